"""ava/ and detect_ava.py: AVA's files, frame mAP, clips around key frames, the detector."""

import itertools
import json
import math
import random
import re

import numpy as np
import torch

import detect_ava
import eval as evaluate
import weights
from ava.clips import (KeyFrame, TestFrames, TrainFrames, clip_seconds, crop_boxes, jitter_boxes,
                       key_frames)
from ava.detector import NORMS, Detector, enlarged, load_detector, pad_frames, roi_align
from ava.files import (Rows, merge_rows, read_boxes, read_detections, read_excluded,
                       read_label_map, read_rows, write_detections)
from ava.score import frame_map
from lib.cubes import position_table
from model import Encoder, VideoClassifier
from tests.common import (DETECT, HERE, ava_data, call, checkpoint, clips, difference, mistake,
                          numbered, numbers, raises, released_vit, run, saved, small, test,
                          tiny_ava, tmp, write)
from video import decode, lists, tools, toy


# ---------------------------------------------------------------- ava/files.py

def ava_file(name, text):
    """A file in the temporary folder -> its path."""
    path = tmp(name)
    open(path, "w", newline="").write(text)
    return path


@test
def test_ava_files():
    """AVA's CSVs parse in every form met: padded seconds, CR LF, tabs, no person, empty label."""
    read = lambda name, text, kind: read_rows(ava_file(name, text), kind)
    truth = read("t.csv", "m,0902,0.1,0.2,0.3,0.4,12,0\r\nm,902,0.1,0.2,0.3,0.4,80,0\r\n\r\n"
                 "n,903,,,,,,\r\nk,1\r\n", "truth")
    assert truth.keys == [("m", 902), ("n", 903), ("k", 1)] and truth.frame.tolist() == [0, 0]
    assert truth.id.tolist() == [12, 80] and truth.box.tolist() == [[0.1, 0.2, 0.3, 0.4]] * 2
    early = read("t7.csv", "video,sec,x1,y1,x2,y2,action\n-5KQ66BBWC4,942,.1,.2,.3,.4,1\n", "truth")
    assert early.keys == [("-5KQ66BBWC4", 942)] and early.id.tolist() == [1]
    boxes = read("b.csv", "m\t1\t0\t0\t1\t1\t\t0.9\r\nm\t1\t0\t0\t1\t1\t7\t0.8\r\n", "boxes")
    assert boxes.score.tolist() == [0.9, 0.8] and boxes.id.tolist() == [0, 0]
    assert read("b7.csv", "m,1,0,0,1,1,0.7\n", "boxes").score.tolist() == [0.7]
    assert read_excluded(ava_file("e.csv", "0f39OWEqJ24,0903\r\n")) == {("0f39OWEqJ24", 903)}
    assert read_excluded(ava_file("empty.csv", "")) == set() == read_excluded(None)
    both = 'item {\n name: "bend/bow (at the waist)"\n id: 3\n}\nlabel {\n  name: \'watch {TV}\'\n}'
    with raises("expected a name and an id"):
        read_label_map(ava_file("bad.pbtxt", both))
    both = ('item {\n name: "stand"\n id: 12\n}\n'
            'label {\n  name: "bend"\n label_id: 1\n label_type: PERSON_MOVEMENT\n}')
    assert read_label_map(ava_file("both.pbtxt", both)) == {1: "bend", 12: "stand"}
    for kind, row, words in (
            ("truth", "m,1,0,0,1,1", ["6 columns"]),
            ("truth", "m,1.5,0,0,1,1,2,0", ["whole second"]),
            ("truth", "m,1,0,0,640,480,2,0", ["[0,1]"]),
            ("boxes", "m,1,0,0,1,1,,x", ["score"]),
            ("truth", "m,1,0,0,1,1,3,0.98", ["person 0.98"]),
            ("boxes", "m,1,0,0,1,1,2", ["score 2"]),
            ("detections", "m,1,0,0,1,1,3", ["7 columns", "action,score"]),
            ("detections", "m,1,0,0,1,1,3,nan", ["score nan"])):
        with raises("wrong.csv row 2", row, *words):
            read("wrong.csv", "m,1,0,0,1,1,2,1\n" + row + "\n", kind)
    boxes = [dict(image_id=10902, bbox=[64, 48, 320, 240], score=0.9)]
    aia = ava_file("aia.json", json.dumps(boxes))

    def images(**image):
        return ava_file("images.json", json.dumps(dict(images=[dict(movie="b") | image])))
    want = [[0.1, 0.1, 0.6, 0.6]]
    for movies in (ava_file("movies.txt", "a.mkv,640,480\nb.mp4,640,480\n"),
                   images(id=10902, timestamp=902, width=640, height=480)):
        rows = read_boxes(aia, movies, None)
        assert rows.keys == [("b", 902)] and np.allclose(rows.box, want)
    movies = ava_file("movies.txt", "a.mkv\nb.mp4\n")
    scaled = read_boxes(aia, movies, lambda video: (720, 960)).box
    assert np.allclose(scaled, [[64 / 480, 48 / 360, 0.8, 0.8]])
    with raises("images.json", "not above 0"):
        read_boxes(aia, images(id=10902, timestamp=9, width=0, height=4), None)
    quoted = ava_file("quoted.pbtxt", 'item { name: "a \\"b\\" c" id: 1 }')
    assert read_label_map(quoted) == {1: 'a "b" c'}
    with raises("looks.csv", "annotations, not person boxes"):
        read("looks.csv", "m,1,0,0,1,1,3,0\nm,1,0,0,1,1,3,1\n", "boxes")
    with raises("aia.json entry 1", "image 10902 is not in"):
        read_boxes(aia, images(id=1, timestamp=9, width=6, height=4), None)
    with raises("aia.json entry 1", "--movie_list"):
        read_boxes(aia, movies, lambda video: (100, 100))


def as_rows(entries):
    """[(key, box or None, class[, score])] -> Rows."""
    keys = {}
    rows = [(keys.setdefault(key, len(keys)), box, *rest) for key, box, *rest in entries]
    rows = [row for row in rows if row[1] is not None]
    column = lambda i, kind: np.array([row[i] if len(row) > i else 1 for row in rows], kind)
    return Rows(list(keys), column(0, int), column(1, float).reshape(-1, 4), column(2, int),
                column(3, float))


@test
def test_detection_files_read_back():
    """What write_detections writes both readers read alike; a frame met again is ignored."""
    rng = np.random.default_rng(0)
    frame = np.array([0, 0, 1, 2, 0])
    box = rng.random((5, 4)).round(3)
    rows = Rows([("a,b", 2), ("b", 1000), ("c", 3)], frame, box, np.arange(1, 6),
                rng.random(5).round(4))
    path = tmp("d.csv")
    write_detections(path, rows._replace(keys=[("ab", 2), *rows.keys[1:]]))
    assert open(path).read().startswith("ab,0002,")
    for got in (read_detections(path), read_rows(path, "detections")):
        assert got.keys == [("ab", 2), ("b", 1000), ("c", 3)]
        assert all(np.array_equal(x, y) for x, y in zip(got[1:], rows[1:]))
    quoted = ava_file("quoted.csv", '"ab",0002,0,0,1,1,3,0.5\nb ,1000,0,0,1,1,3,0.5\n')
    assert read_detections(quoted).keys == [("ab", 2), ("b", 1000)]
    text = "video,sec,x1,y1,x2,y2,id,score\nb, 1000, 0,0,1,1, 3,0.5\nd,4,0,0,1,1,3,0.5\n"
    odd = ava_file("odd.csv", text)
    two = merge_rows([read_detections(path), read_detections(odd)], [path, odd], "detections")
    assert two.keys[-1] == ("d", 4) and len(two.frame) == 6 and two.frame[-1] == 3
    with raises("odd.csv", "another file too", "('b', 1000)"):
        merge_rows([got, read_detections(odd)], [path, odd], "truth")


# ---------------------------------------------------------------- ava/score.py

def slow_frame_map(truth, found, classes, excluded, protocol):
    """Loop-by-loop frame mAP of (key, box or None, class[, score]) -> mAP, {class: AP}."""
    found = [d for d in found if d[2] in classes]
    if protocol == "activitynet":
        listed, kept = {key for key, *_ in truth}, []
        for key in {d[0] for d in found} & listed:
            rows = [(i, d) for i, d in enumerate(found) if d[0] == key]
            kept += sorted(rows, key=lambda row: -row[1][3])[:50]
        found = [d for _, d in sorted(kept, key=lambda row: row[0])]
    full = lambda b: b is not None and b[2] > b[0] and b[3] > b[1]
    aps = {}
    for c in classes:
        gt = {}
        for key, box, label in truth:
            if label == c and key not in excluded and box is not None:
                gt.setdefault(key, []).append(box)
        used, flags = set(), []
        looked_at = [d for d in found if d[2] == c and d[0] not in excluded and full(d[1])]
        for d in sorted(looked_at, key=lambda d: -d[3]):
            best, place = -1, None
            for j, g in enumerate(gt.get(d[0], [])):
                w = min(d[1][2], g[2]) - max(d[1][0], g[0])
                h = min(d[1][3], g[3]) - max(d[1][1], g[1])
                inter = max(w, 0) * max(h, 0)
                area = lambda b: (b[2] - b[0]) * (b[3] - b[1])
                if inter / (area(d[1]) + area(g) - inter) > best:
                    best, place = inter / (area(d[1]) + area(g) - inter), (d[0], j)
            flags.append(best >= 0.5 and place not in used)
            used |= {place} if flags[-1] else set()
        total = sum(map(len, gt.values()))
        recall, precision = [0.0], [0.0]
        for n in range(1, len(flags) + 1):
            recall.append(sum(flags[:n]) / total if total else 0)
            precision.append(sum(flags[:n]) / n)
        area = 0
        for i in range(1, len(recall)):
            area += (recall[i] - recall[i - 1]) * max(precision[i:])
        aps[c] = area if total else math.nan
    valid = [a for a in aps.values() if not math.isnan(a)]
    return sum(valid) / len(valid) if valid else math.nan, aps


@test
def test_frame_map_by_hand():
    """Hand-computed AP: right, wrong, duplicate; empty frames; classes without truth."""
    a, b, far = (0, 0, 0.4, 0.4), (0.1, 0, 0.5, 0.4), (0.6, 0.6, 0.9, 0.9)
    k, m = ("v", 1), ("v", 2)

    def score(truth, found, **kw):
        return frame_map(as_rows(truth), as_rows(found), [1, 2], **kw)["ap"][1]
    truth = [(k, a, 1), (k, far, 1)]
    assert score(truth, [(k, a, 1, 0.9), (k, a, 1, 0.8), (k, far, 1, 0.7)]) == 0.5 * 1 + 0.5 * 2 / 3
    assert score(truth, [(k, far, 1, 0.9)]) == 0.5 and score(truth, []) == 0
    # both look at `a` first, which the higher-scored takes: the other does not turn to `b`,
    # which it overlaps by .6
    assert score([(k, a, 1), (k, b, 1)], [(k, a, 1, 0.9), (k, a, 1, 0.8)]) == 0.5
    # the same IoU: the first
    left, between, right = (0, 0, 0.5, 0.5), (0.125, 0, 0.625, 0.5), (0.25, 0, 0.75, 0.5)
    assert score([(k, left, 1), (k, right, 1)], [(k, between, 1, 0.9), (k, left, 1, 0.8)]) == 0.5
    wrong_first = [(m, a, 1, 0.9), (k, a, 1, 0.8)]  # a frame without true boxes
    assert score(truth[:1], wrong_first) == 0.5
    assert score(truth[:1], wrong_first, protocol="activitynet") == 1
    assert score([*truth[:1], (m, None, 0)], wrong_first, protocol="activitynet") == 0.5
    assert score(truth[:1], wrong_first, excluded={m}) == 1
    flat = (k, (0.2, 0, 0.2, 1), 1)  # a true box without width is missed, a detected one ignored
    assert score([flat], []) == score([flat], [(*flat, 0.9)]) == 0
    assert score([*truth, flat], [(k, a, 1, 0.9), (*flat, 0.8), (k, far, 1, 0.7)]) == 2 / 3
    many = [(k, far, 1, 0.9 - i / 1000) for i in range(50)] + [(k, a, 1, 0.1)]
    assert score(truth[:1], many, protocol="activitynet") == 0 and score(truth[:1], many) == 1 / 51
    same = [(k, a, 1, 0.5), (k, far, 1, 0.5)]  # equal scores: the order of the rows
    assert score(truth[:1], same) == 1 and score(truth[:1], same[::-1]) == 0.5
    result = frame_map(as_rows(truth), as_rows([(k, a, 1, 0.9)]), [1, 2])
    assert math.isnan(result["ap"][2]) and result["map"] == 0.5 and result["count"] == {1: 2, 2: 0}
    for order in (1, -1):  # one score for all: precision 2/3 at recall 1, in whatever order
        rows = [(k, a, 1, 0.9), (m, a, 1, 0.5), (k, far, 1, 0.2)][::order]
        result = frame_map(as_rows(truth), as_rows(rows), [1, 2])
        assert abs(result["flat"][1] - 2 / 3) < 1e-12
        assert result["flat_map"] == result["flat"][1] != result["map"]


@test
def test_frame_map_equals_a_slow_scorer():
    """250 random cases, both protocols: ties, duplicates, empty and excluded frames."""
    for case in range(250):
        r = random.Random(case)
        keys = [(f"v{i % 2}", i) for i in range(r.randint(1, 6))]
        extra = [*keys, ("v9", 1), ("v0", 99)]

        def box():
            x, y = r.choice((0, 0.1, 0.2)), r.choice((0, 0.1, 0.2))
            right = x + r.choice((0.2, 0.3, 0.4))
            return x, y, right, y + (0 if r.random() < 0.1 else r.choice((0.2, 0.3, 0.4)))
        truth = [(k, box(), r.randint(1, 6)) for k in keys for _ in range(r.randint(1, 6))]
        truth += [(keys[0], None, 0), (("v1", 50), None, 0)]
        found = [(r.choice(extra), box(), r.randint(1, 6), r.choice((0.1, 0.5, 0.5, r.random())))
                 for _ in range(r.choice((0, 5, 40, 200)))]
        classes = r.sample(range(1, 7), r.randint(1, 5))
        excluded = {r.choice(extra)} if case % 3 == 0 else set()
        for protocol in ("paper", "activitynet"):
            mine = frame_map(as_rows(truth), as_rows(found), classes, excluded, protocol)
            mean, aps = slow_frame_map(truth, found, classes, excluded, protocol)
            pairs = [(mine["map"], mean), *((mine["ap"][c], aps[c]) for c in classes)]
            for x, y in pairs:
                same = math.isnan(x) and math.isnan(y) or abs(x - y) < 1e-12
                assert same, (case, protocol, pairs)


# ---------------------------------------------------------------- ava/clips.py

@test
def test_key_frames_and_clips():
    """Window -31 + 4k at 25 fps; jitter, crop and flip move boxes with their pixels."""
    assert (clip_seconds(16, 4, 25) * 25).round(9).tolist() == list(range(-31, 30, 4))
    path = write("ava_clip.mp4", numbered(60, 64, 96), bf=2, g=12)
    b, c = (0.1, 0.1, 0.5, 0.9), (0.5, 0.2, 0.9, 0.8)
    rows = as_rows([(("m", 1), b, 3), (("m", 1), c, 5), (("m", 1), b, 9),
                    (("m", 1), (0.2, 0.2, 0.2, 0.9), 3), (("gone", 1), b, 3), (("m", 2), c, 4)])
    frame, = key_frames(rows, {"m": path}, [3, 5, 9])
    assert np.allclose(frame.boxes, [b, c])
    assert frame.labels.tolist() == [[1, 0, 1], [0, 1, 0]] and frame.second == 1
    twice = as_rows([(("m", 1), b, 0, 0.8), (("m", 1), b, 0, 0.9)])
    assert key_frames(twice, {"m": path}, None)[0].scores.tolist() == [np.float32(0.9)]
    still = np.array([[10.0, 20, 30, 60]])
    moved = [jitter_boxes(np.random.default_rng(s), still)[0] for s in range(2000)]
    low, high = np.min(moved, 0), np.max(moved, 0)  # width 20, height 40
    assert np.allclose(low, [6, 16, 28, 58], atol=0.1)
    assert np.allclose(high, [12, 22, 34, 64], atol=0.1)
    boxes = np.array([[0, 0, 10, 10], [20, 5, 40, 50], [9, 0, 10.5, 30]])
    cut, kept = crop_boxes(boxes, 5, 10, 20, 20)
    assert cut.tolist() == [[0, 0, 0, 5], [10, 0, 20, 20], [0, 0, 0.5, 20]]
    assert kept.tolist() == [False, True, False]
    make = lambda **kw: TrainFrames([frame], clip_seconds(4, 2, 25), (64, 64), 64, seed=1, **kw)
    seen = set()
    for epoch in range(12):
        (clip, boxes, labels, count, shift), _ = make(jitter=False)[epoch, 0]
        assert clip.shape == (1, 4, 64, 64, 3) and count.item() == len(boxes) == len(labels)
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all() and 0 <= boxes.min() and boxes.max() <= 64
        assert (shift.abs() <= torch.tensor([10 / 180, 26 / 255, 26 / 255])).all()
        with decode.MovieReader(path) as movie:
            whole = torch.from_numpy(movie.at(1 + clip_seconds(4, 2, 25))[0])
        for flipped in (False, True):
            for left in range(33):
                part = whole[:, :, left:left + 64]
                if not torch.equal(part.flip(2) if flipped else part, clip[0]):
                    continue
                want = np.clip(frame.boxes * [96, 64, 96, 64] - [left, 0, left, 0], 0, 64)
                if flipped:
                    want = want[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [64, 0, 64, 0]
                near = np.allclose(boxes, want[:len(boxes)], atol=1e-4)
                assert near, (flipped, left, boxes, want)
                seen.add(flipped)
    assert seen == {False, True}
    with_box = lambda *box: frame._replace(boxes=np.array([box], np.float32),
                                           labels=frame.labels[:1])
    narrow, tiny = with_box(0.98, 0.1, 1, 0.9), with_box(0.5, 0.5, 0.501, 0.501)
    videos = TrainFrames([narrow], np.zeros(4), (16, 16), 64, jitter=False)
    for epoch in range(5):  # a box that most windows miss is never lost
        assert len(videos[epoch, 0][0][1]) == 1
    videos = TrainFrames([tiny], np.zeros(4), (16, 16), 64)  # less than a pixel
    assert len(videos[0, 0][0][1]) == 1
    videos = TrainFrames([with_box(0, 0, 1, 1)], np.zeros(4), (16, 16), 64)
    videos.window = lambda rng, boxes, h, w: (24, 40, *crop_boxes(boxes, 24, 40, 16, 16))
    for epoch in range(20):  # jitter comes before the crop: an end that the crop cuts is not moved
        assert videos[epoch, 0][0][1].tolist() == [[0, 0, 16, 16]]
    outside = as_rows([(("m", 1), (1.02, 0, 1.08, 1), 3)])  # the frame
    assert not key_frames(outside, {"m": path}, [3])
    far = TrainFrames([frame._replace(second=902), frame], np.zeros(4), (64, 64), 64)
    (clip, *_), bad = far[0, 0]
    assert len(bad) >= 1 and "ends at 2.36 s" in bad[0][1] and "902.00 s" in bad[0][1]
    many = [frame._replace(second=s) for s in (0, 1, 2, 9, 902)]
    videos = TestFrames(many, clip_seconds(4, 2, 25), 32)
    assert videos.groups == [[0, 1, 2], [3], [4]]
    ((group, pixels, where),), failed = videos[0]
    assert group == [0, 1, 2] and where.shape == (3, 4) and pixels.shape[1:] == (32, 48, 3)
    assert not failed
    assert videos[2] == ([], {4: f"{path}: ends at 2.36 s, frames from 901.88 s on were asked for"})


@test
def test_scaled_sizes_are_exact():
    """The short side is 256 for all of 17,460 sizes (1,083 were a pixel off in floats)."""
    fit = TrainFrames([], np.zeros(4), (224, 224)).fit
    floats = 0
    for h, w in itertools.product(range(161, 341), range(320, 417)):
        low = min(h, w)
        assert fit(h, w) == (256 * h // low, 256 * w // low), (h, w)
        floats += fit(h, w) != (int(h * (256 / low)), int(w * (256 / low)))
    assert fit(161, 320) == (256, 508) and floats == 1083
    tall = TrainFrames([], np.zeros(4), (320, 224)).fit  # a window that is higher than 256
    assert tall(240, 321) == (320, 428) and tall(361, 240) == (385, 256)


@test
def test_detection_from_a_sparse_set():
    """A set serves clips whose frames are as far apart as what it keeps; denser ones it refuses."""
    movie = write("sparse_movie.mp4", numbered(40, 32, 48), g=8)  # 25 frames/s
    lists.write_list(tmp("sparse_movie.tsv"), [(movie, None)])
    box, frames = np.array([[0, 0, 1, 1]], np.float32), {}
    for kept in (3, 4):
        folder = tmp(f"sparse_set_{kept}")
        call(tools, "prepare", tmp("sparse_movie.tsv"), folder, "--sampling_rate", kept)
        frames[kept] = [KeyFrame(f"{folder}::{movie}", "m", 1, box, np.ones((1, 1), bool),
                                 np.ones(1))]
    for kept, rate, fps in ((3, 4, 25), (3, 3, 25), (3, 5, 30), (4, 4, 25), (4, 4, 24)):
        seconds = clip_seconds(4, rate, fps)
        clip = TrainFrames(frames[kept], seconds, (32, 48), 32, flip=False)[0, 0][0][0][0]
        (_, pixels, where), = TestFrames(frames[kept], seconds, 32)[0][0]
        for shown in (clip, pixels[where[0]]):
            assert len(set(numbers(shown.numpy()).tolist())) == 4, (kept, rate, fps)
    for kept, rate, fps in ((3, 2, 25), (4, 3, 25), (4, 4, 50)):
        says = f"a frame every {kept / 25:.3f} s", f"every {rate / fps:.3f} s", f"below {kept}"
        with raises(movie, *says):
            TrainFrames(frames[kept], clip_seconds(4, rate, fps), (32, 32))
        with raises(movie, *says):
            TestFrames(frames[kept], clip_seconds(4, rate, fps))


# ---------------------------------------------------------------- ava/detector.py

@test
def test_enlarged_boxes():
    """5 % of the width, 2.5 % of the height at each end; no pixel is added to either."""
    boxes = np.array([[0.25, 0.25, 0.75, 0.75], [0.9, 0, 1, 0.5]])
    assert enlarged(boxes, 100, 200).tolist() == [[45, 23.75, 155, 76.25], [179, 0, 200, 51.25]]


def slow_roi_align(feature, box, scale, bins, aligned):
    """Loop-by-loop RoIAlign of one box, feature (D, h, w) float64 -> (D, bins, bins)."""
    (D, h, w), shift = feature.shape, 0.5 if aligned else 0.0
    x1, y1, x2, y2 = (v * scale - shift for v in box)
    width, height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1), max(y2 - y1, 1))
    rows, columns = math.ceil(height / bins), math.ceil(width / bins)
    out = torch.zeros(D, bins, bins, dtype=torch.float64)
    for i, j in itertools.product(range(bins), range(bins)):
        for a, b in itertools.product(range(rows), range(columns)):
            y = y1 + (i + (a + 0.5) / rows) * height / bins
            x = x1 + (j + (b + 0.5) / columns) * width / bins
            if -1 <= y <= h and -1 <= x <= w:
                y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
                top, left = int(y), int(x)
                for dy, dx in itertools.product((0, 1), (0, 1)):
                    weight = (y - top if dy else 1 - y + top) * (x - left if dx else 1 - x + left)
                    value = feature[:, min(top + dy, h - 1), min(left + dx, w - 1)]
                    out[:, i, j] += weight * value / (rows * columns)
    return out


@test
def test_roi_align():
    """RoIAlign equals the slow loop in float64, boxes outside and without area included."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(3, 4, 9, 12, dtype=torch.float64, generator=g)
    low = torch.rand(30, 2, generator=g) * 200 - 50
    boxes = torch.cat([low, low + torch.rand(30, 2, generator=g) ** 2 * 220], 1).double()
    boxes[:2] = torch.tensor([[10, 10, 10, 10], [-60, -60, -30, -30]])
    boxes[2:4] = torch.tensor([[0, 0, 192, 144], [191, 100, 250, 144]])
    index = torch.randint(0, 3, (30,), generator=g)
    for aligned in (False, True):
        got = roi_align(features, boxes, index, 1 / 16, 7, aligned)
        want = torch.stack([slow_roi_align(features[i], b.tolist(), 1 / 16, 7, aligned)
                            for i, b in zip(index, boxes)])
        assert (got - want).abs().max() < 1e-12 and want.abs().max() > 1
    assert roi_align(features, boxes[:0], index[:0], 1 / 16).shape == (0, 4, 7, 7)
    leaf = features[:, :2].clone().requires_grad_()
    some = lambda f: roi_align(f, boxes[:6], index[:6], 1 / 16, 2)
    assert torch.autograd.gradcheck(some, leaf)


def detector(**kw):
    """A tiny Detector with random biases and norms."""
    torch.manual_seed(0)
    shape = dict(size="tiny", num_frames=4, img_size=(32, 48), patch_size=8) | kw
    model = Detector(5, **shape).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@test
def test_detector_forward():
    """Logits equal slow pooling of the tokens; sizes resize positions; padding is the mean."""
    model = detector()
    video, boxes = clips(model), torch.tensor([[0, 0, 48, 32], [5, 3, 30, 20], [40, 20, 60, 40.0]])
    index = torch.tensor([0, 1, 1])
    with torch.no_grad():
        got = model(video, boxes, index)
        tokens = model.norm(Encoder.forward(model, video)).double()
        maps = tokens.view(2, 2, 4, 6, -1).mean(1).permute(0, 3, 1, 2)
        pooled = torch.stack([slow_roi_align(maps[i], b.tolist(), 1 / 8, 7, False).amax((1, 2))
                              for i, b in zip(index, boxes)])
        assert (got - model.cls_score(pooled.float())).abs().max() < 1e-5
        bigger = model(clips(detector(img_size=(40, 64))), boxes, index)
        assert model.grid == (2, 5, 8)
        assert torch.equal(model.pos, position_table((2, 5, 8), 128, (2, 4, 6)))
        # and back again
        assert torch.equal(model(video, boxes, index), got) and bigger.shape == got.shape
    small_video = torch.randint(0, 256, (1, 4, 30, 41, 3), dtype=torch.uint8)
    padded = pad_frames(small_video, 8, model.mean[:3])
    assert padded.shape == (1, 4, 32, 48, 3)
    assert torch.equal(padded[:, :, :30, :41], small_video / 255)
    normalised = (padded - torch.tensor(model.config["mean"])) / torch.tensor(model.config["std"])
    assert normalised[:, :, 30:].abs().max() == 0 == normalised[:, :, :, 41:].abs().max()
    assert pad_frames(video, 8, model.mean[:3]) is video


@test
def test_detection_weights():
    """Pre-trained weights bring their final norm, others none; other classes start a new head."""
    def file(name, model):
        state = dict(model=model.state_dict(), config=model.config, classes=None, args={})
        return saved(name, state)
    source = small(img_size=(32, 48))
    path = file("ava_pre.pt", source)
    model = detector()
    weights.load_pretrained(model, path, verbose=False)
    assert torch.equal(model.norm.weight, source.encoder.norm.weight)
    assert torch.equal(model.blocks[3].mlp.fc2.weight, source.encoder.blocks[3].mlp.fc2.weight)
    tuned = VideoClassifier(5, size="tiny", num_frames=4, img_size=(32, 48), patch_size=8)
    path = file("ava_tuned.pt", tuned)
    report = weights.load_pretrained(detector(), path, verbose=False)
    assert {"norm.weight", "norm.bias", "cls_score.weight", "cls_score.bias"} == set(report["new"])
    other = Detector(3, size="tiny", num_frames=4, img_size=(32, 48), patch_size=8)
    path = file("ava_other.pt", other)
    report = weights.load_pretrained(detector(), path, verbose=False)
    assert set(report["new"]) == {"cls_score.weight", "cls_score.bias"} == set(report["skipped"])
    with raises("no cls_score"):
        load_detector(file("ava_pre.pt", source), None)


@test
def test_the_papers_detection_files():
    """Bare norm and head: --ckpt and --init take all; input is (pixels - 122.7717...) / 57.375."""
    shape = dict(num_frames=16, img_size=224, patch_size=16)
    model = detector(**shape, **NORMS["reference"])
    bare = {k.replace("cls_score.", "head."): v for k, v in model.state_dict().items()}
    spelt = lambda k: "roi_heads.action.predictor." if k.startswith("cls") else "backbone."
    names = {i: f"class {i}" for i in range(1, 6)}
    video, boxes, index = clips(model, 1), torch.tensor([[3.0, 3, 100, 150]]), torch.tensor([0])
    pixels = video.float() - torch.tensor([122.7717, 115.9465, 102.9801])
    plain = detector(**shape, mean=[0] * 3, std=[1] * 3)
    off = lambda a, b: (a(video, boxes, index) - b).abs().max().item()
    with torch.no_grad():
        want = plain(pixels / 57.375, boxes, index)
        for state in (bare, {spelt(k) + k: v for k, v in model.state_dict().items()}):
            path = saved("ava_public.pth", dict(model=state))
            loaded, got, about = load_detector(path, names)
            assert difference(loaded.state_dict(), model.state_dict()) == 0
            assert got == names and about == {} and off(loaded, want) < 5e-6
            assert off(load_detector(path, names, "imagenet")[0], want) > 1e-3
            report = weights.load_pretrained(detector(**shape), path, verbose=False)
            assert not report["new"] and not report["skipped"]
        rounded = [x / 255 for x in (122.77, 115.95, 102.98)]
        rounded = detector(**shape, mean=rounded, std=NORMS["reference"]["std"])
        assert 2e-5 < off(rounded, want) < 5e-4
    init = saved("init.pth", dict(model={re.sub("cls_score", "head", k): v
                                         for k, v in detector().state_dict().items()}))
    train = ["--data", f"{tiny_ava()}/train.csv", "--data_root", f"{tiny_ava()}/movies"]
    train += ["--max_steps", 1, "--init", init, "--out_dir", tmp("ava_init")]
    call(detect_ava, *DETECT, *train)
    assert checkpoint(tmp("ava_init"))["config"]["mean"] == weights.DETECTION_MEAN
    for wrong, words in ((None, "--label_map"), ({1: "a"}, "not 1")):
        with raises(path, "5 outputs", words):
            load_detector(path, wrong)
    text = mistake(evaluate, "--ckpt", path, "--predict", f"{tiny_ava()}/movies")
    assert "a detection checkpoint" in text and "detect_ava.py --ckpt" in text
    flags = detect_ava.get_args(["--ckpt", path, "--toy"])
    with raises(path, "class 1 is 'class 1'", f"'{toy.TOY_NAMES[1]}'"):
        detect_ava.check_scored(flags, names, names, None, "toy_ava/val.csv")
    detect_ava.check_scored(flags, toy.TOY_NAMES, toy.TOY_NAMES, None, "toy_ava/val.csv")
    # what has a norm and a head too: an image ViT, Hugging Face's without pooling; and a classifier
    image = released_vit(0, **{"head.weight": (5, 128), "head.bias": (5,)})
    hf = {weights.rename(k, weights.TO_HF): v for k, v in bare.items()}
    pooled = {re.sub("^norm", "fc_norm", k): v for k, v in bare.items()}
    for state in (image, hf, pooled):
        _, _, about = weights.read_weights(saved("no_detector.pth", dict(model=state)))
        assert not about["detector"] and "mean" not in about


# ---------------------------------------------------------------- ava/movie.py

@test
def test_own_movie():
    """--video writes a CSV in AVA's format and the movie with boxes, given or the full frame."""
    root, model = tiny_ava(), detector(img_size=32)
    state = dict(model=model.state_dict(), classes=list("vwxyz"),
                 config=model.config | dict(class_ids=[2, 4, 5, 8, 9]),
                 args=dict(sampling_rate=3, fps=12.0, short_side=32))
    base = ["--ckpt", saved("ava_own.pt", state), "--video", f"{root}/movies/a.mp4",
            "--dtype", "fp32", "--device", "cpu", "--num_workers", 0, "--show", 0,
            "--out_dir", tmp("own")]
    text = call(detect_ava, *base, "--full_frame")
    rows = [r.split(",") for r in open(tmp("own", "a_actions.csv")).read().splitlines()]
    assert len(rows) == 5 * 5 and rows[0][:7] == ["a", "0000", "0", "0", "1", "1", "2"]
    assert "60 frames" in text
    boxes = ava_file("own.csv", "a,2,.25,.25,.75,.75,,.9\na,2,0,0,.2,.2,,.1\nb,2,0,0,1,1,,1\n")
    call(detect_ava, *base, "--boxes", boxes)
    rows = [r.split(",") for r in open(tmp("own", "a_actions.csv")).read().splitlines()]
    assert [r[6] for r in rows] == ["2", "4", "5", "8", "9"]
    assert all(0 < float(r[7]) <= 0.9 for r in rows)
    paths = tmp("own", "a_actions.mp4"), f"{root}/movies/a.mp4"
    call(detect_ava, *base[:-1], tmp("own2"), "--boxes", boxes, "--box_score", 0)
    rows = [r.split(",") for r in open(tmp("own2", "a_actions.csv")).read().splitlines()]
    # scores hold the person detector's
    assert [float(r[7]) <= 0.1 for r in rows] == [False] * 5 + [True] * 5
    with decode.VideoReader(paths[0]) as drawn, decode.VideoReader(paths[1]) as movie:
        assert len(drawn) == 60 and np.allclose(drawn.times, movie.times, atol=1e-3)
        frames, plain = drawn.frames([0, 24, 59]), movie.frames([0, 24, 59])
    plain = plain.repeat(10, 1).repeat(10, 2)
    # the share of values that differ much
    change = (np.abs(frames.astype(int) - plain) > 60).mean((1, 2, 3))
    assert frames.shape == plain.shape, change
    assert change[1] > 0.005 > 1e-4 > max(change[0], change[2]), change
    yellow = frames[1, 190:220, 120:122].reshape(-1, 3).mean(0)  # the left edge of the box
    assert yellow[0] > 150 and yellow[1] > 130 and yellow[2] < 120, yellow


# ---------------------------------------------------------------- detect_ava.py

@test
def test_detections_do_not_depend_on_ranks():
    """1 and 2 ranks write the same detections.csv; --score gives the mAP that testing printed."""
    call(detect_ava, *DETECT, *ava_data(), "--out_dir", tmp("ava_tested"))
    val = f"{tiny_ava()}/val.csv"
    args = ["--ckpt", tmp("ava_tested", "last.pt"), "--val_data", val,
            "--data_root", f"{tiny_ava()}/movies",
            *"--dtype fp32 --device cpu --num_workers 0".split()]
    found = []
    for ranks in (None, 2):
        out = tmp(f"ava_test_{ranks}")
        text = run("detect_ava.py", *args, "--out_dir", out, ranks=ranks, ok=False)
        assert "1 of 4 movies are not in" in text, text
        assert "3 of 9 key frames could not be read" in text, text  # hence the exit status
        found.append(open(f"{out}/detections.csv").read())
    assert found[0] == found[1]
    assert len({tuple(r.split(",")[:2]) for r in found[0].splitlines()}) >= 6
    score = call(detect_ava, "--score", f"{out}/detections.csv", "--val_data", val)
    maps = [re.search(r"frame mAP at IoU 0.5: (\S+)", t)[1] for t in (score, text)]
    assert maps[0] == maps[1], maps


@test
def test_detection_mistakes():
    """Impossible flags and files of detect_ava.py are named, with what is allowed."""
    root = tiny_ava()
    base = [*DETECT, *ava_data(), "--out_dir", tmp("ava_mistake")]
    pixels = ava_file("pixels.csv", "a,1,10,10,200,200,1,1\n")
    one_class = ava_file("one.pbtxt", 'item {\n name: "x"\n id: 77\n}')
    for args, words in (
            (["--data", pixels], ["pixels.csv row 1", "[0,1]"]),
            (["--data", "none.csv"], ["none.csv"]),
            (["--data_root", HERE], [HERE]),
            (["--batch_size", 40], ["9 key frames", "40"]),
            (["--label_map", one_class], ["no true box", "77 (x)"]),
            (["--video", "x.mp4"], ["needs --ckpt"]),
            (["--epochs", "inf"], ["--epochs inf"]),
            (["--label_map", f"{root}/train.csv"], ["no classes"]),
            (["--freeze", 5], ["--freeze 5"]),
            (["--img_size", 20], ["img_size=20x20"]),
            (["--val_boxes", pixels], ["pixels.csv row 1"]),
            (["--ckpt", "x.pt", "--init", "y.pt"], ["only one"]),
            (["--ckpt", "x.pt", "--positions", "new"], ["--positions new", "--init"]),
            (["--movie_start", 900], ["before its"])):
        text = mistake(detect_ava, *base, *args)
        assert all(w in text for w in words), text
    other = ava_file("other_movie.csv", "zz,1,0,0,1,1,1,0.5\n")
    assert "('zz', 1)" in mistake(detect_ava, "--score", other, "--val_data", f"{root}/val.csv")
    val = f"{root}/val.csv"
    twice = mistake(detect_ava, "--score", pixels, "--val_data", val, val)
    assert "annotated in another file too" in twice, twice
