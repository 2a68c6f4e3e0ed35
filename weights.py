"""Weights of others: our checkpoints, the reference layout, Hugging Face's and timm's are read.

Hugging Face's is written too, and read by name (hf:owner/model) from its hub or cache. Inside this
project everything has the reference's names.
"""

import functools
import json
import math
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import repeat

from lib.attentive import AttentiveClassifier
from lib.checkpoint import load_torch
from lib.cubes import resize_table
from model import IMAGE_PARTS, SIZES, VideoClassifier, VideoMAE

FROM_HF = [(r"^videomae\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
           (r"^videomae\.encoder\.layer\.", "blocks."),
           (r"^videomae\.layernorm\.", "norm."),
           (r"^decoder\.decoder_layers\.", "decoder.blocks."),
           (r"^classifier\.", "head."),
           (r"\.layernorm_before\.", ".norm1."),
           (r"\.layernorm_after\.", ".norm2."),
           (r"\.attention\.output\.dense\.", ".attn.proj."),
           (r"\.attention\.attention\.", ".attn."),
           (r"\.attn\.query\.bias$", ".attn.q_bias"),
           (r"\.attn\.value\.bias$", ".attn.v_bias"),
           (r"\.intermediate\.dense\.", ".mlp.fc1."),
           (r"\.output\.dense\.", ".mlp.fc2.")]

TO_HF = [(r"^encoder\.", ""),
         (r"^decoder\.blocks\.", "decoder.decoder_layers."),
         (r"^blocks\.", "videomae.encoder.layer."),
         (r"^norm\.", "videomae.layernorm."),
         (r"^head\.", "classifier."),
         (r"^patch_embed\.proj\.", "videomae.embeddings.patch_embeddings.projection."),
         (r"\.norm1\.", ".layernorm_before."),
         (r"\.norm2\.", ".layernorm_after."),
         (r"\.mlp\.fc1\.", ".intermediate.dense."),
         (r"\.mlp\.fc2\.", ".output.dense."),
         (r"\.attn\.proj\.", ".attention.output.dense."),
         (r"\.attn\.", ".attention.attention.")]

HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that a folder has is read

# mean and std of the input in the paper's detection code, whose files do not tell them
DETECTION_MEAN = [122.7717 / 255, 115.9465 / 255, 102.9801 / 255]
DETECTION_STD = [57.375 / 255] * 3


def rename(name: str, patterns: list) -> str:
    """A parameter's name after all the (pattern, replacement), one after the other."""
    for pattern, new in patterns:
        name = re.sub(pattern, new, name)
    return name


# ---- reading ----

def to_reference(state: dict) -> dict:
    """A state dict in any known layout -> reference names without "encoder.", float32."""
    out = {}
    for name, x in state.items():
        if name.startswith(("videomae.", "decoder.decoder_layers.", "classifier.")):
            name = rename(name, FROM_HF)
        name = re.sub(r"^roi_heads\..*cls_score\.", "cls_score.", name)  # AlphAction's
        out[re.sub(r"^(module\.|model\.)?(backbone\.|encoder\.)?", "", name)] = x.float()
    for name in [k for k in out if k.endswith(".query.weight")]:
        stem = name.removesuffix("query.weight")
        parts = [out.pop(f"{stem}{part}.weight") for part in ("query", "key", "value")]
        out[stem + "qkv.weight"] = torch.cat(parts)
    for name in [k for k in out if k.endswith(".qkv.bias")]:
        q, _, v = out.pop(name).chunk(3)  # timm: k's bias cancels in the softmax
        out[name.replace("qkv.bias", "q_bias")] = q
        out[name.replace("qkv.bias", "v_bias")] = v
    # the paper's detectors have a norm and a head; so have image ViTs and Hugging Face's that read
    # a class token or token 0, while a classifier of the mean has fc_norm and head
    cubes = out.get("patch_embed.proj.weight", torch.empty(0))
    if {"norm.weight", "head.weight"} <= out.keys() and "fc_norm.weight" not in out:
        if cubes.ndim == 5 and not any(name.startswith("videomae.") for name in state):
            out = {re.sub(r"^head\.", "cls_score.", name): x for name, x in out.items()}
    return out


def image_positions(state: dict, path: str) -> int:
    """The positions of an image ViT, in place: pos_embed -> spatial_pos (N, D); -> their side.

    state has reference names. A row for the class token (timm's and MAE's first) is added to that,
    since only the sum is ever used.
    """
    table, token = state.pop("pos_embed")[0], state.pop("cls_token", None)  # (N or 1 + N, D)
    found = [k for k in ("dist_token", "reg_token", "norm_pre.weight") if k in state]
    side, inner = math.isqrt(len(table)), math.isqrt(len(table) - 1)
    square = side ** 2 == len(table)
    if not square and (token is None or inner ** 2 != len(table) - 1):
        found.append(f"{len(table)} positions")
    if found:
        raise ValueError(f"{path}: an image ViT with {found[0]}; expected a square of patches and "
                         "at most one class token before it")
    if not square:
        token, table, side = token + table[0], table[1:], inner
    state["spatial_pos"] = table
    if token is not None:
        state["class_token"] = token
    return side


def load_file(path: str) -> dict:
    """What a .safetensors file or a torch checkpoint holds; ValueError names the file."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file")
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import load_file as load_safetensors
        except ImportError:
            raise ValueError(f"{path}: reading .safetensors needs "
                             "`pip install safetensors`") from None
        try:
            return load_safetensors(path)
        except Exception as e:  # a SafetensorError is a plain Exception
            raise ValueError(f"{path}: not a safetensors file ({e})") from None
    content = load_torch(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
    return content


@functools.cache
def hub_folder(name: str) -> str:
    """hf:owner/model[@revision] -> the folder of its files in huggingface_hub's cache.

    What is not there yet is downloaded: config.json, preprocessor_config.json if there is one, and
    model.safetensors or else pytorch_model.bin. Where the cache lies (HF_HOME, HF_HUB_CACHE) and
    whether the hub is asked at all (HF_HUB_OFFLINE) is that package's matter. It locks each file:
    of several ranks one downloads it, the others wait. ValueError is one sentence.
    """
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError:
        raise ValueError(f"{name}: needs `pip install huggingface_hub safetensors`") from None
    repo, _, revision = name.removeprefix("hf:").partition("@")
    try:
        for weights in HF_WEIGHTS:
            wanted = ["config.json", "preprocessor_config.json", weights]
            folder = snapshot_download(repo, revision=revision or None, allow_patterns=wanted)
            if all(os.path.exists(os.path.join(folder, f)) for f in (wanted[0], weights)):
                return folder
        why = f"it has no config.json with {' or '.join(HF_WEIGHTS)}"
    except errors.HFValidationError:
        why = "expected hf:owner/model or hf:owner/model@revision"
    except errors.RepositoryNotFoundError:
        why = "the hub has no such model, or shows it only after `hf auth login`"
    except errors.RevisionNotFoundError:
        why = f"no branch, tag or commit of this model is called {revision}"
    except errors.LocalEntryNotFoundError:
        asked = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub does not answer"
        why = f"it is not in the cache {constants.HF_HUB_CACHE} (or not all of it), and {asked}"
    except Exception as e:  # of the network, the hub, the disk
        why = str(e).splitlines()[0] if str(e) else type(e).__name__
    raise ValueError(f"{name}: {why}")


def read_hf_config(folder: str) -> tuple[dict, tuple, list | None]:
    """The configuration in a Hugging Face folder -> (what it says of us, token grid, class names).

    The first has num_frames, img_size, heads, of the decoder norm_pix_loss, dec_width, dec_heads,
    and mean and std of the input where there is a preprocessor_config.json.
    """
    with open(os.path.join(folder, "config.json")) as f:  # it lacks what is transformers' default
        c = dict(num_frames=16, tubelet_size=2, image_size=224, patch_size=16,
                 num_attention_heads=12, norm_pix_loss=True, decoder_hidden_size=384,
                 decoder_num_attention_heads=6) | json.load(f)
    sides = c["image_size"] if isinstance(c["image_size"], list) else [c["image_size"]] * 2
    grid = (c["num_frames"] // c["tubelet_size"], *(s // c["patch_size"] for s in sides))
    classes = None
    if "id2label" in c:
        classes = [c["id2label"][str(i)] for i in range(len(c["id2label"]))]
    config = dict(num_frames=c["num_frames"], img_size=sides, heads=c["num_attention_heads"],
                  norm_pix_loss=c["norm_pix_loss"], dec_width=c["decoder_hidden_size"],
                  dec_heads=c["decoder_num_attention_heads"])
    images = os.path.join(folder, "preprocessor_config.json")
    if os.path.exists(images):
        with open(images) as f:
            images = json.load(f)
        config |= {k: images[f"image_{k}"] for k in ("mean", "std") if images.get(f"image_{k}")}
    return config, grid, classes


def read_weights(path: str) -> tuple[dict, list, dict]:
    """-> state dict in reference names, token grid of its positions, and what else the file tells.

    The third is a dict: size, patch_size, tubelet_size, num_frames, img_size [H, W] (where a file
    does not say, 16 and 224), temporal_pos, spatial_pos, class_token (True where it has them),
    pretrained (holds a decoder), detector (is one: it has cls_score), mean and std (where known),
    classes (names or None), args (of our script, or {}). ValueError names the file.
    """
    file = hub_folder(path) if path.startswith("hf:") else path
    folder = file if os.path.isdir(file) else os.path.dirname(file)
    if os.path.isdir(file):
        found = [f for f in HF_WEIGHTS if os.path.exists(os.path.join(folder, f))]
        if not found:
            raise ValueError(f"{path}: holds neither {' nor '.join(HF_WEIGHTS)}")
        file = os.path.join(folder, found[0])
    state = load_file(file)
    config, grid, about, probe = {}, None, dict(classes=None, args={}), "probes.0."
    if isinstance(state.get("config"), dict):  # ours
        config, about["classes"] = state["config"], state.get("classes")
        about["args"], grid = state.get("args") or {}, config.get("pos_grid")
        probe = f"probes.{state.get('chosen', 0)}."  # of several that were trained together
    for key in ("ema", "model", "module", "state_dict"):
        state = state[key] if isinstance(state.get(key), dict) else state
    described = os.path.exists(os.path.join(folder, "config.json"))
    if any(k.startswith("videomae.") for k in state) and described:
        config, grid, classes = read_hf_config(folder)
        about["classes"] = classes or about["classes"]
    state = to_reference({k.replace(probe, "probes.0."): v for k, v in state.items()
                          if isinstance(v, torch.Tensor)
                          and (k.startswith(probe) or not k.startswith("probes."))})

    # ---- what the tensors tell
    blocks = [int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in state) if m]
    cubes = state.get("patch_embed.proj.weight", torch.empty(0))
    if not blocks or cubes.ndim < 4:
        raise ValueError(f"{path}: no ViT in a known layout; it holds {list(state)[:3]}...")
    width, depth, patch = len(cubes), max(blocks) + 1, cubes.shape[-1]
    if cubes.ndim == 4:  # an image ViT: MAE's, ViC-MAE's, timm's
        if "pos_embed" not in state:
            raise ValueError(f"{path}: an image ViT without pos_embed")
        side = image_positions(state, path)
        if {"decoder_embed.weight", "mask_token"} <= state.keys():
            # MAE's decoder, which this project does not have
            state["decoder_mask_token"] = state.pop("mask_token")
        grid, config = (1, side, side), dict(num_frames=1, img_size=[side * patch] * 2)
    sizes = {(s["width"], s["depth"]): name for name, s in SIZES.items()}
    about |= dict(size=sizes.get((width, depth)), width=width, depth=depth, patch_size=patch,
                  num_frames=16, img_size=[224, 224],
                  tubelet_size=cubes.shape[2] if cubes.ndim == 5 else 1,
                  pretrained="encoder_to_decoder.weight" in state,
                  detector="cls_score.weight" in state)
    if about["detector"] and not config:
        about |= dict(mean=DETECTION_MEAN, std=DETECTION_STD)
    about |= config
    if grid is None:  # released files: that of 16 x 224 x 224
        size = about["num_frames"], *about["img_size"]
        grid = [n // c for n, c in zip(size, (about["tubelet_size"], patch, patch))]
    heads = SIZES[about["size"]]["heads"] if about["size"] else None
    if heads and about.get("heads", heads) != heads:
        raise ValueError(f"{path}: {about['heads']} heads at width {width}, expected {heads}")
    about |= {part: True for part in IMAGE_PARTS if part in state}
    return state, list(grid), about


# ---- models for what was read ----

def encoder_shape(init: str | None, **flags) -> dict:
    """The keyword arguments of an Encoder as an --init file has them where the flags do not say.

    Among them mean and std of its input, where the file tells them. flags (None: not given): size,
    num_frames, img_size (H, W), patch_size, tubelet_size. Weights of images, which know no time,
    get a temporal table in a model of several temporal slots. ValueError names the file.
    """
    shape = dict(size="base", num_frames=16, img_size=[224, 224], patch_size=None, tubelet_size=2)
    if init:
        _, grid, about = read_weights(init)
        parts = {k: about[k] for k in (*IMAGE_PARTS, "mean", "std") if about.get(k)}
        shape = {k: about[k] for k in shape} | parts
    shape |= {k: v for k, v in flags.items() if v is not None}
    if shape["size"] is None:
        raise ValueError(f"{init}: a ViT of width {about['width']} and {about['depth']} blocks; "
                         f"expected one of {', '.join(SIZES)}")
    shape["patch_size"] = shape["patch_size"] or SIZES[shape["size"]]["patch_size"]
    if init and grid[0] == 1 and shape["num_frames"] > shape["tubelet_size"]:
        shape["temporal_pos"] = True
    return shape | dict(img_size=tuple(shape["img_size"]))


def image_parts(init: str | None, **flags) -> dict:
    """Those of encoder_shape's arguments that no flag has: of IMAGE_PARTS, mean and std."""
    no_flags = (*IMAGE_PARTS, "mean", "std")
    return {k: v for k, v in encoder_shape(init, **flags).items() if k in no_flags}


def build_model(path: str, num_frames: int | None = None, img_size=None, verbose: bool = True,
                positions: str = "resize"):
    """A weights file of any layout -> (the model it is for, in eval mode, what read_weights tells).

    VideoMAE where the file has a decoder or only an encoder (its decoder is None then); else
    VideoClassifier, or AttentiveClassifier with the probe that was chosen. num_frames and img_size
    default to those of the file; positions: see load_pretrained.
    """
    state, grid, about = read_weights(path)
    kwargs = encoder_shape(path, num_frames=num_frames, img_size=img_size)
    if about["pretrained"]:
        own = ("norm_pix_loss", "target", "dec_width", "dec_heads", "joint_norm")
        kwargs |= {k: about[k] for k in own if k in about}
        blocks = [int(k.split(".")[2]) for k in state if k.startswith("decoder.blocks.")]
        model = VideoMAE(dec_depth=max(blocks) + 1, **kwargs)
    elif "head.weight" in state and "fc_norm.weight" in state:
        model = VideoClassifier(len(state["head.weight"]),
                                head_norm="head_norm.running_mean" in state, **kwargs)
    elif "probes.0.query" in state:
        model = AttentiveClassifier(len(state["probes.0.head.weight"]), **kwargs)
    elif "norm.weight" in state:  # an encoder alone, or with another's decoder or head
        if about["detector"] and verbose:
            print(f"{path}: a detection checkpoint, of which this is the encoder alone; "
                  "detect_ava.py --ckpt takes it whole")
        model = VideoMAE(dec_depth=1, **kwargs)
        model.decoder = None
    else:
        raise ValueError(f"{path}: holds no final norm, no decoder and no classification head; "
                         "finetune.py --init takes it, detect_ava.py --ckpt a detection checkpoint")
    load_pretrained(model.eval(), path, verbose, positions)
    return model, about


def fit(name: str, x: torch.Tensor, y: torch.Tensor, model: nn.Module, about: dict):
    """A file's tensor x -> as the model has it (y): cubes of images inflated, tables resized."""
    if name.endswith("patch_embed.proj.weight"):
        x = x[:, :, None] if x.ndim == 4 else x  # (D, 3, p, p) of an image ViT
        if x.shape[2] == 1 and y.shape[2] > 1:
            x = repeat(x, "d c 1 h w -> d c t h w", t=y.shape[2]) / y.shape[2]  # I3D's mean
    if name.endswith("temporal_pos") and len(x) != len(y):
        x = F.interpolate(x.T[None], size=len(y), mode="linear", align_corners=False)[0].T
    if name.endswith("spatial_pos"):
        own = [n // about["patch_size"] for n in about["img_size"]]
        x = resize_table(x, own, model.grid[1:])
    return x


def load_pretrained(model: nn.Module, path: str, verbose: bool = True,
                    positions: str = "resize") -> dict:
    """Loads a file or Hugging Face folder of any known layout into a model of any T, H, W.

    Position tables are resized from the file's token grid (positions "new": made for the model's,
    as the paper's code does), image patch embeddings repeated over the tubelet and divided by its
    length; nothing else is changed. A class token and position table are taken where the model has
    them. Returns {"loaded": [names], "skipped": {name: why}, "new":
    {name: why}} and prints it. ValueError names the parameter and both shapes where they differ,
    except for heads and decoders of another width, which are skipped and start new.
    """
    source, grid, about = read_weights(path)
    if positions == "new" and "spatial_pos" in source:
        raise ValueError(f"{path}: its positions were learned, a table of sines cannot take their "
                         "place: leave out --positions new")
    want = model.state_dict()
    if hasattr(model, "encoder"):
        inside = ("patch_embed.", "blocks.", "norm.", *IMAGE_PARTS)
        source = {f"encoder.{k}" if k.startswith(inside) else k: v for k, v in source.items()}
        norm = "encoder.norm.weight"
        pretraining = isinstance(model, VideoMAE) and "mask_token" in source
        if pretraining and norm in want and norm not in source:
            model.encoder.norm = nn.Identity()  # HF files made with use_mean_pooling
            model.config["encoder_norm"] = False
            want = model.state_dict()
    report, fits = dict(loaded=[], skipped={}, new={}), {}
    if "mask_token" in source and "mask_token" in want:
        width, own = source["mask_token"].shape[2], want["mask_token"].shape[2]
        if width != own:
            why = f"a decoder of width {width}, this model's has {own}"
            parts = ("decoder.", "encoder_to_decoder.", "mask_token")
            report["skipped"] = {k: why for k in source if k.startswith(parts)}
    for name, x in source.items():
        if name in report["skipped"]:
            continue
        if name not in want:
            report["skipped"][name] = "no such parameter in this model"
            continue
        y = want[name]
        x = fit(name, x, y, model, about)
        differ = f"{tuple(x.shape)} in the file, {tuple(y.shape)} in this model"
        if x.shape == y.shape:
            fits[name] = x
        elif "head." in name or name.startswith("cls_score."):
            report["skipped"][name] = differ
        else:
            raise ValueError(f"{path}: {name} is {differ}: other size, patch_size or tubelet_size?")
    model.load_state_dict(fits, strict=False)
    report["loaded"] = list(fits)
    new = [k for k in want if k not in fits]
    report["new"] = {k: report["skipped"].get(k, "not in the file") for k in new}
    model.set_positions(model.grid if positions == "new" else grid)
    if verbose:
        how = "of" if tuple(grid) == model.grid else f"resized from {tuple(grid)} to"
        how = "made anew for" if positions == "new" else how
        print_report(report, path, f"positions {how} token grid {model.grid}")
        lacks = beyond_hf(model) if isinstance(model, (VideoMAE, VideoClassifier)) else []
        if lacks and model.training:  # not where a file is only looked at
            print(f"  eval.py --export_hf will not take the result: {', '.join(lacks)}")
    return report


def print_report(report: dict, path: str, positions: str):
    """Prints what load_pretrained did, a line per part and reason."""
    print(f"{path}: {len(report['loaded'])} tensors loaded; {positions}")
    for what in ("skipped", "new"):
        stems = {}
        for name, why in report[what].items():
            stems.setdefault((name.split(".")[0], why), []).append(name)
        for (stem, why), names in stems.items():
            shown = names[0] if len(names) == 1 else f"{stem}.* ({len(names)})"
            print(f"  {what}: {shown}: {why}")


# ---- writing ----

def beyond_hf(model: nn.Module) -> list[str]:
    """What a model has that transformers' VideoMAE does not know."""
    c = model.config
    lacks = [f"a {part.replace('_', ' ')}" for part in IMAGE_PARTS if c.get(part)]
    if c.get("joint_norm"):
        lacks.append("jointly normalised targets (ViC-MAE)")
    if c.get("target", "clip") != "clip":
        lacks.append(f"target={c['target']}")
    if c["pos_grid"] != list(model.grid):
        lacks.append(f"positions of {c['pos_grid']} resized to {model.grid}")
    return lacks


def to_hf(model: nn.Module) -> tuple[dict, dict]:
    """-> (state dict, config.json as a dict) of transformers' VideoMAE for the same task.

    That is VideoMAEForPreTraining or VideoMAEForVideoClassification. transformers fixes eps 1e-5 in
    decoder.norm and fc_norm where this model has 1e-6: outputs agree to about 1e-4.
    """
    c, lacks = model.config, beyond_hf(model)
    if lacks:
        raise ValueError("transformers' VideoMAE does not know what this model has: "
                         + ", ".join(lacks))
    state, weights = {}, model.state_dict()
    if c.get("head_norm"):  # the linear probe's BatchNorm is part of the linear map
        mean, var = weights.pop("head_norm.running_mean"), weights.pop("head_norm.running_var")
        del weights["head_norm.num_batches_tracked"]
        weights["head.weight"] = weights["head.weight"] * (var + 1e-6).rsqrt()
        weights["head.bias"] = weights["head.bias"] - weights["head.weight"] @ mean
    for name, x in weights.items():
        name = rename(name, TO_HF)
        if name.endswith(".qkv.weight"):
            for part, w in zip(("query", "key", "value"), x.chunk(3)):
                state[name.replace("qkv", part)] = w.clone()
        else:
            state[name] = x.clone()
    return state, hf_config(c, isinstance(model, VideoMAE))


def write_hf(folder: str, model: nn.Module, classes: list[str] | None) -> str:
    """Writes what transformers' from_pretrained reads: weights, configuration; -> the class.

    The weights are safetensors where that is installed.
    """
    state, config = to_hf(model)
    if classes:
        config["id2label"] = {str(i): name for i, name in enumerate(classes)}
        config["label2id"] = {name: i for i, name in enumerate(classes)}
    os.makedirs(folder, exist_ok=True)
    try:
        from safetensors.torch import save_file
        state = {k: v.contiguous() for k, v in state.items()}
        save_file(state, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    except ImportError:
        torch.save(state, os.path.join(folder, "pytorch_model.bin"))
    c, (H, W) = model.config, model.config["img_size"]
    images = dict(image_processor_type="VideoMAEImageProcessor", do_resize=True,
                  size={"shortest_edge": min(H, W)}, resample=2, do_center_crop=True,
                  crop_size={"height": H, "width": W}, do_rescale=True, rescale_factor=1 / 255,
                  do_normalize=True, image_mean=c["mean"], image_std=c["std"])
    for name, content in (("config.json", config), ("preprocessor_config.json", images)):
        with open(os.path.join(folder, name), "w") as f:
            json.dump(content, f, indent=1)
    return config["architectures"][0]


def hf_config(c: dict, pretrain: bool) -> dict:
    """A model's config -> transformers'."""
    s, (H, W) = SIZES[c["size"]], c["img_size"]
    architecture = "VideoMAEForPreTraining" if pretrain else "VideoMAEForVideoClassification"
    config = dict(model_type="videomae", architectures=[architecture],
                  image_size=H if H == W else [H, W], patch_size=c["patch_size"],
                  num_frames=c["num_frames"], tubelet_size=c["tubelet_size"],
                  hidden_size=s["width"], num_hidden_layers=s["depth"],
                  num_attention_heads=s["heads"],
                  intermediate_size=int(s["mlp_ratio"] * s["width"]),
                  layer_norm_eps=1e-6,
                  use_mean_pooling=not (pretrain and c["encoder_norm"]))
    if pretrain:
        return config | dict(decoder_hidden_size=c["dec_width"],
                             decoder_num_hidden_layers=c["dec_depth"],
                             decoder_num_attention_heads=c["dec_heads"],
                             decoder_intermediate_size=int(s["mlp_ratio"] * c["dec_width"]),
                             norm_pix_loss=c["norm_pix_loss"])
    return config | dict(id2label={str(i): f"LABEL_{i}" for i in range(c["num_classes"])})
