"""AVA's files: annotations, person boxes, detections, label maps, and the movies that they name.

A frame is named (video, second), as in AVA's CSV files; boxes there are x1 y1 x2 y2 in [0,1].
"""

import csv
import json
import math
import os
import re
from collections import namedtuple

import numpy as np

from video.decode import short_side
from video.lists import VIDEO_EXT, read_videos

# keys: [(video, second)], and of n rows: frame (n,) index into keys, box (n, 4) x1 y1 x2 y2 in
# [0,1], id (n,) of the class (0: none), score (n,). A key without rows: a frame known to be empty.
Rows = namedtuple("Rows", "keys frame box id score")

# what stands behind video,second,x1,y1,x2,y2
COLUMNS = {"truth": "action[,person]", "boxes": "[label,]score", "detections": "action,score"}


def of_frames(rows: Rows, wanted) -> np.ndarray:
    """(n,) bool: the rows of those frames of which wanted((video, second)) is true."""
    return np.array([wanted(key) for key in rows.keys], bool)[rows.frame]


def pick(rows: Rows, which) -> Rows:
    """The rows at which `which` (n,) bool is true; the frames stay."""
    return Rows(rows.keys, *(column[which] for column in rows[1:]))


# ---- CSV files ----

def read_table(path: str):
    """Yields (row number, fields) of a CSV file: commas or tabs, any line end.

    Empty lines and a header are skipped.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            first = f.readline()
            f.seek(0)
            for i, row in enumerate(csv.reader(f, delimiter="\t" if "\t" in first else ","), 1):
                row = [field.strip() for field in row]
                header = i == 1 and len(row) > 1 and re.search("[a-z]{3}", row[1], re.IGNORECASE)
                if any(row) and not header:
                    yield i, row
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{path}: not a CSV text file ({e})") from None


def parse_key(row: list, where: str) -> tuple[str, int]:
    """-> (video, second): `0902`, `902` and `902.0` are the same second."""
    try:
        second = float(row[1])
        if second != int(second):
            raise ValueError
    except (IndexError, ValueError, OverflowError):
        raise ValueError(f"{where}: {','.join(row)!r}: expected `video,second,...`, "
                         "commas or tabs between, a whole second") from None
    return row[0], int(second)


def is_whole(text: str) -> bool:
    """Whether a field is a whole number."""
    return bool(re.fullmatch(r"-?\d+", text))


def parse_fields(row: list, kind: str) -> tuple[list, int, float]:
    """A row of this kind -> its box, class id (boxes: 0), score (truth: 1)."""
    if len(row) not in ((8,) if kind == "detections" else (7, 8)):
        raise ValueError(f"{len(row)} columns")
    box = [float(x) for x in row[2:6]]
    if not -0.1 <= min(box) <= max(box) <= 1.1:
        raise ValueError("coordinates are shares of the frame, in [0,1]")
    if kind != "boxes" and not is_whole(row[6]):
        raise ValueError(f"action {row[6]!r} is no number of the label map")
    score = 1.0 if kind == "truth" else float(row[-1])
    if not math.isfinite(score) or kind == "boxes" and not 0 <= score <= 1:
        raise ValueError(f"score {score:g}")
    if kind == "truth" and len(row) == 8 and not re.fullmatch(r"-?\d*", row[7]):
        raise ValueError(f"person {row[7]} is no integer")
    return box, 0 if kind == "boxes" else int(row[6]), score


def read_rows(path: str, kind: str) -> Rows:
    """Reads AVA's CSV files; coordinates are in [0,1]; ValueError names file and row.

    kind "truth": video,second,x1,y1,x2,y2,action[,person]; video,second alone: nobody there.
    "boxes", of a person detector: ...,y2[,label],score, the label may be empty.
    "detections": ...,y2,action,score.
    """
    expected = f"video,second,x1,y1,x2,y2,{COLUMNS[kind]}"
    keys, frame, box, ids, score = {}, [], [], [], []
    like_truth = True
    for i, row in read_table(path):
        key = parse_key(row, f"{path} row {i}")
        place = keys.setdefault(key, len(keys))
        if kind == "truth" and not any(row[2:]):
            continue
        like_truth = like_truth and len(row) == 8 and is_whole(row[6]) and is_whole(row[7])
        try:
            one_box, one_id, one_score = parse_fields(row, kind)
        except ValueError as e:
            why = f"{','.join(row)!r}: {e}; expected {expected}"
            raise ValueError(f"{path} row {i}: {why}") from None
        frame.append(place)
        box.append(one_box)
        ids.append(one_id)
        score.append(one_score)
    if not keys:
        raise ValueError(f"{path}: an empty file; expected rows {expected}")
    if kind == "boxes" and like_truth:
        raise ValueError(f"{path}: labels, and whole numbers in the last column: annotations, "
                         "not person boxes? Those end in a score, like 0.97")
    return Rows(list(keys), np.array(frame, int), np.array(box, float).reshape(-1, 4),
                np.array(ids, int), np.array(score, float))


def read_detections(path: str) -> Rows:
    """read_rows(path, "detections"), ten times as fast: full-size files have ten million rows."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            width = max((line.find(",") for line in f), default=0)
        if width <= 0:
            return read_rows(path, "detections")
        columns = [("video", f"U{width}"), ("second", "f8"), ("box", "f8", 4),
                   ("id", "i8"), ("score", "f8")]
        table = np.loadtxt(path, columns, comments=None, delimiter=",", ndmin=1,
                           encoding="utf-8-sig")
        plain = (table["second"] == table["second"].astype(int)).all()
        plain = plain and np.isfinite(table["score"]).all()
        plain = plain and table["box"].min() >= -0.1 and table["box"].max() <= 1.1
    except ValueError:
        plain = False
    if not plain:  # tabs, blanks, a header; or a wrong row, which read_rows names
        return read_rows(path, "detections")
    # rows of a frame mostly stand together: one dictionary look-up per run
    new = np.ones(len(table), bool)
    new[1:] = table["video"][1:] != table["video"][:-1]
    new[1:] |= table["second"][1:] != table["second"][:-1]
    videos, seconds = (table[name][new].tolist() for name in ("video", "second"))
    if any(video != video.strip(' "') for video in videos):
        return read_rows(path, "detections")
    keys = {}
    runs = np.array([keys.setdefault((video, int(second)), len(keys))
                     for video, second in zip(videos, seconds)])
    return Rows(list(keys), runs[np.cumsum(new) - 1], table["box"].copy(),
                table["id"].copy(), table["score"].copy())


def merge_rows(parts: list, paths: list, kind: str) -> Rows:
    """Several files as one.

    A frame that an earlier file has too is ignored with a warning, in a truth it is an error.
    """
    keys, out = {}, []
    for rows, path in zip(parts, paths):
        twice = {key for key in rows.keys if key in keys}
        if twice and kind == "truth":
            raise ValueError(f"{path}: {len(twice)} frames are annotated in another file too, "
                             f"the first is {sorted(twice)[0]}")
        new = of_frames(rows, lambda key: key not in twice)
        if twice:
            print(f"{path}: {len(twice)} frames are in an earlier file too, the first is "
                  f"{sorted(twice)[0]}: ignored here, with their {(~new).sum()} rows")
        place = [-1 if key in twice else keys.setdefault(key, len(keys)) for key in rows.keys]
        frame = np.array(place, int)[rows.frame]
        out.append([column[new] for column in (frame, *rows[2:])])
    return Rows(list(keys), *map(np.concatenate, zip(*out)))


def read_truth(paths: list) -> Rows:
    """The annotation that these CSV files hold together."""
    return merge_rows([read_rows(path, "truth") for path in paths], paths, "truth")


def read_excluded(path: str | None) -> set:
    """Excluded time stamps: rows video,second -> {(video, second)}; the file may be empty."""
    if not path:
        return set()
    return {parse_key(row, f"{path} row {i}") for i, row in read_table(path)}


def write_detections(path: str, found: Rows):
    """AVA's format: video,second (4 digits),x1,y1,x2,y2,action,score."""
    names = [f"{video},{second:04d}" for video, second in found.keys]
    last, start = None, ""
    with open(path + ".part", "w") as f:
        for i, box, c, score in zip(*(column.tolist() for column in found[1:])):
            if (i, box) != last:  # the rows of a box stand together
                last = i, box
                start = f"{names[i]},{','.join(f'{x:.6g}' for x in box)},"
            f.write(f"{start}{c},{score:.6g}\n")
    os.replace(path + ".part", path)


def count_rows(rows: Rows, excluded: set, class_ids: list) -> str:
    """What an annotation holds, and what of it is left out, in words."""
    kept = pick(rows, of_frames(rows, lambda key: key not in excluded))
    boxes = {(frame, *box) for frame, box in zip(kept.frame.tolist(), kept.box.tolist())}
    sides = np.diff(kept.box.clip(0, 1).reshape(-1, 2, 2), axis=1)
    flat = (sides <= 0).any((1, 2)).sum()
    unknown = sorted(set(kept.id.tolist()) - set(class_ids))
    text = (f"{len(rows.frame)} labels of {len(set(rows.id.tolist()))} classes, {len(boxes)} boxes "
            f"in {len(set(kept.frame.tolist()))} frames of {len({v for v, _ in rows.keys})} movies")
    if excluded:
        text += f"; {len(set(rows.keys) & excluded)} frames excluded"
    if flat:
        text += (f"; {flat} rows have a box without area in the frame: not trained on, missed in "
                 "tests")
    if unknown:
        first = ", ".join(map(str, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
        text += (f"; {np.isin(kept.id, unknown).sum()} labels of {len(unknown)} classes that are "
                 f"not in the label map are left out ({first})")
    return text


# ---- other files ----

def read_label_map(path: str) -> dict:
    """A pbtxt of `item { name: "..." id: 1 }` or `label { ... label_id: 1 }` -> {id: name}.

    Ascending by id.
    """
    try:
        with open(path, encoding="utf-8-sig") as f:
            text = f.read()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not a text file ({e})") from None
    out = {}
    for block in re.findall(r"(?:item|label)\s*:?\s*\{(.*?)\}", text, re.DOTALL):
        number = re.search(r"\b(?:label_)?id\s*:\s*(\d+)", block)
        name = re.search(r"\bname\s*:\s*([\"'])((?:\\.|(?!\1).)*)\1", block)
        c = int(number[1]) if number else 0
        if not name or not 0 < c < 1 << 20 or c in out:
            raise ValueError(f"{path}: {' '.join(block.split())!r}: expected a name and an id "
                             "(or label_id) from 1, each id once")
        out[c] = re.sub(r"\\(.)", r"\1", name[2])
    if not out:
        raise ValueError(f"{path}: no classes; expected a label map with entries "
                         'item { name: "stand" id: 12 }')
    return dict(sorted(out.items()))


def read_boxes(path: str, movie_list: str | None, size_of, say=print) -> Rows:
    """Person boxes: a CSV, or AIA's JSON [{image_id, bbox [x, y, w, h] in pixels, score}].

    There image_id = 10000 * the movie's place in `movie_list` + second; that is a text file with a
    name per line (optionally `,width,height` of the pixels), or AIA's annotation JSON, whose
    "images" tell all this. Without sizes size_of(video) -> (height, width) is asked, reduced to a
    short side of 360 as AIA's frames are; None: a movie whose boxes are left out.
    """
    if not path.lower().endswith(".json"):
        return read_rows(path, "boxes")
    if not movie_list:
        raise ValueError(f"{path}: its image ids count movies: "
                         "--movie_list with their names in that order is needed")
    try:
        entries = read_json(path)
        images = read_images(movie_list) if movie_list.lower().endswith(".json") else {}
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}, {movie_list}: not JSON as AIA has it "
                         f"({type(e).__name__}: {e})") from None
    names, sizes = ([], {}) if images else read_movie_list(movie_list)
    keys, frame, box, score, left_out = {}, [], [], [], 0
    for i, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
        where = f"{path} entry {i}"
        try:
            number, (x, y, w, h) = int(entry["image_id"]), map(float, entry["bbox"])
            one_score = float(entry["score"])
            if not 0 <= one_score <= 1:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{where}: expected {{image_id, bbox [x, y, w, h], "
                             "score in [0,1]}") from None
        known = number in images if images else 0 <= number // 10000 < len(names)
        if not known:
            raise ValueError(f"{where}: image {number} is not in {movie_list}")
        if images:
            video, second, size = images[number]
        else:
            video, second = names[number // 10000], number % 10000
            if video not in sizes:
                own = size_of(video)  # of the movie itself
                sizes[video] = short_side(*own, 360) if own and min(own) > 360 else own
            size = sizes[video]
        if size is None:
            left_out += 1
            continue
        height, width = size
        corners = [x / width, y / height, (x + w) / width, (y + h) / height]
        if not -0.1 <= min(corners) <= max(corners) <= 1.1:
            raise ValueError(f"{where}: its box is outside the {width} x {height} pixels of "
                             f"{video}: give the sizes in --movie_list, as name,width,height")
        frame.append(keys.setdefault((video, second), len(keys)))
        box.append(corners)
        score.append(one_score)
    if left_out:
        say(f"{path}: {left_out} boxes of movies that are not tested on, or not there, "
            "are left out")
    if not keys:
        raise ValueError(f"{path}: no boxes")
    return Rows(list(keys), np.array(frame), np.array(box), np.zeros(len(frame), int),
                np.array(score))


def read_json(path: str):
    """What a JSON file holds."""
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def read_images(path: str) -> dict:
    """AIA's annotation JSON -> {image id: (video, second, (height, width))}."""
    out = {x["id"]: (x["movie"], int(x["timestamp"]), (x["height"], x["width"]))
           for x in read_json(path)["images"]}
    if not all(min(size) > 0 for _, _, size in out.values()):
        raise ValueError("a height or width that is not above 0")
    return out


def read_movie_list(path: str) -> tuple[list, dict]:
    """Rows `name` or `name,width,height` -> names in order, {name: (height, width)} where given."""
    names, sizes = [], {}
    for i, row in read_table(path):
        is_file = row[0].lower().endswith(VIDEO_EXT)
        names.append(os.path.splitext(row[0])[0] if is_file else row[0])
        if len(row) >= 3:
            if not all(re.fullmatch(r"0*[1-9]\d*", x) for x in row[1:3]):
                raise ValueError(f"{path} row {i}: {','.join(row)!r}: "
                                 "expected name or name,width,height")
            sizes[names[-1]] = int(row[2]), int(row[1])
    return names, sizes


def find_movies(folder: str, names) -> dict:
    """{video: path} of the movies of these names that lie in a folder or below it.

    They are files `name` or `name.ending`, or of a prepared set.
    """
    names, out = set(names), {}
    for path in read_videos(folder)[0]:
        base = os.path.basename(path.split("::")[-1])  # in a prepared set: FOLDER::PATH
        for name in {base, os.path.splitext(base)[0]} & names:
            if name in out:
                raise ValueError(f"{folder}: holds two movies for {name!r}: {out[name]} and {path}")
            out[name] = path
    if not out:
        raise ValueError(f"{folder}: holds none of the {len(names)} movies, the first would be "
                         f"{sorted(names)[0]}.mp4; expected --data_root to be the folder of "
                         "the movies")
    return out
