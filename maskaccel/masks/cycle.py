"""Step masks with steps that are computed in part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ops._checks import count as check_count
from .planned import Planned
from .schedule import Action, Position, Schedule, StepRule, plan_of


@dataclass(frozen=True)
class Cycle(Planned):
    """A computed step, then steps in part or from memory, in cycles whose length changes over the run.

    At step i of S a cycle is over once `round(interval / (1 - drift + 2 * drift * (i + 1) / S))` steps have passed
    since the last computed one; within `dense`, once two have.

    Attributes:
        interval: Length of a cycle in the middle of the run.
        first: Steps at the start that are always computed.
        drift: By which share of itself the length grows towards the start of the run, and shrinks towards its end.
        dense: Part of the run (from, to; 0 to 1) with cycles of two steps; None has none.
        between: What the steps of a cycle after the computed one do, cyclically.
    """

    interval: int
    first: int = 1
    drift: float = 0.0
    dense: tuple[float, float] | None = None
    between: tuple[Action, ...] = ("partial",)

    def __post_init__(self) -> None:
        Schedule(interval=self.interval, first=self.first, between=self.between)  # checks the fields
        if not isinstance(self.drift, int | float) or not 0 <= self.drift < 1:
            raise ValueError(f"drift={self.drift!r} must be a number from 0 to below 1")
        if self.dense is not None and not (len(self.dense) == 2 and 0 <= self.dense[0] < self.dense[1] <= 1):
            raise ValueError(f"dense={self.dense!r} must be (from, to) with 0 <= from < to <= 1")

    def mask(self, num_steps: int) -> tuple[bool, ...]:
        """Whether each step is computed."""
        low, high = self.dense or (1.0, 1.0)
        # In steps before the end, as the authors count: rounding keeps 0.2 * 50 from being 9.999.
        dense = range(int(round((1 - high) * num_steps, 6)), int(round((1 - low) * num_steps, 6)))
        computed, since = [], 0
        for i in range(num_steps):
            length = round(self.interval / (1 - self.drift + 2 * self.drift * (i + 1) / num_steps))
            length = 2 if num_steps - 1 - i in dense else length
            since += 1
            computed.append(i < self.first or since >= length)
            since = 0 if computed[-1] else since
        return tuple(computed)

    def action(self, at: Position) -> Action:
        """What happens at a step."""
        if super().action(at) == "compute":
            return "compute"
        since, mask = 1, self.mask_of(at)
        step = at.index + at.offset
        while since < at.index and not mask[step - since]:
            since += 1
        return self.between[(since - 1) % len(self.between)]


@dataclass(frozen=True)
class DenseAt:
    """Steps in part but for the first ones, given ones, and those after an end.

    Attributes:
        first: Steps at the start that are always computed, 1 or more.
        at: Numbers of further steps that are computed, from 0.
        end: Last step that may be in part; None: the last of the run.
    """

    first: int = 1
    at: tuple[int, ...] = ()
    end: int | None = None

    def __post_init__(self) -> None:
        check_count("first", self.first, 1)
        if not isinstance(self.at, tuple):
            raise ValueError(f"at={self.at!r} must be a tuple of step numbers")
        for step in self.at:
            check_count("a step of at", step)
        if self.end is not None:
            check_count("end", self.end)

    def action(self, at: Position) -> Action:
        """What happens at a step; a run that starts late (image to image) starts late in the numbers too."""
        step = at.index + at.offset
        dense = at.index == 0 or step < self.first or step in self.at or (self.end is not None and step > self.end)
        return "compute" if dense else "partial"

    def plan(self, num_steps: int, timesteps: Sequence[float] | None = None) -> list[Action]:
        """What happens at every step of a run."""
        return plan_of(self, num_steps, timesteps)


@dataclass(frozen=True)
class Whole:
    """A rule for what is computed whenever anything is: steps in part are computed.

    Attributes:
        rule: The rule.
    """

    rule: StepRule

    def action(self, at: Position) -> Action:
        """What happens at a step."""
        return "reuse" if self.rule.action(at) == "reuse" else "compute"

    def plan(self, num_steps: int, timesteps: Sequence[float] | None = None) -> list[Action]:
        """What happens at every step of a run."""
        return plan_of(self, num_steps, timesteps)
