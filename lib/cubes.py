"""Videos as cubes: position tables, cutting into cubes and back, picking tokens, targets.

B batch, T H W C pixels; t h w token grid, N = t*h*w; a cube of (pt, ph, pw) frames and pixels has
P = pt*ph*pw*C values, channel fastest. A mask is (B, N) bool, True = masked.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange

# einops has a table of the types that it has met; one that grows in a step has it compiled again
for known in (torch.zeros(1), torch.nn.Parameter(torch.zeros(1))):
    rearrange(known, "n -> n")


# ---- position tables ----

def sincos_table(n: int, dim: int) -> torch.Tensor:
    """(n, dim) float32: sin and cos of the flattened token index, interleaved.

    float64 inside: float32 is off at n = 1568.
    """
    j = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(n, dtype=torch.float64)[:, None] / 10000 ** (2 * (j // 2) / dim)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()


def position_table(grid: tuple, dim: int, pos_grid: tuple) -> torch.Tensor:
    """(N, dim) sin-cos table of the token grid `pos_grid`, resized to `grid` where they differ.

    Bicubic in space, linear in time.
    """
    table = sincos_table(math.prod(pos_grid), dim)
    if tuple(grid) == tuple(pos_grid):
        return table
    x = rearrange(table, "(t h w) d -> t d h w", t=pos_grid[0], h=pos_grid[1])
    if tuple(grid[1:]) != tuple(pos_grid[1:]):
        x = F.interpolate(x, size=tuple(grid[1:]), mode="bicubic", align_corners=False)
    if grid[0] != pos_grid[0]:
        x = rearrange(x, "t d h w -> (d h w) 1 t")
        x = F.interpolate(x, size=grid[0], mode="linear", align_corners=False)
        x = rearrange(x, "(d h w) 1 t -> t d h w", h=grid[1], w=grid[2])
    return rearrange(x, "t d h w -> (t h w) d").contiguous()


def resize_table(table: torch.Tensor, grid: tuple, to: tuple) -> torch.Tensor:
    """(h * w, D) of a spatial grid -> that of another, bicubic."""
    if tuple(grid) == tuple(to):
        return table
    x = rearrange(table, "(h w) d -> 1 d h w", h=grid[0])
    x = F.interpolate(x, size=tuple(to), mode="bicubic", align_corners=False)
    return rearrange(x, "1 d h w -> (h w) d")


# ---- cubes and tokens ----

def patchify(video: torch.Tensor, cube: tuple) -> torch.Tensor:
    """(B, T, H, W, C) -> (B, N, P), tokens in (t, h, w) order."""
    pt, ph, pw = cube
    return rearrange(video, "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)",
                     pt=pt, ph=ph, pw=pw)


def unpatchify(cubes: torch.Tensor, grid: tuple, cube: tuple) -> torch.Tensor:
    """(B, N, P) -> (B, T, H, W, C), the inverse of patchify."""
    (t, h, w), (pt, ph, pw) = grid, cube
    return rearrange(cubes, "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c",
                     t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)


def take(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(B, N, P), (B, M) int -> (B, M, P): rows copied whole, which beats an element-wise gather."""
    rows = ids + x.shape[1] * torch.arange(len(x), device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*ids.shape, x.shape[2])


def split(mask: torch.Tensor, num_visible: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """mask (B, N) -> ids of its False (B, num_visible) and of its True tokens, in raster order.

    num_visible None: counted on the host, which waits for the device.
    """
    num_visible = int((~mask[0]).sum()) if num_visible is None else num_visible
    order = mask.byte().argsort(dim=1, stable=True)
    return order[:, :num_visible], order[:, num_visible:]


# ---- pixel values ----

def normalize_cubes(cubes: torch.Tensor, joint: bool = False) -> torch.Tensor:
    """(..., P) uint8, or float in [0,1] -> float32: zero mean, unit (unbiased) variance.

    Per cube and channel, the paper's target: (x - mean) / (std + 1e-6) of x in [0,1]. uint8 is not
    divided by 255 first, its eps is 255 times as large: a pass over memory less. joint: over all P
    values instead, (x - mean) / sqrt(var + 1e-6), as MAE and ViC-MAE.
    """
    unit = 255 if cubes.dtype == torch.uint8 else 1
    if joint:
        var, mean = torch.var_mean(cubes.float(), -1, keepdim=True)
        return (cubes.float() - mean) * (var + 1e-6 * unit ** 2).rsqrt()
    eps = 1e-6 * unit
    x = rearrange(cubes, "... (p c) -> ... p c", c=3).float()
    if x.device.type == "cpu":  # where torch.var_mean takes three times as long
        mean = x.mean(-2, keepdim=True)
        var = (x - mean).square().sum(-2, keepdim=True) / (x.shape[-2] - 1)
    else:
        var, mean = torch.var_mean(x, -2, keepdim=True)
    scale = 1 / (var.sqrt() + eps)
    return rearrange(torch.addcmul(-mean * scale, x, scale), "... p c -> ... (p c)")


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [0,1]; float passes through as float32."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
