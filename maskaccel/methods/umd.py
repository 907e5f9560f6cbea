"""UMD: unified masked diffusion (Hansen-Estruch et al. 2024, arXiv 2406.17688; the authors' code).

A masked autoencoder whose input is also noised. The usual timesteps mask a part of a noised image; one further step,
t = 0, has no noise and a high ratio of masked tokens, as MAE. With r samples of a batch in that step

    L = r L_{t = 0} + (1 - r) L_{t >= 1}

The encoder sees the kept tokens and 4 CLS tokens; the decoder (4 blocks in B, 8 in L) the restored ones (learned mask
token, learned positions) behind the mean of the CLS tokens. Both have adaLN here; images are generated from all tokens.

A masked batch has one number of kept tokens, so the two kinds of samples are two calls of the model (`split`).

Inferred: the defaults of the ratios (0.75 at t = 0, 0.5 elsewhere, a half of the batch at t = 0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..masks import TokenIndex
from ._layers import check_tokens, sizes
from ._ratios import kept_tokens
from ._transformer import AdaLNBlock, AdaLNLinear, learned_token, touched


@dataclass(frozen=True)
class UMDSchedule:
    """Which samples of a batch are at t = 0, and how many tokens the two kinds keep.

    Attributes:
        clean_part: r, the part of the samples at t = 0.
        clean_ratio: Masked part of the tokens at t = 0.
        noised_ratio: Masked part elsewhere.
        bucket: The number of kept tokens is a multiple of it.
    """

    clean_part: float = 0.5
    clean_ratio: float = 0.75
    noised_ratio: float = 0.5
    bucket: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.clean_part <= 1:
            raise ValueError(f"clean_part={self.clean_part} must lie in [0, 1]")
        kept_tokens(1, self.clean_ratio, self.bucket), kept_tokens(1, self.noised_ratio, self.bucket)

    def split(self, batch: int) -> tuple[slice, slice]:
        """The samples at t = 0, and the others."""
        clean = round(batch * self.clean_part)
        return slice(0, clean), slice(clean, batch)

    def kept(self, n: int) -> tuple[int, int]:
        """Tokens that the two kinds keep."""
        return kept_tokens(n, self.clean_ratio, self.bucket), kept_tokens(n, self.noised_ratio, self.bucket)

    def loss(self, clean: Tensor, noised: Tensor) -> Tensor:
        """`r L_{t = 0} + (1 - r) L_{t >= 1}` of the means over each kind."""
        parts = [(self.clean_part, clean), (1 - self.clean_part, noised)]
        return torch.stack([weight * value.mean() for weight, value in parts if value.numel()]).sum()


class UMD(nn.Module):
    """Encoder and decoder between the embedding of patches and their values.

    Args:
        dim: Channels (768 in B).
        depth: Blocks of the encoder (12).
        heads: Attention heads (12).
        grid: Sizes of the grid of tokens.
        out: Values of a patch.
        decoder_depth: Blocks of the decoder (4).
        cls_tokens: Number of CLS tokens.
        mlp_ratio: Hidden channels of the MLPs by channels.
    """

    paper = "Unified Auto-Encoding with Masked Diffusion (arXiv 2406.17688)"

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        grid: Sequence[int],
        out: int,
        *,
        decoder_depth: int = 4,
        cls_tokens: int = 4,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.dim, self.grid, self.cls_tokens = dim, sizes("grid", grid, len(tuple(grid))), cls_tokens
        n = math.prod(self.grid)
        self.cls = nn.Parameter(torch.zeros(1, cls_tokens, dim))
        self.pos_embed, self.decoder_pos_embed = (nn.Parameter(torch.randn(1, n, dim) * n**-0.5) for _ in range(2))
        self.mask_token = learned_token(dim)
        self.blocks = nn.ModuleList(AdaLNBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.decoder_blocks = nn.ModuleList(AdaLNBlock(dim, heads, mlp_ratio) for _ in range(decoder_depth))
        self.final_layer = AdaLNLinear(dim, out, zero=False)

    def encode(self, x: Tensor, c: Tensor, index: TokenIndex | None = None) -> tuple[Tensor, Tensor]:
        """The representation and the encoded tokens.

        Args:
            x: Embedded tokens without positions `(B, N, dim)`.
            c: Condition `(B, dim)`; t = 0 for samples without noise.
            index: Kept tokens; None: all.

        Returns:
            The mean of the CLS tokens `(B, dim)`, and `(B, K, dim)`.
        """
        check_tokens(x, self.dim, self.grid)
        x = x + self.pos_embed.to(x.dtype)
        x = x if index is None else index.gather(x)
        x = torch.cat([self.cls.to(x.dtype).expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, c)
        return x[:, : self.cls_tokens].mean(1), x[:, self.cls_tokens :]

    def forward(self, x: Tensor, c: Tensor, index: TokenIndex | None = None) -> Tensor:
        """Patches of all tokens, `(B, N, out)`; arguments as of `encode`."""
        cls, x = self.encode(x, c, index)
        pos = self.decoder_pos_embed
        if index is None:
            x = touched(x + pos.to(x.dtype), self.mask_token)
        else:
            x = ops.scatter_merge(None, x, index, mode="mask_token", mask_token=self.mask_token, pos=pos)
        x = torch.cat([cls[:, None], x], 1)
        for block in self.decoder_blocks:
            x = block(x, c)
        return self.final_layer(x[:, 1:], c)
