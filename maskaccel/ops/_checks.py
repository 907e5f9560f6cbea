"""Argument checks shared by the ops. Each error names the argument, its value, and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value: object) -> Tensor:
    """`value` as a tensor, or TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def floating(name: str, t: object) -> Tensor:
    """A tensor of fp32, bf16, fp16 or fp64."""
    t = tensor(name, t)
    if t.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {t.dtype}; allowed are float32, bfloat16, float16, float64")
    return t


def activation(name: str, t: object, dims: str = "B, N, D") -> Tensor:
    """A floating tensor with the named dims, the last of them not empty."""
    t = floating(name, t)
    if t.dim() != dims.count(",") + 1:
        raise ValueError(f"{name} must be ({dims}), got shape {tuple(t.shape)}")
    if t.shape[-1] == 0:
        raise ValueError(f"{name} has an empty last dimension: shape {tuple(t.shape)}")
    return t


def same_device(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """Both tensors on one device."""
    if t.device != other.device:
        raise ValueError(f"{name} is on {t.device}, {other_name} on {other.device}; they must be on one device")


def like(name: str, t: object, other_name: str, other: Tensor) -> Tensor:
    """A tensor of the shape, dtype and device of another."""
    t = tensor(name, t)
    if t.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be that of {other_name}, {tuple(other.shape)}")
    if t.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {t.dtype}; it must be that of {other_name}, {other.dtype}")
    same_device(name, t, other_name, other)
    return t


def vector(name: str, t: Tensor | None, size: int, x: Tensor) -> None:
    """None, or a floating `(size,)` on the device of x."""
    if t is None:
        return
    t = floating(name, t)
    if tuple(t.shape) != (size,):
        raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be ({size},)")
    same_device(name, t, "x", x)


def modulation(name: str, t: Tensor | None, x: Tensor, rows: Tensor | None) -> None:
    """None, or a modulation tensor that broadcasts against x (B, N, D) by one of the row forms."""
    if t is None:
        return
    t = floating(name, t)
    batch, n, width = x.shape
    if t.dim() not in (2, 3) or t.shape[-1] != width:
        forms = "(R, D)" if rows is not None else "(B, D), (B, 1, D), (B, F, D) with F dividing N, or (B, N, D)"
        raise ValueError(f"{name} has shape {tuple(t.shape)}; x is {tuple(x.shape)}, so it must be {forms}, D={width}")
    if rows is not None:
        if t.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(t.shape)}; with rows it must be (R, {width})")
    else:
        if t.shape[0] not in (1, batch):
            shape = tuple(t.shape)
            raise ValueError(f"{name} has batch {shape[0]} (shape {shape}); x has batch {batch}: allowed 1, {batch}")
        if t.dim() == 3 and (t.shape[1] == 0 or n % t.shape[1]):
            raise ValueError(f"{name} has {t.shape[1]} rows a sample (shape {tuple(t.shape)}); it must divide N={n}")
    same_device(name, t, "x", x)


def indices(name: str, t: Tensor | None, batch: int, n: int, limit: int, x: Tensor) -> None:
    """None, or int32 `(n,)` or `(batch, n)` with values in [0, limit)."""
    if t is None:
        return
    t = tensor(name, t)
    if t.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {t.dtype}; it must be int32")
    if tuple(t.shape) not in ((n,), (batch, n)):
        raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be ({n},) or ({batch}, {n})")
    same_device(name, t, "x", x)
    # On a GPU the check would wait for the device; there the values are the caller's promise.
    if t.device.type == "cpu" and t.numel() and not torch.compiler.is_compiling():
        low, high = int(t.min()), int(t.max())
        if low < 0 or high >= limit:
            raise ValueError(f"{name} holds values in [{low}, {high}]; allowed are 0 to {limit - 1}")


def choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """`value` is one of `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; allowed are {', '.join(map(repr, allowed))}")


def count(name: str, value: object, least: int = 0) -> int:
    """An integer, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer, {least} or more")
    return value


def dense_last(t: Tensor | None) -> Tensor | None:
    """`t` with a contiguous last dim; copied only if it has none."""
    if t is None or t.shape[-1] == 1 or t.stride(-1) == 1:
        return t
    # not contiguous(): that returns an empty tensor as it is, with whatever strides it was expanded to
    return t.clone(memory_format=torch.contiguous_format)


def no_gradient(op: str, **tensors: Tensor | None) -> None:
    """Refuse inputs that require grad, for an op without a derivative."""
    for name, t in tensors.items():
        if torch.is_grad_enabled() and t is not None and t.requires_grad:
            raise ValueError(f"{op} has no derivative, but {name} requires grad; call it under torch.no_grad()")


def one_dtype(x: Tensor, *operands: Tensor | None) -> list[Tensor | None]:
    """Operands as the kernels take them: all of x's dtype, or all fp32, last dim contiguous."""
    dtypes = {t.dtype for t in operands if t is not None}
    if len(dtypes) > 1 or (dtypes and next(iter(dtypes)) not in (x.dtype, torch.float32)):
        operands = tuple(None if t is None else t.float() for t in operands)
    return [dense_last(t) for t in operands]


def overlap(t: Tensor | None, written: Tensor) -> bool:
    """Whether a tensor shares memory with one that is written."""
    if t is None or torch.compiler.is_compiling() or t.device.type == "meta" or 0 in (t.numel(), written.numel()):
        return False
    (first, last), (start, end) = _extent(t), _extent(written)
    return t.device == written.device and first < end and start < last


def _extent(t: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one after the last."""
    span = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    return t.data_ptr(), t.data_ptr() + span * t.element_size()
