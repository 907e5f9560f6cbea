"""What a scheduler makes of a model's output: which ones may be given outputs of earlier steps, and clean estimates.

A step in which some tokens keep the output of an earlier step is right for a solver that reads the current output
alone. One that mixes outputs of several steps would mix outputs of different noise levels, each token by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Solvers whose step is a function of the current output, and how their latents are scaled.
_FLOW, _PRESERVING, _EXPLODING = "flow", "variance preserving", "variance exploding"
_SOLVERS = {
    "FlowMatchEulerDiscreteScheduler": _FLOW,
    "DDIMScheduler": _PRESERVING,
    "CogVideoXDDIMScheduler": _PRESERVING,
    "EulerDiscreteScheduler": _EXPLODING,
}
_NOISY = ("Ancestral", "DDPM", "SDE", "LCM", "TCD", "Cosine")
# Arguments of `step` that make a solver add noise, where they are above 0.
_NOISE_ARGUMENTS = ("eta", "s_churn")


def _family(scheduler: Any) -> str | None:
    """How the latents of a known solver are scaled; None for any other."""
    for base in type(scheduler).__mro__:
        if base.__name__ in _SOLVERS and base.__module__.startswith("diffusers."):
            return _SOLVERS[base.__name__] if type(scheduler).step is base.step else None  # type: ignore[attr-defined]
    return None


def refusal(scheduler: Any) -> str | None:
    """Why a scheduler cannot be given outputs of earlier steps for some tokens; None if it can."""
    name = type(scheduler).__name__
    if _family(scheduler) is None:
        if any(word in name for word in _NOISY):
            why = "adds noise at every step"
        elif name.endswith("Scheduler") and type(scheduler).__module__.startswith("diffusers."):
            why = "mixes the outputs of several steps"
        else:
            why = "is not known to step from the current output alone"
    elif getattr(scheduler.config, "stochastic_sampling", False):
        name, why = f"{name} with stochastic_sampling=True", "adds noise at every step"
    else:
        return None
    known = ", ".join(_SOLVERS)
    return f"{name} {why}, and tokens that are not computed keep the output of an earlier step; use one of {known}"


def noise_argument(given: Mapping[str, Any]) -> str | None:
    """The argument of one call of a scheduler's `step` that makes it add noise, or None."""
    return next((f"{name}={given[name]}" for name in _NOISE_ARGUMENTS if (given.get(name) or 0) > 0), None)


@dataclass(frozen=True)
class Point:
    """The noise level of one step: latents are `(signal * clean + noise * eps) / scale`.

    Attributes:
        signal: Factor of the clean latents.
        noise: Factor of the noise.
        predicts: What the model gives: `"flow"` (`eps - clean`), `"epsilon"`, `"v_prediction"` or `"sample"`.
        scale: Factor that brings latents to this form; 1 unless their variance explodes.
    """

    signal: float
    noise: float
    predicts: str = "flow"
    scale: float = 1.0

    @classmethod
    def of(cls, scheduler: Any, timestep: Any = None, index: int | None = None) -> Point:
        """Where a known scheduler stands, before its step.

        Args:
            scheduler: One that `refusal` accepts.
            timestep: What its step is given; for schedulers with a table over timesteps.
            index: Number of the step; None is the scheduler's own.
        """
        family = _family(scheduler)
        if family == _PRESERVING:
            alpha = float(scheduler.alphas_cumprod[int(timestep)])
            return cls(alpha**0.5, (1 - alpha) ** 0.5, scheduler.config.prediction_type)
        if index is None:
            if scheduler.step_index is None:
                scheduler._init_step_index(timestep)
            index = scheduler.step_index
        sigma = float(scheduler.sigmas[index])
        if family == _EXPLODING:
            scale = (sigma**2 + 1) ** -0.5
            return cls(scale, sigma * scale, scheduler.config.prediction_type, scale)
        return cls(1 - sigma, sigma)

    def clean(self, output: Tensor, sample: Tensor) -> Tensor:
        """The clean latents that an output stands for: x - t v for flow matching."""
        x = sample if self.scale == 1 else sample * self.scale
        if self.predicts == "flow":
            return (x - self.noise * output) / (self.signal + self.noise)
        if self.predicts == "epsilon":
            return (x - self.noise * output) / self.signal
        if self.predicts == "v_prediction":
            return self.signal * x - self.noise * output
        return output

    def output(self, clean: Tensor, sample: Tensor) -> Tensor:
        """The output that stands for these clean latents; a step with it moves on the straight way to them."""
        x = sample if self.scale == 1 else sample * self.scale
        if self.predicts == "sample":
            return clean
        eps = (x - self.signal * clean) / self.noise
        if self.predicts == "flow":
            return eps - clean
        return eps if self.predicts == "epsilon" else self.signal * eps - self.noise * clean

    def noised(self, clean: Tensor, eps: Tensor) -> Tensor:
        """Latents of this noise level."""
        return (self.signal * clean + self.noise * eps) / self.scale


@dataclass(frozen=True, eq=False)
class Levels:
    """The noise levels that a model is called at, by their share of the way from clean latents (0) to noise (1).

    Attributes:
        alphas: Table of a variance-preserving scheduler; None is flow matching.
    """

    alphas: Tensor | None = None

    @classmethod
    def of(cls, scheduler: Any) -> Levels | None:
        """Of a known scheduler; flow matching without one, None where latents are scaled before the model."""
        family = _FLOW if scheduler is None else _family(scheduler)
        if family == _FLOW:
            return cls()
        return cls(scheduler.alphas_cumprod) if family == _PRESERVING else None

    def point(self, level: float) -> Point:
        """The noise level of a share."""
        if self.alphas is None:
            return Point(1 - level, level)
        alpha = float(self.alphas[round(level * (len(self.alphas) - 1))])
        return Point(alpha**0.5, (1 - alpha) ** 0.5)

    def moved(self, latents: Tensor, clean: Tensor, start: float, level: float) -> Tensor:
        """Clean latents with the noise of `latents`, which are of the level `start`, brought to another level."""
        first = self.point(start)
        return self.point(level).noised(clean, (latents - first.signal * clean) / first.noise)
