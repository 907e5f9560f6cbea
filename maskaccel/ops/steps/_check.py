"""Checks that the step ops share. Each error names the argument, its value, and what is allowed."""

from __future__ import annotations

from torch import Tensor

from .. import _checks

MAX_HISTORY = 16


def history(value: object, dims: str = "K, B, N, D") -> Tensor:
    """Remembered features, 1 to 16 steps of them."""
    t = _checks.activation("history", value, dims)
    steps = t.shape[-4]
    if not 1 <= steps <= MAX_HISTORY:
        raise ValueError(f"history holds K={steps} steps; allowed are 1 to {MAX_HISTORY}")
    return t


def dense_steps(history: Tensor) -> Tensor:
    """`history` with each step of each sample dense; copied only where it is not."""
    n, width = history.shape[-2:]
    dense = (width == 1 or history.stride(-1) == 1) and (n == 1 or history.stride(-2) == width)
    return history if dense else history.contiguous()
