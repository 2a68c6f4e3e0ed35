"""AVA without a model: its files, frame mAP, clips around key frames, toy movies in its format.

A frame is named (video, second), as in AVA's CSV files; boxes there are x1 y1 x2 y2 in [0,1].
"""

import csv
import json
import math
import os
import re
import shutil
import socket
from collections import namedtuple

import numpy as np
import torch

import data

# ---- AVA's files ----

# keys: [(video, second)], and of n rows: frame (n,) index into keys, box (n, 4) x1 y1 x2 y2 in [0,1], id (n,) of the
# class (0: none), score (n,). A key without rows is a frame known to be empty.
Rows = namedtuple("Rows", "keys frame box id score")


def read_table(path: str):
    """Yields (row number, fields) of a CSV file: commas or tabs, any line end; empty lines and a header are skipped."""
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
        raise ValueError(f"{where}: {','.join(row)!r}: expected `video,second,...`, commas or tabs between, "
                         "a whole second") from None
    return row[0], int(second)


def read_rows(path: str, kind: str) -> Rows:
    """Reads AVA's CSV files. kind "truth": video,second,x1,y1,x2,y2,action[,person]; video,second alone: nobody there.

    "boxes" (of a person detector): ...,y2[,label],score, the label may be empty. "detections": ...,y2,action,score.
    Coordinates are in [0,1]; ValueError names file and row.
    """
    expected = "video,second,x1,y1,x2,y2," + dict(truth="action[,person]", detections="action,score",
                                                  boxes="[label,]score")[kind]
    keys, frame, box, ids, score, whole = {}, [], [], [], [], True
    for i, row in read_table(path):
        key = parse_key(row, f"{path} row {i}")
        place = keys.setdefault(key, len(keys))
        if kind == "truth" and not any(row[2:]):
            continue
        whole = whole and len(row) == 8 and bool(re.fullmatch(r"-?\d+", row[6]) and re.fullmatch(r"-?\d+", row[7]))
        try:
            if len(row) not in ((8,) if kind == "detections" else (7, 8)):
                raise ValueError(f"{len(row)} columns")
            corners = [float(x) for x in row[2:6]]
            if not -0.1 <= min(corners) <= max(corners) <= 1.1:
                raise ValueError("coordinates are shares of the frame, in [0,1]")
            if kind != "boxes" and not re.fullmatch(r"-?\d+", row[6]):
                raise ValueError(f"action {row[6]!r} is no number of the label map")
            ids.append(0 if kind == "boxes" else int(row[6]))
            score.append(1.0 if kind == "truth" else float(row[-1]))
            if not math.isfinite(score[-1]) or kind == "boxes" and not 0 <= score[-1] <= 1:
                raise ValueError(f"score {score[-1]:g}")
            if kind == "truth" and len(row) == 8 and not re.fullmatch(r"-?\d*", row[7]):
                raise ValueError(f"person {row[7]} is no integer")
        except ValueError as e:
            raise ValueError(f"{path} row {i}: {','.join(row)!r}: {e}; expected {expected}") from None
        frame.append(place)
        box.append(corners)
    if not keys:
        raise ValueError(f"{path}: an empty file; expected rows {expected}")
    if kind == "boxes" and whole:
        raise ValueError(f"{path}: labels, and whole numbers in the last column: annotations, not person boxes? "
                         "Those end in a score, like 0.97")
    return Rows(list(keys), np.array(frame, int), np.array(box, float).reshape(-1, 4), np.array(ids, int),
                np.array(score, float))


def read_detections(path: str) -> Rows:
    """read_rows(path, "detections"), ten times as fast: full-size files have ten million rows."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            width = max((line.find(",") for line in f), default=0)
        if width <= 0:
            return read_rows(path, "detections")
        table = np.loadtxt(path, delimiter=",", comments=None, ndmin=1, encoding="utf-8-sig", dtype=[
            ("video", f"U{width}"), ("second", "f8"), ("box", "f8", 4), ("id", "i8"), ("score", "f8")])
        plain = (table["second"] == table["second"].astype(int)).all() and np.isfinite(
            table["score"]).all() and table["box"].min() >= -0.1 and table["box"].max() <= 1.1
    except ValueError:
        plain = False
    if not plain:
        return read_rows(path, "detections")  # tabs, blanks, a header; or it names the row that is wrong
    # rows of a frame mostly stand together: one dictionary look-up per run
    new = np.ones(len(table), bool)
    new[1:] = (table["video"][1:] != table["video"][:-1]) | (table["second"][1:] != table["second"][:-1])
    keys, starts = {}, table[new]
    if any(video != video.strip(' "') for video in starts["video"].tolist()):
        return read_rows(path, "detections")
    runs = np.array([keys.setdefault((video, int(second)), len(keys)) for video, second in
                     zip(starts["video"].tolist(), starts["second"].tolist())])
    return Rows(list(keys), runs[np.cumsum(new) - 1], table["box"].copy(), table["id"].copy(), table["score"].copy())


def merge_rows(parts: list, paths: list, kind: str) -> Rows:
    """Several files as one. A frame that an earlier file has too is ignored with a warning, in a truth an error."""
    keys, out = {}, []
    for rows, path in zip(parts, paths):
        twice = {key for key in rows.keys if key in keys}
        if twice and kind == "truth":
            raise ValueError(f"{path}: {len(twice)} frames are annotated in another file too, the first is "
                             f"{sorted(twice)[0]}")
        if twice:
            lost = sum(rows.keys[i] in twice for i in rows.frame.tolist())
            print(f"{path}: {len(twice)} frames are in an earlier file too, the first is {sorted(twice)[0]}: ignored "
                  f"here, with their {lost} rows")
        place = np.array([-1 if key in twice else keys.setdefault(key, len(keys)) for key in rows.keys])[rows.frame]
        out.append([x[place >= 0] for x in (place, *rows[2:])] if len(place) else [place, *rows[2:]])
    return Rows(list(keys), *map(np.concatenate, zip(*out)))


def read_excluded(path: str | None) -> set:
    """Excluded time stamps: rows video,second -> {(video, second)}; the file may be empty."""
    return {parse_key(row, f"{path} row {i}") for i, row in read_table(path)} if path else set()


def read_label_map(path: str) -> dict:
    """A pbtxt of `item { name: "..." id: 1 }` or `label { ... label_id: 1 }` -> {id: name}, ascending."""
    try:
        text = open(path, encoding="utf-8-sig").read()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not a text file ({e})") from None
    out = {}
    for block in re.findall(r"(?:item|label)\s*:?\s*\{(.*?)\}", text, re.DOTALL):
        number = re.search(r"\b(?:label_)?id\s*:\s*(\d+)", block)
        name = re.search(r"\bname\s*:\s*([\"'])((?:\\.|(?!\1).)*)\1", block)
        if not number or not name or not 0 < int(number[1]) < 1 << 20 or int(number[1]) in out:
            raise ValueError(f"{path}: {' '.join(block.split())!r}: expected a name and an id (or label_id) from 1, "
                             "each id once")
        out[int(number[1])] = re.sub(r"\\(.)", r"\1", name[2])
    if not out:
        raise ValueError(f'{path}: no classes; expected a label map with entries item {{ name: "stand" id: 12 }}')
    return dict(sorted(out.items()))


def read_boxes(path: str, movie_list: str | None, size_of, say=print) -> Rows:
    """Person boxes: a CSV, or AIA's JSON [{image_id, bbox [x, y, w, h] in pixels, score}].

    There image_id = 10000 * the movie's place in `movie_list` + second; that is a text file with a name per line
    (optionally `,width,height` of the pixels), or AIA's annotation JSON, whose "images" tell all this. Without sizes
    size_of(video) -> (height, width) is asked, reduced to a short side of 360 as AIA's frames are; None: a movie whose
    boxes are left out.
    """
    if not path.lower().endswith(".json"):
        return read_rows(path, "boxes")
    if not movie_list:
        raise ValueError(f"{path}: its image ids count movies: --movie_list with their names in that order is needed")
    images, names, sizes = {}, [], {}
    try:
        entries = json.load(open(path, encoding="utf-8"))
        if movie_list.lower().endswith(".json"):
            images = {x["id"]: (x["movie"], int(x["timestamp"]), x["height"], x["width"])
                      for x in json.load(open(movie_list, encoding="utf-8"))["images"]}
            if not all(height > 0 and width > 0 for *_, height, width in images.values()):
                raise ValueError("a height or width that is not above 0")
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}, {movie_list}: not JSON as AIA has it ({type(e).__name__}: {e})") from None
    if not images:
        for i, row in read_table(movie_list):
            names.append(os.path.splitext(row[0])[0] if row[0].lower().endswith(data.VIDEO_EXT) else row[0])
            if len(row) >= 3:
                if not all(re.fullmatch(r"0*[1-9]\d*", x) for x in row[1:3]):
                    raise ValueError(f"{movie_list} row {i}: {','.join(row)!r}: expected name or name,width,height")
                sizes[names[-1]] = int(row[2]), int(row[1])
    keys, frame, box, score, left_out = {}, [], [], [], 0
    for i, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
        try:
            number, (x, y, w, h) = int(entry["image_id"]), map(float, entry["bbox"])
            one_score = float(entry["score"])
            if not 0 <= one_score <= 1:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path} entry {i}: expected {{image_id, bbox [x, y, w, h], score in [0,1]}}") from None
        if images and number not in images or not images and not 0 <= number // 10000 < len(names):
            raise ValueError(f"{path} entry {i}: image {number} is not in {movie_list}")
        if images:
            video, second, height, width = images[number]
        else:
            video, second = names[number // 10000], number % 10000
            if video not in sizes:
                own = size_of(video)  # of the movie itself
                sizes[video] = data.short_side(*own, 360) if own and min(own) > 360 else own
            if sizes[video] is None:
                left_out += 1
                continue
            height, width = sizes[video]
        corners = [x / width, y / height, (x + w) / width, (y + h) / height]
        if not -0.1 <= min(corners) <= max(corners) <= 1.1:
            raise ValueError(f"{path} entry {i}: its box is outside the {width} x {height} pixels of {video}: give "
                             "the sizes in --movie_list, as name,width,height")
        frame.append(keys.setdefault((video, second), len(keys)))
        box.append(corners)
        score.append(one_score)
    if left_out:
        say(f"{path}: {left_out} boxes of movies that are not tested on, or not there, are left out")
    if not keys:
        raise ValueError(f"{path}: no boxes")
    return Rows(list(keys), np.array(frame), np.array(box), np.zeros(len(frame), int), np.array(score))


def find_movies(folder: str, names) -> dict:
    """{video: path} of the movies of these names that lie in a folder (or below it): files `name` or `name.ending`."""
    paths, out = data.read_videos(folder)[0], {}
    for path in paths:
        base = os.path.basename(path.split("::")[-1])  # in a prepared set: FOLDER::PATH
        for name in {base, os.path.splitext(base)[0]} & set(names):
            if name in out:
                raise ValueError(f"{folder}: holds two movies for {name!r}: {out[name]} and {path}")
            out[name] = path
    if not out:
        raise ValueError(f"{folder}: holds none of the {len(set(names))} movies, the first would be "
                         f"{sorted(names)[0]}.mp4; expected --data_root to be the folder of the movies")
    return out


# ---- scoring: frame mAP at IoU 0.5 ----

def pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, 4), (n, 4) x1 y1 x2 y2 -> (n,) intersection over union, without a +1 pixel."""
    side = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    inter = np.maximum(side, 0).prod(1)
    area = lambda x: (x[:, 2:] - x[:, :2]).prod(1)
    return inter / (area(a) + area(b) - inter)


def true_positives(group, box, score, true_group, true_box) -> np.ndarray:
    """(n,) bool: which detections are right. A group (int from 0) is a frame and a class; equal scores stay in order.

    Each detection looks only at the true box of its group that it overlaps most, the first among equals, and is right
    if the IoU is at least .5 and no higher-scored one took that box.
    """
    order = np.argsort(true_group, kind="stable")
    true_box = true_box[order]
    size = np.bincount(true_group, minlength=max(group.max(initial=0), true_group.max(initial=0)) + 1)  # of each group
    right, has = np.zeros(len(group), bool), np.flatnonzero(size[group])
    if not len(has):
        return right
    low, count = (np.cumsum(size) - size)[group[has]], size[group[has]]
    start = np.cumsum(count) - count  # a detection's pairs with the true boxes of its group stand in a row
    candidate = np.repeat(low - start, count) + np.arange(count.sum())
    iou = pairwise_iou(np.repeat(box[has], count, 0), true_box[candidate])
    best = np.maximum.reduceat(iou, start)
    taken = np.minimum.reduceat(np.where(iou == np.repeat(best, count), candidate, len(true_box)), start)
    has, taken = has[best >= 0.5], taken[best >= 0.5]
    order = np.argsort(-score[has], kind="stable")
    right[has[order[np.unique(taken[order], return_index=True)[1]]]] = True
    return right


def average_precision(right: np.ndarray, total: int) -> float:
    """(n,) bool by descending score, number of true boxes -> area under the precision envelope; NaN if there are none.
    """
    if not total:
        return math.nan
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((envelope * right).sum() / total)  # recall rises by 1/total at each right one


def frame_map(truth: Rows, found: Rows, class_ids, excluded=(), protocol: str = "paper") -> dict:
    """-> {"map": mean AP over the classes with true boxes, "ap": {class id: AP in [0,1] or NaN}, "count": {id: boxes},

    "flat": {id: AP}, "flat_map"}: flat is what the same boxes get with one score for all, ties taken as one step.

    Frame mAP at IoU .5 as in spec'd for AVA: classes and frames that do not count and boxes without area are dropped,
    then `true_positives`, then per class over all frames `average_precision`. Detections on frames without true boxes
    are wrong. protocol "activitynet" instead ignores frames that the truth does not list, and takes the 50
    highest-scored rows of a frame only.
    """
    if protocol not in ("paper", "activitynet"):
        raise ValueError(f"protocol={protocol!r}: expected paper or activitynet")
    classes = np.array(sorted(class_ids))
    places = {key: i for i, key in enumerate(truth.keys)}
    drop = set(excluded)
    if protocol == "activitynet":
        drop |= set(found.keys) - set(truth.keys)

    def arrays(rows):
        place = np.array([-1 if key in drop else places.setdefault(key, len(places)) for key in rows.keys] or [0])
        frame = place[rows.frame] if len(rows.frame) else rows.frame
        column = np.minimum(np.searchsorted(classes, rows.id), len(classes) - 1)  # of the class among those scored
        keep = (frame >= 0) & (classes[column] == rows.id)
        if rows is found and protocol == "activitynet":
            kept = np.flatnonzero(keep)
            order = kept[np.lexsort((-rows.score[kept], frame[kept]))]  # stable: by frame, then by score
            first = np.searchsorted(frame[order], frame[order])
            keep[order[np.arange(len(order)) - first >= 50]] = False
        keep &= (rows.box[:, 2] > rows.box[:, 0]) & (rows.box[:, 3] > rows.box[:, 1])
        return frame[keep], column[keep], rows.box[keep], rows.score[keep]
    true_frame, true_column, true_box, _ = arrays(truth)
    frame, column, box, score = arrays(found)
    right = true_positives(frame * len(classes) + column, box, score, true_frame * len(classes) + true_column, true_box)
    order = np.lexsort((-score, column))  # by class, then by score; stable
    ends = np.searchsorted(column[order], np.arange(len(classes) + 1))
    total = np.bincount(true_column, minlength=len(classes)).tolist()
    ap, flat = {}, {}
    for k, c in enumerate(classes.tolist()):
        mine = right[order[ends[k]:ends[k + 1]]]
        ap[c] = average_precision(mine, total[k])
        flat[c] = float(mine.mean() * mine.sum() / total[k]) if total[k] and len(mine) else ap[c]
    mean = lambda aps: float(np.mean([x for x in aps.values() if not math.isnan(x)] or [math.nan]))
    return dict(map=mean(ap), ap=ap, count=dict(zip(classes.tolist(), total)), flat=flat, flat_map=mean(flat))


def write_detections(path: str, found: Rows):
    """AVA's format: video,second (4 digits),x1,y1,x2,y2,action,score."""
    names = [f"{video},{second:04d}" for video, second in found.keys]
    last, start = None, ""
    with open(path + ".part", "w") as f:
        for i, box, c, s in zip(found.frame.tolist(), found.box.tolist(), found.id.tolist(), found.score.tolist()):
            if (i, box) != last:  # the rows of a box stand together
                last, start = (i, box), f"{names[i]},{','.join(f'{x:.6g}' for x in box)},"
            f.write(f"{start}{c},{s:.6g}\n")
    os.replace(path + ".part", path)


# ---- clips around key frames ----

# path of the movie, its name, second, boxes (n, 4) in [0,1], labels (n, classes) bool (None: detected), scores (n,)
KeyFrame = namedtuple("KeyFrame", "path video second boxes labels scores")


def clip_seconds(num_frames: int, rate: int, fps: float) -> np.ndarray:
    """(num_frames,) seconds of a clip's frames from its key frame: for 16 at rate 4 of 25 fps (-31 + 4k) / 25."""
    return (1 - num_frames * rate // 2 + rate * np.arange(num_frames)) / fps


def key_frames(rows: Rows, movies: dict, class_ids: list | None) -> list[KeyFrame]:
    """Rows -> a KeyFrame per frame with boxes, by video and second; rows of the same box are one, with all its labels.

    class_ids None: the rows are detected boxes; of equal ones the highest score counts.
    """
    column = {c: i for i, c in enumerate(class_ids or ())}
    by_frame = {}
    for frame, box, c, score in zip(rows.frame.tolist(), rows.box.tolist(), rows.id.tolist(), rows.score.tolist()):
        inside = np.clip(box, 0, 1)
        if (class_ids is None or c in column) and inside[2] > inside[0] and inside[3] > inside[1]:
            boxes = by_frame.setdefault(frame, {})
            labels, best = boxes.get(tuple(box), (set(), 0.0))
            boxes[tuple(box)] = labels | {column.get(c)}, max(best, score)
    out = []
    for frame, boxes in by_frame.items():
        video, second = rows.keys[frame]
        if video in movies:
            labels = np.zeros((len(boxes), len(column)), bool)
            for row, (found, _) in zip(labels, boxes.values()):
                row[[c for c in found if c is not None]] = True
            out.append(KeyFrame(movies[video], video, second, np.array(list(boxes), np.float32),
                                None if class_ids is None else labels,
                                np.array([s for _, s in boxes.values()], np.float32)))
    return sorted(out, key=lambda f: (f.video, f.second))


def jitter_boxes(rng, boxes: np.ndarray) -> np.ndarray:
    """(n, 4) -> the same, every end moved: outward by up to .2 of the width or .1 of the height, inward by half that.
    """
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    out = rng.uniform(-0.5, 1, boxes.shape) * np.stack([0.2 * w, 0.1 * h, 0.2 * w, 0.1 * h], 1)
    return boxes + out * [-1, -1, 1, 1]


def crop_boxes(boxes: np.ndarray, top: float, left: float, height: float, width: float):
    """Pixel boxes in a window -> (boxes in its coordinates, cut off at its edges, which of them have a pixel left)."""
    cut = np.clip(boxes - [left, top, left, top], 0, [width, height, width, height])
    return cut, (cut[:, 2] - cut[:, 0] >= 1) & (cut[:, 3] - cut[:, 1] >= 1)


class TrainFrames(data.PretrainClips):
    """(epoch, index) -> ((clip, boxes, labels, count, shift), bad): one key frame with all its boxes.

    clip (1, T, H, W, C) uint8, a random window of the scaled frame that has at least one box; boxes (n, 4) float32 in
    its pixels, those that the window leaves without area dropped; labels (n, classes) float32; count (1,) = n; shift
    (1, 3) of hue, saturation and value. A movie that cannot be read is reported and another key frame takes its place.
    """

    def __init__(self, frames, seconds, size, short_side=256, movie_start=0.0, jitter=True, flip=True,
                 color=(10, 26, 26), seed=0):
        super().__init__([f.path for f in frames], size=size, flip=flip, seed=seed)
        self.frames, self.seconds, self.short_side, self.jitter, self.color = frames, seconds, short_side, jitter, color
        self.movie_start = movie_start

    def fit(self, h: int, w: int) -> tuple[int, int]:
        """An h x w frame scaled to the short side, or more where the window would not fit."""
        scale = max(self.short_side / min(h, w), self.size[0] / h, self.size[1] / w)
        return max(self.size[0], int(h * scale)), max(self.size[1], int(w * scale))

    def load(self, index: int, rng):
        """-> clip, boxes, labels, count, shift as above; VideoError when the movie cannot be read."""
        f, (H, W) = self.frames[index], self.size
        with data.open_movie(f.path, self.fit) as movie:
            frames, where = movie.at(f.second - self.movie_start + self.seconds)
        h, w = frames.shape[1:3]
        boxes = f.boxes.astype(float) * [w, h, w, h]
        boxes = np.clip(jitter_boxes(rng, boxes) if self.jitter else boxes, 0, [w, h, w, h])
        for attempt in range(11):
            top, left = int(rng.integers(h - H + 1)), int(rng.integers(w - W + 1))
            if attempt == 10:  # around one of the boxes
                x, y = boxes[rng.integers(len(boxes))].reshape(2, 2).mean(0)
                top, left = int(np.clip(y - H / 2, 0, h - H)), int(np.clip(x - W / 2, 0, w - W))
            cut, kept = crop_boxes(boxes, top, left, H, W)
            if attempt == 10:
                kept = (cut[:, 2:] > cut[:, :2]).all(1)  # boxes of less than a pixel
            if kept.any():
                break
        clip, cut = torch.from_numpy(frames[:, top:top + H, left:left + W][where]), cut[kept]
        if self.flip and rng.random() < 0.5:
            clip, cut = clip.flip(2), np.stack([W - cut[:, 2], cut[:, 1], W - cut[:, 0], cut[:, 3]], 1)
        shift = rng.uniform(-1, 1, 3) * self.color / np.array([180, 255, 255])
        labels = torch.from_numpy(f.labels[kept])
        return (clip[None], torch.from_numpy(cut).float(), labels.float(), torch.tensor([len(cut)]),
                torch.from_numpy(shift).float()[None])


class TestFrames(torch.utils.data.Dataset):
    """group -> (parts, failed): up to 8 neighbouring key frames of a movie, read together.

    parts: [(key frame indices, frames (U, h, w, C) uint8 of all their clips, index (n, T) into them)]; failed:
    {key frame index: why}. If a group cannot be read, its key frames are read one by one.
    """

    def __init__(self, frames, seconds, short_side=256, movie_start=0.0, together=8):
        self.frames, self.seconds, self.short_side, self.movie_start = frames, seconds, short_side, movie_start
        self.groups = []
        for i, f in enumerate(frames):
            last = frames[self.groups[-1][-1]] if self.groups else None
            near = last and last.path == f.path and f.second - last.second <= 2 and len(self.groups[-1]) < together
            self.groups[-1].append(i) if near else self.groups.append([i])

    def __len__(self):
        return len(self.groups)

    def read(self, group):
        seconds = np.array([self.frames[i].second for i in group])[:, None] - self.movie_start + self.seconds
        with data.open_movie(self.frames[group[0]].path, lambda h, w: data.short_side(h, w, self.short_side)) as movie:
            frames, where = movie.at(seconds)
        return group, torch.from_numpy(frames), torch.from_numpy(where)

    def __getitem__(self, g: int):
        group, parts, failed = self.groups[g], [], {}
        try:
            return [self.read(group)], failed
        except data.VideoError:
            for i in group:
                try:
                    parts.append(self.read([i]))
                except data.VideoError as e:
                    failed[i] = str(e)
        return parts, failed


# ---- the toy movies ----

TOY_NAMES = {1: "stand", 2: "walk left", 3: "walk right", 4: "jump", 5: "hold", 6: "blink"}
TOY_FPS, TOY_SECONDS, TOY_SIZE, TOY_BLOCK = 12, 24, (64, 96), 3  # frames/s, seconds, pixels, seconds of one action


def toy_movie(rng) -> tuple[np.ndarray, list]:
    """-> ((frames, 64, 96, 3) uint8, rows (second, box in [0,1], class ids)): 2 to 4 figures, each in its quarter.

    For 3 s at a time a figure stands, walks or jumps (one of them, to be told by motion alone), may hold a white
    square (one frame tells) and may blink its head.
    """
    H, W = TOY_SIZE
    n = TOY_FPS * TOY_SECONDS
    y, x = np.mgrid[:H, :W]
    back = 110 + 30 * np.sin(x / rng.uniform(6, 14) + rng.uniform(0, 6)) * np.sin(y / rng.uniform(6, 14))
    movie = np.repeat((back[..., None] + rng.uniform(-25, 25, 3))[None], n, 0)
    rows = []
    for quarter in rng.permutation(4)[:rng.integers(2, 5)]:
        top, left = 32 * (quarter // 2), 48 * (quarter % 2)
        body, head = rng.uniform(0, 90, 3), rng.uniform(150, 230, 3)
        for start in range(0, TOY_SECONDS, TOY_BLOCK):
            pose, hold, blink = int(rng.integers(1, 5)), rng.random() < 0.3, rng.random() < 0.3
            speed = {2: -1, 3: 1}.get(pose, 0) * rng.uniform(9, 11)  # pixels per second
            place = 5 + rng.uniform(0, 33 - abs(speed) * TOY_BLOCK) if speed else 5 + rng.uniform(0, 33)
            place, phase = place - min(speed, 0) * TOY_BLOCK, rng.uniform(0, 2 * np.pi)
            for i in range(start * TOY_FPS, (start + TOY_BLOCK) * TOY_FPS):
                t = i / TOY_FPS
                cx = int(round(left + place + speed * (t - start)))
                up = int(round(3 * np.sin(phase + 2 * np.pi * 1.5 * t))) if pose == 4 else 0
                foot = top + 28 - up
                movie[i, foot - 12:foot, cx - 4:cx + 4] = body
                lit = not blink or np.sin(2 * np.pi * 2 * t + phase) > 0
                movie[i, foot - 18:foot - 12, cx - 3:cx + 3] = head if lit else 255 - head
                if hold:
                    movie[i, foot - 9:foot - 5, cx + 3:cx + 8] = 250
                if i % TOY_FPS == 0 and i // TOY_FPS % TOY_BLOCK:  # the seconds whose clip shows one action
                    box = (cx - 6) / W, (foot - 20) / H, (cx + 9) / W, (foot + 1) / H
                    rows.append((i // TOY_FPS, box, [pose] + [5] * hold + [6] * blink))
    return (movie + rng.normal(0, 4, movie.shape)).clip(0, 255).astype(np.uint8), rows


def make_toy(root: str = "toy_ava", log=print):
    """Writes movies and AVA's files to root/ unless it is there: train and val CSV, label map, exclusions, boxes.

    The boxes are what a person detector might give: ends a little off, some boxes where nobody is, a few missing.
    """
    if os.path.exists(root):
        if not os.path.exists(os.path.join(root, "val.csv")):
            raise ValueError(f"{root}/ exists but does not hold the toy movies: move it away")
        return
    part = f"{root}.{socket.gethostname()}.{os.getpid()}.part"
    log(f"writing 50 toy movies of {TOY_SECONDS} s to {root}/")
    os.makedirs(os.path.join(part, "movies"))
    for split, seed, count in (("train", 0, 40), ("val", 1, 10)):
        with open(os.path.join(part, f"{split}.csv"), "w") as truth, \
                open(os.path.join(part, f"{split}_boxes.csv"), "w") as boxes:
            for k in range(count):
                rng = np.random.default_rng([seed, k])
                movie, rows = toy_movie(rng)
                name = f"{split}_{k:02d}"
                data.write_video(os.path.join(part, "movies", f"{name}.mp4"), movie, fps=TOY_FPS, g=36, bf=2)
                for person, (second, box, ids) in enumerate(rows):
                    for c in ids:
                        truth.write(f"{name},{second:04d},{','.join(f'{v:.3f}' for v in box)},{c},{person}\n")
                    found = np.clip(np.array(box) + rng.normal(0, 0.008, 4), 0, 1)
                    if rng.random() < 0.97:
                        boxes.write(f"{name},{second:04d},{','.join(f'{v:.3f}' for v in found)},,"
                                    f"{rng.uniform(0.85, 1):.3f}\n")
                    if rng.random() < 0.1:
                        x1, y1 = rng.uniform(0, 0.8, 2)
                        boxes.write(f"{name},{second:04d},{x1:.3f},{y1:.3f},{x1 + 0.15:.3f},{min(y1 + 0.3, 1):.3f},,"
                                    f"{rng.uniform(0.3, 0.95):.3f}\n")
        open(os.path.join(part, f"{split}_excluded.csv"), "w").close()
    with open(os.path.join(part, "label_map.pbtxt"), "w") as f:
        f.writelines(f'item {{\n  name: "{name}"\n  id: {c}\n}}\n' for c, name in TOY_NAMES.items())
    try:
        os.rename(part, root)
    except OSError:  # another process was faster
        shutil.rmtree(part)
