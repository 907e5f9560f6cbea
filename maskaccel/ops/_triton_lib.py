"""Device functions and the reduction kernel shared by the Triton kernels. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """An accurate fp32 tanh: Triton has no portable one, and 2 sigmoid(2x) - 1 loses the digits of a small gate."""
    z = x * x
    p = z * 0.00214280365 - 0.00817709362
    p = p * z + 0.0217005006
    p = p * z - 0.0539467032
    p = p * z + 0.133332052
    p = p * z - 0.333333308
    small = x + x * z * p
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def rounded(v, dtype: tl.constexpr):
    """The fp32 value that storing `v` as `dtype` and reading it back gives."""
    return v.to(dtype).to(tl.float32)


@triton.jit
def bounded(v, limit):
    """Clamp to +-limit; a NaN stays one, as in torch."""
    return tl.where(v > limit, limit, tl.where(v < -limit, -limit, v))


@triton.jit
def load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def row_scales(x, out, x_batch, x_row, N, D, BLOCK: tl.constexpr):
    """One over the length of a row; 0 for a row of zeros."""
    n = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        v = load(x + b * x_batch + n.to(tl.int64) * x_row, cols, cols < D)
        total += v * v
    square = tl.sum(total, 0)
    tl.store(out + b * N + n, tl.where(square > 0, 1.0 / tl.sqrt(square), 0.0))


@triton.jit
def reduce_rows(partials, out, batches, chunks, per_group, groups, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[o, f] = sum over `batches` samples and the `per_group` chunks of group f, in an order fixed by the shape."""
    row = tl.program_id(0)
    o = row // groups
    f = row - o * groups
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], partials.dtype.element_ty)
    count = batches * per_group
    for start in range(0, count, ROWS):
        i = start + lanes
        sample = i // per_group
        chunk = f * per_group + i - sample * per_group
        at = ((o + sample).to(tl.int64) * chunks + chunk) * D
        mask = (i < count)[:, None] & (cols < D)[None, :]
        total += tl.load(partials + at[:, None] + cols[None, :], mask=mask, other=0.0)
    tl.store(out + row.to(tl.int64) * D + cols, tl.sum(total, 0), mask=cols < D)
