"""Augmentation, in torch on uint8 clips: RandAugment, random-resized crop, erasing, mixup, CutMix.

Everything is drawn once per clip and applied to all its frames alike. A clip is (T, C, H, W) uint8
here: planes are several times faster than interleaved pixels. Draws come from a numpy Generator, so
they do not depend on workers. RandAugment follows PIL, which the paper's code used, to the last bit
where PIL's operation is pointwise.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

FILL = 128  # grey level of what a geometric operation brings in from outside


# ---- RandAugment: operations on (T, C, H, W) uint8; their argument is the last ----

def lookup(clip: torch.Tensor, table: np.ndarray) -> torch.Tensor:
    """Maps every value v to table[v], rounded down and clipped to 0..255.

    table (256,), or (T, C, 256) with a row for each plane.
    """
    table = np.clip(np.floor(table), 0, 255).astype(np.uint8)
    if table.ndim == 1:
        return torch.from_numpy(np.take(table, clip.numpy()))
    planes = zip(table.reshape(-1, 256), clip.flatten(0, 1).numpy())
    return torch.from_numpy(np.stack([np.take(row, plane) for row, plane in planes])).view(
        clip.shape)


def auto_contrast(clip, _=None):
    """Stretches each plane so that its darkest value becomes 0 and its brightest 255."""
    pixels = clip.flatten(2)  # (T, C, H*W)
    low = pixels.amin(2).numpy().astype(float)[..., None]  # (T, C, 1)
    high = pixels.amax(2).numpy().astype(float)[..., None]
    flat = high <= low
    scale = 255 / np.where(flat, 1, high - low)
    values = np.arange(256.0)
    return lookup(clip, np.where(flat, values, np.trunc(values * scale - low * scale)))


def equalize(clip, _=None):
    """Equalises the histogram of each plane."""
    tables = []
    for plane in clip.flatten(0, 1).flatten(1).numpy():
        count = np.bincount(plane, minlength=256)
        last = count.nonzero()[0][-1]  # the last occupied level does not count
        step = (plane.size - count[last]) // 255
        before = np.cumsum(count) - count
        tables.append((step // 2 + before) // step if step else np.arange(256))
    return lookup(clip, np.stack(tables).reshape(*clip.shape[:2], 256))


def invert(clip, _=None):
    """255 - value."""
    return 255 - clip


def posterize(clip, bits):
    """Keeps the `bits` highest bits of a value."""
    return clip & (0xFF00 >> bits & 0xFF)


def solarize(clip, threshold):
    """Inverts the values from `threshold` on."""
    values = np.arange(256)
    return lookup(clip, np.where(values < threshold, values, 255 - values))


def solarize_add(clip, amount):
    """Adds to the values below 128."""
    values = np.arange(256)
    return lookup(clip, np.where(values < 128, values + amount, values))


def blend(clip: torch.Tensor, other, factor: float) -> torch.Tensor:
    """other + factor * (clip - other), rounded down, clipped.

    Factor 0 gives `other` (a number, or a tensor that broadcasts), 1 the clip, 2 exaggerates.
    """
    other = other.float() if isinstance(other, torch.Tensor) else other
    return clip.float().sub_(other).mul_(factor).add_(other).clamp_(0, 255).byte()


def grey(clip: torch.Tensor) -> torch.Tensor:
    """-> (T, 1, H, W) uint8: ITU-R 601 luma in fixed point, as PIL rounds it."""
    r, g, b = clip.int().unbind(1)
    return ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).byte()[:, None]


def saturate(clip, factor):
    """Blend with the grey clip."""
    return blend(clip, grey(clip), factor)


def contrast(clip, factor):
    """Blend with the mean grey of each frame."""
    mean = (grey(clip).float().mean((1, 2, 3), keepdim=True) + 0.5).floor()  # (T, 1, 1, 1)
    return blend(clip, mean, factor)


def brightness(clip, factor):
    """Blend with black."""
    return blend(clip, 0, factor)


def sharpness(clip, factor):
    """Blend with a smoothed clip (3x3, centre 5, others 1); the outermost pixels stay."""
    x = clip.float()
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = (box.add_(x[:, :, 1:-1, 1:-1], alpha=4) / 13 + 0.5).floor()
    return blend(clip, smooth, factor)


def affine(clip: torch.Tensor, matrix) -> torch.Tensor:
    """Output pixel (x, y) is the input at (a x + b y + c, d x + e y + f), bilinear.

    FILL where that lies outside. Coordinates are those of PIL: pixel centres at .5. One set of
    weights serves all planes.
    """
    a, b, c, d, e, f = matrix
    H, W = clip.shape[2:]
    x = torch.arange(W, dtype=torch.float64) + 0.5
    y = torch.arange(H, dtype=torch.float64)[:, None] + 0.5
    x, y = a * x + b * y + c, d * x + e * y + f  # (H, W): where output pixels come from
    outside = (x < 0) | (x >= W) | (y < 0) | (y >= H)
    x, y = x - 0.5, y - 0.5
    x0, y0 = x.floor(), y.floor()
    wx, wy = (x - x0).float(), (y - y0).float()
    left, right = (i.clamp(0, W - 1).int() for i in (x0, x0 + 1))
    above, below = (j.clamp(0, H - 1).int() * W for j in (y0, y0 + 1))
    taps = ((above + left, (1 - wy) * (1 - wx)), (above + right, (1 - wy) * wx),
            (below + left, wy * (1 - wx)), (below + right, wy * wx))
    # (H*W, T*C): a gather then copies rows, 15 times as fast
    pixels = clip.reshape(-1, H * W).t().contiguous()
    # a whole number that float32 just misses is not rounded down
    out = torch.full(pixels.shape, 1e-4)
    for index, weight in taps:
        if weight.any():  # shear and translation need two of the four
            out.addcmul_(pixels.index_select(0, index.flatten()), weight.view(-1, 1))
    return out.byte().t().reshape(clip.shape).masked_fill_(outside, FILL)


def rotate(clip, degrees):
    """Counter-clockwise about the centre."""
    H, W = clip.shape[2:]
    r = -math.radians(degrees)
    cos, sin = math.cos(r), math.sin(r)
    x, y = W / 2 - cos * W / 2 - sin * H / 2, H / 2 + sin * W / 2 - cos * H / 2
    return affine(clip, (cos, sin, x, -sin, cos, y))


def shear_x(clip, slope):
    """Rows are moved by slope * y pixels."""
    return affine(clip, (1, slope, 0, 0, 1, 0))


def shear_y(clip, slope):
    """Columns are moved by slope * x pixels."""
    return affine(clip, (1, 0, 0, slope, 1, 0))


def translate_x(clip, share):
    """Moved by a share of the width."""
    return affine(clip, (1, 0, share * clip.shape[3], 0, 1, 0))


def translate_y(clip, share):
    """Moved by a share of the height."""
    return affine(clip, (1, 0, 0, 0, 1, share * clip.shape[2]))


def no_argument(m, sign):
    """The operation has one strength only."""


def factor_of(m, sign):
    """For blends: 1 leaves the clip as it is."""
    return 1 + sign * 0.09 * m


# name -> (operation(clip, argument), argument from the magnitude m in [0, 10] and a sign +-1)
OPERATIONS = {
    "AutoContrast": (auto_contrast, no_argument),
    "Equalize": (equalize, no_argument),
    "Invert": (invert, no_argument),
    "Rotate": (rotate, lambda m, sign: sign * 30 * m / 10),
    "Posterize": (posterize, lambda m, sign: 4 - int(0.4 * m)),
    "Solarize": (solarize, lambda m, sign: 256 - int(25.6 * m)),
    "SolarizeAdd": (solarize_add, lambda m, sign: int(11 * m)),
    "Color": (saturate, factor_of),
    "Contrast": (contrast, factor_of),
    "Brightness": (brightness, factor_of),
    "Sharpness": (sharpness, factor_of),
    "ShearX": (shear_x, lambda m, sign: sign * 0.03 * m),
    "ShearY": (shear_y, lambda m, sign: sign * 0.03 * m),
    "TranslateX": (translate_x, lambda m, sign: sign * 0.045 * m),
    "TranslateY": (translate_y, lambda m, sign: sign * 0.045 * m),
}


def rand_augment(rng, clip: torch.Tensor, num_ops=4, magnitude=7.0, std=0.5,
                 prob=0.5) -> torch.Tensor:
    """m7-n4-mstd0.5-inc1: num_ops operations drawn with replacement, each applied with `prob`.

    clip (T, C, H, W) uint8 -> the same. Each operation has its own magnitude, N(magnitude, std)
    clipped to [0, 10], and its own sign.
    """
    for name in rng.choice(list(OPERATIONS), num_ops):
        if rng.random() < prob:
            operation, argument = OPERATIONS[name]
            m = float(np.clip(rng.normal(magnitude, std), 0, 10))
            sign = 1 if rng.random() < 0.5 else -1
            clip = operation(clip, argument(m, sign))
    return clip


# ---- crop, erasing: boxes are (top, left, h, w) in whole pixels ----

def random_box(rng, height: int, width: int, area, aspect, tries: int = 10):
    """-> a box with a share of the area in `area` and w/h log-uniform in `aspect`, or None."""
    for _ in range(tries):
        pixels = rng.uniform(*area) * height * width
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        h, w = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return None


def random_resized_crop(rng, height: int, width: int, area=(0.08, 1), aspect=(3 / 4, 4 / 3)):
    """-> random_box, or the largest central crop whose w/h lies in `aspect`."""
    box = random_box(rng, height, width, area, aspect)
    if box is None:
        h = min(height, round(width / aspect[0]) or 1)
        w = min(width, round(height * aspect[1]) or 1)
        box = (height - h) // 2, (width - w) // 2, h, w
    return box


def erase_box(rng, height: int, width: int, prob: float) -> list:
    """-> the box of random erasing (area .02 to 1/3, aspect .3 to 3.3), [0, 0, 0, 0] for none.

    prob: how likely there is one.
    """
    box = None
    if rng.random() < prob:
        box = random_box(rng, height, width, (0.02, 1 / 3), (0.3, 1 / 0.3))
    return list(box or (0, 0, 0, 0))


# ---- on the device, on batches: erasing, mixup, CutMix (torch.tensor would wait for a GPU) ----

def inside(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, 4) int top, left, h, w -> (B, 1, H, W, 1) bool."""
    y, x = (torch.arange(n, device=boxes.device) for n in (height, width))
    top, left, h, w = boxes.T[..., None]  # each (B, 1)
    rows = (y >= top) & (y < top + h)  # (B, H)
    columns = (x >= left) & (x < left + w)  # (B, W)
    return (rows[:, :, None] & columns[:, None, :])[:, None, :, :, None]


def erase(video: torch.Tensor, boxes: torch.Tensor, mean, std) -> torch.Tensor:
    """(B, T, H, W, C) float in [0,1], boxes (B, 4) -> normal noise in the box, in all frames.

    The noise has this mean and std (tensors of C values each).
    """
    noise = torch.randn_like(video) * std + mean
    return torch.where(inside(boxes, *video.shape[2:4]), noise, video)


def hsv_shift(video: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Moves hue (turns), saturation and value; the latter two are clipped.

    video (B, T, H, W, 3) float in [0,1], shift (B, 3): one for all frames of a clip.
    """
    dh, ds, dv = shift.view(-1, 3, 1, 1, 1, 1).unbind(1)
    r, g, b = video.split(1, -1)
    value, low = video.amax(-1, keepdim=True), video.amin(-1, keepdim=True)
    chroma = value - low
    safe = chroma.clamp(min=1e-12)
    below_red = torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    hue = torch.where(value == r, (g - b) / safe, below_red) / 6
    saturation = (chroma / value.clamp(min=1e-12) + ds).clamp(0, 1)
    value = (value + dv).clamp(0, 1)
    k = ((hue + dh) * 6 + (5 - 2 * torch.arange(3, device=video.device))) % 6
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


def mix(rng, video, labels, num_classes, mixup=0.8, cutmix=1.0, switch_prob=0.5, smoothing=0.1):
    """Mixup or CutMix with the batch reversed, one lambda for all.

    video (B, T, H, W, C) float, labels (B,) -> the video, soft targets (B, num_classes) float32.
    lambda ~ Beta(mixup, mixup), or with switch_prob Beta(cutmix, cutmix), then the share outside
    the box (the same in all frames). 0 turns either off. Targets are smoothed, then mixed.
    """
    off = smoothing / num_classes
    target = torch.full((len(labels), num_classes), off, device=labels.device)
    target.scatter_(1, labels[:, None], 1 - smoothing + off)
    if not mixup and not cutmix:
        return video, target
    use_cutmix = cutmix and (not mixup or rng.random() < switch_prob)
    alpha = cutmix if use_cutmix else mixup
    lam = rng.beta(alpha, alpha)
    if use_cutmix:
        (top, left, h, w), lam = cutmix_box(rng, *video.shape[2:4], lam)
        box = (..., slice(top, top + h), slice(left, left + w), slice(None))
        own, video = video, video.clone()
        video[box] = own[box].flip(0)
    else:
        video = torch.lerp(video.flip(0), video, lam)
    return video, target * lam + target.flip(0) * (1 - lam)


def cutmix_box(rng, height: int, width: int, lam: float) -> tuple[tuple, float]:
    """-> a box of share 1 - lam around a uniform centre, and the lambda that it has.

    It is cut off at the edges, and lambda then is larger.
    """
    h, w = int(height * math.sqrt(1 - lam)), int(width * math.sqrt(1 - lam))
    y, x = rng.integers(height), rng.integers(width)
    top, bottom = (int(np.clip(v, 0, height)) for v in (y - h // 2, y + h // 2))
    left, right = (int(np.clip(v, 0, width)) for v in (x - w // 2, x + w // 2))
    h, w = bottom - top, right - left
    return (top, left, h, w), 1 - h * w / (height * width)


# ---- the views of contrastive learning, on (T, C, H, W) uint8: one draw for all frames ----

def color_jitter(rng, clip: torch.Tensor, brightness=0.4, contrast=0.4, saturation=0.2,
                 hue=0.1) -> torch.Tensor:
    """In random order, factors uniform in 1 +- strength, the hue moved by up to `hue` turns.

    The strengths are MoCo v3's.
    """
    strengths = dict(Brightness=brightness, Contrast=contrast, Color=saturation)
    for name in rng.permutation(["Brightness", "Contrast", "Color", "Hue"]):
        if name == "Hue":
            shift = torch.tensor([[rng.uniform(-hue, hue), 0, 0]], dtype=torch.float32)
            video = clip.permute(0, 2, 3, 1)[None].float() / 255  # (1, T, H, W, C)
            shifted = hsv_shift(video, shift)[0]
            clip = (shifted * 255).round().byte().permute(0, 3, 1, 2)
        else:
            factor = rng.uniform(1 - strengths[name], 1 + strengths[name])
            clip = OPERATIONS[name][0](clip, factor)
    return clip


def blur(clip: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian of this standard deviation (pixels), cut off after 3 of them, borders reflected."""
    radius = min(math.ceil(3 * sigma), *(n - 1 for n in clip.shape[2:]))
    kernel = torch.exp(-torch.arange(-radius, radius + 1.0).square() / (2 * sigma ** 2))
    kernel = (kernel / kernel.sum()).expand(clip.shape[1], 1, 1, -1)
    x = F.pad(clip.float(), (radius,) * 4, mode="reflect")
    x = F.conv2d(F.conv2d(x, kernel, groups=clip.shape[1]), kernel.mT, groups=clip.shape[1])
    return x.round().clamp(0, 255).byte()


def view(rng, clip: torch.Tensor, size: tuple, area, color: bool,
         second: bool = False) -> torch.Tensor:
    """One view, (T, C, *size): random-resized crop, flip; color: jitter p .8, grey p .2, blur.

    Blur p 1 for the first view, p .1 and solarising p .2 for the second (BYOL's and MoCo v3's
    asymmetry).
    """
    top, left, h, w = random_resized_crop(rng, *clip.shape[2:], area)
    clip = clip[:, :, top:top + h, left:left + w].contiguous()
    if (h, w) != size:
        clip = F.interpolate(clip, size=size, mode="bilinear", antialias=True)
    clip = clip.flip(3) if rng.random() < 0.5 else clip
    if not color:
        return clip
    if rng.random() < 0.8:
        clip = color_jitter(rng, clip)
    if rng.random() < 0.2:
        clip = grey(clip).expand(-1, 3, -1, -1)
    if rng.random() < (0.1 if second else 1):
        clip = blur(clip, rng.uniform(0.1, 2.0) * min(size) / 224)
    if second and rng.random() < 0.2:
        clip = solarize(clip, 128)
    return clip
