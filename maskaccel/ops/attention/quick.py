"""Attention calls that need no check in Python: the kernels check their whole contract before any work.

Each function returns None for a call that is not of this kind, and raises one of `_call.FAULTS` for one with a fault;
the caller then takes the path that names the fault or puts the operands right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _call, _registry
from .._backends import automatic, namespace
from .schema import KEEP, PRUNE, packed, packed_test

if TYPE_CHECKING:
    from ...masks.tiles import TileMask

BLOCK = (128, 128)  # of keep bits without a mask
NO_MASK: tuple = (None,) * 8
_INF = float("inf")
_compiler = torch.compiler


@functools.cache
def _native(name: str, device: torch.device, dtype: torch.dtype, grad: bool) -> Callable[..., Any] | None:
    """The native kernel of an op, or its call under autograd; None where another backend serves such tensors."""
    chosen = automatic(name, device, dtype)
    if chosen not in ("cuda", "cpu"):
        return None
    space = namespace(chosen)
    return _registry.direct(space, name) if grad else _registry.quick(_registry.op(space, name))


def _finite(value: Any) -> bool:
    return (type(value) is float or type(value) is int) and -_INF < value < _INF


def _lists(mask: TileMask | None) -> tuple:
    if mask is None:
        return (None,) * 5
    index, count, order, _, _, _, pattern_of, patterns = mask.operands(False)
    return index, count, order, pattern_of, patterns


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: TileMask | None, scale: float | None, bias: Tensor | None,
    out_scale: Tensor | None, out_add: Tensor | None, skip_threshold: float | None, reference_lse: Tensor | None,
    prune: bool, return_keep: bool,
) -> tuple | None:  # fmt: skip
    """`(out, lse)`, and keep bits where the call asks for more than the everyday one."""
    if _compiler._is_compiling_flag:
        return None
    shape = q.shape
    if mask is None:
        bm, bn = BLOCK
    elif mask.shape == (shape[1], k.shape[1]):  # kernels see tiles alone
        bm, bn = mask.block
    else:
        return None
    if scale is None and shape[3]:
        scale = shape[3] ** -0.5
    elif not _finite(scale):
        return None
    grad = _call.wants_grad((q, k, v, bias, out_scale, out_add))
    if grad and (prune or out_scale is not None or out_add is not None or _call.transformed()):
        return None
    flags, threshold = 0, 0.0
    few = bias is None and out_scale is None and out_add is None
    numbers = packed(bm, bn, scale) if few else None
    if skip_threshold is not None or reference_lse is not None or prune or return_keep:
        flags = (KEEP if return_keep else 0) | (PRUNE if prune else 0)
        if not flags or not _finite(skip_threshold):
            return None
        threshold = skip_threshold  # type: ignore[assignment]
        test = packed_test(flags, threshold)
        tested = None if grad else _native("tile_attention_tested_bare", q.device, q.dtype, False)
        if tested is not None and numbers is not None and test is not None:
            return tested(q, k, v, *_lists(mask), reference_lse, numbers, test)  # type: ignore[no-any-return]
    elif mask is None or not grad:  # under autograd a mask brings the lists of its transposed form too
        bare = _native("tile_attention_bare", q.device, q.dtype, grad)
        if bare is not None and numbers is not None:
            return bare(q, k, v, *_lists(mask), numbers)  # type: ignore[no-any-return]
    whole = _native("tile_attention", q.device, q.dtype, grad)
    if whole is None:
        return None
    operands = NO_MASK if mask is None else mask.operands(grad)
    return whole(  # type: ignore[no-any-return]
        q, k, v, *operands, bias, None, None, None, reference_lse, out_scale, out_add, bm, bn, scale, threshold, flags
    )


def column_sums(
    q: Tensor, k: Tensor, lse: Tensor, mask: TileMask | None, scale: float | None, bias: Tensor | None
) -> Tensor | None:
    """The sums of `attention_column_sums`."""
    if _compiler._is_compiling_flag or _call.wants_grad((q, k, lse, bias)):
        return None
    if mask is not None and mask.shape != (q.shape[1], k.shape[1]):
        return None
    if not q.shape[3] if scale is None else not _finite(scale):
        return None
    kernel = _native("attention_column_sums", q.device, q.dtype, False)
    if kernel is None:
        return None
    scale = q.shape[3] ** -0.5 if scale is None else scale
    (bm, bn), lists = BLOCK, (None,) * 5
    if mask is not None:
        bm, bn = mask.block
        lists = (*mask.transposed_lists(), mask.pattern_of, mask.patterns)  # type: ignore[assignment]
    return kernel(q, k, lse, *lists, bias, None, None, None, bm, bn, scale)  # type: ignore[no-any-return]
