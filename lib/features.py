"""What a frozen encoder sees: features, attention, and classifiers that need no training of it."""

import math

import numpy as np
import torch
import torch.nn.functional as F

import data
from lib.views import TestVideos, cut, view_indices
from model import Encoder, VideoClassifier


@torch.no_grad()
def features(model, video: torch.Tensor, layer: int | None = None, pool: bool = True):
    """(B, T, H, W, C) -> (B, D), the mean over tokens, or all tokens (B, N, D), of `layer` blocks.

    layer 0 is the embedding; None: after the last block and the final norm that the model has,
    which is on tokens in a pre-trained or probed encoder (encoder.norm, before the mean), on their
    mean in a fine-tuned classifier (fc_norm; its unpooled tokens have none).
    """
    inside = hasattr(model, "encoder")
    x = Encoder.forward(model.encoder if inside else model, video, depth=layer)  # (B, N, D)
    if layer is None and inside:
        x = model.encoder.norm(x)
    if pool:
        x = x.mean(1)
        if layer is None and isinstance(model, VideoClassifier):
            x = model.fc_norm(x)
    return x


def window_features(model, video, videos: TestVideos, hop: float | None, device,
                    batch_size: int, layer: int | None = None, pool: bool = True):
    """Features of an open video's sliding windows -> (W, D) or (W, N, D), start and end (W,).

    Windows are clips as `videos` says, `hop` seconds apart (None: no overlap), and cover the end of
    the video too; of a sparse sampling there is one clip, spread over the whole video. start and
    end are the times of a window's first and last frame, in seconds.
    """
    span, order = videos.num_frames, data.timeline(video.times, videos.fps)
    if videos.sampling != "dense":
        order = order[view_indices(len(order), span, 1, "sparse", 1)[0]]
    else:
        order = order[::videos.stride]  # the frames that windows are made of
    t = video.times[order] - video.times[0]
    frames_per_hop = span
    if hop:
        seconds_per_frame = max(t[-1] / max(len(t) - 1, 1), 1e-9)
        frames_per_hop = max(1, round(hop / seconds_per_frame))
    starts = list(range(0, max(len(order) - span, 0) + 1, frames_per_hop))
    if starts[-1] + span < len(order):
        starts.append(len(order) - span)
    starts, found = np.array(starts), []
    for some in np.array_split(starts, math.ceil(len(starts) / batch_size)):
        index = np.minimum(some[:, None] + np.arange(span), len(order) - 1)  # (windows, T)
        frames, where = videos.decode(video, order[index])
        views = cut(frames.to(device), where.to(device), videos.img_size, 1)
        found.append(features(model, views, layer, pool).float().cpu().numpy())
    return np.concatenate(found), t[starts], t[np.minimum(starts + span, len(t)) - 1]


@torch.no_grad()
def attention_rollout(model: VideoClassifier, video: torch.Tensor) -> torch.Tensor:
    """(B, T, H, W, C) -> (B, t, h, w) float32, mean 1: how much each cube feeds what is pooled.

    Attention rollout (Abnar & Zuidema 2020) for a mean-pooled ViT: in each block a token is half
    itself, half what the heads' mean attention gathers; the shares of the pooled mean are carried
    back from the last block to the first.
    """
    x, maps = model.with_class_token(model.embed(video)), []
    for block in model.blocks:
        q, k, _ = block.attn.qkv_heads(block.norm1(x))  # (B, heads, N, d)
        # head by head: all at once would be gigabytes
        shares = ((q[:, h] @ k[:, h].mT * q.shape[-1] ** -0.5).float().softmax(-1)
                  for h in range(block.attn.heads))
        maps.append(sum(shares) / block.attn.heads)  # (B, N, N)
        x = block(x)
    extra = x.shape[1] - math.prod(model.grid)  # 1 or 0: a class token is not pooled
    share = torch.ones(len(x), 1, x.shape[1], device=x.device)
    share[..., :extra] = 0
    for attention in reversed(maps):
        share = 0.5 * share + 0.5 * share @ attention
    return share[..., extra:].reshape(-1, *model.grid)


def heat(values: torch.Tensor, frames: np.ndarray) -> np.ndarray:
    """values (t, h, w), frames (T, H, W, 3) uint8 -> frames with the values laid over, blue to red.

    Scaled to the clip's own range: colours compare cubes of one clip, not clips.
    """
    low, high = values.min(), values.max()
    v = ((values - low) / (high - low).clamp(min=1e-9)).float()
    v = F.interpolate(v[None, None], size=frames.shape[:3], mode="trilinear", align_corners=False)
    v = v[0, 0, ..., None].cpu().numpy()  # (T, H, W, 1)
    color = np.concatenate([np.clip(1.5 - abs(4 * v - c), 0, 1) for c in (3, 2, 1)], -1)  # jet
    return (0.5 * frames + 0.5 * 255 * color).round().astype(np.uint8)


def neighbours(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, k: int,
               num_classes: int) -> np.ndarray:
    """k-NN votes (V, num_classes) by cosine similarity, each weighted by exp(similarity / .07).

    As in DINO, but features are centred on the training mean first: what all videos share would
    make all cosines about 1.
    """
    center, votes = train.mean(0), []

    def unit(x):
        x = x - center
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    train = unit(train)
    for part in np.array_split(unit(test), max(1, len(test) // 1024)):
        similarity = part @ train.T
        near = np.argpartition(-similarity, min(k, len(train)) - 1, axis=1)[:, :k]
        weight = np.exp((np.take_along_axis(similarity, near, 1) - 1) / 0.07)
        vote = np.zeros((len(part), num_classes))
        np.add.at(vote, (np.arange(len(part))[:, None], train_labels[near]), weight)
        votes.append(vote)
    return np.concatenate(votes)


def ridge(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, num_classes: int,
          strength=0.01) -> np.ndarray:
    """Scores (V, num_classes) by ridge regression of one-hot labels: a linear probe in one step.

    Features are standardised by the training set's mean and deviation; the penalty is
    strength * videos * |W|^2.
    """
    mean, scale = train.mean(0), train.std(0) + 1e-6
    x, target = (train - mean) / scale, np.eye(num_classes)[train_labels]
    penalty = strength * len(x) * np.eye(x.shape[1])
    w = np.linalg.solve(x.T @ x + penalty, x.T @ target)
    return (test - mean) / scale @ w + target.mean(0)
