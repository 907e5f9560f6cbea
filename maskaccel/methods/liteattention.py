"""LiteAttention (Shmilovich et al. 2025, arXiv 2511.11062): tiles that did not matter once are not computed again.

While a tile is computed, the largest of its scores is compared with what its rows have seen. If it is so far below that
its share of the softmax is under `2^threshold` for every row of the tile, the tile is left out from the next step on.
Attention of a diffusion model changes slowly along a run, so what is left out stays unimportant.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..calibration.file import Calibration, calibration_of
from ..masks.tiles import DEFAULT_BLOCK
from ..ops import tile_attention
from ..ops._checks import count as check_count
from ..ops.attention.check import check_block
from ..ops.attention.check import number as check_number
from ..patching.attention import AttentionCall, AttentionSite, Places
from ..patching.patch import Context
from ..patching.transaction import PatchError
from ..state.generation import Generation
from ..state.skip import Limits, SkipState
from ._attention import SitePolicy, SparseAttention


@dataclass(frozen=True)
class LiteAttention(SparseAttention):
    """Leave out attention tiles whose scores were far below the rest at an earlier step.

    The text of a joint sequence is always kept, as queries and as keys. State is kept for each guidance branch, begins
    anew with every run, and takes one bit a tile.

    Attributes:
        threshold: In log2 of the share of a row's softmax, the authors' unit: -10 is nearly exact, -3 skips much. One
            number, or one for each step, of which the last holds on.
        thresholds: A `Calibration` of kind `"skip"`, or the path of one: thresholds for each layer and step, instead.
        dense_steps: Steps at the start that compute everything and remember nothing.
        dense_layers: Layers at the start that are left alone.
        order_independent: Compare with the row's lse of the step before instead of its running maximum: the decision
            then does not depend on the order of tiles. It costs fp32 `(B, H, Sq)` of memory.
        refresh: Compute all tiles again every so many steps; None never.
        min_tiles: Tiles that every row of tiles keeps at least.
        diagonal: Whether the tiles on the diagonal are always kept.
        must_keep: Ranges `(start, end)` of key tokens that are always computed.
        must_skip: Ranges of key tokens that never are.
        block: Tile size.
    """

    threshold: float | tuple[float, ...] = -10.0
    thresholds: str | Path | Calibration | None = None
    dense_steps: int = 0
    dense_layers: int = 0
    order_independent: bool = False
    refresh: int | None = None
    min_tiles: int = 1
    diagonal: bool = False
    must_keep: tuple[tuple[int, int], ...] = ()
    must_skip: tuple[tuple[int, int], ...] = ()
    block: tuple[int, int] = DEFAULT_BLOCK

    name = "LiteAttention"
    paper = "LiteAttention: A Temporal Sparse Attention for Diffusion Transformers (arXiv 2511.11062)"

    def __post_init__(self) -> None:
        values = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if not values:
            raise ValueError("threshold=() must hold a number at least")
        for value in values:
            check_number("threshold", value)
        for name in ("dense_steps", "dense_layers", "min_tiles"):
            check_count(name, getattr(self, name))
        if self.refresh is not None:
            check_count("refresh", self.refresh, 1)
        for name in ("must_keep", "must_skip"):
            for span in getattr(self, name):
                whole = isinstance(span, tuple) and len(span) == 2 and all(type(n) is int for n in span)
                if not whole or not 0 <= span[0] < span[1]:
                    raise ValueError(f"{name}={getattr(self, name)!r} must hold ranges (start, end) of tokens")
        check_block(self.block)

    @property
    def follows_steps(self) -> bool:
        """Always: it remembers tiles from step to step."""
        return True

    def attach(self, context: Context) -> None:
        """Plan the bridge of every site; PatchError if the calibration is for another model."""
        try:
            self._table(context.model)
        except ValueError as error:
            raise PatchError(f"{self.name}: {error}") from None
        super().attach(context)

    def _table(self, model: Any) -> tuple[tuple[float, ...], ...] | None:
        if self.thresholds is None:
            return None
        found = calibration_of(self.thresholds, "skip", model, field="thresholds")
        if self.block != (found["rows"], found["columns"]):
            raise ValueError(
                f"thresholds were measured in tiles of {found['rows'], found['columns']}, not {self.block}"
            )
        return found["thresholds"]

    def policy(self, site: AttentionSite, generation: Generation) -> _Skipping:
        """The attention of one module."""
        table = self._table(None)
        steps = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if table is not None:
            if site.layer >= len(table):
                raise PatchError(f"{self.name}: thresholds are for {len(table)} layers; {site.name} is {site.layer}")
            steps = table[site.layer]
        return _Skipping(self, site, generation, steps)


def _limits(method: LiteAttention, places: Places) -> Limits:
    text = places.text or (0, 0)
    spans = ((text[0], text[0] + text[1]),) if text[1] else ()
    return Limits(
        (places.queries, places.keys),
        method.block,
        places.device,
        keep_keys=(*spans, *method.must_keep),
        keep_queries=spans,
        skip_keys=method.must_skip,
        diagonal=method.diagonal,
    )


class _Skipping(SitePolicy):
    making = staticmethod(_limits)

    def __init__(self, method: LiteAttention, site: AttentionSite, generation: Generation, steps: tuple) -> None:
        super().__init__(method, site, generation)
        self.steps = steps
        self.state = SkipState(generation, method.block, method.refresh, method.min_tiles)

    @property
    def nbytes(self) -> int:
        return self.state.nbytes

    def __call__(self, call: AttentionCall) -> Tensor | None:
        method, at = self.method, self.generation
        refused = call.refusal()
        if refused is not None:
            return self.leave(refused)
        if not at.active:
            return self.leave("outside of a run")
        if at.index < method.dense_steps:
            return self.leave("dense_steps")
        limits = self.made(call)
        mask = self.state.mask(call.q, call.k, limits, call.part)
        reference = self.state.reference_lse() if method.order_independent else None
        found = tile_attention(
            call.q, call.k, call.v, mask, scale=call.scale, bias=call.bias(), reference_lse=reference,
            skip_threshold=self.steps[min(at.index, len(self.steps) - 1)], return_keep=True,
            return_lse=method.order_independent, block=method.block,
        )  # fmt: skip
        self.count(mask, call)
        self.state.update(found.keep, limits, found.lse)
        return found.out


# It decides and remembers in Python at every step: in a graph each step would be a constant, and compiled anew.
_Skipping.__call__._torchdynamo_disable = True  # type: ignore[attr-defined]
