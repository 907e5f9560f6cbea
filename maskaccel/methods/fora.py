"""FORA: fast-forward caching (Selvaraju et al. 2024, arXiv 2407.01425).

Attention and MLP outputs of every layer are computed on every N-th step and held in between; the adaLN gates are
always those of the current step: `x += gate_msa(t) * attn_cached`, `x += gate_mlp(t) * mlp_cached`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..masks import Schedule
from ..patching.patch import Context
from ..state.history import Storage
from . import _cached


@dataclass(frozen=True)
class FORA(_cached.CachedFeatures):
    """Hold attention and MLP outputs between every `interval`-th step.

    Attributes:
        interval: Steps from one computation to the next (N in the paper); 1 computes always.
        first: Steps at the start that are computed (the paper computes the first).
        last: Steps at the end that are computed (the paper: none).
        level: `"module"` as in the paper; `"block"`, `"stack"` or `"output"` hold what a block, all blocks or the model
            give, at a fraction of the memory and with the gates of the computed step; `"kv"` holds keys and values,
            which the queries of every step attend to.
        storage: How features are kept.
    """

    interval: int = 3
    first: int = 1
    last: int = 0
    level: str = "module"
    storage: Storage = Storage()

    name = "FORA"
    paper = "FORA: Fast-Forward Caching in Diffusion Transformer Acceleration (arXiv 2407.01425)"
    models = _cached.LEVELED

    def __post_init__(self) -> None:
        self.schedule  # noqa: B018  (validates the fields when the method is made, not when it is used)
        _cached.check_level(self.level)

    @property
    def schedule(self) -> Schedule:
        """The step mask."""
        return Schedule(interval=self.interval, first=self.first, last=self.last)

    def attach(self, context: Context) -> None:
        """Plan a memory for the attention and MLP of every block."""
        _cached.attach(self, context, self.level, self.schedule, storage=self.storage)
