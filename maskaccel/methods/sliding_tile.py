"""Sliding tile attention (Zhang et al. 2025, arXiv 2502.04507): windows that move by whole tiles of the video.

Tokens are ordered by tiles of the grid. A tile of queries sees the tiles of keys around it; at the border its centre is
moved inwards, so that every tile sees as many. Text sees everything and is seen by all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..masks import GridWindow, TileMask, TokenOrder
from ..masks.tiles import DEFAULT_BLOCK
from ..ops._checks import count as check_count
from ..patching.attention import AttentionSite, Places
from ..state.generation import Generation
from ._attention import FixedMask, SparseAttention, beside


@dataclass(frozen=True)
class SlidingTile(SparseAttention):
    """Attend to the tiles of the grid around one's own.

    Attributes:
        window: Tiles of the window on each axis (odd), or such a tuple for each head. On a grid of fewer axes than it
            has entries the last ones count.
        tile: Tokens of a tile on each axis; (6, 8, 8) in the paper.
        dense_steps: Steps at the start that compute everything.
        grid: Grid of the latent tokens, where the model's call does not tell it.
    """

    window: tuple[int, ...] | tuple[tuple[int, ...], ...] = (3, 3, 3)
    tile: tuple[int, ...] = (6, 8, 8)
    dense_steps: int = 0
    grid: tuple[int, ...] | None = None

    name = "SlidingTile"
    paper = "Fast Video Generation with Sliding Tile Attention (arXiv 2502.04507)"

    def __post_init__(self) -> None:
        for window in self._windows:
            for size in window:
                check_count("window", size, 1)
                if size % 2 == 0:
                    raise ValueError(f"window={self.window!r} must hold odd numbers of tiles")
        for size in self.tile:
            check_count("tile", size, 1)
        check_count("dense_steps", self.dense_steps)

    @property
    def _windows(self) -> tuple[tuple[int, ...], ...]:
        """One window, or one for each head."""
        if not self.window:
            raise ValueError("window=() must hold the tiles of each axis")
        if isinstance(self.window[0], tuple):
            return self.window  # type: ignore[return-value]
        return (self.window,)  # type: ignore[return-value]

    def patch_for(self, grid: tuple[int, ...]) -> tuple[int, ...] | None:
        """The tile."""
        return self.tile[-len(grid) :] if len(self.tile) >= len(grid) else None

    def policy(self, site: AttentionSite, generation: Generation) -> FixedMask:
        """The attention of one module."""
        return FixedMask(self, site, generation)

    def fixed(self, places: Places) -> tuple[TokenOrder, TileMask] | str:
        """Tile order and windows."""
        if places.grid is None or places.text is None:
            return "the token grid is not known"
        axes = len(places.grid)
        if len(self.tile) < axes or any(len(window) < axes for window in self._windows):
            return f"window and tile have fewer axes than the grid {places.grid}"
        if len(self._windows) not in (1, places.heads):
            raise ValueError(f"window is for {len(self._windows)} heads; the attention has {places.heads}")
        order = beside(places.grid, places.text, self.tile[-axes:])
        masks = [self.tile_mask(order, window[-axes:], places.maker) for window in self._windows]
        return order, TileMask.stack(masks) if len(masks) > 1 else masks[0]

    def tile_mask(self, order: TokenOrder, window: tuple[int, ...], device: torch.device | None = None) -> TileMask:
        """The mask of one head, of tokens in tile order, made on a device."""
        assert order.patch is not None
        tokens = math.prod(order.patch)
        block = (tokens, tokens) if tokens % 32 == 0 and order.prefix == 0 else DEFAULT_BLOCK
        rule = GridWindow(order, tuple(size // 2 for size in window), unit=order.patch, clamp=True)
        return TileMask.from_rule(rule, (order.tokens, order.tokens), block, device)
