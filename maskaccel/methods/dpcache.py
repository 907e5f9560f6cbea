"""DPCache (Cui et al. 2026, arXiv 2602.22654): the computed steps are a shortest path over measured forecast errors.

One calibration run says what a forecast from any two computed steps would have lost at any later one, and dynamic
programming places the computed steps (`masks.paths`). All is known before the run: no signal, nothing to wait for. The
paper measures errors of samples one by one; here they are norms over all samples and tokens of the calibration, which
follow from the inner products of its steps and fit any budget and forecaster.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..calibration.file import Calibration, calibration_of
from ..masks.paths import Paths
from ..patching.patch import Context
from ..patching.transaction import PatchError
from ..state.forecast import Forecaster, Newton
from ..state.history import Storage
from . import _cached


@dataclass(frozen=True)
class DPCache(_cached.CachedFeatures):
    """Forecast what all blocks add between the steps that lose least.

    Attributes:
        calibration: A `Calibration` of kind `"products"`, or the path of one.
        refresh: Steps for each computed one: `floor(N / refresh)` of N steps are computed, the first one among them.
        forecaster: Of one or two values: `Newton()` is the line through the last two, `Hold()` the last one.
        storage: How features are kept.
    """

    calibration: str | Path | Calibration
    refresh: float = 4
    forecaster: Forecaster = Newton()
    storage: Storage = Storage()

    name = "DPCache"
    paper = "Denoising as Path Planning: Training-Free Acceleration with DPCache (arXiv 2602.22654)"
    models = _cached.STACKS

    def __post_init__(self) -> None:
        Paths(((1.0,),), self.refresh, self.forecaster)  # validates the fields
        if not isinstance(self.calibration, Calibration | str | Path):
            raise TypeError(f"calibration={self.calibration!r} must be a Calibration or the path of one")

    @property
    def schedule(self) -> Paths:
        """The step mask.

        Raises:
            ValueError: The calibration is of another kind or version.
        """
        return self.schedule_for(None)

    def schedule_for(self, model: nn.Module | str | None) -> Paths:
        """The step mask for a model, or a class of that name, whose calibration it has to be."""
        found = calibration_of(self.calibration, "products", model)
        return Paths(found["products"], self.refresh, self.forecaster)

    def attach(self, context: Context) -> None:
        """Plan a memory of what all blocks add."""
        try:
            rule = self.schedule_for(context.model)
        except (ValueError, OSError) as error:
            raise PatchError(f"{self.name}: {error}") from None
        _cached.attach_stack(self, context, rule, self.forecaster, self.storage)
