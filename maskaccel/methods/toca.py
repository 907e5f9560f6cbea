"""ToCa: token-wise feature caching (Zou et al. 2024, arXiv 2410.05317).

Between computed steps attention is held, and MLPs (cross-attention too) compute the tokens that matter most; the
others are taken from memory, which keeps what is fresh. A token's score is (section 3.3 of the paper)

    S = s1 or s2 + age_weight * s3, the best token of each cell of the image raised by the share `bonus` (s4)

with s1 the attention that the token receives, s2 the entropy of its cross-attention (both of the last computed step,
scaled to length 1 over the tokens) and s3 the steps since it was computed, over the interval. Of N tokens the layer l
of L computes the share

    ratio * (1 + layer_weight * (1 - 2 l / (L - 1))) * (1 - step_weight * (1 - 2 (i + 1) / S)) * factor of the module

at step i of S, clamped to 0 to 1.

From the authors' code: these shares; that self-attention is never computed in part; the length of the cycles. Defaults
are those for DiT with 50 DDIM steps. Others of theirs:

    DiT, 250 steps  interval=4, step_weight=0.4, layer_weight=0.8
    PixArt-alpha    ratio=0.3, score="cross", bonus=0.4, cell=4, mlp=1.6, cross=0.6, step_weight=-0.9,
                    layer_weight=0.6, drift=0.2, dense=None
    FLUX            interval=4, first=3, ratio=0.1, bonus=0, mlp=0.4, single=1.6, step_weight=0, layer_weight=0.5,
                    drift=0, dense=None

Different here: cycles count from the last computed step (DiT's code counts the steps to the end of the run); every
sample of a batch has tokens of its own (PixArt's code averages the scores of the guided pair); the bonus is left out
where the tokens are no grid of whole cells.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..masks import Action, Cycle, Schedule, StepRule
from ..models._joint import text_first
from ..patching.patch import Context
from ..patching.transaction import PatchError
from ..state.attention_scores import AttentionScores, entropy, received, small_values
from ..state.generation import Generation
from ..state.history import Storage
from . import _cached
from ._partial import Parts, attach_parts, parts_of
from ._scored import TopTokens

MEASURES = {"attention": received, "cross": entropy, "value": small_values}
SCORES = ("random", *MEASURES)


@dataclass(frozen=True)
class ToCa(_cached.CachedFeatures):
    """Compute the most important tokens between computed steps.

    Attributes:
        interval: Steps from one computed step to the next, in the middle of the run (N in the paper).
        first: Steps at the start that are computed.
        ratio: Share of the tokens that is computed (R; the paper gives the caching ratio, 1 - R).
        score: `"attention"` is s1, `"cross"` s2 (for models with cross-attention), `"value"` prefers small value
            vectors (DuCa's), `"random"` needs no attention at all. All but the last need attention that runs through
            torch's `scaled_dot_product_attention`.
        age_weight: Weight of s3.
        bonus: Share of its own score that the best token of a cell gets on top.
        cell: Tokens along each side of a cell.
        grid: Tokens of the image down and across (of a video: of all frames, one below the other); None takes a square.
        step_weight: How the share changes over the run: towards its end, or, if negative, its start.
        layer_weight: How the share changes over the layers: towards the first, or, if negative, the last.
        mlp: Factor of MLPs.
        cross: Factor of cross-attention.
        single: Factor of single-stream blocks whose attention and MLP share a projection.
        drift: By which share of itself the interval grows towards the start of the run, and shrinks towards its end.
        dense: Part of the run (from, to; 0 to 1) with an interval of two; None has none.
        seed: Of random scores.
        storage: How features are kept.
    """

    interval: int = 3
    first: int = 1
    ratio: float = 0.07
    score: str = "attention"
    age_weight: float = 0.25
    bonus: float = 0.6
    cell: int = 2
    grid: tuple[int, int] | None = None
    step_weight: float = 2.0
    layer_weight: float = -0.2
    mlp: float = 2.5
    cross: float = 0.6
    single: float = 1.6
    drift: float = 0.4
    dense: tuple[float, float] | None = (0.6, 0.8)
    seed: int = 0
    storage: Storage = Storage()

    name = "ToCa"
    paper = "Accelerating Diffusion Transformers with Token-wise Feature Caching (arXiv 2410.05317)"
    models = "lists of blocks with MLPs by token; scores: attention through scaled_dot_product_attention"
    between: ClassVar[tuple[Action, ...]] = ("partial",)

    def __post_init__(self) -> None:
        self.schedule  # noqa: B018  (validates the fields when the method is made)
        if self.score not in SCORES:
            raise ValueError(f"score={self.score!r}; allowed are {', '.join(map(repr, SCORES))}")
        if not isinstance(self.ratio, int | float) or not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio!r} must be a number from 0 to 1")
        for name in ("age_weight", "bonus", "mlp", "cross", "single"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r} must be a finite number, 0 or more")
        for name in ("step_weight", "layer_weight"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r} must be a finite number")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed={self.seed!r} must be an integer")
        if self.grid is not None and not isinstance(self.grid, tuple):
            raise ValueError(f"grid={self.grid!r} must be two integers, 1 or more, or None")
        sizes = (self.cell, *(self.grid or ()))
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in sizes) or len(sizes) != (
            1 if self.grid is None else 3
        ):
            raise ValueError(f"cell={self.cell!r} and both entries of grid={self.grid!r} must be integers, 1 or more")

    @property
    def schedule(self) -> StepRule:
        """The step mask."""
        if not self.drift and self.dense is None:
            origin = self.first - 1 if self.first == int(self.first) else 0
            return Schedule(self.interval, self.first, between=self.between, origin=origin)
        return Cycle(self.interval, self.first, self.drift, self.dense, self.between)

    def share(self, at: Generation, layer: int, layers: int, kind: str) -> float:
        """The share of the tokens that a module computes at a step in part.

        Raises:
            ValueError: The number of steps is needed and unknown.
        """
        factor = {"cross": self.cross, "single": self.single}.get(kind, self.mlp)
        depth = 1 + self.layer_weight * (1 - 2 * layer / max(layers - 1, 1))
        time = 1.0
        if self.step_weight:
            if at.num_steps is None:
                raise ValueError(f"{self.name} needs the number of steps; pass it to generation(num_steps=...)")
            progress = (at.index + at.offset + 1) / (at.num_steps + at.offset)
            time = 1 - self.step_weight * (1 - 2 * progress)
        return min(max(self.ratio * depth * time * factor, 0.0), 1.0)

    def attach(self, context: Context) -> None:
        """Plan a memory for the modules of every block, and the choice of tokens.

        Raises:
            PatchError: The model has no MLP that is known, or not the attention that the score needs.
        """
        found = parts_of(self, context)
        generation = context.track_generation(self.name)
        numbers = itertools.count()
        for parts in found:
            scores, source = None, self._source(parts)
            if parts.rows and source is not None:
                scores = AttentionScores(generation, MEASURES[self.score])
            by_module = {} if scores is None or source is None else {id(source): scores}
            choose = functools.partial(TopTokens.of, self, generation, numbers, scores, parts, len(found))
            attach_parts(self, context, parts, self.schedule, choose, storage=self.storage, scores=by_module)

    def _source(self, parts: Parts) -> nn.Module | None:
        """The attention module that the scores of a block come from."""
        if self.score == "random" or not parts.rows:
            return None
        source = parts.only("cross") if self.score == "cross" else next(iter(parts.attention), None)
        block = type(parts.block).__name__
        if source is None:
            kind = "cross-attention" if self.score == "cross" else "self-attention"
            raise PatchError(f"{self.name}: {block} has no {kind}, which score={self.score!r} needs; try 'random'")
        if parts.only("text") is not None and text_first(parts.block) is None:
            raise PatchError(
                f"{self.name}: it is not known in which order {block} joins its streams, which score={self.score!r} "
                "needs; try 'random'"
            )
        return source


__all__ = ["ToCa"]
