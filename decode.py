"""Decoding (PyAV): frames of a video file by index or by time, uint8 RGB, with no trust in what the container claims.

A frame index counts presented frames from 0.
"""

import bisect
import math
import os
from collections import OrderedDict
from fractions import Fraction

import av
import numpy as np
import torch
import torch.nn.functional as F

KEEP_PACKETS = 64 << 20  # files up to this size (bytes) are read into memory once; longer movies are sought in


class VideoError(ValueError):
    """A video that cannot be read; the message names the file and says why."""


def short_side(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) of a frame scaled so that its shorter side is `side`; the other is rounded down."""
    return (side, side * width // height) if height <= width else (side * height // width, side)


def resize(clip: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(T, H, W, C) uint8 -> (T, height, width, C) uint8, antialiased bilinear (as PIL does)."""
    if clip.shape[1:3] == (height, width):
        return clip
    x = F.interpolate(clip.permute(0, 3, 1, 2), size=(height, width), mode="bilinear", antialias=True)
    return x.permute(0, 2, 3, 1)


def nearest(times: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Indices of the frames whose time stamps (ascending, seconds) are nearest to t; the earlier one of two."""
    if len(times) == 1:
        return np.zeros(len(t), int)
    right = np.clip(np.searchsorted(times, t), 1, len(times) - 1)
    return np.where(t - times[right - 1] <= times[right] - t, right - 1, right)


REFORMATTER = av.video.reformatter.VideoReformatter()  # keeps its tables from frame to frame, and from file to file


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """-> (H, W, 3) uint8; chroma is interpolated as the ffmpeg program does it.

    On one thread: starting others takes six times as long as the work.
    """
    return REFORMATTER.reformat(frame, format="rgb24", interpolation="BICUBIC", threads=1).to_ndarray()


INDEX_CACHE: OrderedDict = OrderedDict()  # of the long files only: reading all their packets again takes seconds


class VideoReader:
    """Random access to the frames of a video file, in presentation order; a context manager.

    All packets are read (not decoded) once: their time stamps give the number of frames and where each key frame is,
    with no trust in the container's own count, duration or frame rate. `frames` then decodes from the last key frame
    before the wanted frames to the last of them, and leaves out frames that are neither wanted nor needed by others.
    """

    def __init__(self, path: str, size_of=None):
        """size_of: (height, width) of an upright frame -> the size that `frames` gives instead."""
        self.path, self.size_of = path, size_of
        if not os.path.isfile(path):
            raise VideoError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")
        try:
            self.container = av.open(path, metadata_errors="ignore")
        except (av.FFmpegError, OSError, ValueError) as e:
            raise VideoError(f"{path}: cannot be opened ({getattr(e, 'strerror', None) or e})") from None
        try:
            self.stream = self.container.streams.best("video")  # of several the largest, as ffmpeg chooses
            if self.stream is None or self.stream.disposition & av.stream.Disposition.attached_pic:
                raise VideoError(f"{path}: has no video stream")
            self.codec = self.stream.codec_context
            if self.codec is None:
                raise VideoError(f"{path}: no decoder for its video codec")
            self.codec.thread_count = 1  # a worker has one core
            self.codec.thread_type = "NONE"
            self.read_index()
        except VideoError:
            self.container.close()
            raise
        except (av.FFmpegError, OSError, ValueError) as e:
            self.container.close()
            raise VideoError(f"{path}: {getattr(e, 'strerror', None) or e}") from None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.packets = None
        self.container.close()

    def __len__(self):
        return len(self.order)

    def read_index(self):
        """Sets pts (by packet), keys ((pts, packet) of key frames), order (frame index -> packet), times (seconds)."""
        size = self.container.size or 0
        self.packets, self.counted = [], False
        stamp = (self.path, size, os.path.getmtime(self.path)) if size > KEEP_PACKETS else None
        if stamp in INDEX_CACHE:
            self.packets = None
            self.pts, self.keys, self.order, self.counted, self.times = INDEX_CACHE[stamp]
            return
        self.pts, shown, keys = [], [], []
        for packet in self.demux():
            i = len(self.pts)
            self.pts.append(packet.pts)
            if packet.is_keyframe:
                keys.append((packet.pts, i))
            if keys and self.is_shown(packet):
                shown.append(i)
            if stamp is None:
                self.packets.append(packet)
        if not self.pts:
            raise VideoError(f"{self.path}: holds no video packets")
        stamps = [self.pts[i] for i in shown]
        if None in stamps or len(set(stamps)) < len(stamps) or not keys or self.guesses_times():
            self.count_frames()
        else:
            self.keys = sorted(keys)
            # pictures shown before the first key frame refer to frames that the file does not have
            self.order = sorted((i for i in shown if self.pts[i] >= self.keys[0][0]), key=self.pts.__getitem__)
            base = float(self.stream.time_base or Fraction(1))
            self.times = np.array([self.pts[i] for i in self.order], float) * base
        if not len(self.order):
            raise VideoError(f"{self.path}: holds no frame that can be decoded")
        if stamp:
            self.packets = None
            INDEX_CACHE[stamp] = self.pts, self.keys, self.order, self.counted, self.times
            while len(INDEX_CACHE) > 256:
                INDEX_CACHE.popitem(last=False)

    def is_shown(self, packet) -> bool:
        """Whether a packet's picture is presented: not cut off by an edit list, no alternate reference of VP8."""
        return not packet.is_discard and not (self.codec.name in ("vp8", "libvpx") and not bytes(packet)[0] & 0x10)

    def guesses_times(self) -> bool:
        """AVI stores decoding order only: with B-frames its time stamps are not those of the pictures."""
        return self.container.format.name == "avi" and bool(self.codec.has_b_frames)

    def demux(self):
        try:
            yield from (p for p in self.container.demux(self.stream) if p.size)
        except av.EOFError:  # some demuxers raise it where the file was cut off
            return

    def count_frames(self):
        """For files whose packets have no usable time stamps: the frames are counted by decoding them all."""
        self.counted, self.keys, self.times = True, [], []
        rate = float(self.stream.average_rate or self.stream.guessed_rate or 25)
        try:
            for frame in self.decode(self.read(0, len(self.pts))):
                self.times.append(len(self.times) / rate if frame.time is None else frame.time)
        except av.FFmpegError as e:
            raise VideoError(f"{self.path}: damaged after frame {len(self.times)} ({e.strerror})") from None
        self.times = np.array(self.times)
        if not (np.diff(self.times) > 0).all():
            self.times = np.arange(len(self.times)) / rate
        self.order = range(len(self.times))

    def read(self, start: int, stop: int):
        """Yields packets start..stop-1 in decoding order, with their numbers."""
        if self.packets:
            yield from zip(range(start, stop), self.packets[start:stop])
            return
        i = 0
        if start and self.pts[start] is not None:
            self.container.seek(self.pts[start], stream=self.stream)
            i = None
        else:
            self.container.seek(0)
        for packet in self.demux():
            if i is None:  # where the seek has landed
                i = self.pts.index(packet.pts)
                if i > start:  # too late: some containers seek badly
                    self.container.seek(0)
                    yield from ((j, p) for j, p in enumerate(self.demux()) if start <= j < stop)
                    return
            if i >= stop:
                return
            if i >= start:
                yield i, packet
            i += 1

    def decode(self, numbered, wanted=None):
        """Decodes (number, packet) pairs, drains the decoder; frames that nobody wants or refers to are left out."""
        self.codec.flush_buffers()
        skip = "DEFAULT"
        self.codec.skip_frame = skip
        for _, packet in numbered:
            now = "DEFAULT" if wanted is None or packet.pts in wanted else "NONREF"
            if now != skip:
                self.codec.skip_frame = skip = now
            yield from self.codec.decode(packet)
        yield from self.codec.decode(None)

    def frames(self, indices) -> np.ndarray:
        """Frame indices (any order, repeats) -> (n, H, W, 3) uint8 RGB, upright; VideoError names the failing frame."""
        return np.stack(self.pictures(indices))

    def pictures(self, indices) -> list[np.ndarray]:
        """As `frames`, a list of (H, W, 3): what is cropped next need not be copied whole."""
        indices = [int(i) for i in indices]
        if min(indices) < 0 or max(indices) >= len(self):
            raise VideoError(f"{self.path}: frames {min(indices)}..{max(indices)} wanted, it has {len(self)}")
        found = {}
        try:
            if self.counted:
                frames = self.decode(self.read(0, len(self.pts)))
                for i, frame in zip(range(max(indices) + 1), frames):
                    if i in indices:
                        found[i] = self.convert(frame)
            else:
                by_key = {}  # key frame -> wanted frames that are decoded from it
                for i in sorted(set(indices)):
                    key = self.keys[bisect.bisect_right(self.keys, (self.pts[self.order[i]], len(self.pts))) - 1][1]
                    by_key.setdefault(key, []).append(i)
                for key, some in by_key.items():
                    wanted = {self.pts[self.order[i]]: i for i in some}
                    last = max(self.order[i] for i in some)
                    self.take(self.read(key, last + 1), wanted, found)
        except VideoError:
            raise
        except (av.FFmpegError, OSError, ValueError) as e:
            done, why = max(found, default=-1), getattr(e, "strerror", None) or e
            raise VideoError(f"{self.path}: damaged after frame {done} of {len(self)} ({why})") from None
        missing = [i for i in indices if i not in found]
        if missing:
            raise VideoError(f"{self.path}: frame {missing[0]} of {len(self)} gives no picture")
        return self.alike(found, indices)

    def take(self, numbered, wanted: dict, found: dict):
        """Decodes packets; the pictures of the time stamps in `wanted` go to found[wanted[time stamp]]."""
        for frame in self.decode(numbered, wanted):
            if frame.pts in wanted:
                if frame.is_corrupt:
                    raise VideoError(f"{self.path}: frame {wanted[frame.pts]} is damaged")
                found[wanted[frame.pts]] = self.convert(frame)

    def alike(self, found: dict, indices) -> list[np.ndarray]:
        """[found[i] for i in indices]; in a stream that changes its size, all as large as the first."""
        if len({x.shape for x in found.values()}) > 1:
            h, w = found[min(found)].shape[:2]
            found = {i: resize(torch.from_numpy(x)[None], h, w)[0].numpy() for i, x in found.items()}
        return [found[i] for i in indices]

    def convert(self, frame) -> np.ndarray:
        """A decoded frame -> (H, W, 3) uint8 RGB, turned upright as players do."""
        rgb = to_rgb(frame)
        rgb = np.rot90(rgb, frame.rotation // 90) if frame.rotation % 360 else rgb
        if self.size_of:  # at once, so that many frames of a large video fit in memory
            rgb = resize(torch.from_numpy(np.ascontiguousarray(rgb))[None], *self.size_of(*rgb.shape[:2]))[0].numpy()
        return rgb


FIRST_STAMP: dict = {}  # of movies: the time stamp of the first picture


class MovieReader(VideoReader):
    """Frames by time from a file of hours: a seek and the packets around, where VideoReader reads them all.

    Seconds count from the first picture, whatever time stamp the file gives it.
    """

    def read_index(self):
        """Finds the first picture's time stamp; a file without usable time stamps is indexed as VideoReader does."""
        self.order, self.packets, stamp = None, None, (self.path, os.path.getmtime(self.path))
        if self.guesses_times():
            return super().read_index()
        if stamp not in FIRST_STAMP:
            numbered = enumerate(self.demux())
            FIRST_STAMP[stamp] = next((frame.pts for frame in self.decode(numbered)), None)
        self.first = FIRST_STAMP[stamp]
        if self.first is None:
            super().read_index()

    def at(self, seconds) -> tuple[np.ndarray, np.ndarray]:
        """Seconds (any shape) -> the distinct nearest frames (U, H, W, 3), and where each is among them (that shape).

        Before the start the first frame is taken, after the end the last; VideoError for what is all out of the file by
        more than 3 s, which means another file or another clock.
        """
        seconds = np.asarray(seconds, float)
        if seconds.max() < -3:
            raise VideoError(f"{self.path}: {-seconds.max():.2f} s before its start were asked for")
        if self.order is None:
            try:
                found = self.near(seconds)
            except (av.FFmpegError, OSError) as e:
                why = getattr(e, "strerror", None) or e
                raise VideoError(f"{self.path}: damaged near {seconds.min():.2f} s ({why})") from None
            if found:
                return found
            self.container.seek(0)
            super().read_index()  # its time stamps cannot be relied on: all packets are read
        times = self.times - self.times[0]
        self.check_end(times[-1], seconds.min())
        unique, inverse = np.unique(nearest(times, seconds.ravel()), return_inverse=True)
        return self.frames(unique), inverse.reshape(seconds.shape)

    def check_end(self, end: float, start: float):
        if start > end + 3:
            raise VideoError(f"{self.path}: ends at {end:.2f} s, frames from {start:.2f} s on were asked for")

    def near(self, seconds):
        """As `at`, by seeking; None where time stamps are missing or given twice."""
        stamps = np.maximum(self.first + seconds.ravel() / float(self.stream.time_base), self.first)
        for back in (0, 10, 60, math.inf):  # some containers seek too far
            start = max(self.first, stamps.min() - back / float(self.stream.time_base))
            try:
                self.container.seek(math.floor(start), stream=self.stream)
            except av.FFmpegError:  # past the end, in some containers
                continue
            packets, end = [], math.inf
            for packet in self.demux():
                if packet.pts is None or packet.dts is None:
                    return None
                packets.append(packet)
                if packet.pts >= stamps.max():
                    end = min(end, packet.pts)
                if packet.dts >= end:  # later packets have later pictures
                    break
            key = next((i for i, p in enumerate(packets) if p.is_keyframe), len(packets))
            packets = packets[key:]
            if packets and packets[0].pts <= max(stamps.min(), self.first):
                break
        else:
            return None
        shown = sorted(p.pts for p in packets if self.is_shown(p) and p.pts >= packets[0].pts)
        if len(set(shown)) < len(shown):
            return None
        self.check_end((shown[-1] - self.first) * float(self.stream.time_base), seconds.min())
        unique, inverse = np.unique(nearest(np.array(shown, float), stamps), return_inverse=True)
        wanted = {shown[i]: k for k, i in enumerate(unique)}
        last = max(i for i, p in enumerate(packets) if p.pts in wanted)
        found = {}
        self.take(enumerate(packets[:last + 1]), wanted, found)
        if len(found) < len(wanted):
            raise VideoError(f"{self.path}: a frame near {seconds.min():.2f} s gives no picture")
        return np.stack(self.alike(found, range(len(unique)))), inverse.reshape(seconds.shape)
