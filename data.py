"""What training draws: which frames of a video, which part of them, the data sets of the stages.

A clip is (T, H, W, C) uint8. A frame index counts presented frames from 0. What is drawn for a
sample depends on (seed, epoch, index) alone, never on the number of workers.

The same file is the command line for data sets, see video/tools.py:

    python data.py index ucf101 trainlist01.txt UCF-101/ ucf_train.tsv   # public layout -> list
    python data.py split my_videos/ train.tsv val.tsv                    # own videos -> two lists
    python data.py check ucf_train.tsv                                   # a summary; what is broken
    python data.py prepare ucf_train.tsv ucf_train/                      # decode once, for --data
    python data.py toy                                                   # write the toy videos
"""

import contextlib
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F

from lib.feed import Samples
from video import prepared, remote
from video.augment import erase_box, rand_augment, random_resized_crop, view
from video.decode import KEEP_PACKETS, VideoError, nearest, resize, short_side
from video.lists import refuse_pictures
from video.prepared import check_stride, open_video


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
    start, length = edges[:-1], edges[1:] - edges[:-1]
    return np.minimum((start + rng.random(num_frames) * length).astype(int), n - 1)


def sample_sparse_reference(rng, n: int, num_frames: int) -> np.ndarray:
    """As the paper's code trains on SSv2: segments of n // num_frames frames, counted from 0.

    The rest at the end is never drawn: of 31 frames the first 16, of fewer than num_frames the
    first alone.
    """
    length = n // num_frames
    return length * np.arange(num_frames) + rng.integers(max(length, 1), size=num_frames)


def sample_by_time(rng, times: np.ndarray, num_frames: int, fps: float) -> np.ndarray:
    """num_frames indices 1/fps seconds apart at any file rate: the nearest frames.

    A short video repeats its last.
    """
    span = num_frames / fps
    start = times[0] + rng.random() * max(times[-1] - times[0] - span, 0)
    return nearest(times, start + np.arange(num_frames) / fps)


def sample_window(rng, n: int, num_frames: int, stride: int) -> np.ndarray:
    """num_frames indices spread over a window of num_frames*stride frames at a random place.

    The paper's dense fine-tuning clip, 0, 4, 8, 12, 17, ..., 63: floored, both ends included, an
    effective stride of 64/15 for 16 frames at 4. A video not longer than the window: n // stride
    indices spread over all of it, then its last frame.
    """
    window = num_frames * stride
    if n <= window:
        spread = np.linspace(0, n, n // stride).astype(int)
        rest = np.full(num_frames - len(spread), n)
        return np.minimum(np.concatenate([spread, rest]), n - 1)
    start = rng.integers(n - window + 1)
    spread = np.linspace(start, start + window, num_frames).astype(int)
    return np.minimum(spread, start + window - 1)


def timeline(times: np.ndarray, fps: float | None) -> np.ndarray:
    """Frame indices of a video played at `fps`, whatever rate it was stored at; None: all."""
    if not fps:
        return np.arange(len(times))
    ticks = np.arange(int((times[-1] - times[0]) * fps) + 1)
    return nearest(times, times[0] + ticks / fps)


def repeats(paths: list[str], num_frames: int, span: int, fps: float | None = None,
            seconds: float = 1.0) -> list[str]:
    """[] or a sentence on the videos of fewer frames (at `fps`) than a clip's `span`.

    The lengths of prepared videos are known. Of files 32 are opened, the same ones each time, for
    so many seconds at most.
    """
    if num_frames == 1:
        return []
    found, looked = [], " looked at"
    if not fps and all(map(prepared.in_set, paths)):
        found, looked = [n for n in map(prepared.length, paths) if n], ""
    start = time.monotonic()
    for i in np.random.default_rng(0).permutation(len(paths))[:32] if looked else ():
        with contextlib.suppress(VideoError, OSError):
            if not prepared.in_set(paths[i]) and remote.size(paths[i]) > KEEP_PACKETS:
                found.append(math.inf)  # surely long: its packets are not read for this
            elif time.monotonic() - start < seconds:
                with open_video(paths[i]) as video:
                    found.append(len(timeline(video.times, fps)))
    short = sum(n < span for n in found)
    rate = f" at {fps:g} fps" if fps else ""
    hint = "; a lower --sampling_rate spans fewer" if span > num_frames else ""
    return [f"a clip of {num_frames} frames spans {span} of a video{rate}: {short} of {len(found)} "
            f"videos{looked} are shorter, their clips repeat frames{hint}"] if short else []


# ---- crops ----

def multi_scale_crop(rng, height: int, width: int,
                     scales=(1, 0.875, 0.75, 0.66)) -> tuple[int, int, int, int]:
    """-> (top, left, h, w): sides int(short side * scale), at one of 13 anchors.

    The places of the two sides' scales in the list differ by one at most.
    """
    sides = [max(1, int(min(height, width) * scale)) for scale in scales]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    h, w = pairs[rng.integers(len(pairs))]
    # in quarters of the free space
    anchors = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2),  # corners, centre
               (2, 0), (2, 4), (4, 2), (0, 2),  # edge midpoints
               (1, 1), (1, 3), (3, 1), (3, 3)]  # quarter points
    y, x = anchors[rng.integers(len(anchors))]
    return y * ((height - h) // 4), x * ((width - w) // 4), h, w


def crop_resize(frames, box: tuple, height: int, width: int) -> torch.Tensor:
    """T frames (H, W, C) uint8 and (top, left, h, w) -> (T, height, width, C) uint8."""
    top, left, h, w = box
    part = np.stack([frame[top:top + h, left:left + w] for frame in frames])
    return resize(torch.from_numpy(part), height, width).contiguous()


# ---- the data sets; what a key is, and what becomes of broken files: lib/feed.py, Samples ----

class PretrainClips(Samples):
    """(epoch, index) -> (clips, bad): clips (repeat_aug, T, H, W, C) uint8.

    With repeat_aug several clips, each with its own start and crop, come from one pass of decoding.
    stride counts frames; fps, when given, samples by time instead; sampling "sparse" takes one
    frame of each of T equal segments.
    """

    def __init__(self, paths, num_frames=16, img_size=(224, 224), stride=4, fps=None,
                 sampling="dense", repeat_aug=1, crop_scales=(1, 0.875, 0.75, 0.66), flip=False,
                 seed=0):
        super().__init__(paths, seed)
        self.num_frames, self.img_size, self.stride, self.fps = num_frames, img_size, stride, fps
        self.sampling, self.repeat_aug = sampling, repeat_aug
        self.crop_scales, self.flip = crop_scales, flip
        refuse_pictures(paths, num_frames)
        check_stride(paths, stride if sampling == "dense" and not fps else None)

    def sample(self, rng, video) -> np.ndarray:
        """The frame indices (T,) of one clip."""
        if self.sampling == "sparse":
            return sample_sparse(rng, len(video), self.num_frames)
        if self.fps:
            return sample_by_time(rng, video.times, self.num_frames, self.fps)
        return sample_dense(rng, len(video), self.num_frames, self.stride)

    def span(self) -> int:
        """Frames (at fps, where given) from a clip's first to its last; fewer are repeated."""
        spread = self.sampling == "dense" and not self.fps
        return (self.num_frames - 1) * self.stride + 1 if spread else self.num_frames

    def notes(self) -> list[str]:
        """What there is to say of videos that are shorter than a clip."""
        return repeats(self.paths, self.num_frames, self.span(), self.fps)

    def load(self, index: int, rng) -> torch.Tensor:
        """-> (repeat_aug, T, H, W, C) uint8; VideoError when the file cannot be read."""
        T, clips = self.num_frames, []
        with open_video(self.paths[index]) as video:
            indices = [self.sample(rng, video) for _ in range(self.repeat_aug)]
            frames = video.pictures(np.concatenate(indices))
            height, width = frames[0].shape[:2]
            for k in range(self.repeat_aug):
                box = multi_scale_crop(rng, height, width, self.crop_scales)
                clip = crop_resize(frames[k * T:(k + 1) * T], box, *self.img_size)
                clips.append(clip.flip(2) if self.flip and rng.random() < 0.5 else clip)
        # a single clip is not copied
        return torch.stack(clips) if self.repeat_aug > 1 else clips[0][None]


class FinetuneClips(PretrainClips):
    """(epoch, index) -> ((clips, labels, boxes), bad); section 5.

    clips (repeat_aug, T, H, W, C) uint8, labels (repeat_aug,) int64, boxes (repeat_aug, 4) int64:
    the rectangles that random erasing fills on the device. One augmentation draw serves all frames
    of a clip. Dense clips are windows of T*stride frames, sparse ones have a random frame of each
    of T segments ("sparse-reference": the paper's code's); fps first resamples the video. All
    repeat_aug clips show the same frames, augmented differently. Frames whose short side is over
    max_side pixels are reduced to that first (0: never), as the paper's data were, and antialiased;
    antialias is whether the crops are.
    """

    def __init__(self, paths, labels, num_frames=16, img_size=(224, 224), stride=4, fps=None,
                 sampling="dense", repeat_aug=1, max_side=320, rand_aug=(4, 7.0, 0.5),
                 crop_area=(0.08, 1), crop_aspect=(3 / 4, 4 / 3), flip=True, erase_prob=0.25,
                 seed=0, antialias=True):
        super().__init__(paths, num_frames, img_size, stride, fps, sampling, repeat_aug, flip=flip,
                         seed=seed)
        self.labels, self.max_side, self.rand_aug = labels, max_side, rand_aug
        self.crop_area, self.crop_aspect, self.erase_prob = crop_area, crop_aspect, erase_prob
        self.antialias = antialias

    def reduced(self, h: int, w: int) -> tuple[int, int]:
        """The size that frames of h x w are decoded to."""
        if self.max_side and min(h, w) > self.max_side:
            return short_side(h, w, self.max_side)
        return h, w

    def span(self) -> int:
        """As of PretrainClips; dense clips are spread over a window of num_frames * stride."""
        return self.num_frames * (self.stride if self.sampling == "dense" else 1)

    def load(self, index: int, rng):
        """-> clips, labels, boxes as above; VideoError when the file cannot be read."""
        with open_video(self.paths[index], self.reduced) as video:
            frames = timeline(video.times, self.fps)
            if self.sampling == "sparse":
                indices = sample_sparse(rng, len(frames), self.num_frames)
            elif self.sampling == "sparse-reference":
                indices = sample_sparse_reference(rng, len(frames), self.num_frames)
            else:
                indices = sample_window(rng, len(frames), self.num_frames, self.stride)
            decoded = torch.from_numpy(video.frames(frames[indices]))
        planes = decoded.permute(0, 3, 1, 2).contiguous()  # (T, C, h, w)
        clips, boxes = [], []
        for _ in range(self.repeat_aug):
            x = rand_augment(rng, planes, *self.rand_aug)
            top, left, h, w = random_resized_crop(rng, *x.shape[2:], self.crop_area,
                                                  self.crop_aspect)
            x = x[:, :, top:top + h, left:left + w].contiguous()
            if (h, w) != self.img_size:
                x = F.interpolate(x, size=self.img_size, mode="bilinear",
                                  antialias=self.antialias)
            x = x.flip(3) if self.flip and rng.random() < 0.5 else x
            clips.append(x.permute(0, 2, 3, 1))
            boxes.append(erase_box(rng, *self.img_size, self.erase_prob))
        labels = torch.full((self.repeat_aug,), self.labels[index])
        return torch.stack(clips), labels, torch.tensor(boxes)


class ViewPairs(Samples):
    """(epoch, index, is_image) -> (views (1, 2, T, H, W, C) uint8, bad): two of a video or image.

    Of a video with num_frames 1 (ViC-MAE) they are frames of the two halves of a clip of 2 * gap
    frames (gap 0: one frame twice); with more (MoCo v3) two clips of `stride`, each with its own
    start. Of an image two crops. One augmentation draw per view.
    """

    def __init__(self, videos, images, num_frames=1, img_size=(224, 224), stride=4, gap=32,
                 area=(0.5, 1), color=False, image_area=(0.2, 1), image_color=True, seed=0):
        super().__init__((videos, images), seed)
        self.num_frames, self.img_size, self.stride, self.gap = num_frames, img_size, stride, gap
        self.area, self.color = (area, image_area), (color, image_color)  # of videos, of images
        refuse_pictures(videos, num_frames)
        if num_frames > 1:
            check_stride(videos, stride)

    def __len__(self):
        return sum(map(len, self.paths))

    def sample(self, rng, n: int, is_image: bool) -> np.ndarray:
        """The frame indices (2T,) of both views, of n frames."""
        if self.num_frames > 1:
            clips = [sample_dense(rng, n, self.num_frames, self.stride) for _ in range(2)]
            return np.concatenate(clips)
        span = 1 if is_image else min(max(2 * self.gap, 1), n)
        start = rng.integers(n - span + 1)
        half = span // 2
        first = rng.integers(max(half, 1))
        second = half + rng.integers(span - half)
        return start + np.array([first, second])

    def notes(self) -> list[str]:
        """What there is to say of videos that are shorter than a clip."""
        return repeats(self.paths[0], self.num_frames, (self.num_frames - 1) * self.stride + 1)

    def load(self, index: int, rng, is_image: bool) -> torch.Tensor:
        """-> (1, 2, T, H, W, C) uint8; VideoError when the file cannot be read."""
        with open_video(self.paths[is_image][index]) as video:
            frames = torch.from_numpy(video.frames(self.sample(rng, len(video), is_image)))
        clips = frames.permute(0, 3, 1, 2).contiguous().split(self.num_frames)  # (T, C, h, w) each
        area, color = self.area[is_image], self.color[is_image]
        views = [view(rng, clip, self.img_size, area, color, second=k == 1)
                 for k, clip in enumerate(clips)]
        return torch.stack(views).permute(0, 1, 3, 4, 2)[None]


if __name__ == "__main__":
    from lib.process import script_main
    from video import tools
    script_main(tools.main)
