"""Attentive probes of a frozen encoder (V-JEPA, arXiv 2404.08471, its frozen evaluation).

    python probe.py --toy --init out/pretrain/last.pt                               # laptop CPU
    python probe.py --init out/pretrain/last.pt --data train.tsv --val_data val.tsv \\
        --accum_steps 8 --probe_lr 3e-4 1e-3 3e-3 --probe_wd 0.01 0.1                 # one GPU
    torchrun --nproc_per_node=8 probe.py --init out/pretrain/last.pt \\
        --data k400_train.tsv --val_data k400_val.tsv

`finetune.py --probe attentive` runs this. Each pair of --probe_lr and --probe_wd is a probe of its
own; all are trained together on the same features. Of each video --num_segments fixed clips are
seen, whose features are computed once where --cache_gb allows. With several probes some training
videos are set aside to choose one; the validation videos have no part in that. At the end a table
shows them all. <out_dir>/best.pt has the chosen one, last.pt goes on with the same command;
eval.py tests either with many views.
"""

import math
import zlib

import numpy as np
import torch
import torch.nn.functional as F

from lib.attentive import AttentiveClassifier
from lib.optim import lr_at
from lib.probe import FixedClips, set_aside
from lib.process import (Parser, amount, count, inner, optim_flags, positive, rate, run_flags,
                         script_main)
from lib.run import Run
from lib.views import TestVideos, scores
from model import count_params
from video import lists
from weights import encoder_shape, load_pretrained


def get_args(argv=None):
    """The flags; an impossible one ends the program and is named."""
    p = Parser(__doc__)
    g = p.add_argument_group("data")
    g.add_argument("--data", nargs="+", default=["toy"],
                   help="list files, folders by class, or the word toy")
    g.add_argument("--val_data", nargs="+", help="list files or folders to test on (toy: its own)")
    g.add_argument("--data_root", default="", help="goes before relative paths of a list")
    g.add_argument("--per_class", type=count,
                   help="train on this many videos of each class only, the first in the list")
    g.add_argument("--num_segments", default=8, type=count,
                   help="clips per video that are judged together (default: 8, sparse: 2)")
    g.add_argument("--num_frames", type=count, help="frames per clip (default: those of --init)")
    g.add_argument("--sampling_rate", default=4, type=count,
                   help="frames from one sampled frame to the next")
    g.add_argument("--fps", type=rate, help="resample videos to this many frames/s first")
    g.add_argument("--sampling", default="dense", choices=["dense", "sparse"],
                   help="sparse (SSv2): frames spread over the whole video")
    g.add_argument("--img_size", type=count,
                   help="pixels, a clip's height and width (default: --init's)")
    g.add_argument("--tubelet_size", type=count,
                   help="frames per cube (default: --init's; an image model is inflated)")
    g = p.add_argument_group("probes")
    g.add_argument("--init", help="the encoder: any layout that weights.py reads")
    g.add_argument("--probe_lr", nargs="+", type=amount,
                   help="peak learning rates per 256 videos, each with each decay (default: --lr)")
    g.add_argument("--probe_wd", nargs="+", type=amount,
                   help="weight decays (default: --weight_decay)")
    g.add_argument("--choose_on", default=0.1, type=inner,
                   help="share of the training videos that is set aside to choose a probe on")
    g.add_argument("--cache_gb", default=50.0, type=amount,
                   help="keep features in out_dir up to this size; larger ones are computed anew "
                        "in each step")
    g = optim_flags(p, "videos", batch_size=32, epochs=20, warmup_epochs=0, lr=1e-3, min_lr=0.0,
                    weight_decay=0.01, beta2=0.999, clip_grad=1.0)
    g = run_flags(p, out_dir="out/probe")
    g.add_argument("--eval_every", default=5.0, type=positive, help="epochs between validations")
    if p.peek(argv).sampling == "sparse":
        p.preset(num_segments=2)
    if p.peek(argv).toy:
        p.preset(sampling_rate=1, num_segments=2, choose_on=0.2, log_every=20,
                 probe_lr=[3e-3, 1e-2, 3e-2], probe_wd=[0.01, 0.1])
    args = p.parse_args(argv)
    if not args.init:
        p.error("--init: which encoder? expected a checkpoint")
    if args.sampling == "sparse" and args.fps:
        p.error("--sampling sparse spans the whole video: leave out --fps")
    return args


def main():
    args = get_args()
    run = Run(args)
    pairs = [(lr, wd) for lr in args.probe_lr or [args.lr]
             for wd in args.probe_wd or [args.weight_decay]]

    # ---- data: all videos in one row, those to train on, to choose on, to test on
    img_size = args.img_size and (args.img_size,) * 2
    shape = encoder_shape(args.init, num_frames=args.num_frames, img_size=img_size,
                          tubelet_size=args.tubelet_size)
    folders = shape["num_frames"] > 1  # of numbered pictures: videos; for clips of one frame, not
    classes, paths, labels, val_paths, val_labels = run.labelled(args, folders)
    aside = np.zeros(len(paths), bool)
    if len(pairs) > 1:
        aside = set_aside(labels, args.choose_on, args.seed)
    order = np.argsort(aside, kind="stable")  # those set aside last
    paths, labels = [paths[i] for i in order], [labels[i] for i in order]
    num_train = len(paths) - int(aside.sum())
    all_paths, all_labels = [*paths, *val_paths], np.array(labels + val_labels)
    ids = dict(choose=np.arange(num_train, len(paths)), val=np.arange(len(paths), len(all_paths)))
    shown = (val_paths, val_labels) if val_paths else (paths[num_train:], labels[num_train:])
    told = lists.describe(classes, paths[:num_train], labels[:num_train], *shown)
    for line in told if run.rank == 0 else ():
        run.say(line)
    if len(pairs) > 1:
        run.say(f"{len(ids['choose'])} of the {len(paths)} training videos are set aside to choose "
                f"one of {len(pairs)} probes on")
    run.plan(num_train, unit="videos")

    # ---- model
    model = AttentiveClassifier(len(classes), len(pairs), **shape)
    saved = run.resume(model.config, classes, ("cache_gb",), dict(chosen=int, validated=int),
                       videos=lists.fingerprint(paths, labels))
    chosen, validated = 0, 0
    if saved:
        model.set_positions(saved["config"]["pos_grid"])
        chosen, validated = saved["chosen"], saved["validated"]
    else:
        load_pretrained(model, args.init, verbose=run.rank == 0)

    # ---- features
    videos = TestVideos(all_paths, shape["num_frames"], shape["img_size"], args.sampling_rate,
                        args.fps, args.sampling, args.num_segments)
    rows = (len(all_paths), args.num_segments * math.prod(model.grid),
            model.encoder.norm.normalized_shape[0])
    fits = 2 * math.prod(rows) <= args.cache_gb * 1e9
    same = zlib.crc32(f"{sorted(run.facts.items(), key=str)} {all_paths}".encode())
    train_set = FixedClips(videos, labels[:num_train], args.seed,
                           run.path(f"features-{same:08x}.f16"), rows if fits else None)

    # ---- optimisers: one per probe
    optimizers = []
    for probe, (lr, weight_decay) in zip(model.probes, pairs):
        groups = [dict(params=[p for p in probe.parameters() if p.ndim > 1]),
                  dict(params=[p for p in probe.parameters() if p.ndim == 1], weight_decay=0.0)]
        optimizers.append(torch.optim.AdamW(groups, lr, (0.9, args.beta2), fused=run.fused,
                                            weight_decay=weight_decay))
        for group in optimizers[-1].param_groups:
            group["peak"] = lr * run.global_batch / 256
    run.lr = max(o.param_groups[0]["peak"] for o in optimizers)  # which the summary tells
    net = run.start(model, optimizers, train_set)
    clips = "x".join(map(str, (args.num_segments, shape["num_frames"], *shape["img_size"])))
    run.say(f"{shape['size']}, {len(pairs)} probe(s) of {count_params(model.probes[0]) / 1e6:.3g} M"
            f" parameters, clips of {clips} per video; {run.summary('videos')}")
    passed = lambda step: int(run.epoch(step) / args.eval_every)  # validations due so far
    known = any(map(len, ids.values()))
    missed = known and (passed(run.step) > passed(validated)
                        or validated < run.step == run.total_steps)
    gigabytes = 2e-9 * math.prod(rows)
    unfinished = run.step < run.total_steps or missed
    if unfinished and not fits:
        run.say(f"the features of {len(all_paths)} videos would take {gigabytes:.1f} GB, more than "
                f"--cache_gb {args.cache_gb:g}: they are computed anew in each step")
    elif unfinished and not (run.first_step and train_set.exists(run)):
        seconds = train_set.keep(run, model, args.batch_size)
        run.say(f"the features of {len(all_paths)} videos, {gigabytes:.2g} GB, are computed and "
                f"kept in {train_set.path} until the run ends ({seconds:.0f} s)")

    def about():
        return dict(classes=classes, chosen=chosen, validated=validated)

    def save():
        run.save(model=model.state_dict(), config=model.config, **about())

    def validate():
        """Accuracy of all probes; chooses one. All ranks get the same figures."""
        nonlocal chosen, validated
        result = {}  # part of the videos -> a result per probe
        for part, some in ids.items():
            if not len(some):
                continue
            probs, failed = train_set.probabilities(run, model, some, args.batch_size)
            for i, why in failed.items() if run.rank == 0 else ():
                run.note_bad(all_paths[i], why)
            if not probs:
                save()
                raise ValueError(f"none of {len(some)} videos ({part}) can be read; the first: "
                                 f"{failed[some[0]]}")
            true, probs = all_labels[list(probs)], np.stack(list(probs.values()), 1)
            result[part] = [scores(p, true) for p in probs]  # probs (probes, V, K)
        validated = run.step
        if "choose" in result:
            worth = [(some["top1"], -np.nan_to_num(some["loss"], nan=np.inf))
                     for some in result["choose"]]
            chosen = worth.index(max(worth))
        row = {f"{part}_{name}": value for part, some in result.items()
               for name, value in some[chosen].items()}
        run.write_row(dict(step=run.step, chosen=chosen, **row, epoch=run.epoch(run.step)))
        run.say(f"validation at step {run.step}:  lr       decay    "
                + "".join(f"{part + ' top-1':>14}{'loss':>8}" for part in result))
        for i, (lr, weight_decay) in enumerate(pairs):
            run.say(f"  probe {i:2}  {lr:<8g} {weight_decay:<8g} "
                    + "".join(f"{some[i]['top1']:14.2f}{some[i]['loss']:8.4f}"
                              for some in result.values())
                    + "  <- chosen" * (len(pairs) > 1 and i == chosen), flush=True)
        state = {k: v for k, v in model.state_dict().items() if not k.startswith("probes.")}
        state |= {f"probes.0.{k}": v for k, v in model.probes[chosen].state_dict().items()}
        run.write("best.pt", model=state, config=model.config | dict(num_probes=1),
                  **about() | dict(chosen=0))

    # ---- loop
    with train_set.kept(run):
        if missed:  # the run was stopped before this one
            validate()
            save()
        for step in run.steps():
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = lr_at(step, group["peak"], run.min_lr, run.warmup_steps,
                                    run.total_steps)
            for place, (x, label) in run.batches():  # (B, n, D) float16, (B); or clips
                with run.autocast:
                    if not fits:  # (B, clips, T, H, W, C) uint8
                        x = model.tokens(x.flatten(0, 1)).unflatten(0, x.shape[:2]).flatten(1, 2)
                    logits = net(x)  # (probes, B, K)
                losses = torch.stack([F.cross_entropy(some.float(), label) for some in logits])
                # the sum, so that each probe has the gradient that it would have alone
                run.scaler.scale(losses.sum() / run.accum_steps).backward()
                run.add(loss=losses.nanmean())  # one that has diverged hides no other
            run.update(args.clip_grad, apart=True)

            if run.due(args.log_every):
                run.log(f"loss {{loss:.4f}} (uniform {math.log(len(classes)):.3f})")
            due = run.step == run.total_steps or passed(run.step) > passed(step)
            if known and due and not (run.stopping or run.failure):
                with run.paused():
                    validate()
            if run.due_to_save():
                save()
    if run.done and known and not run.stopping:
        run.say(f"probe {chosen} in {args.out_dir}/best.pt, all in {run.checkpoint}")
    return run.end()


if __name__ == "__main__":
    script_main(main)
