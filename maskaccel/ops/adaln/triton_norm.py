"""Triton kernels of the adaLN forward, and the device functions its backward shares. Importing this needs triton.

One program computes one token: the row stays in registers, so each byte of activation moves once. A modulation operand
is None or the tuple (pointer, batch stride, row stride, tokens of a row).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_lib import bounded, load, rounded, sigmoid, tanh


@triton.jit
def load_modulation(m, table, b, index, cols, mask, NARROW: tl.constexpr):
    """Value plus table of a token, rounded in between under the narrow law. One of `m`, `table` is not None."""
    if m is None:
        v = load(table, cols, mask)
    else:
        v = load(m[0] + b * m[1] + (index // m[3]).to(tl.int64) * m[2], cols, mask)
        if table is not None:
            v += load(table, cols, mask)
            if NARROW:
                v = rounded(v, m[0].dtype.element_ty)
    return v


@triton.jit
def gate_act(g, ACT: tl.constexpr):
    """Gate activation and its derivative."""
    if ACT == 1:
        t = tanh(g)
        slope = 1.0 - t * t
    elif ACT == 2:
        t = tanh(bounded(g, 2.0))
        slope = tl.where(tl.abs(g) <= 2.0, 1.0 - t * t, 0.0)
    elif ACT == 3:
        t = sigmoid(1.0 - g)
        slope = -t * (1.0 - t)
    else:
        t = g
        slope = tl.full(g.shape, 1.0, tl.float32)
    return t, slope


@triton.jit
def standardize(v, mask, D, eps, KIND: tl.constexpr):
    """(v - mean) * rstd, v * rstd or v by KIND (0 layer, 1 rms, 2 none), and rstd. Lanes outside `mask` hold 0."""
    if KIND == 0:
        centred = tl.where(mask, v - tl.sum(v, 0) / D, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
        out = centred * rstd
    elif KIND == 1:
        rstd = tl.rsqrt(tl.sum(v * v, 0) / D + eps)
        out = v * rstd
    else:
        rstd = 1.0
        out = v
    return out, rstd


@triton.jit
def load_weight(weight, cols, mask, PLUS_ONE: tl.constexpr, NARROW: tl.constexpr):
    w = load(weight, cols, mask)
    if PLUS_ONE:
        w += 1.0
        if NARROW:
            w = rounded(w, weight.dtype.element_ty)
    return w


@triton.jit
def affine(h, weight, bias, cols, mask, DTYPE: tl.constexpr, KIND: tl.constexpr, PLUS_ONE: tl.constexpr,
           NARROW: tl.constexpr):  # fmt: skip
    """Weight and bias of a norm. LayerNorm applies them before its result is rounded, RMSNorm after."""
    STEPS: tl.constexpr = NARROW and KIND != 0
    if STEPS:
        h = rounded(h, DTYPE)
    if weight is not None:
        h *= load_weight(weight, cols, mask, PLUS_ONE, STEPS)
        if STEPS:
            h = rounded(h, DTYPE)
    if bias is not None:
        h += load(bias, cols, mask)
    if NARROW:
        h = rounded(h, DTYPE)
    return h


@triton.jit
def round_as(v, m, table):
    """Round to the dtype of a modulation operand: under type promotion the result of narrow arithmetic with it."""
    if m is not None:
        v = rounded(v, m[0].dtype.element_ty)
    else:
        v = rounded(v, table.dtype.element_ty)
    return v


@triton.jit
def modulate(h, scale, shift, scale_table, shift_table, b, index, cols, mask, offset, NARROW: tl.constexpr):
    if (scale is not None) or (scale_table is not None):
        s = offset + load_modulation(scale, scale_table, b, index, cols, mask, NARROW)
        if NARROW:
            h = round_as(h * round_as(s, scale, scale_table), scale, scale_table)
        else:
            h = h * s
    if (shift is not None) or (shift_table is not None):
        h += load_modulation(shift, shift_table, b, index, cols, mask, NARROW)
    return h


@triton.jit
def adaln_forward(x, a, r, y, y2, gate, scale, shift, scale2, shift2, gate_table, scale_table, shift_table, weight,
                  bias, post_weight, rows, x_batch, x_row, a_batch, a_row, rows_batch, N, D, eps, post_eps, offset,
                  FLAGS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Gated residual (with `a`), norm and modulation (with `y`), for one token."""
    NARROW: tl.constexpr = (FLAGS & 4) != 0
    PLUS_ONE: tl.constexpr = (FLAGS & 8) != 0
    KIND: tl.constexpr = FLAGS & 3
    POST: tl.constexpr = (FLAGS >> 6) & 3
    ACT: tl.constexpr = (FLAGS >> 4) & 3
    DTYPE: tl.constexpr = x.dtype.element_ty
    pid = tl.program_id(0)
    b = (pid // N).to(tl.int64)
    n = pid % N
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    index = n
    if rows is not None:
        index = tl.load(rows + b * rows_batch + n)
    out = pid.to(tl.int64) * D
    v = load(x + b * x_batch + n.to(tl.int64) * x_row, cols, mask)
    if a is not None:
        p = load(a + b * a_batch + n.to(tl.int64) * a_row, cols, mask)
        if POST != 0:
            p, _ = standardize(p, mask, D, post_eps, 2 - POST)
            p = affine(p, post_weight, None, cols, mask, DTYPE, 2 - POST, PLUS_ONE, NARROW)
        if (gate is not None) or (gate_table is not None):
            g = load_modulation(gate, gate_table, b, index, cols, mask, NARROW)
            if NARROW and ACT == 3:
                # the slope is not used: only the rounding of 1 - g sets this apart from gate_act
                g = sigmoid(round_as(1.0 - g, gate, gate_table))
            else:
                g, _ = gate_act(g, ACT)
            if NARROW:
                p = round_as(p * round_as(g, gate, gate_table), gate, gate_table)
            else:
                p *= g
        v += p
        if (FLAGS & 256) != 0:
            v = bounded(v, 65504.0)
        v = rounded(v, DTYPE)  # both laws normalise the residual as stored
        if r is not None:
            tl.store(r + out + cols, v.to(DTYPE), mask=mask)
    if y is not None:
        h, _ = standardize(v, mask, D, eps, KIND)
        h = affine(h, weight, bias, cols, mask, DTYPE, KIND, PLUS_ONE, NARROW)
        first = modulate(h, scale, shift, scale_table, shift_table, b, index, cols, mask, offset, NARROW)
        tl.store(y + out + cols, first.to(DTYPE), mask=mask)
        if y2 is not None:
            second = modulate(h, scale2, shift2, None, None, b, index, cols, mask, offset, NARROW)
            tl.store(y2 + out + cols, second.to(DTYPE), mask=mask)
