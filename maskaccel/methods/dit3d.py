"""DiT-3D: window attention on voxel tokens (Mo et al. 2023, arXiv 2307.01831, section 3.3; the authors' code).

In some blocks (`WINDOW_BLOCKS`) tokens attend within windows of `R^3` (R = 4), in the others to all. Scores may have a
decomposed bias of relative positions of ViTDet (Li et al. 2022): `q . (R_x[dx] + R_y[dy] + R_z[dz])`.

Where R does not divide the grid the authors pad it with zeros, and the padding takes part in attention; here it takes
no part by default, and does with `pad="zeros"`.

Inferred: that the tables of relative positions start at 0, as in ViTDet.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..masks import TileMask
from ..ops.attention import tile_attention
from ._layers import check_tokens, cut, head_dim, linear, remembered, sizes, split

WINDOW_BLOCKS = (0, 3, 6, 9)
"""Blocks with window attention in the authors' configuration."""

Pad = Literal["exact", "zeros"]
_AXES = "xyz"


def partition(x: Tensor, grid: tuple[int, ...], window: tuple[int, ...]) -> Tensor:
    """`(B, X * Y * Z, C)` as windows `(B * windows, tokens of a window, C)`, with zeros behind the end of each axis."""
    return cut(x, grid, window).permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)


def join(x: Tensor, grid: tuple[int, ...], window: tuple[int, ...]) -> Tensor:
    """The inverse of `partition`, without the padding."""
    counts = [-(-n // w) for n, w in zip(grid, window)]
    x = x.unflatten(1, window).unflatten(0, (-1, *counts)).permute(0, 1, 4, 2, 5, 3, 6, 7)
    x = x.flatten(5, 6).flatten(3, 4).flatten(1, 2)
    return x[:, : grid[0], : grid[1], : grid[2]].flatten(1, 3)


@remembered
def _without_padding(
    grid: tuple[int, ...], window: tuple[int, ...], batch: int, device: torch.device
) -> TileMask | None:
    """The mask that leaves the padding out, None where there is none."""
    inside = partition(torch.ones(1, grid[0] * grid[1] * grid[2], 1), grid, window)[:, :, 0] > 0
    if bool(inside.all()):
        return None
    tokens = inside.shape[1]
    keys = inside[:, None, None].expand(-1, 1, tokens, -1).repeat(batch, 1, 1, 1)
    side = min(128, -(-tokens // 32) * 32)
    return TileMask.from_bool(keys, (side, side)).to(device)


class DiT3DAttention(nn.Module):
    """Window or global attention over the tokens of a voxel grid.

    Args:
        dim: Channels.
        heads: Attention heads (1152 channels and 16 heads in the largest model).
        grid: Tokens along x, y and z.
        window: Side of a window, or one for each axis; None: all tokens attend to all.
        relative_position: Whether there is the decomposed bias.
        pad: `"exact"`: a window at the border holds the tokens that are there. `"zeros"`: as the authors' code, where
            zeros fill it up; the weights of their models were trained so.
        qkv_bias: Whether the projections of q, k and v have a bias.

    Raises:
        ValueError: `heads` does not divide `dim`, sizes are not positive, or `pad` is unknown.
    """

    paper = "DiT-3D: Exploring Plain Diffusion Transformers for 3D Shape Generation (arXiv 2307.01831)"

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: tuple[int, int, int],
        window: int | tuple[int, int, int] | None = 4,
        *,
        relative_position: bool = False,
        pad: Pad = "exact",
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        width = head_dim(dim, heads)
        if pad not in get_args(Pad):
            raise ValueError(f"pad={pad!r}; allowed are {', '.join(map(repr, get_args(Pad)))}")
        self.dim, self.heads, self.pad = dim, heads, pad
        self.grid = sizes("grid", grid, 3)
        self.window = self.grid if window is None else sizes("window", window, 3)
        self.qkv = linear(dim, 3 * dim, qkv_bias)
        self.proj = linear(dim, dim)
        self.relative_position: nn.ParameterDict | None = None
        if relative_position:
            tables = {axis: nn.Parameter(torch.zeros(2 * n - 1, width)) for axis, n in zip(_AXES, self.window)}
            self.relative_position = nn.ParameterDict(tables)

    def _bias(self, q: Tensor) -> Tensor | None:
        """`(B * windows, heads, n, n)`: what each query adds to the score of each key of its window."""
        if self.relative_position is None:
            return None
        at = q.transpose(1, 2).unflatten(2, self.window)  # (B, H, X, Y, Z, D)
        bias: Tensor | None = None
        for axis, n in enumerate(self.window):
            place = torch.arange(n, device=q.device)
            table = self.relative_position[_AXES[axis]][place[:, None] - place + n - 1].to(q.dtype)
            name = _AXES[axis]
            term = torch.einsum(f"bhxyzd,{name}kd->bhxyzk", at, table).flatten(2, 4)
            shape = [1, 1, 1]
            shape[axis] = n
            term = term.unflatten(3, shape)  # (B, H, n, 1 or keys of the axis ...)
            bias = term if bias is None else bias + term
        assert bias is not None
        return bias.flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        """Attention of `(B, X * Y * Z, dim)`, tokens in raster order; returns that shape."""
        check_tokens(x, self.dim, self.grid)
        batch = x.shape[0]
        q, k, v = split(self.qkv(partition(x, self.grid, self.window)), 3, self.heads)
        mask = _without_padding(self.grid, self.window, batch, x.device) if self.pad == "exact" else None
        out = tile_attention(q, k, v, mask, bias=self._bias(q)).flatten(2)
        return self.proj(join(out, self.grid, self.window))
