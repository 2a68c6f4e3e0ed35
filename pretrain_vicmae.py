"""ViC-MAE pre-training (arXiv 2303.12001): masked reconstruction and contrast, on frames of videos and on images.

    python pretrain_vicmae.py --toy                                          # laptop CPU: minutes
    python pretrain_vicmae.py --data my_videos/ --images my_pictures/ --size small --batch_size 32     # one GPU
    torchrun --nproc_per_node=8 pretrain_vicmae.py --data k400_train.tsv --images imagenet/train --batch_size 64

A sample is two frames of a video or two views of an image. Each is masked by itself and goes through a plain image
ViT; a light decoder reconstructs its hidden patches, and the mean of its visible tokens is drawn, by InfoNCE, to that
of the other view of its sample and away from all others of the batch. The log gives both losses beside what knows
nothing: zeros for the one, ln(views - 1) for the other. finetune.py and eval.py take the checkpoint, for images and
inflated for video.
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
from contrastive import head, info_nce
from model import SIZES, VideoMAE, best_dtype, count_params, param_groups
from pretrain import baselines, lr_at, picture
from weights import image_parts, load_pretrained

MAX_NONFINITE = 20  # steps in a row with a non-finite gradient before the run gives up


def get_args(argv=None) -> argparse.Namespace:
    """The flags, checked as far as that needs no data; an impossible one ends the program and is named."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = argparse.BooleanOptionalAction
    # data
    p.add_argument("--data", nargs="*", default=[], help="videos: list files, folders, or the word toy")
    p.add_argument("--images", nargs="+", default=[], help="pictures: list files or folders, as ImageNet has them")
    p.add_argument("--image_fraction", type=float, help="share of pictures in a batch of both (default: 0.5)")
    p.add_argument("--val_data", nargs="+", help="videos or pictures to draw (default: toy's own, else training's)")
    p.add_argument("--data_root", default="", help="goes before relative paths of a list")
    p.add_argument("--gap_frames", default=32, type=int, help="mean distance of two frames (0: the same one)")
    p.add_argument("--img_size", default=224, type=int, help="pixels, height and width of a view")
    p.add_argument("--crop_area", nargs=2, default=[0.5, 1], type=float, help="share of a frame that a view shows")
    p.add_argument("--image_crop_area", nargs=2, default=[0.2, 1], type=float, help="share of a picture")
    p.add_argument("--color", action=flag, default=False, help="videos too: jitter, grey, blur, solarising")
    p.add_argument("--num_workers", type=int, help="decoding processes per rank (default: cores per rank, at most 10)")
    p.add_argument("--max_bad", default=0.05, type=float, help="stop when more than this share of reads fails")
    # model
    p.add_argument("--size", default="base", choices=list(SIZES))
    p.add_argument("--patch_size", default=16, type=int, help="pixels")
    p.add_argument("--decoder_depth", default=8, type=int, help="blocks")
    p.add_argument("--decoder_width", default=512, type=int)
    p.add_argument("--decoder_heads", default=16, type=int)
    p.add_argument("--proj_width", default=4096, type=int, help="of the projector's hidden layers")
    p.add_argument("--proj_dim", default=128, type=int, help="of what is contrasted")
    p.add_argument("--mask_ratio", default=0.75, type=float, help="share of patches hidden (the public code: 0.5)")
    p.add_argument("--norm_pix_loss", action=flag, default=True, help="targets normalised per patch")
    p.add_argument("--temperature", default=0.1, type=float)
    p.add_argument("--rec_weight", default=1.0, type=float, help="of the reconstruction loss (the public code: 0.97)")
    p.add_argument("--con_weight", default=0.03, type=float, help="lambda, of the contrastive loss")
    p.add_argument("--con_ramp", default=40, type=float, help="epochs over which lambda grows from 0 (public code: 0)")
    p.add_argument("--checkpointing", action=flag, default=False, help="recompute activations: less memory, slower")
    p.add_argument("--init", help="start from these weights (any layout that weights.py reads)")
    # optimisation
    p.add_argument("--batch_size", default=32, type=int, help="videos and pictures per rank and accumulation step")
    p.add_argument("--accum_steps", default=1, type=int, help="batches per optimiser step; negatives are of one batch")
    p.add_argument("--epochs", default=800, type=float)
    p.add_argument("--warmup_epochs", default=40, type=float, help="less than --epochs")
    p.add_argument("--max_steps", type=int, help="optimiser steps instead of epochs; the warm-up keeps its share")
    p.add_argument("--lr", default=1.5e-4, type=float, help="per 256 samples of the global batch")
    p.add_argument("--min_lr", default=0.0, type=float, help="per 256 samples of the global batch")
    p.add_argument("--weight_decay", default=0.05, type=float)
    p.add_argument("--beta2", default=0.95, type=float)
    p.add_argument("--clip_grad", default=0.0, type=float, help="largest gradient norm, 0 = off")
    # run
    p.add_argument("--out_dir", default="out/vicmae")
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
        p.set_defaults(data=["toy"], size="tiny", img_size=32, patch_size=8, batch_size=64, decoder_depth=1,
                       decoder_width=96, decoder_heads=3, proj_width=256, proj_dim=64, gap_frames=8, mask_ratio=0.5,
                       crop_area=[0.8, 1], lr=1.2e-2, con_weight=1.0, epochs=150, warmup_epochs=15, con_ramp=15,
                       log_every=50)
    args = p.parse_args(argv)
    lowest = dict(gap_frames=0, img_size=1, patch_size=1, batch_size=1, accum_steps=1, max_steps=1, log_every=1,
                  save_every=1, vis_every=0, num_workers=0, decoder_depth=1, decoder_width=2, decoder_heads=1,
                  proj_width=1, proj_dim=1, lr=0, min_lr=0, weight_decay=0, clip_grad=0, seed=0, warmup_epochs=0,
                  rec_weight=0, con_weight=0, con_ramp=0)
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
    for name in ("crop_area", "image_crop_area"):
        low, high = getattr(args, name)
        if not 0 < low <= high <= 1:
            p.error(f"--{name} {low} {high}: expected 0 < low <= high <= 1")
    if args.decoder_width % args.decoder_heads or args.temperature <= 0:
        p.error(f"--decoder_width {args.decoder_width}, --decoder_heads {args.decoder_heads}, --temperature "
                f"{args.temperature}: expected a multiple of the heads, and a temperature above 0")
    if not args.data and not args.images:
        p.error("neither --data nor --images: expected videos, pictures or both, or --toy")
    if args.image_fraction is not None and not (args.data and args.images):
        p.error("--image_fraction goes with both --data and --images")
    args.image_fraction = 0.5 if args.image_fraction is None else args.image_fraction
    if not 0 < args.image_fraction < 1:
        p.error(f"--image_fraction {args.image_fraction}: expected a share above 0 and below 1")
    if not args.rec_weight and not args.con_weight:
        p.error("--rec_weight 0 --con_weight 0: nothing would be trained")
    return args


class ViCMAE(VideoMAE):
    """A one-frame VideoMAE with joint targets, and a projector on the mean of the visible tokens."""

    def __init__(self, *args, proj_width=4096, proj_dim=128, temperature=0.1, **kwargs):
        super().__init__(*args, num_frames=1, tubelet_size=1, joint_norm=True, **kwargs)
        self.projector = head(SIZES[self.config["size"]]["width"], proj_width, proj_width, proj_dim)
        self.temperature = temperature
        self.config |= dict(proj_width=proj_width, proj_dim=proj_dim)

    def forward(self, views, mask, num_visible=None):
        """views (B, 2, 1, H, W, C), mask (B, 2, N) -> (reconstruction loss, contrastive loss, number of negatives)."""
        video, mask = (x.transpose(0, 1).flatten(0, 1) for x in (views, mask))  # (2B, ...), view by view
        visible, ids, counts = self.select(mask, None, num_visible)
        x = self.forward_encoder(video, visible)  # (2B, N_vis, D)
        loss = self.forward_loss(video, self.forward_decoder(x, visible, ids), ids, counts)
        z = self.projector(x.mean(1)).unflatten(0, (2, -1))  # (2, B, proj_dim)
        return loss, *info_nce(z, self.temperature)


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
    if args.toy and device.type == "cpu":
        torch.set_num_threads(1)  # in so small a model two wait for each other: 460 samples/s against 317
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
    toy = "toy" in args.data + args.images + (args.val_data or [])
    if toy and local_rank == 0:
        data.make_toy_shapes()
    if world > 1:
        dist.barrier()

    def read(sources, toy_part):
        found = [p for s in sources for p in data.read_videos(toy_part if s == "toy" else s, args.data_root)[0]]
        return [p for p in found if not os.path.abspath(p).startswith(os.path.abspath(args.out_dir) + os.sep)]
    paths, images = read(args.data, "toy_shapes/train"), read(args.images, "toy_shapes/train")
    val_data = args.val_data or (["toy"] if toy else [])
    val_paths = read(val_data, "toy_shapes/val") if val_data else paths or images
    if not paths + images or not val_paths:
        raise ValueError(f"no videos in {args.data if not paths else val_data} outside --out_dir {args.out_dir}")
    num_images = args.batch_size * (not paths)  # in a batch of a rank
    if paths and images:
        num_images = round(args.batch_size * args.image_fraction)
        if not 0 < num_images < args.batch_size:
            raise ValueError(f"--image_fraction {args.image_fraction}: {num_images} of the {args.batch_size} samples "
                             "of a batch would be pictures; expected at least one of each kind")
    clip = dict(size=(args.img_size, args.img_size), gap=args.gap_frames, area=args.crop_area, color=args.color,
                image_area=args.image_crop_area, seed=args.seed)
    train_set = data.ViewPairs(paths, images, **clip)
    global_batch = args.batch_size * args.accum_steps * world
    count = len(paths) + len(images)
    total_steps = args.max_steps or max(1, int(args.epochs * count / global_batch))
    if args.batch_size * world < 2:
        raise ValueError("--batch_size 1 on one rank: nothing to contrast with, expected at least 2")
    warmup_steps = int(total_steps * args.warmup_epochs / args.epochs)
    ramp_steps = int(total_steps * args.con_ramp / args.epochs)

    # ---- model
    model = ViCMAE(args.size, img_size=args.img_size, patch_size=args.patch_size, dec_depth=args.decoder_depth,
                   dec_width=args.decoder_width, dec_heads=args.decoder_heads, norm_pix_loss=args.norm_pix_loss,
                   checkpointing=args.checkpointing, proj_width=args.proj_width, proj_dim=args.proj_dim,
                   temperature=args.temperature, **image_parts(args.init, num_frames=1, tubelet_size=1))
    num_visible = math.prod(model.grid) - masking.num_masked("tube", model.grid, args.mask_ratio)

    # ---- resume: the run in out_dir goes on if it is this one
    last, log_file = os.path.join(args.out_dir, "last.pt"), os.path.join(args.out_dir, "log.jsonl")
    free = {"out_dir", "resume", "num_workers", "log_every", "save_every", "vis_every", "tensorboard", "max_bad", "toy",
            "init", "device", "compile", "checkpointing", "batch_size", "accum_steps", "data", "data_root", "val_data",
            "images"}
    run = {k: v for k, v in vars(args).items() if k not in free}  # what may not change within a run
    names = ["/".join(p.replace(os.sep, "/").split("/")[-2:]) for p in paths + images]
    run |= dict(dtype=dtype_name, global_batch=global_batch, contrasted=args.batch_size * world,
                videos=f"{len(paths)} + {len(images)} ({zlib.crc32(chr(10).join(names).encode()):08x})")
    first_step, saved, changed = 0, None, []
    if args.resume and not os.path.exists(last):
        raise ValueError(f"--resume: there is no {last}")
    if os.path.exists(last) and args.resume is not False:
        try:
            saved = torch.load(last, map_location="cpu", weights_only=True)
            saved["args"]["con_ramp"]  # other scripts have none
            changed = [f"{k} {saved['args'].get(k)} -> {v}" for k, v in run.items() if saved["args"].get(k) != v]
            finished = saved["step"] >= saved["args"]["total_steps"]
            free_config = ("pos_grid", "encoder_norm")  # --init may have set them
            differ = [k for k, v in model.config.items() if k not in free_config and saved["config"].get(k, v) != v]
        except Exception as e:  # torch raises whatever the broken bytes lead to
            raise ValueError(f"{last}: not a checkpoint of pretrain_vicmae.py ({e}); --no-resume moves it "
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

    stream_of = lambda n, size: n and data.Batches(n, size, args.accum_steps, rank, world, first_step, total_steps,
                                                   args.seed)
    batches = data.MixedBatches(stream_of(len(paths), args.batch_size - num_images), stream_of(len(images), num_images))
    loader = torch.utils.data.DataLoader(
        train_set, batch_sampler=batches, num_workers=num_workers, collate_fn=data.collate,
        worker_init_fn=data.ignore_signals, pin_memory=device.type == "cuda",
        prefetch_factor=2 if num_workers else None)

    negatives = 2 * args.batch_size * world - 2
    chance = math.log(negatives + 1)
    say(f"{len(paths)} videos, {len(images)} pictures ({num_images} of {args.batch_size} samples in a rank's batch), "
        f"{args.size} with {count_params(raw_model) / 1e6:.1f} M parameters, token grid "
        f"{'x'.join(map(str, raw_model.grid))}, {num_visible} of {math.prod(raw_model.grid)} tokens of a view visible; "
        f"{world} rank(s) x {args.batch_size} samples x {args.accum_steps} = batch {global_batch}, {total_steps} steps "
        f"= {total_steps * global_batch / count:.1f} epochs, peak lr {lr:.2e}, {device.type} {dtype_name}, "
        f"{num_workers} workers")
    say(f"each view is contrasted with {negatives} others, chance level ln({negatives + 1}) = {chance:.3f}"
        + ("; --accum_steps adds samples to a step, not negatives" if args.accum_steps > 1 else ""))
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
                         step=step, epoch=step * global_batch / count, config=raw_model.config, classes=None,
                         args=vars(args) | run | dict(total_steps=total_steps),
                         rng=dict(seed=args.seed))  # all draws follow from the seed and step, epoch, index
            with open(last + ".part", "wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(last + ".part", last)

    def draw(step):
        """Pictures of the first readable validation videos, always the same clips and masks."""
        shown = data.PretrainClips(val_paths, 1, (args.img_size,) * 2, 1, crop_scales=[1], seed=args.seed)
        samples = [shown[0, i] for i in np.linspace(0, len(val_paths) - 1, min(8, len(val_paths))).astype(int)]
        video, bad = data.collate(samples)
        if video is None:
            return say(f"no picture: {bad[-1][1]}")
        video = video.to(device)
        fixed = torch.Generator().manual_seed(0)
        mask = masking.make_mask("tube", len(video), raw_model.grid, args.mask_ratio, fixed).to(device)
        with autocast:
            loss, image = picture(raw_model, video, mask)
        path = os.path.join(args.out_dir, f"vis_{step:07d}.png")
        data.write_png(path, image)
        zeros, mean = baselines(raw_model, video, mask)
        say(f"{path}: {len(video)} frames, reconstruction loss {loss:.4f} (zeros {zeros:.4f}, visible mean {mean:.4f})")

    # ---- loop
    stop = []  # signals received
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: os._exit(128 + number) if number in stop else stop.append(number))
    generator = torch.Generator(device=device)
    sums = torch.zeros(3, device=device)  # of the batches since the last log line with finite losses: both, how many
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
        # masks of the whole global batch from (seed, step), videos before pictures: the same on any number of ranks
        generator.manual_seed(args.seed * 1_000_003 + step)
        masks = masking.make_mask("tube", 2 * global_batch, raw_model.grid, args.mask_ratio, generator, device)
        masks = masks.unflatten(0, (global_batch, 2))  # (B, 2, N)
        con_weight = args.con_weight * min(1, step / max(ramp_steps, 1)) if ramp_steps else args.con_weight
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
            kinds, place = (len(video) - num_images, num_images), micro * world + rank
            starts = place * kinds[0], global_batch // len(video) * kinds[0] + place * kinds[1]
            mask = torch.cat([masks[start:start + n] for start, n in zip(starts, kinds)])
            sync = contextlib.nullcontext() if world == 1 or micro == args.accum_steps - 1 else model.no_sync()
            with sync:
                with autocast:
                    rec, con, spread = model(video, mask, num_visible)
                loss = args.rec_weight * rec + con_weight * con
                scaler.scale(loss / args.accum_steps).backward()
            both = torch.stack([rec.detach().float(), con.detach(), torch.ones_like(con)])
            sums += torch.where(torch.isfinite(both).all(), both, 0)
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
            zeros, _ = baselines(raw_model, video.flatten(0, 1), mask.flatten(0, 1))
            stats = torch.cat([sums, torch.stack([zeros, spread])])
            counts = torch.tensor([reads, bad_reads] + [0.0] * world, dtype=torch.float64)
            counts[2 + rank] = waiting.seconds()
            if world > 1:
                dist.all_reduce(stats)
                dist.all_reduce(counts, group=control)
            *losses, finite, zeros, spread = (stats / world).tolist()
            rec, con = (x / finite if finite else math.nan for x in losses)
            loss = args.rec_weight * rec + con_weight * con
            all_reads, all_bad, *waited = counts.tolist()
            seconds = time.time() - clock
            memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(
                resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            row = dict(step=step, loss=loss, rec=rec, zeros=zeros, con=con, chance=chance, con_weight=con_weight,
                       spread=spread, lr=optimizer.param_groups[0]["lr"], grad_norm=grad_norm.item(),
                       epoch=step * global_batch / count, clips_per_s=(step - logged) * global_batch / seconds,
                       waiting=max(waited) / seconds, memory_gb=memory / 2**30,
                       seconds_left=(total_steps - step) * seconds / (step - logged), bad_reads=int(all_bad),
                       skipped_steps=int(skipped))
            if rank == 0:
                log(row)
            say(f"step {step}/{total_steps} | reconstruction {rec:.4f} (zeros {zeros:.4f}) | contrast {con:.4f} "
                f"(chance {chance:.3f}) x {con_weight:.3g} | spread {spread:.2f} | lr {row['lr']:.2e} | grad norm "
                f"{row['grad_norm']:.3f} | {row['clips_per_s']:.1f} samples/s | waiting for data {row['waiting']:.0%} "
                f"| {row['memory_gb']:.2f} GB | {datetime.timedelta(seconds=round(row['seconds_left']))} left"
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
        sys.exit(f"pretrain_vicmae.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
