"""Triton kernel of tile_attention. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_lib import (
    INF,
    LN2,
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
def any_row_keeps(top, reference, valid, threshold):
    """1 if a row's largest score of a tile passes LiteAttention's test against its reference, both in units of log2."""
    keeps = valid & (top > -INF) & ((reference == -INF) | (top - reference > threshold))
    return tl.max(keeps.to(tl.int32), 0)


@triton.jit
def visit(acc1, acc2, top, total, bits, q1, q2, k, v, k_stride, v_stride, index, first, tiles, i, b, h, m, Sq, Sk, Nk,
          bm, bn, elements, bias, relpos, reference, gate, scale, threshold, D: tl.constexpr, D1: tl.constexpr,
          D2: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, PATTERN: tl.constexpr, BOUND: tl.constexpr,
          FOLD: tl.constexpr, KEEP: tl.constexpr, PRUNE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Take entries `first` to `first + tiles` of a list into the running softmax of one block of queries.

    A mask tile is PARTS blocks of keys wide. PATTERN: they are partial ones; BOUND: they may reach past the keys; the
    loop over full tiles has neither. FOLD: nothing is added to the scores and the scale is positive, so the maximum is
    taken before scaling. `bits` collects the keep bits, one word an element.
    """
    lanes = tl.arange(0, BLOCK_N)
    words = tl.arange(0, bits.shape[0])
    before, tile_top = top, top  # KEEP: reference of the tile, its largest score so far
    for step in range(tiles * PARTS):
        n = first + step // PARTS
        if index is not None:
            n = tl.load(index + n)
        part = step % PARTS
        j0 = n * bn + part * BLOCK_N
        wanted = 1
        if gate is not None:
            wanted = (tl.load(gate + n // 32) >> (n % 32)) & 1
        if wanted != 0:
            j = j0 + lanes
            k1, k2 = load_rows(k, k_stride, j, Sk, D, D1, D2, BOUND)
            s = products(q1, q2, k1, k2, D2, PRECISION)
            if not FOLD:
                s = with_bias(s * scale, i[:, None], j[None, :], bias, relpos, b, h, Sq, Sk)
            s = only_kept(s, i[:, None], j[None, :], elements, b, h, m, n, j0, Sk, Nk, bm, bn, BLOCK_N, PATTERN, BOUND)
            block_top = tl.max(s, 1)
            if FOLD:
                block_top *= scale
            if KEEP:
                before = tl.where(part == 0, top, before)
                tile_top = tl.where(part == 0, block_top, tl.maximum(tile_top, block_top))
                compared = before if reference is None else reference
                kept = any_row_keeps(tile_top, compared, i < Sq, threshold)
                bits |= tl.where((words == n // 32) & (part == PARTS - 1), kept << (n % 32), 0)
                if PRUNE:
                    wanted = kept
            if wanted != 0:
                new_top = tl.maximum(top, block_top)
                base = new_top
                if PATTERN or BOUND or not FOLD:  # all scores of a row so far may be -inf
                    base = tl.where(new_top == -INF, 0.0, new_top)
                shrink = tl.exp2(top - base)
                p = tl.exp2(s * scale - base[:, None]) if FOLD else tl.exp2(s - base[:, None])
                total = total * shrink + tl.sum(p, 1)
                acc1 *= shrink[:, None]
                if D2 > 0:
                    acc2 *= shrink[:, None]
                v1, v2 = load_rows(v, v_stride, j, Sk, D, D1, D2, BOUND)
                acc1, acc2 = add_products(acc1, acc2, p, v1, v2, D2, PRECISION)
                top = new_top
    return acc1, acc2, top, total, bits


@triton.jit
def tile_forward(q, k, v, lists, order, elements, bias, relpos, reference_lse, gate, out_scale, out_add, out, lse, keep,
                 rows, group, heads, b_copies, H, per_key_head, Sq, Sk, M, Nk, words, bm, bn, scale, threshold,
                 D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 M_PARTS: tl.constexpr, PARTS: tl.constexpr, WORDS: tl.constexpr, RAGGED: tl.constexpr,
                 FOLD: tl.constexpr, KEEP: tl.constexpr, PRUNE: tl.constexpr, ALIGN: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """One block of queries of one head against the tiles of its row: partial ones, full ones, the last ragged one.

    `keep` is None or takes the words of this part of the row, (B, H, M, M_PARTS, words); `gate` is None or holds keep
    bits (B, H, M, words): tiles whose bit is not set are passed over. `scale` and `threshold` are in units of log2.
    """
    b, h, m, part = place(order, rows, group, heads, b_copies, M, M_PARTS)
    i0 = m * bm + part * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    head = b * H + h
    index, partial, full, ragged = phases(lists, b, h, m, M, Nk, i0 < Sq, RAGGED)
    q_rows = head_of(q, b, h, ALIGN)
    q1, q2 = load_rows(q_rows, q[2] * ALIGN, i, Sq, D, D1, D2, True)
    k_rows, v_rows = head_of(k, b, h // per_key_head, ALIGN), head_of(v, b, h // per_key_head, ALIGN)
    k_stride, v_stride = k[2] * ALIGN, v[2] * ALIGN
    if gate is not None:
        gate += (head * M + m) * words
    reference = None
    if reference_lse is not None:
        reference = tl.load(reference_lse + head * Sq + i, mask=i < Sq, other=0.0) * LOG2E

    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 1], tl.float32)
    top = tl.full([BLOCK_M], -INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    bits = tl.zeros([WORDS], tl.int32)
    if elements is not None:
        acc1, acc2, top, total, bits = visit(
            acc1, acc2, top, total, bits, q1, q2, k_rows, v_rows, k_stride, v_stride, index, 0, partial, i, b, h, m, Sq,
            Sk, Nk, bm, bn, elements, bias, relpos, reference, gate, scale, threshold, D, D1, D2, BLOCK_N, PARTS, True,
            RAGGED, FOLD, KEEP, PRUNE, PRECISION,
        )  # fmt: skip
    acc1, acc2, top, total, bits = visit(
        acc1, acc2, top, total, bits, q1, q2, k_rows, v_rows, k_stride, v_stride, index, partial, full, i, b, h, m, Sq,
        Sk, Nk, bm, bn, elements, bias, relpos, reference, gate, scale, threshold, D, D1, D2, BLOCK_N, PARTS, False,
        False, FOLD, KEEP, PRUNE, PRECISION,
    )  # fmt: skip
    if RAGGED:
        acc1, acc2, top, total, bits = visit(
            acc1, acc2, top, total, bits, q1, q2, k_rows, v_rows, k_stride, v_stride, index, partial + full, ragged, i,
            b, h, m, Sq, Sk, Nk, bm, bn, elements, bias, relpos, reference, gate, scale, threshold, D, D1, D2, BLOCK_N,
            PARTS, False, True, FOLD, KEEP, PRUNE, PRECISION,
        )  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    share = 1.0 / total
    if out_scale is not None:
        at = out_scale[0] + b * out_scale[1] + h * out_scale[2] + i.to(tl.int64) * out_scale[3]
        share *= tl.load(at, mask=i < Sq, other=0.0)
    acc1 *= share[:, None]
    acc2 *= share[:, None]
    if out_add is not None:
        more1, more2 = load_rows(head_of(out_add, b, h, ALIGN), out_add[2] * ALIGN, i, Sq, D, D1, D2, True)
        acc1 += more1.to(tl.float32)
        if D2 > 0:
            acc2 += more2.to(tl.float32)
    store_rows(out + (b * Sq * H + h) * D, H * D, i, Sq, acc1, acc2, D, D1, D2)
    tl.store(lse + head * Sq + i, tl.where(empty, -INF, (top + tl.log2(total)) * LN2), mask=i < Sq)
    if KEEP:
        lanes = tl.arange(0, WORDS)
        tl.store(keep + ((head * M + m) * M_PARTS + part) * words + lanes, bits, mask=lanes < words)
