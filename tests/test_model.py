"""model.py, and of lib/: cubes, cpu_attention, reconstruct."""

import math
import unittest.mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

import lib.reconstruct as reconstruct_file
import model as model_file
import pretrain
import pretrain_moco
import pretrain_vicmae
from lib.cpu_attention import HeadwiseAttention
from lib.cubes import normalize_cubes, patchify, position_table, sincos_table, unpatchify
from lib.optim import param_groups
from lib.reconstruct import baselines, reconstruct
from model import SIZES, VideoClassifier, VideoMAE, count_params
from tests.common import Skip, clips, mask_for, raises, small, test
from weights import encoder_shape


# ---------------------------------------------------------------- lib/cubes.py

@test
def test_position_table():
    """sin/cos by the formula, exact to float32 at token 1567; resizing keeps what it can."""
    table = sincos_table(1568, 768)
    for p, j in ((0, 0), (1, 1), (1567, 0), (1567, 1), (1567, 300), (800, 767)):
        angle = p / 10000 ** (2 * (j // 2) / 768)
        wave = math.sin(angle) if j % 2 == 0 else math.cos(angle)
        assert abs(table[p, j].item() - wave) < 1e-7, (p, j)
    assert torch.equal(position_table((2, 3, 4), 16, (2, 3, 4)), sincos_table(24, 16))
    # linear in time: ends repeat, 3:1 and 1:3 between
    tall = position_table((4, 3, 4), 16, (2, 3, 4)).view(4, 12, 16)
    old = sincos_table(24, 16).view(2, 12, 16)
    for k, w in enumerate((1, 0.75, 0.25, 0)):
        assert torch.allclose(tall[k], w * old[0] + (1 - w) * old[1], atol=1e-6)


@test
def test_patchify():
    """Cubes lie in (t, h, w) order, their pixels in (pt, ph, pw, c); unpatchify is the inverse."""
    video = torch.arange(2 * 4 * 8 * 12 * 3).view(2, 4, 8, 12, 3)
    cubes = patchify(video, (2, 4, 4))
    assert cubes.shape == (2, 2 * 2 * 3, 2 * 4 * 4 * 3)
    t, h, w, pt, ph, pw, c = 1, 0, 2, 1, 3, 2, 1
    token, pixel = (t * 2 + h) * 3 + w, ((pt * 4 + ph) * 4 + pw) * 3 + c
    assert cubes[1, token, pixel] == video[1, 2 * t + pt, 4 * h + ph, 4 * w + pw, c]
    assert torch.equal(unpatchify(cubes, (2, 2, 3), (2, 4, 4)), video)


# ---------------------------------------------------------------- attention

@test
def test_attention_on_a_gpu():
    """In bf16 a GPU has cuDNN's attention where torch prefers it (Hopper), flash elsewhere."""
    if not torch.cuda.is_available():
        raise Skip("no GPU here")
    q = torch.zeros(2, 3, 64, 64, device="cuda", dtype=torch.bfloat16)
    hopper = torch.cuda.get_device_capability() in ((9, 0), (10, 0))
    wanted = SDPBackend.CUDNN_ATTENTION if hopper else SDPBackend.FLASH_ATTENTION
    assert torch._fused_sdp_choice(q, q, q) == wanted.value


@test
def test_headwise_attention():
    """The CPU's bf16 attention and its gradients equal float64's, within bf16's precision."""
    g = torch.Generator().manual_seed(0)
    # N so large that heads go one by one
    q, k, v, grad = torch.randn(4, 3, 2001, 4, dtype=torch.float64, generator=g)
    assert len(HeadwiseAttention.groups(q)) == 3 and len(HeadwiseAttention.groups(q[:, :100])) == 1
    def results(attend, dtype):
        x = [y.detach().to(dtype).requires_grad_() for y in (q, k, v)]
        out = attend(*x)
        out.backward(grad.to(dtype))
        return [out] + [y.grad for y in x]
    plain = results(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 0.02)):
        for a, b in zip(results(HeadwiseAttention.apply, dtype), plain):
            assert (a - b).norm() < tolerance * b.norm()
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(clips(model), mask_for(model))[0]
    assert abs(loss - model(clips(model), mask_for(model))[0]) < 0.02


# ---------------------------------------------------------------- model.py

@test
def test_published_parameter_counts():
    """Parameters of all sizes are the published ones, VideoMAE v2's 1,011 M without a head."""
    published = dict(small=(24029376, 22033936, 22264936), base=(94210944, 86534800, 86996200),
                     large=(342996992, 304270736, 304885736),
                     huge=(692487296, 632119440, 632888040),
                     giant=(1026306560, 1012174352, 1013019752))  # decoder: 4 blocks of 512
    with torch.device("meta"):
        for size, (pre, k400, k1000) in published.items():
            assert count_params(VideoMAE(size)) == pre, size
            assert count_params(VideoClassifier(400, size=size)) == k400, size
            assert count_params(VideoClassifier(1000, size=size)) == k1000, size
        giant = VideoMAE("giant")
        assert count_params(giant.encoder) == 1011610752
    parts = giant.encoder, giant.decoder
    assert [part.blocks[0].mlp.fc1.out_features for part in parts] == [6144, 2234]


@test
def test_patches_go_by_the_size():
    """Patches are 14 pixels in a giant model, 16 in others; --patch_size and --toy still win."""
    for module in (pretrain, pretrain_moco, pretrain_vicmae):
        data = ["--data", "x"]
        for flags, patch in (([], 16), (["--size", "giant"], 14), (["--size", "huge"], 16),
                             (["--size", "giant", "--patch_size", "16"], 16), (["--toy"], 8)):
            assert module.get_args(data + flags).patch_size == patch, (module, flags)
    for size, patch in (("giant", 14), ("huge", 16)):
        assert encoder_shape(None, size=size)["patch_size"] == patch
        assert encoder_shape(None, size=size, patch_size=8)["patch_size"] == 8
        with torch.device("meta"):
            model = VideoClassifier(2, size=size)
        assert model.grid == (8, 224 // patch, 224 // patch)


def slow_blocks(blocks, x, heads):
    """float64, one sample, one head and one query at a time."""
    for b in blocks:
        p = {k: v.double() for k, v in b.named_parameters()}
        var = lambda y: y.var(-1, unbiased=False, keepdim=True)
        unit = lambda y: (y - y.mean(-1, keepdim=True)) / (var(y) + 1e-6).sqrt()
        norm = lambda y, n: unit(y) * p[f"{n}.weight"] + p[f"{n}.bias"]
        q, k, v = (norm(x, "norm1") @ w for w in p["attn.qkv.weight"].T.chunk(3, 1))
        q, v = q + p["attn.q_bias"], v + p["attn.v_bias"]
        d, out = x.shape[1] // heads, torch.zeros_like(x)
        for h in range(heads):
            s = slice(h * d, (h + 1) * d)
            for i in range(len(x)):
                e = torch.exp(torch.stack([q[i, s] @ k[j, s] for j in range(len(x))]) * d ** -0.5)
                out[i, s] = (e / e.sum()) @ v[:, s]
        x = x + out @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        y = norm(x, "norm2") @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + y @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
    return x


def slow_videomae(model, video, mask):
    """One sample in float64: embed all by Conv3d, then drop; decode; MSE on normalised cubes."""
    s, P = SIZES[model.config["size"]], {k: v.double() for k, v in model.named_parameters()}
    norm = lambda y, n: F.layer_norm(y, y.shape[-1:], P[f"{n}.weight"], P[f"{n}.bias"], 1e-6)
    pixels = video.double() / 255
    mean, std = (torch.tensor(model.config[k]).double() for k in ("mean", "std"))
    x = (pixels - mean) / std
    weight, bias = P["encoder.patch_embed.proj.weight"], P["encoder.patch_embed.proj.bias"]
    x = F.conv3d(x.permute(3, 0, 1, 2)[None], weight, bias, stride=model.cube)
    x = x[0].flatten(1).T + model.encoder.pos.double()
    x = norm(slow_blocks(model.encoder.blocks, x[~mask], s["heads"]), "encoder.norm")
    x, pos = x @ P["encoder_to_decoder.weight"].T, model.dec_pos.double()
    x = torch.cat([x + pos[~mask], P["mask_token"][0] + pos[mask]])
    x = slow_blocks(model.decoder.blocks, x, s["dec_heads"])[-int(mask.sum()):]
    pred = norm(x, "decoder.norm") @ P["decoder.head.weight"].T + P["decoder.head.bias"]
    (t, h, w), (pt, ph, pw) = model.grid, model.cube
    target = []
    for i in range(t * h * w):
        a, b, c = i // (h * w) * pt, i // w % h * ph, i % w * pw
        cube = pixels[a:a + pt, b:b + ph, c:c + pw].reshape(-1, 3)
        target.append(((cube - cube.mean(0)) / (cube.std(0) + 1e-6)).flatten())
    return ((pred - torch.stack(target)[mask]) ** 2).mean(), pred


@test
def test_forward_equals_slow_float64_reference():
    """Loss and prediction equal float64 loops that embed all cubes and drop afterwards."""
    model = small()
    video, mask = clips(model), mask_for(model)
    with torch.no_grad():
        loss, pred = model(video, mask)
        slow = [slow_videomae(model, v, m) for v, m in zip(video, mask)]
    assert abs(loss - torch.stack([l for l, _ in slow]).mean()) < 1e-5
    assert (pred - torch.stack([p for _, p in slow])).abs().max() < 1e-5


@test
def test_counts_given_or_counted():
    """num_visible and num_decoded change nothing when given; float video in [0,1] equals uint8."""
    model = small(num_frames=8, img_size=32)
    video, mask, cells = clips(model), mask_for(model), mask_for(model, kind="running_cell")
    with torch.no_grad():
        a = model(video, mask, cells)[0]
        num_visible, num_decoded = int((~mask[0]).sum()), int((~cells[0]).sum())
        b = model(video.float() / 255, mask, cells, num_visible, num_decoded)[0]
    assert abs(a - b) < 1e-6


@test
def test_decoder_mask():
    """Decoded are the decoder mask's open tokens; only those that the encoder missed count."""
    model = small(num_frames=8, img_size=32)
    video, mask, cells = clips(model), mask_for(model), mask_for(model, kind="running_cell")
    visible, ids, scored = model.select(mask, cells)
    for some, cell in zip(ids, cells):
        assert set(some.tolist()) == set((~cell).nonzero().flatten().tolist())
    assert torch.equal(scored, mask.gather(1, ids)) and 0 < scored.sum() < scored.numel()
    with torch.no_grad():
        loss, pred = model(video, mask, cells)
    target = normalize_cubes(patchify(video, model.cube).float() / 255)
    errors = []
    for b in range(2):
        errors += [((pred[b, k] - target[b, i]) ** 2).mean()
                   for k, i in enumerate(ids[b]) if mask[b, i]]
    assert abs(loss - torch.stack(errors).mean()) < 1e-6


@test
def test_nothing_to_predict_is_no_nan():
    """A batch whose decoded tokens were all visible has loss 0, not 0/0."""
    model = small(target="center", num_frames=8)
    mask = torch.zeros(2, math.prod(model.grid), dtype=torch.bool)
    mask[:, :6] = True  # the first slot; the centre frame lies in the third
    loss, _ = model(clips(model), mask)
    loss.backward()
    assert loss == 0 and baselines(model, clips(model), mask) == (0, 0)


@test
def test_targets():
    """Normalised, raw, centre frame and denser clip are what they say; zeros score (n-1)/n."""
    model = small()
    video = clips(model)
    zeros, _ = baselines(model, video, mask_for(model))
    n = math.prod(model.cube)
    assert abs(zeros - (n - 1) / n) < 1e-5
    all_ids = torch.arange(math.prod(model.grid)).expand(2, -1)
    raw = small(norm_pix_loss=False).targets(video, all_ids)
    assert torch.equal(raw, patchify(video.float() / 255, model.cube))
    center = small(target="center", norm_pix_loss=False, num_frames=8)
    video = clips(center)
    _, ids, scored = center.select(mask_for(center))
    assert torch.equal(center.targets(video, ids), patchify(video[:, 4:5].float() / 255, (1, 8, 8)))
    assert ids[0, 0] == 2 * 6 and torch.equal(scored, mask_for(center)[:, 12:18])
    dense = small(target="dense", norm_pix_loss=False)
    video, all_ids = clips(dense, frames=8), torch.arange(math.prod(dense.grid)).expand(2, -1)
    assert torch.equal(dense.targets(video, all_ids), patchify(video.float() / 255, (4, 8, 8)))
    for m, v in ((center, clips(center)), (dense, video)):
        loss, *panels = reconstruct(m, v, mask_for(m))
        assert torch.isfinite(loss) and all(p.shape == panels[0].shape for p in panels)
    assert torch.allclose(panels[0], video.float() / 255)


@test
def test_another_loss_is_one_change():
    """In place of error(), another loss is what is trained, and what both baselines score."""
    def absolute(pred, target, reduction="none"):
        return F.l1_loss(pred, target, reduction=reduction)
    model = small(num_frames=8, img_size=32)
    video, mask = clips(model), mask_for(model)
    target = model.targets(video, torch.arange(mask.shape[1]).expand(2, -1))
    hidden, visible = target[mask].view(2, -1, target.shape[2]), target[~mask].view(2, -1, 384)
    mean = visible.mean(1, keepdim=True)
    with (unittest.mock.patch.object(model_file, "error", absolute),
          unittest.mock.patch.object(reconstruct_file, "error", absolute)):
        loss, pred = model(video, mask)
        some, few = model(video, mask, mask_for(model, kind="running_cell"))
        zeros, visible_mean = baselines(model, video, mask)
    assert torch.allclose(loss, (pred - hidden).abs().mean())
    assert torch.allclose(zeros, hidden.abs().mean())
    assert torch.allclose(visible_mean, (hidden - mean).abs().mean())
    assert abs(some - loss) < 0.1 < abs(some - model(video, mask)[0])  # with a decoder mask too


@test
def test_checkpointing_gives_the_same_gradients():
    """Activation checkpointing changes no gradient."""
    grads = []
    for on in (False, True):
        model = small(checkpointing=on)
        model(clips(model), mask_for(model))[0].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(g is not None and torch.allclose(g, h, atol=1e-7) for g, h in zip(*grads))


@test
def test_drop_path():
    """Drop path leaves out whole branches per sample, keeps the mean, rests in eval mode."""
    torch.manual_seed(0)
    block = VideoClassifier(2, size="tiny", num_frames=2, img_size=16, patch_size=8,
                            drop_path=0.4).blocks[-1]
    assert math.isclose(block.drop_path, 0.4)
    x = torch.ones(4000, 1, 2)
    y = block.train().skip(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
    assert abs(y.mean() - 1) < 0.05
    assert (y[..., 0] == y[..., 1]).all() and block.eval().skip(x) is x


@test
def test_param_groups():
    """Layer decay is ld^(depth+1-id); 1-D ones and mask_token do not decay; each in one group."""
    model = VideoClassifier(5, size="tiny", num_frames=4, img_size=16, patch_size=8)
    groups = param_groups(model, 0.05, 0.5)
    where = {id(p): g for g in groups for p in g["params"]}
    assert len(where) == len(list(model.parameters())) == sum(len(g["params"]) for g in groups)
    expect = {"patch_embed.proj.weight": (0.5 ** 5, 0.05), "patch_embed.proj.bias": (0.5 ** 5, 0),
              "blocks.0.attn.qkv.weight": (0.5 ** 4, 0.05), "blocks.0.attn.q_bias": (0.5 ** 4, 0),
              "blocks.3.norm2.weight": (0.5, 0), "fc_norm.weight": (1, 0), "head.weight": (1, 0.05)}
    for name, (scale, decay) in expect.items():
        g = where[id(model.get_parameter(name))]
        assert (g["lr_scale"], g["weight_decay"]) == (scale, decay), name
    model = small()
    groups = [g["params"] for g in param_groups(model, 0.05) if g["weight_decay"] == 0]
    wanted = [p for n, p in model.named_parameters() if p.ndim == 1 or n == "mask_token"]
    assert {id(p) for group in groups for p in group} == set(map(id, wanted))


@test
def test_model_errors():
    """Impossible sizes are refused with what is allowed."""
    with raises("colossal", "tiny, small"):
        VideoMAE("colossal")
    with raises("num_frames=15", "tubelet_size=2"):
        VideoMAE("tiny", num_frames=15)
    with raises("target='all'", "center"):
        VideoMAE("tiny", target="all")


# ---------------------------------------------------------------- lib/reconstruct.py

@test
def test_reconstruct_hides_what_is_masked():
    """Visible cubes are the input; `own` does not change when only hidden pixels do."""
    model = small()
    video, mask = clips(model), mask_for(model)
    values = mask[..., None].expand(-1, -1, 3 * math.prod(model.cube))
    hidden = unpatchify(values, model.grid, model.cube)
    other = torch.where(hidden, 255 - video, video)
    a, b = reconstruct(model, video, mask), reconstruct(model, other, mask)
    for panel in a[1:]:
        assert torch.equal(panel[~hidden], video[~hidden] / 255)
    assert torch.equal(a[3], b[3]) and not torch.equal(a[4], b[4])
    assert (a[2][hidden] == 0.5).all()
