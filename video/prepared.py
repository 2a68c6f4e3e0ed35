"""Prepared sets: frames decoded, reduced and stored once (`python data.py prepare`), read cheaply.

A set is a folder: index.json (settings, paths, labels, where each video lies) and shards of
consecutive videos, in one of two forms. `raw`: the pixels, read through a memory map. `compact`: a
JPEG per frame. A video is named FOLDER::PATH, PATH as in the list that was prepared, and is read
like the file itself: it has as many frames, at the same times; where only every R-th frame is kept,
that stands for the next R - 1 too. A video that could not be read stays in the list and fails when
it is opened, as its file would.
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

from video import remote
from video.decode import (MovieReader, VideoError, VideoReader, nearest, reason, resize,
                          short_side, to_rgb)
from video.frames import FrameFolder

CHUNK = 128 << 20  # bytes of reduced frames that are held at once while a video is prepared
FORMS = ("raw", "compact")


# ---- reading ----

INDEXES: dict = {}  # folder -> its index.json
MAPS: OrderedDict = OrderedDict()  # shard path -> its bytes


def is_prepared(source: str) -> bool:
    """Whether a folder is a prepared set, finished or not."""
    names = "index.json", "settings.json"
    return any(os.path.isfile(os.path.join(source, name)) for name in names)


def read_index(folder: str) -> dict:
    """What a finished set holds; ValueError where it is not finished, or damaged.

    -> {form, sampling_rate, rows: [[path, label]], videos: {path: entry}, failed: {path: why}}
    """
    if folder not in INDEXES:
        path = os.path.join(folder, "index.json")
        if not os.path.isfile(path):
            raise ValueError(f"{folder}: preparing it has not finished; `data.py prepare` with the "
                             "same list goes on")
        keys = "form", "sampling_rate", "rows", "videos", "failed"
        try:
            with open(path, encoding="utf-8") as f:
                index = json.load(f)
            INDEXES[folder] = {key: index[key] for key in keys}
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path}: damaged ({e!r}); `data.py prepare` with the same list "
                             "writes it again") from None
    return INDEXES[folder]


def shard_bytes(path: str) -> np.ndarray:
    """The bytes of a shard (n,) uint8, mapped into memory; the last 64 stay mapped."""
    if path not in MAPS:
        try:
            MAPS[path] = np.asarray(np.memmap(path, np.uint8, "r"))  # a plain array slices faster
        except (OSError, ValueError) as e:
            raise VideoError(f"{path} cannot be read ({reason(e)}); prepare again") from None
        while len(MAPS) > 64:
            MAPS.popitem(last=False)
    return MAPS[path]


def open_video(path: str, size_of=None, antialias=True):
    """A reader for a video file, a frame folder or FOLDER::PATH of a prepared set.

    The rest as in VideoReader.
    """
    reader = FrameFolder if os.path.isdir(path) else VideoReader
    return (PreparedVideo if in_set(path) else reader)(path, size_of, antialias)


def open_movie(path: str, size_of=None):
    """As open_video, for access by time (`at`)."""
    reader = FrameFolder if os.path.isdir(path) else MovieReader
    return (PreparedVideo if in_set(path) else reader)(path, size_of)


def in_set(path: str) -> bool:
    """Whether a path is FOLDER::PATH of a prepared set."""
    folder, inside, _ = path.partition("::")
    return bool(inside) and (folder in INDEXES or os.path.isdir(folder) and is_prepared(folder))


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
        with contextlib.suppress(VideoError), PreparedVideo(path) as video:
            gap = video.kept_every * (video.times[-1] - video.times[0]) / max(len(video) - 1, 1)
            if video.kept_every > 1 and gap > 1.05 * wanted:  # 24 frames/s are taken for 25
                raise ValueError(f"{path}: the set keeps a frame every {gap:.3f} s, clips have one "
                                 f"every {wanted:.3f} s: expected a set prepared with a "
                                 f"--sampling_rate below {video.kept_every}")


class PreparedVideo:
    """A video of a prepared set; the interface of VideoReader and MovieReader."""

    def __init__(self, path: str, size_of=None, antialias=True):
        self.path, self.size_of, self.antialias = path, size_of, antialias
        folder, name = path.split("::", 1)
        index = read_index(folder)
        self.form, self.kept_every = index["form"], index["sampling_rate"]
        if name in index["failed"]:
            raise VideoError(f"{path}: could not be read when the set was prepared: "
                             f"{index['failed'][name]}")
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
            raise VideoError(f"{self.path}: the bytes in {self.shard} are not those that were "
                             "written (checksum): remove it and prepare again")

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
    with written(shard, "wb") as f:
        for path in paths:
            if main and not main.is_alive():  # killed: another run may be at this shard
                os._exit(1)
            start = f.tell()
            try:
                videos[path] = [name, *append_video(f, path, settings)]
            except VideoError as e:
                failed[path] = str(e).removeprefix(path + ": ")
                f.seek(start)
                f.truncate()
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

    settings: form, sampling_rate, short_side, quality, shard_videos. -> its index (None: dry run).
    ValueError names what does not fit: a folder with other content, no space, no readable video.
    """
    paths = list(dict.fromkeys(path for path, _ in rows))
    rows = [list(row) for row in rows]
    inside = [path for path in paths if in_set(path)]
    if inside:
        raise ValueError(f"{inside[0]}: is prepared already; expected a list or folder of files")
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
    free = free_space(folder)
    sizes = (f"{f} about {gb(size * len(paths))}" for f, size in per_video.items())
    say(f"{len(paths)} videos, 1 frame in {settings['sampling_rate']}, short side at most "
        f"{settings['short_side']}: {', '.join(sizes)}; {gb(free)} are free, --form is {form}")
    if dry_run:
        return None
    left = per_video[form] * len(paths) - stored_bytes(folder, form)
    if left > free:
        raise ValueError(f"{folder}: {gb(left)} more would not fit into {gb(free)}; allowed are "
                         "--form compact, a smaller --short_side, a larger --sampling_rate")
    os.makedirs(folder, exist_ok=True)
    with locked(folder):
        for name in os.listdir(folder):  # of killed runs
            if name.endswith(".part"):
                os.remove(os.path.join(folder, name))
        write_json(os.path.join(folder, "settings.json"), settings)
        size = settings["shard_videos"]
        jobs = [(folder, f"{i // size:06d}.{form}", paths[i:i + size], settings)
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
    """ValueError unless the folder is new, empty, or a set that was begun with these settings."""
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
    differ = [f"{key} is {before.get(key)}, not {value}" for key, value in settings.items()
              if before.get(key) != value]
    if differ:
        raise ValueError(f"{folder} holds another set ({', '.join(differ)}; another count or "
                         "checksum means other videos): choose another folder, or the list and "
                         "flags it was begun with")


def estimate(paths: list[str], settings: dict, samples: int = 12) -> dict | None:
    """{form: bytes per video} from three frames each of a few videos; None: none can be read."""
    sizes = {form: [] for form in FORMS}
    places = np.linspace(0, len(paths) - 1, min(samples, len(paths))).astype(int)
    for i in places:
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
    if not sizes["raw"]:
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
    return sum(e.stat().st_size for e in os.scandir(folder) if e.name.endswith(f".{form}"))


@contextlib.contextmanager
def locked(folder: str):
    """Holds the folder's lock; ValueError where another process does."""
    with open(os.path.join(folder, "lock"), "w") as lock:
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is preparing it") from None
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
