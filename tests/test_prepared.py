"""video/prepared.py: sets of decoded frames read like the files that they are made of."""

import contextlib
import functools
import io
import json
import os
import re
import shutil
import tarfile
import time
import types
import unittest.mock

import numpy as np
import torch

import data
import eval as evaluate
import finetune
import pretrain
from lib import feed
from lib.views import TestVideos
from tests.common import (TUNE, answers, call, checkpoint, difference, kill_tree, labelled, mistake,
                          need_http, numbered, numbers, odd_files, raises, run, server, start,
                          test, test_each, tmp, toy_videos, tune_data, write)
from video import lists, pictures, prepared, tools


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


@functools.cache
def files_set():
    """The set of prepared_files()'s list of the form `files`, in five shards."""
    return prepare("set_files", prepared_files()[0], "--form", "files", "--shard_videos", 4)


@test
def test_files_packed_as_they_are():
    """The form `files` holds each file's bytes in tars, and reads like it; failures are named."""
    listed, _ = prepared_files()
    folder, said = files_set()
    assert "18 videos, as they are: files about" in said and "2 not readable" in said
    paths, labels = lists.read_videos(listed)
    inside, same = lists.read_videos(folder)
    assert inside == [f"{folder}::{path}" for path in paths] and same == labels
    for path, stored in zip(paths[:-2], inside):
        assert prepared.length(stored) == 40
        with prepared.open_video(path) as video, prepared.open_video(stored) as ready:
            assert (ready.times == video.times).all()
            wanted = [17, 3, 3, 39, *range(40)]
            assert (ready.frames(wanted) == video.frames(wanted)).all(), path
            assert video.pictures([0])[0].shape[:2] == prepared.find(stored)[1:3]
        with prepared.open_movie(path) as video, prepared.open_movie(stored) as ready:
            for a, b in zip(video.at([0.4, 1.2]), ready.at([0.4, 1.2])):
                assert (a == b).all(), path
    for path, why in ((inside[-2], "half.mp4"), (inside[-1], "no such file")):
        with raises(path, "when the set was prepared"):
            prepared.open_video(path)
    contents = []
    for i in range(5):
        with tarfile.open(os.path.join(folder, f"00000{i}.tar")) as tar:
            contents += [tar.extractfile(member).read() for member in tar]
    assert contents == [open(path, "rb").read() for path in paths[:-2]]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert tools.main(["check", folder, "--num_workers", "1", "--full"]) == 1
    assert "16 of 18 files can be read, 640 frames; every frame was decoded; checksums" in (
        out.getvalue()), out.getvalue()
    damaged = tmp("files_damaged")
    shutil.copytree(folder, damaged)
    with open(os.path.join(damaged, "000000.tar"), "r+b") as f:
        f.seek(prepared.read_index(folder)["videos"][paths[1]][4] + 50)
        f.write(b"x")
    os.truncate(os.path.join(damaged, "000001.tar"), 1000)
    text = checked(damaged)
    assert text.count("(checksum)") == 1 and text.count("is cut off") == 4, text
    for args, words in ((["--quality", 3], "leave out --sampling_rate"),
                        (["--shard_videos", 5], "shard_videos is 4, not 5")):
        assert words in mistake(tools, "prepare", listed, folder, "--form", "files", *args)
    many, text = prepare("set_many", listed, "--form", "files")  # 256 MB hold all
    assert [name for name in os.listdir(many) if name.endswith(".tar")] == ["000000.tar"]
    assert set(prepared.read_index(many)["failed"]) == set(paths[-2:])
    other = json.load(open(os.path.join(folder, "settings.json")))
    again = prepare(os.path.basename(folder), listed, "--form", "files")[1]
    assert "5/5 shards, 5 of them from before" in again and other["shard_videos"] == 4, again
    for i in range(2):
        open(tmp(f"nothing{i}.mp4"), "w").close()
    open(tmp("nothing.txt"), "w").write("nothing0.mp4\nnothing1.mp4\n")
    assert "none of the videos" in mistake(tools, "prepare", tmp("nothing.txt"), tmp("none"),
                                           "--form", "files", "--data_root", tmp())
    os.makedirs(tmp("of_pictures", "clip"))
    for i in range(3):
        pictures.write_png(tmp("of_pictures", "clip", f"{i}.png"), np.zeros((8, 8, 3), np.uint8))
    assert "1 of 1 videos are folders" in mistake(tools, "prepare", tmp("of_pictures"), tmp("none"),
                                                  "--form", "files")


@test
def test_runs_on_packed_files():
    """Training draws shards in windows, ranks and a resumed run alike; the test is the files'."""
    train, val = labelled()
    sets = [prepare(f"packed_{os.path.basename(p)}", p, "--form", "files", "--shard_videos", 2)[0]
            for p in (train, val)]
    args = ["--data", sets[0], *"""--size tiny --patch_size 8 --img_size 16 --num_frames 4
        --sampling_rate 1 --mask_ratio 0.5 --max_steps 6 --warmup_epochs 0 --lr 1e-2 --log_every 1
        --save_every 2 --device cpu --dtype fp32 --num_workers 0 --batch_size""".split()]
    one, two, killed = (tmp(f"{name}_packed") for name in ("one", "two", "killed"))
    with unittest.mock.patch("lib.run.Batches", wraps=feed.Batches) as made:
        call(pretrain, *args, 4, "--out_dir", one)
    assert made.call_args.args[-1].tolist() == [i // 2 for i in range(12)]  # shards
    run("pretrain.py", *args, 2, "--out_dir", two, ranks=2)
    process = start("pretrain.py", *args, 4, "--out_dir", killed)
    for line in process.stdout:
        if line.startswith("step 3/"):
            kill_tree(process.pid)
            break
    text = process.communicate()[0] + run("pretrain.py", *args, 4, "--out_dir", killed)
    assert "resumed" in text and "at step 2" in text
    for other, most in ((two, 2e-5), (killed, 1e-6)):
        assert difference(*(checkpoint(x)["model"] for x in (one, other))) < most
    out = tmp("by_packed")
    text = call(finetune, *TUNE, "--data", sets[0], "--val_data", sets[1], "--out_dir", out)
    assert "5 of the 5 validation videos are also trained on" in text
    scores = []
    for source in (val, sets[1]):
        text = call(evaluate, "--ckpt", os.path.join(out, "last.pt"), "--data", source,
                    "--num_segments", 2, "--num_crops", 1, "--device", "cpu", "--num_workers", 0,
                    "--out_dir", tmp("tested_packed"))
        with open(tmp("tested_packed", "predictions.csv")) as f:
            scores.append([line.split(",", 1)[1] for line in f.read().splitlines()])
    assert scores[0] == scores[1]
    paths = lists.read_videos(sets[0])[0]
    assert prepared.shards(paths).tolist() == [i // 2 for i in range(12)]
    other = lists.read_videos(train)[0]
    assert prepared.shards([other[0], *paths[:3]]).tolist() == [-1, 0, 0, 1]
    assert prepared.shards(other) is None


@test_each(["compact", "files"])
def test_preparing_goes_on_after_a_kill(form):
    """SIGKILL after the first shards; the same command ends with an undisturbed run's bytes."""
    listed, sets = prepared_files()
    args = ["--form", form, "--shard_videos", 4]
    if form == "files":
        whole, out, ending = files_set()[0], tmp("files_killed"), "tar"
    else:
        whole, out, ending = sets["compact", 3], tmp("set_killed"), "compact"
        args += ["--sampling_rate", 3]
    for k, kill in enumerate((lambda: kill_tree(process.pid), lambda: process.terminate())):
        process = start("data.py", "prepare", listed, out, "--num_workers", 1 + k, *args)
        while not os.path.exists(os.path.join(out, f"00000{k}.{ending}.json")):
            time.sleep(0.01)
            assert process.poll() is None
        kill()
        text = process.communicate()[0]
        for name in os.listdir(out) if k == 0 else ():  # of fast machines
            if name[:6] > "000000" and name[0] == "0":
                os.remove(os.path.join(out, name))
    assert process.returncode == 130 and "the same command goes on" in text, text
    assert "Traceback" not in text, text
    assert not os.path.exists(os.path.join(out, "index.json"))
    with raises("has not finished"):
        lists.read_videos(out)
    text = prepare(os.path.basename(out), listed, *args)[1]
    assert "from before" in text and "2 not readable" in text
    assert "gone, away.mp4: no such file" in text
    for name in ("index.json", *(f"00000{i}.{ending}" for i in range(5))):
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


@test
def test_sets_at_addresses():
    """A set of files at file://, HTTP: the same run; each shard is fetched once, few are kept."""
    need_http()
    kind, base = server()
    folder, cache = files_set()[0], tmp("near")
    out = os.path.join(cache, f"videomae-shards-{os.getuid()}")
    os.makedirs(cache)
    for i in range(30):
        open(os.path.join(cache, f"{'mine' if i == 0 else i}.tar"), "w").close()
    train, _ = labelled()
    packed = prepare("far_train", train, "--form", "files", "--shard_videos", 2)[0]
    args = ["--data", packed, *"""--size tiny --patch_size 8 --img_size 16 --num_frames 4
        --sampling_rate 1 --mask_ratio 0.5 --max_steps 6 --warmup_epochs 0 --log_every 1
        --device cpu --dtype fp32 --batch_size 4""".split()]
    call(pretrain, *args, "--num_workers", 0, "--out_dir", tmp("here_packed"))
    with unittest.mock.patch.dict(os.environ, VIDEOMAE_CACHE=cache):
        for place, name in ((f"file://{tmp()}", "file"), (base, "http")):
            args[1] = f"{place}/far_train/"
            with answers() as seen:
                call(pretrain, *args, "--num_workers", 2, "--out_dir", tmp(f"{name}_packed"))
                assert seen.requests == (0 if name == "file" else 6 + 1), seen.requests
            assert difference(*(checkpoint(tmp(f"{x}_packed"))["model"]
                                for x in ("here", name))) == 0
        assert sum(name.endswith(".tar") for name in os.listdir(out)) == 12
        assert not [name for name in os.listdir(out) if name.endswith(".part")]
        address = f"{base}/{os.path.basename(folder)}"
        inside, labels = lists.read_videos(address)
        assert labels == lists.read_videos(folder)[1] and not lists.missing(inside)
        assert inside[0] == f"{address}::{lists.read_videos(folder)[0][0].split('::')[1]}"
        with unittest.mock.patch.object(prepared, "KEPT", 3):
            for stored, path in zip(lists.read_videos(folder)[0][:-2], inside):
                with prepared.open_video(stored) as a, prepared.open_video(path) as b:
                    assert (a.frames([3, 30]) == b.frames([3, 30])).all()
            kept = [name for name in os.listdir(out) if name.endswith(".tar")]
            last = {name.split("-")[1] for name in kept}
            assert len(kept) == 3 and last == {f"00000{i}.tar" for i in (1, 2, 3)}, kept
            assert all(map(os.path.exists, prepared.MAPS))  # none holds what was removed
            for i in (4, 0):  # of the oldest shard; of one that has gone
                prepared.open_video(inside[i])
            last = {name.split("-")[1] for name in os.listdir(out) if name.endswith(".tar")}
            assert last == {f"00000{i}.tar" for i in (0, 1, 3)}, last
        assert os.path.exists(os.path.join(cache, "mine.tar"))  # only copies make room
        copies = [name for name in os.listdir(out) if name.endswith(".tar")]
        with open(os.path.join(out, max(copies)), "r+b") as f:
            f.truncate(1000)
        prepared.MAPS.clear()
        for path in inside[:-2]:
            prepared.open_video(path)  # a copy that was cut off is fetched again
        call(tools, "split", address, tmp("far1.tsv"), tmp("far2.tsv"))
        assert set(lists.read_videos(tmp("far2.tsv"))[0]) < set(inside)
        text = run("data.py", "check", address, "--num_workers", 2, ok=False)
        assert "16 of 18 files can be read" in text, text  # by workers that had no index yet
    open(tmp("no_folder"), "w").close()
    with unittest.mock.patch.dict(os.environ, VIDEOMAE_CACHE=tmp("no_folder")), \
            raises("no_folder", "expected VIDEOMAE_CACHE to be a folder"):
        prepared.open_video(inside[0])
    raw = prepared_files()[1]["raw", 3]
    with raises("at an address a set has to be of the form files"):
        lists.read_videos(f"{base}/{os.path.basename(raw)}")
    assert "expected a folder on a disk" in mistake(tools, "prepare", train, f"{base}/set")
