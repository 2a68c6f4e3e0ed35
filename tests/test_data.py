"""data.py: samplers, crops and the data sets of the stages."""

import argparse
import functools
import os
import re
import unittest.mock

import numpy as np
import torch

import data
import eval as evaluate
import finetune
import pretrain
import pretrain_moco
import pretrain_vicmae
from lib import feed
from lib.process import Process
from tests.common import (TUNE, call, labelled, mistake, numbered, numbers, odd_files, raises, run,
                          test, tmp, toy_videos, write)
from video import decode, lists, pictures, prepared, tools


@test
def test_samplers():
    """Dense, sparse, by-time indices equal hand-computed ones; the start is uniform."""
    class Low:
        integers = staticmethod(lambda n: 0)
        random = staticmethod(lambda n=None: 0.0 if n is None else np.zeros(n))
    class High:
        integers = staticmethod(lambda n: n - 1)
        random = staticmethod(lambda n=None: 0.999 if n is None else np.full(n, 0.999))
    assert data.sample_dense(Low, 100, 16, 4).tolist() == list(range(0, 64, 4))
    assert data.sample_dense(High, 100, 16, 4).tolist() == list(range(36, 100, 4))
    assert data.sample_dense(High, 10, 8, 4).tolist() == [0, 4, 8, 8, 8, 8, 8, 8]
    assert data.sample_sparse(Low, 32, 4).tolist() == [0, 8, 16, 24]
    assert data.sample_sparse(High, 32, 4).tolist() == [7, 15, 23, 31]
    assert data.sample_sparse(High, 2, 4).tolist() == [0, 0, 1, 1]
    times = np.array([0, 0.1, 0.2, 0.5, 0.6, 1.0]) + 7
    assert data.sample_by_time(Low, times, 4, 4).tolist() == [0, 2, 3, 4]
    assert data.sample_by_time(Low, times[:1], 3, 4).tolist() == [0, 0, 0]
    starts = {int(data.sample_dense(np.random.default_rng(s), 66, 16, 4)[0]) for s in range(100)}
    assert starts == {0, 1, 2}


@test
def test_sparse_sampling_of_the_papers_code():
    """Segments of n // 16 frames from 0, so never the end, of n < 16 frame 0; ours reach all."""
    rngs = [np.random.default_rng(s) for s in range(300)]
    for n, count in ((31, 16), (10, 1), (80, 80), (85, 80)):
        theirs = np.stack([data.sample_sparse_reference(rng, n, 16) for rng in rngs])
        assert np.unique(theirs).tolist() == list(range(count)), n
        assert (theirs // max(n // 16, 1) == (np.arange(16) if n >= 16 else 0)).all()
        ours = np.stack([data.sample_sparse(rng, n, 16) for rng in rngs])
        assert np.unique(ours).tolist() == list(range(n)), n
    path = write("sparse.mp4", numbered(31, 32, 48), g=8)
    for sampling, last in (("sparse-reference", 3 * 7 + 6), ("sparse", 30)):
        clips = data.FinetuneClips([path], [0], 4, (32, 48), sampling=sampling, rand_aug=(0, 0, 0),
                                   crop_area=(1, 1), crop_aspect=(1.5, 1.5), flip=False)
        shown = [numbers(clips[epoch, 0][0][0][0].numpy()).tolist() for epoch in range(40)]
        assert max(max(clip) for clip in shown) == last and min(map(min, shown)) == 0, sampling


@test
def test_finetuning_windows_and_timelines():
    """Dense indices are 0 4 8 12 17 ... 63; other lengths and rates equal those by hand."""
    class Low:
        integers = staticmethod(lambda n: 0)
    class High:
        integers = staticmethod(lambda n: n - 1)
    window = [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]
    assert data.sample_window(Low, 100, 16, 4).tolist() == window
    assert data.sample_window(High, 100, 16, 4).tolist() == [36 + i for i in window]
    assert data.sample_window(Low, 65, 16, 4).tolist() == window
    assert data.sample_window(Low, 30, 16, 4).tolist() == [0, 5, 10, 15, 20, 25] + 10 * [29]
    assert data.sample_window(Low, 1, 4, 4).tolist() == [0, 0, 0, 0]
    times = np.arange(64) / 32 + 5  # 2 s at 32 fps
    assert data.timeline(times, None).tolist() == list(range(64))
    assert data.timeline(times, 8).tolist() == list(range(0, 64, 4))
    # the earlier one of two
    assert data.timeline(times, 64).tolist() == [i // 2 for i in range(127)]
    assert data.timeline(np.array([0, 0.1, 0.5, 0.6, 1.0]), 4).tolist() == [0, 1, 2, 3, 4]
    assert decode.short_side(240, 321, 224) == (224, 299)
    assert decode.short_side(321, 240, 224) == (299, 224)


@test
def test_crops():
    """Multi-scale crops lie inside and reach all 13 anchors; crop_resize puts pixels in place."""
    seen = set()
    for s in range(2000):
        y, x, h, w = data.multi_scale_crop(np.random.default_rng(s), 256, 340)
        assert 0 <= y <= 256 - h and 0 <= x <= 340 - w
        sides = [256, 224, 192, 168]
        assert abs(sides.index(h) - sides.index(w)) <= 1
        if (h, w) == (192, 224):
            seen.add((y // 16, x // 29))
    assert seen == {(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2),
                    (1, 1), (1, 3), (3, 1), (3, 3)}
    clip = np.random.default_rng(0).integers(0, 255, (2, 20, 30, 3), dtype=np.uint8)
    assert (data.crop_resize(clip, (3, 5, 8, 10), 8, 10).numpy() == clip[:, 3:11, 5:15]).all()
    flat = np.repeat(np.repeat(clip[:, ::4, ::4], 4, 1), 4, 2)[:, :20, :28]
    down = data.crop_resize(flat, (0, 0, 20, 28), 5, 7).numpy().astype(int)
    blocks = flat.reshape(2, 5, 4, 7, 4, 3)[:, :, 0, :, 0].astype(float)
    pad = np.pad(blocks, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")[:, 1:-1, 1:-1]
    near = ((.125, -1), (.75, 0), (.125, 1))  # antialiased: weights .125 .75 .125 of the neighbours
    expect = sum(a * b * blocks[:, 2 + i, 3 + j] for a, i in near for b, j in near)
    assert abs(down[:, 2, 3] - expect).max() <= 1 and pad.shape == blocks.shape


@test
def test_clips_do_not_depend_on_workers():
    """A step's clips are the same from 0, 1, 2 workers; clips of one decode differ."""
    paths, _ = lists.read_videos(toy_videos())
    made = []
    for workers in (0, 1, 2):
        ds = data.PretrainClips(paths, 4, (32, 32), 2, repeat_aug=2, flip=True, seed=5)
        batches = feed.Batches(12, 4, 1, 0, 1, 2, 6, 5)
        loader = feed.make_loader(ds, batches, workers, torch.device("cpu"))
        made.append([clips for clips, _ in loader])
    assert len(made[0]) == 4 and made[0][0].shape == (8, 4, 32, 32, 3)
    assert made[0][0].dtype == torch.uint8
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*made))
    assert not torch.equal(made[0][0][0], made[0][0][1])


@test
def test_bad_videos_are_replaced_and_named():
    """A broken file is named and gives way to another one; ten in a row give None."""
    paths, _ = lists.read_videos(toy_videos())
    broken = tmp("broken", "broken.mp4")
    os.makedirs(tmp("broken"))
    open(broken, "w").write("x")
    ds = data.PretrainClips(paths + [broken], 4, (32, 32), 1)
    clip, bad = ds[0, len(paths)]
    assert [p for p, _ in bad] == [broken] * len(bad) and bad and broken in bad[0][1]
    assert torch.equal(clip, ds[0, len(paths)][0])
    assert data.PretrainClips([broken], 4, (32, 32), 1)[0, 0][0] is None
    out = run("data.py", "check", tmp("broken"), "--full", ok=False, cwd=toy_videos())
    assert "broken.mp4: cannot be opened" in out


@test
def test_what_was_read_can_be_written():
    """check and split write every name that they read from a list, or nothing of a list."""
    read_list = lambda *args: [*lists.read_list(*args)]
    os.makedirs(tmp("odd names"))
    names = ["my clip", "x.mp4 y", ",a", "#c", "a\tb", " s ", "a.mp4\u2028.mkv", "plain"]
    for i, name in enumerate(names):
        with open(tmp("odd names", name), "wb") as f:
            f.write(open(os.path.join(toy_videos(), f"{i}.mp4"), "rb").read())
    rows = [(name, f"class {i % 2}") for i, name in enumerate(names)]
    source, good = tmp("odd.tsv"), tmp("good.tsv")
    with open(source, "w", encoding="utf-8") as f:
        f.writelines(f'"{name}" {label}\n' for name, label in rows)
    assert read_list(source, tmp("odd names")) == [(tmp("odd names", a), b) for a, b in rows]
    lists.write_list(good, rows)  # bare names: what a row begins with
    assert read_list(good, tmp("odd names")) == [(tmp("odd names", a), b) for a, b in rows]
    call(tools, "check", source, "--data_root", tmp("odd names"), "--write_good", good,
         "--num_workers", 1)
    assert read_list(good, "") == [(tmp("odd names", a), b) for a, b in rows]
    call(tools, "split", source, tmp("a.tsv"), tmp("b.tsv"), "--data_root", tmp("odd names"))
    parts = [row for name in ("a.tsv", "b.tsv") for row in read_list(tmp(name), "")]
    assert sorted(parts) == sorted(read_list(good, ""))
    before = open(good).read()
    with raises(good, "no\\nname.mp4", "nothing is written"):
        lists.write_list(good, [*rows, ("no\nname.mp4", None)])
    assert open(good).read() == before
    with open(source, "w") as f:
        f.write("my clip\n")
    with raises(source, "in double quotes"):
        read_list(source, tmp("odd names"))


@test
def test_pictures_are_no_clips():
    """Pictures asked for clips of 16 frames are refused, and what to do with frames is said."""
    paths = [tmp("frames", label, f"{i}.png") for label in ("left", "right") for i in (1, "cover")]
    for path in paths:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        pictures.write_png(path, np.zeros((32, 32, 3), np.uint8))
    mixed = [*lists.read_videos(toy_videos())[0], *paths]
    says = "4 of 16 files are pictures", paths[0], "16 times", "--num_frames 1", "numbered pictures"
    for make in (lambda p, n: data.PretrainClips(p, n, (32, 32), 1),
                 lambda p, n: data.FinetuneClips(p, [0] * len(p), n, (32, 32), 1),
                 lambda p, n: data.ViewPairs(p, [], num_frames=n, img_size=(32, 32))):
        with raises(*says):
            make(mixed, 16)
        make(mixed, 1)
    stored = [f"{tmp('a_set')}::{path}" for path in paths]
    with raises("4 of 4 files are pictures", stored[0]):
        lists.refuse_pictures(stored, 16)
    lists.refuse_pictures(stored, 1)
    for script in (pretrain, pretrain_moco, finetune):
        text = mistake(script, "--data", tmp("frames"), "--size", "tiny", "--device", "cpu",
                       "--batch_size", 2, "--out_dir", tmp("no_run"))
        assert "4 of 4 files are pictures" in text and paths[0] in text, text


@test
def test_missing_files_are_said_first():
    """Every stage and the test count the files that do not exist; more than --max_bad: an error."""
    train, _ = labelled()
    some = tmp("some_gone.tsv")
    gone = [tmp(f"gone_{i}.mp4") for i in range(12)]
    rows = open(train).read() + "".join(f"{path}\tx class\n" for path in gone)
    open(some, "w").write(rows)
    for script in (pretrain, pretrain_moco, pretrain_vicmae, finetune):
        text = mistake(script, "--data", some, "--device", "cpu", "--batch_size", 2, "--max_bad",
                       0.49, "--out_dir", tmp("no_run"))
        for words in ("12 of 24 files do not exist", gone[0], "max_bad 0.49", "--write_good"):
            assert words in text, (script, text)
    text = call(finetune, *TUNE, "--data", some, "--val_data", some, "--max_bad", 0.9,
                "--max_steps", 1, "--out_dir", tmp("half_gone"))
    assert text.count("12 of 24 files do not exist") == 2 and "validation at step 1" in text, text
    assert text.count(gone[9]) == 2 and gone[10] not in text, text  # ten of each list
    rows = open(train).read().splitlines(True)[:2] + rows.splitlines(True)[-1:] * 4
    open(tmp("one_gone.tsv"), "w").writelines([*rows, f"{toy_videos()}/1.mp4\ty class\n"])
    text = call(finetune, *TUNE, "--data", tmp("one_gone.tsv"), "--max_bad", 0.9, "--max_steps", 9,
                "--out_dir", tmp("one_gone"))
    assert re.search(r"\d\d bad reads of 1 files", text), text
    text = call(evaluate, "--ckpt", tmp("half_gone", "last.pt"), "--data", some,
                "--num_segments", 1, "--num_crops", 1, "--num_workers", 0, "--device", "cpu",
                "--out_dir", tmp("gone"))
    assert text.index("12 of 24 files do not exist") < text.index("top-1"), text


@test
def test_short_videos_are_said_first():
    """A run says how many videos are shorter than a clip: of sets all, of files a sample."""
    paths = 20 * [odd_files()["no B-frames"]]  # 40 frames at 25 fps
    said = lambda kind, *args, **kw: " ".join(kind(paths, *args, **kw).notes())
    tune = functools.partial(data.FinetuneClips, paths, [0] * 20)
    assert not said(data.PretrainClips, 14, stride=3)  # 13 * 3 + 1
    assert "14 frames spans 53 of a video: 20 of 20 videos looked at" in said(
        data.PretrainClips, 14, stride=4)
    assert not tune(10, stride=4).notes() and "spans 44 " in tune(11, stride=4).notes()[0]
    assert not tune(10, stride=2, fps=12.5).notes()  # 20 frames
    assert "spans 22 of a video at 12.5 fps" in tune(11, stride=2, fps=12.5).notes()[0]
    assert not said(data.PretrainClips, 20, fps=12.5)
    assert said(data.PretrainClips, 21, fps=12.5) and said(data.PretrainClips, 41, sampling="s")
    assert not said(data.PretrainClips, 40, stride=4, sampling="s") and not tune(1).notes()
    assert "spans 41 " in said(data.ViewPairs, [], 11) and not said(data.ViewPairs, [], 10)
    videos = {f"{n}.mp4": ["shard", n] for n in range(30, 90)}
    stored = dict(sampling_rate=1, videos=videos, failed={"bad.mp4": "why"})
    with unittest.mock.patch.dict(prepared.INDEXES, a_set=stored):
        paths = [f"a_set::{name}" for name in [*videos, "bad.mp4"]]
        assert "spans 61 of a video: 31 of 60 videos are shorter" in said(data.PretrainClips)
    text = call(pretrain, *"--size tiny --patch_size 8 --img_size 16 --num_frames 16".split(),
                "--data", odd_files()["no B-frames"], "--device", "cpu", "--num_workers", 0,
                "--max_steps", 1, "--batch_size", 1, "--sampling_rate", 3,
                "--out_dir", tmp("short"))
    assert text.index("spans 46 of a video: 1 of 1 videos") < text.index("1 videos, tiny"), text


@test
def test_ranks_agree_on_missing_files():
    """One rank of a machine looks; what the worst machine lacks is an error on all ranks."""
    flags = argparse.Namespace(device="cpu", dtype="fp32", num_workers=0, frame_rate=25)
    look = unittest.mock.Mock(return_value=[])
    for local_rank in range(2):
        process = Process(flags, quiet=True)
        process.local_rank = local_rank
        process.gather = lambda mine: [mine, (0, []), (3, ["a.mp4", "b.mp4", "c.mp4"])]
        with unittest.mock.patch.object(lists, "missing", look), raises("3 of 12", "a.mp4"):
            process.videos([toy_videos()], "", "", max_bad=0.2)
        assert look.call_count == 1


@test
def test_finetuning_clips():
    """Labels follow the video that was read; repeated views show the same frames."""
    folder = toy_videos()
    paths = sorted(lists.read_videos(folder)[0])
    broken = tmp("broken_ft.mp4")
    open(broken, "w").write("x")
    plain = dict(num_frames=4, img_size=(48, 48), stride=2, rand_aug=(0, 0, 0), crop_area=(1, 1),
                 crop_aspect=(1, 1), flip=False, erase_prob=0)
    ids = list(range(len(paths)))
    ds = data.FinetuneClips(paths + [broken], ids + [99], repeat_aug=2, seed=3, **plain)
    (clip, labels, boxes), bad = ds[0, len(paths)]
    assert [p for p, _ in bad] == [broken] * len(bad) and bad and labels[0] == labels[1] != 99
    with decode.VideoReader(paths[labels[0]]) as video:
        frames = torch.from_numpy(video.frames(range(len(video))))
    assert torch.equal(clip[0], clip[1]) and (boxes == 0).all()
    first = (frames == clip[0, 0]).flatten(1).all(1).nonzero().item()
    assert torch.equal(clip[0], frames[first + torch.tensor([0, 2, 5, 7])])
    full = data.FinetuneClips(paths, ids, 4, (32, 32), 2, repeat_aug=2, seed=3)
    batches = feed.Batches(12, 4, 1, 0, 1, 0, 4, 3)
    loaders = [feed.make_loader(full, batches, n, torch.device("cpu")) for n in (0, 2)]
    for (a, _), (b, _) in zip(*loaders, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b)) and a[0].shape == (8, 4, 32, 32, 3)
        assert a[1].tolist()[::2] == a[1].tolist()[1::2] and not torch.equal(a[0][0], a[0][1])
    half = [data.FinetuneClips(paths, ids, **plain | dict(img_size=(16, 24)), antialias=a)[0, 1]
            for a in (False, True)]  # the same frames
    with decode.VideoReader(paths[half[0][0][1][0]]) as video:
        frames = torch.from_numpy(video.frames(range(len(video))))
    for antialias, ((clip, *_), _) in zip((False, True), half):
        small = decode.resize(frames, 16, 24, antialias)
        assert any(torch.equal(clip[0, 0], frame) for frame in small)
    assert not torch.equal(half[0][0][0], half[1][0][0])
    small_side = data.FinetuneClips(paths, [0] * 12, max_side=20).reduced
    assert small_side(40, 60) == (20, 30) and small_side(18, 60) == (18, 60)


@test
def test_view_pairs():
    """Frames `gap` apart on average, of pictures the same twice; batches hold both kinds."""
    square = write("pairs.mp4", numbered(40, 96, 96), g=12)
    pairs = data.ViewPairs([square], [square], gap=8, img_size=(96, 96), area=(1, 1),
                           image_area=(1, 1), image_color=False)
    plain = unittest.mock.patch.object(data, "view", lambda rng, clip, *a, **k: clip)
    with plain:
        load = lambda seed: pairs.load(0, np.random.default_rng(seed), False)[0, :, 0]
        first, second = zip(*(numbers(load(seed).numpy()) for seed in range(300)))
        gaps = np.array(second).astype(int) - np.array(first)
        assert gaps.min() >= 1 and gaps.max() <= 15 and abs(gaps.mean() - 8) < 0.6
        same = data.ViewPairs([square], [], gap=0, img_size=(96, 96))
        for pair, is_image in ((pairs, True), (same, False)):
            a, b = numbers(pair.load(0, np.random.default_rng(1), is_image)[0, :, 0].numpy())
            assert a == b
        clips = data.ViewPairs([square], [], num_frames=4, stride=3, img_size=(96, 96))
        views = clips.load(0, np.random.default_rng(0), False)[0]
        starts = [numbers(v.numpy()) for v in views]
        assert all((np.diff(s.astype(int)) == 3).all() for s in starts)
        assert starts[0][0] != starts[1][0]
    streams = [feed.Batches(n, size, 1, 0, 1, 0, 4, 0) for n, size in ((10, 3), (7, 2))]
    for batch in feed.MixedBatches(*streams):
        assert [key[2] for key in batch] == [False] * 3 + [True] * 2
    item, bad = pairs[0, 0, False]
    assert item.shape == (1, 2, 1, 96, 96, 3) and not bad
    broken = data.ViewPairs(["nowhere.mp4"], [])
    assert broken[0, 0, False][0] is None and len(broken[0, 0, False][1]) == 10
