"""A transformer laid out as the original DiT and SiT code: plain modules, no package, its own `modulate`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .common import Built, made, randint, randn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, n, width = x.shape
        q, k, v = self.qkv(x).view(batch, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, n, width))


class DiTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class RenamedBlock(DiTBlock):
    """The same with other local names, a type, a comment, and the last dim named from the end."""

    def forward(self, h: Tensor, t_emb: Tensor) -> Tensor:
        """What it does is what counts."""
        (b1, s1, g1, b2, s2, g2) = self.adaLN_modulation(t_emb).chunk(6, dim=-1)
        # attention, then the MLP
        h = h + g1.unsqueeze(1) * self.attn(modulate(self.norm1(h), b1, s1))
        h = h + g2.unsqueeze(1) * self.mlp(modulate(self.norm2(h), b2, s2))
        return h


class OtherOrderBlock(DiTBlock):
    """Scale before shift: the same structure, another meaning."""

    def forward(self, x, c):
        scale_msa, shift_msa, gate_msa, scale_mlp, shift_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class AffineBlock(DiTBlock):
    """Norms with weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        x = modulate(self.norm_final(x), shift, scale)
        x = self.linear(x)
        return x


class DiT(nn.Module):
    """Class-conditional, on tokens."""

    def __init__(self, block: type[nn.Module] = DiTBlock, width: int = 32, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.x_embedder, self.y_embedder = nn.Linear(4, width), nn.Embedding(10, width)
        self.t_embedder = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.x_embedder(x), self.t_embedder(t[:, None]) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


def _inputs(tokens: int) -> dict[str, Tensor]:
    return {"x": randn(2, tokens, 4), "t": torch.tensor([0.1, 0.7]), "y": randint(10, 2)}


def dit() -> Built:
    return made(DiT), _inputs(16)


def sit_wide() -> Built:
    """Real width, odd number of tokens, renamed locals."""
    return made(DiT, block=RenamedBlock, width=256, heads=4), _inputs(37)


def other_order() -> Built:
    return made(DiT, block=OtherOrderBlock), _inputs(16)


def affine() -> Built:
    return made(DiT, block=AffineBlock), _inputs(16)
