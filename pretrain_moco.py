"""MoCo v3 (arXiv 2104.02057) on clips: the contrastive baseline that VideoMAE's paper measures itself against.

    python pretrain_moco.py --toy                                                         # laptop CPU: minutes
    python pretrain_moco.py --data my_videos/ --size small --batch_size 16                # one GPU
    torchrun --nproc_per_node=8 pretrain_moco.py --data k400_train.tsv --batch_size 64

Two clips of one video, each with one augmentation draw for all its frames, go through the encoder; a predictor on one
has to tell what a slowly following copy of encoder and projector makes of the other, among those of all other videos.
The image recipe, applied to clips: the paper that uses it publishes no settings. No masks: a step costs a full ViT
twice with and twice without gradient. The log gives the loss beside chance and the spread of the queries.
"""

import argparse
import contextlib
import copy
import ctypes
import datetime
import itertools
import json
import math
import os
import re
import resource
import signal
import sys
import time
import zlib

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
from contrastive import head, info_nce_keys, spread_of
from model import SIZES, Encoder, best_dtype, count_params, init_linears, param_groups
from pretrain import lr_at

MAX_NONFINITE = 20  # steps in a row with a non-finite gradient before the run gives up


def get_args(argv=None) -> argparse.Namespace:
    """The flags, checked as far as that needs no data; an impossible one ends the program and is named."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = argparse.BooleanOptionalAction
    # data
    p.add_argument("--data", nargs="+", help="list files, folders, or the word toy")
    p.add_argument("--data_root", default="", help="goes before relative paths of a list")
    p.add_argument("--num_frames", default=16, type=int, help="frames per clip")
    p.add_argument("--sampling_rate", default=4, type=int, help="frames from one sampled frame to the next (SSv2: 2)")
    p.add_argument("--img_size", default=224, type=int, help="pixels, height and width of a clip")
    p.add_argument("--crop_area", nargs=2, default=[0.2, 1], type=float, help="share of a frame that a view shows")
    p.add_argument("--color", action=flag, default=True, help="jitter, grey, blur, solarising beside crop and flip")
    p.add_argument("--num_workers", type=int, help="decoding processes per rank (default: cores per rank, at most 10)")
    p.add_argument("--max_bad", default=0.05, type=float, help="stop when more than this share of reads fails")
    # model
    p.add_argument("--size", default="base", choices=list(SIZES))
    p.add_argument("--patch_size", default=16, type=int, help="pixels")
    p.add_argument("--tubelet_size", default=2, type=int, help="frames per cube")
    p.add_argument("--proj_width", default=4096, type=int, help="of the heads' hidden layers")
    p.add_argument("--proj_dim", default=256, type=int, help="of what is contrasted")
    p.add_argument("--temperature", default=0.2, type=float)
    p.add_argument("--momentum", default=0.99, type=float, help="of the copies at first; rises to 1 by half a cosine")
    p.add_argument("--checkpointing", action=flag, default=False, help="recompute activations: less memory, slower")
    # optimisation
    p.add_argument("--batch_size", default=32, type=int, help="videos per rank and accumulation step")
    p.add_argument("--accum_steps", default=1, type=int, help="batches per optimiser step; negatives are of one batch")
    p.add_argument("--epochs", default=300, type=float)
    p.add_argument("--warmup_epochs", default=40, type=float, help="less than --epochs")
    p.add_argument("--max_steps", type=int, help="optimiser steps instead of epochs; the warm-up keeps its share")
    p.add_argument("--lr", default=1.5e-4, type=float, help="per 256 videos of the global batch")
    p.add_argument("--min_lr", default=0.0, type=float, help="per 256 videos of the global batch")
    p.add_argument("--weight_decay", default=0.1, type=float)
    p.add_argument("--beta2", default=0.95, type=float)
    p.add_argument("--clip_grad", default=0.0, type=float, help="largest gradient norm, 0 = off")
    # run
    p.add_argument("--out_dir", default="out/moco")
    p.add_argument("--seed", default=0, type=int)
    p.add_argument("--device", help="cuda, cpu or mps (default: the first there is)")
    p.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="(default: bf16 where the hardware has it)")
    p.add_argument("--compile", action=flag, default=False, help="torch.compile the model")
    p.add_argument("--resume", action=flag, help="continue from out_dir (default: if it holds this very run)")
    p.add_argument("--log_every", default=10, type=int, help="steps")
    p.add_argument("--save_every", default=500, type=int, help="steps")
    p.add_argument("--tensorboard", action=flag, default=False, help="also write event files")
    p.add_argument("--toy", action="store_true", help="presets for minutes on two CPU cores; other flags still win")
    if p.parse_known_args(argv)[0].toy:
        p.set_defaults(data=["toy"], size="tiny", num_frames=4, sampling_rate=1, img_size=32, patch_size=8,
                       batch_size=64, proj_width=256, proj_dim=64, crop_area=[0.8, 1], color=False, lr=1.2e-2,
                       epochs=60, warmup_epochs=6, log_every=20)
    args = p.parse_args(argv)
    if not args.data:
        p.error("--data: expected list files or folders of videos, or --toy")
    lowest = dict(num_frames=1, sampling_rate=1, img_size=1, patch_size=1, tubelet_size=1, batch_size=1, accum_steps=1,
                  max_steps=1, log_every=1, save_every=1, num_workers=0, proj_width=1, proj_dim=1, lr=0, min_lr=0,
                  weight_decay=0, clip_grad=0, seed=0, warmup_epochs=0)
    for name, low in lowest.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            p.error(f"--{name} {getattr(args, name)}: expected at least {low}")
    for name, value in vars(args).items():
        if not all(math.isfinite(x) for x in (value if isinstance(value, list) else [value]) if isinstance(x, float)):
            p.error(f"--{name} {value}: expected a finite number")
    if args.epochs <= args.warmup_epochs:
        p.error(f"--epochs {args.epochs:g}: expected more than --warmup_epochs {args.warmup_epochs:g}")
    if not 0 <= args.max_bad <= 1 or args.seed >= 2**31:
        p.error(f"--max_bad {args.max_bad}, --seed {args.seed}: expected a share in [0, 1] and a seed below 2^31")
    low, high = args.crop_area
    if not 0 < low <= high <= 1:
        p.error(f"--crop_area {low} {high}: expected 0 < low <= high <= 1")
    if args.temperature <= 0 or not 0 <= args.momentum <= 1:
        p.error(f"--temperature {args.temperature}, --momentum {args.momentum}: expected more than 0, and 0 to 1")
    return args


class MoCo(torch.nn.Module):
    """Encoder, projector, predictor, and the copies of the first two that follow them."""

    def __init__(self, proj_width=4096, proj_dim=256, temperature=0.2, **kwargs):
        super().__init__()
        self.encoder = Encoder(**kwargs)
        D = SIZES[self.encoder.config["size"]]["width"]
        self.encoder.norm = torch.nn.LayerNorm(D, eps=1e-6)
        init_linears(self.encoder)
        self.encoder.patch_embed.requires_grad_(False)  # stays as drawn: training it makes MoCo v3 unstable
        self.encoder.norm.bias.requires_grad_(False)  # the first BatchNorm takes it out: it would only drift
        self.projector = head(D, proj_width, proj_width, proj_dim, last_norm=True)
        self.predictor = head(proj_dim, proj_width, proj_dim, last_norm=True)
        self.momentum_encoder, self.momentum_projector = copy.deepcopy((self.encoder, self.projector))
        for p in self.followers():
            p.requires_grad_(False)
        self.temperature = temperature
        self.grid = self.encoder.grid
        self.config = self.encoder.config | dict(proj_width=proj_width, proj_dim=proj_dim)

    def followers(self):
        return [*self.momentum_encoder.parameters(), *self.momentum_projector.parameters()]

    @torch.no_grad()
    def follow(self, momentum: float):
        """The copies become momentum * themselves + (1 - momentum) * what they follow."""
        leaders = [*self.encoder.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(self.followers(), leaders, 1 - momentum)

    def forward(self, views):
        """views (B, 2, T, H, W, C) -> (loss of both directions, spread of the queries)."""
        pooled = lambda encoder, x: encoder.norm(encoder(x)).mean(1)  # (B, D)
        q = [self.predictor(self.projector(pooled(self.encoder, v))) for v in views.unbind(1)]  # each (B, proj_dim)
        with torch.no_grad():
            k = [self.momentum_projector(pooled(self.momentum_encoder, v)) for v in views.unbind(1)]
        loss = info_nce_keys(q[0], k[1], self.temperature) + info_nce_keys(q[1], k[0], self.temperature)
        return loss, spread_of(q[0])


def momentum_at(step: int, total: int, start: float) -> float:
    """Half a cosine from `start` at the first step to 1 at the last."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / max(total - 1, 1)))


def main():
    args = get_args()
    # ---- process group: torchrun sets these variables, plain python does not
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    mps = torch.backends.mps.is_available()
    device = args.device or ("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        if device == "cuda":
            torch.cuda.set_device(local_rank)
            torch.set_float32_matmul_precision("high")  # TF32 where fp32 is left
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError) as e:
        why = "this build of torch has no such device" if isinstance(e, AttributeError) else str(e).splitlines()[0]
        raise ValueError(f"--device {device}: {why}") from None
    device = torch.device(device)
    dtype_name = args.dtype or best_dtype(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        control = dist.new_group(backend="gloo")  # host-side numbers: agreeing to stop does not wait for the GPU
    if device.type == "cpu" and hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc gives large tensors back to the system at once and faults their pages in again: a fifth of a step's time
        ctypes.CDLL(None).mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    say = print if rank == 0 else lambda *a, **k: None
    torch.manual_seed(args.seed)  # initial weights; all later draws come from (seed, step) and (seed, epoch, index)
    os.makedirs(args.out_dir, exist_ok=True)
    if args.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard needs `pip install tensorboard`") from None

    # ---- data
    toy = "toy" in args.data
    if toy and local_rank == 0:
        data.make_toy_shapes()
    if world > 1:
        dist.barrier()

    def read(sources, toy_part):
        found = [p for s in sources for p in data.read_videos(toy_part if s == "toy" else s, args.data_root)[0]]
        return [p for p in found if not os.path.abspath(p).startswith(os.path.abspath(args.out_dir) + os.sep)]
    paths = read(args.data, "toy_shapes/train")
    if not paths:
        raise ValueError(f"no videos in {args.data} outside --out_dir {args.out_dir}")
    train_set = data.ViewPairs(paths, [], num_frames=args.num_frames, size=(args.img_size, args.img_size),
                               stride=args.sampling_rate, area=args.crop_area, color=args.color, seed=args.seed)
    global_batch = args.batch_size * args.accum_steps * world
    total_steps = args.max_steps or max(1, int(args.epochs * len(paths) / global_batch))
    if args.batch_size * world < 2:
        raise ValueError("--batch_size 1 on one rank: nothing to contrast with, expected at least 2")
    warmup_steps = int(total_steps * args.warmup_epochs / args.epochs)

    # ---- model
    model = MoCo(args.proj_width, args.proj_dim, args.temperature, size=args.size, num_frames=args.num_frames,
                 img_size=args.img_size, patch_size=args.patch_size, tubelet_size=args.tubelet_size,
                 checkpointing=args.checkpointing)

    # ---- resume: the run in out_dir goes on if it is this one
    last, log_file = os.path.join(args.out_dir, "last.pt"), os.path.join(args.out_dir, "log.jsonl")
    free = {"out_dir", "resume", "num_workers", "log_every", "save_every", "tensorboard", "max_bad", "toy",
            "device", "compile", "checkpointing", "batch_size", "accum_steps", "data", "data_root"}
    run = {k: v for k, v in vars(args).items() if k not in free}  # what may not change within a run
    names = ["/".join(p.replace(os.sep, "/").split("/")[-2:]) for p in paths]
    run |= dict(dtype=dtype_name, global_batch=global_batch, contrasted=args.batch_size * world,
                videos=f"{len(paths)} ({zlib.crc32(chr(10).join(names).encode()):08x})")
    first_step, saved, changed = 0, None, []
    if args.resume and not os.path.exists(last):
        raise ValueError(f"--resume: there is no {last}")
    if os.path.exists(last) and args.resume is not False:
        try:
            saved = torch.load(last, map_location="cpu", weights_only=True)
            saved["args"]["momentum"]  # other scripts have none
            changed = [f"{k} {saved['args'].get(k)} -> {v}" for k, v in run.items() if saved["args"].get(k) != v]
            finished = saved["step"] >= saved["args"]["total_steps"]
            differ = [k for k, v in model.config.items() if saved["config"].get(k, v) != v]
        except Exception as e:  # torch raises whatever the broken bytes lead to
            raise ValueError(f"{last}: not a checkpoint of pretrain_moco.py ({e}); --no-resume moves it "
                             "aside") from None
        if (changed or differ) and args.resume is None and finished:
            saved = None  # a finished run with other settings: start anew beside it
        elif changed and args.resume is None:
            raise ValueError(f"{last} holds another unfinished run ({', '.join(changed)}): choose another --out_dir, "
                             "--no-resume to start anew (the old files are kept), or --resume to go on with the new "
                             "settings")
        elif differ:
            raise ValueError(f"{last} holds another model ({', '.join(changed or differ)}): it cannot go on with this "
                             "one; choose another --out_dir, or --no-resume to start anew")
        elif changed:
            say(f"going on with other settings: {', '.join(changed)}")
    if saved:
        model.load_state_dict(saved["model"])
        first_step = saved["step"]
        say(f"resumed {last} at step {first_step} of {total_steps}")
    if world > 1:  # all have looked before anyone moves or writes files
        steps = torch.tensor([first_step, -first_step])
        dist.all_reduce(steps, dist.ReduceOp.MAX, group=control)
        if steps.sum() != 0:
            raise ValueError(f"not all ranks see the same {last}: --out_dir must be on a disk that all nodes share")
    old = [f for f in sorted(os.listdir(args.out_dir)) if re.match(r"last\.pt|log\.jsonl|bad_videos|vis_|events", f)]
    if not saved and rank == 0 and old:
        n = next(n for n in itertools.count(1) if not os.path.exists(os.path.join(args.out_dir, f"previous-{n}")))
        os.mkdir(os.path.join(args.out_dir, f"previous-{n}"))
        for f in old:
            os.rename(os.path.join(args.out_dir, f), os.path.join(args.out_dir, f"previous-{n}", f))
        say(f"{args.out_dir} held another run{f' ({chr(44).join(changed)})' if changed else ''}: kept in previous-{n}/")
    if rank == 0 and os.path.exists(log_file):  # rows after the checkpoint will be written again
        rows = [r for r in open(log_file) if r.endswith("\n") and json.loads(r)["step"] <= first_step]
        open(log_file, "w").writelines(rows)

    # ---- optimiser
    model.to(device)
    raw_model = model
    if args.compile:
        model = torch.compile(model)
    if world > 1:
        model = DistributedDataParallel(model, device_ids=[local_rank] if device.type == "cuda" else None)
    lr, min_lr = args.lr * global_batch / 256, args.min_lr * global_batch / 256
    fused = device.type in ("cuda", "cpu")
    groups = param_groups(raw_model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, args.beta2), fused=fused)
    params = [p for group in groups for p in group["params"]]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype_name == "fp16")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype_name]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if saved:
        options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(saved["optimizer"])
        for group, option in zip(optimizer.param_groups, options):  # decay and betas are those of the flags
            group.update(option)
        if saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
    del saved

    # ---- loader: starts at the clip where the run stands
    num_workers = args.num_workers
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        num_workers = min(10, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))

    batches = data.Batches(len(paths), args.batch_size, args.accum_steps, rank, world, first_step, total_steps,
                           args.seed)
    batches = data.MixedBatches(batches, None)
    loader = torch.utils.data.DataLoader(
        train_set, batch_sampler=batches, num_workers=num_workers, collate_fn=data.collate,
        worker_init_fn=data.ignore_signals, pin_memory=device.type == "cuda",
        prefetch_factor=2 if num_workers else None)

    chance = 4 * args.temperature * math.log(args.batch_size * world)
    say(f"{len(paths)} videos, {args.size} with {count_params(raw_model.encoder) / 1e6:.1f} M parameters, token grid "
        f"{'x'.join(map(str, raw_model.grid))}; {world} rank(s) x {args.batch_size} videos x {args.accum_steps} = "
        f"batch {global_batch}, {total_steps} steps = {total_steps * global_batch / len(paths):.1f} epochs, peak lr "
        f"{lr:.2e}, {device.type} {dtype_name}, {num_workers} workers")
    say(f"each clip's positive is among {args.batch_size * world} keys, chance level 4 x {args.temperature:g} x "
        f"ln({args.batch_size * world}) = {chance:.3f}"
        + ("; --accum_steps adds videos to a step, not negatives" if args.accum_steps > 1 else ""))
    board = SummaryWriter(args.out_dir) if args.tensorboard and rank == 0 else None

    def log(row):
        with open(log_file, "a") as f:
            f.write(json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n")
        for k, v in row.items():
            if board and k != "step":
                board.add_scalar(k, v, row["step"])

    def save(step):
        """last.pt is whole at any moment: written beside, flushed, renamed."""
        if rank == 0:
            state = dict(model=raw_model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                         step=step, epoch=step * global_batch / len(paths), config=raw_model.config, classes=None,
                         args=vars(args) | run | dict(total_steps=total_steps),
                         rng=dict(seed=args.seed))  # all draws follow from the seed and step, epoch, index
            with open(last + ".part", "wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(last + ".part", last)

    # ---- loop
    stop = []  # signals received
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: os._exit(128 + number) if number in stop else stop.append(number))
    sums = torch.zeros(2, device=device)  # of the batches since the last log line with finite losses: it, how many
    skipped, in_row = torch.zeros((2,), device=device)  # steps with a non-finite gradient: all, and the last in a row
    reads = bad_reads = 0
    bad_file = os.path.join(args.out_dir, "bad_videos.txt")
    bad_seen = {row.split("\t")[0] for row in open(bad_file)} if os.path.exists(bad_file) else set()
    waiting, clock, logged = data.Waiting(device), time.time(), first_step
    model.train()
    stream = iter(loader)
    step = first_step
    while step < total_steps:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, lr, min_lr, warmup_steps, total_steps) * group["lr_scale"]
        momentum = momentum_at(step, total_steps, args.momentum)
        raw_model.follow(momentum)
        for micro in range(args.accum_steps):
            with waiting:
                video, bad = next(stream)
            for path, why in bad:
                if path not in bad_seen:
                    bad_seen.add(path)
                    with open(bad_file, "a") as f:
                        f.write(f"{path}\t{why.removeprefix(path + ': ')}\n")
            reads, bad_reads = reads + args.batch_size + len(bad), bad_reads + len(bad)
            if video is None:
                raise ValueError(f"10 videos in a row could not be read, the last: {bad[-1][1]}")
            video = data.send(video, device)  # (B, 2, T, H, W, C) uint8
            sync = contextlib.nullcontext() if world == 1 or micro == args.accum_steps - 1 else model.no_sync()
            with sync:
                with autocast:
                    loss, spread = model(video)
                scaler.scale(loss / args.accum_steps).backward()
            it = torch.stack([loss.detach(), torch.ones_like(loss)])
            sums += torch.where(torch.isfinite(it).all(), it, 0)
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in params])  # of DDP's average: the same on all ranks
        if args.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(params, args.clip_grad, grad_norm)
        bad_step = ~torch.isfinite(grad_norm)
        skipped, in_row = skipped + bad_step, (in_row + 1) * bad_step
        if scaler.is_enabled():
            scaler.step(optimizer)  # looks for non-finite gradients itself
            scaler.update()
        elif fused:
            optimizer.found_inf = bad_step.float()  # the fused kernel skips the step by itself: no wait for the host
            optimizer.step()
        elif not bad_step:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        stopping = torch.tensor(max(stop, default=0))
        if world > 1:
            dist.all_reduce(stopping, dist.ReduceOp.MAX, group=control)
        if step % args.log_every == 0 or step == total_steps or stopping:
            stats = torch.cat([sums, spread[None]])
            counts = torch.tensor([reads, bad_reads] + [0.0] * world, dtype=torch.float64)
            counts[2 + rank] = waiting.seconds()
            if world > 1:
                dist.all_reduce(stats)
                dist.all_reduce(counts, group=control)
            loss, finite, spread = (stats / world).tolist()
            loss = loss / finite if finite else math.nan
            all_reads, all_bad, *waited = counts.tolist()
            seconds = time.time() - clock
            memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(
                resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            row = dict(step=step, loss=loss, chance=chance, spread=spread, momentum=momentum,
                       lr=optimizer.param_groups[0]["lr"], grad_norm=grad_norm.item(),
                       epoch=step * global_batch / len(paths), clips_per_s=(step - logged) * global_batch / seconds,
                       waiting=max(waited) / seconds, memory_gb=memory / 2**30,
                       seconds_left=(total_steps - step) * seconds / (step - logged), bad_reads=int(all_bad),
                       skipped_steps=int(skipped))
            if rank == 0:
                log(row)
            say(f"step {step}/{total_steps} | loss {loss:.4f} (chance {chance:.3f}) | spread {spread:.2f} | "
                f"momentum {momentum:.4f} | lr {row['lr']:.2e} | grad norm "
                f"{row['grad_norm']:.3f} | {row['clips_per_s']:.1f} videos/s | waiting for data {row['waiting']:.0%} | "
                f"{row['memory_gb']:.2f} GB | {datetime.timedelta(seconds=round(row['seconds_left']))} left"
                + (f" | {row['skipped_steps']} non-finite steps skipped" if row["skipped_steps"] else "")
                + (f" | {row['bad_reads']} bad reads" if row["bad_reads"] else ""), flush=True)
            if int(in_row) >= MAX_NONFINITE:
                raise ValueError(f"{int(in_row)} steps in a row with a non-finite gradient, at step {step}, "
                                 f"lr {row['lr']:.2e}: lower --lr or use --clip_grad or --dtype fp32; {last} is as "
                                 "last saved")
            if all_reads >= 20 and all_bad / all_reads > args.max_bad:
                save(step)
                raise ValueError(f"{int(all_bad)} of {int(all_reads)} reads failed, more than --max_bad "
                                 f"{args.max_bad}: see {bad_file}; `python data.py check` lists all. {last} is saved "
                                 f"at step {step}")
            sums.zero_()
            clock, logged = time.time(), step
        if step % args.save_every == 0 or step == total_steps or stopping:
            save(step)
        if stopping:
            say(f"stopped by signal {int(stopping)}; saved {last} at step {step}: the same command goes on from there")
            break
    else:
        if first_step >= total_steps:
            say("this run is finished; --no-resume starts it anew")
    if board:
        board.close()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return 128 + int(stopping) if step > first_step and stopping else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as e:
        sys.exit(f"pretrain_moco.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
