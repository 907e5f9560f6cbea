"""Triton kernel of the keep bits where a mask tile is larger than a block. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_forward import any_row_keeps
from .triton_lib import INF, LOG2E, head_of, list_of, load_rows, only_kept, place, products, with_bias


@triton.jit
def find_keep(q, k, lists, order, elements, bias, relpos, reference_lse, running, tile_top, keep, rows, group, heads,
              b_copies, H, per_key_head, Sq, Sk, M, Nk, words, bm, bn, scale, threshold, D: tl.constexpr,
              D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
              ALIGN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Keep bits of a row of tiles when a tile that is not kept does not raise the running maximum.

    A decision needs the scores of all rows and keys of a mask tile, so this forms the scores alone, block by block;
    `running` and `tile_top`, both (B, H, Sq), hold the maxima between blocks. The result is formed by a second kernel.
    """
    b, h, m, _ = place(order, rows, group, heads, b_copies, M, 1)
    index, partial, full = list_of(lists, b, h, m, M, Nk)
    head = b * H + h
    lanes = tl.arange(0, BLOCK_M)
    q_rows, k_rows = head_of(q, b, h, ALIGN), head_of(k, b, h // per_key_head, ALIGN)
    running += head * Sq
    tile_top += head * Sq
    for start in range(m * bm, (m + 1) * bm, BLOCK_M):
        i = start + lanes
        first = tl.full([BLOCK_M], -INF, tl.float32)
        if reference_lse is not None:
            first = tl.load(reference_lse + head * Sq + i, mask=i < Sq, other=0.0) * LOG2E
        tl.store(running + i, first, mask=i < Sq)
    tl.debug_barrier()
    numbers = tl.arange(0, WORDS)
    bits = tl.zeros([WORDS], tl.int32)
    for step in range(partial + full):
        n = step
        if index is not None:
            n = tl.load(index + step)
        kept = n * 0
        for start in range(m * bm, (m + 1) * bm, BLOCK_M):
            i = start + lanes
            q1, q2 = load_rows(q_rows, q[2] * ALIGN, i, Sq, D, D1, D2, True)
            top = tl.full([BLOCK_M], -INF, tl.float32)
            for j0 in range(n * bn, (n + 1) * bn, BLOCK_N):
                j = j0 + tl.arange(0, BLOCK_N)
                k1, k2 = load_rows(k_rows, k[2] * ALIGN, j, Sk, D, D1, D2, True)
                s = products(q1, q2, k1, k2, D2, PRECISION) * scale
                s = with_bias(s, i[:, None], j[None, :], bias, relpos, b, h, Sq, Sk)
                s = only_kept(s, i[:, None], j[None, :], None, b, h, m, n, j0, Sk, Nk, bm, bn, BLOCK_N, False, True)
                if elements is not None:  # noqa: SIM102  (known when compiled)
                    if step < partial:
                        s = only_kept(
                            s, i[:, None], j[None, :], elements, b, h, m, n, j0, Sk, Nk, bm, bn, BLOCK_N, True, True
                        )
                top = tl.maximum(top, tl.max(s, 1))
            reference = tl.load(running + i, mask=i < Sq, other=0.0)
            kept = tl.maximum(kept, any_row_keeps(top, reference, i < Sq, threshold))
            tl.store(tile_top + i, top, mask=i < Sq)
        bits |= tl.where(numbers == n // 32, kept << (n % 32), 0)
        tl.debug_barrier()
        if reference_lse is None:
            if kept != 0:
                for start in range(m * bm, (m + 1) * bm, BLOCK_M):
                    i = start + lanes
                    top = tl.load(tile_top + i, mask=i < Sq, other=0.0)
                    tl.store(running + i, tl.maximum(tl.load(running + i, mask=i < Sq, other=0.0), top), mask=i < Sq)
            tl.debug_barrier()
    tl.store(keep + (head * M + m) * words + numbers, bits, mask=numbers < words)
