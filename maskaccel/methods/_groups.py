"""Attention within disjoint groups of tokens: windows, sub-grids, rows.

Tokens are moved so that those of a group are next to each other. Groups of one size are then a batch of short
sequences, which wastes nothing; groups of several sizes are one sequence with a block-diagonal `TileMask`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks import Segments, TileMask
from ..ops.attention import tile_attention
from ._layers import remembered


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of the tokens of a sequence.

    Attributes:
        order: int64 `(S,)`: token of each place, groups one after the other; None if nothing moves.
        inverse: Place of each token.
        size: Tokens of every group, or None if they differ.
        mask: The block-diagonal mask of groups that differ in size.
    """

    order: Tensor | None
    inverse: Tensor | None
    size: int | None
    mask: TileMask | None

    @classmethod
    def of(cls, ids: Tensor, device: torch.device) -> Groups:
        """Groups of tokens with equal ids, int64 `(S,)`."""
        order = ids.argsort(stable=True)
        counts = torch.unique(ids, return_counts=True)[1]
        largest = int(counts.max())
        size = largest if bool((counts == largest).all()) else None
        mask = None
        if size is None:
            side = min(128, 32 * 2 ** math.ceil(math.log2(max(largest / 32, 1))))
            tokens = len(ids)
            mask = TileMask.from_rule(Segments(ids[order], ids[order]), (tokens, tokens), (side, side), device)
        if bool((order.diff() == 1).all()):
            return cls(None, None, size, mask)
        return cls(order.to(device), order.argsort().to(device), size, mask)

    def apply(self, x: Tensor) -> Tensor:
        """Tokens of `(B, S, C)`, group after group."""
        return x if self.order is None else x.index_select(1, self.order)

    def undo(self, x: Tensor) -> Tensor:
        """The inverse of `apply`."""
        return x if self.inverse is None else x.index_select(1, self.inverse)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Attention within groups, of `(B, S, H, D)` in the order of `apply`."""
        if self.size is None:
            return tile_attention(q, k, v, self.mask, scale=scale)
        batch = q.shape[0]
        q, k, v = (t.unflatten(1, (-1, self.size)).flatten(0, 1) for t in (q, k, v))
        return tile_attention(q, k, v, scale=scale).view(batch, -1, *q.shape[2:])


def coordinates(grid: Sequence[int]) -> Tensor:
    """int64 `(S, axes)`, the place of each token in raster order."""
    return torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, len(grid))


def _ids(parts: Tensor) -> Tensor:
    """One number for each distinct row, in lexicographic order."""
    return torch.unique(parts, dim=0, return_inverse=True)[1]


def window_ids(grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """int64 `(S,)`, the window of each token; shifted ones are cut off at the border, as Swin's masked shift does."""
    moved = coordinates(grid) + torch.tensor(shift)
    return _ids(torch.div(moved, torch.tensor(window), rounding_mode="floor"))


@remembered
def windows(grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], device: torch.device) -> Groups:
    """Windows of the grid, which may be shifted."""
    return Groups.of(window_ids(grid, window, shift), device)


@remembered
def sub_grids(grid: tuple[int, ...], factor: int, device: torch.device) -> Groups:
    """Interleaved sub-grids: tokens whose coordinates have the same residues."""
    return Groups.of(_ids(coordinates(grid) % factor), device)


@remembered
def lines(grid: tuple[int, ...], shared: tuple[int, ...], device: torch.device) -> Groups:
    """Tokens that agree in the coordinates `shared`; none of them is one group of all tokens."""
    at = coordinates(grid)
    ids = _ids(at[:, list(shared)]) if shared else torch.zeros(len(at), dtype=torch.int64)
    return Groups.of(ids, device)
