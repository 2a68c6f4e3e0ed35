"""Masked video pre-training (VideoMAE, arXiv 2203.12602, section 3): predict the hidden 90 %.

    python pretrain.py --toy                                # laptop CPU: minutes, on its own videos
    python pretrain.py --data my_videos/ --size small --batch_size 32 --accum_steps 8      # one GPU
    torchrun --nproc_per_node=8 pretrain.py --data k400_train.tsv --accum_steps 8   # the paper's

The log gives the loss beside two baselines: what predicting zeros scores (511/512 with the paper's
target on textured video) and what predicting the mean visible cube scores. A loss that stays at a
baseline has learnt nothing. <out_dir>/vis_*.png shows what the model reconstructs, log.jsonl has
the curve, last.pt is the checkpoint; the same command goes on from it.
"""

import argparse
import math

import torch

import data
import masking
from lib import reconstruct
from lib.optim import lr_at, param_groups
from lib.process import (Parser, count, every, few, inner, optim_flags, portion, rate, run_flags,
                         script_main)
from lib.run import Run
from model import SIZES, VideoMAE, count_params
from video import lists, toy
from weights import image_parts, load_pretrained


def get_args(argv=None):
    """The flags; an impossible one ends the program and is named."""
    p = Parser(__doc__)
    flag = argparse.BooleanOptionalAction
    g = p.add_argument_group("data")
    g.add_argument("--data", nargs="+", default=["toy"], help="list files, folders, or toy")
    g.add_argument("--val_data", nargs="+",
                   help="videos for the pictures (default: toy's own, else training videos)")
    g.add_argument("--data_root", default="", help="goes before relative paths of a list")
    g.add_argument("--num_frames", default=16, type=count, help="frames per clip")
    g.add_argument("--sampling_rate", default=4, type=count,
                   help="frames from one sampled frame to the next (SSv2: 2)")
    g.add_argument("--fps", type=rate, help="sample by time instead: frames per second")
    g.add_argument("--sampling", default="dense", choices=["dense", "sparse"],
                   help="sparse: one frame of each of num_frames equal segments")
    g.add_argument("--img_size", default=224, type=count, help="pixels, a clip's height and width")
    g.add_argument("--crop_scales", nargs="+", default=[1, 0.875, 0.75, 0.66], type=portion,
                   help="crop sides over the short side")
    g.add_argument("--flip", action=flag, default=False, help="mirror half the clips")
    g.add_argument("--repeat_aug", default=1, type=count,
                   help="clips from one decoded video; batch_size counts videos")
    g = p.add_argument_group("model")
    g.add_argument("--size", default="base", choices=list(SIZES))
    g.add_argument("--patch_size", default=16, type=count, help="pixels (giant: 14)")
    g.add_argument("--tubelet_size", default=2, type=count, help="frames per cube")
    g.add_argument("--decoder_depth", type=few, help="blocks (default: the size's)")
    g.add_argument("--mask_type", default="tube", choices=["tube", "random", "frame"])
    g.add_argument("--mask_ratio", default=0.9, type=inner,
                   help="share of cubes hidden from the encoder")
    g.add_argument("--decoder_mask_ratio", default=0.0, type=float, choices=[0, 0.25, 0.5, 0.75],
                   help="share that is not decoded, in 2x2 cells: 0 is off, v2 of the paper 0.5")
    g.add_argument("--norm_pix_loss", action=flag, default=True,
                   help="targets normalised per cube and channel")
    g.add_argument("--target", default="clip", choices=["clip", "center", "dense"],
                   help="what is reconstructed: the clip, its centre frame, twice its frames")
    g.add_argument("--checkpointing", action=flag, default=False,
                   help="recompute activations: less memory, slower")
    g.add_argument("--init", help="start from these weights (any layout that weights.py reads, or "
                                  "hf:owner/model)")
    optim_flags(p, "videos", batch_size=32, epochs=800, warmup_epochs=40, lr=1.5e-4, min_lr=1e-5,
                weight_decay=0.05, beta2=0.95)
    g = run_flags(p, out_dir="out/pretrain")
    g.add_argument("--hour", choices=["cpu", "gpu"],
                   help="presets for your own videos: at most an hour on two cores, or on one "
                        "GPU; other flags still win")
    g.add_argument("--vis_every", default=2000, type=every,
                   help="steps between pictures, which also come with saves by time; 0: only at "
                        "the end; never")
    early = p.peek(argv)
    p.preset(patch_size=SIZES[early.size]["patch_size"])
    length = None if early.epochs != p.get_default("epochs") else 1
    if early.hour == "cpu":  # two cores with bf16 units make 2,000 such steps in an hour
        p.preset(size="small", img_size=112, sampling_rate=2, mask_ratio=0.75, batch_size=8,
                 repeat_aug=2, lr=1.6e-2, min_lr=3e-4, warmup_epochs=80,
                 max_steps=length and 1200, save_every=100)
    if early.hour == "gpu":  # by its FLOPs, on a card of 24 GB; not run
        p.preset(size="small", batch_size=32, repeat_aug=4, lr=4.8e-3, min_lr=1e-4,
                 warmup_epochs=80, max_steps=length and 10000)
    if early.toy:
        p.preset(size="tiny", img_size=32, patch_size=8, num_frames=8, sampling_rate=1,
                 crop_scales=[1], repeat_aug=2, batch_size=32, mask_ratio=0.75, decoder_depth=1,
                 lr=1.2e-2, min_lr=1e-4, epochs=70, warmup_epochs=7, log_every=20)
    args = p.parse_args(argv)
    if args.hour and args.toy:
        p.error("--hour and --toy are presets: expected one of them")
    dense = args.sampling == "dense" and not args.fps
    if args.sampling == "sparse" and args.fps:
        p.error("--sampling sparse spans the whole video: leave out --fps")
    if args.target == "dense" and dense and args.sampling_rate % 2:
        p.error(f"--target dense: --sampling_rate {args.sampling_rate}: expected an even number")
    if args.target == "center" and args.decoder_mask_ratio:
        p.error("--target center decodes one temporal slot: leave out --decoder_mask_ratio")
    return args


def main():
    args = get_args()
    run = Run(args)

    # ---- data
    with_toy = "toy" in args.data + (args.val_data or [])
    if with_toy:
        run.once(toy.make_toy)
    root, out = args.data_root, args.out_dir
    folders = args.num_frames > 1  # of numbered pictures: videos; for clips of one frame, not
    paths, val_paths = run.videos(args.data, root, "toy/train", out, args.max_bad, folders)[0], []
    if args.val_data or with_toy:
        val_paths = run.videos(args.val_data or ["toy"], root, "toy/val", out, 1, folders)[0]
    twice = 2 if args.target == "dense" else 1  # the frames, at half the distance
    clip_args = dict(num_frames=args.num_frames * twice, img_size=(args.img_size,) * 2,
                     stride=args.sampling_rate // twice, fps=args.fps and args.fps * twice,
                     sampling=args.sampling, seed=args.seed)
    train_set = data.PretrainClips(paths, repeat_aug=args.repeat_aug, flip=args.flip,
                                   crop_scales=args.crop_scales, **clip_args)
    shown = data.PretrainClips(val_paths or paths, crop_scales=[1], **clip_args)
    run.plan(len(paths), args.repeat_aug)

    # ---- model
    model = VideoMAE(args.size, args.num_frames, args.img_size, args.patch_size, args.tubelet_size,
                     args.decoder_depth, args.norm_pix_loss, args.target, args.checkpointing,
                     **image_parts(args.init, num_frames=args.num_frames,
                                   tubelet_size=args.tubelet_size))
    num_tokens, num_decoded = math.prod(model.grid), None
    num_visible = num_tokens - masking.num_masked(args.mask_type, model.grid, args.mask_ratio)
    if args.decoder_mask_ratio:
        num_decoded = num_tokens - masking.num_masked("running_cell", model.grid,
                                                      args.decoder_mask_ratio)
    saved = run.resume(model.config, may_change=["init"], videos=lists.fingerprint(paths))
    if saved:
        model.restore(saved["config"])
    elif args.init:
        load_pretrained(model, args.init, verbose=run.rank == 0)

    # ---- optimiser
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=run.lr,
                                  betas=(0.9, args.beta2), fused=run.fused)
    net = run.start(model, optimizer, train_set)
    if "toy" in args.data and args.size != "tiny":
        clip = torch.zeros(1, args.num_frames * twice, *model.config["img_size"], 3).to(run.device)
        mask = masking.make_mask(args.mask_type, 1, model.grid, args.mask_ratio, device=run.device)
        run.warn_of_toys(args.size, lambda: model(clip, mask)[0])
    run.say(f"{len(paths)} videos, {args.size} with {count_params(model) / 1e6:.1f} M parameters, "
            f"token grid {'x'.join(map(str, model.grid))}, {num_visible} of {num_tokens} tokens "
            f"visible{f', {num_decoded} decoded' if num_decoded else ''}; {run.summary('videos')}")

    # ---- loop
    clips = run.global_batch * args.repeat_aug
    decoder_mask = None
    for step in run.steps():
        lr = lr_at(step, run.lr, run.min_lr, run.warmup_steps, run.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        # masks of the whole global batch: the same on any number of ranks and accumulation steps
        draw = run.generator, run.device
        masks = masking.make_mask(args.mask_type, clips, model.grid, args.mask_ratio, *draw)
        if num_decoded:
            decoder_masks = masking.make_mask("running_cell", clips, model.grid,
                                              args.decoder_mask_ratio, *draw)
        for place, video in run.batches():  # (B, T, H, W, C) uint8
            rows = slice(place * len(video), (place + 1) * len(video))
            mask = masks[rows]  # (B, N)
            if num_decoded:
                decoder_mask = decoder_masks[rows]
            with run.autocast:
                loss, _ = net(video, mask, decoder_mask, num_visible, num_decoded)
            run.scaler.scale(loss / run.accum_steps).backward()
            run.add(loss=loss)
        run.update(args.clip_grad)

        if run.due(args.log_every):
            zeros, visible_mean = reconstruct.baselines(model, video, mask)
            run.log("loss {loss:.4f} (zeros {zeros:.4f}, visible mean {visible_mean:.4f})",
                    zeros=zeros, visible_mean=visible_mean)
        if run.due_to_save():
            run.save(model=model.state_dict(), config=model.config)
        if run.due(args.vis_every, at_stop=False, by_time=True) and run.rank == 0:
            run.say(reconstruct.draw(model, shown, args.mask_type, args.mask_ratio,
                                     run.path(f"vis_{run.step:07d}.png"), run.device,
                                     run.autocast))
    return run.end()


if __name__ == "__main__":
    script_main(main)
