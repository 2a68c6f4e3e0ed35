"""Spatio-temporal action detection on AVA (VideoMAE, arXiv 2203.12602, appendix): training, detection, frame mAP.

    python detect_ava.py --toy                                   # laptop CPU: minutes, on movies it writes itself
    torchrun --nproc_per_node=8 detect_ava.py --init out/pretrain/last.pt --data ava_train_v2.2.csv \\
        --val_data ava_val_v2.2.csv --data_root movies/ --label_map ava_action_list_v2.2.pbtxt \\
        --score_map ava_action_list_v2.2_for_activitynet_2019.pbtxt --val_boxes person_boxes_val.csv
    python detect_ava.py --ckpt out/detect/last.pt --val_data ava_val_v2.2.csv --val_boxes ... --data_root movies/
    python detect_ava.py --score detections.csv --val_data ava_val_v2.2.csv --label_map ...      # any such file
    python detect_ava.py --ckpt out/detect/last.pt --video my.mp4 --boxes my_boxes.csv           # or --full_frame

Clips are read from the movies by time stamp. Trained on annotated boxes, tested on those of a person detector.
<out_dir>/detections.csv is in AVA's format, log.jsonl has the curves, last.pt goes on with the same command.
"""

import argparse
import contextlib
import ctypes
import datetime
import itertools
import json
import math
import os
import re
import resource
import signal
import sys
import time
import zlib
from fractions import Fraction

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import augment
import data
from ava import (Rows, TestFrames, TrainFrames, clip_seconds, find_movies, frame_map, key_frames, make_toy, merge_rows,
                 read_boxes, read_detections, read_excluded, read_label_map, read_rows, write_detections)
from model import (IMAGENET_MEAN, IMAGENET_STD, SIZES, Encoder, best_dtype, count_params, init_linears, param_groups,
                   to_unit)
from weights import encoder_shape, load_pretrained, read_weights

MAX_NONFINITE = 20  # steps in a row with a non-finite gradient before the run gives up
# mean and std of the input; the second is that of the paper's detection code
NORMS = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD),
         "reference": ((122.77 / 255, 115.95 / 255, 102.98 / 255), (57.375 / 255,) * 3)}


# ---- model ----

def bin_weights(low, high, size: int, bins: int, aligned: bool) -> torch.Tensor:
    """ends (R,) of RoIs in cells along one axis -> (R, bins, size): how much each cell counts in each bin's average.

    A bin has ceil(length / bins) sampling points at equal distances, each linear between two cells; a point up to one
    cell outside is moved to the border, one further out counts as 0.
    """
    shift = 0.5 if aligned else 0.0
    low, length = low - shift, high - low
    length = length if aligned else length.clamp(min=1)
    wanted = (length / bins).ceil()[:, None, None]  # (R, 1, 1); none for an aligned box without length: all 0
    points = wanted.clamp(min=1)
    i = torch.arange(int(points.max()) if len(points) else 1, device=low.device)
    bin_start = torch.arange(bins, device=low.device)[:, None]
    y = low[:, None, None] + (bin_start + (i + 0.5) / points) * (length / bins)[:, None, None]
    counts = (i < wanted) & (y >= -1) & (y <= size)  # (R, bins, points)
    y = y.clamp(0, size - 1)
    hat = (1 - (y[..., None] - torch.arange(size, device=low.device)).abs()).clamp(min=0)  # (R, bins, points, size)
    return (hat * counts[..., None]).sum(2) / points


def roi_align(features: torch.Tensor, boxes: torch.Tensor, index: torch.Tensor, scale: float, bins: int = 7,
              aligned: bool = False) -> torch.Tensor:
    """features (B, D, h, w), boxes (R, 4) x1 y1 x2 y2 in pixels, index (R,) of their maps -> (R, D, bins, bins).

    RoIAlign (Mask R-CNN, section 3) with adaptive sampling. Bilinear sampling and averaging are linear and separate
    into rows and columns: two matrix products. aligned moves boxes by half a cell and lets them be smaller than a cell.
    """
    x1, y1, x2, y2 = (boxes.to(features.dtype) * scale).unbind(1)
    with torch.no_grad():
        rows = bin_weights(y1, y2, features.shape[2], bins, aligned)  # (R, bins, h)
        columns = bin_weights(x1, x2, features.shape[3], bins, aligned)  # (R, bins, w)
    x = features.index_select(0, index) @ columns.mT[:, None]  # (R, D, h, bins)
    return rows[:, None] @ x


class Detector(Encoder):
    """Encoder, LayerNorm, mean over time, RoIAlign 7x7, max, linear: logits of each box. Frames of any size.

    Named as in the paper's detection code, without its prefixes; the final norm takes pre-training's encoder.norm.
    """

    def __init__(self, num_classes: int, aligned: bool = False, **kwargs):
        super().__init__(**kwargs)
        D = SIZES[self.config["size"]]["width"]
        self.aligned = aligned
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.cls_score = nn.Linear(D, num_classes)
        self.config |= dict(num_classes=num_classes, aligned=aligned)
        init_linears(self)
        self.cls_score.weight.data.mul_(0.001)

    def forward(self, video, boxes, index):
        """video (B, T, H, W, C) uint8 or float in [0,1], H and W multiples of the patch; boxes (R, 4) in its pixels.

        index (R,) int: the clip of each box. -> logits (R, num_classes).
        """
        grid = tuple(n // c for n, c in zip(video.shape[1:4], self.cube))
        if grid != self.grid:  # positions are resized per temporal slot
            self.grid = grid
            self.set_positions(self.config["pos_grid"])
        x = self.norm(super().forward(video))  # (B, N, D)
        with torch.autocast(x.device.type, enabled=False):
            x = x.float().unflatten(1, self.grid).mean(1).permute(0, 3, 1, 2).contiguous()  # (B, D, h, w)
            x = roi_align(x, boxes, index, 1 / self.cube[1], 7, self.aligned).amax((2, 3))  # (R, D)
        return self.cls_score(x)


def load_detector(path: str, names: dict | None, norm: str | None = None):
    """A detection checkpoint, ours or in the paper's layout -> (Detector in eval mode, {id: name}, its arguments).

    norm replaces the mean and std that the file tells (none: ImageNet's).
    """
    state, _, about = read_weights(path)
    if "cls_score.weight" not in state:
        raise ValueError(f"{path}: no detection checkpoint, it has no cls_score; --init trains one from it")
    outputs = len(state["cls_score.weight"])
    if about.get("class_ids"):
        own = dict(zip(about["class_ids"], about["classes"]))
        if names and list(names) != list(own):
            raise ValueError(f"{path}: its classes are other ones than those of --label_map; leave that out")
        names = own
    if not names or len(names) != outputs:
        raise ValueError(f"{path}: has {outputs} outputs; expected --label_map with as many classes"
                         + (f", not {len(names)}" if names else ""))
    model = Detector(outputs, **encoder_shape(path), **{k: about[k] for k in ("mean", "std", "aligned") if k in about}
                     | (dict(zip(("mean", "std"), NORMS[norm])) if norm else {}))
    load_pretrained(model, path, verbose=False)
    return model.eval(), names, about["args"]


# ---- detecting ----

def pad_frames(video: torch.Tensor, patch: int, mean) -> torch.Tensor:
    """(B, T, H, W, C) -> float32 in [0,1] padded right and bottom to multiples of the patch with the mean colour.

    After normalisation the padding is 0. Frames that fit are returned as they are.
    """
    B, T, h, w, C = video.shape
    if h % patch == 0 and w % patch == 0:
        return video
    size = B, T, -(-h // patch) * patch, -(-w // patch) * patch, C
    out = torch.tensor(mean, device=video.device).expand(size).clone()
    out[:, :, :h, :w] = to_unit(video)
    return out


@torch.no_grad()
def detect(model: Detector, frames: list, videos: TestFrames, device, autocast, batch_size: int, num_workers: int,
           control=None, progress=None) -> tuple[dict, dict]:
    """Every key frame once -> ({index: (n, classes) float32 probabilities of its boxes}, {index: why it failed}).

    The same on all ranks: rank r takes groups r, r + world, ...; `control` (a gloo group) gathers. Boxes are enlarged
    for pooling by 5 % of the width and 2.5 % of the height at each end, within the frame.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if control else (0, 1)
    loader = torch.utils.data.DataLoader(videos, batch_size=None, sampler=range(rank, len(videos), world),
                                         num_workers=num_workers, worker_init_fn=data.ignore_signals,
                                         pin_memory=device.type == "cuda", prefetch_factor=2 if num_workers else None)
    probs, failed, mine = {}, {}, len(range(rank, len(videos), world))
    for done, (parts, bad) in enumerate(loader, 1):
        failed |= bad
        for group, pixels, where in parts:
            h, w = pixels.shape[1:3]
            pixels = pixels.to(device, non_blocking=True)
            for start in range(0, len(group), batch_size):
                some = group[start:start + batch_size]
                video = pad_frames(pixels[where[start:start + batch_size].to(device)], model.cube[1],
                                   model.config["mean"])
                boxes = np.concatenate([frames[i].boxes for i in some]).astype(float) * [w, h, w, h]
                margin = (boxes[:, 2:] - boxes[:, :2]) * [0.05, 0.025]
                boxes = np.clip(np.concatenate([boxes[:, :2] - margin, boxes[:, 2:] + margin], 1), 0, [w, h, w, h])
                counts = [len(frames[i].boxes) for i in some]
                index = torch.from_numpy(np.repeat(np.arange(len(some)), counts))
                with autocast:
                    logits = model(video, torch.from_numpy(boxes).float().to(device), index.to(device))
                p = logits.float().sigmoid().cpu().numpy()
                probs |= dict(zip(some, np.split(p, np.cumsum(counts)[:-1])))
        if progress and rank == 0:
            progress(done, mine)
    if control and world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, (probs, failed), group=control)
        probs, failed = {k: v for p, _ in parts for k, v in p.items()}, {k: v for _, f in parts for k, v in f.items()}
    return dict(sorted(probs.items())), dict(sorted(failed.items()))


def to_rows(frames: list, probs: dict, class_ids: list) -> Rows:
    """Probabilities of boxes -> a row per box and class, with score = probability * the person detector's score."""
    keys = [(frames[i].video, frames[i].second) for i in probs]
    counts = [len(p) for p in probs.values()]
    K = len(class_ids)
    empty = [np.zeros((0, 4))]
    box = np.concatenate([frames[i].boxes for i in probs] or empty).astype(float)
    score = np.concatenate([p * frames[i].scores[:, None] for i, p in probs.items()] or [np.zeros((0, K))])
    return Rows(keys, np.repeat(np.arange(len(keys)), counts).repeat(K), box.repeat(K, 0),
                np.tile(np.array(class_ids), len(box)), score.astype(float).ravel())


def report(truth: Rows, found: Rows, names: dict, excluded: set, protocol: str, say) -> dict:
    """Prints mAP and a per-class table, beside what the same rows would get with one score for all; -> frame_map."""
    common = set(found.keys) & set(truth.keys)
    if not common and len(found.keys):
        raise ValueError(f"none of the {len(found.keys)} frames with detections is annotated; the first ones are "
                         f"{found.keys[0]} there and {truth.keys[0]} in the annotation: other names or other seconds?")
    result = frame_map(truth, found, list(names), excluded, protocol)
    say(f"{'class':36s} boxes     AP  constant score")
    for c in sorted(names, key=lambda c: (math.isnan(result["ap"][c]), -np.nan_to_num(result["ap"][c]))):
        if result["count"][c]:
            say(f"{names[c][:36]:36s} {result['count'][c]:5d} {100 * result['ap'][c]:6.2f} "
                f"{100 * result['flat'][c]:7.2f}")
    absent = sum(n == 0 for n in result["count"].values())
    say(f"frame mAP at IoU 0.5: {100 * result['map']:.2f} (constant score: {100 * result['flat_map']:.2f}), mean of "
        f"{len(names) - absent} classes" + (f"; {absent} have no true box" if absent else "")
        + (", ActivityNet's protocol" if protocol == "activitynet" else ""))
    return result


# ---- one's own movie ----

COLORS = [(255, 230, 0), (0, 230, 255), (255, 90, 200), (120, 255, 90), (255, 150, 60), (150, 170, 255)]


def draw_boxes(image: np.ndarray, boxes, captions: list):
    """Draws boxes (n, 4) in [0,1] and the lines of text of each, above it if there is room, into (H, W, 3) uint8."""
    h, w = image.shape[:2]
    scale = max(1, min(h, w) // 160)
    for k, ((x1, y1, x2, y2), lines) in enumerate(zip(boxes, captions)):
        left, right = (int(np.clip(x, 0, w - 1)) for x in (x1 * w, x2 * w - 1))
        top, bottom = (int(np.clip(y, 0, h - 1)) for y in (y1 * h, y2 * h - 1))
        color, t = COLORS[k % len(COLORS)], scale
        image[top:top + t, left:right + 1] = image[max(bottom - t + 1, 0):bottom + 1, left:right + 1] = color
        image[top:bottom + 1, left:left + t] = image[top:bottom + 1, max(right - t + 1, 0):right + 1] = color
        above = top - 7 * scale * len(lines)
        for n, text in enumerate(lines):
            y = (above if above >= 0 else top + t) + n * 7 * scale
            x = min(left, max(w - 4 * scale * len(text) - scale, 0))
            image[y:y + 7 * scale, x:x + 4 * scale * len(text) + scale] //= 4
            data.draw_text(image, text, y + scale, x + scale, scale, color)


def draw_movie(path: str, out: str, found: Rows, names: dict, show: float, movie_start: float) -> int:
    """Writes the movie with each key frame's boxes and classes of at least `show`, half a second around it; -> frames.
    """
    seconds = np.array([second for _, second in found.keys]) - movie_start
    with data.VideoReader(path) as video, contextlib.ExitStack() as stack:
        stack.callback(lambda: os.path.exists(out + ".part") and os.remove(out + ".part"))  # after an error
        file = stack.enter_context(av.open(out + ".part", "w", format="mp4"))
        rate = video.stream.average_rate or Fraction(25)
        stream = file.add_stream("libx264", rate=rate.limit_denominator(1001))
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
        stream.codec_context.time_base = clock = Fraction(1, 90000)
        count, last = 0, -1
        for frame in video.decode(video.read(0, len(video.pts))):
            if count >= len(video):
                break
            image, t = video.convert(frame), video.times[count] - video.times[0]
            # so that names are readable on small movies
            zoom = min(-(-320 // min(image.shape[:2])), max(1, 1280 // max(image.shape[:2])))
            image = np.ascontiguousarray(image.repeat(zoom, 0).repeat(zoom, 1))
            nearest = int(abs(seconds - t).argmin()) if len(seconds) else -1
            if nearest >= 0 and abs(seconds[nearest] - t) <= 0.5:
                mine = found.frame == nearest
                boxes = {}
                for box, c, score in zip(found.box[mine].tolist(), found.id[mine].tolist(), found.score[mine].tolist()):
                    boxes.setdefault(tuple(box), []).append((score, names[c]))
                draw_boxes(image, list(boxes), [[f"{name} {score:.2f}" for score, name in sorted(some, reverse=True)
                                                 if score >= show][:5] for some in boxes.values()])
            h, w = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
            if not count:
                stream.height, stream.width = h, w
            elif (h, w) != (stream.height, stream.width):  # a stream that changes its size
                h, w = stream.height, stream.width
                image = data.resize(torch.from_numpy(image)[None], h, w)[0].numpy()
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:h, :w]), "rgb24")
            last = max(last + 1, round(t * 90000))
            picture.pts, picture.time_base = last, clock
            file.mux(stream.encode(picture))
            count += 1
        file.mux(stream.encode(None))
        file.close()
        os.replace(out + ".part", out)
    return count


# ---- the command line ----

def get_args(argv=None) -> argparse.Namespace:
    """The flags, checked as far as that needs no data; an impossible one ends the program and is named."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = argparse.BooleanOptionalAction
    # what to do; the default is training
    p.add_argument("--ckpt", help="detect with this checkpoint on --val_data or --video, train nothing")
    p.add_argument("--score", nargs="+", metavar="CSV", help="score detection files against --val_data, nothing else")
    p.add_argument("--video", help="with --ckpt: detect on this movie, write a CSV and the movie with boxes drawn")
    # data
    p.add_argument("--data", nargs="+", default=["toy"], help="annotation CSVs to train on, or the word toy")
    p.add_argument("--val_data", nargs="+", help="annotation CSVs to test on (toy: its own)")
    p.add_argument("--data_root", default="", help="folder of the movies, files <video>.<ending>")
    p.add_argument("--label_map", help="pbtxt of the classes, one output each (default: the ids in --data)")
    p.add_argument("--score_map", help="pbtxt of the classes that are scored (default: all; AVA: 60 of 80)")
    p.add_argument("--excluded", help="CSV of time stamps that are left out of training")
    p.add_argument("--val_excluded", help="CSV of time stamps that are left out of the test")
    p.add_argument("--val_boxes", help="person boxes to test on, CSV or AIA's JSON (default: the annotated ones)")
    p.add_argument("--boxes", help="with --video: CSV of person boxes")
    p.add_argument("--full_frame", action="store_true", help="with --video: the whole frame as the box of every second")
    p.add_argument("--movie_list", help="for JSON boxes: movie names in their order, or AIA's annotation JSON")
    p.add_argument("--box_score", default=0.8, type=float, help="person boxes below this score are left out")
    p.add_argument("--movie_start", default=0.0, type=float, help="the second at which files begin (15-min cuts: 900)")
    p.add_argument("--num_workers", type=int, help="decoding processes per rank (default: cores per rank, at most 10)")
    p.add_argument("--max_bad", default=0.05, type=float, help="stop when more than this share of reads fails")
    # clips
    p.add_argument("--num_frames", type=int, help="frames per clip (default: those of --init, else 16)")
    p.add_argument("--sampling_rate", type=int, help="frames of --fps from one to the next of a clip (default: 4)")
    p.add_argument("--fps", type=float, help="the clock of sampling_rate, whatever a file's rate (default: 25)")
    p.add_argument("--img_size", nargs="+", type=int, metavar="PIXELS", help="training crop: side, or height and width")
    p.add_argument("--short_side", type=int, help="pixels to which a frame's short side is scaled (default: 256)")
    p.add_argument("--jitter", action=flag, default=True, help="training: move the ends of boxes")
    p.add_argument("--flip", action=flag, default=True, help="training: mirror half the clips (no sided labels)")
    p.add_argument("--color_jitter", nargs=3, default=[10, 26, 26], type=float, metavar=("H", "S", "V"),
                   help="training: largest shift of hue (of 180), saturation and value (of 255); 0 0 0 = off")
    # model
    p.add_argument("--init", help="start from these weights: pre-trained, fine-tuned or of detection, any known layout")
    p.add_argument("--size", choices=list(SIZES), help="(default: --init's, else base)")
    p.add_argument("--patch_size", type=int, help="pixels (default: --init's, else 16)")
    p.add_argument("--tubelet_size", type=int, help="frames per cube (default: --init's, else 2)")
    p.add_argument("--norm", choices=list(NORMS),
                   help="mean and std of the input: ImageNet's, as in pre-training, or the paper's detection code's, "
                        "which its released detection weights need (default: --ckpt's, else imagenet)")
    p.add_argument("--aligned", action=flag, default=False, help="RoIAlign with the half-cell shift")
    p.add_argument("--drop_path", default=0.2, type=float, help="stochastic depth of the last block")
    p.add_argument("--checkpointing", action=flag, default=False, help="recompute activations: less memory, slower")
    p.add_argument("--freeze", default=0, type=int, help="keep the patch embedding and the first N blocks as they are")
    # optimisation
    p.add_argument("--batch_size", default=16, type=int, help="key frames per rank and accumulation step")
    p.add_argument("--accum_steps", default=1, type=int, help="batches per optimiser step")
    p.add_argument("--epochs", default=30, type=float)
    p.add_argument("--warmup_epochs", default=5, type=float, help="less than --epochs")
    p.add_argument("--max_steps", type=int, help="optimiser steps instead of epochs; the warm-up keeps its share")
    p.add_argument("--lr", default=2.5e-4, type=float, help="per 256 key frames of the global batch")
    p.add_argument("--min_lr", default=1e-6, type=float, help="per 256 key frames of the global batch")
    p.add_argument("--layer_decay", type=float,
                   help="factor on the learning rate per block down (default: .75, from scratch 1)")
    p.add_argument("--weight_decay", default=0.05, type=float)
    p.add_argument("--clip_grad", default=0.0, type=float, help="largest gradient norm, 0 = off")
    # scoring, drawing
    p.add_argument("--protocol", default="paper", choices=["paper", "activitynet"],
                   help="activitynet: at most 50 rows per frame, frames without annotation do not count")
    p.add_argument("--show", default=0.3, type=float, help="video: least score of a class that is drawn")
    # run
    p.add_argument("--out_dir", default="out/detect")
    p.add_argument("--seed", default=0, type=int)
    p.add_argument("--device", help="cuda, cpu or mps (default: the first there is)")
    p.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="(default: bf16 where the hardware has it)")
    p.add_argument("--resume", action=flag, help="continue from out_dir (default: if it holds this very run)")
    p.add_argument("--log_every", default=10, type=int, help="steps")
    p.add_argument("--save_every", default=500, type=int, help="steps")
    p.add_argument("--eval_every", type=float, help="epochs between tests on --val_data (default: one at the end)")
    p.add_argument("--toy", action="store_true", help="presets for minutes on two CPU cores; other flags still win")
    if p.parse_known_args(argv)[0].toy:
        p.set_defaults(size="tiny", img_size=[64], short_side=64, patch_size=8, num_frames=8, sampling_rate=6,
                       drop_path=0.0, flip=False, epochs=12, warmup_epochs=1, lr=0.016, log_every=40)
    args = p.parse_args(argv)
    lowest = dict(num_frames=1, sampling_rate=1, short_side=1, patch_size=1, tubelet_size=1, batch_size=1,
                  accum_steps=1, max_steps=1, log_every=1, save_every=1, num_workers=0, lr=0, min_lr=0, weight_decay=0,
                  clip_grad=0, seed=0, warmup_epochs=0, freeze=0, movie_start=0)
    for name, low in lowest.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            p.error(f"--{name} {getattr(args, name)}: expected at least {low}")
    for name in ("max_bad", "box_score", "show"):
        if not 0 <= getattr(args, name) <= 1:
            p.error(f"--{name} {getattr(args, name)}: expected a number in [0, 1]")
    if not 0 <= args.drop_path < 1:
        p.error(f"--drop_path {args.drop_path}: expected a number in [0, 1)")
    for name, value in vars(args).items():
        if not all(math.isfinite(x) for x in (value if isinstance(value, list) else [value]) if isinstance(x, float)):
            p.error(f"--{name} {value}: expected a finite number")
    for name in ("layer_decay", "fps", "eval_every"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            p.error(f"--{name} {getattr(args, name)}: expected more than 0")
    if args.img_size and (len(args.img_size) > 2 or min(args.img_size) < 1):
        p.error(f"--img_size {' '.join(map(str, args.img_size))}: expected a side, or height and width")
    if min(args.color_jitter) < 0:
        p.error(f"--color_jitter {args.color_jitter}: expected three numbers from 0")
    if args.epochs <= args.warmup_epochs:
        p.error(f"--epochs {args.epochs:g}: expected more than --warmup_epochs {args.warmup_epochs:g}")
    if args.seed >= 2**31:
        p.error(f"--seed {args.seed}: expected a seed below 2^31")
    if args.video and not args.ckpt:
        p.error("--video needs --ckpt")
    if bool(args.video) != bool(args.boxes or args.full_frame) or args.boxes and args.full_frame:
        p.error("--video goes with --boxes or --full_frame, and they with it: who is to be looked at?")
    if args.score and (args.ckpt or args.init):
        p.error("--score needs no model: leave out --ckpt and --init")
    if args.ckpt and args.init:
        p.error("--ckpt tests, --init trains: only one of them")
    if (args.score or args.ckpt) and not args.val_data and not args.video and not args.toy:
        p.error("--val_data: expected the annotation CSVs to test on")
    if any("toy" in x and len(x) > 1 for x in (args.data, args.val_data or [])):
        p.error("the word toy stands alone")
    if not args.ckpt and not args.score and args.val_data and (args.data == ["toy"]) != (args.val_data == ["toy"]):
        p.error("--data and --val_data: both are the toy movies, or neither")
    return args


def lr_at(step: int, peak: float, floor: float, warmup: int, total: int) -> float:
    """Learning rate of a step (0-based): linear from 0 over the warm-up, then half a cosine to the floor."""
    if step < warmup:
        return peak * step / warmup
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def movie_size(path: str) -> tuple[int, int]:
    """(height, width) of a movie's upright frames."""
    with data.open_movie(path) as movie:
        return movie.at([0.0])[0].shape[1:3]


def main():
    args = get_args()
    # ---- process group: torchrun sets these variables, plain python does not
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and (args.score or args.video):
        raise ValueError("only training and detection on --val_data run on several ranks: leave out torchrun")
    mps = torch.backends.mps.is_available()
    device = args.device or ("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        if device == "cuda":
            torch.cuda.set_device(local_rank)
            torch.set_float32_matmul_precision("high")  # TF32 where fp32 is left
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError) as e:
        why = "this build of torch has no such device" if isinstance(e, AttributeError) else str(e).splitlines()[0]
        raise ValueError(f"--device {device}: {why}") from None
    device, control = torch.device(device), None
    dtype_name = args.dtype or best_dtype(device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype_name]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        control = dist.new_group(backend="gloo")  # host-side numbers: agreeing to stop does not wait for the GPU
    if hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc gives large tensors back to the system at once and faults their pages in again, a fifth of a CPU step
        ctypes.CDLL(None).mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    num_workers = args.num_workers
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        num_workers = min(10, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    say = print if rank == 0 else lambda *a, **k: None
    torch.manual_seed(args.seed)  # initial weights; all later draws come from (seed, step) and (seed, epoch, index)

    # ---- annotations
    training = not (args.ckpt or args.score)
    toy = "toy" in (args.data if training or args.toy else []) + (args.val_data or [])
    if toy and local_rank == 0:
        make_toy(log=say)
    if world > 1:
        dist.barrier()
    data_root = args.data_root or ("toy_ava/movies" if toy else ".")
    files = lambda given, part: [f"toy_ava/{part}.csv" if name == "toy" else name for name in given]
    train_files = files(args.data, "train") if training else []
    val_files = files(args.val_data or (["toy"] if toy else []), "val")
    train = merge_rows([read_rows(f, "truth") for f in train_files], train_files, "truth") if training else None
    truth = merge_rows([read_rows(f, "truth") for f in val_files], val_files, "truth") if val_files else None
    excluded, val_excluded = read_excluded(args.excluded), read_excluded(args.val_excluded)
    label_map = args.label_map or ("toy_ava/label_map.pbtxt" if toy and not args.ckpt else None)  # a model has its own
    names = read_label_map(label_map) if label_map else None
    model, about = None, {}
    if args.ckpt:
        model, names, about = load_detector(args.ckpt, names, args.norm)
    if names is None:
        names = {c: str(c) for c in np.unique(np.concatenate([r.id for r in (train, truth) if r])).tolist()}
    class_ids = list(names)
    scored = read_label_map(args.score_map) if args.score_map else names
    without = [f"{c} ({name})" for c, name in scored.items() if c not in names] if not args.score else []
    if without:
        raise ValueError(f"{args.score_map}: {len(without)} classes are not among the {len(names)} that the model has: "
                         f"{', '.join(without[:5])}")
    if truth and not np.isin(truth.id, list(scored)).any():
        raise ValueError(f"{' '.join(val_files)}: no true box of a scored class; these are "
                         f"{', '.join(f'{c} ({name})' for c, name in list(scored.items())[:5])}")

    def count_rows(rows, excluded, what):
        """Says what an annotation holds, and what of it is left out."""
        kept = np.array([key not in excluded for key in rows.keys])[rows.frame] if len(rows.frame) else rows.frame > 0
        unknown = sorted(set(rows.id[kept].tolist()) - set(class_ids))
        flat = int((np.diff(rows.box[kept].clip(0, 1).reshape(-1, 2, 2), axis=1) <= 0).any((1, 2)).sum())
        boxes = len({(f, *b) for f, b in zip(rows.frame[kept].tolist(), rows.box[kept].tolist())})
        say(f"{what}: {len(rows.frame)} labels of {len(set(rows.id.tolist()))} classes, {boxes} boxes in "
            f"{len(set(rows.frame[kept].tolist()))} frames of {len({v for v, _ in rows.keys})} movies"
            + (f"; {len(set(rows.keys) & excluded)} frames excluded" if excluded else "")
            + (f"; {flat} rows whose box has no area in the frame are left out" if flat else "")
            + (f"; {np.isin(rows.id[kept], unknown).sum()} labels of {len(unknown)} classes that are not in the label "
               f"map are left out ({', '.join(map(str, unknown[:8]))}{', ...' if len(unknown) > 8 else ''})"
               if unknown else ""))
    if args.score:
        count_rows(truth, val_excluded, " ".join(val_files))
        found = merge_rows([read_detections(f) for f in args.score], args.score, "detections")
        start = time.time()
        result = report(truth, found, scored, val_excluded, args.protocol, say)
        say(f"{len(found.frame)} detections in {len(found.keys)} frames, scored in {time.time() - start:.1f} s")
        return 0
    os.makedirs(args.out_dir, exist_ok=True)

    # ---- model: shaped as --init is where the flags do not say otherwise
    if training:
        if args.init:
            init = read_weights(args.init)[2]
            about = init["args"] if "short_side" in init["args"] else {}  # a detection checkpoint's clips
        shape = encoder_shape(args.init, size=args.size, num_frames=args.num_frames, patch_size=args.patch_size,
                              img_size=args.img_size and tuple(args.img_size * 2)[:2], tubelet_size=args.tubelet_size)
        mean, std = NORMS[args.norm or "imagenet"]
        model = Detector(len(names), args.aligned, mean=mean, std=std, drop_path=args.drop_path,
                         checkpointing=args.checkpointing, **shape)
        if args.freeze > len(model.blocks):
            raise ValueError(f"--freeze {args.freeze}: expected at most the {len(model.blocks)} blocks of "
                             f"{shape['size']}")
    else:
        given = dict(num_frames=args.num_frames, img_size=args.img_size, size=args.size, patch_size=args.patch_size,
                     tubelet_size=args.tubelet_size)
        wrong = [k for k, v in given.items() if v is not None and not args.toy]
        if wrong:
            raise ValueError(f"--{wrong[0]}: is that of --ckpt; leave it out")
    rate, fps = args.sampling_rate or about.get("sampling_rate") or 4, args.fps or about.get("fps") or 25.0
    short_side = args.short_side or about.get("short_side") or 256
    seconds = clip_seconds(model.config["num_frames"], rate, fps)

    # ---- one's own movie
    if args.video:
        stem = os.path.splitext(os.path.basename(args.video))[0]
        base = os.path.join(args.out_dir, stem + "_actions")
        for given in (args.video, args.boxes):
            if given and os.path.realpath(given) in (os.path.realpath(base + end) for end in (".csv", ".mp4")):
                raise ValueError(f"{given}: the result would be written over it; choose another --out_dir")
        if args.full_frame:
            with data.VideoReader(args.video) as video:
                end = video.times[-1] - video.times[0] + args.movie_start
            keys = [(stem, s) for s in range(math.ceil(args.movie_start), int(end) + 1)]
            length = len(keys)
            rows = Rows(keys, np.arange(length), np.tile([0.0, 0, 1, 1], (length, 1)), np.zeros(length, int),
                        np.ones(length))
        else:
            own = stem, os.path.basename(args.video)
            rows = read_boxes(args.boxes, args.movie_list, lambda v: movie_size(args.video) if v in own else None, say)
            mine = np.array([video in own for video, _ in rows.keys])[rows.frame]
            if not mine.any():
                raise ValueError(f"{args.boxes}: no boxes of {stem!r}; it has those of "
                                 f"{', '.join(sorted({v for v, _ in rows.keys})[:5])}")
            mine &= rows.score >= args.box_score
            if not mine.any():
                raise ValueError(f"{args.boxes}: no box of {stem!r} has a score of {args.box_score} (--box_score)")
            rows = Rows(rows.keys, rows.frame[mine], rows.box[mine], rows.id[mine], rows.score[mine])
        frames = key_frames(rows, {video: args.video for video, _ in rows.keys}, None)
        if not frames:
            raise ValueError(f"{args.boxes or args.video}: no box has an area within the frame")
        model.to(device)
        probs, failed = detect(model, frames, TestFrames(frames, seconds, short_side, args.movie_start), device,
                               autocast, args.batch_size, num_workers)
        for why in failed.values():
            say(f"failed: {why}")
        if not probs:
            raise ValueError(f"{args.video}: none of its {len(frames)} key frames can be read: {failed[0]}")
        found = to_rows(frames, probs, class_ids)
        write_detections(base + ".csv", found)
        for i, p in probs.items():
            for box, one in zip(frames[i].boxes, p * frames[i].scores[:, None]):
                best = np.argsort(-one, kind="stable")[:3]
                say(f"{frames[i].second:4d} s, box {' '.join(f'{v:.2f}' for v in box)}: "
                    + ", ".join(f"{names[class_ids[c]]} {one[c]:.2f}" for c in best))
        try:
            count = draw_movie(args.video, base + ".mp4", found, names, args.show, args.movie_start)
        except (av.FFmpegError, data.VideoError) as e:
            raise ValueError(f"{args.video}: damaged ({e}): no movie drawn; the detections are in {base}.csv") from None
        say(f"{base}.csv: {len(found.frame)} rows; {base}.mp4: {count} frames, classes of at least {args.show:g}")
        return 1 if failed else 0

    # ---- key frames, of the movies that are there
    def with_movies(rows, excluded, labelled, what, then):
        movies = find_movies(data_root, {video for video, _ in rows.keys})
        missing = sorted({video for video, _ in rows.keys} - set(movies))
        keep = np.array([key not in excluded for key in rows.keys])[rows.frame] if len(rows.frame) else rows.frame > 0
        rows = Rows(rows.keys, *(x[keep] for x in rows[1:]))
        frames = key_frames(rows, movies, class_ids if labelled else None)
        if missing:
            say(f"{what}: {len(missing)} of {len(missing) + len(movies)} movies are not in {data_root} "
                f"({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}): {then}")
        if not frames:
            raise ValueError(f"{what}: no key frame with a box is left")
        return frames
    val_frames = []
    if truth:
        count_rows(truth, val_excluded, "test, " + " ".join(val_files))
        val_boxes = args.val_boxes or ("toy_ava/val_boxes.csv" if toy else None)
        if val_boxes:
            movies = find_movies(data_root, {video for video, _ in truth.keys})

            size_of = lambda video: movie_size(movies[video]) if video in movies else None
            rows = read_boxes(val_boxes, args.movie_list, size_of, say)
            known = {video for video, _ in truth.keys}
            of_these = np.array([video in known for video, _ in rows.keys])[rows.frame]
            keep = of_these & (rows.score >= args.box_score)
            say(f"{val_boxes}: {keep.sum()} of {of_these.sum()} boxes have a score of at least {args.box_score:g}"
                + (f"; {(~of_these).sum()} boxes of movies that {' '.join(val_files)} does not name are left out"
                   if (~of_these).any() else ""))
            rows = Rows(rows.keys, *(x[keep] for x in rows[1:]))
            if not keep.any():
                raise ValueError(f"{val_boxes}: no box is left to test on")
        else:
            rows = truth
            say("no --val_boxes: tested on the annotated boxes, which flatters: published figures are on detected ones")
        val_frames = with_movies(rows, val_excluded, False, "test", "no detections there, their boxes count as missed")
    val_set = TestFrames(val_frames, seconds, short_side, args.movie_start)

    def test(progress):
        """Detects on the test frames, writes detections.csv, prints the table; -> result, key frames that failed."""
        start, shown = time.time(), [time.time()]

        def tell(done, of):
            if time.time() - shown[0] > 30:
                shown[0] = time.time()
                left = datetime.timedelta(seconds=round((shown[0] - start) / done * (of - done)))
                say(f"{done}/{of} groups of key frames, {left} left", flush=True)
        probs, failed = detect(model_raw, val_frames, val_set, device, autocast, args.batch_size, num_workers, control,
                               tell if progress else None)
        for i, why in list(failed.items())[:10]:
            say(f"failed: {why}")
        if failed:
            say(f"{len(failed)} of {len(val_frames)} key frames could not be read: no detections there")
        if not probs:
            raise ValueError(f"none of the {len(val_frames)} key frames can be read: {failed[0]}")
        result = None
        if rank == 0:
            found = to_rows(val_frames, probs, class_ids)
            write_detections(os.path.join(args.out_dir, "detections.csv"), found)
            result = report(truth, found, scored, val_excluded, args.protocol, say)
            say(f"{len(probs)} key frames, {len(found.frame)} rows in {args.out_dir}/detections.csv, "
                f"{time.time() - start:.0f} s", flush=True)
        return result, failed

    model_raw = model
    if args.ckpt:
        model.to(device)
        failed = test(True)[1]
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
        return 1 if failed else 0

    count_rows(train, excluded, "training, " + " ".join(train_files))
    frames = with_movies(train, excluded, True, "training", "their key frames are left out")
    global_batch = args.batch_size * args.accum_steps * world
    if global_batch > len(frames):
        raise ValueError(f"{len(frames)} key frames are fewer than a batch of {world} rank(s) x {args.batch_size} x "
                         f"{args.accum_steps} = {global_batch}: lower --batch_size or --accum_steps")
    both = {f.video for f in frames} & {f.video for f in val_frames}
    if both:
        say(f"{len(both)} movies are trained and tested on ({sorted(both)[0]}): the test says little")
    share = np.concatenate([f.labels for f in frames]).mean(0).clip(1e-9, 1 - 1e-9)
    prior = -(share * np.log(share) + (1 - share) * np.log(1 - share)).mean()  # loss of always saying the shares
    absent = [name for name, n in zip(names.values(), share) if n <= 1e-9]
    if absent:
        say(f"{len(absent)} classes have no training box: {', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}")
    sided = [n for n in names.values() if re.search(r"(?<![a-z])(left|right)(?![a-z])", n.lower().replace("_", " "))]
    if args.flip and sided:
        say(f"--flip mirrors the clips, but {len(sided)} classes name a side ({sided[0]}): --no-flip?")
    total_steps = args.max_steps or max(1, int(args.epochs * len(frames) / global_batch))
    warmup_steps = int(total_steps * args.warmup_epochs / args.epochs)
    train_set = TrainFrames(frames, seconds, shape["img_size"], short_side, args.movie_start, args.jitter, args.flip,
                            args.color_jitter, args.seed)
    if short_side < min(shape["img_size"]):
        say(f"--short_side {short_side} is less than the crop's {min(shape['img_size'])}: frames are scaled to fit it")

    # ---- resume: the run in out_dir goes on if it is this one
    last, log_file = os.path.join(args.out_dir, "last.pt"), os.path.join(args.out_dir, "log.jsonl")
    free = {"out_dir", "resume", "num_workers", "log_every", "save_every", "eval_every", "max_bad", "toy", "device",
            "checkpointing", "batch_size", "accum_steps", "data", "data_root", "val_data", "val_boxes", "val_excluded",
            "excluded", "label_map", "score_map", "box_score", "movie_list", "protocol", "show", "boxes", "full_frame",
            "video", "ckpt", "score"}
    run = {k: v for k, v in vars(args).items() if k not in free}  # what may not change within a run
    content = b"".join(f"{f.video} {f.second}".encode() + f.boxes.tobytes() + f.labels.tobytes() for f in frames)
    run |= dict(dtype=dtype_name, global_batch=global_batch, sampling_rate=rate, fps=fps, short_side=short_side,
                frames=f"{len(frames)} ({zlib.crc32(content):08x})")
    first_step, saved, changed, best, tested = 0, None, [], -1.0, 0  # tested: the step of the last test
    if args.resume and not os.path.exists(last):
        raise ValueError(f"--resume: there is no {last}")
    if os.path.exists(last) and args.resume is not False:
        try:
            saved = torch.load(last, map_location="cpu", weights_only=True)
            changed = [f"{k} {saved['args'].get(k)} -> {v}" for k, v in run.items() if saved["args"].get(k) != v]
            finished = saved["step"] >= saved["args"]["total_steps"]
            differ = [k for k, v in model.config.items() if k != "pos_grid" and saved["config"].get(k, v) != v]
            differ += ["classes"] if saved["classes"] != list(names.values()) else []
        except Exception as e:  # torch raises whatever the broken bytes lead to
            raise ValueError(f"{last}: not a checkpoint of detect_ava.py ({e}); --no-resume moves it aside") from None
        if (changed or differ) and args.resume is None and finished:
            saved = None  # a finished run with other settings: start anew beside it
        elif changed and args.resume is None:
            raise ValueError(f"{last} holds another unfinished run ({', '.join(changed)}): choose another --out_dir, "
                             "--no-resume to start anew (the old files are kept), or --resume to go on with the new "
                             "settings")
        elif differ:
            raise ValueError(f"{last} holds another model ({', '.join(changed or differ)}): it cannot go on with this "
                             "one; choose another --out_dir, or --no-resume to start anew")
        elif changed:
            say(f"going on with other settings: {', '.join(changed)}")
    if saved:
        model.set_positions(saved["config"]["pos_grid"])
        model.load_state_dict(saved["model"])
        first_step, best, tested = saved["step"], saved["best"], saved["tested"]
        say(f"resumed {last} at step {first_step} of {total_steps}")
    elif args.init:
        load_pretrained(model, args.init, verbose=rank == 0)
    if world > 1:  # all have looked before anyone moves or writes files
        steps = torch.tensor([first_step, -first_step])
        dist.all_reduce(steps, dist.ReduceOp.MAX, group=control)
        if steps.sum() != 0:
            raise ValueError(f"not all ranks see the same {last}: --out_dir must be on a disk that all nodes share")
    ours = r"last\.pt|best\.pt|log\.jsonl|bad_videos|detections\.csv"
    old = [f for f in sorted(os.listdir(args.out_dir)) if re.match(ours, f)]
    if not saved and rank == 0 and old:
        n = next(n for n in itertools.count(1) if not os.path.exists(os.path.join(args.out_dir, f"previous-{n}")))
        os.mkdir(os.path.join(args.out_dir, f"previous-{n}"))
        for f in old:
            os.rename(os.path.join(args.out_dir, f), os.path.join(args.out_dir, f"previous-{n}", f))
        say(f"{args.out_dir} held another run{f' ({chr(44).join(changed)})' if changed else ''}: kept in previous-{n}/")
    if rank == 0 and os.path.exists(log_file):  # rows after the checkpoint will be written again
        rows = [r for r in open(log_file) if r.endswith("\n") and json.loads(r)["step"] <= first_step]
        open(log_file, "w").writelines(rows)

    # ---- optimiser
    frozen = ["patch_embed."] * bool(args.freeze) + [f"blocks.{i}." for i in range(args.freeze)]
    for name, param in model.named_parameters():
        param.requires_grad = not name.startswith(tuple(frozen))
    model.to(device)
    if world > 1:
        model = DistributedDataParallel(model, device_ids=[local_rank] if device.type == "cuda" else None,
                                        broadcast_buffers=False)
    lr, min_lr = args.lr * global_batch / 256, args.min_lr * global_batch / 256
    layer_decay = args.layer_decay or (0.75 if args.init else 1.0)
    fused = device.type in ("cuda", "cpu")
    groups = param_groups(model_raw, args.weight_decay, layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=fused)
    params = [p for group in groups for p in group["params"]]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype_name == "fp16")
    if saved:
        options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        sizes = lambda groups: [len(group["params"]) for group in groups]
        if sizes(saved["optimizer"]["param_groups"]) != sizes(optimizer.param_groups):
            raise ValueError(f"{last}: --freeze and a --layer_decay of 1 change which parameters are grouped: "
                             "they cannot change within a run")
        optimizer.load_state_dict(saved["optimizer"])
        for group, option in zip(optimizer.param_groups, options):  # decay and betas are those of the flags
            group.update(option)
        if saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
    del saved

    # ---- loader: starts at the clip where the run stands
    batches = data.Batches(len(frames), args.batch_size, args.accum_steps, rank, world, first_step, total_steps,
                           args.seed)
    loader = torch.utils.data.DataLoader(
        train_set, batch_sampler=batches, num_workers=num_workers, collate_fn=data.collate,
        worker_init_fn=data.ignore_signals, pin_memory=device.type == "cuda",
        prefetch_factor=2 if num_workers else None)
    trained = sum(p.numel() for p in params)
    say(f"{shape['size']} with {count_params(model_raw) / 1e6:.1f} M parameters ({trained / 1e6:.3g} M trained), "
        f"clips of {'x'.join(map(str, (shape['num_frames'], *shape['img_size'])))}, "
        f"{world} rank(s) x {args.batch_size} key frames x {args.accum_steps} = batch {global_batch}, {total_steps} "
        f"steps = {total_steps * global_batch / len(frames):.1f} epochs, peak lr {lr:.2e}, layer decay "
        f"{layer_decay:g}, {device.type} {dtype_name}, {num_workers} workers")

    def log(row):
        with open(log_file, "a") as f:
            f.write(json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n")

    def write(name, state):
        """A checkpoint is whole at any moment: written beside, flushed, renamed."""
        path = os.path.join(args.out_dir, name)
        with open(path + ".part", "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".part", path)

    def about_run(step):
        return dict(step=step, epoch=step * global_batch / len(frames), rng=dict(seed=args.seed),
                    config=model_raw.config | dict(class_ids=class_ids), classes=list(names.values()),
                    args=vars(args) | run | dict(total_steps=total_steps), best=best, tested=tested)

    def save(step):
        if rank == 0:
            write("last.pt", dict(model=model_raw.state_dict(), optimizer=optimizer.state_dict(),
                                  scaler=scaler.state_dict()) | about_run(step))

    def validate(step):
        """Tests, logs, keeps the best weights. All ranks take part."""
        nonlocal best, tested
        save(step)  # what was trained is not lost if the test fails or takes long
        model_raw.eval()
        say(f"test at step {step}:")
        result, failed = test(False)
        model_raw.train()
        tested = step
        if rank == 0:
            for i, why in failed.items():
                note_bad(val_frames[i].path, why)
            log(dict(step=step, map=100 * result["map"], val_frames=len(val_frames), val_failed=len(failed),
                     epoch=step * global_batch / len(frames)))
            if result["map"] > best:
                best = result["map"]
                write("best.pt", dict(model=model_raw.state_dict()) | about_run(step))

    # ---- loop
    stop = []  # signals received
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: os._exit(128 + number) if number in stop else stop.append(number))
    loss_sum, boxes_sum = torch.zeros((2,), device=device)  # since the last log line, of batches with a finite loss
    skipped, in_row = torch.zeros((2,), device=device)  # steps with a non-finite gradient: all, and the last in a row
    reads = bad_reads = 0
    bad_file = os.path.join(args.out_dir, "bad_videos.txt")
    bad_seen = {row.split("\t")[0] for row in open(bad_file)} if os.path.exists(bad_file) else set()

    def note_bad(path, why):
        if path not in bad_seen:
            bad_seen.add(path)
            with open(bad_file, "a") as f:
                f.write(f"{path}\t{why.removeprefix(path + ': ')}\n")

    passed = lambda s: int(s * global_batch / len(frames) / args.eval_every) if args.eval_every else 0
    if val_frames and (passed(first_step) > passed(tested) or tested < first_step == total_steps):
        validate(first_step)  # the run was stopped before this one
        save(first_step)
    waiting, clock, logged = data.Waiting(device), time.time(), first_step
    model.train()
    stream = iter(loader)
    step = first_step
    while step < total_steps:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, lr, min_lr, warmup_steps, total_steps) * group["lr_scale"]
        torch.manual_seed(zlib.crc32(f"{args.seed} {step} {rank}".encode()))  # drop path
        for micro in range(args.accum_steps):
            with waiting:
                batch, bad = next(stream)
            for path, why in bad:
                note_bad(path, why)
            reads, bad_reads = reads + args.batch_size + len(bad), bad_reads + len(bad)
            if batch is None:
                raise ValueError(f"10 key frames in a row could not be read, the last: {bad[-1][1]}")
            index = torch.repeat_interleave(batch[3])  # (R,): the clip of each box
            video, boxes, label, index, shift = (data.send(x, device)
                                                 for x in (*batch[:3], index, batch[4]))
            if any(args.color_jitter):
                video = augment.hsv_shift(to_unit(video), shift)  # (B, T, H, W, C)
            sync = contextlib.nullcontext() if world == 1 or micro == args.accum_steps - 1 else model.no_sync()
            with sync:
                with autocast:
                    logits = model(video, boxes, index)  # (R, K)
                # every box counts alike, whatever rank or batch it is in; AdamW does not mind the scale
                loss = F.binary_cross_entropy_with_logits(logits.float(), label, reduction="none").mean(1).sum()
                scaler.scale(loss / len(video) / args.accum_steps).backward()
            fine = torch.isfinite(loss.detach())
            loss_sum += torch.nan_to_num(loss.detach(), 0, 0, 0)
            boxes_sum += fine * len(index)
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in params])  # of DDP's average: the same on all ranks
        if args.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(params, args.clip_grad, grad_norm)
        bad_step = ~torch.isfinite(grad_norm)
        skipped, in_row = skipped + bad_step, (in_row + 1) * bad_step
        if scaler.is_enabled():
            scaler.step(optimizer)  # looks for non-finite gradients itself
            scaler.update()
        elif fused:
            optimizer.found_inf = bad_step.float()  # the fused kernel skips the step by itself: no wait for the host
            optimizer.step()
        elif not bad_step:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        stopping = torch.tensor(max(stop, default=0))
        if world > 1:
            dist.all_reduce(stopping, dist.ReduceOp.MAX, group=control)
        if step % args.log_every == 0 or step == total_steps or stopping:
            stats = torch.stack([loss_sum, boxes_sum]).float()
            tally = torch.tensor([reads, bad_reads] + [0.0] * world, dtype=torch.float64)
            tally[2 + rank] = waiting.seconds()
            if world > 1:
                dist.all_reduce(stats)
                dist.all_reduce(tally, group=control)
            loss_total, box_count = stats.tolist()
            all_reads, all_bad, *waited = tally.tolist()
            seconds_passed = time.time() - clock
            memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(
                resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            row = dict(step=step, loss=loss_total / box_count if box_count else math.nan,
                       lr=max(g["lr"] for g in optimizer.param_groups), grad_norm=grad_norm.item(),
                       epoch=step * global_batch / len(frames),
                       clips_per_s=(step - logged) * global_batch / seconds_passed,
                       waiting=max(waited) / seconds_passed, memory_gb=memory / 2**30,
                       seconds_left=(total_steps - step) * seconds_passed / max(step - logged, 1),
                       bad_reads=int(all_bad), skipped_steps=int(skipped))
            if rank == 0:
                log(row)
            say(f"step {step}/{total_steps} | loss {row['loss']:.4f} (class shares {prior:.4f}) | lr {row['lr']:.2e} | "
                f"grad norm {row['grad_norm']:.3f} | {row['clips_per_s']:.1f} clips/s | "
                f"waiting for data {row['waiting']:.0%} | {row['memory_gb']:.2f} GB | "
                f"{datetime.timedelta(seconds=round(row['seconds_left']))} left"
                + (f" | {row['skipped_steps']} non-finite steps skipped" if row["skipped_steps"] else "")
                + (f" | {row['bad_reads']} bad reads" if row["bad_reads"] else ""), flush=True)
            if int(in_row) >= MAX_NONFINITE:
                raise ValueError(f"{int(in_row)} steps in a row with a non-finite gradient, at step {step}, "
                                 f"lr {row['lr']:.2e}: lower --lr or use --clip_grad or --dtype fp32; {last} is as "
                                 "last saved")
            if all_reads >= 20 and all_bad / all_reads > args.max_bad:
                save(step)
                raise ValueError(f"{int(all_bad)} of {int(all_reads)} reads failed, more than --max_bad "
                                 f"{args.max_bad}: see {bad_file}")
            loss_sum.zero_()
            boxes_sum.zero_()
            clock, logged = time.time(), step
        if val_frames and not stopping and (step == total_steps or passed(step) > passed(step - 1)):
            t = time.time()
            validate(step)
            clock += time.time() - t
        if step % args.save_every == 0 or step == total_steps or stopping:
            save(step)
        if stopping:
            say(f"stopped by signal {int(stopping)}; saved {last} at step {step}: the same command goes on from there")
            break
    else:
        if first_step >= total_steps:
            say("this run is finished; --no-resume starts it anew")
        elif val_frames:
            say(f"best mAP {100 * best:.2f} in {args.out_dir}/best.pt, the last weights in {last}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return 128 + int(stopping) if step > first_step and stopping else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as e:
        sys.exit(f"detect_ava.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
