"""Videos that the code writes itself: toy clips, toy shapes, toy movies in AVA's format."""

import contextlib
import os
import shutil
import socket

import numpy as np

from video.lists import write_list
from video.pictures import write_video

TOY_TRAIN, TOY_VAL = 640, 160  # videos
TOY_FRAMES, TOY_SIDE = 24, 48  # frames, pixels


def write_once(root: str, parts, fill, log, what: str = "toy videos"):
    """fill(folder) writes a data set that then appears at root, whole or not at all.

    Nothing happens where it is already; ValueError where root does not hold all of `parts`.
    """
    if os.path.exists(root):
        missing = [name for name in parts if not os.path.exists(os.path.join(root, name))]
        if missing:
            raise ValueError(f"{root}/ exists but does not hold the {what} (no "
                             f"{root}/{missing[0]}): move it away")
        return
    part = f"{root}.{socket.gethostname()}.{os.getpid()}.part"  # several may write at once
    log(f"writing the {what} to {root}/")
    try:
        fill(part)
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(part, root)
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ---- a texture that moves over one that rests ----

TOY_CLASSES = ("right", "down_right", "down", "down_left", "left", "up_left", "up", "up_right")


def toy_clip(rng, label: int, num_frames: int = TOY_FRAMES, side: int = TOY_SIDE) -> np.ndarray:
    """(T, side, side, 3) uint8: a random texture that moves in one of 8 directions, the label.

    Half transparent, it lies over another that rests: labels alone teach the motion slowly, and no
    single frame tells. A texture is two coloured fields of six waves each, of random direction and
    about as long as two or three cubes: too irregular to be continued from the neighbours within a
    frame. But the moving one passes a cube in two frames, so that what a masked cube hides was or
    will be visible elsewhere. To predict it is to know the motion: the evidence for the label lies
    where the loss is.
    """
    angle, speed = label * np.pi / 4, rng.uniform(0.125, 0.1875) * side  # pixels per frame
    t = np.arange(num_frames)[:, None, None]
    y, x = np.mgrid[:side, :side]
    layers = np.zeros((num_frames, side, side, 3))
    for step in (speed, 0):  # the moving texture and the resting one
        k = 2 * np.pi / (rng.uniform(0.375, 0.75, (2, 6)) * side)  # per pixel
        direction, phase = rng.uniform(0, 2 * np.pi, (2, 2, 6))
        color = rng.normal(size=(2, 3))
        color /= np.abs(color).sum(0)
        # (T, side, side): where it came from
        fx, fy = x - t * step * np.cos(angle), y - t * step * np.sin(angle)
        kx, ky = k * np.cos(direction), k * np.sin(direction)
        fields = [sum(np.cos(kx[f, i] * fx + ky[f, i] * fy + phase[f, i]) for i in range(6))
                  for f in range(2)]
        layers += np.einsum("ftyx,fc->tyxc", np.array(fields), color)
    return (128 + 23 * layers).clip(0, 255).astype(np.uint8)


def make_toy(root: str = "toy", log=print):
    """Writes the toy set to root/{train,val,dev}/<class>/ unless it is there.

    dev is for choosing hyper-parameters, so that val stays unseen. What is drawn is the same every
    time; x264 need not encode it to the same bytes.
    """
    def fill(folder):
        for split, seed, count in (("train", 0, TOY_TRAIN), ("val", 1, TOY_VAL),
                                   ("dev", 2, TOY_VAL)):
            for i in range(count):
                label = i % len(TOY_CLASSES)
                path = os.path.join(folder, split, TOY_CLASSES[label], f"{i:04d}.mp4")
                os.makedirs(os.path.dirname(path), exist_ok=True)
                clip = toy_clip(np.random.default_rng([seed, i]), label)
                write_video(path, clip, g=8, bf=2)
    write_once(root, ("train", "val", "dev"), fill, log)


# ---- shapes that move: one frame tells the shape, none the way ----

TOY_SHAPES = ("disc", "square", "triangle", "cross")
TOY_WAYS = ("right", "down", "left", "up")


def waves(rng, side: int) -> np.ndarray:
    """(side, side, 3) float, about -1 to 1: six coloured waves of one to three periods."""
    y, x = np.mgrid[:side, :side]
    k = rng.integers(-3, 4, (6, 2)) * 2 * np.pi / side
    phase, color = rng.uniform(0, 2 * np.pi, (6, 1)), rng.normal(size=(6, 3))
    kx, ky = k[:, 0, None, None], k[:, 1, None, None]
    field = np.cos(kx * x + ky * y + phase[..., None])  # (6, side, side)
    return np.einsum("fyx,fc->yxc", field, color / np.abs(color).sum(0))


def toy_shape_clip(rng, shape: int, way: int, fields: list,
                   num_frames: int = TOY_FRAMES) -> np.ndarray:
    """(T, side, side, 3) uint8: four equal shapes cross a ground together.

    The textures of both (one of the fields (side, side, 3), shifted) are drawn anew in every frame:
    frames of a video share shape, size, light or dark, and motion; there is no texture to know it
    by. Shapes of one size have one area.
    """
    side = len(fields[0])

    def field():
        drawn = fields[rng.integers(len(fields))]
        return np.roll(drawn, rng.integers(side, size=2), (0, 1))

    y, x = np.mgrid[:side // 2, :side // 2] - side / 4 + 0.5
    r = rng.uniform(0.16, 0.2) * side
    near, far = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
    mask = (x ** 2 + y ** 2 < r ** 2,
            far < 0.88 * r,
            (y < 1.27 * r) & (y > 2.1 * abs(x) - 1.27 * r),
            (near < 0.39 * r) & (far < 1.2 * r))[shape]
    start, speed = rng.integers(side, size=2), rng.uniform(0.06, 0.1) * side  # pixels per frame
    direction = np.array(((0, 1), (1, 0), (0, -1), (-1, 0))[way])  # y, x
    light, frames = rng.choice((58, 198)), []
    for t in range(num_frames):
        move = (start + np.round(t * speed * direction)).astype(int)
        there = np.roll(np.tile(mask, (2, 2)), move, (0, 1))[..., None]
        frames.append(np.where(there, light + 20 * field(), 128 + 40 * field()))
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def make_toy_shapes(root: str = "toy_shapes", log=print):
    """Writes the toy set of shapes that move: root/{train,val}/*.mp4, and lists of either label.

    train_shape.tsv, train_way.tsv, val_shape.tsv, val_way.tsv; their paths start where root's does.
    """
    def fill(folder):
        fields = [waves(np.random.default_rng([5, i]), TOY_SIDE) for i in range(64)]
        for split, seed, count in (("train", 3, TOY_TRAIN), ("val", 4, TOY_VAL)):
            os.makedirs(os.path.join(folder, split))
            shapes, ways = [], []
            for i in range(count):
                shape, way = i % 4, i // 4 % 4
                clip = toy_shape_clip(np.random.default_rng([seed, i]), shape, way, fields)
                write_video(os.path.join(folder, split, f"{i:04d}.mp4"), clip, g=8, bf=2)
                shapes.append((f"{root}/{split}/{i:04d}.mp4", TOY_SHAPES[shape]))
                ways.append((f"{root}/{split}/{i:04d}.mp4", TOY_WAYS[way]))
            write_list(os.path.join(folder, f"{split}_shape.tsv"), shapes)
            write_list(os.path.join(folder, f"{split}_way.tsv"), ways)
    write_once(root, ("train", "val", "train_shape.tsv", "val_way.tsv"), fill, log)


# ---- movies with several figures, in AVA's format ----

TOY_NAMES = {1: "stand", 2: "walk left", 3: "walk right", 4: "jump", 5: "hold", 6: "blink"}
MOVIE_FPS, MOVIE_SECONDS = 12, 24  # frames/s, seconds
MOVIE_SIZE, MOVIE_BLOCK = (64, 96), 3  # pixels, seconds of one action


def toy_movie(rng) -> tuple[np.ndarray, list]:
    """2 to 4 figures, each in its quarter.

    -> (frames, 64, 96, 3) uint8, rows (second, box x1 y1 x2 y2 in [0,1], class ids)

    For 3 s at a time a figure stands, walks or jumps (one of them, to be told by motion alone), may
    hold a white square (one frame tells) and may blink its head.
    """
    H, W = MOVIE_SIZE
    n = MOVIE_FPS * MOVIE_SECONDS
    y, x = np.mgrid[:H, :W]
    back = np.sin(x / rng.uniform(6, 14) + rng.uniform(0, 6))
    back = 110 + 30 * back * np.sin(y / rng.uniform(6, 14))
    movie = np.repeat((back[..., None] + rng.uniform(-25, 25, 3))[None], n, 0)
    rows = []
    for quarter in rng.permutation(4)[:rng.integers(2, 5)]:
        top, left = 32 * (quarter // 2), 48 * (quarter % 2)
        body, head = rng.uniform(0, 90, 3), rng.uniform(150, 230, 3)
        for start in range(0, MOVIE_SECONDS, MOVIE_BLOCK):
            pose, hold, blink = int(rng.integers(1, 5)), rng.random() < 0.3, rng.random() < 0.3
            speed = {2: -1, 3: 1}.get(pose, 0) * rng.uniform(9, 11)  # pixels per second
            place = 5 + rng.uniform(0, 33 - abs(speed) * MOVIE_BLOCK)
            place, phase = place - min(speed, 0) * MOVIE_BLOCK, rng.uniform(0, 2 * np.pi)
            for i in range(start * MOVIE_FPS, (start + MOVIE_BLOCK) * MOVIE_FPS):
                t = i / MOVIE_FPS
                cx = int(round(left + place + speed * (t - start)))
                up = int(round(3 * np.sin(phase + 2 * np.pi * 1.5 * t))) if pose == 4 else 0
                foot = top + 28 - up
                movie[i, foot - 12:foot, cx - 4:cx + 4] = body
                lit = not blink or np.sin(2 * np.pi * 2 * t + phase) > 0
                movie[i, foot - 18:foot - 12, cx - 3:cx + 3] = head if lit else 255 - head
                if hold:
                    movie[i, foot - 9:foot - 5, cx + 3:cx + 8] = 250
                second = i // MOVIE_FPS
                if i % MOVIE_FPS == 0 and second % MOVIE_BLOCK:  # its clip shows one action
                    box = (cx - 6) / W, (foot - 20) / H, (cx + 9) / W, (foot + 1) / H
                    rows.append((second, box, [pose] + [5] * hold + [6] * blink))
    movie = movie + rng.normal(0, 4, movie.shape)
    return movie.clip(0, 255).astype(np.uint8), rows


def find_boxes(rng, box) -> list[tuple]:
    """What a person detector might give for a figure's box -> (box, score), none to two of them.

    Its ends are a little off; it is missed at times; at times there is one where nobody is.
    """
    found, near = [], np.clip(np.array(box) + rng.normal(0, 0.008, 4), 0, 1)
    if rng.random() < 0.97:
        found.append((near, rng.uniform(0.85, 1)))
    if rng.random() < 0.1:
        x, y = rng.uniform(0, 0.8, 2)
        found.append(((x, y, x + 0.15, min(y + 0.3, 1)), rng.uniform(0.3, 0.95)))
    return found


def make_toy_movies(root: str = "toy_ava", log=print):
    """Writes movies and AVA's files to root/ unless they are there.

    {train,val}.csv, _boxes.csv as of a person detector, _excluded.csv (empty); a label map.
    """
    def corners(box):
        return ",".join(f"{value:.3f}" for value in box)

    def fill(folder):
        os.makedirs(os.path.join(folder, "movies"))
        for split, seed, count in (("train", 0, 40), ("val", 1, 10)):
            truth, boxes = [], []  # rows of the CSV files
            for k in range(count):
                rng = np.random.default_rng([seed, k])
                movie, rows = toy_movie(rng)
                name = f"{split}_{k:02d}"
                path = os.path.join(folder, "movies", f"{name}.mp4")
                write_video(path, movie, fps=MOVIE_FPS, g=36, bf=2)
                for person, (second, box, ids) in enumerate(rows):
                    where = f"{name},{second:04d}"
                    truth += [f"{where},{corners(box)},{c},{person}" for c in ids]
                    boxes += [f"{where},{corners(found)},,{score:.3f}"
                              for found, score in find_boxes(rng, box)]
            for kind, lines in (("", truth), ("_boxes", boxes), ("_excluded", [])):
                with open(os.path.join(folder, f"{split}{kind}.csv"), "w") as f:
                    f.writelines(line + "\n" for line in lines)
        with open(os.path.join(folder, "label_map.pbtxt"), "w") as f:
            for c, name in TOY_NAMES.items():
                f.write(f'item {{\n  name: "{name}"\n  id: {c}\n}}\n')
    write_once(root, ("val.csv",), fill, log, f"50 toy movies of {MOVIE_SECONDS} s")
