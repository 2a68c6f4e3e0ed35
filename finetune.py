"""Supervised fine-tuning for action recognition (VideoMAE, arXiv 2203.12602, section 4 and appendix).

    python finetune.py --toy --init out/pretrain/last.pt            # laptop CPU: minutes; without --init: from scratch
    python finetune.py --init out/pretrain/last.pt --data train.tsv --val_data val.tsv --batch_size 8 --accum_steps 4
    torchrun --nproc_per_node=8 finetune.py --init out/pretrain/last.pt --data k400_train.tsv --val_data k400_val.tsv
    torchrun --nproc_per_node=8 finetune.py --linear_probe --init out/pretrain/last.pt --data ssv2_train.tsv ...

The log gives the loss beside log(number of classes), what uniform guessing costs; mixed and smoothed labels keep it
well above 0. After each epoch the validation videos are classified from one central view; eval.py tests with many.
<out_dir>/last.pt goes on with the same command, best.pt has the weights of the best epoch, log.jsonl the curves.
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
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import augment
import data
from eval import TestVideos, run_views, scores
from model import SIZES, VideoClassifier, best_dtype, count_params, param_groups, to_unit
from weights import encoder_shape, load_pretrained

MAX_NONFINITE = 20  # steps in a row with a non-finite gradient before the run gives up


def get_args(argv=None) -> argparse.Namespace:
    """The flags, checked as far as that needs no data; an impossible one ends the program and is named."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = argparse.BooleanOptionalAction
    # data
    p.add_argument("--data", nargs="+", default=["toy"], help="list files, folders by class, or the word toy")
    p.add_argument("--val_data", nargs="+", help="list files or folders, classified after each epoch (toy: its own)")
    p.add_argument("--data_root", default="", help="goes before relative paths of a list")
    p.add_argument("--per_class", type=int, help="train on this many videos of each class only, the first in the list")
    p.add_argument("--num_frames", type=int, help="frames per clip (default: those of --init, else 16)")
    p.add_argument("--sampling_rate", default=4, type=int, help="a clip spans num_frames * this many frames")
    p.add_argument("--fps", type=float, help="resample videos to this many frames per second first")
    p.add_argument("--sampling", default="dense", choices=["dense", "sparse"],
                   help="dense: a window of the video; sparse (SSv2): one frame of each of num_frames segments")
    p.add_argument("--img_size", type=int, help="pixels, height and width of a clip (default: --init's, else 224)")
    p.add_argument("--max_side", default=320, type=int, help="reduce larger videos to this short side first, 0 = never")
    p.add_argument("--num_workers", type=int, help="decoding processes per rank (default: cores per rank, at most 10)")
    p.add_argument("--max_bad", default=0.05, type=float, help="stop when more than this share of reads fails")
    # augmentation
    p.add_argument("--repeat_aug", default=1, type=int, help="clips from one decoded video; batch_size counts videos")
    p.add_argument("--rand_aug", nargs=3, default=[4, 7, 0.5], type=float, metavar=("N", "M", "STD"),
                   help="RandAugment: operations, magnitude 0 to 10, its standard deviation; N = 0: off")
    p.add_argument("--crop_area", nargs=2, default=[0.08, 1], type=float, help="share of the frame that a crop covers")
    p.add_argument("--crop_aspect", nargs=2, default=[0.75, 4 / 3], type=float, help="width over height of a crop")
    p.add_argument("--flip", action=flag, default=True, help="mirror half the clips; --no-flip where sides are labels")
    p.add_argument("--reprob", default=0.25, type=float, help="probability of random erasing")
    p.add_argument("--mixup", default=0.8, type=float, help="alpha, 0 = off")
    p.add_argument("--cutmix", default=1.0, type=float, help="alpha, 0 = off")
    p.add_argument("--switch_prob", default=0.5, type=float, help="share of cutmix where both are on")
    p.add_argument("--smoothing", default=0.1, type=float, help="of the labels")
    # model
    p.add_argument("--init", help="start from these weights (any layout that weights.py reads); without: from scratch")
    p.add_argument("--size", choices=list(SIZES), help="(default: --init's, else base)")
    p.add_argument("--patch_size", type=int, help="pixels (default: --init's, else 16)")
    p.add_argument("--tubelet_size", type=int, 
                   help="frames per cube (default: --init's, else 2)")
    p.add_argument("--drop_path", default=0.1, type=float, help="stochastic depth of the last block")
    p.add_argument("--head_dropout", default=0.0, type=float)
    p.add_argument("--checkpointing", action=flag, default=False, help="recompute activations: less memory, slower")
    p.add_argument("--linear_probe", action="store_true",
                   help="train a linear head on the frozen encoder; presets: SGD as in the paper, crops and flips only")
    p.add_argument("--freeze", default=0, type=int, help="keep the patch embedding and the first N blocks as they are")
    p.add_argument("--ema", default=0.0, type=float, help="decay of averaged weights, which are then tested; 0 = off")
    # optimisation
    p.add_argument("--batch_size", default=16, type=int, help="videos per rank and accumulation step")
    p.add_argument("--accum_steps", default=1, type=int, help="batches per optimiser step")
    p.add_argument("--epochs", default=100, type=float)
    p.add_argument("--warmup_epochs", default=5, type=float, help="less than --epochs")
    p.add_argument("--max_steps", type=int, help="optimiser steps instead of epochs; the warm-up keeps its share")
    p.add_argument("--lr", default=1e-3, type=float, help="per 256 videos of the global batch")
    p.add_argument("--min_lr", default=1e-6, type=float, help="per 256 videos of the global batch")
    p.add_argument("--layer_decay", type=float,
                   help="factor on the learning rate per block down (default: .75, from scratch 1)")
    p.add_argument("--weight_decay", default=0.05, type=float)
    p.add_argument("--beta2", default=0.999, type=float)
    p.add_argument("--clip_grad", default=0.0, type=float, help="largest gradient norm, 0 = off")
    # run
    p.add_argument("--out_dir", default="out/finetune")
    p.add_argument("--seed", default=0, type=int)
    p.add_argument("--device", help="cuda, cpu or mps (default: the first there is)")
    p.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="(default: bf16 where the hardware has it)")
    p.add_argument("--compile", action=flag, default=False, help="torch.compile the model")
    p.add_argument("--resume", action=flag, help="continue from out_dir (default: if it holds this very run)")
    p.add_argument("--log_every", default=10, type=int, help="steps")
    p.add_argument("--save_every", default=500, type=int, help="steps")
    p.add_argument("--eval_every", default=1, type=float, help="epochs between validations; there is one at the end")
    p.add_argument("--tensorboard", action=flag, default=False, help="also write event files")
    p.add_argument("--toy", action="store_true", help="presets for minutes on two CPU cores; other flags still win")
    known = p.parse_known_args(argv)[0]
    if known.linear_probe:
        p.set_defaults(rand_aug=[0, 0, 0], reprob=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0, drop_path=0.0, lr=0.1,
                       min_lr=0.0, weight_decay=0.0, layer_decay=1.0, epochs=100, warmup_epochs=10)
    if known.toy:
        p.set_defaults(size="tiny", img_size=32, patch_size=8, num_frames=8, sampling_rate=1, per_class=32,
                       rand_aug=[0, 0, 0], crop_area=[1, 1], crop_aspect=[1, 1], flip=False, reprob=0.0, mixup=0.0,
                       cutmix=0.0, batch_size=32, drop_path=0.0, epochs=20, warmup_epochs=1, eval_every=5,
                       log_every=20, lr=0.024 if known.init else 0.012)  # lr chosen on toy/dev
    args = p.parse_args(argv)
    lowest = dict(num_frames=1, sampling_rate=1, img_size=1, patch_size=1, tubelet_size=1, repeat_aug=1, batch_size=1,
                  accum_steps=1, max_steps=1, log_every=1, save_every=1, num_workers=0, lr=0, min_lr=0, weight_decay=0,
                  clip_grad=0, seed=0, warmup_epochs=0, per_class=1, max_side=0, mixup=0, cutmix=0, freeze=0)
    for name, low in lowest.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            p.error(f"--{name} {getattr(args, name)}: expected at least {low}")
    for name in ("max_bad", "reprob", "switch_prob"):
        if not 0 <= getattr(args, name) <= 1:
            p.error(f"--{name} {getattr(args, name)}: expected a number in [0, 1]")
    for name in ("smoothing", "drop_path", "head_dropout", "ema"):
        if not 0 <= getattr(args, name) < 1:
            p.error(f"--{name} {getattr(args, name)}: expected a number in [0, 1)")
    for name, value in vars(args).items():
        if not all(math.isfinite(x) for x in (value if isinstance(value, list) else [value]) if isinstance(x, float)):
            p.error(f"--{name} {value}: expected a finite number")
    for name in ("layer_decay", "fps", "eval_every"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            p.error(f"--{name} {getattr(args, name)}: expected more than 0")
    if args.epochs <= args.warmup_epochs:
        p.error(f"--epochs {args.epochs:g}: expected more than --warmup_epochs {args.warmup_epochs:g}")
    for name, top in (("crop_area", 1), ("crop_aspect", math.inf)):
        low, high = getattr(args, name)
        if not 0 < low <= high <= top:
            p.error(f"--{name} {low:g} {high:g}: expected two ascending numbers above 0, at most {top}")
    if args.rand_aug[0] % 1 or args.rand_aug[0] < 0 or not 0 <= args.rand_aug[1] <= 10 or args.rand_aug[2] < 0:
        p.error(f"--rand_aug {args.rand_aug}: expected a whole number, a magnitude in [0, 10], a deviation from 0")
    if args.seed >= 2**31:
        p.error(f"--seed {args.seed}: expected a seed below 2^31")
    if args.linear_probe and not args.init:
        p.error("--linear_probe needs --init: there is nothing to learn from a random frozen encoder")
    if args.linear_probe and args.batch_size < 2:
        p.error(f"--batch_size {args.batch_size}: --linear_probe needs at least 2, its BatchNorm compares clips")
    if args.linear_probe and (args.freeze or args.ema):
        p.error("--linear_probe trains the head only: leave out --freeze and --ema")
    if args.sampling == "sparse" and args.fps:
        p.error("--sampling sparse spans the whole video: leave out --fps")
    return args


def lr_at(step: int, peak: float, floor: float, warmup: int, total: int) -> float:
    """Learning rate of a step (0-based): linear from 0 over the warm-up, then half a cosine to the floor."""
    if step < warmup:
        return peak * step / warmup
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


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
    device, control = torch.device(device), None
    dtype_name = args.dtype or best_dtype(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        control = dist.new_group(backend="gloo")  # host-side numbers: agreeing to stop does not wait for the GPU
    if hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc gives large tensors back to the system at once and faults their pages in again: a fifth of a step's time
        # on a CPU, a third of RandAugment's in the workers
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
        found = [data.read_videos(toy_part if s == "toy" else s, args.data_root) for s in sources]
        return sum((p for p, _ in found), []), sum((l for _, l in found), [])
    paths, names = read(args.data, "toy/train")
    classes = data.class_names([name for name in names if name is not None])
    labels = data.class_ids(names, classes, paths, "the training data")
    if len(classes) < 2:
        raise ValueError(f"{' '.join(args.data)}: one class only ({classes[0]}); expected at least 2")
    if args.per_class:
        seen, keep = [0] * len(classes), []
        for i, label in enumerate(labels):
            seen[label] += 1
            if seen[label] <= args.per_class:
                keep.append(i)
        paths, labels = [paths[i] for i in keep], [labels[i] for i in keep]
    val_data = args.val_data or (["toy"] if toy else [])
    val_paths, val_names = read(val_data, "toy/val") if val_data else ([], [])
    val_labels = data.class_ids(val_names, classes, val_paths, "the training data")
    counts = np.bincount(labels, minlength=len(classes))
    say(f"{len(paths)} videos of {len(classes)} classes ({', '.join(classes[:8])}"
        f"{', ...' if len(classes) > 8 else ''}), {counts.min()} to {counts.max()} of a class")
    if val_paths:
        often = np.bincount(val_labels)
        say(f"{len(val_paths)} videos for validation; always saying {classes[often.argmax()]!r} would get "
            f"{100 * often.max() / len(val_paths):.1f} %")
    else:
        say("no --val_data: nothing is validated, and no best.pt written")
    if counts.max() >= 3 * counts.min():
        order = counts.argsort(kind="stable")
        say("the classes are imbalanced: " + ", ".join(f"{classes[i]} {counts[i]}" for i in order[:3]) + " ... "
            + ", ".join(f"{classes[i]} {counts[i]}" for i in order[-3:]) + "; read the per-class accuracy too")
    twice = len(paths) - len({os.path.realpath(p) for p in paths})
    if twice:
        say(f"{twice} training videos are listed more than once; with different labels they contradict each other")
    files = [{os.path.realpath(data.prepared.source_of(p)) for p in some} for some in (paths, val_paths)]
    shared = len(files[0] & files[1])
    if shared:
        say(f"{shared} of the {len(val_paths)} validation videos are also trained on: their accuracy says little")
    sided = [c for c in classes if re.search(r"(?<![a-z])(left|right)(?![a-z])", c.lower().replace("_", " "))]
    if args.flip and sided:
        say(f"--flip mirrors the clips, but {len(sided)} classes name a side ({sided[0]}): --no-flip?")
    global_batch = args.batch_size * args.accum_steps * world
    if global_batch > len(paths):
        raise ValueError(f"{len(paths)} videos are fewer than a batch of {world} rank(s) x {args.batch_size} x "
                         f"{args.accum_steps} = {global_batch}: lower --batch_size or --accum_steps")
    total_steps = args.max_steps or max(1, int(args.epochs * len(paths) / global_batch))
    warmup_steps = int(total_steps * args.warmup_epochs / args.epochs)

    # ---- model: shaped as --init is where the flags do not say otherwise
    shape = encoder_shape(args.init, size=args.size, num_frames=args.num_frames, patch_size=args.patch_size,
                          img_size=args.img_size and (args.img_size, args.img_size), tubelet_size=args.tubelet_size)
    if args.init and shape["num_frames"] == 1 and not args.num_frames:
        say(f"{args.init} is a model of one frame, and so is this one: --num_frames 16 --tubelet_size 2 inflates it")
    model = VideoClassifier(len(classes), args.head_dropout, args.linear_probe, drop_path=args.drop_path,
                            checkpointing=args.checkpointing, **shape)
    if args.freeze > len(model.blocks):
        raise ValueError(f"--freeze {args.freeze}: expected at most the {len(model.blocks)} blocks of {shape['size']}")
    clip = dict(num_frames=shape["num_frames"], size=shape["img_size"], stride=args.sampling_rate, fps=args.fps,
                sampling=args.sampling)
    max_side = args.max_side and max(args.max_side, *shape["img_size"])
    train_set = data.FinetuneClips(paths, labels, repeat_aug=args.repeat_aug, max_side=max_side,
                                   rand_aug=(int(args.rand_aug[0]), *args.rand_aug[1:]), crop_area=args.crop_area,
                                   crop_aspect=args.crop_aspect, flip=args.flip, erase_prob=args.reprob,
                                   seed=args.seed, **clip)
    val_set = TestVideos(val_paths, **clip)

    # ---- resume: the run in out_dir goes on if it is this one
    last, log_file = os.path.join(args.out_dir, "last.pt"), os.path.join(args.out_dir, "log.jsonl")
    free = {"out_dir", "resume", "num_workers", "log_every", "save_every", "eval_every", "tensorboard", "max_bad",
            "toy", "device", "compile", "checkpointing", "batch_size", "accum_steps", "data", "data_root", "val_data"}
    run = {k: v for k, v in vars(args).items() if k not in free}  # what may not change within a run
    ends = ["/".join(p.replace(os.sep, "/").split("/")[-2:]) + f" {label}" for p, label in zip(paths, labels)]
    run |= dict(dtype=dtype_name, global_batch=global_batch,
                videos=f"{len(paths)} ({zlib.crc32(chr(10).join(ends).encode()):08x})")
    val_run = f"{len(val_paths)} ({zlib.crc32(chr(10).join(val_paths).encode()):08x})"
    first_step, saved, changed, best, validated = 0, None, [], -1.0, 0  # validated: the step of the last validation
    if args.resume and not os.path.exists(last):
        raise ValueError(f"--resume: there is no {last}")
    if os.path.exists(last) and args.resume is not False:
        try:
            saved = torch.load(last, map_location="cpu", weights_only=True)
            changed = [f"{k} {saved['args'].get(k)} -> {v}" for k, v in run.items() if saved["args"].get(k) != v]
            finished = saved["step"] >= saved["args"]["total_steps"]
            differ = [k for k, v in model.config.items() if k != "pos_grid" and saved["config"].get(k, v) != v]
            differ += ["classes"] if saved["classes"] != classes else []
        except Exception as e:  # torch raises whatever the broken bytes lead to
            raise ValueError(f"{last}: not a checkpoint of finetune.py ({e}); --no-resume moves it aside") from None
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
        model.set_positions(saved["config"]["pos_grid"])
        model.load_state_dict(saved["model"])
        first_step = saved["step"]
        if saved["val_run"] == val_run:  # with other validation videos the best is sought anew
            best, validated = saved["best"], saved["validated"]
        say(f"resumed {last} at step {first_step} of {total_steps}")
    elif args.init:
        load_pretrained(model, args.init, verbose=rank == 0)
    if world > 1:  # all have looked before anyone moves or writes files
        steps = torch.tensor([first_step, -first_step])
        dist.all_reduce(steps, dist.ReduceOp.MAX, group=control)
        if steps.sum() != 0:
            raise ValueError(f"not all ranks see the same {last}: --out_dir must be on a disk that all nodes share")
    ours = r"last\.pt|best\.pt|log\.jsonl|bad_videos|events"
    old = [f for f in sorted(os.listdir(args.out_dir)) if re.match(ours, f)]
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
    frozen = ["patch_embed."] * bool(args.freeze) + [f"blocks.{i}." for i in range(args.freeze)]
    for name, param in model.named_parameters():
        param.requires_grad = name.startswith("head.") if args.linear_probe else not name.startswith(tuple(frozen))
    model.to(device)
    raw_model = model
    if args.compile:
        model = torch.compile(model)
    if world > 1:  # the buffers that change are those of the linear probe's BatchNorm
        model = DistributedDataParallel(model, device_ids=[local_rank] if device.type == "cuda" else None,
                                        broadcast_buffers=args.linear_probe)
    lr, min_lr = args.lr * global_batch / 256, args.min_lr * global_batch / 256
    layer_decay = args.layer_decay or (0.75 if args.init else 1.0)
    fused = device.type in ("cuda", "cpu")
    groups = param_groups(raw_model, args.weight_decay, layer_decay)
    if args.linear_probe:
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=fused)
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, args.beta2), fused=fused)
    params = [p for group in groups for p in group["params"]]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype_name == "fp16")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype_name]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    ema = None
    if args.ema:
        ema = {k: v.clone() for k, v in ((saved and saved["ema"]) or raw_model.state_dict()).items()}
        ema = {k: v.to(device) for k, v in ema.items()}
    if saved:
        options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        sizes = lambda groups: [len(group["params"]) for group in groups]
        if sizes(saved["optimizer"]["param_groups"]) != sizes(optimizer.param_groups):
            raise ValueError(f"{last}: --freeze and a --layer_decay of 1 change which parameters are grouped: "
                             "they cannot change within a run")
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

    trained = sum(p.numel() for p in params)
    say(f"{shape['size']} with {count_params(raw_model) / 1e6:.1f} M parameters ({trained / 1e6:.3g} M trained), "
        f"clips of {'x'.join(map(str, (shape['num_frames'], *shape['img_size'])))}, "
        f"{world} rank(s) x {args.batch_size} videos x {args.accum_steps} = batch {global_batch}"
        f"{f' (x {args.repeat_aug} clips)' if args.repeat_aug > 1 else ''}, {total_steps} steps = "
        f"{total_steps * global_batch / len(paths):.1f} epochs, peak lr {lr:.2e}, layer decay {layer_decay:g}, "
        f"{device.type} {dtype_name}, {num_workers} workers")
    board = SummaryWriter(args.out_dir) if args.tensorboard and rank == 0 else None

    def log(row):
        with open(log_file, "a") as f:
            f.write(json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n")
        for k, v in row.items():
            if board and k != "step":
                board.add_scalar(k, v, row["step"])

    def write(name, state):
        """A checkpoint is whole at any moment: written beside, flushed, renamed."""
        path = os.path.join(args.out_dir, name)
        with open(path + ".part", "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".part", path)

    def about_run(step):
        return dict(step=step, epoch=step * global_batch / len(paths), config=raw_model.config, classes=classes,
                    args=vars(args) | run | dict(total_steps=total_steps), rng=dict(seed=args.seed), best=best,
                    validated=validated, val_run=val_run)

    def save(step):
        if rank == 0:
            write("last.pt", dict(model=raw_model.state_dict(), optimizer=optimizer.state_dict(), ema=ema,
                                  scaler=scaler.state_dict()) | about_run(step))

    def validate(step):
        """Accuracy of one central view; keeps the best weights. All ranks take part and get the same figures."""
        nonlocal best, validated
        raw_model.eval()
        live = {k: v.clone() for k, v in raw_model.state_dict().items()} if ema else None
        if ema:
            raw_model.load_state_dict(ema)

        def classify(views):
            with autocast:
                return raw_model(views).float().softmax(-1)
        probs, failed = run_views(classify, val_set, 1, device, args.batch_size, num_workers, control)
        tested = raw_model.state_dict()
        if ema:
            raw_model.load_state_dict(live)
            tested = ema
        raw_model.train()
        for i, why in failed.items() if rank == 0 else ():
            note_bad(val_paths[i], why)
        if not probs:
            save(step)
            raise ValueError(f"none of the {len(val_paths)} validation videos can be read; the first: {failed[0]}")
        result = scores(np.stack(list(probs.values())), np.array(val_labels)[list(probs)])
        if rank == 0:
            log(dict(step=step, val_loss=result["loss"], val_top1=result["top1"], val_top5=result["top5"],
                     val_per_class=result["per_class"], val_videos=len(probs), val_failed=len(failed),
                     epoch=step * global_batch / len(paths)))
        say(f"validation at step {step}: top-1 {result['top1']:.2f}, top-5 {result['top5']:.2f}, per class "
            f"{result['per_class']:.2f}, loss {result['loss']:.4f} ({len(probs)} videos, one view"
            f"{', averaged weights' if ema else ''})"
            f"{f'; {len(failed)} could not be read' if failed else ''}", flush=True)
        validated = step
        if result["top1"] > best:
            best = result["top1"]
            if rank == 0:
                write("best.pt", dict(model=tested) | about_run(step))

    # ---- loop
    stop = []  # signals received
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: os._exit(128 + number) if number in stop else stop.append(number))
    loss_sum, finite = torch.zeros((2,), device=device)  # of the batches since the last log line with a finite loss
    skipped, in_row = torch.zeros((2,), device=device)  # steps with a non-finite gradient: all, and the last in a row
    reads = bad_reads = 0
    bad_file = os.path.join(args.out_dir, "bad_videos.txt")
    bad_seen = {row.split("\t")[0] for row in open(bad_file)} if os.path.exists(bad_file) else set()

    def note_bad(path, why):
        if path not in bad_seen:
            bad_seen.add(path)
            with open(bad_file, "a") as f:
                f.write(f"{path}\t{why.removeprefix(path + ': ')}\n")

    passed = lambda s: int(s * global_batch / len(paths) / args.eval_every)  # validations due after s steps
    if val_paths and (passed(first_step) > passed(validated) or validated < first_step == total_steps):
        validate(first_step)  # the run was stopped before this one
        save(first_step)
    waiting, clock, logged = data.Waiting(device), time.time(), first_step
    model.train()
    stream = iter(loader)
    step = first_step
    while step < total_steps:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, lr, min_lr, warmup_steps, total_steps) * group["lr_scale"]
        torch.manual_seed(zlib.crc32(f"{args.seed} {step} {rank}".encode()))  # drop path, dropout, erasing's noise
        for micro in range(args.accum_steps):
            with waiting:
                batch, bad = next(stream)
            for path, why in bad:
                note_bad(path, why)
            reads, bad_reads = reads + args.batch_size + len(bad), bad_reads + len(bad)
            if batch is None:
                raise ValueError(f"10 videos in a row could not be read, the last: {bad[-1][1]}")
            video, label, boxes = (data.send(x, device) for x in batch)  # (B, T, H, W, C) uint8, (B), (B, 4)
            draw = np.random.default_rng([args.seed, step, micro * world + rank])
            if args.reprob or args.mixup or args.cutmix:  # dense work, on the device and in float
                video = to_unit(video)
                if args.reprob:
                    video = augment.erase(video, boxes, raw_model.config["mean"], raw_model.config["std"])
            video, target = augment.mix(draw, video, label, len(classes), args.mixup, args.cutmix, args.switch_prob,
                                        args.smoothing)  # target (B, K) float32
            sync = contextlib.nullcontext() if world == 1 or micro == args.accum_steps - 1 else model.no_sync()
            with sync:
                with autocast:
                    logits = model(video)  # (B, K)
                loss = F.cross_entropy(logits.float(), target)
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
        if ema:
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.values()), list(raw_model.state_dict().values()), 1 - args.ema)
        step += 1

        stopping = torch.tensor(max(stop, default=0))
        if world > 1:
            dist.all_reduce(stopping, dist.ReduceOp.MAX, group=control)
        if step % args.log_every == 0 or step == total_steps or stopping:
            stats = torch.stack([loss_sum, finite]).float()
            tally = torch.tensor([reads, bad_reads] + [0.0] * world, dtype=torch.float64)
            tally[2 + rank] = waiting.seconds()
            if world > 1:
                dist.all_reduce(stats)
                dist.all_reduce(tally, group=control)
            loss_total, finite_batches = stats.tolist()
            loss = loss_total / finite_batches if finite_batches else math.nan
            all_reads, all_bad, *waited = tally.tolist()
            seconds = time.time() - clock
            memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(
                resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            row = dict(step=step, loss=loss, lr=max(g["lr"] for g in optimizer.param_groups),
                       grad_norm=grad_norm.item(), epoch=step * global_batch / len(paths),
                       clips_per_s=(step - logged) * global_batch * args.repeat_aug / seconds,
                       waiting=max(waited) / seconds, memory_gb=memory / 2**30,
                       seconds_left=(total_steps - step) * seconds / max(step - logged, 1),
                       bad_reads=int(all_bad), skipped_steps=int(skipped))
            if rank == 0:
                log(row)
            say(f"step {step}/{total_steps} | loss {loss:.4f} (uniform {math.log(len(classes)):.3f}) | "
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
                                 f"{args.max_bad}: see {bad_file}; `python data.py check` lists all")
            loss_sum.zero_()
            finite.zero_()
            clock, logged = time.time(), step
        if val_paths and not stopping and (step == total_steps or passed(step) > passed(step - 1)):
            t = time.time()
            validate(step)
            clock += time.time() - t
        if step % args.save_every == 0 or step == total_steps or stopping:
            save(step)
        if stopping:
            say(f"stopped by signal {int(stopping)}; saved {last} at step {step}: the same command goes on from there")
            break
    else:
        if first_step >= total_steps:
            say("this run is finished; --no-resume starts it anew")
        elif val_paths:
            say(f"best top-1 {best:.2f} in {args.out_dir}/best.pt, the last weights in {last}")
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
        sys.exit(f"finetune.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
