"""Data sets at the command line, before any training.

    python data.py index ucf101 trainlist01.txt UCF-101/ ucf_train.tsv   # public layout -> list
    python data.py split my_videos/ train.tsv val.tsv                    # own videos -> two lists
    python data.py check ucf_train.tsv                                   # what cannot be read, why
    python data.py prepare ucf_train.tsv ucf_train/                      # decode once, for --data
    python data.py toy                                                   # write the toy videos
"""

import argparse
import contextlib
import csv
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time

import numpy as np

from video import lists, prepared
from video.decode import VideoError
from video.toy import make_toy, make_toy_shapes

# ---- index: public layouts -> list files ----
# Each layout yields (where the video may be, without or with its ending; label) per entry.

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
            yield [os.path.join(videos, row[0])], row[0].split("/")[0]


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
        path = next((path for path in paths if os.path.isfile(path)), None)
        if path:
            found.append((path, label))
        else:
            missing.append(stems[0])
    if not found:
        first = missing[0] if missing else "(the annotation is empty)"
        raise ValueError(f"none of the {len(missing)} videos of {args.annotation} is in "
                         f"{args.videos}; the first would be {first}")
    lists.write_list(args.out, found)
    labels = {label for _, label in found if label}
    print(f"{args.out}: {len(found)} videos, {len(labels)} classes; "
          f"{len(missing)} of the annotation's are not in {args.videos}")
    for path in missing[:5]:
        print(f"  missing: {path}")
    if len(missing) > 5:
        print("  ...")


# ---- split: one's own videos -> a list to train on, a list to validate on ----

def split_main(args):
    """Deals labelled videos into folds, class by class.

    Where a pattern says what belongs together, whole groups.
    """
    paths, labels = lists.read_videos(args.source, args.data_root)
    classes = lists.class_names([label for label in labels if label is not None])
    lists.class_ids(labels, classes, paths, args.source)
    if args.fold >= args.folds:
        raise ValueError(f"--folds {args.folds} --fold {args.fold}: expected fold < folds")
    if len({os.path.realpath(path) for path in (args.source, args.train, args.val)}) < 3:
        raise ValueError(f"{args.source}, {args.train}, {args.val}: expected three different files")
    groups = grouped(paths, labels, args.group)
    names = sorted(groups)
    np.random.default_rng(args.seed).shuffle(names)
    names.sort(key=lambda name: groups[name][0][1])  # stable: class by class, shuffled within
    by_class = {}
    for name in names:
        by_class.setdefault(groups[name][0][1], []).append(name)
    val = set()
    for some in by_class.values():
        if len(some) > 1:  # the only one of a class is for training
            val.update(some[args.fold::args.folds])
    kind = "groups" if args.group else "files"
    for out, part in ((args.train, [name for name in names if name not in val]),
                      (args.val, [name for name in names if name in val])):
        rows = [row for name in part for row in groups[name]]
        there = {label for _, label in rows}
        lists.write_list(out, rows)
        print(f"{out}: {len(rows)} videos, {len(there)} of {len(classes)} classes, "
              f"{len(part)} {kind}")
        if len(there) < len(classes):
            print(f"  classes without a video in it: {', '.join(sorted(set(classes) - there))}")


def grouped(paths: list[str], labels: list, pattern: str | None) -> dict:
    """-> {name: (path, label) rows} of the videos that match alike; pattern None: each alone."""
    try:
        compiled = re.compile(pattern or "")
    except re.error as e:
        raise ValueError(f"--group {pattern!r}: not a regular expression ({e})") from None
    groups = {}
    for path, label in zip(paths, labels):
        name = path
        if pattern:
            match = compiled.search(path)
            if not match:
                raise ValueError(f"--group {pattern!r}: {path} does not match")
            name = match[0]
        groups.setdefault(name, []).append((path, label))
    return groups


# ---- check: which files cannot be read, and why ----

def check_file(job: tuple[str, bool]) -> tuple[str, int, str | None]:
    """(path, decode all?) -> path, number of frames, what is wrong (None: nothing)."""
    path, full = job
    try:
        with prepared.open_video(path) as video:
            n = len(video)
            if isinstance(video, prepared.PreparedVideo):
                video.check()
            if full:
                for i in range(0, n, 64):  # a long video is not held in memory whole
                    video.frames(range(i, min(i + 64, n)))
            else:
                video.frames(np.linspace(0, n - 1, 3).astype(int))
            return path, n, None
    except VideoError as e:
        return path, 0, str(e)


def check_main(args):
    """Reads every file of a data set in parallel; prints which fail, can list the rest.

    The exit status is 1 if any fails.
    """
    paths, labels = lists.read_videos(args.source, args.data_root)
    start, bad, total, failed = time.time(), set(), 0, 0
    with contextlib.ExitStack() as stack:
        jobs = [(path, args.full) for path in paths]
        results = map(check_file, jobs)
        if args.num_workers > 1:
            pool = multiprocessing.get_context("spawn").Pool(args.num_workers)
            results = stack.enter_context(pool).imap_unordered(check_file, jobs, 4)
        for done, (path, n, wrong) in enumerate(results, 1):
            total += n
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
    if args.write_good:
        good = [(path, label) for path, label in zip(paths, labels) if path not in bad]
        lists.write_list(args.write_good, good)
    return 1 if bad else 0


# ---- prepare: decode once ----

def prepare_main(args):
    """Decodes and stores a whole list once, see video/prepared.py."""
    rows = list(zip(*lists.read_videos(args.source, args.data_root)))
    settings = dict(form=args.form, sampling_rate=args.sampling_rate, short_side=args.short_side,
                    quality=args.quality, shard_videos=args.shard_videos)
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


class Parser(argparse.ArgumentParser):
    """Ends the program with one sentence, not with the whole usage."""

    def error(self, message: str):
        message = re.sub(r"^argument (--\w+): ", r"\1 ", message)
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")


def get_args(argv=None) -> argparse.Namespace:
    """The flags; an impossible one ends the program and is named."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    p.add_argument("--seed", default=0, type=at_least(0))

    p = commands.add_parser("check", help="say which files of a data set cannot be read, and why")
    p.set_defaults(run=check_main)
    p.add_argument("source", help="a list file or a folder")
    p.add_argument("--data_root", default="", help="goes before relative paths of a list")
    p.add_argument("--num_workers", default=os.cpu_count(), type=at_least(1), help="processes")
    p.add_argument("--full", action="store_true", help="decode every frame, not three per file")
    p.add_argument("--write_good", help="write a list of the files that can be read")

    p = commands.add_parser("prepare", help="decode a data set once into shards that train without "
                                            "decoding")
    p.set_defaults(run=prepare_main)
    p.add_argument("source", help="a list file or a folder")
    p.add_argument("out", help="the folder to write; then given as --data")
    p.add_argument("--data_root", default="", help="goes before relative paths of a list")
    p.add_argument("--form", default="raw", choices=prepared.FORMS,
                   help="raw: pixels, the fastest; compact: a JPEG per frame, a 20th of the size")
    p.add_argument("--sampling_rate", default=4, type=at_least(1),
                   help="keep every N-th frame (1: all)")
    p.add_argument("--short_side", default=256, type=at_least(1),
                   help="pixels; smaller frames stay as they are")
    p.add_argument("--quality", default=2, type=at_least(2, at_most=31),
                   help="compact: JPEG quantiser, 2 (best) to 31")
    p.add_argument("--shard_videos", default=16, type=at_least(1),
                   help="videos per shard, and per unit of work")
    p.add_argument("--num_workers", default=os.cpu_count(), type=at_least(1), help="processes")
    p.add_argument("--dry_run", action="store_true", help="only say how large it would be")

    p = commands.add_parser("toy", help="write the toy videos to toy/ and toy_shapes/")
    p.set_defaults(run=toy_main)
    return parser.parse_args(argv)


def main(argv=None) -> int | None:
    """The command line; returns the exit status."""
    args = get_args(argv)
    return args.run(args)
