"""How many tokens are dropped: ratios over training steps, and numbers that are drawn on the host.

A number that is drawn on the GPU makes the host wait, and one of many values makes every kernel and graph of kept
tokens anew. So a ratio is drawn on the host from the seed and the step, alike on all ranks, and the number of kept
tokens is rounded to a multiple (`bucket`).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from ..ops.tokens import philox

SCHEDULES = ("constant", "linear", "cosine", "exp")


def drawn(seed: int, step: int) -> float:
    """A number in (0, 1), a function of seed and step alone."""
    return min(max(random.Random((seed << 64) ^ step).random(), 1e-12), 1 - 1e-12)


_PATH_DROP = 3 << 24  # last word of the counter: a purpose of its own beside those of the token ops


def uniform(batch: int, *, seed: int, step: Tensor | int, offset: int = 0, device: Any = None) -> Tensor:
    """A number in (0, 1) for each sample, fp32 `(batch,)`, from counters as those of `ops.random_keep`.

    Args:
        batch: Samples.
        seed: Of the generator.
        step: Training step; a tensor is not read on the host.
        offset: Number of this rank's first sample.
        device: Of the result, unless `step` is a tensor.
    """
    at = torch.as_tensor(step, dtype=torch.int64, device=device)
    sample = torch.arange(offset, offset + batch, device=at.device)
    word = philox.words(seed, torch.zeros_like(sample), sample, at, _PATH_DROP)
    return ((word >> 9).float() + 0.5) * 2.0**-23


def kept_tokens(n: int, ratio: float, bucket: int = 1) -> int:
    """`floor(n (1 - ratio))`, rounded to a multiple of `bucket`, at least one token (or bucket) and at most n.

    Raises:
        ValueError: `ratio` is not in [0, 1), or a size is below 1.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} must lie in [0, 1): the part of the tokens that is dropped")
    if n < 1 or bucket < 1:
        raise ValueError(f"n={n}, bucket={bucket}: both must be 1 or more")
    keep = math.floor(n * (1 - ratio) + 1e-9)
    return min(n, max(bucket, bucket * ((keep + bucket // 2) // bucket)))


@dataclass(frozen=True)
class RatioRange:
    """A ratio of dropped tokens that is uniform in a range, one for all samples of a step.

    Attributes:
        low: Least part of dropped tokens.
        high: Largest part.
        bucket: The number of kept tokens is a multiple of it.
        seed: Of the draws.
    """

    low: float = 0.3
    high: float = 0.5
    bucket: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high < 1:
            raise ValueError(f"low={self.low}, high={self.high}: they must satisfy 0 <= low <= high < 1")
        if self.bucket < 1:
            raise ValueError(f"bucket={self.bucket} must be 1 or more")

    def ratio(self, step: int) -> float:
        """The ratio of a step."""
        return self.low + (self.high - self.low) * drawn(self.seed, step)

    def kept(self, n: int, step: int) -> int:
        """How many of n tokens a step keeps."""
        return kept_tokens(n, self.ratio(step), self.bucket)

    def all_kept(self, n: int) -> tuple[int, ...]:
        """Every number that `kept` can give: what a run compiles for."""
        least, most = kept_tokens(n, self.high, self.bucket), kept_tokens(n, self.low, self.bucket)
        return tuple(k for k in range(least, most + 1) if k % self.bucket == 0 or k in (least, most))


@dataclass(frozen=True)
class TruncatedNormal:
    """A ratio with the density of a normal distribution that is cut off (MAR: mean 1, deviation 0.25, from 0.7 to 1).

    Attributes:
        low: Least ratio.
        high: Largest ratio.
        mean: Of the normal distribution.
        deviation: Standard deviation of the normal distribution.
        seed: Of the draws.
    """

    low: float = 0.7
    high: float = 1.0
    mean: float = 1.0
    deviation: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1 or self.deviation <= 0:
            raise ValueError(
                f"low={self.low}, high={self.high}, deviation={self.deviation}: allowed are 0 <= low < high <= 1 and a "
                "positive deviation"
            )

    def ratio(self, step: int) -> float:
        """The ratio of a step."""
        normal = NormalDist(self.mean, self.deviation)
        least, most = normal.cdf(self.low), normal.cdf(self.high)
        return min(max(normal.inv_cdf(least + (most - least) * drawn(self.seed, step)), self.low), self.high)

    def masked(self, n: int, step: int, bucket: int = 1) -> int:
        """How many of n tokens a step masks: `ceil(n ratio)`, rounded up to a multiple of `bucket`, at most n."""
        return min(n, bucket * math.ceil(math.ceil(n * self.ratio(step) - 1e-9) / bucket))


@dataclass(frozen=True)
class RatioSchedule:
    """A ratio that goes from `start` to `end` in the course of a training (the schedules of MaskDiT's code).

        constant: start
        linear:   end + (start - end) (1 - p)     (the authors' code runs it the other way, from end to start)
        cosine:   end + (start - end) cos(pi p / 2)^power
        exp:      end + (start - end) e^(-power p)

    where p is the part of the training that is done.

    Attributes:
        start: Ratio at the first step.
        end: Ratio after `steps`; 0 trains the last part on all tokens.
        steps: Length of the training.
        kind: `"constant"`, `"linear"`, `"cosine"` or `"exp"`.
        power: Of the cosine (None: 4), or the rate of the exponential (None: 7).
    """

    start: float = 0.5
    end: float = 0.0
    steps: int = 1
    kind: str = "cosine"
    power: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"kind={self.kind!r}; allowed are {', '.join(map(repr, SCHEDULES))}")
        if not (0 <= self.start < 1 and 0 <= self.end < 1) or self.steps < 1 or (self.power or 1) <= 0:
            raise ValueError(
                f"start={self.start}, end={self.end} must lie in [0, 1), steps={self.steps} and power={self.power} be "
                "positive"
            )

    def ratio(self, step: int) -> float:
        """The ratio of a step."""
        p = min(max(step / self.steps, 0.0), 1.0)
        if self.kind == "constant":
            return self.start
        if self.kind == "linear":
            left = 1 - p
        elif self.kind == "cosine":
            left = math.cos(math.pi * p / 2) ** (self.power or 4) if p < 1 else 0.0
        else:
            left = math.exp(-(self.power or 7) * p)
        return self.end + (self.start - self.end) * left

    def kept(self, n: int, step: int, bucket: int = 1) -> int:
        """How many of n tokens a step keeps."""
        return kept_tokens(n, self.ratio(step), bucket)
