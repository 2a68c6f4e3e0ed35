"""python test_all.py [filter]: what the code says of itself, checked in under two minutes on two cores.

Comparisons are with slow float64 references, hand-computed values, published numbers, and transformers' VideoMAE where
it is installed.
"""

import argparse
import ast
import contextlib
import functools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from fractions import Fraction

import av
import numpy as np
import torch
import torch.nn.functional as F

import data
import masking
import pretrain
import weights
from model import (SIZES, Encoder, HeadwiseAttention, VideoClassifier, VideoMAE, count_params, forward_macs,
                   normalize_cubes, param_groups, patchify, position_table, sincos_table, split, unpatchify)

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = []


class Skip(Exception):
    """A test that cannot run here; the message says what is missing."""


def test(f):
    """Registers a test; its docstring is the claim."""
    TESTS.append(f)
    return f


def raises(*words):
    """Context: a ValueError whose message holds all the words."""
    class Expect:
        def __enter__(self): pass
        def __exit__(self, kind, error, tb):
            assert kind is not None and issubclass(kind, ValueError), f"expected a ValueError, got {kind}"
            assert all(str(w) in str(error) for w in words), f"{error} lacks one of {words}"
            return True
    return Expect()


def small(**kw):
    """A tiny VideoMAE with random biases and norms, so that no term is hidden by a zero."""
    torch.manual_seed(0)
    model = VideoMAE(**(dict(size="tiny", num_frames=4, img_size=(16, 24), patch_size=8) | kw))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def clips(model, batch=2, frames=None):
    """(batch, T, H, W, 3) uint8 noise of the model's size, always the same."""
    t, h, w = (g * c for g, c in zip(model.grid, model.cube))
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, frames or t, h, w, 3), dtype=torch.uint8, generator=g)


def mask_for(model, batch=2, ratio=0.5, kind="tube"):
    """(batch, N) bool, always the same."""
    return masking.make_mask(kind, batch, model.grid, ratio, torch.Generator().manual_seed(2))


# ---------------------------------------------------------------- model.py

@test
def test_published_parameter_counts_and_gflops():
    """Parameters and GFLOPs of all four sizes are the published ones."""
    published = dict(small=(24029376, 22033936, 22264936, 57), base=(94210944, 86534800, 86996200, 180),
                     large=(342996992, 304270736, 304885736, 597), huge=(692487296, 632119440, 632888040, 1192))
    with torch.device("meta"):
        for size, (pre, k400, k1000, gflops) in published.items():
            classifier = VideoClassifier(400, size=size)
            assert count_params(VideoMAE(size)) == pre and count_params(classifier) == k400, size
            assert count_params(VideoClassifier(1000, size=size)) == k1000, size
            assert round(forward_macs(classifier) / 1e9) == gflops, (size, forward_macs(classifier))
        for size, T, side, gflops in (("large", 32, 224, 1436), ("large", 32, 320, 3958), ("huge", 32, 320, 7397)):
            assert round(forward_macs(VideoClassifier(400, size=size, num_frames=T, img_size=side)) / 1e9) == gflops


@test
def test_macs_of_pretraining_are_those_of_its_matmuls():
    """forward_macs of a VideoMAE equals the multiply-adds that its Linears and attentions do, plus the LayerNorms."""
    model, macs = small(), []
    mask = mask_for(model)
    def linear(m, args, out):
        macs.append(out[0].numel() // out.shape[-1] * m.weight.numel())
    def attention(m, args, out):
        _, n, d = args[0].shape
        macs.append(n * 3 * d * d + 2 * n * n * d)
    def norm(m, args, out):
        macs.append(5 * out[0].numel())
    def embed(m, args, out):
        macs.append(out[0].numel() * m.proj.weight[0].numel())
    for m in model.modules():
        hook = {"Attention": attention, "LayerNorm": norm, "CubeEmbed": embed, "Linear": linear}.get(type(m).__name__)
        if hook:
            m.register_forward_hook(hook)
    model(clips(model), mask)
    visible, hidden = split(mask)
    assert forward_macs(model, visible.shape[1], hidden.shape[1]) == sum(macs)


@test
def test_position_table():
    """sin/cos of the token index by the formula, exact to float32 at token 1567; resizing keeps what it can."""
    table = sincos_table(1568, 768)
    for p, j in ((0, 0), (1, 1), (1567, 0), (1567, 1), (1567, 300), (800, 767)):
        angle = p / 10000 ** (2 * (j // 2) / 768)
        assert abs(table[p, j].item() - (math.sin(angle) if j % 2 == 0 else math.cos(angle))) < 1e-7, (p, j)
    assert torch.equal(position_table((2, 3, 4), 16, (2, 3, 4)), sincos_table(24, 16))
    tall = position_table((4, 3, 4), 16, (2, 3, 4)).view(4, 12, 16)  # linear in time: ends repeat, 3:1 and 1:3 between
    old = sincos_table(24, 16).view(2, 12, 16)
    for k, w in enumerate((1, 0.75, 0.25, 0)):
        assert torch.allclose(tall[k], w * old[0] + (1 - w) * old[1], atol=1e-6)


@test
def test_patchify():
    """Cubes are in (t, h, w) order, pixels of a cube in (pt, ph, pw, c) order; unpatchify is the inverse."""
    video = torch.arange(2 * 4 * 8 * 12 * 3).view(2, 4, 8, 12, 3)
    cubes = patchify(video, (2, 4, 4))
    assert cubes.shape == (2, 2 * 2 * 3, 2 * 4 * 4 * 3)
    t, h, w, pt, ph, pw, c = 1, 0, 2, 1, 3, 2, 1
    token, pixel = (t * 2 + h) * 3 + w, ((pt * 4 + ph) * 4 + pw) * 3 + c
    assert cubes[1, token, pixel] == video[1, 2 * t + pt, 4 * h + ph, 4 * w + pw, c]
    assert torch.equal(unpatchify(cubes, (2, 2, 3), (2, 4, 4)), video)


def slow_blocks(blocks, x, heads):
    """float64, one sample, one head and one query at a time."""
    for b in blocks:
        p = {k: v.double() for k, v in b.named_parameters()}
        unit = lambda y: (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        norm = lambda y, n: unit(y) * p[f"{n}.weight"] + p[f"{n}.bias"]
        q, k, v = (norm(x, "norm1") @ w for w in p["attn.qkv.weight"].T.chunk(3, 1))
        q, v = q + p["attn.q_bias"], v + p["attn.v_bias"]
        d, out = x.shape[1] // heads, torch.zeros_like(x)
        for h in range(heads):
            s = slice(h * d, (h + 1) * d)
            for i in range(len(x)):
                e = torch.exp(torch.stack([q[i, s] @ k[j, s] for j in range(len(x))]) * d ** -0.5)
                out[i, s] = (e / e.sum()) @ v[:, s]
        x = x + out @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        y = norm(x, "norm2") @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
        x = x + (y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))) @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
    return x


def slow_videomae(model, video, mask):
    """One sample, float64, from the paper's text: embed everything with a Conv3d, then drop; decode; normalised MSE."""
    s, P = SIZES[model.config["size"]], {k: v.double() for k, v in model.named_parameters()}
    norm = lambda y, n: F.layer_norm(y, y.shape[-1:], P[f"{n}.weight"], P[f"{n}.bias"], 1e-6)
    pixels = video.double() / 255
    x = (pixels - torch.tensor(model.config["mean"]).double()) / torch.tensor(model.config["std"]).double()
    weight, bias = P["encoder.patch_embed.proj.weight"], P["encoder.patch_embed.proj.bias"]
    x = F.conv3d(x.permute(3, 0, 1, 2)[None], weight, bias, stride=model.cube)
    x = x[0].flatten(1).T + model.encoder.pos.double()
    x = norm(slow_blocks(model.encoder.blocks, x[~mask], s["heads"]), "encoder.norm") @ P["encoder_to_decoder.weight"].T
    x = torch.cat([x + model.dec_pos.double()[~mask], P["mask_token"][0] + model.dec_pos.double()[mask]])
    x = slow_blocks(model.decoder.blocks, x, s["dec_heads"])[-int(mask.sum()):]
    pred = norm(x, "decoder.norm") @ P["decoder.head.weight"].T + P["decoder.head.bias"]
    (t, h, w), (pt, ph, pw) = model.grid, model.cube
    target = []
    for i in range(t * h * w):
        a, b, c = i // (h * w) * pt, i // w % h * ph, i % w * pw
        cube = pixels[a:a + pt, b:b + ph, c:c + pw].reshape(-1, 3)
        target.append(((cube - cube.mean(0)) / (cube.std(0) + 1e-6)).flatten())
    return ((pred - torch.stack(target)[mask]) ** 2).mean(), pred


@test
def test_forward_equals_slow_float64_reference():
    """Loss and prediction equal a float64 computation in loops that embeds all cubes by Conv3d and drops afterwards."""
    model = small()
    video, mask = clips(model), mask_for(model)
    with torch.no_grad():
        loss, pred = model(video, mask)
        slow = [slow_videomae(model, v, m) for v, m in zip(video, mask)]
    assert abs(loss - torch.stack([l for l, _ in slow]).mean()) < 1e-5
    assert (pred - torch.stack([p for _, p in slow])).abs().max() < 1e-5


@test
def test_headwise_attention():
    """The CPU's bf16 attention and its gradients equal softmax attention in float64, within bf16's precision."""
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, 3, 2001, 4, dtype=torch.float64, generator=g)  # N so large that heads go one by one
    assert len(HeadwiseAttention.groups(q)) == 3 and len(HeadwiseAttention.groups(q[:, :100])) == 1
    def results(attend, dtype):
        x = [y.detach().to(dtype).requires_grad_() for y in (q, k, v)]
        out = attend(*x)
        out.backward(grad.to(dtype))
        return [out] + [y.grad for y in x]
    plain = results(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 0.02)):
        for a, b in zip(results(HeadwiseAttention.apply, dtype), plain):
            assert (a - b).norm() < tolerance * b.norm()
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(clips(model), mask_for(model))[0]
    assert abs(loss - model(clips(model), mask_for(model))[0]) < 0.02


@test
def test_counts_given_or_counted():
    """num_visible and num_decoded change nothing when given; float video in [0,1] equals uint8."""
    model = small(num_frames=8, img_size=32)
    video, mask, cells = clips(model), mask_for(model), mask_for(model, kind="running_cell")
    with torch.no_grad():
        a = model(video, mask, cells)[0]
        b = model(video.float() / 255, mask, cells, int((~mask[0]).sum()), int((~cells[0]).sum()))[0]
    assert abs(a - b) < 1e-6


@test
def test_decoder_mask():
    """With a decoder mask the decoded tokens are its open ones, and only those that the encoder did not see count."""
    model = small(num_frames=8, img_size=32)
    video, mask, cells = clips(model), mask_for(model), mask_for(model, kind="running_cell")
    visible, ids, counts = model.select(mask, cells)
    assert all(set(i.tolist()) == set((~c).nonzero().flatten().tolist()) for i, c in zip(ids, cells))
    assert torch.equal(counts, mask.gather(1, ids)) and 0 < counts.sum() < counts.numel()
    with torch.no_grad():
        loss, pred = model(video, mask, cells)
    target = normalize_cubes(patchify(video, model.cube).float() / 255)
    error = [((pred[b, k] - target[b, i]) ** 2).mean() for b in range(2) for k, i in enumerate(ids[b]) if mask[b, i]]
    assert abs(loss - torch.stack(error).mean()) < 1e-6


@test
def test_nothing_to_predict_is_no_nan():
    """A batch whose decoded tokens were all visible has loss 0, not 0/0."""
    model = small(target="center", num_frames=8)
    mask = torch.zeros(2, math.prod(model.grid), dtype=torch.bool)
    mask[:, :6] = True  # the first slot; the centre frame lies in the third
    loss, _ = model(clips(model), mask)
    loss.backward()
    assert loss == 0 and pretrain.baselines(model, clips(model), mask) == (0, 0)


@test
def test_targets():
    """Normalised per cube and channel (zeros score (n-1)/n), raw, centre frame and denser clip are what they say."""
    model = small()
    video = clips(model)
    zeros, _ = pretrain.baselines(model, video, mask_for(model))
    n = math.prod(model.cube)
    assert abs(zeros - (n - 1) / n) < 1e-5
    all_ids = torch.arange(math.prod(model.grid)).expand(2, -1)
    raw = small(norm_pix_loss=False).targets(video, all_ids)
    assert torch.equal(raw, patchify(video.float() / 255, model.cube))
    center = small(target="center", norm_pix_loss=False, num_frames=8)
    video = clips(center)
    _, ids, counts = center.select(mask_for(center))
    assert torch.equal(center.targets(video, ids), patchify(video[:, 4:5].float() / 255, (1, 8, 8)))
    assert ids[0, 0] == 2 * 6 and torch.equal(counts, mask_for(center)[:, 12:18])
    dense = small(target="dense", norm_pix_loss=False)
    video, all_ids = clips(dense, frames=8), torch.arange(math.prod(dense.grid)).expand(2, -1)
    assert torch.equal(dense.targets(video, all_ids), patchify(video.float() / 255, (4, 8, 8)))
    for m, v in ((center, clips(center)), (dense, video)):
        loss, *panels = pretrain.reconstruct(m, v, mask_for(m))
        assert torch.isfinite(loss) and all(p.shape == panels[0].shape for p in panels)
    assert torch.allclose(panels[0], video.float() / 255)


@test
def test_reconstruct_hides_what_is_masked():
    """In the pictures visible cubes are the input; `own` does not change when only hidden pixels do."""
    model = small()
    video, mask = clips(model), mask_for(model)
    hidden = unpatchify(mask[..., None].expand(-1, -1, 3 * math.prod(model.cube)), model.grid, model.cube)
    other = torch.where(hidden, 255 - video, video)
    a, b = pretrain.reconstruct(model, video, mask), pretrain.reconstruct(model, other, mask)
    for panel in a[1:]:
        assert torch.equal(panel[~hidden], video[~hidden] / 255)
    assert torch.equal(a[3], b[3]) and not torch.equal(a[4], b[4]) and (a[2][hidden] == 0.5).all()


@test
def test_checkpointing_gives_the_same_gradients():
    """Activation checkpointing changes no gradient."""
    grads = []
    for on in (False, True):
        model = small(checkpointing=on)
        model(clips(model), mask_for(model))[0].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(g is not None and torch.allclose(g, h, atol=1e-7) for g, h in zip(*grads))


@test
def test_param_groups():
    """Layer decay is ld^(depth+1-id); 1-D parameters and mask_token do not decay; every parameter is in one group."""
    model = VideoClassifier(5, size="tiny", num_frames=4, img_size=16, patch_size=8)
    groups = param_groups(model, 0.05, 0.5)
    where = {id(p): g for g in groups for p in g["params"]}
    assert len(where) == len(list(model.parameters())) == sum(len(g["params"]) for g in groups)
    expect = {"patch_embed.proj.weight": (0.5 ** 5, 0.05), "patch_embed.proj.bias": (0.5 ** 5, 0),
              "blocks.0.attn.qkv.weight": (0.5 ** 4, 0.05), "blocks.0.attn.q_bias": (0.5 ** 4, 0),
              "blocks.3.norm2.weight": (0.5, 0), "fc_norm.weight": (1, 0), "head.weight": (1, 0.05)}
    for name, (scale, decay) in expect.items():
        g = where[id(model.get_parameter(name))]
        assert (g["lr_scale"], g["weight_decay"]) == (scale, decay), name
    model = small()
    no_decay = {id(p) for g in param_groups(model, 0.05) if g["weight_decay"] == 0 for p in g["params"]}
    assert no_decay == {id(p) for n, p in model.named_parameters() if p.ndim == 1 or n == "mask_token"}


@test
def test_drop_path():
    """Drop path leaves out whole branches per sample, keeps the mean, and does nothing in eval mode."""
    torch.manual_seed(0)
    block = VideoClassifier(2, size="tiny", num_frames=2, img_size=16, patch_size=8, drop_path=0.4).blocks[-1]
    assert math.isclose(block.drop_path, 0.4)
    x = torch.ones(4000, 1, 2)
    y = block.train().skip(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()} and abs(y.mean() - 1) < 0.05
    assert (y[..., 0] == y[..., 1]).all() and block.eval().skip(x) is x


@test
def test_model_errors():
    """Impossible sizes are refused with what is allowed."""
    with raises("giant", "tiny, small"):
        VideoMAE("giant")
    with raises("num_frames=15", "tubelet_size=2"):
        VideoMAE("tiny", num_frames=15)
    with raises("target='all'", "center"):
        VideoMAE("tiny", target="all")


# ---------------------------------------------------------------- weights.py

def saved(name, obj):
    """Path of a new file that torch.save has written."""
    path = os.path.join(tempfile.mkdtemp(dir=TMP), name)
    torch.save(obj, path)
    return path


@test
def test_reference_layout():
    """Files with model/module, argparse.Namespace, fp16, with and without encoder. load to the same tensors."""
    source = small()
    state = source.state_dict()
    for top in (dict(model=state, args=argparse.Namespace(lr=1)), dict(module={k: v.half() for k, v in state.items()}),
                state, {"module." + k: v for k, v in state.items()}):
        model = VideoMAE("tiny", num_frames=4, img_size=(16, 24), patch_size=8)
        report = weights.load_pretrained(model, saved("x.pth", top), verbose=False)
        assert not report["new"] and not report["skipped"]
        assert all(torch.allclose(v, state[k], atol=1e-3) for k, v in model.state_dict().items())
    classifier = VideoClassifier(7, size="tiny", num_frames=4, img_size=(16, 24), patch_size=8)
    report = weights.load_pretrained(classifier, saved("x.pth", dict(model=state)), verbose=False)
    assert set(report["new"]) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert "norm.weight" in report["skipped"] and "decoder.norm.weight" in report["skipped"]
    assert torch.equal(classifier.blocks[3].mlp.fc2.weight, state["encoder.blocks.3.mlp.fc2.weight"])


@test
def test_malicious_and_broken_files_are_refused():
    """A pickle that would run code is not run; what is no checkpoint gives an error that names the file."""
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + os.path.join(TMP, "evil"),)
    with raises("x.pth", "weights_only"):
        weights.load_pretrained(small(), saved("x.pth", dict(model=Evil())))
    assert not os.path.exists(os.path.join(TMP, "evil"))
    with raises("absent.pth", "no such file"):
        weights.load_pretrained(small(), "absent.pth")
    with raises("x.pth", "no ViT in a known layout"):
        weights.load_pretrained(small(), saved("x.pth", dict(model=dict(a=torch.zeros(2)))))


@test
def test_shape_mismatch_names_both_shapes():
    """Another width is an error with both shapes; another number of classes leaves a new head and says so."""
    with raises("mask_token", "(1, 1, 96)", "(1, 1, 192)"):
        wider = VideoMAE("small", num_frames=4, img_size=16, patch_size=8)
        weights.load_pretrained(wider, saved("x.pth", small().state_dict()))
    make = lambda n: VideoClassifier(n, size="tiny", num_frames=4, img_size=16, patch_size=8)
    report = weights.load_pretrained(make(3), saved("x.pth", make(5).state_dict()), verbose=False)
    assert report["new"]["head.weight"] == "(5, 128) in the file, (3, 128) in this model"


@test
def test_other_frames_and_sides():
    """At another T, H, W all tensors load as they are; only position tables are resized, from the file's own grid."""
    source = small()
    path = saved("x.pt", dict(model=source.state_dict(), config=source.config))
    model = VideoMAE("tiny", num_frames=8, img_size=32, patch_size=8)
    report = weights.load_pretrained(model, path, verbose=False)
    assert not report["new"] and not report["skipped"] and model.config["pos_grid"] == [2, 2, 3]
    assert torch.equal(model.encoder.pos, position_table((4, 4, 4), 128, (2, 2, 3)))
    assert torch.equal(model.dec_pos, position_table((4, 4, 4), 96, (2, 2, 3)))
    assert torch.equal(VideoMAE(**model.config).encoder.pos, model.encoder.pos)


@test
def test_image_weights_are_inflated():
    """A timm ViT: patch embedding repeated over the tubelet and divided; qkv.bias less its k third; same outputs."""
    torch.manual_seed(0)
    image = Encoder("tiny", num_frames=1, img_size=16, patch_size=8, tubelet_size=1)
    state = {k: torch.randn_like(v) * 0.1 for k, v in image.state_dict().items()}
    timm = {k: v for k, v in state.items() if not k.endswith(("q_bias", "v_bias"))}
    timm["pos_embed"] = torch.zeros(1, 5, 128)
    for i in range(4):
        q, v = state[f"blocks.{i}.attn.q_bias"], state[f"blocks.{i}.attn.v_bias"]
        timm[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.randn(128), v])
    timm["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, 0]
    image.load_state_dict(state)
    video = Encoder("tiny", num_frames=2, img_size=16, patch_size=8)
    report = weights.load_pretrained(video, saved("vit.pth", timm), verbose=False)
    assert set(report["skipped"]) == {"pos_embed"}
    frame = torch.randint(0, 256, (2, 1, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.allclose(video(frame.repeat(1, 2, 1, 1, 1)), image(frame), atol=1e-5)


@test
def test_hf_layout_round_trip():
    """to_hf and back gives the same tensors, under both spellings of the q and v biases."""
    source = small(num_frames=16, img_size=112, patch_size=16)
    state, config = weights.to_hf(source)
    v5 = {k.replace(".q_bias", ".query.bias").replace(".v_bias", ".value.bias"): v for k, v in state.items()}
    for names in (state, v5):
        path = saved("pytorch_model.bin", names)
        json.dump(config, open(os.path.join(os.path.dirname(path), "config.json"), "w"))
        model = VideoMAE("tiny", num_frames=16, img_size=112, patch_size=16)
        report = weights.load_pretrained(model, os.path.dirname(path), verbose=False)
        assert not report["new"] and not report["skipped"] and model.config == source.config
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in source.state_dict().items())


@test
def test_transformers_agrees():
    """Loss, predictions and logits equal Hugging Face's VideoMAE within 1e-5, both ways (needs transformers)."""
    try:
        import transformers
    except ImportError:
        raise Skip("pip install transformers to compare with it") from None
    def equal_eps(m):  # transformers fixes 1e-5 in two places
        for x in m.modules():
            if isinstance(x, torch.nn.LayerNorm):
                x.eps = 1e-6
        return m.eval()
    ours = small(num_frames=16, img_size=112, patch_size=16)
    classifier = VideoClassifier(5, size="tiny", num_frames=16, img_size=112)
    torch.nn.init.normal_(classifier.head.weight)
    for model, cls in ((ours, transformers.VideoMAEForPreTraining),
                       (classifier, transformers.VideoMAEForVideoClassification)):
        state, config = weights.to_hf(model)
        folder = tempfile.mkdtemp(dir=TMP)
        torch.save(state, os.path.join(folder, "pytorch_model.bin"))
        json.dump(config, open(os.path.join(folder, "config.json"), "w"))
        hf = equal_eps(cls.from_pretrained(folder))
        video, mask = clips(model), mask_for(model)
        x = (video / 255 - torch.tensor(model.config["mean"])) / torch.tensor(model.config["std"])
        for _ in range(2):
            with torch.no_grad():
                theirs = hf(x.permute(0, 1, 4, 2, 3), **(dict(bool_masked_pos=mask) if model is ours else {}))
                if model is ours:
                    loss, mine = model(video, mask)
                    assert abs(loss - theirs.loss) < 1e-5
                else:
                    mine = model.eval()(video)
                assert (mine - theirs.logits).abs().max() < 1e-5
                for p in hf.parameters():  # and back: other weights, saved by transformers
                    p.add_(0.02 * torch.randn_like(p))
            hf.save_pretrained(folder)
            weights.load_pretrained(model, os.path.join(folder, "model.safetensors"), verbose=False)


# ---------------------------------------------------------------- masking.py

@test
def test_mask_counts():
    """Masked tokens on 8x14x14 as in the paper: tube .9 1408, .75 1176 (392 visible), random .9 1411, frame 7 of 8."""
    grid = (8, 14, 14)
    for kind, ratio, masked in (("tube", 0.9, 1408), ("tube", 0.75, 1568 - 392), ("tube", 0.95, 1568 - 80),
                                ("random", 0.9, 1411), ("frame", 0.875, 7 * 196), ("running_cell", 0.5, 784)):
        mask = masking.make_mask(kind, 5, grid, ratio, torch.Generator().manual_seed(0))
        assert mask.shape == (5, 1568) and mask.dtype == torch.bool
        assert (mask.sum(1) == masked).all() and masking.num_masked(kind, grid, ratio) == masked, kind
        assert torch.equal(mask, masking.make_mask(kind, 5, grid, ratio, torch.Generator().manual_seed(0)))
        assert not torch.equal(mask, masking.make_mask(kind, 5, grid, ratio, torch.Generator().manual_seed(1)))
        assert not (mask[0] == mask).all() or kind == "frame", f"{kind}: all samples alike"


@test
def test_mask_shapes():
    """Tubes are the same in all slots, frame masks whole slots; running cells visit all positions equally often."""
    g = torch.Generator().manual_seed(0)
    tube = masking.tube_mask(3, (4, 6, 6), 0.5, g).view(3, 4, 36)
    assert (tube == tube[:, :1]).all()
    frame = masking.frame_mask(3, (4, 6, 6), 0.5, g).view(3, 4, 36)
    assert (frame == frame[:, :, :1]).all()
    for ratio in (0.25, 0.5, 0.75):
        cells = masking.running_cell_mask(64, (4, 6, 6), ratio, g).view(64, 4, 6, 6)
        assert (cells.sum(1) == 4 * ratio).all()
        assert (cells.view(64, 4, 3, 2, 3, 2).sum((3, 5)) == 4 * ratio).all()
    assert len({tuple(c.flatten().tolist()) for c in cells}) == 4
    mean = masking.random_mask(4000, (2, 2, 2), 0.5, g).float().mean(0)
    assert (mean - 0.5).abs().max() < 0.05


@test
def test_mask_errors():
    """A ratio that leaves nothing visible or nothing masked is refused, and so is an unknown mask."""
    for ratio in (0, 1, 1.2, -0.5):
        with raises("mask_ratio", "0 < mask_ratio < 1"):
            masking.make_mask("tube", 1, (8, 14, 14), ratio)
    with raises("0 of 4", "frame"):
        masking.make_mask("frame", 1, (4, 2, 2), 0.1)
    with raises("block", "tube"):
        masking.make_mask("block", 1, (4, 2, 2), 0.5)
    with raises("even"):
        masking.make_mask("running_cell", 1, (4, 3, 2), 0.5)


# ---------------------------------------------------------------- data.py

def numbered(n=40, h=64, w=96):
    """Frames with their number on the left (8 bits, black and white blocks) and moving noise beside it: real GOPs."""
    rng, frames = np.random.default_rng(0), np.full((n, h, w, 3), 128, np.uint8)
    noise = rng.integers(0, 255, (h // 8 + 1, w * 4, 3), dtype=np.uint8).repeat(8, 0)[:h]
    for i in range(n):
        frames[i, :, w // 2:] = noise[:, 2 * i:2 * i + w - w // 2]
        for bit in range(8):
            y, x = bit // 4 * h // 2, bit % 4 * w // 8
            frames[i, y:y + h // 2, x:x + w // 8] = 255 * (i >> bit & 1)
    return frames


def numbers(frames):
    """Reads the numbers back."""
    h, w = frames.shape[1:3]
    bits = [frames[:, bit // 4 * h // 2 + h // 4, bit % 4 * w // 8 + w // 16].mean(-1) > 128 for bit in range(8)]
    return sum(b.astype(int) << k for k, b in enumerate(bits))


def write(name, frames, codec="libx264", pix_fmt="yuv420p", pts=None, container={}, **options):
    """Like data.write_video, with any codec and any time stamps (in 1/1000 s)."""
    path = os.path.join(TMP, name)
    with av.open(path, "w", options=container) as out:
        stream = out.add_stream(codec, rate=25, options={k.replace("_", "-"): str(v) for k, v in options.items()})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(frame, "rgb24").reformat(format=pix_fmt)
            if pts is not None:
                frame.pts, frame.time_base = int(pts[i]), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@functools.cache
def odd_files():
    """{kind: path} of files with the same 40 numbered frames."""
    f = numbered()
    return {
        "B-frames, pyramid, long GOP": write("bframes.mp4", f, g=250, bf=3),
        "short GOP, open": write("open.mkv", f, g=10, bf=3, x264_params="open-gop=1:scenecut=0"),
        "no B-frames": write("plain.mp4", f, bf=0, g=12),
        "non-zero start": write("start.mkv", f, pts=5000 + 40 * np.arange(40), bf=2, g=12),
        "variable rate": write("vfr.mkv", f, pts=np.cumsum(np.random.default_rng(0).integers(10, 200, 40)), bf=2, g=12),
        "AVI with B-frames": write("b.avi", f, codec="mpeg4", bf=2, g=12, qscale=2, flags="+qscale"),
        "H.264 with B-frames in AVI": write("h264.avi", f, bf=2, g=12),
        "MPEG transport stream": write("x.ts", f, bf=2, g=12),
        "MPEG-2": write("x.mpg", f, codec="mpeg2video", bf=2, g=12, b=4000000),
        "4:4:4": write("444.mp4", f, pix_fmt="yuv444p", g=12),
        "10 bit": write("10.mp4", f, codec="libx265", pix_fmt="yuv420p10le", g=12, x265_params="log-level=error"),
        "MJPEG, no key frame structure": write("mj.avi", f, codec="mjpeg", pix_fmt="yuvj420p"),
        "odd size": write("odd.mp4", numbered(40, 63, 97), pix_fmt="yuv444p", g=12),
        "VP8 with hidden frames": write("vp8.webm", f, codec="libvpx", b=2000000, auto_alt_ref=1, lag_in_frames=16,
                                        g=20),
        "VP9": write("vp9.webm", f, codec="libvpx-vp9", b=2000000, lag_in_frames=16, g=20, cpu_used=8),
        "GIF": write("x.gif", f, codec="gif", pix_fmt="rgb8"),
    }


@test
def test_decoding_is_frame_exact():
    """Any frames in any order of every kind of file are the right ones as presented, from memory and by seeking."""
    rng = np.random.default_rng(0)
    keep = data.KEEP_PACKETS
    try:
        for data.KEEP_PACKETS in (keep, 0):
            for kind, path in odd_files().items():
                with data.VideoReader(path) as video:
                    assert len(video) == 40, (kind, len(video))
                    for wanted in ([0], [39], [17, 3, 3, 30], range(40), rng.integers(0, 40, 5)):
                        got = numbers(video.frames(wanted))
                        assert (got == np.array(wanted)).all(), (kind, list(wanted), got)
                    assert (np.diff(video.times) > 0).all(), kind
    finally:
        data.KEEP_PACKETS = keep


@test
def test_decoding_stops_at_the_last_frame():
    """A clip decodes from its key frame to its last frame, no further; frames nobody refers to are left out."""
    with data.VideoReader(odd_files()["no B-frames"]) as video:
        seen = []
        read = video.read
        video.read = lambda a, b: (seen.append(i) or (i, p) for i, p in read(a, b))
        video.frames([14, 17])
        assert seen == list(range(12, 18)), seen
    with data.VideoReader(odd_files()["B-frames, pyramid, long GOP"]) as video:
        decoded = list(video.decode(video.read(0, 40), wanted={video.pts[video.order[39]]}))
        assert len(decoded) < 30, len(decoded)


@test
def test_rotation_and_pictures():
    """Rotation metadata turns frames upright; a picture is a video of one frame; PNG writing is lossless."""
    image = np.random.default_rng(0).integers(0, 255, (10, 14, 3), dtype=np.uint8)
    data.write_png(os.path.join(TMP, "a.png"), image)
    with data.VideoReader(os.path.join(TMP, "a.png")) as video:
        assert len(video) == 1 and (video.frames([0, 0])[1] == image).all()
    class Turned:  # PyAV cannot write a display matrix: a frame that says it has one
        rotation = 90
    class Rgb:
        def reformat(self, frame, **kw): return self
        def to_ndarray(self): return image
    with data.VideoReader(os.path.join(TMP, "a.png")) as video:
        video.to_rgb = Rgb()
        assert (video.convert(Turned) == np.rot90(image)).all()


@test
def test_broken_videos_give_clear_errors():
    """Cut, empty, absent, audio-only, non-video files: the error names the file; a cut one gives frames or an error."""
    good = open(odd_files()["B-frames, pyramid, long GOP"], "rb").read()
    cut, empty, text, sound = (os.path.join(TMP, n) for n in ("cut.mp4", "empty.mp4", "text.mp4", "sound.wav"))
    open(cut, "wb").write(good[:len(good) // 2])
    open(empty, "wb").close()
    open(text, "w").write("no video\n" * 100)
    with av.open(sound, "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        sample = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sample.rate = 8000
        out.mux(stream.encode(sample))
    for path in (cut, empty, text, sound, os.path.join(TMP, "absent.mp4")):
        with raises(path):
            data.VideoReader(path)
    half = os.path.join(TMP, "half.ts")
    whole = open(odd_files()["MPEG transport stream"], "rb").read()
    open(half, "wb").write(whole[:len(whole) // 2])
    with data.VideoReader(half) as video:
        n = len(video)
        assert 5 < n < 40 and (numbers(video.frames(range(n - 2))) == np.arange(n - 2)).all()
        with raises("half.ts", n):
            video.frames([n])
    bad = bytearray(open(odd_files()["no B-frames"], "rb").read())
    at = bad.find(b"mdat") + 3000
    bad[at:at + 2000] = bytes(2000)
    damaged = os.path.join(TMP, "damaged.mp4")
    open(damaged, "wb").write(bad)
    with raises("damaged.mp4"):
        with data.VideoReader(damaged) as video:
            video.frames(range(40))


@test
def test_list_rows():
    """Commas, tabs and last spaces; paths with spaces and commas; label optional; a row without a path is named."""
    for row, expect in (("a.mp4 3", ("a.mp4", "3")), ("my dir/a b.mp4 3", ("my dir/a b.mp4", "3")),
                        ("a, b.mp4,jump", ("a, b.mp4", "jump")), ("a, b.mp4 3", ("a, b.mp4", "3")),
                        ("a b.mp4", ("a b.mp4", None)), ("x y.webm\tlong label", ("x y.webm", "long label")),
                        ('"q,r.avi",7', ("q,r.avi", "7")), ('"a, b.mp4","x, y"', ("a, b.mp4", "x, y")),
                        ("a.mp4,b, c", ("a.mp4", "b, c")), ("a.mp4 b c", ("a.mp4", "b c")),
                        ('"q" s.mp4', ('"q" s.mp4', None)), ("noending 4", ("noending", "4")),
                        ("a.mp4,", ("a.mp4", None))):
        assert data.parse_row(row, "") == expect, (row, data.parse_row(row, ""))
    with raises("list.txt row 3", "word"):
        data.parse_row("word", "list.txt row 3")


@test
def test_folders_and_lists():
    """Class folders give labels; lists honour data_root, CR LF, BOM, comments, blank lines; errors name the source."""
    root = os.path.join(TMP, "set")
    for name in ("walk/a.mp4", "run/deep/b.MP4", "run/notes.txt"):
        os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
        open(os.path.join(root, name), "w").close()
    paths, labels = data.read_videos(root)
    assert [os.path.relpath(p, root) for p in paths] == ["run/deep/b.MP4", "walk/a.mp4"] and labels == ["run", "walk"]
    os.symlink("..", os.path.join(root, "run", "deep", "loop"))
    open(os.path.join(root, "walk", "._a.mp4"), "w").close()
    assert len(data.read_videos(root)[0]) == 2 and data.read_videos(paths[0]) == ([paths[0]], [None])
    assert data.read_videos(os.path.join(root, "walk")) == ([os.path.join(root, "walk", "a.mp4")], [None])
    rows = os.path.join(TMP, "rows.csv")
    open(rows, "w", newline="").write("\ufeff# comment\r\nwalk/a.mp4,0\r\n\r\nrun/deep/b.MP4,1\r\n")
    paths = [os.path.join(root, "walk/a.mp4"), os.path.join(root, "run/deep/b.MP4")]
    assert data.read_videos(rows, root) == (paths, ["0", "1"])
    with raises("rows.csv", "walk/a.mp4", "data_root"):
        data.read_videos(rows)
    with raises("nowhere", "no such file"):
        data.read_videos("nowhere")
    os.makedirs(os.path.join(TMP, "none"))
    with raises("none", "no videos"):
        data.read_videos(os.path.join(TMP, "none"))


@test
def test_index_layouts():
    """Kinetics, SSv2, UCF101 and HMDB51 annotations become lists with the right paths and labels."""
    videos = os.path.join(TMP, "videos")
    for name in ("jumping rope/abc_000001_000011.mp4", "12.webm", "Fencing/v_Fencing_g01_c01.avi", "wave/x y.avi",
                 "wave/z.avi"):
        os.makedirs(os.path.dirname(os.path.join(videos, name)), exist_ok=True)
        open(os.path.join(videos, name), "w").close()
    os.makedirs(os.path.join(TMP, "notes"), exist_ok=True)
    note = lambda name, text: open(os.path.join(TMP, "notes", name), "w").write(text)
    note("k.csv", "label,youtube_id,time_start,time_end,split\n"
                  "jumping rope,abc,1,11,train\njumping rope,gone,2,12,train\n")
    note("s.json", json.dumps([dict(id="12", label="x", template="Pushing [something] left", placeholders=["a"])]))
    note("u.txt", "Fencing/v_Fencing_g01_c01.avi 1\n")
    note("wave_test_split1.txt", "x y.avi 1 \nz.avi 2 \n")
    for layout, annotation, args, expect in (
            ("kinetics", "k.csv", [], ["jumping rope/abc_000001_000011.mp4\tjumping rope"]),
            ("ssv2", "s.json", [], ["12.webm\tPushing something left"]),
            ("ucf101", "u.txt", [], ["Fencing/v_Fencing_g01_c01.avi\tFencing"]),
            ("hmdb51", "", ["--part", "test"], ["wave/z.avi\twave"]), ("hmdb51", "", [], ["wave/x y.avi\twave"])):
        out = os.path.join(TMP, "list.tsv")
        with contextlib.redirect_stdout(None):
            data.main(["index", layout, os.path.join(TMP, "notes", annotation), videos, out, *args])
        assert open(out).read().splitlines() == [os.path.join(videos, e) for e in expect], layout
        assert data.read_videos(out)[1] == [expect[0].split("\t")[1]]


@test
def test_samplers():
    """Dense, sparse and by-time indices equal hand-computed ones; the start is uniform over [0, n - frames*stride]."""
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
def test_crops():
    """Multi-scale crops lie inside, have allowed sides, reach all 13 anchors; crop_resize puts pixels in place."""
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
def test_toy_is_deterministic_and_moves():
    """The same toy clip twice; classes share their first frames and move as their names say; 8 classes, balanced."""
    for label, name in enumerate(data.TOY_CLASSES):
        clip = data.toy_clip(np.random.default_rng(3), label).astype(float)
        assert (clip == data.toy_clip(np.random.default_rng(3), label)).all() and clip.std() > 20, name
        assert (clip[0] == data.toy_clip(np.random.default_rng(3), 0)[0]).all(), "the label changes a single frame"
        dx, dy = {"right": (2, 0), "left": (-2, 0), "down": (0, 2), "up": (0, -2)}.get(name, (0, 0))
        if dx or dy:  # shifting frame t by about the speed explains frame t+1 better than shifting it back
            fit = lambda s: abs(np.roll(clip[0], (s * dy, s * dx), (0, 1)) - clip[1])[4:-4, 4:-4].mean()
            assert fit(1) < 0.5 * fit(-1), name
    assert data.TOY_TRAIN % 8 == data.TOY_VAL % 8 == 0 and len(data.TOY_CLASSES) == 8


@functools.cache
def toy_videos(n=12):
    """A folder of n toy videos."""
    folder = os.path.join(TMP, "toy_videos")
    os.makedirs(folder)
    for i in range(n):
        data.write_video(os.path.join(folder, f"{i}.mp4"), data.toy_clip(np.random.default_rng(i), i % 8), g=8)
    return folder


@test
def test_clips_do_not_depend_on_workers():
    """The clips of a step are the same from 0, 1 and 2 workers; repeat_aug gives clips that differ from one decode."""
    paths, _ = data.read_videos(toy_videos())
    made = []
    for workers in (0, 1, 2):
        ds = data.PretrainClips(paths, 4, (32, 32), 2, repeat_aug=2, flip=True, seed=5)
        loader = torch.utils.data.DataLoader(ds, batch_sampler=data.Batches(12, 4, 1, 0, 1, 2, 6, 5),
                                             num_workers=workers, collate_fn=data.collate)
        made.append([clips for clips, _ in loader])
    assert len(made[0]) == 4 and made[0][0].shape == (8, 4, 32, 32, 3) and made[0][0].dtype == torch.uint8
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*made))
    assert not torch.equal(made[0][0][0], made[0][0][1])


@test
def test_batches():
    """Every epoch is a permutation; ranks and accumulation cut the same stream; a later start gives the same rest."""
    def stream(b, acc, world, first=0, last=6):
        ranks = [data.Batches(7, b, acc, r, world, first, last, 0) for r in range(world)]
        return [sum(batches, []) for batches in zip(*ranks, strict=True)]
    one = sum(stream(4, 1, 1), [])
    assert [sorted(i for e, i in one if e == epoch) for epoch in range(3)] == [list(range(7))] * 3
    assert one == sum(stream(2, 1, 2), []) == sum(stream(2, 2, 1), []) == sum(stream(1, 2, 2), [])
    assert one[8:] == sum(stream(4, 1, 1, first=2), []) and one[:7] != [(0, i) for i in range(7)]


@test
def test_bad_videos_are_replaced_and_named():
    """A broken file is reported and gives way to another, drawn from (seed, epoch, index); ten in a row give None."""
    paths, _ = data.read_videos(toy_videos())
    broken = os.path.join(TMP, "broken.mp4")
    open(broken, "w").write("x")
    ds = data.PretrainClips(paths + [broken], 4, (32, 32), 1)
    clip, bad = ds[0, len(paths)]
    assert [p for p, _ in bad] == [broken] * len(bad) and bad and broken in bad[0][1]
    assert torch.equal(clip, ds[0, len(paths)][0])
    assert data.PretrainClips([broken], 4, (32, 32), 1)[0, 0][0] is None
    out = run("data.py", "check", os.path.dirname(broken), "--full", ok=False, cwd=toy_videos())
    assert "broken.mp4: cannot be opened" in out


@test
def test_text_is_drawn():
    """Letters appear in the picture and are cut off at its edge."""
    image = np.full((12, 20, 3), 255, np.uint8)
    data.draw_text(image, "I", 1, 1, 2)
    assert (image[1:3, 1:7] == 0).all() and (image[3:9, 3:5] == 0).all() and (image[3:9, 1:3] == 255).all()
    data.draw_text(image, "WWWWWWWW", 9, 0, 2)


# ---------------------------------------------------------------- pretrain.py

def start(script, *args, ranks=None, cwd=None):
    """Starts a script, on torchrun ranks if told; its output is a pipe."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    return subprocess.Popen([sys.executable, *torchrun, os.path.join(HERE, script), *map(str, args)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd or TMP,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def children(pid):
    """Process ids of a process's children: from /proc, or from pgrep where there is none."""
    if not os.path.exists("/proc/self/stat"):
        return [int(p) for p in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True).stdout.split()]
    found = []
    for other in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it may have ended
            if int(open(f"/proc/{other}/stat").read().rpartition(")")[2].split()[1]) == pid:
                found.append(int(other))
    return found


def kill_tree(pid):
    """SIGKILL to a process and all below it: torchrun puts each rank into a session of its own."""
    below = children(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in below:
        kill_tree(child)


def run(script, *args, ok=True, **kw):
    """Runs a script to its end; returns its output."""
    out = start(script, *args, **kw)
    out.stdout = out.communicate()[0]
    assert (out.returncode == 0) == ok, f"exit status {out.returncode}\n{out.stdout[-3000:]}"
    return out.stdout


TINY = ["--size", "tiny", "--num_frames", 4, "--img_size", 16, "--patch_size", 8, "--sampling_rate", 1,
        "--dtype", "fp32", "--mask_ratio", 0.5, "--max_steps", 6, "--lr", 0.02, "--log_every", 1, "--epochs", 4,
        "--warmup_epochs", 1, "--num_workers", 0, "--device", "cpu"]


def tiny_run(name, *args, **kw):
    """A pre-training run of a few steps -> its output, and the weights it has saved (None: none)."""
    out = os.path.join(TMP, name)
    text = run("pretrain.py", *TINY, "--data", toy_videos(), "--out_dir", out, *args, **kw)
    last = os.path.join(out, "last.pt")
    return text, torch.load(last, weights_only=True)["model"] if os.path.exists(last) else None


def difference(a, b):
    """The largest difference of two state dicts."""
    return max((a[k] - b[k]).abs().max().item() for k in a)


@functools.cache
def whole_run(ranks=None):
    """The weights after a run of batch 4 that nothing interrupts, on one process or on ranks."""
    return tiny_run(f"whole_{ranks}", "--batch_size", 4 // (ranks or 1), ranks=ranks)[1]


@test
def test_killed_and_resumed_is_bit_identical():
    """SIGKILL at a random step, resume: bit-identical weights, with workers and on 2 ranks; one log row per step."""
    for ranks in (None, 2):
        name, batch = os.path.join(TMP, f"killed_{ranks}"), ["--batch_size", 4 // (ranks or 1)]
        args = [*TINY, "--data", toy_videos(), "--out_dir", name, *batch, "--num_workers", 2, "--save_every", 2]
        process, last_step = start("pretrain.py", *args, ranks=ranks), random.randint(3, 5)
        for line in process.stdout:
            if line.startswith(f"step {last_step}/"):
                kill_tree(process.pid)
                break
        process.communicate()
        text, model = tiny_run(f"killed_{ranks}", *batch, "--num_workers", 1, ranks=ranks)
        assert "resumed" in text and "step 6/6" in text, text
        assert difference(model, whole_run(ranks)) == 0
        assert [json.loads(r)["step"] for r in open(os.path.join(name, "log.jsonl"))] == [1, 2, 3, 4, 5, 6]


@test
def test_accumulation_and_ranks_equal_a_bigger_batch():
    """Two ranks x 2, and 2 accumulated x 2, give batch 4's weights (fp32, 2e-5 after 6 AdamW steps), masks, clips."""
    assert difference(tiny_run("accum", "--batch_size", 2, "--accum_steps", 2)[1], whole_run()) < 2e-5
    assert difference(whole_run(2), whole_run()) < 2e-5
    rows = [[json.loads(r) for r in open(os.path.join(TMP, name, "log.jsonl"))]
            for name in ("whole_None", "whole_2", "accum")]
    for a, b, c in zip(*rows):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["loss"] - c["loss"]) < 1e-5 and a["lr"] == b["lr"] == c["lr"]


@test
def test_signal_saves_and_other_runs_are_kept():
    """SIGTERM saves and says so; an unfinished run in out_dir refuses another one, a finished one is set aside."""
    name = os.path.join(TMP, "signal")
    args = [*TINY, "--data", toy_videos(), "--out_dir", name, "--batch_size", 4, "--max_steps", 1000]
    args += ["--num_workers", 1]
    process = start("pretrain.py", *args)
    for line in process.stdout:
        if line.startswith("step 2/"):
            for pid in (*children(process.pid), process.pid):  # a scheduler signals them all
                os.kill(pid, signal.SIGTERM)
            break
    rest = process.communicate()[0]
    step = torch.load(os.path.join(name, "last.pt"), weights_only=True)["step"]
    assert f"saved {name}/last.pt at step {step}" in rest and 2 <= step < 1000
    assert process.returncode == 128 + signal.SIGTERM
    text, _ = tiny_run("signal", "--batch_size", 4, "--lr", 0.01, ok=False)
    assert "unfinished run" in text and "lr 0.02 -> 0.01" in text and "Traceback" not in text
    text, _ = tiny_run("signal", "--batch_size", 4, "--decoder_depth", 1, "--resume", ok=False)
    assert "another model" in text and "decoder_depth None -> 1" in text and "Traceback" not in text
    text, _ = tiny_run("reference_copy", "--batch_size", 4, "--max_steps", 1)
    text, _ = tiny_run("reference_copy", "--batch_size", 4, "--max_steps", 2)
    assert "max_steps 1 -> 2" in text and set(os.listdir(os.path.join(TMP, "reference_copy", "previous-1"))) == {
        "last.pt", "log.jsonl", "vis_0000001.png"}
    assert "finished" in tiny_run("reference_copy", "--batch_size", 4, "--max_steps", 2)[0]


@test
def test_nonfinite_steps_are_skipped_on_the_device():
    """The fused AdamW leaves weights and moments alone when found_inf is set, as pretrain.py relies on."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], lr=0.1, fused=True)
    p.grad = torch.ones(3)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    before, state = p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}
    p.grad = torch.full((3,), float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(p, before) and all(torch.equal(v, state[k]) for k, v in optimizer.state[p].items())


@test
def test_nonfinite_runs_stop_and_keep_their_checkpoint():
    """Steps with NaN gradients are skipped, counted, never logged as loss 0; 20 in a row stop the run and say where."""
    text, model = tiny_run("nan", "--batch_size", 4, "--lr", 1e9, "--max_steps", 40, "--save_every", 1, ok=False)
    assert "20 steps in a row with a non-finite gradient, at step" in text and "lr " in text and "Traceback" not in text
    rows = [json.loads(row) for row in open(os.path.join(TMP, "nan", "log.jsonl"))]
    assert any(row["loss"] is None for row in rows) and not any(row["loss"] == 0 for row in rows)
    assert rows[0]["skipped_steps"] == 0 and rows[-1]["skipped_steps"] >= 20
    assert all(torch.isfinite(v).all() for v in model.values())


@test
def test_user_mistakes():
    """Impossible flags and bad data: exit status not 0, the value named, no traceback."""
    out = os.path.join(TMP, "mistake")
    for args, words in ((["--mask_ratio", 1.2], ["mask_ratio=1.2"]), (["--img_size", 20], ["img_size=20"]),
                        (["--batch_size", 0], ["--batch_size 0"]),
                        (["--data", "nowhere"], ["nowhere", "no such file"]), (["--resume"], ["--resume"]),
                        (["--epochs", 1], ["--epochs 1", "--warmup_epochs 1"]), (["--device", "foo"], ["--device foo"]),
                        (["--out_dir", os.path.join(HERE, "README.md")], ["README.md"])):
        text = run("pretrain.py", *TINY, "--data", toy_videos(), "--out_dir", out, *args, ok=False)
        assert all(w in text for w in words) and "Traceback" not in text, text


@test
def test_lr_schedule():
    """0 at the first step, the peak after the warm-up, half way down in the middle, the floor at the end."""
    lr = [pretrain.lr_at(s, 1.0, 0.1, 10, 110) for s in range(111)]
    assert lr[0] == 0 and lr[5] == 0.5 and lr[10] == 1 and abs(lr[60] - 0.55) < 1e-12 and abs(lr[110] - 0.1) < 1e-12
    assert lr[:11] == sorted(lr[:11]) and lr[10:] == sorted(lr[10:], reverse=True)


@test
def test_every_flag_is_read():
    """No script has a flag that nothing reads, a type=bool, or an unsafe torch.load."""
    for script in ("pretrain.py", "finetune.py", "eval.py", "data.py", "bench.py"):
        text = open(os.path.join(HERE, script)).read()
        for flag in re.findall(r'add_argument\("(?:--)?(\w+)"', text):
            assert f"args.{flag}" in text or flag == "toy", f"{script}: {flag} is never read"
        assert not re.search(r"type\s*=\s*bool|weights_only\s*=\s*False", text)
    pretrain_args = pretrain.get_args(["--toy", "--max_steps", "3"])
    assert pretrain_args.size == "tiny" and pretrain_args.max_steps == 3
    defaults = pretrain.get_args([])
    assert (defaults.size, defaults.num_frames, defaults.sampling_rate, defaults.mask_ratio) == ("base", 16, 4, 0.9)
    assert (defaults.lr, defaults.beta2, defaults.epochs) == (1.5e-4, 0.95, 800)


@test
def test_files_are_as_the_style_wants():
    """Lines up to 120 columns, these tests' too; public functions with docstrings; everything parses."""
    for script in sorted(f for f in os.listdir(HERE) if f.endswith(".py")):
        text = open(os.path.join(HERE, script)).read()
        for n in ast.parse(text).body:
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name not in ("main", "get_args"):
                assert script == "test_all.py" or ast.get_docstring(n), f"{script}: {n.name} has no docstring"
        long = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 120]
        assert not long, f"{script}: lines {long} are too long"


def main():
    global TMP
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("filter", nargs="?", default="", help="run the tests whose name holds this")
    wanted = [t for t in TESTS if parser.parse_args().filter in t.__name__]
    torch.set_num_threads(1)  # on a busy machine two threads wait for each other
    passed = failed = skipped = 0
    start = time.time()
    with tempfile.TemporaryDirectory() as TMP:
        for t in wanted:
            began = time.time()
            try:
                t()
            except Skip as e:
                skipped += 1
                print(f"skip  {t.__name__}: {e}")
                continue
            except Exception:
                failed += 1
                print(f"FAIL  {t.__name__}: {t.__doc__}\n{traceback.format_exc()}")
                continue
            passed += 1
            print(f"ok    {t.__name__} ({time.time() - began:.1f} s): {t.__doc__}", flush=True)
    print(f"{time.time() - start:.0f} s")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
