"""The memory of a training step on a GPU, reckoned without one: on tensors that hold nothing.

Forward, backward and AdamW run as ever, but for the arithmetic. A storage counts from where an
operator makes it to where Python and autograd let go of it.
"""

import contextlib
import math
import unittest.mock
import weakref

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import masking
from lib.optim import param_groups
from model import VideoClassifier, VideoMAE


class Storages(TorchDispatchMode):
    """Counts the bytes of the meta tensors that operators give back: now, and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if torch.is_tensor(x) and x.is_meta and x.untyped_storage() not in self.known:
                storage = x.untyped_storage()
                size = math.ceil(storage.nbytes() / 512) * 512  # as CUDA's allocator gives it out
                self.known[storage] = size
                self.add(size)
                weakref.finalize(storage, self.add, -size)
        return out

    def add(self, size: int):
        self.now += size
        self.peak = max(self.peak, self.now)


@contextlib.contextmanager
def like_cuda(autocast: bool = True):
    """Context: functions of our models are what they are on CUDA -> a list of weights in bf16.

    Attention is flash attention. With autocast, linear layers are in bf16 and layer norms in fp32.
    The list holds on to the copies of weights: autocast does so until the forward pass ends.
    """
    kept, linear = [], F.linear

    def bf16_linear(*tensors):
        cast = [None if x is None else x.to(torch.bfloat16) for x in tensors]
        if torch._C._current_graph_task_id() < 0:  # not a block that the backward pass runs again
            kept.extend(y for x, y in zip(tensors, cast) if x is not None and x.is_leaf)
        return linear(*cast)

    def fp32_norm(x, *rest):
        return torch.layer_norm(x.float(), *rest)

    def flash(*qkv):
        return torch.ops.aten._scaled_dot_product_flash_attention(*qkv)[0]
    casts = dict(linear=bf16_linear, layer_norm=fp32_norm) if autocast else {}
    with unittest.mock.patch.multiple(F, scaled_dot_product_attention=flash, **casts):
        yield kept


def peak_of_step(task: str, size: str, batch_size: int, checkpointing: bool = False,
                 decoder_mask: float = 0.0, autocast: bool = True, **shape) -> int:
    """Bytes at most in use in the second step of task "pretrain" or "finetune", with AdamW in fp32.

    What kernels take for themselves, CUDA's context and gaps of its allocator come on top. shape:
    more arguments of the model.
    """
    finetune = task == "finetune"
    with torch.device("meta"), Storages() as storages, like_cuda(autocast) as kept:
        if finetune:
            model = VideoClassifier(400, size=size, checkpointing=checkpointing, drop_path=0.1,
                                    **shape)
        else:
            model = VideoMAE(size, checkpointing=checkpointing, **shape)
        N, counts, masks = math.prod(model.grid), [], []
        for kind, ratio in (("tube", 0.9), ("running_cell", decoder_mask)):
            count = N - masking.num_masked(kind, model.grid, ratio) if ratio else None
            counts.append(count)
            masks.append(torch.empty(batch_size, N, dtype=torch.bool) if ratio else None)
        # erasing and mixup make floats of the clips
        video = torch.empty(batch_size, model.config["num_frames"], *model.config["img_size"], 3,
                            dtype=torch.float32 if finetune else torch.uint8)
        target = torch.empty(batch_size, 400)
        optimizer = torch.optim.AdamW(param_groups(model, 0.05), lr=1e-4, foreach=False)
        for _ in range(2):
            if finetune:
                loss = F.cross_entropy(model(video).float(), target)
            else:
                loss = model(video, *masks, *counts)[0]
            kept.clear()
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
    return storages.peak
