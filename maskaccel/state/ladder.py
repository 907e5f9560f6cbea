"""Differences instead of raw values, for a newest value that is written to between computed steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .forecast import check_order
from .history import History


class Ladder(History):
    """A history that keeps a value and its differences over the computed steps, as ClusCa and TaylorSeer's code do.

    `D^0 = F`, `D^(i+1) = (D^i - D^i of the push before) / steps between`. Over raw values a Taylor series weighs the
    newest one with `1 + e / gap`, so a row that is written into it would be extrapolated by itself; here it counts
    once, and the differences stay those of the computed steps. The memory is that of as many raw values.

    Its weights are those of the differences, from the value itself on.
    """

    def clear(self) -> None:
        """Forget everything and free the buffer."""
        super().clear()
        self._head = self.capacity - 1  # the slot of D^0; D^i is i slots before it

    def _keep(self, value: Tensor, stamp: float, base: Tensor | None) -> None:
        levels = min(len(self._stamps) + 1, self.capacity)
        new = value if base is None else value - base
        for level in range(levels):
            slot = self._head - level
            below = None
            if level + 1 < levels:
                wide = torch.promote_types(new.dtype, torch.float32)
                below = (new.to(wide) - self._slots([slot])[0].to(wide)) / (stamp - self._stamps[0])
            self._write(slot, new)
            if below is not None:
                new = below


@dataclass(frozen=True)
class Series:
    """The Taylor series over a `Ladder`: `sum_i D^i e^i / i!`, e the steps since the last computed one.

    Attributes:
        order: Highest difference used.
    """

    order: int = 1

    ladder = True

    def __post_init__(self) -> None:
        check_order(self.order)

    @property
    def capacity(self) -> int:
        """The value and `order` differences."""
        return self.order + 1

    def weights(self, stamps: Sequence[float], target: float, values: Any = None) -> list[float]:
        """Weights of the value and its differences."""
        since = target - stamps[0]
        return [since**i / math.factorial(i) for i in range(len(stamps))]
