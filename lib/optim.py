"""Parameter groups, the learning rate's schedule, a step that leaves out what is not finite."""

import math
import re

import torch

from model import IMAGE_PARTS, SIZES


def param_groups(model, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """AdamW groups {params, weight_decay, lr_scale} for weight decay and layer-wise learning rates.

    No decay for 1-D parameters, tokens and position tables, as in the paper's code. lr_scale is
    layer_decay^(depth+1-layer), with layer 0 for all up to the patch embedding, i+1 for encoder
    block i, depth+1 for all that follows.
    """
    depth = SIZES[model.config["size"]]["depth"]
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if block := re.match(r"(?:encoder\.)?blocks\.(\d+)\.", name):
            layer = int(block[1]) + 1
        else:
            layer = 0 if "patch_embed" in name or name.endswith(IMAGE_PARTS) else depth + 1
        token = name.endswith(("mask_token", *IMAGE_PARTS))
        decay = 0.0 if p.ndim == 1 or token else weight_decay
        scale = layer_decay ** (depth + 1 - layer)
        group = dict(params=[], weight_decay=decay, lr_scale=scale)
        key = layer if layer_decay != 1 else 0, decay
        groups.setdefault(key, group)["params"].append(p)
    return list(groups.values())


def lr_at(step: int, peak: float, floor: float, warmup: int, total: int) -> float:
    """Learning rate of a step (0-based): linear from 0 over the warm-up, then half a cosine."""
    if step < warmup:
        return peak * step / warmup
    angle = math.pi * (step - warmup) / max(total - warmup, 1)
    return floor + 0.5 * (peak - floor) * (1 + math.cos(angle))


def guarded_step(optimizer, scaler: torch.amp.GradScaler, bad_step: torch.Tensor):
    """optimizer.step(), unless bad_step, a bool scalar on the device: a gradient is not finite.

    An enabled scaler looks for that itself. Else the optimiser is asked how it can skip: torch's
    fused kernels do it on the device, so that the host need not wait. For others the host looks.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)
    elif getattr(optimizer, "_step_supports_amp_scaling", False):  # what GradScaler asks, too
        optimizer.found_inf = bad_step.float()
        optimizer.step()
    elif not bad_step:
        optimizer.step()


def load_optimizer(optimizer, state: dict, new_options: bool):
    """Takes a saved state; an error says where it is not one of this optimiser.

    new_options: decay, betas and the like are those of this optimiser, not of the saved one.
    """
    lengths = lambda groups: [len(group["params"]) for group in groups]
    before, now = lengths(state["param_groups"]), lengths(optimizer.param_groups)
    if before != now:
        raise ValueError(f"groups of {before} parameters, not {now}")
    theirs, ours = set(state["param_groups"][0]), set(optimizer.param_groups[0])
    if theirs - ours and ours - theirs:
        name = type(optimizer).__name__
        raise ValueError(f"{', '.join(sorted(theirs - ours))} are settings that {name} lacks")
    kinds = (bool,), (int, float, torch.Tensor), (tuple, list)
    for saved, group in zip(state["param_groups"], optimizer.param_groups):
        for name in (saved.keys() & group.keys()) - {"params", "fused", "foreach"}:
            kind = next((k for k in kinds if isinstance(group[name], k)), object)
            if not isinstance(saved[name], kind):
                raise ValueError(f"{name} is {saved[name]!r}, not {group[name]!r}")
    options = [{k: v for k, v in group.items() if k != "params"}
               for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    known = {name for moments in optimizer.state.values() for name in moments}
    for group, option in zip(optimizer.param_groups, options):
        # what the checkpoint does not know is as this optimiser has it
        group.update({k: v for k, v in option.items()
                      if new_options or k == "fused" or k not in group})
    for p, moments in optimizer.state.items():
        for name in {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"} & known:
            x, wanted = moments.get(name), () if name == "step" else tuple(p.shape)
            found = tuple(getattr(x, "shape", ()))
            if found != wanted and (x is not None or name != "momentum_buffer"):
                raise ValueError(f"{name} has shape {found}, expected {wanted}")
