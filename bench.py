"""Speed and memory as ratios: each row against an alternative measured in the same run, interleaved, median of several.

    python bench.py step --model base --batch_size 4          # a pre-training step, against transformers' VideoMAE
    python bench.py step --vary decoder_depth                 # or num_frames, img_size, mask_ratio: how cost grows
    python bench.py finetune                                  # a fine-tuning step, against transformers'
    python bench.py load my_videos/                           # a clip read and cropped, against decord + PIL
    python bench.py prepare my_videos/                        # the same from prepared sets, and their sizes
    python bench.py feed my_set/                              # training fed by a loader, against a batch at hand
    python bench.py eval my_videos/                           # a 5x3-view test, against decoding for each view
    python bench.py ddp                                       # several ranks, against one process

What is compared with has to be installed (`pip install transformers`, `pip install decord pillow`); without it a row
has no ratio. Utilisation is the model's arithmetic (multiply-adds of the forward pass, three times, no recomputation)
over the rate of a large matmul on the same device. Times differ from machine to machine and from minute to minute: read
the ratios, on a machine that does nothing else.
"""

import argparse
import gc
import itertools
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import types

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import masking
import prepared
from eval import TestVideos, cut, view_indices
from model import (IMAGENET_MEAN, IMAGENET_STD, SIZES, Attention, VideoClassifier, VideoMAE, best_dtype, forward_macs,
                   param_groups)

CLASSES = 400


# ---- training steps ----

def plain_attention(self, x):
    """Attention.forward with its N x N matrix spelt out."""
    B, N, D = x.shape
    bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
    q, k, v = F.linear(x, self.qkv.weight, bias).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
    attention = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)  # (B, heads, N, N)
    return self.proj((attention @ v).transpose(1, 2).reshape(B, N, D))


def hf_model(row: dict):
    """transformers' model of the row's shape, sdpa attention, random weights."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification
    s, finetune = SIZES[row["model"]], row["task"] == "finetune"
    config = VideoMAEConfig(hidden_size=s["width"], num_hidden_layers=s["depth"], num_attention_heads=s["heads"],
                            intermediate_size=4 * s["width"], decoder_hidden_size=s["dec_width"],
                            decoder_num_hidden_layers=row["decoder_depth"] or s["dec_depth"],
                            decoder_num_attention_heads=s["dec_heads"], decoder_intermediate_size=4 * s["dec_width"],
                            num_frames=row["num_frames"], image_size=row["img_size"], num_labels=CLASSES,
                            use_mean_pooling=finetune, attn_implementation="sdpa")
    return (VideoMAEForVideoClassification if finetune else VideoMAEForPreTraining)(config)


def training_step(row: dict, device: torch.device, video=None):
    """-> (a function: one step, forward, backward, AdamW; flops of a step). row: see ROW; video: (B, T, H, W, 3) uint8.

    The function takes another batch, or uses a random one that stays on the device.
    """
    torch.manual_seed(0)
    B, T, side = row["batch_size"], row["num_frames"], row["img_size"]
    grid, finetune = (T // 2, side // 16, side // 16), row["task"] == "finetune"
    fixed = torch.randint(0, 256, (B, T, side, side, 3), dtype=torch.uint8).to(device)
    mask = masking.make_mask("tube", B, grid, row["mask_ratio"]).to(device)
    visible, labels = int((~mask[0]).sum()), torch.randint(0, CLASSES, (B,)).to(device)
    shape = dict(size=row["model"], num_frames=T, img_size=side, checkpointing=row["checkpointing"])
    ours = VideoClassifier(CLASSES, **shape) if finetune else VideoMAE(dec_depth=row["decoder_depth"], **shape)
    extra = (None, visible, None)
    if row["decoder_mask"]:
        decoder_mask = masking.make_mask("running_cell", B, grid, row["decoder_mask"]).to(device)
        extra = (decoder_mask, visible, int((~decoder_mask[0]).sum()))
    decoded = extra[2] or math.prod(grid) - visible
    flops = 6 * B * (forward_macs(ours) if finetune else forward_macs(ours, visible, decoded))
    model = hf_model(row) if row["transformers"] else ours
    model.to(device)
    if row["plain"]:
        for m in model.modules():
            if isinstance(m, Attention):
                m.forward = types.MethodType(plain_attention, m)
    groups = model.parameters() if row["transformers"] else param_groups(model, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    run = torch.compile(model, dynamic=False) if row["compile"] else model
    mean, std = (torch.tensor(x, device=device) for x in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = ((fixed / 255 - mean) / std).permute(0, 1, 4, 2, 3).contiguous() if row["transformers"] else None

    def forward(video):
        if row["transformers"]:
            return (run(pixels, labels=labels) if finetune else run(pixels, bool_masked_pos=mask)).loss
        return F.cross_entropy(run(video).float(), labels) if finetune else run(video, mask, *extra)[0]

    def step(video=fixed):
        with torch.autocast(device.type, torch.bfloat16, enabled=best_dtype(device) == "bf16"):
            loss = forward(video)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for the device
    return step, flops


ROW = dict(task="pretrain", model="base", batch_size=4, num_frames=16, img_size=224, mask_ratio=0.9, decoder_mask=0,
           decoder_depth=None, checkpointing=False, compile=False, plain=False, transformers=False)


def peak_memory(row: dict, device: torch.device) -> float:
    """GB at most in use after three steps of this process: of the device's memory, or of this process's."""
    step, _ = training_step(row, device)
    for _ in range(3):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if os.path.exists("/proc/self/status"):  # of this process alone; ru_maxrss begins at what its parent had
        return int(next(row for row in open("/proc/self/status") if row.startswith("VmHWM")).split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def send_peak_memory(row: dict, device: torch.device, queue):
    """peak_memory, for a process of its own."""
    queue.put(peak_memory(row, device))


def interleaved(ways: dict, repeats: int, warmup: int = 2) -> dict:
    """{name: function} -> {name: median seconds}; all in turn, the first `warmup` rounds do not count."""
    times = {name: [] for name in ways}
    for _ in range(repeats + warmup):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(t[warmup:])) for name, t in times.items()}


def matmul_rate(device: torch.device) -> float:
    """Floating-point operations per second of a large matmul in the dtype that training uses."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[best_dtype(device)]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def work():
        for _ in range(8):
            c = a @ b
        c[0, 0].item()
    return 8 * 2 * n ** 3 / interleaved(dict(matmul=work), 5)["matmul"]


def about(args, device: torch.device) -> str:
    """The conditions of a measurement."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = [f"torch {torch.__version__}"]
    try:
        import transformers
        versions.append(f"transformers {transformers.__version__} (sdpa)")
    except ImportError:
        versions.append("transformers is not installed: no ratio to it")
    dtype = best_dtype(device)
    return f"{name}, {dtype if dtype == 'fp32' else dtype + ' autocast'}, {', '.join(versions)}"


def compare(rows: dict, args, against: str):
    """Prints time, peak memory and utilisation of {name: row}, and the ratio to the row `against`, if it is there."""
    device = torch.device(args.device)
    print(f"\n{about(args, device)}, ViT-{next(iter(rows.values()))['model']}; memory first, then time", flush=True)
    context, memory = multiprocessing.get_context("spawn"), {}
    for name, row in rows.items():
        if device.type == "cuda":  # one after the other, while nothing else is there
            torch.cuda.reset_peak_memory_stats()
            try:
                memory[name] = peak_memory(row, device)
            except torch.OutOfMemoryError:
                print(f"{name:30s} batch {row['batch_size']:3d} does not fit into the device's memory")
            gc.collect()
            torch.cuda.empty_cache()
        else:
            queue = context.Queue()
            process = context.Process(target=send_peak_memory, args=(row, device, queue))
            process.start()
            process.join()
            if process.exitcode:
                raise ValueError(f"{name}: its process ended with status {process.exitcode}")
            memory[name] = queue.get()
    steps = {name: training_step(row, device) for name, row in rows.items() if name in memory}
    seconds = interleaved({name: step for name, (step, _) in steps.items()}, args.repeats)
    rate = matmul_rate(device)
    print(f"a large matmul: {rate / 1e12:.2f} TFLOP/s")
    for name, (_, flops) in steps.items():
        ratio = f"{seconds[against] / seconds[name]:6.2f} x {against}" if against in seconds else ""
        print(f"{name:30s} batch {rows[name]['batch_size']:3d} {seconds[name]:8.3f} s/step {memory[name]:6.2f} GB "
              f"{flops / seconds[name] / rate:5.0%} of the matmul rate {ratio}", flush=True)


def bench_step(args):
    """A pre-training step: our options against transformers', or one setting varied against the paper's."""
    try:
        import transformers  # noqa: F401
        peers = ["transformers"]
    except ImportError:
        peers = []
    for model, what in itertools.product(args.model, args.vary):
        base = ROW | dict(model=model, batch_size=args.batch_size)
        if what == "options":
            rows = {"ours": base, "decoder mask .5": base | dict(decoder_mask=0.5),
                    "recomputed activations": base | dict(checkpointing=True),
                    "plain attention": base | dict(plain=True)}
            rows |= {peer: base | dict(transformers=True) for peer in peers}
            if args.compile:
                rows |= {f"{name}, compiled": rows[name] | dict(compile=True) for name in ["ours"] + peers}
            compare(rows, args, "transformers")
        else:
            values = dict(decoder_depth=[1, 2, 4, 8], num_frames=[8, 16, 32], img_size=[112, 224, 320],
                          mask_ratio=[0.5, 0.75, 0.9, 0.95])[what]
            usual = dict(decoder_depth=4).get(what, base[what])
            compare({f"{what} {v}": base | {what: v} for v in values}, args, f"{what} {usual}")


def bench_finetune(args):
    """A fine-tuning step on whole clips against transformers'."""
    for model in args.model:
        base = ROW | dict(task="finetune", model=model, batch_size=args.batch_size)
        rows = {"ours": base, "recomputed activations": base | dict(checkpointing=True)}
        try:
            import transformers  # noqa: F401
            rows["transformers"] = base | dict(transformers=True)
        except ImportError:
            pass
        if args.compile:
            rows["ours, compiled"] = base | dict(compile=True)
        compare(rows, args, "transformers")


def ddp_rank(rank: int, world: int, row: dict, device: str, file: str, repeats: int, threads: int, queue):
    """One rank: times steps of the row with gradients exchanged, and puts the median into the queue."""
    device = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(threads)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", f"file://{file}", rank=rank,
                                world_size=world)
    torch.manual_seed(0)
    model = VideoMAE(row["model"]).to(device)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(param_groups(model, 0.05), lr=1e-4, fused=True)
    video = torch.randint(0, 256, (row["batch_size"], 16, 224, 224, 3), dtype=torch.uint8).to(device)
    mask = masking.make_mask("tube", row["batch_size"], model.grid, 0.9).to(device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=best_dtype(device) == "bf16"):
            loss, _ = wrapped(video, mask, None, 160)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    seconds = interleaved(dict(step=step), repeats)["step"]
    if rank == 0:
        queue.put(seconds)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def bench_ddp(args):
    """Clips per second of N ranks against one process: one GPU each, or the CPU's threads divided among them."""
    cuda = args.device == "cuda"
    cores = torch.get_num_threads()
    world = torch.cuda.device_count() if cuda else min(2, cores)
    if world < 2:
        raise ValueError(f"ddp needs two GPUs or two CPU threads, here is {world}")
    context, rate = multiprocessing.get_context("spawn"), {}
    alone = args.batch_size if cuda else args.batch_size * world  # on a CPU the same work for the same cores
    runs = {"one process": (1, alone), f"{world} ranks": (world, args.batch_size)}
    for name, (ranks, batch) in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            queue, row = context.Queue(), ROW | dict(model=args.model[0], batch_size=batch)
            processes = [context.Process(target=ddp_rank, args=(
                r, ranks, row, args.device, os.path.join(folder, "store"), args.repeats, 1 if cuda else cores // ranks,
                queue)) for r in range(ranks)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
                if process.exitcode:
                    raise ValueError(f"{name}: a process ended with status {process.exitcode}")
            rate[name] = ranks * batch / queue.get()
    print(f"\n{about(args, torch.device(args.device))}, ViT-{args.model[0]}; one after the other")
    for name, (ranks, batch) in runs.items():
        print(f"{name:30s} x batch {batch:3d} {rate[name]:8.2f} clips/s {rate[name] / rate['one process']:6.2f} x one")


# ---- data ----

def usual_clip(path: str, rng):
    """The usual pipeline: decord on one thread, get_batch, PIL crop and resize, to float (T, C, H, W) in [0,1]."""
    import decord
    from PIL import Image
    reader = decord.VideoReader(path, num_threads=1)
    frames = reader.get_batch(list(data.sample_dense(rng, len(reader), 16, 4))).asnumpy()
    y, x, h, w = data.multi_scale_crop(rng, *frames.shape[1:3])
    images = [Image.fromarray(f).crop((x, y, x + w, y + h)).resize((224, 224), Image.BILINEAR) for f in frames]
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 255 for i in images])


def usual_way(paths: list) -> dict:
    """{"decord + PIL": a function (index, rng) -> clip}, or nothing where they are not installed."""
    try:
        import decord
        import PIL
    except ImportError:
        print("decord or pillow is not installed: no ratio to them")
        return {}
    print(f"decord {decord.__version__}, PIL {PIL.__version__}")
    return {"decord + PIL": lambda i, rng: usual_clip(paths[i], rng)}


def cpu_times(ways: dict, count: int, repeats: int, seen=None) -> dict:
    """{name: function (index, rng)} -> {name: mean CPU seconds} over `count` indices; seen(clips) gets each round's."""
    times = {name: [] for name in ways}
    for repeat in range(repeats):
        for i in range(count):
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
        ratios = [f"{times[other] / t:6.2f} x {other}" for other in ("decord + PIL", "ours") if other in times]
        print(f"{name:24s} {1000 * t:7.1f} ms CPU/clip {1 / t:7.1f} clips/s/core {' '.join(ratios)}")


def bench_load(args):
    """CPU time per clip of decoding, cropping and resizing a file, the ratio to decord + PIL, and where it goes."""
    torch.set_num_threads(1)
    paths, _ = data.read_videos(args.source)
    ways = usual_way(paths) | {"ours": data.PretrainClips(paths, 16, (224, 224), 4).load}
    worst = [0.0]

    def seen(clips):
        if len(clips) == 2:
            ours, theirs = clips["ours"][0].permute(0, 3, 1, 2).float(), 255 * clips["decord + PIL"]
            worst.append((ours - theirs).abs().mean().item())
    print_times(cpu_times(ways, len(paths), args.repeats, seen))
    if len(ways) == 2:
        print(f"largest mean difference of two such clips: {max(worst):.3f} of 255")
    parts = dict.fromkeys(("open and index", "decode", "to RGB", "crop and resize"), 0.0)
    for i, path in enumerate(paths):
        rng, marks = np.random.default_rng([0, i]), [time.perf_counter()]
        with data.open_video(path) as video:
            marks.append(time.perf_counter())
            spent = []
            if isinstance(video, data.VideoReader):
                convert = video.convert

                def timed(frame):
                    start = time.perf_counter()
                    rgb = convert(frame)
                    spent.append(time.perf_counter() - start)
                    return rgb
                video.convert = timed
            frames = video.pictures(data.sample_dense(rng, len(video), 16, 4))
            marks.append(time.perf_counter())
            data.crop_resize(frames, data.multi_scale_crop(rng, *frames[0].shape[:2]), 224, 224)
        marks.append(time.perf_counter())
        seconds = [marks[1] - marks[0], marks[2] - marks[1] - sum(spent), sum(spent), marks[3] - marks[2]]
        for part, s in zip(parts, seconds):
            parts[part] += s
    print("ours, ms/clip: " + ", ".join(f"{part} {1000 * s / len(paths):.1f}" for part, s in parts.items()))
    tuning = {name: data.FinetuneClips(paths, [0] * len(paths), rand_aug=(n, 7, 0.5)).load
              for name, n in (("with RandAugment", 4), ("without", 0))}
    times = cpu_times(tuning, len(paths), args.repeats)
    print("a fine-tuning clip, ms CPU: " + ", ".join(f"{name} {1000 * t:.1f}" for name, t in times.items()))


def bench_prepare(args):
    """CPU time per clip from both forms of a prepared set, against files and decord + PIL; size, time, correctness."""
    torch.set_num_threads(1)
    paths = data.read_videos(args.source)[0][:args.videos]
    settings = dict(sampling_rate=4, short_side=args.short_side, quality=2, shard_videos=16)
    ways = usual_way(paths) | {"ours": data.PretrainClips(paths, 16, (224, 224), 4).load}
    with tempfile.TemporaryDirectory() as folder:
        for form in prepared.FORMS:
            out, start = os.path.join(folder, form), time.process_time()
            rows, quiet = [(p, None) for p in paths], lambda *a, **k: None
            prepared.prepare(rows, out, settings | dict(form=form), 1, False, quiet)
            seconds = (time.process_time() - start) / len(paths)
            size = os.path.getsize(os.path.join(out, f"000000.{form}")) / min(16, len(paths))
            print(f"{form}: {prepared.gb(1000 * size)} per 1000 videos, {seconds:.2f} s CPU/video to prepare")
            ways[form] = data.PretrainClips(data.read_videos(out)[0], 16, (224, 224), 4).load
        print(f"the files: {prepared.gb(1000 * sum(map(os.path.getsize, paths)) / len(paths))} per 1000 videos")
        print_times(cpu_times(ways, len(paths), args.repeats))
        for form in prepared.FORMS:
            error = []
            for path in paths:
                with data.open_video(path, prepared.reduce_to(args.short_side)) as video, \
                        data.open_video(f"{os.path.join(folder, form)}::{path}") as ready:
                    wanted = range(0, min(len(video), 256), 4)
                    error.append(np.square(ready.frames(wanted) - video.frames(wanted).astype(float)).mean())
            print(f"{form}: kept frames against the files' own, as large: "
                  + (f"PSNR {10 * math.log10(255 ** 2 / np.mean(error)):.1f} dB" if any(error) else "equal"))


def bench_feed(args):
    """Training steps fed by a loader against steps on a batch at hand, in turn; the loader's lead is used up first."""
    device = torch.device(args.device)
    paths, _ = data.read_videos(args.source)
    row = ROW | dict(model=args.model[0], batch_size=args.batch_size, compile=args.compile)
    step, _ = training_step(row, device)
    clips, lead = data.PretrainClips(paths, 16, (224, 224), 4), 2 * args.num_workers + 2
    rates = {"a batch at hand": [], "fed": []}
    for repeat in range(args.repeats):
        count = lead + args.steps
        batches = data.Batches(len(paths), args.batch_size, 1, 0, 1, repeat * count, (repeat + 1) * count, 0)
        loader = torch.utils.data.DataLoader(
            clips, batch_sampler=batches,
            num_workers=args.num_workers, collate_fn=data.collate, worker_init_fn=data.ignore_signals,
            pin_memory=device.type == "cuda", prefetch_factor=2)
        for n, (video, bad) in enumerate(loader):
            if video is None:
                raise ValueError(bad[-1][1])
            if n == lead:
                start = time.perf_counter()
            step(data.send(video, device))
        rates["fed"].append(args.steps * args.batch_size / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(args.steps):
            step()
        rates["a batch at hand"].append(args.steps * args.batch_size / (time.perf_counter() - start))
    print(f"{about(args, device)}, ViT-{row['model']}, batch {args.batch_size}, {args.num_workers} workers")
    for name, r in rates.items():
        print(f"{name:24s} {np.median(r):8.2f} clips/s {np.median(r) / np.median(rates['a batch at hand']):6.1%}")


def bench_eval(args):
    """Prints wall time of testing with 5 clips x 3 crops, one decode per video, against one per view (two ways).

    For each view, one way decodes the frames of its own clip, the other every 4th frame of the whole video, as the
    paper's code does. The views are checked to be the same pixels, the model is the same.
    """
    torch.set_num_threads(1)
    paths, _ = data.read_videos(args.source)
    torch.manual_seed(0)
    device = torch.device(args.device)
    side = args.img_size
    model = VideoClassifier(400, size=args.model, img_size=side).to(device).eval()
    videos = TestVideos(paths, 16, (side, side), num_segments=5)

    def once(i):
        _, frames, index, why = videos[i]
        if why:
            raise ValueError(why)
        return cut(frames, index, (side, side), 3)

    def per_view(i, whole):
        views = []
        for k in range(15):
            with data.open_video(paths[i], videos.fit) as video:
                index = view_indices(len(video), 16, 4, "dense", 5)[k // 3]
                if whole:
                    every = np.arange(0, len(video), 4)
                    frames = video.frames(every)[np.searchsorted(every, index)]
                else:
                    frames = video.frames(index)
            views.append(cut(torch.from_numpy(frames), torch.arange(16)[None], (side, side), 3)[k % 3])
        return torch.stack(views)

    @torch.no_grad()
    def forward(views):
        with torch.autocast(device.type, torch.bfloat16, enabled=best_dtype(device) == "bf16"):
            return model(views.to(device)).float().softmax(-1).mean(0).argmax().item()
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
    print(f"{len(paths)} videos x 5 clips x 3 crops, 16x{side}x{side}, ViT-{args.model} on {args.device}, one thread; "
          "all three give the same pixels")
    for name in ways:
        print(f"{name:28s} loading {load[name] / len(paths):6.3f} s/video   with the model "
              f"{total[name] / len(paths):6.3f}   ours is {load[name] / load['ours, one decode per video']:5.1f} x, "
              f"{total[name] / total['ours, one decode per video']:5.1f} x as fast")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = lambda name, text: commands.add_parser(name, help=text)
    step, tune, load, ready, feed, test, ddp = parts = (
        add("step", "a pre-training step"), add("finetune", "a fine-tuning step"), add("load", "reading a clip"),
        add("prepare", "reading a clip from a prepared set"), add("feed", "training fed by a loader"),
        add("eval", "multi-view testing"), add("ddp", "several ranks"))
    for p in (load, ready, feed, test):
        p.add_argument("source", help="a list file, a folder of videos or a prepared set")
    for p in (step, tune, feed, ddp):
        p.add_argument("--model", default=["base"], nargs="+", choices=list(SIZES))
        p.add_argument("--batch_size", default=4, type=int, help="clips, per process")
    for p in (step, tune, feed, test, ddp):
        p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for p in (step, tune, feed):
        p.add_argument("--compile", action="store_true", help="torch.compile too")
    step.add_argument("--vary", default=["options"], nargs="+", help="what the rows differ in",
                      choices=["options", "decoder_depth", "num_frames", "img_size", "mask_ratio"])
    ready.add_argument("--videos", default=8, type=int, help="how many of them, prepared in a temporary folder")
    ready.add_argument("--short_side", default=256, type=int, help="pixels")
    feed.add_argument("--num_workers", default=min(10, os.cpu_count()), type=int, help="decoding processes")
    feed.add_argument("--steps", default=20, type=int, help="per round")
    test.add_argument("--model", default="tiny", choices=list(SIZES))
    test.add_argument("--img_size", default=224, type=int, help="pixels")
    for p in set(parts) - {test}:
        p.add_argument("--repeats", default=3 if p is feed else 7, type=int, help="measured rounds")
    args = parser.parse_args()
    for name in ("batch_size", "repeats", "videos", "short_side", "num_workers", "steps", "img_size"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    try:
        {"step": bench_step, "finetune": bench_finetune, "load": bench_load, "prepare": bench_prepare,
         "feed": bench_feed, "eval": bench_eval, "ddp": bench_ddp}[args.command](args)
    except ValueError as e:
        sys.exit(f"bench.py: {e}")


if __name__ == "__main__":
    main()
