"""Checks that the step ops share. Each error names the argument, its value, and what is allowed."""

from __future__ import annotations

import torch
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


def weights(value: object, history: Tensor, *shapes: tuple[int, ...]) -> None:
    """fp32 (or fp64) weights of one of `shapes`."""
    t = _checks.tensor("weights", value)
    if t.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weights has dtype {t.dtype}; it must be float32")
    if tuple(t.shape) not in shapes:
        raise ValueError(f"weights has shape {tuple(t.shape)}; it must be {' or '.join(map(str, shapes))}")
    _checks.same_device("weights", t, "history", history)


def residual(x: Tensor | None, history: Tensor) -> None:
    """None, or the residual stream that a forecast is added to."""
    if x is None:
        return
    _checks.same_device("x", _checks.floating("x", x), "history", history)
    need = tuple(history.shape[-3:])
    if tuple(x.shape) != need:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be {need}, as a step of history")


def gates(value: Tensor | None, history: Tensor) -> None:
    """None, or one gate for each site of `(S, K, B, N, D)`."""
    if value is None:
        return
    t = _checks.floating("gates", value)
    sites, _, batch, n, width = history.shape
    shape = tuple(t.shape)
    if t.dim() not in (3, 4) or shape[0] != sites or shape[1] not in (1, batch) or shape[-1] != width:
        forms = f"({sites}, {batch}, {width}) or ({sites}, {batch}, F, {width})"
        raise ValueError(f"gates has shape {shape}; it must be {forms}, with a batch of {batch} or 1")
    if t.dim() == 4 and (shape[2] == 0 or n % shape[2]):
        raise ValueError(f"gates has {shape[2]} rows a sample (shape {shape}); it must divide N={n}")
    _checks.same_device("gates", t, "history", history)
