"""FoCa: forecast then calibrate (Zheng et al. 2025, arXiv 2508.16211).

Features are computed every N-th step; in between a two-step predictor and a Heun-type corrector integrate them as an
ODE. What was taken from the paper and what from cache-dit is said at `maskaccel.state.PredictCorrect`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..masks import Schedule
from ..patching.patch import Context
from ..state.forecast_foca import PredictCorrect
from ..state.history import Storage
from . import _cached


@dataclass(frozen=True)
class FoCa(_cached.CachedFeatures):
    """Integrate features between every `interval`-th step.

    Attributes:
        interval: Steps from one computation to the next (N in the paper).
        values: Computed values that the recursion goes back over, and that are remembered.
        first: Steps at the start that are computed.
        last: Steps at the end that are computed.
        level: `"stack"` forecasts what all blocks add to the residual stream; also `"block"`, `"module"`, `"output"`.
        storage: How features are kept.
    """

    interval: int = 5
    values: int = 4
    first: int = 3
    last: int = 0
    level: str = "stack"
    storage: Storage = Storage()

    name = "FoCa"
    paper = "Forecast then Calibrate: Feature Caching as ODE for Efficient Diffusion Transformers (arXiv 2508.16211)"
    models = _cached.LEVELED

    def __post_init__(self) -> None:
        self.schedule  # noqa: B018  (validates the fields when the method is made)
        self.forecaster  # noqa: B018
        _cached.check_level(self.level)

    @property
    def schedule(self) -> Schedule:
        """The step mask; the interval counts from the last of the first steps."""
        return Schedule.after_first(self.interval, self.first, self.last)

    @property
    def forecaster(self) -> PredictCorrect:
        """The predictor and corrector."""
        return PredictCorrect(self.values)

    def attach(self, context: Context) -> None:
        """Plan a history at the chosen level."""
        _cached.attach(self, context, self.level, self.schedule, self.forecaster, self.storage)
