"""MagCache (Ma et al. 2025, arXiv 2506.09045): the magnitude of the residual says how many steps may be reused.

The ratio of the residual's norm between consecutive steps hardly depends on the prompt, so one run of a model gives a
table of ratios, and the accumulated error `sum |1 - prod ratios|` of reusing is known for every step beforehand. The
whole schedule follows from the table: no signal is computed, and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..calibration.file import Calibration, calibration_of, class_name
from ..masks.planned import Magnitudes
from ..patching.patch import Context
from ..patching.transaction import PatchError
from ..state.forecast import Forecaster, Hold
from ..state.history import Storage
from . import _cached

# Published ratios of 28 steps (github.com/Zehong-Ma/MagCache).
RATIOS = {
    "flux": (
        1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562,
        1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359,
        0.89062,
    ),
    "flux-kontext": (
        1.0, 1.19531, 1.07812, 1.02344, 1.03125, 1.00781, 1.02344, 1.01562, 1.01562, 1.0, 1.01562, 1.0, 1.00781, 1.0,
        1.00781, 1.0, 1.00781, 0.99609, 1.01562, 0.99219, 1.0, 0.99219, 0.98438, 0.99609, 0.96484, 0.96094, 0.9375,
        0.93359,
    ),
}  # fmt: skip
_OF_CLASS = {"FluxTransformer2DModel": "flux"}


@dataclass(frozen=True)
class MagCache(_cached.CachedFeatures):
    """Reuse what all blocks add for as many steps as the model's magnitude ratios allow.

    Attributes:
        threshold: Largest accumulated error of a reused step.
        max_consecutive: Most reused steps in a row (K in the paper).
        retention: Part of the steps at the start that is always computed.
        ratios: The table: numbers (one a step), `"flux"` or `"flux-kontext"`, a `Calibration` of kind `"magnitudes"` or
            the path of one. None takes the published table of the model's class, if there is one.
        forecaster: Of the residual; the paper holds the last one.
        storage: How features are kept.
    """

    threshold: float = 0.06
    max_consecutive: int = 3
    retention: float = 0.2
    ratios: tuple[float, ...] | str | Path | Calibration | None = None
    forecaster: Forecaster = Hold()
    storage: Storage = Storage()

    name = "MagCache"
    paper = "MagCache: Fast Video Generation with Magnitude-Aware Cache (arXiv 2506.09045)"
    models = _cached.STACKS

    def __post_init__(self) -> None:
        Magnitudes((1.0,), self.threshold, self.max_consecutive, self.retention)  # validates the fields
        if self.ratios is not None:
            self.schedule  # noqa: B018

    @property
    def schedule(self) -> Magnitudes:
        """The step mask.

        Raises:
            ValueError: There are no ratios.
        """
        return self.schedule_for(None)

    def schedule_for(self, model: nn.Module | str | None) -> Magnitudes:
        """The step mask for a model, or a class of that name."""
        name = class_name(model)
        ratios = self.ratios if self.ratios is not None else _OF_CLASS.get(name or "")
        if ratios is None:
            raise ValueError(
                f"there are no magnitude ratios for {name or 'no model'}: measure them with `maskaccel calibrate "
                f"magnitudes` and pass ratios='file.json', or name a table: {', '.join(RATIOS)}"
            )
        if isinstance(ratios, str) and ratios in RATIOS:
            ratios = RATIOS[ratios]
        if not isinstance(ratios, tuple):
            ratios = calibration_of(ratios, "magnitudes", model, field="ratios", names=RATIOS)["ratios"]
        return Magnitudes(ratios, self.threshold, self.max_consecutive, self.retention)

    def attach(self, context: Context) -> None:
        """Plan a memory of what all blocks add."""
        try:
            rule = self.schedule_for(context.model)
        except ValueError as error:
            raise PatchError(f"{self.name}: {error}") from None
        _cached.attach_stack(self, context, rule, self.forecaster, self.storage)
