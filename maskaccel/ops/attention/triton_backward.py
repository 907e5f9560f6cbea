"""Triton kernels of the backward of tile_attention and of the sums of its columns. Importing this needs triton.

P = exp(s - lse), dP = dout v^T, dS = P (dP - delta), dq = scale dS k, dk = scale dS^T q, dv = P^T dout. The kernels of
keys work on transposed tiles, so that no operand of a product has to be transposed through shared memory. No atomics:
a program owns its rows of dq, or of dk and dv, and walks its list in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_lib import (
    INF,
    LOG2E,
    add_products,
    head_of,
    load_rows,
    only_kept,
    phases,
    place,
    products,
    store_rows,
    with_bias,
)


@triton.jit
def row_products(dout, out, dlse, delta, H, Sq, blocks, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
                 BLOCK: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Store delta = sum_d dout * out - dlse for a block of rows of one head."""
    p = tl.program_id(0)
    head = (p // blocks).to(tl.int64)
    b, h = head // H, head % H
    i = (p % blocks) * BLOCK + tl.arange(0, BLOCK)
    left1, left2 = load_rows(head_of(dout, b, h, ALIGN), dout[2] * ALIGN, i, Sq, D, D1, D2, True)
    right1, right2 = load_rows(head_of(out, b, h, ALIGN), out[2] * ALIGN, i, Sq, D, D1, D2, True)
    total = tl.sum(left1.to(tl.float32) * right1.to(tl.float32), 1)
    if D2 > 0:
        total += tl.sum(left2.to(tl.float32) * right2.to(tl.float32), 1)
    if dlse is not None:
        total -= tl.load(dlse + head * Sq + i, mask=i < Sq, other=0.0)
    tl.store(delta + head * Sq + i, total, mask=i < Sq)


@triton.jit
def load_lse(lse, i, Sq):
    """An lse in units of log2; inf, which makes every P 0, for rows that keep nothing and rows from Sq on."""
    value = tl.load(lse + i, mask=i < Sq, other=INF)
    return tl.where(value == -INF, INF, value * LOG2E)


@triton.jit
def visit_keys(dq1, dq2, q1, q2, do1, do2, k, v, k_stride, v_stride, log_sum, delta, ds, index, first, tiles, i, b, h,
               m, Sq, Sk, Nk, bm, bn, elements, bias, relpos, scale, D: tl.constexpr, D1: tl.constexpr,
               D2: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, PATTERN: tl.constexpr, BOUND: tl.constexpr,
               WANT_Q: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add what entries `first` to `first + tiles` of a list give to dq of one block of queries (without the scale).

    `ds` is None or points to the head's scores, whose gradient is stored.
    """
    lanes = tl.arange(0, BLOCK_N)
    for step in range(tiles * PARTS):
        n = first + step // PARTS
        if index is not None:
            n = tl.load(index + n)
        j0 = n * bn + step % PARTS * BLOCK_N
        j = j0 + lanes
        k1, k2 = load_rows(k, k_stride, j, Sk, D, D1, D2, BOUND)
        s = products(q1, q2, k1, k2, D2, PRECISION) * scale
        s = with_bias(s, i[:, None], j[None, :], bias, relpos, b, h, Sq, Sk) - log_sum[:, None]
        s = only_kept(s, i[:, None], j[None, :], elements, b, h, m, n, j0, Sk, Nk, bm, bn, BLOCK_N, PATTERN, BOUND)
        v1, v2 = load_rows(v, v_stride, j, Sk, D, D1, D2, BOUND)
        change = tl.exp2(s) * (products(do1, do2, v1, v2, D2, PRECISION) - delta[:, None])
        if ds is not None:
            at = ds + i.to(tl.int64)[:, None] * Sk + j[None, :]
            tl.store(at, change, mask=(i < Sq)[:, None] & (j < Sk)[None, :])
        if WANT_Q:
            dq1, dq2 = add_products(dq1, dq2, change, k1, k2, D2, PRECISION)
    return dq1, dq2


@triton.jit
def backward_queries(dout, q, k, v, lse, delta, lists, order, elements, bias, relpos, dq, ds, rows, group, heads,
                     b_copies, H, per_key_head, Sq, Sk, M, Nk, bm, bn, scale, plain_scale, D: tl.constexpr,
                     D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                     M_PARTS: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr, WANT_Q: tl.constexpr,
                     ALIGN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Store dq of one block of queries, and dS of its tiles if `ds` is not None. `scale` is in units of log2."""
    b, h, m, part = place(order, rows, group, heads, b_copies, M, M_PARTS)
    i0 = m * bm + part * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    head = b * H + h
    index, partial, full, ragged = phases(lists, b, h, m, M, Nk, i0 < Sq, RAGGED)
    q1, q2 = load_rows(head_of(q, b, h, ALIGN), q[2] * ALIGN, i, Sq, D, D1, D2, True)
    do1, do2 = load_rows(head_of(dout, b, h, ALIGN), dout[2] * ALIGN, i, Sq, D, D1, D2, True)
    k_rows, v_rows = head_of(k, b, h // per_key_head, ALIGN), head_of(v, b, h // per_key_head, ALIGN)
    k_stride, v_stride = k[2] * ALIGN, v[2] * ALIGN
    log_sum = load_lse(lse + head * Sq, i, Sq)
    offset = tl.load(delta + head * Sq + i, mask=i < Sq, other=0.0)
    if ds is not None:
        ds += head * Sq * Sk
    dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    dq2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 1], tl.float32)
    if elements is not None:
        dq1, dq2 = visit_keys(
            dq1, dq2, q1, q2, do1, do2, k_rows, v_rows, k_stride, v_stride, log_sum, offset, ds, index, 0, partial, i,
            b, h, m, Sq, Sk, Nk, bm, bn, elements, bias, relpos, scale, D, D1, D2, BLOCK_N, PARTS, True, RAGGED, WANT_Q,
            PRECISION,
        )  # fmt: skip
    dq1, dq2 = visit_keys(
        dq1, dq2, q1, q2, do1, do2, k_rows, v_rows, k_stride, v_stride, log_sum, offset, ds, index, partial, full, i, b,
        h, m, Sq, Sk, Nk, bm, bn, elements, bias, relpos, scale, D, D1, D2, BLOCK_N, PARTS, False, False, WANT_Q,
        PRECISION,
    )  # fmt: skip
    if RAGGED:
        dq1, dq2 = visit_keys(
            dq1, dq2, q1, q2, do1, do2, k_rows, v_rows, k_stride, v_stride, log_sum, offset, ds, index, partial + full,
            ragged, i, b, h, m, Sq, Sk, Nk, bm, bn, elements, bias, relpos, scale, D, D1, D2, BLOCK_N, PARTS, False,
            True, WANT_Q, PRECISION,
        )  # fmt: skip
    if WANT_Q:
        to = dq + (b * Sq * H + h) * D
        store_rows(to, H * D, i, Sq, dq1 * plain_scale, dq2 * plain_scale, D, D1, D2)


@triton.jit
def transposed_weights(k1, k2, q1, q2, log_sum, i, j, j0, elements, bias, relpos, b, h, m, n, Sq, Sk, Nk, bm, bn, scale,
                       D2: tl.constexpr, BLOCK_N: tl.constexpr, PATTERN: tl.constexpr,
                       PRECISION: tl.constexpr):  # fmt: skip
    """P of a block of keys (rows) and a block of queries (columns)."""
    s = products(k1, k2, q1, q2, D2, PRECISION) * scale
    s = with_bias(s, i[None, :], j[:, None], bias, relpos, b, h, Sq, Sk) - log_sum[None, :]
    s = only_kept(s, i[None, :], j[:, None], elements, b, h, m, n, j0, Sk, Nk, bm, bn, BLOCK_N, PATTERN, False)
    return tl.exp2(s)


@triton.jit
def visit_queries(dk1, dk2, dv1, dv2, k1, k2, v1, v2, q, dout, q_stride, do_stride, lse, delta, index, first, tiles, j,
                  j0, b, h, n, Sq, Sk, Nk, bm, bn, elements, bias, relpos, scale, D: tl.constexpr, D1: tl.constexpr,
                  D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
                  PATTERN: tl.constexpr, BOUND: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Add what entries of a transposed list give to dk (without the scale) and dv of one block of keys."""
    lanes = tl.arange(0, BLOCK_M)
    for step in range(tiles * PARTS):
        m = first + step // PARTS
        if index is not None:
            m = tl.load(index + m)
        i = m * bm + step % PARTS * BLOCK_M + lanes
        q1, q2 = load_rows(q, q_stride, i, Sq, D, D1, D2, BOUND)
        p = transposed_weights(
            k1, k2, q1, q2, load_lse(lse, i, Sq), i, j, j0, elements, bias, relpos, b, h, m, n, Sq, Sk, Nk, bm, bn,
            scale, D2, BLOCK_N, PATTERN, PRECISION,
        )  # fmt: skip
        do1, do2 = load_rows(dout, do_stride, i, Sq, D, D1, D2, BOUND)
        if WANT_V:
            dv1, dv2 = add_products(dv1, dv2, p, do1, do2, D2, PRECISION)
        if WANT_K:
            offset = tl.load(delta + i, mask=i < Sq, other=0.0)
            change = p * (products(v1, v2, do1, do2, D2, PRECISION) - offset[None, :])
            dk1, dk2 = add_products(dk1, dk2, change, q1, q2, D2, PRECISION)
    return dk1, dk2, dv1, dv2


@triton.jit
def backward_keys(dout, q, k, v, lse, delta, lists, order, elements, bias, relpos, dk, dv, rows, group, heads, b_copies,
                  H, per_key_head, Sq, Sk, M, Nk, bm, bn, scale, plain_scale, D: tl.constexpr, D1: tl.constexpr,
                  D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, N_PARTS: tl.constexpr,
                  PARTS: tl.constexpr, RAGGED: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr,
                  ALIGN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Store dk and dv of one block of keys, summed over the query heads that read it. The lists are transposed."""
    b, kv_head, n, part = place(order, rows, group, heads, b_copies, Nk, N_PARTS)
    j0 = n * bn + part * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    k1, k2 = load_rows(head_of(k, b, kv_head, ALIGN), k[2] * ALIGN, j, Sk, D, D1, D2, True)
    v1, v2 = load_rows(head_of(v, b, kv_head, ALIGN), v[2] * ALIGN, j, Sk, D, D1, D2, True)
    dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
    dk2 = tl.zeros([BLOCK_N, D2 if D2 > 0 else 1], tl.float32)
    dv1 = tl.zeros([BLOCK_N, D1], tl.float32)
    dv2 = tl.zeros([BLOCK_N, D2 if D2 > 0 else 1], tl.float32)
    for member in range(per_key_head):
        h = kv_head * per_key_head + member
        of_head = (b * H + h) * Sq
        index, partial, full, _ = phases(lists, b, h, n, Nk, M, j0 < Sk, False)
        q_rows, do_rows = head_of(q, b, h, ALIGN), head_of(dout, b, h, ALIGN)
        if elements is not None:
            dk1, dk2, dv1, dv2 = visit_queries(
                dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_rows, do_rows, q[2] * ALIGN, dout[2] * ALIGN, lse + of_head,
                delta + of_head, index, 0, partial, j, j0, b, h, n, Sq, Sk, Nk, bm, bn, elements, bias, relpos, scale,
                D, D1, D2, BLOCK_M, BLOCK_N, PARTS, True, RAGGED, WANT_K, WANT_V, PRECISION,
            )  # fmt: skip
        dk1, dk2, dv1, dv2 = visit_queries(
            dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_rows, do_rows, q[2] * ALIGN, dout[2] * ALIGN, lse + of_head,
            delta + of_head, index, partial, full, j, j0, b, h, n, Sq, Sk, Nk, bm, bn, elements, bias, relpos, scale, D,
            D1, D2, BLOCK_M, BLOCK_N, PARTS, False, RAGGED, WANT_K, WANT_V, PRECISION,
        )  # fmt: skip
    kv_heads = H // per_key_head
    offset = (b * Sk * kv_heads + kv_head) * D
    if WANT_K:
        store_rows(dk + offset, kv_heads * D, j, Sk, dk1 * plain_scale, dk2 * plain_scale, D, D1, D2)
    if WANT_V:
        store_rows(dv + offset, kv_heads * D, j, Sk, dv1, dv2, D, D1, D2)


@triton.jit
def visit_columns(total, k1, k2, q, q_stride, lse, index, first, tiles, j, j0, b, h, n, Sq, Sk, Nk, bm, bn, elements,
                  bias, relpos, scale, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, PARTS: tl.constexpr, PATTERN: tl.constexpr, BOUND: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Add P of entries of a transposed list, summed over the queries."""
    lanes = tl.arange(0, BLOCK_M)
    for step in range(tiles * PARTS):
        m = first + step // PARTS
        if index is not None:
            m = tl.load(index + m)
        i = m * bm + step % PARTS * BLOCK_M + lanes
        q1, q2 = load_rows(q, q_stride, i, Sq, D, D1, D2, BOUND)
        p = transposed_weights(
            k1, k2, q1, q2, load_lse(lse, i, Sq), i, j, j0, elements, bias, relpos, b, h, m, n, Sq, Sk, Nk, bm, bn,
            scale, D2, BLOCK_N, PATTERN, PRECISION,
        )  # fmt: skip
        total += tl.sum(p, 1)
    return total


@triton.jit
def column_sums(q, k, lse, lists, order, elements, bias, relpos, out, rows, group, heads, b_copies, H, per_key_head, Sq,
                Sk, M, Nk, bm, bn, scale, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr, N_PARTS: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
                ALIGN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Store the attention of one head that a block of keys receives, summed over the queries."""
    b, h, n, part = place(order, rows, group, heads, b_copies, Nk, N_PARTS)
    j0 = n * bn + part * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    head = b * H + h
    k1, k2 = load_rows(head_of(k, b, h // per_key_head, ALIGN), k[2] * ALIGN, j, Sk, D, D1, D2, True)
    index, partial, full, _ = phases(lists, b, h, n, Nk, M, j0 < Sk, False)
    q_rows, lse_rows = head_of(q, b, h, ALIGN), lse + head * Sq
    total = tl.zeros([BLOCK_N], tl.float32)
    if elements is not None:
        total = visit_columns(
            total, k1, k2, q_rows, q[2] * ALIGN, lse_rows, index, 0, partial, j, j0, b, h, n, Sq, Sk, Nk, bm, bn,
            elements, bias, relpos, scale, D, D1, D2, BLOCK_M, BLOCK_N, PARTS, True, RAGGED, PRECISION,
        )  # fmt: skip
    total = visit_columns(
        total, k1, k2, q_rows, q[2] * ALIGN, lse_rows, index, partial, full, j, j0, b, h, n, Sq, Sk, Nk, bm, bn,
        elements, bias, relpos, scale, D, D1, D2, BLOCK_M, BLOCK_N, PARTS, False, RAGGED, PRECISION,
    )  # fmt: skip
    tl.store(out + head * Sk + j, total, mask=j < Sk)
