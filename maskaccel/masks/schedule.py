"""The step mask: which steps compute a feature, and which take it from memory."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from ..ops._checks import count as check_count

Action = Literal["compute", "partial", "reuse"]
ACTIONS: tuple[str, ...] = get_args(Action)


class Position(Protocol):
    """Where a run stands, as a rule sees it (`maskaccel.state.Generation`)."""

    @property
    def index(self) -> int:
        """Step of the run, from 0."""

    @property
    def num_steps(self) -> int | None:
        """Steps of the run, if known."""

    @property
    def offset(self) -> int:
        """Steps that an image-to-image run leaves out at its start."""

    @property
    def timestep(self) -> float:
        """The scheduler's timestep, 1000 (noise) to 0; ValueError where it is not known."""


class StepRule(Protocol):
    """A step mask. Hashable."""

    def __hash__(self) -> int:
        """Plans are remembered by their rule."""

    def action(self, at: Position) -> Action:
        """What happens at a step."""

    def plan(self, num_steps: int, timesteps: Sequence[float] | None = None) -> list[Action]:
        """What happens at every step of a run."""


@dataclass(frozen=True)
class At:
    """A position of its own, for plans."""

    index: int
    num_steps: int | None = None
    timesteps: tuple[float, ...] | None = None
    offset: int = 0

    @property
    def timestep(self) -> float:
        """The timestep of this step."""
        if self.timesteps is None:
            raise ValueError("this rule needs the timesteps of the run; pass timesteps=...")
        return self.timesteps[self.index]


def plan_of(rule: StepRule, num_steps: int, timesteps: Sequence[float] | None = None) -> list[Action]:
    """The actions of a rule at every step of a run.

    Raises:
        ValueError: `num_steps` is below 1, or another number than that of the timesteps.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be 1 or more")
    given = None if timesteps is None else tuple(float(t) for t in timesteps)
    if given is not None and len(given) != num_steps:
        raise ValueError(f"timesteps has {len(given)} entries; the run has {num_steps} steps")
    return [rule.action(At(step, num_steps, given)) for step in range(num_steps)]


@dataclass(frozen=True)
class Schedule:
    """Compute every N-th step, or by an explicit mask.

    A step is computed if it is among the first `first` or the last `last`, if its number is a multiple of `interval`
    (counted from `origin`), or if `computed` (when given, instead of the interval) is true at it.

    Attributes:
        interval: Compute every `interval`-th step, counted from step `origin`.
        first: Steps at the start that are always computed, 1 or more (there is nothing to reuse before).
        last: Steps at the end that are always computed; needs a known number of steps.
        computed: Explicit mask, one entry a step; replaces the interval. A run that starts late (image to image) starts
            late in it.
        between: What the steps after a computed one do, cyclically; `("reuse",)`, or with `"partial"` for methods that
            recompute some tokens.
        origin: Step from which the interval counts; steps between the first ones and it are reused.
    """

    interval: int = 1
    first: int = 1
    last: int = 0
    computed: tuple[bool, ...] | None = None
    between: tuple[Action, ...] = ("reuse",)
    origin: int = 0

    def __post_init__(self) -> None:
        for name, low in (("interval", 1), ("first", 1), ("last", 0), ("origin", 0)):
            check_count(name, getattr(self, name), low)
        if not self.between or any(action not in ("reuse", "partial") for action in self.between):
            raise ValueError(f"between={self.between!r} must be a non-empty tuple of 'reuse' and 'partial'")
        if self.computed is not None:
            entries = self.computed if isinstance(self.computed, tuple) else ()
            if not entries or not all(isinstance(c, bool) for c in entries):
                raise ValueError("computed must be a non-empty tuple of bools, one a step (True = compute)")
            if not self.computed[0]:
                raise ValueError("computed[0] is False; the first step has nothing to reuse and must be computed")

    @classmethod
    def after_first(
        cls, interval: int, first: int, last: int = 0, between: tuple[Action, ...] = ("reuse",)
    ) -> Schedule:
        """A schedule whose interval counts from the last of the first steps."""
        cls(interval, first, last, between=between)  # checks `first` before it is counted with
        return cls(interval, first, last, between=between, origin=first - 1)

    @classmethod
    def from_mask(cls, computed: Iterable[int | bool], *, last: int = 0) -> Schedule:
        """A schedule from an explicit mask (1 = compute)."""
        return cls(computed=tuple(bool(c) for c in computed), last=last)

    @classmethod
    def from_bins(cls, compute: Sequence[int], reuse: Sequence[int], num_steps: int) -> Schedule:
        """A schedule from run lengths, `compute[0]` computed steps, `reuse[0]` reused ones, and so on.

        The lengths are stretched in proportion to another number of steps than their sum.

        Raises:
            ValueError: The lengths are no positive integers, do not alternate, or `num_steps` is below 1.
        """
        lengths = [n for pair in zip(compute, [*reuse, 0]) for n in pair][: len(compute) + len(reuse)]
        if len(compute) - len(reuse) not in (0, 1) or any(not isinstance(n, int) or n < 1 for n in lengths):
            raise ValueError(f"compute={list(compute)} and reuse={list(reuse)} must alternate and be 1 or more each")
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} must be 1 or more")
        flags = [i % 2 == 0 for i, n in enumerate(lengths) for _ in range(n)]
        return cls(computed=tuple(flags[step * len(flags) // num_steps] for step in range(num_steps)))

    def computes(self, step: int, num_steps: int | None, offset: int = 0) -> bool:
        """Whether `step` (from 0) of `num_steps` is computed.

        Raises:
            ValueError: The rule needs the number of steps and it is unknown, or the mask is for another number.
        """
        if step < self.first:
            return True
        if self.last:
            if num_steps is None:
                raise ValueError(f"last={self.last} needs the number of steps; pass it to generation(num_steps=...)")
            if step >= num_steps - self.last:
                return True
        if self.computed is not None:
            if num_steps is not None and num_steps + offset != len(self.computed):
                raise ValueError(f"computed has {len(self.computed)} entries; the run has {num_steps + offset} steps")
            step += offset
            return step >= len(self.computed) or self.computed[step]
        return step >= self.origin and (step - self.origin) % self.interval == 0

    def action(self, at: Position) -> Action:
        """What happens at a step."""
        if self.computes(at.index, at.num_steps, at.offset):
            return "compute"
        if len(self.between) == 1:
            return self.between[0]
        since = next(n for n in range(1, at.index + 1) if self.computes(at.index - n, at.num_steps, at.offset))
        return self.between[(since - 1) % len(self.between)]

    def plan(self, num_steps: int, timesteps: Sequence[float] | None = None) -> list[Action]:
        """The whole mask for a run of `num_steps`."""
        return plan_of(self, num_steps, timesteps)


@dataclass(frozen=True)
class Window:
    """A rule that holds while the timestep is in `[low, high]`; outside, every step is computed.

    Attributes:
        rule: The rule inside.
        low: Smallest timestep at which it holds.
        high: Largest timestep at which it holds.
    """

    rule: Schedule
    low: float = 0.0
    high: float = 1000.0

    def __post_init__(self) -> None:
        numbers = isinstance(self.low, int | float) and isinstance(self.high, int | float)
        if not numbers or not 0 <= self.low < self.high <= 1000:
            raise ValueError(f"the window low={self.low!r}, high={self.high!r} must lie in 0 to 1000, low below high")

    @classmethod
    def around(cls, rule: Schedule, low: float, high: float) -> Schedule | Window:
        """The rule in a window; the rule itself where that is 0 to 1000, so that nobody has to tell timesteps."""
        return rule if (low, high) == (0, 1000) else cls(rule, low, high)

    def action(self, at: Position) -> Action:
        """What happens at a step."""
        return self.rule.action(at) if self.low <= at.timestep <= self.high else "compute"

    def plan(self, num_steps: int, timesteps: Sequence[float] | None = None) -> list[Action]:
        """The whole mask; without `timesteps` they are taken to fall evenly from 1000."""
        return plan_of(self, num_steps, even_timesteps(num_steps) if timesteps is None else timesteps)


def even_timesteps(num_steps: int) -> tuple[float, ...]:
    """Timesteps that fall evenly from 1000, as a flow-matching scheduler without shift has them."""
    return tuple(1000.0 * (1.0 - step / num_steps) for step in range(num_steps))


@functools.lru_cache(maxsize=256)
def reuses(rule: StepRule, num_steps: int, timesteps: tuple[float, ...] | None = None) -> bool:
    """Whether any step of a run takes anything from memory."""
    return any(action != "compute" for action in rule.plan(num_steps, timesteps))


def render(actions: Iterable[Action | str]) -> str:
    """One letter a step: C computed, p partial, `.` reused."""
    return "".join({"compute": "C", "partial": "p"}.get(action, ".") for action in actions)
