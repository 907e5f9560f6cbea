"""Where to compute again: evenly, or by dynamic programming over measured distances (Wang et al. 2025, DDT).

DDT (arXiv 2504.05741) shares a feature between steps and asks which K of N steps should compute it. If
step j computes and the steps up to i-1 share, they lose `E(j, i) = sum_(k=j..i-1) d[k][j]`, with d the distances
between the features of a calibration run. The least total `C_m(i)` of m computations for the first i steps, the first
of which is always computed, is `C_1(i) = E(0, i)`, `C_m(i) = min_j C_(m-1)(j) + E(j, i)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .planned import Planned


def check_refresh(refresh: float) -> None:
    """ValueError unless it is a finite number, 1 or more."""
    if isinstance(refresh, bool) or not isinstance(refresh, int | float) or not 1 <= refresh < math.inf:
        raise ValueError(f"refresh={refresh!r} must be a finite number, 1 or more")


def computations(num_steps: int, refresh: float) -> int:
    """Steps that are computed: `floor(num_steps / refresh)`, 1 or more."""
    return max(1, int(num_steps / refresh))


@dataclass(frozen=True)
class Uniform(Planned):
    """`floor(num_steps / refresh)` computed steps, spread evenly from the first.

    Attributes:
        refresh: Steps for each computed one.
    """

    refresh: float = 2

    def __post_init__(self) -> None:
        check_refresh(self.refresh)

    def mask(self, num_steps: int) -> tuple[bool, ...]:
        """Computed at the steps `floor(i * num_steps / K)`."""
        count = computations(num_steps, self.refresh)
        computed = {i * num_steps // count for i in range(count)}
        return tuple(step in computed for step in range(num_steps))


@dataclass(frozen=True)
class Dynamic(Planned):
    """`floor(num_steps / refresh)` computed steps, placed where the shared features lose least.

    Attributes:
        distances: One row a step of the calibration run: how far its feature is from that of each other step, such as
            `1 - cosine similarity`. For another number of steps the nearest entries are taken.
        refresh: Steps for each computed one.
    """

    distances: tuple[tuple[float, ...], ...]
    refresh: float = 2

    def __post_init__(self) -> None:
        check_refresh(self.refresh)
        rows = self.distances if isinstance(self.distances, tuple) else ()
        if not rows or any(not isinstance(row, tuple) or len(row) != len(rows) for row in rows):
            raise ValueError("distances must be a square matrix, a non-empty tuple of tuples, one row a step")
        if any(not isinstance(d, int | float) or not math.isfinite(d) for row in rows for d in row):
            raise ValueError("distances must hold finite numbers")

    def __str__(self) -> str:
        n = len(self.distances)
        return f"Dynamic(distances of {n} steps, refresh={self.refresh})"

    def mask(self, num_steps: int) -> tuple[bool, ...]:
        """The best places for this number of steps."""
        distances = self.distances
        if num_steps != len(distances):
            if num_steps == 1:
                return (True,)
            scale = (len(distances) - 1) / (num_steps - 1)
            at = [round(i * scale) for i in range(num_steps)]
            distances = tuple(tuple(distances[i][j] for j in at) for i in at)
        chosen = set(best_steps(distances, computations(num_steps, self.refresh)))
        return tuple(step in chosen for step in range(num_steps))


def best_steps(distances: Sequence[Sequence[float]], count: int) -> list[int]:
    """The steps to compute so that the sum of distances of all steps to the last computed one is least.

    Args:
        distances: `d[k][j]`: how far the feature of step k is from that of step j.
        count: Steps to compute, the first of which is step 0; 1 to the number of steps.

    Returns:
        Their numbers, ascending. Of equally good ones the earliest last step, then the earliest one before it.

    Raises:
        ValueError: `count` is out of range.
    """
    steps = len(distances)
    if not 1 <= count <= steps:
        raise ValueError(f"count={count} must be 1 to {steps}, the number of steps")
    table = torch.tensor(distances, dtype=torch.float64)
    # losses[i, j] = E(j, i): steps j to i-1 on what step j computed; infinite where there is no such step.
    losses = torch.full((steps + 1, steps), math.inf, dtype=torch.float64)
    losses[1:] = table.tril().cumsum(0) + torch.full_like(table, math.inf).triu(1)
    total, before = losses[:, 0], []
    for _ in range(count - 1):
        candidates = total[None, :steps] + losses
        before.append(candidates.argmin(1))
        total = candidates.gather(1, before[-1][:, None])[:, 0]
    chosen, end = [], steps
    for places in reversed(before):
        end = int(places[end])
        chosen.append(end)
    return [0, *reversed(chosen)]
