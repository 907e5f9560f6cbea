"""Triton kernels of the step ops with a norm in the same pass. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_lib import load, rounded
from ..adaln.triton_norm import affine, modulate, standardize
from .triton_kernels import combined


@triton.jit
def combine_norm(history, weights, x, gate, h, y, scale, shift, scale_table, shift_table, weight, bias, rows, h_step,
                 h_batch, weight_step, rows_batch, N, D, eps, offset, K: tl.constexpr, PER_CHANNEL: tl.constexpr,
                 FLAGS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Store h = x + gate * sum_k weights[k] * history[k] of one token, and its modulated norm."""
    NARROW: tl.constexpr = (FLAGS & 4) != 0
    KIND: tl.constexpr = FLAGS & 3
    DTYPE: tl.constexpr = h.dtype.element_ty
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    total = combined(history, weights, x, gate, h_step, h_batch, weight_step, row, N, D, cols, mask, K, PER_CHANNEL,
                     BLOCK)  # fmt: skip
    v = rounded(total, DTYPE)  # both laws normalise the residual as stored
    out = row.to(tl.int64) * D + cols
    tl.store(h + out, v.to(DTYPE), mask=mask)
    b = (row // N).to(tl.int64)
    index = row % N
    if rows is not None:
        index = tl.load(rows + b * rows_batch + index)
    v, _ = standardize(v, mask, D, eps, KIND)
    v = affine(v, weight, bias, cols, mask, DTYPE, KIND, (FLAGS & 8) != 0, NARROW)
    v = modulate(v, scale, shift, scale_table, shift_table, b, index, cols, mask, offset, NARROW)
    tl.store(y + out, v.to(DTYPE), mask=mask)


@triton.jit
def norm_difference(x, reference, y, partials, scale, shift, scale_table, shift_table, weight, bias, rows, x_batch,
                    x_row, reference_batch, reference_row, rows_batch, N, D, run, chunks, eps, offset,
                    FLAGS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Store the modulated norm of a run of tokens of one sample, and their (sum |y - reference|, sum |reference|)."""
    NARROW: tl.constexpr = (FLAGS & 4) != 0
    KIND: tl.constexpr = FLAGS & 3
    DTYPE: tl.constexpr = x.dtype.element_ty
    pid = tl.program_id(0)
    b = (pid // chunks).to(tl.int64)
    first = (pid % chunks) * run
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    moved = tl.zeros([BLOCK], tl.float32)
    size = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.minimum(run, N - first)):
        n = first + i
        wide = n.to(tl.int64)
        index = n
        if rows is not None:
            index = tl.load(rows + b * rows_batch + n)
        stored = load(reference + b * reference_batch + wide * reference_row, cols, mask)
        v, _ = standardize(load(x + b * x_batch + wide * x_row, cols, mask), mask, D, eps, KIND)
        v = affine(v, weight, bias, cols, mask, DTYPE, KIND, (FLAGS & 8) != 0, NARROW)
        v = modulate(v, scale, shift, scale_table, shift_table, b, index, cols, mask, offset, NARROW)
        v = rounded(v, DTYPE)
        tl.store(y + (b * N + wide) * D + cols, v.to(DTYPE), mask=mask)
        moved += tl.where(mask, tl.abs(v - stored), 0.0)  # what pads a row may be NaN where eps is 0
        size += tl.abs(stored)
    out = partials + pid.to(tl.int64) * 2
    tl.store(out, tl.sum(moved, 0))
    tl.store(out + 1, tl.sum(size, 0))
