"""Triton kernel of the most similar row. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention.triton_lib import dot


@triton.jit
def match_rows(metric, lengths, src, dst, best, similarity, m_batch, m_row, src_batch, dst_batch, N, S, T, C,
               PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """For ROWS source rows the destination of largest cosine similarity; scores stay in registers, COLS at a time.

    `lengths` holds one over the length of each row, 0 for a row of zeros.
    """
    s = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1).to(tl.int64)
    here = metric + b * m_batch
    token = tl.load(src + b * src_batch + s, mask=s < S, other=-1)
    inside = (token >= 0) & (token < N)
    left = token.to(tl.int64)[:, None] * m_row
    own = tl.load(lengths + b * N + token, mask=inside, other=0.0)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    at = tl.zeros([ROWS], tl.int32)
    for start in range(0, T, COLS):
        t = start + tl.arange(0, COLS)
        other = tl.load(dst + b * dst_batch + t, mask=t < T, other=-1)
        held = (other >= 0) & (other < N)
        right = other.to(tl.int64)[None, :] * m_row
        total = tl.zeros([ROWS, COLS], tl.float32)
        for done in range(0, C, DEPTH):
            c = done + tl.arange(0, DEPTH)
            x = tl.load(here + left + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
            y = tl.load(here + right + c[:, None], mask=held[None, :] & (c < C)[:, None], other=0.0)
            total = dot(x, y, total, PRECISION)
        total *= tl.load(lengths + b * N + other, mask=held, other=0.0)[None, :]
        total = tl.where((t < T)[None, :], total, float("-inf"))
        high = tl.max(total, 1)
        lowest = tl.min(tl.where(total == high[:, None], t[None, :], T), 1)
        better = high > most
        at = tl.where(better, lowest, at)
        most = tl.where(better, high, most)
    tl.store(best + b * S + s, at, mask=s < S)
    tl.store(similarity + b * S + s, most * own, mask=s < S)
