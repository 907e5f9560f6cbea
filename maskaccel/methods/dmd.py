"""Dynamic mode decomposition as a forecast of features between computed steps (a calibrator of cache-dit).

Features are computed every N-th step; in between they follow the exponentials that fit the last computed values
(Schmid 2010). Only the inner products of these are needed: see `maskaccel.state.DynamicModes`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..masks import Schedule
from ..patching.patch import Context
from ..state.forecast_dmd import DynamicModes
from ..state.history import Storage
from . import _cached


@dataclass(frozen=True)
class DMD(_cached.CachedFeatures):
    """Follow the modes of features between every `interval`-th step.

    Attributes:
        interval: Steps from one computation to the next.
        snapshots: Computed values that are remembered, 4 or more.
        first: Steps at the start that are computed. The decomposition needs 4 equally spaced values: the first 4, then
            again 3 computed steps after them; until then a line forecasts.
        last: Steps at the end that are computed.
        rank: Modes, at most; 0 finds them by the singular values.
        per_sample: Fit each sample of a batch by itself; else the batch as a whole.
        level: `"stack"` forecasts what all blocks add to the residual stream, `"block"` each block.
        storage: How features are kept.
    """

    interval: int = 3
    snapshots: int = 6
    first: int = 4
    last: int = 0
    rank: int = 0
    per_sample: bool = True
    level: str = "stack"
    storage: Storage = Storage()

    name = "DMD"
    paper = "Dynamic mode decomposition of numerical and experimental data (Schmid 2010), as cache-dit applies it"
    models = _cached.STACKS

    def __post_init__(self) -> None:
        self.schedule  # noqa: B018  (validates the fields when the method is made)
        self.forecaster  # noqa: B018
        _cached.check_level(self.level, ("stack", "block"))

    @property
    def schedule(self) -> Schedule:
        """The step mask; the interval counts from the last of the first steps."""
        return Schedule.after_first(self.interval, self.first, self.last)

    @property
    def forecaster(self) -> DynamicModes:
        """The decomposition."""
        return DynamicModes(self.snapshots, self.rank, per_sample=self.per_sample)

    def attach(self, context: Context) -> None:
        """Plan a history at the chosen level."""
        _cached.attach(self, context, self.level, self.schedule, self.forecaster, self.storage)
