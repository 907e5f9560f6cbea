"""Radial attention (Li et al. 2025, arXiv 2506.19852): the further apart two frames, the narrower the window.

With `n` tokens a frame and frames `d` apart, tokens whose places in their frames differ by at most `w` see each other:
the whole frame for `d <= 1`, else `w = 2^bits(n) / 2^bits(d) * decay`, at least a tile. Where `2^bits(n) / 2^bits(d)`
has become smaller than 128, only every `128 / that`-th distance `d` is kept. `bits` is a number's length in binary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks import Rule, TileMask, TokenOrder
from ..masks.rules import ALL, NONE, SOME
from ..masks.tiles import DEFAULT_BLOCK
from ..ops._checks import count as check_count
from ..ops.attention.check import check_block
from ..ops.attention.check import number as check_number
from ..ops.attention.reference import unpack_words
from ..patching.attention import AttentionSite, Places
from ..state.generation import Generation
from ._attention import FixedMask, SparseAttention, beside

_LEAST = 128  # tokens: windows of distant frames get no narrower, but rarer


class FrameBands(Rule):
    """The paper's rule for the tokens of `frames` frames of `n` tokens, with text beside them that sees all.

    Args:
        order: The grid `(frames, n)` in raster order.
        decay: Factor of the widths.
        least: Narrowest window, in tokens.
        sink: Whether the first frame is seen by all and sees all.
    """

    def __init__(self, order: TokenOrder, decay: float, least: int, sink: bool) -> None:
        self.order = order
        frames, n = order.grid
        width, kept = [], []
        for d in range(frames):
            reach = 2 ** n.bit_length() / 2 ** d.bit_length()
            width.append(float(n) if d <= 1 else max(reach * decay, float(least)))
            kept.append(d <= 1 or reach >= _LEAST or d % int(_LEAST / reach) == 0)
        self._widths, self._kept = torch.tensor(width, dtype=torch.float64), torch.tensor(kept)
        self._places, self.sink = order.coordinates, sink
        self.decay, self.least = decay, least

    def check(self, sq: int, sk: int) -> None:
        """The tokens are those of the video."""
        if (sq, sk) != (self.order.tokens,) * 2:
            raise ValueError(f"the video has {self.order.tokens} tokens; there are {sq} queries and {sk} keys")

    def to(self, device: torch.device) -> Rule:
        """A copy whose tables are on the device."""
        moved = object.__new__(FrameBands)
        moved.__dict__.update(self.__dict__)
        moved._widths, moved._kept, moved._places = (t.to(device) for t in (self._widths, self._kept, self._places))
        return moved

    def classify(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Exact for tiles within one frame each; SOME for the others."""
        q, k = self._places[rows], self._places[columns]
        (qf, qp), (kf, kp) = q.unbind(2), k.unbind(2)
        beside = (qf < 0).all(1)[:, None] | (kf < 0).all(1)
        single = (qf.amin(1) == qf.amax(1))[:, None] & (kf.amin(1) == kf.amax(1)) & ~beside
        d = (qf[:, :1] - kf[None, :, 0]).abs().clamp(max=len(self._widths) - 1)
        least = torch.maximum(qp.amin(1)[:, None] - kp.amax(1), kp.amin(1) - qp.amax(1)[:, None])
        most = torch.maximum(qp.amax(1)[:, None] - kp.amin(1), kp.amax(1) - qp.amin(1)[:, None])
        inside = torch.where(self._kept[d] & (most <= self._widths[d]), ALL, SOME)
        inside = torch.where(~self._kept[d] | (least > self._widths[d]), NONE, inside)
        if self.sink:
            inside = torch.where((qf[:, :1] == 0) | (kf[None, :, 0] == 0), ALL, inside)
        return torch.where(beside, ALL, torch.where(single, inside, SOME)).to(torch.int8)[None, None]

    def keep(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Exactly."""
        q, k = self._places[rows][:, :, None], self._places[columns][:, None]
        d = (q[..., 0] - k[..., 0]).abs()
        beside = (q[..., 0] < 0) | (k[..., 0] < 0)
        if self.sink:
            beside = beside | (q[..., 0] == 0) | (k[..., 0] == 0)
        d = d.clamp(max=len(self._widths) - 1)
        near = self._kept[d] & ((q[..., 1] - k[..., 1]).abs() <= self._widths[d])
        return (near | beside)[None, None]


@dataclass(frozen=True)
class RadialAttention(SparseAttention):
    """Attend to a window that narrows with the distance of frames.

    Attributes:
        decay: Factor of the widths.
        sink: Whether the first frame is seen by all (the authors' setting for Wan).
        whole_tiles: Keep or leave whole tiles as the authors do (kept if more than 60 % of the columns that hold
            anything are filled by more than a third); False computes the rule exactly.
        dense_steps: Steps at the start that compute everything.
        dense_layers: Layers at the start that are left alone.
        grid: `(frames, height, width)` of the latent tokens, where the model's call does not tell it.
        block: Tile size.
    """

    decay: float = 1.0
    sink: bool = True
    whole_tiles: bool = True
    dense_steps: int = 0
    dense_layers: int = 0
    grid: tuple[int, ...] | None = None
    block: tuple[int, int] = DEFAULT_BLOCK

    name = "RadialAttention"
    paper = (
        "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation (arXiv 2506.19852)"
    )

    def __post_init__(self) -> None:
        check_number("decay", self.decay)
        if self.decay <= 0:
            raise ValueError(f"decay={self.decay!r} must be above 0")
        check_count("dense_steps", self.dense_steps)
        check_count("dense_layers", self.dense_layers)
        check_block(self.block)

    def policy(self, site: AttentionSite, generation: Generation) -> FixedMask:
        """The attention of one module."""
        return FixedMask(self, site, generation)

    def fixed(self, places: Places) -> tuple[None, TileMask] | str:
        """The mask."""
        if places.grid is None or places.text is None:
            return "the token grid is not known"
        if len(places.grid) != 3:
            return "it is for videos"
        order = beside((places.grid[0], math.prod(places.grid[1:])), places.text)
        return None, self.tile_mask(order, places.maker)

    def tile_mask(self, order: TokenOrder, device: torch.device | None = None) -> TileMask:
        """The mask of tokens in raster order, of the grid `(frames, tokens of a frame)`, made on a device."""
        rule = FrameBands(order, self.decay, self.block[0], self.sink)
        mask = TileMask.from_rule(rule, (order.tokens, order.tokens), self.block, device)
        return whole(mask) if self.whole_tiles else mask


def whole(mask: TileMask) -> TileMask:
    """Whole tiles, by the authors' rule for tiles in part."""
    if mask.patterns is None or mask.pattern_of is None:
        return mask
    filled = unpack_words(mask.patterns, mask.block[1]).double().mean(1)  # (P, bn): density of each column
    some = filled > 0
    dense = ((filled > 1 / 3) & some).sum(1) > 0.6 * some.sum(1)
    part = mask.pattern_of
    keep = mask.tiles() & ((part < 0) | dense[part.clamp(min=0).long()])
    return TileMask.from_tiles(keep, mask.shape, mask.block)
