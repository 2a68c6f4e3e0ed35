"""VideoMAE (arXiv 2203.12602): plain joint space-time ViT, light decoder, loss; classifier.

B batch, T frames, C channels, H W pixels; t h w token grid, N = t*h*w; N_vis visible tokens, M
decoded tokens; D width, d decoder width; P = tubelet*patch*patch*C values of a cube. A mask is
(B, N) bool, True = masked. Videos come as (B, T, H, W, C), uint8 or float in [0,1]: mean and std
are applied here, to the cubes that are embedded and no others. Parameter names are those of the
reference implementation, so released weights load without renaming.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

from lib.cpu_attention import HeadwiseAttention
from lib.cubes import normalize_cubes, patchify, position_table, resize_table, split, take, to_unit

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# large and huge have the decoder depth of the released weights (the paper's text: 4)
SIZES = {
    "tiny":  dict(width=128, depth=4, heads=4, dec_width=96, dec_depth=2, dec_heads=3),
    "small": dict(width=384, depth=12, heads=6, dec_width=192, dec_depth=4, dec_heads=3),
    "base":  dict(width=768, depth=12, heads=12, dec_width=384, dec_depth=4, dec_heads=6),
    "large": dict(width=1024, depth=24, heads=16, dec_width=512, dec_depth=12, dec_heads=8),
    "huge":  dict(width=1280, depth=32, heads=16, dec_width=640, dec_depth=12, dec_heads=8),
    # ViT-g/14 as VideoMAE v2 has it (arXiv 2303.16727); mlp_ratio is its decoder's, too
    "giant": dict(width=1408, depth=40, heads=16, dec_width=512, dec_depth=4, dec_heads=8,
                  mlp_ratio=48 / 11, patch_size=14),
}
SIZES = {name: dict(mlp_ratio=4, patch_size=16) | size for name, size in SIZES.items()}

# what an encoder with weights of images may have besides
IMAGE_PARTS = ("temporal_pos", "spatial_pos", "class_token")


class Attention(nn.Module):
    """Joint space-time self-attention; q and v have a bias, k has none (it would cancel)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def qkv_heads(self, x):
        """(B, N, D) -> q, k, v, each (B, heads, N, D / heads)."""
        B, N, D = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)  # (B, N, 3D)
        return qkv.view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)

    def forward(self, x):  # (B, N, D)
        q, k, v = self.qkv_heads(x)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            scaled = q * q.shape[3] ** -0.5
            y = HeadwiseAttention.apply(*(z.flatten(0, 1) for z in (scaled, k, v))).view(q.shape)
        else:
            y = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D / heads)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    """Linear, exact GELU, Linear, `ratio` times as wide inside."""

    def __init__(self, dim: int, ratio: float = 4):
        super().__init__()
        self.fc1 = nn.Linear(dim, int(ratio * dim))
        self.fc2 = nn.Linear(int(ratio * dim), dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; drop_path is the probability that a sample skips a branch."""

    def __init__(self, dim: int, heads: int, drop_path: float = 0.0, mlp_ratio: float = 4):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, mlp_ratio)
        self.drop_path = drop_path

    def skip(self, x):
        if not self.training or self.drop_path == 0:
            return x
        keep = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop_path)
        return x * keep / (1 - self.drop_path)

    def forward(self, x):  # (B, N, D)
        x = x + self.skip(self.attn(self.norm1(x)))
        return x + self.skip(self.mlp(self.norm2(x)))


def run_blocks(blocks: nn.ModuleList, x: torch.Tensor, checkpointing: bool) -> torch.Tensor:
    """Applies the blocks; checkpointing: activations are computed again for gradients, not kept."""
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, use_reentrant=False)
        else:
            x = block(x)
    return x


class CubeEmbed(nn.Module):
    """The parameters of Conv3d(3, D, kernel = stride = cube), applied to cubes as one matmul."""

    def __init__(self, dim: int, cube: tuple):
        super().__init__()
        self.proj = nn.Conv3d(3, dim, kernel_size=cube, stride=cube)

    def forward(self, cubes):  # (B, n, P)
        weight = rearrange(self.proj.weight, "d c pt ph pw -> d (pt ph pw c)")
        return F.linear(cubes, weight, self.proj.bias)  # (B, n, D)


class Encoder(nn.Module):
    """ViT on cubes: a sequence of tokens, with no final norm.

    img_size is a side or (H, W), patch_size by default that of the size (16 pixels, giant: 14),
    pos_grid the token grid of the position table (default: own). For
    weights of images: temporal_pos adds a trainable row per temporal slot, zero at first, since
    their positions say nothing of time; spatial_pos is a trainable table (h * w, D) in place of the
    sin-cos one; class_token (its own position added) takes part in attention and is then dropped.
    """

    def __init__(self, size="base", num_frames=16, img_size=224, patch_size=None, tubelet_size=2,
                 drop_path=0.0, checkpointing=False, pos_grid=None, mean=IMAGENET_MEAN,
                 std=IMAGENET_STD, temporal_pos=False, spatial_pos=False, class_token=False):
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size={size!r}: expected one of {', '.join(SIZES)}")
        patch_size = patch_size or SIZES[size]["patch_size"]
        H, W = (img_size, img_size) if isinstance(img_size, int) else img_size
        if num_frames < 1 or num_frames % tubelet_size:
            raise ValueError(f"num_frames={num_frames} must be a multiple of tubelet_size="
                             f"{tubelet_size}" + "; images take tubelet_size=1" * (num_frames == 1))
        if H % patch_size or W % patch_size:
            raise ValueError(f"img_size={H}x{W} must be a multiple of patch_size={patch_size}")
        # what rebuilds the model
        self.config = dict(size=size, num_frames=num_frames, img_size=[H, W], patch_size=patch_size,
                           tubelet_size=tubelet_size, mean=list(mean), std=list(std))
        parts = zip(IMAGE_PARTS, (temporal_pos, spatial_pos, class_token))
        self.config |= {name: True for name, wanted in parts if wanted}
        D, depth, heads = (SIZES[size][k] for k in ("width", "depth", "heads"))
        self.cube = (tubelet_size, patch_size, patch_size)
        self.grid = t, h, w = num_frames // tubelet_size, H // patch_size, W // patch_size
        self.checkpointing = checkpointing
        self.patch_embed = CubeEmbed(D, self.cube)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        ratio = SIZES[size]["mlp_ratio"]
        self.blocks = nn.ModuleList(Block(D, heads, rate, ratio) for rate in rates)
        pixels = math.prod(self.cube)
        self.register_buffer("mean", torch.tensor(mean).repeat(pixels), persistent=False)  # (P,)
        self.register_buffer("std", torch.tensor(std).repeat(pixels), persistent=False)  # (P,)
        self.register_buffer("pos", torch.empty(0), persistent=False)  # (N, D)
        self.temporal_pos = nn.Parameter(torch.zeros(t, D)) if temporal_pos else None
        self.spatial_pos = nn.Parameter(torch.zeros(h * w, D)) if spatial_pos else None
        self.class_token = nn.Parameter(torch.zeros(1, 1, D)) if class_token else None
        self.set_positions(pos_grid or self.grid)

    def set_positions(self, pos_grid):
        """Takes the position table of another token grid, resized to this model's."""
        self.config["pos_grid"] = list(pos_grid)
        D = self.patch_embed.proj.out_channels
        self.pos = position_table(self.grid, D, pos_grid).to(self.pos.device)

    def restore(self, config: dict):
        """Becomes what a checkpoint of this very model was, before its weights are loaded."""
        self.set_positions(config["pos_grid"])

    def positions(self):
        """(N, D): what is added to the tokens of the whole grid."""
        t, h, w = self.grid
        pos = self.pos
        if self.spatial_pos is not None:
            # its own grid: detection changes self.grid
            own = [n // self.cube[1] for n in self.config["img_size"]]
            pos = resize_table(self.spatial_pos, own, (h, w)).repeat(t, 1)
        if self.temporal_pos is not None:
            pos = pos + self.temporal_pos.repeat_interleave(h * w, 0)
        return pos

    def embed(self, video, ids=None):
        """(B, T, H, W, C), ids (B, n) of cubes (None: all) -> (B, n, D).

        Pixels are gathered before any arithmetic.
        """
        T, H, W = (g * c for g, c in zip(self.grid, self.cube))
        if video.shape[1:] != (T, H, W, 3):
            raise ValueError(f"video of shape {tuple(video.shape)}: expected (B, {T}, {H}, {W}, 3)")
        cubes, pos = patchify(video, self.cube), self.positions()  # (B, N, P), (N, D)
        if ids is not None:
            cubes, pos = take(cubes, ids), pos[ids]  # (B, n, P), (B, n, D)
        x = self.patch_embed((to_unit(cubes) - self.mean) / self.std)  # (B, n, D)
        return x + pos.to(x.dtype)

    def with_class_token(self, x):
        """(B, n, D) -> (B, n + 1, D), the class token first, or x where there is none."""
        if self.class_token is None:
            return x
        return torch.cat([self.class_token.expand(len(x), -1, -1).to(x.dtype), x], 1)

    def forward(self, video, ids=None, depth=None):
        """-> (B, n, D): tokens after the last (or `depth`) blocks, with no final norm.

        The class token is not among them.
        """
        x = self.with_class_token(self.embed(video, ids))
        x = run_blocks(self.blocks[:depth], x, self.checkpointing)
        return x if self.class_token is None else x[:, 1:]


class Decoder(nn.Module):
    """Blocks on visible and mask tokens; norm and head see the last `num_out` tokens only."""

    def __init__(self, dim: int, depth: int, heads: int, out_dim: int, mlp_ratio: float):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, 0.0, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, out_dim)

    def forward(self, x, num_out: int, checkpointing: bool):  # (B, N_vis + M, d)
        x = run_blocks(self.blocks, x, checkpointing)
        return self.head(self.norm(x[:, -num_out:]))  # (B, M, out_dim)


def error(pred: torch.Tensor, target: torch.Tensor, reduction: str = "none") -> torch.Tensor:
    """(B, M, P) float32 twice -> (B, M, P), what each value costs; reduction "mean": the mean.

    Another loss is another line here; the baselines in lib/reconstruct.py follow.
    """
    return F.mse_loss(pred, target, reduction=reduction)


class VideoMAE(nn.Module):
    """Masked autoencoder (section 3): encoder on visible cubes, decoder, MSE on the masked ones.

    target: "clip" (the paper's choice), "center" (only the clip's centre frame, predicted at its
    own temporal slot) or "dense" (input every second frame, predict all of them: the video given to
    forward then has 2*num_frames frames).
    """

    def __init__(self, size="base", num_frames=16, img_size=224, patch_size=None, tubelet_size=2,
                 dec_depth=None, norm_pix_loss=True, target="clip", checkpointing=False,
                 encoder_norm=True, pos_grid=None, dec_width=None, dec_heads=None,
                 joint_norm=False, **encoder):
        super().__init__()
        if target not in ("clip", "center", "dense"):
            raise ValueError(f"target={target!r}: expected clip, center or dense")
        self.encoder = Encoder(size, num_frames, img_size, patch_size, tubelet_size,
                               checkpointing=checkpointing, **encoder)
        s = SIZES[size]
        D, d = s["width"], dec_width or s["dec_width"]
        dec_depth, dec_heads = dec_depth or s["dec_depth"], dec_heads or s["dec_heads"]
        self.grid, self.cube = self.encoder.grid, self.encoder.cube
        self.norm_pix_loss, self.joint_norm = norm_pix_loss, joint_norm
        self.target, self.checkpointing = target, checkpointing
        self.encoder.norm = nn.LayerNorm(D, eps=1e-6) if encoder_norm else nn.Identity()
        self.encoder_to_decoder = nn.Linear(D, d, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        frames = {"clip": tubelet_size, "center": 1, "dense": 2 * tubelet_size}[target]
        self.target_cube = (frames, *self.cube[1:])
        out_dim = 3 * math.prod(self.target_cube)  # values of a token that `targets` gives
        self.decoder = Decoder(d, dec_depth, dec_heads, out_dim, s["mlp_ratio"])
        self.config = self.encoder.config | dict(
            dec_depth=dec_depth, norm_pix_loss=norm_pix_loss, target=target,
            encoder_norm=encoder_norm, dec_width=d, dec_heads=dec_heads, joint_norm=joint_norm)
        self.register_buffer("dec_pos", torch.empty(0), persistent=False)  # (N, d)
        self.set_positions(pos_grid or self.grid)
        for name, m in self.named_modules():
            # encoder_to_decoder and the Conv3d keep PyTorch's default
            if isinstance(m, nn.Linear) and name != "encoder_to_decoder":
                nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def set_positions(self, pos_grid):
        """Takes the position tables of another token grid, resized to this model's."""
        self.config["pos_grid"] = list(pos_grid)
        self.encoder.set_positions(pos_grid)
        # an image's table would say nothing of time
        known = self.grid if pos_grid[0] == 1 < self.grid[0] else pos_grid
        table = position_table(self.grid, self.mask_token.shape[2], known)
        self.dec_pos = table.to(self.dec_pos.device)

    def restore(self, config: dict):
        """Becomes what a checkpoint of this very model was, before its weights are loaded."""
        if not config["encoder_norm"]:
            self.encoder.norm = nn.Identity()
        self.set_positions(config["pos_grid"])
        self.config = config

    def select(self, mask, decoder_mask=None, num_visible=None, num_decoded=None):
        """-> ids of visible tokens (B, N_vis), of decoded ones (B, M), which of these are scored.

        The third is (B, M) bool, or None where all are: the encoder did not see them.
        """
        visible, ids = split(mask, num_visible)
        if self.target == "center":  # all of that frame's slot, though some of it is visible
            hw = self.grid[1] * self.grid[2]
            first = self.config["num_frames"] // 2 // self.cube[0] * hw
            ids = torch.arange(first, first + hw, device=mask.device).expand(len(mask), -1)
        elif decoder_mask is not None:
            ids, _ = split(decoder_mask, num_decoded)
        else:
            return visible, ids, None
        return visible, ids, mask.gather(1, ids)

    def targets(self, video, ids):
        """(B, T, H, W, C), ids (B, M) -> (B, M, P) float32: what the decoder should say there.

        Loss and baselines ask nothing but this; another target changes it, and out_dim above.
        """
        if self.target == "center":
            T = video.shape[1]
            video = video[:, T // 2:T // 2 + 1]  # (B, 1, H, W, C)
            ids = ids - T // 2 // self.cube[0] * self.grid[1] * self.grid[2]
        cubes = take(patchify(video, self.target_cube), ids)
        return normalize_cubes(cubes, self.joint_norm) if self.norm_pix_loss else to_unit(cubes)

    def forward_encoder(self, video, visible):
        """(B, T, H, W, C), ids (B, N_vis) -> (B, N_vis, D), normed."""
        if self.target == "dense":
            video = video[:, ::2]
        return self.encoder.norm(self.encoder(video, visible))

    def forward_decoder(self, x, visible, ids):
        """(B, N_vis, D) at `visible` -> predictions (B, M, P) at `ids`."""
        x = self.encoder_to_decoder(x)  # (B, N_vis, d)
        x = x + self.dec_pos[visible].to(x.dtype)
        hidden = (self.mask_token + self.dec_pos[ids]).to(x.dtype)  # (B, M, d)
        return self.decoder(torch.cat([x, hidden], 1), ids.shape[1], self.checkpointing)

    def forward_loss(self, video, pred, ids, scored=None):
        """(B, M, P) at `ids` -> mean error of the tokens that are scored (None: all), float32."""
        with torch.no_grad():
            target = self.targets(video, ids)
        if scored is None:
            return error(pred.float(), target, "mean")
        cost = error(pred.float(), target).mean(-1)  # (B, M)
        return (cost * scored).sum() / scored.sum().clamp(min=1)

    def forward(self, video, mask, decoder_mask=None, num_visible=None, num_decoded=None):
        """-> (loss, pred): float32 scalar, (B, M, P) at the decoded tokens.

        video (B, T, H, W, C) uint8 or float in [0,1]; mask (B, N) bool with as many True in every
        row. decoder_mask (B, N): True = not decoded (VideoMAE v2); default: the masked tokens are
        decoded, in raster order. The loss covers decoded positions that the encoder did not see.
        The two numbers are counted from the masks when not given, which waits for the device.
        """
        visible, ids, scored = self.select(mask, decoder_mask, num_visible, num_decoded)
        x = self.forward_encoder(video, visible)  # (B, N_vis, D)
        pred = self.forward_decoder(x, visible, ids)  # (B, M, P)
        return self.forward_loss(video, pred, ids, scored), pred


def init_linears(model: nn.Module):
    """Fine-tuning's initial weights, in place: linears normal with deviation .02, biases 0."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class VideoClassifier(Encoder):
    """Encoder, mean over all tokens, fc_norm, dropout, head; no final norm before the mean.

    head_norm puts a BatchNorm without parameters before the head, for linear probes of frozen
    features (MAE, A.1).
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


def count_params(model: nn.Module) -> int:
    """Number of parameters; buffers (the position tables) are none."""
    return sum(p.numel() for p in model.parameters())
