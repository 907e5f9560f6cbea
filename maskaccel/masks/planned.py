"""Step masks that follow from the number of steps alone: the whole plan is known before the run."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..ops._checks import count as check_count
from .schedule import Action, Position, Schedule, plan_of

Entry = TypeVar("Entry")


class Planned:
    """A rule whose mask is a function of the number of steps.

    A run that starts late (image to image) starts late in the mask. A subclass is hashable and says the mask of a whole
    schedule.
    """

    def mask(self, num_steps: int) -> tuple[bool, ...]:
        """Whether each step of a schedule of `num_steps` is computed."""
        raise NotImplementedError

    def action(self, at: Position) -> Action:
        """What happens at a step.

        Raises:
            ValueError: The number of steps is not known.
        """
        mask, step = self.mask_of(at), at.index + at.offset
        if at.index == 0:
            return "compute"  # nothing to reuse yet
        return "compute" if step >= len(mask) or mask[step] else "reuse"

    def mask_of(self, at: Position) -> tuple[bool, ...]:
        """The mask of the schedule that a run belongs to.

        Raises:
            ValueError: The number of steps is not known.
        """
        if at.num_steps is None:
            raise ValueError(f"{self} needs the number of steps; pass it to generation(num_steps=...)")
        return _mask(self, at.num_steps + at.offset)

    def plan(self, num_steps: int, timesteps: Sequence[float] | None = None) -> list[Action]:
        """The whole mask for a run of `num_steps`."""
        return plan_of(self, num_steps, timesteps)


@functools.lru_cache(maxsize=256)
def _mask(rule: Planned, num_steps: int) -> tuple[bool, ...]:
    return rule.mask(num_steps)


@dataclass(frozen=True)
class Bins(Planned):
    """Runs of computed and reused steps in turn, stretched in proportion to the number of steps.

    Attributes:
        compute: Lengths of the computed runs; the first one begins the schedule.
        reuse: Lengths of the reused runs between them: as many, or one less.
    """

    compute: tuple[int, ...]
    reuse: tuple[int, ...]

    def __post_init__(self) -> None:
        Schedule.from_bins(self.compute, self.reuse, sum(self.compute) + sum(self.reuse))  # checks the lengths

    def mask(self, num_steps: int) -> tuple[bool, ...]:
        """`Schedule.from_bins` for this number of steps."""
        computed = Schedule.from_bins(self.compute, self.reuse, num_steps).computed
        assert computed is not None
        return computed


@dataclass(frozen=True)
class Magnitudes(Planned):
    """MagCache's rule (Ma et al. 2025, arXiv 2506.09045): reuse while the known magnitudes say that little changes.

    `ratios[t]` is the mean over tokens of `|R_t| / |R_(t-1)|`, R the residual of all blocks. From the end of the
    retained steps on, with `gamma = 1`, `error = 0`, `n = 0` after each computed step:
    `gamma *= ratios[t]; error += |1 - gamma|; n += 1`, and the step is reused if `error <= threshold` and
    `n <= max_consecutive`.

    Attributes:
        ratios: One for each step of a run, from its first (which has no step before it: 1). For another number of steps
            the nearest entries are taken.
        threshold: Largest accumulated error of a reused step; 0 computes always unless a ratio is exactly 1.
        max_consecutive: Most reused steps in a row.
        retention: Part of the steps at the start that is always computed, 0 to 1.
    """

    ratios: tuple[float, ...]
    threshold: float = 0.06
    max_consecutive: int = 3
    retention: float = 0.2

    def __post_init__(self) -> None:
        number = isinstance(self.ratios, tuple) and all(isinstance(r, int | float) for r in self.ratios)
        if not number or not self.ratios or not all(0 < r < math.inf for r in self.ratios):
            raise ValueError(f"ratios={self.ratios!r} must be a non-empty tuple of positive numbers, one a step")
        if not isinstance(self.threshold, int | float) or not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold={self.threshold!r} must be a finite number, 0 or more")
        check_count("max_consecutive", self.max_consecutive, 1)
        if not isinstance(self.retention, int | float) or not 0 <= self.retention <= 1:
            raise ValueError(f"retention={self.retention!r} must be a number from 0 to 1")

    def __str__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)}" for name in ("threshold", "max_consecutive", "retention"))
        return f"Magnitudes(ratios of {len(self.ratios)} steps, {fields})"

    def mask(self, num_steps: int) -> tuple[bool, ...]:
        """The rule, run over the table."""
        ratios = nearest(self.ratios, num_steps)
        retained = max(1, int(self.retention * num_steps + 0.5))
        gamma, error, reused = 1.0, 0.0, 0
        computed = [True] * min(retained, num_steps)
        for ratio in ratios[retained:]:
            gamma, reused = gamma * ratio, reused + 1
            error += abs(1.0 - gamma)
            computed.append(not (error <= self.threshold and reused <= self.max_consecutive))
            if computed[-1]:
                gamma, error, reused = 1.0, 0.0, 0
        return tuple(computed)


def nearest(values: Sequence[Entry], count: int) -> list[Entry]:
    """`count` entries of a table, evenly spread over it; the table itself if it has as many."""
    if count == 1:
        return [values[-1]]
    scale = (len(values) - 1) / (count - 1)
    return [values[round(i * scale)] for i in range(count)]
