"""Forecasts of a feature from its history: weights over raw values, computed on the host.

Every forecast of the field is `sum_k w_k H_k` over the last computed values `H_k`, newest first. A forecaster is the
rule that gives `w` for the steps at which the values were computed and the step that is wanted. Its `capacity` is the
number of values it can use; with fewer (early in a run) it falls back to the order that they allow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..ops.steps.api import MAX_HISTORY


class Forecaster(Protocol):
    """What a history is asked for."""

    @property
    def capacity(self) -> int:
        """Values that are kept."""

    def weights(self, stamps: Sequence[float], target: float, values: Any = None) -> Sequence[float] | Tensor:
        """Weights of the values computed at `stamps` (newest first, distinct) that give the value at `target`.

        Args:
            stamps: Steps of the values held.
            target: The step that is wanted.
            values: The history itself, for forecasters that look at the values.

        Returns:
            One weight for each stamp, or a host tensor `(len(stamps), D)` with one for each channel.
        """


def check_order(order: int, low: int = 0) -> None:
    """ValueError unless a history can hold what an order needs."""
    if not isinstance(order, int) or isinstance(order, bool) or not low <= order < MAX_HISTORY:
        raise ValueError(f"order={order!r} must be an integer from {low} to {MAX_HISTORY - 1}")


@dataclass(frozen=True)
class Hold:
    """The last computed value."""

    capacity = 1

    def weights(self, stamps: Sequence[float], target: float, values: Any = None) -> list[float]:
        """1 for the newest value."""
        return [1.0] + [0.0] * (len(stamps) - 1)


@dataclass(frozen=True)
class Taylor:
    """TaylorSeer's ladder (Liu et al. 2025, arXiv 2503.06923, eqs. 3 to 5).

    `D^0 = F`, `D^(i+1) = (D^i - D^i of the computed step before) / steps between`, forecast `sum_i D^i e^i / i!`.
    Backward differences stand in for derivatives, so it is exact on lines only; `Newton` is exact on polynomials of
    its order.

    Attributes:
        order: Highest difference used.
    """

    order: int = 1

    def __post_init__(self) -> None:
        check_order(self.order)

    @property
    def capacity(self) -> int:
        """`order + 1` values."""
        return self.order + 1

    def weights(self, stamps: Sequence[float], target: float, values: Any = None) -> list[float]:
        """The ladder's differences, expanded over the raw values."""
        count = len(stamps)
        # rows[j] is the current difference at the j-th newest value, as weights over the values
        rows = [[1.0 if k == j else 0.0 for k in range(count)] for j in range(count)]
        distance, total = target - stamps[0], [0.0] * count
        for i in range(min(self.order + 1, count)):
            factor = distance**i / math.factorial(i)
            total = [t + factor * w for t, w in zip(total, rows[0], strict=True)]
            rows = [
                [(a - b) / (stamps[j] - stamps[j + 1]) for a, b in zip(rows[j], rows[j + 1], strict=True)]
                for j in range(len(rows) - 1)
            ]
        return total


@dataclass(frozen=True)
class Newton:
    """The polynomial through the last `order + 1` values (Newton's form; the weights are Lagrange's).

    Exact on polynomials of degree `order`, whatever the spacing of the steps.

    Attributes:
        order: Degree.
    """

    order: int = 1

    def __post_init__(self) -> None:
        check_order(self.order)

    @property
    def capacity(self) -> int:
        """`order + 1` values."""
        return self.order + 1

    def weights(self, stamps: Sequence[float], target: float, values: Any = None) -> list[float]:
        """Lagrange's basis at `target`."""
        used = stamps[: self.capacity]
        found = [
            math.prod((target - s) / (stamps[k] - s) for j, s in enumerate(used) if j != k) for k in range(len(used))
        ]
        return found + [0.0] * (len(stamps) - len(used))


def _slopes(stamps: Sequence[float], count: int) -> list[list[float]]:
    """Backward differences at the `count` newest values, as weights over all values."""
    rows = []
    for j in range(count):
        row = [0.0] * len(stamps)
        gap = stamps[j] - stamps[j + 1]
        row[j], row[j + 1] = 1.0 / gap, -1.0 / gap
        rows.append(row)
    return rows


@dataclass(frozen=True)
class AdamsBashforth:
    """Adams-Bashforth over backward differences as slopes.

    No new evaluation is allowed on a reused step, so the slopes `f_j` at the computed steps are differences of the
    history. `F(target) = F_0 + integral of the polynomial through (s_j, f_j)` from the newest step to the target; with
    order 1 this is the line through the last two values.

    Attributes:
        order: Slopes used, 1 or more.
    """

    order: int = 2

    def __post_init__(self) -> None:
        check_order(self.order, 1)

    @property
    def capacity(self) -> int:
        """`order + 1` values."""
        return self.order + 1

    def weights(self, stamps: Sequence[float], target: float, values: Any = None) -> list[float]:
        """The newest value and the integral of the slopes."""
        count = min(self.order, len(stamps) - 1)
        total = [1.0] + [0.0] * (len(stamps) - 1)
        nodes = stamps[:count]
        for j, row in enumerate(_slopes(stamps, count)):
            factor = _integral_of_basis(nodes, j, stamps[0], target)
            total = [t + factor * w for t, w in zip(total, row, strict=True)]
        return total


def _integral_of_basis(nodes: Sequence[float], j: int, start: float, end: float) -> float:
    """Integral of Lagrange's j-th basis polynomial of `nodes`, from `start` to `end`."""
    coefficients = [1.0]  # of powers of (s - start), lowest first
    for i, node in enumerate(nodes):
        if i != j:
            a, b = 1.0 / (nodes[j] - node), (start - node) / (nodes[j] - node)
            raised, same = [0.0, *(a * c for c in coefficients)], [*(b * c for c in coefficients), 0.0]
            coefficients = [r + s for r, s in zip(raised, same, strict=True)]
    length = end - start
    return sum(c * length ** (power + 1) / (power + 1) for power, c in enumerate(coefficients))


@dataclass(frozen=True)
class BDF:
    """The backward differentiation formula of order 2 with the last slope in place of the unknown one.

    With `h` from the newest step to the target, `g` between the last two computed steps and `r = h / g`:
    `F = ((1 + r)^2 F_0 - r^2 F_1 + h (1 + r) f) / (1 + 2 r)`, `f` the backward difference at the newest step. For equal
    steps this is `(4 F_0 - F_1) / 3 + 2 h f / 3`.
    """

    capacity = 2

    def weights(self, stamps: Sequence[float], target: float, values: Any = None) -> list[float]:
        """The formula, expanded over the raw values."""
        if len(stamps) < 2:
            return Hold().weights(stamps, target)
        h, g = target - stamps[0], stamps[0] - stamps[1]
        r = h / g
        slope = h * (1 + r) / g
        newest, before = (1 + r) ** 2 + slope, -(r**2) - slope
        return [newest / (1 + 2 * r), before / (1 + 2 * r)] + [0.0] * (len(stamps) - 2)


@dataclass(frozen=True)
class Damped:
    """Another forecaster, drawn towards the last value: `(1 - damping) * Hold + damping * inner`.

    Attributes:
        inner: The forecaster.
        damping: 1 is the forecaster alone, 0 is the last value.
    """

    inner: Taylor | Newton | AdamsBashforth | BDF = Taylor()
    damping: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.damping <= 1.0:
            raise ValueError(f"damping={self.damping} must be from 0 to 1")

    @property
    def capacity(self) -> int:
        """That of the inner forecaster."""
        return self.inner.capacity

    def weights(self, stamps: Sequence[float], target: float, values: Any = None) -> list[float]:
        """A mixture of the two."""
        found = [self.damping * w for w in self.inner.weights(stamps, target)]
        found[0] += 1.0 - self.damping
        return found
