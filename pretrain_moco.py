"""MoCo v3 (arXiv 2104.02057) on clips: the contrastive baseline of VideoMAE's paper.

    python pretrain_moco.py --toy                                              # laptop CPU: minutes
    python pretrain_moco.py --data my_videos/ --size small --batch_size 16     # one GPU
    torchrun --nproc_per_node=8 pretrain_moco.py --data k400_train.tsv --batch_size 64

Two clips of one video, each with one augmentation draw for all its frames, go through the encoder;
a predictor on one has to tell what a slowly following copy of encoder and projector makes of the
other, among those of all other videos. The image recipe, applied to clips (with --beta2 0.999
--crop_area 0.08 1): the paper that uses it publishes no settings. No masks: a step costs a full ViT
twice with and twice without gradient. The log gives the loss beside chance and the spread of the
queries.
"""

import argparse
import copy
import math

import torch

import data
from lib.contrastive import head, info_nce_keys, spread_of
from lib.feed import MixedBatches
from lib.optim import lr_at, param_groups
from lib.process import (Parser, count, optim_flags, portion, positive, run_flags, script_main,
                         share)
from lib.run import Run
from model import SIZES, Encoder, count_params, init_linears
from video import lists, toy


def get_args(argv=None):
    """The flags; an impossible one ends the program and is named."""
    p = Parser(__doc__)
    flag = argparse.BooleanOptionalAction
    g = p.add_argument_group("data")
    g.add_argument("--data", nargs="+", help="list files, folders, or the word toy")
    g.add_argument("--data_root", default="", help="goes before relative paths of a list")
    g.add_argument("--num_frames", default=16, type=count, help="frames per clip")
    g.add_argument("--sampling_rate", default=4, type=count,
                   help="frames from one sampled frame to the next (SSv2: 2)")
    g.add_argument("--img_size", default=224, type=count, help="pixels, a clip's height and width")
    g.add_argument("--crop_area", nargs=2, default=[0.2, 1], type=portion,
                   help="share of a frame that a view shows")
    g.add_argument("--color", action=flag, default=True,
                   help="jitter, grey, blur, solarising beside crop and flip")
    g = p.add_argument_group("model")
    g.add_argument("--size", default="base", choices=list(SIZES))
    g.add_argument("--patch_size", default=16, type=count, help="pixels (giant: 14)")
    g.add_argument("--tubelet_size", default=2, type=count, help="frames per cube")
    g.add_argument("--proj_width", default=4096, type=count, help="of the heads' hidden layers")
    g.add_argument("--proj_dim", default=256, type=count, help="of what is contrasted")
    g.add_argument("--temperature", default=0.2, type=positive)
    g.add_argument("--momentum", default=0.99, type=share,
                   help="of the copies at first; rises to 1 by half a cosine")
    g.add_argument("--checkpointing", action=flag, default=False,
                   help="recompute activations: less memory, slower")
    optim_flags(p, "videos", batch_size=32, epochs=300, warmup_epochs=40, lr=1.5e-4, min_lr=0.0,
                weight_decay=0.1, beta2=0.95)
    run_flags(p, out_dir="out/moco")
    early = p.peek(argv)
    p.preset(patch_size=SIZES[early.size]["patch_size"])
    if early.toy:
        p.preset(data=["toy"], size="tiny", num_frames=4, sampling_rate=1, img_size=32,
                 patch_size=8, batch_size=64, proj_width=256, proj_dim=64, crop_area=[0.8, 1],
                 color=False, lr=1.2e-2, epochs=60, warmup_epochs=6, log_every=20)
    args = p.parse_args(argv)
    low, high = args.crop_area
    if not args.data:
        p.error("--data: expected list files or folders of videos, or --toy")
    if low > high:
        p.error(f"--crop_area {low} {high}: expected low <= high")
    return args


class MoCo(torch.nn.Module):
    """Encoder, projector, predictor, and the copies of the first two that follow them."""

    def __init__(self, proj_width=4096, proj_dim=256, temperature=0.2, **kwargs):
        super().__init__()
        self.encoder = Encoder(**kwargs)
        D = SIZES[self.encoder.config["size"]]["width"]
        self.encoder.norm = torch.nn.LayerNorm(D, eps=1e-6)
        init_linears(self.encoder)
        # stays as drawn: training it makes MoCo v3 unstable
        self.encoder.patch_embed.requires_grad_(False)
        # the first BatchNorm takes this bias out: it would only drift
        self.encoder.norm.bias.requires_grad_(False)
        self.projector = head(D, proj_width, proj_width, proj_dim, last_norm=True)
        self.predictor = head(proj_dim, proj_width, proj_dim, last_norm=True)
        copies = copy.deepcopy((self.encoder, self.projector))
        self.momentum_encoder, self.momentum_projector = copies
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
        """views (B, 2, T, H, W, C) -> loss of both directions, spread of the queries."""
        pooled = lambda encoder, x: encoder.norm(encoder(x)).mean(1)  # (B, D)
        q = [self.predictor(self.projector(pooled(self.encoder, v)))  # (B, proj_dim)
             for v in views.unbind(1)]
        with torch.no_grad():
            k = [self.momentum_projector(pooled(self.momentum_encoder, v))
                 for v in views.unbind(1)]
        loss = info_nce_keys(q[0], k[1], self.temperature)
        loss = loss + info_nce_keys(q[1], k[0], self.temperature)
        return loss, spread_of(q[0])


def momentum_at(step: int, total: int, start: float) -> float:
    """Half a cosine from `start` at the first step to 1 at the last."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / max(total - 1, 1)))


def main():
    args = get_args()
    run = Run(args)

    # ---- data
    if "toy" in args.data:
        run.once(toy.make_toy_shapes)
    paths, _ = run.videos(args.data, args.data_root, "toy_shapes/train", args.out_dir,
                          args.max_bad, args.num_frames > 1)
    if args.batch_size * run.world < 2:
        raise ValueError("--batch_size 1: nothing to contrast with, expected 2 or more")
    train_set = data.ViewPairs(paths, [], num_frames=args.num_frames,
                               img_size=(args.img_size,) * 2, stride=args.sampling_rate,
                               area=args.crop_area, color=args.color, seed=args.seed)
    run.plan(len(paths), unit="videos")

    # ---- model
    model = MoCo(args.proj_width, args.proj_dim, args.temperature, size=args.size,
                 num_frames=args.num_frames, img_size=args.img_size, patch_size=args.patch_size,
                 tubelet_size=args.tubelet_size, checkpointing=args.checkpointing)
    run.resume(model.config, contrasted=args.batch_size * run.world,
               videos=lists.fingerprint(paths))

    # ---- optimiser
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=run.lr,
                                  betas=(0.9, args.beta2), fused=run.fused)
    sampler = MixedBatches(run.sampler(paths, args.batch_size), None)
    net = run.start(model, optimizer, train_set, sampler)
    keys = args.batch_size * run.world
    chance = 4 * args.temperature * math.log(keys)
    run.say(f"{len(paths)} videos, {args.size} with {count_params(model.encoder) / 1e6:.1f} M "
            f"parameters, token grid {'x'.join(map(str, model.grid))}; {run.summary('videos')}")
    run.say(f"each clip's positive is among {keys} keys, chance level 4 x {args.temperature:g} x "
            f"ln({keys}) = {chance:.3f}"
            + "; --accum_steps adds videos to a step, not negatives" * (run.accum_steps > 1))

    # ---- loop
    for step in run.steps():
        lr = lr_at(step, run.lr, run.min_lr, run.warmup_steps, run.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        momentum = momentum_at(step, run.total_steps, args.momentum)
        model.follow(momentum)  # the copies move before they are asked
        for _, views in run.batches():  # (B, 2, T, H, W, C) uint8
            with run.autocast:
                loss, spread = net(views)
            run.scaler.scale(loss / run.accum_steps).backward()
            run.add(loss=loss)
        run.update(args.clip_grad)

        if run.due(args.log_every):
            run.log("loss {loss:.4f} (chance {chance:.3f}) | spread {spread:.2f} | "
                    "momentum {momentum:.4f}", chance=chance, spread=spread, momentum=momentum)
        if run.due_to_save():
            run.save(model=model.state_dict(), config=model.config)
    return run.end()


if __name__ == "__main__":
    script_main(main)
