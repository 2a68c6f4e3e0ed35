"""Masked video pre-training (VideoMAE, arXiv 2203.12602, section 3): predict the 90 % of a clip that is hidden.

    python pretrain.py --toy                                       # laptop CPU: minutes, on videos it writes itself
    python pretrain.py --data my_videos/ --size small --batch_size 32 --accum_steps 8      # one GPU, a folder of videos
    torchrun --nproc_per_node=8 pretrain.py --data k400_train.csv --epochs 800             # 8 GPUs, the paper's ViT-B

The log gives the loss beside two baselines: what predicting zeros scores (511/512 with the paper's target on textured
video) and what predicting the mean visible cube scores. A loss that stays at a baseline has learnt nothing.
<out_dir>/vis_*.png shows what the model reconstructs, log.jsonl has the curve, last.pt is the checkpoint; the same
command goes on from it.
"""

import argparse
import contextlib
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

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import masking
from model import SIZES, VideoMAE, best_dtype, count_params, param_groups, patchify, to_unit, unpatchify
from weights import image_parts, load_pretrained

MAX_NONFINITE = 20  # steps in a row with a non-finite gradient before the run gives up


def get_args(argv=None) -> argparse.Namespace:
    """The flags, checked as far as that needs no data; an impossible one ends the program and is named."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = argparse.BooleanOptionalAction
    # data
    p.add_argument("--data", nargs="+", default=["toy"], help="list files, folders, or the word toy")
    p.add_argument("--val_data", nargs="+", help="videos for the pictures (default: toy's own, else training videos)")
    p.add_argument("--data_root", default="", help="goes before relative paths of a list")
    p.add_argument("--num_frames", default=16, type=int, help="frames per clip")
    p.add_argument("--sampling_rate", default=4, type=int, help="frames from one sampled frame to the next (SSv2: 2)")
    p.add_argument("--fps", type=float, help="sample by time instead: frames per second of the clip")
    p.add_argument("--sampling", default="dense", choices=["dense", "sparse"],
                   help="sparse: one frame of each of num_frames equal segments")
    p.add_argument("--img_size", default=224, type=int, help="pixels, height and width of a clip")
    p.add_argument("--crop_scales", nargs="+", default=[1, 0.875, 0.75, 0.66], type=float,
                   help="crop sides over the short side")
    p.add_argument("--flip", action=flag, default=False, help="horizontal flip of half the clips")
    p.add_argument("--repeat_aug", default=1, type=int, help="clips from one decoded video; batch_size counts videos")
    p.add_argument("--num_workers", type=int, help="decoding processes per rank (default: cores per rank, at most 10)")
    p.add_argument("--max_bad", default=0.05, type=float, help="stop when more than this share of reads fails")
    # model
    p.add_argument("--size", default="base", choices=list(SIZES))
    p.add_argument("--patch_size", default=16, type=int, help="pixels")
    p.add_argument("--tubelet_size", default=2, type=int, help="frames per cube")
    p.add_argument("--decoder_depth", type=int, help="blocks (default: the size's)")
    p.add_argument("--mask_type", default="tube", choices=["tube", "random", "frame"])
    p.add_argument("--mask_ratio", default=0.9, type=float, help="share of cubes hidden from the encoder")
    p.add_argument("--decoder_mask_ratio", default=0.0, type=float, help="not decoded: 0 (off), .25, .5 (v2), .75")
    p.add_argument("--norm_pix_loss", action=flag, default=True, help="targets normalised per cube and channel")
    p.add_argument("--target", default="clip", choices=["clip", "center", "dense"],
                   help="what is reconstructed: the clip, its centre frame, or twice its frames (the paper's ablation)")
    p.add_argument("--checkpointing", action=flag, default=False, help="recompute activations: less memory, slower")
    p.add_argument("--init", help="start from these weights (any layout that weights.py reads)")
    # optimisation
    p.add_argument("--batch_size", default=32, type=int, help="videos per rank and accumulation step")
    p.add_argument("--accum_steps", default=1, type=int, help="batches per optimiser step")
    p.add_argument("--epochs", default=800, type=float)
    p.add_argument("--warmup_epochs", default=40, type=float, help="less than --epochs")
    p.add_argument("--max_steps", type=int, help="optimiser steps instead of epochs; the warm-up keeps its share")
    p.add_argument("--lr", default=1.5e-4, type=float, help="per 256 videos of the global batch")
    p.add_argument("--min_lr", default=1e-5, type=float, help="per 256 videos of the global batch")
    p.add_argument("--weight_decay", default=0.05, type=float)
    p.add_argument("--beta2", default=0.95, type=float)
    p.add_argument("--clip_grad", default=0.0, type=float, help="largest gradient norm, 0 = off")
    # run
    p.add_argument("--out_dir", default="out/pretrain")
    p.add_argument("--seed", default=0, type=int)
    p.add_argument("--device", help="cuda, cpu or mps (default: the first there is)")
    p.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="(default: bf16 where the hardware has it)")
    p.add_argument("--compile", action=flag, default=False, help="torch.compile the model")
    p.add_argument("--resume", action=flag, help="continue from out_dir (default: if it holds this very run)")
    p.add_argument("--log_every", default=10, type=int, help="steps")
    p.add_argument("--save_every", default=500, type=int, help="steps")
    p.add_argument("--vis_every", default=2000, type=int, help="steps between pictures, 0 = only at the end")
    p.add_argument("--tensorboard", action=flag, default=False, help="also write event files")
    p.add_argument("--toy", action="store_true", help="presets for minutes on two CPU cores; other flags still win")
    if p.parse_known_args(argv)[0].toy:
        p.set_defaults(size="tiny", img_size=32, patch_size=8, num_frames=8, sampling_rate=1, crop_scales=[1],
                       repeat_aug=2, batch_size=32, mask_ratio=0.75, decoder_depth=1, lr=1.2e-2, min_lr=1e-4,
                       epochs=70, warmup_epochs=7, log_every=20)
    args = p.parse_args(argv)
    lowest = dict(num_frames=1, sampling_rate=1, img_size=1, patch_size=1, tubelet_size=1, repeat_aug=1, batch_size=1,
                  accum_steps=1, max_steps=1, log_every=1, save_every=1, vis_every=0, num_workers=0, decoder_depth=1,
                  lr=0, min_lr=0, weight_decay=0, clip_grad=0, seed=0, warmup_epochs=0)
    for name, low in lowest.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            p.error(f"--{name} {getattr(args, name)}: expected at least {low}")
    for name, value in vars(args).items():
        if not all(math.isfinite(x) for x in (value if isinstance(value, list) else [value]) if isinstance(x, float)):
            p.error(f"--{name} {value}: expected a finite number")
    if args.epochs <= args.warmup_epochs:
        p.error(f"--epochs {args.epochs:g}: expected more than --warmup_epochs {args.warmup_epochs:g}")
    if args.fps is not None and args.fps <= 0:
        p.error(f"--fps {args.fps}: expected more than 0")
    if args.sampling == "sparse" and args.fps:
        p.error("--sampling sparse spans the whole video: leave out --fps")
    if not 0 <= args.max_bad <= 1 or args.seed >= 2**31:
        p.error(f"--max_bad {args.max_bad}, --seed {args.seed}: expected a share in [0, 1] and a seed below 2^31")
    if args.decoder_mask_ratio not in (0, 0.25, 0.5, 0.75):
        p.error(f"--decoder_mask_ratio {args.decoder_mask_ratio}: expected 0 (off), 0.25, 0.5 or 0.75: cells are 2x2")
    if not all(0 < s <= 1 for s in args.crop_scales):
        p.error(f"--crop_scales {args.crop_scales}: expected numbers in (0, 1]")
    if args.target == "dense" and (args.sampling == "dense" and not args.fps and args.sampling_rate % 2):
        p.error(f"--target dense needs an even --sampling_rate (here {args.sampling_rate}): it also reads between")
    if args.target == "center" and args.decoder_mask_ratio:
        p.error("--target center decodes one temporal slot only: leave out --decoder_mask_ratio")
    return args


def lr_at(step: int, peak: float, floor: float, warmup: int, total: int) -> float:
    """Learning rate of a step (0-based): linear from 0 over the warm-up, then half a cosine to the floor."""
    if step < warmup:
        return peak * step / warmup
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


@torch.no_grad()
def baselines(model, video, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of predicting zeros, and of predicting the mean visible cube of the clip, on the targets of this batch."""
    ids = torch.arange(mask.shape[1], device=mask.device).expand(len(mask), -1)
    if model.target == "center":
        ids = model.select(mask)[1]
    masked = mask.gather(1, ids)[..., None]  # (B, M, 1)
    target = model.targets(video, ids)  # (B, M, P)
    mean = (target * ~masked).sum(1, keepdim=True) / (~masked).sum(1, keepdim=True).clamp(min=1)  # (B, 1, P)
    score = lambda guess: ((target - guess).square() * masked).sum() / (masked.sum().clamp(min=1) * target.shape[2])
    return score(0), score(mean)


@torch.no_grad()
def reconstruct(model, video, mask):
    """-> (loss, original, masked, own, true): videos (B, T, H, W, C) in [0,1] of the frames that are to be predicted.

    With normalised targets a prediction has no brightness and contrast. `own` takes those of the clip's visible cubes
    on average, all that the model was shown; `true` takes each hidden cube's own mean and variance, as published
    pictures do, which flatters.
    """
    loss, pred = VideoMAE.forward(model, video, mask)  # (B, M, P); pretrain_vicmae.py gives a subclass
    ids, grid = model.select(mask)[1], model.grid
    hidden = mask
    if model.target == "center":
        middle = video.shape[1] // 2
        hidden, ids = mask.gather(1, ids), ids - ids[:, :1]
        video, grid = video[:, middle:middle + 1], (1, *model.grid[1:])
    cubes = to_unit(patchify(video, model.target_cube)).unflatten(2, (-1, 3))  # (B, N, p, C)
    over = (2, 3) if model.joint_norm else 2  # what the targets are normalised over
    mean, std = cubes.mean(over, keepdim=True), cubes.std(over, keepdim=True)  # (B, N, 1, C or 1)
    seen = ~hidden[:, :, None, None]
    average = lambda x: (x * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)  # over visible cubes
    guess = torch.zeros_like(cubes).flatten(2).scatter_(1, ids[..., None].expand_as(pred), pred.float())
    guess = guess.unflatten(2, (-1, 3))
    own, true = (guess * average(std) + average(mean), guess * std + mean) if model.norm_pix_loss else (guess, guess)
    grey = torch.full_like(cubes, 0.5)
    back = lambda x: unpatchify(torch.where(seen, cubes, x).flatten(2).clamp(0, 1), grid, model.target_cube)
    return loss, back(cubes), back(grey), back(own), back(true)


def picture(model, video, mask, columns: int = 8) -> tuple[float, np.ndarray]:
    """-> loss, and an (H, W, 3) uint8 picture: four labelled rows per clip, up to `columns` frames each."""
    loss, *videos = reconstruct(model, video, mask)
    labels = ["input", f"masked {mask.float().mean():.0%}"] + (
        ["prediction + mean and contrast of the visible cubes", "prediction + true mean and contrast (flatters)"]
        if model.norm_pix_loss else ["prediction"])
    if videos[0].shape[1] == 1:  # single frames stand side by side
        videos = [v.transpose(0, 1) for v in videos]
    rows = []
    for clip in range(len(videos[0])):
        for label, v in zip(labels, videos):
            rows.append(data.strip((v[clip] * 255).round().byte().cpu().numpy(), label, columns))
    return loss.item(), np.concatenate(rows)


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
    toy = "toy" in args.data + (args.val_data or [])
    if toy and local_rank == 0:
        data.make_toy()
    if world > 1:
        dist.barrier()

    def read(sources, toy_part):
        found = [p for s in sources for p in data.read_videos(toy_part if s == "toy" else s, args.data_root)[0]]
        return [p for p in found if not os.path.abspath(p).startswith(os.path.abspath(args.out_dir) + os.sep)]
    paths = read(args.data, "toy/train")
    val_data = args.val_data or (["toy"] if toy else [])
    val_paths = read(val_data, "toy/val") if val_data else paths
    if not paths or not val_paths:
        raise ValueError(f"no videos in {args.data if not paths else val_data} outside --out_dir {args.out_dir}")
    dense = args.target == "dense"  # twice the frames at half the distance
    clip = dict(num_frames=args.num_frames * (1 + dense), size=(args.img_size, args.img_size), sampling=args.sampling,
                stride=args.sampling_rate // (1 + dense), fps=args.fps and args.fps * (1 + dense),
                crop_scales=args.crop_scales, seed=args.seed)
    train_set = data.PretrainClips(paths, repeat_aug=args.repeat_aug, flip=args.flip, **clip)
    global_batch = args.batch_size * args.accum_steps * world
    total_steps = args.max_steps or max(1, int(args.epochs * len(paths) / global_batch))
    warmup_steps = int(total_steps * args.warmup_epochs / args.epochs)

    # ---- model
    model = VideoMAE(args.size, args.num_frames, args.img_size, args.patch_size, args.tubelet_size, args.decoder_depth,
                     args.norm_pix_loss, args.target, args.checkpointing,
                     **image_parts(args.init, num_frames=args.num_frames, tubelet_size=args.tubelet_size))
    num_visible = math.prod(model.grid) - masking.num_masked(args.mask_type, model.grid, args.mask_ratio)
    num_decoded = None
    if args.decoder_mask_ratio:
        num_decoded = math.prod(model.grid) - masking.num_masked("running_cell", model.grid, args.decoder_mask_ratio)

    # ---- resume: the run in out_dir goes on if it is this one
    last, log_file = os.path.join(args.out_dir, "last.pt"), os.path.join(args.out_dir, "log.jsonl")
    free = {"out_dir", "resume", "num_workers", "log_every", "save_every", "vis_every", "tensorboard", "max_bad", "toy",
            "init", "device", "compile", "checkpointing", "batch_size", "accum_steps", "data", "data_root", "val_data"}
    run = {k: v for k, v in vars(args).items() if k not in free}  # what may not change within a run
    names = ["/".join(p.replace(os.sep, "/").split("/")[-2:]) for p in paths]
    run |= dict(dtype=dtype_name, global_batch=global_batch,
                videos=f"{len(paths)} ({zlib.crc32(chr(10).join(names).encode()):08x})")
    first_step, saved, changed = 0, None, []
    if args.resume and not os.path.exists(last):
        raise ValueError(f"--resume: there is no {last}")
    if os.path.exists(last) and args.resume is not False:
        try:
            saved = torch.load(last, map_location="cpu", weights_only=True)
            changed = [f"{k} {saved['args'].get(k)} -> {v}" for k, v in run.items() if saved["args"].get(k) != v]
            finished = saved["step"] >= saved["args"]["total_steps"]
            free_config = ("pos_grid", "encoder_norm")  # --init may have set them
            differ = [k for k, v in model.config.items() if k not in free_config and saved["config"].get(k, v) != v]
        except Exception as e:  # torch raises whatever the broken bytes lead to
            raise ValueError(f"{last}: not a checkpoint of pretrain.py ({e}); --no-resume moves it aside") from None
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
        if not saved["config"]["encoder_norm"]:
            model.encoder.norm = torch.nn.Identity()
        model.set_positions(saved["config"]["pos_grid"])
        model.config = saved["config"]
        model.load_state_dict(saved["model"])
        first_step = saved["step"]
        say(f"resumed {last} at step {first_step} of {total_steps}")
    elif args.init:
        load_pretrained(model, args.init, verbose=rank == 0)
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
    loader = torch.utils.data.DataLoader(
        train_set, batch_sampler=batches, num_workers=num_workers, collate_fn=data.collate,
        worker_init_fn=data.ignore_signals, pin_memory=device.type == "cuda",
        prefetch_factor=2 if num_workers else None)

    say(f"{len(paths)} videos, {args.size} with {count_params(raw_model) / 1e6:.1f} M parameters, "
        f"token grid {'x'.join(map(str, raw_model.grid))}, {num_visible} of {math.prod(raw_model.grid)} tokens visible"
        f"{f', {num_decoded} decoded' if num_decoded else ''}; "
        f"{world} rank(s) x {args.batch_size} videos x {args.accum_steps} = batch {global_batch}"
        f"{f' (x {args.repeat_aug} clips)' if args.repeat_aug > 1 else ''}, {total_steps} steps = "
        f"{total_steps * global_batch / len(paths):.1f} epochs, peak lr {lr:.2e}, {device.type} {dtype_name}, "
        f"{num_workers} workers")
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

    def draw(step):
        """Pictures of the first readable validation videos, always the same clips and masks."""
        val_set = data.PretrainClips(val_paths, **(clip | dict(crop_scales=[1])))
        samples = [val_set[0, i] for i in np.linspace(0, len(val_paths) - 1, min(4, len(val_paths))).astype(int)]
        video, bad = data.collate(samples)
        if video is None:
            return say(f"no picture: {bad[-1][1]}")
        video = video.to(device)
        fixed = torch.Generator().manual_seed(0)
        mask = masking.make_mask(args.mask_type, len(video), raw_model.grid, args.mask_ratio, fixed).to(device)
        with autocast:
            loss, image = picture(raw_model, video, mask)
        path = os.path.join(args.out_dir, f"vis_{step:07d}.png")
        data.write_png(path, image)
        zeros, mean = baselines(raw_model, video, mask)
        say(f"{path}: {len(video)} clips, loss {loss:.4f} (zeros {zeros:.4f}, visible mean {mean:.4f})")

    # ---- loop
    stop = []  # signals received
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: os._exit(128 + number) if number in stop else stop.append(number))
    generator = torch.Generator(device=device)
    loss_sum, finite = torch.zeros((2,), device=device)  # of the batches since the last log line with a finite loss
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
        # masks of the whole global batch from (seed, step): the same on any number of ranks and accumulation steps
        generator.manual_seed(args.seed * 1_000_003 + step)
        clips_in_all = global_batch * args.repeat_aug
        masks = masking.make_mask(args.mask_type, clips_in_all, raw_model.grid, args.mask_ratio, generator, device)
        decoder_masks = None
        if num_decoded:
            decoder_masks = masking.make_mask("running_cell", clips_in_all, raw_model.grid, args.decoder_mask_ratio,
                                              generator, device)
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
            video = data.send(video, device)  # (B, T, H, W, C) uint8
            rows = slice((micro * world + rank) * len(video), (micro * world + rank + 1) * len(video))
            mask, decoder_mask = masks[rows], None if decoder_masks is None else decoder_masks[rows]
            sync = contextlib.nullcontext() if world == 1 or micro == args.accum_steps - 1 else model.no_sync()
            with sync:
                with autocast:
                    loss, _ = model(video, mask, decoder_mask, num_visible, num_decoded)
                scaler.scale(loss / args.accum_steps).backward()
            loss_sum += torch.nan_to_num(loss.detach(), 0, 0, 0)
            finite += torch.isfinite(loss.detach())
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
            zeros, mean = baselines(raw_model, video, mask)
            stats = torch.stack([loss_sum, finite, zeros, mean]).float()
            counts = torch.tensor([reads, bad_reads] + [0.0] * world, dtype=torch.float64)
            counts[2 + rank] = waiting.seconds()
            if world > 1:
                dist.all_reduce(stats)
                dist.all_reduce(counts, group=control)
            loss_total, finite_batches, zeros, mean = (stats / world).tolist()
            loss = loss_total / finite_batches if finite_batches else math.nan
            all_reads, all_bad, *waited = counts.tolist()
            seconds = time.time() - clock
            memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(
                resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            row = dict(step=step, loss=loss, zeros=zeros, visible_mean=mean, lr=optimizer.param_groups[0]["lr"],
                       grad_norm=grad_norm.item(), epoch=step * global_batch / len(paths),
                       clips_per_s=(step - logged) * clips_in_all / seconds, waiting=max(waited) / seconds,
                       memory_gb=memory / 2**30, seconds_left=(total_steps - step) * seconds / (step - logged),
                       bad_reads=int(all_bad), skipped_steps=int(skipped))
            if rank == 0:
                log(row)
            say(f"step {step}/{total_steps} | loss {loss:.4f} (zeros {zeros:.4f}, visible mean {mean:.4f}) | "
                f"lr {row['lr']:.2e} | grad norm {row['grad_norm']:.3f} | {row['clips_per_s']:.1f} clips/s | "
                f"waiting for data {row['waiting']:.0%} | {row['memory_gb']:.2f} GB | "
                f"{datetime.timedelta(seconds=round(row['seconds_left']))} left"
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
            loss_sum.zero_()
            finite.zero_()
            clock, logged = time.time(), step
        if step % args.save_every == 0 or step == total_steps or stopping:
            save(step)
        if stopping:
            say(f"stopped by signal {int(stopping)}; saved {last} at step {step}: the same command goes on from there")
            break
        if rank == 0 and (step == total_steps or args.vis_every and step % args.vis_every == 0):
            draw(step)
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
        sys.exit(f"pretrain.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
