"""Testing and using a model: multi-view accuracy, prediction, features, k-NN, pictures, export (VideoMAE, section 4.1).

    python eval.py --toy                                                            # the fine-tuned toy model
    torchrun --nproc_per_node=8 eval.py --ckpt out/finetune/best.pt --data k400_val.tsv --num_segments 5 --num_crops 3
    python eval.py --ckpt out/finetune/best.pt --predict my.mp4 --window 4          # what happens in each 4 s
    python eval.py --ckpt out/pretrain/last.pt --knn train.tsv --data val.tsv       # pre-trained features, no training
    python eval.py --ckpt out/pretrain/last.pt --features my_videos/                # .npz per video, with time stamps
    python eval.py --ckpt out/pretrain/last.pt --reconstruct my.mp4 --mask_ratio 0.75 0.9 0.95
    python eval.py --ckpt out/finetune/best.pt --attention my.mp4

--ckpt takes our checkpoints, the paper's released .pth files and Hugging Face folders. Each video is decoded once for
all its views. A video that cannot be read is listed as failed and counted, never replaced.
"""

import argparse
import csv
import datetime
import json
import math
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import masking
from model import Encoder, VideoClassifier, VideoMAE, best_dtype
from weights import build_model, to_hf

# ---- views: which frames, which crops ----

def view_indices(n: int, num_frames: int, stride: int, sampling: str, num_segments: int) -> np.ndarray:
    """(num_segments, num_frames) frame indices of the test clips of a video of n frames.

    Dense: the frames 0, stride, 2*stride, ... (the last repeated up to num_frames), clip k of K starting at
    int(k * (their number - num_frames) / (K - 1)), a single clip in the middle. Sparse: a tick is n/num_frames frames,
    clip k starts k/K of a tick later (SSv2: K = 2).
    """
    k = np.arange(num_segments)[:, None]
    if sampling == "sparse":
        tick = n / num_frames
        return np.minimum((tick * k / num_segments + tick * np.arange(num_frames)).astype(int), n - 1)
    strided = np.arange(0, n, stride)
    spare = max(len(strided) - num_frames, 0)
    start = (k * (spare / (num_segments - 1))).astype(int) if num_segments > 1 else np.array([[spare // 2]])
    return strided[np.minimum(start + np.arange(num_frames), len(strided) - 1)]


def cut(frames: torch.Tensor, index: torch.Tensor, size: tuple, num_crops: int) -> torch.Tensor:
    """frames (U, h, w, C), index (S, T) into them -> views (S * num_crops, T, H, W, C), clip by clip.

    num_crops windows of `size` at equal distances along the longer side, centred along the other; one is the centre.
    """
    (h, w), (H, W) = frames.shape[1:3], size
    views = []
    for clip in index:
        x = frames[clip]  # (T, h, w, C)
        for k in range(num_crops):
            along = k / (num_crops - 1) if num_crops > 1 else 0.5
            top, left = (int(along * (h - H)), (w - W) // 2) if h - H > w - W else ((h - H) // 2, int(along * (w - W)))
            views.append(x[:, top:top + H, left:left + W])
    return torch.stack(views)


class TestVideos(torch.utils.data.Dataset):
    """index -> (index, frames (U, h, w, C) uint8, index (S, T) into them, why not or None); U distinct frames.

    Decoded once for all clips, scaled so that a window of `size` just fits.
    """

    def __init__(self, paths, num_frames, size, stride=4, fps=None, sampling="dense", num_segments=1):
        self.paths, self.num_frames, self.size, self.stride, self.fps = paths, num_frames, size, stride, fps
        self.sampling, self.num_segments = sampling, num_segments
        data.prepared.check_stride(paths, stride if sampling == "dense" and not fps else None)

    def __len__(self):
        return len(self.paths)

    def fit(self, h: int, w: int) -> tuple[int, int]:
        """The size of an h x w frame in which a window of self.size just fits."""
        H, W = self.size
        return (h * W // w, W) if h * W > H * w else (H, w * H // h)

    def clips(self, video: data.VideoReader, start: float = 0.0, end: float = math.inf):
        """-> frames (U, h, w, C), index (S, T), of the part of an open video from start to end (seconds).

        Where no frame begins in that time, the one that is on show.
        """
        order = data.timeline(video.times, self.fps)
        t = video.times[order] - video.times[0]
        inside = (t >= start) & (t < end)
        order = order[inside] if inside.any() else order[t < end][-1:]
        return self.decode(video, order[view_indices(len(order), self.num_frames, self.stride, self.sampling,
                                                     self.num_segments)])

    def decode(self, video: data.VideoReader, wanted: np.ndarray):
        """wanted (S, T) frame indices -> the distinct frames (U, h, w, C), and where each is among them (S, T)."""
        unique, inverse = np.unique(wanted, return_inverse=True)
        return torch.from_numpy(video.frames(unique)), torch.from_numpy(inverse.reshape(wanted.shape))

    def __getitem__(self, i: int):
        try:
            with data.open_video(self.paths[i], self.fit) as video:
                return i, *self.clips(video), None
        except data.VideoError as e:
            return i, torch.empty(0), torch.empty(0), str(e)


@torch.no_grad()
def run_views(function, videos: TestVideos, num_crops: int, device, batch_size: int, num_workers: int, control=None,
              progress=None) -> tuple[dict, dict]:
    """function(views (B, T, H, W, C)) -> (B, K), averaged over the views of each video; every video exactly once.

    -> ({index: (K,) float32 numpy}, {index: why it failed}), the same on all ranks: rank r takes videos r, r + world,
    ..., and `control` (a gloo group) gathers. batch_size counts views. progress(done, all) is called per video.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if control else (0, 1)
    loader = torch.utils.data.DataLoader(videos, batch_size=None, sampler=range(rank, len(videos), world),
                                         num_workers=num_workers, worker_init_fn=data.ignore_signals,
                                         pin_memory=device.type == "cuda", prefetch_factor=2 if num_workers else None)
    outputs, failed, waiting = {}, {}, []  # waiting: (index, views) not yet run
    num_views = videos.num_segments * num_crops

    def flush():
        views = torch.cat([v for _, v in waiting])
        out = torch.cat([function(part) for part in views.split(batch_size)])
        for (i, _), mean in zip(waiting, out.float().view(len(waiting), num_views, -1).mean(1).cpu().numpy()):
            outputs[i] = mean
        waiting.clear()

    for done, (i, frames, index, why) in enumerate(loader, 1):
        if why:
            failed[i] = why
        else:
            frames = frames.to(device, non_blocking=True)
            waiting.append((i, cut(frames, index.to(device), videos.size, num_crops)))
            if len(waiting) * num_views >= batch_size:
                flush()
        if progress and rank == 0:
            progress(done, len(range(0, len(videos), world)))
    if waiting:
        flush()
    if control and world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, (outputs, failed), group=control)
        outputs, failed = {k: v for o, _ in parts for k, v in o.items()}, {k: v for _, f in parts for k, v in f.items()}
    return dict(sorted(outputs.items())), dict(sorted(failed.items()))


def scores(probs: np.ndarray, labels: np.ndarray) -> dict:
    """probs (V, K), labels (V,) -> top1, top5, per_class (mean accuracy over the classes that occur), in percent; loss.

    loss is the mean negative logarithm of the averaged probability of the true class.
    """
    true = probs[np.arange(len(labels)), labels]
    # how many classes come before the true one; among equals the first counts, as argmax has it
    tied = (probs == true[:, None]) & (np.arange(probs.shape[1]) < labels[:, None])
    place = (probs > true[:, None]).sum(1) + tied.sum(1)
    right = place == 0
    per_class = [right[labels == c].mean() for c in np.unique(labels)]
    return dict(top1=float(100 * right.mean()), top5=float(100 * (place < 5).mean()),
                per_class=float(100 * np.mean(per_class)), loss=float(-np.log(np.maximum(true, 1e-12)).mean()))


# ---- features, attention ----

@torch.no_grad()
def features(model, video: torch.Tensor, layer: int | None = None, pool: bool = True) -> torch.Tensor:
    """(B, T, H, W, C) -> (B, D), the mean over tokens, or all tokens (B, N, D), after `layer` blocks (0: embedding).

    None: after the last block and the final norm that the model has, which is on tokens in a pre-trained encoder
    (encoder.norm, before the mean), on their mean in a classifier (fc_norm; its unpooled tokens have none).
    """
    x = Encoder.forward(model.encoder if isinstance(model, VideoMAE) else model, video, depth=layer)  # (B, N, D)
    if layer is None and isinstance(model, VideoMAE):
        x = model.encoder.norm(x)
    x = x.mean(1) if pool else x
    return model.fc_norm(x) if pool and layer is None and isinstance(model, VideoClassifier) else x


@torch.no_grad()
def attention_rollout(model: VideoClassifier, video: torch.Tensor) -> torch.Tensor:
    """(B, T, H, W, C) -> (B, t, h, w) float32, mean 1: how much each cube feeds the pooled representation.

    Attention rollout (Abnar & Zuidema 2020) for a mean-pooled ViT: in each block a token is half itself, half what the
    heads' mean attention gathers; the shares of the pooled mean are carried back from the last block to the first.
    """
    x, maps = model.with_class_token(model.embed(video)), []
    for block in model.blocks:
        a, (B, N, D) = block.attn, x.shape
        bias = torch.cat((a.q_bias, torch.zeros_like(a.v_bias), a.v_bias))
        q, k, _ = F.linear(block.norm1(x), a.qkv.weight, bias).view(B, N, 3, a.heads, -1).permute(2, 0, 3, 1, 4)
        maps.append(sum((q[:, h] @ k[:, h].mT * q.shape[-1] ** -0.5).float().softmax(-1)
                        for h in range(a.heads)) / a.heads)  # (B, N, N), head by head: all at once would be gigabytes
        x = block(x)
    pooled = x.shape[1] - math.prod(model.grid)  # the class token, where there is one, is not pooled
    share = x.new_full((len(x), 1, x.shape[1]), 1.0, dtype=torch.float32)
    share[..., :pooled] = 0
    for attention in reversed(maps):
        share = 0.5 * share + 0.5 * share @ attention
    return share[..., pooled:].reshape(-1, *model.grid)


def heat(values: torch.Tensor, frames: np.ndarray) -> np.ndarray:
    """values (t, h, w), frames (T, H, W, 3) uint8 -> frames with the values laid over, from blue (low) to red (high).

    Scaled to the clip's own range: colours compare cubes of one clip, not clips.
    """
    low, high = values.min(), values.max()
    v = ((values - low) / (high - low).clamp(min=1e-9))[None, None].float()
    v = F.interpolate(v, size=frames.shape[:3], mode="trilinear", align_corners=False)[0, 0].cpu().numpy()[..., None]
    color = np.concatenate([np.clip(1.5 - abs(4 * v - c), 0, 1) for c in (3, 2, 1)], -1)  # jet
    return (0.5 * frames + 0.5 * 255 * color).round().astype(np.uint8)


def neighbours(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, k: int, num_classes: int) -> np.ndarray:
    """k-NN votes (V, num_classes) by cosine similarity, each weighted by exp(similarity / .07) as in DINO.

    Features are centred on the training mean first: what all videos share would make all cosines about 1.
    """
    center = train.mean(0)
    unit = lambda x: (x - center) / np.maximum(np.linalg.norm(x - center, axis=1, keepdims=True), 1e-12)
    train, votes = unit(train), []
    for part in np.array_split(unit(test), max(1, len(test) // 1024)):
        similarity = part @ train.T
        near = np.argpartition(-similarity, min(k, len(train)) - 1, axis=1)[:, :k]
        weight = np.exp((np.take_along_axis(similarity, near, 1) - 1) / 0.07)
        vote = np.zeros((len(part), num_classes))
        np.add.at(vote, (np.arange(len(part))[:, None], train_labels[near]), weight)
        votes.append(vote)
    return np.concatenate(votes)


def ridge(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, num_classes: int, strength=0.01) -> np.ndarray:
    """Scores (V, num_classes) of the linear map by ridge regression of the one-hot labels: a linear probe in one step.

    Features are standardised by the training set's mean and deviation; the penalty is strength * videos * |W|^2.
    """
    mean, scale = train.mean(0), train.std(0) + 1e-6
    x, target = (train - mean) / scale, np.eye(num_classes)[train_labels]
    w = np.linalg.solve(x.T @ x + strength * len(x) * np.eye(x.shape[1]), x.T @ target)
    return (test - mean) / scale @ w + target.mean(0)


# ---- the command line ----

def get_args(argv=None) -> argparse.Namespace:
    """The flags; an impossible one ends the program and is named."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = argparse.BooleanOptionalAction
    # what to do; the default is a multi-view test of --data
    todo = p.add_mutually_exclusive_group()
    todo.add_argument("--predict", nargs="+", metavar="FILE", help="classify videos: files, folders or lists")
    todo.add_argument("--features", nargs="+", metavar="FILE", help="write a .npz of features per video")
    todo.add_argument("--knn", nargs="+", metavar="TRAIN", help="k-NN and linear accuracy on --data of frozen features")
    todo.add_argument("--reconstruct", nargs="+", metavar="FILE", help="draw what a pre-trained model reconstructs")
    todo.add_argument("--attention", nargs="+", metavar="FILE", help="draw what a classifier attends to")
    todo.add_argument("--export_hf", metavar="DIR", help="write the model for Hugging Face transformers")
    # model
    p.add_argument("--ckpt", help="ours, a released .pth or a Hugging Face folder (--toy: that of finetune.py)")
    p.add_argument("--classes", help="text file with a class name per line, for checkpoints that have none")
    # data and views; what is not given is as the model was trained
    p.add_argument("--data", nargs="+", help="labelled videos to test on: list files, class folders, or the word toy")
    p.add_argument("--data_root", default="", help="goes before relative paths of a list")
    p.add_argument("--num_segments", type=int, help="clips per video (test: 5, otherwise 1)")
    p.add_argument("--num_crops", type=int, help="crops per clip along the longer side (test: 3, otherwise 1)")
    p.add_argument("--num_frames", type=int, help="frames per clip")
    p.add_argument("--sampling_rate", type=int, help="frames from one sampled frame to the next")
    p.add_argument("--fps", type=float, help="resample videos to this many frames per second first")
    p.add_argument("--sampling", choices=["dense", "sparse"], help="sparse (SSv2): frames spread over the whole video")
    p.add_argument("--img_size", type=int, help="pixels, height and width of a view")
    # of single modes
    p.add_argument("--window", type=float, help="predict: classify every WINDOW seconds of a video by themselves")
    p.add_argument("--hop", type=float, help="predict, features: seconds between windows (default: no overlap)")
    p.add_argument("--top", default=5, type=int, help="predict: names per video")
    p.add_argument("--json", action=flag, default=False, help="predict: print JSON and nothing else")
    p.add_argument("--layer", type=int, help="features, knn: after this many blocks (default: all, and the final norm)")
    p.add_argument("--pool", action=flag, default=True, help="features: mean over the tokens; --no-pool: all of them")
    p.add_argument("--k", default=[20], nargs="+", type=int, help="knn: neighbours")
    p.add_argument("--mask_ratio", nargs="+", default=[0.75, 0.9, 0.95], type=float, help="reconstruct")
    p.add_argument("--mp4", action=flag, default=False, help="reconstruct, attention: also write a video")
    # run
    p.add_argument("--out_dir", default="out/eval")
    p.add_argument("--seed", default=0, type=int, help="of the masks that reconstruct draws")
    p.add_argument("--device", help="cuda, cpu or mps (default: the first there is)")
    p.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="(default: bf16 where the hardware has it)")
    p.add_argument("--batch_size", default=32, type=int, help="views per forward pass and rank")
    p.add_argument("--num_workers", type=int, help="decoding processes per rank (default: cores per rank, at most 10)")
    p.add_argument("--toy", action="store_true", help="test out/finetune/best.pt on the toy videos; other flags win")
    known = p.parse_known_args(argv)[0]
    if known.toy:
        p.set_defaults(ckpt="out/finetune/best.pt")
        if not any((known.predict, known.features, known.reconstruct, known.attention, known.export_hf)):
            p.set_defaults(data=["toy"], num_segments=2)
    args = p.parse_args(argv)
    if not args.ckpt:
        p.error("--ckpt: which model? expected a checkpoint, or --toy")
    lowest = dict(num_segments=1, num_crops=1, num_frames=1, sampling_rate=1, img_size=1, top=1, layer=0, batch_size=1,
                  num_workers=0, seed=0)
    for name, low in lowest.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            p.error(f"--{name} {getattr(args, name)}: expected at least {low}")
    for name in ("fps", "window", "hop"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            p.error(f"--{name} {getattr(args, name)}: expected more than 0")
    if min(args.k) < 1:
        p.error(f"--k {min(args.k)}: expected at least 1")
    only = dict(window=["predict"], hop=["predict", "features"], json=["predict"], layer=["features", "knn"],
                mp4=["reconstruct", "attention"])
    for name, modes in only.items():
        if getattr(args, name) not in (None, False) and not any(getattr(args, mode) for mode in modes):
            p.error(f"--{name} goes with --{' or --'.join(modes)}")
    if (args.num_segments or args.num_crops) and (args.features or args.reconstruct or args.attention):
        p.error("--num_segments and --num_crops go with the test, --predict and --knn")
    if not args.pool and not args.features:
        p.error("--no-pool goes with --features")
    if args.data and (args.predict or args.features or args.reconstruct or args.attention):
        p.error("--data goes with the test and --knn: the other modes are told their files themselves")
    if args.hop and args.predict and not args.window:
        p.error("--hop needs --window")
    test = not any((args.predict, args.features, args.reconstruct, args.attention, args.export_hf))
    if test and not args.data:
        p.error("--data: expected labelled videos to test on"
                + ("" if args.knn else ", or one of --predict, --features, --reconstruct, ..."))
    return args


def report_accuracy(args, model, classes, paths, labels, make_set, run, say):
    """Multi-view accuracy; predictions.csv and confusions in out_dir."""
    videos = make_set(paths, args.num_segments or 5)
    num_crops = args.num_crops or 3
    probs, failed = run(lambda x: model(x).float().softmax(-1), videos, num_crops, progress=True)
    if not probs:
        raise ValueError(f"none of the {len(paths)} videos can be read; the first: {failed[0]}")
    ids, p = np.array(list(probs)), np.stack(list(probs.values()))
    true = np.array(labels)[ids]
    result = scores(p, true)
    say(f"{len(ids)} videos x {videos.num_segments} clips x {num_crops} crops: top-1 {result['top1']:.2f}, "
        f"top-5 {result['top5']:.2f}, mean per-class accuracy {result['per_class']:.2f}")
    if failed:
        say(f"{len(failed)} of {len(paths)} videos could not be read; counted as wrong, top-1 is "
            f"{result['top1'] * len(ids) / len(paths):.2f}, top-5 {result['top5'] * len(ids) / len(paths):.2f}:")
        for i, why in list(failed.items())[:10]:
            say(f"  {why}")
        if len(failed) > 10:
            say("  ... (all in predictions.csv)")
    order = np.argsort(-p, 1, kind="stable")
    wrong = {}
    for label, guess in zip(true, order[:, 0]):
        if label != guess:
            wrong[label, guess] = wrong.get((label, guess), 0) + 1
    if wrong:
        say("most confused: true class -> predicted, videos, share of the class")
        for (label, guess), n in sorted(wrong.items(), key=lambda x: (-x[1], x[0]))[:10]:
            say(f"  {classes[label]} -> {classes[guess]}: {n}, {100 * n / (true == label).sum():.0f} %")
    if say is print:
        path = os.path.join(args.out_dir, "predictions.csv")
        with open(path, "w", newline="", encoding="utf-8") as f:
            rows = csv.writer(f)
            rows.writerow(["path", "label", "predicted", "probability", "probability_of_label", "place_of_label",
                           "top5", "failed"])
            row_of = {i: r for r, i in enumerate(ids)}
            for i, file in enumerate(paths):
                if i in failed:
                    rows.writerow([file, classes[labels[i]], "", "", "", "", "", failed[i]])
                    continue
                r = row_of[i]
                rows.writerow([file, classes[labels[i]], classes[order[r, 0]], f"{p[r, order[r, 0]]:.6f}",
                               f"{p[r, labels[i]]:.6f}", int((order[r] == labels[i]).argmax()) + 1,
                               " | ".join(classes[c] for c in order[r, :5]), ""])
        with open(os.path.join(args.out_dir, "result.json"), "w") as f:
            json.dump(result | dict(videos=len(ids), failed=len(failed), num_segments=videos.num_segments,
                                    num_crops=num_crops, ckpt=args.ckpt), f, indent=1)
        say(f"per video: {path}")


def report_knn(args, model, classes, train, test, make_set, run, say):
    """Accuracy of k nearest neighbours among the training videos' frozen features, and of a linear map of them."""
    sets = []
    for paths, labels in (train, test):
        found, failed = run(lambda x: features(model, x, args.layer), make_set(paths, args.num_segments or 1),
                            args.num_crops or 1, progress=True)
        if failed:
            say(f"{len(failed)} of {len(paths)} videos could not be read and are left out, the first: "
                f"{next(iter(failed.values()))}")
        if not found:
            raise ValueError(f"none of {len(paths)} videos can be read")
        sets.append((np.stack(list(found.values())), np.array(labels)[list(found)]))
    (x, y), (test_x, test_y) = sets
    say(f"{len(y)} training and {len(test_y)} test videos, {len(classes)} classes; always saying the most common one "
        f"of training would get {100 * (test_y == np.bincount(y).argmax()).mean():.1f} %")
    for k in args.k:
        result = scores(neighbours(x, y, test_x, min(k, len(y)), len(classes)), test_y)
        say(f"k-NN, k = {min(k, len(y))}: top-1 {result['top1']:.2f}, "
            f"mean per-class accuracy {result['per_class']:.2f}")
    result = scores(ridge(x.astype(np.float64), y, test_x, len(classes)), test_y)
    say(f"linear map by ridge regression: top-1 {result['top1']:.2f}, "
        f"mean per-class accuracy {result['per_class']:.2f}")


def predict(args, model, classes, paths, videos, device, say):
    """Prints names and probabilities of each file, or of each window of it; returns the exit status."""
    results = []
    for path in paths:
        say(path)
        try:
            with data.open_video(path, videos.fit) as video:
                seconds, windows = video.times[-1] - video.times[0], [(0.0, math.inf)]
                if args.window:
                    starts = np.arange(0, max(seconds, 1e-9), args.hop or args.window).tolist()
                    windows = [(start, start + args.window) for start in starts[:-1]] + [(starts[-1], math.inf)]
                for start, end in windows:
                    frames, index = videos.clips(video, start, end)
                    views = cut(frames.to(device), index.to(device), videos.size, args.num_crops or 1)
                    p = torch.cat([model(v).float().softmax(-1) for v in views.split(args.batch_size)]).mean(0)
                    best = p.topk(min(args.top, len(p)))
                    names = [dict(name=classes[i], probability=round(v, 6))
                             for i, v in zip(best.indices.tolist(), best.values.tolist())]
                    when = dict(start=round(start, 3), end=round(min(end, seconds), 3)) if args.window else {}
                    results.append(dict(path=path, **when, classes=names))
                    say("  " + (f"{when['start']:.2f} to {when['end']:.2f} s: " if when else "")
                        + ", ".join(f"{n['name']} {100 * n['probability']:.1f} %" for n in names))
        except data.VideoError as e:
            results.append(dict(path=path, failed=str(e)))
            say(f"  failed: {e}")
    if args.json:
        print(json.dumps(results, indent=1))
    return 1 if any("failed" in r for r in results) else 0


def write_features(args, model, paths, videos, device, say):
    """Sliding-window features: <out_dir>/<number>_<name>.npz with features, start and end in seconds of each window."""
    bad, span = 0, videos.num_frames
    for number, path in enumerate(paths):
        try:
            with data.open_video(path, videos.fit) as video:
                order = data.timeline(video.times, videos.fps)
                if videos.sampling == "sparse":  # one clip, spread over the whole video
                    order = order[view_indices(len(order), span, 1, "sparse", 1)[0]]
                else:
                    order = order[::videos.stride]
                t = video.times[order] - video.times[0]
                hop = span if not args.hop else max(1, round(args.hop / max(t[-1] / max(len(t) - 1, 1), 1e-9)))
                starts = list(range(0, max(len(order) - span, 0) + 1, hop))
                if starts[-1] + span < len(order):
                    starts.append(len(order) - span)  # the end of the video is covered too
                starts, out = np.array(starts), []
                for some in np.array_split(starts, math.ceil(len(starts) / args.batch_size)):
                    index = np.minimum(some[:, None] + np.arange(span), len(order) - 1)  # (windows, T)
                    frames, where = videos.decode(video, order[index])
                    views = cut(frames.to(device), where.to(device), videos.size, 1)
                    out.append(features(model, views, args.layer, args.pool).float().cpu().numpy())
        except data.VideoError as e:
            bad += 1
            say(f"failed: {e}")
            continue
        out, ends = np.concatenate(out), t[np.minimum(starts + span, len(t)) - 1]
        name = os.path.join(args.out_dir, f"{number:05d}_{os.path.splitext(os.path.basename(path))[0]}.npz")
        np.savez(name, features=out, start=t[starts], end=ends, path=path, grid=np.array(model.grid))
        say(f"{name}: {out.shape[0]} windows x {' x '.join(map(str, out.shape[1:]))}, {t[0]:.2f} to {t[-1]:.2f} s")
    return 1 if bad else 0


def draw(args, model, classes, paths, videos, device, say):
    """--reconstruct and --attention: a PNG per file, with --mp4 a video too."""
    from pretrain import reconstruct
    bad = 0
    for number, path in enumerate(paths):
        try:
            with data.open_video(path, videos.fit) as video:
                clip = cut(*videos.clips(video), videos.size, 1).to(device)  # (1, T, H, W, C)
        except data.VideoError as e:
            bad += 1
            say(f"failed: {e}")
            continue
        name = os.path.join(args.out_dir, f"{number:05d}_{os.path.splitext(os.path.basename(path))[0]}")
        if args.attention:
            share, logits = attention_rollout(model, clip), model(clip)
            shown = heat(share[0], clip[0].cpu().numpy())
            panels = [("input", clip[0].cpu().numpy()), ("attention rollout, blue low, red high", shown)]
            say(f"{path}: {classes[int(logits[0].argmax())]}; the cubes' shares are {share.min():.2f} to "
                f"{share.max():.2f} times the average")
            name += "_attention"
        else:
            panels = []
            for ratio in args.mask_ratio:
                generator = torch.Generator().manual_seed(args.seed)
                mask = masking.make_mask("tube", 1, model.grid, ratio, generator).to(device)
                loss, *parts = reconstruct(model, clip, mask)
                original, masked, own, true = ((v[0] * 255).round().byte().cpu().numpy() for v in parts)
                panels += [("input", original)] * (not panels)
                panels += [(f"masked {mask.float().mean():.0%}", masked)]
                if model.norm_pix_loss:
                    panels += [("prediction + mean and contrast of the visible cubes", own),
                               ("prediction + true mean and contrast (flatters)", true)]
                else:
                    panels += [("prediction", own)]
                say(f"{path}: mask ratio {ratio:g}, loss {loss.item():.4f}")
            name += "_reconstruct"
        data.write_png(name + ".png", np.concatenate([data.strip(v, label) for label, v in panels]))
        if args.mp4:
            zoom = max(1, 224 // panels[0][1].shape[1])
            side = np.concatenate([v.repeat(zoom, 1).repeat(zoom, 2) for _, v in panels], 2)
            side = side[:, :side.shape[1] // 2 * 2, :side.shape[2] // 2 * 2]
            data.write_video(name + ".mp4", side, fps=8)
        say(f"{name}.png{' and .mp4, the panels from left to right' if args.mp4 else ''}: "
            + ", ".join(label for label, _ in panels))
    return 1 if bad else 0


def export_hf(args, model, classes, clip, say):
    """Writes config.json, preprocessor_config.json and the weights for transformers' from_pretrained."""
    state, config = to_hf(model)
    if classes:
        config["id2label"] = {str(i): name for i, name in enumerate(classes)}
        config["label2id"] = {name: i for i, name in enumerate(classes)}
    os.makedirs(args.export_hf, exist_ok=True)
    try:
        from safetensors.torch import save_file
        save_file({k: v.contiguous() for k, v in state.items()}, os.path.join(args.export_hf, "model.safetensors"),
                  metadata={"format": "pt"})
    except ImportError:
        torch.save(state, os.path.join(args.export_hf, "pytorch_model.bin"))
    H, W = clip["size"]
    images = dict(image_processor_type="VideoMAEImageProcessor", do_resize=True, size={"shortest_edge": min(H, W)},
                  resample=2, do_center_crop=True, crop_size={"height": H, "width": W}, do_rescale=True,
                  rescale_factor=1 / 255, do_normalize=True, image_mean=model.config["mean"],
                  image_std=model.config["std"])
    for name, content in (("config.json", config), ("preprocessor_config.json", images)):
        with open(os.path.join(args.export_hf, name), "w") as f:
            json.dump(content, f, indent=1)
    say(f"{args.export_hf}: {config['architectures'][0]}, {' and '.join(sorted(os.listdir(args.export_hf)))}")


def main():
    args = get_args()
    # ---- process group: torchrun sets these variables, plain python does not
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    mps = torch.backends.mps.is_available()
    device = args.device or ("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        if device == "cuda":
            torch.cuda.set_device(local_rank)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError) as e:
        why = "this build of torch has no such device" if isinstance(e, AttributeError) else str(e).splitlines()[0]
        raise ValueError(f"--device {device}: {why}") from None
    device, control = torch.device(device), None
    dtype_name = args.dtype or best_dtype(device)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")  # nothing but results is exchanged
        control = dist.group.WORLD
    say = print if rank == 0 and not args.json else lambda *a, **k: None
    num_workers = args.num_workers
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        num_workers = min(10, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))

    # ---- model: weights, class names, and how its clips were sampled
    model, about = build_model(args.ckpt, args.num_frames, (args.img_size, args.img_size) if args.img_size else None,
                               verbose=rank == 0 and not args.json)
    model.to(device)
    trained = about["args"]
    classes = about["classes"]
    classifier = isinstance(model, VideoClassifier)
    if args.classes:
        with open(args.classes, encoding="utf-8") as f:
            classes = [line.strip() for line in f if line.strip()]
    if classifier:
        classes = classes or [str(i) for i in range(model.head.out_features)]
        if len(classes) != model.head.out_features:
            raise ValueError(f"{args.classes or args.ckpt}: {len(classes)} class names, the model has "
                             f"{model.head.out_features} classes")
    elif args.predict or args.attention or args.data and not args.knn:
        raise ValueError(f"{args.ckpt}: a pre-training checkpoint, it has no classes; expected a fine-tuned one, or "
                         "--knn, --features, --reconstruct or --export_hf")
    alone = not classifier and model.decoder is None
    if args.reconstruct and (classifier or alone) or args.export_hf and alone:
        raise ValueError(f"{args.ckpt}: it has no decoder; expected a checkpoint of masked pre-training"
                         + ", or a classifier" * bool(args.export_hf))
    blocks = len((model if classifier else model.encoder).blocks)
    if args.layer is not None and args.layer > blocks:
        raise ValueError(f"--layer {args.layer}: expected 0 to {blocks}, the blocks of this model")
    clip = dict(num_frames=model.config["num_frames"], size=tuple(model.config["img_size"]),
                stride=args.sampling_rate or trained.get("sampling_rate", 4), fps=args.fps or trained.get("fps"),
                sampling=args.sampling or trained.get("sampling", "dense"))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype_name]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    say(f"{about['size']} {f'classifier of {len(classes)} classes' if classifier else 'without classes'}, "
        f"clips of {'x'.join(map(str, (clip['num_frames'], *clip['size'])))}, {clip['sampling']}"
        + (f" every {clip['stride']} frames" if clip["sampling"] == "dense" else "")
        + (f" of {clip['fps']:g} fps" if clip["fps"] else ""))
    if not args.export_hf:
        os.makedirs(args.out_dir, exist_ok=True)

    # ---- data
    sources = args.predict or args.features or args.reconstruct or args.attention
    sources = sources or (args.knn or []) + (args.data or [])
    if "toy" in sources and local_rank == 0:
        data.make_toy(log=say)
    if world > 1:
        dist.barrier()

    def read(sources, toy_part="toy/val"):
        found = [data.read_videos(toy_part if s == "toy" else s, args.data_root) for s in sources or []]
        return sum((p for p, _ in found), []), sum((l for _, l in found), [])

    def make_set(paths, num_segments=1):
        return TestVideos(paths, num_segments=num_segments, **clip)

    def run(function, videos, num_crops, progress=False):
        start, shown = time.time(), [0.0]

        def tell(done, all_videos):
            now = time.time()
            if done == all_videos or now - shown[0] > (5 if sys.stdout.isatty() else 60):
                shown[0] = now
                left = datetime.timedelta(seconds=round((now - start) / done * (all_videos - done)))
                say(f"{min(done * world, len(videos))}/{len(videos)} videos, {done * world / (now - start):.1f}/s, "
                    f"{left} left", flush=True)
        with autocast:
            return run_views(function, videos, num_crops, device, args.batch_size, num_workers, control,
                             tell if progress else None)

    status = 0
    if args.export_hf:
        export_hf(args, model, classes, clip, say)
    elif args.predict or args.features or args.reconstruct or args.attention:
        if world > 1:
            raise ValueError("only the test and --knn run on several ranks: leave out torchrun")
        paths, _ = read(sources)
        videos = make_set(paths, args.num_segments or 1)
        with autocast, torch.no_grad():
            if args.predict:
                status = predict(args, model, classes, paths, videos, device, say)
            elif args.features:
                status = write_features(args, model, paths, videos, device, say)
            else:
                status = draw(args, model, classes, paths, make_set(paths), device, say)
    elif args.knn:
        train_paths, train_names = read(args.knn, "toy/train")
        names = data.class_names([name for name in train_names if name is not None])
        known = " ".join(args.knn)
        train = train_paths, data.class_ids(train_names, names, train_paths, known)
        paths, test_names = read(args.data)
        report_knn(args, model, names, train, (paths, data.class_ids(test_names, names, paths, known)), make_set, run,
                 say)
    else:
        paths, names = read(args.data)
        labels = data.class_ids(names, classes, paths, args.ckpt)
        report_accuracy(args, model, classes, paths, labels, make_set, run, say)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as e:
        sys.exit(f"eval.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
