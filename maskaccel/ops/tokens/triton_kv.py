"""Triton kernels of the rows of a K/V cache. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_lib import rounded
from ..adaln.triton_rope import load_pairs, normed_pairs, rotated_pairs, store_pairs
from .triton_lib import from_e4m3, to_e4m3


@triton.jit
def counts_as_last(ids, m, M, BLOCK: tl.constexpr):
    """Whether no later row has the id of row m."""
    mine = tl.load(ids + m)
    again = tl.zeros([BLOCK], tl.int32)
    for start in range(m + 1, M, BLOCK):
        other = start + tl.arange(0, BLOCK)
        again += (tl.load(ids + other, mask=other < M, other=-1) == mine).to(tl.int32)
    return tl.sum(again, 0) == 0


@triton.jit
def store_row(cache, scale, strides, b, row, one, two, D, H, S, heads, HEADS: tl.constexpr, PAIRS: tl.constexpr,
              HALF: tl.constexpr):  # fmt: skip
    """Store all heads of one row of a cache; with `scale` as fp8 e4m3fn, a scale a head."""
    h = tl.arange(0, HEADS).to(tl.int64)[:, None]
    if scale is not None:
        most = tl.maximum(tl.max(tl.abs(one), 1), tl.max(tl.abs(two), 1))[:, None]
        spoiled = tl.maximum(tl.max((one != one).to(tl.int32), 1), tl.max((two != two).to(tl.int32), 1))[:, None]
        unit = tl.div_rn(most, tl.full([HEADS, 1], 448.0, tl.float32))
        unit = tl.where(unit == 0.0, 1.0, tl.where(spoiled > 0, float("nan"), unit))
        tl.store(scale + (b * S + row) * H + h, unit, mask=heads)
        spread = unit + tl.zeros([HEADS, PAIRS], tl.float32)
        one = to_e4m3(tl.clamp(tl.div_rn(one, spread), -448.0, 448.0))
        two = to_e4m3(tl.clamp(tl.div_rn(two, spread), -448.0, 448.0))
    at = b * strides[0] + row * strides[1] + h * strides[2]
    store_pairs(cache, at, one, two, D, heads, PAIRS, HEADS, HALF)


@triton.jit
def write_rows(q, k, v, q_out, k_cache, v_cache, k_scale, v_scale, ids, q_weight, k_weight, cos, sin, positions,
               ids_batch, positions_batch, q_strides, k_strides, v_strides, k_cache_strides, v_cache_strides, M, S,
               table, H, HK, D, eps, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, PAIRS: tl.constexpr,
               FLAGS: tl.constexpr, PRE_ROPE: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A program is one row of k (second grid index 0), of v (1) or of q (2)."""
    HALF: tl.constexpr = (FLAGS & 32) != 0
    b = (tl.program_id(0) // M).to(tl.int64)
    m = tl.program_id(0) % M
    part = tl.program_id(1)
    here = ids + b * ids_batch
    row = tl.load(here + m)
    place = row
    if positions is not None:
        place = tl.load(positions + b * positions_batch + m)
    place = tl.minimum(tl.maximum(place, 0), table - 1)
    if part == 2:
        if q is not None:
            one, two = normed_pairs(q, q_weight, None, q_strides, b, m, H, D, eps, Q_HEADS, PAIRS, FLAGS)
            one, two = rotated_pairs(one, two, cos, sin, None, 0, b, place, H, D, Q_HEADS, PAIRS, FLAGS, FULL, False)
            h = tl.arange(0, Q_HEADS).to(tl.int64)[:, None]
            store_pairs(q_out, ((b * M + m) * H + h) * D, one, two, D, h < H, PAIRS, Q_HEADS, HALF)
    else:
        if (row >= 0) & (row < S) & counts_as_last(here, m, M, BLOCK):
            h = tl.arange(0, K_HEADS).to(tl.int64)[:, None]
            to = row.to(tl.int64)
            if part == 0:
                one, two = normed_pairs(k, k_weight, None, k_strides, b, m, HK, D, eps, K_HEADS, PAIRS, FLAGS)
                if not PRE_ROPE:
                    one, two = rotated_pairs(one, two, cos, sin, None, 0, b, place, HK, D, K_HEADS, PAIRS, FLAGS, FULL,
                                             False)  # fmt: skip
                if k_scale is not None:  # the scale is that of the rounded values
                    one = rounded(one, k.dtype.element_ty)
                    two = rounded(two, k.dtype.element_ty)
                store_row(k_cache, k_scale, k_cache_strides, b, to, one, two, D, HK, S, h < HK, K_HEADS, PAIRS, HALF)
            else:
                at = b * v_strides[0] + m.to(tl.int64) * v_strides[1] + h * v_strides[2]
                one, two = load_pairs(v, at, D, h < HK, PAIRS, K_HEADS, HALF)
                store_row(v_cache, v_scale, v_cache_strides, b, to, one, two, D, HK, S, h < HK, K_HEADS, PAIRS, HALF)


@triton.jit
def read_rows(cache, scale, out, strides, S, H, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """An fp8 cache times its scales, for ROWS heads of rows of one sample."""
    b = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (at < S * H) & (cols < D)
    where = b * strides[0] + (at // H).to(tl.int64) * strides[1] + (at % H).to(tl.int64) * strides[2]
    code = tl.load(cache + where + cols, mask=mask, other=0)
    unit = tl.load(scale + b * S * H + at, mask=at < S * H, other=0.0)
    tl.store(out + (b * S * H + at) * D + cols, (from_e4m3(code) * unit).to(out.dtype.element_ty), mask=mask)
