"""weights.py: weights of others in, ours out."""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import sys
import tempfile
from unittest import mock

import torch
import torch.nn.functional as F

import eval as evaluate
import weights
from lib.cubes import position_table
from lib.features import features
from model import IMAGENET_MEAN, IMAGENET_STD, Encoder, VideoClassifier, VideoMAE
from tests.common import (Skip, call, checkpoint, clips, mask_for, raises, released_vit, run, saved,
                          small, test, tmp, toy_videos)


@test
def test_reference_layout():
    """model/module, Namespace, fp16, with and without encoder.: files load to the same tensors."""
    source = small()
    state = source.state_dict()
    for top in (dict(model=state, args=argparse.Namespace(lr=1)),
                dict(module={k: v.half() for k, v in state.items()}), state,
                {"module." + k: v for k, v in state.items()}):
        model = VideoMAE("tiny", num_frames=4, img_size=(16, 24), patch_size=8)
        report = weights.load_pretrained(model, saved("x.pth", top), verbose=False)
        assert not report["new"] and not report["skipped"]
        assert all(torch.allclose(v, state[k], atol=1e-3) for k, v in model.state_dict().items())
    classifier = VideoClassifier(7, size="tiny", num_frames=4, img_size=(16, 24), patch_size=8)
    report = weights.load_pretrained(classifier, saved("x.pth", dict(model=state)), verbose=False)
    assert set(report["new"]) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert "norm.weight" in report["skipped"] and "decoder.norm.weight" in report["skipped"]
    assert torch.equal(classifier.blocks[3].mlp.fc2.weight,
                       state["encoder.blocks.3.mlp.fc2.weight"])


@test
def test_layouts_of_videomae_v2():
    """Patches of 14 pixels mean positions of 16x16; a hub's encoder without head, named model.*."""
    source = VideoClassifier(3, size="tiny", patch_size=14)
    state = source.state_dict()
    released = saved("ft.pth", dict(module={k: v.half() for k, v in state.items()}))
    model, _ = weights.build_model(released, verbose=False)
    assert model.grid == (8, 16, 16) and model.config["pos_grid"] == [8, 16, 16]
    assert torch.equal(model.pos, source.pos)
    hub = saved("hub.bin", {f"model.{k}": v for k, v in state.items() if "head." not in k})
    model = VideoClassifier(3, **weights.encoder_shape(hub))
    report = weights.load_pretrained(model, hub, verbose=False)
    assert not report["skipped"] and set(report["new"]) == {"head.weight", "head.bias"}
    assert torch.equal(model.pos, source.pos)
    assert torch.equal(model.blocks[3].mlp.fc2.weight, source.blocks[3].mlp.fc2.weight)


@test
def test_malicious_and_broken_files_are_refused():
    """A pickle that would run code is not run; what is no checkpoint is named."""
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + tmp("evil"),)
    with raises("x.pth", "it holds a pickled", "system"):
        weights.load_pretrained(small(), saved("x.pth", dict(model=Evil())))
    assert not os.path.exists(tmp("evil"))
    with raises("absent.pth", "no such file"):
        weights.load_pretrained(small(), "absent.pth")
    with raises("x.pth", "no ViT in a known layout"):
        weights.load_pretrained(small(), saved("x.pth", dict(model=dict(a=torch.zeros(2)))))


@test
def test_shape_mismatch_names_both_shapes():
    """Another width is an error with both shapes; other classes leave a new head and say so."""
    with raises("encoder.patch_embed.proj.weight", "(128, 3, 2, 8, 8)", "(384, 3, 2, 8, 8)"):
        wider = VideoMAE("small", num_frames=4, img_size=16, patch_size=8)
        weights.load_pretrained(wider, saved("x.pth", small().state_dict()))
    make = lambda n: VideoClassifier(n, size="tiny", num_frames=4, img_size=16, patch_size=8)
    report = weights.load_pretrained(make(3), saved("x.pth", make(5).state_dict()), verbose=False)
    assert report["new"]["head.weight"] == "(5, 128) in the file, (3, 128) in this model"


@test
def test_other_frames_and_sides():
    """At another T, H, W all loads; only position tables are resized, from the file's own grid."""
    source = small()
    path = saved("x.pt", dict(model=source.state_dict(), config=source.config))
    model = VideoMAE("tiny", num_frames=8, img_size=32, patch_size=8)
    report = weights.load_pretrained(model, path, verbose=False)
    assert not report["new"] and not report["skipped"] and model.config["pos_grid"] == [2, 2, 3]
    assert torch.equal(model.encoder.pos, position_table((4, 4, 4), 128, (2, 2, 3)))
    assert torch.equal(model.dec_pos, position_table((4, 4, 4), 96, (2, 2, 3)))
    assert torch.equal(VideoMAE(**model.config).encoder.pos, model.encoder.pos)


@test
def test_new_positions():
    """--positions new: logits of a model made with the other grid; kept in config; not for ViTs."""
    torch.manual_seed(0)
    shape = dict(size="tiny", num_frames=4, img_size=(16, 24), patch_size=8)
    source = VideoClassifier(3, **shape)
    for p in source.parameters():
        p.data += 0.05 * torch.randn_like(p)
    path = saved("x.pt", dict(model=source.state_dict(), config=source.config))
    wanted = VideoClassifier(3, **shape | dict(num_frames=8, img_size=(32, 32))).eval()
    wanted.load_state_dict(source.state_dict())
    # cell p of the 4x4x4 grid, in raster order: sin and cos of p / 10000^(2 (j // 2) / 128)
    assert abs(wanted.pos[21, 4] - math.sin(21 / 10000 ** (4 / 128))) < 1e-6
    make = lambda positions: weights.build_model(path, 8, (32, 32), False, positions)[0]
    new, resized = make("new"), make("resize")
    video = clips(new)
    with torch.no_grad():
        assert torch.equal(new(video), wanted(video))
        difference = (resized(video) - wanted(video)).abs().max()
    assert 0.02 < difference < 2, difference
    again = saved("x.pt", dict(model=new.state_dict(), config=new.config))
    assert torch.equal(weights.build_model(again, verbose=False)[0].pos, wanted.pos)
    mae = saved("x.pt", dict(model=small().state_dict(), config=small().config))
    mae = weights.build_model(mae, 8, (32, 32), False, "new")[0]
    assert torch.equal(mae.dec_pos, position_table((4, 4, 4), 96, (4, 4, 4)))
    path = saved("vit.pth", dict(model=released_vit(0)))
    with raises("vit.pth", "learned", "--positions new"):
        weights.build_model(path, img_size=(48, 48), verbose=False, positions="new")


def plain_vit(state: dict, images: torch.Tensor, blocks: int, heads: int,
              keep=None) -> torch.Tensor:
    """An image ViT in timm's layout: (B, 3, H, W) -> (B, 1 + N, D) after its last block.

    images are normalised; keep: the patches that it sees.
    """
    def linear(x, name):
        return x @ state[name + ".weight"].T + state[name + ".bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * state[name + ".weight"] + state[name + ".bias"]
    weight = state["patch_embed.proj.weight"]
    x = F.conv2d(images, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    x = x if keep is None else x[:, [0] + [1 + i for i in keep]]
    B, N, D = x.shape
    for i in range(blocks):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").split(D, -1)
        q, k, v = (y.reshape(B, N, heads, D // heads).transpose(1, 2) for y in (q, k, v))
        a = (q @ k.transpose(2, 3) / (D // heads) ** 0.5).softmax(-1) @ v
        x = x + linear(a.transpose(1, 2).reshape(B, N, D), f"blocks.{i}.attn.proj")
        h = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        x = x + linear(h * 0.5 * (1 + torch.erf(h / 2 ** 0.5)), f"blocks.{i}.mlp.fc2")
    return x


@test
def test_image_vits_load():
    """Image ViTs as released, and inflated for one temporal slot, give a plain ViT's outputs."""
    # in more slots there is still one class token, with a smaller share of the attention; without
    # a class token test_image_models_become_video_models has more
    frames = torch.randint(0, 256, (2, 1, 32, 32, 3), dtype=torch.uint8)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    images = ((frames[:, 0] / 255 - mean) / std).permute(0, 3, 1, 2)
    decoder = {"mask_token": (1, 1, 64), "decoder_pos_embed": (1, 17, 64),
               "decoder_embed.weight": (64, 128), "decoder_embed.bias": (64,),
               "decoder_blocks.0.attn.qkv.bias": (192,), "decoder_norm.weight": (64,),
               "decoder_pred.weight": (192, 64), "projector.0.weight": (96, 128),
               "projector.6.bias": (16,)}
    state = released_vit(0, **decoder)
    path = saved("vicmae.pth", dict(model=state, epoch=3))
    wanted = plain_vit(state, images, 4, 4)
    shape = weights.encoder_shape(path)
    assert shape == dict(size="tiny", num_frames=1, img_size=(32, 32), patch_size=8, tubelet_size=1,
                         spatial_pos=True, class_token=True)
    model, about = weights.build_model(path, verbose=False)  # an encoder alone
    assert model.decoder is None
    with torch.no_grad():
        tokens = model.encoder(frames)
        error = (tokens - wanted[:, 1:]).abs().max()
        assert torch.allclose(tokens, wanted[:, 1:], atol=1e-4), error
        keep = [3, 0, 9]  # with the class token, as under a mask
        few = model.encoder(frames, torch.tensor([keep, keep]))
        assert torch.allclose(few, plain_vit(state, images, 4, 4, keep)[:, 1:], atol=1e-4)
        last = features(model, frames)
        norm = state["norm.weight"], state["norm.bias"]
        normed = F.layer_norm(wanted[:, 1:], (128,), *norm, 1e-6)
        assert torch.allclose(last, normed.mean(1), atol=1e-4)
        shape = weights.encoder_shape(path, num_frames=8, tubelet_size=2)
        assert shape["temporal_pos"]
        video = VideoClassifier(3, **shape)
        report = weights.load_pretrained(video, path, verbose=False)
        assert not [k for k in report["skipped"]
                    if k.startswith(("cls", "class", "pos", "blocks", "patch"))]
        assert set(report["new"]) == {"temporal_pos", "fc_norm.weight", "fc_norm.bias",
                                      "head.weight", "head.bias"}
        # one temporal slot
        clip = VideoClassifier(3, **weights.encoder_shape(path, num_frames=2, tubelet_size=2))
        weights.load_pretrained(clip, path, verbose=False)
        tokens = Encoder.forward(clip, frames.repeat(1, 2, 1, 1, 1))
        assert torch.allclose(tokens, wanted[:, 1:], atol=1e-4)
    # at 48 pixels the table is resized, the class token's position is not
    large = VideoClassifier(3, **weights.encoder_shape(path, img_size=(48, 48)))
    weights.load_pretrained(large, path, verbose=False)
    table = state["pos_embed"][0, 1:].view(1, 4, 4, 128).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=(6, 6), mode="bicubic", align_corners=False)
    assert torch.allclose(large.spatial_pos, table[0].flatten(1).T, atol=1e-6)
    assert torch.equal(large.class_token, state["cls_token"] + state["pos_embed"][:, :1])
    # a classifier fine-tuned as MAE's: mean over the patches, fc_norm, head
    tuned = released_vit(1, **{"fc_norm.weight": (128,), "fc_norm.bias": (128,),
                               "head.weight": (5, 128), "head.bias": (5,)})
    del tuned["norm.weight"], tuned["norm.bias"]
    classifier, _ = weights.build_model(saved("tuned.pth", dict(model=tuned)), verbose=False)
    x = plain_vit(tuned, images, 4, 4)[:, 1:].mean(1)
    x = F.layer_norm(x, (128,), tuned["fc_norm.weight"], tuned["fc_norm.bias"], 1e-6)
    logits = x @ tuned["head.weight"].T + tuned["head.bias"]
    assert torch.allclose(classifier(frames), logits, atol=1e-4)
    # what is ours again, from our own checkpoint: nothing lost; what is no such ViT is named
    again = saved("ours.pt", dict(model=large.state_dict(), config=large.config))
    back, _ = weights.build_model(again, verbose=False)
    x = torch.rand(1, 1, 48, 48, 3)
    assert torch.equal(back(x), large.eval()(x))
    for wrong in (dict(reg_token=torch.zeros(1, 4, 128)), dict(pos_embed=torch.zeros(1, 19, 128))):
        try:
            weights.read_weights(saved("odd.pth", state | wrong))
        except ValueError as e:
            assert "odd.pth" in str(e) and ("reg_token" in str(e) or "19 positions" in str(e))
        else:
            raise AssertionError(f"{list(wrong)} was taken")


@test
def test_hf_layout_round_trip():
    """to_hf and back gives the same tensors, under both spellings of the q and v biases."""
    source = small(num_frames=16, img_size=112, patch_size=16)
    state, config = weights.to_hf(source)
    spelt = lambda k: k.replace(".q_bias", ".query.bias").replace(".v_bias", ".value.bias")
    v5 = {spelt(k): v for k, v in state.items()}
    for names in (state, v5):
        path = saved("pytorch_model.bin", names)
        json.dump(config, open(os.path.join(os.path.dirname(path), "config.json"), "w"))
        model = VideoMAE("tiny", num_frames=16, img_size=112, patch_size=16)
        report = weights.load_pretrained(model, os.path.dirname(path), verbose=False)
        assert not report["new"] and not report["skipped"] and model.config == source.config
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in source.state_dict().items())


@test
def test_hf_folders_tell_more():
    """A Hugging Face folder's mean and std, decoder and targets become the model's; heads fit."""
    mean, std = [0.5, 0.4, 0.3], [0.25, 0.5, 0.5]
    source = small(mean=mean, std=std, dec_width=64, dec_heads=2, norm_pix_loss=False).eval()
    folder = tmp("told")
    weights.write_hf(folder, source, None)
    model, _ = weights.build_model(folder, verbose=False)
    assert model.config == source.config
    with torch.no_grad():
        for mine, theirs in zip(model(clips(model), mask_for(model)),
                                source(clips(source), mask_for(source))):
            assert torch.equal(mine, theirs)
    tuned = VideoClassifier(3, **weights.encoder_shape(folder))  # as finetune.py --init makes it
    assert tuned.config["mean"] == mean and tuned.config["std"] == std
    assert weights.image_parts(folder) == dict(mean=mean, std=std)  # pretrain.py --init
    path = os.path.join(folder, "config.json")
    config = json.load(open(path))
    json.dump(config | dict(num_attention_heads=8), open(path, "w"))
    with raises("told", "8 heads", "expected 4"):
        weights.read_weights(folder)


def cached(root: str, name: str, model, classes=None) -> str:
    """Puts a model into a cache as huggingface_hub lays it out -> the folder of its files."""
    sha, base = "0123456789" * 4, os.path.join(root, f"models--{name.replace('/', '--')}")
    os.makedirs(os.path.join(base, "refs"))
    open(os.path.join(base, "refs", "main"), "w").write(sha)
    weights.write_hf(os.path.join(base, "snapshots", sha), model, classes)
    return os.path.join(base, "snapshots", sha)


@test
def test_models_by_name():
    """hf:owner/model, from the cache alone: predicts with its classes, goes on, else a sentence."""
    if not importlib.util.find_spec("huggingface_hub"):
        raise Skip("pip install huggingface_hub to load models by name")
    shape, cache = dict(num_frames=4, img_size=32, patch_size=8), tmp("hub")
    mae, classifier = small(**shape), VideoClassifier(3, size="tiny", **shape)
    torch.nn.init.normal_(classifier.head.weight)
    cached(cache, "me/mae", mae)
    folder = cached(cache, "me/tuned", classifier, ["run", "jump", "wave"])
    state = weights.to_hf(classifier)[0]  # as older repositories have it
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, "model.safetensors"))
    torch.save(state, os.path.join(folder, "pytorch_model.bin"))
    video = os.path.join(toy_videos(), "0.mp4")
    predict = ["--predict", video, "--json", "--device", "cpu", "--dtype", "fp32", "--out_dir",
               tmp("by_name_eval"), "--ckpt"]
    flags = """--size tiny --num_frames 4 --img_size 32 --patch_size 8 --sampling_rate 1 --lr 0
        --weight_decay 0 --batch_size 4 --max_steps 1 --warmup_epochs 0 --num_workers 0
        --device cpu""".split()
    with mock.patch.dict(os.environ, HF_HUB_CACHE=cache, HF_HUB_OFFLINE="1"):
        text = run("eval.py", *predict, "hf:me/tuned@main")
        run("pretrain.py", *flags, "--data", toy_videos(), "--init", "hf:me/mae", "--out_dir",
            tmp("by_name"))
        wrong = run("eval.py", *predict, "hf:me/mae@v2", ok=False)
    assert "eval.py: hf:me/mae@v2: it is not in the cache" in wrong and cache in wrong, wrong
    assert "HF_HUB_OFFLINE is set" in wrong and "Traceback" not in wrong
    with raises("hf:no name: expected hf:owner/model"):
        weights.read_weights("hf:no name")
    assert text.endswith(call(evaluate, *predict, folder)) and "jump" in text
    went_on = checkpoint(tmp("by_name"))
    assert went_on["args"]["init"] == "hf:me/mae"
    assert all(torch.equal(went_on["model"][k], v) for k, v in mae.state_dict().items())


@test
def test_models_by_name_need_a_package():
    """Without huggingface_hub, hf:owner/model says what to install."""
    with mock.patch.dict(sys.modules, huggingface_hub=None), \
            raises("hf:me/some", "pip install huggingface_hub"):
        weights.read_weights("hf:me/some")


@test
def test_what_cannot_be_exported_is_said_first():
    """Loading into a model to be trained says what --export_hf will refuse, looking at one not."""
    source = small()
    path = saved("x.pt", dict(model=source.state_dict(), config=source.config))
    vit = saved("vit.pth", dict(model=released_vit(0)))
    same = dict(size="tiny", num_frames=4, img_size=(16, 24), patch_size=8)
    longer, grids = same | dict(num_frames=8), ("(2, 2, 3)", "(4, 2, 3)")
    told = [f"positions {how}token grid {grid}" for how, grid in (
        ("of ", grids[0]), ("made anew for ", grids[1]), (f"resized from {grids[0]} to ", grids[1]),
        ("of ", "(1, 4, 4)"))]
    for (shape, file, positions, lacks), positions_are in zip((
            (same, path, "resize", None), (longer, path, "new", None),
            (longer, path, "resize", "positions of [2, 2, 3] resized"),
            (weights.encoder_shape(vit), vit, "resize", "a spatial pos, a class token")), told):
        for train in (True, False):
            model, out = VideoClassifier(3, **shape).train(train), io.StringIO()
            with contextlib.redirect_stdout(out):
                weights.load_pretrained(model, file, positions=positions)
            assert ("--export_hf will not" in out.getvalue()) == bool(lacks and train)
            assert positions_are in out.getvalue(), out.getvalue()
            if lacks:
                assert not train or lacks in out.getvalue()
                with raises(lacks):
                    weights.to_hf(model)
            else:
                weights.to_hf(model)


@test
def test_transformers_agrees():
    """Loss, predictions, logits equal Hugging Face's VideoMAE to 1e-5, both ways (if installed)."""
    try:
        import transformers
    except ImportError:
        raise Skip("pip install transformers to compare with it") from None
    def equal_eps(m):  # transformers fixes 1e-5 in two places
        for x in m.modules():
            if isinstance(x, torch.nn.LayerNorm):
                x.eps = 1e-6
        return m.eval()
    ours = small(num_frames=16, img_size=112, patch_size=16)
    classifier = VideoClassifier(5, size="tiny", num_frames=16, img_size=112)
    torch.nn.init.normal_(classifier.head.weight)
    for model, cls in ((ours, transformers.VideoMAEForPreTraining),
                       (classifier, transformers.VideoMAEForVideoClassification)):
        state, config = weights.to_hf(model)
        folder = tempfile.mkdtemp(dir=tmp())
        torch.save(state, os.path.join(folder, "pytorch_model.bin"))
        json.dump(config, open(os.path.join(folder, "config.json"), "w"))
        hf = equal_eps(cls.from_pretrained(folder))
        video, mask = clips(model), mask_for(model)
        x = (video / 255 - torch.tensor(model.config["mean"])) / torch.tensor(model.config["std"])
        for _ in range(2):
            with torch.no_grad():
                theirs = hf(x.permute(0, 1, 4, 2, 3),
                            **(dict(bool_masked_pos=mask) if model is ours else {}))
                if model is ours:
                    loss, mine = model(video, mask)
                    assert abs(loss - theirs.loss) < 1e-5
                else:
                    mine = model.eval()(video)
                assert (mine - theirs.logits).abs().max() < 1e-5
                for p in hf.parameters():  # and back: other weights, saved by transformers
                    p.add_(0.02 * torch.randn_like(p))
            hf.save_pretrained(folder)
            weights.load_pretrained(model, os.path.join(folder, "model.safetensors"), verbose=False)
