"""Videos in, uint8 clips out: lists, folders, decoding (PyAV), clip samplers, crops, toy videos, writing pictures.

    python data.py index ucf101 trainlist01.txt UCF-101/ ucf_train.tsv     # a public layout -> a list file
    python data.py split my_videos/ train.tsv val.tsv                      # one's own videos -> two list files
    python data.py check ucf_train.tsv                                     # which files cannot be read, and why
    python data.py prepare ucf_train.tsv ucf_train/                        # decode once, for --data ucf_train/
    python data.py toy                                                     # write the toy videos to toy/

A clip is (T, H, W, C) uint8. A frame index counts presented frames from 0. What is drawn for a sample depends on
(seed, epoch, index) alone, never on the number of workers.
"""

import argparse
import atexit
import contextlib
import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time
from fractions import Fraction

import av
import numpy as np
import torch
import torch.nn.functional as F

import prepared
from augment import erase_box, rand_augment, random_resized_crop, view
from decode import MovieReader, VideoError, VideoReader, nearest, resize, short_side  # some of it for the stages
from prepared import open_movie, open_video

VIDEO_EXT = tuple(".mp4 .mkv .webm .avi .mov .mpg .mpeg .m4v .wmv .flv .3gp .ts .ogv .gif .mts .m2ts .vob .mxf .ogg "
                  ".asf .divx .y4m .m2v .m1v .f4v".split())
IMAGE_EXT = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


# ---- lists and folders ----

MEDIA = "|".join(re.escape(e) for e in VIDEO_EXT + IMAGE_EXT)


def parse_row(row: str, where: str) -> tuple[str, str | None]:
    """A list row -> (path, label or None). Paths and labels may hold spaces and commas.

    The path ends at the first known ending (.mp4, ...) that a comma, a tab or a space follows, or with the row; a path
    of unknown ending ends at the last tab, else comma, else space. A path in double quotes is taken as it is.
    """
    tabbed = re.fullmatch(rf"(.*(?:{MEDIA}))\t([^\t]*)", row, re.IGNORECASE)  # as our own lists have it
    if tabbed and not row.startswith('"'):
        return tabbed[1].strip(), tabbed[2].strip().strip('"') or None
    quoted = re.fullmatch(r'\s*"([^"]+)"\s*(?:[,\t ]\s*"?(.*?)"?\s*)?', row)
    known = re.fullmatch(rf"(.*?(?:{MEDIA}))(?:\s*[,\t ]\s*(.*?))?\s*", row, re.IGNORECASE)
    quoted = quoted if not known or re.search(rf"(?:{MEDIA})$", (quoted or [""] * 2)[1], re.IGNORECASE) else None
    match = quoted or known or next(filter(None, (re.fullmatch(rf"(.+){sep}(.*)", row) for sep in "\t, ")), None)
    if not match:
        raise ValueError(f"{where}: {row!r}: expected `path`, or `path label` with a tab, a comma or a space between")
    path, label = match[1], (match[2] or "").strip().strip('"')
    return path if quoted else path.strip(), label or None


def write_list(out: str, rows: list):
    """Writes (path, label or None) rows so that parse_row reads them back; odd paths are put in double quotes."""
    with open(out, "w", encoding="utf-8") as f:
        for path, label in rows:
            row = f"{path}\t{label}" if label else path
            f.write((row if parse_row(row, out) == (path, label or None) else row.replace(path, f'"{path}"', 1)) + "\n")


def read_videos(source: str, data_root: str = "") -> tuple[list[str], list[str | None]]:
    """A list file, a folder (of class folders or flat), a prepared set or one video -> paths, labels as written.

    A label is None where there is none. The videos of a prepared set are named FOLDER::PATH.
    """
    is_media = lambda name: name.lower().endswith(VIDEO_EXT + IMAGE_EXT) and not name.startswith(".")
    if os.path.isdir(source) and prepared.is_prepared(source):
        source = os.path.normpath(source)
        rows = [(f"{source}::{path}", label) for path, label in prepared.read_index(source)["rows"]]
    elif os.path.isdir(source):
        rows, seen = [], set()
        for folder, subfolders, files in os.walk(source, followlinks=True):
            hidden = {s for s in subfolders if s.startswith((".", "@eaDir"))}  # a NAS keeps its thumbnails in @eaDir
            seen.add(os.path.realpath(folder))  # links may lead in a circle
            subfolders[:] = sorted(s for s in subfolders
                                   if s not in hidden and os.path.realpath(os.path.join(folder, s)) not in seen)
            inside = os.path.relpath(folder, source).split(os.sep)[0]  # class = first folder below the source
            label = None if inside == "." else inside
            rows += [(os.path.join(folder, f), label) for f in sorted(files) if is_media(f)]
        if not rows:
            raise ValueError(f"{source}: no videos in this folder; known endings: {' '.join(VIDEO_EXT + IMAGE_EXT)}")
    elif prepared.in_set(source) or os.path.isfile(source) and is_media(os.path.basename(source)):
        rows = [(source, None)]
    elif os.path.isfile(source):
        try:
            lines = open(source, encoding="utf-8-sig").read().splitlines()
        except UnicodeDecodeError as e:
            raise ValueError(f"{source}: not a text file ({e}); "
                             "expected a list with a row `path label` per video") from None
        comment = lambda line: line.startswith("#") and not re.search(MEDIA, line, re.IGNORECASE)
        header = lambda i, line: i == 1 and line.lower().replace("\t", ",") in ("path,label", "video,label")
        rows = [parse_row(line, f"{source} row {i}") for i, line in enumerate(lines, 1)
                if line.strip() and not comment(line) and not header(i, line)]
        rows = [(path if prepared.in_set(path) else os.path.join(data_root, path), label) for path, label in rows]
        if not rows:
            raise ValueError(f"{source}: an empty list")
        if not any(prepared.exists(path) for path, _ in rows):
            raise ValueError(f"{source}: none of its {len(rows)} files exists, the first is {rows[0][0]!r}; "
                             "relative paths start at --data_root, or else at the current folder")
    else:
        raise ValueError(f"{source}: no such file or folder; expected a list file, a folder of videos, or the word toy")
    return [path for path, _ in rows], [label for _, label in rows]


def class_names(labels: list[str]) -> list[str]:
    """The distinct labels in order: by number where all are integers, else by name. A label's place is its class id."""
    if all(re.fullmatch(r"\d+", label) for label in labels):
        return sorted(set(labels), key=int)
    return sorted(set(labels))


def class_ids(labels: list, classes: list[str], paths: list[str], known: str) -> list[int]:
    """Labels as written -> class ids; ValueError names the videos without a label and the labels not in `classes`."""
    without = [p for p, label in zip(paths, labels) if label is None]
    if without:
        raise ValueError(f"{len(without)} of {len(paths)} videos have no label, the first is {without[0]}; expected "
                         "rows `path label` or one folder per class")
    ids = {name: i for i, name in enumerate(classes)}
    new = {}
    for path, label in zip(paths, labels):
        if label not in ids:
            new.setdefault(label, []).append(path)
    if new:
        names = "; ".join(f"{label!r} ({len(p)} videos, the first {p[0]})" for label, p in list(new.items())[:3])
        raise ValueError(f"{len(new)} labels are not among the {len(classes)} classes of {known}: {names}; "
                         f"known are {', '.join(classes[:8])}{', ...' if len(classes) > 8 else ''}")
    return [ids[label] for label in labels]


# ---- which frames ----

def sample_dense(rng, n: int, num_frames: int, stride: int) -> np.ndarray:
    """num_frames indices, `stride` apart, start uniform in [0, n - num_frames*stride].

    The paper's pre-training clip. A shorter video starts at 0 and repeats its last usable frame.
    """
    start = rng.integers(max(n - num_frames * stride, 0) + 1)
    i = start + stride * np.arange(num_frames)
    return np.minimum(i, start + (n - 1 - start) // stride * stride)


def sample_sparse(rng, n: int, num_frames: int) -> np.ndarray:
    """TSN sampling (SSv2): num_frames equal segments of the video, one random frame of each."""
    edges = np.linspace(0, n, num_frames + 1)
    return np.minimum((edges[:-1] + rng.random(num_frames) * (edges[1:] - edges[:-1])).astype(int), n - 1)


def sample_by_time(rng, times: np.ndarray, num_frames: int, fps: float) -> np.ndarray:
    """num_frames indices 1/fps seconds apart at any file rate: the nearest frames; a short video repeats its last."""
    span = num_frames / fps
    start = times[0] + rng.random() * max(times[-1] - times[0] - span, 0)
    return nearest(times, start + np.arange(num_frames) / fps)


def sample_window(rng, n: int, num_frames: int, stride: int) -> np.ndarray:
    """num_frames indices spread over a window of num_frames*stride frames at a random place: 0, 4, 8, 12, 17, ..., 63.

    The paper's dense fine-tuning clip: floored, both ends included, an effective stride of 64/15 for 16 frames at 4. A
    video not longer than the window: n // stride indices spread over all of it, then its last frame.
    """
    window = num_frames * stride
    if n <= window:
        spread = np.linspace(0, n, n // stride).astype(int)
        return np.minimum(np.concatenate([spread, np.full(num_frames - len(spread), n)]), n - 1)
    start = rng.integers(n - window + 1)
    return np.minimum(np.linspace(start, start + window, num_frames).astype(int), start + window - 1)


def timeline(times: np.ndarray, fps: float | None) -> np.ndarray:
    """Frame indices of a video played at `fps`, whatever rate it was stored at; None: all its frames as stored."""
    if not fps:
        return np.arange(len(times))
    return nearest(times, times[0] + np.arange(int((times[-1] - times[0]) * fps) + 1) / fps)


# ---- crops ----

def multi_scale_crop(rng, height: int, width: int, scales=(1, 0.875, 0.75, 0.66)) -> tuple[int, int, int, int]:
    """-> (top, left, h, w): sides int(short side * scale), scale indices at most 1 apart, at one of 13 anchors."""
    sides = [max(1, int(min(height, width) * s)) for s in scales]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    h, w = pairs[rng.integers(len(pairs))]
    # corners, centre, edge midpoints, quarter points, in quarters of the free space
    anchors = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2), (1, 1), (1, 3), (3, 1), (3, 3)]
    y, x = anchors[rng.integers(len(anchors))]
    return y * ((height - h) // 4), x * ((width - w) // 4), h, w


def crop_resize(frames, box: tuple, height: int, width: int) -> torch.Tensor:
    """T frames (H, W, C) uint8 and (top, left, h, w) -> (T, height, width, C) uint8."""
    top, left, h, w = box
    part = torch.from_numpy(np.stack([frame[top:top + h, left:left + w] for frame in frames]))
    return resize(part, height, width).contiguous()


# ---- what training draws ----

class PretrainClips(torch.utils.data.Dataset):
    """(epoch, index) -> (clips, bad): clips (repeat_aug, T, H, W, C) uint8, bad the (path, reason) of all that failed.

    A video that cannot be read is reported and another, drawn from (seed, epoch, index), takes its place; after ten
    such in a row clips is None. With repeat_aug several clips, each with its own start and crop, come from one pass of
    decoding. stride counts frames; fps, when given, samples by time instead; sampling "sparse" takes one frame of each
    of T equal segments.
    """

    def __init__(self, paths, num_frames=16, size=(224, 224), stride=4, fps=None, sampling="dense", repeat_aug=1,
                 crop_scales=(1, 0.875, 0.75, 0.66), flip=False, seed=0):
        self.paths, self.num_frames, self.size, self.stride, self.fps = paths, num_frames, size, stride, fps
        self.sampling, self.repeat_aug, self.crop_scales = sampling, repeat_aug, crop_scales
        self.flip, self.seed = flip, seed
        prepared.check_stride(paths, stride if sampling == "dense" and not fps else None)

    def __len__(self):
        return len(self.paths)

    def load(self, index: int, rng) -> torch.Tensor:
        """-> (repeat_aug, T, H, W, C) uint8; VideoError when the file cannot be read."""
        with open_video(self.paths[index]) as video:
            if self.sampling == "sparse":
                indices = [sample_sparse(rng, len(video), self.num_frames) for _ in range(self.repeat_aug)]
            elif self.fps:
                indices = [sample_by_time(rng, video.times, self.num_frames, self.fps) for _ in range(self.repeat_aug)]
            else:
                indices = [sample_dense(rng, len(video), self.num_frames, self.stride) for _ in range(self.repeat_aug)]
            frames = video.pictures(np.concatenate(indices))
            height, width = frames[0].shape[:2]
            clips = []
            for k in range(self.repeat_aug):
                box = multi_scale_crop(rng, height, width, self.crop_scales)
                clip = crop_resize(frames[k * self.num_frames:(k + 1) * self.num_frames], box, *self.size)
                clips.append(clip.flip(2) if self.flip and rng.random() < 0.5 else clip)
        return torch.stack(clips) if self.repeat_aug > 1 else clips[0][None]

    def __getitem__(self, key):
        epoch, index = key
        bad = []
        for attempt in range(10):
            rng = np.random.default_rng([self.seed, epoch, index, attempt])
            i = index if attempt == 0 else int(rng.integers(len(self)))
            try:
                return self.load(i, rng), bad
            except VideoError as e:
                bad.append((self.paths[i], str(e)))
        return None, bad


class FinetuneClips(PretrainClips):
    """(epoch, index) -> ((clips, labels, boxes), bad), with one augmentation draw for all frames of a clip (section 5).

    clips (repeat_aug, T, H, W, C) uint8, labels (repeat_aug,) int64, boxes (repeat_aug, 4) int64: the rectangles that
    random erasing fills on the device. Dense clips are windows of T*stride frames, sparse ones have a random frame of
    each of T segments; fps first resamples the video. All repeat_aug clips show the same frames, augmented differently.
    Frames whose short side is over max_side pixels are reduced to that first (0: never), as the paper's data were.
    """

    def __init__(self, paths, labels, num_frames=16, size=(224, 224), stride=4, fps=None, sampling="dense",
                 repeat_aug=1, max_side=320, rand_aug=(4, 7.0, 0.5), crop_area=(0.08, 1), crop_aspect=(3 / 4, 4 / 3),
                 flip=True, erase_prob=0.25, seed=0):
        super().__init__(paths, num_frames, size, stride, fps, sampling, repeat_aug, flip=flip, seed=seed)
        self.labels, self.max_side, self.rand_aug = labels, max_side, rand_aug
        self.crop_area, self.crop_aspect, self.erase_prob = crop_area, crop_aspect, erase_prob

    def reduced(self, h: int, w: int) -> tuple[int, int]:
        """The size that frames of h x w are decoded to."""
        return short_side(h, w, self.max_side) if self.max_side and min(h, w) > self.max_side else (h, w)

    def load(self, index: int, rng):
        """-> clips, labels, boxes as above; VideoError when the file cannot be read."""
        with open_video(self.paths[index], self.reduced) as video:
            frames = timeline(video.times, self.fps)
            if self.sampling == "sparse":
                indices = sample_sparse(rng, len(frames), self.num_frames)
            else:
                indices = sample_window(rng, len(frames), self.num_frames, self.stride)
            decoded = torch.from_numpy(video.frames(frames[indices]))
        planes = decoded.permute(0, 3, 1, 2).contiguous()  # (T, C, H, W)
        clips, boxes = [], []
        for _ in range(self.repeat_aug):
            x = rand_augment(rng, planes, *self.rand_aug)
            top, left, h, w = random_resized_crop(rng, *x.shape[2:], self.crop_area, self.crop_aspect)
            x = x[:, :, top:top + h, left:left + w].contiguous()
            if (h, w) != self.size:
                x = F.interpolate(x, size=self.size, mode="bilinear", antialias=True)
            x = x.flip(3) if self.flip and rng.random() < 0.5 else x
            clips.append(x.permute(0, 2, 3, 1))
            boxes.append(erase_box(rng, *self.size, self.erase_prob))
        return torch.stack(clips), torch.full((self.repeat_aug,), self.labels[index]), torch.tensor(boxes)


def collate(samples: list):
    """[(item, bad), ...] -> the items concatenated, tensor by tensor (None if one is None), and all that was bad."""
    items, bad = [item for item, _ in samples], [b for _, bad in samples for b in bad]
    if any(item is None for item in items):
        return None, bad
    return torch.cat(items) if torch.is_tensor(items[0]) else tuple(map(torch.cat, zip(*items))), bad


SIDE_STREAMS: dict = {}


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor from the loader on its way to the device; on CUDA its copy overlaps with the step before.

    There the copy has a stream of its own, so it does not queue behind the kernels that the host has launched already.
    """
    if device.type != "cuda":
        return x.to(device)
    side = SIDE_STREAMS.setdefault(device, torch.cuda.Stream(device))
    with torch.cuda.stream(side):
        x = x.to(device, non_blocking=True)
    torch.cuda.current_stream(device).wait_stream(side)
    x.record_stream(torch.cuda.current_stream(device))
    return x


class Waiting:
    """How long the device had nothing to do because a batch was not there: `with waiting: batch = next(loader)`.

    The host runs ahead of a GPU and may wait for data while that still works. There the gap between the last kernel
    before the wait and the first one after it counts, if it is shorter than the host's wait.
    """

    def __init__(self, device: torch.device):
        self.cuda, self.waits = device.type == "cuda", []

    def event(self):
        event = torch.cuda.Event(enable_timing=True) if self.cuda else None
        if event:
            event.record()
        return event

    def __enter__(self):
        self.before, self.start = self.event(), time.perf_counter()

    def __exit__(self, *exc):
        self.waits.append((time.perf_counter() - self.start, self.before, self.event()))

    def seconds(self) -> float:
        """The sum since the last call; on CUDA this waits for the start of the last step."""
        if self.cuda and self.waits:
            self.waits[-1][2].synchronize()
        total = sum(min(host, before.elapsed_time(after) / 1000) if before else host
                    for host, before, after in self.waits)
        self.waits = []
        return total


class Batches:
    """Batch sampler without end-of-epoch gaps: the permutations of all epochs one after the other, cut into batches.

    Position p of that stream is sample (epoch, index) = (p // n, permutation(seed, epoch)[p % n]). Step s takes
    `accum` * `world` batches; this rank's are yielded in order. So 1 rank x 2B, 2 ranks x B and 2 accumulated x B see
    the same samples, sets smaller than a batch work, and a resumed run starts at any step.
    """

    def __init__(self, n: int, batch_size: int, accum: int, rank: int, world: int, first_step: int, last_step: int,
                 seed: int):
        self.n, self.batch_size, self.accum, self.rank, self.world = n, batch_size, accum, rank, world
        self.first_step, self.last_step, self.seed = first_step, last_step, seed

    def __len__(self):
        return (self.last_step - self.first_step) * self.accum

    def __iter__(self):
        orders = {}
        for micro in range(self.first_step * self.accum, self.last_step * self.accum):
            start = (micro * self.world + self.rank) * self.batch_size
            batch = []
            for p in range(start, start + self.batch_size):
                epoch, i = divmod(p, self.n)
                if epoch not in orders:
                    orders = {e: o for e, o in orders.items() if e >= epoch - 1}
                    orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.n)
                batch.append((epoch, int(orders[epoch][i])))
            yield batch


class ViewPairs(torch.utils.data.Dataset):
    """(epoch, index, is_image) -> (views (1, 2, T, H, W, C) uint8, bad): two views of a video or of an image.

    Of a video with num_frames 1 (ViC-MAE) they are frames of the two halves of a clip of 2 * gap frames (gap 0: one
    frame twice); with more (MoCo v3) two clips of `stride`, each with its own start. Of an image two crops. One
    augmentation draw per view. What cannot be read is replaced as in PretrainClips.
    """

    def __init__(self, videos, images, num_frames=1, size=(224, 224), stride=4, gap=32, area=(0.5, 1), color=False,
                 image_area=(0.2, 1), image_color=True, seed=0):
        self.paths = videos, images
        self.num_frames, self.size, self.stride, self.gap, self.seed = num_frames, size, stride, gap, seed
        self.area, self.color = (area, image_area), (color, image_color)  # of videos, of images
        if num_frames > 1:
            prepared.check_stride(videos, stride)

    def load(self, path: str, is_image: bool, rng) -> torch.Tensor:
        """-> (2, T, H, W, C) uint8; VideoError when the file cannot be read."""
        with open_video(path) as video:
            n, T = len(video), self.num_frames
            if T > 1:
                indices = np.concatenate([sample_dense(rng, n, T, self.stride) for _ in range(2)])
            else:
                span = 1 if is_image else min(max(2 * self.gap, 1), n)
                start = rng.integers(n - span + 1)
                half = span // 2
                indices = start + np.array([rng.integers(max(half, 1)), half + rng.integers(span - half)])
            frames = torch.from_numpy(video.frames(indices)).permute(0, 3, 1, 2).contiguous()  # (2T, C, H, W)
        views = [view(rng, clip, self.size, self.area[is_image], self.color[is_image], second=bool(k))
                 for k, clip in enumerate(frames.split(T))]
        return torch.stack(views).permute(0, 1, 3, 4, 2)

    def __getitem__(self, key):
        epoch, index, is_image = key
        bad, paths = [], self.paths[is_image]
        for attempt in range(10):
            rng = np.random.default_rng([self.seed, epoch, index, is_image, attempt])
            path = paths[index if attempt == 0 else int(rng.integers(len(paths)))]
            try:
                return self.load(path, is_image, rng)[None], bad
            except VideoError as e:
                bad.append((path, str(e)))
        return None, bad


class MixedBatches:
    """Batches of (epoch, index, False) from a stream of videos, then (epoch, index, True) from one of images."""

    def __init__(self, videos: Batches | None, images: Batches | None):
        self.streams = [(stream, kind) for kind, stream in enumerate((videos, images)) if stream]

    def __len__(self):
        return len(self.streams[0][0])

    def __iter__(self):
        for parts in zip(*(stream for stream, _ in self.streams)):
            yield [(*key, bool(kind)) for part, (_, kind) in zip(parts, self.streams) for key in part]


def ignore_signals(worker: int):
    """For data workers: a terminal and a job scheduler signal all processes; the main one decides, workers go on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers():
    """At exit multiprocessing sends workers SIGTERM, which they ignore, and waits for them: they are killed before."""
    for process in multiprocessing.active_children():
        process.kill()


atexit.register(end_workers)


# ---- pictures out ----

# 3x5 pixels a glyph, a row an octal digit: for labels in pictures, with no font library
FONT = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-:_/%()+=,", (
    "25755 65656 34443 65556 74647 74644 34553 55755 72227 11152 55655 44447 57755 "
    "65555 25552 65644 25563 65655 34216 72222 55557 55552 55775 55255 55222 71247 "
    "75557 26227 71747 71717 55711 74717 74757 71122 75757 75717 "
    "00002 00700 02020 00007 11244 51245 12221 42224 02720 07070 00024").split()))


def draw_text(image: np.ndarray, text: str, y: int, x: int, scale: int = 1, color=(0, 0, 0)):
    """Writes text into an (H, W, 3) uint8 image in place, glyphs 4*scale wide, 5*scale high; cut off at the edges."""
    for k, char in enumerate(text.upper()):
        rows = [[int(d) >> b & 1 for b in (2, 1, 0)] for d in FONT.get(char, "00000")]
        glyph = np.kron(np.array(rows, bool), np.ones((scale, scale), bool))
        place = image[y:y + 5 * scale, x + 4 * scale * k:x + 4 * scale * k + 3 * scale]
        place[glyph[:place.shape[0], :place.shape[1]]] = color


def strip(frames: np.ndarray, label: str, columns: int = 8) -> np.ndarray:
    """(T, H, W, 3) uint8 -> up to `columns` frames side by side under a label."""
    frames = frames[np.linspace(0, len(frames) - 1, min(columns, len(frames))).astype(int)]
    zoom = max(1, 112 // frames.shape[1])
    row = np.concatenate(list(np.pad(frames.repeat(zoom, 1).repeat(zoom, 2), ((0, 0), (0, 2), (0, 2), (0, 0)),
                                     constant_values=255)), 1)
    title = np.full((14, row.shape[1], 3), 255, np.uint8)
    draw_text(title, label, 2, 2, 2)
    return np.concatenate([title, row])


def write_png(path: str, image: np.ndarray):
    """(H, W, 3) uint8 -> a PNG file."""
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width, codec.pix_fmt, codec.time_base = *image.shape[:2], "rgb24", Fraction(1)
    packets = codec.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")) + codec.encode(None)
    with open(path, "wb") as f:
        f.write(b"".join(bytes(p) for p in packets))


def write_video(path: str, frames: np.ndarray, fps: int = 25, crf: int = 18, **options):
    """(T, H, W, 3) uint8 with even H and W -> an H.264 file; options go to x264 as is (gop is `g`, B-frames `bf`)."""
    with av.open(path, "w") as out:
        stream = out.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "threads": "1"} | {k: str(v) for k, v in options.items()}
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        out.mux(stream.encode(None))


# ---- the toy videos ----

TOY_CLASSES = ("right", "down_right", "down", "down_left", "left", "up_left", "up", "up_right")
TOY_TRAIN, TOY_VAL, TOY_FRAMES, TOY_SIDE = 640, 160, 24, 48  # videos, videos, frames, pixels


def toy_clip(rng, label: int, num_frames: int = TOY_FRAMES, side: int = TOY_SIDE) -> np.ndarray:
    """(T, side, side, 3) uint8: a random texture that moves in one of 8 directions, the label; no single frame tells.

    Half transparent, it lies over another that rests: labels alone teach the motion slowly. A texture is two coloured
    fields of six waves each, of random direction and about as long as two or three cubes: too irregular to be continued
    from the neighbours within a frame. But the moving one passes a cube in two frames, so that what a masked cube hides
    was or will be visible elsewhere. To predict it is to know the motion: the evidence for the label lies where the
    loss is.
    """
    angle, speed = label * np.pi / 4, rng.uniform(0.125, 0.1875) * side  # pixels per frame
    t = np.arange(num_frames)[:, None, None]
    y, x = np.mgrid[:side, :side]
    layers = np.zeros((num_frames, side, side, 3))
    for step in (speed, 0):  # the moving texture and the resting one
        k = 2 * np.pi / (rng.uniform(0.375, 0.75, (2, 6)) * side)  # per pixel
        direction, phase = rng.uniform(0, 2 * np.pi, (2, 2, 6))
        color = rng.normal(size=(2, 3))
        color /= np.abs(color).sum(0)
        fx, fy = x - t * step * np.cos(angle), y - t * step * np.sin(angle)  # (T, side, side): where it came from
        kx, ky = k * np.cos(direction), k * np.sin(direction)
        fields = [sum(np.cos(kx[f, i] * fx + ky[f, i] * fy + phase[f, i]) for i in range(6)) for f in range(2)]
        layers += np.einsum("ftyx,fc->tyxc", np.array(fields), color)
    return (128 + 23 * layers).clip(0, 255).astype(np.uint8)


def write_once(root: str, parts, fill, log):
    """fill(folder) writes a data set that then appears at root, whole or not at all; nothing happens where it is."""
    if os.path.exists(root):
        missing = [name for name in parts if not os.path.exists(os.path.join(root, name))]
        if missing:
            raise ValueError(f"{root}/ exists but does not hold the toy videos (no {root}/{missing[0]}): move it away")
        return
    part = f"{root}.{socket.gethostname()}.{os.getpid()}.part"  # several processes may write at once
    log(f"writing the toy videos to {root}/")
    fill(part)
    try:
        os.rename(part, root)
    except OSError:  # another process was faster
        shutil.rmtree(part)


def make_toy(root: str = "toy", log=print):
    """Writes the toy set to root/{train,val,dev}/<class>/ unless it is there; deterministic.

    dev is for choosing hyper-parameters, so that val stays unseen.
    """
    def fill(folder):
        for split, seed, count in (("train", 0, TOY_TRAIN), ("val", 1, TOY_VAL), ("dev", 2, TOY_VAL)):
            for i in range(count):
                label = i % len(TOY_CLASSES)
                path = os.path.join(folder, split, TOY_CLASSES[label], f"{i:04d}.mp4")
                os.makedirs(os.path.dirname(path), exist_ok=True)
                write_video(path, toy_clip(np.random.default_rng([seed, i]), label), g=8, bf=2)
    write_once(root, ("train", "val", "dev"), fill, log)


TOY_SHAPES, TOY_WAYS = ("disc", "square", "triangle", "cross"), ("right", "down", "left", "up")


def waves(rng, side: int) -> np.ndarray:
    """(side, side, 3) float, about -1 to 1: a coloured field of six waves of one to three periods."""
    y, x = np.mgrid[:side, :side]
    k = rng.integers(-3, 4, (6, 2)) * 2 * np.pi / side
    phase, color = rng.uniform(0, 2 * np.pi, (6, 1)), rng.normal(size=(6, 3))
    field = np.cos(k[:, 0, None, None] * x + k[:, 1, None, None] * y + phase[..., None])  # (6, side, side)
    return np.einsum("fyx,fc->yxc", field, color / np.abs(color).sum(0))


def toy_shape_clip(rng, shape: int, way: int, fields: list, num_frames: int = TOY_FRAMES) -> np.ndarray:
    """(T, side, side, 3) uint8: four equal shapes cross a ground together; one frame tells the shape, none the way.

    The textures of both (one of the fields (side, side, 3), shifted) are drawn anew in every frame: frames of a video
    share shape, size, light or dark, and motion; there is no texture to know it by. Shapes of one size have one area.
    """
    side = len(fields[0])
    field = lambda: np.roll(fields[rng.integers(len(fields))], rng.integers(side, size=2), (0, 1))
    y, x = np.mgrid[:side // 2, :side // 2] - side / 4 + 0.5
    r = rng.uniform(0.16, 0.2) * side
    mask = (x ** 2 + y ** 2 < r ** 2, np.maximum(abs(x), abs(y)) < 0.88 * r,
            (y < 1.27 * r) & (y > 2.1 * abs(x) - 1.27 * r),
            (np.minimum(abs(x), abs(y)) < 0.39 * r) & (np.maximum(abs(x), abs(y)) < 1.2 * r))[shape]
    start, speed = rng.integers(side, size=2), rng.uniform(0.06, 0.1) * side  # pixels per frame
    light, frames = rng.choice((58, 198)), []
    for t in range(num_frames):
        move = (start + np.round(t * speed * np.array(((0, 1), (1, 0), (0, -1), (-1, 0))[way]))).astype(int)
        there = np.roll(np.tile(mask, (2, 2)), move, (0, 1))[..., None]
        frames.append(np.where(there, light + 20 * field(), 128 + 40 * field()))
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def make_toy_shapes(root: str = "toy_shapes", log=print):
    """Writes the toy set of shapes that move: root/{train,val}/*.mp4, and lists of them with the label of either kind.

    train_shape.tsv, train_way.tsv, val_shape.tsv, val_way.tsv; their paths start where root's does.
    """
    def fill(folder):
        fields = [waves(np.random.default_rng([5, i]), TOY_SIDE) for i in range(64)]
        for split, seed, count in (("train", 3, TOY_TRAIN), ("val", 4, TOY_VAL)):
            os.makedirs(os.path.join(folder, split))
            rows = []
            for i in range(count):
                shape, way = i % 4, i // 4 % 4
                clip = toy_shape_clip(np.random.default_rng([seed, i]), shape, way, fields)
                write_video(os.path.join(folder, split, f"{i:04d}.mp4"), clip, g=8, bf=2)
                rows.append((f"{root}/{split}/{i:04d}.mp4", TOY_SHAPES[shape], TOY_WAYS[way]))
            write_list(os.path.join(folder, f"{split}_shape.tsv"), [(path, shape) for path, shape, _ in rows])
            write_list(os.path.join(folder, f"{split}_way.tsv"), [(path, way) for path, _, way in rows])
    write_once(root, ("train", "val", "train_shape.tsv", "val_way.tsv"), fill, log)


# ---- python data.py index: public layouts -> list files ----

def index_kinetics(annotation: str, videos: str, part: str, split: int):
    """Kinetics csv (label,youtube_id,time_start,time_end,split): <id>_<start>_<end>.mp4, in class folders or flat."""
    with open(annotation, newline="", encoding="utf-8-sig") as f:
        for i, row in enumerate(csv.DictReader(f), 2):
            try:
                name = f"{row['youtube_id']}_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{annotation} row {i}: "
                                 "expected columns label,youtube_id,time_start,time_end") from None
            label = row.get("label") or None
            yield [os.path.join(videos, d, name) for d in (label or "", (label or "").replace(" ", "_"), "")], label


def index_ssv2(annotation: str, videos: str, part: str, split: int):
    """Something-Something v2 json ([{id, template}]): <id>.webm; the label is the template without its brackets."""
    try:
        rows = json.load(open(annotation, encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{annotation}: not a json file ({e})") from None
    for i, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        if not isinstance(row, dict) or "id" not in row:
            raise ValueError(f"{annotation} entry {i}: expected an object with id and template")
        label = (row.get("template") or "").replace("[", "").replace("]", "")
        yield [os.path.join(videos, str(row["id"]))], label or None


def index_ucf101(annotation: str, videos: str, part: str, split: int):
    """UCF101 trainlist0N.txt or testlist0N.txt: rows Class/name.avi [number]; the label is the class."""
    for i, line in enumerate(open(annotation, encoding="utf-8"), 1):
        if line.strip():
            path = line.split(".avi")[0].strip() + ".avi"
            if "/" not in path:
                raise ValueError(f"{annotation} row {i}: {line.strip()!r}: expected Class/name.avi")
            yield [os.path.join(videos, p) for p in (path, path.removesuffix(".avi"))], path.split("/")[0]


def index_hmdb51(annotation: str, videos: str, part: str, split: int):
    """HMDB51 folder of <class>_test_split<N>.txt: rows name.avi 1|2|0 (train, test, unused)."""
    suffix, want = f"_test_split{split}.txt", {"train": "1", "test": "2"}[part]
    names = sorted(f for f in os.listdir(annotation) if f.endswith(suffix))
    if not names:
        raise ValueError(f"{annotation}: no file ends in {suffix}")
    for name in names:
        label = name.removesuffix(suffix)
        for line in open(os.path.join(annotation, name), encoding="utf-8"):
            if line.strip() and line.split()[-1] == want:
                path = os.path.join(videos, label, line.rsplit(maxsplit=1)[0].strip())
                yield [path, path.removesuffix(".avi")], label


def index_moments(annotation: str, videos: str, part: str, split: int):
    """Moments in Time's trainingSet.csv or validationSet.csv: rows class/name.mp4,class,votes for,votes against."""
    with open(annotation, newline="", encoding="utf-8-sig") as f:
        for i, row in enumerate(csv.reader(f), 1):
            if not row:
                continue
            if "/" not in row[0]:
                raise ValueError(f"{annotation} row {i}: expected class/name.mp4 in the first column, not {row[0]!r}")
            yield [os.path.join(videos, row[0])], row[0].split("/")[0]


LAYOUTS = {"kinetics": index_kinetics, "moments": index_moments, "ssv2": index_ssv2, "ucf101": index_ucf101,
           "hmdb51": index_hmdb51}


def index_main(args):
    """Writes a list file of the videos that exist and says which do not."""
    if not os.path.exists(args.annotation):
        raise ValueError(f"{args.annotation}: no such file or folder")
    if os.path.realpath(args.out) == os.path.realpath(args.annotation):
        raise ValueError(f"{args.out}: is the annotation itself")
    found, missing = [], []
    for stems, label in LAYOUTS[args.layout](args.annotation, args.videos, args.part, args.split):
        paths = [s + ext for s in stems for ext in ("", ".mp4", ".webm", ".mkv", ".avi")]
        path = next((p for p in paths if os.path.isfile(p)), None)
        (found if path else missing).append((path or stems[0], label))
    if not found:
        raise ValueError(f"none of the {len(missing)} videos of {args.annotation} is in {args.videos}; "
                         f"the first would be {missing[0][0] if missing else '(the annotation is empty)'}")
    write_list(args.out, found)
    labels = {label for _, label in found if label}
    print(f"{args.out}: {len(found)} videos, {len(labels)} classes; "
          f"{len(missing)} of the annotation's are not in {args.videos}"
          + "".join(f"\n  missing: {path}" for path, _ in missing[:5]) + ("\n  ..." if len(missing) > 5 else ""))


# ---- python data.py split ----

def split_main(args):
    """Deals labelled videos into folds, class by class, or whole groups where a pattern says what belongs together."""
    paths, labels = read_videos(args.source, args.data_root)
    classes = class_names([label for label in labels if label is not None])
    class_ids(labels, classes, paths, args.source)
    if not 2 <= args.folds or not 0 <= args.fold < args.folds:
        raise ValueError(f"--folds {args.folds} --fold {args.fold}: expected at least 2 folds, and 0 <= fold < folds")
    if len({os.path.realpath(p) for p in (args.source, args.train, args.val)}) < 3:
        raise ValueError(f"{args.source}, {args.train}, {args.val}: expected three different files")
    try:
        pattern = re.compile(args.group or "")
    except re.error as e:
        raise ValueError(f"--group {args.group!r}: not a regular expression ({e})") from None
    groups = {}
    for path, label in zip(paths, labels):
        match = pattern.search(path) if args.group else None
        if args.group and not match:
            raise ValueError(f"--group {args.group!r}: {path} does not match")
        groups.setdefault(match[0] if match else path, []).append((path, label))
    names = sorted(groups)
    np.random.default_rng(args.seed).shuffle(names)
    names.sort(key=lambda name: groups[name][0][1])  # stable: class by class, shuffled within
    by_class = {}
    for name in names:
        by_class.setdefault(groups[name][0][1], []).append(name)
    val = {name for some in by_class.values() if len(some) > 1  # the only one of a class is for training
           for i, name in enumerate(some) if i % args.folds == args.fold}
    for out, rows in ((args.train, [r for n in names if n not in val for r in groups[n]]),
                      (args.val, [r for n in names if n in val for r in groups[n]])):
        write_list(out, rows)
        print(f"{out}: {len(rows)} videos, {len({label for _, label in rows})} of {len(classes)} classes, "
              f"{len(val) if out == args.val else len(names) - len(val)} {'groups' if args.group else 'files'}")
        without = set(classes) - {label for _, label in rows}
        if without:
            print(f"  classes without a video in it: {', '.join(sorted(without))}")


# ---- python data.py check ----

def check_file(job: tuple[str, bool]) -> tuple[str, int, str | None]:
    """(path, decode all?) -> path, number of frames, what is wrong (None: nothing)."""
    path, full = job
    try:
        with open_video(path) as video:
            n = len(video)
            if isinstance(video, prepared.PreparedVideo):
                video.check()
            step = 64  # a long video is not held in memory whole
            for i in range(0, n, step) if full else (0,):
                video.frames(range(i, min(i + step, n)) if full else np.linspace(0, n - 1, 3).astype(int))
            return path, n, None
    except VideoError as e:
        return path, 0, str(e)


def check_main(args):
    """Reads every file of a data set in parallel; prints which fail, can list the rest; exit status 1 if any fails."""
    paths, labels = read_videos(args.source, args.data_root)
    if args.num_workers < 1:
        raise ValueError(f"--num_workers {args.num_workers}: expected at least 1")
    start, bad, total, failed = time.time(), set(), 0, 0
    with contextlib.ExitStack() as stack:
        jobs = [(path, args.full) for path in paths]
        results = map(check_file, jobs)
        if args.num_workers > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(args.num_workers))
            results = pool.imap_unordered(check_file, jobs, 4)
        for done, (path, n, wrong) in enumerate(results, 1):
            total += n
            if wrong:
                bad.add(path)
                failed += 1
                print(f"\r{wrong}")
            rate = done / (time.time() - start)
            if sys.stdout.isatty() or done == len(paths) or done % 1000 == 0:
                print(f"\r{done}/{len(paths)} files, {failed} bad, {rate:.0f} files/s, "
                      f"{(len(paths) - done) / rate:.0f} s left   ", end="", flush=True)
    print(f"\n{len(paths) - failed} of {len(paths)} files can be read, {total} frames; "
          + ("every frame was decoded" if args.full else "first, middle and last frame were decoded (--full: all)")
          + ("; checksums of prepared videos were compared" if any(map(prepared.in_set, paths)) else ""))
    if args.write_good:
        write_list(args.write_good, [(p, l) for p, l in zip(paths, labels) if p not in bad])
    return 1 if bad else 0


# ---- python data.py prepare ----

def prepare_main(args):
    """Decodes and stores a whole list once, see prepared.py."""
    lowest = dict(sampling_rate=1, short_side=1, shard_videos=1, num_workers=1)
    for name, low in lowest.items():
        if getattr(args, name) < low:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least {low}")
    if not 2 <= args.quality <= 31:
        raise ValueError(f"--quality {args.quality}: expected 2 (best) to 31")
    paths, labels = read_videos(args.source, args.data_root)
    settings = dict(form=args.form, sampling_rate=args.sampling_rate, short_side=args.short_side,
                    quality=args.quality, shard_videos=args.shard_videos)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the workers end with this process
    try:
        if prepared.prepare(list(zip(paths, labels)), args.out, settings, args.num_workers, args.dry_run):
            print(f"--data {args.out} takes the place of {args.source}")
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with what is in {args.out}")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv=None) -> int | None:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="turn a public data set's annotation into a list file")
    index.add_argument("layout", choices=sorted(LAYOUTS))
    index.add_argument("annotation", help="the csv, json or split file (hmdb51: the folder of split files)")
    index.add_argument("videos", help="the folder that holds the videos")
    index.add_argument("out", help="the list file to write: path, tab, label")
    index.add_argument("--part", default="train", choices=["train", "test"], help="hmdb51: which part of the split")
    index.add_argument("--split", default=1, type=int, choices=[1, 2, 3], help="hmdb51: which split")
    check = commands.add_parser("check", help="say which files of a data set cannot be read, and why")
    check.add_argument("source", help="a list file or a folder")
    check.add_argument("--data_root", default="", help="goes before relative paths of a list")
    check.add_argument("--num_workers", default=os.cpu_count(), type=int, help="processes")
    check.add_argument("--full", action="store_true", help="decode every frame, not three per file")
    check.add_argument("--write_good", help="write a list of the files that can be read")
    split = commands.add_parser("split", help="deal labelled videos into a training and a validation list")
    split.add_argument("source", help="a list file, or a folder with one folder per class")
    split.add_argument("train", help="the list file to write for training")
    split.add_argument("val", help="the list file to write for validation")
    split.add_argument("--data_root", default="", help="goes before relative paths of a list")
    split.add_argument("--folds", default=5, type=int, help="1/folds of the videos are for validation")
    split.add_argument("--fold", default=0, type=int, help="which of them, 0 to folds - 1")
    split.add_argument("--group", help="regular expression: videos whose paths match it alike stay on one side "
                                       "(one scene, one person, one source video)")
    split.add_argument("--seed", default=0, type=int)
    ready = commands.add_parser("prepare", help="decode a data set once into shards that train without decoding")
    ready.add_argument("source", help="a list file or a folder")
    ready.add_argument("out", help="the folder to write; then given as --data")
    ready.add_argument("--data_root", default="", help="goes before relative paths of a list")
    ready.add_argument("--form", default="raw", choices=prepared.FORMS,
                       help="raw: pixels, the fastest; compact: a JPEG per frame, a 20th of the size")
    ready.add_argument("--sampling_rate", default=4, type=int, help="keep every N-th frame (1: all)")
    ready.add_argument("--short_side", default=256, type=int, help="pixels; smaller frames stay as they are")
    ready.add_argument("--quality", default=2, type=int, help="compact: JPEG quantiser, 2 (best) to 31")
    ready.add_argument("--shard_videos", default=16, type=int, help="videos per shard, and per unit of work")
    ready.add_argument("--num_workers", default=os.cpu_count(), type=int, help="processes")
    ready.add_argument("--dry_run", action="store_true", help="only say how large it would be")
    commands.add_parser("toy", help="write the toy videos to toy/ and toy_shapes/")
    args = parser.parse_args(argv)
    commands = {"index": index_main, "split": split_main, "check": check_main, "prepare": prepare_main,
                "toy": lambda args: (make_toy(), make_toy_shapes()) and None}
    return commands[args.command](args)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as e:
        sys.exit(f"data.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
