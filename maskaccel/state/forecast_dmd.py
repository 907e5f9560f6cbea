"""Dynamic mode decomposition: a feature as a sum of exponentials, fitted to its last values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.steps.api import MAX_HISTORY
from .forecast import Newton, Taylor
from .history import History

LEAST = 4  # three pairs of neighbours: one oscillation is two modes, and a third pair says how well they fit


@dataclass(frozen=True)
class DynamicModes:
    """The forecast of dynamic mode decomposition (Schmid 2010; the "exact DMD" of Tu et al. 2014).

    `A` is the linear map that takes each remembered value to the next, by least squares in the space of their leading
    singular vectors; the newest value, written in the eigenvectors of `A`, is moved on by powers of the eigenvalues.
    Every vector of the construction lies in the span of the values, so their inner products are all it needs (the
    method of snapshots, Sirovich 1987): the result is a weight for each value. Exact on sums of exponentials, with as
    many different rates as pairs of neighbours at most.

    The values have to be equally spaced: older ones with other gaps are left out, and with fewer than 4 left the
    fallback forecasts. The inner products are read from the device once for each change of a history.

    Attributes:
        snapshots: Values that are kept, 4 or more.
        rank: Modes, at most; 0 takes those whose singular value is above `cut` times the largest.
        cut: Of the automatic rank.
        ridge: Added to the singular values where they are divided by, relative to the largest.
        per_sample: Fit each sample of a batch by itself (stack and block level), so that none depends on the others.
        fallback: Where there are too few values, or where the fit gives no finite weights.
    """

    snapshots: int = 6
    rank: int = 0
    cut: float = 1e-4
    ridge: float = 1e-8
    per_sample: bool = True
    fallback: Taylor | Newton = Taylor(1)

    def __post_init__(self) -> None:
        for name, low, high in (("snapshots", LEAST, MAX_HISTORY), ("rank", 0, MAX_HISTORY)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"{name}={value!r} must be an integer from {low} to {high}")
        if not 0 < self.cut < 1:
            raise ValueError(f"cut={self.cut!r} must be between 0 and 1")
        if not 0 <= self.ridge < math.inf:
            raise ValueError(f"ridge={self.ridge!r} must be finite, 0 or more")

    @property
    def capacity(self) -> int:
        """`snapshots`, or what the fallback needs."""
        return max(self.snapshots, self.fallback.capacity)

    def weights(self, stamps: Sequence[float], target: float, values: Any = None) -> list[float]:
        """The decomposition's weights; those of the fallback without a history, or with too few values."""
        count = min(evenly_spaced(stamps), self.snapshots)
        if count >= LEAST and isinstance(values, History):
            spacing = stamps[0] - stamps[1]
            inner = values.gram()[:count, :count].flip(0, 1)  # oldest first
            found = dmd_weights(inner, (target - stamps[0]) / spacing, self.rank, self.cut, self.ridge)
            if found is not None:
                return found[::-1] + [0.0] * (len(stamps) - count)
        return list(self.fallback.weights(stamps, target))


def evenly_spaced(stamps: Sequence[float]) -> int:
    """How many of the newest stamps have equal gaps."""
    count = min(len(stamps), 2)
    while count < len(stamps) and stamps[count - 1] - stamps[count] == stamps[0] - stamps[1]:
        count += 1
    return count


def dmd_weights(
    inner: Tensor, ahead: float, rank: int = 0, cut: float = 1e-4, ridge: float = 1e-8
) -> list[float] | None:
    """The weights of snapshots `y_0 .. y_(n-1)`, oldest first, that give `y` at `n - 1 + ahead`.

    With `X = [y_0 .. y_(n-2)] = U S V^T` and `Y = [y_1 .. y_(n-1)]`: `S^2` and `V` are the eigenvalues and vectors of
    `X^T X`, the map is `U^T Y V / S = (V / S)^T (X^T Y) (V / S)`, its modes are `Y (V / S) W`, and the amplitudes are
    the least-squares fit of `y_(n-1)`, in coordinates of the columns of `Y`.

    Args:
        inner: Inner products, fp64 `(n, n)`, on the host.
        ahead: Spacings ahead of the newest; need not be whole.
        rank: As in `DynamicModes`.
        cut: As in `DynamicModes`.
        ridge: As in `DynamicModes`.

    Returns:
        One weight for each snapshot, or None if there are no finite ones.
    """
    count = inner.shape[0] - 1
    if not bool(torch.isfinite(inner).all()) or float(inner.diagonal()[:-1].max()) <= 0:
        return None
    squares, right = torch.linalg.eigh(inner[:count, :count])
    singular, right = squares.clamp_min(0).sqrt().flip(0), right.flip(1)
    modes = int((singular > singular[0] * cut).sum()) if rank == 0 else min(rank, int((singular > 0).sum()))
    scaled = right[:, :modes] / (singular[:modes] + ridge * singular[0])
    rates, vectors = torch.linalg.eig(scaled.T @ inner[:count, 1:] @ scaled)
    coordinates = scaled.to(vectors.dtype) @ vectors
    # Least squares in the metric of Y: `root^T root` are the inner products of its columns.
    squares, axes = torch.linalg.eigh(inner[1:, 1:])
    root = (squares.clamp_min(0).sqrt()[:, None] * axes.T).to(vectors.dtype)
    amplitudes = torch.linalg.lstsq(root @ coordinates, root[:, -1:], driver="gelsd").solution[:, 0]
    found = (coordinates @ (rates**ahead * amplitudes)).real
    return [0.0, *found.tolist()] if bool(torch.isfinite(found).all()) else None
