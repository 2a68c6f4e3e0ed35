"""ViC-MAE pre-training (arXiv 2303.12001): reconstruction and contrast, on video frames and images.

    python pretrain_vicmae.py --toy                                       # laptop CPU: minutes
    python pretrain_vicmae.py --data my_videos/ --images my_pictures/ --size small --batch_size 32
    torchrun --nproc_per_node=8 pretrain_vicmae.py --data k400_train.tsv --images imagenet/train

A sample is two frames of a video or two views of an image. Each is masked by itself and goes
through a plain image ViT; a light decoder reconstructs its hidden patches, and the mean of its
visible tokens is drawn, by InfoNCE, to that of the other view of its sample and away from all
others of the batch. The log gives both losses beside what knows nothing: zeros for the one,
ln(views - 1) for the other. finetune.py and eval.py take the checkpoint, for images and inflated
for video.
"""

import argparse
import math

import torch

import data
import masking
from lib import reconstruct
from lib.contrastive import head, info_nce
from lib.feed import MixedBatches
from lib.optim import lr_at, param_groups
from lib.process import (Parser, amount, count, every, few, inner, optim_flags, portion,
                         positive, run_flags, script_main, whole)
from lib.run import Run
from model import SIZES, VideoMAE, count_params
from video import lists, toy
from weights import image_parts, load_pretrained


def get_args(argv=None):
    """The flags; an impossible one ends the program and is named."""
    p = Parser(__doc__)
    flag = argparse.BooleanOptionalAction
    g = p.add_argument_group("data")
    g.add_argument("--data", nargs="*", default=[], help="videos: list files, folders, or toy")
    g.add_argument("--images", nargs="+", default=[], help="pictures: list files or folders")
    g.add_argument("--image_fraction", type=inner,
                   help="share of pictures in a batch of both (default: 0.5)")
    g.add_argument("--val_data", nargs="+",
                   help="videos or pictures to draw (default: toy's own, else training's)")
    g.add_argument("--data_root", default="", help="goes before relative paths of a list")
    g.add_argument("--gap_frames", default=32, type=whole,
                   help="mean distance of two frames (0: the same one)")
    g.add_argument("--img_size", default=224, type=count, help="pixels, a view's height and width")
    g.add_argument("--crop_area", nargs=2, default=[0.5, 1], type=portion,
                   help="share of a frame that a view shows")
    g.add_argument("--image_crop_area", nargs=2, default=[0.2, 1], type=portion,
                   help="share of a picture")
    g.add_argument("--color", action=flag, default=False,
                   help="videos too: jitter, grey, blur, solarising")
    g = p.add_argument_group("model")
    g.add_argument("--size", default="base", choices=list(SIZES))
    g.add_argument("--patch_size", default=16, type=count, help="pixels (giant: 14)")
    g.add_argument("--decoder_depth", default=8, type=few, help="blocks")
    g.add_argument("--decoder_width", default=512, type=count, help="a multiple of the heads")
    g.add_argument("--decoder_heads", default=16, type=count)
    g.add_argument("--proj_width", default=4096, type=count, help="of the projector's layers")
    g.add_argument("--proj_dim", default=128, type=count, help="of what is contrasted")
    g.add_argument("--mask_ratio", default=0.75, type=inner,
                   help="share of patches hidden (the public code: 0.5)")
    g.add_argument("--norm_pix_loss", action=flag, default=True,
                   help="targets normalised per patch")
    g.add_argument("--temperature", default=0.1, type=positive)
    g.add_argument("--rec_weight", default=1.0, type=amount,
                   help="of the reconstruction loss (the public code: 0.97)")
    g.add_argument("--con_weight", default=0.03, type=amount, help="lambda, of the contrast")
    g.add_argument("--con_ramp", default=40, type=amount,
                   help="epochs over which lambda grows from 0 (the public code: 0)")
    g.add_argument("--checkpointing", action=flag, default=False,
                   help="recompute activations: less memory, slower")
    g.add_argument("--init", help="start from these weights (any layout that weights.py reads, or "
                                  "hf:owner/model)")
    optim_flags(p, "samples", batch_size=32, epochs=800, warmup_epochs=40, lr=1.5e-4, min_lr=0.0,
                weight_decay=0.05, beta2=0.95)
    g = run_flags(p, out_dir="out/vicmae")
    g.add_argument("--vis_every", default=2000, type=every,
                   help="steps between pictures, which also come with saves by time; 0: only at "
                        "the end; never")
    early = p.peek(argv)
    p.preset(patch_size=SIZES[early.size]["patch_size"])
    if early.toy:
        p.preset(data=["toy"], size="tiny", img_size=32, patch_size=8, batch_size=64,
                 decoder_depth=1, decoder_width=96, decoder_heads=3, proj_width=256, proj_dim=64,
                 gap_frames=8, mask_ratio=0.5, crop_area=[0.8, 1], lr=1.2e-2, con_weight=1.0,
                 epochs=150, warmup_epochs=15, con_ramp=15, log_every=50)
    args = p.parse_args(argv)
    for name in ("crop_area", "image_crop_area"):
        low, high = getattr(args, name)
        if low > high:
            p.error(f"--{name} {low} {high}: expected low <= high")
    if args.decoder_width % args.decoder_heads:
        p.error(f"--decoder_width {args.decoder_width}: expected a multiple of the "
                f"{args.decoder_heads} heads")
    if not args.data and not args.images:
        p.error("neither --data nor --images: expected videos, pictures or both, or --toy")
    if args.image_fraction is not None and not (args.data and args.images):
        p.error("--image_fraction goes with both --data and --images")
    if not args.rec_weight and not args.con_weight:
        p.error("--rec_weight 0 --con_weight 0: nothing would be trained")
    return args


class ViCMAE(VideoMAE):
    """A one-frame VideoMAE with joint targets, a projector on the mean of the visible tokens."""

    def __init__(self, *args, proj_width=4096, proj_dim=128, temperature=0.1, **kwargs):
        super().__init__(*args, num_frames=1, tubelet_size=1, joint_norm=True, **kwargs)
        self.projector = head(SIZES[self.config["size"]]["width"], proj_width, proj_width, proj_dim)
        self.temperature = temperature
        self.config |= dict(proj_width=proj_width, proj_dim=proj_dim)

    def forward(self, views, mask, num_visible=None):
        """views (B, 2, 1, H, W, C), mask (B, 2, N) -> reconstruction loss, contrast, spread."""
        video, mask = (x.transpose(0, 1).flatten(0, 1) for x in (views, mask))  # (2B, ...)
        visible, ids, scored = self.select(mask, None, num_visible)
        x = self.forward_encoder(video, visible)  # (2B, N_vis, D)
        loss = self.forward_loss(video, self.forward_decoder(x, visible, ids), ids, scored)
        z = self.projector(x.mean(1)).unflatten(0, (2, -1))  # (2, B, proj_dim)
        return loss, *info_nce(z, self.temperature)


def main():
    args = get_args()
    run = Run(args)
    if args.toy and run.device.type == "cpu":
        torch.set_num_threads(1)  # in so small a model two wait: 460 samples/s, not 317

    # ---- data
    with_toy = "toy" in args.data + args.images + (args.val_data or [])
    if with_toy:
        run.once(toy.make_toy_shapes)
    read = lambda sources, part, folders=True, max_bad=args.max_bad: run.videos(
        sources, args.data_root, part, args.out_dir, max_bad, folders)[0]
    paths, images = (read(x, "toy_shapes/train", x is args.data) if x else []
                     for x in (args.data, args.images))
    val_paths = paths or images
    if args.val_data or with_toy:
        val_paths = read(args.val_data or ["toy"], "toy_shapes/val", bool(args.data), 1)
    image_fraction = 0.5 if args.image_fraction is None else args.image_fraction
    num_images = args.batch_size * (not paths)  # in a batch of a rank
    if paths and images:
        num_images = round(args.batch_size * image_fraction)
        if not 0 < num_images < args.batch_size:
            raise ValueError(f"--image_fraction {image_fraction}: {num_images} of the "
                             f"{args.batch_size} samples of a batch would be pictures; expected "
                             "at least one of each kind")
    num_videos = args.batch_size - num_images
    if args.batch_size * run.world < 2:
        raise ValueError("--batch_size 1: nothing to contrast with, expected 2 or more")
    img_size = (args.img_size,) * 2
    train_set = data.ViewPairs(paths, images, img_size=img_size, gap=args.gap_frames,
                               area=args.crop_area, image_area=args.image_crop_area,
                               color=args.color, seed=args.seed)
    shown = data.PretrainClips(val_paths, 1, img_size, 1, crop_scales=[1], seed=args.seed)
    run.plan(len(paths) + len(images), unit="samples")
    ramp_steps = int(run.total_steps * args.con_ramp / args.epochs)

    # ---- model
    model = ViCMAE(args.size, img_size=args.img_size, patch_size=args.patch_size,
                   dec_depth=args.decoder_depth, dec_width=args.decoder_width,
                   dec_heads=args.decoder_heads, norm_pix_loss=args.norm_pix_loss,
                   checkpointing=args.checkpointing, proj_width=args.proj_width,
                   proj_dim=args.proj_dim, temperature=args.temperature,
                   **image_parts(args.init, num_frames=1, tubelet_size=1))
    num_tokens = math.prod(model.grid)
    num_visible = num_tokens - masking.num_masked("tube", model.grid, args.mask_ratio)
    print_of = lists.fingerprint([*paths, *images]).split()[-1]
    saved = run.resume(model.config, may_change=["init"], image_fraction=image_fraction,
                       contrasted=args.batch_size * run.world,
                       videos=f"{len(paths)} + {len(images)} {print_of}")
    if saved:
        model.restore(saved["config"])
    elif args.init:
        load_pretrained(model, args.init, verbose=run.rank == 0)

    # ---- optimiser
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=run.lr,
                                  betas=(0.9, args.beta2), fused=run.fused)
    sampler = MixedBatches(run.sampler(paths, num_videos) if paths else None,
                           run.sampler(images, num_images) if images else None)
    net = run.start(model, optimizer, train_set, sampler)
    negatives = 2 * args.batch_size * run.world - 2
    chance = math.log(negatives + 1)
    run.say(f"{len(paths)} videos, {len(images)} pictures ({num_images} of {args.batch_size} "
            "samples in a rank's batch), "
            f"{args.size} with {count_params(model) / 1e6:.1f} M parameters, "
            f"token grid {'x'.join(map(str, model.grid))}, {num_visible} of {num_tokens} tokens of "
            f"a view visible; {run.summary('samples')}")
    run.say(f"each view is contrasted with {negatives} others, chance level "
            f"ln({negatives + 1}) = {chance:.3f}"
            + "; --accum_steps adds samples to a step, not negatives" * (run.accum_steps > 1))

    # ---- loop
    for step in run.steps():
        lr = lr_at(step, run.lr, run.min_lr, run.warmup_steps, run.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        con_weight = args.con_weight * (min(1, step / ramp_steps) if ramp_steps else 1)
        # masks of the whole global batch, videos before pictures: the same on any number of ranks
        masks = masking.make_mask("tube", 2 * run.global_batch, model.grid, args.mask_ratio,
                                  run.generator, run.device)
        masks = masks.unflatten(0, (run.global_batch, 2))  # (B, 2, N)
        first_image = run.global_batch // args.batch_size * num_videos
        for place, views in run.batches():  # (B, 2, T, H, W, C) uint8
            of_videos = masks[place * num_videos:][:num_videos]
            of_images = masks[first_image + place * num_images:][:num_images]
            mask = torch.cat([of_videos, of_images])
            with run.autocast:
                rec, con, spread = net(views, mask, num_visible)
            loss = args.rec_weight * rec + con_weight * con
            run.scaler.scale(loss / run.accum_steps).backward()
            run.add(rec=rec, con=con)
        run.update(args.clip_grad)

        if run.due(args.log_every):
            zeros, _ = reconstruct.baselines(model, views.flatten(0, 1), mask.flatten(0, 1))
            mean = run.means()
            run.log("reconstruction {rec:.4f} (zeros {zeros:.4f}) | contrast {con:.4f} "
                    "(chance {chance:.3f}) x {con_weight:.3g} | spread {spread:.2f}",
                    loss=args.rec_weight * mean["rec"] + con_weight * mean["con"],
                    zeros=zeros, chance=chance, con_weight=con_weight, spread=spread)
        if run.due_to_save():
            run.save(model=model.state_dict(), config=model.config)
        if run.due(args.vis_every, at_stop=False, by_time=True) and run.rank == 0:
            run.say(reconstruct.draw(model, shown, "tube", args.mask_ratio,
                                     run.path(f"vis_{run.step:07d}.png"), run.device,
                                     run.autocast, count=8))
    return run.end()


if __name__ == "__main__":
    script_main(main)
