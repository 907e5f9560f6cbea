"""A forecast with a solver for each channel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .forecast import BDF, AdamsBashforth, Damped, Forecaster, Hold, Newton, Taylor

# What HyCa's families come down to where a reused step computes nothing, so that slopes are differences of the history.
# The trapezoidal rule of Adams-Moulton with the slope at its end predicted along a line is Adams-Bashforth of order 2;
# the midpoint rule of Runge-Kutta with slopes where differences are exact is the parabola.
SOLVERS: dict[str, Forecaster] = {
    "hold": Hold(),
    "damped": Damped(Taylor(1), 0.5),
    "taylor1": Taylor(1),
    "taylor2": Taylor(2),
    "bdf2": BDF(),
    "ab2": AdamsBashforth(2),
    "newton2": Newton(2),
}


@dataclass(frozen=True)
class PerChannel:
    """HyCa's forecast (arXiv 2510.04188): `F[d] = sum_k W[s(d)][k] * H_k[d]`, s(d) the solver of channel d.

    Attributes:
        solvers: Names in `SOLVERS`.
        channels: For each channel the index of its solver.
    """

    solvers: tuple[str, ...]
    channels: tuple[int, ...]

    def __post_init__(self) -> None:
        unknown = [name for name in self.solvers if name not in SOLVERS]
        if unknown or not self.solvers:
            raise ValueError(f"solvers={self.solvers!r}; allowed are {', '.join(map(repr, SOLVERS))}")
        if not self.channels or not all(0 <= i < len(self.solvers) for i in self.channels):
            raise ValueError(f"channels must hold numbers from 0 to {len(self.solvers) - 1}, one for each channel")

    @property
    def capacity(self) -> int:
        """Of the solver that looks back furthest."""
        return max(SOLVERS[name].capacity for name in self._used)

    @functools.cached_property
    def _used(self) -> tuple[str, ...]:
        """The solvers that some channel has."""
        return tuple(self.solvers[i] for i in sorted(set(self.channels)))

    @functools.cached_property
    def _places(self) -> Tensor:
        """For each channel the place of its solver among those that are used."""
        return torch.tensor([self._used.index(self.solvers[i]) for i in self.channels])

    def weights(self, stamps: Sequence[float], target: float, values: Any = None) -> Sequence[float] | Tensor:
        """The weights of each channel, `(len(stamps), D)`; one list where all channels have one solver.

        Raises:
            ValueError: The values have another number of channels.
        """
        width = len(self.channels) if values is None else values.width
        if width != len(self.channels):
            raise ValueError(f"the calibration is of {len(self.channels)} channels; the feature has {width}")
        rows = [list(SOLVERS[name].weights(stamps, target)) for name in self._used]
        if len(rows) == 1:
            return rows[0]
        return torch.tensor(rows, dtype=torch.float64).T[:, self._places]
