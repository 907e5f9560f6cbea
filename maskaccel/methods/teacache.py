"""TeaCache (Liu et al. 2024, arXiv 2411.19108): the first block's modulated input says how much the output moves.

`d = mean|F_t - F_(t-1)| / mean|F_(t-1)|` (eq. 5) of the modulated input F, rescaled by a polynomial fitted to the
model's outputs (eq. 7), is accumulated since the last computed step; while the sum is below a threshold (eq. 6), what
all blocks added then is added again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..calibration.file import Calibration, calibration_of, class_name
from ..masks.signal import Signal
from ..models._modulated import modulated_tap, time_tap
from ..patching.patch import Context
from ..patching.transaction import PatchError
from ..state.forecast import Forecaster, Hold
from ..state.history import Storage
from . import _cached

# Published fits, highest degree first (github.com/ali-vilab/TeaCache).
POLYNOMIALS = {
    "flux": (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01),
    "hunyuan-video": (7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02),
    "ltx": (2.14700694e01, -1.28016453e01, 2.31279151e00, 7.92487521e-01, 9.69274326e-03),
    "mochi": (-3.51241319e03, 8.11675948e02, -6.09400215e01, 2.42429681e00, 3.05291719e-03),
    "cosmos": (2.71156237e02, -9.19775607e01, 2.24437250e00, 2.08355751e00, 1.41776330e-01),
    "lumina2": (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
    "consisid": (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02),
}
_OF_CLASS = {
    "FluxTransformer2DModel": "flux",
    "HunyuanVideoTransformer3DModel": "hunyuan-video",
    "LTXVideoTransformer3DModel": "ltx",
    "MochiTransformer3DModel": "mochi",
    "CosmosTransformer3DModel": "cosmos",
    "Lumina2Transformer2DModel": "lumina2",
    "ConsisIDTransformer3DModel": "consisid",
}


@dataclass(frozen=True)
class TeaCache(_cached.CachedFeatures):
    """Reuse what all blocks add until the modulated input has moved enough.

    Attributes:
        threshold: Accumulated rescaled change at which a step is computed (FLUX in the paper's code: 0.25, 0.4, 0.6,
            0.8 for speed-ups of 1.5 to 2.25).
        polynomial: Applied to the relative change: coefficients, highest degree first; the name of a published fit; a
            `Calibration` of kind `"teacache"` or the path of one. None takes the published fit of the model's class,
            or the identity where there is none (the report says so).
        tap: `"modulated"` watches the modulated input of the first block; `"time"` the time embedding, which does not
            depend on the sample.
        first: Steps at the start that are computed.
        last: Steps at the end that are computed.
        max_consecutive: Most reused steps in a row; None is unlimited.
        forecaster: Of what the blocks add; the paper holds the last one.
        reduce: `"sample"` decides for every sample of a batch by itself; `"mean"` for the batch, as the paper's code;
            `"any"` computes the batch if one sample has to be computed.
        storage: How features are kept.
    """

    threshold: float = 0.25
    polynomial: tuple[float, ...] | str | Path | Calibration | None = None
    tap: str = "modulated"
    first: int = 1
    last: int = 1
    max_consecutive: int | None = None
    forecaster: Forecaster = Hold()
    reduce: str = "sample"
    storage: Storage = Storage()

    name = "TeaCache"
    paper = "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model (arXiv 2411.19108)"
    models = "stacks whose first block is of a known kind: Flux, SD3, Wan, Qwen-Image, LTX, HunyuanVideo, DiT, ..."

    def __post_init__(self) -> None:
        if self.tap not in ("modulated", "time"):
            raise ValueError(f"tap={self.tap!r}; allowed are 'modulated' and 'time'")
        self.signal  # noqa: B018  (validates the fields when the method is made)

    @property
    def signal(self) -> Signal:
        """The step mask, without a model to take a published fit for."""
        return self.signal_for(None)

    def signal_for(self, model: nn.Module | str | None) -> Signal:
        """The step mask for a model, or a class of that name."""
        return Signal(
            self.threshold, "previous", self._coefficients(model), accumulate=True, first=self.first, last=self.last,
            max_consecutive=self.max_consecutive, reduce=self.reduce,  # type: ignore[arg-type]
        )  # fmt: skip

    def _coefficients(self, model: nn.Module | str | None) -> tuple[float, ...]:
        given = self.polynomial
        if given is None:
            # The published fits are of the modulated input.
            return POLYNOMIALS.get(_OF_CLASS.get(class_name(model) or "", ""), ()) if self.tap == "modulated" else ()
        if isinstance(given, str) and given in POLYNOMIALS:
            return POLYNOMIALS[given]
        if isinstance(given, tuple):
            return given
        found = calibration_of(given, "teacache", model, field="polynomial", names=POLYNOMIALS)
        if found["tap"] != self.tap:
            raise ValueError(f"the calibration is of tap={found['tap']!r}, the method watches tap={self.tap!r}")
        return found["polynomial"]

    def attach(self, context: Context) -> None:
        """Plan a memory of what all blocks add, and the signal at the first block."""
        model = type(context.model).__name__
        block = _cached.segments_of(self, context.model)[0][0][0]
        try:
            tap = modulated_tap(block) if self.tap == "modulated" else time_tap(block)
        except LookupError as error:
            raise PatchError(
                f"{self.name}: {error}; FBCache watches what the first block adds, which any model has"
            ) from None
        try:
            signal = self.signal_for(context.model)
        except ValueError as error:
            raise PatchError(f"{self.name}: {error}") from None
        if not signal.polynomial:
            context.report.notes.append(
                f"{self.name}: no polynomial for {model}, so the change itself is accumulated; "
                "`maskaccel calibrate teacache` fits one"
            )
        _cached.attach_stack(self, context, signal, self.forecaster, self.storage, tap=tap)
