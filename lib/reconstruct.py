"""What a pre-trained model reconstructs: losses of guesses that know nothing, and pictures."""

import numpy as np
import torch

import masking
from lib.cubes import patchify, to_unit, unpatchify
from lib.feed import collate
from model import VideoMAE, error
from video.pictures import strip, write_png


@torch.no_grad()
def baselines(model, video, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of predicting zeros, and the clip's mean visible cube, on the targets of this batch.

    video (B, T, H, W, C), mask (B, N) bool -> two float32 scalars, over all masked cubes.
    """
    ids = torch.arange(mask.shape[1], device=mask.device).expand(len(mask), -1)
    if model.target == "center":
        ids = model.select(mask)[1]
    masked = mask.gather(1, ids)[..., None]  # (B, M, 1)
    target = model.targets(video, ids)  # (B, M, P)
    mean = masked_mean(target, ~masked)  # (B, 1, P)

    def score(guess):
        cost = error(guess.expand_as(target), target)  # (B, M, P)
        return (cost * masked).sum() / (masked.sum().clamp(min=1) * cost.shape[2])
    return score(torch.zeros_like(mean)), score(mean)


def masked_mean(x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of x (B, N, ...) that `where`, bool of as many dimensions, says."""
    return (x * where).sum(1, keepdim=True) / where.sum(1, keepdim=True).clamp(min=1)


@torch.no_grad()
def reconstruct(model, video, mask):
    """-> (loss, original, masked, own, true): videos (B, T, H, W, C) in [0,1] of predicted frames.

    With normalised targets a prediction has no brightness and contrast. `own` takes those of the
    clip's visible cubes on average, all that the model was shown; `true` takes each hidden cube's
    own mean and variance, as published pictures do, which flatters.
    """
    loss, pred = VideoMAE.forward(model, video, mask)  # (B, M, P); ViCMAE's own takes views
    ids, hidden, grid = model.select(mask)[1], mask, model.grid
    if model.target == "center":
        middle = video.shape[1] // 2
        hidden, ids = mask.gather(1, ids), ids - ids[:, :1]
        video, grid = video[:, middle:middle + 1], (1, *model.grid[1:])
    cubes = to_unit(patchify(video, model.target_cube)).unflatten(2, (-1, 3))  # (B, N, p, C)
    guess = torch.zeros_like(cubes).flatten(2)  # (B, N, P)
    guess = guess.scatter_(1, ids[..., None].expand_as(pred), pred.float()).view_as(cubes)
    seen = ~hidden[:, :, None, None]
    own = true = guess
    if model.norm_pix_loss:
        over = (2, 3) if model.joint_norm else 2  # what the targets are normalised over
        mean, std = cubes.mean(over, keepdim=True), cubes.std(over, keepdim=True)
        own = guess * masked_mean(std, seen) + masked_mean(mean, seen)
        true = guess * std + mean

    def back(x):  # (B, N, p, C) where hidden
        x = torch.where(seen, cubes, x).flatten(2).clamp(0, 1)
        return unpatchify(x, grid, model.target_cube)
    return loss, back(cubes), back(torch.full_like(cubes, 0.5)), back(own), back(true)


def panels(model, video, mask) -> tuple[float, list]:
    """-> loss, and what reconstruct shows: a label and frames (B, T, H, W, 3) uint8 each.

    A model of raw pixels has one prediction.
    """
    loss, *videos = reconstruct(model, video, mask)
    labels = ["input", f"masked {mask.float().mean():.0%}", "prediction"]
    if model.norm_pix_loss:
        labels[2:] = ["prediction + mean and contrast of the visible cubes",
                      "prediction + true mean and contrast (flatters)"]
    pictures = [(v * 255).round().byte().cpu().numpy() for v in videos]
    return loss.item(), list(zip(labels, pictures))


def picture(model, video, mask, columns: int = 8) -> tuple[float, np.ndarray]:
    """-> loss, and an (H, W, 3) uint8 picture: labelled rows of up to `columns` frames per clip."""
    loss, shown = panels(model, video, mask)
    if shown[0][1].shape[1] == 1:  # single frames stand side by side
        shown = [(label, v.swapaxes(0, 1)) for label, v in shown]
    clips = len(shown[0][1])
    rows = [strip(v[clip], label, columns) for clip in range(clips) for label, v in shown]
    return loss, np.concatenate(rows)


def draw(model, shown, mask_type: str, mask_ratio: float, path: str, device, autocast,
         count: int = 4) -> str:
    """Draws `count` clips of the data set `shown`, always the same and equally masked.

    -> a line to print. A video that cannot be read is replaced by another, as in training.
    """
    if model.decoder.head.out_features != 3 * np.prod(model.target_cube):
        return "no picture: this model's targets are not pixels"
    chosen = np.linspace(0, len(shown) - 1, min(count, len(shown))).astype(int)
    video, bad = collate([shown[0, i] for i in chosen])
    if video is None:
        return f"no picture: {bad[-1][1]}"
    video = video.to(device)
    fixed = torch.Generator().manual_seed(0)
    mask = masking.make_mask(mask_type, len(video), model.grid, mask_ratio, fixed).to(device)
    with autocast:
        loss, image = picture(model, video, mask)
    write_png(path, image)
    zeros, mean = baselines(model, video, mask)
    return (f"{path}: {len(video)} clips, loss {loss:.4f} "
            f"(zeros {zeros:.4f}, visible mean {mean:.4f})")
