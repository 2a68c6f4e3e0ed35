"""Testing on several clips and crops of a video: which frames, which windows, averages, scores."""

import math

import numpy as np
import torch
import torch.distributed as dist

import data
from lib.feed import ignore_signals
from video.decode import VideoError, VideoReader
from video.prepared import check_stride, open_video


def view_indices(n: int, num_frames: int, stride: int, sampling: str,
                 num_segments: int) -> np.ndarray:
    """(num_segments, num_frames) frame indices of the test clips of a video of n frames.

    Dense: the frames 0, stride, 2*stride, ... (the last repeated up to num_frames), clip k of K
    starting at int(k * (their number - num_frames) / (K - 1)), a single clip in the middle. Sparse
    (and sparse-reference, which differs in training only): a tick is n/num_frames frames, clip k
    starts k/K of a tick later (SSv2: K = 2).
    """
    k = np.arange(num_segments)[:, None]
    if sampling != "dense":
        tick = n / num_frames
        frame = tick * k / num_segments + tick * np.arange(num_frames)
        return np.minimum(frame.astype(int), n - 1)
    strided = np.arange(0, n, stride)
    spare = max(len(strided) - num_frames, 0)
    start = np.array([[spare // 2]])
    if num_segments > 1:
        start = (k * (spare / (num_segments - 1))).astype(int)
    return strided[np.minimum(start + np.arange(num_frames), len(strided) - 1)]


def cut(frames: torch.Tensor, index: torch.Tensor, img_size: tuple, num_crops: int) -> torch.Tensor:
    """frames (U, h, w, C), index (S, T) into them -> views (S * num_crops, T, H, W, C).

    Clip by clip, num_crops windows of `img_size` (H, W) at equal distances along the longer side,
    centred along the other; one is the centre.
    """
    (h, w), (H, W) = frames.shape[1:3], img_size
    views = frames.new_empty((len(index), num_crops, index.shape[1], H, W, frames.shape[-1]))
    for clip, of_clip in zip(index, views):
        x = frames[clip]  # (T, h, w, C)
        for k in range(num_crops):
            along = k / (num_crops - 1) if num_crops > 1 else 0.5
            top, left = (h - H) // 2, (w - W) // 2
            if h - H > w - W:
                top = int(along * (h - H))
            else:
                left = int(along * (w - W))
            of_clip[k] = x[:, top:top + H, left:left + W]
    return views.flatten(0, 1)


class TestVideos(torch.utils.data.Dataset):
    """index -> (index, frames (U, h, w, C) uint8, index (S, T) into them, why not or None).

    A video is decoded once for all its clips: U distinct frames, scaled so that a window of
    `img_size` (H, W) just fits. A video that cannot be read has empty tensors and a reason.
    antialias: how frames are scaled; the paper's code does it without.
    """

    def __init__(self, paths, num_frames, img_size, stride=4, fps=None, sampling="dense",
                 num_segments=1, antialias=True):
        self.paths, self.num_frames, self.img_size = paths, num_frames, img_size
        self.stride, self.fps, self.sampling = stride, fps, sampling
        self.num_segments, self.antialias = num_segments, antialias
        check_stride(paths, stride if sampling == "dense" and not fps else None)

    def __len__(self):
        return len(self.paths)

    def fit(self, h: int, w: int) -> tuple[int, int]:
        """The size of an h x w frame in which a window of self.img_size just fits."""
        H, W = self.img_size
        return (h * W // w, W) if h * W > H * w else (H, w * H // h)

    def open(self, path: str):
        """A reader of one file, whose frames are scaled as said above."""
        return open_video(path, self.fit, self.antialias)

    def clips(self, video: VideoReader, start: float = 0.0, end: float = math.inf):
        """-> frames (U, h, w, C), index (S, T) of the part from start to end of an open video.

        start and end are in seconds; where no frame begins between them, the one that is on show.
        """
        order = data.timeline(video.times, self.fps)
        t = video.times[order] - video.times[0]
        inside = (t >= start) & (t < end)
        order = order[inside] if inside.any() else order[t < end][-1:]
        index = view_indices(len(order), self.num_frames, self.stride, self.sampling,
                             self.num_segments)
        return self.decode(video, order[index])

    def decode(self, video: VideoReader, wanted: np.ndarray):
        """wanted (S, T) frame indices -> distinct frames (U, h, w, C), index (S, T) into them."""
        unique, inverse = np.unique(wanted, return_inverse=True)
        frames = torch.from_numpy(video.frames(unique))
        return frames, torch.from_numpy(inverse.reshape(wanted.shape))

    def __getitem__(self, i: int):
        try:
            with self.open(self.paths[i]) as video:
                return i, *self.clips(video), None
        except VideoError as e:
            return i, torch.empty(0), torch.empty(0), str(e)


def clip_settings(model, about: dict, **given) -> dict:
    """How a model's clips are sampled, as arguments of TestVideos.

    given: sampling_rate, fps, sampling, antialias; what is None there is as in training, which
    `about` (of weights.build_model) tells, else every 4th frame, antialiased.
    """
    chosen = dict(sampling_rate=4, fps=None, sampling="dense", antialias=True)
    for source in (about["args"], given):
        chosen |= {k: source[k] for k in chosen if source.get(k) is not None}
    stride = chosen.pop("sampling_rate")
    return dict(num_frames=model.config["num_frames"], img_size=tuple(model.config["img_size"]),
                stride=stride, **chosen)


def read_clip(path: str, model, about: dict) -> torch.Tensor:
    """The middle clip of a video, sampled as the model was trained: (1, T, H, W, C) uint8.

    model and about: of weights.build_model. VideoError names a file that cannot be read.
    """
    videos = TestVideos([path], **clip_settings(model, about))
    with videos.open(path) as video:
        return cut(*videos.clips(video), videos.img_size, 1)


@torch.no_grad()
def run_views(function, videos: TestVideos, num_crops: int, device, batch_size: int,
              num_workers: int, host_group=None, progress=None, join=None) -> tuple[dict, dict]:
    """function(views (B, T, H, W, C)) -> (B, K), averaged over each video's views.

    -> ({index: (K,) float32 numpy}, {index: why it failed}), the same on all ranks; every video is
    in one of them. Rank r takes videos r, r + world, ..., and host_group (gloo) gathers. batch_size
    counts views. progress(done, all) is called per video of rank 0. join(index, what the function
    gives for its views (clips, crops, ...)) -> a video's output, where that is not the mean.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if host_group else (0, 1)
    mine = range(rank, len(videos), world)
    loader = torch.utils.data.DataLoader(
        videos, batch_size=None, sampler=mine, num_workers=num_workers,
        worker_init_fn=ignore_signals, pin_memory=device.type == "cuda",
        prefetch_factor=2 if num_workers else None)
    num_views = videos.num_segments * num_crops
    outputs, failed, waiting = {}, {}, []  # waiting: (index, views) not yet run

    def flush():
        views = torch.cat([views for _, views in waiting])
        out = torch.cat([function(part) for part in views.split(batch_size)])
        ids = [i for i, _ in waiting]
        if join:
            parts = out.unflatten(0, (len(waiting), videos.num_segments, num_crops))
            outputs.update((i, join(i, part)) for i, part in zip(ids, parts))
        else:
            means = out.float().view(len(waiting), num_views, -1).mean(1).cpu().numpy()
            outputs.update(zip(ids, means))
        waiting.clear()

    for done, (i, frames, index, why) in enumerate(loader, 1):
        if why:
            failed[i] = why
        else:
            frames = frames.to(device, non_blocking=True)
            waiting.append((i, cut(frames, index.to(device), videos.img_size, num_crops)))
            if len(waiting) * num_views >= batch_size:
                flush()
        if progress and rank == 0:
            progress(done, len(mine))
    if waiting:
        flush()
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, (outputs, failed), group=host_group)
        for some_outputs, some_failed in parts:
            outputs |= some_outputs
            failed |= some_failed
    return dict(sorted(outputs.items())), dict(sorted(failed.items()))


def scores(probs: np.ndarray, labels: np.ndarray) -> dict:
    """probs (V, K), labels (V,) -> top1, top5, per_class (mean over classes that occur), loss.

    The first three in percent; loss is the mean negative logarithm of the averaged probability of
    the true class.
    """
    true = probs[np.arange(len(labels)), labels]
    # how many classes come before the true one; among equals the first counts, as argmax has it
    tied = (probs == true[:, None]) & (np.arange(probs.shape[1]) < labels[:, None])
    place = (probs > true[:, None]).sum(1) + tied.sum(1)
    place[np.isnan(true)] = probs.shape[1]  # of a model that has diverged nothing is right
    right = place == 0
    per_class = [right[labels == c].mean() for c in np.unique(labels)]
    return dict(top1=float(100 * right.mean()), top5=float(100 * (place < 5).mean()),
                per_class=float(100 * np.mean(per_class)),
                loss=float(-np.log(np.maximum(true, 1e-12)).mean()))


def say_scores(result: dict, num_classes: int) -> str:
    """What `scores` gave, in words; of fewer than six classes the first five are all of them."""
    top5 = f", top-5 {result['top5']:.2f}" if num_classes > 5 else ""
    return f"top-1 {result['top1']:.2f}{top5}, per class {result['per_class']:.2f}"
