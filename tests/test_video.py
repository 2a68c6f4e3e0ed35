"""video/: decoding, lists, the commands of data.py, pictures, toy videos."""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import unittest.mock
from fractions import Fraction

import av
import numpy as np

from ava.clips import clip_seconds
from tests.common import (as_script, call, mistake, numbered, numbers, odd_files, raises, test, tmp,
                          toy_videos, write)
from video import decode, lists, pictures, prepared, tools, toy


# ---------------------------------------------------------------- video/decode.py

@test
def test_decoding_is_frame_exact():
    """Any frames in any order of every kind of file are right, from memory and by seeking."""
    rng = np.random.default_rng(0)
    keep = decode.KEEP_PACKETS
    try:
        for decode.KEEP_PACKETS in (keep, 0):
            for kind, path in odd_files().items():
                with decode.VideoReader(path) as video:
                    assert len(video) == 40, (kind, len(video))
                    for wanted in ([0], [39], [17, 3, 3, 30], range(40), rng.integers(0, 40, 5)):
                        got = numbers(video.frames(wanted))
                        assert (got == np.array(wanted)).all(), (kind, list(wanted), got)
                    assert (np.diff(video.times) > 0).all(), kind
    finally:
        decode.KEEP_PACKETS = keep


@test
def test_decoding_stops_at_the_last_frame():
    """A clip decodes from its key frame to its last frame; what nobody refers to is left out."""
    with decode.VideoReader(odd_files()["no B-frames"]) as video:
        seen = []
        read = video.read

        def spy(a, b):
            for i, packet in read(a, b):
                seen.append(i)
                yield i, packet
        video.read = spy
        video.frames([14, 17])
        assert seen == list(range(12, 18)), seen
    with decode.VideoReader(odd_files()["B-frames, pyramid, long GOP"]) as video:
        decoded = list(video.decode(video.read(0, 40), wanted={video.pts[video.order[39]]}))
        assert len(decoded) < 30, len(decoded)


@test
def test_pictures():
    """A picture is a one-frame video; PNGs are lossless."""
    image = np.random.default_rng(0).integers(0, 255, (10, 14, 3), dtype=np.uint8)
    pictures.write_png(tmp("a.png"), image)
    with decode.VideoReader(tmp("a.png")) as video:
        assert len(video) == 1 and (video.frames([0, 0])[1] == image).all()


@test
def test_broken_videos_give_clear_errors():
    """The error names the cut, empty, absent, audio-only file; a cut one may give frames."""
    good = open(odd_files()["B-frames, pyramid, long GOP"], "rb").read()
    cut, empty, text, sound = (tmp(n) for n in ("cut.mp4", "empty.mp4", "text.mp4", "sound.wav"))
    open(cut, "wb").write(good[:len(good) // 2])
    open(empty, "wb").close()
    open(text, "w").write("no video\n" * 100)
    with av.open(sound, "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        sample = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sample.rate = 8000
        out.mux(stream.encode(sample))
    for path in (cut, empty, text, sound, tmp("absent.mp4")):
        with raises(path):
            decode.VideoReader(path)
    half = tmp("half.ts")
    whole = open(odd_files()["MPEG transport stream"], "rb").read()
    open(half, "wb").write(whole[:len(whole) // 2])
    with decode.VideoReader(half) as video:
        n = len(video)
        assert 5 < n < 40 and (numbers(video.frames(range(n - 2))) == np.arange(n - 2)).all()
        with raises("half.ts", n):
            video.frames([n])
    bad = bytearray(open(odd_files()["no B-frames"], "rb").read())
    at = bad.find(b"mdat") + 3000
    bad[at:at + 2000] = bytes(2000)
    damaged = tmp("damaged.mp4")
    open(damaged, "wb").write(bad)
    with raises("damaged.mp4"):
        with decode.VideoReader(damaged) as video:
            video.frames(range(40))


@test
def test_movie_reader_is_frame_exact():
    """Frames by time are a full index's, on every kind of file; at 24 to 60 fps by number."""
    rng = np.random.default_rng(0)
    for kind, path in odd_files().items():
        with decode.VideoReader(path) as video:
            times = video.times - video.times[0]
            windows = [times[-1] * rng.random() + np.arange(5) * 0.07 for _ in range(4)]
            windows += [times[::3], times[:2] - 5]
            wanted = [decode.nearest(times, w) for w in windows[:-1]] + [np.zeros(2, int)]
        for window, index in zip(windows, wanted):
            with decode.MovieReader(path) as movie:
                if window.max() < -3:
                    with raises(path, "before its start"):
                        movie.at(window)
                    continue
                frames, where = movie.at(window)
                got = numbers(frames)[where]
                assert (got == index).all(), (kind, window, index, got)
    for rate in (Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(60)):
        pts = np.round(np.arange(250) * 1000 / float(rate) + 7000).astype(int)  # starts at 7 s
        path = write(f"clock{float(rate):.0f}.mkv", numbered(250), pts=pts, bf=3, g=48)
        for second in (0, 1, 2, 3, 4):
            t = second + clip_seconds(16, 4, 25)
            away = lambda i, x: (abs((pts[i] - 7000) / 1000 - max(x, 0)), i)
            index = [min(range(250), key=lambda i: away(i, x)) for x in t]
            with decode.MovieReader(path) as movie:
                frames, where = movie.at(t)
                assert movie.order is None  # no full index: a seek
            assert (numbers(frames)[where] == index).all(), (rate, second)
            assert len(frames) == len(set(index)), (rate, second)
    with decode.MovieReader(path) as movie, raises(path, "ends at 4.15 s", "from 8.00 s"):
        movie.at(np.array([8.0, 9.0]))


# ---------------------------------------------------------------- video/lists.py

@test
def test_list_rows():
    """Commas, tabs, last spaces; paths with spaces and commas; the label is optional."""
    for row, path, label in (
            ("a.mp4 3", "a.mp4", "3"),
            ("my dir/a b.mp4 3", "my dir/a b.mp4", "3"),
            ("a, b.mp4,jump", "a, b.mp4", "jump"),
            ("a, b.mp4 3", "a, b.mp4", "3"),
            ("a b.mp4", "a b.mp4", None),
            ("x y.webm\tlong label", "x y.webm", "long label"),
            ('"q,r.avi",7', "q,r.avi", "7"),
            ('"a, b.mp4","x, y"', "a, b.mp4", "x, y"),
            ("a.mp4,b, c", "a.mp4", "b, c"),
            ("a.mp4 b c", "a.mp4", "b c"),
            ('"q" s.mp4', '"q" s.mp4', None),
            ("noending 4", "noending", "4"),
            ("frames/down/0042", "frames/down/0042", None),
            ("word", "word", None),
            ("a.mp4,", "a.mp4", None)):
        assert lists.parse_row(row, "") == (path, label), (row, lists.parse_row(row, ""))
    with raises("list.txt row 3", "expected `path`"):
        lists.parse_row(",label", "list.txt row 3")


@test
def test_written_lists_read_back():
    """Names with commas, spaces, tabs and endings inside come back, with and without labels."""
    rows = [("a/clip1.mp4 copy.mp4", "x"), ("v3.mov, take 2.mp4", "y z"),
            ("v3.mov, take 2.mp4", None), ("plain.mp4", None), ("b c.avi", "d, e"),
            ("odd name", "x"), ("clip.mp4", "x.mp4 y")]
    out = tmp("written.tsv")
    lists.write_list(out, rows)
    assert [lists.parse_row(row, out) for row in open(out).read().splitlines()] == rows


@test
def test_folders_and_lists():
    """Folders give labels; lists honour data_root, CR LF, BOM, comments; errors name the source."""
    root = tmp("set")
    for name in ("walk/a.mp4", "run/deep/b.MP4", "run/notes.txt"):
        os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
        open(os.path.join(root, name), "w").close()
    paths, labels = lists.read_videos(root)
    assert [os.path.relpath(p, root) for p in paths] == ["run/deep/b.MP4", "walk/a.mp4"]
    assert labels == ["run", "walk"]
    os.symlink("..", os.path.join(root, "run", "deep", "loop"))
    open(os.path.join(root, "walk", "._a.mp4"), "w").close()
    assert len(lists.read_videos(root)[0]) == 2
    assert lists.read_videos(paths[0]) == ([paths[0]], [None])
    alone = os.path.join(root, "walk", "a.mp4")
    assert lists.read_videos(os.path.join(root, "walk")) == ([alone], [None])
    rows = tmp("rows.csv")
    text = "\ufeff# comment\r\nwalk/a.mp4,0\r\n\r\nrun/deep/b.MP4,1\r\n"
    open(rows, "w", newline="").write(text)
    paths = [os.path.join(root, "walk/a.mp4"), os.path.join(root, "run/deep/b.MP4")]
    assert lists.read_videos(rows, root) == (paths, ["0", "1"])
    with raises("rows.csv", "walk/a.mp4", "data_root"):
        lists.read_videos(rows)
    with raises("nowhere", "no such file"):
        lists.read_videos("nowhere")
    os.makedirs(tmp("none"))
    with raises("none", "no videos"):
        lists.read_videos(tmp("none"))


@test
def test_paths():
    """A block of paths reads as a list does, also what is no UTF-8; links lead to their files."""
    texts = ["a b.mp4", "", "fünf/\udcff.mp4", "☃::x.mp4", *map(str, range(5000)), "\0 no\0 path"]
    paths = lists.Paths(iter(texts))
    assert [*paths] == [paths[i] for i in range(5005)] == paths[:] == texts and len(paths) == 5005
    assert paths[-1] == texts[-1] and paths[1:3] == texts[1:3] and not [*lists.Paths()]
    with contextlib.suppress(IndexError):
        raise AssertionError(paths[5005])
    folder = tmp("real")
    os.makedirs(os.path.join(folder, "in"))
    open(os.path.join(folder, "in", "x.mp4"), "w").close()
    os.symlink("x.mp4", os.path.join(folder, "in", "link.mp4"))
    os.symlink("in", os.path.join(folder, "as"))
    some = [os.path.join(folder, *names.split()) for names in (
        "in x.mp4", "as x.mp4", "in link.mp4", "as link.mp4", "in .. in x.mp4", "in no.mp4")]
    some += ["none/x.mp4", os.path.join(folder, "no", "x.mp4")]
    assert [*lists.real_paths(some)] == [os.path.realpath(path) for path in some]
    said = [*lists.describe(["a"], some[:5], [0] * 5, some[3:6], [0] * 3)]
    assert said[-2].startswith("4 training") and said[-1].startswith("1 of the 3"), said


@test
def test_missing_files():
    """What exists() denies is found, links and pictures of a set too, by one listing per folder."""
    folder = tmp("many")
    os.makedirs(folder)
    there = [os.path.join(folder, f"{i}.mp4") for i in range(20)]
    for path in there:
        open(path, "w").close()
    dangling, absent = os.path.join(folder, "dangling.mp4"), os.path.join(folder, "no.mp4")
    os.symlink("nowhere", dangling)
    made = dict(videos={"a.mp4": []}, failed={"b.mp4": "why"})
    stored = [f"{folder}::{name}.mp4" for name in "abc"]
    paths = [*there, absent, "none/x.mp4", dangling, *stored, absent]
    asked = []
    with (unittest.mock.patch.dict(prepared.INDEXES, {folder: made}),
          unittest.mock.patch.object(os.path, "exists", lambda path: asked.append(path))):
        assert lists.missing(paths) == [absent, "none/x.mp4", dangling, stored[2], absent]
    assert set(asked) == {absent, "none/x.mp4", dangling}


# ---------------------------------------------------------------- video/lists.py, video/tools.py

@test
def test_classes_and_splits():
    """Integers sort as numbers; unknown and missing labels are named; groups stay on one side."""
    assert lists.class_names(["10", "2", "2"]) == ["2", "10"]
    assert lists.class_names(["b", "10", "a"]) == ["10", "a", "b"]
    assert lists.class_ids(["b", "a"], ["a", "b"], ["x", "y"], "z") == [1, 0]
    with raises("'c'", "y.mp4", "a, b"):
        lists.class_ids(["a", "c"], ["a", "b"], ["x.mp4", "y.mp4"], "z")
    with raises("1 of 2", "no label", "y.mp4"):
        lists.class_ids(["a", None], ["a"], ["x.mp4", "y.mp4"], "z")
    source = tmp("all.tsv")
    rows = [f"{tmp()}/{label}/s{scene}_{i}.mp4\t{label}"
            for label, scene, i in itertools.product("ab", range(5), range(2))]
    os.makedirs(tmp("a"), exist_ok=True)
    open(tmp("a", "s0_0.mp4"), "w").close()
    open(source, "w").write("\n".join(rows))
    seen = []
    for fold in range(5):
        train, val = tmp("t.tsv"), tmp("v.tsv")
        with contextlib.redirect_stdout(None):
            tools.main(["split", source, train, val, "--fold", str(fold), "--group", r"/s\d_"])
        a, b = open(train).read().splitlines(), open(val).read().splitlines()
        assert sorted(a + b) == sorted(rows) and len(b) == 4
        scenes = lambda rows: {re.search(r"/s\d_", r)[0] for r in rows}
        assert not scenes(a) & scenes(b)
        seen += b
    assert sorted(seen) == sorted(rows)
    with contextlib.redirect_stdout(None):
        tools.main(["split", source, train, val])
    assert [r.split("\t")[1] for r in open(val).read().splitlines()] == ["a", "a", "b", "b"]
    with contextlib.redirect_stdout(None), raises("--group", "does not match"):
        tools.main(["split", source, train, val, "--group", "scene"])


def split(source, *flags):
    """Runs `data.py split` into a new folder -> rows for training, for validation, what it says."""
    out = [os.path.join(tempfile.mkdtemp(dir=tmp()), "new", name) for name in ("t.tsv", "v.tsv")]
    text = call(tools, "split", source, *out, *flags)
    return *(open(name).read().splitlines() for name in out), text


def label_files(name, counts, scenes=("",)):
    """A folder of files that are no videos: so many of each class from each scene."""
    for (label, count), (k, scene) in itertools.product(counts.items(), enumerate(scenes)):
        os.makedirs(tmp(name, label), exist_ok=True)
        for i in range(count[k] if isinstance(count, tuple) else count):
            with open(tmp(name, label, f"{scene}{i}.mp4"), "w") as f:
                f.write(f"{label} {scene} {i}")
    return tmp(name)


@test
def test_folds_of_the_right_size():
    """Folds part the videos, none is empty or over a third, or it is refused; counts are told."""
    source = label_files("threes", {f"c{i:02d}": 3 for i in range(24)})
    parts = [split(source, "--fold", fold) for fold in range(5)]
    assert sorted(sum((val for _, val, _ in parts), [])) == sorted(parts[0][0] + parts[0][1])
    assert all(13 <= len(val) <= 16 and len(train + val) == 72 for train, val, _ in parts)
    assert re.search(r"^c00 +2 +1$", parts[0][2], re.M) and "and 4 more classes" in parts[0][2]
    label_files("threes", dict(alone=1))
    assert not any("alone" in row for fold in range(5)
                   for row in split(source, "--fold", fold)[1])
    signers = label_files("signers", dict(a=(25, 15, 10), b=(25, 15, 10)), ("ann", "bob", "cat"))
    kept = [split(signers, "--group", "ann|bob|cat", "--fold", fold)[1] for fold in (0, 1)]
    assert [len(rows) for rows in kept] == [30, 20]
    nothing = tmp("nothing"), tmp("nothing_too")
    for fold, words in ((2, "50 of the 100"), (3, "have 0 of the 100")):
        flags = "--group", "ann|bob|cat", "--fold", fold
        text = mistake(tools, "split", signers, *nothing, *flags)
        assert words in text and "have 30, 20, 50, 0, 0" in text, text
    train, val, _ = split(signers, "--val_group", "/cat")
    assert len(train) == 80 and len(val) == 20 and all("/cat" in row for row in val)
    for pattern, words in (("dog", "takes 0 of the 100"), ("[", "'['"), ("mp4", "takes 100 of")):
        assert words in mistake(tools, "split", signers, *nothing, "--val_group", pattern)
    flags = "--val_group", "cat", "--fold", 1
    assert "leave out --folds" in mistake(tools, "split", signers, *nothing, *flags)
    ones = label_files("ones", dict(a=1, b=1))
    assert "0 of the 2" in mistake(tools, "split", ones, *nothing)
    assert not any(map(os.path.exists, nothing))


@test
def test_copies_stay_on_one_side():
    """Files of the same bytes are one group, whatever their classes; a like size is not enough."""
    source = label_files("twins", dict(a=10, b=10))
    shutil.copy(tmp("twins", "a", "0.mp4"), tmp("twins", "b", "0.mp4"))
    shutil.copy(tmp("twins", "a", "1.mp4"), tmp("twins", "a", "2.mp4"))
    parts = [split(source, "--fold", fold) for fold in range(5)]
    for train, val, text in parts:
        assert "byte-identical copies of other files: 2 (" in text, text
        for twins in (("a/0.", "b/0."), ("a/1.", "a/2.")):
            held = [sum(name in row for row in val for name in twins)]
            assert held in ([0], [2]), (twins, val)
    assert len({row for _, val, _ in parts for row in val}) == 20
    train, val, _ = split(source, "--val_group", "a/[1345]")
    assert sorted(row.split("/")[-1][0] for row in val) == list("12345")
    alike = [tmp(f"alike_{i}.mp4") for i in range(3)]
    for path, first in zip(alike, b"aba"):
        with open(path, "wb") as f:
            f.write(bytes([first]) + bytes(1 << 18))
    assert tools.copies(alike) == [[alike[0], alike[2]]]
    folder, videos = tmp("stored"), {}
    os.makedirs(folder)
    for i, content in enumerate((b"a" * 99, b"b" * 99, b"a" * 99)):
        with open(os.path.join(folder, "shard"), "ab") as f:
            videos[f"{i}.mp4"] = ["shard", 1, 1, 1, f.tell(), f.tell() + 99, 0]
            f.write(content)
    index = dict(form="raw", sampling_rate=1, rows=[], videos=videos, failed={})
    with unittest.mock.patch.dict(prepared.INDEXES, {folder: index}):
        paths = [f"{folder}::{name}" for name in (*videos, "gone.mp4")]
        assert tools.copies(paths) == [[paths[0], paths[2]]]


@test
def test_written_lists_hold_anywhere():
    """Lists of relative sources hold whole paths, of a set's videos too."""
    before = os.getcwd()
    label_files("from here", dict(a=5, b=5))
    try:
        os.chdir(tmp())
        rows = sum(split("from here")[:2], [])
        assert sorted(rows)[0] == f"{os.getcwd()}/from here/a/0.mp4\ta"
        with unittest.mock.patch.dict(prepared.INDEXES, {"set": {}}):
            tools.write_rows("of set.tsv", [("set::../from here/x.mp4", None)])
        assert open("of set.tsv").read() == f"{os.getcwd()}/set::../from here/x.mp4\n"
    finally:
        os.chdir(before)


@test
def test_check_sums_up():
    """check tells classes, lengths, rates, sizes, what is short, twice or doubly labelled."""
    a, b = odd_files()["no B-frames"], odd_files()["odd size"]
    copy, short = tmp("copy.mp4"), write("eight.mp4", numbered(8), g=12)
    shutil.copy(a, copy)
    rows = [(a, "x"), (b, "x"), (copy, "y"), (short, "z"), (short, "z"), (tmp("gone.mp4"), "x")]
    lists.write_list(tmp("summed.tsv"), rows)
    with as_script(tools, "check", tmp("summed.tsv"), "--num_workers", 1, "--num_frames", 10,
                   "--sampling_rate", 3, "--write_good", tmp("good", "a.tsv")) as out:
        assert tools.main() == 1
    for line in ("1 of them do not exist", "3 classes, 1 to 3 videos of each: x 3, y 1, z 2",
                 "frames: 8 to 40, median 40", "seconds: 0.32 to 1.6, median 1.6",
                 "frames per second: 25 (4)", "width x height: 96x64 (3), 97x63 (1)",
                 "1 of 4 are shorter than 30 frames", "1 rows name a file that another row names",
                 f"byte-identical copies of other files: 1 ({a} = {copy})",
                 f"  {a} (x) = {copy} (y)"):
        assert f"\n{line}" in out.getvalue(), (line, out.getvalue())
    assert len(lists.read_videos(tmp("good", "a.tsv"))[0]) == 5


@test
def test_imbalance_names_a_class_once():
    """Each class is named once where there are few, the ends where there are many."""
    said = lambda n: "\n".join(lists.describe(
        list("abcdefgh")[:n], ["x"], sum(([i] * 3 ** i for i in range(n)), []), [], []))
    assert "imbalanced: a 1, b 3, c 9;" in said(3)
    assert "imbalanced: a 1, b 3, c 9, ..., f 243, g 729, h 2187;" in said(8)


@test
def test_index_layouts():
    """Annotations of Kinetics, MiT, SSv2, UCF101, HMDB51 become lists of right paths and labels."""
    videos = tmp("videos")
    for name in ("jumping rope/abc_000001_000011.mp4", "12.webm", "Fencing/v_Fencing_g01_c01.avi",
                 "wave/x y.avi", "wave/z.avi", "adult+male+singing/yt_1,2.mp4"):
        os.makedirs(os.path.dirname(os.path.join(videos, name)), exist_ok=True)
        open(os.path.join(videos, name), "w").close()
    os.makedirs(tmp("notes"), exist_ok=True)
    note = lambda name, text: open(tmp("notes", name), "w").write(text)
    note("k.csv", "label,youtube_id,time_start,time_end,split\n"
                  "jumping rope,abc,1,11,train\njumping rope,gone,2,12,train\n")
    pushing = dict(id="12", label="x", template="Pushing [something] left", placeholders=["a"])
    note("s.json", json.dumps([pushing]))
    note("m.csv", '"adult+male+singing/yt_1,2.mp4",adult+male+singing,3,0\n'
                  "stacking/gone.mp4,stacking,3,1\n")
    note("u.txt", "Fencing/v_Fencing_g01_c01.avi 1\n")
    note("wave_test_split1.txt", "x y.avi 1 \nz.avi 2 \n")
    for layout, annotation, args, expect in (
            ("kinetics", "k.csv", [], "jumping rope/abc_000001_000011.mp4\tjumping rope"),
            ("ssv2", "s.json", [], "12.webm\tPushing something left"),
            ("moments", "m.csv", [], "adult+male+singing/yt_1,2.mp4\tadult+male+singing"),
            ("ucf101", "u.txt", [], "Fencing/v_Fencing_g01_c01.avi\tFencing"),
            ("hmdb51", "", ["--part", "test"], "wave/z.avi\twave"),
            ("hmdb51", "", [], "wave/x y.avi\twave")):
        out = tmp("list.tsv")
        with contextlib.redirect_stdout(None):
            tools.main(["index", layout, tmp("notes", annotation), videos, out, *args])
        assert open(out).read().splitlines() == [os.path.join(videos, expect)], layout
        assert lists.read_videos(out)[1] == [expect.split("\t")[1]]


# ---------------------------------------------------------------- video/pictures.py

@test
def test_text_is_drawn():
    """Letters appear in the picture and are cut off at its edge."""
    image = np.full((12, 20, 3), 255, np.uint8)
    pictures.draw_text(image, "I", 1, 1, 2)
    assert (image[1:3, 1:7] == 0).all() and (image[3:9, 3:5] == 0).all()
    assert (image[3:9, 1:3] == 255).all()
    pictures.draw_text(image, "WWWWWWWW", 9, 0, 2)


# ---------------------------------------------------------------- video/toy.py

@test
def test_toy_is_deterministic_and_moves():
    """The same clip twice; classes share first frames, move as their names say, are balanced."""
    for label, name in enumerate(toy.TOY_CLASSES):
        clip = toy.toy_clip(np.random.default_rng(3), label).astype(float)
        assert (clip == toy.toy_clip(np.random.default_rng(3), label)).all(), name
        assert clip.std() > 20, name
        other = toy.toy_clip(np.random.default_rng(3), 0)
        assert (clip[0] == other[0]).all(), "a single frame tells"
        # the whole-pixel shift that best explains the next change
        reach, inner = range(-10, 11), slice(10, -10)
        change = np.diff(clip[:3], axis=0)  # what rests is gone
        shifted = lambda dx, dy: np.roll(change[0], (dy, dx), (0, 1))
        error = {(dx, dy): abs(shifted(dx, dy) - change[1])[inner, inner].mean()
                 for dy in reach for dx in reach}
        dx, dy = min(error, key=error.get)
        toward = dict(left=(-1, 0), right=(1, 0), up=(0, -1), down=(0, 1))
        x, y = np.sum([toward[word] for word in name.split("_")], 0)
        assert 5 <= math.hypot(dx, dy) <= 10, name
        moved = np.array([dx, dy]) / math.hypot(dx, dy)
        assert np.allclose(moved, np.array([x, y]) / math.hypot(x, y), atol=0.1), name
    assert toy.TOY_TRAIN % 8 == toy.TOY_VAL % 8 == 0 and len(toy.TOY_CLASSES) == 8


@test
def test_toy_shapes():
    """The same clip twice; the shape goes its way after a first frame that does not tell it."""
    fields = [toy.waves(np.random.default_rng(i), 48) for i in range(3)]
    draw = lambda shape, way: toy.toy_shape_clip(np.random.default_rng(5), shape, way, fields, 6)
    clips = [draw(0, way) for way in range(4)]
    assert (clips[0] == draw(0, 0)).all()
    assert all((clips[0][0] == c[0]).all() and (clips[0][1:] != c[1:]).any() for c in clips[1:])
    assert len({draw(shape, 0)[0].tobytes() for shape in range(4)}) == 4
    plain, areas = [np.zeros((48, 48, 3))], []
    ways = enumerate(((0, 1), (1, 0), (0, -1), (-1, 0)))
    for shape, (way, (dy, dx)) in itertools.product(range(4), ways):
        masks = toy.toy_shape_clip(np.random.default_rng(5), shape, way, plain, 3)[..., 0] != 128
        steps = [d for d in range(1, 6)
                 if (np.roll(masks[0], (d * dy, d * dx), (0, 1)) == masks[1]).all()]
        assert len(steps) == 1 and masks.sum((1, 2)).std() == 0, (way, steps)
        areas.append(masks[0].sum())
    assert max(areas) < 1.2 * min(areas), areas  # of one size


@test
def test_toy_movies():
    """The toy AVA set is deterministic; boxes hold the figures; an odd folder is not touched."""
    movie, rows = toy.toy_movie(np.random.default_rng([0, 0]))
    assert movie.shape == (288, 64, 96, 3)
    assert np.array_equal(movie, toy.toy_movie(np.random.default_rng([0, 0]))[0])
    still = np.median(movie.astype(int), 0)
    for second, (x1, y1, x2, y2), ids in rows:
        assert len([c for c in ids if c < 5]) == 1 and second % 3
        assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
        frame = np.abs(movie[second * 12] - still).max(-1) > 60
        if {2, 3} & set(ids):  # who walks differs from the background
            top, bottom, left, right = (round(x) for x in (y1 * 64, y2 * 64, x1 * 96, x2 * 96))
            assert frame[top:bottom, left:right].mean() > 0.15
    assert {c for _, _, ids in rows for c in ids} <= set(toy.TOY_NAMES)
    os.makedirs(tmp("odd_toy"))
    with raises("odd_toy", "move it away"):
        toy.make_toy_movies(tmp("odd_toy"))


@test
def test_lists_overwrite_no_video():
    """A list is not written over a video; more folds than videos, and others' rows, are refused."""
    folder = os.path.join(tempfile.mkdtemp(dir=tmp()), "set")
    shutil.copytree(toy_videos(), folder)
    video = next(path for path in lists.read_videos(folder)[0])
    before = open(video, "rb").read()
    labelled = tmp("over_own.tsv")
    lists.write_list(labelled, [(path, "ab"[i % 2])
                                for i, path in enumerate(lists.read_videos(folder)[0])])
    other = tmp("over_v.tsv")
    for args in (["split", labelled, video, other], ["split", labelled, other, video],
                 ["check", folder, "--write_good", video, "--num_workers", 1]):
        text = mistake(tools, *args)
        assert video in text and "a list to write" in text, text
    assert open(video, "rb").read() == before and not os.path.exists(other)
    text = mistake(tools, "split", labelled, tmp("over_t.tsv"), tmp("over_v.tsv"), "--folds", 10**6)
    assert "--folds 1000000" in text, text
    with open(tmp("tsn.txt"), "w") as f:
        f.writelines(f"{path} 24 {i % 2}\n" for i, path in enumerate(lists.read_videos(folder)[0]))
    with raises("tsn.txt", "two numbers"):
        lists.read_videos(tmp("tsn.txt"))
