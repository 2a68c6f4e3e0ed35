"""Speed and memory as ratios: each row against an alternative, measured in turn in the same run.

    python bench.py gpu                               # all worth knowing of a GPU, in 8 minutes
    python bench.py step --model base --batch_size 4  # a pre-training step, against transformers'
    python bench.py step --vary decoder_depth         # or num_frames, ...: how cost grows
    python bench.py finetune                          # a fine-tuning step, against transformers'
    python bench.py load my_videos/                   # reading a clip, against decord + PIL
    python bench.py prepare my_videos/                # the same from prepared sets, and their sizes
    python bench.py feed my_set/                      # training fed by a loader
    python bench.py eval my_videos/                   # a 5x3-view test, or a decode for each view
    python bench.py ddp                               # several ranks, against one process
    python bench.py memory --model base huge          # a step's memory on a GPU, reckoned without

What is compared with has to be installed (`pip install transformers`, `pip install decord pillow`);
without it a row has no ratio. A row and its partner take turns, and a ratio is the median of the
rounds' ratios. Utilisation is the model's arithmetic (multiply-adds of the forward pass, three
times, no recomputation) over the data sheet's rate and over that of a large matmul on the same
device. Times differ from machine to machine and from minute to minute: read the ratios, on a
machine that does nothing else.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import itertools
import math
import os
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

import data
import masking
from lib.feed import Batches, make_loader, send
from lib.memory import peak_of_step
from lib.optim import param_groups
from lib.process import Help, Process, count, few, positive, script_main
from lib.run import peak_memory, wrap
from lib.views import TestVideos, cut, view_indices
from model import IMAGENET_MEAN, IMAGENET_STD, SIZES, VideoClassifier, VideoMAE
from video import lists, pictures, prepared, toy

CLASSES = 400

# what a step is measured on; task: pretrain, finetune or test
ROW = dict(task="pretrain", model="base", batch_size=4, num_frames=16, img_size=224, mask_ratio=0.9,
           decoder_mask=0, decoder_depth=None, checkpointing=False, compile=False,
           transformers=False)

# 1e12 operations a second in bf16 (where there is none in fp16), dense, by the makers' data sheets;
# the first whose name is part of the device's counts
SHEET = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312,
         "L40S": 362, "L4": 121, "A10G": 70, "A10": 125, "RTX 4090": 165, "RTX 3090": 71,
         "V100": 125, "T4": 65}


# ---- arithmetic ----

def block_macs(n: int, dim: int, depth: int, ratio: float) -> int:
    """Multiply-adds of `depth` blocks on n tokens, as the paper counts.

    Each 4nD^2 + 2n^2D, those of the MLP (8nD^2 at ratio 4), and 5nD per LayerNorm.
    """
    mlp = 2 * n * dim * int(ratio * dim)
    return depth * (4 * n * dim ** 2 + mlp + 2 * n ** 2 * dim + 10 * n * dim)


def forward_macs(model: torch.nn.Module, num_visible=None, num_decoded=None) -> int:
    """Multiply-adds of one clip's forward pass (Table 6's "GFLOPs").

    Of a classifier, or of a VideoMAE with so many visible and decoded tokens.
    """
    s, N, P = SIZES[model.config["size"]], math.prod(model.grid), 3 * math.prod(model.cube)
    D, d, ratio = s["width"], model.config.get("dec_width"), s["mlp_ratio"]
    if isinstance(model, VideoClassifier):
        tokens = N + bool(model.config.get("class_token"))
        head = D * model.head.out_features + 5 * D
        return N * D * P + block_macs(tokens, D, s["depth"], ratio) + head
    n, M = num_visible, num_decoded
    encoder = n * D * P + block_macs(n, D, s["depth"], ratio) + 5 * n * D + n * D * d
    head = 5 * M * d + M * d * model.decoder.head.out_features
    return encoder + block_macs(n + M, d, len(model.decoder.blocks), ratio) + head


# ---- steps ----

def installed(*names: str) -> bool:
    """Whether all these packages can be imported."""
    try:
        return all(importlib.import_module(name) for name in names)
    except ImportError:
        return False


def hf_model(row: dict):
    """transformers' model of the row's shape, sdpa attention, random weights."""
    from transformers import (VideoMAEConfig, VideoMAEForPreTraining,
                              VideoMAEForVideoClassification)
    s, whole = SIZES[row["model"]], row["task"] != "pretrain"
    config = VideoMAEConfig(
        hidden_size=s["width"], num_hidden_layers=s["depth"], num_attention_heads=s["heads"],
        intermediate_size=int(s["mlp_ratio"] * s["width"]), decoder_hidden_size=s["dec_width"],
        decoder_num_hidden_layers=row["decoder_depth"] or s["dec_depth"],
        decoder_num_attention_heads=s["dec_heads"],
        decoder_intermediate_size=int(s["mlp_ratio"] * s["dec_width"]),
        num_frames=row["num_frames"], image_size=row["img_size"], patch_size=s["patch_size"],
        num_labels=CLASSES, use_mean_pooling=whole,
        attn_implementation="sdpa")
    return (VideoMAEForVideoClassification if whole else VideoMAEForPreTraining)(config)


def make_step(row: dict, run: Process):
    """-> (a function: one step, forward, backward, AdamW; its flops). row: see ROW.

    The function takes a batch (B, T, H, W, 3) uint8, or uses a random one that stays on the device,
    and gives the loss; of task "test" the classes, and nothing is trained. It does not wait.
    """
    torch.manual_seed(0)
    B, T, side, device = row["batch_size"], row["num_frames"], row["img_size"], run.device
    patch, task, theirs = SIZES[row["model"]]["patch_size"], row["task"], row["transformers"]
    grid = T // 2, side // patch, side // patch
    fixed = torch.randint(0, 256, (B, T, side, side, 3), dtype=torch.uint8).to(device)
    mask = masking.make_mask("tube", B, grid, row["mask_ratio"]).to(device)
    labels = torch.randint(0, CLASSES, (B,)).to(device)
    num_visible = int((~mask[0]).sum())
    shape = dict(size=row["model"], num_frames=T, img_size=side,
                 checkpointing=row["checkpointing"])
    ours = VideoClassifier(CLASSES, **shape) if task != "pretrain" else (
        VideoMAE(dec_depth=row["decoder_depth"], **shape))
    decoder_mask, num_decoded = None, None
    if row["decoder_mask"]:
        decoder_mask = masking.make_mask("running_cell", B, grid, row["decoder_mask"]).to(device)
        num_decoded = int((~decoder_mask[0]).sum())
    macs = forward_macs(ours, num_visible, num_decoded or math.prod(grid) - num_visible)
    model = (hf_model(row) if theirs else ours).to(device).train(task != "test")
    groups = model.parameters() if theirs else param_groups(model, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05,
                                  fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == "fp16")
    if theirs:
        net = torch.compile(model, dynamic=False) if row["compile"] else model
        mean, std = (torch.tensor(x, device=device) for x in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = ((fixed / 255 - mean) / std).permute(0, 1, 4, 2, 3).contiguous()
        given = dict(bool_masked_pos=mask) if task == "pretrain" else dict(labels=labels)
    else:
        net = wrap(model, run, row["compile"])

    def forward(video):
        if theirs:
            out = net(pixels, **given)
            return out.logits if task == "test" else out.loss
        if task == "pretrain":
            return net(video, mask, decoder_mask, num_visible, num_decoded)[0]
        logits = net(video).float()
        return logits if task == "test" else F.cross_entropy(logits, labels)

    def step(video=fixed):
        with run.autocast:
            loss = forward(video)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def test():
        with run.autocast:
            return forward(fixed).softmax(-1)
    return (test, 2 * B * macs) if task == "test" else (step, 6 * B * macs)


def wait(device: torch.device):
    """Returns when the device has done all it was told."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def interleaved(ways: dict, repeats: int, device: torch.device, warmup: int = 2) -> dict:
    """{name: function} -> {name: seconds of each round}; in turn, `warmup` rounds do not count."""
    times = {name: [] for name in ways}
    for _ in range(repeats + warmup):
        for name, way in ways.items():
            wait(device)
            start = time.perf_counter()
            way()
            wait(device)
            times[name].append(time.perf_counter() - start)
    return {name: t[warmup:] for name, t in times.items()}


def median_ratio(partner: list, own: list) -> float:
    """How many times as fast: the median of the rounds' ratios of two lists of seconds."""
    return float(np.median(np.divide(partner, own)))


def free(device: torch.device):
    """Gives back what steps that are gone held; peak_memory begins anew (on a CPU: on Linux)."""
    torch.compiler.reset()  # one code compiled for many models would be too many
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError), open("/proc/self/clear_refs", "w") as f:
            ctypes.CDLL(None).malloc_trim(0)
            f.write("5")


# ---- a table ----

class Table(Process):
    """Prints rows that are measured one after the other, each in turn with its partner."""

    def __init__(self, args):
        """Prints conditions and head; sheet (None: unknown) and matmul are operations a second."""
        super().__init__(args)
        name, self.repeats = f"CPU, {torch.get_num_threads()} threads", args.repeats
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name()
            torch.set_float32_matmul_precision("high")  # as in lib/run.py
        known = [1e12 * rate for part, rate in SHEET.items() if part in name]
        self.sheet = known[0] if known and self.dtype != "fp32" else None
        self.matmul = self.matmul_rate()
        peer = "transformers is not installed: no ratio to it"
        if installed("transformers"):
            import transformers
            peer = f"transformers {transformers.__version__} (sdpa)"
        self.say(f"\n{self.world} x {name}, {self.dtype}, torch {torch.__version__}, {peer}\n"
                 f"TFLOP/s of a large matmul: {self.matmul / 1e12:.4g}, of the data sheet: "
                 f"{self.sheet / 1e12 if self.sheet else 'unknown'}\n"
                 f"{'':32s} batch   s/step   clips/s     GB  sheet matmul", flush=True)

    def matmul_rate(self) -> float:
        """Operations per second of a large matmul in the dtype that training uses."""
        n = 8192 if self.device.type == "cuda" else 1024
        dtype = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[self.dtype]
        a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        times = interleaved(dict(work=lambda: [a @ b for _ in range(8)]), 5, self.device)["work"]
        return 8 * 2 * n ** 3 / np.median(times)

    def show(self, name: str, batch: int, seconds: list, flops: int, memory=None, ratio=""):
        """Prints a row; seconds of each round, flops of a rank's step, memory in bytes."""
        median = np.median(seconds)
        shares = " ".join(f"{flops / median / rate:6.0%}" if rate else f"{'-':>6s}"
                          for rate in (self.sheet, self.matmul))
        memory = f"{memory / 2**30:6.2f}" if memory else f"{'-':>6s}"
        self.say(f"{name:32s} {batch:5d} {median:8.4f} {self.world * batch / median:9.1f} {memory} "
                 f"{shares} {ratio}", flush=True)

    def measure(self, name: str, row: dict, partner: dict | None = None, whose: str = ""):
        """Prints a row, measured in turn with its partner, another row called `whose`.

        What memory is short for is left out and said: the partner first.
        """
        free(self.device)
        try:
            step, flops = make_step(row, self)
            for _ in range(3):
                step()
            wait(self.device)
            memory, ways = peak_memory(self.device), dict(own=step)
            if partner:
                ways["partner"] = make_step(partner, self)[0]
            times = interleaved(ways, self.repeats, self.device)
        except torch.OutOfMemoryError:
            step = ways = times = None  # and so what they hold
        if not times:
            self.say(f"{name:32s} {row['batch_size']:5d} does not fit into the memory"
                     f"{f' beside {whose}' * bool(partner)}", flush=True)
            return self.measure(name, row) if partner else None
        ratio = f"{median_ratio(times['partner'], times['own']):.2f} x {whose}" if partner else ""
        self.show(name, row["batch_size"], times["own"], flops, memory, ratio)

    def best_batch(self, row: dict, batch: int) -> int | None:
        """The batch of most clips per second: doubled while that gains 3 % and fits.

        Halved instead where not even the first fits; None where no batch does.
        """
        rates, first = {}, batch
        while batch:
            step = None
            free(self.device)
            try:
                step, _ = make_step(row | dict(batch_size=batch), self)
                rate = batch / np.median(interleaved(dict(step=step), 3, self.device)["step"])
            except torch.OutOfMemoryError:
                if rates:
                    break
                batch //= 2
                continue
            gains = rate > 1.03 * max(rates.values(), default=0)
            rates[batch] = rate
            if not gains or batch < first:
                break
            batch *= 2
        return max(rates, key=rates.get, default=None)

    def fed(self, name: str, row: dict, paths: list, steps: int):
        """Prints steps fed by a loader, in turn with so many steps on a batch at hand.

        The loader's lead is used up before the clock starts; the device is waited for once a round.
        """
        free(self.device)
        step, flops = make_step(row, self)
        clips = data.PretrainClips(paths, row["num_frames"], (row["img_size"],) * 2, 4)
        lead, fed, at_hand = 2 * self.num_workers + 2, [], []
        for k in range(self.repeats):
            order = Batches(len(paths), row["batch_size"], 1, 0, 1, k * (lead + steps),
                            (k + 1) * (lead + steps), 0)
            loader = make_loader(clips, order, self.num_workers, self.device)
            for i, (video, bad) in enumerate(loader):
                if video is None:
                    raise ValueError(bad[-1][1])
                if i == lead:
                    wait(self.device)
                    start = time.perf_counter()
                step(send(video, self.device))
            wait(self.device)
            fed.append((time.perf_counter() - start) / steps)
            ways = dict(step=lambda: [step() for _ in range(steps)])
            at_hand += [t / steps for t in interleaved(ways, 1, self.device, 0)["step"]]
        self.show(name, row["batch_size"], fed, flops, None, f"{median_ratio(at_hand, fed):.3f} x "
                  f"a batch at hand, {self.num_workers} workers")


def compare(rows: dict, args, against: str):
    """Prints {name: row}, each beside the row `against` where there is one."""
    table = Table(args)
    for name, row in rows.items():
        partner = rows.get(against) if name != against else None
        table.measure(f"{row['model']}: {name}", row, partner, against)
    table.close()


VARY = dict(decoder_depth=[1, 2, 4, 8], num_frames=[8, 16, 32], img_size=[112, 224, 320],
            mask_ratio=[0.5, 0.75, 0.9, 0.95])


def bench_step(args):
    """A step of pre-training or fine-tuning: options against transformers', or a setting varied."""
    task = "finetune" if args.command == "finetune" else "pretrain"
    for model, what in itertools.product(args.model, args.vary):
        ours = ROW | dict(task=task, model=model, batch_size=args.batch_size)
        if what in VARY:
            usual = dict(decoder_depth=4).get(what, ours[what])
            rows = {f"{what} {v}": ours | {what: v} for v in VARY[what]}
            compare(rows, args, f"{what} {usual}")
            continue
        rows = dict(ours=ours)
        if what == "options":
            rows["recomputed activations"] = ours | dict(checkpointing=True)
            if task == "pretrain":
                rows["decoder mask .5"] = ours | dict(decoder_mask=0.5)
            if installed("transformers"):
                rows["transformers"] = ours | dict(transformers=True)
        if args.compile:
            rows |= {f"{name}, compiled": rows[name] | dict(compile=True)
                     for name in ("ours", "transformers") if name in rows}
        compare(rows, args, "transformers")


def bench_ddp(args):
    """A step in one process, then on N ranks: a GPU each, or the CPU's threads divided."""
    run, threads = Process(args), torch.get_num_threads()
    cuda = run.device.type == "cuda"
    world = torch.cuda.device_count() if cuda else min(2, threads)
    if world < 2:
        raise ValueError(f"ddp needs two GPUs or two CPU threads, here is {world}")
    # on a CPU the same work for the same cores
    for ranks, batch in ((1, args.batch_size * (1 if cuda else world)), (world, args.batch_size)):
        launch = f"-m torch.distributed.run --standalone --nproc_per_node={ranks}".split()
        flags = f"""step --vary nothing --model {args.model[0]} --batch_size {batch}
            --repeats {args.repeats} --device {run.device.type}""".split()
        each = dict(OMP_NUM_THREADS=str(threads if cuda else threads // ranks))
        if subprocess.run([sys.executable, *launch, __file__, *flags],
                          env=os.environ | each).returncode:
            raise ValueError(f"{ranks} rank(s): a process failed")


def toy_videos(folder: str, side: int) -> list[str]:
    """Writes 32 toy videos of 64 frames of so many pixels -> their paths."""
    paths = [os.path.join(folder, f"{i}.mp4") for i in range(32)]
    for i, path in enumerate(paths):
        clip = toy.toy_clip(np.random.default_rng(i), i % 8, 64, side // 4)
        pictures.write_video(path, clip.repeat(4, 1).repeat(4, 2))
    return paths


def prepare(paths: list, folder: str, form: str, side: int) -> list[str]:
    """Writes a prepared set of videos -> the paths in it."""
    settings = dict(form=form, sampling_rate=4, short_side=side, quality=2, shard_videos=16)
    prepared.prepare([(path, None) for path in paths], folder, settings, 1, False,
                     say=lambda *a, **k: None)
    return lists.read_videos(folder)[0]


def bench_gpu(args) -> int:
    """All that is worth knowing of a GPU, in one table and so many minutes.

    What time or memory were short for, or what failed, is said; 1: something failed.
    """
    start, left_out, failed = time.monotonic(), [], 0
    table = Table(args)

    def stop(number, frame):
        raise TimeoutError
    signal.signal(signal.SIGALRM, stop)
    sys.unraisablehook = lambda error: None  # of an alarm that rings while something is deleted

    def item(name, function, *more):
        """function(*more), stopped when the time is over."""
        nonlocal failed
        left = start + 60 * args.minutes - time.monotonic()
        try:
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), 1)  # again: some catch it
            return function(*more)
        except Exception as e:  # the rest is still worth its time
            why = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
            in_time = time.monotonic() < start + 60 * args.minutes
            failed = failed or int(in_time)
            left_out.append(f"{name}: {why if in_time else 'no time was left'}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def rows_of(task, model):
        base = ROW | dict(task=task, model=model, img_size=args.img_size)
        base["batch_size"] = item(f"{model} {task}", table.best_batch, base, args.batch_size)
        if not base["batch_size"]:
            return None
        theirs = base | dict(transformers=True) if installed("transformers") else None
        rows = {"eager": (base, theirs, "transformers")}
        if task != "test":
            rows["compiled"] = base | dict(compile=True), base, "eager"
        if task == "pretrain":
            rows["decoder mask .5"] = base | dict(decoder_mask=0.5), base, "eager"
        for what, row in rows.items():
            name = f"{model} {task}, {what}"
            item(name, table.measure, name, *row)
        return base | dict(compile=True)

    def fed(name, row, form):
        with tempfile.TemporaryDirectory() as folder:
            paths = toy_videos(folder, args.img_size)
            paths = prepare(paths, os.path.join(folder, form), form, args.img_size)
            table.fed(name, row, paths, args.steps)

    first, *others = args.model
    row = rows_of("pretrain", first)
    for form in prepared.DECODED if row else ():
        name = f"{first} compiled, fed {form}"
        item(name, fed, name, row, form)
    for task, model in [*(("pretrain", m) for m in others), ("test", first), ("finetune", first)]:
        rows_of(task, model)
    print(f"{(time.monotonic() - start) / 60:.1f} minutes", *[f"left out: {x}" for x in left_out],
          sep="\n")
    return failed


def bench_memory(args):
    """Prints the memory that steps of each batch size take on a GPU (lib/memory.py)."""
    print("reckoned, not run: GB of 2^30 bytes on a GPU, bf16, AdamW in fp32, fused attention")
    print(f"{'':40s}" + "".join(f"batch {n:<6d}" for n in args.batch_size))
    rows = itertools.product(args.model, ("pretrain", "finetune"), (False, True))
    for model, task, checkpointing in rows:
        about = f"{model}, {task}" + ", recomputed" * checkpointing
        print(f"{about:40s}", end="")
        for n in args.batch_size:
            peak = peak_of_step(task, model, n, checkpointing, args.decoder_mask_ratio)
            print(f"{peak / 2**30:<12.1f}", end="", flush=True)
        print()


# ---- data ----

def usual_way(paths: list) -> dict:
    """{"decord + PIL": (index, rng) -> clip}, or nothing where they are missing.

    The usual pipeline, decord on one thread and PIL -> float (T, C, H, W) in [0,1].
    """
    if not installed("decord", "PIL.Image"):
        print("decord or pillow is not installed: no ratio to them")
        return {}
    import decord
    import PIL.Image
    print(f"decord {decord.__version__}, PIL {PIL.__version__}")

    def clip(i, rng):
        reader = decord.VideoReader(paths[i], num_threads=1)
        frames = reader.get_batch(list(data.sample_dense(rng, len(reader), 16, 4))).asnumpy()
        y, x, h, w = data.multi_scale_crop(rng, *frames.shape[1:3])
        images = (PIL.Image.fromarray(frame).crop((x, y, x + w, y + h)) for frame in frames)
        images = [np.array(image.resize((224, 224), PIL.Image.BILINEAR)) for image in images]
        return torch.stack([torch.from_numpy(x).permute(2, 0, 1).float() / 255 for x in images])
    return {"decord + PIL": clip}


def cpu_times(ways: dict, indices: int, repeats: int) -> dict:
    """{name: function (index, rng)} -> {name: mean CPU seconds} over so many indices."""
    times = {name: [] for name in ways}
    for repeat, i in itertools.product(range(repeats), range(indices)):
        for name, way in ways.items():
            start = time.process_time()
            way(i, np.random.default_rng([repeat, i]))
            times[name].append(time.process_time() - start)
    return {name: float(np.mean(t)) for name, t in times.items()}


def print_times(times: dict):
    """A line per way, with the ratios to decord + PIL and to the files."""
    for name, t in times.items():
        ratios = [f"{times[other] / t:6.2f} x {other}" for other in ("decord + PIL", "ours")
                  if other in times]
        print(f"{name:24s} {1000 * t:7.1f} ms CPU/clip {1 / t:7.1f} clips/s/core "
              f"{' '.join(ratios)}")


def bench_load(args):
    """CPU time per clip of decoding, cropping and resizing a file."""
    torch.set_num_threads(1)
    paths, _ = lists.read_videos(args.source)
    ways = usual_way(paths) | {"ours": data.PretrainClips(paths, 16, (224, 224), 4).load}
    print_times(cpu_times(ways, len(paths), args.repeats))
    if len(ways) == 2:
        made = ([way(i, np.random.default_rng(i)) for way in ways.values()]
                for i in range(len(paths)))
        worst = max((ours[0].permute(0, 3, 1, 2) - 255 * usual).abs().mean()
                    for usual, ours in made)
        print(f"largest mean difference of two such clips: {worst:.3f} of 255")
    tuning = {name: data.FinetuneClips(paths, [0] * len(paths), rand_aug=(n, 7, 0.5)).load
              for name, n in (("with RandAugment", 4), ("without", 0))}
    times = cpu_times(tuning, len(paths), args.repeats)
    print("a fine-tuning clip, ms CPU: " + ", ".join(f"{name} {1000 * t:.1f}"
                                                     for name, t in times.items()))


def bench_prepare(args):
    """CPU time per clip from both forms of a prepared set, against files; sizes."""
    torch.set_num_threads(1)
    paths = lists.read_videos(args.source)[0][:args.videos]
    ways = usual_way(paths) | {"ours": data.PretrainClips(paths, 16, (224, 224), 4).load}
    with tempfile.TemporaryDirectory() as folder:
        for form in prepared.DECODED:
            out, start = os.path.join(folder, form), time.process_time()
            ready = prepare(paths, out, form, args.short_side)
            seconds = (time.process_time() - start) / len(paths)
            size = os.path.getsize(os.path.join(out, f"000000.{form}")) / min(16, len(paths))
            print(f"{form}: {prepared.gb(1000 * size)} per 1000 videos, "
                  f"{seconds:.2f} s CPU/video to prepare")
            ways[form] = data.PretrainClips(ready, 16, (224, 224), 4).load
        size = sum(map(os.path.getsize, paths)) / len(paths)
        print(f"the files: {prepared.gb(1000 * size)} per 1000 videos")
        print_times(cpu_times(ways, len(paths), args.repeats))


def bench_feed(args):
    """Training steps fed by a loader against steps on a batch at hand."""
    paths, _ = lists.read_videos(args.source)
    row = ROW | dict(model=args.model[0], batch_size=args.batch_size, compile=args.compile)
    Table(args).fed(f"{row['model']}, fed", row, paths, args.steps)


def bench_eval(args):
    """Wall time of a test with 5 clips x 3 crops: a decode per video, or one per view.

    That is of the view's own clip, or of the whole video, as the paper's code does.
    """
    run = Process(args)
    torch.set_num_threads(1)
    paths, _ = lists.read_videos(args.source)
    size = (args.img_size, args.img_size)
    model = VideoClassifier(CLASSES, size=args.model[0], img_size=args.img_size).eval()
    model.to(run.device)
    videos = TestVideos(paths, 16, size, num_segments=5)

    def once(path):
        with videos.open(path) as video:
            return cut(*videos.clips(video), size, 3)

    def per_view(path, whole):
        views = []
        for k in range(15):
            with videos.open(path) as video:
                index = view_indices(len(video), 16, 4, "dense", 5)[k // 3]
                wanted = np.arange(0, len(video), 4) if whole else np.unique(index)
                frames = video.frames(wanted)[np.searchsorted(wanted, index)]
            views.append(cut(torch.from_numpy(frames), torch.arange(16)[None], size, 3)[k % 3])
        return torch.stack(views)

    ways = {"ours, one decode per video": once, "per view, its clip": lambda p: per_view(p, False),
            "per view, the video": lambda p: per_view(p, True)}
    times = {name: [] for name in ways}  # seconds of loading, and with the model
    for path in paths:
        made = []
        for name, way in ways.items():
            start = time.perf_counter()
            made.append(way(path))
            loaded = time.perf_counter() - start
            with run.autocast, torch.no_grad():
                model(made[-1].to(run.device)).float().softmax(-1).mean(0).argmax().item()
            times[name].append((loaded, time.perf_counter() - start))
        assert all(torch.equal(made[0], views) for views in made[1:])
    print(f"{len(paths)} videos x 5 clips x 3 crops, 16x{args.img_size}x{args.img_size}, "
          f"ViT-{args.model[0]} on {run.device.type}, one thread; all three give the same pixels")
    ours = next(iter(times.values()))
    for name, t in times.items():
        load, total = np.mean(t, 0)
        faster = np.median(np.divide(t, ours), 0)
        print(f"{name:28s} loading {load:6.3f} s/video   with the model {total:6.3f}   ours is "
              f"{faster[0]:5.1f} x, {faster[1]:5.1f} x as fast")


# ---- the command line ----

BENCHES = dict(gpu=bench_gpu, step=bench_step, finetune=bench_step, load=bench_load,
               prepare=bench_prepare, feed=bench_feed, eval=bench_eval, ddp=bench_ddp,
               memory=bench_memory)


def get_args(argv=None) -> argparse.Namespace:
    """The flags; an impossible one ends the program and is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    # what Process asks for and no flag says
    parser.set_defaults(device=None, dtype=None, num_workers=0, frame_rate=25.0)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in BENCHES.items():
        text = function.__doc__.partition("\n")[0]
        p = commands.add_parser(name, help=text, description=text, formatter_class=Help)
        if name in ("load", "prepare", "feed", "eval"):
            p.add_argument("source", help="a list file, a folder of videos or a prepared set")
        if name == "memory":
            p.add_argument("--model", default=list(SIZES)[1:], nargs="+", choices=list(SIZES))
            p.add_argument("--batch_size", default=[8, 16, 32, 64], nargs="+", type=count,
                           help="clips at a time, repeated views count")
            p.add_argument("--decoder_mask_ratio", default=0.0, type=float,
                           choices=[0, 0.25, 0.5, 0.75], help="of pre-training")
            continue
        if name not in ("load", "prepare"):
            sizes = dict(gpu=["base", "small", "large"], eval=["tiny"]).get(name, ["base"])
            p.add_argument("--model", default=sizes, nargs="+", choices=list(SIZES))
            p.add_argument("--device", help="cuda, cpu or mps (default: the first there is)")
        if name not in ("load", "prepare", "eval"):
            p.add_argument("--batch_size", default=32 if name == "gpu" else 4, type=count,
                           help="clips, per process (gpu: where the search begins)")
        if name in ("step", "finetune", "feed"):
            p.add_argument("--compile", action="store_true", help="torch.compile too")
        if name == "gpu":
            p.add_argument("--minutes", default=8, type=positive,
                           help="what would take longer is left out and said")
        if name == "step":
            p.add_argument("--vary", default=["options"], nargs="+",
                           choices=["options", "nothing", *VARY], help="what the rows differ in")
        if name == "finetune":
            p.set_defaults(vary=["options"])
        if name == "prepare":
            p.add_argument("--videos", default=8, type=count,
                           help="how many of them, prepared in a temporary folder")
            p.add_argument("--short_side", default=256, type=count, help="pixels")
        if name in ("gpu", "feed"):
            p.add_argument("--num_workers", type=few,
                           help="decoding processes (default: the cores, at most 32)")
            p.add_argument("--steps", default=20, type=few, help="fed in a round")
        if name in ("gpu", "eval"):
            p.add_argument("--img_size", default=224, type=count, help="pixels")
        if name != "eval":
            p.add_argument("--repeats", default=3 if name == "feed" else 7, type=few,
                           help="measured rounds")
    return parser.parse_args(argv)


def main():
    args = get_args()
    return BENCHES[args.command](args)


if __name__ == "__main__":
    script_main(main)
