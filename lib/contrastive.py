"""What the contrastive stages share: gathering with gradient, BatchNorm over ranks, heads, InfoNCE.

Under DistributedDataParallel each rank's loss is the mean over its own anchors and gradients are
averaged over ranks: together the mean over all anchors, which is what one process with the global
batch computes. A loss that all ranks compute alike from gather(z), such as a covariance, comes out
right as well; it wants autocast off, a matmul would be in bf16. B batch of a rank, W ranks, d
dimensions.
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


class AllReduce(torch.autograd.Function):
    """The sum over all ranks, of values and of gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class AllGather(torch.autograd.Function):
    """(B, ...) of each rank -> (W, B, ...); a row's gradient is the sum over all ranks' losses."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def world_size() -> int:
    """The number of ranks; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 where there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, with gradient."""
    return AllReduce.apply(x) if world_size() > 1 else x


def gather(x: torch.Tensor) -> torch.Tensor:
    """(B, ...) of each rank -> (W, B, ...), with gradient."""
    return AllGather.apply(x) if world_size() > 1 else x[None]


class BatchNorm(nn.Module):
    """BatchNorm1d over the rows of all ranks, float32 inside; nn.SyncBatchNorm runs on GPUs alone.

    It has batch statistics only: the heads are not used after training.
    """

    def __init__(self, dim: int, affine: bool = True, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x):  # (B, dim), as many rows on every rank
        with torch.autocast(x.device.type, enabled=False):
            x, n = x.float(), len(x) * world_size()
            x = x - total(x.sum(0)) / n
            var = total(x.square().sum(0)) / n
            x = x * (var + self.eps).rsqrt()
            return x if self.weight is None else x * self.weight + self.bias


def head(*dims: int, last_norm: bool = False) -> nn.Sequential:
    """Linears between the dims, BatchNorm and ReLU after all but the last.

    last_norm: after the last a BatchNorm without affine parameters. Linears before a BatchNorm have
    no bias: it would take it out again. A loss that cannot see the last bias has to freeze it: the
    optimiser would follow rounding.
    """
    layers = []
    for a, b in zip(dims[:-2], dims[1:-1]):
        layers += [nn.Linear(a, b, bias=False), BatchNorm(b), nn.ReLU()]
    layers.append(nn.Linear(*dims[-2:], bias=not last_norm))
    if last_norm:
        layers.append(BatchNorm(dims[-1], affine=False))
    return nn.Sequential(*layers)


def spread_of(z: torch.Tensor) -> torch.Tensor:
    """(..., d) -> sqrt(d) times the deviation per dimension of the normalised z, without gradient.

    About 1 where they point in all directions, 0 where they have collapsed to one.
    """
    z = F.normalize(z.detach().float(), dim=-1).flatten(0, -2)
    return z.std(0).mean() * z.shape[1] ** 0.5


def info_nce(z: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """SimCLR's loss of two views: z (2, B, d) of this rank -> (mean over its 2B anchors, spread).

    Among the other 2BW - 1 views of all ranks an anchor has one positive, the other view of its
    sample; chance level is ln(2BW - 1).
    """
    z = F.normalize(z.float(), dim=-1)
    B, everyone = z.shape[1], gather(z).flatten(0, 2)  # (W * 2 * B, d): rank, view, sample
    first, anchors = 2 * B * rank(), torch.arange(2 * B, device=z.device)
    own = first + anchors  # each anchor's own place among all
    positive = first + (anchors + B) % (2 * B)
    logits = z.flatten(0, 1) @ everyone.T / temperature  # (2B, 2BW)
    logits = logits.scatter(1, own[:, None], -math.inf)  # an anchor is not its own negative
    return F.cross_entropy(logits, positive), spread_of(z)


def info_nce_keys(query: torch.Tensor, key: torch.Tensor, temperature: float) -> torch.Tensor:
    """MoCo v3's loss of one direction, times 2T: queries (B, d) of this rank, keys (B, d) of all.

    The keys carry no gradient; the positive of query i is key i of the same rank.
    """
    query, key = F.normalize(query.float(), dim=-1), F.normalize(key.float(), dim=-1).detach()
    logits = query @ gather(key).flatten(0, 1).T / temperature  # (B, B * W)
    positive = len(query) * rank() + torch.arange(len(query), device=query.device)
    return 2 * temperature * F.cross_entropy(logits, positive)
