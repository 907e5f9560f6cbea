"""LMD: a ratio of masked tokens that grows in training (Ma et al. 2024, arXiv 2312.07971, section 3.3; their code).

A masked autoencoder of latents learns from simple to difficult: the ratio rises from 0.15 to 0.75 in the first two
thirds of the training and stays there. With p the part of the training that is done and q = min(p / (2/3), 1):

    linear:    low + (high - low) q
    piecewise: linear from low to 0.4 until p = 1/6, constant until 1/3, linear from 0.4 to high until 2/3
    cosine:    low + (high - low) (1 - f(q) / f(0)),  f(q) = cos^2((q + s) / (1 + s) pi / 2),  s = 0.008

In the authors' code, where it is commented out, the second slope of `piecewise` is not counted from its start, so that
the ratio would exceed 1; here it is. Inferred: `linear` ("uniform" in the paper), which the code does not have.

The model is a masked autoencoder: `UMD` with a timestep of 0, or any encoder on `TokenIndex.gather`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ._ratios import kept_tokens

SCHEDULES = ("linear", "piecewise", "cosine")
_RISE = 2 / 3
_MIDDLE = 0.4
_OFFSET = 0.008


def _squared_cosine(q: float) -> float:
    return math.cos((q + _OFFSET) / (1 + _OFFSET) * math.pi / 2) ** 2


@dataclass(frozen=True)
class LMDSchedule:
    """The ratio of masked tokens of a training step.

    Attributes:
        low: Ratio at the first step.
        high: Ratio from two thirds of the training on.
        steps: Length of the training.
        kind: `"linear"`, `"piecewise"` or `"cosine"`.
        bucket: Kept tokens are a multiple of it, so that few shapes are compiled.
    """

    low: float = 0.15
    high: float = 0.75
    steps: int = 1
    kind: str = "cosine"
    bucket: int = 16

    paper = "LMD: Faster Image Reconstruction with Latent Masking Diffusion (arXiv 2312.07971)"

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"kind={self.kind!r}; allowed are {', '.join(map(repr, SCHEDULES))}")
        if not 0 <= self.low <= self.high < 1:
            raise ValueError(f"low={self.low}, high={self.high}: they must satisfy 0 <= low <= high < 1")
        if self.kind == "piecewise" and not self.low <= _MIDDLE <= self.high:
            raise ValueError(f"low={self.low}, high={self.high}: 'piecewise' passes {_MIDDLE}, which must lie between")
        if self.steps < 1 or self.bucket < 1:
            raise ValueError(f"steps={self.steps}, bucket={self.bucket}: both must be 1 or more")

    def ratio(self, step: int) -> float:
        """The ratio of a step."""
        p = min(max(step / self.steps, 0.0), 1.0)
        q = min(p / _RISE, 1.0)
        if self.kind == "piecewise":
            first, second = min(6 * p, 1.0), min(max(3 * p - 1, 0.0), 1.0)
            return self.low + (_MIDDLE - self.low) * first + (self.high - _MIDDLE) * second
        rise = q if self.kind == "linear" else 1 - _squared_cosine(q) / _squared_cosine(0)
        return self.low + (self.high - self.low) * rise

    def kept(self, n: int, step: int) -> int:
        """How many of n tokens a step keeps."""
        return kept_tokens(n, self.ratio(step), self.bucket)
