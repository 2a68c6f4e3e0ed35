"""Prepared sets: frames decoded, reduced and stored once (`python data.py prepare`), then read at random cheaply.

A set is a folder: index.json (settings, paths, labels, where each video lies) and shards of consecutive videos, in one
of two forms. `raw`: the pixels, read through a memory map. `compact`: a JPEG per frame. A video is named FOLDER::PATH,
PATH as in the list that was prepared, and is read like the file itself: it has as many frames, at the same times; where
only every R-th frame is kept, that stands for the next R - 1 too. A video that could not be read stays in the list and
fails when it is opened, as its file would.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import zlib
from collections import OrderedDict
from fractions import Fraction

import av
import numpy as np
import torch

from decode import MovieReader, VideoError, VideoReader, nearest, resize, short_side, to_rgb

CHUNK = 128 << 20  # bytes of reduced frames that are held at once while a video is prepared
FORMS = ("raw", "compact")


# ---- reading ----

INDEXES: dict = {}  # folder -> its index.json
MAPS: OrderedDict = OrderedDict()  # shard path -> its bytes


def is_prepared(source: str) -> bool:
    """Whether a folder is a prepared set, finished or not."""
    return any(os.path.isfile(os.path.join(source, name)) for name in ("index.json", "settings.json"))


def read_index(folder: str) -> dict:
    """-> {form, sampling_rate, rows: [[path, label]], videos: {path: entry}, failed: {path: why}} of a finished set."""
    if folder not in INDEXES:
        path = os.path.join(folder, "index.json")
        if not os.path.isfile(path):
            raise ValueError(f"{folder}: preparing it has not finished; `data.py prepare` with the same list goes on")
        try:
            with open(path, encoding="utf-8") as f:
                index = json.load(f)
            INDEXES[folder] = {k: index[k] for k in ("form", "sampling_rate", "rows", "videos", "failed")}
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path}: damaged ({e!r}); `data.py prepare` with the same list writes it again") from None
    return INDEXES[folder]


def shard_bytes(path: str) -> np.ndarray:
    """The bytes of a shard (n,) uint8, mapped into memory; the last 64 stay mapped."""
    if path not in MAPS:
        try:
            MAPS[path] = np.asarray(np.memmap(path, np.uint8, "r"))  # a plain array slices faster
        except (OSError, ValueError) as e:
            raise VideoError(f"{path} cannot be read ({getattr(e, 'strerror', None) or e}); prepare again") from None
        while len(MAPS) > 64:
            MAPS.popitem(last=False)
    return MAPS[path]


def open_video(path: str, size_of=None):
    """A reader for a video file, or for FOLDER::PATH in a prepared set; size_of as in VideoReader."""
    return PreparedVideo(path, size_of) if in_set(path) else VideoReader(path, size_of)


def open_movie(path: str, size_of=None):
    """As open_video, for access by time (`at`)."""
    return PreparedVideo(path, size_of) if in_set(path) else MovieReader(path, size_of)


def in_set(path: str) -> bool:
    """Whether a path is FOLDER::PATH of a prepared set."""
    folder, inside, _ = path.partition("::")
    return bool(inside) and (folder in INDEXES or is_prepared(folder))


def exists(path: str) -> bool:
    """Whether a list's path leads somewhere: to a file, or into a prepared set."""
    return os.path.exists(path) or in_set(path)


def source_of(path: str) -> str:
    """The file that a path stands for: PATH of FOLDER::PATH, else itself."""
    return path.split("::", 1)[1] if in_set(path) else path


def check_stride(paths: list[str], stride: int | None):
    """ValueError where clips of this stride (frames; None: any frames) need some that a prepared set has not kept."""
    for folder in dict.fromkeys(path.split("::")[0] for path in paths if "::" in path):
        kept = read_index(folder)["sampling_rate"] if is_prepared(folder) else 1
        if kept > 1 and stride is None:
            raise ValueError(f"{folder} keeps 1 frame in {kept}: --fps and --sampling sparse may want any; expected "
                             "a set prepared with `--sampling_rate 1`")
        if stride and stride % kept:
            raise ValueError(f"{folder} keeps 1 frame in {kept}: --sampling_rate {stride}: expected a multiple of "
                             f"{kept}, or a set prepared with `--sampling_rate {stride}`")


class PreparedVideo:
    """A video of a prepared set; the interface of VideoReader and MovieReader."""

    def __init__(self, path: str, size_of=None):
        self.path, self.size_of = path, size_of
        folder, name = path.split("::", 1)
        index = read_index(folder)
        self.form, self.kept_every = index["form"], index["sampling_rate"]
        if name in index["failed"]:
            raise VideoError(f"{path}: could not be read when the set was prepared: {index['failed'][name]}")
        if name not in index["videos"]:
            raise VideoError(f"{path}: not in this prepared set")
        shard, self.n, self.h, self.w, start, end, self.checksum = index["videos"][name]
        self.shard = os.path.join(folder, shard)
        try:
            self.data = shard_bytes(self.shard)[start:end]
        except VideoError as e:
            raise VideoError(f"{path}: {e}") from None
        if len(self.data) < end - start:
            raise VideoError(f"{path}: {self.shard} is cut off: remove it and prepare again")
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
        """VideoError unless the stored bytes are those that were written."""
        if zlib.crc32(self.data) != self.checksum:
            raise VideoError(f"{self.path}: the bytes in {self.shard} are not those that were written (checksum): "
                             "remove it and prepare again")

    def stored(self, places) -> list[np.ndarray]:
        """Places among the kept frames -> (H, W, 3) each, of the stored size."""
        if self.form == "raw":
            frames = self.data[:self.kept * self.h * self.w * 3].reshape(self.kept, self.h, self.w, 3)
            return [frames[k] for k in places]
        table = self.data[-8 * (self.n + self.kept + 1):-8 * self.n].tobytes()
        offsets, found = np.frombuffer(table, np.int64), {}
        codec = av.CodecContext.create("mjpeg", "r")
        codec.thread_type = "NONE"
        for k in dict.fromkeys(places):
            try:
                frame, = codec.decode(av.Packet(self.data[offsets[k]:offsets[k + 1]]))
            except (av.FFmpegError, ValueError) as e:
                raise VideoError(f"{self.path}: frame {k * self.kept_every} is damaged ({e})") from None
            found[k] = to_rgb(frame)
        return [found[k] for k in places]

    def pictures(self, indices) -> list[np.ndarray]:
        """Frame indices of the source (any order, repeats) -> (H, W, 3) uint8 each, views where they can be."""
        indices = np.asarray(indices, int)
        if indices.min() < 0 or indices.max() >= self.n:
            raise VideoError(f"{self.path}: frames {indices.min()}..{indices.max()} wanted, it has {self.n}")
        return self.sized(self.stored((indices // self.kept_every).tolist()))

    def sized(self, frames):
        size = self.size_of(self.h, self.w) if self.size_of else (self.h, self.w)
        return frames if size == (self.h, self.w) else list(resize(torch.from_numpy(np.stack(frames)), *size).numpy())

    def frames(self, indices) -> np.ndarray:
        """As VideoReader.frames: (n, H, W, 3) uint8 RGB."""
        return np.stack(self.pictures(indices))

    def at(self, seconds) -> tuple[np.ndarray, np.ndarray]:
        """As MovieReader.at, among the kept frames."""
        seconds, times = np.asarray(seconds, float), self.times
        if not -3 <= seconds.max() or seconds.min() > times[-1] - times[0] + 3:
            raise VideoError(f"{self.path}: ends at {times[-1] - times[0]:.2f} s, frames from {seconds.min():.2f} to "
                             f"{seconds.max():.2f} s were asked for")
        places, inverse = np.unique(nearest(times[::self.kept_every] - times[0], seconds.ravel()), return_inverse=True)
        return np.stack(self.sized(self.stored(places.tolist()))), inverse.reshape(seconds.shape)


# ---- writing ----

def jpeg_encoder(height: int, width: int, quality: int) -> av.CodecContext:
    """quality: the quantiser scale, 2 (best) to 31."""
    codec = av.CodecContext.create("mjpeg", "w")
    codec.height, codec.width, codec.pix_fmt, codec.time_base = height, width, "yuvj420p", Fraction(1, 25)
    codec.thread_count = 1
    codec.options = {"qmin": str(quality), "qmax": str(quality)}
    return codec


def encode(codec, rgb: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> one JPEG."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), "rgb24")
    frame = frame.reformat(format="yuvj420p", interpolation="BICUBIC", threads=1)
    packet, = codec.encode(frame)
    return bytes(packet)


def reduce_to(side: int):
    """-> (height, width) -> the size of a frame whose short side is at most `side`."""
    return lambda h, w: short_side(h, w, side) if min(h, w) > side else (h, w)


def write_video(f, path: str, settings: dict) -> list:
    """Appends a video to an open shard; -> [frames, height, width, start, end, checksum]. VideoError: cannot be read.

    Its bytes: the kept frames; compact: an int64 table of where each begins and the last ends; n float64 times.
    """
    start, checksum = f.tell(), 0

    def write(content):
        nonlocal checksum
        f.write(content)
        checksum = zlib.crc32(content, checksum)
    with VideoReader(path, reduce_to(settings["short_side"])) as video:
        kept, step = range(0, len(video), settings["sampling_rate"]), 1  # the first frame alone, which tells the size
        offsets, codec, shape = [0], None, None
        while kept:
            frames = video.frames(kept[:step])
            if shape is None:
                shape = frames.shape[1:3]
                codec = jpeg_encoder(*shape, settings["quality"]) if settings["form"] == "compact" else None
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


def write_shard(job: tuple) -> tuple[str, bool]:
    """(folder, name, paths, settings): writes the shard and NAME.json beside it, whole or not at all -> name, new?"""
    folder, name, paths, settings = job
    shard = os.path.join(folder, name)
    with contextlib.suppress(OSError, ValueError):
        with open(shard + ".json", encoding="utf-8") as about:
            if json.load(about)["bytes"] == os.path.getsize(shard):
                return name, False
    videos, failed, main = {}, {}, multiprocessing.parent_process()
    with written(shard, "wb") as f:
        for path in paths:
            if main and not main.is_alive():  # killed: another run may be at this shard
                os._exit(1)
            start = f.tell()
            try:
                videos[path] = [name, *write_video(f, path, settings)]
            except VideoError as e:
                failed[path] = str(e).removeprefix(path + ": ")
                f.seek(start)
                f.truncate()
        size = f.tell()
    write_json(shard + ".json", dict(bytes=size, videos=videos, failed=failed))
    return name, True


@contextlib.contextmanager
def written(path: str, mode: str):
    """A file that appears at `path` when it is whole; ValueError names it where the disk is full or read-only."""
    part = f"{path}.{os.getpid()}.part"  # of this process: one of a killed run may still be at it
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise ValueError(f"{path}: cannot be written ({e.strerror}); the same command goes on from "
                         "what there is") from None


def write_json(path: str, content: dict):
    """Whole or not at all."""
    with written(path, "w") as f:
        json.dump(content, f)


def estimate(paths: list[str], settings: dict, samples: int = 12) -> dict | None:
    """{form: bytes per video} from a few videos of the list, of each three frames; None if none of them can be read."""
    sizes, places = {form: [] for form in FORMS}, np.linspace(0, len(paths) - 1, min(samples, len(paths))).astype(int)
    for i in places:
        try:
            with VideoReader(paths[i], reduce_to(settings["short_side"])) as video:
                n = len(video)
                frames = video.frames([0, n // 3, 2 * n // 3])
        except VideoError:
            continue
        kept = -(-n // settings["sampling_rate"])
        codec = jpeg_encoder(*frames.shape[1:3], settings["quality"])
        sizes["raw"].append(kept * frames[0].size + 8 * n)
        sizes["compact"].append(kept * np.mean([len(encode(codec, rgb)) + 8 for rgb in frames]) + 8 * n)
    return {form: float(sum(s)) / len(places) for form, s in sizes.items()} if sizes["raw"] else None


def prepare(rows: list, folder: str, settings: dict, num_workers: int, dry_run: bool, say=print) -> dict | None:
    """Writes the set of (path, label) rows; goes on where a killed run stopped. -> its index (None: dry run)."""
    paths, rows = list(dict.fromkeys(path for path, _ in rows)), [list(row) for row in rows]
    inside = [path for path in paths if in_set(path)]
    if inside or "::" in folder:
        raise ValueError(f"{inside[0]}: is prepared already; expected a list or folder of files" if inside else
                         f"{folder}: a set's name cannot hold `::`, which stands between it and its videos")
    settings = settings | dict(version=1, count=len(paths), checksum=zlib.crc32("\n".join(paths).encode()))
    form, known, before = settings["form"], os.path.join(folder, "settings.json"), None
    shards = lambda: sum(e.stat().st_size for e in os.scandir(folder) if e.name.endswith(f".{form}"))
    if os.path.isfile(known):
        try:
            with open(known, encoding="utf-8") as f:
                before = dict(json.load(f))
        except (ValueError, TypeError) as e:
            raise ValueError(f"{known}: damaged ({e}); choose another folder") from None
        differ = [f"{k} is {before.get(k)}, not {v}" for k, v in settings.items() if before.get(k) != v]
        if differ:
            raise ValueError(f"{folder} holds another set ({', '.join(differ)}; another count or checksum means other "
                             "videos): choose another folder, or the list and flags it was begun with")
    elif os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise ValueError(f"{folder}: expected a new or empty folder")
    per_video = estimate(paths, settings)
    if per_video is None:
        raise ValueError("none of the videos that the size is estimated from can be read; `data.py check` says why")
    above = os.path.abspath(folder)
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    free, left = shutil.disk_usage(above).free, per_video[form] * len(paths) - (shards() if before else 0)
    say(f"{len(paths)} videos, 1 frame in {settings['sampling_rate']}, short side at most {settings['short_side']}: "
        + ", ".join(f"{f} about {gb(size * len(paths))}" for f, size in per_video.items())
        + f"; {gb(free)} are free, --form is {form}")
    if dry_run:
        return None
    if left > free:
        raise ValueError(f"{folder}: {gb(left)} more would not fit into {gb(free)}; allowed are --form compact, a "
                         "smaller --short_side, a larger --sampling_rate")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "w") as lock:
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is preparing it") from None
        except (ImportError, OSError):  # there are no locks on this system or disk
            pass
        for name in os.listdir(folder):  # of killed runs
            if name.endswith(".part"):
                os.remove(os.path.join(folder, name))
        write_json(known, settings)
        size = settings["shard_videos"]
        jobs = [(folder, f"{i // size:06d}.{form}", paths[i:i + size], settings) for i in range(0, len(paths), size)]
        begin, shown, new, workers = time.time(), 0.0, 0, min(num_workers, len(jobs))
        with contextlib.ExitStack() as stack:
            results = map(write_shard, jobs)
            if workers > 1:
                context = multiprocessing.get_context("spawn")
                pool = context.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN))
                results = stack.enter_context(pool).imap_unordered(write_shard, jobs)
            for n, (_, is_new) in enumerate(results, 1):
                new, now = new + is_new, time.time()
                if n == len(jobs) or new and now - shown > (2 if sys.stdout.isatty() else 60):
                    shown, left = now, (now - begin) / max(new, 1) * (len(jobs) - n)
                    say(f"{n}/{len(jobs)} shards{f', {n - new} of them from before' if n > new else ''}"
                        + (f", {left:.0f} s left" if new >= 2 * workers else ""), flush=True)  # the first tell little
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
    good, bad, total = len(index["videos"]), index["failed"], shards()
    say(f"{folder}: {good} videos, {gb(total)} ({gb(1000 * total / max(good, 1))} per 1000); {len(bad)} not readable"
        + (", which will fail as their files do:" if bad else ""))
    for path, why in list(bad.items())[:10]:
        say(f"  {path}: {why}")
    if len(bad) > 10:
        say(f"  ... `python data.py check {folder}` lists all")
    return index


def gb(size: float) -> str:
    """Bytes, readably."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
