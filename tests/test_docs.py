"""README.md and docs/: links, commands and diffs hold."""

import functools
import glob
import math
import os
import re
import shutil
import sys
import types
import unittest.mock

import numpy as np
import torch

import pretrain
from tests.common import (HERE, call, checkpoint, flags_of, kill_tree, log_rows, numbered, read,
                          run, saved, small, start, test, test_each, tmp, toy_videos, write)
from video import toy
from video.decode import VideoReader

PAGES = ["README.md", *(os.path.relpath(page, HERE)
                        for page in sorted(glob.glob(os.path.join(HERE, "docs", "*.md"))))]


def fences(text):
    """[(language, text)] of a page's fenced blocks."""
    return re.findall(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", text, re.M | re.S)


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    found, text = set(), re.sub(r"^ *```.*?^ *```", "", read(page), flags=re.M | re.S)
    for heading in re.findall(r"^#+ +(.*?) *#*$", text, re.M):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)  # of a link its text
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(next(n for n in (name, *(f"{name}-{i}" for i in range(1, 99))) if n not in found))
    return found


def commands(page):
    """[[script, word, ...]] of all `python X.py ...` and torchrun commands on a page."""
    found = []
    text = re.sub(r"\\\n\s*", " ", read(page))  # lines that go on
    text = re.sub(r"&lt;|&gt;", "", text)
    spans = [line for _, block in fences(text) for line in block.splitlines()]
    spans += re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))
    for span in spans:
        for part in re.split(r"&&|;|\||#", span):
            match = re.search(r"\b(?:python3?|torchrun) (?:[^`]*? )?([\w/.]+\.py)\b(.*)", part)
            if match:
                found.append([match[1], *match[2].split()])
    return found


@test
def test_links_resolve():
    """Every relative link of README.md and docs/ names a file and a heading that exist."""
    for page in PAGES:
        text = re.sub(r"^ *```.*?^ *```", "", read(page), flags=re.M | re.S)
        links = re.findall(r"\]\(([^)\s]+)[^)]*\)", re.sub(r"`[^`\n]*`", "", text))
        links += re.findall(r'(?:src|href)="([^"]+)"', text)
        for link in links:
            if re.match(r"\w+:", link):
                continue
            target, _, anchor = link.partition("#")
            path = os.path.normpath(os.path.join(os.path.dirname(page), target)) if target else page
            assert os.path.exists(os.path.join(HERE, path)), f"{page}: {link}: no such file"
            known = not anchor or anchor in anchors(path)
            assert known, f"{page}: {link}: no such heading in {path}"


@test
def test_commands_exist():
    """Every command of README.md and docs/ names a script that exists and flags that it has."""
    seen = 0
    for page in PAGES:
        for script, *words in commands(page):
            path = os.path.join(HERE, script)
            assert os.path.exists(path), f"{page}: {script}: no such file"
            word = [w for w in words[:1] if re.fullmatch(r"[a-z]+", w)]
            command = word if script in ("data.py", "bench.py") else []
            for flag in (w.split("=")[0] for w in words if re.match(r"--\w", w)):
                seen += 1
                known = flag[2:] in flags_of(script, *command)
                assert known, f"{page}: {' '.join([script, *words])}: no flag {flag}"
    assert seen > 20, "no commands were found"


@test
def test_recipes_add_up():
    """GPUs x batch x accumulation is each row's batch; SSv2 S and the image recipes are theirs."""
    page, seen = read("docs/recipes.md"), 0
    batch = lambda text: 8 * math.prod(int(n) for n in re.findall(
        r"--(?:nnodes=|batch_size |accum_steps )(\d+)", text))
    for row in re.findall(r"^\|.*--batch_size.*$", page, re.M):
        told = re.search(r"\| (\d+) \||\(batch (\d+)", row)
        assert batch(row) == int(told[1] or told[2]), row
        seen += 1
    assert seen > 20
    row, = re.findall(r"^\| SSv2 \| S \|.*--epochs 2400.*$", page, re.M)
    assert abs(1.5e-4 * batch(row) / 256 - 1.2e-3) < 1e-9  # the peak rate
    fence = re.sub(r"\\\n\s*", " ", next(t for _, t in fences(page) if "pretrain_moco.py" in t))
    moco, = re.findall(r".*pretrain_moco.*", fence)
    mae, = re.findall(r".*--num_frames 1 .*", fence)
    assert batch(moco) == batch(mae) == 4096 and "--accum_steps" not in moco
    assert "--beta2 0.999 --crop_area 0.08 1" in moco and "--min_lr 0 --flip" in mae
    assert page.count("pretrain_moco.py") == page.count("--num_frames 1 --tubelet_size 1") == 1


def apply(block, folder):
    """Applies one of README's diffs to the files in a folder; ValueError where a line is not there.

    Kept and removed lines are looked for in their order; added ones come after the line before
    them, the first ones before the line that follows, and those of a file without any at its end.
    """
    for name, rows in re.findall(r"^--- ([\w/]+\.py)\n((?:(?!--- ).*\n?)*)", block, re.M):
        path = os.path.join(folder, name)
        with open(path, encoding="utf-8") as f:
            lines = f.read().splitlines()
        place, first = 0, []
        for row in rows.splitlines():
            kind, text = row[:1], row[1:]
            if kind == "+" and place:
                lines.insert(place, text)
                place += 1
            elif kind == "+":
                first.append(text)
            else:
                place = lines.index(text, place)  # ValueError: README names a line that is gone
                lines[place:place + 1] = [*first, text] if kind == " " else first
                place, first = place + len(first) + (kind == " "), []
        lines += first
        with open(path, "w", encoding="utf-8") as f:
            f.write("\n".join(lines) + "\n")


@test
def test_boxes_of_ones_own_movie():
    """detection.md's lines for a person detector write a row for every second of a movie."""
    code = next(text for kind, text in fences(read("docs/detection.md")) if kind == "python")
    found = dict(boxes=torch.tensor([[12.0, 16, 24, 48]]), labels=[1], scores=[0.9])
    modules = {name: types.ModuleType(name) for name in
               ("torchvision", "torchvision.models", "torchvision.models.detection")}
    detector = unittest.mock.Mock(return_value=[found])
    detector.eval.return_value = detector
    modules["torchvision.models.detection"].fasterrcnn_resnet50_fpn_v2 = lambda weights: detector
    for n in (20, 60):  # 0.76 and 2.36 s
        movie, boxes = write("my.mp4", numbered(n, 64, 96), g=8), tmp("my_boxes.csv")
        with unittest.mock.patch.dict(sys.modules, modules):
            exec(code.replace("my.mp4", movie).replace("my_boxes.csv", boxes), {})
        with open(boxes) as f:
            rows = f.read().splitlines()
        assert rows == [f"my,{second},0.1250,0.2500,0.2500,0.7500,,0.900"
                        for second in range(n // 25 + 1)], rows


@test
def test_features_in_a_few_lines():
    """README's lines give the middle clip's features, as the encoder and its final norm do."""
    code = next(text for kind, text in fences(read("README.md")) if kind == "python")
    model = small(num_frames=4, img_size=(16, 16)).eval()
    path = saved("x.pt", dict(model=model.state_dict(), config=model.config,
                              args=dict(sampling_rate=2)))
    frames = numbered(21, 16, 16)
    movie, names = write("own.mp4", frames, crf=0), {}
    exec(code.replace("out/pretrain/last.pt", path).replace("my.mp4", movie), names)
    with VideoReader(movie) as video:
        clip = torch.from_numpy(video.frames([6, 8, 10, 12]))[None]  # of 11 at stride 2, the middle
    with torch.no_grad():
        x = model.encoder.norm(model.encoder(clip)).mean(1)
    assert names["x"].shape == (1, 128) and torch.allclose(names["x"], x, atol=1e-6)


@functools.cache
def recipes():
    """{name: diff} of README's section on forks and of its page."""
    section = re.search(r"^## +How to hack it.*?(?=^## )", read("README.md"), re.M | re.S)[0]
    return dict(re.findall(r"^\*\*(.*?)\*\*.*?\n```diff\n(.*?)^```",
                           section + read("docs/hacking.md"), re.M | re.S))


RECIPES = ["A mask", "A loss", "A target", "A data source", "Another optimiser",
           "An EMA of the weights"]


@test_each(RECIPES)
def test_fork(name):
    """README's and hacking.md's changes apply to the code; the fork trains, stops, goes on."""
    assert sorted(recipes()) == sorted(RECIPES)
    fork = tmp(f"fork_{name}")
    keep = shutil.ignore_patterns(".*", "out", "toy", "toy_*", "tests", "docs")
    shutil.copytree(HERE, fork, ignore=keep)
    apply(recipes()[name], fork)
    videos, out = toy_videos(), os.path.join(fork, "out")
    if name == "A data source":
        videos = os.path.join(fork, "arrays")
        os.makedirs(videos)
        for i in range(8):
            np.save(os.path.join(videos, f"{i}.npy"), toy.toy_clip(np.random.default_rng(i), i))
    flags = ["--data", videos, *"""--size tiny --img_size 16 --patch_size 8 --num_frames 4
        --sampling_rate 1 --batch_size 4 --mask_ratio 0.5 --max_steps 4 --warmup_epochs 0 --lr 1e-2
        --log_every 1 --save_every 2 --num_workers 0 --device cpu --dtype fp32""".split()]
    if name == "A target":
        call(pretrain, *flags, "--out_dir", tmp("teacher"))
        os.rename(tmp("teacher", "last.pt"), tmp("teacher.pt"))
    command = [os.path.join(fork, "pretrain.py"), *flags, "--out_dir", out]
    process = start(*command)
    for line in process.stdout:
        if line.startswith("step 3/"):  # its checkpoint is of step 2
            kill_tree(process.pid)
            break
    text = process.communicate()[0] + run(*command)
    assert "resumed" in text and "at step 2" in text, text
    rows = log_rows(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4], text
    assert all(math.isfinite(row["loss"]) and not row["skipped_steps"] for row in rows), rows
    assert ("ema" in checkpoint(out)) == (name == "An EMA of the weights")


@test
def test_readme_is_short():
    """README.md has at most 220 lines, some of them for a fork's own."""
    assert len(read("README.md").splitlines()) <= 220
