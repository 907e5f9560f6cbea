"""The polynomial of TeaCache (Liu et al. 2024, arXiv 2411.19108).

Each step of a run gives a point: `x`, the relative change of the first block's modulated input (or of the time
embedding) since the step before, `mean|F_t - F_(t-1)| / mean|F_(t-1)|`, and `y`, that of the model's output. The
polynomial is the least squares fit of y on x, over samples, guidance branches and runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..models import stack_of
from ..models._modulated import modulated_tap, time_tap
from ..ops import relative_difference
from ..patching.patch import Context
from .probe import Probe

TAPS = ("modulated", "time")


class Fit(Probe):
    """Measures the points and fits the polynomial.

    Args:
        tap: `"modulated"` or `"time"`, as in `TeaCache`.
        degree: Degree of the polynomial; the paper's is 4.
    """

    def __init__(self, tap: str = "modulated", degree: int = 4) -> None:
        super().__init__()
        if tap not in TAPS:
            raise ValueError(f"tap={tap!r}; allowed are {' and '.join(map(repr, TAPS))}")
        if not isinstance(degree, int) or isinstance(degree, bool) or not 1 <= degree <= 8:
            raise ValueError(f"degree={degree!r} must be an integer from 1 to 8")
        self.tap, self.degree = tap, degree
        self._before: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self._input: Tensor | None = None
        self.points: list[tuple[float, float]] = []

    def watch(self, context: Context) -> None:
        """The first block, and the model itself."""
        block = stack_of(context.model).segments[0][0]
        tap = modulated_tap(block) if self.tap == "modulated" else time_tap(block)

        def at_block(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            if self.generation.active:
                with torch.no_grad():
                    self._input = tap(module, args, kwargs).detach().clone()
            return inner(*args, **kwargs)

        def at_model(_: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            if self.arrived() and self._input is not None:
                value = next(t for t in pytree.tree_leaves(_plain(output)) if isinstance(t, Tensor))
                self._compare(self._input, value.detach().clone())
                self._input = None
            return output

        context.transaction.wrap_forward(block, at_block)
        context.transaction.wrap_forward(context.model, at_model)

    def _compare(self, given: Tensor, output: Tensor) -> None:
        at = self.generation
        self._before = {key: value for key, value in self._before.items() if key[0] == at.run}
        before = self._before.get((at.run, at.branch_key))
        if before is not None:
            if before[0].shape != given.shape or before[1].shape != output.shape:
                raise ValueError("the model's input or output changes its shape within a run")
            x, y = _moved(given, before[0]), _moved(output, before[1])
            if len(x) != len(y):  # one time embedding for a batch, or samples whose tokens are packed
                x, y = x.mean(0, keepdim=True), y.mean(0, keepdim=True)
            both = torch.stack([x, y], 1)
            self.points += [(a, b) for a, b in both.tolist() if both.isfinite().all()]
        self._before[at.run, at.branch_key] = given, output

    def values(self) -> dict[str, Any]:
        """The polynomial, highest degree first, and how far its points are from it (root of the mean square)."""
        distinct = len({x for x, _ in self.points})
        if distinct <= self.degree:
            raise ValueError(
                f"{distinct} different changes were seen; a polynomial of degree {self.degree} needs more than "
                f"{self.degree}: measure more steps or runs, or lower the degree"
            )
        polynomial, error = fit(self.points, self.degree)
        return {"polynomial": polynomial, "tap": self.tap, "points": len(self.points), "error": error}


def _plain(output: Any) -> Any:
    """The output as something that pytree looks into (diffusers' output classes are dictionaries)."""
    return dict(output) if isinstance(output, dict) else output


def _moved(value: Tensor, before: Tensor) -> Tensor:
    """The relative change of each sample, on the host in double precision."""
    if value.dim() < 2:
        value, before = value.reshape(1, -1), before.reshape(1, -1)
    sums = relative_difference(value.float(), before.float()).double().cpu()
    return sums[:, 0] / sums[:, 1]


def fit(points: list[tuple[float, float]], degree: int) -> tuple[list[float], float]:
    """The least squares polynomial through points `(x, y)`.

    Returns:
        Its coefficients, highest degree first, and the root of the mean squared error.
    """
    x, y = torch.tensor(points, dtype=torch.float64).T
    scale = x.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    powers = torch.arange(degree, -1, -1, dtype=torch.float64)
    # Scaled to at most 1: powers of small changes would otherwise be of very different size.
    vandermonde = (x / scale)[:, None] ** powers
    scaled = torch.linalg.lstsq(vandermonde, y[:, None], driver="gelsd").solution[:, 0]
    error = (vandermonde @ scaled - y).square().mean().sqrt()
    return (scaled / scale**powers).tolist(), float(error)


def check(values: Mapping[str, Any], steps: int) -> None:
    """ValueError unless there is a polynomial and its tap."""
    polynomial = values.get("polynomial")
    if not isinstance(polynomial, tuple) or not polynomial:
        raise ValueError("polynomial must be a list of numbers, highest degree first")
    if any(isinstance(c, bool) or not isinstance(c, int | float) for c in polynomial):
        raise ValueError("polynomial must hold numbers")
    if values.get("tap") not in TAPS:
        raise ValueError(f"tap={values.get('tap')!r}; allowed are {' and '.join(map(repr, TAPS))}")
