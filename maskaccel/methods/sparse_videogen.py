"""Sparse VideoGen (Xi et al. 2025, arXiv 2502.01776): heads look within frames, or at one place through all frames.

Spatial heads see a band of the raster index, temporal heads the same band once tokens are ordered by place and then by
frame; both see a sink, the first tokens of their order, as many as a frame has. For spatial heads that is the first
frame; for temporal heads it is inferred from the authors' code for Wan: the frame itself would lie in every tile. Which
a head is, is tried at every call on a few queries: the mask whose result is nearer to the full attention's is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks import GridWindow, Segments, TileMask, TokenOrder
from ..masks.rules import ALWAYS, WHERE
from ..masks.tiles import DEFAULT_BLOCK
from ..ops import tile_attention
from ..ops._checks import count as check_count
from ..ops.attention.check import check_block
from ..ops.attention.check import number as check_number
from ..patching.attention import AttentionCall, AttentionSite, Places
from ..state.generation import Generation
from ._attention import SitePolicy, SparseAttention


@dataclass(frozen=True)
class SparseVideoGen(SparseAttention):
    """Give each head the spatial or the temporal mask, whichever is nearer to its full attention.

    Attributes:
        width: Of the band on each side, in frames.
        samples: Queries that the masks are tried on.
        sink: Whether the first tokens of either order, as many as a frame has, are seen by all.
        dense_steps: Steps at the start that compute everything (the first fifth in the paper).
        dense_layers: Layers at the start that are left alone.
        seed: Of the choice of queries.
        grid: `(frames, height, width)` of the latent tokens, where the model's call does not tell it.
        block: Tile size.
    """

    width: float = 1.5
    samples: int = 64
    sink: bool = True
    dense_steps: int = 0
    dense_layers: int = 0
    seed: int = 0
    grid: tuple[int, ...] | None = None
    block: tuple[int, int] = DEFAULT_BLOCK

    name = "SparseVideoGen"
    paper = "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity (2502.01776)"

    def __post_init__(self) -> None:
        check_number("width", self.width)
        if self.width <= 0:
            raise ValueError(f"width={self.width!r} must be above 0")
        check_count("samples", self.samples, 1)
        for name in ("dense_steps", "dense_layers"):
            check_count(name, getattr(self, name))
        check_block(self.block)

    def policy(self, site: AttentionSite, generation: Generation) -> _Heads:
        """The attention of one module."""
        return _Heads(self, site, generation)

    def masks(self, grid: tuple[int, ...], text: tuple[int, int]) -> tuple[TileMask, TileMask, Tensor]:
        """The spatial mask, the temporal mask in its own order, and that order.

        Returns:
            Both masks, and int64 `(tokens,)`: row `i` of the temporal order is row `order[i]` of the raster order.
        """
        frames, places = grid[0], math.prod(grid[1:])
        prefix, suffix = (text[1], 0) if text[0] == 0 else (0, text[1])
        tokens = frames * places + text[1]
        reach = max(1, round(self.width * places))
        temporal = torch.arange(frames * places).view(frames, places).T.flatten() + prefix
        whole = torch.arange(tokens)
        order = torch.cat([whole[:prefix], temporal, whole[prefix + frames * places :]])
        line = TokenOrder((frames * places,), None, prefix, suffix)
        first = (torch.arange(tokens) >= prefix) & (torch.arange(tokens) < prefix + places)
        sink = first.long() if self.sink else torch.zeros(tokens, dtype=torch.int64)
        rule = Segments(sink, sink, ((WHERE, ALWAYS), (WHERE, ALWAYS)), GridWindow(line, reach, "band"))
        mask = TileMask.from_rule(rule, (tokens, tokens), self.block)
        return mask, mask, order  # bands of places in two orders: the same tiles


def _both(method: SparseVideoGen, places: Places) -> tuple[TileMask, Tensor, Tensor, Tensor]:
    """Both masks as two heads, the temporal order, sampled queries, and what these see under either mask."""
    assert places.grid is not None and places.text is not None
    spatial, temporal, order = method.masks(places.grid, places.text)
    tokens, device = len(order), places.device
    generator = torch.Generator().manual_seed(method.seed)
    rows = torch.randperm(tokens, generator=generator)[: method.samples].sort().values
    back = torch.empty_like(order).scatter_(0, order, torch.arange(tokens))
    seen = torch.stack([spatial.to_bool()[0, 0][rows], temporal.to_bool()[0, 0][back[rows]][:, back]])
    return TileMask.stack([spatial, temporal]).to(device), order.to(device), rows.to(device), seen.to(device)


class _Heads(SitePolicy):
    making = staticmethod(_both)

    def __call__(self, call: AttentionCall) -> Tensor | None:
        why = call.refusal() or self.dense_step()
        if why is None and (call.grid is None or call.text is None):
            why = "the token grid is not known"
        if why is None and call.grid is not None and len(call.grid) != 3:
            why = "it is for videos"
        if why is None and call.k.shape[1:3] != call.q.shape[1:3]:
            why = "grouped queries, or keys of other tokens"
        if why is None and call.mask is not None:
            why = "the model gives a mask"
        if why is not None:
            return self.leave(why)
        both, order, rows, seen = self.made(call)
        with torch.no_grad():
            temporal = self._is_temporal(call, rows, seen)
        mask = _chosen(both, temporal)
        self.count(mask, call)
        moved = temporal[:, None, :, None]
        q, k, v = (torch.where(moved, t[:, order], t) for t in (call.q, call.k, call.v))
        out = tile_attention(q, k, v, mask, scale=call.scale)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return torch.where(moved, out[:, back], out)

    def _is_temporal(self, call: AttentionCall, rows: Tensor, seen: Tensor) -> Tensor:
        """Bool `(B, H)`: whether the temporal mask comes nearer to the full attention on the sampled queries."""
        q, k, v = (t.transpose(1, 2).float() for t in (call.q[:, rows], call.k, call.v))
        s = q @ k.mT * call.scale
        full = s.softmax(-1) @ v
        errors = [((s.masked_fill(~part, -torch.inf).softmax(-1) @ v - full) ** 2).mean((2, 3)) for part in seen]
        return errors[1] < errors[0]


def _chosen(both: TileMask, second: Tensor) -> TileMask:
    """For each sample and head the first or the second head of a mask of two."""
    which = second.long()

    def pick(t: Tensor) -> Tensor:
        return t[0][which]

    pattern_of = None if both.pattern_of is None else pick(both.pattern_of)
    return TileMask(pick(both.bits), both.block, both.shape, pattern_of, both.patterns)
