"""FasterCache (Lv et al. 2024, arXiv 2410.19355).

Dynamic feature reuse: on every other step attention is extrapolated from its last two computed outputs,
`F = F_0 + w(t) (F_0 - F_1)`, with a weight that grows as the run progresses (eq. 7 of the paper).

CFG-Cache: the unconditional output differs from the conditional one of the same step by something that changes slowly,
its low spatial frequencies early in a run and its high ones late. Steps that compute both branches keep the difference
in two bands; the others add it to the conditional output, the low band times `low_growth` for each skipped step inside
`low_window`, the high band likewise (eqs. 9 to 11).

From the authors' code and diffusers: the disc of radius `min(H, W) // 5` that divides the bands, the windows and
factors, and that attention is computed at steps that compute both branches. Different here: what was extrapolated is
never extrapolated from again, and branches that run in calls of their own are told apart by their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..masks import Schedule, StepRule, Window
from ..masks.schedule import Position
from ..patching.patch import Context
from ..patching.transaction import PatchError
from ..state.generation import Generation
from ..state.guidance import GUIDANCE, Guidance, GuidedSite, guide
from ..state.history import Storage
from ..state.site import Site, remember
from . import _cached
from .pab import modules_by_kind

ORDERS = ("auto", "cond_first", "uncond_first")
# Models whose pipelines put the conditional half of a guided batch first; all others of diffusers put it last.
_COND_FIRST = ("DiTTransformer2DModel", "LuminaNextDiT2DModel", "ZImageTransformer2DModel")
_WINDOWS = ("attention_window", "uncond_window", "low_window", "high_window")


@dataclass(frozen=True)
class FasterCache(_cached.CachedFeatures):
    """Extrapolate attention on every other step, and compute the unconditional branch on every fifth.

    A batch counts as both branches of guidance if the model's first input is the same in its two halves (looked at once
    a run); calls of their own count if they are named `"cond"` and `"uncond"`, as diffusers' pipelines do. Without
    guidance only attention is extrapolated.

    Attributes:
        attention: Steps from one computation of self-attention to the next; None leaves attention alone.
        uncond: Steps from one computation of the unconditional branch to the next; None or 1 computes it always.
        weight: Weight of the extrapolation at the first and the last step of a run, linear in between.
        attention_window: Timesteps, 1000 (noise) to 0, in which attention is extrapolated.
        uncond_window: Timesteps in which the unconditional branch is skipped.
        low_growth: Factor of the low band for each skipped step inside `low_window`.
        low_window: Timesteps in which the low band grows.
        high_growth: Factor of the high band for each skipped step inside `high_window`.
        high_window: Timesteps in which the high band grows.
        order: Of the halves of a guided batch: `"cond_first"`, `"uncond_first"`, or `"auto"`, which is the order of the
            diffusers pipelines of the model's class.
        grid: Rows and columns of outputs that are lists of tokens, where the model is not told them (LTX and Qwen-Image
            are); None for models whose output is an image or a video.
        storage: How attention outputs are kept.
    """

    attention: int | None = 2
    uncond: int | None = 5
    weight: tuple[float, float] = (0.0, 1.0)
    attention_window: tuple[float, float] = (0.0, 681.0)
    uncond_window: tuple[float, float] = (0.0, 641.0)
    low_growth: float = 1.1
    low_window: tuple[float, float] = (99.0, 901.0)
    high_growth: float = 1.1
    high_window: tuple[float, float] = (0.0, 301.0)
    order: str = "auto"
    grid: tuple[int, int] | None = None
    storage: Storage = Storage()

    name = "FasterCache"
    paper = "FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality (arXiv 2410.19355)"
    models = "models with guidance in a batch or in named calls; attention: lists of blocks with attention children"

    def __post_init__(self) -> None:
        for name in ("attention", "uncond"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r} must be an integer, 1 or more, or None")
        if self.attention is None and self.uncond is None:
            raise ValueError("nothing to reuse: attention and uncond are None")
        for name in ("weight", *_WINDOWS):
            value = getattr(self, name)
            numbers = isinstance(value, tuple) and len(value) == 2
            if not numbers or not all(isinstance(v, int | float) and v == v for v in value):
                raise ValueError(f"{name}={value!r} must be a tuple of two numbers")
        for name in _WINDOWS:
            low, high = getattr(self, name)
            if not 0 <= low < high <= 1000:
                raise ValueError(f"{name}=({low}, {high}) must lie in 0 to 1000, low first")
        for name in ("low_growth", "high_growth"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r} must be a finite number, 0 or more")
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r}; allowed are {', '.join(map(repr, ORDERS))}")
        if self.grid is not None:
            numbers = isinstance(self.grid, tuple) and len(self.grid) == 2
            if not numbers or not all(isinstance(n, int) and n > 0 for n in self.grid):
                raise ValueError(f"grid={self.grid!r} must be two positive integers (rows, columns), or None")

    @property
    def attention_rule(self) -> StepRule:
        """The step mask of attention, apart from the steps that compute both branches."""
        return Window.around(Schedule(interval=self.attention or 1), *self.attention_window)

    @property
    def uncond_rule(self) -> StepRule:
        """The step mask of the unconditional branch."""
        return Window.around(Schedule(interval=self.uncond or 1), *self.uncond_window)

    @property
    def rules(self) -> dict[str, StepRule]:
        """The step masks of both."""
        found = {}
        if self.attention is not None:
            found["attention"] = self.attention_rule
        if self.uncond is not None:
            found["unconditional branch"] = self.uncond_rule
        return found

    def growth(self, at: Position) -> tuple[float, float]:
        """Factors of the low and the high band at a skipped step."""
        low = self.low_growth if _inside(self.low_window, at) else 1.0
        return low, self.high_growth if _inside(self.high_window, at) else 1.0

    def attach(self, context: Context) -> None:
        """Plan the memory of guidance, and one for each self-attention."""
        model = context.model
        generation = context.track_generation(self.name)
        guidance = None
        if self.uncond not in (None, 1):
            first = type(model).__name__ in _COND_FIRST if self.order == "auto" else self.order == "cond_first"
            guidance = Guidance(generation, self.uncond_rule, self.growth, cond_first=first, grid=self.grid)
            guide(model, guidance, context.transaction, self.name)
            _cached.watch(self, context, self.uncond_rule)
            context.done(self.name, model, "unconditional branch remembered")
        if self.attention is None:
            return
        modules = [module for kind, module in modules_by_kind(model) if kind in ("spatial", "temporal")]
        if not modules and guidance is None:
            raise PatchError(f"{self.name}: {type(model).__name__} has no self-attention in its blocks")
        if not modules:
            context.skip(self.name, model, "no self-attention in its blocks, so only guidance is remembered")
            return
        rule, forecaster = self.attention_rule, Extrapolation(generation, *self.weight)
        _cached.watch(self, context, rule)
        for module in modules:
            if guidance is None:
                site = Site(generation, rule, forecaster, self.storage)
            else:
                site = GuidedSite(guidance, rule, forecaster, self.storage)
            remember(module, site, context.transaction, self.name)
            context.done(self.name, module, "extrapolated")

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """Calls computed and reused, of attention and of the unconditional branch; bytes held now and at most."""
        found = super().activity(model)
        guidance: Guidance | None = model.__dict__.get(GUIDANCE)
        if guidance is not None:
            found |= {"unconditional computed": guidance.computed, "unconditional reused": guidance.reused}
            found["bytes held"] += guidance.nbytes
            found["reused"] += guidance.reused
        return found


@dataclass
class Extrapolation:
    """`F_0 + w (F_0 - F_1)` with a weight that is linear in the progress of the run.

    Attributes:
        generation: The run.
        start: Weight at its first step.
        end: Weight at its last step.
    """

    generation: Generation
    start: float
    end: float

    capacity = 2

    def weights(self, stamps: Any, target: float, values: Any = None) -> list[float]:
        """The weights of the last two values; the newest alone while there is no other."""
        if len(stamps) < 2:
            return [1.0]
        run, w = self.generation, self.start
        if self.start != self.end:
            if run.num_steps is None:
                raise ValueError("FasterCache needs the number of steps; pass it to generation(num_steps=...)")
            w += (self.end - self.start) * (run.index + run.offset) / max(run.num_steps + run.offset - 1, 1)
        return [1.0 + w, -w]


def _inside(window: tuple[float, float], at: Position) -> bool:
    return window == (0, 1000) or window[0] <= at.timestep <= window[1]
