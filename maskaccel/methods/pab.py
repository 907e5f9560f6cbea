"""Pyramid Attention Broadcast (Zhao et al. 2024, arXiv 2408.12588).

The outputs of attention differ little between neighbouring steps in the middle of a run, least of all those of
cross-attention, most of all those of spatial attention. So within a window of timesteps each kind is computed on every
`range`-th step and held in between (section 3.2 and table 1 of the paper: the "pyramid" of ranges).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..masks import Schedule, Window
from ..models._adapter import children_of
from ..patching.patch import Context
from ..patching.transaction import PatchError
from ..state.history import Storage
from . import _cached

KINDS = ("spatial", "temporal", "cross", "mlp")


@dataclass(frozen=True)
class PAB(_cached.CachedFeatures):
    """Hold the outputs of attention inside a window of timesteps, for a range of steps of each kind.

    Within the window a module is computed at the steps whose number is a multiple of its range; outside it always is.
    Guidance branches that run in calls of their own each hold their own outputs.

    Attributes:
        spatial: Range of self-attention, joint attention included; 1 computes always, None leaves the kind alone.
        temporal: Range of self-attention in lists of temporal blocks (Latte, Open-Sora).
        cross: Range of cross-attention.
        mlp: Range of the MLPs; None, as in the paper's main results, leaves them alone.
        low: Smallest timestep of the window (450 to 930 is the paper's for Open-Sora; its authors' code has 100 to 800
            for Latte, with ranges 2, 3 and 6, and 100 to 850 for CogVideoX). With 0, and `high=1000`, the timesteps of
            the run are not needed.
        high: Largest timestep of the window.
        storage: How outputs are kept.
    """

    spatial: int | None = 2
    temporal: int | None = 4
    cross: int | None = 6
    mlp: int | None = None
    low: float = 450.0
    high: float = 930.0
    storage: Storage = Storage()

    name = "PAB"
    paper = "Real-Time Video Generation with Pyramid Attention Broadcast (arXiv 2408.12588)"
    models = "lists of blocks with attention (or MLP) children"

    def __post_init__(self) -> None:
        for kind in KINDS:
            value = getattr(self, kind)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{kind}={value!r} must be an integer, 1 or more, or None")
        if all(getattr(self, kind) is None for kind in KINDS):
            raise ValueError(f"nothing to hold: all of {', '.join(KINDS)} are None")
        Window(Schedule(), self.low, self.high)

    def rule(self, kind: str) -> Schedule | Window | None:
        """The step mask of one kind of module (`"spatial"`, `"temporal"`, `"cross"`, `"mlp"`); None leaves it alone."""
        value = getattr(self, kind)
        return None if value is None else Window.around(Schedule(interval=value), self.low, self.high)

    @property
    def rules(self) -> dict[str, Schedule | Window]:
        """The step mask of each kind that has a range."""
        found = {kind: self.rule(kind) for kind in KINDS}
        return {kind: rule for kind, rule in found.items() if rule is not None}

    def attach(self, context: Context) -> None:
        """Plan a memory for each module of the kinds that have a range."""
        kinds: dict[str, list[nn.Module]] = {}
        for kind, module in modules_by_kind(context.model):
            kinds.setdefault(kind, []).append(module)
        wanted = [kind for kind in KINDS if getattr(self, kind) is not None]
        if not any(kind in kinds for kind in wanted):
            raise PatchError(f"{self.name}: {type(context.model).__name__} has no modules of kind {', '.join(wanted)}")
        for kind in wanted:
            rule = self.rule(kind)
            if rule is not None and kind in kinds:
                _cached.remember_modules(
                    self, context, kinds[kind], rule, storage=self.storage, action=f"held ({kind})"
                )  # fmt: skip


def modules_by_kind(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The attention and MLP modules of every block, with their kind."""
    names = {id(module): path for path, module in model.named_modules()}
    for blocks in _cached.block_lists(model):
        temporal = "temporal" in names[id(blocks)]
        for block in blocks:
            for module in children_of(block, _cached.SELF_ATTENTION):
                yield "temporal" if temporal else "spatial", module
            for module in children_of(block, _cached.CROSS_ATTENTION):
                # A second self-attention (SD3.5's dual attention) says of itself that it attends to no other stream.
                crossing = getattr(module, "is_cross_attention", True)
                yield "cross" if crossing else "temporal" if temporal else "spatial", module
            for module in children_of(block, _cached.MLPS):
                yield "mlp", module
