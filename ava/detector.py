"""The detector: a video encoder, RoIAlign on its mean over time, logits of each box."""

import numpy as np
import torch
import torch.nn as nn

from ava.clips import TestFrames
from ava.files import Rows
from lib.cubes import to_unit
from lib.feed import ignore_signals
from model import IMAGENET_MEAN, IMAGENET_STD, SIZES, Encoder, init_linears
from weights import DETECTION_MEAN, DETECTION_STD, encoder_shape, load_pretrained, read_weights

# mean and std of the input
NORMS = {"imagenet": dict(mean=IMAGENET_MEAN, std=IMAGENET_STD),
         "reference": dict(mean=DETECTION_MEAN, std=DETECTION_STD)}


# ---- RoIAlign ----

def bin_weights(low, high, size: int, bins: int, aligned: bool) -> torch.Tensor:
    """Ends (R,) of RoIs in cells along one axis -> (R, bins, size): a cell's share in each bin.

    A bin has ceil(length / bins) sampling points at equal distances, each linear between two cells;
    a point up to one cell outside is moved to the border, one further out counts as 0. They are no
    more than an RoI within the frame has, and one for rounding; a longer RoI's lie further apart. A
    number that depended on the RoIs would wait for the device and could not be compiled.
    """
    shift = 0.5 if aligned else 0.0
    low, length = low - shift, high - low
    length = length if aligned else length.clamp(min=1)
    # an aligned box without length has no points: all 0
    most = -(-size // bins) + 1
    wanted = (length / bins).ceil().clamp(max=most)[:, None, None]  # (R, 1, 1)
    points = wanted.clamp(min=1)
    i = torch.arange(most, device=low.device)
    bin_start = torch.arange(bins, device=low.device)[:, None]
    place = bin_start + (i + 0.5) / points  # (R, bins, points), in bins
    y = low[:, None, None] + place * (length / bins)[:, None, None]
    valid = (i < wanted) & (y >= -1) & (y <= size)
    y = y.clamp(0, size - 1)
    cells = torch.arange(size, device=low.device)
    hat = (1 - (y[..., None] - cells).abs()).clamp(min=0)  # (R, bins, points, size)
    return (hat * valid[..., None]).sum(2) / points


def roi_align(features: torch.Tensor, boxes: torch.Tensor, index: torch.Tensor, scale: float,
              bins: int = 7, aligned: bool = False) -> torch.Tensor:
    """RoIAlign (Mask R-CNN, section 3) with adaptive sampling.

    features (B, D, h, w), boxes (R, 4) x1 y1 x2 y2 in pixels, index (R,) of their maps ->
    (R, D, bins, bins). Bilinear sampling and averaging are linear and separate into rows and
    columns: two matrix products. aligned moves boxes by half a cell and lets them be smaller than
    one.
    """
    h, w = features.shape[2:]
    x1, y1, x2, y2 = (boxes.to(features.dtype) * scale).unbind(1)
    with torch.no_grad():
        rows = bin_weights(y1, y2, h, bins, aligned)  # (R, bins, h)
        columns = bin_weights(x1, x2, w, bins, aligned)  # (R, bins, w)
    x = features.index_select(0, index) @ columns.mT[:, None]  # (R, D, h, bins)
    return rows[:, None] @ x


# ---- the model ----

class Detector(Encoder):
    """Encoder, LayerNorm, mean over time, RoIAlign 7x7, max, linear: logits of each box.

    Frames may have any size. Named as in the paper's detection code, without its prefixes; the
    final norm takes pre-training's encoder.norm.
    """

    def __init__(self, num_classes: int, aligned: bool = False, **kwargs):
        super().__init__(**kwargs)
        D = SIZES[self.config["size"]]["width"]
        self.aligned = aligned
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.cls_score = nn.Linear(D, num_classes)
        self.config |= dict(num_classes=num_classes, aligned=aligned)
        init_linears(self)
        self.cls_score.weight.data.mul_(0.001)

    def fit(self, grid: tuple):
        """Takes frames of this token grid: positions are resized per temporal slot."""
        self.grid = grid
        self.set_positions(self.config["pos_grid"])

    def forward(self, video, boxes, index):
        """Logits (R, num_classes) of boxes (R, 4) in pixels, of the clips index (R,).

        video (B, T, H, W, C) uint8 or float in [0,1], H and W multiples of the patch.
        """
        grid = tuple(n // c for n, c in zip(video.shape[1:4], self.cube))
        if grid != self.grid:
            self.fit(grid)
        x = self.norm(super().forward(video))  # (B, N, D)
        with torch.autocast(x.device.type, enabled=False):
            x = x.float().unflatten(1, self.grid).mean(1)  # (B, h, w, D)
            x = x.permute(0, 3, 1, 2).contiguous()  # (B, D, h, w)
            x = roi_align(x, boxes, index, 1 / self.cube[1], 7, self.aligned)  # (R, D, 7, 7)
            x = x.amax((2, 3))  # (R, D)
        return self.cls_score(x)


def load_detector(path: str, names: dict | None, norm: str | None = None):
    """A detection checkpoint, ours or in the paper's layout.

    -> (Detector in eval mode, {id: name}, the arguments it was trained with). names: the classes of
    a file that does not tell its own; norm replaces the mean and std that the file has.
    """
    state, _, about = read_weights(path)
    if not about["detector"]:
        raise ValueError(f"{path}: no detection checkpoint, it has no cls_score (nor norm and "
                         "head); --init trains one from it")
    outputs = len(state["cls_score.weight"])
    if about.get("class_ids"):
        own = dict(zip(about["class_ids"], about["classes"]))
        if names and list(names) != list(own):
            raise ValueError(f"{path}: its classes are other ones than those of --label_map; "
                             "leave that out")
        names = own
    if not names or len(names) != outputs:
        raise ValueError(f"{path}: has {outputs} outputs; expected --label_map with as many "
                         "classes" + (f", not {len(names)}" if names else ""))
    shape = encoder_shape(path) | NORMS.get(norm, {})
    model = Detector(outputs, about.get("aligned", False), **shape)
    load_pretrained(model, path, verbose=False)
    return model.eval(), names, about["args"]


# ---- detecting ----

def pad_frames(video: torch.Tensor, patch: int, mean) -> torch.Tensor:
    """(B, T, H, W, C) -> float32 in [0,1], H and W padded to multiples of the patch.

    Right and bottom get the mean colour (C,), which normalisation makes 0. Frames that fit are
    returned as they are.
    """
    B, T, h, w, C = video.shape
    if h % patch == 0 and w % patch == 0:
        return video
    H, W = -(-h // patch) * patch, -(-w // patch) * patch
    out = mean.expand(B, T, H, W, C).clone()
    out[:, :, :h, :w] = to_unit(video)
    return out


def enlarged(boxes: np.ndarray, h: int, w: int) -> np.ndarray:
    """Boxes (n, 4) in [0,1] -> in pixels of an h x w frame, enlarged for pooling.

    By 5 % of the width and 2.5 % of the height at each end, within the frame.
    """
    boxes = boxes.astype(float) * [w, h, w, h]
    margin = (boxes[:, 2:] - boxes[:, :2]) * [0.05, 0.025]
    boxes = np.concatenate([boxes[:, :2] - margin, boxes[:, 2:] + margin], 1)
    return np.clip(boxes, 0, [w, h, w, h])


@torch.no_grad()
def detect(run, model: Detector, videos: TestFrames, batch_size: int, progress=None):
    """Every key frame once, shared among the ranks of `run` (a lib.process.Process).

    -> ({key frame index: (n, classes) float32 probabilities of its boxes}, {index: why it failed}),
    the same on all ranks. Rank r takes groups r, r + world, ...; rank 0 calls progress(done, of).
    """
    mine = range(run.rank, len(videos), run.world)
    loader = torch.utils.data.DataLoader(
        videos, batch_size=None, sampler=mine, num_workers=run.num_workers,
        worker_init_fn=ignore_signals, pin_memory=run.device.type == "cuda",
        prefetch_factor=2 if run.num_workers else None)
    probs, failed, grid = {}, {}, model.grid
    for done, (parts, bad) in enumerate(loader, 1):
        failed |= bad
        for group, pixels, where in parts:
            pixels = pixels.to(run.device, non_blocking=True)
            for start in range(0, len(group), batch_size):
                some = slice(start, start + batch_size)
                frames = [videos.frames[i] for i in group[some]]
                video = pixels[where[some].to(run.device)]  # (B, T, h, w, C)
                video = pad_frames(video, model.cube[1], model.mean[:3])
                boxes = enlarged(np.concatenate([f.boxes for f in frames]), *pixels.shape[1:3])
                boxes = torch.from_numpy(boxes).float().to(run.device)
                counts = [len(f.boxes) for f in frames]
                index = torch.from_numpy(np.repeat(np.arange(len(frames)), counts)).to(run.device)
                with run.autocast:
                    logits = model(video, boxes, index)
                p = logits.float().sigmoid().cpu().numpy()
                probs |= dict(zip(group[some], np.split(p, np.cumsum(counts)[:-1])))
        if progress and run.rank == 0:
            progress(done, len(mine))
    model.fit(grid)  # training is compiled for its own
    for other_probs, other_failed in run.gather((probs, failed)):
        probs, failed = probs | other_probs, failed | other_failed
    return dict(sorted(probs.items())), dict(sorted(failed.items()))


def to_rows(frames: list, probs: dict, class_ids: list) -> Rows:
    """Probabilities of boxes -> a row per box and class.

    Its score is the probability times the person detector's score.
    """
    K = len(class_ids)
    keys = [(frames[i].video, frames[i].second) for i in probs]
    counts = [len(p) for p in probs.values()]
    box = np.concatenate([np.zeros((0, 4)), *(frames[i].boxes for i in probs)])
    score = [p * frames[i].scores[:, None] for i, p in probs.items()]
    score = np.concatenate(score or [np.zeros((0, K))]).astype(float)
    return Rows(keys, np.repeat(np.arange(len(keys)), counts).repeat(K), box.repeat(K, 0),
                np.tile(np.array(class_ids), len(box)), score.ravel())
