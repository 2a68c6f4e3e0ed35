"""Detection on one's own movie: a CSV in AVA's format, and the movie with the boxes drawn."""

import contextlib
import math
import os
from fractions import Fraction

import av
import numpy as np
import torch

from ava.clips import TestFrames, key_frames, movie_size
from ava.detector import detect, to_rows
from ava.files import Rows, of_frames, pick, read_boxes, write_detections
from video.decode import VideoError, resize
from video.pictures import draw_text
from video.prepared import in_set, open_video

COLORS = [(255, 230, 0), (0, 230, 255), (255, 90, 200), (120, 255, 90), (255, 150, 60),
          (150, 170, 255)]


# ---- drawing ----

def draw_boxes(image: np.ndarray, boxes, captions: list):
    """Draws boxes (n, 4) in [0,1] and the lines of text of each into (H, W, 3) uint8.

    The text stands above its box if there is room.
    """
    h, w = image.shape[:2]
    t = max(1, min(h, w) // 160)  # pixels: of a line, and of a glyph's dots
    for k, ((x1, y1, x2, y2), lines) in enumerate(zip(boxes, captions)):
        left, right = (int(np.clip(x, 0, w - 1)) for x in (x1 * w, x2 * w - 1))
        top, bottom = (int(np.clip(y, 0, h - 1)) for y in (y1 * h, y2 * h - 1))
        color = COLORS[k % len(COLORS)]
        image[top:top + t, left:right + 1] = color
        image[max(bottom - t + 1, 0):bottom + 1, left:right + 1] = color
        image[top:bottom + 1, left:left + t] = color
        image[top:bottom + 1, max(right - t + 1, 0):right + 1] = color
        above = top - 7 * t * len(lines)
        for n, text in enumerate(lines):
            width = 4 * t * len(text) + t
            y = (above if above >= 0 else top + t) + n * 7 * t
            x = min(left, max(w - width, 0))
            image[y:y + 7 * t, x:x + width] //= 4
            draw_text(image, text, y + t, x + t, t, color)


def captions(found: Rows, frame: int, names: dict, show: float) -> tuple[list, list]:
    """The boxes of a frame, and of each the lines `class score`: the 5 best of at least `show`."""
    boxes = {}
    mine = pick(found, found.frame == frame)
    for box, c, score in zip(mine.box.tolist(), mine.id.tolist(), mine.score.tolist()):
        boxes.setdefault(tuple(box), []).append((score, names[c]))
    lines = [[f"{name} {score:.2f}" for score, name in sorted(some, reverse=True) if score >= show]
             for some in boxes.values()]
    return list(boxes), [some[:5] for some in lines]


def magnified(image: np.ndarray) -> np.ndarray:
    """A small picture with each pixel repeated, so that names are readable."""
    low, high = sorted(image.shape[:2])
    zoom = min(-(-320 // low), max(1, 1280 // high))
    return np.ascontiguousarray(image.repeat(zoom, 0).repeat(zoom, 1))


def draw_movie(path: str, out: str, found: Rows, names: dict, show: float,
               movie_start: float) -> int:
    """Writes the movie with each key frame's boxes and classes of at least `show`; -> frames.

    They are shown for half a second before and after it.
    """
    seconds = np.array([second for _, second in found.keys]) - movie_start
    part, clock = out + ".part", Fraction(1, 90000)
    with open_video(path) as video, contextlib.ExitStack() as stack:
        stack.callback(lambda: os.path.exists(part) and os.remove(part))  # after an error
        file = stack.enter_context(av.open(part, "w", format="mp4"))
        stream = file.add_stream("libx264", rate=video.rate.limit_denominator(1001))
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
        stream.codec_context.time_base = clock
        count = last = -1
        for count, image in enumerate(video.all_frames()):
            image = magnified(image)
            t = video.times[count] - video.times[0]
            nearest = int(abs(seconds - t).argmin()) if len(seconds) else -1
            if nearest >= 0 and abs(seconds[nearest] - t) <= 0.5:
                draw_boxes(image, *captions(found, nearest, names, show))
            h, w = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
            if not count:
                stream.height, stream.width = h, w
            elif (h, w) != (stream.height, stream.width):  # a stream that changes its size
                h, w = stream.height, stream.width
                image = resize(torch.from_numpy(image)[None], h, w)[0].numpy()
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:h, :w]), "rgb24")
            last = max(last + 1, round(t * 90000))
            picture.pts, picture.time_base = last, clock
            file.mux(stream.encode(picture))
        file.mux(stream.encode(None))
        file.close()
        os.replace(part, out)
    return count + 1


# ---- detect_ava.py --video ----

def whole_frames(path: str, name: str, movie_start: float) -> Rows:
    """The whole frame as the box of every second of a movie."""
    with open_video(path) as video:
        end = video.times[-1] - video.times[0] + movie_start
    keys = [(name, second) for second in range(math.ceil(movie_start), int(end) + 1)]
    n = len(keys)
    return Rows(keys, np.arange(n), np.tile([0.0, 0, 1, 1], (n, 1)), np.zeros(n, int), np.ones(n))


def boxes_of(path: str, movie: str, name: str, movie_list: str | None, least: float, say) -> Rows:
    """The boxes of a movie in a file of person boxes, those with a score of at least `least`."""
    own = name, os.path.basename(movie)

    def size_of(video):
        return movie_size(movie) if video in own else None
    rows = read_boxes(path, movie_list, size_of, say)
    mine = of_frames(rows, lambda key: key[0] in own)
    if not mine.any():
        others = ", ".join(sorted({video for video, _ in rows.keys})[:5])
        raise ValueError(f"{path}: no boxes of {name!r}; it has those of {others}")
    mine &= rows.score >= least
    if not mine.any():
        raise ValueError(f"{path}: no box of {name!r} has a score of {least} (--box_score)")
    return pick(rows, mine)


def detect_movie(run, args, model, names: dict, seconds: np.ndarray, short_side: int) -> int:
    """Detects on args.video, prints what each box does, writes a CSV and a movie; -> exit status.

    seconds: those of a clip's frames from its key frame on. A damaged movie gives status 1.
    """
    movie = args.video
    if in_set(movie):
        raise ValueError(f"--video {movie}: is of a prepared set; expected the movie itself")
    name = os.path.splitext(os.path.basename(os.path.normpath(movie)))[0]
    base = os.path.join(args.out_dir, name + "_actions")
    for given in (movie, args.boxes):
        results = (os.path.realpath(base + end) for end in (".csv", ".mp4"))
        if given and os.path.realpath(given) in results:
            raise ValueError(f"{given}: the result would be written over it; "
                             "choose another --out_dir")
    if args.full_frame:
        rows = whole_frames(movie, name, args.movie_start)
    else:
        rows = boxes_of(args.boxes, movie, name, args.movie_list, args.box_score, run.say)
    frames = key_frames(rows, {video: movie for video, _ in rows.keys}, None)
    if not frames:
        raise ValueError(f"{args.boxes or movie}: no box has an area within the frame")
    model.to(run.device)
    videos = TestFrames(frames, seconds, short_side, args.movie_start)
    probs, failed = detect(run, model, videos, args.batch_size)
    for why in failed.values():
        run.say(f"failed: {why}")
    if not probs:
        raise ValueError(f"{movie}: none of its {len(frames)} key frames can be read: {failed[0]}")
    found = to_rows(frames, probs, list(names))
    write_detections(base + ".csv", found)
    tell(frames, probs, list(names.values()), run.say)
    try:
        count = draw_movie(movie, base + ".mp4", found, names, args.show, args.movie_start)
    except (av.FFmpegError, VideoError) as e:
        raise ValueError(f"{movie}: damaged ({e}): no movie drawn; "
                         f"the detections are in {base}.csv") from None
    run.say(f"{base}.csv: {len(found.frame)} rows; "
            f"{base}.mp4: {count} frames, classes of at least {args.show:g}")
    return 1 if failed else 0


def tell(frames: list, probs: dict, names: list, say):
    """Prints the three best classes of each box."""
    for i, p in probs.items():
        for box, score in zip(frames[i].boxes, p * frames[i].scores[:, None]):
            place = " ".join(f"{v:.2f}" for v in box)
            best = np.argsort(-score, kind="stable")[:3]
            say(f"{frames[i].second:4d} s, box {place}: "
                + ", ".join(f"{names[c]} {score[c]:.2f}" for c in best))
