"""VideoMAE (arXiv 2203.12602): plain joint space-time ViT, light decoder, loss; classifier; parameter groups; counts.

B batch, T frames, C channels, H W pixels; t h w token grid, N = t*h*w; N_vis visible tokens, M decoded tokens; D width,
P = tubelet*patch*patch*C pixels of a cube, flattened as (pt, ph, pw, c). A mask is (B, N) bool, True = masked. Videos
come as (B, T, H, W, C), uint8 or float in [0,1]: mean and std are applied here, to the cubes that are embedded and no
others. Parameter names are those of the reference implementation, so released weights load without renaming.
"""

import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# width, depth, heads; decoder width, depth, heads. L and H: the released weights' decoder depth (the paper's text: 4).
SIZES = {
    "tiny":  dict(width=128, depth=4, heads=4, dec_width=96, dec_depth=2, dec_heads=3),
    "small": dict(width=384, depth=12, heads=6, dec_width=192, dec_depth=4, dec_heads=3),
    "base":  dict(width=768, depth=12, heads=12, dec_width=384, dec_depth=4, dec_heads=6),
    "large": dict(width=1024, depth=24, heads=16, dec_width=512, dec_depth=12, dec_heads=8),
    "huge":  dict(width=1280, depth=32, heads=16, dec_width=640, dec_depth=12, dec_heads=8),
}


IMAGE_PARTS = ("temporal_pos", "spatial_pos", "class_token")  # of an encoder with weights of images


def sincos_table(n: int, dim: int) -> torch.Tensor:
    """(n, dim) float32: sin/cos of the flattened token index, interleaved; float64 inside: float32 is off at n=1568."""
    j = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(n, dtype=torch.float64)[:, None] / 10000 ** (2 * (j // 2) / dim)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()


def position_table(grid: tuple, dim: int, pos_grid: tuple) -> torch.Tensor:
    """(N, dim) sin-cos table of `pos_grid`, resized to `grid` (bicubic in space, linear in time) where they differ."""
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
    return rearrange(F.interpolate(x, size=tuple(to), mode="bicubic", align_corners=False), "1 d h w -> (h w) d")


def patchify(video: torch.Tensor, cube: tuple) -> torch.Tensor:
    """(B, T, H, W, C) -> (B, N, P), tokens in (t, h, w) order, channel fastest inside a cube of (pt, ph, pw)."""
    return rearrange(video, "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)", pt=cube[0], ph=cube[1], pw=cube[2])


def unpatchify(cubes: torch.Tensor, grid: tuple, cube: tuple) -> torch.Tensor:
    """(B, N, P) -> (B, T, H, W, C), the inverse of patchify."""
    t, h, w = grid
    return rearrange(cubes, "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c", t=t, h=h, w=w,
                     pt=cube[0], ph=cube[1], pw=cube[2])


def take(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(B, N, P), (B, M) int -> (B, M, P): rows copied whole, which beats an element-wise gather."""
    rows = ids + x.shape[1] * torch.arange(len(x), device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*ids.shape, x.shape[2])


def split(mask: torch.Tensor, num_visible: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """mask (B, N) -> ids of its False (B, num_visible) and True tokens, in raster order; None: counted on the host."""
    num_visible = int((~mask[0]).sum()) if num_visible is None else num_visible
    order = mask.byte().argsort(dim=1, stable=True)
    return order[:, :num_visible], order[:, num_visible:]


def normalize_cubes(cubes: torch.Tensor, joint: bool = False) -> torch.Tensor:
    """(..., P) uint8, or float in [0,1] -> float32: zero mean, unit (unbiased) variance per cube and channel.

    The paper's target: (x - mean) / (std + 1e-6) of x in [0,1]. uint8 is not divided first, its eps is 255 times as
    large: a pass over memory less. joint: over all P values instead, (x - mean) / sqrt(var + 1e-6), as MAE and ViC-MAE.
    """
    unit = 255 if cubes.dtype == torch.uint8 else 1
    if joint:
        var, mean = torch.var_mean(cubes.float(), -1, keepdim=True)
        return (cubes.float() - mean) * (var + 1e-6 * unit ** 2).rsqrt()
    eps = 1e-6 * unit
    x = rearrange(cubes, "... (p c) -> ... p c", c=3).float()
    var, mean = torch.var_mean(x, -2, keepdim=True)
    scale = 1 / (var.sqrt() + eps)
    return rearrange(torch.addcmul(-mean * scale, x, scale), "... p c -> ... (p c)")


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [0,1]; float passes through as float32."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


def best_dtype(device: torch.device) -> str:
    """The default of --dtype: bf16; on a CPU that would emulate it fp32, on such a GPU fp16.

    Emulated, a matmul takes 25 to 35 times as long as in fp32 (measured on an AVX2 CPU).
    """
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "fp32"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return "bf16"


class HeadwiseAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v for bf16 on CPU, a few heads at a time.

    Their N x N matrices stay in cache and are computed again in the backward pass. There torch's fused kernel is the
    slowest part of a step (measured: 1.3x this one's time at N = 1568, 3x at N = 160). Scores are rounded to bf16, as
    in unfused attention under autocast.
    """

    @staticmethod
    def forward(ctx, q, k, v):  # each (B * heads, N, d); q is scaled
        out = torch.empty_like(q)
        for s in HeadwiseAttention.groups(q):
            torch.bmm((q[s] @ k[s].mT).softmax(-1), v[s], out=out[s])
        ctx.save_for_backward(q, k, v)
        return out

    @staticmethod
    def groups(q):
        step = max(1, 4_000_000 // q.shape[1] ** 2)
        return [slice(i, i + step) for i in range(0, len(q), step)]

    @staticmethod
    def backward(ctx, grad):  # (B * heads, N, d)
        q, k, v = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        for s in HeadwiseAttention.groups(q):
            p = (q[s] @ k[s].mT).softmax(-1)
            torch.bmm(p.mT, grad[s], out=dv[s])
            ds = torch._softmax_backward_data(grad[s] @ v[s].mT, p, -1, p.dtype)
            torch.bmm(ds, k[s], out=dq[s])
            torch.bmm(ds.mT, q[s], out=dk[s])
        return dq, dk, dv


class Attention(nn.Module):
    """Joint space-time self-attention; q and v have a bias, k has none (it would cancel in the softmax)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # (B, N, D)
        B, N, D = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)  # (B, N, 3D)
        q, k, v = qkv.view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            x = HeadwiseAttention.apply(*(y.flatten(0, 1) for y in (q * q.shape[3] ** -0.5, k, v))).view(q.shape)
        else:
            x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    """Linear, exact GELU, Linear, four times as wide inside."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; drop_path is the probability that a sample skips a branch."""

    def __init__(self, dim: int, heads: int, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)
        self.drop_path = drop_path

    def skip(self, x):
        if not self.training or self.drop_path == 0:
            return x
        keep = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop_path)
        return x * keep / (1 - self.drop_path)

    def forward(self, x):
        x = x + self.skip(self.attn(self.norm1(x)))
        return x + self.skip(self.mlp(self.norm2(x)))


def run_blocks(blocks: nn.ModuleList, x: torch.Tensor, checkpointing: bool) -> torch.Tensor:
    """Applies the blocks; with checkpointing their activations are computed again in the backward pass, not kept."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if checkpointing and torch.is_grad_enabled() else block(x)
    return x


class CubeEmbed(nn.Module):
    """The parameters of Conv3d(3, D, kernel = stride = cube); applied as one matmul on the cubes that are wanted."""

    def __init__(self, dim: int, cube: tuple):
        super().__init__()
        self.proj = nn.Conv3d(3, dim, kernel_size=cube, stride=cube)

    def forward(self, cubes):  # (B, n, P)
        weight = rearrange(self.proj.weight, "d c pt ph pw -> d (pt ph pw c)")
        return F.linear(cubes, weight, self.proj.bias)  # (B, n, D)


class Encoder(nn.Module):
    """ViT on cubes; `img_size` is a side or (H, W), `pos_grid` the token grid of the position table (default: own).

    For weights of images: temporal_pos adds a trainable table, zero at first, of a row per temporal slot, since their
    positions say nothing of time; spatial_pos is a trainable table (h * w, D) in place of the sin-cos one; class_token
    (its own position added) takes part in attention and is then dropped.
    """

    def __init__(self, size="base", num_frames=16, img_size=224, patch_size=16, tubelet_size=2, drop_path=0.0,
                 checkpointing=False, pos_grid=None, mean=IMAGENET_MEAN, std=IMAGENET_STD, temporal_pos=False,
                 spatial_pos=False, class_token=False):
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size={size!r}: expected one of {', '.join(SIZES)}")
        H, W = (img_size, img_size) if isinstance(img_size, int) else img_size
        if num_frames < 1 or num_frames % tubelet_size:
            raise ValueError(f"num_frames={num_frames} must be a multiple of tubelet_size={tubelet_size}"
                             + ("; images take tubelet_size=1" if num_frames == 1 else ""))
        if H % patch_size or W % patch_size:
            raise ValueError(f"img_size={H}x{W} must be a multiple of patch_size={patch_size}")
        self.config = dict(size=size, num_frames=num_frames, img_size=[H, W], patch_size=patch_size,
                           tubelet_size=tubelet_size, mean=list(mean), std=list(std))  # what rebuilds the model
        there = zip(IMAGE_PARTS, (temporal_pos, spatial_pos, class_token))
        self.config |= {name: True for name, wanted in there if wanted}
        D, depth, heads = (SIZES[size][k] for k in ("width", "depth", "heads"))
        self.cube = (tubelet_size, patch_size, patch_size)
        self.grid = (num_frames // tubelet_size, H // patch_size, W // patch_size)
        self.checkpointing = checkpointing
        self.patch_embed = CubeEmbed(D, self.cube)
        self.blocks = nn.ModuleList(Block(D, heads, drop_path * i / max(depth - 1, 1)) for i in range(depth))
        pixels = math.prod(self.cube)
        self.register_buffer("mean", torch.tensor(mean).repeat(pixels), persistent=False)  # (P,)
        self.register_buffer("std", torch.tensor(std).repeat(pixels), persistent=False)
        self.register_buffer("pos", torch.empty(0), persistent=False)
        self.temporal_pos = nn.Parameter(torch.zeros(self.grid[0], D)) if temporal_pos else None
        self.spatial_pos = nn.Parameter(torch.zeros(math.prod(self.grid[1:]), D)) if spatial_pos else None
        self.class_token = nn.Parameter(torch.zeros(1, 1, D)) if class_token else None
        self.set_positions(pos_grid or self.grid)

    def set_positions(self, pos_grid):
        """Takes the position table of another token grid, resized to this model's."""
        self.config["pos_grid"] = list(pos_grid)
        self.pos = position_table(self.grid, self.patch_embed.proj.out_channels, pos_grid).to(self.pos.device)

    def embed(self, video, ids=None):
        """(B, T, H, W, C), ids (B, n) of cubes (None: all) -> (B, n, D); pixels are gathered before any arithmetic."""
        expected = tuple(g * c for g, c in zip(self.grid, self.cube))
        if video.shape[1:] != (*expected, 3):
            raise ValueError(f"video of shape {tuple(video.shape)}: expected (B, {', '.join(map(str, expected))}, 3)")
        cubes = patchify(video, self.cube)  # (B, N, P)
        cubes = cubes if ids is None else take(cubes, ids)  # (B, n, P)
        x = self.patch_embed((to_unit(cubes) - self.mean) / self.std)  # (B, n, D)
        pos = self.positions()  # (N, D)
        return x + (pos if ids is None else pos[ids]).to(x.dtype)

    def positions(self):
        """(N, D): what is added to the tokens of the whole grid."""
        t, h, w = self.grid
        pos = self.pos
        if self.spatial_pos is not None:
            own = [n // self.cube[1] for n in self.config["img_size"]]  # detection changes self.grid
            pos = resize_table(self.spatial_pos, own, (h, w)).repeat(t, 1)
        if self.temporal_pos is not None:
            pos = pos + self.temporal_pos.repeat_interleave(h * w, 0)
        return pos

    def with_class_token(self, x):
        """(B, n, D) -> (B, n + 1, D), the class token first, or x where there is none."""
        return x if self.class_token is None else torch.cat([self.class_token.expand(len(x), -1, -1).to(x.dtype), x], 1)

    def forward(self, video, ids=None, depth=None):
        """-> (B, n, D): tokens after the last (or `depth`) blocks, without a final norm and without the class token."""
        x = self.with_class_token(self.embed(video, ids))
        x = run_blocks(self.blocks[:depth], x, self.checkpointing)
        return x if self.class_token is None else x[:, 1:]


class Decoder(nn.Module):
    """Blocks on visible and mask tokens; norm and head see the last `num_out` tokens only."""

    def __init__(self, dim: int, depth: int, heads: int, out_dim: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, out_dim)

    def forward(self, x, num_out: int, checkpointing: bool):
        x = run_blocks(self.blocks, x, checkpointing)
        return self.head(self.norm(x[:, -num_out:]))


class VideoMAE(nn.Module):
    """Masked autoencoder (section 3): encoder on visible cubes, decoder, MSE on the masked ones.

    target: "clip" (the paper's choice), "center" (only the clip's centre frame, predicted at its own temporal slot) or
    "dense" (input every second frame, predict all of them: the video given to forward then has 2*num_frames frames).
    """

    def __init__(self, size="base", num_frames=16, img_size=224, patch_size=16, tubelet_size=2, dec_depth=None,
                 norm_pix_loss=True, target="clip", checkpointing=False, encoder_norm=True, pos_grid=None,
                 mean=IMAGENET_MEAN, std=IMAGENET_STD, dec_width=None, dec_heads=None, joint_norm=False, **encoder):
        super().__init__()
        if target not in ("clip", "center", "dense"):
            raise ValueError(f"target={target!r}: expected clip, center or dense")
        self.encoder = Encoder(size, num_frames, img_size, patch_size, tubelet_size, 0.0, checkpointing, pos_grid,
                               mean, std, **encoder)
        s = SIZES[size]
        dec_depth, d, dec_heads = dec_depth or s["dec_depth"], dec_width or s["dec_width"], dec_heads or s["dec_heads"]
        self.grid, self.cube = self.encoder.grid, self.encoder.cube
        self.norm_pix_loss, self.joint_norm = norm_pix_loss, joint_norm
        self.target, self.checkpointing = target, checkpointing
        self.encoder.norm = nn.LayerNorm(s["width"], eps=1e-6) if encoder_norm else nn.Identity()
        self.encoder_to_decoder = nn.Linear(s["width"], d, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        target_frames = {"clip": tubelet_size, "center": 1, "dense": 2 * tubelet_size}[target]
        self.target_cube = (target_frames, patch_size, patch_size)
        self.decoder = Decoder(d, dec_depth, dec_heads, 3 * math.prod(self.target_cube))
        self.config = self.encoder.config | dict(dec_depth=dec_depth, norm_pix_loss=norm_pix_loss, target=target,
                                                 encoder_norm=encoder_norm, dec_width=d, dec_heads=dec_heads,
                                                 joint_norm=joint_norm)
        self.register_buffer("dec_pos", torch.empty(0), persistent=False)
        self.set_positions(pos_grid or self.grid)
        for name, m in self.named_modules():  # encoder_to_decoder and the Conv3d keep PyTorch's default
            if isinstance(m, nn.Linear) and name != "encoder_to_decoder":
                nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def set_positions(self, pos_grid):
        """Takes the position tables of another token grid, resized to this model's."""
        self.config["pos_grid"] = list(pos_grid)
        self.encoder.set_positions(pos_grid)
        known = self.grid if pos_grid[0] == 1 < self.grid[0] else pos_grid  # an image's table would say nothing of time
        self.dec_pos = position_table(self.grid, self.mask_token.shape[2], known).to(self.dec_pos.device)

    def select(self, mask, decoder_mask=None, num_visible=None, num_decoded=None):
        """-> ids of visible tokens (B, N_vis), of decoded ones (B, M), which of these (B, M) count (None: all)."""
        visible, ids = split(mask, num_visible)
        if self.target == "center":  # the slot of that frame; its visible positions are decoded too, but do not count
            hw = self.grid[1] * self.grid[2]
            first = self.config["num_frames"] // 2 // self.cube[0] * hw
            ids = torch.arange(first, first + hw, device=mask.device).expand(len(mask), -1)
        elif decoder_mask is not None:
            ids, _ = split(decoder_mask, num_decoded)
        else:
            return visible, ids, None
        return visible, ids, mask.gather(1, ids)

    def targets(self, video, ids):
        """(B, T, H, W, C), ids (B, M) -> (B, M, P) float32: what the decoder should say at these tokens."""
        if self.target == "center":
            T = video.shape[1]
            video = video[:, T // 2:T // 2 + 1]  # (B, 1, H, W, C)
            ids = ids - T // 2 // self.cube[0] * self.grid[1] * self.grid[2]
        cubes = take(patchify(video, self.target_cube), ids)
        return normalize_cubes(cubes, self.joint_norm) if self.norm_pix_loss else to_unit(cubes)

    def forward(self, video, mask, decoder_mask=None, num_visible=None, num_decoded=None):
        """-> (loss, pred): float32 scalar, (B, M, P) at the decoded tokens (by default the masked, in raster order).

        video (B, T, H, W, C) uint8 or float in [0,1]; mask (B, N) bool with as many True in every row. decoder_mask
        (B, N): True = not decoded (VideoMAE v2); the loss covers decoded positions that the encoder did not see. The
        two numbers are counted from the masks when not given, which waits for the device.
        """
        visible, ids, counts = self.select(mask, decoder_mask, num_visible, num_decoded)
        pred = self.forward_decoder(self.forward_encoder(video, visible), visible, ids)
        return self.forward_loss(video, pred, ids, counts), pred

    def forward_encoder(self, video, visible):
        """(B, T, H, W, C), ids (B, N_vis) -> (B, N_vis, D), normed."""
        return self.encoder.norm(self.encoder(video[:, ::2] if self.target == "dense" else video, visible))

    def forward_decoder(self, x, visible, ids):
        """(B, N_vis, D) at `visible` -> predictions (B, M, P) at `ids`."""
        x = self.encoder_to_decoder(x)  # (B, N_vis, d)
        x = torch.cat([x + self.dec_pos[visible].to(x.dtype), (self.mask_token + self.dec_pos[ids]).to(x.dtype)], 1)
        return self.decoder(x, ids.shape[1], self.checkpointing)

    def forward_loss(self, video, pred, ids, counts):
        """Mean squared error of (B, M, P) over the tokens that count (None: all), float32."""
        with torch.no_grad():
            target = self.targets(video, ids)  # (B, M, P)
        if counts is None:
            return F.mse_loss(pred.float(), target)
        error = (pred.float() - target).square().mean(-1)  # (B, M)
        return (error * counts).sum() / counts.sum().clamp(min=1)


def init_linears(model: nn.Module):
    """Fine-tuning's initial weights, in place: linear layers normal with deviation .02, biases 0."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class VideoClassifier(Encoder):
    """Encoder, mean over all tokens, fc_norm, dropout, head (fine-tuning: no final norm before the mean).

    head_norm puts a BatchNorm without parameters before the head, for linear probes of frozen features (MAE, A.1).
    """

    def __init__(self, num_classes: int, head_dropout=0.0, head_norm=False, **kwargs):
        super().__init__(**kwargs)
        D = SIZES[self.config["size"]]["width"]
        self.fc_norm = nn.LayerNorm(D, eps=1e-6)
        self.head_norm = nn.BatchNorm1d(D, eps=1e-6, affine=False) if head_norm else nn.Identity()
        self.head_dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(D, num_classes)
        self.config |= dict(num_classes=num_classes, head_norm=head_norm)
        init_linears(self)
        self.head.weight.data.mul_(0.001)

    def forward(self, video):
        """(B, T, H, W, C) uint8 or float in [0,1] -> logits (B, num_classes)."""
        x = super().forward(video).mean(1)  # (B, D)
        return self.head(self.head_dropout(self.head_norm(self.fc_norm(x))))


def param_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """AdamW groups {params, weight_decay, lr_scale} for weight decay and layer-wise learning rates.

    No decay for 1-D parameters, tokens and position tables, as in the paper's code. lr_scale = layer_decay^(depth+1-id)
    with id 0 for all up to the patch embedding, i+1 for encoder block i; 1 for all that follows.
    """
    depth = SIZES[model.config["size"]]["depth"]
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        block = re.match(r"(?:encoder\.)?blocks\.(\d+)\.", name)
        layer = int(block[1]) + 1 if block else 0 if "patch_embed" in name or name.endswith(IMAGE_PARTS) else depth + 1
        decay = 0.0 if p.ndim == 1 or name.endswith(("mask_token", *IMAGE_PARTS)) else weight_decay
        group = dict(params=[], weight_decay=decay, lr_scale=layer_decay ** (depth + 1 - layer))
        groups.setdefault((layer if layer_decay != 1 else 0, decay), group)["params"].append(p)
    return list(groups.values())


def count_params(model: nn.Module) -> int:
    """Number of parameters; buffers (the position tables) are none."""
    return sum(p.numel() for p in model.parameters())


def block_macs(n: int, dim: int, depth: int) -> int:
    """Multiply-adds of `depth` blocks on n tokens, as the paper counts: each 12nD^2 + 2n^2D, and 5nD per LayerNorm."""
    return depth * (12 * n * dim ** 2 + 2 * n ** 2 * dim + 10 * n * dim)


def forward_macs(model: nn.Module, num_visible=None, num_decoded=None) -> int:
    """Multiply-adds of one clip's forward pass (Table 6's "GFLOPs"), of a classifier or a VideoMAE at these counts."""
    s, N, P = SIZES[model.config["size"]], math.prod(model.grid), 3 * math.prod(model.cube)
    D, d = s["width"], model.config.get("dec_width")
    if isinstance(model, VideoClassifier):
        tokens = N + bool(model.config.get("class_token"))
        return block_macs(tokens, D, s["depth"]) + N * D * P + D * model.head.out_features + 5 * D
    n, M = num_visible, num_decoded
    encoder = n * D * P + block_macs(n, D, s["depth"]) + 5 * n * D + n * D * d
    head = 5 * M * d + M * d * model.decoder.head.out_features
    return encoder + block_macs(n + M, d, len(model.decoder.blocks)) + head
