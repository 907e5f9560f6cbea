"""MD4 and GenMD4: simplified and generalized masked diffusion (Shi et al. 2024, arXiv 2406.04329)."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..masks.unmasking import NoiseSchedule, time_grid
from . import _masked
from ._masked import Draw, Reveal
from .mdlm import MDLM

COSINE = NoiseSchedule("cosine", eps=1e-4)
"""MD4's `alpha(t) = 1 - cos(pi/2 (1 - t))`, squeezed as in its code."""


@dataclass(frozen=True)
class MD4(MDLM):
    """Ancestral sampling with MD4's schedules and time grid; otherwise as `MDLM`."""

    steps: int = 256
    schedule: NoiseSchedule = COSINE
    grid: Literal["uniform", "cosine"] = "cosine"

    name = "MD4"
    paper = "Simplified and Generalized Masked Diffusion for Discrete Data (arXiv 2406.04329)"


@dataclass(frozen=True, eq=False)
class GenMD4(_masked.MaskedSampling):
    """State-dependent unmasking: the probability of being revealed depends on the predicted token.

    `alpha_v(t) = 1 - t^(w_v)`, so a masked token takes value v with probability `mu_v r_v`, where
    `r_v = 1 - (s / t)^(w_v)` and mu is the model's prediction, and stays masked otherwise: a token is
    sampled from mu, and revealed with the probability r of what it is.

    Attributes:
        powers: fp32 `(V,)`, w of each token.
        steps: Steps of the time grid. All of them call the model: how many tokens they reveal depends on what it says.
        grid: Times of the steps.
    """

    powers: Tensor
    steps: int = 256
    grid: Literal["uniform", "cosine"] = "uniform"

    name = "GenMD4"
    paper = MD4.paper

    def __post_init__(self) -> None:
        time_grid(self.steps, self.grid)
        if self.powers.dim() != 1 or not bool((self.powers > 0).all()):
            raise ValueError(f"powers has shape {tuple(self.powers.shape)}; it must be (V,), all above 0")

    def rates(self, t: float, s: float) -> Tensor:
        """Probability that a masked token which is predicted as v is revealed from time t to s: `(V,)`."""
        return 1 - (s / t) ** self.powers.float()

    def plan(self, free: Tensor, draw: Draw) -> Generator[Reveal, bool, None]:
        """The steps, until nothing is masked."""
        times = time_grid(self.steps, self.grid)
        for step, (t, s) in enumerate(itertools.pairwise(times)):

            def scores(_: int, ids: Tensor, confidence: Tensor, step: int = step, t: float = t, s: float = s) -> Tensor:
                rates = self.rates(t, s).to(ids.device)
                # mask_id stands where nothing could be sampled; the step leaves it masked whatever the score.
                return rates[ids.clamp(max=len(rates) - 1)] - draw.uniform(step, ids)

            if not (yield Reveal(0, "scores", threshold=0.0, scores=scores, watch=True)):
                return
