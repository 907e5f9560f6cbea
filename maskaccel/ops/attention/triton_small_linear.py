"""Triton kernels of linear attention. Importing this needs triton.

The formulas, of a sample and key head (c is 1 or 1 / Sk):

    A = c sum_j phi(k_j)^T v_j      s = c sum_j phi(k_j)      z_i = phi(q_i) . s + eps      o_i = phi(q_i) A / z_i
    dz_i = -(g_i . n_i) / z_i^2     dA = c sum_i phi(q_i)^T g_i / z_i                       ds = c sum_i dz_i phi(q_i)
    dq_i = phi'(q_i) * (g_i A^T / z_i + dz_i s)
    dk_j = phi'(k_j) * (v_j dA^T + ds)                          dv_j = phi(k_j) dA

with g_i = d o_i, n_i = phi(q_i) A. `strides` of a tensor are those of its first three dims (B, S, H).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tokens(x, strides, b, h, rows, cols, S, D):
    """A block of one head's tokens, fp32; 0 outside."""
    at = b * strides[0] + rows.to(tl.int64)[:, None] * strides[1] + h * strides[2] + cols[None, :]
    return tl.load(x + at, mask=(rows < S)[:, None] & (cols < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def feature(x, ELU: tl.constexpr):
    if ELU:
        return tl.where(x > 0, x + 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    return tl.where(x < 0, 0.0, x)  # lets NaN through


@triton.jit
def slope(x, ELU: tl.constexpr):
    if ELU:
        return tl.where(x > 0, 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    return tl.where(x > 0, 1.0, 0.0)


@triton.jit
def sum_outer(x, y, divisor, weight, matrices, vectors, of_x, of_y, factor, S, D, H, run, PRECISION: tl.constexpr,
              ELU: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sums over one run of tokens for a block of y's channels: `factor * (phi(x)^T (y / divisor), weight * phi(x))`.

    `divisor` and `weight`, fp32 (B, H, S), are None for 1.
    """
    chunk = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    head = tl.program_id(2).to(tl.int64)
    b, h = head // H, head % H
    d = tl.arange(0, WIDE)
    e = first + tl.arange(0, BLOCK)
    lanes = tl.arange(0, ROWS)
    matrix = tl.zeros([WIDE, BLOCK], tl.float32)
    vector = tl.zeros([WIDE], tl.float32)
    start = chunk * run
    for done in range(0, run, ROWS):
        rows = start + done + lanes
        rows = tl.where(done + lanes < run, rows, S)
        # beyond D and S phi(0) is not 0 for every map
        inside = (rows < S)[:, None] & (d < D)[None, :]
        f = tl.where(inside, feature(tokens(x, of_x, b, h, rows, d, S, D), ELU), 0.0)
        right = tokens(y, of_y, b, h, rows, e, S, D)
        if divisor is not None:
            right /= tl.load(divisor + head * S + rows, mask=rows < S, other=1.0)[:, None]
            vector += tl.sum(f * tl.load(weight + head * S + rows, mask=rows < S, other=0.0)[:, None], 0)
        else:
            vector += tl.sum(f, 0)
        matrix += tl.dot(tl.trans(f), right, input_precision=PRECISION)
    at = head * tl.num_programs(0) + chunk
    tl.store(matrices + (at * D + d[:, None]) * D + e[None, :], matrix * factor,
             mask=(d < D)[:, None] & (e < D)[None, :])  # fmt: skip
    if first == 0:
        tl.store(vectors + at * D + d, vector * factor, mask=d < D)


@triton.jit
def feature_product(x, strides, b, h, rows, matrix, vector, S, D, PRECISION: tl.constexpr, ELU: tl.constexpr,
                    ROWS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(phi(x) @ matrix, phi(x) . vector) of a block of tokens, summed over D in steps: all of phi(x) at once spills."""
    e = tl.arange(0, WIDE)
    total = tl.zeros([ROWS, WIDE], tl.float32)
    inner = tl.zeros([ROWS], tl.float32)
    for first in range(0, D, BLOCK):
        d = first + tl.arange(0, BLOCK)
        f = tl.where((d < D)[None, :], feature(tokens(x, strides, b, h, rows, d, S, D), ELU), 0.0)
        right = tl.load(matrix + d[:, None] * D + e[None, :], mask=(d < D)[:, None] & (e < D)[None, :], other=0.0)
        total += tl.dot(f, right, input_precision=PRECISION)
        inner += tl.sum(f * tl.load(vector + d, mask=d < D, other=0.0)[None, :], 1)
    return total, inner


@triton.jit
def product_transposed(x, strides, b, h, rows, matrix, S, D, PRECISION: tl.constexpr, ROWS: tl.constexpr,
                       WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The product x @ matrix^T of a block of tokens."""
    d = tl.arange(0, WIDE)
    total = tl.zeros([ROWS, WIDE], tl.float32)
    for first in range(0, D, BLOCK):
        e = first + tl.arange(0, BLOCK)
        right = tl.load(matrix + d[:, None] * D + e[None, :], mask=(d < D)[:, None] & (e < D)[None, :], other=0.0)
        left = tokens(x, strides, b, h, rows, e, S, D)
        total += tl.dot(left, tl.trans(right), input_precision=PRECISION)
    return total


@triton.jit
def put(out, b, h, H, rows, cols, value, S, D):
    """Store a block of one head's tokens in a contiguous (B, S, H, D)."""
    at = ((b * S + rows.to(tl.int64)) * H + h)[:, None] * D + cols[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=(rows < S)[:, None] & (cols < D)[None, :])


@triton.jit
def query_rows(q, matrices, vectors, out, of_q, eps, S, D, H, KH, PRECISION: tl.constexpr, ELU: tl.constexpr,
               ROWS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Results of a block of queries of one head."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    key_head = b * KH + h // (H // KH)
    n, z = feature_product(q, of_q, b, h, rows, matrices + key_head * D * D, vectors + key_head * D, S, D, PRECISION,
                           ELU, ROWS, WIDE, BLOCK)  # fmt: skip
    put(out, b, h, H, rows, tl.arange(0, WIDE), n / (z + eps)[:, None], S, D)


@triton.jit
def query_rows_backward(dout, q, matrices, vectors, dq, z_out, dz_out, of_dout, of_q, eps, S, D, H, KH,
                        PRECISION: tl.constexpr, ELU: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    """Gradient of a block of queries of one head, and z and dz for the sums over queries."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    key_head = b * KH + h // (H // KH)
    matrix, vector = matrices + key_head * D * D, vectors + key_head * D
    d = tl.arange(0, WIDE)
    n, z = feature_product(q, of_q, b, h, rows, matrix, vector, S, D, PRECISION, ELU, ROWS, WIDE, BLOCK)
    z += eps
    dz = -(tl.sum(tokens(dout, of_dout, b, h, rows, d, S, D) * n, 1) / z) / z
    tl.store(z_out + head * S + rows, z, mask=rows < S)
    tl.store(dz_out + head * S + rows, dz, mask=rows < S)
    moved = product_transposed(dout, of_dout, b, h, rows, matrix, S, D, PRECISION, ROWS, WIDE, BLOCK)
    moved = moved / z[:, None] + dz[:, None] * tl.load(vector + d, mask=d < D, other=0.0)[None, :]
    put(dq, b, h, H, rows, d, slope(tokens(q, of_q, b, h, rows, d, S, D), ELU) * moved, S, D)


@triton.jit
def key_rows_backward(k, v, matrices, vectors, dk, dv, of_k, of_v, S, D, KH, PRECISION: tl.constexpr,
                      ELU: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Gradients of a block of keys and values of one head; `matrices` and `vectors` are dA and ds."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // KH, head % KH
    matrix, vector = matrices + head * D * D, vectors + head * D
    d = tl.arange(0, WIDE)
    total, _ = feature_product(k, of_k, b, h, rows, matrix, vector, S, D, PRECISION, ELU, ROWS, WIDE, BLOCK)
    put(dv, b, h, KH, rows, d, total, S, D)
    moved = product_transposed(v, of_v, b, h, rows, matrix, S, D, PRECISION, ROWS, WIDE, BLOCK)
    moved += tl.load(vector + d, mask=d < D, other=0.0)[None, :]
    put(dk, b, h, KH, rows, d, slope(tokens(k, of_k, b, h, rows, d, S, D), ELU) * moved, S, D)
