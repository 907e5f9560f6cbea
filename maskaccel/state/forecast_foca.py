"""The forecast of FoCa: a two-step predictor and a Heun-type corrector over the remembered values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..ops.steps.api import MAX_HISTORY

_Point = tuple[float, list[float]]  # a step, and the value there as weights over the raw values


@dataclass(frozen=True)
class PredictCorrect:
    """Forecast-then-calibrate (Zheng et al. 2025, arXiv 2508.16211): a feature as the solution of an ODE.

    A step at a time: the predictor is BDF2 on the last two values, computed or forecast, with their difference as the
    slope, which is the line through them. The corrector is the trapezoidal rule from the newest computed value `F` with
    `f` the slope there, from the computed values alone, and `p` the slope of the predictor:
    `F(t) = F + (t - s) / 2 * (f + p)`.
    Forecasts go into the predictor of the next steps, also of those after the next computed step; all of it is linear
    in the computed values, so it comes down to a weight for each. Exact on lines.

    That the predictor looks at forecasts and that the corrector starts at the newest computed value is taken from
    cache-dit's implementation: the paper's own code is not public. Slopes here are divided by the real numbers of steps
    between the values (there they are not), long gaps are not damped, and what is older than `values` is left out.

    Attributes:
        values: Computed values used, 2 or more; with 2 it is the line through them.
    """

    values: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.values, int) or isinstance(self.values, bool) or not 2 <= self.values <= MAX_HISTORY:
            raise ValueError(f"values={self.values!r} must be an integer from 2 to {MAX_HISTORY}")

    @property
    def capacity(self) -> int:
        """`values`."""
        return self.values

    def weights(self, stamps: Sequence[float], target: float, values: Any = None) -> list[float]:
        """The recursion from the oldest value to the target, expanded over the raw values."""
        count = len(stamps)
        computed: list[_Point] = [
            (stamp, [1.0 if k == j else 0.0 for k in range(count)]) for j, stamp in enumerate(stamps)
        ][::-1]
        before = newest = earlier = last = computed[0]  # the last two values of all, and of the computed ones
        for point in [*computed[1:], (target, [])]:
            if newest is not earlier:
                while newest[0] + 1 < point[0]:
                    before, newest = newest, _corrected(newest[0] + 1, before, newest, earlier, last)
            if not point[1]:
                break
            before, newest, earlier, last = newest, point, last, point
        if before is newest:
            return newest[1]
        return _corrected(target, before, newest, earlier, last)[1]


def _corrected(t: float, before: _Point, newest: _Point, earlier: _Point, last: _Point) -> _Point:
    """The trapezoidal rule from the last computed value to step `t`."""
    half = (t - last[0]) / 2
    slopes = zip(_slope(earlier, last), _slope(before, newest), strict=True)
    return t, [w + half * (f + p) for w, (f, p) in zip(last[1], slopes, strict=True)]


def _slope(a: _Point, b: _Point) -> list[float]:
    return [(w - v) / (b[0] - a[0]) for v, w in zip(a[1], b[1], strict=True)]
