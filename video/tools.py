"""Data sets at the command line, before any training.

    python data.py index ucf101 trainlist01.txt UCF-101/ ucf_train.tsv   # public layout -> list
    python data.py split my_videos/ train.tsv val.tsv                    # own videos -> two lists
    python data.py check ucf_train.tsv                                   # a summary; what is broken
    python data.py prepare ucf_train.tsv ucf_train/                      # decode once, for --data
    python data.py toy                                                   # write the toy videos
"""

import argparse
import contextlib
import csv
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter

import numpy as np

from video import frames, lists, prepared, remote
from video.decode import VideoError
from video.toy import make_toy, make_toy_shapes

SHOWN = 20  # so many classes are listed at most
ONE_FRAME = "1: for clips of one frame, a folder of numbered pictures is no video, each is"
FRAME_RATE = "frames per second of folders of numbered pictures"

# ---- what lists are made of ----

def write_rows(out: str, rows: list):
    """write_list with whole paths, so that the list holds in any folder; makes out's folder."""
    def whole(path):
        folder, inside, name = path.partition("::") if prepared.in_set(path) else (path, "", "")
        return path if remote.is_address(folder) else os.path.abspath(folder) + inside + name
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    lists.write_list(out, [(whole(path), label) for path, label in rows])


def read(args, labelled: bool = False) -> tuple[list[str], list[str | None]]:
    """The source's paths and labels; says what are folders, and which files do not exist.

    labelled: labels are needed, so folders of pictures right in the source are classes of them.
    """
    paths, labels = lists.read_videos(args.source, args.data_root, args.num_frames > 1)
    if labelled and not any(labels):
        paths, labels = lists.read_videos(args.source, args.data_root, False)
    for note in lists.say_folders(paths):
        print(note)
    gone = lists.missing(paths)
    if gone:
        print(lists.say_missing(len(gone), gone, len(paths)))
    return paths, labels


def stored(path: str) -> np.ndarray | None:
    """The bytes of a video of a prepared set; None where it has none there."""
    with contextlib.suppress(VideoError):
        return prepared.find(path).data


def size(path: str):
    """Of two videos it differs if their bytes do not have the same number; None: no bytes."""
    if prepared.in_set(path):
        data = stored(path)
        return None if data is None else len(data)
    with contextlib.suppress(OSError, VideoError):
        return sum(map(remote.size, frames.files_of(path))) or None


def checksum(path: str, most: int | None = None):
    """A hash of a video's bytes, or of so many of them from its middle on; None: unreadable."""
    if prepared.in_set(path):
        data = stored(path)
        start = len(data) // 2 if most else 0
        return hashlib.sha1(data[start:start + most if most else None]).digest()
    with contextlib.suppress(OSError, VideoError):
        files, found = frames.files_of(path), hashlib.sha1()
        for file in files[len(files) // 2:][:1] if most else files:
            with remote.open_binary(file) as f:
                if most:
                    f.seek(remote.size(file) // 2)
                    found.update(f.read(most))
                else:
                    hashlib.file_digest(f, lambda: found)
        return found.digest()


def copies(paths: list[str]) -> list[list[str]]:
    """The videos whose bytes are the same, in groups of two or more.

    Only those of one size are read, all of their bytes only where 64 kB of them are the same.
    """
    groups = [list(dict.fromkeys(paths))]
    for key in (size, lambda path: checksum(path, 1 << 16), checksum):
        finer = {}
        for i, group in enumerate(groups):
            for path in group:
                finer.setdefault((i, key(path)), []).append(path)
        groups = [group for (_, value), group in finer.items()
                  if len(group) > 1 and value is not None]
    return groups


def say_copies(groups: list[list[str]]) -> str:
    """How many of copies()'s videos could go, and the first of them."""
    some = "; ".join(" = ".join(group[:3] + ["..."] * (len(group) > 3)) for group in groups[:3])
    return (f"byte-identical copies of other files: {sum(map(len, groups)) - len(groups)}"
            + f" ({some}{'; ...' if len(groups) > 3 else ''})" * bool(groups))


# ---- index: public layouts -> list files ----
# Each layout yields (where the video may be, without or with its ending; label) per entry. Where
# there is no such file, a folder of that name is taken, which holds its frames.

def index_kinetics(annotation: str, videos: str, part: str, split: int):
    """Kinetics csv (label,youtube_id,time_start,time_end,split).

    Files are <id>_<start>_<end>.mp4, in class folders or flat.
    """
    with open(annotation, newline="", encoding="utf-8-sig") as f:
        for i, row in enumerate(csv.DictReader(f), 2):
            try:
                start, end = (int(float(row[key])) for key in ("time_start", "time_end"))
                name = f"{row['youtube_id']}_{start:06d}_{end:06d}"
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{annotation} row {i}: expected columns "
                                 "label,youtube_id,time_start,time_end") from None
            label = row.get("label") or ""
            folders = label, label.replace(" ", "_"), ""
            yield [os.path.join(videos, folder, name) for folder in folders], label or None


def index_ssv2(annotation: str, videos: str, part: str, split: int):
    """Something-Something v2 json ([{id, template}]): <id>.webm.

    The label is the template without its brackets.
    """
    try:
        with open(annotation, encoding="utf-8") as f:
            rows = json.load(f)
    except ValueError as e:
        raise ValueError(f"{annotation}: not a json file ({e})") from None
    for i, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        if not isinstance(row, dict) or "id" not in row:
            raise ValueError(f"{annotation} entry {i}: expected an object with id and template")
        label = (row.get("template") or "").replace("[", "").replace("]", "")
        yield [os.path.join(videos, str(row["id"]))], label or None


def index_ucf101(annotation: str, videos: str, part: str, split: int):
    """UCF101 trainlist0N.txt or testlist0N.txt: rows Class/name.avi [number]."""
    for i, line in enumerate(open(annotation, encoding="utf-8"), 1):
        if line.strip():
            path = line.split(".avi")[0].strip() + ".avi"
            if "/" not in path:
                raise ValueError(f"{annotation} row {i}: {line.strip()!r}: expected "
                                 "Class/name.avi")
            names = path, path.removesuffix(".avi")
            yield [os.path.join(videos, name) for name in names], path.split("/")[0]


def index_hmdb51(annotation: str, videos: str, part: str, split: int):
    """HMDB51 folder of <class>_test_split<N>.txt: rows name.avi 1|2|0 (train, test, unused)."""
    suffix, want = f"_test_split{split}.txt", {"train": "1", "test": "2"}[part]
    names = sorted(name for name in os.listdir(annotation) if name.endswith(suffix))
    if not names:
        raise ValueError(f"{annotation}: no file ends in {suffix}")
    for name in names:
        label = name.removesuffix(suffix)
        for line in open(os.path.join(annotation, name), encoding="utf-8"):
            if line.strip() and line.split()[-1] == want:
                path = os.path.join(videos, label, line.rsplit(maxsplit=1)[0].strip())
                yield [path, path.removesuffix(".avi")], label


def index_moments(annotation: str, videos: str, part: str, split: int):
    """Moments in Time's trainingSet.csv or validationSet.csv: rows class/name.mp4,class,votes."""
    with open(annotation, newline="", encoding="utf-8-sig") as f:
        for i, row in enumerate(csv.reader(f), 1):
            if not row:
                continue
            if "/" not in row[0]:
                raise ValueError(f"{annotation} row {i}: expected class/name.mp4 in the first "
                                 f"column, not {row[0]!r}")
            names = row[0], row[0].removesuffix(".mp4")
            yield [os.path.join(videos, name) for name in names], row[0].split("/")[0]


LAYOUTS = {"kinetics": index_kinetics, "moments": index_moments, "ssv2": index_ssv2,
           "ucf101": index_ucf101, "hmdb51": index_hmdb51}


def index_main(args):
    """Writes a list file of the videos that exist and says which do not."""
    if not os.path.exists(args.annotation):
        raise ValueError(f"{args.annotation}: no such file or folder")
    if os.path.realpath(args.out) == os.path.realpath(args.annotation):
        raise ValueError(f"{args.out}: is the annotation itself")
    found, missing = [], []
    entries = LAYOUTS[args.layout](args.annotation, args.videos, args.part, args.split)
    endings = "", ".mp4", ".webm", ".mkv", ".avi"
    for stems, label in entries:
        paths = [stem + ending for stem in stems for ending in endings]
        path = next(filter(os.path.isfile, paths), None) or next(filter(os.path.isdir, stems), None)
        if path:
            found.append((path, label))
        else:
            missing.append(stems[0])
    if not found:
        first = missing[0] if missing else "(the annotation is empty)"
        raise ValueError(f"none of the {len(missing)} videos of {args.annotation} is in "
                         f"{args.videos}; the first would be {first}")
    write_rows(args.out, found)
    labels = {label for _, label in found if label}
    print(f"{args.out}: {len(found)} videos, {len(labels)} classes; "
          f"{len(missing)} of the annotation's are not in {args.videos}")
    for path in missing[:5]:
        print(f"  missing: {path}")
    if len(missing) > 5:
        print("  ...")


# ---- split: one's own videos -> a list to train on, a list to validate on ----

def split_main(args):
    """Deals labelled videos into folds, class by class; --val_group: what matches is one.

    Where a pattern says what belongs together, whole groups; copies of a file always.
    """
    paths, labels = read(args, labelled=True)
    classes = lists.class_names([label for label in labels if label is not None])
    lists.class_ids(labels, classes, paths, args.source)
    if args.fold >= args.folds:
        raise ValueError(f"--folds {args.folds} --fold {args.fold}: expected fold < folds")
    if len({os.path.realpath(path) for path in (args.source, args.train, args.val)}) < 3:
        raise ValueError(f"{args.source}, {args.train}, {args.val}: expected three different files")
    same = copies(paths)
    if same:
        print(f"{say_copies(same)}; they stay on one side")
    groups = merged(grouped(paths, labels, args.group), same)
    if args.folds > max(5, len(paths)):
        raise ValueError(f"--folds {args.folds}: expected at most {len(paths)}, one for each video")
    if args.val_group and (args.folds, args.fold) != (5, 0):
        raise ValueError("--val_group says what is for validation: leave out --folds and --fold")
    if args.val_group:
        chosen = matches("--val_group", args.val_group, paths)
        val = {name for name, rows in groups.items() if any(path in chosen for path, _ in rows)}
        count = sum(len(groups[name]) for name in val)
        if not 0 < count < len(paths):
            raise ValueError(f"--val_group {args.val_group!r} takes {count} of the {len(paths)} "
                             f"videos, the first is {paths[0]}; expected some, but not all")
    else:
        val = fold_of(groups, args)
    kind = "groups" if args.group else "files"
    lists.check_out(args.train)
    lists.check_out(args.val)
    lists.list_text(zip(paths, labels), args.train)  # both lists can be written, or none is
    sides = []
    for out, is_val in ((args.train, False), (args.val, True)):
        part = [name for name in groups if (name in val) == is_val]
        rows = [row for name in part for row in groups[name]]
        sides.append(Counter(label for _, label in rows))
        write_rows(out, rows)
        print(f"{out}: {len(rows)} videos, {len(sides[-1])} of {len(classes)} classes, "
              f"{len(part)} {kind}")
        absent = [name for name in classes if name not in sides[-1]]
        if absent:
            print(f"  classes without a video in it: {', '.join(absent[:SHOWN])}"
                  + f", and {len(absent) - SHOWN} more" * (len(absent) > SHOWN))
    wide = max(map(len, ["class", *classes[:SHOWN]]))
    print(f"{'class':{wide}}  train    val")
    for name in classes[:SHOWN]:
        print(f"{name:{wide}} {sides[0][name]:6d} {sides[1][name]:6d}")
    if len(classes) > SHOWN:
        print(f"and {len(classes) - SHOWN} more classes")


def fold_of(groups: dict, args) -> set:
    """The names of the groups that are fold args.fold of args.folds; puts `groups` in order.

    Of each class the fold has every folds-th group, which is about as many videos from all classes
    where groups are alike. Where that makes a fold a quarter larger or smaller than it should be,
    each group, the largest first, goes where its classes are rarest. ValueError: what is left out
    would be nothing, or more than one video and a third (of 2 or 3 folds 1.2 times their share).
    """
    names = sorted(groups)
    np.random.default_rng(args.seed).shuffle(names)
    names.sort(key=lambda name: groups[name][0][1])  # stable: class by class, shuffled within
    ordered = {name: groups[name] for name in names}
    groups.clear()
    groups.update(ordered)
    counts = {name: Counter(label for _, label in groups[name]) for name in names}
    homes = Counter(label for some in counts.values() for label in some)
    # the only one of a class is for training
    free = [name for name in names if all(homes[label] > 1 for label in counts[name])]
    total, k = sum(len(rows) for rows in groups.values()), args.folds
    by_class = {}
    for name in free:
        by_class.setdefault(groups[name][0][1], []).append(name)
    folds = [[name for some in by_class.values() for name in some[i::k]] for i in range(k)]
    videos = lambda fold: sum(len(groups[name]) for name in fold)
    fair = sum(map(videos, folds)) / k
    if any(abs(videos(fold) - fair) > fair / 4 for fold in folds):
        folds, there = [[] for _ in range(k)], [Counter() for _ in range(k)]
        sums = sum(counts.values(), Counter())
        for name in sorted(free, key=lambda name: -len(groups[name])):
            i = min(range(k), key=lambda i: (sum(n * there[i][label] / sums[label]
                                                 for label, n in counts[name].items()),
                                             there[i].total()))
            folds[i].append(name)
            there[i] += counts[name]
    most = max(1, int(max(1 / 3, 1.2 / k) * total))
    folds.sort(key=lambda fold: not 0 < videos(fold) <= most)  # stable: those that serve first
    fold = folds[args.fold]
    if not 0 < videos(fold) <= most:
        sizes = ", ".join(str(videos(fold)) for fold in folds)
        raise ValueError(f"fold {args.fold} of {k} would have {videos(fold)} of the {total} "
                         f"videos, expected 1 to {most}; the folds of {len(groups)} "
                         f"{'groups' if args.group else 'files'} have {sizes} (what is the only "
                         "one of a class is for training): another --fold, fewer --folds, or "
                         "--val_group REGEX")
    return set(fold)


def matches(flag: str, pattern: str, paths: list[str]) -> dict:
    """-> {path: what of it matches} of those that do; ValueError names the flag of a bad one."""
    try:
        found = ((path, re.search(pattern, path)) for path in paths)
        return {path: match[0] for path, match in found if match}
    except re.error as e:
        raise ValueError(f"{flag} {pattern!r}: not a regular expression ({e})") from None


def merged(groups: dict, same: list[list[str]]) -> dict:
    """grouped()'s groups, those that hold copies of one file made one."""
    home = {path: name for name, rows in groups.items() for path, _ in rows}
    into = {}  # a group's name -> whose it has become

    def now(name):
        while name in into:
            name = into[name]
        return name
    for first, *others in same:
        for path in others:
            a, b = now(home[first]), now(home[path])
            if a != b:
                into[b] = a
    whole = {}
    for name, rows in groups.items():
        whole.setdefault(now(name), []).extend(rows)
    return whole


def grouped(paths: list[str], labels: list, pattern: str | None) -> dict:
    """-> {name: (path, label) rows} of the videos that match alike; pattern None: each alone."""
    names = matches("--group", pattern, paths) if pattern else {path: path for path in paths}
    groups = {}
    for path, label in zip(paths, labels):
        if path not in names:
            raise ValueError(f"--group {pattern!r}: {path} does not match")
        groups.setdefault(names[path], []).append((path, label))
    return groups


# ---- check: which files cannot be read, and why ----

def check_file(job: tuple[str, bool]) -> tuple[str, int, str | None]:
    """(path, decode all?) -> path, number of frames, what is wrong (None: nothing)."""
    path, full = job
    try:
        if prepared.in_set(path):
            prepared.check_bytes(path)
        with prepared.open_video(path) as video:
            n = len(video)
            video.frames(np.linspace(0, n - 1, 3).astype(int))
            if full:
                video.check()
            return path, n, None
    except VideoError as e:
        return path, 0, str(e)


def measure(path: str) -> tuple[int, float, int, int]:
    """-> frames, seconds, height, width of a video that can be read."""
    with prepared.open_video(path) as video:
        n, times = len(video), video.times
        seconds = (times[-1] - times[0]) * n / max(n - 1, 1)  # to the end of the last frame
        return n, float(seconds), *video.pictures([0])[0].shape[:2]


def look_at(job: tuple[str, bool]) -> tuple:
    """A job of check_file -> its answer, and measure()'s; None where the file cannot be read."""
    path, _, wrong = found = check_file(job)
    with contextlib.suppress(VideoError):
        return found, None if wrong else measure(path)
    return found, None


def most_common(things, shown: int = 6) -> str:
    """"30 (118), 25 (2)": the distinct things with how often each is there, the commonest first."""
    counted = Counter(things).most_common()
    more = f", and {len(counted) - shown} more" if len(counted) > shown else ""
    return ", ".join(f"{thing} ({n})" for thing, n in counted[:shown]) + more


def summary(paths: list[str], labels: list, found: dict, num_frames: int, stride: int):
    """Yields what there is to say of a data set, a sentence each; found: {path: measure(path)}."""
    known = Counter(label for label in labels if label is not None)
    if known:
        names = [f"{name} {known[name]}" for name in lists.class_names(list(known))]
        names[SHOWN:] = [f"and {len(names) - SHOWN} more"] * (len(names) > SHOWN)
        yield (f"{len(known)} classes, {min(known.values())} to {max(known.values())} videos of "
               f"each: {', '.join(names)}")
    if None in labels:
        yield f"{labels.count(None)} of {len(labels)} videos have no label"
    if found:
        n, seconds, h, w = map(np.array, zip(*found.values()))
        for name, values in (("frames", n), ("seconds", seconds.round(2)),
                             ("short side", np.minimum(h, w))):
            yield f"{name}: {values.min():g} to {values.max():g}, median {np.median(values):g}"
        rates = (f"{a / b:.4g}" for a, b in zip(n, seconds) if b)
        yield f"frames per second: {most_common(rates) or 'pictures have none'}"
        yield f"width x height: {most_common(f'{b}x{a}' for a, b in zip(h, w))}"
        span = num_frames * stride
        yield (f"{(n < span).sum()} of {len(n)} are shorter than {span} frames, what a clip of "
               f"{num_frames} at stride {stride} spans (--num_frames, --sampling_rate)")
    names = {}
    for path, label in zip(paths, labels):
        names.setdefault(path, set()).add(label)
    groups = copies(list(found))
    if len(names) < len(paths):
        yield f"{len(paths) - len(names)} rows name a file that another row names"
    yield say_copies(groups)
    alone = [[path] for path in names]
    odd = [group for group in groups + alone
           if len(set().union(*(names[path] for path in group))) > 1]
    if odd:
        yield f"the same video has different labels, {len(odd)} times:"
    for group in odd[:5]:
        yield "  " + " = ".join(f"{path} ({label or 'no label'})"
                                for path in group for label in names[path])


def check_main(args):
    """Reads every file of a data set in parallel; prints which fail, can list the rest.

    Then what there is to say of those that can be read. The exit status is 1 if any fails.
    """
    paths, labels = lists.read_videos(args.source, args.data_root, args.num_frames > 1)
    for note in lists.say_folders(paths):
        print(note)
    if args.write_good:  # before hours of reading: can it be written?
        lists.check_out(args.write_good)
        lists.list_text(zip(paths, labels), args.write_good)
    start, bad, total, failed, found = time.time(), set(), 0, 0, {}
    with contextlib.ExitStack() as stack:
        jobs = [(path, args.full) for path in paths]
        results = map(look_at, jobs)
        if args.num_workers > 1:
            pool = multiprocessing.get_context("spawn").Pool(args.num_workers)
            results = stack.enter_context(pool).imap_unordered(look_at, jobs, 4)
        for done, ((path, n, wrong), measured) in enumerate(results, 1):
            total += n
            if measured:
                found[path] = measured
            if wrong:
                bad.add(path)
                failed += 1
                print(f"\r{wrong}")
            rate = done / (time.time() - start)
            if sys.stdout.isatty() or done == len(paths) or done % 1000 == 0:
                left = (len(paths) - done) / rate
                print(f"\r{done}/{len(paths)} files, {failed} bad, {rate:.0f} files/s, "
                      f"{left:.0f} s left   ", end="", flush=True)
    decoded = "first, middle and last frame were decoded (--full: all)"
    if args.full:
        decoded = "every frame was decoded"
    if any(map(prepared.in_set, paths)):
        decoded += "; checksums of prepared videos were compared"
    print(f"\n{len(paths) - failed} of {len(paths)} files can be read, {total} frames; {decoded}")
    absent = lists.missing(sorted(bad))
    if absent:
        print(f"{len(absent)} of them do not exist")
    for line in summary(paths, labels, found, args.num_frames, args.sampling_rate):
        print(line)
    if args.write_good:
        good = [(path, label) for path, label in zip(paths, labels) if path not in bad]
        write_rows(args.write_good, good)
    return 1 if bad else 0


# ---- prepare: decode once ----

def prepare_main(args):
    """Decodes and stores a whole list once, see video/prepared.py."""
    rows, files = list(zip(*read(args))), args.form == "files"
    settings = dict(form=args.form, sampling_rate=args.sampling_rate, short_side=args.short_side,
                    quality=args.quality, shard_videos=args.shard_videos)
    if files:
        settings = dict(form=args.form, sampling_rate=1, shard_videos=args.shard_videos)
        if (args.sampling_rate, args.short_side, args.quality) != (4, 256, 2):
            raise ValueError("--form files keeps files as they are: leave out --sampling_rate, "
                             "--short_side and --quality")
    if folders := lists.say_folders([path for path, _ in rows]):
        settings["frame_rate"] = args.frame_rate
        if files:
            raise ValueError(f"--form files: {folders[0]}; expected files, or --form raw, compact")
    # so that the workers end with this process
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if prepared.prepare(rows, args.out, settings, args.num_workers, args.dry_run):
            print(f"--data {args.out} takes the place of {args.source}")
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with what is in {args.out}")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- toy ----

def toy_main(args):
    """Writes the toy videos to toy/ and toy_shapes/."""
    make_toy()
    make_toy_shapes()


# ---- the command line ----

def at_least(low: int, at_most: float = math.inf):
    """An argparse type: a whole number from `low`, to `at_most` where that is given."""
    allowed = f"at least {low}" if at_most == math.inf else f"{low} to {at_most}"

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number") from None
        if not low <= value <= at_most:
            raise argparse.ArgumentTypeError(f"{value}: expected {allowed}")
        return value
    return number


def frame_rate(text: str) -> float:
    """An argparse type: frames per second."""
    with contextlib.suppress(ValueError):
        if 1e-9 <= float(text) <= 1e9:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: expected a number of frames per second above 0")


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action):
        hidden = any(action.default is x for x in (None, False, "", argparse.SUPPRESS))
        return action.help if hidden else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Its help shows defaults; an error is one sentence, not the whole usage."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=Help, **kwargs)

    def error(self, message: str):
        message = re.sub(r"^argument (--\w+): ", r"\1 ", message)
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")


def get_args(argv=None) -> argparse.Namespace:
    """The flags; an impossible one ends the program and is named."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("index", help="turn a public data set's annotation into a list file")
    p.set_defaults(run=index_main)
    p.add_argument("layout", choices=sorted(LAYOUTS))
    p.add_argument("annotation",
                   help="the csv, json or split file (hmdb51: the folder of split files)")
    p.add_argument("videos", help="the folder that holds the videos")
    p.add_argument("out", help="the list file to write: path, tab, label")
    p.add_argument("--part", default="train", choices=["train", "test"],
                   help="hmdb51: which part of the split")
    p.add_argument("--split", default=1, type=int, choices=[1, 2, 3], help="hmdb51: which split")

    p = commands.add_parser("split", help="deal labelled videos into a training and a "
                                          "validation list")
    p.set_defaults(run=split_main)
    p.add_argument("source", help="a list file, or a folder with one folder per class")
    p.add_argument("train", help="the list file to write for training")
    p.add_argument("val", help="the list file to write for validation")
    p.add_argument("--data_root", default="", help="goes before relative paths of a list")
    p.add_argument("--folds", default=5, type=at_least(2),
                   help="1/folds of the videos are for validation")
    p.add_argument("--fold", default=0, type=at_least(0), help="which of them, 0 to folds - 1")
    p.add_argument("--group", help="regular expression: videos whose paths match it alike stay on "
                                   "one side (one scene, one person, one source video)")
    p.add_argument("--val_group", help="regular expression: all videos whose paths match it, and "
                                       "no others, are for validation (one person left out)")
    p.add_argument("--seed", default=0, type=at_least(0), help="of the shuffling")
    p.add_argument("--num_frames", default=16, type=at_least(1), help=ONE_FRAME)

    p = commands.add_parser("check", help="say which files of a data set cannot be read, and why")
    p.set_defaults(run=check_main)
    p.add_argument("source", help="a list file or a folder")
    p.add_argument("--data_root", default="", help="goes before relative paths of a list")
    p.add_argument("--num_workers", default=os.cpu_count(), type=at_least(1, at_most=1000),
                   help="processes")
    p.add_argument("--full", action="store_true", help="decode every frame, not three per file")
    p.add_argument("--num_frames", default=16, type=at_least(1),
                   help="of the clips that videos may be too short for; " + ONE_FRAME)
    p.add_argument("--sampling_rate", default=4, type=at_least(1),
                   help="their stride in frames")
    p.add_argument("--frame_rate", default=25.0, type=frame_rate, help=FRAME_RATE)
    p.add_argument("--write_good", help="write a list of the files that can be read")

    p = commands.add_parser("prepare", help="decode a data set once into shards that train without "
                                            "decoding")
    p.set_defaults(run=prepare_main)
    p.add_argument("source", help="a list file or a folder")
    p.add_argument("out", help="the folder to write; then given as --data")
    p.add_argument("--data_root", default="", help="goes before relative paths of a list")
    p.add_argument("--form", default="raw", choices=prepared.FORMS,
                   help="raw: pixels, the fastest; compact: a JPEG per frame, a 20th of the size; "
                        "files: the files as they are, in tars")
    p.add_argument("--sampling_rate", default=4, type=at_least(1),
                   help="keep every N-th frame (1: all)")
    p.add_argument("--short_side", default=256, type=at_least(1),
                   help="pixels; smaller frames stay as they are")
    p.add_argument("--quality", default=2, type=at_least(2, at_most=31),
                   help="compact: JPEG quantiser, 2 (best) to 31")
    p.add_argument("--shard_videos", type=at_least(1),
                   help="videos per shard, and per unit of work (default: 16; of the form files as "
                        "many as make 256 MB)")
    p.add_argument("--num_workers", default=os.cpu_count(), type=at_least(1, at_most=1000),
                   help="processes")
    p.add_argument("--num_frames", default=16, type=at_least(1), help=ONE_FRAME)
    p.add_argument("--frame_rate", default=25.0, type=frame_rate, help=FRAME_RATE)
    p.add_argument("--dry_run", action="store_true", help="only say how large it would be")

    p = commands.add_parser("toy", help="write the toy videos to toy/ and toy_shapes/")
    p.set_defaults(run=toy_main)
    return parser.parse_args(argv)


def main(argv=None) -> int | None:
    """The command line; returns the exit status."""
    args = get_args(argv)
    frames.set_rate(getattr(args, "frame_rate", 25))
    return args.run(args)
