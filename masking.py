"""Masks on a token grid (t, h, w): pure functions, vectorised over the batch, True = masked.

Tube masking is VideoMAE section 3.3, random and frame masking its ablation (Table 1c), running
cells are the decoder mask of VideoMAE v2 (section 3.2). Every sample of a batch has the same number
of masked tokens, so shapes are static and no step waits for the device.
"""

import torch
from einops import rearrange, repeat


def _k_of_n(batch: int, n: int, k: int, generator, device) -> torch.Tensor:
    """(batch, n) bool with exactly k True per row, uniformly among all such rows."""
    noise = torch.rand(batch, n, generator=generator, device=device)
    return noise.argsort(dim=1).argsort(dim=1) < k


def tube_mask(batch, grid: tuple, ratio: float, generator=None, device="cpu") -> torch.Tensor:
    """(batch, N) bool: int(ratio*h*w) positions of a frame, the same in all t temporal slots."""
    t, h, w = grid
    mask = _k_of_n(batch, h * w, int(ratio * h * w), generator, device)
    return repeat(mask, "b n -> b (t n)", t=t)


def random_mask(batch, grid: tuple, ratio: float, generator=None, device="cpu") -> torch.Tensor:
    """(batch, N) bool: int(ratio*N) tokens anywhere in space-time."""
    t, h, w = grid
    return _k_of_n(batch, t * h * w, int(ratio * t * h * w), generator, device)


def frame_mask(batch, grid: tuple, ratio: float, generator=None, device="cpu") -> torch.Tensor:
    """(batch, N) bool: int(ratio*t) whole temporal slots."""
    t, h, w = grid
    mask = _k_of_n(batch, t, int(ratio * t), generator, device)
    return repeat(mask, "b t -> b (t n)", n=h * w)


def running_cell_mask(batch, grid: tuple, ratio: float, generator=None, device="cpu"):
    """(batch, N) bool: int(4*ratio) corners of every 2x2 cell, the next ones in the next slot.

    Each sample starts at one of 4 phases, so that 4 temporal slots mask every position equally
    often. h and w are even.
    """
    t, h, w = grid
    phase = torch.randint(4, (batch, 1, 1, 1), generator=generator, device=device)
    slot, row, col = (torch.arange(n, device=device) for n in grid)
    row, col = row[:, None] % 2, col % 2
    # corners in cyclic order: (0,0) 0, (0,1) 1, (1,1) 2, (1,0) 3; a table would be copied from here
    corner = row * (3 - 2 * col) + col  # (h, w)
    mask = (corner - slot[:, None, None] - phase) % 4 < int(4 * ratio)  # (batch, t, h, w)
    return rearrange(mask, "b t h w -> b (t h w)")


MASKS = {"tube": tube_mask, "random": random_mask, "frame": frame_mask,
         "running_cell": running_cell_mask}


def num_masked(kind: str, grid: tuple, ratio: float) -> int:
    """How many of the N = t*h*w tokens `kind` masks at `ratio`.

    ValueError where no such mask can be made.
    """
    if kind not in MASKS:
        raise ValueError(f"mask type {kind!r}: expected one of {', '.join(MASKS)}")
    if not 0 < ratio < 1:
        raise ValueError(f"mask_ratio={ratio}: expected 0 < mask_ratio < 1")
    t, h, w = grid
    # what is masked or kept as one
    units = {"tube": h * w, "random": t * h * w, "frame": t, "running_cell": 4}[kind]
    masked = int(ratio * units)
    if kind == "running_cell" and (h % 2 or w % 2):
        raise ValueError(f"running_cell mask on a {h}x{w} token grid: "
                         "expected even height and width")
    if not 0 < masked < units:
        raise ValueError(f"mask_ratio={ratio} masks {masked} of {units} units of a {kind} mask on "
                         f"the token grid {t}x{h}x{w}: at least one must be masked and one visible")
    return masked * (t * h * w // units)


def make_mask(kind: str, batch: int, grid: tuple, ratio: float, generator=None,
              device="cpu") -> torch.Tensor:
    """(batch, N) bool mask of the named kind, True = masked.

    ValueError on an unknown kind or an impossible ratio.
    """
    num_masked(kind, grid, ratio)
    return MASKS[kind](batch, grid, ratio, generator, device)
