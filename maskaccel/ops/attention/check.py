"""Argument checks of the attention ops. Each error names the argument, its value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks
from .._backends import KERNEL_DTYPES

if TYPE_CHECKING:
    from ...masks.tiles import TileMask

HEAD_DIMS = tuple(range(16, 257, 8))  # of the kernels


def qkv(q: Any, k: Any, v: Any) -> None:
    """`(B, Sq, H, D)` and twice `(B, Sk, Hk, D)`, of one dtype and device, with Hk dividing H."""
    q = _checks.activation("q", q, "B, Sq, H, D")
    k = _checks.activation("k", k, "B, Sk, Hk, D")
    _checks.like("v", v, "k", k)
    if k.dtype != q.dtype:
        raise TypeError(f"k has dtype {k.dtype}, q {q.dtype}; they must be of one dtype")
    _checks.same_device("k", k, "q", q)
    if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(f"q is {tuple(q.shape)}, k is {tuple(k.shape)}; batch and head dim must be equal")
    heads_divide(q, k)


def heads_divide(q: Tensor, k: Tensor) -> None:
    """Hk divides H."""
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads; they must divide the {q.shape[2]} heads of q")


def mask_fits(mask: TileMask, q: Tensor, k: Tensor) -> None:
    """The mask is for scores of this shape."""
    if not hasattr(mask, "transposed_lists"):  # its class is made of these ops: no import here
        raise TypeError(f"mask must be a TileMask, got {type(mask).__name__}; TileMask.from_bool takes a bool tensor")
    if mask.shape != (q.shape[1], k.shape[1]):
        raise ValueError(f"mask is for {mask.shape} queries and keys; q and k have {(q.shape[1], k.shape[1])}")
    if mask.batch not in (1, q.shape[0]):
        raise ValueError(f"mask has batch {mask.batch}; q has batch {q.shape[0]}: allowed are 1 and {q.shape[0]}")
    if mask.heads not in (1, q.shape[2]):
        raise ValueError(f"mask has {mask.heads} heads; q has {q.shape[2]}: allowed are 1 and {q.shape[2]}")
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device}, q on {q.device}; they must be on one device")


def broadcastable(name: str, t: Any, shape: tuple[int, ...], dims: str, q: Tensor) -> None:
    """None, or a floating tensor of `shape` with any dim 1, fp32 or of q's dtype."""
    if t is None:
        return
    t = _checks.floating(name, t)
    if t.dim() != len(shape) or any(have not in (1, want) for have, want in zip(t.shape, shape, strict=True)):
        raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be ({dims}) = {shape}, any of them 1")
    if t.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"{name} has dtype {t.dtype}; allowed are {q.dtype} and torch.float32")
    _checks.same_device(name, t, "q", q)


def lse_of(name: str, t: Any, q: Tensor) -> None:
    """None, or fp32 `(B, H, Sq)`."""
    if t is None:
        return
    t = _checks.floating(name, t)
    expected = (q.shape[0], q.shape[2], q.shape[1])
    if tuple(t.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be (B, H, Sq) = {expected}")
    if t.dtype != (torch.float64 if q.dtype == torch.float64 else torch.float32):
        raise TypeError(f"{name} has dtype {t.dtype}; it must be float32")
    _checks.same_device(name, t, "q", q)


def number(name: str, value: Any, *, positive: bool = False) -> float:
    """A finite number; NaN and infinities are named."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number")
    if positive and value <= 0:
        raise ValueError(f"{name}={value!r} must be above 0")
    return float(value)


def head_dim_refusal(width: int, dtype: torch.dtype) -> str | None:
    """Why kernels do not take this head dim and dtype; None if they do."""
    if dtype not in KERNEL_DTYPES:
        return f"dtype {dtype} is not served by kernels (float32, bfloat16, float16)"
    if width not in HEAD_DIMS:
        return f"head dim {width} is not served by kernels: they take multiples of 8 from 16 to 256"
    return None


def check_block(block: Sequence[int]) -> tuple[int, int]:
    """`block` as (bm, bn), or ValueError."""
    sizes = tuple(block) if isinstance(block, Sequence) else ()
    if len(sizes) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) for n in sizes):
        raise ValueError(f"block={block!r} must be two integers, rows and columns of a tile")
    if sizes[0] < 16 or sizes[0] % 16 or sizes[1] < 32 or sizes[1] % 32:
        raise ValueError(f"block={sizes} is not served: rows must be a multiple of 16, columns one of 32")
    return sizes
