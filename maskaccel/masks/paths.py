"""Where to compute when the steps between are forecast: a shortest path over pairs of computed steps (DPCache, 2026).

A forecast from the last two computed steps a < b loses `|sum_k w_k F_k - F_t|` at step t, and all the norms follow from
the inner products `G = <F_s, F_t>` of one calibration run: with the weights of the forecast and -1 for step t as `v`,
the loss is `sqrt(v^T G v)`. The cost `c(a, b, e)` of computing next at step e is the sum of the losses of the steps
between b and e, a tensor that knows the path and not only the gap. The best path of K computed steps is
`C_1(-, 0) = 0`, `C_m(b, e) = min_a C_(m-1)(a, b) + c(a, b, e)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..state.forecast import Forecaster, Newton
from .dynamic import check_refresh, computations
from .planned import Planned, nearest

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Paths(Planned):
    """`floor(num_steps / refresh)` computed steps, placed where the forecasts between them lose least.

    Attributes:
        products: One row a step of the calibration run: the inner products of its feature with that of each step. For
            another number of steps the nearest entries are taken.
        refresh: Steps for each computed one.
        forecaster: Gives the weights, from two values at most.
    """

    products: Matrix
    refresh: float = 4
    forecaster: Forecaster = Newton()

    def __post_init__(self) -> None:
        check_refresh(self.refresh)
        if not isinstance(getattr(self.forecaster, "capacity", None), int):
            raise ValueError(f"forecaster={self.forecaster!r} must be one of one or two values, such as Newton()")
        if not 1 <= self.forecaster.capacity <= 2:
            raise ValueError(
                f"forecaster={self.forecaster} uses {self.forecaster.capacity} values; paths are planned for 1 or 2"
            )
        rows = self.products if isinstance(self.products, tuple) else ()
        if not rows or any(not isinstance(row, tuple) or len(row) != len(rows) for row in rows):
            raise ValueError("products must be a square matrix, a non-empty tuple of tuples, one row a step")
        if any(not isinstance(p, int | float) or not math.isfinite(p) for row in rows for p in row):
            raise ValueError("products must hold finite numbers")

    def __str__(self) -> str:
        n = len(self.products)
        return f"Paths(inner products of {n} steps, refresh={self.refresh}, forecaster={self.forecaster})"

    def mask(self, num_steps: int) -> tuple[bool, ...]:
        """The best places for this number of steps."""
        products = tuple(tuple(nearest(row, num_steps)) for row in nearest(self.products, num_steps))
        chosen = set(best_path(products, computations(num_steps, self.refresh), self.forecaster)[0])
        return tuple(step in chosen for step in range(num_steps))


def _costs(products: Matrix, forecaster: Forecaster) -> Tensor:
    """`c[a + 1, b, e]`: `a + 1` is 0 where nothing was computed before b, `e` is n at the end of the run."""
    steps = len(products)
    table = torch.tensor(products, dtype=torch.float64)
    costs = torch.full((steps + 1, steps, steps + 1), math.inf, dtype=torch.float64)
    for b in range(steps):
        targets = range(b + 1, steps)
        own = table.diagonal()[b + 1 :]
        for a in range(-1, b):
            stamps = [b] if a < 0 else [b, a]
            weights = torch.tensor([list(forecaster.weights(stamps, t)) for t in targets], dtype=torch.float64)
            weights = weights.reshape(len(targets), len(stamps))
            with_targets = (weights * table[stamps, b + 1 :].T).sum(1)
            among = ((weights @ table[stamps][:, stamps]) * weights).sum(1)
            losses = (own - 2 * with_targets + among).clamp_min(0).sqrt()
            costs[a + 1, b, b + 1] = 0
            costs[a + 1, b, b + 2 :] = losses.cumsum(0)
    return costs


def best_path(products: Matrix, count: int, forecaster: Forecaster) -> tuple[list[int], float]:
    """The steps to compute so that the losses of all forecasts between them sum to least.

    Args:
        products: Inner products of the features of each pair of steps.
        count: Steps to compute, the first of which is step 0; 1 to the number of steps.
        forecaster: Of two values at most.

    Returns:
        Their numbers, ascending, and the sum of losses.

    Raises:
        ValueError: `count` is out of range.
    """
    steps = len(products)
    if not 1 <= count <= steps:
        raise ValueError(f"count={count} must be 1 to {steps}, the number of steps")
    costs = _costs(products, forecaster)
    total = torch.full((steps + 1, steps), math.inf, dtype=torch.float64)
    total[0, 0] = 0
    before: list[Tensor] = []
    for _ in range(count - 1):
        least, places = (total[:, :, None] + costs[:, :, :steps]).min(0)
        before.append(places)
        total = torch.full_like(total, math.inf)
        total[1:] = least
    ends = total + costs[:, :, steps]
    a, b = divmod(int(ends.argmin()), steps)
    return _walk(before, a, b), float(ends.min())


def _walk(before: Sequence[Tensor], a: int, b: int) -> list[int]:
    """The path that ends with the pair `(a - 1, b)`, backwards along the choices."""
    path = [b]
    for places in reversed(before):
        path.append(a - 1)
        a, b = int(places[a - 1, b]), a - 1
    return path[::-1]
