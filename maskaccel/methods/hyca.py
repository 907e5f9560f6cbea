"""HyCa: let features decide their own solvers (arXiv 2510.04188).

Channels of a feature move differently: some hardly, some along curves. Each is taken for the solution of an ODE of its
own and continued between computed steps by its own solver, `F[d] = sum_k W[s(d)][k] * H_k[d]`. Which solver a channel
has is found once for a model, by clustering its channels (`maskaccel.calibration`, kind `"hyca"`); the paper finds it
to depend little on prompt, step and resolution. As a reused step computes nothing, every solver comes down to weights
of remembered values (`state.forecast_channels`), so a forecast costs what TaylorSeer's does.

Inferred, as no code is public: the coefficients of the solvers, and that the first steps are computed as in TaylorSeer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration.file import Calibration, calibration_of
from ..masks import Schedule
from ..patching.patch import Context
from ..patching.transaction import PatchError
from ..state.forecast_channels import PerChannel
from ..state.history import Storage
from . import _cached


@dataclass(frozen=True)
class HyCa(_cached.CachedFeatures):
    """Forecast each channel with the solver that suits it, between every `interval`-th step.

    Attributes:
        calibration: A `Calibration` of kind `"hyca"`, or the path of one; it also says whether what all blocks add is
            remembered together (`level="stack"`) or by block.
        interval: Steps from one computation to the next (the paper: 6 and 7 for FLUX, 6 for HunyuanVideo, 6 to 8 for
            Qwen-Image).
        first: Steps at the start that are computed.
        last: Steps at the end that are computed.
        storage: How features are kept.
    """

    calibration: str | Path | Calibration
    interval: int = 6
    first: int = 3
    last: int = 0
    storage: Storage = Storage()

    name = "HyCa"
    paper = (
        "Let Features Decide Their Own Solvers: Hybrid Feature Caching for Diffusion Transformers (arXiv 2510.04188)"
    )
    models = _cached.STACKS

    def __post_init__(self) -> None:
        self.schedule  # noqa: B018  (validates the fields when the method is made)
        if isinstance(self.calibration, Calibration):
            self.calibration.checked("hyca")
        elif not isinstance(self.calibration, str | Path):
            raise TypeError(f"calibration={self.calibration!r} must be a Calibration or the path of one")

    @property
    def schedule(self) -> Schedule:
        """The step mask; the interval counts from the last of the first steps."""
        return Schedule.after_first(self.interval, self.first, self.last)

    def attach(self, context: Context) -> None:
        """Plan a memory with the solvers of the calibration."""
        model = type(context.model).__name__
        try:
            found = calibration_of(self.calibration, "hyca", context.model)
        except (ValueError, OSError) as error:
            raise PatchError(f"{self.name}: {error}") from None
        stacks = _cached.attach_stack(self, context, self.schedule, None, self.storage, each=found["level"] == "block")
        features = [segment.feature for stack in stacks for segment in stack.segments]
        channels = found["channels"]
        if len(features) != len(channels):
            raise PatchError(
                f"{self.name}: the calibration is of {len(channels)} features; this {model} has {len(features)}"
            )
        for feature, digits in zip(features, channels, strict=True):
            feature.forecaster = PerChannel(found["solvers"], tuple(map(int, digits)))

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """Calls computed and reused, channels of each solver, and bytes held now and at most."""
        found = super().activity(model)
        counts: dict[str, int] = {}
        for stack in _cached.stacks_of(model):
            for one in (segment.feature.forecaster for segment in stack.segments):
                if isinstance(one, PerChannel):
                    for i in one.channels:
                        counts[one.solvers[i]] = counts.get(one.solvers[i], 0) + 1
        found["channels"] = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        return found
