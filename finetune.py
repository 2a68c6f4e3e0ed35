"""Supervised fine-tuning for action recognition (VideoMAE, arXiv 2203.12602, section 4).

    python finetune.py --toy --init out/pretrain/last.pt     # laptop CPU; without --init: scratch
    python finetune.py --init out/pretrain/last.pt --data train.tsv --val_data val.tsv \\
        --batch_size 8 --accum_steps 4                                               # one GPU
    torchrun --nproc_per_node=8 finetune.py --init out/pretrain/last.pt \\
        --data k400_train.tsv --val_data k400_val.tsv
    torchrun --nproc_per_node=8 finetune.py --linear_probe --init out/pretrain/last.pt ...

The log gives the loss beside log(number of classes), what uniform guessing costs; mixed and
smoothed labels keep it well above 0. After each epoch the validation videos are classified from
one central view; eval.py tests with many. <out_dir>/last.pt goes on with the same command, best.pt
has the weights of the best epoch, log.jsonl the curves.
"""

import argparse
import math
import os
import runpy
import sys
import zlib

import numpy as np
import torch
import torch.nn.functional as F

import data
from lib.cubes import to_unit
from lib.optim import lr_at, param_groups
from lib.process import (Parser, amount, count, fraction, optim_flags, portion, positive, rate,
                         run_flags, script_main, share, whole)
from lib.run import Run
from lib.views import TestVideos, run_views, say_scores, scores
from model import SIZES, VideoClassifier, count_params
from video import augment, lists
from weights import encoder_shape, load_pretrained


def get_args(argv=None):
    """The flags; an impossible one ends the program and is named."""
    p = Parser(__doc__)
    flag = argparse.BooleanOptionalAction
    g = p.add_argument_group("data")
    g.add_argument("--data", nargs="+", default=["toy"],
                   help="list files, folders by class, or the word toy")
    g.add_argument("--val_data", nargs="+",
                   help="list files or folders, classified after each epoch (toy: its own)")
    g.add_argument("--data_root", default="", help="goes before relative paths of a list")
    g.add_argument("--per_class", type=count,
                   help="train on this many videos of each class only, the first in the list")
    g.add_argument("--num_frames", type=count,
                   help="frames per clip (default: those of --init, else 16)")
    g.add_argument("--sampling_rate", default=4, type=count,
                   help="a clip spans num_frames * this many frames")
    g.add_argument("--fps", type=rate, help="resample videos to this many frames/s first")
    g.add_argument("--sampling", default="dense", choices=["dense", "sparse", "sparse-reference"],
                   help="dense: a window of the video; sparse (SSv2): a frame per segment; "
                        "sparse-reference: segments as in the paper's code, which leave out the "
                        "end (training; tests are those of sparse)")
    g.add_argument("--img_size", type=count,
                   help="pixels, a clip's height and width (default: --init's, else 224)")
    g.add_argument("--max_side", default=320, type=whole,
                   help="reduce larger videos to this short side first, 0 = never")
    g.add_argument("--antialias", action=flag, default=True,
                   help="resize crops and validation frames antialiased; --no-antialias: as the "
                        "paper's code does")
    g = p.add_argument_group("augmentation")
    g.add_argument("--repeat_aug", default=1, type=count,
                   help="clips from one decoded video; batch_size counts videos")
    g.add_argument("--rand_aug", nargs=3, default=[4, 7, 0.5], type=amount,
                   metavar=("N", "M", "STD"),
                   help="RandAugment: operations (0: off), magnitude up to 10, its deviation")
    g.add_argument("--crop_area", nargs=2, default=[0.08, 1], type=portion,
                   help="share of the frame that a crop covers")
    g.add_argument("--crop_aspect", nargs=2, default=[0.75, 4 / 3], type=positive,
                   help="width over height of a crop")
    g.add_argument("--flip", action=flag, default=True,
                   help="mirror half the clips; --no-flip where sides are labels")
    g.add_argument("--reprob", default=0.25, type=share, help="probability of random erasing")
    g.add_argument("--mixup", default=0.8, type=amount, help="alpha, 0 = off")
    g.add_argument("--cutmix", default=1.0, type=amount, help="alpha, 0 = off")
    g.add_argument("--switch_prob", default=0.5, type=share,
                   help="share of cutmix where both are on")
    g.add_argument("--smoothing", default=0.1, type=fraction, help="of the labels")
    g = p.add_argument_group("model")
    g.add_argument("--init", help="start from these weights (any layout that weights.py reads, or "
                                  "hf:owner/model); without: from scratch")
    g.add_argument("--positions", default="resize", choices=["resize", "new"],
                   help="with other frames or sides than --init's: resize its position table, or "
                        "make a new one, as the paper's code does")
    g.add_argument("--size", choices=list(SIZES), help="(default: --init's, else base)")
    g.add_argument("--patch_size", type=count,
                   help="pixels (default: --init's, else 16, giant: 14)")
    g.add_argument("--tubelet_size", type=count,
                   help="frames per cube (default: --init's, else 2)")
    g.add_argument("--drop_path", default=0.1, type=fraction,
                   help="stochastic depth of the last block")
    g.add_argument("--head_dropout", default=0.0, type=fraction)
    g.add_argument("--checkpointing", action=flag, default=False,
                   help="recompute activations: less memory, slower")
    g.add_argument("--linear_probe", action="store_true",
                   help="train a linear head on the frozen encoder; presets: SGD as in the paper, "
                        "crops and flips only")
    g.add_argument("--probe", choices=["linear", "attentive"],
                   help="linear: --linear_probe; attentive: probe.py, which has its own flags")
    g.add_argument("--freeze", default=0, type=whole,
                   help="keep the patch embedding and the first N blocks as they are")
    g.add_argument("--ema", default=0.0, type=fraction,
                   help="decay of averaged weights, which are then tested; 0 = off")
    g = optim_flags(p, "videos", batch_size=16, epochs=100, warmup_epochs=5, lr=1e-3, min_lr=1e-6,
                    weight_decay=0.05, beta2=0.999)
    g.add_argument("--layer_decay", type=portion,
                   help="factor on the rate per block down (default: .75, from scratch 1)")
    g = run_flags(p, out_dir="out/finetune")
    g.add_argument("--hour", choices=["cpu", "gpu"],
                   help="presets for your own videos: at most an hour on two cores, or on one "
                        "GPU; other flags still win")
    g.add_argument("--eval_every", default=1.0, type=positive, help="epochs between validations")
    early = p.peek(argv)
    length = None if early.epochs != p.get_default("epochs") else 1
    if early.hour == "cpu":  # the clips of pretrain.py --hour
        p.preset(img_size=112, sampling_rate=2, lr=8e-3, warmup_epochs=10, save_every=50,
                 max_steps=length and 400, size=None if early.init else "small")
    if early.hour == "gpu":
        p.preset(batch_size=32, lr=4e-3, warmup_epochs=10, max_steps=length and 5000,
                 size=None if early.init else "small")
    if early.linear_probe or early.probe == "linear":
        p.preset(linear_probe=True, rand_aug=[0, 0, 0], reprob=0.0, mixup=0.0, cutmix=0.0,
                 smoothing=0.0, drop_path=0.0, lr=0.1, min_lr=0.0, weight_decay=0.0,
                 layer_decay=1.0, epochs=100, warmup_epochs=10)
    if early.toy:  # lr chosen on toy/dev
        p.preset(size="tiny", img_size=32, patch_size=8, num_frames=8, sampling_rate=1,
                 per_class=32, rand_aug=[0, 0, 0], crop_area=[1, 1], crop_aspect=[1, 1],
                 flip=False, reprob=0.0, mixup=0.0, cutmix=0.0, batch_size=32, drop_path=0.0,
                 epochs=20, warmup_epochs=1, eval_every=5, log_every=20,
                 lr=0.024 if early.init else 0.012)
    args = p.parse_args(argv)
    if args.hour and args.toy:
        p.error("--hour and --toy are presets: expected one of them")
    for name in ("crop_area", "crop_aspect"):
        low, high = getattr(args, name)
        if low > high:
            p.error(f"--{name} {low:g} {high:g}: expected two ascending numbers")
    if args.rand_aug[0] % 1 or args.rand_aug[1] > 10:
        p.error(f"--rand_aug {args.rand_aug}: expected a whole number, a magnitude up to 10")
    if args.positions == "new" and not args.init:
        p.error("--positions new goes with --init: from scratch they are new")
    if args.linear_probe and not args.init:
        p.error("--linear_probe needs --init: a random frozen encoder teaches nothing")
    if args.linear_probe and args.batch_size < 2:
        p.error("--linear_probe needs --batch_size 2 or more: its BatchNorm compares clips")
    if args.linear_probe and (args.freeze or args.ema):
        p.error("--linear_probe trains the head only: leave out --freeze and --ema")
    if args.sampling != "dense" and args.fps:
        p.error(f"--sampling {args.sampling} spans the whole video: leave out --fps")
    return args


def main():
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    p.add_argument("--probe")
    args, others = p.parse_known_args()
    if args.probe == "attentive":  # other data, heads and loop: a stage that is read by itself
        sys.argv = [os.path.join(os.path.dirname(os.path.abspath(__file__)), "probe.py"), *others]
        return runpy.run_path(sys.argv[0])["main"]()
    args = get_args()
    run = Run(args)

    # ---- data
    img_size = args.img_size and (args.img_size,) * 2
    shape = encoder_shape(args.init, size=args.size, num_frames=args.num_frames, img_size=img_size,
                          patch_size=args.patch_size, tubelet_size=args.tubelet_size)
    folders = shape["num_frames"] > 1  # of numbered pictures: videos; for clips of one frame, not
    with_toy = "toy" in args.data + (args.val_data or [])
    classes, paths, labels, val_paths, val_labels = run.labelled(args, folders)
    told = lists.describe(classes, paths, labels, val_paths, val_labels)
    for line in told if run.rank == 0 else ():
        run.say(line)
    sided = lists.sided(classes)
    if args.flip and sided:
        run.say(f"--flip mirrors the clips, but {len(sided)} classes name a side ({sided[0]}): "
                "--no-flip?")
    run.plan(len(paths), args.repeat_aug, whole="videos")

    # ---- model: shaped as --init is where the flags do not say otherwise
    if args.init and shape["num_frames"] == 1 and not args.num_frames:
        run.say(f"{args.init} is a model of one frame, and so is this one: --num_frames 16 "
                "--tubelet_size 2 inflates it")
    model = VideoClassifier(len(classes), args.head_dropout, args.linear_probe,
                            drop_path=args.drop_path, checkpointing=args.checkpointing, **shape)
    clip_args = dict(num_frames=shape["num_frames"], img_size=shape["img_size"],
                     stride=args.sampling_rate, fps=args.fps, sampling=args.sampling,
                     antialias=args.antialias)
    num_ops, *strength = args.rand_aug
    train_set = data.FinetuneClips(
        paths, labels, repeat_aug=args.repeat_aug, rand_aug=(int(num_ops), *strength),
        max_side=args.max_side and max(args.max_side, *shape["img_size"]), flip=args.flip,
        crop_area=args.crop_area, crop_aspect=args.crop_aspect, erase_prob=args.reprob,
        seed=args.seed, **clip_args)
    val_set = TestVideos(val_paths, **clip_args)
    parts = dict(ema=dict | None, best=float, validated=int, val_run=str)
    saved = run.resume(model.config, classes, ("probe",), parts,
                       videos=lists.fingerprint(paths, labels))
    best, validated = -1.0, 0  # top-1 of best.pt, step of the last validation
    val_run = f"{len(val_paths)} ({zlib.crc32(chr(10).join(val_paths).encode()):08x})"
    if saved:
        model.restore(saved["config"])
        if saved["val_run"] == val_run:  # with other validation videos the best is sought anew
            best, validated = saved["best"], saved["validated"]
    elif args.init:
        load_pretrained(model, args.init, run.rank == 0, args.positions)

    # ---- optimiser
    if args.freeze > len(model.blocks):
        raise ValueError(f"--freeze {args.freeze}: expected at most the {len(model.blocks)} blocks "
                         f"of {shape['size']}")
    frozen = ["patch_embed."] * bool(args.freeze) + [f"blocks.{i}." for i in range(args.freeze)]
    for name, param in model.named_parameters():
        head_only = args.linear_probe and not name.startswith("head.")
        param.requires_grad = not (head_only or name.startswith(tuple(frozen)))
    layer_decay = args.layer_decay or (0.75 if args.init else 1.0)
    groups = param_groups(model, args.weight_decay, layer_decay)
    if args.linear_probe:
        optimizer = torch.optim.SGD(groups, lr=run.lr, momentum=0.9, fused=run.fused)
    else:
        optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, args.beta2), fused=run.fused)
    net = run.start(model, optimizer, train_set)
    ema = None
    if args.ema:
        start = saved and saved["ema"] or model.state_dict()
        ema = {k: v.to(run.device, copy=True) for k, v in start.items()}
    if with_toy and shape["size"] != "tiny":
        clip = torch.zeros(1, shape["num_frames"], *shape["img_size"], 3).to(run.device)
        run.warn_of_toys(shape["size"], lambda: model(clip).float().sum())
    trained = sum(p.numel() for group in groups for p in group["params"])
    clip_shape = "x".join(map(str, (shape["num_frames"], *shape["img_size"])))
    run.say(f"{shape['size']} with {count_params(model) / 1e6:.1f} M parameters "
            f"({trained / 1e6:.3g} M trained), clips of {clip_shape}, layer decay {layer_decay:g}; "
            f"{run.summary('videos')}")

    def about():
        return dict(config=model.config, classes=classes, best=best, validated=validated,
                    val_run=val_run)

    def save():
        run.save(model=model.state_dict(), ema=ema, **about())

    def classify(views):  # (B, T, H, W, C) -> (B, K)
        with run.autocast:
            return model(views).float().softmax(-1)

    def validate():
        """Accuracy of one central view; keeps the best weights. All ranks get the same figures."""
        nonlocal best, validated
        model.eval()
        if ema:
            live = {k: v.clone() for k, v in model.state_dict().items()}
            model.load_state_dict(ema)
        probs, failed = run_views(classify, val_set, 1, run.device, args.batch_size,
                                  run.num_workers, run.host_group)
        if ema:
            model.load_state_dict(live)
        model.train()
        for i, why in failed.items() if run.rank == 0 else ():
            run.note_bad(val_paths[i], why)
        if not probs:
            save()
            raise ValueError(f"none of the {len(val_paths)} validation videos can be read; the "
                             f"first: {failed[0]}")
        result = scores(np.stack(list(probs.values())), np.array(val_labels)[list(probs)])
        run.write_row(dict(step=run.step, val_loss=result["loss"], val_top1=result["top1"],
                           val_top5=result["top5"], val_per_class=result["per_class"],
                           val_videos=len(probs), val_failed=len(failed),
                           epoch=run.epoch(run.step)))
        run.say(f"validation at step {run.step}: {say_scores(result, len(classes))}, "
                f"loss {result['loss']:.4f} ({len(probs)} videos, one view"
                + ", averaged weights" * bool(ema) + ")"
                + f"; {len(failed)} could not be read" * bool(failed), flush=True)
        validated = run.step
        if result["top1"] > best:
            best = result["top1"]
            run.write("best.pt", model=ema or model.state_dict(), **about())

    # ---- loop
    passed = lambda step: int(run.epoch(step) / args.eval_every)  # validations due so far
    missed = passed(run.step) > passed(validated) or validated < run.step == run.total_steps
    if val_paths and missed:  # the run was stopped before this one
        validate()
        save()
    for step in run.steps():  # whose seed drop path, dropout and erasing's noise draw from
        lr = lr_at(step, run.lr, run.min_lr, run.warmup_steps, run.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for place, (video, label, boxes) in run.batches():  # (B, T, H, W, C) uint8, (B), (B, 4)
            draw = np.random.default_rng([args.seed, step, place])
            if args.reprob or args.mixup or args.cutmix:  # dense work, on the device, in float
                video = to_unit(video)
            if args.reprob:
                video = augment.erase(video, boxes, model.mean[:3], model.std[:3])
            video, target = augment.mix(draw, video, label, len(classes), args.mixup, args.cutmix,
                                        args.switch_prob, args.smoothing)  # target (B, K)
            with run.autocast:
                logits = net(video)  # (B, K)
            loss = F.cross_entropy(logits.float(), target)
            run.scaler.scale(loss / run.accum_steps).backward()
            run.add(loss=loss)
        run.update(args.clip_grad)
        if ema:
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()),
                                     1 - args.ema)

        if run.due(args.log_every):
            run.log("loss {loss:.4f} (uniform {uniform:.3f})", uniform=math.log(len(classes)))
        due = run.step == run.total_steps or passed(run.step) > passed(step)
        if val_paths and due and not (run.stopping or run.failure):
            with run.paused():
                validate()
        if run.due_to_save():
            save()
    if run.done and val_paths and not run.stopping:
        run.say(f"best top-1 {best:.2f} in {args.out_dir}/best.pt, the last weights in "
                f"{run.checkpoint}")
    return run.end()


if __name__ == "__main__":
    script_main(main)
