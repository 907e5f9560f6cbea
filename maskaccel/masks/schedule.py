"""The step mask: which steps compute a feature, and which take it from memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A rule known before the run: no signal, no synchronisation.

    A step is computed if it is among the first `first` or the last `last`, if its number is a multiple of `interval`,
    or if `computed` (when given, instead of the interval) is true at it.

    Attributes:
        interval: Compute every `interval`-th step, counted from step 0.
        first: Steps at the start that are always computed, 1 or more (there is nothing to reuse before).
        last: Steps at the end that are always computed; needs a known number of steps.
        computed: Explicit mask, one entry a step; replaces the interval.
    """

    interval: int = 1
    first: int = 1
    last: int = 0
    computed: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        for name, low in (("interval", 1), ("first", 1), ("last", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name}={value!r} must be an integer, {low} or more")
        if self.computed is not None:
            entries = self.computed if isinstance(self.computed, tuple) else ()
            if not entries or not all(isinstance(c, bool) for c in entries):
                raise ValueError("computed must be a non-empty tuple of bools, one a step (True = compute)")
            if not self.computed[0]:
                raise ValueError("computed[0] is False; the first step has nothing to reuse and must be computed")

    @classmethod
    def from_mask(cls, computed: Iterable[int | bool], *, last: int = 0) -> Schedule:
        """A schedule from an explicit mask (1 = compute)."""
        return cls(computed=tuple(bool(c) for c in computed), last=last)

    def computes(self, step: int, num_steps: int | None) -> bool:
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
            if num_steps is not None and num_steps != len(self.computed):
                raise ValueError(f"computed has {len(self.computed)} entries; the run has {num_steps} steps")
            return step >= len(self.computed) or self.computed[step]
        return step % self.interval == 0

    def reuses(self, num_steps: int) -> bool:
        """Whether any step of a run of `num_steps` takes the feature from memory."""
        if self.computed is not None:
            return not all(self.computed[:num_steps])
        return not all(self.plan(num_steps))

    def plan(self, num_steps: int) -> list[bool]:
        """The whole mask for a run of `num_steps`."""
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} must be 1 or more")
        return [self.computes(step, num_steps) for step in range(num_steps)]
