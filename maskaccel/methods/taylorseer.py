"""TaylorSeer: from reusing to forecasting (Liu et al. 2025, arXiv 2503.06923).

Features are computed every N-th step; in between they are extrapolated by a Taylor series whose derivatives are finite
differences of the computed steps (eqs. 3 to 5).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..masks import Schedule
from ..patching.patch import Context
from ..state.forecast import Newton, Taylor
from ..state.history import Storage
from . import _cached


@dataclass(frozen=True)
class TaylorSeer(_cached.CachedFeatures):
    """Extrapolate features between every `interval`-th step.

    Attributes:
        interval: Steps from one computation to the next (N in the paper).
        order: Order of the series; needs `order + 1` remembered values.
        first: Steps at the start that are computed (the paper: 3 for FLUX, 2 for DiT, 1 for HunyuanVideo).
        last: Steps at the end that are computed.
        level: `"stack"` extrapolates what all blocks add to the residual stream; `"module"` is the paper's: attention
            and MLP outputs, with the gates of the current step, at the memory of all of them. Also `"block"` and
            `"output"`.
        newton: Use the polynomial through the remembered values instead of the paper's ladder; exact on polynomials of
            the order, also for uneven steps.
        storage: How features are kept.
    """

    interval: int = 5
    order: int = 1
    first: int = 3
    last: int = 0
    level: str = "stack"
    newton: bool = False
    storage: Storage = Storage()

    name = "TaylorSeer"
    paper = "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers (arXiv 2503.06923)"
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
    def forecaster(self) -> Taylor | Newton:
        """The series."""
        return Newton(self.order) if self.newton else Taylor(self.order)

    def attach(self, context: Context) -> None:
        """Plan a history at the chosen level."""
        _cached.attach(self, context, self.level, self.schedule, self.forecaster, self.storage)
