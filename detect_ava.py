"""Spatio-temporal action detection on AVA (VideoMAE, arXiv 2203.12602, appendix): frame mAP.

    python detect_ava.py --toy                  # laptop CPU: minutes, on movies it writes itself
    torchrun --nproc_per_node=8 detect_ava.py --init out/pretrain/last.pt --data_root movies/ \\
        --data ava_train_v2.2.csv --val_data ava_val_v2.2.csv \\
        --label_map ava_action_list_v2.2.pbtxt --val_boxes person_boxes_val.csv \\
        --score_map ava_action_list_v2.2_for_activitynet_2019.pbtxt
    python detect_ava.py --ckpt out/detect/last.pt --val_data ava_val_v2.2.csv --val_boxes ...
    python detect_ava.py --score detections.csv --val_data ava_val_v2.2.csv --label_map ...
    python detect_ava.py --ckpt out/detect/last.pt --video my.mp4 --boxes boxes.csv  # --full_frame

Clips are read from the movies by time stamp. Trained on annotated boxes, tested on those of a
person detector. <out_dir>/detections.csv is in AVA's format, which --score takes from anybody;
log.jsonl has the curves; last.pt goes on with the same command.
"""

import argparse
import datetime
import math
import time
import zlib

import numpy as np
import torch
import torch.nn.functional as F

from ava import files
from ava.clips import TestFrames, TrainFrames, clip_seconds, read_test_boxes, with_movies
from ava.detector import NORMS, Detector, detect, load_detector, to_rows
from ava.movie import detect_movie
from ava.score import report
from lib.cubes import to_unit
from lib.optim import lr_at, param_groups
from lib.process import (Parser, Process, amount, count, fraction, optim_flags, portion,
                         positive, rate, run_flags, script_main, share, whole)
from lib.run import Run
from model import SIZES, count_params
from video import augment, lists, toy
from weights import encoder_shape, load_pretrained, read_weights

# flags that a run may change when it goes on, as they say nothing of its training
OF_TEST = ("val_boxes", "val_excluded", "excluded", "label_map", "score_map", "box_score",
           "movie_list", "protocol", "show", "boxes", "full_frame", "video", "ckpt", "score")


def get_args(argv=None):
    """The flags; an impossible one ends the program and is named."""
    p = Parser(__doc__)
    flag = argparse.BooleanOptionalAction
    g = p.add_argument_group("what to do, if not to train")
    g.add_argument("--ckpt", help="detect with this checkpoint on --val_data or --video")
    g.add_argument("--score", nargs="+", metavar="CSV",
                   help="score detection files against --val_data, nothing else")
    g.add_argument("--video", help="with --ckpt: detect on this movie, write a CSV and the movie "
                                   "with boxes drawn")
    g = p.add_argument_group("data")
    g.add_argument("--data", nargs="+", default=["toy"],
                   help="annotation CSVs to train on, or the word toy")
    g.add_argument("--val_data", nargs="+", help="annotation CSVs to test on (toy: its own)")
    g.add_argument("--data_root", default="", help="folder of the movies, files <video>.<ending>")
    g.add_argument("--label_map",
                   help="pbtxt of the classes, one output each (default: the ids in --data)")
    g.add_argument("--score_map",
                   help="pbtxt of the classes that are scored (default: all; AVA: 60 of 80)")
    g.add_argument("--excluded", help="CSV of time stamps that are left out of training")
    g.add_argument("--val_excluded", help="CSV of time stamps that are left out of the test")
    g.add_argument("--val_boxes", help="person boxes to test on, CSV or AIA's JSON "
                                       "(default: the annotated ones)")
    g.add_argument("--boxes", help="with --video: CSV of person boxes")
    g.add_argument("--full_frame", action="store_true",
                   help="with --video: the whole frame as the box of every second")
    g.add_argument("--movie_list", help="for JSON boxes: movie names in their order, or AIA's "
                                        "annotation JSON")
    g.add_argument("--box_score", default=0.8, type=share,
                   help="person boxes below this score are left out")
    g.add_argument("--movie_start", default=0.0, type=amount,
                   help="the second at which files begin (15-min cuts: 900)")
    g = p.add_argument_group("clips")
    g.add_argument("--num_frames", type=count,
                   help="frames per clip (default: those of --init, else 16)")
    g.add_argument("--sampling_rate", type=count,
                   help="frames of --fps from one to the next of a clip (default: 4)")
    g.add_argument("--fps", type=rate,
                   help="the clock of sampling_rate, whatever a file's rate (default: 25)")
    g.add_argument("--img_size", nargs="+", type=count, metavar="PIXELS",
                   help="training crop: side, or height and width (default: --init's, else 224)")
    g.add_argument("--short_side", type=count,
                   help="pixels to which a frame's short side is scaled (default: 256)")
    g.add_argument("--jitter", action=flag, default=True, help="training: move the ends of boxes")
    g.add_argument("--flip", action=flag, default=True,
                   help="training: mirror half the clips (no sided labels)")
    g.add_argument("--color_jitter", nargs=3, default=[10, 26, 26], type=amount,
                   metavar=("H", "S", "V"), help="training: largest shift of hue (of 180), "
                   "saturation and value (of 255); 0 0 0 = off")
    g = p.add_argument_group("model")
    g.add_argument("--init", help="start from these weights: pre-trained, fine-tuned or of "
                                  "detection, any known layout")
    g.add_argument("--positions", default="resize", choices=["resize", "new"],
                   help="with other frames or sides than --init's: resize its position table, or "
                        "make a new one, as the paper's code does")
    g.add_argument("--size", choices=list(SIZES), help="(default: --init's, else base)")
    g.add_argument("--patch_size", type=count,
                   help="pixels (default: --init's, else 16, giant: 14)")
    g.add_argument("--tubelet_size", type=count, help="frames per cube (default: --init's, else 2)")
    g.add_argument("--norm", choices=list(NORMS), help="mean and std of the input: ImageNet's, as "
                   "in pre-training, or the paper's detection code's (default: those of a "
                   "detection checkpoint, which are the latter in the paper's; else imagenet)")
    g.add_argument("--aligned", action=flag, default=False,
                   help="RoIAlign with the half-cell shift")
    g.add_argument("--drop_path", default=0.2, type=fraction,
                   help="stochastic depth of the last block")
    g.add_argument("--checkpointing", action=flag, default=False,
                   help="recompute activations: less memory, slower")
    g.add_argument("--freeze", default=0, type=whole,
                   help="keep the patch embedding and the first N blocks as they are")
    g = optim_flags(p, "key frames", batch_size=16, epochs=30, warmup_epochs=5, lr=2.5e-4,
                    min_lr=1e-6, weight_decay=0.05)
    g.add_argument("--layer_decay", type=portion, help="factor on the learning rate per block "
                   "down (default: .75, from scratch 1)")
    g = p.add_argument_group("scoring, drawing")
    g.add_argument("--protocol", default="paper", choices=["paper", "activitynet"],
                   help="activitynet: at most 50 rows per frame, frames without annotation do "
                        "not count")
    g.add_argument("--show", default=0.3, type=share,
                   help="video: least score of a class that is drawn")
    g = run_flags(p, out_dir="out/detect")
    g.add_argument("--eval_every", type=positive,
                   help="epochs between tests on --val_data (default: one at the end)")
    if p.peek(argv).toy:
        p.preset(size="tiny", img_size=[64], short_side=64, patch_size=8, num_frames=8,
                 sampling_rate=6, drop_path=0.0, flip=False, epochs=12, warmup_epochs=1, lr=0.016,
                 log_every=40)
    args = p.parse_args(argv)
    only_test = args.score or args.ckpt
    if args.img_size and len(args.img_size) > 2:
        sides = " ".join(map(str, args.img_size))
        p.error(f"--img_size {sides}: expected a side, or height and width")
    if args.video and not args.ckpt:
        p.error("--video needs --ckpt")
    if bool(args.boxes) + args.full_frame != bool(args.video):
        p.error("--video goes with --boxes or --full_frame, and they with it: who is looked at?")
    if args.score and (args.ckpt or args.init):
        p.error("--score needs no model: leave out --ckpt and --init")
    if args.positions == "new" and not args.init:
        p.error("--positions new goes with --init: from scratch they are new, --ckpt has its own")
    if args.ckpt and args.init:
        p.error("--ckpt tests, --init trains: only one of them")
    if only_test and not (args.val_data or args.video or args.toy):
        p.error("--val_data: expected the annotation CSVs to test on")
    if any("toy" in x and len(x) > 1 for x in (args.data, args.val_data or [])):
        p.error("the word toy stands alone")
    if not only_test and args.val_data and (args.data == ["toy"]) != (args.val_data == ["toy"]):
        p.error("--data and --val_data: both are the toy movies, or neither")
    return args


def main():
    args = get_args()
    run = Process(args) if args.score else Run(args)
    if run.world > 1 and (args.score or args.video):
        raise ValueError("only training and detection on --val_data run on several ranks: "
                         "leave out torchrun")
    training = not (args.score or args.ckpt)

    # ---- annotations
    with_toy = "toy" in (args.data if training or args.toy else []) + (args.val_data or [])
    if with_toy:
        run.once(toy.make_toy_movies, log=run.say)
    toy_file = lambda given, name: f"toy_ava/{name}" if with_toy and not given else given
    data_root = toy_file(args.data_root, "movies") or "."
    paths = lambda given, part: [f"toy_ava/{part}.csv" if f == "toy" else f for f in given]
    train_files = paths(args.data, "train") if training else []
    val_files = paths(args.val_data or ["toy"] * with_toy, "val")
    val_name = " ".join(val_files)
    train = files.read_truth(train_files) if training else None
    truth = files.read_truth(val_files) if val_files else None
    excluded, val_excluded = map(files.read_excluded, (args.excluded, args.val_excluded))
    label_map = args.label_map if args.ckpt else toy_file(args.label_map, "label_map.pbtxt")
    names = files.read_label_map(label_map) if label_map else None  # {class id: name}
    about = {}  # the arguments that weights come with: their clips' are the defaults
    if args.ckpt:
        model, names, about = load_detector(args.ckpt, names, args.norm)
        if not (about or args.norm):
            run.say(f"{args.ckpt} does not tell mean and std of its input: taken as --norm "
                    "reference")
    if names is None:
        ids = np.unique(np.concatenate([rows.id for rows in (train, truth) if rows]))
        names = {c: str(c) for c in ids.tolist()}
    class_ids = list(names)
    scored = files.read_label_map(args.score_map) if args.score_map else names
    check_scored(args, scored, names, truth, val_name)
    if args.score:
        run.say(f"{val_name}: {files.count_rows(truth, val_excluded, class_ids)}")
        parts = [files.read_detections(path) for path in args.score]
        found, start = files.merge_rows(parts, args.score, "detections"), time.time()
        report(truth, found, scored, val_excluded, args.protocol, run.say)
        run.say(f"{len(found.frame)} detections in {len(found.keys)} frames, "
                f"scored in {time.time() - start:.1f} s")
        return 0

    # ---- model: shaped as --init is where the flags do not say otherwise
    if training:
        if args.init:
            init = read_weights(args.init)[2]
            if init["detector"]:  # its head is for its input
                about = init["args"]
        shape = encoder_shape(args.init, size=args.size, num_frames=args.num_frames,
                              img_size=args.img_size and tuple(args.img_size * 2)[:2],
                              patch_size=args.patch_size, tubelet_size=args.tubelet_size)
        shape |= NORMS.get(args.norm, {})
        model = Detector(len(names), args.aligned, drop_path=args.drop_path,
                         checkpointing=args.checkpointing, **shape)
        if args.freeze > len(model.blocks):
            raise ValueError(f"--freeze {args.freeze}: expected at most the {len(model.blocks)} "
                             f"blocks of {shape['size']}")
    elif not args.toy:
        for name in ("num_frames", "img_size", "size", "patch_size", "tubelet_size"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name}: is that of --ckpt; leave it out")
    rate = args.sampling_rate or about.get("sampling_rate") or 4
    fps = args.fps or about.get("fps") or 25.0
    short_side = args.short_side or about.get("short_side") or 256
    seconds = clip_seconds(model.config["num_frames"], rate, fps)
    if args.video:
        return detect_movie(run, args, model, names, seconds, short_side)

    # ---- key frames, of the movies that are there
    val_frames = []
    if truth:
        val_boxes = toy_file(args.val_boxes, "val_boxes.csv")
        val_frames = frames_to_test(run, args, truth, val_name, val_excluded, class_ids,
                                    val_boxes, data_root)
    val_set = TestFrames(val_frames, seconds, short_side, args.movie_start)

    def test(progress: bool):
        return run_test(run, args, model, val_set, class_ids, truth, scored, val_excluded, progress)
    if args.ckpt:
        model.to(run.device)
        failed = test(True)[1]
        run.close()
        return 1 if failed else 0

    run.say(f"training, {' '.join(train_files)}: {files.count_rows(train, excluded, class_ids)}")
    frames = with_movies(train, excluded, class_ids, data_root, "training",
                         "their key frames are left out", run.say)
    run.plan(len(frames), whole="key frames")
    shares_loss = look_at(run, args, frames, val_frames, list(names.values()))
    crop = shape["img_size"]
    if short_side < min(crop):
        run.say(f"--short_side {short_side} is less than the crop's {min(crop)}: "
                "frames are scaled to fit it")
    train_set = TrainFrames(frames, seconds, crop, short_side, args.movie_start, args.jitter,
                            args.flip, args.color_jitter, args.seed)

    # ---- the run in out_dir goes on if it is this one
    content = b"".join(f"{f.video} {f.second}".encode() + f.boxes.tobytes() + f.labels.tobytes()
                       for f in frames)
    saved = run.resume(
        model.config, list(names.values()), may_change=OF_TEST, parts=dict(best=float, tested=int),
        sampling_rate=rate, fps=fps, short_side=short_side,
        frames=f"{len(frames)} ({zlib.crc32(content):08x})")
    best, tested = -1.0, 0  # mAP, and the step of the last test
    if saved:
        model.restore(saved["config"])
        best, tested = saved["best"], saved["tested"]
    elif args.init:
        load_pretrained(model, args.init, run.rank == 0, args.positions)

    # ---- optimiser
    frozen = ["patch_embed."] * bool(args.freeze) + [f"blocks.{i}." for i in range(args.freeze)]
    for name, param in model.named_parameters():
        param.requires_grad = not name.startswith(tuple(frozen))
    layer_decay = args.layer_decay or (0.75 if args.init else 1.0)
    groups = param_groups(model, args.weight_decay, layer_decay)
    trained = sum(p.numel() for group in groups for p in group["params"])
    optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.999), fused=run.fused)
    net = run.start(model, optimizer, train_set)
    clip_shape = "x".join(map(str, (shape["num_frames"], *crop)))
    run.say(f"{shape['size']} with {count_params(model) / 1e6:.1f} M parameters "
            f"({trained / 1e6:.3g} M trained), clips of {clip_shape}, layer decay {layer_decay:g}; "
            f"{run.summary('key frames')}")

    def state() -> dict:
        return dict(model=model.state_dict(), config=model.config | dict(class_ids=class_ids),
                    classes=list(names.values()), best=best, tested=tested)

    def validate():
        """Tests, logs, keeps the best weights. All ranks take part."""
        nonlocal best, tested
        run.save(**state())  # what was trained is not lost if the test fails or takes long
        run.say(f"test at step {run.step}:")
        model.eval()
        result, failed = test(False)
        model.train()
        tested = run.step
        if run.rank == 0:
            for i, why in failed.items():
                run.note_bad(val_frames[i].path, why)
            run.write_row(dict(step=run.step, map=100 * result["map"], val_frames=len(val_frames),
                               val_failed=len(failed), epoch=run.epoch(run.step)))
            if result["map"] > best:
                best = result["map"]
                run.write("best.pt", **state())

    # ---- loop
    passed = lambda step: int(run.epoch(step) / (args.eval_every or math.inf))  # tests due so far
    missed = passed(run.step) > passed(tested) or tested < run.step == run.total_steps
    if val_frames and missed:  # the run was stopped before this one
        validate()
        run.save(**state())
    for step in run.steps():
        lr = lr_at(step, run.lr, run.min_lr, run.warmup_steps, run.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for _, (video, boxes, labels, counts, shift) in run.batches():
            # video (B, T, H, W, C) uint8; boxes (R, 4) in its pixels; labels (R, K)
            index = torch.repeat_interleave(counts, output_size=len(boxes))  # (R,): their clips
            if any(args.color_jitter):
                video = augment.hsv_shift(to_unit(video), shift)
            for x in (boxes, index) if args.compile else ():  # as many as the clips have
                torch._dynamo.maybe_mark_dynamic(x, 0)
            with run.autocast:
                logits = net(video, boxes, index)  # (R, K)
            # every box counts alike, whatever rank or batch it is in; AdamW does not mind the scale
            loss = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none")
            loss = loss.mean(1).sum()
            run.scaler.scale(loss / len(video) / run.accum_steps).backward()
            run.add(len(boxes), loss=loss)
        run.update(args.clip_grad)

        if run.due(args.log_every):
            run.log("loss {loss:.4f} (class shares {class_shares:.4f})", class_shares=shares_loss)
        due = run.step == run.total_steps or passed(run.step) > passed(step)
        if val_frames and due and not (run.stopping or run.failure):
            with run.paused():
                validate()
        if run.due_to_save():
            run.save(**state())
    if val_frames and run.done and not run.stopping:
        run.say(f"best mAP {100 * best:.2f} in {run.path('best.pt')}, "
                f"the last weights in {run.checkpoint}")
    return run.end()


def check_scored(args, scored: dict, names: dict, truth, truth_name: str):
    """ValueError where scored classes are none of the model, or none of the annotation."""
    for c, name in toy.TOY_NAMES.items() if args.ckpt and truth_name == "toy_ava/val.csv" else ():
        if names.get(c, name) != name:
            raise ValueError(f"{args.ckpt}: its class {c} is {names[c]!r}, the toy movies' "
                             f"{name!r}; expected --val_data of its own classes")
    named = [f"{c} ({name})" for c, name in scored.items()]
    new = [text for text, c in zip(named, scored) if c not in names]
    if new and not args.score:
        raise ValueError(f"{args.score_map}: {len(new)} classes are not among the {len(names)} "
                         f"that the model has: {', '.join(new[:5])}")
    if truth and not np.isin(truth.id, list(scored)).any():
        raise ValueError(f"{truth_name}: no true box of a scored class; these are "
                         f"{', '.join(named[:5])}")


def frames_to_test(run, args, truth, name: str, excluded: set, class_ids: list,
                   boxes: str | None, data_root: str) -> list:
    """The key frames of an annotation, called `name`, with the boxes of a file or its own."""
    run.say(f"test, {name}: {files.count_rows(truth, excluded, class_ids)}")
    rows = truth
    if boxes:
        rows = read_test_boxes(boxes, truth, name, data_root, args.movie_list, args.box_score,
                               run.say)
    else:
        run.say("no --val_boxes: tested on the annotated boxes, which flatters: "
                "published figures are on detected ones")
    return with_movies(rows, excluded, None, data_root, "test",
                       "no detections there, their boxes count as missed", run.say)


def look_at(run, args, frames: list, val_frames: list, names: list) -> float:
    """Says what is odd in the key frames; -> the loss of always saying the class shares."""
    both = sorted({f.video for f in frames} & {f.video for f in val_frames})
    if both:
        run.say(f"{len(both)} movies are trained and tested on ({both[0]}): the test says little")
    share = np.concatenate([f.labels for f in frames]).mean(0).clip(1e-9, 1 - 1e-9)
    absent = [name for name, n in zip(names, share) if n <= 1e-9]
    if absent:
        run.say(f"{len(absent)} classes have no training box: "
                f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}")
    sided = lists.sided(names)
    if args.flip and sided:
        run.say(f"--flip mirrors the clips, but {len(sided)} classes name a side ({sided[0]}): "
                "--no-flip?")
    return -(share * np.log(share) + (1 - share) * np.log(1 - share)).mean()


def run_test(run, args, model, videos: TestFrames, class_ids: list, truth, scored: dict,
             excluded: set, progress: bool):
    """Detects on the test frames, writes detections.csv, prints the table.

    -> (rank 0: what frame_map gives, others: None), {index of a key frame that failed: why}.
    """
    frames, start = videos.frames, time.time()
    shown = [start]

    def tell(done, of):
        now = time.time()
        if progress and now - shown[0] > 30:
            shown[0] = now
            left = datetime.timedelta(seconds=round((now - start) / done * (of - done)))
            run.say(f"{done}/{of} groups of key frames, {left} left", flush=True)
    probs, failed = detect(run, model, videos, args.batch_size, tell)
    for why in list(failed.values())[:10]:
        run.say(f"failed: {why}")
    if failed:
        run.say(f"{len(failed)} of {len(frames)} key frames could not be read: no detections there")
    if not probs:
        raise ValueError(f"none of the {len(frames)} key frames can be read: {failed[0]}")
    if run.rank != 0:
        return None, failed
    found, path = to_rows(frames, probs, class_ids), run.path("detections.csv")
    files.write_detections(path, found)
    result = report(truth, found, scored, excluded, args.protocol, run.say)
    run.say(f"{len(probs)} key frames, {len(found.frame)} rows in {path}, "
            f"{time.time() - start:.0f} s", flush=True)
    return result, failed


if __name__ == "__main__":
    script_main(main)
