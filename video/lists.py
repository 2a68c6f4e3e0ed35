"""Lists, folders and prepared sets -> the paths and labels of videos; labels -> class ids."""

import contextlib
import functools
import io
import itertools
import os
import re
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np

from video import prepared, remote
from video.frames import IMAGE_EXT, are_frames, get_rate

VIDEO_EXT = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".m4v", ".wmv", ".flv",
             ".3gp", ".ts", ".ogv", ".gif", ".mts", ".m2ts", ".vob", ".mxf", ".ogg", ".asf",
             ".divx", ".y4m", ".m2v", ".m1v", ".f4v")
HEADERS = ("path,label", "video,label", "path", "video")  # first rows of a list that name columns
MEDIA = "|".join(re.escape(ending) for ending in VIDEO_EXT + IMAGE_EXT)  # a regular expression
TABBED = re.compile(rf"(.*(?:{MEDIA}))\t([^\t]*)", re.IGNORECASE)  # a row as we write lists


class Paths(Sequence):
    """Strings in one block of bytes, which data workers share with the process that made them.

    A list of str does not stay shared: who reads one counts a reference on its page. Indexing
    gives a str, a slice a list.
    """

    def __init__(self, texts=()):
        block, ends = bytearray(), array("q", [0])
        for text in texts:
            block += text.encode(errors="surrogatepass") + b"\0"  # a name that is no UTF-8
            ends.append(len(block))
        self.block, self.ends = block, np.frombuffer(ends, np.int64)  # no copy

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        k = range(len(self))[i]  # IndexError where there is none
        return self.block[self.ends[k]:self.ends[k + 1] - 1].decode(errors="surrogatepass")

    def __iter__(self):
        for k in range(0, len(self), 4096):
            ends = self.ends[k:k + 4097]
            some = self.block[ends[0]:ends[-1] - 1].decode(errors="surrogatepass").split("\0")
            yield from some if len(some) == len(ends) - 1 else self[k:k + 4096]  # a text has a NUL


# ---- rows of a list ----

def bare(label: str | None) -> str | None:
    """A label without the quotes and spaces around it; None: nothing is left."""
    return re.sub(r'^[\s"]+|[\s"]+$', "", label or "") or None


def parse_row(row: str, where: str) -> tuple[str, str | None]:
    """A list row -> (path, label or None). Paths and labels may hold spaces and commas.

    The path ends at the first known ending (.mp4, ...) that a comma, a tab or a space follows, or
    with the row; a path of unknown ending ends at the last tab, else comma, else space, else with
    the row. A path in double quotes is taken as it is. ValueError: no path; it says `where`.
    """
    if (tabbed := TABBED.fullmatch(row)) and not row.startswith('"'):
        return tabbed[1].strip(), bare(tabbed[2])
    quoted = re.fullmatch(r'\s*"([^"]+)"\s*(?:[,\t ]\s*"?(.*?)"?\s*)?', row)
    known = re.fullmatch(rf"(.*?(?:{MEDIA}))(?:\s*[,\t ]\s*(.*?))?\s*", row, re.IGNORECASE)
    # quotes may also be part of a name: "q" s.mp4
    inside = quoted and known and known[1].lstrip().startswith(f'"{quoted[1]}"')
    if inside and not re.search(rf"(?:{MEDIA})$", quoted[1], re.IGNORECASE):
        quoted = None
    match = quoted or known
    for separator in "\t, ":
        match = match or re.fullmatch(rf"(.+){separator}(.*)", row)
    match = match or re.fullmatch(r' *([^\s,"][^\t, ]*)()', row)
    if not match:
        raise ValueError(f"{where}: {row!r}: expected `path`, or `path label` with a tab, a comma "
                         "or a space between; an odd path in double quotes")
    return match[1] if quoted else match[1].strip(), bare(match[2])


def parse_line(line: str, number: int, source: str) -> tuple[str, str | None] | None:
    """A list's line, the first has number 1 -> (path, label); None: empty, a comment, a header."""
    header = number == 1 and line.lower().replace("\t", ",") in HEADERS
    comment = line.startswith("#") and not re.search(MEDIA, line, re.IGNORECASE)
    if not line.strip() or header or comment:
        return None
    return parse_row(line, f"{source} row {number}")


def list_text(rows: list, out: str) -> str:
    """(path, label or None) rows -> the text of a list `out` that reads back as they are.

    Odd paths are put in double quotes. ValueError names one that no list can hold.
    """
    lines = []
    for path, label in rows:
        for start in (path, f'"{path}"'):
            line = f"{start}\t{label}" if label else start
            with contextlib.suppress(ValueError):  # of what is no row, or no UTF-8
                if parse_line(line, len(lines) + 1, out) == (path, bare(label)):
                    if line.encode().splitlines() == [line.encode()]:  # LF and CR end a line
                        break
        else:
            raise ValueError(f"{out}: a list cannot hold {path!r} with the label {label!r}; "
                             "nothing is written: rename it, or give the folder in the list's "
                             "place")
        lines.append(line)
    return "".join(line + "\n" for line in lines)


def check_out(out: str):
    """ValueError where a list would overwrite a video, or lie at an address."""
    if remote.is_remote(out):
        raise ValueError(f"{out}: expected the name of a list to write on a disk here")
    if os.path.exists(out) and is_media(out):
        raise ValueError(f"{out}: a video or picture; expected the name of a list to write")


def write_list(out: str, rows: list):
    """Writes a list file, whole or not at all; see list_text."""
    check_out(out)
    text = list_text(rows, out)
    with open(out + ".part", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(out + ".part", out)


# ---- sources ----

def read_videos(source: str, data_root: str = "",
                folders: bool = True) -> tuple[list[str], list[str | None]]:
    """A list, a folder (of class folders or flat), a prepared set or one video -> paths, labels.

    Labels are as written, None where there is none. The videos of a prepared set are named
    FOLDER::PATH. Relative paths of a list start at data_root; a row may name a frame folder. Where
    a file stands, what is remote may: see video/remote.py.
    folders: as of read_folder. ValueError: nothing to read there.
    """
    rows = [*read_rows(source, data_root, folders)]
    return [path for path, _ in rows], [label for _, label in rows]


def read_rows(source: str, data_root: str, folders: bool):
    """-> what gives the (path, label) rows of read_videos."""
    name = os.path.basename(source.partition("?")[0] if remote.is_address(source) else source)
    far = not is_media(name) and prepared.is_far(source.rstrip("/"))
    if far or os.path.isdir(source) and prepared.is_prepared(source):
        source = source.rstrip("/") if far else os.path.normpath(source)
        return ((f"{source}::{path}", label)
                for path, label in prepared.read_index(source)["rows"])
    if os.path.isdir(source):
        return read_folder(source, folders)
    if prepared.in_set(source):
        return [(source, None)]
    if not os.path.isfile(source) and not remote.exists(source):
        raise ValueError(f"{source}: no such file or folder; expected a list file, a folder of "
                         "videos, a video, or the word toy")
    if is_media(name) or remote.split(source)[1]:
        return [(source, None)]
    if name.lower().endswith(".tar"):
        raise ValueError(f"{source}: a tar; expected TAR::NAME, or a list of such rows")
    if not name:
        raise ValueError(f"{source}: a folder is searched on a disk only; expected a list, a video "
                         "or a set of the form files")
    return read_list(source, data_root)


def is_media(name: str) -> bool:
    """Whether a file's name has a known ending and is not hidden."""
    return name.lower().endswith(VIDEO_EXT + IMAGE_EXT) and not name.startswith(".")


def read_folder(source: str, folders: bool = True) -> list[tuple]:
    """The videos of a folder at any depth -> (path, label) rows.

    The label is the first folder below the source, None where there is none. Names that begin with
    a dot are left out. folders: one that holds numbered pictures, and no other picture, video or
    folder, is a video itself; False (clips of one frame are wanted): each picture is one.
    """
    rows, seen = [], set()
    for folder, subfolders, files in os.walk(source, followlinks=True):
        seen.add(os.path.realpath(folder))  # links may lead in a circle
        subfolders[:] = sorted(
            name for name in subfolders
            if not name.startswith((".", "@eaDir"))  # a NAS keeps its thumbnails in @eaDir
            and os.path.realpath(os.path.join(folder, name)) not in seen)
        inside = os.path.relpath(folder, source).split(os.sep)
        label = None if inside == ["."] else inside[0]
        media = sorted(filter(is_media, files))
        if folders and not subfolders and are_frames(media):
            rows.append((folder.rstrip(os.sep), label if inside[1:] else None))
        else:
            rows += [(os.path.join(folder, name), label) for name in media]
    if not rows:
        raise ValueError(f"{source}: no videos in this folder; known endings: "
                         f"{' '.join(VIDEO_EXT + IMAGE_EXT)}")
    return rows


def read_list(source: str, data_root: str):
    """Yields a list file's (path, label) rows; a header, empty lines, # comments are skipped."""
    count, first, there, numbers = 0, None, False, True
    try:
        with io.TextIOWrapper(remote.open_binary(source), "utf-8-sig") as f:
            for i, line in enumerate(f, 1):
                if row := parse_line(line.removesuffix("\n"), i, source):
                    path, label = row
                    joined = os.path.join(data_root, path.rstrip("/"))
                    away = remote.is_address(path) and not os.path.exists(joined)
                    if not prepared.in_set(path):
                        path = path if away else joined
                        if remote.is_address(path):
                            remote.know(path[:path.index("://") + 3])
                    count, first = count + 1, first or path
                    numbers = numbers and re.fullmatch(r"\d+[\s,]+\d+", label or "")
                    there = there or prepared.exists(path)
                    yield path, label
    except OSError as e:
        raise ValueError(f"{source}: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"{source}: not a text file ({e}); expected a list with a row "
                         "`path label` per video") from None
    if not count:
        raise ValueError(f"{source}: an empty list")
    if numbers:
        raise ValueError(f"{source}: its rows hold two numbers behind the path, as those of other "
                         "projects do (path, frames, label); expected `path label`")
    if not there and first.startswith("<"):
        raise ValueError(f"{source}: a web page; expected a list, a video or a set of the form "
                         "files; a folder is searched on a disk only")
    if not there:
        raise ValueError(f"{source}: none of its {count} files exists, the first is {first!r}; "
                         "relative paths start at --data_root, or else at the current folder"
                         + "; a path of unknown ending that holds spaces or commas goes in double "
                           "quotes" * (not is_media(first)))


def read_all(sources: list, data_root: str, toy: str, outside: str | None = None,
             folders: bool = True) -> tuple[Paths, list[str | None]]:
    """The videos of several sources, one after the other -> paths, labels; see read_videos.

    The word "toy" means the folder or list `toy`. outside: a folder whose videos are left out,
    such as a run's own out_dir.
    """
    below, labels = outside is not None and os.path.abspath(outside) + os.sep, []
    inside = functools.cache(lambda folder: (os.path.abspath(folder) + os.sep).startswith(below))

    def kept():
        for source in sources:
            source = toy if source == "toy" else source
            for path, label in read_rows(source, data_root, folders):
                if not (below and inside(os.path.dirname(path))) or remote.is_address(path):
                    labels.append(label and sys.intern(label))  # one str for each
                    yield path
    paths = Paths(kept())
    if not labels:
        raise ValueError(f"no videos in {' '.join(sources)} outside --out_dir {outside}")
    return paths, labels


def files_of(folder: str) -> set[str]:
    """The names in a folder that are no links, by one listing, cheaper than to ask for each."""
    with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
        return {entry.name for entry in entries if not entry.is_symlink()}
    return set()


def missing(paths: Sequence[str]) -> list[str]:
    """The paths that lead nowhere, in their order.

    A folder with many of them is listed once; links, and what a listing lacks (it may spell a name
    otherwise), are asked for. What is remote is decided by its folder or its tar: remote.exists.
    """
    ends = lambda path: max(path.rfind(os.sep), path.rfind("::") + 1) + 1  # of folder or archive
    many = Counter(path[:ends(path)] for path in paths)
    names = {folder: files_of(folder) for folder, n in many.items() if n > 8}
    away = functools.cache(lambda folder: not prepared.in_set(folder + "x")
                           and remote.exists(folder + "x"))
    gone = []
    for path in paths:
        cut = ends(path)
        if not (path[cut:] in names.get(path[:cut], ()) or away(path[:cut])
                or prepared.exists(path)):
            gone.append(path)
    return gone


def real_paths(paths):
    """Yields os.path.realpath of each; a folder is looked up and listed once, links each."""
    folders = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder), files_of(folder), os.path.isdir(folder)
        real, names, exists = folders[folder]
        plain = name.partition("::")[0] in names or not exists  # a tar's members
        yield os.path.join(real, name) if plain else os.path.realpath(path)


def say_missing(count: int, some: list[str], total: int) -> str:
    """What is said of so many missing files out of all: how many, and the first ten."""
    names = some[:10] + ["..."] * (count > 10)
    return "\n  ".join([f"{count} of {total} files do not exist:", *names])


def say_folders(paths: list[str]) -> list[str]:
    """[] or a sentence on how many of the videos are frame folders, and what that means."""
    found = [path for path in paths if not is_media(os.path.basename(path)) and os.path.isdir(path)]
    return [f"{len(found)} of {len(paths)} videos are folders of numbered pictures, "
            f"{get_rate():g} a second (--frame_rate), the first is {found[0]}"] if found else []


def refuse_pictures(paths: list[str], num_frames: int):
    """ValueError where clips of more than one frame would be read from pictures."""
    if num_frames == 1:
        return
    pictures = [path for path in paths if path.lower().endswith(IMAGE_EXT)]
    if pictures:
        raise ValueError(
            f"{len(pictures)} of {len(paths)} files are pictures, the first is {pictures[0]}: a "
            f"clip of {num_frames} frames would show one still {num_frames} times; expected "
            "videos, or --num_frames 1 --tubelet_size 1. Frames of one video are a folder of their "
            "own: numbered pictures, with no other picture, video or folder beside them")


def fingerprint(paths: Sequence[str], labels: list | None = None) -> str:
    """The number of videos and a checksum of their names and labels: is it the same data set?

    A name is the last two parts of a path, so that the data may move.
    """
    names, crc = ("/".join(path.replace(os.sep, "/").rsplit("/", 2)[-2:]) for path in paths), None
    if labels is not None:
        names = (f"{name} {label}" for name, label in zip(names, labels))
    while some := list(itertools.islice(names, 4096)):
        begin = "" if crc is None else "\n"
        crc = zlib.crc32((begin + "\n".join(some)).encode(), crc or 0)
    return f"{len(paths)} ({crc or 0:08x})"


# ---- classes ----

def class_names(labels: list[str]) -> list[str]:
    """The distinct labels in order: by number where all are integers, else by name.

    A label's place is its class id.
    """
    if all(re.fullmatch(r"\d+", label) for label in labels):
        return sorted(set(labels), key=int)
    return sorted(set(labels))


def class_ids(labels: list, classes: list[str], paths: list[str], known: str) -> list[int]:
    """Labels as written -> class ids.

    ValueError names the videos without a label and the labels not in `classes`, which are those of
    `known`.
    """
    without = [path for path, label in zip(paths, labels) if label is None]
    if without:
        raise ValueError(f"{len(without)} of {len(paths)} videos have no label, the first is "
                         f"{without[0]}; expected rows `path label` or one folder per class"
                         + "; it is a folder of numbered pictures, which is one video (for each "
                           "picture by itself: --num_frames 1)" * os.path.isdir(without[0]))
    ids = {name: i for i, name in enumerate(classes)}
    new = {}
    for path, label in zip(paths, labels):
        if label not in ids:
            new.setdefault(label, []).append(path)
    if new:
        names = "; ".join(f"{label!r} ({len(some)} videos, the first {some[0]})"
                          for label, some in list(new.items())[:3])
        raise ValueError(f"{len(new)} labels are not among the {len(classes)} classes of {known}: "
                         f"{names}; known are {', '.join(classes[:8])}"
                         f"{', ...' if len(classes) > 8 else ''}")
    return [ids[label] for label in labels]


def first_of_each(paths: list, labels: list[int], n: int) -> tuple[list, list[int]]:
    """The first n videos of each class, in the order of the list."""
    seen, kept = Counter(), []
    for path, label in zip(paths, labels):
        seen[label] += 1
        if seen[label] <= n:
            kept.append((path, label))
    return [path for path, _ in kept], [label for _, label in kept]


def sided(names) -> list[str]:
    """The names that speak of left or right, which mirroring would make wrong."""
    side = r"(?<![a-z])(left|right)(?![a-z])"
    return [name for name in names if re.search(side, name.lower().replace("_", " "))]


def describe(classes: list[str], paths: list, labels: list[int], val_paths: list,
             val_labels: list[int]):
    """Yields what there is to say of labelled videos: how many, and what would mislead."""
    videos = np.bincount(labels, minlength=len(classes))
    few = ", ".join(classes[:8]) + ", ..." * (len(classes) > 8)
    yield (f"{len(paths)} videos of {len(classes)} classes ({few}), {videos.min()} to "
           f"{videos.max()} of a class")
    if val_paths:
        often = np.bincount(val_labels)
        yield (f"{len(val_paths)} videos for validation; always saying "
               f"{classes[often.argmax()]!r} would get {100 * often.max() / len(val_paths):.1f} %")
    else:
        yield "no --val_data: nothing is validated, and no best.pt written"
    if videos.max() >= 3 * videos.min():
        names = [f"{classes[i]} {videos[i]}" for i in videos.argsort(kind="stable")]
        names[3:-3] = ["..."] * (len(names) > 6)
        yield (f"the classes are imbalanced: {', '.join(names)}; read the per-class accuracy too")
    # of files their hashes: two of 5 million are the same by chance once in a million such lists
    hashes = lambda some: np.unique(np.fromiter(map(hash, real_paths(some)), np.int64))
    twice = len(paths) - len(hashes(paths))
    if twice:
        yield (f"{twice} training videos are listed more than once; with different labels they "
               "contradict each other")
    files, val_files = (hashes(map(prepared.source_of, some)) for some in (paths, val_paths))
    if both := len(np.intersect1d(files, val_files, assume_unique=True)):
        yield (f"{both} of the {len(val_paths)} validation videos are also trained on: their "
               "accuracy says little")
