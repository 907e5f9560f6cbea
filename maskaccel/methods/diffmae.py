"""DiffMAE: diffusion models as masked autoencoders (Wei et al. 2023, arXiv 2304.03283, section 3).

The encoder sees the visible tokens only, without noise; the decoder denoises the masked ones given its output:

    L = mean over masked of (x0 - D(x_t, t, E(visible)))^2,   x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) e

with `beta_t^rho` for the variances of the process, rho = 0.8 in the paper. Nothing of the encoder depends on t, so its
output, and the keys and values that the decoder forms of it, are computed once for a whole sampling run: `encode` gives
them, and every step is exact with them. Decoders (section 3.2): `"joint"` attends within visible and masked tokens
together, `"cross"` only from masked to visible ones, `"cross-self"` first among the masked and then to the visible.
(The joint decoder also updates the visible tokens, which then depend on t: it remembers the encoder's output alone.)

Inferred: the timestep is added to the decoder's tokens as an embedding of two layers; every block of the decoder
attends to the encoder's last output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..masks import TokenIndex
from ._layers import check_tokens, linear, sizes
from ._transformer import Attention, CrossAttention, Mlp, PreNormBlock, sincos

Decoder = Literal["joint", "cross", "cross-self"]


def noise_levels(steps: int = 1000, rho: float = 0.8, low: float = 1e-4, high: float = 0.02) -> Tensor:
    """`abar_t` for t = 1 to `steps`, fp32 `(steps,)`: products of `1 - beta_t^rho` with linear beta.

    Raises:
        ValueError: A setting is out of range.
    """
    if steps < 1 or rho <= 0 or not 0 < low <= high < 1:
        raise ValueError(f"steps={steps}, rho={rho}, low={low}, high={high}: allowed are 0 < low <= high < 1, rho > 0")
    beta = torch.linspace(low, high, steps, dtype=torch.float64) ** rho
    return (1 - beta).cumprod(0).float()


def timestep_embedding(t: Tensor, dim: int, period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of timesteps `(B,)`, fp32 `(B, dim)`: cosines, then sines (DiT)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return nn.functional.pad(torch.cat([angles.cos(), angles.sin()], 1), (0, dim % 2))


def time_mlp(dim: int, frequencies: int = 256) -> nn.Sequential:
    """DiT's two layers on top of `timestep_embedding`."""
    first, second = nn.Linear(frequencies, dim), nn.Linear(dim, dim)
    for layer in (first, second):
        nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.SiLU(), second)


class DecoderBlock(nn.Module):
    """A block of the decoders with cross-attention.

    Args:
        dim: Channels.
        heads: Attention heads.
        among: Whether the masked tokens first attend among themselves (`"cross-self"`).
        mlp_ratio: Hidden channels of the MLP by channels.
    """

    def __init__(self, dim: int, heads: int, among: bool, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6) if among else None
        self.attn = Attention(dim, heads) if among else None
        self.norm_cross, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.cross = CrossAttention(dim, heads)
        self.mlp = Mlp(dim, mlp_ratio, tanh=False)

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        """Masked tokens `(B, M, dim)` with keys and values of the visible ones."""
        if self.attn is not None and self.norm1 is not None:
            x = x + self.attn(self.norm1(x))
        x = x + self.cross(self.norm_cross(x), memory)
        return x + self.mlp(self.norm2(x))


@dataclass(frozen=True, eq=False)
class Encoded:
    """What the decoder needs of the visible tokens at every step of a run.

    Attributes:
        index: The visible tokens.
        masked: The others.
        visible: The encoder's output in the decoder's width `(B, V, width)`.
        memory: Keys and values of every block of the decoder; none for the joint decoder.
    """

    index: TokenIndex
    masked: TokenIndex
    visible: Tensor
    memory: tuple[tuple[Tensor, Tensor], ...]


class DiffMAE(nn.Module):
    """Encoder and decoder.

    Args:
        patch_values: Values of a patch.
        grid: Sizes of the grid of tokens.
        dim: Channels of the encoder (1024 in L).
        depth: Blocks of the encoder (24).
        heads: Attention heads of the encoder (16).
        width: Channels of the decoder (512).
        decoder_depth: Blocks of the decoder (8).
        decoder_heads: Attention heads of the decoder (16).
        decoder: `"joint"`, `"cross"` or `"cross-self"`.
        mlp_ratio: Hidden channels of the MLPs by channels.

    Raises:
        ValueError: `decoder` is unknown, or sizes do not fit.
    """

    paper = "Diffusion Models as Masked Autoencoders (arXiv 2304.03283)"

    def __init__(
        self,
        patch_values: int,
        grid: Sequence[int],
        dim: int = 1024,
        depth: int = 24,
        heads: int = 16,
        *,
        width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        decoder: Decoder = "cross-self",
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if decoder not in get_args(Decoder):
            raise ValueError(f"decoder={decoder!r}; allowed are {', '.join(map(repr, get_args(Decoder)))}")
        self.grid = sizes("grid", grid, len(tuple(grid)))
        self.embed, self.embed_noised = linear(patch_values, dim), linear(patch_values, width)
        self.register_buffer("pos_embed", sincos(self.grid, dim), persistent=False)
        self.register_buffer("decoder_pos_embed", sincos(self.grid, width), persistent=False)
        self.blocks = nn.ModuleList(PreNormBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm, self.decoder_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.time = time_mlp(width)
        self.to_decoder, self.head = linear(dim, width), linear(width, patch_values)
        self.decoder_blocks = nn.ModuleList(
            PreNormBlock(width, decoder_heads, mlp_ratio)
            if decoder == "joint"
            else DecoderBlock(width, decoder_heads, decoder == "cross-self", mlp_ratio)
            for _ in range(decoder_depth)
        )

    def encode(self, patches: Tensor, visible: TokenIndex) -> Encoded:
        """The visible tokens, once for a run.

        Args:
            patches: `(B, N, patch_values)` without noise; what masked tokens hold is not read.
            visible: Which tokens are visible.
        """
        check_tokens(patches, self.embed.in_features, self.grid)
        x = self.embed(visible.gather(patches))
        x = x + visible.gather(self.get_buffer("pos_embed").to(x.dtype))
        for block in self.blocks:
            x = block(x)
        x = self.to_decoder(self.norm(x))
        crossing = (block for block in self.decoder_blocks if isinstance(block, DecoderBlock))
        memory = tuple(block.cross.keys(x) for block in crossing)
        return Encoded(visible, visible.complement(), x, memory)

    def decode(self, noised: Tensor, t: Tensor, encoded: Encoded) -> Tensor:
        """The clean patches of the masked tokens.

        Args:
            noised: x_t of the masked tokens, `(B, M, patch_values)`, in their order.
            t: Timesteps `(B,)`.
            encoded: Of `encode`.

        Returns:
            `(B, M, patch_values)`.
        """
        x = self.embed_noised(noised)
        pos = encoded.masked.gather(self.get_buffer("decoder_pos_embed").to(x.dtype))
        x = x + pos + self.time(timestep_embedding(t, 256).to(x.dtype))[:, None]
        if not encoded.memory:  # joint
            count = x.shape[1]
            x = torch.cat([encoded.visible, x], 1)
            for block in self.decoder_blocks:
                x = block(x)
            x = x[:, -count:]
        for block, memory in zip(self.decoder_blocks, encoded.memory):
            x = block(x, memory)
        return self.head(self.decoder_norm(x))

    def loss(self, patches: Tensor, visible: TokenIndex, t: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """The mean squared error of x0 over the masked tokens, for each sample.

        Args:
            patches: `(B, N, patch_values)`.
            visible: Which tokens are visible (25 % at random in the paper).
            t: Timesteps `(B,)`, int64 from 0.
            noise: e of the masked tokens, `(B, M, patch_values)`.
            levels: `abar`, see `noise_levels`.

        Returns:
            `(B,)`.
        """
        encoded = self.encode(patches, visible)
        target = encoded.masked.gather(patches)
        at = levels.to(patches.device)[t][:, None, None].to(patches.dtype)
        found = self.decode(at.sqrt() * target + (1 - at).sqrt() * noise, t, encoded)
        return (found - target).square().mean((1, 2))

    @torch.no_grad()
    def sample(
        self, patches: Tensor, visible: TokenIndex, steps: Sequence[int], levels: Tensor, **kwargs: Any
    ) -> Tensor:
        """Fill in the masked tokens, deterministically (DDIM).

        Args:
            patches: `(B, N, patch_values)` with the visible ones.
            visible: Which tokens are visible.
            steps: Descending timesteps.
            levels: `abar`.
            **kwargs: `generator` of the first noise.

        Returns:
            `(B, N, patch_values)`: visible tokens as given.
        """
        encoded = self.encode(patches, visible)
        shape = (patches.shape[0], encoded.masked.kept, patches.shape[2])
        x = torch.randn(shape, device=patches.device, dtype=patches.dtype, **kwargs)
        levels = levels.to(patches.device, patches.dtype)
        for i, step in enumerate(steps):
            t = torch.full((shape[0],), step, device=patches.device)
            clean = self.decode(x, t, encoded)
            if i + 1 == len(steps):
                x = clean
                break
            noise = (x - levels[step].sqrt() * clean) / (1 - levels[step]).sqrt()
            x = levels[steps[i + 1]].sqrt() * clean + (1 - levels[steps[i + 1]]).sqrt() * noise
        return encoded.masked.merge(patches, x)
