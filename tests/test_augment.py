"""video/augment.py: against values by hand, PIL and colorsys."""

import numpy as np
import torch
import torch.nn.functional as F

from tests.common import Skip, test
from video import augment


def pixels(*values):
    """A one-frame clip (1, 3, 1, n) with these values in all channels."""
    return torch.tensor(values, dtype=torch.uint8).expand(1, 3, 1, len(values)).contiguous()


@test
def test_rand_augment_operations_by_hand():
    """Arguments at magnitude 7 and the pixels of each operation equal values by hand."""
    level = {name: (argument(7, 1), argument(7, -1))
             for name, (_, argument) in augment.OPERATIONS.items()}
    near = lambda a, b: all(abs(x - y) < 1e-9 for x, y in zip(a, b))
    assert near(level["Rotate"], (21, -21)) and near(level["ShearX"], (0.21, -0.21))
    assert near(level["TranslateY"], (0.315, -0.315)) and near(level["Color"], (1.63, 0.37))
    assert level["Posterize"] == (2, 2) and level["Solarize"] == (77, 77)
    assert level["SolarizeAdd"] == (77, 77)
    at_most = [augment.OPERATIONS[name][1](10, 1)
               for name in ("Posterize", "Solarize", "SolarizeAdd")]
    assert at_most == [0, 0, 110]
    for name, argument, given, expect in (
            ("Invert", None, (0, 7, 255), (255, 248, 0)),
            ("Posterize", 2, (63, 64, 200, 255), (0, 64, 192, 192)),
            ("Posterize", 0, (63, 255), (0, 0)),
            ("Solarize", 77, (76, 77, 255), (76, 178, 0)),
            ("SolarizeAdd", 77, (0, 127, 128, 255), (77, 204, 128, 255)),
            ("AutoContrast", None, (50, 75, 100, 150), (0, 63, 127, 255)),
            ("AutoContrast", None, (9, 9), (9, 9)),
            ("Brightness", 1.63, (0, 100, 200), (0, 163, 255)),
            ("Brightness", 0.37, (0, 100, 200), (0, 37, 74)),
            ("Contrast", 0.37, (0, 100, 200), (63, 100, 137)),  # grey mean 100
            ("Color", 0.37, (0, 100, 200), (0, 100, 200)),  # grey stays grey
            ("TranslateX", 0.5, (10, 20, 30, 40), (30, 40, 128, 128)),
            ("TranslateX", -0.25, (10, 20, 30, 40), (128, 10, 20, 30)),
            ("TranslateX", 0.125, (10, 20, 30, 40), (15, 25, 35, 128))):  # half a pixel
        out = augment.OPERATIONS[name][0](pixels(*given), argument)
        assert out.dtype == torch.uint8, (name, out)
        assert out[0, 0, 0].tolist() == out[0, 2, 0].tolist() == list(expect), (name, out)
    square = torch.arange(0, 90, 10, dtype=torch.uint8).view(1, 1, 3, 3).repeat(2, 3, 1, 1)
    turned = augment.rotate(square, 90)[0, 0]
    assert turned.tolist() == square[0, 0].rot90(1).tolist(), turned
    smooth = augment.sharpness(square, 0)[0, 1]
    assert smooth[1, 1] == int((sum(range(0, 90, 10)) + 4 * 40) / 13 + 0.5)
    assert smooth[0].tolist() == [0, 10, 20]
    # 128 levels, 8 of each: step (1024 - 8) // 255 = 3
    ramp = torch.arange(128, dtype=torch.uint8).repeat(1, 3, 8, 1)
    expect = [min(255, (1 + 8 * i) // 3) for i in range(128)]
    assert augment.equalize(ramp, None)[0, 0, 0].tolist() == expect


@test
def test_rand_augment_equals_pil():
    """Pointwise operations equal PIL's to the bit, the geometric ones to 1 of 255."""
    try:
        from PIL import Image, ImageEnhance, ImageOps
    except ImportError:
        raise Skip("needs `pip install pillow`") from None
    fill = (augment.FILL,) * 3

    def pil(name, argument, image):
        smooth, (w, h) = dict(resample=Image.BILINEAR, fillcolor=fill), image.size
        if name in ("AutoContrast", "Equalize", "Invert"):
            return getattr(ImageOps, name.lower())(image)
        if name in ("Posterize", "Solarize"):
            return getattr(ImageOps, name.lower())(image, argument)
        if name == "SolarizeAdd":
            return image.point([min(255, i + argument * (i < 128)) for i in range(256)] * 3)
        if name == "Rotate":
            return image.rotate(argument, **smooth)
        matrix = {"ShearX": (1, argument, 0, 0, 1, 0), "ShearY": (1, 0, 0, argument, 1, 0),
                  "TranslateX": (1, 0, argument * w, 0, 1, 0),
                  "TranslateY": (1, 0, 0, 0, 1, argument * h)}
        if name in matrix:
            return image.transform(image.size, Image.AFFINE, matrix[name], **smooth)
        return getattr(ImageEnhance, name)(image).enhance(argument)
    rng = np.random.default_rng(0)
    ramp = np.stack(np.broadcast_arrays(*np.ogrid[:40, :60], 99), -1).astype(np.uint8)
    for frame in (rng.integers(0, 256, (41, 60, 3), dtype=np.uint8), ramp * 3,
                  np.full((8, 9, 3), 77, np.uint8),
                  np.where(rng.random((30, 31, 3)) < 0.5, 10, 200).astype(np.uint8)):
        clip = torch.from_numpy(frame).permute(2, 0, 1)[None].contiguous()
        for name, (operation, argument) in augment.OPERATIONS.items():
            for m, sign in ((0.0, 1), (6.5, 1), (7.2, -1), (9.9, 1)):
                ours = operation(clip, argument(m, sign))[0].permute(1, 2, 0).numpy().astype(int)
                error = abs(ours - np.array(pil(name, argument(m, sign), Image.fromarray(frame))))
                geometric = name.startswith(("Rotate", "Shear", "Translate"))
                assert error.max() <= geometric, (name, m, sign, error.max())
                assert (error > 0).mean() < 0.02, (name, m, sign, error.max())


@test
def test_rand_augment_draws():
    """N operations with replacement, each half the time, m ~ N(7, .5); one draw for all frames."""
    applied = []

    def spy(name):
        def operation(clip, m):
            applied.append((name, m))
            return clip
        return operation, lambda m, sign: m * sign
    real = augment.OPERATIONS
    augment.OPERATIONS = {name: spy(name) for name in real}
    try:
        for seed in range(1500):
            augment.rand_augment(np.random.default_rng(seed), pixels(1, 2))
    finally:
        augment.OPERATIONS = real
    names, m = zip(*applied)
    assert abs(len(m) / 1500 - 2) < 0.1 and {names.count(n) > 120 for n in real} == {True}
    assert abs(np.mean(np.abs(m)) - 7) < 0.05 and abs(np.std(np.abs(m)) - 0.5) < 0.03
    assert abs(np.mean(np.sign(m))) < 0.06
    g = torch.Generator().manual_seed(0)
    frame = torch.randint(0, 256, (1, 3, 24, 32), dtype=torch.uint8, generator=g)
    changed = 0
    for seed in range(30):
        clip = frame.expand(3, -1, -1, -1).contiguous()
        out = augment.rand_augment(np.random.default_rng(seed), clip)
        assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
        changed += not torch.equal(out[0], frame[0])
    assert 20 < changed


@test
def test_random_resized_crop_and_erasing():
    """Crops lie inside with area and aspect as stated; one box in a quarter of the clips."""
    areas = []
    for seed in range(500):
        y, x, h, w = augment.random_resized_crop(np.random.default_rng(seed), 240, 320)
        assert y >= 0 and x >= 0 and y + h <= 240 and x + w <= 320 and 0.72 < w / h < 1.37
        areas.append(h * w / 240 / 320)
    assert 0.075 < min(areas) < 0.12 and 0.85 < max(areas) <= 1 and abs(np.mean(areas) - 0.5) < 0.08
    central = augment.random_resized_crop(np.random.default_rng(0), 20, 400, (0.9, 1))
    assert central == (0, 186, 20, 27)
    boxes = [augment.erase_box(np.random.default_rng(s), 100, 100, 0.25) for s in range(1000)]
    some = [h * w / 1e4 for _, _, h, w in boxes if h]
    assert 200 < len(some) < 300 and 0.015 < min(some) and max(some) < 0.34
    video = torch.full((2, 3, 40, 50, 3), 0.25)
    torch.manual_seed(0)
    boxes = torch.tensor([[0, 0, 0, 0], [5, 10, 30, 20]])
    out = augment.erase(video, boxes, *torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.2, 0.1]]))
    inside = torch.zeros(40, 50, dtype=torch.bool)
    inside[5:35, 10:30] = True
    assert torch.equal(out[0], video[0]) and (out[1, :, ~inside] == 0.25).all()
    noise = (out[1, :, inside] - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.2, 0.1])
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert not torch.equal(noise[0], noise[1])


@test
def test_hsv_shift():
    """Hue, saturation and value move as colorsys has it, clipped; no shift changes nothing."""
    import colorsys
    g = torch.Generator().manual_seed(0)
    video = torch.rand(2, 1, 5, 6, 3, generator=g, dtype=torch.float64)
    video[0, 0, 0, 0], video[0, 0, 0, 1] = 0.5, 0.0  # grey, black
    assert (augment.hsv_shift(video, torch.zeros(2, 3)) - video).abs().max() < 1e-6
    shift = torch.tensor([[0.05, 0.1, -0.1], [-0.04, -0.1, 0.1]])
    out = augment.hsv_shift(video, shift)
    rows = video.reshape(60, 3), out.reshape(60, 3), shift.repeat_interleave(30, 0).tolist()
    for pixel, got, (dh, ds, dv) in zip(*rows):
        h, s, v = colorsys.rgb_to_hsv(*pixel.tolist())
        if s > 0:  # the hue of grey is arbitrary
            want = colorsys.hsv_to_rgb((h + dh) % 1, min(max(s + ds, 0), 1), min(max(v + dv, 0), 1))
            assert np.allclose(got, want, atol=1e-6), (pixel, got, want)


@test
def test_mix():
    """Mixup and CutMix with the reversed batch; soft targets by hand; lambda is the area left."""
    class Fixed:
        def __init__(self, lam, y=0, x=0): self.lam, self.places = lam, [y, x]
        beta = lambda self, a, b: self.lam
        random = lambda self: 0.9  # no cutmix at switch_prob .5
        integers = lambda self, n: self.places.pop(0)
    video = torch.arange(3.0).view(3, 1, 1, 1, 1).expand(3, 2, 8, 12, 3).contiguous()
    labels = torch.tensor([0, 1, 3])
    x, y = augment.mix(Fixed(0.3), video, labels, 4)
    assert torch.allclose(x[:, 0, 0, 0, 0], torch.tensor([1.4, 1.0, 0.6]))
    hard = torch.tensor([[0.3, 0, 0, 0.7], [0, 1, 0, 0], [0.7, 0, 0, 0.3]])
    assert torch.allclose(y, 0.9 * hard + 0.1 / 4) and torch.allclose(y.sum(1), torch.ones(3))
    x, y = augment.mix(Fixed(0.75, 4, 11), video, labels, 4, mixup=0, smoothing=0)
    # half the sides: 4 x 6 around (4, 11): rows 2..5, columns 8..11 after the cut at the edge
    inside = torch.zeros(8, 12, dtype=torch.bool)
    inside[2:6, 8:12] = True
    assert (x[0, :, inside] == 2).all() and (x[0, :, ~inside] == 0).all() and (x[1] == 1).all()
    assert torch.allclose(y[0], torch.tensor([5 / 6, 0, 0, 1 / 6]))
    x, y = augment.mix(Fixed(0.5), video, labels, 4, mixup=0, cutmix=0, smoothing=0)
    assert torch.equal(x, video) and torch.equal(y, F.one_hot(labels, 4).float())
    draws = [augment.mix(np.random.default_rng(s), video[:2], labels[:2], 4, smoothing=0)
             for s in range(600)]
    mixed = np.array([y[0, 0].item() for x, y in draws if len(x[0].unique()) == 1])
    assert abs(len(mixed) / 600 - 0.5) < 0.08 and abs(mixed.mean() - 0.5) < 0.06
    assert abs(mixed.std() - (0.25 / 2.6) ** 0.5) < 0.03  # of Beta(.8, .8)


@test
def test_views_are_drawn_once_per_clip():
    """Equal frames stay so under every view; jitter, grey, blur, solarising do what they say."""
    torch.manual_seed(0)
    frame = torch.randint(0, 256, (1, 3, 40, 50), dtype=torch.uint8)
    seen = set()
    for seed in range(40):
        for second in (False, True):
            out = augment.view(np.random.default_rng(seed), frame.repeat(3, 1, 1, 1), (24, 24),
                               (0.3, 1), True, second)
            assert out.shape == (3, 3, 24, 24) and out.dtype == torch.uint8
            assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])
            seen.add((second, bool((out[:, 0] == out[:, 1]).all())))
    # some are grey, some are not
    assert seen == {(a, b) for a in (False, True) for b in (False, True)}
    flat = torch.full((2, 3, 9, 9), 200, dtype=torch.uint8)
    assert (augment.blur(flat, 2.0) == 200).all()
    point = torch.zeros(1, 3, 21, 21, dtype=torch.uint8)
    point[..., 10, 10] = 255
    x = np.arange(-10, 11)
    kernel = np.exp(-x ** 2 / 4.5) * (abs(x) <= 5)
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    assert abs(augment.blur(point, 1.5)[0, 0].numpy() - 255 * kernel).max() <= 0.51
    red = torch.tensor([200, 100, 100], dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, 2, 2)
    hues = []
    for seed in range(30):
        out = augment.color_jitter(np.random.default_rng(seed), red, 0, 0, 0, 0.1)
        hues.append(out[0, :, 0, 0].tolist())
    assert all(max(h) == 200 and min(h) == 100 and h[0] == 200 for h in hues)
    assert len(set(map(tuple, hues))) > 9
