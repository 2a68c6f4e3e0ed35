"""masking.py: how many tokens are masked, and which."""

import torch

import masking
from tests.common import raises, test


@test
def test_mask_counts():
    """Masked tokens on 8x14x14 as in the paper: tube .9 1408, .75 1176, random .9 1411, ..."""
    grid = (8, 14, 14)
    for kind, ratio, masked in (("tube", 0.9, 1408), ("tube", 0.75, 1568 - 392),
                                ("tube", 0.95, 1568 - 80), ("random", 0.9, 1411),
                                ("frame", 0.875, 7 * 196), ("running_cell", 0.5, 784)):
        mask = masking.make_mask(kind, 5, grid, ratio, torch.Generator().manual_seed(0))
        assert mask.shape == (5, 1568) and mask.dtype == torch.bool
        assert (mask.sum(1) == masked).all(), kind
        assert masking.num_masked(kind, grid, ratio) == masked, kind
        again, other = (masking.make_mask(kind, 5, grid, ratio, torch.Generator().manual_seed(s))
                        for s in (0, 1))
        assert torch.equal(mask, again) and not torch.equal(mask, other)
        assert not (mask[0] == mask).all() or kind == "frame", f"{kind}: all samples alike"


@test
def test_mask_shapes():
    """Tubes are the same in all slots, frame masks whole slots; running cells visit all equally."""
    g = torch.Generator().manual_seed(0)
    tube = masking.tube_mask(3, (4, 6, 6), 0.5, g).view(3, 4, 36)
    assert (tube == tube[:, :1]).all()
    frame = masking.frame_mask(3, (4, 6, 6), 0.5, g).view(3, 4, 36)
    assert (frame == frame[:, :, :1]).all()
    for ratio in (0.25, 0.5, 0.75):
        cells = masking.running_cell_mask(64, (4, 6, 6), ratio, g).view(64, 4, 6, 6)
        assert (cells.sum(1) == 4 * ratio).all()
        assert (cells.view(64, 4, 3, 2, 3, 2).sum((3, 5)) == 4 * ratio).all()
    assert len({tuple(c.flatten().tolist()) for c in cells}) == 4
    mean = masking.random_mask(4000, (2, 2, 2), 0.5, g).float().mean(0)
    assert (mean - 0.5).abs().max() < 0.05


@test
def test_mask_errors():
    """A ratio that leaves nothing visible or nothing masked is refused, so is an unknown mask."""
    for ratio in (0, 1, 1.2, -0.5):
        with raises("mask_ratio", "0 < mask_ratio < 1"):
            masking.make_mask("tube", 1, (8, 14, 14), ratio)
    with raises("0 of 4", "frame"):
        masking.make_mask("frame", 1, (4, 2, 2), 0.1)
    with raises("block", "tube"):
        masking.make_mask("block", 1, (4, 2, 2), 0.5)
    with raises("even"):
        masking.make_mask("running_cell", 1, (4, 3, 2), 0.5)
