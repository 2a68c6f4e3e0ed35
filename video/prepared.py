"""Prepared sets: frames decoded, reduced and stored once (`python data.py prepare`), read cheaply.

A set is a folder: index.json (settings, paths, labels, where each video lies) and shards of
consecutive videos, in one of three forms. `raw`: the pixels, read through a memory map. `compact`:
a JPEG per frame. `files`: the videos' own bytes in plain tars; such a set may lie at an address. A
video is named FOLDER::PATH, PATH as in the list that was prepared, and is read like the file
itself: it has as many frames, at the same times; where only every R-th frame is kept, that stands
for the next R - 1 too. A video that could not be read stays in the list and fails when it is
opened, as its file would.
"""

import contextlib
import errno
import functools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import zlib
from collections import OrderedDict, namedtuple
from fractions import Fraction

import av
import numpy as np
import torch

from video import remote
from video.decode import (MovieReader, VideoError, VideoReader, nearest, reason, resize,
                          short_side, to_rgb)
from video.frames import FrameFolder

CHUNK = 128 << 20  # bytes of reduced frames that are held at once while a video is prepared
SHARD = 256 << 20  # about so many bytes of files are a shard of the form `files`
KEPT = 24  # copies of shards of sets at addresses that stay on the disk
DECODED = ("raw", "compact")
FORMS = (*DECODED, "files")
ENDINGS = dict(raw="raw", compact="compact", files="tar")  # of shards

Entry = namedtuple("Entry", "n h w checksum shard data")  # of a set's video: data (bytes,) uint8


# ---- reading ----

INDEXES: dict = {}  # folder -> its index.json
MAPS: OrderedDict = OrderedDict()  # shard path -> its bytes


def is_prepared(source: str) -> bool:
    """Whether a folder is a prepared set, finished or not."""
    names = "index.json", "settings.json"
    return any(os.path.isfile(os.path.join(source, name)) for name in names)


@functools.cache
def is_far(folder: str) -> bool:
    """Whether a set of the form `files` is at an address; it is asked once in a process.

    ValueError: a set of another form is there, or copies of its shards have no place.
    """
    if not remote.is_address(folder) or "?" in folder or remote.split(folder + "::x")[1]:  # a tar
        return False
    remote.exists(folder)  # else ValueError
    try:
        form = read_index(folder)["form"]
    except (OSError, ValueError):  # stores answer in many ways that there is no index.json
        return False
    if form != "files":
        raise ValueError(f"{folder}: at an address a set has to be of the form files")
    copies()
    return True


def read_index(folder: str) -> dict:
    """What a finished set holds; ValueError where it is not finished, or damaged.

    -> {form, sampling_rate, rows: [[path, label]], videos: {path: entry}, failed: {path: why}},
    and a checksum of it all, stamp.
    """
    if folder not in INDEXES:
        path = os.path.join(folder, "index.json")
        if not os.path.isfile(path) and not remote.is_address(folder):
            raise ValueError(f"{folder}: preparing it has not finished; `data.py prepare` with the "
                             "same list goes on")
        keys = "form", "sampling_rate", "rows", "videos", "failed"
        try:
            with remote.open_binary(path) as f:
                text = f.read()
            index = json.loads(text)
            INDEXES[folder] = {key: index[key] for key in keys} | dict(stamp=zlib.crc32(text))
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path}: damaged ({type(e).__name__}: {e}); `data.py prepare` with "
                             "the same list writes it again") from None
    return INDEXES[folder]


def shard_bytes(shard: str, cut: int | None = None) -> np.ndarray:
    """The bytes of a shard (n,) uint8, mapped into memory; the last 64 stay mapped.

    One at an address is copied to a disk first, again where the copy has `cut` bytes.
    """
    path, far = shard, remote.is_address(shard)
    if far:
        try:
            path = near(shard, cut)
        except (OSError, ValueError) as e:
            raise VideoError(f"{shard}: {reason(e)}") from None
        if cut is not None:
            MAPS.pop(path, None)
    if path not in MAPS:
        for old in [old for old in MAPS if far and not os.path.exists(old)]:
            del MAPS[old]  # or the disk does not get its room back
        try:
            MAPS[path] = np.asarray(np.memmap(path, np.uint8, "r"))  # a plain array slices faster
        except (OSError, ValueError) as e:
            if far and isinstance(e, FileNotFoundError):  # another process has made room
                return shard_bytes(shard)
            raise VideoError(f"{path} cannot be read ({reason(e)}); prepare again") from None
        while len(MAPS) > 64:
            MAPS.popitem(last=False)
    return MAPS[path]


def copies() -> str:
    """The folder of copies of shards, which all processes of a machine share.

    It is one of its own in that of VIDEOMAE_CACHE in the environment, else in that for temporary
    files. ValueError: it cannot be written to.
    """
    root = os.environ.get("VIDEOMAE_CACHE") or tempfile.gettempdir()
    folder = os.path.join(root, f"videomae-shards-{os.getuid()}")
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as e:
        raise ValueError(f"{folder}: {reason(e)}; expected VIDEOMAE_CACHE to be a folder for "
                         "copies of shards") from None
    return folder


def near(shard: str, cut: int | None) -> str:
    """The path of a copy of a set's shard, fetched where none is there, or one of `cut` bytes.

    The KEPT shards used last stay.
    """
    folder, (place, name) = copies(), shard.rsplit("/", 1)
    key = zlib.crc32(f"{shard} {read_index(place)['stamp']}".encode())  # of this set as it is now
    path = os.path.join(folder, f"{key:08x}-{name}")
    with contextlib.suppress(FileNotFoundError):
        if os.path.getsize(path) != cut:
            os.utime(path)  # it was used now
            return path
    with locked(os.path.join(folder, f"lock-{key % 64}"), wait=True):
        if os.path.exists(path) and os.path.getsize(path) != cut:
            return path  # another process has fetched it meanwhile
        remote.copy(shard, path + ".part")
        os.replace(path + ".part", path)
    with locked(os.path.join(folder, "lock"), wait=True):  # one process at a time makes room
        there = sorted((e for e in os.scandir(folder) if e.name.endswith(".tar")),
                       key=lambda e: e.stat().st_mtime)
        for old in there[:-KEPT]:
            os.remove(old.path)
    return path


def open_video(path: str, size_of=None, antialias=True):
    """A reader for a video file, a frame folder or FOLDER::PATH of a prepared set.

    The rest as in VideoReader.
    """
    reader = FrameFolder if os.path.isdir(path) else VideoReader
    return (form_reader(path, PackedVideo) if in_set(path) else reader)(path, size_of, antialias)


def open_movie(path: str, size_of=None):
    """As open_video, for access by time (`at`)."""
    reader = FrameFolder if os.path.isdir(path) else MovieReader
    return (form_reader(path, PackedMovie) if in_set(path) else reader)(path, size_of)


def form_reader(path: str, packed: type) -> type:
    """What reads FOLDER::PATH: `packed` where the set holds files as they are."""
    files = read_index(path.split("::", 1)[0])["form"] == "files"
    return packed if files else PreparedVideo


def in_set(path: str) -> bool:
    """Whether a path is FOLDER::PATH of a prepared set."""
    folder, inside, _ = path.partition("::")
    return bool(inside) and (folder in INDEXES or os.path.isdir(folder) and is_prepared(folder)
                             or "://" in folder and is_far(folder))


def exists(path: str) -> bool:
    """Whether a list's path leads somewhere: to a file, a video of a prepared set; see remote."""
    if not in_set(path):
        return os.path.exists(path) or remote.exists(path)
    folder, name = path.split("::", 1)
    index = read_index(folder)
    return name in index["videos"] or name in index["failed"]


def length(path: str) -> int | None:
    """Frames of a video of a prepared set, by its index; None of one that failed, of any other."""
    if not in_set(path):
        return None
    folder, name = path.split("::", 1)
    entry = read_index(folder)["videos"].get(name)
    return entry and entry[1]


def source_of(path: str) -> str:
    """The file that a path stands for: PATH of FOLDER::PATH, else itself."""
    return path.split("::", 1)[1] if in_set(path) else path


def check_stride(paths: list[str], stride: int | None):
    """ValueError where clips need frames that a prepared set has not kept.

    stride: frames from one of a clip to the next; None: any frames may be wanted.
    """
    for folder in dict.fromkeys(path.split("::")[0] for path in paths if "::" in path):
        kept = read_index(folder)["sampling_rate"] if is_prepared(folder) else 1
        if kept > 1 and stride is None:
            raise ValueError(f"{folder} keeps 1 frame in {kept}: --fps and --sampling sparse may "
                             "want any; expected a set prepared with `--sampling_rate 1`")
        if stride and stride % kept:
            raise ValueError(f"{folder} keeps 1 frame in {kept}: --sampling_rate {stride}: "
                             f"expected a multiple of {kept}, or a set prepared with "
                             f"`--sampling_rate {stride}`")


def check_gap(paths: list[str], seconds: np.ndarray):
    """ValueError where a clip with frames at `seconds` would show a kept frame of a set twice."""
    wanted = np.diff(seconds).min(initial=np.inf)
    for path in dict.fromkeys(path for path in paths if in_set(path)):
        if form_reader(path, None) is None:
            continue
        with contextlib.suppress(VideoError), PreparedVideo(path) as video:
            gap = video.kept_every * (video.times[-1] - video.times[0]) / max(len(video) - 1, 1)
            if video.kept_every > 1 and gap > 1.05 * wanted:  # 24 frames/s are taken for 25
                raise ValueError(f"{path}: the set keeps a frame every {gap:.3f} s, clips have one "
                                 f"every {wanted:.3f} s: expected a set prepared with a "
                                 f"--sampling_rate below {video.kept_every}")


def find(path: str) -> Entry:
    """What a set holds of FOLDER::PATH; VideoError where it holds nothing, or that is cut off."""
    folder, name = path.split("::", 1)
    index = read_index(folder)
    if name in index["failed"]:
        raise VideoError(f"{path}: could not be read when the set was prepared: "
                         f"{index['failed'][name]}")
    if name not in index["videos"]:
        raise VideoError(f"{path}: not in this prepared set")
    shard, n, h, w, start, end, checksum = index["videos"][name]
    shard = os.path.join(folder, shard)
    try:
        data = (whole := shard_bytes(shard))[start:end]
        if len(data) < end - start and remote.is_address(shard):  # its copy was cut off
            data = shard_bytes(shard, len(whole))[start:end]
    except VideoError as e:
        raise VideoError(f"{path}: {e}") from None
    if len(data) < end - start:
        raise VideoError(f"{path}: {shard} is cut off: remove it and prepare again")
    return Entry(n, h, w, checksum, shard, data)


def check_bytes(path: str):
    """VideoError unless a set's bytes of FOLDER::PATH are those that were written."""
    entry = find(path)
    if zlib.crc32(entry.data) != entry.checksum:
        raise VideoError(f"{path}: the bytes in {entry.shard} are not those that were "
                         "written (checksum): remove it and prepare again")


def shards(paths) -> np.ndarray | None:
    """(videos,) number of the shard that each video is in; -1: not in a set of the form `files`.

    None where no set of that form was read.
    """
    sets = {folder: x["videos"] for folder, x in INDEXES.items() if x["form"] == "files"}
    numbers, found = {}, np.full(len(paths), -1)
    for i, path in enumerate(paths if sets else ()):
        folder, _, name = path.partition("::")
        if entry := sets.get(folder, {}).get(name):
            found[i] = numbers.setdefault((folder, entry[0]), len(numbers))
    return found if numbers else None


class Packed:
    """A file of a set of the form `files`, read as from a disk."""

    def open_source(self):
        """As of VideoReader."""
        entry, name = find(self.path), self.path.split("::", 1)[1]
        part = remote.Part(name, lambda a, b: entry.data[a:b].tobytes(), 0, len(entry.data),
                           entry.checksum, whole=self.at_once)
        return part, part.mtime


class PackedVideo(Packed, VideoReader):
    """As VideoReader."""


class PackedMovie(Packed, MovieReader):
    """As MovieReader."""


class PreparedVideo:
    """A video of a set of decoded frames; the interface of VideoReader and MovieReader."""

    def __init__(self, path: str, size_of=None, antialias=True):
        self.path, self.size_of, self.antialias = path, size_of, antialias
        index = read_index(path.split("::", 1)[0])
        self.form, self.kept_every = index["form"], index["sampling_rate"]
        self.n, self.h, self.w, _, _, self.data = find(path)
        self.kept = -(-self.n // self.kept_every)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.data = None

    def __len__(self):
        return self.n

    @property
    def times(self) -> np.ndarray:
        """Seconds of all n frames of the source."""
        return np.frombuffer(self.data[-8 * self.n:].tobytes())

    def check(self):
        """Decodes all frames and keeps none; VideoError names the first that fails."""
        for i in range(self.n):
            self.frames([i])

    def stored(self, places) -> list[np.ndarray]:
        """Places among the kept frames -> (H, W, 3) each, of the stored size."""
        if self.form == "raw":
            pixels = self.data[:self.kept * self.h * self.w * 3]
            frames = pixels.reshape(self.kept, self.h, self.w, 3)
            return [frames[k] for k in places]
        table = self.data[-8 * (self.n + self.kept + 1):-8 * self.n].tobytes()
        offsets, found = np.frombuffer(table, np.int64), {}
        codec = av.CodecContext.create("mjpeg", "r")
        codec.thread_type = "NONE"
        for k in dict.fromkeys(places):
            try:
                frame, = codec.decode(av.Packet(self.data[offsets[k]:offsets[k + 1]]))
            except (av.FFmpegError, ValueError) as e:
                i = k * self.kept_every
                raise VideoError(f"{self.path}: frame {i} is damaged ({e})") from None
            found[k] = to_rgb(frame)
        return [found[k] for k in places]

    def sized(self, frames: list) -> list[np.ndarray]:
        """Frames of the stored size -> of the size that size_of wants."""
        size = self.size_of(self.h, self.w) if self.size_of else (self.h, self.w)
        if size == (self.h, self.w):
            return frames
        return list(resize(torch.from_numpy(np.stack(frames)), *size, self.antialias).numpy())

    def pictures(self, indices) -> list[np.ndarray]:
        """Frame indices of the source (any order, repeats) -> (H, W, 3) uint8 each.

        They are views of the shard where they can be.
        """
        indices = np.asarray(indices, int)
        first, last = indices.min(), indices.max()
        if first < 0 or last >= self.n:
            raise VideoError(f"{self.path}: frames {first}..{last} wanted, it has {self.n}")
        return self.sized(self.stored((indices // self.kept_every).tolist()))

    def frames(self, indices) -> np.ndarray:
        """As VideoReader.frames: (n, H, W, 3) uint8 RGB."""
        return np.stack(self.pictures(indices))

    def at(self, seconds) -> tuple[np.ndarray, np.ndarray]:
        """As MovieReader.at, among the kept frames."""
        seconds = np.asarray(seconds, float)
        times = self.times - self.times[0]
        first, last = seconds.min(), seconds.max()
        if not -3 <= last or first > times[-1] + 3:
            raise VideoError(f"{self.path}: ends at {times[-1]:.2f} s, frames from {first:.2f} to "
                             f"{last:.2f} s were asked for")
        kept = times[::self.kept_every]
        places, inverse = np.unique(nearest(kept, seconds.ravel()), return_inverse=True)
        pictures = self.sized(self.stored(places.tolist()))
        return np.stack(pictures), inverse.reshape(seconds.shape)


# ---- writing: one video, one shard ----

def jpeg_encoder(height: int, width: int, quality: int) -> av.CodecContext:
    """quality: the quantiser scale, 2 (best) to 31."""
    codec = av.CodecContext.create("mjpeg", "w")
    codec.height, codec.width = height, width
    codec.pix_fmt, codec.time_base = "yuvj420p", Fraction(1, 25)
    codec.thread_count = 1
    codec.options = {"qmin": str(quality), "qmax": str(quality)}
    return codec


def encode(codec: av.CodecContext, rgb: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> one JPEG."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), "rgb24")
    frame = frame.reformat(format="yuvj420p", interpolation="BICUBIC", threads=1)
    packet, = codec.encode(frame)
    return bytes(packet)


def reduce_to(side: int):
    """-> (height, width) -> the size of a frame whose short side is at most `side`."""
    return lambda h, w: short_side(h, w, side) if min(h, w) > side else (h, w)


def append_video(f, path: str, settings: dict) -> list:
    """Appends a video to an open shard; -> [frames, height, width, start, end, checksum].

    Its bytes: the kept frames; compact: an int64 table of where each begins and the last ends; n
    float64 times. VideoError where it cannot be read.
    """
    start, checksum = f.tell(), 0

    def write(content):
        nonlocal checksum
        f.write(content)
        checksum = zlib.crc32(content, checksum)

    with open_video(path, reduce_to(settings["short_side"])) as video:
        kept = range(0, len(video), settings["sampling_rate"])
        step = 1  # the first frame alone, which tells the size
        offsets, codec, shape = [0], None, None
        while kept:
            frames = video.frames(kept[:step])
            if shape is None:
                shape = frames.shape[1:3]
                if settings["form"] == "compact":
                    codec = jpeg_encoder(*shape, settings["quality"])
            elif frames.shape[1:3] != shape:  # a stream that changes its size
                frames = resize(torch.from_numpy(frames), *shape).numpy()
            for rgb in frames:
                write(encode(codec, rgb) if codec else np.ascontiguousarray(rgb))
                offsets.append(f.tell() - start)
            kept = kept[step:]
            step = max(1, CHUNK // (3 * shape[0] * shape[1]))
        if codec:
            write(np.array(offsets, np.int64))
        write(np.array(video.times, np.float64))
        return [len(video), *shape, start, f.tell(), checksum]


class Copied(VideoReader):
    """A file whose bytes are in another already, as `part`."""

    def __init__(self, path: str, part: remote.Part):
        self.part = part
        super().__init__(path)

    def open_source(self):
        """As of VideoReader."""
        return self.part, None


def content(path: str):
    """Yields how many bytes a file has, then these; VideoError where it cannot be read."""
    try:
        with remote.open_binary(path) as f:
            yield f.seek(0, os.SEEK_END)
            f.seek(0)
            while data := f.read(remote.BLOCK):
                yield data
    except FileNotFoundError:
        raise VideoError(f"{path}: no such file") from None
    except (OSError, ValueError) as e:
        raise VideoError(f"{path}: {reason(e)}") from None


def append_file(f, path: str, settings: dict) -> list:
    """As append_video, of the file as it is, as a member of a tar.

    Decoded are its first picture, for the size, and what tells where its frames are.
    """
    parts = content(path)
    name = os.path.basename(path.partition("?")[0].rpartition("::")[2])
    member = tarfile.TarInfo(f"{f.tell():012d}-{name}")
    member.size = next(parts)
    f.write(member.tobuf())
    start, checksum = f.tell(), 0
    for data in parts:
        f.write(data)
        checksum = zlib.crc32(data, checksum)
    end = f.tell()
    if end != start + member.size:
        raise VideoError(f"{path}: has changed while it was read")

    def fetch(first, last):
        f.seek(first)
        return f.read(last - first)
    with Copied(path, remote.Part(path, fetch, start, member.size, None)) as video:
        n, (h, w) = len(video), video.pictures([0])[0].shape[:2]
    f.seek(end)
    f.write(bytes(-member.size % tarfile.BLOCKSIZE))
    return [n, h, w, start, end, checksum]


def write_shard(job: tuple) -> tuple[str, bool]:
    """(folder, name, paths, settings) -> name, new?

    Writes the shard and NAME.json beside it, whole or not at all; not where they are whole already.
    """
    folder, name, paths, settings = job
    shard = os.path.join(folder, name)
    with contextlib.suppress(OSError, ValueError):
        with open(shard + ".json", encoding="utf-8") as about:
            if json.load(about)["bytes"] == os.path.getsize(shard):
                return name, False
    videos, failed = {}, {}
    main = multiprocessing.parent_process()
    append = append_file if settings["form"] == "files" else append_video
    with written(shard, "w+b") as f:
        for path in paths:
            if main and not main.is_alive():  # killed: another run may be at this shard
                os._exit(1)
            start = f.tell()
            try:
                videos[path] = [name, *append(f, path, settings)]
            except VideoError as e:
                failed[path] = str(e).removeprefix(path + ": ")
                f.seek(start)
                f.truncate()
        if append is append_file:
            f.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of a tar
        size = f.tell()
    write_json(shard + ".json", dict(bytes=size, videos=videos, failed=failed))
    return name, True


@contextlib.contextmanager
def written(path: str, mode: str):
    """A file that appears at `path` when it is whole; ValueError names it where that fails."""
    part = f"{path}.{os.getpid()}.part"  # of this process: one of a killed run may still be at it
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:  # the disk is full or read-only
        with contextlib.suppress(OSError):
            os.remove(part)
        raise ValueError(f"{path}: cannot be written ({e.strerror}); the same command goes on from "
                         "what there is") from None


def write_json(path: str, content: dict):
    """Whole or not at all."""
    with written(path, "w") as f:
        json.dump(content, f)


# ---- writing: a set ----

def prepare(rows: list, folder: str, settings: dict, num_workers: int, dry_run: bool,
            say=print) -> dict | None:
    """Writes the set of (path, label) rows; goes on where a killed run stopped.

    settings: form, sampling_rate, shard_videos; of decoded forms short_side, quality too.
    shard_videos may be None: as the set was begun, else 16, of files as many as make some 256 MB.
    -> its index (None: dry run). ValueError names what does not fit: a folder with other content,
    no space, no readable video.
    """
    paths = list(dict.fromkeys(path for path, _ in rows))
    rows = [list(row) for row in rows]
    inside = [path for path in paths if in_set(path)]
    if inside:
        raise ValueError(f"{inside[0]}: is prepared already; expected a list or folder of files")
    if remote.is_address(folder):
        raise ValueError(f"{folder}: expected a folder on a disk here; copy it there when it is "
                         "whole")
    if "::" in folder:
        raise ValueError(f"{folder}: a set's name cannot hold `::`, which stands between it and "
                         "its videos")
    checksum = zlib.crc32("\n".join(paths).encode())
    settings = settings | dict(version=1, count=len(paths), checksum=checksum)
    form = settings["form"]
    check_folder(folder, settings)
    per_video = estimate(paths, settings)
    if per_video is None:
        raise ValueError("none of the videos that the size is estimated from can be read; "
                         "`data.py check` says why")
    if not settings["shard_videos"]:
        fit = max(1, round(SHARD / per_video[form]))
        settings["shard_videos"] = fit if form == "files" else 16
    free = free_space(folder)
    sizes = (f"{f} about {gb(size * len(paths))}" for f, size in per_video.items())
    kept = "as they are" if form == "files" else (
        f"1 frame in {settings['sampling_rate']}, short side at most {settings['short_side']}")
    say(f"{len(paths)} videos, {kept}: {', '.join(sizes)}; {gb(free)} are free, --form is {form}")
    if dry_run:
        return None
    left = per_video[form] * len(paths) - stored_bytes(folder, form)
    if left > free:
        raise ValueError(f"{folder}: {gb(left)} more would not fit into {gb(free)}"
                         + "; allowed are --form compact, a smaller --short_side, a larger "
                           "--sampling_rate" * (form != "files"))
    os.makedirs(folder, exist_ok=True)
    with locked(os.path.join(folder, "lock")):
        for name in os.listdir(folder):  # of killed runs
            if name.endswith(".part"):
                os.remove(os.path.join(folder, name))
        write_json(os.path.join(folder, "settings.json"), settings)
        size = settings["shard_videos"]
        jobs = [(folder, f"{i // size:06d}.{ENDINGS[form]}", paths[i:i + size], settings)
                for i in range(0, len(paths), size)]
        write_shards(jobs, num_workers, say)
        with contextlib.suppress(ValueError):
            if read_index(folder)["rows"] != rows:
                say("its rows and labels were others: they are those of this list now")
        index = settings | dict(rows=rows, videos={}, failed={})
        for _, name, _, _ in jobs:
            with open(os.path.join(folder, name + ".json"), encoding="utf-8") as f:
                about = json.load(f)
            index["videos"] |= about["videos"]
            index["failed"] |= about["failed"]
        write_json(os.path.join(folder, "index.json"), index)
    INDEXES.clear()  # this process may have read the set as it was
    MAPS.clear()
    good, bad, total = len(index["videos"]), index["failed"], stored_bytes(folder, form)
    say(f"{folder}: {good} videos, {gb(total)} ({gb(1000 * total / max(good, 1))} per 1000); "
        f"{len(bad)} not readable" + (", which will fail as their files do:" if bad else ""))
    for path, why in list(bad.items())[:10]:
        say(f"  {path}: {why}")
    if len(bad) > 10:
        say(f"  ... `python data.py check {folder}` lists all")
    return index


def check_folder(folder: str, settings: dict):
    """ValueError unless the folder is new, empty, or a set that was begun with these settings.

    Of such a set shard_videos is taken where the settings have none.
    """
    known = os.path.join(folder, "settings.json")
    if not os.path.isfile(known):
        if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
            raise ValueError(f"{folder}: expected a new or empty folder")
        return
    try:
        with open(known, encoding="utf-8") as f:
            before = dict(json.load(f))
    except (ValueError, TypeError) as e:
        raise ValueError(f"{known}: damaged ({e}); choose another folder") from None
    settings["shard_videos"] = settings["shard_videos"] or before.get("shard_videos")
    differ = [f"{key} is {before.get(key)}, not {value}" for key, value in settings.items()
              if before.get(key) != value]
    if differ:
        raise ValueError(f"{folder} holds another set ({', '.join(differ)}; another count or "
                         "checksum means other videos): choose another folder, or the list and "
                         "flags it was begun with")


def estimate(paths: list[str], settings: dict, samples: int = 12) -> dict | None:
    """{form: bytes per video} from three frames each of a few videos; None: none can be read.

    Of the form `files` from the sizes of these videos.
    """
    files = settings["form"] == "files"
    sizes = {form: [] for form in (FORMS[2:] if files else DECODED)}
    places = np.linspace(0, len(paths) - 1, min(samples, len(paths))).astype(int)
    for i in places:
        if files:
            with contextlib.suppress(VideoError):
                sizes["files"].append(next(content(paths[i])))
            continue
        try:
            with open_video(paths[i], reduce_to(settings["short_side"])) as video:
                n = len(video)
                frames = video.frames([0, n // 3, 2 * n // 3])
        except VideoError:
            continue
        kept = -(-n // settings["sampling_rate"])
        codec = jpeg_encoder(*frames.shape[1:3], settings["quality"])
        jpeg = np.mean([len(encode(codec, rgb)) + 8 for rgb in frames])
        sizes["raw"].append(kept * frames[0].size + 8 * n)
        sizes["compact"].append(kept * jpeg + 8 * n)
    if not sum(map(sum, sizes.values())):
        return None
    return {form: float(sum(s)) / len(places) for form, s in sizes.items()}


def free_space(folder: str) -> int:
    """Bytes that are free where the folder is or will be."""
    above = os.path.abspath(folder)
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    return shutil.disk_usage(above).free


def stored_bytes(folder: str, form: str) -> int:
    """Bytes of the shards that are there."""
    if not os.path.isdir(folder):
        return 0
    return sum(e.stat().st_size for e in os.scandir(folder) if e.name.endswith(f".{ENDINGS[form]}"))


@contextlib.contextmanager
def locked(path: str, wait: bool = False):
    """Holds a lock file; where another process does, waits for it, or a ValueError."""
    with open(path, "w") as lock:
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(f"{os.path.dirname(path)}: another process is preparing it") from None
        except (ImportError, OSError):  # there are no locks on this system or disk
            pass
        yield


def write_shards(jobs: list, num_workers: int, say):
    """Writes shards in parallel and says how far that is, now and then."""
    begin, shown, new = time.time(), 0.0, 0
    workers = min(num_workers, len(jobs))
    pause = 2 if sys.stdout.isatty() else 60  # seconds
    with contextlib.ExitStack() as stack:
        results = map(write_shard, jobs)
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            pool = context.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN))
            results = stack.enter_context(pool).imap_unordered(write_shard, jobs)
        for n, (_, is_new) in enumerate(results, 1):
            new, now = new + is_new, time.time()
            if n == len(jobs) or new and now - shown > pause:
                shown, left = now, (now - begin) / max(new, 1) * (len(jobs) - n)
                before = f", {n - new} of them from before" if n > new else ""
                known = new >= 2 * workers  # the first tell little
                say(f"{n}/{len(jobs)} shards{before}" + (f", {left:.0f} s left" if known else ""),
                    flush=True)


def gb(size: float) -> str:
    """Bytes, readably."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
