"""video/prepared.py: sets of decoded frames read like the files that they are made of."""

import contextlib
import functools
import io
import os
import re
import shutil
import time
import types

import numpy as np
import torch

import data
import finetune
from lib.views import TestVideos
from tests.common import (TUNE, call, checkpoint, difference, kill_tree, labelled, mistake,
                          numbered, numbers, odd_files, raises, start, test, tmp, toy_videos,
                          tune_data, write)
from video import lists, prepared, tools


def prepare(name, source, *args):
    """Runs `data.py prepare` -> the folder it wrote, its output."""
    out = tmp(name)
    return out, call(tools, "prepare", source, out, "--num_workers", 1, *args)


def checked(folder):
    """What `data.py check` says of a set with failures."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert tools.main(["check", folder, "--num_workers", "1"]) == 1
    return out.getvalue()


@functools.cache
def prepared_files():
    """Sets of a list of the odd files, a broken and a missing one -> list, {(form, rate): set}."""
    listed = tmp("odd list.tsv")
    broken = tmp("half.mp4")
    open(broken, "wb").write(open(odd_files()["no B-frames"], "rb").read()[:3000])
    rows = [*odd_files().values(), broken, tmp("gone, away.mp4")]
    lists.write_list(listed, [(path, f"class {i % 3}") for i, path in enumerate(rows)])
    sets = {}
    for form, rate in (("raw", 1), ("raw", 3), ("compact", 3)):
        flags = ["--form", form, "--sampling_rate", rate, "--shard_videos", 4]
        sets[form, rate] = prepare(f"set_{form}_{rate}", listed, *flags)[0]
    return listed, sets


@test
def test_prepared_sets_read_like_their_files():
    """Each frame of each kind of file is the kept one not after it; times, labels are its own."""
    listed, sets = prepared_files()
    paths, labels = lists.read_videos(listed)
    for (form, rate), folder in sets.items():
        inside, same = lists.read_videos(folder)
        assert same == labels and inside == [f"{folder}::{path}" for path in paths]
        for path, stored in zip(paths[:-2], inside):
            with prepared.open_video(path) as video, prepared.open_video(stored) as ready:
                assert len(ready) == 40 and (ready.times == video.times).all()
                wanted = [17, 3, 3, 39, *range(40)]
                kept = video.frames([i - i % rate for i in wanted])
                if form == "raw":
                    assert (ready.frames(wanted) == kept).all(), path
                else:
                    error = (ready.frames(wanted).astype(float) - kept).mean(-1)
                    # colour has half the resolution: files that have more of it lose it
                    fine = path.endswith(("444.mp4", "odd.mp4", "gif"))
                    assert (error ** 2).mean() ** 0.5 < (16 if fine else 3)
                    assert (numbers(ready.frames(wanted)) == numbers(kept)).all()
                with raises(stored, "0..40 wanted, it has 40"):
                    ready.frames([0, 40])
        for path, why in ((inside[-2], "half.mp4"), (inside[-1], "no such file")):
            with raises(path, "when the set was prepared", why):
                prepared.open_video(path)
    movie = odd_files()["non-zero start"]
    stored = f"{sets['raw', 1]}::{movie}"
    with prepared.open_movie(movie) as video, prepared.open_movie(stored) as ready:
        times = np.array([[-1, 0.41], [0.9, 3]])
        for a, b in zip(video.at(times), ready.at(times)):
            assert (a == b).all()
        with raises("ends at 1.56 s", "from 9.00"):
            ready.at([9, 10])
    # frames 0, 3, 6, ... are at 0, .12, .24 s
    with prepared.open_movie(f"{sets['raw', 3]}::{movie}") as ready:
        frames, place = ready.at([0.05, 0.19, 0.55])
        assert numbers(frames).tolist() == [0, 6, 15] and place.tolist() == [0, 1, 2]


@test
def test_clips_of_a_prepared_set_are_those_of_its_files():
    """Training clips, test views and a whole fine-tuning run are bit-identical."""
    listed, sets = prepared_files()
    (paths, _), (inside, _) = lists.read_videos(listed), lists.read_videos(sets["raw", 1])
    zeros = [0] * len(paths)
    sparse = dict(sampling="sparse", repeat_aug=2)
    for make in (lambda p: data.PretrainClips(p, 4, (32, 32), 3, repeat_aug=2, flip=True),
                 lambda p: data.PretrainClips(p, 4, (32, 32), fps=10),
                 lambda p: data.FinetuneClips(p, zeros, 4, (32, 32), 3, max_side=40),
                 lambda p: data.FinetuneClips(p, zeros, 4, (32, 32), **sparse),
                 lambda p: TestVideos(p, 4, (32, 32), 3, num_segments=3)):
        files, ready = make(paths), make(inside)
        for i in (0, 3, 4, 12):
            key = i if isinstance(files, TestVideos) else (1, i)
            a, b = (torch.utils._pytree.tree_leaves(x[key]) for x in (files, ready))
            for x, y in zip(a, b, strict=True):
                assert torch.equal(x, y) if torch.is_tensor(x) else x == y
    train, val = [prepare(f"set_of_{os.path.basename(p)}", p, "--sampling_rate", 1)[0]
                  for p in labelled()]
    by_file, by_set = tmp("by_file"), tmp("by_set")
    call(finetune, *TUNE, *tune_data(), "--out_dir", by_file)
    text = call(finetune, *TUNE, "--data", train, "--val_data", val, "--out_dir", by_set)
    assert "5 of the 5 validation videos are also trained on" in text
    assert difference(checkpoint(by_file)["model"], checkpoint(by_set)["model"]) == 0
    # a clip of every 3rd frame starts at a kept one
    square = write("square.mp4", numbered(40, 96, 96), g=12)
    every_third = lists.read_videos(prepare("set_square", square, "--sampling_rate", 3)[0])[0]
    clips = [data.PretrainClips(p, 4, (96, 96), 3, crop_scales=[1])
             for p in ([square], every_third)]
    for seed in range(5):
        files, ready = (numbers(c.load(0, np.random.default_rng(seed))[0].numpy()) for c in clips)
        assert (ready == files - files % 3).all() and (np.diff(files) == 3).all()
    several = data.PretrainClips([square], 4, (96, 96), 3, crop_scales=[1], repeat_aug=3)
    rng = np.random.default_rng(0)
    starts = [data.sample_dense(rng, 40, 4, 3) for _ in range(3)]
    shown = numbers(several.load(0, np.random.default_rng(0)).flatten(0, 1).numpy())
    assert (shown == np.concatenate(starts)).all()


@test
def test_preparing_goes_on_after_a_kill():
    """SIGKILL after the first shards; the same command ends with an undisturbed run's bytes."""
    listed, sets = prepared_files()
    whole, out = sets["compact", 3], tmp("set_killed")
    args = ["--form", "compact", "--sampling_rate", 3, "--shard_videos", 4]
    for k, kill in enumerate((lambda: kill_tree(process.pid), lambda: process.terminate())):
        process = start("data.py", "prepare", listed, out, "--num_workers", 1 + k, *args)
        while not os.path.exists(os.path.join(out, f"00000{k}.compact.json")):
            time.sleep(0.01)
            assert process.poll() is None
        kill()
        text = process.communicate()[0]
    assert process.returncode == 130 and "the same command goes on" in text, text
    assert "Traceback" not in text, text
    assert not os.path.exists(os.path.join(out, "index.json"))
    with raises("has not finished"):
        lists.read_videos(out)
    text = prepare("set_killed", listed, *args)[1]
    assert "from before" in text and "2 not readable" in text
    assert "gone, away.mp4: no such file" in text
    for name in ("index.json", *(f"00000{i}.compact" for i in range(5))):
        killed, undisturbed = (open(os.path.join(f, name), "rb").read() for f in (out, whole))
        assert killed == undisturbed, name
    assert not [f for f in os.listdir(out) if f.endswith(".part")]


@test
def test_damaged_and_misused_sets():
    """`check` names changed bytes and missing shards; other flags and full disks are refused."""
    listed, sets = prepared_files()
    folder = tmp("set_damaged")
    shutil.copytree(sets["raw", 3], folder)
    with open(os.path.join(folder, "000001.raw"), "r+b") as f:
        f.seek(12345)
        f.write(bytes([f.read(1)[0] ^ 1]))
    os.truncate(os.path.join(folder, "000002.raw"), 1000)
    os.remove(os.path.join(folder, "000003.raw"))
    text = checked(folder)
    assert text.count("(checksum)") == 1 and "000001.raw" in text and text.count("is cut off") == 4
    gone = "000003.raw cannot be read (No such file or directory); prepare again"
    assert text.count(gone) == 4 and "7 of 18 files can be read" in text
    # as the message says
    flags = "--form", "raw", "--sampling_rate", 3, "--shard_videos", 4
    prepare("set_damaged", listed, *flags)
    assert "15 of 18 files can be read" in checked(folder)
    os.remove(os.path.join(folder, "000001.raw"))
    prepare("set_damaged", listed, *flags)
    assert "16 of 18 files can be read" in checked(folder)
    for args, words in (
            (["--sampling_rate", 2], ["sampling_rate is 3, not 2", "choose another folder"]),
            (["--sampling_rate", 0], ["--sampling_rate 0: expected at least 1"]),
            (["--quality", 1], ["--quality 1: expected 2"]),
            (["--shard_videos", 4, "--short_side", 99], ["short_side is 256, not 99"])):
        said = mistake(tools, "prepare", listed, folder, *args)
        assert all(word in said for word in words), said
    assert "expected a new or empty folder" in mistake(tools, "prepare", listed, toy_videos())
    assert "is prepared already" in mistake(tools, "prepare", folder, tmp("again"))
    usage, shutil.disk_usage = shutil.disk_usage, lambda path: types.SimpleNamespace(free=10 ** 5)
    try:
        assert "would not fit into 0.1 MB" in mistake(tools, "prepare", listed, tmp("large"))
    finally:
        shutil.disk_usage = usage
    text = call(tools, "prepare", listed, tmp("dry"), "--dry_run", "--sampling_rate", 1)
    size = sum(os.path.getsize(os.path.join(sets["raw", 1], f"00000{i}.raw")) for i in range(5))
    said = float(re.search(r"raw about ([\d.]+) MB", text)[1])
    assert 0.8 < said / (size / 1e6) < 1.4 and not os.path.exists(tmp("dry"))
    spoilt = bytearray(open(odd_files()["MJPEG, no key frame structure"], "rb").read())
    first, end = len(spoilt) // 2, len(spoilt) * 3 // 4
    spoilt[first:end] = bytes(end - first)
    spoilt_file, good = tmp("spoilt.avi"), odd_files()["no B-frames"]
    open(spoilt_file, "wb").write(spoilt)
    lists.write_list(tmp("two.tsv"), [(good, None), (spoilt_file, None)])
    two, text = prepare("set_two", tmp("two.tsv"), "--sampling_rate", 1)
    end = prepared.read_index(two)["videos"][good][5]
    assert "1 not readable" in text
    assert os.path.getsize(os.path.join(two, "000000.raw")) == end  # nothing of it stays
    inside = lists.read_videos(folder)[0]
    for make in (data.PretrainClips, TestVideos):
        with raises("keeps 1 frame in 3", "--sampling_rate 4", "multiple of 3"):
            make(inside, 4, (32, 32), 4)
        with raises("keeps 1 frame in 3", "--sampling sparse", "`--sampling_rate 1`"):
            make(inside, 4, (32, 32), 3, sampling="sparse")
    assert "cannot hold `::`" in mistake(tools, "prepare", listed, tmp("a::b"))
    relabelled = tmp("other labels.tsv")
    lists.write_list(relabelled, [(path, "new") for path in lists.read_videos(listed)[0]])
    assert "its rows and labels were others" in prepare("set_damaged", relabelled, *flags)[1]
    # and the slash does not go into the names
    assert lists.read_videos(folder + os.sep)[1] == ["new"] * 18
    assert lists.read_videos(inside[0]) == ([inside[0]], [None])
    for name, content in (("index.json", "{}"), ("settings.json", "{")):
        open(os.path.join(two, name), "w").write(content)
    with raises("index.json: damaged", "writes it again"):
        lists.read_videos(two)
    assert "settings.json: damaged" in mistake(tools, "prepare", tmp("two.tsv"), two)
    with raises("no/x: cannot be written (No such file or directory)"):
        prepared.write_json(tmp("no", "x"), {})
