"""Step masks that are decided during the run, from how far a feature moved."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..ops._checks import count as check_count
from .schedule import Action, Position


@dataclass
class SignalState:
    """What a signal remembers of each sample between steps."""

    accumulated: list[float] = field(default_factory=list)
    consecutive: list[int] = field(default_factory=list)
    reused: list[int] = field(default_factory=list)

    def fit(self, samples: int) -> None:
        """Start anew if the number of samples changed."""
        if len(self.accumulated) != samples:
            self.accumulated, self.consecutive, self.reused = [0.0] * samples, [0] * samples, [0] * samples


@dataclass(frozen=True)
class Signal:
    """Reuse while a feature moves little: `map(sum|f - f_ref| / sum|f_ref|) < threshold`.

    First-Block Cache compares the residual of the first blocks with the last computed step; TeaCache (Liu et al.
    2024, arXiv 2411.19108, eqs. 5 to 7) compares the modulated input with the previous step and accumulates a
    polynomial of it.

    Attributes:
        threshold: Above or at it a sample is computed; 0 computes always.
        reference: `"computed"` compares with the last computed step, `"previous"` with the step before.
        polynomial: Applied to the relative difference, highest degree first; empty is the identity.
        accumulate: Compare the sum since the last computed step, instead of the difference itself.
        first: Steps at the start that are always computed, 1 or more.
        last: Steps at the end that are always computed; needs a known number of steps.
        max_consecutive: Most reused steps in a row; None is unlimited.
        max_reused: Most reused steps of a run; None is unlimited.
        reduce: `"sample"` decides for each sample of the batch by itself, `"mean"` for all of them by their mean,
            `"any"` computes all if one would be computed.
    """

    threshold: float
    reference: Literal["computed", "previous"] = "computed"
    polynomial: tuple[float, ...] = ()
    accumulate: bool = False
    first: int = 1
    last: int = 0
    max_consecutive: int | None = None
    max_reused: int | None = None
    reduce: Literal["sample", "mean", "any"] = "sample"

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, int | float) or not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold={self.threshold!r} must be a finite number, 0 or more")
        for name, low in (("first", 1), ("last", 0), ("max_consecutive", 1), ("max_reused", 1)):
            value = getattr(self, name)
            if value is None and name.startswith("max"):
                continue
            check_count(name, value, low)
        if self.reference not in ("computed", "previous"):
            raise ValueError(f"reference={self.reference!r}; allowed are 'computed' and 'previous'")
        if self.reduce not in ("sample", "mean", "any"):
            raise ValueError(f"reduce={self.reduce!r}; allowed are 'sample', 'mean' and 'any'")
        if not all(math.isfinite(c) for c in self.polynomial):
            raise ValueError(f"polynomial={self.polynomial} must be finite")

    def action(self, at: Position) -> Action:
        """`"compute"` at the steps that are always computed, else `"reuse"` for "it depends"."""
        if at.index < self.first:
            return "compute"
        if self.last:
            if at.num_steps is None:
                raise ValueError(f"last={self.last} needs the number of steps; pass it to generation(num_steps=...)")
            if at.index >= at.num_steps - self.last:
                return "compute"
        return "reuse" if self.threshold > self._least else "compute"

    @functools.cached_property
    def _least(self) -> float:
        """The least value that is compared with the threshold, for relative changes of 0 to 10."""
        return min(self._mapped(i / 1000) for i in range(10001)) if self.polynomial else 0.0

    def _mapped(self, change: float) -> float:
        """The polynomial of a relative change."""
        value = 0.0
        for coefficient in self.polynomial:
            value = value * change + coefficient
        return value

    def plan(self, num_steps: int, timesteps: Sequence[float] | None = None) -> list[Action]:
        """The steps that are always computed, and those that may be reused."""
        from .schedule import plan_of

        return plan_of(self, num_steps, timesteps)

    def judge(self, sums: Sequence[Sequence[float]], state: SignalState, forced: bool = False) -> list[bool]:
        """Which samples are computed at this step; moves the state on.

        Args:
            sums: For each sample `(sum |f - f_ref|, sum |f_ref|)`.
            state: Of the branch.
            forced: The step is computed whatever the signal says.

        Returns:
            True for each sample that is computed.
        """
        state.fit(len(sums))
        if self.reduce == "mean" and sums:
            total = [sum(s[0] for s in sums), sum(s[1] for s in sums)]
            sums = [total] * len(sums)
        computes = []
        for i, (moved, size) in enumerate(sums):
            value = moved / size if size > 0 else math.inf
            if self.polynomial:
                value = self._mapped(value)
            if self.accumulate:
                value = state.accumulated[i] = state.accumulated[i] + value
            limited = (self.max_consecutive is not None and state.consecutive[i] >= self.max_consecutive) or (
                self.max_reused is not None and state.reused[i] >= self.max_reused
            )
            computes.append(forced or limited or not value < self.threshold)
        if self.reduce == "any" and any(computes):
            computes = [True] * len(computes)
        for i, compute in enumerate(computes):
            state.consecutive[i] = 0 if compute else state.consecutive[i] + 1
            state.reused[i] += not compute
            if compute:
                state.accumulated[i] = 0.0
        return computes
