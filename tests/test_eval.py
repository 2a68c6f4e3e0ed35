"""eval.py, and of lib/: views, features."""

import csv
import functools
import importlib.util
import json
import math
import os

import av
import numpy as np
import torch
import torch.nn.functional as F

import weights
from lib import plot
from lib.features import attention_rollout, features, heat, neighbours, ridge
from lib.views import TestVideos, cut, scores, view_indices
from model import VideoClassifier
from tests.common import Skip, as_script, call, mistake, run, small, test, tmp, write
from video import decode, lists, pictures, toy

evaluate = importlib.import_module("eval")  # `import eval` would hide the builtin


# ---------------------------------------------------------------- lib/views.py

@test
def test_views():
    """K400's and SSv2's clips, and the crops along the long side, equal hand-computed ones."""
    k400 = view_indices(300, 16, 4, "dense", 5)  # 75 frames at stride 4, 59 to spare
    assert k400[:, 0].tolist() == [4 * s for s in (0, 14, 29, 44, 59)]
    assert (np.diff(k400) == 4).all()
    assert view_indices(300, 16, 4, "dense", 1)[0].tolist() == list(range(4 * 29, 4 * 45, 4))
    assert view_indices(10, 4, 4, "dense", 2).tolist() == [[0, 4, 8, 8]] * 2
    ssv2 = view_indices(40, 16, 2, "sparse", 2)
    assert ssv2[0].tolist() == [int(2.5 * k) for k in range(16)]
    assert ssv2[1].tolist() == [int(1.25 + 2.5 * k) for k in range(16)]
    assert (view_indices(40, 16, 2, "sparse-reference", 2) == ssv2).all()
    frames = torch.arange(2 * 4 * 11).view(2, 4, 11, 1)
    views = cut(frames, torch.tensor([[0, 1], [1, 1]]), (4, 4), 3)
    assert views.shape == (6, 2, 4, 4, 1)
    for v, (clip, left) in enumerate(((0, 0), (0, 3), (0, 7), (1, 0), (1, 3), (1, 7))):
        assert torch.equal(views[v, 0], frames[clip, :, left:left + 4]), v
        assert torch.equal(views[v, 1], frames[1, :, left:left + 4]), v
    tall = cut(frames.transpose(1, 2), torch.tensor([[0, 1]]), (4, 4), 1)
    assert torch.equal(tall[0, 0], frames.transpose(1, 2)[0, 3:7])
    fit = TestVideos([], 4, (24, 16)).fit
    assert fit(30, 40) == (24, 32) and fit(100, 40) == (40, 16) and fit(24, 16) == (24, 16)
    assert fit(3, 2) == (24, 16)


@test
def test_scores():
    """Top-1, top-5, per-class accuracy, loss by hand; ties go as argmax's, NaN is never right."""
    p = np.array([[0.5, 0.3, 0.2, 0, 0, 0], [0.1, 0.1, 0.2, 0.2, 0.2, 0.2],
                  [0.4, 0.1, 0.1, 0.1, 0.1, 0.2], [0.2, 0.2, 0.2, 0.2, 0.1, 0.1]])
    result = scores(p, np.array([0, 2, 4, 1]))
    assert result["top1"] == 50 and result["top5"] == 75 and result["per_class"] == 50
    assert abs(result["loss"] + np.log([0.5, 0.2, 0.1, 0.2]).mean()) < 1e-12
    assert scores(p, np.array([0, 2, 0, 0]))["per_class"] == 100
    assert scores(p * np.nan, np.array([0, 2, 0, 0]))["top5"] == 0
    assert abs(scores(p, np.array([0, 3, 0, 0]))["per_class"] - 50) < 1e-12


def slow_views(path, num_frames, stride, size, num_segments, num_crops, resize=decode.resize):
    """Every frame decoded by plain PyAV, resized whole, indexed: (segments * crops, T, S, S, 3)."""
    with av.open(path) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    h, w = frames[0].shape[:2]
    h, w = (size, int(w * size / h)) if h <= w else (int(h * size / w), size)
    frames = [resize(torch.from_numpy(f)[None], h, w)[0].numpy() for f in frames]
    frames = np.stack(frames)[::stride]
    step, views = max((len(frames) - num_frames) / (num_segments - 1), 0), []
    while len(frames) < num_frames:
        frames = np.concatenate([frames, frames[-1:]])
    for s in range(num_segments):
        for c in range(num_crops):
            y, x = (int(c * (n - size) / (num_crops - 1)) if n > size else 0 for n in (h, w))
            views.append(frames[int(s * step):int(s * step) + num_frames, y:y + size, x:x + size])
    return np.stack(views)


@functools.cache
def classified():
    """A classifier with a large random head, its checkpoint, a list of 7 videos, one broken."""
    torch.manual_seed(0)
    model = VideoClassifier(3, size="tiny", num_frames=4, img_size=32, patch_size=8)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model.head.weight.mul_(20)
    ckpt = tmp("classifier.pt")
    torch.save(dict(model=model.state_dict(), config=model.config, classes=["a", "b", "c"],
                    args=dict(sampling="dense", sampling_rate=3, fps=None)), ckpt)
    folder, rows = tmp("seven"), []
    os.makedirs(folder)
    for i in range(6):
        rows.append(f"{folder}/{i}.mp4\t{'abc'[i % 3]}")
        clip = toy.toy_clip(np.random.default_rng(i), i, 10 + 7 * i, 64)
        clip = clip[:, :40 + 4 * i, :64 - 2 * i]
        pictures.write_video(f"{folder}/{i}.mp4", clip, g=8, bf=2)
    rows.insert(3, f"{folder}/broken.mp4\tb")
    open(f"{folder}/broken.mp4", "w").write("x")
    listed = tmp("seven.tsv")
    open(listed, "w").write("\n".join(rows))
    return model.eval(), ckpt, listed


# ---------------------------------------------------------------- lib/features.py

@test
def test_neighbours():
    """k-NN votes equal a loop over centred cosines; the linear map is the least squares one."""
    rng = np.random.default_rng(0)
    train, labels = rng.normal(size=(20, 6)) + 3, rng.integers(0, 4, 20)
    test_x = rng.normal(size=(7, 6)) + 3
    votes = neighbours(train, labels, test_x, 5, 4)
    for x, vote in zip(test_x, votes):
        a, expect = x - train.mean(0), np.zeros(4)
        cosine = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in train - train.mean(0)]
        for i in sorted(range(20), key=lambda i: -cosine[i])[:5]:
            expect[labels[i]] += math.exp((cosine[i] - 1) / 0.07)
        assert np.allclose(vote, expect)
    x, test_z = ((a - train.mean(0)) / (train.std(0) + 1e-6) for a in (train, test_x))
    y = np.eye(4)[labels] - np.eye(4)[labels].mean(0)
    # the penalty 0.01 * 20 as six more rows of a least squares
    x, y = np.vstack([x, np.sqrt(0.2) * np.eye(6)]), np.vstack([y, np.zeros((6, 4))])
    w = np.linalg.lstsq(x, y, rcond=None)[0]
    found = ridge(train, labels, test_x, 4)
    assert np.allclose(found, test_z @ w + np.eye(4)[labels].mean(0))
    assert np.abs(w).max() > 0.05
    _, ckpt, listed = classified()
    text = call(evaluate, "--ckpt", ckpt, "--knn", listed, "--data", listed, "--k", 1, 3,
                "--out_dir", tmp("knn"), "--num_workers", 0)
    assert "k = 1: top-1 100.00" in text and "ridge regression: top-1" in text
    assert "1 of 7 videos could not be read" in text


@test
def test_attention_rollout():
    """Shares equal a float64 product of (A + I)/2, average 1; uniform attention gives ones."""
    model, _, listed = classified()
    video = torch.from_numpy(slow_views(lists.read_videos(listed)[0][-1], 4, 3, 32, 2, 2))[:1]
    share = attention_rollout(model, video)
    with torch.no_grad():
        x, total = model.embed(video)[0].double(), torch.eye(32, dtype=torch.float64)
        for block in model.blocks:
            block.double()
            qkv = block.norm1(x) @ block.attn.qkv.weight.T
            q, k, _ = qkv.view(32, 3, 4, 32).permute(1, 2, 0, 3)
            q = q + block.attn.q_bias.view(4, 1, 32)
            a = (q @ k.mT / 32 ** 0.5).softmax(-1).mean(0)
            total, x = (a + torch.eye(32)) / 2 @ total, block(x[None])[0]
            block.float()
    assert share.shape == (1, 2, 4, 4) and abs(share.mean() - 1) < 1e-5
    assert (share.flatten() - 32 * total.mean(0)).abs().max() < 1e-4 and share.std() > 0.01
    flat = VideoClassifier(3, size="tiny", num_frames=4, img_size=32, patch_size=8)
    for block in flat.blocks:
        block.attn.qkv.weight.data.zero_()
    assert torch.allclose(attention_rollout(flat, video), torch.ones(1, 2, 4, 4), atol=1e-5)


# ---------------------------------------------------------------- eval.py

@test
def test_multi_view_probabilities_equal_a_slow_reference():
    """4 clips x 3 crops: probabilities are the mean softmax over views cut by plain decoding."""
    model, ckpt, listed = classified()
    out = tmp("mv")
    text = call(evaluate, "--ckpt", ckpt, "--data", listed, "--num_segments", 4, "--num_crops", 3,
                "--dtype", "fp32", "--out_dir", out, "--num_workers", 1, "--batch_size", 5)
    rows = list(csv.DictReader(open(os.path.join(out, "predictions.csv"))))
    assert [r["path"] for r in rows] == lists.read_videos(listed)[0] and rows[3]["failed"]
    assert not rows[3]["predicted"]
    assert "1 of 7 videos could not be read" in text and "broken.mp4" in text
    right = 0
    for row in rows[:3] + rows[4:]:
        views = torch.from_numpy(slow_views(row["path"], 4, 3, 32, 4, 3))
        with torch.no_grad():
            p = model(views).softmax(-1).mean(0)
        label = "abc".index(row["label"])
        assert abs(p[label] - float(row["probability_of_label"])) < 1e-5, (row, p)
        assert row["predicted"] == "abc"[p.argmax()]
        assert int(row["place_of_label"]) == 1 + int((p > p[label]).sum())
        right += int(p.argmax() == label)
    result = json.load(open(os.path.join(out, "result.json")))
    assert abs(result["top1"] - 100 * right / 6) < 1e-9 and result["failed"] == 1
    assert result["videos"] == 6
    assert f"top-1 is {100 * right / 7:.2f}" in text


@test
def test_ranks_give_the_same_figures():
    """7 videos (one broken) on 1, 2 and 3 ranks: the same predictions.csv, every video once."""
    _, ckpt, listed = classified()
    tables = []
    for ranks in (None, 2, 3):
        out = tmp(f"ranks_{ranks}")
        # one view a batch: others are rounded by their size, on some processors in the sixth digit
        run("eval.py", "--ckpt", ckpt, "--data", listed, "--num_segments", 2, "--dtype", "fp32",
            "--out_dir", out, "--num_workers", 0, "--batch_size", 1, ranks=ranks)
        tables.append((open(os.path.join(out, "predictions.csv")).read(),
                       open(os.path.join(out, "result.json")).read()))
    assert tables[0] == tables[1] == tables[2] and tables[0][0].count("\n") == 8


def as_opencv(clip, height, width):
    """What cv2.resize computes, before it rounds: bilinear between the four nearest pixels."""
    planes = clip.permute(0, 3, 1, 2).double()
    return F.interpolate(planes, (height, width), mode="bilinear").permute(0, 2, 3, 1)


@test
def test_not_antialiased():
    """--no-antialias, or a checkpoint trained so: pixels are F.interpolate's, to rounding."""
    row = torch.tensor([0, 40, 100, 0, 0, 0, 30, 200], dtype=torch.uint8).view(1, 1, 8, 1)
    assert decode.resize(row, 1, 2, antialias=False).flatten().tolist() == [70, 15]
    assert decode.resize(row, 1, 2).flatten().tolist() == [35, 47]  # weights 5 7 7 5 3 1 of 28
    noise = np.random.default_rng(0).integers(0, 256, (16, 96, 128, 3), dtype=np.uint8)
    path = write("noise.mp4", noise)
    state, made = torch.load(classified()[1]), [tmp(f"resized_{i}.pt") for i in range(3)]
    state["model"]["head.weight"] *= 0.05  # less certain of itself
    for name, args in zip(made, ({}, dict(antialias=False), dict(sampling="sparse-reference"))):
        torch.save(state | dict(args=dict(sampling_rate=3) | args), name)
    model = weights.build_model(made[0], verbose=False)[0]
    want = torch.from_numpy(slow_views(path, 4, 3, 32, 3, 3, as_opencv)[4:5])
    views = []
    for antialias in (False, True):
        videos = TestVideos([path], 4, (32, 32), 3, antialias=antialias)
        views.append(cut(*videos[0][1:3], (32, 32), 1))
    assert (views[0] - want).abs().max() <= 1 < 10 < (views[1] - want).abs().max()
    with torch.no_grad():
        p, other = model(torch.cat(views)).softmax(-1)
    assert (p - other).abs().max() > 1e-3

    def predict(name, *args):
        found = json.loads(call(evaluate, "--ckpt", name, "--dtype", "fp32", "--predict", path,
                                "--json", "--out_dir", tmp("aa"), *args))
        best = {c["name"]: c["probability"] for c in found[0]["classes"]}
        return torch.tensor([best[name] for name in "abc"])
    close = lambda a, b: (a - b).abs().max() < 1e-5
    assert close(predict(made[0]), other) and close(predict(made[0], "--no-antialias"), p)
    assert close(predict(made[1]), p) and close(predict(made[1], "--antialias"), other)
    sparse = predict(made[0], "--sampling", "sparse")  # what the paper's code tests with
    assert close(predict(made[2]), sparse) and not close(sparse, other)


@test
def test_predict_and_windows():
    """--predict gives the middle clip's probabilities; windows see only their own frames."""
    model, ckpt, listed = classified()
    path = lists.read_videos(listed)[0][-1]  # 45 frames at 25 fps
    base = ["--ckpt", ckpt, "--dtype", "fp32", "--out_dir", tmp("pr"), "--predict", path]
    found = json.loads(call(evaluate, *base, "--json", "--top", 3))
    views = torch.from_numpy(slow_views(path, 4, 3, 32, 3, 3))[4:5]  # the middle one of three
    with torch.no_grad():
        p = model(views).softmax(-1)[0]
    classes = found[0]["classes"]
    assert [c["name"] for c in classes] == ["abc"[i] for i in p.argsort(descending=True)]
    assert all(abs(c["probability"] - p["abc".index(c["name"])]) < 1e-5 for c in classes)
    windows = json.loads(call(evaluate, *base, "--json", "--window", 0.6))
    assert [(w["start"], w["end"]) for w in windows] == [(0, 0.6), (0.6, 1.2), (1.2, 1.76)]
    with open(tmp("pr", "predicted.csv"), newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 9 and [float(r["start"]) for r in rows[::3]] == [0, 0.6, 1.2]
    for row, name in zip(rows[6:], windows[2]["classes"]):
        assert row["class"] == name["name"] and float(row["probability"]) == name["probability"]
    middle = TestVideos([], 4, (32, 32), 3)
    with decode.VideoReader(path, middle.fit) as video:
        # frames 0..14, 30..44, all
        for start, end, first in ((0, 0.6, 0), (1.2, 1.8, 30), (0, 9, 15)):
            frames, index = middle.clips(video, start, end)
            assert (frames[index[0]].numpy() == video.frames(range(first, first + 12, 3))).all()
    os.makedirs(tmp("empty_folder"))
    wrong = [tmp("absent.mp4"), tmp("empty_folder"), "absent_folder/"]
    with as_script(evaluate, *base[:-1], *wrong[:2], path, wrong[2]) as out:
        assert evaluate.main() == 1
    assert out.getvalue().count(f"{path}\n  ") == 1, out.getvalue()
    with open(tmp("pr", "predicted.csv"), newline="") as f:
        rows = list(csv.DictReader(f))
    assert {row["path"] for row in rows if row["class"]} == {path}
    assert [row["path"] for row in rows if row["failed"]] == wrong
    assert all(text in mistake(evaluate, *base[:-1], *wrong) for text in wrong[:1])
    assert "a " in call(evaluate, *base)
    assert " to " in call(evaluate, *base, "--window", 1, "--hop", 0.5)


@test
def test_sources_that_are_not_there():
    """A mistake names each of them once, and nothing else has said it."""
    _, ckpt, _ = classified()
    gone = ["nowhere1", "nowhere2"]
    said = run("eval.py", "--ckpt", ckpt, "--out_dir", tmp("not_there"), "--predict", *gone,
               ok=False)
    assert [said.count(name) for name in gone] == [1, 1], said


@test
def test_windows():
    """A window of less than half its length is left out; the last one ends with the video."""
    assert evaluate.windows_of(10.5, 4, 4) == [(0, 4), (4, 8), (8, math.inf)]
    assert evaluate.windows_of(9.9, 4, 4) == [(0, 4), (4, math.inf)]
    assert evaluate.windows_of(1, 4, 4) == evaluate.windows_of(0, 4, 4) == [(0, math.inf)]
    assert evaluate.windows_of(6, 4, 2) == [(0, 4), (2, 6), (4, math.inf)]
    assert evaluate.windows_of(19, 2, 10) == [(0, 2), (10, 12)]


@test
def test_features():
    """Windows cover the video; pooled, per token and per layer features equal the model's own."""
    model, ckpt, listed = classified()
    path = lists.read_videos(listed)[0][-1]
    out = tmp("fe")
    base = ["--ckpt", ckpt, "--dtype", "fp32", "--features", path, "--out_dir", out]
    call(evaluate, *base, "--batch_size", 2)
    name = os.path.join(out, "00000_5.npz")
    found = dict(np.load(name))
    # 15 frames at stride 3: windows at 0, 4, 8 and the last 4
    assert np.allclose(found["start"], np.array([0, 12, 24, 33]) / 25, atol=1e-4)
    assert np.allclose(found["end"], np.array([9, 21, 33, 42]) / 25, atol=1e-4)
    views = torch.from_numpy(slow_views(path, 4, 3, 32, 12, 3))[1::3][[0, 4, 8, 11]]
    with torch.no_grad():
        x = model.embed(views)
        tokens = [x := block(x) for block in model.blocks]
        assert abs(found["features"] - model.fc_norm(tokens[-1].mean(1)).numpy()).max() < 1e-4
        call(evaluate, *base, "--no-pool", "--layer", 2)
        assert abs(np.load(name)["features"] - tokens[1].numpy()).max() < 1e-4
        call(evaluate, *base, "--hop", 0.12)
        assert len(np.load(name)["features"]) == 12
        pre = small(num_frames=4, img_size=32).eval()
        wanted = pre.encoder.norm(pre.encoder(views)).mean(1)
        assert torch.allclose(features(pre, views), wanted, atol=1e-5)


@test
def test_pictures_and_export():
    """--reconstruct, --attention, --mp4 show the clip; --export_hf loads to the same logits."""
    model, ckpt, listed = classified()
    path, out = lists.read_videos(listed)[0][-1], tmp("draw")
    pre = small(num_frames=4, img_size=32)
    pre_ckpt = tmp("pre.pt")
    args = dict(sampling_rate=3)
    state = dict(model=pre.state_dict(), config=pre.config, classes=None, args=args)
    torch.save(state, pre_ckpt)
    text = call(evaluate, "--ckpt", pre_ckpt, "--reconstruct", path, "--mask_ratio", 0.5, 0.75,
                "--mp4", "--out_dir", out)
    assert text.count("loss ") == 2 and "flatters" in text
    with decode.VideoReader(os.path.join(out, "00000_5_reconstruct.mp4")) as video:
        assert video.frames([0]).shape == (1, 224, 7 * 224, 3) and len(video) == 4
    call(evaluate, "--ckpt", ckpt, "--attention", path, "--out_dir", out)
    with decode.VideoReader(os.path.join(out, "00000_5_attention.png")) as picture:
        image = picture.frames([0])[0]
    first = slow_views(path, 4, 3, 32, 3, 3)[4, 0]
    zoomed = first.repeat(3, 0).repeat(3, 1)
    assert (image[14:14 + 96, :96] == zoomed).all()
    assert (image[14 + 98 + 14:][:96, :96] != zoomed).any()
    values = torch.zeros(1, 2, 2)
    values[0, 0, 0] = 1
    colors = heat(values, np.zeros((2, 4, 4, 3), np.uint8))[0]
    # red high, blue low
    assert colors[0, 0, 0] > colors[0, 0, 2] and colors[3, 3, 2] > colors[3, 3, 0]
    folder = tmp("hf")
    call(evaluate, "--ckpt", ckpt, "--export_hf", folder)
    again, about = weights.build_model(folder, verbose=False)
    views = torch.from_numpy(slow_views(path, 4, 3, 32, 2, 2))
    with torch.no_grad():
        assert torch.equal(again(views), model(views)) and about["classes"] == ["a", "b", "c"]
        shape = dict(size="tiny", num_frames=4, img_size=32, patch_size=8)
        probe = VideoClassifier(3, head_norm=True, **shape)
        probe.head.weight.mul_(1000)
        for _ in range(9):
            probe(views)  # moves the BatchNorm's statistics
        plain = VideoClassifier(3, **shape).eval()
        torch.save(weights.to_hf(probe)[0], os.path.join(folder, "x.bin"))
        weights.load_pretrained(plain, os.path.join(folder, "x.bin"), verbose=False)
        assert torch.allclose(plain(views), probe.eval()(views), atol=1e-4, rtol=1e-4)
    assert weights.build_model(pre_ckpt, verbose=False)[0].config == pre.config


@test
def test_eval_mistakes():
    """Impossible requests of eval.py: the value and what is allowed are named, no traceback."""
    _, ckpt, listed = classified()
    for args, words in (
            ([], ["--data"]),
            (["--data", "nowhere"], ["nowhere"]),
            (["--predict", "x.mp4"], ["x.mp4"]),
            (["--reconstruct", listed], ["classifier", "no decoder"]),
            (["--window", 2], ["--window"]),
            (["--data", listed, "--positions", "new"], ["--positions new", "--num_frames"]),
            (["--data", listed, "--k", 20], ["--k goes with --knn"]),
            (["--predict", listed, "--mask_ratio", 0.5], ["--mask_ratio", "--reconstruct"]),
            (["--knn", listed, "--data", listed, "--top", 3], ["--top goes with --predict"]),
            (["--data", listed, "--num_crops", 0], ["--num_crops 0"]),
            (["--features", listed, "--layer", 9], ["--layer 9", "0 to 4"])):
        text = mistake(evaluate, "--ckpt", ckpt, *args)
        assert all(w in text for w in words), text
    bad = tmp("unknown.tsv")
    open(bad, "w").write(open(listed).read().replace("\ta", "\tzebra"))
    text = run("eval.py", "--ckpt", ckpt, "--data", bad, ok=False)
    assert "zebra" in text and "a, b, c" in text and "Traceback" not in text


# ---------------------------------------------------------------- lib/plot.py

@test
def test_curves_and_confusions():
    """Curves hold every logged loss, baseline and score; confusions count videos; both are PNGs."""
    runs = tmp("curves_a"), tmp("curves_b")
    for folder in runs:
        os.makedirs(folder)
    with open(os.path.join(runs[0], "log.jsonl"), "w") as f:
        f.writelines(json.dumps(dict(step=i, loss=1 / i, zeros=0.9, lr=1e-3, waiting=0.25)) + "\n"
                     for i in (1, 2, 4))
    with open(os.path.join(runs[1], "log.jsonl"), "w") as f:
        f.write('{"step": 3, "loss": null, "waiting": 0.5}\n{"step": 3, "val_top1": 40.0}\n')
    if not importlib.util.find_spec("matplotlib"):
        assert "pip install matplotlib" in mistake(evaluate, "--plot", *runs, "--out_dir", runs[0])
        raise Skip("needs matplotlib")
    said = call(evaluate, "--plot", *runs, "--out_dir", runs[0])
    assert f"{runs[0]}: step 4, loss 0.25, zeros 0.9, waiting 25 %\n" in said
    assert f"{runs[1]}: step 3, val_top1 40, waiting 50 %\n" in said
    picture = decode.VideoReader(os.path.join(runs[0], "curves.png")).frames([0])[0]
    assert picture.shape == (450, 1800, 3) and (picture != 255).any()  # 3 panels
    text = mistake(evaluate, "--plot", tmp("none"), "--out_dir", runs[0])
    assert "expected a run's out_dir" in text, text

    path = os.path.join(runs[0], "confusions.png")
    plot.confusions(np.array([0, 0, 0, 2, 2, 2]), np.array([0, 0, 2, 2, 2, 2]), list("abc"), path)
    picture = decode.VideoReader(path).frames([0])[0].reshape(-1, 3).astype(int)
    from matplotlib import colormaps
    for share in (2 / 3, 1 / 3, 0, 1):  # of a's and c's videos
        color = 255 * np.array(colormaps["Blues"](share)[:3])
        assert (abs(picture - color).max(1) < 3).sum() > 1000, share  # a square is full of it
