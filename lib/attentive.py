"""The attentive probe of a frozen encoder (V-JEPA, arXiv 2404.08471): the modules of probe.py."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import MLP, SIZES, Encoder, init_linears


class AttentiveProbe(nn.Module):
    """One learned query attends to all tokens; residual, LayerNorm, MLP, linear (V-JEPA's probe).

    With one query for all samples nothing is computed per token but the shares: what a head looks
    for is a vector among tokens, and what it gathers goes through v once. Keys have no bias, which
    would cancel. Tokens come in standardised (layer norm without weights), once for all probes:
    norm1 holds the weights.
    """

    def __init__(self, dim: int, heads: int, num_classes: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, dim), std=0.02))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(3))
        self.k = nn.Linear(dim, dim, bias=False)
        self.mlp = MLP(dim)
        init_linears(self)
        with torch.no_grad():
            self.proj.weight.div_(2 ** 0.5)
            self.mlp.fc2.weight.div_(2 ** 0.5)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x):
        """(B, n, D), standardised -> logits (B, num_classes)."""
        d = x.shape[2] // self.heads
        q = self.q(self.query).view(self.heads, 1, d)
        k, v = (m.weight.view(self.heads, d, -1) for m in (self.k, self.v))  # (heads, d, D)
        wanted = (q @ k)[:, 0] * d ** -0.5 * self.norm1.weight  # (heads, D)
        share = (x @ wanted.T).softmax(1)  # (B, n, heads)
        x = share.mT @ x * self.norm1.weight + self.norm1.bias  # (B, heads, D)
        x = torch.einsum("bhc,hdc->bhd", x, v).flatten(1) + self.v.bias  # (B, D)
        x = self.query + self.proj(x)
        return self.head(x + self.mlp(self.norm2(x)))


class AttentiveClassifier(nn.Module):
    """A frozen encoder with its final norm, and attentive probes side by side on its tokens."""

    def __init__(self, num_classes: int, num_probes: int = 1, **encoder):
        super().__init__()
        self.encoder = Encoder(**encoder)
        D, heads = (SIZES[self.encoder.config["size"]][k] for k in ("width", "heads"))
        self.encoder.norm = nn.LayerNorm(D, eps=1e-6)
        self.encoder.requires_grad_(False)
        self.probes = nn.ModuleList(AttentiveProbe(D, heads, num_classes)
                                    for _ in range(num_probes))
        self.grid, self.config = self.encoder.grid, self.encoder.config
        self.config |= dict(num_classes=num_classes, num_probes=num_probes)

    def set_positions(self, pos_grid):
        """Takes the position table of another token grid, resized to this model's."""
        self.encoder.set_positions(pos_grid)

    @torch.no_grad()
    def tokens(self, video):
        """(B, T, H, W, C) uint8 or float in [0,1] -> (B, N, D), normed."""
        return self.encoder.norm(self.encoder(video))

    def forward(self, tokens):
        """(B, n, D), those of all clips that are judged together -> logits (probes, B, K)."""
        x = F.layer_norm(tokens.float(), tokens.shape[2:])
        return torch.stack([probe(x) for probe in self.probes])
