"""Attentive probes: features of a frozen encoder that are kept in a file, and what probes say."""

import contextlib
import copy
import os
import shutil
import time

import numpy as np
import torch

import data
from lib.feed import Samples
from lib.views import TestVideos, cut, run_views
from video.decode import VideoError


def set_aside(labels: list[int], part: float, seed: int) -> np.ndarray:
    """(V,) bool: the videos on which probes are compared, about `part` of each class.

    Never all of a class; of one with two videos or more, one at least.
    """
    rng, aside = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for c in np.unique(labels):
        ids = rng.permutation(np.flatnonzero(np.equal(labels, c)))
        aside[ids[:min(max(1, round(part * len(ids))), len(ids) - 1)]] = True
    return aside


def joint(model, tokens: torch.Tensor) -> np.ndarray:
    """An AttentiveClassifier's probabilities (probes, K) of a video, averaged over its crops.

    tokens (clips, crops, N, D): those of all clips of a crop go into one call of the probes.
    """
    logits = model(tokens.transpose(0, 1).flatten(1, 2))  # (probes, crops, K)
    return logits.float().softmax(-1).mean(1).cpu().numpy()


class FixedClips(Samples):
    """(epoch, index) -> ((x, labels (1,)), bad): always the same clips of a video, centre crops.

    x: their tokens (1, clips * N, D) float16 where `keep` has written them, else the clips
    themselves (1, clips, T, H, W, C) uint8.
    """

    def __init__(self, videos: TestVideos, labels, seed: int, path: str, shape: tuple | None):
        """path: the file of tokens, of `shape` (all videos, clips * N, D); None: none is kept."""
        super().__init__(videos.paths[:len(labels)], seed)  # those after them are not trained on
        self.videos, self.labels, self.path, self.shape = videos, labels, path, shape

    def tokens(self, i: int) -> torch.Tensor:
        """(clips * N, D) float16 of a video; VideoError where it could not be read."""
        rows = np.memmap(self.path, np.float16, "r", shape=self.shape)
        if np.isnan(rows[i, 0, 0]):
            raise VideoError(f"{self.videos.paths[i]}: could not be read for its features")
        return torch.from_numpy(rows[i].copy())

    def notes(self) -> list[str]:
        """What there is to say of videos that are shorter than a clip."""
        v = self.videos
        spread = v.sampling == "dense" and not v.fps
        span = (v.num_frames - 1) * v.stride + 1 if spread else v.num_frames
        return data.repeats(self.paths, v.num_frames, span, v.fps)

    def load(self, index: int, rng):
        """-> x, labels as above; VideoError when the file cannot be read."""
        label = torch.tensor([self.labels[index]])
        if self.shape:
            return self.tokens(index)[None], label
        _, frames, where, why = self.videos[index]
        if why:
            raise VideoError(why)
        return cut(frames, where, self.videos.img_size, 1)[None], label

    def keep(self, run, model, batch_size: int) -> float:
        """Writes the tokens of all videos, by all ranks; -> seconds."""
        start = time.time()
        need = 2 * int(np.prod(self.shape, dtype=np.int64))
        free = shutil.disk_usage(os.path.dirname(self.path)).free
        if need > free:
            raise ValueError(f"{self.path}: the features take {need / 1e9:.1f} GB, {free / 1e9:.1f}"
                             " GB are free there; with a lower --cache_gb they are computed anew "
                             "in each step")
        part, row = self.path + ".part", need // self.shape[0]
        if run.rank == 0:
            with open(part, "wb") as f:
                f.truncate(need)
        run.barrier()
        with open(part, "r+b") as f:
            def write(i, tokens):  # (clips, 1, N, D)
                f.seek(i * row)
                f.write(tokens.half().cpu().numpy().tobytes())
                return np.zeros(0)
            with run.autocast:
                _, failed = run_views(model.tokens, self.videos, 1, run.device, batch_size,
                                      run.num_workers, run.host_group, join=write)
            for i in failed:
                f.seek(i * row)
                f.write(np.full(row // 2, np.nan, np.float16).tobytes())
        if run.rank == 0:  # named once out_dir is this run's
            run.bad_new += [(self.videos.paths[i], why) for i, why in failed.items()]
        run.barrier()
        if run.rank == 0:
            os.replace(part, self.path)
        run.barrier()
        return time.time() - start

    def exists(self, run) -> bool:
        """Whether the file is there, as rank 0 sees it."""
        return run.gather(os.path.exists(self.path))[0]

    @contextlib.contextmanager
    def kept(self, run):
        """Context of the loop: the file goes when the run is finished, or has failed to begin."""
        try:
            yield
        finally:
            finished = run.step == run.total_steps and not run.stopping
            if run.rank == 0 and (finished or run.step == run.first_step):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self.path)

    @torch.no_grad()
    def probabilities(self, run, model, ids: np.ndarray, batch_size: int) -> tuple[dict, dict]:
        """-> {video: (probes, K)} by all of its clips in one call, {video: why it failed}."""
        found, failed = {}, {}
        with run.autocast:
            if not self.shape:
                part = copy.copy(self.videos)
                part.paths = [part.paths[i] for i in ids]
                found, failed = run_views(model.tokens, part, 1, run.device, batch_size,
                                          run.num_workers, run.host_group,
                                          join=lambda i, tokens: joint(model, tokens))
                return ({int(ids[i]): p for i, p in found.items()},
                        {int(ids[i]): why for i, why in failed.items()})
            for i in ids[run.rank::run.world].tolist():
                try:
                    found[i] = joint(model, self.tokens(i).to(run.device)[None, None])
                except VideoError as e:
                    failed[i] = str(e)
        for some, others in run.gather((found, failed)):
            found, failed = found | some, failed | others
        return dict(sorted(found.items())), dict(sorted(failed.items()))
