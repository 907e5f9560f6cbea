"""LMD: a ratio of masked tokens that grows in training (Ma et al. 2024, arXiv 2312.07971, section 3.3).

A masked autoencoder of latents learns from simple to difficult: the ratio rises from a low to a high one with the
training steps, by one of three schedules of the part p of the training that is done,

    uniform:   low + (high - low) p
    piecewise: low + (high - low) floor(p S) / (S - 1), S steps of equal length
    cosine:    low + (high - low) (1 - cos(pi p)) / 2

Inferred: the forms of the schedules (the paper tells their names and ends), and the defaults 0.15 and 0.75. The model
is a masked autoencoder: `UMD` with a timestep of 0, or any encoder on `TokenIndex.gather`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ._ratios import kept_tokens

SCHEDULES = ("uniform", "piecewise", "cosine")


@dataclass(frozen=True)
class LMDSchedule:
    """The ratio of masked tokens of a training step.

    Attributes:
        low: Ratio at the first step.
        high: Ratio at the last one.
        steps: Length of the training.
        kind: `"uniform"`, `"piecewise"` or `"cosine"`.
        pieces: S of `"piecewise"`.
        bucket: Kept tokens are a multiple of it, so that few shapes are compiled.
    """

    low: float = 0.15
    high: float = 0.75
    steps: int = 1
    kind: str = "cosine"
    pieces: int = 4
    bucket: int = 16

    paper = "LMD: Faster Image Reconstruction with Latent Masking Diffusion (arXiv 2312.07971)"

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"kind={self.kind!r}; allowed are {', '.join(map(repr, SCHEDULES))}")
        if not 0 <= self.low <= self.high < 1:
            raise ValueError(f"low={self.low}, high={self.high}: they must satisfy 0 <= low <= high < 1")
        if self.steps < 1 or self.pieces < 2 or self.bucket < 1:
            raise ValueError(f"steps={self.steps} and bucket={self.bucket} must be 1 or more, pieces={self.pieces} 2")

    def ratio(self, step: int) -> float:
        """The ratio of a step."""
        p = min(max(step / self.steps, 0.0), 1.0)
        if self.kind == "piecewise":
            p = min(math.floor(p * self.pieces), self.pieces - 1) / (self.pieces - 1)
        elif self.kind == "cosine":
            p = (1 - math.cos(math.pi * p)) / 2
        return self.low + (self.high - self.low) * p

    def kept(self, n: int, step: int) -> int:
        """How many of n tokens a step keeps."""
        return kept_tokens(n, self.ratio(step), self.bucket)
