"""video/frames.py: folders of numbered pictures, as videos."""

import itertools
import multiprocessing
import os
import shutil

import numpy as np
import torch

import data
import eval as evaluate
import finetune
import pretrain
import pretrain_moco
import pretrain_vicmae
import probe
from ava.files import find_movies
from ava.movie import draw_movie, whole_frames
from lib.views import TestVideos
from tests.common import TUNE, call, mistake, numbered, numbers, raises, test, tmp, write
from video import decode, frames, lists, pictures, prepared, tools


def frame_folder(name, pattern="img_{:05d}.png", first=1, n=40, h=24, w=40):
    """A folder of the numbered frames as pictures, and of files that are none -> its path."""
    frames.set_rate(25)  # whatever a script was told before
    os.makedirs(tmp(name))
    for i, picture in enumerate(numbered(n, h, w), first):
        pictures.write_png(tmp(name, pattern.format(i)), picture)
    for other in ("Thumbs.db", "notes.txt", "._1.png"):
        open(tmp(name, other), "w").close()
    return tmp(name)


@test
def test_frames_are_a_lossless_videos():
    """Clips of every stage and a prepared set of a frame folder are bit for bit those of a file."""
    folder = frame_folder("lossless/clip")
    file = write("lossless/clip.mkv", numbered(40, 24, 40), codec="ffv1", pix_fmt="bgr0")
    clip = (8, (16, 16), 2)
    kinds = [lambda p: data.PretrainClips(p, *clip), lambda p: data.PretrainClips(p, *clip, fps=10),
             lambda p: data.FinetuneClips(p, [0], *clip, fps=12.5, max_side=20),
             lambda p: data.ViewPairs([], p, img_size=(16, 16)),
             lambda p: TestVideos(p, *clip, num_segments=3)]
    for kind, epoch in itertools.product(kinds, range(3)):
        ours, theirs = kind([folder]), kind([file])
        if isinstance(ours, TestVideos):
            a, b = ours[0][1:3], theirs[0][1:3]
        else:
            key = (epoch, 0) + (True,) * isinstance(ours, data.ViewPairs)
            (a, bad), (b, _) = ours[key], theirs[key]
            assert not bad, bad
            a, b = ([x] if torch.is_tensor(x) else x for x in (a, b))
        assert all(map(torch.equal, a, b))
    stored = []
    for path in (folder, file):
        settings = dict(form="raw", sampling_rate=2, short_side=20, quality=2, shard_videos=16)
        out = tmp("lossless", f"set{len(stored)}")
        prepared.prepare([(path, "x")], out, settings, 1, False, lambda *a, **k: None)
        stored.append(open(os.path.join(out, "000000.raw"), "rb").read())
    assert stored[0] == stored[1]
    with prepared.open_movie(folder) as a, prepared.open_movie(file) as b:
        for seconds in (np.array([[0.3, 0.31], [1.5, 9]]), np.array([-1.0])):
            (x, i), (y, k) = a.at(seconds), b.at(seconds)
            assert (x[i] == y[k]).all()
        with raises("ends at 1.56 s"):
            a.at(np.array([8.0]))


@test
def test_frames_go_by_number():
    """Any prefix, padding, first number; other files do not count; --frame_rate is the clock."""
    for k, (pattern, first) in enumerate((("{}.png", 0), ("{:04d}.PNG", 1), ("frame{}.png", 98),
                                          ("a 2_{:02d}.png", 95))):
        folder = frame_folder(f"named{k}", pattern, first, n=12)
        with prepared.open_video(folder) as video:
            wanted = [11, 0, 5, 5]
            assert len(video) == 12 and (numbers(video.frames(wanted)) == wanted).all(), pattern
            assert (video.times == np.arange(12) * (1 / 25)).all()
            with raises(folder, "frames 3..12 wanted"):
                video.frames([3, 12])
    text = call(tools, "check", folder, "--frame_rate", 10, "--num_workers", 1, "--full")
    assert "1 of 1 videos are folders of numbered pictures, 10 a second" in text
    assert "frames per second: 10 (1)" in text and "12 frames; every" in text, text
    frames.set_rate(12.5)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(frames.get_rate) == 12.5
    out = tmp("rates")
    call(tools, "prepare", folder, out, "--frame_rate", 10, "--num_workers", 1)
    with prepared.open_video(f"{out}::{folder}") as video:
        assert video.times[1] == 0.1
    assert "frame_rate is 10.0, not 25.0" in mistake(tools, "prepare", folder, out)


@test
def test_odd_frames_are_named():
    """A gap, a number that comes twice, another size or series, a damaged picture: an error."""
    def spoiled(name, spoil):
        folder = frame_folder(f"odd/{name}", n=8, w=80 if name == "wide" else 40)
        spoil(lambda i: os.path.join(folder, f"img_{i:05d}.png"))
        return folder
    wide = spoiled("wide", lambda path: None)
    spoils = {
        "gap": (lambda path: os.remove(path(4)), "img_00003.png is followed by img_00005.png"),
        "twice": (lambda path: shutil.copy(path(4), path(4).replace("000", "")),
                  "frame 4 is there twice"),
        "series": (lambda path: shutil.copy(path(4), path(4).replace("img", "other")),
                   "holds other_00004.png"),
        "cover": (lambda path: shutil.copy(path(4), path(4).replace("img_00004", "cover")),
                  "holds cover.png"),
        "size": (lambda path: shutil.copy(os.path.join(wide, "img_00004.png"), path(4)),
                 "img_00004.png: is 80x24 pixels, img_00001.png 40x24"),
        "cut": (lambda path: os.truncate(path(4), 200), "img_00004.png: no frame could be"),
        "none": (lambda path: [os.remove(path(i)) for i in range(1, 9)], "without pictures")}
    paths = [spoiled(name, spoil) for name, (spoil, _) in spoils.items()]
    for path, (_, why) in zip(paths, spoils.values()):
        with raises(path, why), prepared.open_video(path) as video:
            video.frames(range(8))
        with raises(path, why), prepared.open_video(path) as video:
            video.check()
    for name in ("size", "cut"):  # only what is read is looked at
        with prepared.open_video(tmp("odd", name)) as video:
            video.frames([0, 1, 7])
    jpeg = write("odd/0.jpg", numbered(1, 64, 96), codec="mjpeg", pix_fmt="yuvj420p")
    os.makedirs(tmp("odd/jpeg"))
    shutil.copy(jpeg, tmp("odd/jpeg/0.jpg"))
    with prepared.open_video(tmp("odd/jpeg")) as video:
        video.check()
        os.truncate(tmp("odd/jpeg/0.jpg"), os.path.getsize(jpeg) - 400)
        with raises("odd/jpeg/0.jpg"):  # half a JPEG, whose rest FFmpeg would make up
            video.check()


@test
def test_folders_of_frames_or_of_pictures():
    """Frame folders in class folders, flat, beside files; pictures where one frame is wanted."""
    root = tmp("mixed")
    for name in ("wave/clip1", "wave/clip 2", "jump/clip1"):
        frame_folder(f"mixed/{name}", n=3)
    write("mixed/jump/b.mp4", numbered(3, 24, 40))
    pictures.write_png(tmp("mixed/jump/still.png"), numbered(1)[0])
    names = lambda paths: [os.path.relpath(path, root) for path in paths]
    paths, labels = lists.read_videos(root)
    assert names(paths) == ["jump/b.mp4", "jump/still.png", "jump/clip1", "wave/clip 2",
                            "wave/clip1"]
    assert labels == ["jump"] * 3 + ["wave"] * 2
    assert lists.read_videos(tmp("mixed/wave"))[1] == [None] * 2
    clip = tmp("mixed/wave/clip1")
    assert lists.read_videos(clip + "/") == ([clip], [None])
    alone, labels = lists.read_videos(root, folders=False)
    assert len(alone) == 11 and len(names(alone)[-1].split("/")) == 3 and labels[-1] == "wave"
    source = tmp("mixed.tsv")
    tools.write_rows(source, list(zip(paths, ["x"] * 5)))
    assert lists.read_videos(source) == lists.read_videos(source, folders=False)
    assert lists.read_videos(source)[0] == paths and not lists.missing(paths)
    open(source, "w").write("wave/clip1/ x\nwave/gone x\n")
    paths, _ = lists.read_videos(source, root)
    assert paths[0] == clip and lists.missing(paths) == [tmp("mixed/wave/gone")]
    shutil.copytree(clip, tmp("mixed/jump/same"))  # byte-identical, but for its notes
    open(tmp("mixed/jump/same/notes.txt"), "w").write("other")
    jump = lambda i: tmp(f"mixed/jump/clip1/img_0000{i}.png")
    for a, b in ((2, 9), (3, 2), (9, 3)):  # as large as the others, in another order
        os.rename(jump(a), jump(b))
    same = tools.copies(lists.read_videos(root)[0])
    assert [sorted(names(group)) for group in same] == [["jump/same", "wave/clip 2", "wave/clip1"]]
    pics = [tmp(f"stills/{label}/{i}.png") for label in "ab" for i in (1, 2, 5, 9, 11)]
    for i, path in enumerate(pics):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        pictures.write_png(path, np.full((32, 32, 3), 20 * i, np.uint8))
    train, val = tmp("stills.tsv"), tmp("stills_val.tsv")
    call(tools, "split", tmp("stills"), train, val)
    assert sorted(lists.read_videos(train)[0] + lists.read_videos(val)[0]) == sorted(pics)
    shutil.copytree(tmp("stills"), tmp("deep/c/images"))
    assert "2 of 2 videos are folders" in call(tools, "split", tmp("deep"), train, val)
    call(tools, "split", tmp("deep"), train, val, "--num_frames", 1)
    assert len(lists.read_videos(train)[0]) == 8
    text = call(tools, "check", tmp("stills"), "--num_frames", 1, "--num_workers", 1)
    assert "10 of 10 files can be read" in text, text
    annotation = tmp("ids.json")
    open(annotation, "w").write('[{"id": "clip1", "template": "t"}, {"id": "b", "template": "t"}]')
    call(tools, "index", "ssv2", annotation, tmp("mixed/jump"), source)
    assert names(lists.read_videos(source)[0]) == ["jump/clip1", "jump/b.mp4"]


@test
def test_stages_take_frame_folders():
    """Training, testing, predicting on frame folders; image models see each picture by itself."""
    for label, name in itertools.product("xy", "1234"):
        frame_folder(f"staged/{label}/{name}", n=6, h=32, w=32)
    root, says = tmp("staged"), "8 of 8 videos are folders of numbered pictures, 30 a second"
    common = ["--num_workers", 1, "--device", "cpu", "--dtype", "fp32"]
    tiny = "--size tiny --img_size 16 --patch_size 8 --batch_size 4 --max_steps 1".split()
    tiny += [*common, "--warmup_epochs", 0]
    head = ["--proj_width", 32, "--proj_dim", 8]
    clips = "--num_frames 4 --sampling_rate 1 --frame_rate 30".split()
    text = call(pretrain, "--data", root, *tiny, *clips, "--out_dir", tmp("staged_pre"))
    assert says in text, text
    text = call(pretrain_vicmae, "--data", root, "--images", root, *tiny, *head, "--mask_ratio",
                0.5, "--out_dir", tmp("staged_vic"), "--vis_every", "never", "--frame_rate", 30)
    assert says in text and text.count("folders of numbered") == 1, text  # of --data alone
    for stage, more in ((pretrain, []), (pretrain_moco, head)):
        text = call(stage, "--data", root, *tiny, *more, "--num_frames", 1, "--tubelet_size", 1,
                    "--out_dir", tmp(f"one_{stage.__name__}"))
        assert "48 videos, tiny" in text, text
    text = mistake(finetune, "--data", tmp("staged/x"), *tiny, *clips, "--out_dir", tmp("no_run"))
    assert "have no label" in text and "--num_frames 1" in text, text
    text = mistake(pretrain, "--data", root, *tiny, *clips[:-1], 24, "--out_dir", tmp("staged_pre"))
    assert "frame_rate 30.0 -> 24.0" in text, text
    for out, init, length, kind in (("staged_clips", "staged_pre", 4, "8 videos"),
                                    ("staged_stills", "staged_vic", 1, "48 videos")):
        text = call(finetune, *TUNE, "--init", tmp(init, "last.pt"), "--data", root, "--max_steps",
                    1, "--num_frames", length, "--out_dir", tmp(out))
        assert f"{kind} of 2 classes" in text, text
        text = call(probe, "--init", tmp(init, "last.pt"), "--data", root, *common,
                    "--batch_size", 4, "--max_steps", 1, "--out_dir", tmp(f"{out}_probe"))
        assert f"{kind} of 2 classes" in text, text
        text = call(evaluate, "--ckpt", tmp(out, "last.pt"), "--data", root, *common,
                    "--num_segments", 1, "--num_crops", 1, "--out_dir", tmp(out))
        assert f"{kind} x 1 clips" in text, text
    text = call(evaluate, "--ckpt", tmp("staged_clips", "last.pt"), "--predict",
                tmp("staged/x/1/"), "--window", 0.1, "--frame_rate", 10, *common,
                "--out_dir", tmp("staged_clips"))
    assert text.count(" s: ") == 5 and "0.40 to 0.50 s" in text, text


@test
def test_a_movie_of_frames():
    """Detection finds a movie that is a frame folder by its name, and draws into all its frames."""
    folder = frame_folder("movies/film.one", n=40)
    assert find_movies(tmp("movies"), ["film.one"]) == {"film.one": folder}
    rows = whole_frames(folder, "film.one", 0.0)
    assert rows.keys == [("film.one", 0), ("film.one", 1)]
    assert draw_movie(folder, tmp("film.mp4"), rows, {0: "act"}, 0.5, 0.0) == 40
    with decode.VideoReader(tmp("film.mp4")) as video:
        assert len(video) == 40 and abs(video.times[-1] - 39 / 25) < 1e-3
