"""MDLM: simple and effective masked diffusion language models (Sahoo et al. 2024, arXiv 2406.07524).

Ancestral sampling of the absorbing process (section 3.2): from time t to s each masked token is revealed with
probability `(alpha_s - alpha_t) / (1 - alpha_t)`, and takes a token that the model predicts. Where no token of the
batch changes, the model would be asked again about the same tokens; MDLM keeps the last prediction there. Here the
number of tokens of each step is drawn before the run, from the same law, so steps that change nothing are known and
not run at all: without the comparison of tokens on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..masks.unmasking import LINEAR, NoiseSchedule, ancestral_counts, time_grid
from ..ops._checks import choice
from . import _masked
from ._masked import Draw, Reveal


@dataclass(frozen=True)
class MDLM(_masked.MaskedSampling):
    """Each masked token is revealed with the probability of the posterior, tokens at random.

    The law of the tokens is that of ancestral sampling with as many steps; calls of the model are at most that many,
    and never more than masked tokens in the batch.

    Attributes:
        steps: Steps of the time grid.
        schedule: `alpha(t)`.
        grid: Times of the steps.
        temperature: Of the sampled tokens.
        finish: What is left at the last step is sampled (`"sample"`) or takes the most probable tokens (`"argmax"`,
            MDLM's noise removal).
    """

    steps: int = 1000
    schedule: NoiseSchedule = LINEAR
    grid: Literal["uniform", "cosine"] = "uniform"
    temperature: float = 1.0
    finish: Literal["sample", "argmax"] = "sample"

    name = "MDLM"
    paper = "Simple and Effective Masked Diffusion Language Models (arXiv 2406.07524)"

    def __post_init__(self) -> None:
        time_grid(self.steps, self.grid)
        choice("finish", self.finish, ("sample", "argmax"))

    def probabilities(self) -> list[float]:
        """The probability of each step that a masked token is revealed."""
        times = time_grid(self.steps, self.grid)
        return [self.schedule.reveal_probability(t, s) for t, s in itertools.pairwise(times)]

    def plan(self, free: Tensor, draw: Draw) -> Generator[Reveal, bool, None]:
        """The steps; those that reveal nothing are idle."""
        masked = free.sum(1).tolist()
        counts = ancestral_counts(masked, self.probabilities(), draw.seed, sample_offset=draw.sample_offset)
        for step, (count, rows) in enumerate(zip(counts, _masked.remaining(masked, counts), strict=True)):
            last = step == self.steps - 1 and self.finish == "argmax"
            yield Reveal(tuple(count), "random", temperature=0.0 if last else self.temperature, rows=rows)
