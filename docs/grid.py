"""Evidence on real video (docs/results.md): its videos, its baselines, its runs, its tables.

    python docs/grid.py videos grid_s1/ mouth/          # cut to the mouth, and the lists
    python docs/grid.py ridge > grid/ridge.jsonl        # what linear maps of pixels tell
    python docs/grid.py runs 1                          # the commands of table 1: ... | sh
    python docs/grid.py rows > grid/rows.tsv            # what the finished runs said, a row each
    python docs/grid.py loss CHECKPOINT ...             # of training and unseen clips
    python docs/grid.py tables grid/rows.tsv            # means, deviations; else of grid_runs.tsv

grid_s1/ has clips/, digit/ and color/ of 160x112 pixels and {digit,color}_{train,test}.tsv. The
commands run in the folder that holds grid/, mouth/ and the latter's prepared form, ready/:
`python data.py prepare mouth/all.tsv ready/ --data_root mouth --sampling_rate 1`.
"""

import collections
import functools
import glob
import itertools
import json
import os
import random
import re
import sys

import av
import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
import masking
from lib import features
from video.decode import VideoReader
from weights import build_model

CLASSES = dict(digit=10, color=4)
TASKS, SEEDS, LABELS = tuple(CLASSES), (0, 1, 2), (1, 5, 20, "all")
ROWS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "grid_runs.tsv")


# ---- videos ----

def read(path):
    """Rows of a list, (path, label)."""
    with open(path) as f:
        return [tuple(line.rstrip("\n").split("\t")) for line in f if line.strip()]


def write(path, rows):
    with open(path, "w") as f:
        f.writelines("\t".join(map(str, row)) + "\n" for row in rows)


def first(rows, some):
    """The first `some` rows of each label."""
    seen, kept = collections.Counter(), []
    for row in rows:
        seen[row[1]] += 1
        if seen[row[1]] <= some:
            kept.append(row)
    return kept


def cut(source, target, order=None):
    """Rows 24 to 88 and columns 34 to 98 of a 160x112 video, without loss; frames in `order`."""
    frames = []
    with av.open(source) as video:
        for frame in video.decode(video=0):
            planes = frame.to_ndarray(format="yuv420p")  # (112 * 3 / 2, 160)
            y, u, v = np.split(planes.reshape(-1), [112 * 160, 112 * 200])
            parts = (y.reshape(112, 160)[24:88, 34:98],
                     *(x.reshape(56, 80)[12:44, 17:49] for x in (u, v)))
            frames.append(np.concatenate([x.reshape(-1, 64) for x in parts]))
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with av.open(target, "w") as out:
        stream = out.add_stream("ffv1", rate=25, width=64, height=64, pix_fmt="yuv420p")
        for i in range(len(frames)) if order is None else order:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frames[i], format="yuv420p")))
        out.mux(stream.encode(None))


def videos(source, target):
    """Cuts all videos; writes the lists. shuffled_*: test windows, their 8 steps in random order.

    A list of a seed is the training list in random order; _1, _5, _20 have as many of each class.
    _fit and _dev are parts of the training list, for choosing rates.
    """
    for path in sorted(glob.glob(os.path.join(source, "*", "*.mp4"))):
        name = os.path.relpath(path, source).replace(".mp4", ".mkv")
        cut(path, os.path.join(target, name))
    for task in TASKS:
        train, test = ([(path.replace(".mp4", ".mkv"), label) for path, label
                        in read(os.path.join(source, f"{task}_{part}.tsv"))]
                       for part in ("train", "test"))
        out = lambda name: os.path.join(target, f"{task}_{name}.tsv")
        write(out("test"), test)
        for seed in (99, *SEEDS):
            random.Random(seed).shuffle(rows := list(train))
            if seed not in SEEDS:
                write(out("fit"), rows[:480])
                write(out("dev"), rows[480:])
                continue
            write(out(seed), rows)
            for some in LABELS[:-1]:
                write(out(f"{seed}_{some}"), first(rows, some))
        rng = random.Random(0)
        for path, _ in test:
            rng.shuffle(blocks := list(range(8)))  # of 3 frames, of which a model sees the first
            cut(os.path.join(source, path.replace(".mkv", ".mp4")),
                os.path.join(target, "shuffled_" + path),
                [3 * block + i for block in blocks for i in range(3)])
        write(out("shuffled"), [("shuffled_" + path, label) for path, label in test])
    random.Random(0).shuffle(some := list(train))
    for part, rows in (("train", train), (75, some[:75]), (300, some[:300]), ("unseen", test)):
        write(os.path.join(target, f"clips_{part}.tsv"),
              [(path.replace("color/", "clips/"),) for path, _ in rows])
    write(os.path.join(target, "all.tsv"),
          [(os.path.relpath(path, target),)
           for path in sorted(glob.glob(os.path.join(target, "*", "*.mkv")))])


# ---- baselines: linear maps of pixels ----

def ridge():
    """Ridge regression on grey frames of 14x14 pixels, its penalty chosen on dev, as in the runs.

    7 frames in order, the middle one, their mean; 7 frames in order tested on shuffled windows.
    """
    @functools.cache
    def pixels(path):
        with VideoReader(os.path.join("mouth", path), lambda height, width: (14, 14)) as video:
            frames = video.frames(np.linspace(0, len(video) - 1, 7).round().astype(int))
        return frames.mean(-1).reshape(7, -1) / 255

    def top1(view, train, test, strength):
        """Percent; of lists and a function of (V, 7, 196) to (V, D)."""
        (x, y), (x_test, y_test) = (zip(*read(path)) for path in (train, test))
        classes = sorted({*y_test})
        x, x_test = (view(np.stack([*map(pixels, paths)])) for paths in (x, x_test))
        labels = np.array([*map(classes.index, y)])
        votes = features.ridge(x, labels, x_test, len(classes), strength)
        return round(100 * np.mean([classes[i] for i in votes.argmax(1)] == np.array(y_test)), 2)

    views = dict(order=lambda x: x.reshape(len(x), -1), middle=lambda x: x[:, 3],
                 mean=lambda x: x.mean(1))
    for (name, view), task in itertools.product(views.items(), TASKS):
        part = lambda some: f"mouth/{task}_{some}.tsv"
        strength = max((.01, .03, .1, .3, 1), key=lambda s: top1(view, part("fit"), part("dev"), s))
        for labels, seed in itertools.product(LABELS, SEEDS):
            row = dict(run=f"ridge_{name}_{seed}_{task}_{labels}", penalty=strength)
            for column, test in dict(top1="test", shuffled="shuffled").items():
                if column == "top1" or name == "order":
                    row[column] = top1(view, listed(task, seed, labels), part(test), strength)
            print(json.dumps(row))


# ---- runs: one command a line, its results in grid/NAME/ ----

CLIPS = ("--data mouth/clips_train.tsv --data_root ready::mouth --size tiny --patch_size 12 "
         "--img_size 48 --clip_grad 1 --min_lr 1e-4 --num_workers 0 --dtype bf16")
VIDEO = ("pretrain.py", "--num_frames 8 --sampling_rate 3 --decoder_depth 1 --batch_size 16 "
         "--repeat_aug 2 --crop_scales 1 0.875 --lr 3.2e-2 --max_steps 6000 --warmup_epochs 53")
STARTS = dict(  # the other methods have as many minutes as VideoMAE's 6000 steps
    scratch=None, untrained=("pretrain.py", f"{VIDEO[1]} --max_steps 1 --lr 0"), mae=VIDEO,
    image=("pretrain.py", "--num_frames 1 --tubelet_size 1 --mask_ratio 0.75 --decoder_depth 1 "
           "--batch_size 64 --repeat_aug 4 --crop_scales 1 0.875 --lr 1.2e-2 --max_steps 3500 "
           "--warmup_epochs 53"),
    vicmae=("pretrain_vicmae.py", "--decoder_depth 1 --decoder_width 96 --decoder_heads 3 "
            "--proj_width 512 --batch_size 128 --lr 4e-3 --max_steps 1950 --warmup_epochs 53 "
            "--con_ramp 80"),
    moco=("pretrain_moco.py", "--num_frames 8 --sampling_rate 3 --proj_width 512 --batch_size 32 "
          "--crop_area 0.6 1 --lr 4e-3 --max_steps 850 --warmup_epochs 20"))
RATES = dict(scratch=0.004)  # of fine-tuning; all others 0.016
SOURCES = dict(  # table 4: other videos, or fewer
    toy="--data toy --data_root ''",
    interaction="--data ut_interaction/ ut_interaction_background/ --data_root ''",
    clips75="--data mouth/clips_75.tsv", clips300="--data mouth/clips_300.tsv")
ABLATIONS = dict(  # table 2: what is changed of VIDEO
    random="--mask_type random", frame="--mask_type frame",
    ratio50="--mask_ratio 0.5", ratio75="--mask_ratio 0.75", ratio95="--mask_ratio 0.95",
    depth2="--decoder_depth 2", depth4="--decoder_depth 4", depth8="--decoder_depth 8",
    raw="--no-norm_pix_loss", center="--target center",
    stride1="--sampling_rate 1", stride2="--sampling_rate 2",
    dense="--sampling_rate 2 --target dense")
TUNE = ("--data_root ready::mouth --size tiny --patch_size 12 --img_size 48 --num_frames 8 "
        "--tubelet_size 2 --sampling_rate 3 --rand_aug 0 0 0 --crop_area 0.85 1 "
        "--crop_aspect 0.95 1.05 --no-flip --reprob 0 --mixup 0 --cutmix 0 --smoothing 0.1 "
        "--drop_path 0.1 --clip_grad 1 --num_workers 0 --dtype bf16 --eval_every 1000")
PROBE = ("--data_root ready::mouth --num_segments 1 --num_frames 8 --tubelet_size 2 --img_size 48 "
         "--sampling_rate 3 --num_workers 0 --dtype bf16 --batch_size 16 --eval_every 1000 "
         "--probe_lr 1e-2 --probe_wd 0.01")
STEPS = {1: 120, 5: 250, 20: 500, "all": 1200}


def pretrain(name, script, flags, seed):
    print(f"python {script} {CLIPS} {flags} --seed {seed} --out_dir grid/{name}_{seed}")


def finetune(start, seed, task, labels, rate=0.016, step=None):
    """Few labels take fewer steps; with fewer videos than a batch the peak rate is the same."""
    name, batch = f"{start}{step or ''}_{seed}_{task}_{labels}", 16
    if labels != "all":
        batch = min(16, labels * CLASSES[task])
    file = f"step_{step:07d}.pt" if step else "last.pt"
    init = "" if start == "scratch" else f" --init grid/{start}_{seed}/{file}"
    print(f"python finetune.py{init} --data {listed(task, seed, labels)} --val_data "
          f"mouth/{task}_test.tsv {TUNE} --batch_size {batch} --lr {rate * 16 / batch:g} "
          f"--max_steps {STEPS[labels]} --seed {seed} --out_dir grid/{name}")
    if labels == "all":
        print(f"python eval.py --ckpt grid/{name}/last.pt --data mouth/{task}_shuffled.tsv "
              "--data_root ready::mouth --num_segments 1 --num_crops 1 --num_workers 0 --out_dir "
              f"grid/{name}_shuffled > grid/{name}/shuffled.txt")


def frozen(start, seed, task, labels):
    """k-NN and a linear map by one command, an attentive probe by another."""
    name, train = f"{start}_{seed}_{task}_{labels}", listed(task, seed, labels)
    print(f"python eval.py --ckpt grid/{start}_{seed}/last.pt --knn {train} --data "
          f"mouth/{task}_test.tsv --data_root ready::mouth --num_frames 8 --sampling_rate 3 "
          f"--num_workers 0 --out_dir grid/{name}_knn > grid/{start}_{seed}/{task}_{labels}.txt")
    print(f"python probe.py --init grid/{start}_{seed}/last.pt --data {train} --val_data "
          f"mouth/{task}_test.tsv {PROBE} --max_steps {STEPS[labels] // 2} --seed {seed} "
          f"--out_dir grid/{name}_probe")


def listed(task, seed, labels):
    return f"mouth/{task}_{seed}{f'_{labels}' * (labels != 'all')}.tsv"


def runs(table):
    """Prints the commands of a table, in an order that works."""
    for seed in SEEDS:
        if table == "1":
            for start, how in STARTS.items():
                if how:
                    pretrain(start, *how, seed)
                for task, labels in itertools.product(TASKS, LABELS):
                    if start != "untrained":
                        finetune(start, seed, task, labels, RATES.get(start, 0.016))
                    if start != "scratch":
                        frozen(start, seed, task, labels)
        if table == "2":
            for name, change in ABLATIONS.items():
                pretrain(name, VIDEO[0], f"{VIDEO[1]} {change}", seed)
                finetune(name, seed, "digit", "all")
        if table == "3":  # 3 times as long as mae; of each a third and a ninth
            pretrain("long", VIDEO[0], f"{VIDEO[1]} --max_steps 18000 --keep_every 2000", seed)
            for step in (2000, 6000, 18000):
                finetune("long", seed, "digit", "all", step=step)
        if table == "4":
            for name, source in SOURCES.items():
                pretrain(name, VIDEO[0], f"{VIDEO[1]} {source}", seed)
                finetune(name, seed, "digit", "all")


# ---- what came out ----

@torch.no_grad()
def loss(*checkpoints):
    """Prints the loss on 200 training clips and on the 200 unseen ones, always masked alike."""
    for checkpoint in checkpoints:
        model, _ = build_model(checkpoint, verbose=False)
        for part in ("train", "unseen"):
            paths = [os.path.join("mouth", path) for path, in read(f"mouth/clips_{part}.tsv")[:200]]
            clips = data.PretrainClips(paths, 8, (48, 48), stride=3, crop_scales=[1])
            video = torch.cat([clips[0, i][0] for i in range(len(paths))])
            mask = masking.make_mask("tube", len(video), model.grid, 0.9,
                                     torch.Generator().manual_seed(0))
            print(f"{checkpoint}\t{part}\t{model(video, mask)[0].item():.4f}")


COLUMNS = ("run", "step", "loss", "zeros", "contrast", "top1", "shuffled", "knn", "linear",
           "clips_per_s", "memory_gb")


def rows():
    """The last rows of each run's log.jsonl and what its tests printed -> a table with tabs."""
    found = {}
    for path in sorted(glob.glob("grid/*/log.jsonl")):
        with open(path) as f:
            log = [json.loads(line) for line in f]
        row = collections.ChainMap(*log[:-4:-1])  # what the last rows say, the last first
        name = os.path.basename(os.path.dirname(path))
        rate = np.median([row["clips_per_s"] for row in log if "clips_per_s" in row])
        found[name] = dict(row, run=name, clips_per_s=rate, top1=row.get("val_top1", ""),
                           loss=row.get("reconstruction", row["loss"]))
    if os.path.exists("grid/ridge.jsonl"):
        with open("grid/ridge.jsonl") as f:
            found |= {row["run"]: row for row in map(json.loads, f)}
    for path in sorted(glob.glob("grid/*/*.txt")):
        name, part = path.split(os.sep)[1], os.path.basename(path)[:-4]
        percent = re.findall(r"^(\S+).*?top-1 ([\d.]+)", open(path).read(), re.M)
        if not percent:  # still running, or failed
            continue
        if part == "shuffled":
            found[name]["shuffled"] = percent[0][1]
        else:
            found[f"{name}_{part}_frozen"] = dict(run=f"{name}_{part}_frozen", knn=percent[0][1],
                                                  linear=percent[1][1])
    print(*COLUMNS, sep="\t")
    for row in found.values():
        print(*(f"{x:.4g}" if isinstance(x := row.get(column, ""), float) else x
                for column in COLUMNS), sep="\t")


NAMES = dict(
    scratch="from scratch", untrained="untrained", mae="VideoMAE", image="image MAE",
    vicmae="ViC-MAE", moco="MoCo v3", ridge_order="ridge, 7 frames",
    ridge_middle="ridge, middle frame", ridge_mean="ridge, mean frame")


def told(values, digits=1):
    """Mean and standard deviation of the seeds, and their number where some are missing."""
    if not values:
        return ""
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" +- {np.std(values, ddof=1):.{digits}f}"
    return text + f" ({len(values)})" * (len(values) != len(SEEDS))


def tables(path=ROWS):
    """Prints rows, docs/grid_runs.tsv if none are named, as the tables of docs/results.md."""
    with open(path) as f:
        found = [dict(zip(COLUMNS, line.rstrip("\n").split("\t"))) for line in f][1:]

    def cell(start, rest="", column="top1", digits=1):
        name = re.compile(rf"{start}_\d+{rest}$")
        return told([float(row[column]) for row in found
                     if name.match(row["run"]) and row[column]], digits)

    def table(*lines):
        for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]):
            if any(line[1:]):
                print("|", " | ".join(line), "|")
        print()

    budgets = [f"{labels} a class" for labels in LABELS[:-1]] + ["all"]
    for task in TASKS:
        table([f"{task}, fine-tuned", *budgets, "all, shuffled"], *(
            [name, *(cell(start, f"_{task}_{labels}") for labels in LABELS),
             cell(start, f"_{task}_all", "shuffled")] for start, name in NAMES.items()))
    ways = dict(knn="k-NN", linear="linear", top1="attentive")
    table(["frozen", *(f"{task}, {way}" for task in TASKS for way in ways.values())], *(
        [name, *(cell(start, f"_{task}_all_{'probe' if column == 'top1' else 'frozen'}", column)
                 for task in TASKS for column in ways)] for start, name in NAMES.items()))
    table(["changed", "digit", "digit, shuffled", "loss"], *(
        [f"`{change}`" if change else "VideoMAE", cell(name, "_digit_all"),
         cell(name, "_digit_all", "shuffled"), cell(name, column="loss", digits=3)]
        for name, change in (("mae", ""), *ABLATIONS.items())))
    steps = dict(long2000="2000 of 18000", long6000="6000 of 18000", mae="6000", long18000="18000")
    sources = dict(scratch="not at all", toy="toy videos", interaction="UT-Interaction",
                   clips75="75 of the clips", clips300="300 of the clips", mae="the 600 clips")
    for title, names in (("steps", steps), ("pre-trained on", sources)):
        table([title, "digit", "digit, shuffled"], *(
            [text, cell(name, "_digit_all"), cell(name, "_digit_all", "shuffled")]
            for name, text in names.items()))


if __name__ == "__main__":
    do, *args = sys.argv[1:] or ["help"]
    known = dict(videos=videos, ridge=ridge, runs=runs, loss=loss, rows=rows, tables=tables)
    if do not in known:
        sys.exit(__doc__)
    known[do](*args)
