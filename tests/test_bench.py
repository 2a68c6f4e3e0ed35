"""bench.py: counted multiply-adds and what is compared."""

import types

import torch
import torch.nn.functional as F

import bench
from bench import forward_macs
from lib.cubes import split
from lib.memory import peak_of_step
from model import VideoClassifier, VideoMAE
from tests.common import clips, mask_for, small, test


@test
def test_published_gflops():
    """GFLOPs of all sizes, and of longer and larger clips, are the published ones."""
    published = [("small", 16, 224, 57), ("base", 16, 224, 180), ("large", 16, 224, 597),
                 ("huge", 16, 224, 1192), ("large", 32, 224, 1436), ("large", 32, 320, 3958),
                 ("huge", 32, 320, 7397), ("giant", 16, 224, round(38160 / 15)),
                 ("giant", 64, 266, round(160300 / 6, -1))]  # v2's are of 15 and of 6 views
    for size, frames, side, gflops in published:
        with torch.device("meta"):
            model = VideoClassifier(400, size=size, num_frames=frames, img_size=side)
        digits = -1 if frames == 64 else 0  # TFLOPs of six views, to two digits
        assert round(forward_macs(model) / 1e9, digits) == gflops, (size, forward_macs(model))


@test
def test_macs_of_pretraining_are_those_of_its_matmuls():
    """forward_macs of a VideoMAE counts its Linears, attentions and LayerNorms."""
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
    hooks = dict(Attention=attention, LayerNorm=norm, CubeEmbed=embed, Linear=linear)
    for m in model.modules():
        if hook := hooks.get(type(m).__name__):
            m.register_forward_hook(hook)
    model(clips(model), mask)
    visible, hidden = split(mask)
    assert forward_macs(model, visible.shape[1], hidden.shape[1]) == sum(macs)


@test
def test_bench_compares_like_with_like():
    """Spelt-out attention computes the same; flops are 3 x 2 x a forward pass's matmuls."""
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
        macs = forward_macs(plain, 4, 4) if task == "pretrain" else forward_macs(plain)
        assert flops == 6 * 2 * macs
        assert step() > step() > 0


@test
def test_reckoned_memory():
    """Reckoned is what a real step keeps: weights, states, what autograd saves; nothing N x N."""
    shape, kept = dict(num_frames=8, img_size=64, patch_size=8), {}
    model = VideoClassifier(400, size="tiny", drop_path=0.1, **shape)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # and so alive
        return x
    video = torch.rand(8, 8, 64, 64, 3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = F.cross_entropy(model(video), torch.rand(8, 400))
    saved = sum(x.nbytes() for place, x in kept.items() if place not in own) + video.nbytes
    weights = 4 * sum(p.numel() for p in model.parameters())
    reckon = lambda **kw: peak_of_step("finetune", "tiny", 8, **shape | kw)
    fp32, bf16 = reckon(autocast=False), reckon()
    assert 1 < fp32 / (3 * weights + saved) < 1.15, (fp32, weights, saved)
    assert bf16 < 0.75 * fp32 and loss > 0
    assert 4 * weights < reckon(checkpointing=True) < 0.6 * bf16
    assert reckon(num_frames=16) < 2 * bf16
