"""Speed and memory as ratios: each row against an alternative, measured in turn in the same run.

    python bench.py step --model base --batch_size 4  # a pre-training step, against transformers'
    python bench.py step --vary decoder_depth         # or num_frames, ...: how cost grows
    python bench.py finetune                          # a fine-tuning step, against transformers'
    python bench.py load my_videos/                   # reading a clip, against decord + PIL
    python bench.py prepare my_videos/                # the same from prepared sets, and their sizes
    python bench.py feed my_set/                      # training fed by a loader
    python bench.py eval my_videos/                   # a 5x3-view test, or a decode for each view
    python bench.py ddp                               # several ranks, against one process

What is compared with has to be installed (`pip install transformers`, `pip install decord pillow`);
without it a row has no ratio. Utilisation is the model's arithmetic (multiply-adds of the forward
pass, three times, no recomputation) over the rate of a large matmul on the same device. Figures are
medians. Times differ from machine to machine and from minute to minute: read the ratios, on a
machine that does nothing else.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import itertools
import math
import multiprocessing
import os
import resource
import socket
import sys
import tempfile
import time
import types

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
import masking
from lib.feed import Batches, make_loader, send
from lib.optim import param_groups
from lib.process import Help, Process, count, few, script_main
from lib.views import TestVideos, cut, view_indices
from model import IMAGENET_MEAN, IMAGENET_STD, SIZES, Attention, VideoClassifier, VideoMAE
from video import lists, prepared
from video.decode import VideoReader
from video.prepared import open_video

CLASSES = 400

# what a training step is measured on
ROW = dict(task="pretrain", model="base", batch_size=4, num_frames=16, img_size=224, mask_ratio=0.9,
           decoder_mask=0, decoder_depth=None, checkpointing=False, compile=False, plain=False,
           transformers=False)


# ---- arithmetic ----

def block_macs(n: int, dim: int, depth: int) -> int:
    """Multiply-adds of `depth` blocks on n tokens, as the paper counts.

    Each 12nD^2 + 2n^2D, and 5nD per LayerNorm.
    """
    return depth * (12 * n * dim ** 2 + 2 * n ** 2 * dim + 10 * n * dim)


def forward_macs(model: torch.nn.Module, num_visible=None, num_decoded=None) -> int:
    """Multiply-adds of one clip's forward pass (Table 6's "GFLOPs").

    Of a classifier, or of a VideoMAE with so many visible and decoded tokens.
    """
    s, N, P = SIZES[model.config["size"]], math.prod(model.grid), 3 * math.prod(model.cube)
    D, d = s["width"], model.config.get("dec_width")
    if isinstance(model, VideoClassifier):
        tokens = N + bool(model.config.get("class_token"))
        head = D * model.head.out_features + 5 * D
        return N * D * P + block_macs(tokens, D, s["depth"]) + head
    n, M = num_visible, num_decoded
    encoder = n * D * P + block_macs(n, D, s["depth"]) + 5 * n * D + n * D * d
    head = 5 * M * d + M * d * model.decoder.head.out_features
    return encoder + block_macs(n + M, d, len(model.decoder.blocks)) + head


# ---- training steps ----

def installed(*names: str) -> bool:
    """Whether all these packages can be imported."""
    try:
        return all(importlib.import_module(name) for name in names)
    except ImportError:
        return False


def plain_attention(self, x):
    """Attention.forward with its N x N matrix spelt out."""
    q, k, v = self.qkv_heads(x)
    attention = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)  # (B, heads, N, N)
    return self.proj((attention @ v).transpose(1, 2).reshape(x.shape))


def hf_model(row: dict):
    """transformers' model of the row's shape, sdpa attention, random weights."""
    from transformers import (VideoMAEConfig, VideoMAEForPreTraining,
                              VideoMAEForVideoClassification)
    s, finetune = SIZES[row["model"]], row["task"] == "finetune"
    config = VideoMAEConfig(
        hidden_size=s["width"], num_hidden_layers=s["depth"], num_attention_heads=s["heads"],
        intermediate_size=4 * s["width"], decoder_hidden_size=s["dec_width"],
        decoder_num_hidden_layers=row["decoder_depth"] or s["dec_depth"],
        decoder_num_attention_heads=s["dec_heads"],
        decoder_intermediate_size=4 * s["dec_width"], num_frames=row["num_frames"],
        image_size=row["img_size"], num_labels=CLASSES, use_mean_pooling=finetune,
        attn_implementation="sdpa")
    return (VideoMAEForVideoClassification if finetune else VideoMAEForPreTraining)(config)


def training_step(row: dict, device: torch.device, autocast=contextlib.nullcontext()):
    """-> (a function: one step, forward, backward, AdamW; flops of a step). row: see ROW.

    The function takes a batch (B, T, H, W, 3) uint8, or uses a random one that stays on the device,
    and gives the loss.
    """
    torch.manual_seed(0)
    B, T, side = row["batch_size"], row["num_frames"], row["img_size"]
    grid, finetune = (T // 2, side // 16, side // 16), row["task"] == "finetune"
    fixed = torch.randint(0, 256, (B, T, side, side, 3), dtype=torch.uint8).to(device)
    mask = masking.make_mask("tube", B, grid, row["mask_ratio"]).to(device)
    labels = torch.randint(0, CLASSES, (B,)).to(device)
    num_visible = int((~mask[0]).sum())
    shape = dict(size=row["model"], num_frames=T, img_size=side,
                 checkpointing=row["checkpointing"])
    if finetune:
        ours = VideoClassifier(CLASSES, **shape)
    else:
        ours = VideoMAE(dec_depth=row["decoder_depth"], **shape)
    decoder_mask, num_decoded = None, None
    if row["decoder_mask"]:
        decoder_mask = masking.make_mask("running_cell", B, grid, row["decoder_mask"]).to(device)
        num_decoded = int((~decoder_mask[0]).sum())
    macs = forward_macs(ours, num_visible, num_decoded or math.prod(grid) - num_visible)
    model = hf_model(row) if row["transformers"] else ours
    model.to(device)
    if row["plain"]:
        for m in model.modules():
            if isinstance(m, Attention):
                m.forward = types.MethodType(plain_attention, m)
    groups = model.parameters() if row["transformers"] else param_groups(model, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05,
                                  fused=True)
    net = torch.compile(model, dynamic=False) if row["compile"] else model
    if row["transformers"]:
        mean, std = (torch.tensor(x, device=device) for x in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = ((fixed / 255 - mean) / std).permute(0, 1, 4, 2, 3).contiguous()

    def forward(video):
        if row["transformers"]:
            given = dict(labels=labels) if finetune else dict(bool_masked_pos=mask)
            return net(pixels, **given).loss
        if finetune:
            return F.cross_entropy(net(video).float(), labels)
        return net(video, mask, decoder_mask, num_visible, num_decoded)[0]

    def step(video=fixed):
        with autocast:
            loss = forward(video)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for the device
    return step, 6 * B * macs


def peak_memory(row: dict, device: torch.device, autocast) -> float:
    """GB at most in use after three steps: of the device's memory, or of this process's."""
    step, _ = training_step(row, device, autocast)
    for _ in range(3):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if os.path.exists("/proc/self/status"):
        # of this process alone; ru_maxrss begins at what its parent had
        with open("/proc/self/status") as f:
            high = next(line for line in f if line.startswith("VmHWM"))
        return int(high.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def send_peak_memory(row: dict, args, queue):
    """peak_memory, for a process of its own."""
    run = Process(args)
    queue.put(peak_memory(row, run.device, run.autocast))


def in_processes(name: str, function, all_args: list):
    """function(*args, queue) in a process for each args -> what one of them puts into the queue."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    calls = [functools.partial(function, *args, queue) for args in all_args]
    processes = [context.Process(target=script_main, args=(call,)) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise ValueError(f"{name}: a process ended with status {process.exitcode}")
    return queue.get()


def interleaved(ways: dict, repeats: int, warmup: int = 2) -> dict:
    """{name: function} -> {name: median seconds}; all in turn, `warmup` rounds do not count."""
    times = {name: [] for name in ways}
    for _ in range(repeats + warmup):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(t[warmup:])) for name, t in times.items()}


def matmul_rate(run: Process) -> float:
    """Floating-point operations per second of a large matmul in the dtype that training uses."""
    n = 8192 if run.device.type == "cuda" else 2048
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[run.dtype]
    a, b = (torch.randn(n, n, device=run.device, dtype=dtype) for _ in range(2))

    def work():
        for _ in range(8):
            c = a @ b
        c[0, 0].item()
    return 8 * 2 * n ** 3 / interleaved(dict(matmul=work), 5)["matmul"]


def about(run: Process) -> str:
    """The conditions of a measurement."""
    name = f"CPU, {torch.get_num_threads()} threads"
    if run.device.type == "cuda":
        name = torch.cuda.get_device_name()
    dtype = run.dtype if run.dtype == "fp32" else f"{run.dtype} autocast"
    peer = "transformers is not installed: no ratio to it"
    if installed("transformers"):
        import transformers
        peer = f"transformers {transformers.__version__} (sdpa)"
    return f"{name}, {dtype}, torch {torch.__version__}, {peer}"


def compare(rows: dict, args, against: str):
    """Prints time, memory and utilisation of {name: row}, and the ratio to the row `against`."""
    run, memory = Process(args), {}
    model = next(iter(rows.values()))["model"]
    print(f"\n{about(run)}, ViT-{model}; memory first, then time", flush=True)
    for name, row in rows.items():
        if run.device.type == "cuda":  # one after the other, while nothing else is there
            torch.cuda.reset_peak_memory_stats()
            try:
                memory[name] = peak_memory(row, run.device, run.autocast)
            except torch.OutOfMemoryError:
                print(f"{name:30s} batch {row['batch_size']:3d} does not fit into the device's "
                      "memory")
            gc.collect()
            torch.cuda.empty_cache()
        else:
            memory[name] = in_processes(name, send_peak_memory, [(row, args)])
    steps = {name: training_step(rows[name], run.device, run.autocast) for name in memory}
    seconds = interleaved({name: step for name, (step, _) in steps.items()}, args.repeats)
    rate = matmul_rate(run)
    print(f"a large matmul: {rate / 1e12:.2f} TFLOP/s")
    for name, (_, flops) in steps.items():
        ratio = ""
        if against in seconds:
            ratio = f"{seconds[against] / seconds[name]:6.2f} x {against}"
        print(f"{name:30s} batch {rows[name]['batch_size']:3d} {seconds[name]:8.3f} s/step "
              f"{memory[name]:6.2f} GB {flops / seconds[name] / rate:5.0%} of the matmul rate "
              f"{ratio}", flush=True)


VARY = dict(decoder_depth=[1, 2, 4, 8], num_frames=[8, 16, 32], img_size=[112, 224, 320],
            mask_ratio=[0.5, 0.75, 0.9, 0.95])


def bench_step(args):
    """A pre-training step: our options against transformers', or one setting varied."""
    for model, what in itertools.product(args.model, args.vary):
        base = ROW | dict(model=model, batch_size=args.batch_size)
        if what != "options":
            usual = dict(decoder_depth=4).get(what, base[what])
            rows = {f"{what} {v}": base | {what: v} for v in VARY[what]}
            compare(rows, args, f"{what} {usual}")
            continue
        rows = {"ours": base, "decoder mask .5": base | dict(decoder_mask=0.5),
                "recomputed activations": base | dict(checkpointing=True),
                "plain attention": base | dict(plain=True)}
        compiled = ["ours"]
        if installed("transformers"):
            rows["transformers"] = base | dict(transformers=True)
            compiled.append("transformers")
        if args.compile:
            rows |= {f"{name}, compiled": rows[name] | dict(compile=True) for name in compiled}
        compare(rows, args, "transformers")


def bench_finetune(args):
    """A fine-tuning step on whole clips against transformers'."""
    for model in args.model:
        base = ROW | dict(task="finetune", model=model, batch_size=args.batch_size)
        rows = {"ours": base, "recomputed activations": base | dict(checkpointing=True)}
        if installed("transformers"):
            rows["transformers"] = base | dict(transformers=True)
        if args.compile:
            rows["ours, compiled"] = base | dict(compile=True)
        compare(rows, args, "transformers")


def ddp_rank(rank: int, world: int, port: int, row: dict, args, threads: int, queue):
    """One rank: times steps of the row with gradients exchanged; the first puts the median."""
    torch.set_num_threads(threads)
    if world > 1:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                           MASTER_ADDR="localhost", MASTER_PORT=str(port))
    run = Process(args)
    torch.manual_seed(0)
    model = VideoMAE(row["model"]).to(run.device)
    net = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(param_groups(model, 0.05), lr=1e-4, fused=True)
    size = (row["batch_size"], row["num_frames"], row["img_size"], row["img_size"], 3)
    video = torch.randint(0, 256, size, dtype=torch.uint8).to(run.device)
    mask = masking.make_mask("tube", len(video), model.grid, row["mask_ratio"]).to(run.device)
    num_visible = int((~mask[0]).sum())

    def step():
        with run.autocast:
            loss, _ = net(video, mask, None, num_visible)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    seconds = interleaved(dict(step=step), args.repeats)["step"]
    if rank == 0:
        queue.put(seconds)
    run.close()


def bench_ddp(args):
    """Clips per second of N ranks against one process: a GPU each, or the CPU's threads divided."""
    run, threads = Process(args), torch.get_num_threads()
    cuda = run.device.type == "cuda"
    world = torch.cuda.device_count() if cuda else min(2, threads)
    if world < 2:
        raise ValueError(f"ddp needs two GPUs or two CPU threads, here is {world}")
    # on a CPU the same work for the same cores
    alone = args.batch_size if cuda else args.batch_size * world
    ways, rate = {"one process": (1, alone), f"{world} ranks": (world, args.batch_size)}, {}
    for name, (ranks, batch) in ways.items():
        row = ROW | dict(model=args.model[0], batch_size=batch)
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]  # a free one
        each = 1 if cuda else threads // ranks
        seconds = in_processes(name, ddp_rank, [(rank, ranks, port, row, args, each)
                                                for rank in range(ranks)])
        rate[name] = ranks * batch / seconds
    print(f"\n{about(run)}, ViT-{args.model[0]}; one after the other")
    for name, (ranks, batch) in ways.items():
        print(f"{name:30s} x batch {batch:3d} {rate[name]:8.2f} clips/s "
              f"{rate[name] / rate['one process']:6.2f} x one")


# ---- data ----

def usual_clip(path: str, rng):
    """The usual pipeline, decord on one thread and PIL -> float (T, C, H, W) in [0,1]."""
    import decord
    from PIL import Image
    reader = decord.VideoReader(path, num_threads=1)
    frames = reader.get_batch(list(data.sample_dense(rng, len(reader), 16, 4))).asnumpy()
    y, x, h, w = data.multi_scale_crop(rng, *frames.shape[1:3])
    clip = []
    for frame in frames:
        image = Image.fromarray(frame).crop((x, y, x + w, y + h))
        image = np.array(image.resize((224, 224), Image.BILINEAR))
        clip.append(torch.from_numpy(image).permute(2, 0, 1).float() / 255)
    return torch.stack(clip)


def usual_way(paths: list) -> dict:
    """{"decord + PIL": a function (index, rng) -> clip}, or nothing where they are missing."""
    if not installed("decord", "PIL"):
        print("decord or pillow is not installed: no ratio to them")
        return {}
    import decord
    import PIL
    print(f"decord {decord.__version__}, PIL {PIL.__version__}")
    return {"decord + PIL": lambda i, rng: usual_clip(paths[i], rng)}


def cpu_times(ways: dict, indices: int, repeats: int, seen=None) -> dict:
    """{name: function (index, rng)} -> {name: mean CPU seconds} over so many indices.

    seen(clips) gets each round's {name: clip}.
    """
    times = {name: [] for name in ways}
    for repeat, i in itertools.product(range(repeats), range(indices)):
        clips = {}
        for name, way in ways.items():
            start = time.process_time()
            clips[name] = way(i, np.random.default_rng([repeat, i]))
            times[name].append(time.process_time() - start)
        if seen:
            seen(clips)
    return {name: float(np.mean(t)) for name, t in times.items()}


def print_times(times: dict):
    """A line per way, with the ratios to decord + PIL and to the files."""
    for name, t in times.items():
        ratios = [f"{times[other] / t:6.2f} x {other}" for other in ("decord + PIL", "ours")
                  if other in times]
        print(f"{name:24s} {1000 * t:7.1f} ms CPU/clip {1 / t:7.1f} clips/s/core "
              f"{' '.join(ratios)}")


def bench_load(args):
    """CPU time per clip of decoding, cropping and resizing a file, and where it goes."""
    torch.set_num_threads(1)
    paths, _ = lists.read_videos(args.source)
    ways = usual_way(paths) | {"ours": data.PretrainClips(paths, 16, (224, 224), 4).load}
    worst = [0.0]

    def seen(clips):
        if len(clips) == 2:
            ours = clips["ours"][0].permute(0, 3, 1, 2).float()
            worst.append((ours - 255 * clips["decord + PIL"]).abs().mean().item())
    print_times(cpu_times(ways, len(paths), args.repeats, seen))
    if len(ways) == 2:
        print(f"largest mean difference of two such clips: {max(worst):.3f} of 255")
    parts = dict.fromkeys(("open and index", "decode", "to RGB", "crop and resize"), 0.0)
    for i, path in enumerate(paths):
        for part, seconds in zip(parts, time_parts(path, np.random.default_rng([0, i]))):
            parts[part] += seconds
    print("ours, ms/clip: " + ", ".join(f"{part} {1000 * seconds / len(paths):.1f}"
                                        for part, seconds in parts.items()))
    tuning = {}
    for name, operations in (("with RandAugment", 4), ("without", 0)):
        clips = data.FinetuneClips(paths, [0] * len(paths), rand_aug=(operations, 7, 0.5))
        tuning[name] = clips.load
    times = cpu_times(tuning, len(paths), args.repeats)
    print("a fine-tuning clip, ms CPU: " + ", ".join(f"{name} {1000 * t:.1f}"
                                                     for name, t in times.items()))


def time_parts(path: str, rng) -> tuple:
    """Seconds of one clip: to open and index, to decode, to convert to RGB, to crop and resize."""
    marks, converting = [time.perf_counter()], []
    with open_video(path) as video:
        marks.append(time.perf_counter())
        if isinstance(video, VideoReader):
            convert = video.convert

            def timed(frame):
                start = time.perf_counter()
                rgb = convert(frame)
                converting.append(time.perf_counter() - start)
                return rgb
            video.convert = timed
        frames = video.pictures(data.sample_dense(rng, len(video), 16, 4))
        marks.append(time.perf_counter())
        data.crop_resize(frames, data.multi_scale_crop(rng, *frames[0].shape[:2]), 224, 224)
    marks.append(time.perf_counter())
    opening, reading, cropping = np.diff(marks).tolist()
    return opening, reading - sum(converting), sum(converting), cropping


def bench_prepare(args):
    """CPU time per clip from both forms of a prepared set, against files; size, correctness."""
    torch.set_num_threads(1)
    paths = lists.read_videos(args.source)[0][:args.videos]
    ways = usual_way(paths) | {"ours": data.PretrainClips(paths, 16, (224, 224), 4).load}
    with tempfile.TemporaryDirectory() as folder:
        for form in prepared.DECODED:
            out, start = os.path.join(folder, form), time.process_time()
            settings = dict(form=form, sampling_rate=4, short_side=args.short_side, quality=2,
                            shard_videos=16)
            prepared.prepare([(path, None) for path in paths], out, settings, 1, False,
                             say=lambda *a, **k: None)
            seconds = (time.process_time() - start) / len(paths)
            size = os.path.getsize(os.path.join(out, f"000000.{form}")) / min(16, len(paths))
            print(f"{form}: {prepared.gb(1000 * size)} per 1000 videos, "
                  f"{seconds:.2f} s CPU/video to prepare")
            ready = lists.read_videos(out)[0]
            ways[form] = data.PretrainClips(ready, 16, (224, 224), 4).load
        size = sum(map(os.path.getsize, paths)) / len(paths)
        print(f"the files: {prepared.gb(1000 * size)} per 1000 videos")
        print_times(cpu_times(ways, len(paths), args.repeats))
        for form in prepared.DECODED:
            kept = os.path.join(folder, form)
            error = np.mean([kept_error(path, kept, args.short_side) for path in paths])
            quality = f"PSNR {10 * math.log10(255 ** 2 / error):.1f} dB" if error else "equal"
            print(f"{form}: kept frames against the files' own, as large: {quality}")


def kept_error(path: str, folder: str, short_side: int) -> float:
    """Mean squared difference of a prepared video's kept frames to those of its file, as large."""
    with (open_video(path, prepared.reduce_to(short_side)) as video,
          open_video(f"{folder}::{path}") as ready):
        wanted = range(0, min(len(video), 256), 4)
        return np.square(ready.frames(wanted) - video.frames(wanted).astype(float)).mean()


def bench_feed(args):
    """Training steps fed by a loader against steps on a batch at hand, in turn.

    The loader's lead is used up before the clock starts.
    """
    run = Process(args)
    paths, _ = lists.read_videos(args.source)
    row = ROW | dict(model=args.model[0], batch_size=args.batch_size, compile=args.compile)
    step, _ = training_step(row, run.device, run.autocast)
    clips, lead = data.PretrainClips(paths, 16, (224, 224), 4), 2 * args.num_workers + 2
    batches, rates = lead + args.steps, {"a batch at hand": [], "fed": []}
    for repeat in range(args.repeats):
        order = Batches(len(paths), args.batch_size, 1, 0, 1, repeat * batches,
                        (repeat + 1) * batches, 0)
        for n, (video, bad) in enumerate(make_loader(clips, order, args.num_workers, run.device)):
            if video is None:
                raise ValueError(bad[-1][1])
            if n == lead:
                start = time.perf_counter()
            step(send(video, run.device))
        rates["fed"].append(args.steps * args.batch_size / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(args.steps):
            step()
        rates["a batch at hand"].append(args.steps * args.batch_size
                                        / (time.perf_counter() - start))
    print(f"{about(run)}, ViT-{row['model']}, batch {args.batch_size}, {args.num_workers} workers")
    at_hand = np.median(rates["a batch at hand"])
    for name, rate in rates.items():
        print(f"{name:24s} {np.median(rate):8.2f} clips/s {np.median(rate) / at_hand:6.1%}")


def bench_eval(args):
    """Prints wall time of testing with 5 clips x 3 crops, one decode per video or one per view.

    For each view, one way decodes the frames of its own clip, the other every 4th frame of the
    whole video, as the paper's code does. The views are checked to be the same pixels, the model is
    the same.
    """
    run = Process(args)
    torch.set_num_threads(1)
    paths, _ = lists.read_videos(args.source)
    torch.manual_seed(0)
    size = (args.img_size, args.img_size)
    model = VideoClassifier(400, size=args.model, img_size=args.img_size).to(run.device).eval()
    videos = TestVideos(paths, 16, size, num_segments=5)

    def once(i):
        _, frames, index, why = videos[i]
        if why:
            raise ValueError(why)
        return cut(frames, index, size, 3)

    def per_view(i, whole):
        views = []
        for k in range(15):
            with open_video(paths[i], videos.fit) as video:
                index = view_indices(len(video), 16, 4, "dense", 5)[k // 3]
                if whole:
                    every = np.arange(0, len(video), 4)
                    frames = video.frames(every)[np.searchsorted(every, index)]
                else:
                    frames = video.frames(index)
            crops = cut(torch.from_numpy(frames), torch.arange(16)[None], size, 3)
            views.append(crops[k % 3])
        return torch.stack(views)

    @torch.no_grad()
    def forward(views):
        with run.autocast:
            return model(views.to(run.device)).float().softmax(-1).mean(0).argmax().item()
    ways = {"ours, one decode per video": once, "per view, its clip": lambda i: per_view(i, False),
            "per view, the video": lambda i: per_view(i, True)}
    load, total = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0.0)
    for i in range(len(paths)):
        made = []
        for name, way in ways.items():
            start = time.perf_counter()
            made.append(way(i))
            load[name] += time.perf_counter() - start
            forward(made[-1])
            total[name] += time.perf_counter() - start
        assert all(torch.equal(made[0], views) for views in made[1:])
    print(f"{len(paths)} videos x 5 clips x 3 crops, 16x{args.img_size}x{args.img_size}, "
          f"ViT-{args.model} on {run.device.type}, one thread; all three give the same pixels")
    ours = next(iter(ways))
    for name in ways:
        print(f"{name:28s} loading {load[name] / len(paths):6.3f} s/video   with the model "
              f"{total[name] / len(paths):6.3f}   ours is {load[name] / load[ours]:5.1f} x, "
              f"{total[name] / total[ours]:5.1f} x as fast")


# ---- the command line ----

BENCHES = {"step": (bench_step, "a pre-training step"),
           "finetune": (bench_finetune, "a fine-tuning step"),
           "load": (bench_load, "reading a clip"),
           "prepare": (bench_prepare, "reading a clip from a prepared set"),
           "feed": (bench_feed, "training fed by a loader"),
           "eval": (bench_eval, "multi-view testing"),
           "ddp": (bench_ddp, "several ranks")}


def get_args(argv=None) -> argparse.Namespace:
    """The flags; an impossible one ends the program and is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    # what Process asks for and no flag says
    parser.set_defaults(device=None, dtype=None, num_workers=0, frame_rate=25.0)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in BENCHES.items():
        p = commands.add_parser(name, help=text, formatter_class=Help)
        if name in ("load", "prepare", "feed", "eval"):
            p.add_argument("source", help="a list file, a folder of videos or a prepared set")
        if name in ("step", "finetune", "feed", "ddp"):
            p.add_argument("--model", default=["base"], nargs="+", choices=list(SIZES))
            p.add_argument("--batch_size", default=4, type=count, help="clips, per process")
        if name not in ("load", "prepare"):
            p.add_argument("--device", help="cuda, cpu or mps (default: the first there is)")
        if name in ("step", "finetune", "feed"):
            p.add_argument("--compile", action="store_true", help="torch.compile too")
        if name == "step":
            p.add_argument("--vary", default=["options"], nargs="+", choices=["options", *VARY],
                           help="what the rows differ in")
        if name == "prepare":
            p.add_argument("--videos", default=8, type=count,
                           help="how many of them, prepared in a temporary folder")
            p.add_argument("--short_side", default=256, type=count, help="pixels")
        if name == "feed":
            p.add_argument("--num_workers", default=min(10, os.cpu_count()), type=few,
                           help="decoding processes")
            p.add_argument("--steps", default=20, type=few, help="per round")
        if name == "eval":
            p.add_argument("--model", default="tiny", choices=list(SIZES))
            p.add_argument("--img_size", default=224, type=count, help="pixels")
        else:
            p.add_argument("--repeats", default=3 if name == "feed" else 7, type=few,
                           help="measured rounds")
    return parser.parse_args(argv)


def main():
    args = get_args()
    BENCHES[args.command][0](args)


if __name__ == "__main__":
    script_main(main)
