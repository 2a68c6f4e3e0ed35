"""Testing (VideoMAE, section 4.1) and using a model: accuracy, predictions, features, pictures.

    python eval.py --toy                                            # the fine-tuned toy model
    torchrun --nproc_per_node=8 eval.py --ckpt out/finetune/best.pt --data k400_val.tsv
    python eval.py --ckpt out/finetune/best.pt --predict my.mp4 --window 4   # what is in each 4 s
    python eval.py --ckpt out/pretrain/last.pt --knn train.tsv --data val.tsv        # no training
    python eval.py --ckpt out/pretrain/last.pt --features my_videos/   # .npz with time stamps
    python eval.py --ckpt out/pretrain/last.pt --reconstruct my.mp4 --mask_ratio 0.75 0.9 0.95
    python eval.py --ckpt out/finetune/best.pt --attention my.mp4
    python eval.py --plot out/pretrain out/finetune                          # curves.png

--ckpt takes our checkpoints, the paper's released .pth files and Hugging Face folders. Each video
is decoded once for all its views, in a test 5 clips x 3 crops. A video that cannot be read is
listed as failed and counted, never replaced.
"""

import argparse
import csv
import datetime
import functools
import json
import math
import os
import sys
import time

import numpy as np
import torch

import masking
from lib import plot
from lib.attentive import AttentiveClassifier
from lib.features import (attention_rollout, features, heat, neighbours, ridge,
                          window_features)
from lib.probe import joint
from lib.process import (Parser, Process, count, device_flags, folder, inner, positive,
                         random_seed, rate, script_main, whole)
from lib.reconstruct import panels
from lib.views import TestVideos, clip_settings, cut, run_views, say_scores, scores
from model import VideoClassifier
from video import lists, toy
from video.decode import VideoError
from video.pictures import strip, write_png, write_video
from weights import build_model, write_hf

SINGLE = ("predict", "features", "reconstruct", "attention")  # modes that look at single files


def get_args(argv=None) -> argparse.Namespace:
    """The flags; an impossible one ends the program and is named."""
    p = Parser(__doc__)
    flag = argparse.BooleanOptionalAction
    g = p.add_argument_group("what to do, one of these or a multi-view test of --data")
    g = g.add_mutually_exclusive_group()
    g.add_argument("--predict", nargs="+", metavar="FILE",
                   help="classify videos: files, folders or lists")
    g.add_argument("--features", nargs="+", metavar="FILE", help="write a .npz per video")
    g.add_argument("--knn", nargs="+", metavar="TRAIN",
                   help="k-NN and linear accuracy on --data of frozen features")
    g.add_argument("--reconstruct", nargs="+", metavar="FILE",
                   help="draw what a pre-trained model reconstructs")
    g.add_argument("--attention", nargs="+", metavar="FILE",
                   help="draw what a classifier attends to")
    g.add_argument("--export_hf", metavar="DIR",
                   help="write the model for Hugging Face transformers")
    g.add_argument("--plot", nargs="+", metavar="DIR",
                   help="draw the curves of runs, each given by its out_dir")
    g = p.add_argument_group("model")
    g.add_argument("--ckpt", help="ours, a .pth, a Hugging Face folder or hf:owner/model (--toy: "
                                  "finetune.py's)")
    g.add_argument("--classes",
                   help="text file with a class name per line, for checkpoints that have none")
    g = p.add_argument_group("data and views; what is not given is as the model was trained")
    g.add_argument("--data", nargs="+",
                   help="labelled videos to test on: list files, class folders, or the word toy")
    g.add_argument("--data_root", default="", help="goes before relative paths of a list")
    g.add_argument("--num_segments", type=count, help="clips per video (test: 5, otherwise 1)")
    g.add_argument("--num_crops", type=count,
                   help="crops per clip along the longer side (test: 3, otherwise 1)")
    g.add_argument("--num_frames", type=count, help="frames per clip")
    g.add_argument("--sampling_rate", type=count,
                   help="frames from one sampled frame to the next")
    g.add_argument("--fps", type=rate, help="resample to so many frames per second first")
    g.add_argument("--sampling", choices=["dense", "sparse"],
                   help="sparse (SSv2): frames spread over the whole video")
    g.add_argument("--img_size", type=count, help="pixels, height and width of a view")
    g.add_argument("--positions", default="resize", choices=["resize", "new"],
                   help="with other frames or sides: resize the checkpoint's position table, or "
                        "make a new one, as the paper's code does")
    g.add_argument("--antialias", action=flag, help="scale frames antialiased (default: yes); "
                   "--no-antialias: as the paper's code does, for its released weights")
    g = p.add_argument_group("of single modes")
    g.add_argument("--window", type=positive,
                   help="predict: classify every WINDOW seconds of a video by themselves")
    g.add_argument("--hop", type=positive,
                   help="predict, features: seconds between windows (default: no overlap)")
    g.add_argument("--top", type=count, help="predict: names per video (default: 5)")
    g.add_argument("--json", action=flag, default=False,
                   help="predict: print JSON and nothing else")
    g.add_argument("--layer", type=whole,
                   help="features, knn: after so many blocks (default: all, and the final norm)")
    g.add_argument("--pool", action=flag, default=True,
                   help="features: mean over the tokens; --no-pool: all of them")
    g.add_argument("--k", nargs="+", type=count, help="knn: neighbours (default: 20)")
    g.add_argument("--mask_ratio", nargs="+", type=inner,
                   help="reconstruct (default: 0.75 0.9 0.95)")
    g.add_argument("--mp4", action=flag, default=False,
                   help="reconstruct, attention: also write a video")
    g = device_flags(p)
    g.add_argument("--out_dir", default="out/eval", type=folder, help="for what is written")
    g.add_argument("--seed", default=0, type=random_seed, help="of the masks of reconstruct")
    g.add_argument("--batch_size", default=32, type=count, help="views per forward pass and rank")
    g.add_argument("--toy", action="store_true",
                   help="test out/finetune/best.pt on the toy videos; other flags win")
    if p.peek(argv).toy:
        p.preset(ckpt="out/finetune/best.pt")
        if mode_of(p.peek(argv)) in ("test", "knn"):
            p.preset(data=["toy"], num_segments=2)
    args = p.parse_args(argv)
    mode = mode_of(args)
    if not args.ckpt and mode != "plot":
        p.error("--ckpt: which model? expected a checkpoint, or --toy")
    only = dict(window=["predict"], hop=["predict", "features"], json=["predict"],
                layer=["features", "knn"], mp4=["reconstruct", "attention"], top=["predict"],
                k=["knn"], mask_ratio=["reconstruct"])
    for name, modes in only.items():
        value = getattr(args, name)
        if value is not None and value is not False and mode not in modes:
            p.error(f"--{name} goes with --{' or --'.join(modes)}")
    if (args.num_segments or args.num_crops) and mode in SINGLE[1:]:
        p.error("--num_segments and --num_crops go with the test, --predict and --knn")
    if not args.pool and mode != "features":
        p.error("--no-pool goes with --features")
    if args.data and mode not in ("test", "knn"):
        p.error("--data goes with the test and --knn: the other modes are told their files")
    if args.hop and mode == "predict" and not args.window:
        p.error("--hop needs --window")
    if args.positions == "new" and not (args.num_frames or args.img_size):
        p.error("--positions new goes with --num_frames or --img_size: else they are as trained")
    if mode == "test" and not args.data:
        p.error("--data: expected labelled videos to test on, or one of --predict, --features, "
                "--reconstruct, ...")
    if mode == "knn" and not args.data:
        p.error("--data: expected labelled videos to test on")
    return args


def mode_of(args) -> str:
    """What the flags ask for."""
    return next((m for m in (*SINGLE, "knn", "export_hf", "plot") if getattr(args, m)), "test")


# ---- labelled videos, on any number of ranks ----

def judge(model) -> tuple:
    """-> function and join for run_views, which then gives the probabilities (K,) of a video.

    Softmax is averaged over views; an attentive probe sees all clips of a crop at once.
    """
    if isinstance(model, AttentiveClassifier):
        return model.tokens, lambda i, tokens: joint(model, tokens)[0]
    return lambda views: model(views).float().softmax(-1), None


def average_views(args, run, function, videos: TestVideos, num_crops: int, join=None):
    """run_views on all ranks; tells now and then how far it is."""
    start, shown = time.time(), 0.0

    def tell(done, mine):  # videos of this rank
        nonlocal shown
        now = time.time()
        if done == mine or now - shown > (5 if sys.stdout.isatty() else 60):
            shown = now
            left = datetime.timedelta(seconds=round((now - start) / done * (mine - done)))
            run.say(f"{min(done * run.world, len(videos))}/{len(videos)} videos, "
                    f"{done * run.world / (now - start):.1f}/s, {left} left", flush=True)
    return run_views(function, videos, num_crops, run.device, args.batch_size, run.num_workers,
                     run.host_group, tell, join)


def test(args, run, model, classes, clip_args, files):
    """Multi-view accuracy; predictions.csv, result.json and confusions.png in out_dir."""
    paths, names = files["data"]
    labels = np.array(lists.class_ids(names, classes, paths, args.ckpt))
    videos = TestVideos(paths, **clip_args)
    num_crops, (function, join) = args.num_crops or 3, judge(model)
    probs, failed = average_views(args, run, function, videos, num_crops, join)
    if not probs:
        raise ValueError(f"none of the {len(paths)} videos can be read; the first: {failed[0]}")
    p, true = np.stack(list(probs.values())), labels[list(probs)]  # (V, K), (V,)
    result = scores(p, true)
    run.say(f"{len(p)} videos x {videos.num_segments} clips x {num_crops} crops: "
            f"{say_scores(result, len(classes))}")
    if failed:
        run.say(f"{len(failed)} of {len(paths)} videos could not be read; counted as wrong, top-1 "
                f"is {result['top1'] * len(p) / len(paths):.2f}:")
        for why in list(failed.values())[:10]:
            run.say(f"  {why}")
        if len(failed) > 10:
            run.say("  ... (all in predictions.csv)")
    say_confusions(run, true, p.argmax(1), classes)
    if run.rank == 0:
        path = os.path.join(args.out_dir, "predictions.csv")
        write_predictions(path, paths, labels, probs, failed, classes)
        result |= dict(videos=len(p), failed=len(failed), num_segments=videos.num_segments,
                       num_crops=num_crops, ckpt=args.ckpt)
        with open(os.path.join(args.out_dir, "result.json"), "w") as f:
            json.dump(result, f, indent=1)
        run.say(f"per video: {path}")
        path = os.path.join(args.out_dir, "confusions.png")
        try:
            plot.confusions(true, p.argmax(1), classes, path)
            run.say(f"drawn: {path}")
        except ValueError as e:
            run.say(f"confusions.png was not drawn: {e}")


def say_confusions(run, true, guesses, classes):
    """The ten most frequent mistakes."""
    wrong = {}
    for pair in zip(true, guesses):
        if pair[0] != pair[1]:
            wrong[pair] = wrong.get(pair, 0) + 1
    if wrong:
        run.say("most confused: true class -> predicted, videos, share of the class")
    for (label, guess), n in sorted(wrong.items(), key=lambda x: (-x[1], x[0]))[:10]:
        share = 100 * n / (true == label).sum()
        run.say(f"  {classes[label]} -> {classes[guess]}: {n}, {share:.0f} %")


def write_predictions(path: str, paths, labels, probs: dict, failed: dict, classes):
    """A CSV with a row per video, in the list's order."""
    with open(path, "w", newline="", encoding="utf-8") as f:
        rows = csv.writer(f)
        rows.writerow(["path", "label", "predicted", "probability", "probability_of_label",
                       "place_of_label", "top5", "failed"])
        for i, (file, label) in enumerate(zip(paths, labels)):
            if i in failed:
                rows.writerow([file, classes[label], "", "", "", "", "", failed[i]])
                continue
            p, order = probs[i], np.argsort(-probs[i], kind="stable")
            place = int((order == label).argmax()) + 1
            rows.writerow([file, classes[label], classes[order[0]], f"{p[order[0]]:.6f}",
                           f"{p[label]:.6f}", place, " | ".join(classes[c] for c in order[:5]), ""])


def knn(args, run, model, classes, clip_args, files):
    """Accuracy of nearest neighbours among frozen training features, and of a linear map."""
    (train, names), (val, val_names) = files["knn"], files["data"]
    classes, known = lists.class_names([name for name in names if name]), " ".join(args.knn)
    parts = [(train, lists.class_ids(names, classes, train, known)),
             (val, lists.class_ids(val_names, classes, val, known))]
    sets = []
    for paths, labels in parts:
        videos = TestVideos(paths, **clip_args)
        found, failed = average_views(args, run, lambda x: features(model, x, args.layer), videos,
                                      args.num_crops or 1)
        if failed:
            run.say(f"{len(failed)} of {len(paths)} videos could not be read and are left out, the "
                    f"first: {next(iter(failed.values()))}")
        if not found:
            raise ValueError(f"none of {len(paths)} videos can be read")
        sets.append((np.stack(list(found.values())), np.array(labels)[list(found)]))
    (x, y), (test_x, test_y) = sets
    common = 100 * (test_y == np.bincount(y).argmax()).mean()
    run.say(f"{len(y)} training and {len(test_y)} test videos, {len(classes)} classes; always "
            f"saying the most common one of training would get {common:.1f} %")
    answers = {}
    for k in args.k or [20]:
        k = min(k, len(y))
        answers[f"k-NN, k = {k}"] = neighbours(x, y, test_x, k, len(classes))
    answers["linear map by ridge regression"] = ridge(x.astype(np.float64), y, test_x, len(classes))
    for name, votes in answers.items():
        result = scores(votes, test_y)
        run.say(f"{name}: top-1 {result['top1']:.2f}, "
                f"mean per-class accuracy {result['per_class']:.2f}")


# ---- single files ----

def predict(args, run, model, classes, clip_args, files):
    """Prints and writes names and probabilities of each file, or of each window of it."""
    paths, _ = files["predict"]
    videos, (function, join) = TestVideos(paths, **clip_args), judge(model)
    results = []
    for path in paths:
        run.say(path)
        try:
            with videos.open(path) as video:
                seconds, windows = video.times[-1] - video.times[0], [(0.0, math.inf)]
                if args.window:
                    windows = windows_of(seconds, args.window, args.hop or args.window)
                for start, end in windows:
                    frames, index = videos.clips(video, start, end)
                    views = cut(frames.to(run.device), index.to(run.device), videos.img_size,
                                args.num_crops or 1)
                    out = torch.cat([function(v) for v in views.split(args.batch_size)])
                    p = out.mean(0) if join is None else (
                        torch.from_numpy(join(0, out.unflatten(0, (len(index), -1)))))
                    best = p.topk(min(args.top or 5, len(classes)))
                    names = [dict(name=classes[i], probability=round(p, 6))
                             for i, p in zip(best.indices.tolist(), best.values.tolist())]
                    when, line = {}, "  "
                    if args.window:
                        when = dict(start=round(start, 3), end=round(min(end, seconds), 3))
                        line += f"{when['start']:.2f} to {when['end']:.2f} s: "
                    results.append(dict(path=path, **when, classes=names))
                    run.say(line + ", ".join(f"{n['name']} {100 * n['probability']:.1f} %"
                                             for n in names))
        except VideoError as e:
            results.append(dict(path=path, failed=str(e)))
            run.say(f"  failed: {e}")
    if args.json:
        print(json.dumps(results, indent=1))
    path = os.path.join(args.out_dir, "predicted.csv")
    with open(path, "w", newline="", encoding="utf-8") as f:
        rows = csv.writer(f)
        rows.writerow(["path", "start", "end", "place", "class", "probability", "failed"])
        for r in results:
            where = r["path"], r.get("start", ""), r.get("end", "")
            rows.writerows([*where, i, n["name"], n["probability"], ""]
                           for i, n in enumerate(r.get("classes", []), 1))
            rows.writerows([[*where, "", "", "", r["failed"]]] if "failed" in r else [])
    run.say(f"as a table: {path}")
    return 1 if any("failed" in r for r in results) else 0


def windows_of(seconds: float, window: float, hop: float) -> list[tuple[float, float]]:
    """(start, end) in seconds of the windows of a video; the last goes on to the video's end.

    One that would hold less than half a window is left out.
    """
    starts = [s for s in np.arange(0, max(seconds, 1e-9), hop).tolist()
              if seconds - s >= window / 2] or [0.0]
    windows = [(start, start + window) for start in starts]
    if seconds - starts[-1] < 1.5 * window:
        windows[-1] = starts[-1], math.inf
    return windows


def file_stem(args, number: int, path: str) -> str:
    """Where what belongs to a file is written, without an ending."""
    name = os.path.splitext(os.path.basename(path))[0]
    return os.path.join(args.out_dir, f"{number:05d}_{name}")


def write_features(args, run, model, classes, clip_args, files):
    """<out_dir>/<number>_<name>.npz with features, start and end in seconds of each window."""
    paths, _ = files["features"]
    videos, bad = TestVideos(paths, **clip_args), 0
    for number, path in enumerate(paths):
        try:
            with videos.open(path) as video:
                found, start, end = window_features(model, video, videos, args.hop, run.device,
                                                    args.batch_size, args.layer, args.pool)
        except VideoError as e:
            bad += 1
            run.say(f"failed: {e}")
            continue
        name = file_stem(args, number, path) + ".npz"
        np.savez(name, features=found, start=start, end=end, path=path, grid=np.array(model.grid))
        run.say(f"{name}: {found.shape[0]} windows x {' x '.join(map(str, found.shape[1:]))}, "
                f"{start[0]:.2f} to {end[-1]:.2f} s")
    return 1 if bad else 0


def draw(args, run, model, classes, clip_args, files):
    """--reconstruct and --attention: a PNG per file, with --mp4 a video too."""
    look = attention_rows if args.attention else reconstruction_rows
    paths, _ = files[mode_of(args)]
    videos, bad = TestVideos(paths, **clip_args), 0
    for number, path in enumerate(paths):
        try:
            with videos.open(path) as video:
                clip = cut(*videos.clips(video), videos.img_size, 1)  # (1, T, H, W, C)
        except VideoError as e:
            bad += 1
            run.say(f"failed: {e}")
            continue
        rows = look(args, run, model, classes, path, clip.to(run.device))  # label, (T, H, W, 3)
        name = file_stem(args, number, path) + ("_attention" if args.attention else "_reconstruct")
        write_png(name + ".png", np.concatenate([strip(v, label) for label, v in rows]))
        if args.mp4:
            zoom = max(1, 224 // rows[0][1].shape[1])
            side = np.concatenate([v.repeat(zoom, 1).repeat(zoom, 2) for _, v in rows], 2)
            h, w = side.shape[1] // 2 * 2, side.shape[2] // 2 * 2
            write_video(name + ".mp4", side[:, :h, :w], fps=8)
        run.say(f"{name}.png{' and .mp4, the panels from left to right' if args.mp4 else ''}: "
                + ", ".join(label for label, _ in rows))
    return 1 if bad else 0


def attention_rows(args, run, model, classes, path, clip) -> list:
    """The clip, and what the classifier attends to laid over it."""
    share, logits, frames = attention_rollout(model, clip), model(clip), clip[0].cpu().numpy()
    run.say(f"{path}: {classes[int(logits[0].argmax())]}; the cubes' shares are {share.min():.2f} "
            f"to {share.max():.2f} times the average")
    return [("input", frames),
            ("attention rollout, blue low, red high", heat(share[0], frames))]


def reconstruction_rows(args, run, model, classes, path, clip) -> list:
    """The clip, and for each mask ratio what is masked and predicted."""
    rows = []
    for ratio in args.mask_ratio or [0.75, 0.9, 0.95]:
        generator = torch.Generator().manual_seed(args.seed)
        mask = masking.make_mask("tube", 1, model.grid, ratio, generator).to(run.device)
        loss, shown = panels(model, clip, mask)
        shown = [(label, frames[0]) for label, frames in shown]
        rows += shown[1:] if rows else shown  # the input once
        run.say(f"{path}: mask ratio {ratio:g}, loss {loss:.4f}")
    return rows


# ---- the command line ----

def check_model(args, model, about) -> list[str] | None:
    """The class names; ValueError where this model cannot do what the flags ask for."""
    mode, classes, probed = mode_of(args), about["classes"], isinstance(model, AttentiveClassifier)
    classifier = probed or isinstance(model, VideoClassifier)
    if args.classes:
        with open(args.classes, encoding="utf-8") as f:
            classes = [line.strip() for line in f if line.strip()]
    if about["detector"] and mode not in ("features", "knn"):
        raise ValueError(f"{args.ckpt}: a detection checkpoint, which detect_ava.py --ckpt takes; "
                         "here expected --features or --knn, of its encoder")
    if classifier:
        outputs = model.config["num_classes"]
        classes = classes or [str(i) for i in range(outputs)]
        if len(classes) != outputs:
            raise ValueError(f"{args.classes or args.ckpt}: {len(classes)} class names, the model "
                             f"has {outputs} classes")
    elif mode in ("test", "predict", "attention"):
        raise ValueError(f"{args.ckpt}: it has no fc_norm and head, which classify; expected a "
                         "fine-tuned one, or --knn, --features, --reconstruct or --export_hf")
    if probed and mode in ("attention", "export_hf"):
        raise ValueError(f"{args.ckpt}: an attentive probe; expected a classifier that averages "
                         f"its tokens for --{mode}")
    alone = not classifier and model.decoder is None
    if mode == "reconstruct" and (classifier or alone):
        raise ValueError(f"{args.ckpt}: it has no decoder; expected a checkpoint of masked "
                         "pre-training")
    if mode == "export_hf" and alone:
        raise ValueError(f"{args.ckpt}: it has no decoder; expected a checkpoint of masked "
                         "pre-training, or a classifier")
    blocks = len(getattr(model, "encoder", model).blocks)
    if args.layer is not None and args.layer > blocks:
        raise ValueError(f"--layer {args.layer}: expected 0 to {blocks}, the blocks of this model")
    return classes


def read_files(run, args, name: str, sources: list, folders: bool) -> tuple:
    """-> paths and labels of the videos that a flag names; see Process.videos.

    Of several single files and folders one may be wrong: it is said, and stands for a video that
    will fail. ValueError where all are.
    """
    read = functools.partial(run.videos, data_root=args.data_root, folders=folders,
                             toy=f"toy/{'train' * (name == 'knn') or 'val'}")
    if name not in SINGLE:
        return read(sources)
    paths, wrong, why = [], [], []
    for source in sources:
        try:
            paths += read([source])[0]
        except ValueError as e:
            wrong.append(source)
            why.append(str(e))
    if len(wrong) == len(sources):
        raise ValueError("\n".join(why))
    for line in why:
        run.say(line)
    return paths + wrong, None


def main():
    args = get_args()
    mode = mode_of(args)
    if mode == "plot":
        os.makedirs(args.out_dir, exist_ok=True)
        path = os.path.join(args.out_dir, "curves.png")
        print(*plot.curves(args.plot, path), path, sep="\n")
        return
    run = Process(args, host_only=True, quiet=args.json)
    if mode not in ("test", "knn") and run.world > 1:
        raise ValueError("only the test and --knn run on several ranks: leave out torchrun")

    # ---- videos: looked for before a model is loaded
    sources = dict(data=args.data, knn=args.knn, predict=args.predict, features=args.features,
                   reconstruct=args.reconstruct, attention=args.attention)
    sources = {name: some for name, some in sources.items() if some}
    if any("toy" in some for some in sources.values()):
        run.once(toy.make_toy, log=run.say)
    read = lambda folders: {name: read_files(run, args, name, some, folders)
                            for name, some in sources.items()}
    files = read(args.num_frames != 1)

    # ---- model: weights, class names, and how its clips were sampled
    img_size = (args.img_size, args.img_size) if args.img_size else None
    model, about = build_model(args.ckpt, args.num_frames, img_size,
                               run.rank == 0 and not args.json, args.positions)
    model.to(run.device)
    classes = check_model(args, model, about)
    if model.config["num_frames"] == 1 and any(lists.say_folders(x) for x, _ in files.values()):
        run.say("a model of single frames: each picture that is found in a folder is by itself")
        files = read(False)
    clip_args = clip_settings(model, about, sampling_rate=args.sampling_rate, fps=args.fps,
                              sampling=args.sampling, antialias=args.antialias)
    clip_args["num_segments"] = args.num_segments or 1
    if mode == "test" and not args.num_segments:
        clip_args["num_segments"] = about["args"].get("num_segments", 5)  # an attentive probe's own
    kind = "without classes"
    if "num_classes" in model.config:
        kind = f"classifier of {len(classes)} classes"
    shape = "x".join(map(str, (clip_args["num_frames"], *clip_args["img_size"])))
    rate = f" every {clip_args['stride']} frames" if clip_args["sampling"] == "dense" else ""
    fps = f" of {clip_args['fps']:g} fps" if clip_args["fps"] else ""
    plain = "" if clip_args["antialias"] else ", not antialiased"
    run.say(f"{about['size']} {kind}, clips of {shape}, {clip_args['sampling']}{rate}{fps}{plain}")

    if mode == "export_hf":
        kind = write_hf(args.export_hf, model, classes)
        files = " and ".join(sorted(os.listdir(args.export_hf)))
        run.say(f"{args.export_hf}: {kind}, {files}")
        return run.close()
    os.makedirs(args.out_dir, exist_ok=True)
    do = dict(test=test, knn=knn, predict=predict, features=write_features, reconstruct=draw,
              attention=draw)[mode]
    with run.autocast, torch.no_grad():
        status = do(args, run, model, classes, clip_args, files)
    run.close()
    return status


if __name__ == "__main__":
    script_main(main)
