"""lib/contrastive.py, pretrain_vicmae.py, pretrain_moco.py."""

import math
import os
import re
import tempfile

import numpy as np
import torch
import torch.nn.functional as F

import masking
import pretrain_moco
import pretrain_vicmae
import weights
from lib import contrastive
from lib.cubes import normalize_cubes, patchify
from lib.optim import param_groups
from lib.reconstruct import baselines
from model import IMAGENET_MEAN, IMAGENET_STD, Encoder, VideoClassifier, VideoMAE
from tests.common import mistake, raises, read, released_vit, run, saved, test, tmp, toy_videos
from video import pictures


# ---------------------------------------------------------------- lib/contrastive.py

def on_ranks(world, function, *args):
    """function(*args) on `world` gloo ranks -> [what each returns]."""
    import torch.multiprocessing as mp
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_of, (world, folder, function, args), nprocs=world)
        return [torch.load(os.path.join(folder, f"{r}.pt"), weights_only=True)
                for r in range(world)]


def rank_of(rank, world, folder, function, args):
    """One of them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank,
                                         world_size=world)
    torch.save(function(*args), os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def contrast_parts(z):
    """Losses and gradients of this rank's part of z (2, B, d) and of BatchNorm on it, averaged."""
    world = contrastive.world_size()
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    B = z.shape[1] // world
    z = z[:, rank * B:(rank + 1) * B].clone().requires_grad_()
    torch.manual_seed(0)
    norm = contrastive.BatchNorm(z.shape[2])
    torch.nn.init.normal_(norm.weight)
    normed = norm(z.flatten(0, 1)).unflatten(0, (2, B))
    loss, _ = contrastive.info_nce(normed, 0.1)
    loss = loss + contrastive.info_nce_keys(normed[0], normed[1], 0.2)
    loss.backward()
    return dict(loss=loss.detach(), z=z.grad / world, weight=norm.weight.grad / world)


@test
def test_info_nce():
    """A float64 loop: itself left out, one positive, others negative; 3 ranks equal one process."""
    torch.manual_seed(0)
    z = torch.randn(2, 6, 5)
    unit = F.normalize(z.double(), dim=-1).flatten(0, 1)
    slow = 0
    for i in range(12):
        scores = [float(unit[i] @ unit[j]) / 0.1 for j in range(12) if j != i]
        positive = float(unit[i] @ unit[(i + 6) % 12]) / 0.1
        slow += (math.log(sum(map(math.exp, scores))) - positive) / 12
    loss, spread = contrastive.info_nce(z, 0.1)
    assert abs(loss.item() - slow) < 1e-6
    assert 0.8 < spread < 1.1 and contrastive.spread_of(torch.ones(9, 5)) < 1e-3
    query, key = F.normalize(z.double(), dim=-1)
    scores = (query @ key.T / 0.2).tolist()
    losses = [math.log(sum(map(math.exp, row))) - row[i] for i, row in enumerate(scores)]
    slow = sum(losses) / 6 * 0.4
    assert abs(contrastive.info_nce_keys(*z, 0.2).item() - slow) < 1e-6
    # all agree with their positive, with no other: log(e^10 + 10) - 10
    far = torch.eye(6).expand(2, 6, 6)
    assert abs(contrastive.info_nce(far, 0.1)[0] - math.log(math.exp(10) + 10) + 10) < 1e-5
    whole, parts = contrast_parts(z), on_ranks(3, contrast_parts, z)
    assert abs(np.mean([p["loss"] for p in parts]) - whole["loss"]) < 1e-5
    assert torch.allclose(torch.cat([p["z"] for p in parts], 1), whole["z"], atol=1e-6)
    assert torch.allclose(sum(p["weight"] for p in parts), whole["weight"], atol=1e-5)


@test
def test_contrastive_heads():
    """BatchNorm is torch's with batch statistics; layers are named as the released weights'."""
    torch.manual_seed(0)
    x = torch.randn(16, 7) * 3 + 1
    assert torch.allclose(contrastive.BatchNorm(7)(x), torch.nn.BatchNorm1d(7)(x), atol=1e-5)
    names = contrastive.head(5, 8, 8, 3).state_dict()
    assert sorted({k.split(".")[0] for k in names}) == list("01346")
    last = contrastive.head(5, 8, 3, last_norm=True)
    out = last(torch.randn(32, 5))
    assert [k for k in last.state_dict() if "bias" in k] == ["1.bias"]
    assert out.mean(0).abs().max() < 1e-5 and (out.std(0, correction=0) - 1).abs().max() < 1e-3


# ---------------------------------------------------------------- pretrain_vicmae.py

VICMAE = dict(size="tiny", img_size=32, dec_depth=1, dec_width=96, dec_heads=3, proj_width=32,
              proj_dim=8)


@test
def test_joint_targets_and_image_embedding():
    """Zeros score 767/768 under joint targets; one frame's embedding is a 2-D convolution."""
    torch.manual_seed(0)
    model = pretrain_vicmae.ViCMAE(**VICMAE)
    video = torch.rand(3, 1, 32, 32, 3)
    mask = masking.make_mask("tube", 3, model.grid, 0.75)
    zeros, _ = baselines(model, video, mask)
    assert abs(zeros - 767 / 768) < 1e-3
    cubes = patchify(video, model.cube).double()  # (3, 4, 768)
    slow = (cubes - cubes.mean(2, keepdim=True)) / (cubes.var(2, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(normalize_cubes(cubes, True).double(), slow, atol=1e-5)
    eight = (video * 255).round().byte()
    assert torch.allclose(normalize_cubes(patchify(eight, model.cube), True),
                          normalize_cubes(patchify(eight / 255, model.cube), True), atol=1e-4)
    x = ((video - model.encoder.mean[:3]) / model.encoder.std[:3])[:, 0].permute(0, 3, 1, 2)
    proj = model.encoder.patch_embed.proj
    conv = F.conv2d(x, proj.weight[:, :, 0], proj.bias, stride=16).flatten(2).mT
    assert torch.allclose(model.encoder.embed(video), conv + model.encoder.pos, atol=1e-4)
    views = torch.rand(3, 2, 1, 32, 32, 3)
    masks = masking.make_mask("tube", 6, model.grid, 0.75).unflatten(0, (3, 2))
    rec, con, _ = model(views, masks)
    each = [VideoMAE.forward(model, views[:, k], masks[:, k])[0] for k in range(2)]
    assert abs(rec - sum(each) / 2) < 1e-5 and con > 0


@test
def test_image_models_become_video_models():
    """Of a repeated frame the inflated encoder's pooled output is the image encoder's."""
    torch.manual_seed(0)
    source = pretrain_vicmae.ViCMAE(**VICMAE)
    path = saved("vicmae.pt", dict(model=source.state_dict(), config=source.config))
    image = VideoClassifier(3, size="tiny", num_frames=1, img_size=32, tubelet_size=1)
    video = VideoClassifier(3, size="tiny", num_frames=8, img_size=32, tubelet_size=2,
                            temporal_pos=True)
    for model in (image, video):
        report = weights.load_pretrained(model, path, verbose=False)
        assert {k.split(".")[0] for k in report["new"]} <= {"fc_norm", "head", "temporal_pos"}
    frame = torch.rand(2, 1, 32, 32, 3)
    clip = frame.expand(-1, 8, -1, -1, -1)
    pooled = [Encoder.forward(m, x).mean(1) for m, x in ((image, frame), (video, clip))]
    assert torch.allclose(*pooled, atol=1e-5) and pooled[0].std() > 0.1
    with torch.no_grad():
        video.temporal_pos.normal_()
    assert not torch.allclose(pooled[0], Encoder.forward(video, clip).mean(1), atol=0.01)
    for model, lacks in ((source, "jointly normalised"), (video, "a temporal pos")):
        with raises("transformers", lacks):
            weights.to_hf(model)
    parts = weights.image_parts(path, num_frames=4, tubelet_size=2)  # --init's
    mae = VideoMAE("tiny", 4, 32, dec_depth=1, **parts)
    weights.load_pretrained(mae, path, verbose=False)
    assert mae.encoder.pos[:4].equal(mae.encoder.pos[4:])
    assert mae.encoder.temporal_pos.shape == (2, 128)
    assert not mae.dec_pos[:4].equal(mae.dec_pos[4:])  # the decoder is new: it knows time
    wide = VideoMAE("tiny", 1, 32, tubelet_size=1, dec_depth=1, dec_width=48)
    # another decoder: the encoder alone
    report = weights.load_pretrained(wide, path, verbose=False)
    assert "width 96" in report["skipped"]["mask_token"] and "decoder.head.weight" in report["new"]
    assert wide.encoder.blocks[0].mlp.fc1.weight.equal(source.encoder.blocks[0].mlp.fc1.weight)
    groups = {id(p): g for g in param_groups(video, 0.05, 0.5) for p in g["params"]}
    group = groups[id(video.temporal_pos)]
    assert group["weight_decay"] == 0 and group["lr_scale"] == 0.5 ** 5
    again = saved("clip.pt", dict(model=video.state_dict(), config=video.config))
    back, about = weights.build_model(again, verbose=False)
    assert torch.allclose(back(clip), video.eval()(clip), atol=1e-6)
    # for eval.py: its decoder and targets come along
    back, about = weights.build_model(path, verbose=False)
    mask = masking.make_mask("tube", 2, back.grid, 0.5)
    assert back.joint_norm
    assert torch.allclose(back(frame, mask)[1], VideoMAE.forward(source.eval(), frame, mask)[1])


@test
def test_public_vicmae():
    """The public code's positives, BatchNorm, targets are other ones, as docs/methods.md says."""
    page = read("docs/methods.md")
    W, B = 3, 2  # ranks, samples of each; a view is (rank, view, sample)
    views = [(r, v, i) for r in range(W) for v in range(2) for i in range(B)]
    for a in views:  # sample numbers, which each rank counts from 0, are compared
        positives = [b for b in views if b != a and b[2] == a[2]]
        assert len(positives) == 2 * W - 1 == 5 and {b[0] for b in positives} == {0, 1, 2}
    assert "2W - 1, five on three ranks" in page
    alike = torch.ones(2, W * B, 4)  # the chance level: 1 of 11 others here, 5 of 11 there
    assert abs(contrastive.info_nce(alike, 0.1)[0] - math.log(11)) < 1e-5
    assert "| ln(2BW - 1) | ln((2BW - 1) / (2W - 1)) |" in page
    torch.manual_seed(0)
    x, norm = torch.randn(2, 8, 5) + torch.tensor([1.0, -1]).view(2, 1, 1), contrastive.BatchNorm(5)
    by_view = torch.stack([norm(view) for view in x])
    assert (norm(x.flatten(0, 1)).unflatten(0, (2, 8)) - by_view).abs().mean() > 0.3
    cubes = torch.rand(6, 8, 8, 1).expand(6, 8, 8, 3).reshape(6, 192)  # grey
    mean, std = (torch.tensor(c).repeat(64) for c in (IMAGENET_MEAN, IMAGENET_STD))
    theirs = normalize_cubes((cubes - mean) / std, True)
    assert 0.05 < (theirs - normalize_cubes(cubes, True)).square().mean().sqrt() < 0.5
    # --toy is another setting
    args = pretrain_vicmae.get_args(["--toy"])
    for name, value in vars(args).items():
        text = " ".join(map(str, value)) if isinstance(value, list) else value
        if value != args.defaults[name] and name not in ("toy", "data", "log_every"):
            assert re.search(rf"--{name} {re.escape(str(text))}\s", page), (name, text)


# ---------------------------------------------------------------- pretrain_moco.py

@test
def test_moco_follows():
    """Keys have no gradient, copies follow their formula, momentum ends at 1."""
    torch.manual_seed(0)
    model = pretrain_moco.MoCo(32, 8, size="tiny", num_frames=4, img_size=32)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss, spread = model(torch.rand(4, 2, 4, 32, 32, 3))
    loss.backward()
    assert all(p.grad is None for p in model.followers())
    assert model.encoder.patch_embed.proj.weight.grad is None
    assert all(p.grad is not None for p in model.encoder.blocks.parameters())
    optimizer.step()
    model.follow(0.75)
    state = model.state_dict()
    for name, x in state.items():
        if name.startswith("momentum_"):
            leader = name.removeprefix("momentum_")
            assert torch.allclose(x, 0.75 * start[name] + 0.25 * state[leader], atol=1e-6), name
    assert torch.equal(state["encoder.patch_embed.proj.weight"],
                       start["encoder.patch_embed.proj.weight"])
    at = [pretrain_moco.momentum_at(s, 11, 0.99) for s in range(11)]
    assert at[0] == 0.99 and at[10] == 1 and abs(at[5] - 0.995) < 1e-9 and at == sorted(at)


# ---------------------------------------------------------------- both

@test
def test_contrastive_mistakes():
    """Impossible flags of the contrastive stages are named, with what is allowed."""
    folder = toy_videos()
    out = ["--out_dir", tmp("contrast_mistake"), "--num_workers", 0, "--size", "tiny"]
    videos, images = ["--data", folder], ["--data", folder, "--images", folder]
    for module, args, words in (
            (pretrain_vicmae, [], ["--data", "--images", "--toy"]),
            (pretrain_moco, [], ["--data", "--toy"]),
            (pretrain_vicmae, [*videos, "--image_fraction", 0.3], ["--images"]),
            (pretrain_vicmae, [*images, "--image_fraction", 1], ["below 1"]),
            (pretrain_vicmae, [*videos, "--batch_size", 1], ["--batch_size 1", "2 or more"]),
            (pretrain_vicmae, [*videos, "--rec_weight", 0, "--con_weight", 0], ["nothing"]),
            (pretrain_vicmae, ["--images", "nowhere"], ["nowhere"]),
            (pretrain_moco, [*videos, "--batch_size", 1], ["--batch_size 1", "2 or more"]),
            (pretrain_moco, [*videos, "--momentum", 1.5], ["--momentum 1.5"]),
            (pretrain_moco, [*videos, "--num_frames", 3], ["num_frames=3", "tubelet_size=2"])):
        text = mistake(module, *args, *out)
        assert all(w in text for w in words), (args, text)


@test
def test_picture_folders_end_to_end():
    """Class folders of pictures: pre-training, fine-tuning of a released ViT, probe, test, k-NN."""
    rng, folder = np.random.default_rng(0), tmp("pictures")
    shape = ["--img_size", 32, "--num_workers", 0]
    for label, color in (("red", (200, 40, 40)), ("green", (40, 200, 40)), ("blue", (40, 40, 200))):
        os.makedirs(os.path.join(folder, label))
        for i in range(6):
            image = rng.integers(-40, 40, (40, 48, 3)) + np.array(color)
            image = image.clip(0, 255).astype(np.uint8)
            pictures.write_png(os.path.join(folder, label, f"{i}.png"), image)
    out = {name: tmp(f"pictures_{name}") for name in ("pre", "probe", "tuned", "test", "knn")}
    flags = """--size tiny --patch_size 8 --batch_size 6 --max_steps 3 --proj_width 16
        --decoder_depth 1""".split()
    text = run("pretrain_vicmae.py", "--images", folder, *shape, *flags, "--out_dir", out["pre"])
    assert "0 videos, 18 pictures" in text
    pre = os.path.join(out["pre"], "last.pt")
    released = saved("released.pth", dict(model=released_vit(0)))
    small_run = ["--data", folder, "--val_data", folder, *shape, "--batch_size", 6,
                 "--eval_every", 99]
    run("finetune.py", "--linear_probe", "--init", pre, *small_run, "--max_steps", 2,
        "--out_dir", out["probe"])
    flags = """--epochs 12 --warmup_epochs 2 --lr 0.1 --mixup 0 --cutmix 0
        --rand_aug 0 0 0""".split()
    text = run("finetune.py", "--init", released, *small_run, *flags, "--out_dir", out["tuned"])
    assert "one frame" in text and "cls_token" not in text
    tuned = os.path.join(out["tuned"], "last.pt")
    text = run("eval.py", "--ckpt", tuned, "--data", folder, "--num_segments", 1,
               "--num_crops", 1, "--num_workers", 0, "--out_dir", out["test"])
    assert "top-1 100.00" in text, text  # the colour is the label
    text = run("eval.py", "--ckpt", pre, "--knn", folder, "--data", folder, "--k", 1,
               "--num_workers", 0, "--out_dir", out["knn"])
    assert "k = 1: top-1 100.00" in text, text
