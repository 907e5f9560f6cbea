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


def judged(history: Tensor, x: Tensor | None) -> Tensor:
    """Whichever of the two no kernel serves, for the choice of the backend: `history` unless `x` is fp64."""
    return x if x is not None and x.dtype == torch.float64 else history


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


def writable_history(history: Tensor, newest: object) -> int:
    """The entry that is written: a position in a dense `history` whose elements are all distinct memory."""
    entry = integer("newest", newest, 0, history.shape[0] - 1)
    if dense_steps(history) is not history:
        raise ValueError(f"history is written to, so it must be dense in N and D; its strides are {history.stride()}")
    if any(history.stride(i) == 0 and history.shape[i] > 1 for i in (0, 1)):
        raise ValueError(f"history is written to, but it is expanded: strides {history.stride()}")
    return entry


def apart(name: str, t: Tensor | None, written: Tensor) -> None:
    """None, or a tensor that shares no memory with what is written."""
    if _checks.overlap(t, written):
        raise ValueError(f"{name} shares memory with history[newest], which this call writes; pass a copy")


def integer(name: str, value: object, low: int, high: int) -> int:
    """An int from `low` to `high`."""
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}={value}; allowed are {low} to {high}")
    return value


def per_row(name: str, value: object, batch: int, columns: int | None, like: Tensor) -> Tensor:
    """An int32 or int64 `(batch, columns)` (any number of them for None), or `(1, ...)` for all samples, as it is."""
    t = _checks.tensor(name, value)
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {t.dtype}; it must be int32 (or int64)")
    if t.dim() != 2 or t.shape[0] not in (1, batch) or columns not in (None, t.shape[1]):
        form = f"({batch}, {'M' if columns is None else columns})"
        raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be {form}, with a batch of {batch} or 1")
    _checks.same_device(name, t, "history", like)
    return t


def as_rows(t: Tensor, batch: int) -> Tensor:
    """Checked `per_row` values as the kernels take them: int32, contiguous, one row for each sample."""
    return t.to(torch.int32).expand(batch, -1).contiguous()
