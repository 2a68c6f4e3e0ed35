"""python test_all.py [filter]: what the code says of itself, checked in under two minutes on two cores.

Comparisons are with slow float64 references, hand-computed values, published numbers, and transformers' VideoMAE where
it is installed.
"""

import argparse
import ast
import contextlib
import csv
import functools
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
import unittest.mock
from fractions import Fraction

import av
import numpy as np
import torch
import torch.nn.functional as F

import augment
import ava
import bench
import contrastive
import data
import decode
import detect_ava
import finetune
import masking
import prepared
import pretrain
import pretrain_moco
import pretrain_vicmae
import weights
from model import (IMAGENET_MEAN, IMAGENET_STD, SIZES, Encoder, HeadwiseAttention, VideoClassifier, VideoMAE,
                   best_dtype, count_params, forward_macs, normalize_cubes, param_groups, patchify, position_table,
                   sincos_table, split, unpatchify)

evaluate = importlib.import_module("eval")  # `import eval` would hide the builtin
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
def test_default_dtype():
    """--dtype is bf16 where the hardware has it: not on an x86 CPU without AVX-512, not on a GPU before Ampere."""
    name = best_dtype(torch.device("cpu"))
    if os.path.exists("/proc/cpuinfo") and "avx2" in (flags := open("/proc/cpuinfo").read().split()):
        assert name == ("bf16" if "avx512bw" in flags else "fp32"), name
    with unittest.mock.patch.object(torch.cuda, "is_bf16_supported", lambda including_emulation: False):
        assert best_dtype(torch.device("cuda")) == "fp16"


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
    with raises("encoder.patch_embed.proj.weight", "(128, 3, 2, 8, 8)", "(384, 3, 2, 8, 8)"):
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


def plain_vit(state: dict, images: torch.Tensor, blocks: int, heads: int, keep=None) -> torch.Tensor:
    """(B, 3, H, W) normalised -> (B, 1 + N, D) after the last block, of an image ViT in timm's and MAE's layout.

    keep: the patches that it sees.
    """
    def linear(x, name):
        return x @ state[name + ".weight"].T + state[name + ".bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * state[name + ".weight"] + state[name + ".bias"]
    weight = state["patch_embed.proj.weight"]
    x = torch.nn.functional.conv2d(images, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    x = x if keep is None else x[:, [0] + [1 + i for i in keep]]
    B, N, D = x.shape
    for i in range(blocks):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").split(D, -1)
        q, k, v = (y.reshape(B, N, heads, D // heads).transpose(1, 2) for y in (q, k, v))
        a = (q @ k.transpose(2, 3) / (D // heads) ** 0.5).softmax(-1) @ v
        x = x + linear(a.transpose(1, 2).reshape(B, N, D), f"blocks.{i}.attn.proj")
        h = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        x = x + linear(h * 0.5 * (1 + torch.erf(h / 2 ** 0.5)), f"blocks.{i}.mlp.fc2")
    return x


def released_vit(seed: int, **more) -> dict:
    """A random state dict in the layout of MAE's and ViC-MAE's released ViTs: width 128, 4 blocks, patch 8, 4x4."""
    torch.manual_seed(seed)
    shapes = {"cls_token": (1, 1, 128), "pos_embed": (1, 17, 128), "patch_embed.proj.weight": (128, 3, 8, 8),
              "patch_embed.proj.bias": (128,), "norm.weight": (128,), "norm.bias": (128,)}
    for i in range(4):
        for name, shape in {"norm1": (128,), "norm2": (128,), "attn.qkv": (384, 128), "attn.proj": (128, 128),
                            "mlp.fc1": (512, 128), "mlp.fc2": (128, 512)}.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    return {k: torch.randn(shape) * 0.2 for k, shape in (shapes | more).items()}


@test
def test_image_vits_load():
    """Image ViTs as released (class token, position table, k bias, other decoders): outputs of a plain ViT of its own.

    Inflated too, of a repeated frame in one temporal slot (in more there is still one class token, with a smaller share
    of the attention); without a class token test_image_models_become_video_models has more.
    """
    frames = torch.randint(0, 256, (2, 1, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    images = ((frames[:, 0] / 255 - mean) / std).permute(0, 3, 1, 2)
    decoder = {"mask_token": (1, 1, 64), "decoder_pos_embed": (1, 17, 64), "decoder_embed.weight": (64, 128),
               "decoder_embed.bias": (64,), "decoder_blocks.0.attn.qkv.bias": (192,), "decoder_norm.weight": (64,),
               "decoder_pred.weight": (192, 64), "projector.0.weight": (96, 128), "projector.6.bias": (16,)}
    state = released_vit(0, **decoder)
    path = saved("vicmae.pth", dict(model=state, epoch=3))
    wanted = plain_vit(state, images, 4, 4)
    shape = weights.encoder_shape(path)
    assert shape == dict(size="tiny", num_frames=1, img_size=(32, 32), patch_size=8, tubelet_size=1, spatial_pos=True,
                         class_token=True)
    model, about = weights.build_model(path, verbose=False)  # an encoder alone
    assert model.decoder is None
    with torch.no_grad():
        tokens = model.encoder(frames)
        assert torch.allclose(tokens, wanted[:, 1:], atol=1e-4), (tokens - wanted[:, 1:]).abs().max()
        keep = [3, 0, 9]  # with the class token, as under a mask
        few = model.encoder(frames, torch.tensor([keep, keep]))
        assert torch.allclose(few, plain_vit(state, images, 4, 4, keep)[:, 1:], atol=1e-4)
        last = evaluate.features(model, frames)
        norm = torch.nn.functional.layer_norm(wanted[:, 1:], (128,), state["norm.weight"], state["norm.bias"], 1e-6)
        assert torch.allclose(last, norm.mean(1), atol=1e-4)
        shape = weights.encoder_shape(path, num_frames=8, tubelet_size=2)
        assert shape["temporal_pos"]
        video = VideoClassifier(3, **shape)
        report = weights.load_pretrained(video, path, verbose=False)
        assert not [k for k in report["skipped"] if k.startswith(("cls", "class", "pos", "blocks", "patch"))]
        assert set(report["new"]) == {"temporal_pos", "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
        clip = VideoClassifier(3, **weights.encoder_shape(path, num_frames=2, tubelet_size=2))  # one temporal slot
        weights.load_pretrained(clip, path, verbose=False)
        assert torch.allclose(Encoder.forward(clip, frames.repeat(1, 2, 1, 1, 1)), wanted[:, 1:], atol=1e-4)
    # at 48 pixels the table is resized, the class token's position is not
    large = VideoClassifier(3, **weights.encoder_shape(path, img_size=(48, 48)))
    weights.load_pretrained(large, path, verbose=False)
    table = state["pos_embed"][0, 1:].view(1, 4, 4, 128).permute(0, 3, 1, 2)
    table = torch.nn.functional.interpolate(table, size=(6, 6), mode="bicubic", align_corners=False)
    assert torch.allclose(large.spatial_pos, table[0].flatten(1).T, atol=1e-6)
    assert torch.equal(large.class_token, state["cls_token"] + state["pos_embed"][:, :1])
    # a classifier fine-tuned as MAE's: mean over the patches, fc_norm, head
    tuned = released_vit(1, **{"fc_norm.weight": (128,), "fc_norm.bias": (128,), "head.weight": (5, 128),
                               "head.bias": (5,)})
    del tuned["norm.weight"], tuned["norm.bias"]
    classifier, _ = weights.build_model(saved("tuned.pth", dict(model=tuned)), verbose=False)
    x = plain_vit(tuned, images, 4, 4)[:, 1:].mean(1)
    x = torch.nn.functional.layer_norm(x, (128,), tuned["fc_norm.weight"], tuned["fc_norm.bias"], 1e-6)
    assert torch.allclose(classifier(frames), x @ tuned["head.weight"].T + tuned["head.bias"], atol=1e-4)
    # what is ours again, from our own checkpoint: nothing lost; what is no such ViT is named
    again = saved("ours.pt", dict(model=large.state_dict(), config=large.config))
    back, _ = weights.build_model(again, verbose=False)
    x = torch.rand(1, 1, 48, 48, 3)
    assert torch.equal(back(x), large.eval()(x))
    for wrong in (dict(reg_token=torch.zeros(1, 4, 128)), dict(pos_embed=torch.zeros(1, 19, 128))):
        try:
            weights.read_weights(saved("odd.pth", state | wrong))
        except ValueError as e:
            assert "odd.pth" in str(e) and ("reg_token" in str(e) or "19 positions" in str(e))
        else:
            raise AssertionError(f"{list(wrong)} was taken")


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


# ---------------------------------------------------------------- augment.py

def pixels(*values):
    """A one-frame clip (1, 3, 1, n) with these values in all channels."""
    return torch.tensor(values, dtype=torch.uint8).expand(1, 3, 1, len(values)).contiguous()


@test
def test_rand_augment_operations_by_hand():
    """The arguments at magnitude 7 and the pixels that each operation gives equal values computed by hand."""
    level = {name: (argument(7, 1), argument(7, -1)) for name, (_, argument) in augment.OPERATIONS.items()}
    near = lambda a, b: all(abs(x - y) < 1e-9 for x, y in zip(a, b))
    assert near(level["Rotate"], (21, -21)) and near(level["ShearX"], (0.21, -0.21))
    assert near(level["TranslateY"], (0.315, -0.315)) and near(level["Color"], (1.63, 0.37))
    assert level["Posterize"] == (2, 2) and level["Solarize"] == (77, 77) and level["SolarizeAdd"] == (77, 77)
    at_most = [augment.OPERATIONS[name][1](10, 1) for name in ("Posterize", "Solarize", "SolarizeAdd")]
    assert at_most == [0, 0, 110]
    for name, argument, given, expect in (
            ("Invert", None, (0, 7, 255), (255, 248, 0)), ("Posterize", 2, (63, 64, 200, 255), (0, 64, 192, 192)),
            ("Posterize", 0, (63, 255), (0, 0)), ("Solarize", 77, (76, 77, 255), (76, 178, 0)),
            ("SolarizeAdd", 77, (0, 127, 128, 255), (77, 204, 128, 255)),
            ("AutoContrast", None, (50, 75, 100, 150), (0, 63, 127, 255)), ("AutoContrast", None, (9, 9), (9, 9)),
            ("Brightness", 1.63, (0, 100, 200), (0, 163, 255)), ("Brightness", 0.37, (0, 100, 200), (0, 37, 74)),
            ("Contrast", 0.37, (0, 100, 200), (63, 100, 137)),  # grey mean 100
            ("Color", 0.37, (0, 100, 200), (0, 100, 200)),  # grey stays grey
            ("TranslateX", 0.5, (10, 20, 30, 40), (30, 40, 128, 128)),
            ("TranslateX", -0.25, (10, 20, 30, 40), (128, 10, 20, 30)),
            ("TranslateX", 0.125, (10, 20, 30, 40), (15, 25, 35, 128))):  # half a pixel
        out = augment.OPERATIONS[name][0](pixels(*given), argument)
        assert out.dtype == torch.uint8 and out[0, 0, 0].tolist() == out[0, 2, 0].tolist() == list(expect), (name, out)
    square = torch.arange(0, 90, 10, dtype=torch.uint8).view(1, 1, 3, 3).repeat(2, 3, 1, 1)
    turned = augment.rotate(square, 90)[0, 0]
    assert turned.tolist() == square[0, 0].rot90(1).tolist(), turned
    smooth = augment.sharpness(square, 0)[0, 1]
    assert smooth[1, 1] == int((sum(range(0, 90, 10)) + 4 * 40) / 13 + 0.5) and smooth[0].tolist() == [0, 10, 20]
    ramp = torch.arange(128, dtype=torch.uint8).repeat(1, 3, 8, 1)  # 128 levels, 8 of each: step (1024 - 8) // 255 = 3
    assert augment.equalize(ramp, None)[0, 0, 0].tolist() == [min(255, (1 + 8 * i) // 3) for i in range(128)]


@test
def test_rand_augment_equals_pil():
    """On noise and on ramps the pointwise operations equal PIL's to the bit, the geometric ones to 1 of 255."""
    try:
        from PIL import Image, ImageEnhance, ImageOps
    except ImportError:
        raise Skip("needs `pip install pillow`") from None
    fill = (augment.FILL,) * 3

    def pil(name, argument, image):
        affine = lambda *m: image.transform(image.size, Image.AFFINE, m, resample=Image.BILINEAR, fillcolor=fill)
        w, h = image.size
        return {"AutoContrast": lambda: ImageOps.autocontrast(image), "Equalize": lambda: ImageOps.equalize(image),
                "Invert": lambda: ImageOps.invert(image), "Posterize": lambda: ImageOps.posterize(image, argument),
                "Solarize": lambda: ImageOps.solarize(image, argument),
                "SolarizeAdd": lambda: image.point([min(255, i + argument * (i < 128)) for i in range(256)] * 3),
                "Rotate": lambda: image.rotate(argument, resample=Image.BILINEAR, fillcolor=fill),
                "ShearX": lambda: affine(1, argument, 0, 0, 1, 0), "ShearY": lambda: affine(1, 0, 0, argument, 1, 0),
                "TranslateX": lambda: affine(1, 0, argument * w, 0, 1, 0),
                "TranslateY": lambda: affine(1, 0, 0, 0, 1, argument * h),
                }.get(name, lambda: getattr(ImageEnhance, name)(image).enhance(argument))()
    rng = np.random.default_rng(0)
    ramp = np.stack(np.broadcast_arrays(*np.ogrid[:40, :60], 99), -1).astype(np.uint8)
    for frame in (rng.integers(0, 256, (41, 60, 3), dtype=np.uint8), ramp * 3, np.full((8, 9, 3), 77, np.uint8),
                  np.where(rng.random((30, 31, 3)) < 0.5, 10, 200).astype(np.uint8)):
        clip = torch.from_numpy(frame).permute(2, 0, 1)[None].contiguous()
        for name, (operation, argument) in augment.OPERATIONS.items():
            for m, sign in ((0.0, 1), (6.5, 1), (7.2, -1), (9.9, 1)):
                ours = operation(clip, argument(m, sign))[0].permute(1, 2, 0).numpy().astype(int)
                error = abs(ours - np.array(pil(name, argument(m, sign), Image.fromarray(frame))))
                geometric = name.startswith(("Rotate", "Shear", "Translate"))
                assert error.max() <= geometric and (error > 0).mean() < 0.02, (name, m, sign, error.max())


@test
def test_rand_augment_draws():
    """N operations with replacement, each applied half the time, m ~ N(7, .5) in [0, 10]; one draw for all frames."""
    applied = []
    spies = {name: (lambda clip, m, name=name: (applied.append((name, m)), clip)[1], lambda m, s: m * s)
             for name in augment.OPERATIONS}
    real, augment.OPERATIONS = augment.OPERATIONS, spies
    try:
        for seed in range(1500):
            augment.rand_augment(np.random.default_rng(seed), pixels(1, 2))
    finally:
        augment.OPERATIONS = real
    names, m = zip(*applied)
    assert abs(len(m) / 1500 - 2) < 0.1 and {names.count(n) > 120 for n in real} == {True}
    assert abs(np.mean(np.abs(m)) - 7) < 0.05 and abs(np.std(np.abs(m)) - 0.5) < 0.03
    assert abs(np.mean(np.sign(m))) < 0.06
    frame = torch.randint(0, 256, (1, 3, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changed = 0
    for seed in range(30):
        out = augment.rand_augment(np.random.default_rng(seed), frame.expand(3, -1, -1, -1).contiguous())
        assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
        changed += not torch.equal(out[0], frame[0])
    assert 20 < changed


@test
def test_random_resized_crop_and_erasing():
    """Crops lie inside with the stated area and aspect, or are the central one; one box in a quarter of the clips."""
    areas = []
    for seed in range(500):
        y, x, h, w = augment.random_resized_crop(np.random.default_rng(seed), 240, 320)
        assert y >= 0 and x >= 0 and y + h <= 240 and x + w <= 320 and 0.72 < w / h < 1.37
        areas.append(h * w / 240 / 320)
    assert 0.075 < min(areas) < 0.12 and 0.85 < max(areas) <= 1 and abs(np.mean(areas) - 0.5) < 0.08
    assert augment.random_resized_crop(np.random.default_rng(0), 20, 400, (0.9, 1)) == (0, 186, 20, 27)
    boxes = [augment.erase_box(np.random.default_rng(s), 100, 100, 0.25) for s in range(1000)]
    some = [h * w / 1e4 for _, _, h, w in boxes if h]
    assert 200 < len(some) < 300 and 0.015 < min(some) and max(some) < 0.34
    video = torch.full((2, 3, 40, 50, 3), 0.25)
    torch.manual_seed(0)
    out = augment.erase(video, torch.tensor([[0, 0, 0, 0], [5, 10, 30, 20]]), (0.4, 0.5, 0.6), (0.2, 0.2, 0.1))
    inside = torch.zeros(40, 50, dtype=torch.bool)
    inside[5:35, 10:30] = True
    assert torch.equal(out[0], video[0]) and (out[1, :, ~inside] == 0.25).all()
    noise = (out[1, :, inside] - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.2, 0.1])
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05 and not torch.equal(noise[0], noise[1])


@test
def test_mix():
    """Mixup and CutMix with the reversed batch; soft targets equal those by hand; lambda is the area that is left."""
    class Fixed:
        def __init__(self, lam, y=0, x=0): self.lam, self.places = lam, [y, x]
        beta = lambda self, a, b: self.lam
        random = lambda self: 0.9  # no cutmix at switch_prob .5
        integers = lambda self, n: self.places.pop(0)
    video = torch.arange(3.0).view(3, 1, 1, 1, 1).expand(3, 2, 8, 12, 3).contiguous()
    labels = torch.tensor([0, 1, 3])
    x, y = augment.mix(Fixed(0.3), video, labels, 4)
    assert torch.allclose(x[:, 0, 0, 0, 0], torch.tensor([1.4, 1.0, 0.6]))
    hard = torch.tensor([[0.3, 0, 0, 0.7], [0, 1, 0, 0], [0.7, 0, 0, 0.3]])
    assert torch.allclose(y, 0.9 * hard + 0.1 / 4) and torch.allclose(y.sum(1), torch.ones(3))
    x, y = augment.mix(Fixed(0.75, 4, 11), video, labels, 4, mixup=0, smoothing=0)
    # half the sides: 4 x 6 around (4, 11): rows 2..5, columns 8..11 after the cut at the edge
    inside = torch.zeros(8, 12, dtype=torch.bool)
    inside[2:6, 8:12] = True
    assert (x[0, :, inside] == 2).all() and (x[0, :, ~inside] == 0).all() and (x[1] == 1).all()
    assert torch.allclose(y[0], torch.tensor([5 / 6, 0, 0, 1 / 6]))
    x, y = augment.mix(Fixed(0.5), video, labels, 4, mixup=0, cutmix=0, smoothing=0)
    assert torch.equal(x, video) and torch.equal(y, F.one_hot(labels, 4).float())
    draws = [augment.mix(np.random.default_rng(s), video[:2], labels[:2], 4, smoothing=0) for s in range(600)]
    mixed = np.array([y[0, 0].item() for x, y in draws if len(x[0].unique()) == 1])
    assert abs(len(mixed) / 600 - 0.5) < 0.08 and abs(mixed.mean() - 0.5) < 0.06
    assert abs(mixed.std() - (0.25 / 2.6) ** 0.5) < 0.03  # of Beta(.8, .8)


# ---------------------------------------------------------------- data.py

def numbered(n=40, h=64, w=96):
    """Frames with their number on the left (8 bits, black and white blocks) and moving noise beside it: real GOPs."""
    rng, frames = np.random.default_rng(0), np.full((n, h, w, 3), 128, np.uint8)
    noise = rng.integers(0, 255, (h // 8 + 1, max(w * 4, 2 * n + w), 3), dtype=np.uint8).repeat(8, 0)[:h]
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
    keep = decode.KEEP_PACKETS
    try:
        for decode.KEEP_PACKETS in (keep, 0):
            for kind, path in odd_files().items():
                with data.VideoReader(path) as video:
                    assert len(video) == 40, (kind, len(video))
                    for wanted in ([0], [39], [17, 3, 3, 30], range(40), rng.integers(0, 40, 5)):
                        got = numbers(video.frames(wanted))
                        assert (got == np.array(wanted)).all(), (kind, list(wanted), got)
                    assert (np.diff(video.times) > 0).all(), kind
    finally:
        decode.KEEP_PACKETS = keep


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
    with data.VideoReader(os.path.join(TMP, "a.png")) as video, \
            unittest.mock.patch.object(decode, "to_rgb", lambda frame: image):
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
    """Kinetics, Moments in Time, SSv2, UCF101 and HMDB51 annotations become lists with the right paths and labels."""
    videos = os.path.join(TMP, "videos")
    for name in ("jumping rope/abc_000001_000011.mp4", "12.webm", "Fencing/v_Fencing_g01_c01.avi", "wave/x y.avi",
                 "wave/z.avi", "adult+male+singing/yt_1,2.mp4"):
        os.makedirs(os.path.dirname(os.path.join(videos, name)), exist_ok=True)
        open(os.path.join(videos, name), "w").close()
    os.makedirs(os.path.join(TMP, "notes"), exist_ok=True)
    note = lambda name, text: open(os.path.join(TMP, "notes", name), "w").write(text)
    note("k.csv", "label,youtube_id,time_start,time_end,split\n"
                  "jumping rope,abc,1,11,train\njumping rope,gone,2,12,train\n")
    note("s.json", json.dumps([dict(id="12", label="x", template="Pushing [something] left", placeholders=["a"])]))
    note("m.csv", '"adult+male+singing/yt_1,2.mp4",adult+male+singing,3,0\nstacking/gone.mp4,stacking,3,1\n')
    note("u.txt", "Fencing/v_Fencing_g01_c01.avi 1\n")
    note("wave_test_split1.txt", "x y.avi 1 \nz.avi 2 \n")
    for layout, annotation, args, expect in (
            ("kinetics", "k.csv", [], ["jumping rope/abc_000001_000011.mp4\tjumping rope"]),
            ("ssv2", "s.json", [], ["12.webm\tPushing something left"]),
            ("moments", "m.csv", [], ["adult+male+singing/yt_1,2.mp4\tadult+male+singing"]),
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
        assert (clip[0] == data.toy_clip(np.random.default_rng(3), 0)[0]).all(), "a single frame tells"
        reach, inner = range(-10, 11), slice(10, -10)  # the whole-pixel shift that best explains the next change
        change = np.diff(clip[:3], axis=0)  # what rests is gone
        error = {(dx, dy): abs(np.roll(change[0], (dy, dx), (0, 1)) - change[1])[inner, inner].mean()
                 for dy in reach for dx in reach}
        dx, dy = min(error, key=error.get)
        toward = dict(left=(-1, 0), right=(1, 0), up=(0, -1), down=(0, 1))
        x, y = np.sum([toward[word] for word in name.split("_")], 0)
        assert 5 <= math.hypot(dx, dy) <= 10 and np.allclose(np.array([dx, dy]) / math.hypot(dx, dy),
                                                             np.array([x, y]) / math.hypot(x, y), atol=0.1), name
    assert data.TOY_TRAIN % 8 == data.TOY_VAL % 8 == 0 and len(data.TOY_CLASSES) == 8


@test
def test_toy_shapes():
    """The same clip twice; at first all ways look alike, then the shape goes its way; shapes differ in one frame."""
    fields = [data.waves(np.random.default_rng(i), 48) for i in range(3)]
    draw = lambda shape, way: data.toy_shape_clip(np.random.default_rng(5), shape, way, fields, 6)
    clips = [draw(0, way) for way in range(4)]
    assert (clips[0] == draw(0, 0)).all()
    assert all((clips[0][0] == c[0]).all() and (clips[0][1:] != c[1:]).any() for c in clips[1:])
    assert len({draw(shape, 0)[0].tobytes() for shape in range(4)}) == 4
    plain, areas = [np.zeros((48, 48, 3))], []
    for shape, (way, (dy, dx)) in itertools.product(range(4), enumerate(((0, 1), (1, 0), (0, -1), (-1, 0)))):
        masks = data.toy_shape_clip(np.random.default_rng(5), shape, way, plain, 3)[..., 0] != 128
        steps = [d for d in range(1, 6) if (np.roll(masks[0], (d * dy, d * dx), (0, 1)) == masks[1]).all()]
        assert len(steps) == 1 and masks.sum((1, 2)).std() == 0, (way, steps)
        areas.append(masks[0].sum())
    assert max(areas) < 1.2 * min(areas), areas  # of one size


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
def test_waiting_for_data():
    """On a CPU the time in the loader counts; on a GPU only what its kernels had to wait for, by its own clock."""
    cpu = data.Waiting(torch.device("cpu"))
    for _ in range(2):
        with cpu:
            time.sleep(0.05)
    assert 0.1 <= cpu.seconds() < 0.2 and cpu.seconds() == 0
    busy_until = [0.0]  # of a pretended device, in seconds of the host's clock

    class Event:
        def __init__(self, enable_timing): assert enable_timing
        def record(self): self.at = max(time.perf_counter(), busy_until[0])
        def elapsed_time(self, later): return 1000 * (later.at - self.at)
        def synchronize(self): pass
    with unittest.mock.patch.object(torch.cuda, "Event", Event):
        gpu = data.Waiting(torch.device("cuda"))
        for work, wait in ((0.0, 0.04), (0.03, 0.05), (0.2, 0.05)):  # queued before the wait: idle for .04, .02, 0 s
            busy_until[0] = time.perf_counter() + work
            with gpu:
                time.sleep(wait)
        assert 0.06 <= gpu.seconds() < 0.09, "the device's own idle time"


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


@test
def test_finetuning_windows_and_timelines():
    """Dense fine-tuning indices are 0 4 8 12 17 ... 63; short videos and other frame rates equal hand-computed ones."""
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
    assert data.timeline(times, 64).tolist() == [i // 2 for i in range(127)]  # the earlier one of two
    assert data.timeline(np.array([0, 0.1, 0.5, 0.6, 1.0]), 4).tolist() == [0, 1, 2, 3, 4]
    assert data.short_side(240, 321, 224) == (224, 299) and data.short_side(321, 240, 224) == (299, 224)


@test
def test_classes_and_splits():
    """Integers sort as numbers, names as names; unknown and missing labels are named; groups stay on one side."""
    assert data.class_names(["10", "2", "2"]) == ["2", "10"] and data.class_names(["b", "10", "a"]) == ["10", "a", "b"]
    assert data.class_ids(["b", "a"], ["a", "b"], ["x", "y"], "z") == [1, 0]
    with raises("'c'", "y.mp4", "a, b"):
        data.class_ids(["a", "c"], ["a", "b"], ["x.mp4", "y.mp4"], "z")
    with raises("1 of 2", "no label", "y.mp4"):
        data.class_ids(["a", None], ["a"], ["x.mp4", "y.mp4"], "z")
    source = os.path.join(TMP, "all.tsv")
    rows = [f"{TMP}/{label}/s{scene}_{i}.mp4\t{label}" for label in "ab" for scene in range(5) for i in range(2)]
    os.makedirs(os.path.join(TMP, "a"), exist_ok=True)
    open(os.path.join(TMP, "a", "s0_0.mp4"), "w").close()
    open(source, "w").write("\n".join(rows))
    seen = []
    for fold in range(5):
        train, val = os.path.join(TMP, "t.tsv"), os.path.join(TMP, "v.tsv")
        with contextlib.redirect_stdout(None):
            data.main(["split", source, train, val, "--fold", str(fold), "--group", r"/s\d_"])
        a, b = open(train).read().splitlines(), open(val).read().splitlines()
        assert sorted(a + b) == sorted(rows) and len(b) == 4
        assert not {re.search(r"/s\d_", r)[0] for r in a} & {re.search(r"/s\d_", r)[0] for r in b}
        seen += b
    assert sorted(seen) == sorted(rows)
    with contextlib.redirect_stdout(None):
        data.main(["split", source, train, val])
    assert [r.split("\t")[1] for r in open(val).read().splitlines()] == ["a", "a", "b", "b"]
    with raises("--group", "does not match"):
        data.main(["split", source, train, val, "--group", "scene"])


@test
def test_written_lists_read_back():
    """Names with commas, spaces, tabs of label and endings inside come back as they were, with and without labels."""
    rows = [("a/clip1.mp4 copy.mp4", "x"), ("v3.mov, take 2.mp4", "y z"), ("v3.mov, take 2.mp4", None),
            ("plain.mp4", None), ("b c.avi", "d, e"), ("odd name", "x"), ("clip.mp4", "x.mp4 y")]
    out = os.path.join(TMP, "written.tsv")
    data.write_list(out, rows)
    assert [data.parse_row(row, out) for row in open(out).read().splitlines()] == rows


@test
def test_finetuning_clips():
    """Labels follow the video that was read; repeated views show the same frames; off means exactly resized frames."""
    folder = toy_videos()
    paths = sorted(data.read_videos(folder)[0])
    broken = os.path.join(TMP, "broken_ft.mp4")
    open(broken, "w").write("x")
    plain = dict(num_frames=4, size=(48, 48), stride=2, rand_aug=(0, 0, 0), crop_area=(1, 1), crop_aspect=(1, 1),
                 flip=False, erase_prob=0)
    ds = data.FinetuneClips(paths + [broken], list(range(len(paths))) + [99], repeat_aug=2, seed=3, **plain)
    (clip, labels, boxes), bad = ds[0, len(paths)]
    assert [p for p, _ in bad] == [broken] * len(bad) and bad and labels[0] == labels[1] != 99
    with data.VideoReader(paths[labels[0]]) as video:
        frames = torch.from_numpy(video.frames(range(len(video))))
    assert torch.equal(clip[0], clip[1]) and (boxes == 0).all()
    first = (frames == clip[0, 0]).flatten(1).all(1).nonzero().item()
    assert torch.equal(clip[0], frames[first + torch.tensor([0, 2, 5, 7])])
    full = data.FinetuneClips(paths, list(range(len(paths))), 4, (32, 32), 2, repeat_aug=2, seed=3)
    loaders = [torch.utils.data.DataLoader(full, batch_sampler=data.Batches(12, 4, 1, 0, 1, 0, 4, 3), num_workers=n,
                                           collate_fn=data.collate) for n in (0, 2)]
    for (a, _), (b, _) in zip(*loaders, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b)) and a[0].shape == (8, 4, 32, 32, 3)
        assert a[1].tolist()[::2] == a[1].tolist()[1::2] and not torch.equal(a[0][0], a[0][1])
    small_side = data.FinetuneClips(paths, [0] * 12, max_side=20).reduced
    assert small_side(40, 60) == (20, 30) and small_side(18, 60) == (18, 60)


# ---------------------------------------------------------------- prepared.py

def prepare(name, source, *args):
    """Runs `data.py prepare` -> the folder it wrote, its output."""
    out = os.path.join(TMP, name)
    return out, call(data, "prepare", source, out, "--num_workers", 1, *args)


def checked(folder):
    """What `data.py check` says of a set with failures."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert data.main(["check", folder, "--num_workers", "1"]) == 1
    return out.getvalue()


@functools.cache
def prepared_files():
    """A list of the odd files (and a broken one, and a labelled missing one) -> list, {(form, rate): set}."""
    listed = os.path.join(TMP, "odd list.tsv")
    broken = os.path.join(TMP, "half.mp4")
    open(broken, "wb").write(open(odd_files()["no B-frames"], "rb").read()[:3000])
    rows = [*odd_files().values(), broken, os.path.join(TMP, "gone, away.mp4")]
    data.write_list(listed, [(path, f"class {i % 3}") for i, path in enumerate(rows)])
    return listed, {(form, rate): prepare(f"set_{form}_{rate}", listed, "--form", form, "--sampling_rate", rate,
                                          "--shard_videos", 4)[0]
                    for form, rate in (("raw", 1), ("raw", 3), ("compact", 3))}


@test
def test_prepared_sets_read_like_their_files():
    """Every frame of every kind of file is the kept one not after it; times, labels, failures are the files' own."""
    listed, sets = prepared_files()
    paths, labels = data.read_videos(listed)
    for (form, rate), folder in sets.items():
        inside, same = data.read_videos(folder)
        assert same == labels and inside == [f"{folder}::{path}" for path in paths]
        for path, stored in zip(paths[:-2], inside):
            with data.open_video(path) as video, data.open_video(stored) as ready:
                assert len(ready) == 40 and (ready.times == video.times).all()
                wanted = [17, 3, 3, 39, *range(40)]
                kept = video.frames([i - i % rate for i in wanted])
                if form == "raw":
                    assert (ready.frames(wanted) == kept).all(), path
                else:
                    error = (ready.frames(wanted).astype(float) - kept).mean(-1)
                    # colour has half the resolution: files that have more of it lose it
                    assert (error ** 2).mean() ** 0.5 < (16 if path.endswith(("444.mp4", "odd.mp4", "gif")) else 3)
                    assert (numbers(ready.frames(wanted)) == numbers(kept)).all()
                with raises(stored, "0..40 wanted, it has 40"):
                    ready.frames([0, 40])
        for path, why in ((inside[-2], "half.mp4"), (inside[-1], "no such file")):
            with raises(path, "when the set was prepared", why):
                data.open_video(path)
    movie = odd_files()["non-zero start"]
    with data.open_movie(movie) as video, data.open_movie(f"{sets['raw', 1]}::{movie}") as ready:
        times = np.array([[-1, 0.41], [0.9, 3]])
        for a, b in zip(video.at(times), ready.at(times)):
            assert (a == b).all()
        with raises("ends at 1.56 s", "from 9.00"):
            ready.at([9, 10])
    with data.open_movie(f"{sets['raw', 3]}::{movie}") as ready:  # frames 0, 3, 6, ... are at 0, .12, .24 s
        frames, place = ready.at([0.05, 0.19, 0.55])
        assert numbers(frames).tolist() == [0, 6, 15] and place.tolist() == [0, 1, 2]


@test
def test_clips_of_a_prepared_set_are_those_of_its_files():
    """Pre-training and fine-tuning clips, test views and a whole fine-tuning run are bit-identical."""
    listed, sets = prepared_files()
    (paths, _), (inside, _) = data.read_videos(listed), data.read_videos(sets["raw", 1])
    for make in (lambda p: data.PretrainClips(p, 4, (32, 32), 3, repeat_aug=2, flip=True),
                 lambda p: data.PretrainClips(p, 4, (32, 32), fps=10),
                 lambda p: data.FinetuneClips(p, [0] * len(p), 4, (32, 32), 3, max_side=40),
                 lambda p: data.FinetuneClips(p, [0] * len(p), 4, (32, 32), sampling="sparse", repeat_aug=2),
                 lambda p: evaluate.TestVideos(p, 4, (32, 32), 3, num_segments=3)):
        files, ready = make(paths), make(inside)
        for i in (0, 3, 4, 12):
            key = i if isinstance(files, evaluate.TestVideos) else (1, i)
            a, b = (torch.utils._pytree.tree_leaves(x[key]) for x in (files, ready))
            for x, y in zip(a, b, strict=True):
                assert torch.equal(x, y) if torch.is_tensor(x) else x == y
    train, val = (prepare(f"set_of_{os.path.basename(p)}", p, "--sampling_rate", 1)[0] for p in labelled())
    by_file = tune("by_file", "--batch_size", 4)[1]["model"]
    text, by_set, _ = tune("by_set", "--batch_size", 4, "--data", train, "--val_data", val)
    assert "5 of the 5 validation videos are also trained on" in text
    for a, b in zip(by_file.values(), by_set["model"].values()):
        assert torch.equal(a, b)
    # a clip of every 3rd frame starts at a kept one
    square = write("square.mp4", numbered(40, 96, 96), g=12)
    every_third = data.read_videos(prepare("set_square", square, "--sampling_rate", 3)[0])[0]
    clips = [data.PretrainClips(p, 4, (96, 96), 3, crop_scales=[1]) for p in ([square], every_third)]
    for seed in range(5):
        files, ready = (numbers(c.load(0, np.random.default_rng(seed))[0].numpy()) for c in clips)
        assert (ready == files - files % 3).all() and (np.diff(files) == 3).all()
    several = data.PretrainClips([square], 4, (96, 96), 3, crop_scales=[1], repeat_aug=3)
    rng = np.random.default_rng(0)
    starts = [data.sample_dense(rng, 40, 4, 3) for _ in range(3)]
    assert (numbers(several.load(0, np.random.default_rng(0)).flatten(0, 1).numpy()) == np.concatenate(starts)).all()


@test
def test_preparing_goes_on_after_a_kill():
    """SIGKILL after the first shards; the same command ends with the bytes of a run that nobody killed."""
    listed, sets = prepared_files()
    whole, out = sets["compact", 3], os.path.join(TMP, "set_killed")
    args = ["--form", "compact", "--sampling_rate", 3, "--shard_videos", 4]
    for k, kill in enumerate((lambda: kill_tree(process.pid), lambda: process.terminate())):
        process = start("data.py", "prepare", listed, out, "--num_workers", 1 + k, *args)
        while not os.path.exists(os.path.join(out, f"00000{k}.compact.json")):
            time.sleep(0.01)
            assert process.poll() is None
        kill()
        text = process.communicate()[0]
    assert process.returncode == 130 and "the same command goes on" in text and "Traceback" not in text, text
    assert not os.path.exists(os.path.join(out, "index.json"))
    with raises("has not finished"):
        data.read_videos(out)
    text = prepare("set_killed", listed, *args)[1]
    assert "from before" in text and "2 not readable" in text and "gone, away.mp4: no such file" in text
    for name in ("index.json", *(f"00000{i}.compact" for i in range(5))):
        assert open(os.path.join(out, name), "rb").read() == open(os.path.join(whole, name), "rb").read(), name
    assert not [f for f in os.listdir(out) if f.endswith(".part")]


@test
def test_damaged_and_misused_sets():
    """Changed bytes and missing shards are named by `check`; other flags, strides, full disks are refused."""
    listed, sets = prepared_files()
    folder = os.path.join(TMP, "set_damaged")
    shutil.copytree(sets["raw", 3], folder)
    with open(os.path.join(folder, "000001.raw"), "r+b") as f:
        f.seek(12345)
        f.write(bytes([f.read(1)[0] ^ 1]))
    os.truncate(os.path.join(folder, "000002.raw"), 1000)
    os.remove(os.path.join(folder, "000003.raw"))
    text = checked(folder)
    assert text.count("(checksum)") == 1 and "000001.raw" in text and text.count("is cut off") == 4
    assert text.count("000003.raw cannot be read (No such file or directory); prepare again") == 4 \
        and "7 of 18 files can be read" in text
    prepare("set_damaged", listed, "--form", "raw", "--sampling_rate", 3, "--shard_videos", 4)  # as the message says
    assert "15 of 18 files can be read" in checked(folder)
    os.remove(os.path.join(folder, "000001.raw"))
    prepare("set_damaged", listed, "--form", "raw", "--sampling_rate", 3, "--shard_videos", 4)
    assert "16 of 18 files can be read" in checked(folder)
    for args, words in ((("--sampling_rate", 2), ("sampling_rate is 3, not 2", "choose another folder")),
                        (("--sampling_rate", 0), ("--sampling_rate 0: expected at least 1",)),
                        (("--quality", 1), ("--quality 1: expected 2",)),
                        (("--shard_videos", 4, "--short_side", 99), ("short_side is 256, not 99",))):
        said = mistake(data, "prepare", listed, folder, *args)
        assert all(word in said for word in words), said
    assert "expected a new or empty folder" in mistake(data, "prepare", listed, toy_videos())
    assert "is prepared already" in mistake(data, "prepare", folder, os.path.join(TMP, "again"))
    usage, shutil.disk_usage = shutil.disk_usage, lambda path: types.SimpleNamespace(free=10 ** 5)
    try:
        assert "would not fit into 0.1 MB" in mistake(data, "prepare", listed, os.path.join(TMP, "large"))
    finally:
        shutil.disk_usage = usage
    text = call(data, "prepare", listed, os.path.join(TMP, "dry"), "--dry_run", "--sampling_rate", 1)
    size = sum(os.path.getsize(os.path.join(sets["raw", 1], f"00000{i}.raw")) for i in range(5))
    said = float(re.search(r"raw about ([\d.]+) MB", text)[1])
    assert 0.8 < said / (size / 1e6) < 1.4 and not os.path.exists(os.path.join(TMP, "dry"))
    spoilt = bytearray(open(odd_files()["MJPEG, no key frame structure"], "rb").read())
    spoilt[len(spoilt) // 2:len(spoilt) * 3 // 4] = bytes(len(spoilt) * 3 // 4 - len(spoilt) // 2)
    spoilt_file, good = os.path.join(TMP, "spoilt.avi"), odd_files()["no B-frames"]
    open(spoilt_file, "wb").write(spoilt)
    data.write_list(os.path.join(TMP, "two.tsv"), [(good, None), (spoilt_file, None)])
    two, text = prepare("set_two", os.path.join(TMP, "two.tsv"), "--sampling_rate", 1)
    end = prepared.read_index(two)["videos"][good][5]
    assert "1 not readable" in text and os.path.getsize(os.path.join(two, "000000.raw")) == end  # nothing of it stays
    inside = data.read_videos(folder)[0]
    for make in (data.PretrainClips, evaluate.TestVideos):
        with raises("keeps 1 frame in 3", "--sampling_rate 4", "multiple of 3"):
            make(inside, 4, (32, 32), 4)
        with raises("keeps 1 frame in 3", "--sampling sparse", "`--sampling_rate 1`"):
            make(inside, 4, (32, 32), 3, sampling="sparse")
    assert "cannot hold `::`" in mistake(data, "prepare", listed, os.path.join(TMP, "a::b"))
    relabelled = os.path.join(TMP, "other labels.tsv")
    data.write_list(relabelled, [(path, "new") for path in data.read_videos(listed)[0]])
    args = "--form", "raw", "--sampling_rate", 3, "--shard_videos", 4
    assert "its rows and labels were others" in prepare("set_damaged", relabelled, *args)[1]
    assert data.read_videos(folder + os.sep)[1] == ["new"] * 18  # and the slash does not go into the names
    assert data.read_videos(inside[0]) == ([inside[0]], [None])
    for name, content in (("index.json", "{}"), ("settings.json", "{")):
        open(os.path.join(two, name), "w").write(content)
    with raises("index.json: damaged", "writes it again"):
        data.read_videos(two)
    assert "settings.json: damaged" in mistake(data, "prepare", os.path.join(TMP, "two.tsv"), two)
    with raises("no/x: cannot be written (No such file or directory)"):
        prepared.write_json(os.path.join(TMP, "no", "x"), {})


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
def test_errors_end_the_process():
    """An error that nobody expects ends a process with data workers, which ignore SIGTERM, instead of hanging it."""
    code = ("import data, torch\nclass Ones(torch.utils.data.Dataset):\n    def __getitem__(self, i): return i\n"
            "    def __len__(self): return 1000\n"
            "stream = iter(torch.utils.data.DataLoader(Ones(), num_workers=2, worker_init_fn=data.ignore_signals))\n"
            "next(stream)\nraise RuntimeError('out of memory')")
    process = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=100)
    assert process.returncode == 1 and "out of memory" in process.stderr


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


# ---------------------------------------------------------------- finetune.py

TUNE = ["--size", "tiny", "--num_frames", 4, "--img_size", 16, "--patch_size", 8, "--sampling_rate", 1,
        "--dtype", "fp32", "--max_steps", 6, "--epochs", 2, "--warmup_epochs", 0.5, "--lr", 0.05, "--log_every", 1,
        "--num_workers", 0, "--device", "cpu", "--eval_every", 1]
PLAIN = ["--mixup", 0, "--cutmix", 0, "--drop_path", 0, "--reprob", 0]  # what is drawn per rank: off


@functools.cache
def labelled():
    """A list of 12 toy videos in 3 classes, and one of 5 for validation."""
    toy_videos()
    lists = []
    for name, ids in (("train", range(12)), ("val", (0, 1, 2, 4, 8))):
        lists.append(os.path.join(TMP, f"tune_{name}.tsv"))
        open(lists[-1], "w").write("".join(f"{toy_videos()}/{i}.mp4\t{'xyz'[i % 3]} class\n" for i in ids))
    return lists


def tune(name, *args, **kw):
    """A fine-tuning run of a few steps -> its output, its last checkpoint (None: none), its log rows."""
    out, (train, val) = os.path.join(TMP, name), labelled()
    text = run("finetune.py", *TUNE, "--data", train, "--val_data", val, "--out_dir", out, *args, **kw)
    last, log = os.path.join(out, "last.pt"), os.path.join(out, "log.jsonl")
    rows = [json.loads(r) for r in open(log)] if os.path.exists(log) else []
    return text, torch.load(last, weights_only=True) if os.path.exists(last) else None, rows


@test
def test_finetuning_killed_and_resumed_is_bit_identical():
    """SIGKILL at a random step, resume, all augmentation, drop path, EMA on: the same weights, averages and best."""
    args = ["--batch_size", 4, "--drop_path", 0.3, "--head_dropout", 0.3, "--ema", 0.8, "--repeat_aug", 2]
    _, whole, rows = tune("tune_whole", *args)
    name, stop_at = os.path.join(TMP, "tune_killed"), random.randint(3, 5)
    train, val = labelled()
    process = start("finetune.py", *TUNE, "--data", train, "--val_data", val, "--out_dir", name, *args,
                    "--save_every", 2, "--num_workers", 2)
    for line in process.stdout:
        if line.startswith(f"step {stop_at}/"):
            kill_tree(process.pid)
            break
    process.communicate()
    last = os.path.join(name, "last.pt")
    torch.save(torch.load(last, weights_only=True) | dict(best=101.0), last)  # no later epoch can beat it
    text, again, resumed_rows = tune("tune_killed", *args, "--num_workers", 1)
    assert "resumed" in text and again["best"] == 101
    assert difference(whole["model"], again["model"]) == 0 == difference(whole["ema"], again["ema"])
    assert difference(whole["model"], whole["ema"]) > 0
    figures = lambda rows: [(r["step"], r.get("loss"), r.get("val_top1"), r.get("val_loss")) for r in rows]
    assert figures(rows) == figures(resumed_rows)
    assert [r["step"] for r in rows if "val_top1" in r] == [3, 6] and all("loss" in r for r in rows if "lr" in r)
    best = weights.build_model(os.path.join(TMP, "tune_whole", "best.pt"), verbose=False)
    assert best[1]["classes"] == ["x class", "y class", "z class"]
    assert torch.load(os.path.join(TMP, "tune_whole", "best.pt"), weights_only=True)["best"] == whole["best"]


@test
def test_finetuning_ranks_and_accumulation_equal_a_bigger_batch():
    """Two ranks x 2, and 2 accumulated x 2, give batch 4's weights and validation figures (fp32, 2e-5)."""
    runs = [tune("tune_4", *PLAIN, "--batch_size", 4),
            tune("tune_acc", *PLAIN, "--batch_size", 2, "--accum_steps", 2),
            tune("tune_2", *PLAIN, "--batch_size", 2, ranks=2)]
    for _, state, rows in runs[1:]:
        assert difference(state["model"], runs[0][1]["model"]) < 2e-5
        for a, b in zip(rows, runs[0][2], strict=True):
            assert a["step"] == b["step"] and all(abs(a[k] - b[k]) < 1e-4 for k in ("loss", "val_top1", "val_loss")
                                                  if k in a)
            assert a.get("val_videos", 5) == 5


@test
def test_what_is_trained():
    """--linear_probe moves the head only; --freeze 2 leaves the patch embedding and 2 blocks as --init has them."""
    torch.manual_seed(1)
    source = VideoMAE("tiny", num_frames=4, img_size=16, patch_size=8)
    init = os.path.join(TMP, "init.pt")
    torch.save(dict(model=source.state_dict(), config=source.config, classes=None, args={}), init)
    shapeless = ["--data", labelled()[0], "--max_steps", 2, "--batch_size", 4, "--num_workers", 0, "--device", "cpu",
                 "--dtype", "fp32", "--sampling_rate", 1, "--log_every", 1]
    encoder = {k: v for k, v in source.encoder.state_dict().items() if not k.startswith("norm.")}
    out = os.path.join(TMP, "probe")
    text = run("finetune.py", *shapeless, "--init", init, "--linear_probe", "--out_dir", out)  # shaped as init is
    probe = torch.load(os.path.join(out, "last.pt"), weights_only=True)
    assert all(torch.equal(probe["model"][k], v) for k, v in encoder.items()) and "no best.pt" in text
    assert probe["config"]["head_norm"] and probe["model"]["head_norm.num_batches_tracked"] == 2
    assert probe["model"]["head.weight"].abs().max() > 1e-3 and (probe["model"]["fc_norm.weight"] == 1).all()
    assert list(probe["optimizer"]["state"][0]) == ["momentum_buffer"]
    out = os.path.join(TMP, "freeze")
    run("finetune.py", *shapeless, "--init", init, "--freeze", 2, "--out_dir", out)
    state = torch.load(os.path.join(out, "last.pt"), weights_only=True)["model"]
    for k, v in encoder.items():
        still = k.startswith(("patch_embed.", "blocks.0.", "blocks.1."))
        assert torch.equal(state[k], v) == still, k
    text = run("finetune.py", *shapeless, "--init", init, "--freeze", 2, "--out_dir", out, "--val_data", labelled()[1])
    assert "validation at step 2" in text and "finished" in text and os.path.exists(os.path.join(out, "best.pt"))


@test
def test_finetuning_mistakes():
    """Impossible flags, labels and lists of finetune.py: named, with what is allowed, no traceback."""
    train, val = labelled()
    unseen, single, unlabelled = (os.path.join(TMP, f"{n}.tsv") for n in ("unseen", "single", "unlabelled"))
    open(unseen, "w").write(open(val).read().replace("z class", "w class"))
    open(single, "w").write("".join(r.split("\t")[0] + "\tx\n" for r in open(train)))
    open(unlabelled, "w").write("".join(r.split("\t")[0] + "\n" for r in open(train)))
    for args, words in ((["--val_data", unseen], ["'w class'", "2.mp4", "x class"]),
                        (["--data", single], ["one class only"]), (["--data", unlabelled], ["12 of 12", "no label"]),
                        (["--batch_size", 13], ["12 videos", "13"]), (["--linear_probe"], ["--init"]),
                        (["--rand_aug", 2, 11, 0], ["--rand_aug"]), (["--freeze", 9], ["--freeze 9", "4 blocks"]),
                        (["--crop_area", 0.5, 0.2], ["--crop_area 0.5 0.2"]),
                        (["--init", "absent.pth"], ["absent.pth"])):
        text = mistake(finetune, *TUNE, "--batch_size", 4, "--data", train, "--val_data", val, "--out_dir",
                       os.path.join(TMP, "ft_mistake"), *args)
        assert all(w in text for w in words), text
    rows = open(train).read().splitlines()
    open(unseen, "w").write("\n".join(rows + rows[:1] + [rows[0].replace("x class", "turning left")]))
    text = tune("imbalanced", "--data", unseen, "--max_steps", 1, "--batch_size", 4)[0]
    assert "imbalanced" in text and "turning left 1" in text and "--no-flip?" in text
    assert "5 of the 5 validation videos are also trained on" in text and "would get 40.0 %" in text


# ---------------------------------------------------------------- eval.py

@test
def test_views():
    """K400's and SSv2's clips, and the crops along the long side, equal hand-computed ones."""
    k400 = evaluate.view_indices(300, 16, 4, "dense", 5)  # 75 frames at stride 4, 59 to spare
    assert k400[:, 0].tolist() == [4 * s for s in (0, 14, 29, 44, 59)] and (np.diff(k400) == 4).all()
    assert evaluate.view_indices(300, 16, 4, "dense", 1)[0].tolist() == list(range(4 * 29, 4 * 45, 4))
    assert evaluate.view_indices(10, 4, 4, "dense", 2).tolist() == [[0, 4, 8, 8]] * 2
    ssv2 = evaluate.view_indices(40, 16, 2, "sparse", 2)
    assert ssv2[0].tolist() == [int(2.5 * k) for k in range(16)]
    assert ssv2[1].tolist() == [int(1.25 + 2.5 * k) for k in range(16)]
    frames = torch.arange(2 * 4 * 11).view(2, 4, 11, 1)
    views = evaluate.cut(frames, torch.tensor([[0, 1], [1, 1]]), (4, 4), 3)
    assert views.shape == (6, 2, 4, 4, 1)
    for v, (clip, left) in enumerate(((0, 0), (0, 3), (0, 7), (1, 0), (1, 3), (1, 7))):
        assert torch.equal(views[v, 1], frames[1, :, left:left + 4]) and torch.equal(
            views[v, 0], frames[clip, :, left:left + 4]), v
    tall = evaluate.cut(frames.transpose(1, 2), torch.tensor([[0, 1]]), (4, 4), 1)
    assert torch.equal(tall[0, 0], frames.transpose(1, 2)[0, 3:7])
    fit = evaluate.TestVideos([], 4, (24, 16)).fit
    assert fit(30, 40) == (24, 32) and fit(100, 40) == (40, 16) and fit(24, 16) == (24, 16) and fit(3, 2) == (24, 16)


@test
def test_scores():
    """Top-1, top-5, per-class accuracy and loss of a hand-made case; the order among equals is argmax's."""
    p = np.array([[0.5, 0.3, 0.2, 0, 0, 0], [0.1, 0.1, 0.2, 0.2, 0.2, 0.2], [0.4, 0.1, 0.1, 0.1, 0.1, 0.2],
                  [0.2, 0.2, 0.2, 0.2, 0.1, 0.1]])
    result = evaluate.scores(p, np.array([0, 2, 4, 1]))
    assert result["top1"] == 50 and result["top5"] == 75 and result["per_class"] == 50
    assert abs(result["loss"] + np.log([0.5, 0.2, 0.1, 0.2]).mean()) < 1e-12
    assert evaluate.scores(p, np.array([0, 2, 0, 0]))["per_class"] == 100
    assert abs(evaluate.scores(p, np.array([0, 3, 0, 0]))["per_class"] - 50) < 1e-12


def slow_views(path, num_frames, stride, size, num_segments, num_crops):
    """Every frame decoded by plain PyAV, resized whole, indexed with numpy: (segments * crops, T, size, size, 3)."""
    with av.open(path) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    h, w = frames[0].shape[:2]
    h, w = (size, int(w * size / h)) if h <= w else (int(h * size / w), size)
    frames = np.stack([data.resize(torch.from_numpy(f)[None], h, w)[0].numpy() for f in frames])[::stride]
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
    """A classifier (random weights, large head), its checkpoint, a list of 7 videos, one of them broken."""
    torch.manual_seed(0)
    model = VideoClassifier(3, size="tiny", num_frames=4, img_size=32, patch_size=8)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model.head.weight.mul_(20)
    ckpt = os.path.join(TMP, "classifier.pt")
    torch.save(dict(model=model.state_dict(), config=model.config, classes=["a", "b", "c"],
                    args=dict(sampling="dense", sampling_rate=3, fps=None)), ckpt)
    folder, rows = os.path.join(TMP, "seven"), []
    os.makedirs(folder)
    for i in range(6):
        rows.append(f"{folder}/{i}.mp4\t{'abc'[i % 3]}")
        clip = data.toy_clip(np.random.default_rng(i), i, 10 + 7 * i, 64)[:, :40 + 4 * i, :64 - 2 * i]
        data.write_video(rows[-1].split("\t")[0], clip, g=8, bf=2)
    rows.insert(3, f"{folder}/broken.mp4\tb")
    open(f"{folder}/broken.mp4", "w").write("x")
    listed = os.path.join(TMP, "seven.tsv")
    open(listed, "w").write("\n".join(rows))
    return model.eval(), ckpt, listed


def call(module, *args):
    """Runs a script's main() in this process -> what it printed; the exit status has to be 0."""
    argv, sys.argv = sys.argv, [module.__name__, *map(str, args)]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = module.main()
        assert not status, f"exit status {status}: {out.getvalue()}"
        return out.getvalue()
    finally:
        sys.argv = argv


def mistake(module, *args):
    """Runs a script's main() in this process -> the error message that a user would see."""
    argv, sys.argv = sys.argv, [module.__name__, *map(str, args)]
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
            module.main()
        raise AssertionError(f"no error: {out.getvalue()}")
    except (ValueError, OSError) as e:
        return str(e)
    except SystemExit as e:
        assert e.code, out.getvalue()
        return out.getvalue()
    finally:
        sys.argv = argv
        for s, handler in handlers:
            signal.signal(s, handler)


@test
def test_multi_view_probabilities_equal_a_slow_reference():
    """4 clips x 3 crops of real files: probabilities equal the mean softmax over views cut by plain decoding (1e-5)."""
    model, ckpt, listed = classified()
    out = os.path.join(TMP, "mv")
    text = call(evaluate, "--ckpt", ckpt, "--data", listed, "--num_segments", 4, "--num_crops", 3, "--dtype", "fp32",
                "--out_dir", out, "--num_workers", 1, "--batch_size", 5)
    rows = list(csv.DictReader(open(os.path.join(out, "predictions.csv"))))
    assert [r["path"] for r in rows] == data.read_videos(listed)[0] and rows[3]["failed"] and not rows[3]["predicted"]
    assert "1 of 7 videos could not be read" in text and "broken.mp4" in text
    right = 0
    for row in rows[:3] + rows[4:]:
        views = torch.from_numpy(slow_views(row["path"], 4, 3, 32, 4, 3))
        with torch.no_grad():
            p = model(views).softmax(-1).mean(0)
        label = "abc".index(row["label"])
        assert abs(p[label] - float(row["probability_of_label"])) < 1e-5, (row, p)
        assert row["predicted"] == "abc"[p.argmax()] and int(row["place_of_label"]) == 1 + int((p > p[label]).sum())
        right += int(p.argmax() == label)
    result = json.load(open(os.path.join(out, "result.json")))
    assert abs(result["top1"] - 100 * right / 6) < 1e-9 and result["failed"] == 1 and result["videos"] == 6
    assert f"top-1 is {100 * right / 7:.2f}" in text


@test
def test_ranks_give_the_same_figures():
    """7 videos (one broken) on 1, 2 and 3 ranks: the same predictions.csv, every video once."""
    _, ckpt, listed = classified()
    tables = []
    for ranks in (None, 2, 3):
        out = os.path.join(TMP, f"ranks_{ranks}")
        run("eval.py", "--ckpt", ckpt, "--data", listed, "--num_segments", 2, "--dtype", "fp32", "--out_dir", out,
            "--num_workers", 0, ranks=ranks)
        tables.append((open(os.path.join(out, "predictions.csv")).read(),
                       open(os.path.join(out, "result.json")).read()))
    assert tables[0] == tables[1] == tables[2] and tables[0][0].count("\n") == 8


@test
def test_predict_and_windows():
    """--predict: probabilities of the middle clip; windows have times and see only their own frames; --json is JSON."""
    model, ckpt, listed = classified()
    path = data.read_videos(listed)[0][-1]  # 45 frames at 25 fps
    base = ["--ckpt", ckpt, "--dtype", "fp32", "--out_dir", os.path.join(TMP, "pr"), "--predict", path]
    found = json.loads(call(evaluate, *base, "--json", "--top", 3))
    views = torch.from_numpy(slow_views(path, 4, 3, 32, 3, 3))[4:5]  # the middle one of three
    with torch.no_grad():
        p = model(views).softmax(-1)[0]
    assert [c["name"] for c in found[0]["classes"]] == ["abc"[i] for i in p.argsort(descending=True)]
    assert all(abs(c["probability"] - p["abc".index(c["name"])]) < 1e-5 for c in found[0]["classes"])
    windows = json.loads(call(evaluate, *base, "--json", "--window", 0.6))
    assert [(w["start"], w["end"]) for w in windows] == [(0, 0.6), (0.6, 1.2), (1.2, 1.76)]
    middle = evaluate.TestVideos([], 4, (32, 32), 3)
    with data.VideoReader(path, middle.fit) as video:
        for start, end, first in ((0, 0.6, 0), (1.2, 1.8, 30), (0, 9, 15)):  # frames 0..14, 30..44, all
            frames, index = middle.clips(video, start, end)
            assert (frames[index[0]].numpy() == video.frames(range(first, first + 12, 3))).all()
    assert "a " in call(evaluate, *base) and " to " in call(evaluate, *base, "--window", 1, "--hop", 0.5)


@test
def test_features():
    """Windows cover the video, time stamps are theirs; pooled, per token and per layer equal the model's own."""
    model, ckpt, listed = classified()
    path = data.read_videos(listed)[0][-1]
    out = os.path.join(TMP, "fe")
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
        assert torch.allclose(evaluate.features(pre, views), pre.encoder.norm(pre.encoder(views)).mean(1), atol=1e-5)


@test
def test_neighbours():
    """k-NN votes equal a loop over cosine similarities of centred features; the linear map is the least squares one."""
    rng = np.random.default_rng(0)
    train, labels, test_x = rng.normal(size=(20, 6)) + 3, rng.integers(0, 4, 20), rng.normal(size=(7, 6)) + 3
    votes = evaluate.neighbours(train, labels, test_x, 5, 4)
    for x, vote in zip(test_x, votes):
        a, expect = x - train.mean(0), np.zeros(4)
        cosine = [a @ (t - train.mean(0)) / np.linalg.norm(a) / np.linalg.norm(t - train.mean(0)) for t in train]
        for i in sorted(range(20), key=lambda i: -cosine[i])[:5]:
            expect[labels[i]] += math.exp((cosine[i] - 1) / 0.07)
        assert np.allclose(vote, expect)
    x, test_z = ((a - train.mean(0)) / (train.std(0) + 1e-6) for a in (train, test_x))
    y = np.eye(4)[labels] - np.eye(4)[labels].mean(0)
    w = np.linalg.lstsq(np.vstack([x, np.sqrt(0.2) * np.eye(6)]), np.vstack([y, np.zeros((6, 4))]), rcond=None)[0]
    found = evaluate.ridge(train, labels, test_x, 4)  # the penalty 0.01 * 20 as six more rows of a least squares
    assert np.allclose(found, test_z @ w + np.eye(4)[labels].mean(0)) and np.abs(w).max() > 0.05
    _, ckpt, listed = classified()
    text = call(evaluate, "--ckpt", ckpt, "--knn", listed, "--data", listed, "--k", 1, 3, "--out_dir",
                os.path.join(TMP, "knn"), "--num_workers", 0)
    assert "k = 1: top-1 100.00" in text and "ridge regression: top-1" in text
    assert "1 of 7 videos could not be read" in text


@test
def test_attention_rollout():
    """Shares equal a float64 product of (A + I)/2 over the blocks, average 1; uniform attention gives all ones."""
    model, _, listed = classified()
    video = torch.from_numpy(slow_views(data.read_videos(listed)[0][-1], 4, 3, 32, 2, 2))[:1]
    share = evaluate.attention_rollout(model, video)
    with torch.no_grad():
        x, total = model.embed(video)[0].double(), torch.eye(32, dtype=torch.float64)
        for block in model.blocks:
            block.double()
            q, k, _ = (block.norm1(x) @ block.attn.qkv.weight.T).view(32, 3, 4, 32).permute(1, 2, 0, 3)
            q = q + block.attn.q_bias.view(4, 1, 32)
            a = (q @ k.mT / 32 ** 0.5).softmax(-1).mean(0)
            total, x = (a + torch.eye(32)) / 2 @ total, block(x[None])[0]
            block.float()
    assert share.shape == (1, 2, 4, 4) and abs(share.mean() - 1) < 1e-5
    assert (share.flatten() - 32 * total.mean(0)).abs().max() < 1e-4 and share.std() > 0.01
    flat = VideoClassifier(3, size="tiny", num_frames=4, img_size=32, patch_size=8)
    for block in flat.blocks:
        block.attn.qkv.weight.data.zero_()
    assert torch.allclose(evaluate.attention_rollout(flat, video), torch.ones(1, 2, 4, 4), atol=1e-5)


@test
def test_pictures_and_export():
    """--reconstruct, --attention, --mp4 write files that show the clip; --export_hf loads back to the same logits."""
    model, ckpt, listed = classified()
    path, out = data.read_videos(listed)[0][-1], os.path.join(TMP, "draw")
    pre = small(num_frames=4, img_size=32)
    pre_ckpt = os.path.join(TMP, "pre.pt")
    torch.save(dict(model=pre.state_dict(), config=pre.config, classes=None, args=dict(sampling_rate=3)), pre_ckpt)
    text = call(evaluate, "--ckpt", pre_ckpt, "--reconstruct", path, "--mask_ratio", 0.5, 0.75, "--mp4",
                "--out_dir", out)
    assert text.count("loss ") == 2 and "flatters" in text
    with data.VideoReader(os.path.join(out, "00000_5_reconstruct.mp4")) as video:
        assert video.frames([0]).shape == (1, 224, 7 * 224, 3) and len(video) == 4
    call(evaluate, "--ckpt", ckpt, "--attention", path, "--out_dir", out)
    with data.VideoReader(os.path.join(out, "00000_5_attention.png")) as picture:
        image = picture.frames([0])[0]
    first = slow_views(path, 4, 3, 32, 3, 3)[4, 0]
    zoomed = first.repeat(3, 0).repeat(3, 1)
    assert (image[14:14 + 96, :96] == zoomed).all() and (image[14 + 98 + 14:][:96, :96] != zoomed).any()
    values = torch.zeros(1, 2, 2)
    values[0, 0, 0] = 1
    colors = evaluate.heat(values, np.zeros((2, 4, 4, 3), np.uint8))[0]
    assert colors[0, 0, 0] > colors[0, 0, 2] and colors[3, 3, 2] > colors[3, 3, 0]  # red high, blue low
    folder = os.path.join(TMP, "hf")
    call(evaluate, "--ckpt", ckpt, "--export_hf", folder)
    again, about = weights.build_model(folder, verbose=False)
    views = torch.from_numpy(slow_views(path, 4, 3, 32, 2, 2))
    with torch.no_grad():
        assert torch.equal(again(views), model(views)) and about["classes"] == ["a", "b", "c"]
        probe = VideoClassifier(3, head_norm=True, size="tiny", num_frames=4, img_size=32, patch_size=8)
        probe.head.weight.mul_(1000)
        for _ in range(9):
            probe(views)  # moves the BatchNorm's statistics
        plain = VideoClassifier(3, size="tiny", num_frames=4, img_size=32, patch_size=8).eval()
        torch.save(weights.to_hf(probe)[0], os.path.join(folder, "x.bin"))
        weights.load_pretrained(plain, os.path.join(folder, "x.bin"), verbose=False)
        assert torch.allclose(plain(views), probe.eval()(views), atol=1e-4, rtol=1e-4)
    assert weights.build_model(pre_ckpt, verbose=False)[0].config == pre.config


@test
def test_eval_mistakes():
    """Impossible requests of eval.py: the value and what is allowed are named, no traceback."""
    _, ckpt, listed = classified()
    for args, words in (([], ["--data"]), (["--data", "nowhere"], ["nowhere"]), (["--predict", "x.mp4"], ["x.mp4"]),
                        (["--reconstruct", listed], ["classifier", "no decoder"]), (["--window", 2], ["--window"]),
                        (["--data", listed, "--num_crops", 0], ["--num_crops 0"]),
                        (["--features", listed, "--layer", 9], ["--layer 9", "0 to 4"])):
        text = mistake(evaluate, "--ckpt", ckpt, *args)
        assert all(w in text for w in words), text
    bad = os.path.join(TMP, "unknown.tsv")
    open(bad, "w").write(open(listed).read().replace("\ta", "\tzebra"))
    text = run("eval.py", "--ckpt", ckpt, "--data", bad, ok=False)
    assert "zebra" in text and "a, b, c" in text and "Traceback" not in text


# ---------------------------------------------------------------- contrastive.py, pretrain_vicmae.py, pretrain_moco.py

def on_ranks(world, function, *args):
    """function(*args) on `world` gloo ranks -> [what each returns]."""
    import torch.multiprocessing as mp
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_of, (world, folder, function, args), nprocs=world)
        return [torch.load(os.path.join(folder, f"{r}.pt"), weights_only=True) for r in range(world)]


def rank_of(rank, world, folder, function, args):
    """One of them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(function(*args), os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def contrast_parts(z):
    """Losses and gradients of this rank's part of z (2, B, d) and of BatchNorm on it; the gradients are averaged."""
    world, rank = contrastive.world_size(), torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    B = z.shape[1] // world
    z = z[:, rank * B:(rank + 1) * B].clone().requires_grad_()
    torch.manual_seed(0)
    norm = contrastive.BatchNorm(z.shape[2])
    torch.nn.init.normal_(norm.weight)
    normed = norm(z.flatten(0, 1)).unflatten(0, (2, B))
    loss = contrastive.info_nce(normed, 0.1)[0] + contrastive.info_nce_keys(normed[0], normed[1], 0.2)
    loss.backward()
    return dict(loss=loss.detach(), z=z.grad / world, weight=norm.weight.grad / world)


@test
def test_info_nce():
    """Equal to a loop in float64: itself left out, one positive, all others negative; 3 ranks equal one process."""
    torch.manual_seed(0)
    z = torch.randn(2, 6, 5)
    unit = F.normalize(z.double(), dim=-1).flatten(0, 1)
    slow = 0
    for i in range(12):
        scores = [float(unit[i] @ unit[j]) / 0.1 for j in range(12) if j != i]
        positive = float(unit[i] @ unit[(i + 6) % 12]) / 0.1
        slow += (math.log(sum(map(math.exp, scores))) - positive) / 12
    loss, spread = contrastive.info_nce(z, 0.1)
    assert abs(loss.item() - slow) < 1e-6
    assert 0.8 < spread < 1.1 and contrastive.spread_of(torch.ones(9, 5)) < 1e-3
    query, key = F.normalize(z.double(), dim=-1)
    scores = (query @ key.T / 0.2).tolist()
    slow = sum(math.log(sum(map(math.exp, row))) - row[i] for i, row in enumerate(scores)) / 6 * 0.4
    assert abs(contrastive.info_nce_keys(*z, 0.2).item() - slow) < 1e-6
    far = torch.eye(6).expand(2, 6, 6)  # all agree with their positive, with no other: log(e^10 + 10) - 10
    assert abs(contrastive.info_nce(far, 0.1)[0] - math.log(math.exp(10) + 10) + 10) < 1e-5
    whole, parts = contrast_parts(z), on_ranks(3, contrast_parts, z)
    assert abs(np.mean([p["loss"] for p in parts]) - whole["loss"]) < 1e-5
    assert torch.allclose(torch.cat([p["z"] for p in parts], 1), whole["z"], atol=1e-6)
    assert torch.allclose(sum(p["weight"] for p in parts), whole["weight"], atol=1e-5)


@test
def test_contrastive_heads():
    """BatchNorm is torch's with batch statistics; the projector's layers are named as the released weights'."""
    torch.manual_seed(0)
    x = torch.randn(16, 7) * 3 + 1
    assert torch.allclose(contrastive.BatchNorm(7)(x), torch.nn.BatchNorm1d(7)(x), atol=1e-5)
    assert sorted({k.split(".")[0] for k in contrastive.head(5, 8, 8, 3).state_dict()}) == list("01346")
    last = contrastive.head(5, 8, 3, last_norm=True)
    out = last(torch.randn(32, 5))
    assert [k for k in last.state_dict() if "bias" in k] == ["1.bias"]
    assert out.mean(0).abs().max() < 1e-5 and (out.std(0, correction=0) - 1).abs().max() < 1e-3


@test
def test_views_are_drawn_once_per_clip():
    """A clip whose frames are equal stays so under every view; jitter, grey, blur and solarising do what they say."""
    torch.manual_seed(0)
    frame = torch.randint(0, 256, (1, 3, 40, 50), dtype=torch.uint8)
    seen = set()
    for seed in range(40):
        for second in (False, True):
            out = augment.view(np.random.default_rng(seed), frame.repeat(3, 1, 1, 1), (24, 24), (0.3, 1), True, second)
            assert out.shape == (3, 3, 24, 24) and out.dtype == torch.uint8
            assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
            seen.add((second, bool((out[:, 0] == out[:, 1]).all())))
    assert seen == {(a, b) for a in (False, True) for b in (False, True)}  # some are grey, some are not
    flat = torch.full((2, 3, 9, 9), 200, dtype=torch.uint8)
    assert (augment.blur(flat, 2.0) == 200).all()
    point = torch.zeros(1, 3, 21, 21, dtype=torch.uint8)
    point[..., 10, 10] = 255
    x = np.arange(-10, 11)
    kernel = np.exp(-x ** 2 / 4.5) * (abs(x) <= 5)
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    assert abs(augment.blur(point, 1.5)[0, 0].numpy() - 255 * kernel).max() <= 0.51
    red = torch.tensor([200, 100, 100], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2).contiguous()
    hues = [augment.color_jitter(np.random.default_rng(s), red, 0, 0, 0, 0.1)[0, :, 0, 0].tolist() for s in range(30)]
    assert all(max(h) == 200 and min(h) == 100 and h[0] == 200 for h in hues) and len(set(map(tuple, hues))) > 9


@test
def test_view_pairs():
    """Frames of a clip's two halves, `gap` apart on average; of pictures the same twice; batches hold both kinds."""
    square = write("pairs.mp4", numbered(40, 96, 96), g=12)
    pairs = data.ViewPairs([square], [square], gap=8, size=(96, 96), area=(1, 1), image_area=(1, 1), image_color=False)
    plain = unittest.mock.patch.object(data, "view", lambda rng, clip, *a, **k: clip)
    with plain:
        first, second = zip(*(numbers(pairs.load(square, False, np.random.default_rng(seed))[:, 0].numpy())
                              for seed in range(300)))
        gaps = np.array(second).astype(int) - np.array(first)
        assert gaps.min() >= 1 and gaps.max() <= 15 and abs(gaps.mean() - 8) < 0.6
        same = data.ViewPairs([square], [], gap=0, size=(96, 96))
        for pair, is_image in ((pairs, True), (same, False)):
            a, b = numbers(pair.load(square, is_image, np.random.default_rng(1))[:, 0].numpy())
            assert a == b
        clips = data.ViewPairs([square], [], num_frames=4, stride=3, size=(96, 96))
        views = clips.load(square, False, np.random.default_rng(0))
        starts = [numbers(v.numpy()) for v in views]
        assert all((np.diff(s.astype(int)) == 3).all() for s in starts) and starts[0][0] != starts[1][0]
    streams = [data.Batches(n, size, 1, 0, 1, 0, 4, 0) for n, size in ((10, 3), (7, 2))]
    for batch in data.MixedBatches(*streams):
        assert [key[2] for key in batch] == [False] * 3 + [True] * 2
    item, bad = pairs[0, 0, False]
    assert item.shape == (1, 2, 1, 96, 96, 3) and not bad
    broken = data.ViewPairs(["nowhere.mp4"], [])
    assert broken[0, 0, False][0] is None and len(broken[0, 0, False][1]) == 10


@test
def test_joint_targets_and_image_embedding():
    """Zeros score 767/768 under joint targets; one frame's embedding is a 2-D convolution."""
    torch.manual_seed(0)
    model = pretrain_vicmae.ViCMAE("tiny", img_size=32, dec_depth=1, dec_width=96, dec_heads=3, proj_width=32,
                                   proj_dim=8)
    video = torch.rand(3, 1, 32, 32, 3)
    mask = masking.make_mask("tube", 3, model.grid, 0.75)
    zeros, _ = pretrain.baselines(model, video, mask)
    assert abs(zeros - 767 / 768) < 1e-3
    cubes = patchify(video, model.cube).double()  # (3, 4, 768)
    slow = (cubes - cubes.mean(2, keepdim=True)) / (cubes.var(2, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(normalize_cubes(cubes, True).double(), slow, atol=1e-5)
    eight = (video * 255).round().byte()
    assert torch.allclose(normalize_cubes(patchify(eight, model.cube), True),
                          normalize_cubes(patchify(eight / 255, model.cube), True), atol=1e-4)
    x = ((video - model.encoder.mean[:3]) / model.encoder.std[:3])[:, 0].permute(0, 3, 1, 2)
    proj = model.encoder.patch_embed.proj
    conv = F.conv2d(x, proj.weight[:, :, 0], proj.bias, stride=16).flatten(2).mT + model.encoder.pos
    assert torch.allclose(model.encoder.embed(video), conv, atol=1e-4)
    views = torch.rand(3, 2, 1, 32, 32, 3)
    masks = masking.make_mask("tube", 6, model.grid, 0.75).unflatten(0, (3, 2))
    rec, con, _ = model(views, masks)
    each = [VideoMAE.forward(model, views[:, k], masks[:, k])[0] for k in range(2)]
    assert abs(rec - sum(each) / 2) < 1e-5 and con > 0


@test
def test_image_models_become_video_models():
    """A repeated frame under a zero temporal table: the inflated encoder's pooled output is the image encoder's."""
    torch.manual_seed(0)
    source = pretrain_vicmae.ViCMAE("tiny", img_size=32, dec_depth=1, dec_width=96, dec_heads=3, proj_width=32,
                                    proj_dim=8)
    path = saved("vicmae.pt", dict(model=source.state_dict(), config=source.config))
    image = VideoClassifier(3, size="tiny", num_frames=1, img_size=32, tubelet_size=1)
    video = VideoClassifier(3, size="tiny", num_frames=8, img_size=32, tubelet_size=2, temporal_pos=True)
    for model in (image, video):
        report = weights.load_pretrained(model, path, verbose=False)
        assert {k.split(".")[0] for k in report["new"]} <= {"fc_norm", "head", "temporal_pos"}
    frame = torch.rand(2, 1, 32, 32, 3)
    clip = frame.expand(-1, 8, -1, -1, -1)
    pooled = [Encoder.forward(m, x).mean(1) for m, x in ((image, frame), (video, clip))]
    assert torch.allclose(*pooled, atol=1e-5) and pooled[0].std() > 0.1
    with torch.no_grad():
        video.temporal_pos.normal_()
    assert not torch.allclose(pooled[0], Encoder.forward(video, clip).mean(1), atol=0.01)
    for model, lacks in ((source, "jointly normalised"), (video, "a temporal pos")):
        with raises("transformers", lacks):
            weights.to_hf(model)
    mae = VideoMAE("tiny", 4, 32, dec_depth=1, **weights.image_parts(path, num_frames=4, tubelet_size=2))  # --init's
    weights.load_pretrained(mae, path, verbose=False)
    assert mae.encoder.pos[:4].equal(mae.encoder.pos[4:]) and mae.encoder.temporal_pos.shape == (2, 128)
    assert not mae.dec_pos[:4].equal(mae.dec_pos[4:])  # the decoder is new: it knows time
    wide = VideoMAE("tiny", 1, 32, tubelet_size=1, dec_depth=1, dec_width=48)
    report = weights.load_pretrained(wide, path, verbose=False)  # another decoder: the encoder alone
    assert "width 96" in report["skipped"]["mask_token"] and "decoder.head.weight" in report["new"]
    assert wide.encoder.blocks[0].mlp.fc1.weight.equal(source.encoder.blocks[0].mlp.fc1.weight)
    groups = {id(p): g for g in param_groups(video, 0.05, 0.5) for p in g["params"]}
    group = groups[id(video.temporal_pos)]
    assert group["weight_decay"] == 0 and group["lr_scale"] == 0.5 ** 5
    again = saved("clip.pt", dict(model=video.state_dict(), config=video.config))
    back, about = weights.build_model(again, verbose=False)
    assert torch.allclose(back(clip), video.eval()(clip), atol=1e-6)
    back, about = weights.build_model(path, verbose=False)  # for eval.py: its decoder and targets come along
    mask = masking.make_mask("tube", 2, back.grid, 0.5)
    assert back.joint_norm and torch.allclose(back(frame, mask)[1], VideoMAE.forward(source.eval(), frame, mask)[1])


@test
def test_moco_follows():
    """Keys and copies have no gradient, the patch embedding stays, copies follow their formula, momentum ends at 1."""
    torch.manual_seed(0)
    model = pretrain_moco.MoCo(32, 8, size="tiny", num_frames=4, img_size=32)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss, spread = model(torch.rand(4, 2, 4, 32, 32, 3))
    loss.backward()
    assert all(p.grad is None for p in model.followers()) and model.encoder.patch_embed.proj.weight.grad is None
    assert all(p.grad is not None for p in model.encoder.blocks.parameters())
    optimizer.step()
    model.follow(0.75)
    state = model.state_dict()
    for name, x in state.items():
        if name.startswith("momentum_"):
            leader = name.removeprefix("momentum_")
            assert torch.allclose(x, 0.75 * start[name] + 0.25 * state[leader], atol=1e-6), name
    assert torch.equal(state["encoder.patch_embed.proj.weight"], start["encoder.patch_embed.proj.weight"])
    at = [pretrain_moco.momentum_at(s, 11, 0.99) for s in range(11)]
    assert at[0] == 0.99 and at[10] == 1 and abs(at[5] - 0.995) < 1e-9 and at == sorted(at)


VIEWS = ["--size", "tiny", "--img_size", 16, "--patch_size", 8, "--dtype", "fp32", "--max_steps", 6, "--lr", 0.02,
         "--log_every", 1, "--epochs", 4, "--warmup_epochs", 1, "--num_workers", 0, "--device", "cpu", "--proj_width",
         32, "--proj_dim", 8]
STAGES = {"pretrain_vicmae.py": ["--decoder_depth", 1, "--decoder_width", 96, "--decoder_heads", 3, "--mask_ratio", 0.5,
                                 "--gap_frames", 4, "--con_weight", 1, "--con_ramp", 1],
          "pretrain_moco.py": ["--num_frames", 4, "--sampling_rate", 1]}


def contrast_args(script, name, *args):
    """The flags of a run of a few steps."""
    images = ["--images", toy_videos()] * (script == "pretrain_vicmae.py")
    return [*VIEWS, *STAGES[script], "--data", toy_videos(), *images, "--out_dir", os.path.join(TMP, name), *args]


def contrast_run(script, name, *args, **kw):
    """Such a run -> its output, its weights, its log rows."""
    out = os.path.join(TMP, name)
    text = run(script, *contrast_args(script, name, *args), **kw)
    return (text, torch.load(os.path.join(out, "last.pt"), weights_only=True)["model"],
            [json.loads(row) for row in open(os.path.join(out, "log.jsonl"))])


@test
def test_contrastive_ranks_equal_one_process():
    """2 ranks x 4 samples give losses and weights of 1 x 8 (fp32), for both scripts; killed and resumed: identical."""
    for script in STAGES:
        _, one, rows = contrast_run(script, f"one_{script}", "--batch_size", 8)
        _, two, rows_of_two = contrast_run(script, f"two_{script}", "--batch_size", 4, ranks=2)
        assert difference(one, two) < 5e-5, (script, max((difference({k: one[k]}, {k: two[k]}), k) for k in one))
        for a, b in zip(rows, rows_of_two, strict=True):
            assert abs(a["loss"] - b["loss"]) < 1e-4 and a["chance"] == b["chance"]
        process = start(script, *contrast_args(script, f"cut_{script}", "--batch_size", 8, "--save_every", 2))
        for line in process.stdout:
            if line.startswith("step 3/"):
                kill_tree(process.pid)
                break
        process.communicate()
        text, again, _ = contrast_run(script, f"cut_{script}", "--batch_size", 8, "--num_workers", 1)
        assert "resumed" in text and difference(one, again) == 0
        text = run(script, *contrast_args(script, f"cut_{script}", "--batch_size", 4, "--accum_steps", 2, "--resume"))
        assert "contrasted 8 -> 4" in text  # other negatives: not the same run


@test
def test_contrastive_mistakes():
    """Impossible flags of pretrain_vicmae.py and pretrain_moco.py: named, with what is allowed, no traceback."""
    folder = toy_videos()
    out = ["--out_dir", os.path.join(TMP, "contrast_mistake"), "--num_workers", 0, "--size", "tiny"]
    for module, args, words in (
            (pretrain_vicmae, [], ["--data", "--images", "--toy"]), (pretrain_moco, [], ["--data", "--toy"]),
            (pretrain_vicmae, ["--data", folder, "--image_fraction", 0.3], ["--images"]),
            (pretrain_vicmae, ["--data", folder, "--images", folder, "--image_fraction", 1], ["below 1"]),
            (pretrain_vicmae, ["--data", folder, "--batch_size", 1], ["--batch_size 1", "at least 2"]),
            (pretrain_vicmae, ["--data", folder, "--rec_weight", 0, "--con_weight", 0], ["nothing"]),
            (pretrain_vicmae, ["--images", "nowhere"], ["nowhere"]),
            (pretrain_moco, ["--data", folder, "--batch_size", 1], ["--batch_size 1", "at least 2"]),
            (pretrain_moco, ["--data", folder, "--momentum", 1.5], ["--momentum 1.5"]),
            (pretrain_moco, ["--data", folder, "--num_frames", 3], ["num_frames=3", "tubelet_size=2"])):
        text = mistake(module, *args, *out)
        assert all(w in text for w in words), (args, text)


@test
def test_picture_folders_end_to_end():
    """Class folders of pictures: ViC-MAE's pre-training, fine-tuning of a released ViT, linear probe, test, k-NN."""
    rng, folder, shape = np.random.default_rng(0), os.path.join(TMP, "pictures"), ["--img_size", 32, "--num_workers", 0]
    for label, color in (("red", (200, 40, 40)), ("green", (40, 200, 40)), ("blue", (40, 40, 200))):
        os.makedirs(os.path.join(folder, label))
        for i in range(6):
            noise = rng.integers(-40, 40, (40, 48, 3)) + np.array(color)
            data.write_png(os.path.join(folder, label, f"{i}.png"), noise.clip(0, 255).astype(np.uint8))
    out = {name: os.path.join(TMP, f"pictures_{name}") for name in ("pre", "probe", "tuned", "test", "knn")}
    text = run("pretrain_vicmae.py", "--images", folder, *shape, "--size", "tiny", "--patch_size", 8,
               "--batch_size", 6, "--max_steps", 3, "--proj_width", 16, "--decoder_depth", 1, "--out_dir", out["pre"])
    assert "0 videos, 18 pictures" in text
    pre, released = os.path.join(out["pre"], "last.pt"), saved("released.pth", dict(model=released_vit(0)))
    small_run = ["--data", folder, "--val_data", folder, *shape, "--batch_size", 6, "--eval_every", 99]
    run("finetune.py", "--linear_probe", "--init", pre, *small_run, "--max_steps", 2, "--out_dir", out["probe"])
    text = run("finetune.py", "--init", released, *small_run, "--epochs", 12, "--warmup_epochs", 2, "--lr", 0.1,
               "--mixup", 0, "--cutmix", 0, "--rand_aug", 0, 0, 0, "--out_dir", out["tuned"])
    assert "one frame" in text and "cls_token" not in text
    tuned = os.path.join(out["tuned"], "last.pt")
    text = run("eval.py", "--ckpt", tuned, "--data", folder, "--num_segments", 1, "--num_crops", 1, "--num_workers", 0,
               "--out_dir", out["test"])
    assert "top-1 100.00" in text, text  # the colour is the label
    text = run("eval.py", "--ckpt", pre, "--knn", folder, "--data", folder, "--k", 1, "--num_workers", 0, "--out_dir",
               out["knn"])
    assert "k = 1: top-1 100.00" in text, text


# ---------------------------------------------------------------- bench.py

@test
def test_bench_compares_like_with_like():
    """Spelt-out attention computes the same; a row's flops are three times two times the matmuls of a forward pass."""
    model = small()
    video, mask = clips(model), mask_for(model)
    loss = model(video, mask)[0]
    for m in model.modules():
        if isinstance(m, bench.Attention):
            m.forward = types.MethodType(bench.plain_attention, m)
    assert abs(model(video, mask)[0] - loss) < 1e-5
    row = bench.ROW | dict(model="tiny", batch_size=2, num_frames=4, img_size=32, mask_ratio=0.5)
    classifier = VideoClassifier(400, size="tiny", num_frames=4, img_size=32)
    for task, plain in (("pretrain", VideoMAE("tiny", 4, 32)), ("finetune", classifier)):
        step, flops = bench.training_step(row | dict(task=task), torch.device("cpu"))
        assert flops == 6 * 2 * (forward_macs(plain, 4, 4) if task == "pretrain" else forward_macs(plain))
        assert step() > step() > 0


# ---------------------------------------------------------------- all scripts

# ---------------------------------------------------------------- ava.py

def ava_file(name, text):
    """A file in the temporary folder -> its path."""
    path = os.path.join(TMP, name)
    open(path, "w", newline="").write(text)
    return path


@test
def test_ava_files():
    """AVA's CSVs parse in every form met: padded seconds, CR LF, tabs, no person, empty label, nobody in the frame."""
    truth = ava.read_rows(ava_file("t.csv", "m,0902,0.1,0.2,0.3,0.4,12,0\r\nm,902,0.1,0.2,0.3,0.4,80,0\r\n\r\n"
                                            "n,903,,,,,,\r\nk,1\r\n"), "truth")
    assert truth.keys == [("m", 902), ("n", 903), ("k", 1)] and truth.frame.tolist() == [0, 0]
    assert truth.id.tolist() == [12, 80] and truth.box.tolist() == [[0.1, 0.2, 0.3, 0.4]] * 2
    early = ava.read_rows(ava_file("t7.csv", "video,sec,x1,y1,x2,y2,action\n-5KQ66BBWC4,942,.1,.2,.3,.4,1\n"), "truth")
    assert early.keys == [("-5KQ66BBWC4", 942)] and early.id.tolist() == [1]
    boxes = ava.read_rows(ava_file("b.csv", "m\t1\t0\t0\t1\t1\t\t0.9\r\nm\t1\t0\t0\t1\t1\t7\t0.8\r\n"), "boxes")
    assert boxes.score.tolist() == [0.9, 0.8] and boxes.id.tolist() == [0, 0]
    assert ava.read_rows(ava_file("b7.csv", "m,1,0,0,1,1,0.7\n"), "boxes").score.tolist() == [0.7]
    assert ava.read_excluded(ava_file("e.csv", "0f39OWEqJ24,0903\r\n")) == {("0f39OWEqJ24", 903)}
    assert ava.read_excluded(ava_file("empty.csv", "")) == set() == ava.read_excluded(None)
    both = 'item {\n name: "bend/bow (at the waist)"\n id: 3\n}\nlabel {\n  name: \'watch {TV}\'\n}'
    with raises("expected a name and an id"):
        ava.read_label_map(ava_file("bad.pbtxt", both))
    both = 'item {\n name: "stand"\n id: 12\n}\nlabel {\n  name: "bend"\n label_id: 1\n label_type: PERSON_MOVEMENT\n}'
    assert ava.read_label_map(ava_file("both.pbtxt", both)) == {1: "bend", 12: "stand"}
    for kind, row, words in (("truth", "m,1,0,0,1,1", ["6 columns"]), ("truth", "m,1.5,0,0,1,1,2,0", ["whole second"]),
                             ("truth", "m,1,0,0,640,480,2,0", ["[0,1]"]), ("boxes", "m,1,0,0,1,1,,x", ["score"]),
                             ("truth", "m,1,0,0,1,1,3,0.98", ["person 0.98"]), ("boxes", "m,1,0,0,1,1,2", ["score 2"]),
                             ("detections", "m,1,0,0,1,1,3", ["7 columns", "action,score"]),
                             ("detections", "m,1,0,0,1,1,3,nan", ["score nan"])):
        with raises("wrong.csv row 2", row, *words):
            ava.read_rows(ava_file("wrong.csv", "m,1,0,0,1,1,2,1\n" + row + "\n"), kind)
    aia = ava_file("aia.json", json.dumps([dict(image_id=10902, bbox=[64, 48, 320, 240], score=0.9)]))
    want = [[0.1, 0.1, 0.6, 0.6]]
    for movies in (ava_file("movies.txt", "a.mkv,640,480\nb.mp4,640,480\n"), ava_file("images.json", json.dumps(
            dict(images=[dict(id=10902, movie="b", timestamp=902, width=640, height=480)])))):
        rows = ava.read_boxes(aia, movies, None)
        assert rows.keys == [("b", 902)] and np.allclose(rows.box, want)
    movies = ava_file("movies.txt", "a.mkv\nb.mp4\n")
    assert np.allclose(ava.read_boxes(aia, movies, lambda video: (720, 960)).box, [[64 / 480, 48 / 360, 0.8, 0.8]])
    image = dict(id=10902, movie="b", timestamp=9, width=0, height=4)
    images = ava_file("images.json", json.dumps(dict(images=[image])))
    with raises("images.json", "not above 0"):
        ava.read_boxes(aia, images, None)
    assert ava.read_label_map(ava_file("quoted.pbtxt", 'item { name: "a \\"b\\" c" id: 1 }')) == {1: 'a "b" c'}
    with raises("looks.csv", "annotations, not person boxes"):
        ava.read_rows(ava_file("looks.csv", "m,1,0,0,1,1,3,0\nm,1,0,0,1,1,3,1\n"), "boxes")
    with raises("aia.json entry 1", "image 10902 is not in"):
        ava.read_boxes(aia, ava_file("images.json", json.dumps(dict(images=[dict(id=1, movie="b", timestamp=9, width=6,
                                                                                 height=4)]))), None)
    with raises("aia.json entry 1", "--movie_list"):
        ava.read_boxes(aia, movies, lambda video: (100, 100))


@test
def test_detection_files_read_back():
    """What write_detections writes, both readers read alike; a frame met again in a second file is ignored."""
    rng = np.random.default_rng(0)
    frame = np.array([0, 0, 1, 2, 0])
    box = rng.random((5, 4)).round(3)
    rows = ava.Rows([("a,b", 2), ("b", 1000), ("c", 3)], frame, box, np.arange(1, 6), rng.random(5).round(4))
    path = os.path.join(TMP, "d.csv")
    ava.write_detections(path, rows._replace(keys=[("ab", 2), *rows.keys[1:]]))
    assert open(path).read().startswith("ab,0002,")
    for got in (ava.read_detections(path), ava.read_rows(path, "detections")):
        assert got.keys == [("ab", 2), ("b", 1000), ("c", 3)]
        assert all(np.array_equal(x, y) for x, y in zip(got[1:], rows[1:]))
    quoted = ava_file("quoted.csv", '"ab",0002,0,0,1,1,3,0.5\nb ,1000,0,0,1,1,3,0.5\n')
    assert ava.read_detections(quoted).keys == [("ab", 2), ("b", 1000)]
    odd = ava_file("odd.csv", "video,sec,x1,y1,x2,y2,id,score\nb, 1000, 0,0,1,1, 3,0.5\nd,4,0,0,1,1,3,0.5\n")
    two = ava.merge_rows([ava.read_detections(path), ava.read_detections(odd)], [path, odd], "detections")
    assert two.keys[-1] == ("d", 4) and len(two.frame) == 6 and two.frame[-1] == 3
    with raises("odd.csv", "another file too", "('b', 1000)"):
        ava.merge_rows([got, ava.read_detections(odd)], [path, odd], "truth")


def slow_frame_map(truth, found, classes, excluded, protocol):
    """Loop-by-loop frame mAP of lists (key, box, class[, score]); truth's box None: an empty frame -> mAP, {class: AP}.
    """
    found = [d for d in found if d[2] in classes]
    if protocol == "activitynet":
        listed, kept = {key for key, *_ in truth}, []
        for key in {d[0] for d in found} & listed:
            rows = [(i, d) for i, d in enumerate(found) if d[0] == key]
            kept += sorted(rows, key=lambda row: -row[1][3])[:50]
        found = [d for _, d in sorted(kept, key=lambda row: row[0])]
    full = lambda b: b is not None and b[2] > b[0] and b[3] > b[1]
    aps = {}
    for c in classes:
        gt = {}
        for key, box, label in truth:
            if label == c and key not in excluded and full(box):
                gt.setdefault(key, []).append(box)
        used, flags = set(), []
        for d in sorted((d for d in found if d[2] == c and d[0] not in excluded and full(d[1])), key=lambda d: -d[3]):
            best, place = -1, None
            for j, g in enumerate(gt.get(d[0], [])):
                w, h = min(d[1][2], g[2]) - max(d[1][0], g[0]), min(d[1][3], g[3]) - max(d[1][1], g[1])
                inter = max(w, 0) * max(h, 0)
                area = lambda b: (b[2] - b[0]) * (b[3] - b[1])
                if inter / (area(d[1]) + area(g) - inter) > best:
                    best, place = inter / (area(d[1]) + area(g) - inter), (d[0], j)
            flags.append(best >= 0.5 and place not in used)
            used |= {place} if flags[-1] else set()
        total = sum(map(len, gt.values()))
        recall, precision = [0.0], [0.0]
        for n in range(1, len(flags) + 1):
            recall.append(sum(flags[:n]) / total if total else 0)
            precision.append(sum(flags[:n]) / n)
        area = sum((recall[i] - recall[i - 1]) * max(precision[i:]) for i in range(1, len(recall)))
        aps[c] = area if total else math.nan
    valid = [a for a in aps.values() if not math.isnan(a)]
    return sum(valid) / len(valid) if valid else math.nan, aps


def as_rows(entries):
    """[(key, box or None, class[, score])] -> Rows."""
    keys = {}
    rows = [(keys.setdefault(key, len(keys)), box, *rest) for key, box, *rest in entries]
    rows = [row for row in rows if row[1] is not None]
    column = lambda i, kind: np.array([row[i] if len(row) > i else 1 for row in rows], kind)
    return ava.Rows(list(keys), column(0, int), column(1, float).reshape(-1, 4), column(2, int), column(3, float))


@test
def test_frame_map_by_hand():
    """Hand-computed AP: a right, a wrong, a duplicate detection; no second choice; empty frames; classes without truth.
    """
    a, b, far = (0, 0, 0.4, 0.4), (0.1, 0, 0.5, 0.4), (0.6, 0.6, 0.9, 0.9)
    k, m = ("v", 1), ("v", 2)
    score = lambda truth, found, **kw: ava.frame_map(as_rows(truth), as_rows(found), [1, 2], **kw)["ap"][1]
    truth = [(k, a, 1), (k, far, 1)]
    assert score(truth, [(k, a, 1, 0.9), (k, a, 1, 0.8), (k, far, 1, 0.7)]) == 0.5 * 1 + 0.5 * 2 / 3
    assert score(truth, [(k, far, 1, 0.9)]) == 0.5 and score(truth, []) == 0
    # both look at `a` first, which the higher-scored takes: the other does not turn to `b`, which it overlaps by .6
    assert score([(k, a, 1), (k, b, 1)], [(k, a, 1, 0.9), (k, a, 1, 0.8)]) == 0.5
    left, between, right = (0, 0, 0.5, 0.5), (0.125, 0, 0.625, 0.5), (0.25, 0, 0.75, 0.5)  # the same IoU: the first
    assert score([(k, left, 1), (k, right, 1)], [(k, between, 1, 0.9), (k, left, 1, 0.8)]) == 0.5
    wrong_first = [(m, a, 1, 0.9), (k, a, 1, 0.8)]  # a frame without true boxes
    assert score(truth[:1], wrong_first) == 0.5
    assert score(truth[:1], wrong_first, protocol="activitynet") == 1
    assert score([*truth[:1], (m, None, 0)], wrong_first, protocol="activitynet") == 0.5
    assert score(truth[:1], wrong_first, excluded={m}) == 1 and math.isnan(score([(k, (0, 0, 0, 1), 1)], []))
    many = [(k, far, 1, 0.9 - i / 1000) for i in range(50)] + [(k, a, 1, 0.1)]
    assert score(truth[:1], many, protocol="activitynet") == 0 and score(truth[:1], many) == 1 / 51
    result = ava.frame_map(as_rows(truth), as_rows([(k, a, 1, 0.9)]), [1, 2])
    assert math.isnan(result["ap"][2]) and result["map"] == 0.5 and result["count"] == {1: 2, 2: 0}
    for order in (1, -1):  # one score for all: precision 2/3 at recall 1, in whatever order
        rows = [(k, a, 1, 0.9), (m, a, 1, 0.5), (k, far, 1, 0.2)][::order]
        result = ava.frame_map(as_rows(truth), as_rows(rows), [1, 2])
        assert abs(result["flat"][1] - 2 / 3) < 1e-12 and result["flat_map"] == result["flat"][1] != result["map"]


@test
def test_frame_map_equals_a_slow_scorer():
    """250 random cases, both protocols: ties, duplicates, several detections on one box, empty and excluded frames."""
    for case in range(250):
        r = random.Random(case)
        keys = [(f"v{i % 2}", i) for i in range(r.randint(1, 6))]
        extra = [*keys, ("v9", 1), ("v0", 99)]

        def box():
            x, y = r.choice((0, 0.1, 0.2)), r.choice((0, 0.1, 0.2))
            return x, y, x + r.choice((0.2, 0.3, 0.4)), y + (0 if r.random() < 0.1 else r.choice((0.2, 0.3, 0.4)))
        truth = [(k, box(), r.randint(1, 6)) for k in keys for _ in range(r.randint(1, 6))] + [(keys[0], None, 0)]
        truth += [(("v1", 50), None, 0)]
        found = [(r.choice(extra), box(), r.randint(1, 6), r.choice((0.1, 0.5, 0.5, r.random())))
                 for _ in range(r.choice((0, 5, 40, 200)))]
        classes, excluded = r.sample(range(1, 7), r.randint(1, 5)), {r.choice(extra)} if case % 3 == 0 else set()
        for protocol in ("paper", "activitynet"):
            mine = ava.frame_map(as_rows(truth), as_rows(found), classes, excluded, protocol)
            mean, aps = slow_frame_map(truth, found, classes, excluded, protocol)
            pairs = [(mine["map"], mean), *((mine["ap"][c], aps[c]) for c in classes)]
            assert all(math.isnan(x) and math.isnan(y) or abs(x - y) < 1e-12 for x, y in pairs), (case, protocol, pairs)


@test
def test_movie_reader_is_frame_exact():
    """Frames by time are those of a full index, on every kind of file; at 24, 25, 29.97 and 60 fps by number."""
    rng = np.random.default_rng(0)
    for kind, path in odd_files().items():
        with data.VideoReader(path) as video:
            times = video.times - video.times[0]
            windows = [times[-1] * rng.random() + np.arange(5) * 0.07 for _ in range(4)] + [times[::3], times[:2] - 5]
            wanted = [data.nearest(times, w) for w in windows[:-1]] + [np.zeros(2, int)]
        for window, index in zip(windows, wanted):
            with data.MovieReader(path) as movie:
                if window.max() < -3:
                    with raises(path, "before its start"):
                        movie.at(window)
                    continue
                frames, where = movie.at(window)
                assert (numbers(frames)[where] == index).all(), (kind, window, index, numbers(frames)[where])
    for rate in (Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(60)):
        pts = np.round(np.arange(250) * 1000 / float(rate) + 7000).astype(int)  # starts at 7 s
        path = write(f"clock{float(rate):.0f}.mkv", numbered(250), pts=pts, bf=3, g=48)
        for second in (0, 1, 2, 3, 4):
            t = second + ava.clip_seconds(16, 4, 25)
            index = [min(range(250), key=lambda i: (abs((pts[i] - 7000) / 1000 - max(x, 0)), i)) for x in t]
            with data.MovieReader(path) as movie:
                assert movie.order is None  # no full index: a seek
                frames, where = movie.at(t)
            assert (numbers(frames)[where] == index).all() and len(frames) == len(set(index)), (rate, second)
    with data.MovieReader(path) as movie, raises(path, "ends at 4.15 s", "from 8.00 s"):
        movie.at(np.array([8.0, 9.0]))


@test
def test_key_frames_and_clips():
    """Window -31 + 4k at 25 fps; rows of one box are one target; jitter, crop and flip move boxes with their pixels."""
    assert (ava.clip_seconds(16, 4, 25) * 25).round(9).tolist() == list(range(-31, 30, 4))
    path = write("ava_clip.mp4", numbered(60, 64, 96), bf=2, g=12)
    b, c = (0.1, 0.1, 0.5, 0.9), (0.5, 0.2, 0.9, 0.8)
    rows = as_rows([(("m", 1), b, 3), (("m", 1), c, 5), (("m", 1), b, 9), (("m", 1), (0.2, 0.2, 0.2, 0.9), 3),
                    (("gone", 1), b, 3), (("m", 2), c, 4)])
    frame, = ava.key_frames(rows, {"m": path}, [3, 5, 9])
    assert np.allclose(frame.boxes, [b, c]) and frame.labels.tolist() == [[1, 0, 1], [0, 1, 0]] and frame.second == 1
    twice = as_rows([(("m", 1), b, 0, 0.8), (("m", 1), b, 0, 0.9)])
    assert ava.key_frames(twice, {"m": path}, None)[0].scores.tolist() == [np.float32(0.9)]
    moved = [ava.jitter_boxes(np.random.default_rng(s), np.array([[10.0, 20, 30, 60]]))[0] for s in range(2000)]
    low, high = np.min(moved, 0), np.max(moved, 0)  # width 20, height 40
    assert np.allclose(low, [6, 16, 28, 58], atol=0.1) and np.allclose(high, [12, 22, 34, 64], atol=0.1)
    cut, kept = ava.crop_boxes(np.array([[0, 0, 10, 10], [20, 5, 40, 50], [9, 0, 10.5, 30]]), 5, 10, 20, 20)
    assert cut.tolist() == [[0, 0, 0, 5], [10, 0, 20, 20], [0, 0, 0.5, 20]] and kept.tolist() == [False, True, False]
    make = lambda **kw: ava.TrainFrames([frame], ava.clip_seconds(4, 2, 25), (64, 64), 64, seed=1, **kw)
    seen = set()
    for epoch in range(12):
        (clip, boxes, labels, count, shift), _ = make(jitter=False)[epoch, 0]
        assert clip.shape == (1, 4, 64, 64, 3) and count.item() == len(boxes) == len(labels)
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all() and 0 <= boxes.min() and boxes.max() <= 64
        assert (shift.abs() <= torch.tensor([10 / 180, 26 / 255, 26 / 255])).all()
        with data.MovieReader(path) as movie:
            whole = torch.from_numpy(movie.at(1 + ava.clip_seconds(4, 2, 25))[0])
        for flipped in (False, True):
            for left in range(33):
                part = whole[:, :, left:left + 64]
                if torch.equal(part.flip(2) if flipped else part, clip[0]):
                    want = np.clip(frame.boxes * [96, 64, 96, 64] - [left, 0, left, 0], 0, 64)
                    want = want[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [64, 0, 64, 0] if flipped else want
                    assert np.allclose(boxes, want[: len(boxes)], atol=1e-4), (flipped, left, boxes, want)
                    seen.add(flipped)
    assert seen == {False, True}
    narrow = frame._replace(boxes=np.array([[0.98, 0.1, 1, 0.9]], np.float32), labels=frame.labels[:1])
    for epoch in range(5):  # a box that most windows miss is never lost
        assert len(ava.TrainFrames([narrow], np.zeros(4), (16, 16), 64, jitter=False)[epoch, 0][0][1]) == 1
    tiny = frame._replace(boxes=np.array([[0.5, 0.5, 0.501, 0.501]], np.float32), labels=frame.labels[:1])
    assert len(ava.TrainFrames([tiny], np.zeros(4), (16, 16), 64)[0, 0][0][1]) == 1  # less than a pixel
    assert not ava.key_frames(as_rows([(("m", 1), (1.02, 0, 1.08, 1), 3)]), {"m": path}, [3])  # outside the frame
    far = ava.TrainFrames([frame._replace(second=902), frame], np.zeros(4), (64, 64), 64)
    (clip, *_), bad = far[0, 0]
    assert len(bad) >= 1 and "ends at 2.36 s" in bad[0][1] and "902.00 s" in bad[0][1]
    many = [frame._replace(second=s) for s in (0, 1, 2, 9, 902)]
    videos = ava.TestFrames(many, ava.clip_seconds(4, 2, 25), 32)
    assert videos.groups == [[0, 1, 2], [3], [4]]
    ((group, pixels, where),), failed = videos[0]
    assert group == [0, 1, 2] and where.shape == (3, 4) and pixels.shape[1:] == (32, 48, 3) and not failed
    assert videos[2] == ([], {4: f"{path}: ends at 2.36 s, frames from 901.88 s on were asked for"})


@test
def test_hsv_shift():
    """Hue, saturation and value move as colorsys has it, clipped; no shift changes nothing."""
    import colorsys
    video = torch.rand(2, 1, 5, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    video[0, 0, 0, 0], video[0, 0, 0, 1] = 0.5, 0.0  # grey, black
    assert (augment.hsv_shift(video, torch.zeros(2, 3)) - video).abs().max() < 1e-6
    shift = torch.tensor([[0.05, 0.1, -0.1], [-0.04, -0.1, 0.1]])
    out = augment.hsv_shift(video, shift)
    for pixel, got, (dh, ds, dv) in zip(video.flatten(1, 3).flatten(0, 1), out.flatten(1, 3).flatten(0, 1),
                                        shift.repeat_interleave(30, 0).tolist()):
        h, s, v = colorsys.rgb_to_hsv(*pixel.tolist())
        if s > 0:  # the hue of grey is arbitrary
            want = colorsys.hsv_to_rgb((h + dh) % 1, min(max(s + ds, 0), 1), min(max(v + dv, 0), 1))
            assert np.allclose(got, want, atol=1e-6), (pixel, got, want)


# ---------------------------------------------------------------- detect_ava.py

def slow_roi_align(feature, box, scale, bins, aligned):
    """Loop-by-loop RoIAlign of one box, feature (D, h, w) float64 -> (D, bins, bins)."""
    (D, h, w), shift = feature.shape, 0.5 if aligned else 0.0
    x1, y1, x2, y2 = (v * scale - shift for v in box)
    width, height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1), max(y2 - y1, 1))
    rows, columns = math.ceil(height / bins), math.ceil(width / bins)
    out = torch.zeros(D, bins, bins, dtype=torch.float64)
    for i, j in itertools.product(range(bins), range(bins)):
        for a, b in itertools.product(range(rows), range(columns)):
            y = y1 + (i + (a + 0.5) / rows) * height / bins
            x = x1 + (j + (b + 0.5) / columns) * width / bins
            if -1 <= y <= h and -1 <= x <= w:
                y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
                top, left = int(y), int(x)
                for dy, dx in itertools.product((0, 1), (0, 1)):
                    weight = (y - top if dy else 1 - y + top) * (x - left if dx else 1 - x + left)
                    out[:, i, j] += weight * feature[:, min(top + dy, h - 1), min(left + dx, w - 1)] / (rows * columns)
    return out


@test
def test_roi_align():
    """RoIAlign equals the slow loop in float64, boxes over, at and outside the borders and without area included."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(3, 4, 9, 12, dtype=torch.float64, generator=g)
    low = torch.rand(30, 2, generator=g) * 200 - 50
    boxes = torch.cat([low, low + torch.rand(30, 2, generator=g) ** 2 * 220], 1).double()
    boxes[:4] = torch.tensor([[10, 10, 10, 10], [-60, -60, -30, -30], [0, 0, 192, 144], [191, 100, 250, 144]])
    index = torch.randint(0, 3, (30,), generator=g)
    for aligned in (False, True):
        got = detect_ava.roi_align(features, boxes, index, 1 / 16, 7, aligned)
        want = torch.stack([slow_roi_align(features[i], b.tolist(), 1 / 16, 7, aligned) for i, b in zip(index, boxes)])
        assert (got - want).abs().max() < 1e-12 and want.abs().max() > 1
    assert detect_ava.roi_align(features, boxes[:0], index[:0], 1 / 16).shape == (0, 4, 7, 7)
    leaf = features[:, :2].clone().requires_grad_()
    some = lambda f: detect_ava.roi_align(f, boxes[:6], index[:6], 1 / 16, 2)
    assert torch.autograd.gradcheck(some, leaf)


def detector(**kw):
    """A tiny Detector with random biases and norms."""
    torch.manual_seed(0)
    model = detect_ava.Detector(5, **(dict(size="tiny", num_frames=4, img_size=(32, 48), patch_size=8) | kw)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@test
def test_detector_forward():
    """Logits equal slow pooling of the encoder's tokens; other frame sizes resize positions; padding is the mean."""
    model = detector()
    video, boxes = clips(model), torch.tensor([[0, 0, 48, 32], [5, 3, 30, 20], [40, 20, 60, 40.0]])
    index = torch.tensor([0, 1, 1])
    with torch.no_grad():
        got = model(video, boxes, index)
        tokens = model.norm(Encoder.forward(model, video)).double()
        maps = tokens.view(2, 2, 4, 6, -1).mean(1).permute(0, 3, 1, 2)
        pooled = torch.stack([slow_roi_align(maps[i], b.tolist(), 1 / 8, 7, False).amax((1, 2)) for i, b in
                              zip(index, boxes)])
        assert (got - model.cls_score(pooled.float())).abs().max() < 1e-5
        bigger = model(clips(detector(img_size=(40, 64))), boxes, index)
        assert model.grid == (2, 5, 8) and torch.equal(model.pos, position_table((2, 5, 8), 128, (2, 4, 6)))
        assert torch.equal(model(video, boxes, index), got) and bigger.shape == got.shape  # and back again
    small_video = torch.randint(0, 256, (1, 4, 30, 41, 3), dtype=torch.uint8)
    padded = detect_ava.pad_frames(small_video, 8, model.config["mean"])
    assert padded.shape == (1, 4, 32, 48, 3) and torch.equal(padded[:, :, :30, :41], small_video / 255)
    normalised = (padded - torch.tensor(model.config["mean"])) / torch.tensor(model.config["std"])
    assert normalised[:, :, 30:].abs().max() == 0 == normalised[:, :, :, 41:].abs().max()
    assert detect_ava.pad_frames(video, 8, model.config["mean"]) is video


@test
def test_detection_weights():
    """Pre-trained weights bring their final norm, fine-tuned ones and other heads none; the public layout loads whole.
    """
    source = small(img_size=(32, 48))
    path = saved("ava_pre.pt", dict(model=source.state_dict(), config=source.config, classes=None, args={}))
    model = detector()
    weights.load_pretrained(model, path, verbose=False)
    assert torch.equal(model.norm.weight, source.encoder.norm.weight)
    assert torch.equal(model.blocks[3].mlp.fc2.weight, source.encoder.blocks[3].mlp.fc2.weight)
    tuned = VideoClassifier(5, size="tiny", num_frames=4, img_size=(32, 48), patch_size=8)
    path = saved("ava_tuned.pt", dict(model=tuned.state_dict(), config=tuned.config, classes=None, args={}))
    report = weights.load_pretrained(detector(), path, verbose=False)
    assert {"norm.weight", "norm.bias", "cls_score.weight", "cls_score.bias"} == set(report["new"])
    other = detect_ava.Detector(3, size="tiny", num_frames=4, img_size=(32, 48), patch_size=8)
    path = saved("ava_other.pt", dict(model=other.state_dict(), config=other.config, classes=None, args={}))
    report = weights.load_pretrained(detector(), path, verbose=False)
    assert set(report["new"]) == {"cls_score.weight", "cls_score.bias"} == set(report["skipped"])
    model = detector(num_frames=16, img_size=224, patch_size=16, mean=detect_ava.NORMS["reference"][0],
                     std=detect_ava.NORMS["reference"][1])
    public = {("backbone." if not k.startswith("cls") else "roi_heads.action.predictor.") + k: v
              for k, v in model.state_dict().items()}
    path = saved("ava_public.pth", dict(model=public))
    names = {i: f"class {i}" for i in range(1, 6)}
    loaded, got, about = detect_ava.load_detector(path, names, "reference")
    assert difference(loaded.state_dict(), model.state_dict()) == 0 and got == names and about == {}
    video, boxes, index = clips(model, 1), torch.tensor([[3.0, 3, 100, 150]]), torch.tensor([0])
    with torch.no_grad():
        assert torch.equal(loaded(video, boxes, index), model(video, boxes, index))
        other = detect_ava.load_detector(path, names)[0]
        assert not torch.equal(other(video, boxes, index), model(video, boxes, index))  # ImageNet's mean and std
    for names, words in ((None, "--label_map"), ({1: "a"}, "not 1")):
        with raises(path, "5 outputs", words):
            detect_ava.load_detector(path, names)
    with raises("no cls_score"):
        detect_ava.load_detector(saved("ava_pre.pt", dict(model=source.state_dict(), config=source.config)), None)


@functools.cache
def tiny_ava():
    """An AVA set of 4 movies of 5 s with two boxes a second -> its folder; movie d is cut off, e does not exist."""
    root = os.path.join(TMP, "ava")
    os.makedirs(os.path.join(root, "movies"))
    rng = np.random.default_rng(0)
    for k, name in enumerate("abcd"):
        frames = rng.integers(0, 255, (60, 8, 12, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
        data.write_video(os.path.join(root, "movies", f"{name}.mp4"), frames, fps=12, g=12 + k, bf=2)
    whole = open(os.path.join(root, "movies", "d.mp4"), "rb").read()
    open(os.path.join(root, "movies", "d.mp4"), "wb").write(whole[:-2000])
    rows = [(v, s, box, c) for v in "abcde" for s in range(1, 4)
            for box, c in ((".1,.1,.5,.8", 1 + s % 2), (".4,.2,.9,.9", 3), (".4,.2,.9,.9", 1))[:1 if s == 3 else 3]]
    for name, videos in (("train", "abc"), ("val", "abde")):
        open(os.path.join(root, f"{name}.csv"), "w").writelines(
            f"{v},{s:04d},{box},{c},7\n" for v, s, box, c in rows if v in videos)
    return root


DETECT = ["--size", "tiny", "--num_frames", 4, "--img_size", 24, "--short_side", 32, "--patch_size", 8,
          "--sampling_rate", 3, "--dtype", "fp32", "--batch_size", 4, "--max_steps", 6, "--lr", 0.05, "--log_every", 1,
          "--device", "cpu", "--max_bad", 1]


def ava_run(name, *args, **kw):
    """A detection run of a few steps -> its output, its checkpoint (None: none), the lines of its detections."""
    root, out = tiny_ava(), os.path.join(TMP, name)
    text = run("detect_ava.py", *DETECT, "--data", f"{root}/train.csv", "--val_data", f"{root}/val.csv", "--data_root",
               f"{root}/movies", "--out_dir", out, *args, **kw)
    last, csv_file = os.path.join(out, "last.pt"), os.path.join(out, "detections.csv")
    return (text, torch.load(last, weights_only=True) if os.path.exists(last) else None,
            open(csv_file).read() if os.path.exists(csv_file) else None)


@test
def test_detection_killed_resumed_and_on_ranks():
    """SIGKILL and resume: the same weights (drop path, jitter on). 2 ranks: the same weights (2e-5) and detections."""
    args = ["--drop_path", 0.3]
    _, whole, lines = ava_run("ava_whole", *args, "--num_workers", 0)
    stop_at, root, name = random.randint(3, 5), tiny_ava(), os.path.join(TMP, "ava_killed")
    process = start("detect_ava.py", *DETECT, "--data", f"{root}/train.csv", "--val_data", f"{root}/val.csv",
                    "--data_root", f"{root}/movies", "--out_dir", name, *args, "--save_every", 2, "--num_workers", 2)
    for line in process.stdout:
        if line.startswith(f"step {stop_at}/"):
            kill_tree(process.pid)
            break
    process.communicate()
    text, again, resumed_lines = ava_run("ava_killed", *args, "--num_workers", 1)
    assert "resumed" in text and difference(whole["model"], again["model"]) == 0 and lines == resumed_lines
    plain = ["--drop_path", 0, "--num_workers", 0]
    _, one, _ = ava_run("ava_one", *plain)
    _, two, _ = ava_run("ava_two", *plain, "--batch_size", 2, ranks=2)
    assert difference(one["model"], two["model"]) < 2e-5
    losses = [[json.loads(r).get("loss") for r in open(os.path.join(TMP, name, "log.jsonl"))]
              for name in ("ava_one", "ava_two")]
    assert all(a == b or abs(a - b) < 1e-5 for a, b in zip(*losses))
    test_args = ["--ckpt", os.path.join(TMP, "ava_one", "last.pt"), "--val_data", f"{root}/val.csv", "--data_root",
                 f"{root}/movies", "--dtype", "fp32", "--device", "cpu", "--num_workers", 0]
    found = []
    for ranks in (None, 2):
        out = os.path.join(TMP, f"ava_test_{ranks}")
        text = run("detect_ava.py", *test_args, "--out_dir", out, ranks=ranks, ok=False)  # some key frames fail
        assert "1 of 4 movies are not in" in text and "3 of 9 key frames could not be read" in text, text
        found.append(open(os.path.join(out, "detections.csv")).read())
    assert found[0] == found[1] and len({tuple(r.split(",")[:2]) for r in found[0].splitlines()}) >= 6
    score = call(detect_ava, "--score", os.path.join(out, "detections.csv"), "--val_data", f"{root}/val.csv")
    assert re.search(r"frame mAP at IoU 0.5: (\S+)", score)[1] == re.search(r"frame mAP at IoU 0.5: (\S+)", text)[1]


@test
def test_own_movie():
    """--video writes a CSV in AVA's format and the whole movie with boxes drawn, from boxes or the full frame."""
    root, ckpt = tiny_ava(), saved("ava_own.pt", dict(
        model=(m := detector(img_size=32)).state_dict(), config=m.config | dict(class_ids=[2, 4, 5, 8, 9]),
        classes=list("vwxyz"), args=dict(sampling_rate=3, fps=12.0, short_side=32)))
    base = ["--ckpt", ckpt, "--video", f"{root}/movies/a.mp4", "--dtype", "fp32", "--device", "cpu", "--num_workers", 0,
            "--show", 0, "--out_dir", os.path.join(TMP, "own")]
    text = call(detect_ava, *base, "--full_frame")
    rows = [r.split(",") for r in open(os.path.join(TMP, "own", "a_actions.csv")).read().splitlines()]
    assert len(rows) == 5 * 5 and rows[0][:7] == ["a", "0000", "0", "0", "1", "1", "2"] and "60 frames" in text
    boxes = ava_file("own.csv", "a,2,.25,.25,.75,.75,,.9\na,2,0,0,.2,.2,,.1\nb,2,0,0,1,1,,1\n")
    call(detect_ava, *base, "--boxes", boxes)
    rows = [r.split(",") for r in open(os.path.join(TMP, "own", "a_actions.csv")).read().splitlines()]
    assert [r[6] for r in rows] == ["2", "4", "5", "8", "9"] and all(0 < float(r[7]) <= 0.9 for r in rows)
    paths = os.path.join(TMP, "own", "a_actions.mp4"), f"{root}/movies/a.mp4"
    call(detect_ava, *base[:-1], os.path.join(TMP, "own2"), "--boxes", boxes, "--box_score", 0)
    rows = [r.split(",") for r in open(os.path.join(TMP, "own2", "a_actions.csv")).read().splitlines()]
    assert [float(r[7]) <= 0.1 for r in rows] == [False] * 5 + [True] * 5  # scores hold the person detector's
    with data.VideoReader(paths[0]) as drawn, data.VideoReader(paths[1]) as movie:
        assert len(drawn) == 60 and np.allclose(drawn.times, movie.times, atol=1e-3)
        frames, plain = drawn.frames([0, 24, 59]), movie.frames([0, 24, 59]).repeat(10, 1).repeat(10, 2)
    change = (np.abs(frames.astype(int) - plain) > 60).mean((1, 2, 3))  # the share of values that differ much
    assert frames.shape == plain.shape and change[1] > 0.005 > 1e-4 > max(change[0], change[2]), change
    yellow = frames[1, 190:220, 120:122].reshape(-1, 3).mean(0)  # the left edge of the box
    assert yellow[0] > 150 and yellow[1] > 130 and yellow[2] < 120, yellow


@test
def test_detection_mistakes():
    """Impossible flags and files of detect_ava.py: named, with what is allowed, no traceback."""
    root = tiny_ava()
    base = [*DETECT, "--data", f"{root}/train.csv", "--val_data", f"{root}/val.csv", "--data_root", f"{root}/movies",
            "--out_dir", os.path.join(TMP, "ava_mistake"), "--num_workers", 0]
    pixels = ava_file("pixels.csv", "a,1,10,10,200,200,1,1\n")
    one_class = ava_file("one.pbtxt", 'item {\n name: "x"\n id: 77\n}')
    for args, words in ((["--data", pixels], ["pixels.csv row 1", "[0,1]"]), (["--data", "none.csv"], ["none.csv"]),
                        (["--data_root", HERE], [HERE]), (["--batch_size", 40], ["9 key frames", "40"]),
                        (["--label_map", one_class], ["no true box", "77 (x)"]),
                        (["--video", "x.mp4"], ["needs --ckpt"]), (["--epochs", "inf"], ["--epochs inf"]),
                        (["--label_map", f"{root}/train.csv"], ["no classes"]), (["--freeze", 5], ["--freeze 5"]),
                        (["--img_size", 20], ["img_size=20x20"]), (["--val_boxes", pixels], ["pixels.csv row 1"]),
                        (["--ckpt", "x.pt", "--init", "y.pt"], ["only one"]), (["--movie_start", 900], ["before its"])):
        text = mistake(detect_ava, *base, *args)
        assert all(w in text for w in words), text
    other = ava_file("other_movie.csv", "zz,1,0,0,1,1,1,0.5\n")
    assert "('zz', 1)" in mistake(detect_ava, "--score", other, "--val_data", f"{root}/val.csv")
    twice = mistake(detect_ava, "--score", pixels, "--val_data", f"{root}/val.csv", f"{root}/val.csv")
    assert "annotated in another file too" in twice, twice


@test
def test_toy_movies():
    """The toy AVA set is deterministic, in AVA's files, and boxes hold the figures; an odd folder is not touched."""
    movie, rows = ava_toy = ava.toy_movie(np.random.default_rng([0, 0]))
    assert movie.shape == (288, 64, 96, 3) and np.array_equal(movie, ava.toy_movie(np.random.default_rng([0, 0]))[0])
    still = np.median(movie.astype(int), 0)
    for second, (x1, y1, x2, y2), ids in ava_toy[1]:
        assert len([c for c in ids if c < 5]) == 1 and second % 3 and 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
        frame = np.abs(movie[second * 12] - still).max(-1) > 60
        if {2, 3} & set(ids):  # who walks differs from the background
            assert frame[round(y1 * 64):round(y2 * 64), round(x1 * 96):round(x2 * 96)].mean() > 0.15
    assert {c for _, _, ids in rows for c in ids} <= set(ava.TOY_NAMES)
    os.makedirs(os.path.join(TMP, "odd_toy"))
    with raises("odd_toy", "move it away"):
        ava.make_toy(os.path.join(TMP, "odd_toy"))


@test
def test_every_flag_is_read():
    """No script has a flag that nothing reads, a type=bool, or an unsafe torch.load."""
    for script in ("pretrain.py", "pretrain_vicmae.py", "pretrain_moco.py", "finetune.py", "eval.py", "detect_ava.py",
                   "data.py", "bench.py"):
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
