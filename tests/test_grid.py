"""docs/grid.py: the evidence's videos, commands and tables."""

import contextlib
import importlib.util
import io
import json
import os
import shlex

import av
import numpy as np

from tests.common import HERE, module_of, test, tmp, write

spec = importlib.util.spec_from_file_location("grid", os.path.join(HERE, "docs", "grid.py"))
grid = importlib.util.module_from_spec(spec)
spec.loader.exec_module(grid)


def said(function, *args):
    """The lines that a function prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(*args)
    return out.getvalue().splitlines()


def planes(path):
    """The frames of a 4:2:0 video, (T, H * 3 / 2, W) uint8."""
    with av.open(path) as video:
        return np.stack([frame.to_ndarray(format="yuv420p") for frame in video.decode(video=0)])


@test
def test_commands_of_the_evidence():
    """Every command is one that its script takes; what it starts from was made by one before it."""
    made = {"out"}
    for table in "1234":
        lines = said(grid.runs, table)
        assert len(lines) > 10
        for line in lines:
            words = shlex.split(line.split(" > ")[0])
            assert words[0] == "python"
            args = module_of(words[1]).get_args(words[2:])
            for file in filter(None, (getattr(args, "init", None), getattr(args, "ckpt", None))):
                assert os.path.dirname(file) in made, line
            assert args.out_dir not in made, f"twice: {args.out_dir}"
            made.add(args.out_dir)


@test
def test_videos_of_the_evidence():
    """Cut without loss; shuffled windows hold the same frames; lists are parts of each other."""
    source, target = tmp("grid_source"), os.path.join(tmp("grid_cut"), "mouth")
    noise = np.random.default_rng(0)
    for kind in ("clips", "digit", "color"):
        os.makedirs(os.path.join(source, kind))
        for i in range(6):
            frames = noise.integers(0, 256, (24, 112, 160, 3), dtype=np.uint8)
            write(f"grid_source/{kind}/{i}.mp4", frames, crf=30)
    for task in grid.TASKS:
        grid.write(os.path.join(source, f"{task}_train.tsv"),
                   [(f"{task}/{i}.mp4", "ab"[i % 2]) for i in range(4 if task == "digit" else 400)])
        grid.write(os.path.join(source, f"{task}_test.tsv"),
                   [(f"{task}/{i}.mp4", "ab"[i % 2]) for i in (4, 5)])
    grid.videos(source, target)
    whole, cut = (planes(os.path.join(*at)) for at in ((source, "digit", "4.mp4"),
                                                       (target, "digit", "4.mkv")))
    assert cut.shape == (24, 96, 64) and np.array_equal(cut[:, :64], whole[:, 24:88, 34:98])
    chroma = lambda x, h, w: x[:, h:].reshape(24, 2, h // 2, w // 2)
    assert np.array_equal(chroma(cut, 64, 64), chroma(whole, 112, 160)[:, :, 12:44, 17:49])
    mixed = planes(os.path.join(target, "shuffled_digit", "4.mkv"))
    order = [next(i for i in range(24) if np.array_equal(cut[i], frame)) for frame in mixed]
    assert order != [*range(24)] and sorted(order[::3]) == [*range(0, 24, 3)]
    rows = lambda name: grid.read(os.path.join(target, name))
    assert sorted(rows("digit_0.tsv")) == sorted(rows("digit_1.tsv")) != rows("digit_0.tsv")
    assert [label for _, label in rows("digit_0_1.tsv")] in (["a", "b"], ["b", "a"])
    assert set(rows("digit_0_1.tsv")) < set(rows("digit_0_5.tsv")) == set(rows("digit_fit.tsv"))
    clips, some = rows("clips_train.tsv"), rows("clips_75.tsv")
    assert clips == [(f"clips/{i}.mkv",) for i in range(400)]
    assert len(set(some)) == 75 and some == rows("clips_300.tsv")[:75]
    assert set(some) < set(clips) and not set(some) <= set(clips[:300])
    assert len(rows("all.tsv")) == 18 + 4


@test
def test_tables_of_the_evidence():
    """Last rows of the runs, and the mean and deviation over the seeds, by hand."""
    here, folder = os.getcwd(), tmp("grid_tables")
    for seed, top1 in enumerate((40, 50, 60)):
        os.makedirs(out := os.path.join(folder, "grid", f"mae_{seed}_digit_all"))
        with open(os.path.join(out, "log.jsonl"), "w") as f:
            for row in (dict(step=1, loss=9, clips_per_s=10), dict(step=2, loss=1.5),
                        dict(step=2, val_top1=top1)):
                f.write(json.dumps(row) + "\n")
        with open(os.path.join(out, "shuffled.txt"), "w") as f:
            f.write("1/9 videos, 1/s\n9 videos x 1 clips x 1 crops: top-1 12.50, top-5 40.00\n")
    os.makedirs(out := os.path.join(folder, "grid", "mae_0"))
    with open(os.path.join(out, "digit_all.txt"), "w") as f:
        f.write("k-NN, k = 20: top-1 9.00, mean\nlinear map by ridge: top-1 16.50, mean\n")
    os.chdir(folder)
    try:
        lines = said(grid.rows)
    finally:
        os.chdir(here)
    rows = {line.split("\t")[0]: dict(zip(grid.COLUMNS, line.split("\t"))) for line in lines}
    assert rows["mae_1_digit_all"]["loss"] == "1.5" and rows["mae_1_digit_all"]["top1"] == "50"
    assert rows["mae_0_digit_all_frozen"]["linear"] == "16.50"
    with open(path := os.path.join(folder, "rows.tsv"), "w") as f:
        f.write("\n".join(lines) + "\n")
    text = "\n".join(said(grid.tables, path))
    assert "| VideoMAE |  |  |  | 50.0 +- 10.0 | 12.5 +- 0.0 |" in text, text
    assert "| VideoMAE | 9.0 (1) | 16.5 (1) |" in text, text
    for title in ("6000", "the 600 clips"):  # tables 3 and 4 have it beside their own rows
        assert f"| {title} | 50.0 +- 10.0 | 12.5 +- 0.0 |" in text, text
    assert "18000" not in text, text  # a row without a run is none
