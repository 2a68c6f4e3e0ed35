"""probe.py, and what belongs to it: AttentiveProbe, lib/probe.py, tests of probed checkpoints."""

import csv
import importlib
import os
import re

import numpy as np
import torch

import finetune
import probe
import weights
from lib.attentive import AttentiveClassifier, AttentiveProbe
from lib.probe import set_aside
from lib.views import TestVideos, cut
from model import SIZES, count_params
from tests.common import (PROBE, call, checkpoint, difference, labelled, log_rows, mistake,
                          pretrained, probe_data, saved, test, tmp)
from tests.test_run import copied, killed, stage_args

evaluate = importlib.import_module("eval")  # `import eval` would hide the builtin


def random_probe(dim=12, heads=3, classes=5):
    """An AttentiveProbe without zeros and ones that would hide a term."""
    torch.manual_seed(0)
    model = AttentiveProbe(dim, heads, classes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def slow_logits(p: dict, heads: int, tokens: torch.Tensor) -> torch.Tensor:
    """A probe's logits (K,) by its definition, head by head and token by token: tokens (n, D)."""
    p = {k: v.double() for k, v in p.items()}
    linear = lambda x, name: p[f"{name}.weight"] @ x + p.get(f"{name}.bias", 0)

    def norm(x, name):
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]
    query, d = p["query"][0], tokens.shape[1] // heads
    q, gathered = linear(query, "q"), torch.zeros_like(query)
    for h in range(heads):
        part, scores, values = slice(h * d, h * d + d), [], []
        for x in tokens.double():
            k = linear(norm(x, "norm1"), "k") + 7.0  # any bias of the keys cancels
            scores.append((q[part] @ k[part]) / d ** 0.5)
            values.append(linear(norm(x, "norm1"), "v")[part])
        share = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
        gathered[part] = sum(s * v for s, v in zip(share, values))
    x = query + linear(gathered, "proj")
    hidden = linear(norm(x, "norm2"), "mlp.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2 ** 0.5))
    return linear(x + linear(hidden, "mlp.fc2"), "head")


# ---------------------------------------------------------------- model.py

@test
def test_attentive_probe_equals_a_slow_reference():
    """Logits equal a float64 loop over heads and tokens with keys, values and a bias of keys."""
    model, tokens = random_probe(), torch.randn(2, 7, 12) * 3 + 1
    x = torch.nn.functional.layer_norm(tokens, (12,))
    for found, some in zip(model(x), tokens):
        expect = slow_logits(model.state_dict(), 3, some)
        assert (found - expect).abs().max() < 1e-5 < expect.std()


@test
def test_attentive_probe_parameters():
    """12 D^2 + 13 D in a probe and K (D + 1) in its head; the encoder is frozen."""
    for size in ("tiny", "large"):
        D, heads = SIZES[size]["width"], SIZES[size]["heads"]
        # query, q, k, v, proj, two norms, MLP, linear
        count = D + (D * D + D) + D * D + 2 * (D * D + D) + 4 * D + (8 * D * D + 5 * D)
        assert count == 12 * D * D + 13 * D
        assert count_params(AttentiveProbe(D, heads, 400)) == count + 400 * (D + 1)
    model = AttentiveClassifier(3, 2, size="tiny", num_frames=4, img_size=16, patch_size=8)
    trained = [k for k, p in model.named_parameters() if p.requires_grad]
    assert trained and all(k.startswith("probes.") for k in trained)


# ---------------------------------------------------------------- lib/probe.py

@test
def test_set_aside():
    """The same videos for a seed, a share of each class, one at least, never the whole class."""
    labels = [0] * 40 + [1] * 10 + [2] * 2 + [3]
    aside = set_aside(labels, 0.2, 5)
    assert np.bincount(np.array(labels)[aside], minlength=4).tolist() == [8, 2, 1, 0]
    assert (aside == set_aside(labels, 0.2, 5)).all()
    assert (aside != set_aside(labels, 0.2, 6)).any()
    assert np.bincount(np.array(labels)[~set_aside(labels, 0.99, 0)]).tolist() == [1, 1, 1, 1]


# ---------------------------------------------------------------- probe.py

@test
def test_probes_together_equal_one_alone():
    """A probe ends as if trained alone, though the one beside it diverges; all are in a table."""
    train, val = labelled()
    rows = open(train).read().splitlines()
    aside = set_aside(["xyz".index(row.split("\t")[1][0]) for row in rows], 0.1, 0)
    alone = tmp("probe_alone.tsv")
    open(alone, "w").write("\n".join(row for row, out in zip(rows, aside) if not out))
    base = [*PROBE, *probe_data(), "--probe_wd", 0.01]
    text = call(probe, *base, "--probe_lr", 0.05, 1e9, "--out_dir", tmp("together"))
    call(probe, *base, "--probe_lr", 0.05, "--data", alone, "--out_dir", tmp("alone"))
    one, both = checkpoint(tmp("alone")), checkpoint(tmp("together"))
    own = {k: v for k, v in both["model"].items() if "probes.1." not in k}
    assert difference(one["model"], own) < 1e-6
    start = weights.build_model(pretrained(), verbose=False)[0].state_dict()
    frozen = {k: v for k, v in own.items() if k.startswith("encoder.")}
    assert difference(frozen, start) == 0 and len(frozen) > 50
    table = re.findall(r"probe +(\d) +(\S+) +(\S+) +([\d.]+) +([\d.]+|nan) .*?(chosen)?$",
                       text, re.M)
    assert [row[:3] for row in table] == 3 * [("0", "0.05", "0.01"), ("1", "1e+09", "0.01")]
    assert [row[5] for row in table] == 3 * ["chosen", ""], text
    assert log_rows(tmp("together"))[-2]["skipped_steps"] > 0  # it did diverge


@test
def test_probe_is_chosen_on_training_videos():
    """The one marked is the best on what is set aside; nothing of it is trained or tested on."""
    out = tmp("chosen")
    text = call(probe, *PROBE, *probe_data(), "--probe_lr", 0, 0.5, "--out_dir", out)
    last = text.split("validation at step 6")[1]
    rows = [row.split() for row in re.findall(r"probe .*", last)][:4]
    figures = [(float(row[4]), -float(row[5])) for row in rows]  # accuracy and loss set aside
    assert [row[-1] == "chosen" for row in rows] == [f == max(figures) for f in figures], last
    assert "3 of the 12 training videos are set aside to choose one of 4 probes on" in text
    best, state = checkpoint(out, "best.pt"), checkpoint(out)
    chosen = state["chosen"]
    assert rows[chosen][-1] == "chosen" and best["config"]["num_probes"] == 1
    assert all(torch.equal(best["model"][f"probes.0.{k}"], v) for k, v in
               weights.build_model(os.path.join(out, "last.pt"), verbose=False)[0]
               .probes[0].state_dict().items())
    assert torch.equal(best["model"]["probes.0.query"], state["model"][f"probes.{chosen}.query"])


@test
def test_features_are_kept_or_computed_anew():
    """Both ways give the same losses; what is kept is read on resume and removed at the end."""
    losses = []
    for name, more in (("kept", []), ("anew", ["--cache_gb", 0])):
        text = call(probe, *PROBE, *probe_data(), *more, "--out_dir", tmp(f"features_{name}"))
        assert ("computed anew in each step" in text) == (name == "anew"), text
        assert ("are computed and kept in" in text) == (name == "kept"), text
        assert not any(f.endswith(".f16") for f in os.listdir(tmp(f"features_{name}")))
        losses.append([row["loss"] for row in log_rows(tmp(f"features_{name}")) if "loss" in row])
    states = []
    for name in ("read", "lost"):
        out = copied(killed("probe.py"), f"features_{name}")
        if name == "lost":
            os.remove(next(os.path.join(out, f) for f in os.listdir(out) if f.endswith(".f16")))
        text = call(probe, *stage_args("probe.py", out))
        assert "resumed" in text
        assert ("are computed and kept in" in text) == (name == "lost"), text
        states.append(checkpoint(out)["model"])
    assert difference(*states) == 0
    assert np.abs(np.subtract(*losses)).max() < 1e-3 and len(losses[0]) == 6
    assert np.ptp(losses[0]) > 0.005


@test
def test_broken_videos_of_a_probe_are_named():
    """Kept features or not: another video takes its place, the file is named and not tested."""
    train, val = labelled()
    broken = tmp("broken_probe.mp4")
    open(broken, "w").write("x")
    listed = []
    for name, source in (("train", train), ("val", val)):
        listed.append(tmp(f"probe_{name}.tsv"))
        open(listed[-1], "w").write(open(source).read() + f"{broken}\tx class\n")
    for gigabytes in (1, 0):
        out = tmp(f"broken_{gigabytes}")
        call(probe, *PROBE, *probe_data(), "--data", listed[0], "--val_data", listed[1],
             "--probe_lr", 0.05, "--probe_wd", 0.01, "--cache_gb", gigabytes, "--out_dir", out,
             "--max_bad", 1)
        bad = open(os.path.join(out, "bad_videos.txt")).read()
        assert bad.count("\n") == 1 and bad.startswith(broken) and "Invalid data" in bad, bad
        row = log_rows(out)[-2]
        assert row["loss"] > 0 and row["bad_reads"] > 0


@test
def test_finetune_hands_over():
    """finetune.py --probe attentive is probe.py; --probe linear is --linear_probe, also resumed."""
    out = tmp("handed")
    text = call(finetune, "--probe", "attentive", *PROBE, *probe_data(), "--out_dir", out)
    assert "4 probe(s)" in text
    direct = tmp("direct")
    call(probe, *PROBE, *probe_data(), "--out_dir", direct)
    assert difference(checkpoint(out)["model"], checkpoint(direct)["model"]) == 0
    assert "finished" in call(finetune, "--probe=attentive", *PROBE, *probe_data(), "--out_dir",
                              direct)
    linear = ["--data", labelled()[0], "--init", pretrained(), "--max_steps", 2, "--batch_size", 4,
              "--sampling_rate", 1, "--num_workers", 0, "--device", "cpu", "--dtype", "fp32"]
    out = tmp("linear")
    call(finetune, "--linear_probe", *linear, "--out_dir", out)
    old = checkpoint(out)
    del old["args"]["probe"]  # as before the flag was there
    torch.save(old, os.path.join(out, "last.pt"))
    assert "finished" in call(finetune, "--probe", "linear", *linear, "--out_dir", out)
    assert probe.get_args(["--init", "x"]).num_segments == 8
    assert probe.get_args(["--init", "x", "--sampling", "sparse"]).num_segments == 2
    assert "--init" in mistake(probe, "--data", labelled()[0])


# ---------------------------------------------------------------- eval.py

@test
def test_probed_checkpoints_are_tested():
    """3 clips x 3 crops: all clips of a crop in one call, softmax over crops; the chosen probe."""
    model = AttentiveClassifier(3, 2, size="tiny", num_frames=4, img_size=16, patch_size=8)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    ckpt = saved("probed.pt", dict(
        model=model.state_dict(), config=model.config, chosen=1, classes=["x class", "y class",
        "z class"], args=dict(sampling="dense", sampling_rate=1, fps=None, num_segments=3)))
    out, flags = tmp("probed"), ["--dtype", "fp32", "--num_workers", 0]
    text = call(evaluate, "--ckpt", ckpt, "--data", labelled()[1], "--out_dir", out, *flags,
                "--batch_size", 5)
    assert "5 videos x 3 clips x 3 crops" in text
    rows = list(csv.DictReader(open(os.path.join(out, "predictions.csv"))))
    videos = TestVideos([row["path"] for row in rows], 4, (16, 16), 1, num_segments=3)
    state = {k.removeprefix("probes.1."): v for k, v in model.state_dict().items()
             if k.startswith("probes.1.")}
    for i, row in enumerate(rows):
        _, frames, index, _ = videos[i]
        p = 0
        for crop in range(3):
            views = cut(frames, index, (16, 16), 3)[crop::3]  # (clips, T, H, W, C)
            tokens = model.tokens(views).flatten(0, 1)  # (clips * N, D)
            p = p + slow_logits(state, 4, tokens).softmax(0) / 3
        label = "xyz".index(row["label"][0])
        assert abs(p[label] - float(row["probability_of_label"])) < 1e-5, (row, p)
    words = call(evaluate, "--ckpt", ckpt, "--predict", rows[-1]["path"], *flags, "--out_dir", out,
                 "--num_segments", 3, "--num_crops", 3)
    shown = {name: float(share) for name, share in re.findall(r"(. class) ([\d.]+) %", words)}
    assert all(abs(shown[f"{c} class"] - 100 * p[i]) < 0.06 for i, c in enumerate("xyz")), words
    call(evaluate, "--ckpt", ckpt, "--features", rows[0]["path"], *flags, "--out_dir", out)
    found = np.load(os.path.join(out, "00000_0.npz"))["features"]
    with videos.open(rows[0]["path"]) as video:
        windows = videos.decode(video, np.arange(4)[None])
    expect = model.tokens(cut(*windows, (16, 16), 1)).mean(1)[0]
    assert np.abs(found[0] - expect.numpy()).max() < 1e-5
    for mode, value in (("--attention", rows[0]["path"]), ("--export_hf", tmp("no_hf"))):
        text = mistake(evaluate, "--ckpt", ckpt, mode, value, "--out_dir", out)
        assert "attentive probe" in text, text
