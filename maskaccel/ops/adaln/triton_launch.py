"""Calls of the adaLN norm and gate kernels: the contract is checked here, strides and launch shapes worked out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _triton as host
from .schema import (
    CLIP,
    LAWS,
    NEED_A,
    NEED_BIAS,
    NEED_GATE,
    NEED_POST,
    NEED_SCALE,
    NEED_SCALE2,
    NEED_SHIFT,
    NEED_SHIFT2,
    NEED_WEIGHT,
    NEED_X,
    NO_RESIDUAL,
)  # fmt: skip

Operand = tuple[Tensor, int, int, int]
_NARROW = LAWS["narrow"]


def _modulation(name: str, m: Tensor | None, x: Tensor, rows: Tensor | None) -> Operand | None:
    """(tensor, batch stride, row stride, tokens of a row): where a token finds its row, for every allowed shape."""
    if m is None:
        return None
    batch, n, width = x.shape
    if m.device != x.device:
        raise RuntimeError(f"{name} must be on {x.device}, got {m.device}")
    if m.dtype not in (x.dtype, torch.float32):
        raise RuntimeError(f"{name} must be {x.dtype} or fp32, got {m.dtype}")
    if m.dim() not in (2, 3) or m.shape[-1] != width:
        raise RuntimeError(f"{name} must end in {width}, got {tuple(m.shape)}")
    if width > 1 and m.stride(-1) != 1:
        raise RuntimeError(f"{name} must be contiguous in its last dim, got {m.stride()}")
    if rows is not None:
        if m.dim() != 2:
            raise RuntimeError(f"{name} must be (R, {width}) with rows, got {tuple(m.shape)}")
        return m, 0, m.stride(0), 1
    if m.shape[0] not in (1, batch):
        raise RuntimeError(f"{name} must have batch 1 or {batch}, got {tuple(m.shape)}")
    groups = m.shape[1] if m.dim() == 3 else 1
    if groups == 0 or n % groups:
        raise RuntimeError(f"{name} must have a row count that divides {n}, got {tuple(m.shape)}")
    of_batch = 0 if m.shape[0] == 1 else m.stride(0)
    return (m, of_batch, m.stride(1), n // groups) if groups > 1 else (m, of_batch, 0, max(n, 1))


def _check_rows(rows: Tensor | None, x: Tensor) -> int:
    """Batch stride of `rows`."""
    if rows is None:
        return 0
    batch, n, _ = x.shape
    if rows.dtype != torch.int32 or not rows.is_contiguous():
        raise RuntimeError(f"rows must be contiguous int32, got {rows.dtype}")
    if rows.shape not in ((n,), (batch, n)):
        raise RuntimeError(f"rows must be ({n},) or ({batch}, {n}), got {tuple(rows.shape)}")
    if rows.device != x.device:
        raise RuntimeError(f"rows must be on {x.device}, got {rows.device}")
    return n if rows.dim() == 2 else 0


class Call:
    """Operands common to forward and backward, checked once."""

    def __init__(self, x: Tensor, flags: int, rows: Tensor | None, gate=None, scale=None, shift=None, scale2=None,
                 shift2=None, gate_table=None, scale_table=None, shift_table=None, weight=None, bias=None,
                 post_weight=None) -> None:  # fmt: skip
        width = x.shape[-1]
        self.rows, self.rows_batch = rows, _check_rows(rows, x)
        self.mods = [
            _modulation(name, m, x, rows)
            for name, m in (("gate", gate), ("scale", scale), ("shift", shift), ("scale2", scale2), ("shift2", shift2))
        ]
        self.tables = (gate_table, scale_table, shift_table)
        # a post weight without a post norm has no effect, and a gradient of 0
        self.idle_post = post_weight is not None and not flags >> 6 & 3
        self.vectors = (weight, bias, None if self.idle_post else post_weight)
        for name, t in zip(("gate_table", "scale_table", "shift_table", "weight", "bias", "post_weight"),
                           (*self.tables, weight, bias, post_weight), strict=True):  # fmt: skip
            host.check_vector(name, t, width, x)
        host.one_dtype("modulation and tables", gate, scale, shift, scale2, shift2, *self.tables)
        host.one_dtype("weight, bias and post_weight", weight, bias, post_weight)
        if flags & 3 == 3:
            raise RuntimeError(f"flags name no norm: {flags}")
        # without FMA contraction no product escapes the rounding that the narrow law asks for
        self.options = {"enable_fp_fusion": not flags & _NARROW}


def _forward(x: Tensor, a: Tensor | None, call: Call, outputs: Sequence[Tensor | None], eps: float, post_eps: float,
             offset: float, flags: int) -> None:  # fmt: skip
    from .triton_norm import adaln_forward

    batch, n, width = x.shape
    if batch * n == 0:
        return
    block, warps = host.block_and_warps(width, 16)
    a_strides = (a.stride(0), a.stride(1)) if a is not None else (0, 0)
    host.launch(
        adaln_forward, (batch * n,), x, x, a, *outputs, *call.mods, *call.tables, *call.vectors, call.rows, x.stride(0),
        x.stride(1), *a_strides, call.rows_batch, n, width, eps, post_eps, offset, FLAGS=flags & ~NO_RESIDUAL,
        BLOCK=block, num_warps=warps, **call.options,
    )  # fmt: skip


def norm_modulate(x, scale, shift, weight, bias, scale_table, shift_table, rows, eps, offset, flags):
    host.check_activation("x", x)
    call = Call(x, flags, rows, None, scale, shift, None, None, None, scale_table, shift_table, weight, bias)
    y = x.new_empty(x.shape)
    _forward(x, None, call, (None, y, None), eps, eps, offset, flags)
    return y


def norm_modulate_pair(x, scale, shift, scale2, shift2, weight, bias, scale_table, shift_table, rows, eps, offset,
                       flags):  # fmt: skip
    host.check_activation("x", x)
    call = Call(x, flags, rows, None, scale, shift, scale2, shift2, None, scale_table, shift_table, weight, bias)
    y, y2 = x.new_empty(x.shape), x.new_empty(x.shape)
    _forward(x, None, call, (None, y, y2), eps, eps, offset, flags)
    return y, y2


def gate_residual(x, a, gate, gate_table, post_weight, rows, post_eps, flags):
    host.check_activation("x", x)
    host.check_activation("a", a, x)
    call = Call(x, flags, rows, gate, gate_table=gate_table, post_weight=post_weight)
    r = x.new_empty(x.shape)
    _forward(x, a, call, (r, None, None), post_eps, post_eps, 0.0, flags)
    return r


def _gate_norm(x, a, gate, gate_table, post_weight, scale, shift, scale2, shift2, weight, bias, scale_table,
               shift_table, rows, eps, post_eps, offset, flags, pair):  # fmt: skip
    host.check_activation("x", x)
    host.check_activation("a", a, x)
    call = Call(x, flags, rows, gate, scale, shift, scale2, shift2, gate_table, scale_table, shift_table, weight, bias,
                 post_weight)  # fmt: skip
    r = None if flags & NO_RESIDUAL else x.new_empty(x.shape)
    y, y2 = x.new_empty(x.shape), x.new_empty(x.shape) if pair else None
    _forward(x, a, call, (r, y, y2), eps, post_eps, offset, flags)
    return (x.new_empty(0) if r is None else r), y, y2


def gate_residual_norm_modulate(x, a, gate, gate_table, post_weight, scale, shift, weight, bias, scale_table,
                                shift_table, rows, eps, post_eps, offset, flags):  # fmt: skip
    return _gate_norm(x, a, gate, gate_table, post_weight, scale, shift, None, None, weight, bias, scale_table,
                      shift_table, rows, eps, post_eps, offset, flags, False)[:2]  # fmt: skip


def gate_residual_norm_modulate_pair(x, a, gate, gate_table, post_weight, scale, shift, scale2, shift2, weight, bias,
                                     scale_table, shift_table, rows, eps, post_eps, offset, flags):  # fmt: skip
    return _gate_norm(x, a, gate, gate_table, post_weight, scale, shift, scale2, shift2, weight, bias, scale_table,
                      shift_table, rows, eps, post_eps, offset, flags, True)  # fmt: skip


class _Shared:
    """The fp32 gradient of one modulation operand: what the kernel writes, and how it becomes the result."""

    def __init__(self, operand: Operand | None, table: Tensor | None, wanted: int, x: Tensor,
                 rows: Tensor | None) -> None:  # fmt: skip
        batch, n, _ = x.shape
        self.wanted = bool(wanted) and (operand is not None or table is not None)
        self.batch, self.groups = 1, 1
        if operand is not None:
            m = operand[0]
            groups = m.shape[1] if m.dim() == 3 else 1
            self.batch, self.groups = (batch, n) if rows is not None else (m.shape[0], groups)
        self.direct = self.groups == n
        self.partials: Tensor | None = None

    def allocate(self, x: Tensor, chunks: int) -> Tensor | None:
        if self.wanted:
            batch, n, width = x.shape
            self.partials = x.new_empty(batch, n if self.direct else chunks, width, dtype=torch.float32)
        return self.partials

    def result(self, x: Tensor) -> Tensor:
        if not self.wanted:
            return x.new_empty(0, dtype=torch.float32)
        if self.partials is None:  # no token at all
            return x.new_zeros(self.batch, self.groups, x.shape[-1], dtype=torch.float32)
        return host.reduce_partials(self.partials, self.batch, self.groups)


def _backward(dr, dy, dy2, r, a, call: Call, eps, post_eps, offset, flags, needs):
    """All gradients: (dx, da, [gate, scale, shift, scale2, shift2], [weight, bias, post_weight])."""
    x = r if r is not None else a
    batch, n, width = x.shape
    dx = x.new_empty(x.shape if needs & NEED_X else 0)
    da = x.new_empty(x.shape if needs & NEED_A else 0)
    bits = (NEED_GATE, NEED_SCALE, NEED_SHIFT, NEED_SCALE2, NEED_SHIFT2)
    shared = [
        _Shared(m, table, needs & bit, x, call.rows)
        for m, table, bit in zip(call.mods, (*call.tables, None, None), bits, strict=True)
    ]
    vector_bits = (NEED_WEIGHT, NEED_BIAS, NEED_POST)
    wanted = [v is not None and needs & bit for v, bit in zip(call.vectors, vector_bits, strict=True)]
    no_effect = x.new_zeros(width, dtype=torch.float32) if call.idle_post and needs & NEED_POST else None
    if batch * n == 0:
        vectors = [x.new_zeros(width if w else 0, dtype=torch.float32) for w in wanted]
        return dx, da, [s.result(x) for s in shared], [*vectors[:2], vectors[2] if no_effect is None else no_effect]

    from .triton_backward import adaln_backward

    segment = n
    for s in shared:
        if s.wanted and not s.direct:
            segment = math.gcd(segment, n // s.groups)
    run, segment_runs = host.runs(batch * n, segment)
    chunks = n // segment * segment_runs
    grads = [s.allocate(x, chunks) for s in shared]
    partials = [x.new_empty(1, batch * chunks, width, dtype=torch.float32) if w else None for w in wanted]
    strides = [s for t in (dr, dy, dy2, r, a) for s in ((t.stride(0), t.stride(1)) if t is not None else (0, 0))]
    # half as many elements a thread as forward: the running sums live in registers too
    block, warps = host.block_and_warps(width, 8)
    host.launch(
        adaln_backward, (batch * chunks,), x, dr, dy, dy2, r, a, *call.mods, *call.tables, *call.vectors, call.rows,
        dx if needs & NEED_X else None, da if needs & NEED_A else None, *grads, *partials, *strides, call.rows_batch,
        n, width, segment, run, segment_runs, chunks, eps, post_eps, offset,
        FLAGS=flags & ~(NO_RESIDUAL | CLIP | _NARROW), BLOCK=block, num_warps=warps,
        DIRECT=sum(1 << i for i, s in enumerate(shared) if s.direct and s.wanted),
    )  # fmt: skip
    vectors = [
        x.new_empty(0, dtype=torch.float32) if p is None else host.reduce_partials(p, 1, 1).view(width)
        for p in partials
    ]
    return dx, da, [s.result(x) for s in shared], [*vectors[:2], vectors[2] if no_effect is None else no_effect]


def norm_modulate_backward(dy, dy2, x, scale, shift, scale2, shift2, weight, bias, scale_table, shift_table, rows, eps,
                           offset, flags, needs):  # fmt: skip
    host.check_activation("x", x)
    for name, t in (("dy", dy), ("dy2", dy2)):
        if t is not None:
            host.check_activation(name, t, x)
    call = Call(x, flags, rows, None, scale, shift, scale2, shift2, None, scale_table, shift_table, weight, bias)
    dx, _, mods, vectors = _backward(None, dy, dy2, x, None, call, eps, eps, offset, flags, needs & ~NEED_A)
    return (dx, *mods[1:], *vectors[:2])


def gate_residual_norm_modulate_backward(dr, dy, dy2, r, a, gate, gate_table, post_weight, scale, shift, scale2, shift2,
                                         weight, bias, scale_table, shift_table, rows, eps, post_eps, offset, flags,
                                         needs):  # fmt: skip
    host.check_activation("r", r)
    for name, t in (("dr", dr), ("dy", dy), ("dy2", dy2), ("a", a)):
        if t is not None:
            host.check_activation(name, t, r)
    call = Call(r, flags, rows, gate, scale, shift, scale2, shift2, gate_table, scale_table, shift_table, weight, bias,
                 post_weight)  # fmt: skip
    dx, da, mods, vectors = _backward(dr, dy, dy2, r, a, call, eps, post_eps, offset, flags, needs)
    return (dx, da, *mods, *vectors)


def gate_residual_backward(dr, a, gate, gate_table, post_weight, rows, post_eps, flags, needs):
    host.check_activation("a", a)
    host.check_activation("dr", dr, a)
    call = Call(a, flags, rows, gate, gate_table=gate_table, post_weight=post_weight)
    _, da, mods, vectors = _backward(dr, None, None, None, a, call, post_eps, post_eps, 0.0, flags, needs & ~NEED_X)
    return da, mods[0], vectors[2]
