"""Re-ttention (Chen et al. 2025, arXiv 2505.22918): very sparse attention with the statistics of the dense one.

A narrow window holds only the share `rho` of a row's softmax, and normalising over it alone makes its weights too
large. So `rho` is measured in a step that is computed in full, with the part `R` of the result that lies outside of the
window, and a sparse step gives

    O = rho * softmax over the window of (q k^T) v + R,        rho += 0.04 after every sparse step

A full step costs one dense attention: window and complement are computed apart and merged, which also gives `rho` and
`R`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..masks import GridWindow, TileMask, TokenOrder
from ..masks.tiles import DEFAULT_BLOCK
from ..ops import merge_attention, tile_attention
from ..ops._checks import count as check_count
from ..ops.attention.check import check_block
from ..ops.attention.check import number as check_number
from ..patching.attention import AttentionCall, AttentionSite
from ..state.generation import Generation
from ..state.statistics import SoftmaxStats
from ._attention import SitePolicy, SparseAttention


@dataclass(frozen=True)
class Rettention(SparseAttention):
    """Attend to a narrow window, with the softmax statistics of a recent dense step.

    Images: the window is a band of the raster index. Videos: the same band within the frame, in all frames. Text is
    seen by all and sees all.

    Attributes:
        density: Part of a frame's tokens that the window holds (1/32 in the paper).
        dense_steps: Steps at the start that are computed in full.
        refresh: Of the later steps, every so-many-th is computed in full (5 in the paper), counted from step 0.
        growth: Added to `rho` after every sparse step.
        clamp: Whether `rho` stays at 1 or below; the authors' code does not clamp.
        grid: Grid of the latent tokens, where the model's call does not tell it.
        block: Tile size.
    """

    density: float = 1 / 32
    dense_steps: int = 5
    refresh: int = 5
    growth: float = 0.04
    clamp: bool = True
    grid: tuple[int, ...] | None = None
    block: tuple[int, int] = DEFAULT_BLOCK

    name = "Re-ttention"
    paper = "Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape (arXiv 2505.22918)"

    def __post_init__(self) -> None:
        check_number("density", self.density)
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density!r} must be in (0, 1]")
        check_count("dense_steps", self.dense_steps)
        check_count("refresh", self.refresh, 1)
        check_number("growth", self.growth)
        check_block(self.block)

    @property
    def follows_steps(self) -> bool:
        """Always: it remembers statistics from step to step."""
        return True

    def policy(self, site: AttentionSite, generation: Generation) -> _Reshaped:
        """The attention of one module."""
        return _Reshaped(self, site, generation)

    def window(self, grid: tuple[int, ...], text: tuple[int, int]) -> TileMask:
        """The mask of the tokens of a grid, with the text around it.

        Args:
            grid: `(height, width)`, `(frames, height, width)` or `(tokens,)`.
            text: `(start, length)` of the text in the sequence.
        """
        frames, place = (grid[0], math.prod(grid[1:])) if len(grid) == 3 else (1, math.prod(grid))
        tokens = frames * place
        prefix, suffix = (text[1], 0) if text[0] == 0 else (0, text[1])
        order = TokenOrder((frames, place), None, prefix, suffix)
        radius = int(place * self.density) // 2
        return TileMask.from_rule(GridWindow(order, (None, radius)), (tokens + text[1],) * 2, self.block)


class _Reshaped(SitePolicy):
    def __init__(self, method: Rettention, site: AttentionSite, generation: Generation) -> None:
        super().__init__(method, site, generation)
        self.stats = SoftmaxStats(generation)
        self._masks: dict[tuple, tuple[TileMask, TileMask]] = {}

    @property
    def nbytes(self) -> int:
        return self.stats.nbytes

    def _both(self, call: AttentionCall) -> tuple[TileMask, TileMask] | str:
        """The window and its complement."""
        grid, text = call.grid, call.text
        if grid is None or text is None or call.q.shape[1] != call.k.shape[1]:
            return "the token grid is not known, or queries and keys are not the same tokens"
        key = (grid, text, call.q.device)
        if key not in self._masks:
            window = self.method.window(grid, text)
            self._masks[key] = window.to(call.q.device), (~window).to(call.q.device)
        return self._masks[key]

    def __call__(self, call: AttentionCall) -> Tensor | None:
        method, at = self.method, self.generation
        refused = call.refusal()
        masks = refused if refused is not None else self._both(call)
        if isinstance(masks, str):
            return self.leave(masks)
        if not at.active:
            return self.leave("outside of a run")
        if at.index < method.dense_steps - 1:
            return self.leave("dense_steps")
        self.stats.begin(call.part)
        options: dict[str, Any] = {"scale": call.scale, "bias": call.bias()}
        shape = (*call.q.shape, call.k.shape[1])
        held = None
        if at.index >= method.dense_steps and at.index % method.refresh:
            held = self.stats.get(shape, method.growth, method.clamp)
        if held is not None:
            self.count(masks[0], call)
            return tile_attention(call.q, call.k, call.v, masks[0], out_scale=held[0], out_add=held[1], **options)
        part, part_lse = tile_attention(call.q, call.k, call.v, masks[0], return_lse=True, **options)
        rest, rest_lse = tile_attention(call.q, call.k, call.v, masks[1], return_lse=True, **options)
        out, lse = merge_attention(part, part_lse, rest, rest_lse)
        self.stats.store(out, lse, part, part_lse, shape)
        self.count(masks[0], call)
        self.count(masks[1], call)
        return out


# It decides and remembers in Python at every step: in a graph each step would be a constant, and compiled anew.
_Reshaped.__call__._torchdynamo_disable = True  # type: ignore[attr-defined]
