"""DiffiT: time-dependent self-attention (Hatamizadeh et al. 2023, arXiv 2312.02139, equations 3 to 6).

    q = x W_q + t W_qt,   k = x W_k + t W_kt,   v = x W_v + t W_vt,   O = softmax(q k^T / sqrt(d) + B) v

x are the tokens, t is the embedding of time (and of the class), B the learned bias of relative positions. Time enters
as a bias of each sample, so the projection of t is one row, not one of every token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.attention import RelativePosition, tile_attention
from ._layers import check_tokens, head_dim, linear, remembered, sizes, split


@remembered
def _positions(grid: tuple[int, ...], device: torch.device) -> RelativePosition:
    entries = math.prod(2 * n - 1 for n in grid)
    return RelativePosition.of_grid(torch.empty(1, entries, device=device), grid)


class DiffiTAttention(nn.Module):
    """Time-dependent multi-head self-attention (TMSA).

    Args:
        dim: Channels.
        heads: Attention heads.
        grid: Height and width in tokens.
        time_dim: Channels of the time embedding; None: as `dim`.
        qkv_bias: Whether the projections of q, k and v have a bias.
        relative_position: Whether there is a B.

    Raises:
        ValueError: `heads` does not divide `dim`.
    """

    paper = "DiffiT: Diffusion Vision Transformers for Image Generation (arXiv 2312.02139)"

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: tuple[int, int],
        time_dim: int | None = None,
        *,
        qkv_bias: bool = True,
        relative_position: bool = True,
    ) -> None:
        super().__init__()
        head_dim(dim, heads)
        self.dim, self.heads = dim, heads
        self.grid = height, width = sizes("grid", grid, 2)
        self.time_dim = dim if time_dim is None else time_dim
        self.qkv = linear(dim, 3 * dim, qkv_bias)
        self.qkv_time = linear(self.time_dim, 3 * dim, qkv_bias)
        self.proj = linear(dim, dim)
        self.relative_position: nn.Parameter | None = None
        if relative_position:
            self.relative_position = nn.Parameter(torch.empty(heads, (2 * height - 1) * (2 * width - 1)))
            nn.init.trunc_normal_(self.relative_position, std=0.02)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Attention at a time.

        Args:
            x: `(B, H * W, dim)`, tokens in raster order.
            t: `(B, time_dim)`.

        Returns:
            Of the shape of x.
        """
        check_tokens(x, self.dim, self.grid)
        if tuple(t.shape) != (x.shape[0], self.time_dim):
            raise ValueError(f"t has shape {tuple(t.shape)}; it must be {(x.shape[0], self.time_dim)}")
        q, k, v = split(self.qkv(x) + self.qkv_time(t)[:, None], 3, self.heads)
        relpos = None
        if self.relative_position is not None:
            relpos = _positions(self.grid, x.device).with_table(self.relative_position)
        return self.proj(tile_attention(q, k, v, relpos=relpos).flatten(2))
