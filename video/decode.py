"""Decoding (PyAV): frames of a video file by index or by time, uint8 RGB.

Nothing that the container claims is trusted. A frame index counts presented frames from 0.
"""

import bisect
import contextlib
import itertools
import math
import os
from collections import OrderedDict, namedtuple
from fractions import Fraction

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.frame import PictureType

from video import remote

# files up to this size (bytes) are read into memory once; longer movies are sought in
KEEP_PACKETS = 64 << 20
AV_ERRORS = (av.FFmpegError, OSError, ValueError)  # what PyAV raises for files that are broken


class VideoError(ValueError):
    """A video that cannot be read; the message names the file and says why."""


def reason(error: Exception) -> str:
    """What went wrong, without the numbers and paths that PyAV puts around it."""
    return getattr(error, "strerror", None) or str(error)


# ---- sizes, times, colours ----

def short_side(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) of a frame scaled to a shorter side of `side`; the other is rounded down."""
    if height <= width:
        return side, side * width // height
    return side * height // width, side


def resize(clip: torch.Tensor, height: int, width: int, antialias: bool = True) -> torch.Tensor:
    """(T, H, W, C) uint8 -> (T, height, width, C) uint8, bilinear.

    Antialiased as PIL does it, else as OpenCV does (each to 1 of 255).
    """
    if clip.shape[1:3] == (height, width):
        return clip
    planes = clip.permute(0, 3, 1, 2)  # (T, C, H, W)
    planes = F.interpolate(planes, size=(height, width), mode="bilinear", antialias=antialias)
    return planes.permute(0, 2, 3, 1)


def resized(picture: np.ndarray, height: int, width: int, antialias: bool = True) -> np.ndarray:
    """As `resize`, of one picture (H, W, 3)."""
    clip = torch.from_numpy(np.ascontiguousarray(picture))[None]
    return resize(clip, height, width, antialias)[0].numpy()


def nearest(times: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Indices of the frames whose times (ascending, seconds) are nearest to t, of two the earlier.

    t (n,) seconds -> (n,) int.
    """
    if len(times) == 1:
        return np.zeros(len(t), int)
    right = np.clip(np.searchsorted(times, t), 1, len(times) - 1)
    return np.where(t - times[right - 1] <= times[right] - t, right - 1, right)


# keeps its tables from frame to frame, and from file to file
REFORMATTER = av.video.reformatter.VideoReformatter()


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """-> (H, W, 3) uint8; chroma is interpolated as the ffmpeg program does it.

    On one thread: starting others takes six times as long as the work.
    """
    rgb = REFORMATTER.reformat(frame, format="rgb24", interpolation="BICUBIC", threads=1)
    return rgb.to_ndarray()


# ---- by index ----

Stamp = namedtuple("Stamp", "pts dts is_keyframe is_discard")  # of a packet, without its data


class Hollow:
    """A file object that is not read from byte start to stop: there it gives zeros."""

    def __init__(self, file, start: int, stop: int):
        self.file, self.start, self.stop = file, start, stop
        self.seek, self.tell = file.seek, file.tell

    def read(self, n: int) -> bytes:
        at = self.tell()
        if not self.start <= at < self.stop:
            return self.file.read(min(n, self.start - at) if at < self.start else n)
        n = min(n, self.stop - at)
        self.seek(n, os.SEEK_CUR)
        return bytes(n)


# of the long files only: reading all their packets again takes seconds
INDEX_CACHE: OrderedDict = OrderedDict()
SHUFFLED: dict = {}  # of files that look so: whether they are


class VideoReader:
    """Random access to the frames of a video file, in presentation order; a context manager.

    All packets are read (not decoded) once: their time stamps give the number of frames and where
    each key frame is, with no trust in the container's own count, duration or frame rate. Those of
    a long MP4 file come from its header (`stamps`). `frames` then decodes from the last key frame
    before the wanted frames to the last of them, and leaves out frames that are neither wanted nor
    needed by others.
    """

    at_once = KEEP_PACKETS  # bytes: remote files up to this size are fetched in one request
    source = None  # what is read: a path, or a file of video/remote.py
    counted = False  # whether frames were decoded to count them
    options: dict = {}  # of the decoder

    def __init__(self, path: str, size_of=None, antialias=True):
        """size_of: (height, width) of an upright frame -> the size that `frames` gives instead.

        antialias: how frames are brought to it, as in `resize`.
        """
        self.path, self.size_of, self.antialias = path, size_of, antialias
        self.open_container()
        try:
            self.open_stream()
            self.read_index()
            self.tell_encoder()
        except VideoError:
            self.container.close()
            raise
        except AV_ERRORS as e:
            self.container.close()
            raise VideoError(f"{path}: {self.why(e)}") from None

    def open_source(self):
        """-> what av.open takes, mtime: what tells a file from a later one of its name."""
        if os.path.isfile(self.path):
            return self.path, os.path.getmtime(self.path)
        if not remote.is_remote(self.path):
            why = "not a file" if os.path.exists(self.path) else "no such file"
            raise VideoError(f"{self.path}: {why}")
        file = remote.open_file(self.path, self.at_once)
        return file, file.mtime

    def open_container(self):
        """Sets container, source and mtime."""
        try:
            self.source, self.mtime = self.open_source()
            self.container = av.open(self.source, metadata_errors="ignore")
        except VideoError:
            raise
        except AV_ERRORS as e:
            raise VideoError(f"{self.path}: cannot be opened ({self.why(e)})") from None

    def open_stream(self):
        """Sets stream, codec, and rate: frames per second, as the container says."""
        # of several the largest, as ffmpeg chooses
        self.stream = self.container.streams.best("video")
        cover = av.stream.Disposition.attached_pic
        if self.stream is None or self.stream.disposition & cover:
            raise VideoError(f"{self.path}: has no video stream")
        self.rate = self.stream.average_rate or Fraction(25)
        self.codec = self.stream.codec_context
        if self.codec is None:
            raise VideoError(f"{self.path}: no decoder for its video codec")
        self.codec.thread_count = 1  # a worker has one core
        self.codec.thread_type = "NONE"
        self.codec.options = self.options
        self.codec.open()  # dav1d (AV1) keeps the skip_frame that it was opened with

    def tell_encoder(self):
        """Shows the decoder the first packet of 4:4:4 H.264, where x264 says which version it is.

        Old ones have a bug that the decoder has to know of, else most frames are damaged and some
        are wrong without an error.
        """
        if self.codec.name == "h264" and (self.codec.pix_fmt or "").startswith(("yuv444", "gbr")):
            with contextlib.suppress(*AV_ERRORS):
                list(self.decode(self.read(0, 1)))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.packets = None
        self.container.close()

    def __len__(self):
        return len(self.order)

    def read_index(self):
        """Sets what says where each frame is, from the time stamps of all packets.

        pts: time stamps, by packet; keys: (pts, packet) where decoding can start; order: frame
        index -> packet; times: seconds, by frame; packets: themselves, None for a long file.
        """
        size = self.container.size or 0
        long = size > KEEP_PACKETS
        stamp = (self.path, size, self.mtime) if long else None
        if stamp in INDEX_CACHE:
            self.packets = None
            self.pts, self.keys, self.order, self.counted, self.times = INDEX_CACHE[stamp]
            return
        self.packets, self.pts, shown, keys = [], [], [], []
        apart = []  # by packet: whether it is decoded at another time than it is shown
        for i, packet in enumerate(long and self.stamps() or self.demux()):
            self.pts.append(packet.pts)
            apart.append(packet.pts != packet.dts)
            if packet.is_keyframe:
                keys.append((packet.pts, i))
            if self.is_shown(packet):
                shown.append(i)
            if not long:
                self.packets.append(packet)
        if not self.pts:
            raise VideoError(f"{self.path}: holds no video packets")
        stamps = [self.pts[i] for i in shown if keys and i >= keys[0][1]]
        unusable = None in stamps or len(set(stamps)) < len(stamps) or not keys
        if unusable or self.guesses_times() or self.is_shuffled(apart, [i for _, i in keys]):
            self.count_frames()
        else:
            start, first = self.find_start(min(keys)[0], keys[0][1], shown)
            self.keys = sorted({(first, start), *keys})
            self.order = [i for i in shown if i >= start and self.pts[i] >= first]
            self.order.sort(key=self.pts.__getitem__)
            base = float(self.stream.time_base or Fraction(1))
            self.times = np.array([self.pts[i] for i in self.order], float) * base
        self.check_source()
        if not len(self.order):
            raise VideoError(f"{self.path}: holds no frame that can be decoded")
        if long:
            self.packets = None
            INDEX_CACHE[stamp] = self.pts, self.keys, self.order, self.counted, self.times
            while len(INDEX_CACHE) > 256:
                INDEX_CACHE.popitem(last=False)

    def stamps(self) -> list | None:
        """The Stamp of each packet from the header of an MP4 file; None where all must be read.

        A demuxer that is given zeros for the data gives the same time stamps. What is a key frame
        it takes from the header then, else from the data: None where it matters that they differ.
        """
        entries = self.stream.index_entries
        uncut = self.codec.codec.canonical_name in ("h264", "hevc", "av1", "mpeg4", "prores")
        if not (self.container.format.name.startswith("mov") and uncut and len(entries)):
            return None
        start, stop = min(e.pos for e in entries), max(e.pos + e.size for e in entries)
        found, options = [], {"fflags": "noparse+nofillin", "probesize": "32"}
        with contextlib.suppress(*AV_ERRORS):
            source, _ = self.open_source()
            file = open(source, "rb", 0) if isinstance(source, str) else source
            with file, av.open(Hollow(file, start, stop), format="mov", options=options) as hollow:
                for stream in hollow.streams:
                    if stream.index != self.stream.index:
                        stream.discard = av.stream.Discard.all
                for p in self.demux(hollow, hollow.streams[self.stream.index]):
                    found.append(Stamp(p.pts, p.dts, p.is_keyframe, p.is_discard))
        keys = [i for i, p in enumerate(found) if p.is_keyframe]
        if (stop > self.container.size or len(found) != len(entries) or keys[:1] != [0]
                or any(p.pts is None or p.pts < found[0].pts for p in found)
                or max(b - a for a, b in itertools.pairwise([*keys, len(found)])) > 1000):
            return None
        # see is_shuffled; so it may be between key frames that the header does not call so
        latest = itertools.accumulate((p.pts for p in found), max)
        runs = itertools.groupby(p.pts == p.dts == top for p, top in zip(found, latest))
        if self.codec.has_b_frames and any(alike and len(list(run)) > 3 for alike, run in runs):
            return None
        for i in (keys[-1], keys[len(keys) // 2], 0):
            self.container.seek(found[i].pts, stream=self.stream)
            packet = next(self.demux(), None)
            if not packet or packet.pts != found[i].pts or not packet.is_keyframe:
                self.reopen()
                return None
        return found

    def find_start(self, first: int, key: int, shown) -> tuple[int, int]:
        """-> (packet to start from, time stamp of the first picture that can be decoded).

        It is mostly that of the first key frame (`first`, its packet `key`). It is earlier where
        pictures lead the key frame and need no other (RADL), or where a key frame is not called
        one; later where a file starts with H.264 that is refreshed bit by bit. For pictures that
        refer to what the file does not have, decoders of H.26x, MPEG-2, VPx and AV1 give none;
        those of MPEG-4, WMV, H.263 and Theora make up gray, and then no key frame comes first.
        """
        early = any(self.pts[i] is not None and self.pts[i] < first for i in shown)
        if not early and self.codec.name == "h264":  # a millisecond
            with contextlib.suppress(*AV_ERRORS):
                early = not list(self.decode(self.read(key, key + 1)))
        for start in dict.fromkeys((0, key) if early else ()):
            with contextlib.suppress(*AV_ERRORS):
                frame = next(self.decode(self.read(start, len(self.pts))), None)
                if frame and frame.pts is not None and (start == key or frame.key_frame):
                    return start, frame.pts
        return key, first

    def is_shown(self, packet) -> bool:
        """Whether a packet's picture is presented.

        It is not where an edit list cuts it off, and where it is an alternate reference of VP8.
        """
        if packet.is_discard:
            return False
        return self.codec.name not in ("vp8", "libvpx") or bool(bytes(packet)[0] & 0x10)

    def guesses_times(self) -> bool:
        """AVI stores decoding order only: with B-frames, time stamps are not the pictures'."""
        return self.container.format.name == "avi" and bool(self.codec.has_b_frames)

    def is_shuffled(self, apart, keys) -> bool:
        """Whether pictures are shown in another order than their time stamps say.

        So it is where a stream with B-frames was copied from AVI or a raw file into a container:
        the stamps are those of decoding. Where they look so, in all the file or from one key frame
        to the next, all is decoded once: a decoder gives pictures in their order.
        """
        stamps = [pts for pts in self.pts if pts is not None]
        ascending = all(a < b for a, b in itertools.pairwise(stamps))
        ends = [*keys, len(self.pts)]
        alike = any(b - a > 3 and not any(apart[a:b]) for a, b in itertools.pairwise(ends))
        if not self.codec.has_b_frames or not (ascending or alike):
            return False
        stamp = self.path, len(self.pts), self.mtime
        if stamp not in SHUFFLED:
            SHUFFLED[stamp] = not self.decodes_in_order(self.read(0, len(self.pts)))
        return SHUFFLED[stamp]

    def decodes_in_order(self, numbered) -> bool:
        """Whether the time stamps of pictures ascend as a decoder gives them."""
        stamps = []
        with contextlib.suppress(*AV_ERRORS):
            for frame in self.decode(numbered):
                stamps.append(frame.pts)
        self.check_source()
        return all(a < b for a, b in itertools.pairwise(stamps))

    def demux(self, container=None, stream=None):
        """Yields the stream's packets from where the container stands."""
        locked = "enc_key_id" in self.stream.metadata  # Matroska; MP4 says it of each packet
        try:
            for packet in (container or self.container).demux(stream or self.stream):
                self.check_source()
                if locked or packet.has_sidedata("encryption_info"):
                    raise VideoError(f"{self.path}: is encrypted")
                if packet.size:
                    yield packet
        except av.EOFError:  # some demuxers raise it where the file was cut off
            self.check_source()

    def check_source(self):
        """VideoError where a connection was lost, which FFmpeg may have taken for the end."""
        if getattr(self.source, "error", None):
            raise VideoError(f"{self.path}: {self.why()}")

    def why(self, error: Exception | None = None) -> str:
        """The reason of an error, which may be that of a lost connection."""
        return reason(getattr(self.source, "error", None) or error)

    def reopen(self):
        """Back to the first packet, which not every container can seek to."""
        before = self.container
        self.open_container()
        before.close()
        self.open_stream()

    def count_frames(self):
        """Decodes all frames to count them, where packets have no usable time stamps."""
        self.counted, self.keys, times = True, [(0, 0)], []
        rate = float(self.stream.average_rate or self.stream.guessed_rate or 25)
        try:
            for frame in self.decode(self.read(0, len(self.pts))):
                times.append(len(times) / rate if frame.time is None else frame.time)
        except av.FFmpegError as e:
            raise self.damaged(len(times) - 1, e) from None
        self.times = np.array(times)
        if not (np.diff(self.times) > 0).all():
            self.times = np.arange(len(times)) / rate
        self.order = range(len(times))

    def read(self, start: int, stop: int):
        """Yields (number, packet) of the packets start..stop-1, in decoding order."""
        if self.packets:
            yield from zip(range(start, stop), self.packets[start:stop])
            return
        known = start and self.pts[start] is not None
        for back in (0, 1, 10) if known else ():  # seconds: some containers seek too far
            try:
                to = self.pts[start] - int(back / self.stream.time_base)
                self.container.seek(to, stream=self.stream)
            except av.FFmpegError:  # before the start
                continue
            packets = self.demux()
            head = next(packets, None)
            if head and head.pts in self.pts and (i := self.pts.index(head.pts)) <= start:
                packets = itertools.chain([head], packets)
                break
        else:
            try:
                self.container.seek(0)
            except av.FFmpegError:  # the first packet is not called a key frame
                self.reopen()
            packets, i = self.demux(), 0
        for i, packet in enumerate(packets, i):
            if i >= stop:
                return
            if i >= start:
                yield i, packet

    def decode(self, numbered, wanted=None):
        """Decodes (number, packet) pairs and drains the decoder.

        wanted (time stamps; None: all): frames that nobody wants or refers to are left out.
        """
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
        """Frame indices (any order, repeats) -> (n, H, W, 3) uint8 RGB, upright.

        VideoError names the failing frame.
        """
        return np.stack(self.pictures(indices))

    def inside(self, indices) -> list[int]:
        """Frame indices as a list; VideoError where the video has no such frame."""
        indices = [int(i) for i in indices]
        first, last, n = min(indices), max(indices), len(self)
        if first < 0 or last >= n:
            raise VideoError(f"{self.path}: frames {first}..{last} wanted, it has {n}")
        return indices

    def pictures(self, indices) -> list[np.ndarray]:
        """As `frames`, a list of (H, W, 3): what is cropped next need not be copied whole."""
        indices, n = self.inside(indices), len(self)
        found, missing, wrong = {}, indices, None  # frame index -> picture
        for back in (0, 2, len(self.keys)):
            for key, some in self.by_key_frame(missing, back).items():
                stop = len(self.pts) if self.counted else max(self.order[i] for i in some) + 1
                stamp = None if key == self.keys[0][1] else self.pts[key]
                places = {self.place(i): i for i in some}
                try:
                    found.update(dict(self.pick(self.read(key, stop), places, stamp, back)))
                except VideoError as e:
                    wrong = e
            missing = [i for i in indices if i not in found]
        if missing:
            raise wrong or VideoError(f"{self.path}: frame {missing[0]} of {n} gives no picture")
        return self.alike(found, indices)

    def all_frames(self):
        """Yields every frame in its order, (H, W, 3) uint8; the file is decoded once."""
        frames = self.decode(self.read(0, len(self.pts)))
        yield from map(self.convert, itertools.islice(frames, len(self)))

    def check(self):
        """Decodes all frames in one pass and keeps none; VideoError names the first that fails."""
        left = set(range(len(self)))
        start = min(packet for _, packet in self.keys)
        numbered = self.read(start, len(self.pts))
        for i, _ in self.pick(numbered, {self.place(i): i for i in left}):
            left.remove(i)
        if left:
            raise VideoError(f"{self.path}: frame {min(left)} of {len(self)} gives no picture")

    def place(self, i: int) -> int:
        """By what a decoded frame is known as that of index i: its time stamp, or its number."""
        return i if self.counted else self.pts[self.order[i]]

    def by_key_frame(self, indices, back: int = 0) -> dict:
        """Frame indices -> {packet of the key frame `back` before their own: those indices}."""
        groups = {}
        for i in sorted(set(indices)):
            shown_at = self.place(i), len(self.pts)  # above any (pts, packet) of that pts
            key = self.keys[max(bisect.bisect_right(self.keys, shown_at) - 1 - back, 0)][1]
            groups.setdefault(key, []).append(i)
        return groups

    def pick(self, numbered, wanted: dict, key: int | None = None, back: int = 0):
        """Decodes packets; yields (wanted[place], picture) of the frames whose place is wanted.

        VideoError also where a frame is damaged that others may refer to. key: the time stamp of
        the packet that starts. Nothing comes where it is no key frame whatever the container says,
        and where it is one that H.264 refreshes bit by bit: FFmpeg misjudges when that is over, but
        is right from the second next one on (`back` of them before the wanted).
        """
        last, bad = -1, False
        try:
            for i, frame in enumerate(self.decode(numbered, None if self.counted else wanted)):
                place = i if self.counted else frame.pts
                if key is not None and i == 0:
                    own = frame.key_frame or frame.pict_type == PictureType.I
                    if place > key and not back or place == key and not own:
                        return
                bad = frame.is_corrupt or bad and not frame.key_frame
                if bad and (place in wanted or not self.counted):
                    name = wanted.get(place, f"one that frame {max(wanted.values())} refers to")
                    raise VideoError(f"{self.path}: frame {name} is damaged")
                if place in wanted:
                    last = wanted[place]
                    yield last, self.convert(frame)
                    if self.counted and i == max(wanted):
                        return
        except VideoError:
            raise
        except AV_ERRORS as e:
            raise self.damaged(last, e) from None

    def damaged(self, last: int, error: Exception) -> VideoError:
        """What to raise where decoding failed after frame `last`; -1: before the first wanted."""
        where = f"damaged after frame {last}" if last >= 0 else "no frame could be decoded"
        return VideoError(f"{self.path}: {where} ({self.why(error)})")

    def alike(self, found: dict, indices) -> list[np.ndarray]:
        """[found[i] for i in indices]; in a stream that changes its size, as large as the first."""
        if len({picture.shape for picture in found.values()}) > 1:
            h, w = found[min(found)].shape[:2]
            found = {i: resized(picture, h, w) for i, picture in found.items()}
        return [found[i] for i in indices]

    def convert(self, frame) -> np.ndarray:
        """A decoded frame -> (H, W, 3) uint8 RGB, turned upright as players do."""
        rgb = to_rgb(frame)
        try:
            matrix = frame.side_data.get("DISPLAYMATRIX")
        except ValueError:  # beside data that PyAV does not know, it tells the turn only
            matrix, rgb = None, np.rot90(rgb, frame.rotation // 90)
        if matrix:  # the picture's (x, y, 1) @ it is the place on screen
            turn = np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2].astype(int)
            if abs(turn[0, 0]) < abs(turn[0, 1]):
                rgb, turn = rgb.swapaxes(0, 1), turn[::-1]
            rgb = rgb[::-1 if turn[1, 1] < 0 else 1, ::-1 if turn[0, 0] < 0 else 1]
        if self.size_of:  # at once, so that many frames of a large video fit in memory
            rgb = resized(rgb, *self.size_of(*rgb.shape[:2]), self.antialias)
        return rgb


# ---- by time ----

FIRST_STAMP: dict = {}  # of movies: the time stamp of the first picture


class MovieReader(VideoReader):
    """Frames by time from a file of hours: a seek and the packets around; no index of them all.

    Seconds count from the first picture, whatever time stamp the file gives it.
    """

    at_once = 4 << 20

    def read_index(self):
        """Finds the first picture's time stamp; where there is none, as VideoReader does it."""
        self.order, self.packets = None, None
        stamp = self.path, self.mtime
        if self.guesses_times():
            return super().read_index()
        if stamp not in FIRST_STAMP:
            FIRST_STAMP[stamp] = None
            numbered = enumerate(self.demux())
            with contextlib.suppress(*AV_ERRORS):
                head = next(numbered)
                frame = next(self.decode(itertools.chain([head], numbered)), None)
                if frame and (frame.key_frame or head[1].is_keyframe):
                    FIRST_STAMP[stamp] = frame.pts
        self.first = FIRST_STAMP[stamp]
        if self.first is None:
            self.reopen()
            super().read_index()

    def at(self, seconds) -> tuple[np.ndarray, np.ndarray]:
        """Seconds (any shape) -> the distinct nearest frames (U, H, W, 3), and where each is among
        them (that shape).

        Before the start the first frame is taken, after the end the last; VideoError for what is
        all out of the file by more than 3 s, which means another file or another clock.
        """
        seconds = np.asarray(seconds, float)
        if seconds.max() < -3:
            raise VideoError(f"{self.path}: {-seconds.max():.2f} s before its start were asked for")
        if self.order is None:
            try:
                if found := self.near(seconds):
                    return found
                self.reopen()
                super().read_index()  # its time stamps cannot be relied on: all packets are read
            except (av.FFmpegError, OSError) as e:
                where = f"damaged near {seconds.min():.2f} s"
                raise VideoError(f"{self.path}: {where} ({self.why(e)})") from None
            self.tell_encoder()
        times = self.times - self.times[0]
        self.check_end(times[-1], seconds.min())
        unique, inverse = np.unique(nearest(times, seconds.ravel()), return_inverse=True)
        return self.frames(unique), inverse.reshape(seconds.shape)

    def check_end(self, end: float, start: float):
        """VideoError where the file ends more than 3 s before what is wanted starts (seconds)."""
        if start > end + 3:
            raise VideoError(f"{self.path}: ends at {end:.2f} s, frames from {start:.2f} s on were "
                             "asked for")

    def near(self, seconds):
        """As `at`, by seeking; None where time stamps are missing or given twice, or it fails."""
        base, failed = float(self.stream.time_base), False
        stamps = np.maximum(self.first + seconds.ravel() / base, self.first)
        # some containers seek too far; what is refreshed bit by bit needs the key frames before
        for back in (0, 10, 60, math.inf):
            if failed and back == math.inf:
                break
            start = max(self.first, stamps.min() - back / base)
            try:
                if back < math.inf:
                    self.container.seek(math.floor(start), stream=self.stream)
                else:
                    self.reopen()
            except av.FFmpegError:  # past the end, in some containers
                continue
            packets = self.packets_until(stamps.max())
            if packets is None:
                return None
            if not packets or packets[0].pts > max(stamps.min(), self.first):
                continue
            ascending = all(a.pts < b.pts for a, b in itertools.pairwise(packets))
            suspect = self.codec.has_b_frames and ascending and len(packets) > 3  # see is_shuffled
            if suspect and not self.decodes_in_order(enumerate(packets)):
                return None
            shown = sorted(p.pts for p in packets if self.is_shown(p) and p.pts >= packets[0].pts)
            if len(set(shown)) < len(shown):
                return None
            self.check_end((shown[-1] - self.first) * base, seconds.min())
            times = np.array(shown, float) * base - self.first * base  # an index's, to the bit
            unique, inverse = np.unique(nearest(times, np.maximum(seconds.ravel(), 0)),
                                        return_inverse=True)
            wanted = {shown[i]: k for k, i in enumerate(unique)}
            last = max(i for i, p in enumerate(packets) if p.pts in wanted)
            failed = True
            key = packets[0].pts if packets[0].pts > self.first else None
            with contextlib.suppress(VideoError):
                found = dict(self.pick(enumerate(packets[:last + 1]), wanted, key, back))
                if len(found) == len(wanted):
                    found = self.alike(found, range(len(unique)))
                    return np.stack(found), inverse.reshape(seconds.shape)
        return None

    def packets_until(self, stamp: float) -> list | None:
        """Packets from the next key frame to the picture at `stamp`; None: one has no time.

        Matroska has no times of decoding. Those of the first packets after a seek are not known,
        others are guessed, perhaps too late: by 16 pictures at most, as many as a decoder holds.
        """
        packets, end, after = [], math.inf, 0
        for packet in self.demux():
            if packet.pts is None or packet.dts is None and len(packets) >= 16:
                return None
            packets.append(packet)
            if packet.pts >= stamp:
                end = min(end, packet.pts)
            after += packet.dts is not None and packet.dts >= end
            if after > 16:  # later packets have later pictures
                break
        key = next((i for i, p in enumerate(packets) if p.is_keyframe), len(packets))
        return packets[key:]
