"""Clips around AVA's key frames, for training and for the test.

Movies are read by time stamp, so a clip is the same whatever a file's rate.
"""

from collections import namedtuple
from fractions import Fraction

import numpy as np
import torch

from ava.files import Rows, find_movies, of_frames, pick, read_boxes
from lib.feed import Samples
from video import prepared
from video.decode import VideoError, short_side

# path of the movie, its name, second, boxes (n, 4) in [0,1], labels (n, classes) bool (None:
# detected), scores (n,)
KeyFrame = namedtuple("KeyFrame", "path video second boxes labels scores")


def clip_seconds(num_frames: int, rate: int, fps: float) -> np.ndarray:
    """(num_frames,) seconds of a clip's frames, counted from its key frame.

    For 16 frames at rate 4 of 25 fps (-31 + 4k) / 25.
    """
    return (1 - num_frames * rate // 2 + rate * np.arange(num_frames)) / fps


def movie_size(path: str) -> tuple[int, int]:
    """(height, width) of a movie's upright frames."""
    with prepared.open_movie(path) as movie:
        return movie.at([0.0])[0].shape[1:3]


# ---- from rows to key frames ----

def key_frames(rows: Rows, movies: dict, class_ids: list | None) -> list[KeyFrame]:
    """Rows -> a KeyFrame per frame with boxes, by video and second.

    Rows of the same box are one, with all its labels. class_ids None: the rows are detected boxes;
    of equal ones the highest score counts.
    """
    column = {c: i for i, c in enumerate(class_ids or ())}
    by_frame = {}  # frame -> {box: (columns of its classes, score)}
    for frame, box, c, score in zip(*(x.tolist() for x in rows[1:])):
        x1, y1, x2, y2 = np.clip(box, 0, 1)
        if (class_ids is None or c in column) and x2 > x1 and y2 > y1:
            boxes = by_frame.setdefault(frame, {})
            columns, best = boxes.get(tuple(box), (set(), 0.0))
            boxes[tuple(box)] = columns | ({column[c]} if column else set()), max(best, score)
    out = []
    for frame, boxes in by_frame.items():
        video, second = rows.keys[frame]
        if video not in movies:
            continue
        labels = None
        if class_ids is not None:
            labels = np.zeros((len(boxes), len(column)), bool)
            for row, (columns, _) in zip(labels, boxes.values()):
                row[list(columns)] = True
        scores = np.array([score for _, score in boxes.values()], np.float32)
        out.append(KeyFrame(movies[video], video, second, np.array(list(boxes), np.float32),
                            labels, scores))
    return sorted(out, key=lambda f: (f.video, f.second))


def with_movies(rows: Rows, excluded: set, class_ids: list | None, folder: str, what: str,
                then: str, say) -> list[KeyFrame]:
    """The key frames of the movies that are in the folder, without the excluded ones.

    class_ids as in key_frames; what and then: of which part it is said that movies are missing,
    and what follows from it.
    """
    videos = {video for video, _ in rows.keys}
    movies = find_movies(folder, videos)
    missing = sorted(videos - set(movies))
    kept = pick(rows, of_frames(rows, lambda key: key not in excluded))
    frames = key_frames(kept, movies, class_ids)
    if missing:
        first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        say(f"{what}: {len(missing)} of {len(videos)} movies are not in {folder} ({first}): {then}")
    if not frames:
        raise ValueError(f"{what}: no key frame with a box is left")
    return frames


def read_test_boxes(path: str, truth: Rows, truth_name: str, folder: str, movie_list: str | None,
                    least: float, say) -> Rows:
    """The person boxes with a score of at least `least`, of the movies that the truth names."""
    known = {video for video, _ in truth.keys}
    movies = find_movies(folder, known)

    def size_of(video):
        return movie_size(movies[video]) if video in movies else None
    rows = read_boxes(path, movie_list, size_of, say)
    ours = of_frames(rows, lambda key: key[0] in known)
    keep = ours & (rows.score >= least)
    text = f"{path}: {keep.sum()} of {ours.sum()} boxes have a score of at least {least:g}"
    if not ours.all():
        text += f"; {(~ours).sum()} boxes of movies that {truth_name} does not name are left out"
    say(text)
    if not keep.any():
        raise ValueError(f"{path}: no box is left to test on")
    return pick(rows, keep)


# ---- training ----

def jitter_boxes(rng, boxes: np.ndarray) -> np.ndarray:
    """(n, 4) -> the same, every end moved.

    Outward by up to .2 of the width or .1 of the height, inward by up to half that.
    """
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    most = np.stack([0.2 * w, 0.1 * h, 0.2 * w, 0.1 * h], 1)
    outward = rng.uniform(-0.5, 1, boxes.shape) * most
    return boxes + outward * [-1, -1, 1, 1]


def crop_boxes(boxes: np.ndarray, top: float, left: float, height: float, width: float):
    """Pixel boxes in a window -> (boxes in its coordinates, which have a pixel left).

    The boxes are cut off at the window's edges.
    """
    cut = np.clip(boxes - [left, top, left, top], 0, [width, height, width, height])
    return cut, (cut[:, 2] - cut[:, 0] >= 1) & (cut[:, 3] - cut[:, 1] >= 1)


class TrainFrames(Samples):
    """(epoch, index) -> ((clip, boxes, labels, count, shift), bad): one key frame, all its boxes.

    clip (1, T, H, W, C) uint8, a random window of the scaled frame that has at least one box; boxes
    (n, 4) float32 in its pixels, those that the window leaves without area dropped; labels
    (n, classes) float32; count (1,) = n; shift (1, 3) of hue, saturation and value. A movie that
    cannot be read is reported and another key frame takes its place.
    """

    def __init__(self, frames, seconds, img_size, short_side=256, movie_start=0.0, jitter=True,
                 flip=True, color=(10, 26, 26), seed=0):
        super().__init__([f.path for f in frames], seed)
        prepared.check_gap(self.paths, seconds)
        self.frames, self.seconds, self.movie_start = frames, seconds, movie_start
        self.img_size, self.short_side = img_size, short_side
        self.jitter, self.flip, self.color = jitter, flip, color

    def fit(self, h: int, w: int) -> tuple[int, int]:
        """An h x w frame scaled to the short side, or more where the window would not fit."""
        H, W = self.img_size
        scale = max(Fraction(self.short_side, min(h, w)), Fraction(H, h), Fraction(W, w))
        return int(h * scale), int(w * scale)  # exactly, then rounded down

    def window(self, rng, boxes: np.ndarray, h: int, w: int):
        """A random window of an h x w frame -> top, left, boxes in it, which of them it keeps."""
        H, W = self.img_size
        for attempt in range(11):
            top, left = int(rng.integers(h - H + 1)), int(rng.integers(w - W + 1))
            if attempt == 10:  # around one of the boxes
                x, y = boxes[rng.integers(len(boxes))].reshape(2, 2).mean(0)
                top, left = int(np.clip(y - H / 2, 0, h - H)), int(np.clip(x - W / 2, 0, w - W))
            cut, kept = crop_boxes(boxes, top, left, H, W)
            if attempt == 10:  # boxes of less than a pixel
                kept = (cut[:, 2:] > cut[:, :2]).all(1)
            if kept.any():
                break
        return top, left, cut, kept

    def load(self, index: int, rng):
        """-> clip, boxes, labels, count, shift as above; VideoError: the movie cannot be read."""
        f, (H, W) = self.frames[index], self.img_size
        with prepared.open_movie(f.path, self.fit) as movie:
            frames, where = movie.at(f.second - self.movie_start + self.seconds)
        h, w = frames.shape[1:3]
        boxes = f.boxes.astype(float) * [w, h, w, h]
        boxes = jitter_boxes(rng, boxes) if self.jitter else boxes
        boxes = np.clip(boxes, 0, [w, h, w, h])
        top, left, cut, kept = self.window(rng, boxes, h, w)
        clip = torch.from_numpy(frames[:, top:top + H, left:left + W][where])  # (T, H, W, C)
        boxes, labels = cut[kept], torch.from_numpy(f.labels[kept])
        if self.flip and rng.random() < 0.5:
            x1, y1, x2, y2 = boxes.T
            clip, boxes = clip.flip(2), np.stack([W - x2, y1, W - x1, y2], 1)
        shift = rng.uniform(-1, 1, 3) * self.color / np.array([180, 255, 255])
        return (clip[None], torch.from_numpy(boxes).float(), labels.float(),
                torch.tensor([len(boxes)]), torch.from_numpy(shift).float()[None])


# ---- test ----

class TestFrames(torch.utils.data.Dataset):
    """group -> (parts, failed): up to 8 neighbouring key frames of a movie, read together.

    parts: [(key frame indices, frames (U, h, w, C) uint8 of all their clips, index (n, T) into
    them)]; failed: {key frame index: why}. If a group cannot be read, its key frames are read one
    by one.
    """

    def __init__(self, frames, seconds, short_side=256, movie_start=0.0, together=8):
        prepared.check_gap([f.path for f in frames], seconds)
        self.frames, self.seconds = frames, seconds
        self.short_side, self.movie_start = short_side, movie_start
        self.groups = []
        for i, f in enumerate(frames):
            group = self.groups[-1] if self.groups else []
            last = frames[group[-1]] if group else None
            near = last and last.path == f.path and f.second - last.second <= 2
            if near and len(group) < together:
                group.append(i)
            else:
                self.groups.append([i])

    def __len__(self):
        return len(self.groups)

    def fit(self, h: int, w: int) -> tuple[int, int]:
        """An h x w frame scaled to the short side."""
        return short_side(h, w, self.short_side)

    def read(self, group: list):
        """Key frame indices -> one of the parts."""
        starts = np.array([self.frames[i].second for i in group])[:, None] - self.movie_start
        with prepared.open_movie(self.frames[group[0]].path, self.fit) as movie:
            frames, where = movie.at(starts + self.seconds)
        return group, torch.from_numpy(frames), torch.from_numpy(where)

    def __getitem__(self, g: int):
        group, parts, failed = self.groups[g], [], {}
        try:
            return [self.read(group)], failed
        except VideoError:
            for i in group:
                try:
                    parts.append(self.read([i]))
                except VideoError as e:
                    failed[i] = str(e)
        return parts, failed
