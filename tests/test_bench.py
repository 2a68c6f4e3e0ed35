"""bench.py: counted multiply-adds and what is compared."""

import functools
import re
import unittest.mock

import torch
import torch.nn.functional as F

import bench
from bench import forward_macs
from lib.cubes import split
from lib.memory import peak_of_step
from lib.process import Process
from model import VideoClassifier, VideoMAE
from tests.common import as_script, call, clips, mask_for, small, test

GPU = """gpu --device cpu --model tiny --img_size 32 --repeats 1 --steps 1 --num_workers 1
    --batch_size 1""".split()


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
def test_steps_of_bench():
    """Flops are 3 x 2 x a forward pass's matmuls, a test's 2 x; steps train, also in fp16."""
    row = bench.ROW | dict(model="tiny", batch_size=2, num_frames=4, img_size=32, mask_ratio=0.5)
    classifier = VideoClassifier(400, size="tiny", num_frames=4, img_size=32)
    for dtype in ("fp32", "fp16"):
        args = bench.get_args(GPU)
        args.dtype = dtype
        run = Process(args)
        for task, plain in (("pretrain", VideoMAE("tiny", 4, 32)), ("finetune", classifier)):
            step, flops = bench.make_step(row | dict(task=task), run)
            macs = forward_macs(plain, 4, 4) if task == "pretrain" else forward_macs(plain)
            assert flops == 6 * 2 * macs
            losses = [step() for _ in range(9)]  # the scaler of fp16 leaves out the first ones
            assert losses[0] > losses[-1] > 0, (dtype, task, losses)
        test_views, flops = bench.make_step(row | dict(task="test"), run)
        assert flops == 2 * 2 * macs and torch.equal(test_views(), test_views())


@test
def test_medians_of_rounds():
    """Ways take turns, the warm-up does not count, a ratio is the median of the rounds' ratios."""
    now, order = [0.0], []
    seconds = dict(a=iter([50, 50, 1, 2, 9]), b=iter([70, 70, 2, 8, 9]))

    def way(name):
        order.append(name)
        now[0] += next(seconds[name])
    ways = {name: functools.partial(way, name) for name in "ab"}
    with unittest.mock.patch.object(bench.time, "perf_counter", lambda: now[0]):
        times = bench.interleaved(ways, 3, torch.device("cpu"))
    assert "".join(order) == "ab" * 5 and times == dict(a=[1, 2, 9], b=[2, 8, 9])
    assert bench.median_ratio(times["b"], times["a"]) == 2  # of 2, 4, 1; of the medians it is 4


@test
def test_a_table_of_a_gpu():
    """bench.py gpu: rows at the best batch that fits; what does not fit, or fails, is said."""
    def short(row, run):
        if row["batch_size"] > 2 or row["decoder_mask"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make_step(row, run)

    def fails(paths, folder, form, side):
        if form == "raw":
            raise ValueError("no room")
        return prepare(paths, folder, form, side)
    make_step, prepare, compiled = bench.make_step, bench.prepare, []
    as_it_is = lambda model, **flags: compiled.append(flags) or model
    with (unittest.mock.patch.object(torch, "compile", as_it_is),
          unittest.mock.patch.multiple(bench, make_step=short, prepare=fails),
          as_script(bench, *GPU) as out):
        assert bench.main() == 1
    text = out.getvalue()
    row = r" +[12] +[\d.]+ +[\d.]+ +[\d.]+ +- +\d+% "
    for name, ratio in (("pretrain, eager", ""), ("pretrain, compiled", r"[\d.]+ x eager"),
                        ("test, eager", ""), ("finetune, compiled", r"[\d.]+ x eager")):
        assert re.search(f"^tiny {name}{row}{ratio}$", text, re.M), (name, text)
    assert compiled == 3 * [dict(fullgraph=True, dynamic=False)], compiled  # as in training
    for beside in (" beside eager", ""):
        assert re.search(rf"mask .5 +[12] does not fit into the memory{beside}$", text, re.M), text
    assert re.search(r"compiled, fed compact .* x a batch at hand, 1 workers$", text, re.M), text
    assert text.endswith("left out: tiny compiled, fed raw: ValueError: no room\n"), text


@test
def test_no_time_for_a_gpu():
    """bench.py gpu stops what takes longer than --minutes and says all that is left out."""
    slow = lambda row, run: (functools.partial(bench.time.sleep, 60), 1)
    with unittest.mock.patch.object(bench, "make_step", slow):
        text = call(bench, *GPU, "--minutes", 0.05)
    assert text.count("no time was left") == 3 and "left out: tiny test" in text, text


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
