"""Triton kernels of tile lists and of merging partial attention results. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_bits(bits, pattern_of, slab, pattern_slab, own, i, M, W, tiles, L, TRANSPOSE: tl.constexpr):
    """(kept, partial), int32, of entries `i` of row `own` of a slab's lists."""
    valid = i < L
    if TRANSPOSE:
        m, n = i, own
    else:
        m, n = own, i
    word = tl.load(bits + (slab * M + m) * W + n // 32, mask=valid, other=0)
    kept = (word >> (n % 32).to(tl.int32)) & 1
    partial = tl.zeros_like(kept)
    if pattern_of is not None:
        pattern = tl.load(pattern_of + (pattern_slab * M + m) * tiles + n, mask=valid, other=-1)
        partial = kept * (pattern >= 0).to(tl.int32)
    return kept, partial


@triton.jit
def list_rows(bits, pattern_of, index, count, H, M, W, tiles, rows, L, p_batch, p_head, TRANSPOSE: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """The list of one row of tiles: partial tiles, full ones, then, so that every entry is defined, those left out.

    `rows` and `L` are those of the lists: (M, tiles), or transposed (tiles, M). Slab `b * H + h` (sample and head) has
    patterns `b * p_batch + h * p_head`.
    """
    row = tl.program_id(0).to(tl.int64)
    slab = row // rows
    own = row % rows
    pattern_slab = slab // H * p_batch + slab % H * p_head
    lanes = tl.arange(0, BLOCK)
    partials = tl.zeros([BLOCK], tl.int32)
    all_kept = tl.zeros([BLOCK], tl.int32)
    for start in range(0, L, BLOCK):
        kept, partial = tile_bits(bits, pattern_of, slab, pattern_slab, own, start + lanes, M, W, tiles, L, TRANSPOSE)
        partials += partial
        all_kept += kept
    first = tl.sum(partials, 0)
    most = tl.sum(all_kept, 0)
    tl.store(count + 2 * row, first)
    tl.store(count + 2 * row + 1, most - first)
    before_partial = tl.full([], 0, tl.int32)
    before_kept = tl.full([], 0, tl.int32)
    for start in range(0, L, BLOCK):
        i = start + lanes
        kept, partial = tile_bits(bits, pattern_of, slab, pattern_slab, own, i, M, W, tiles, L, TRANSPOSE)
        at_partial = before_partial + tl.cumsum(partial, 0) - partial
        at_kept = before_kept + tl.cumsum(kept, 0) - kept
        at = tl.where(partial > 0, at_partial, tl.where(kept > 0, first + at_kept - at_partial, most + i - at_kept))
        tl.store(index + row * L + at, i, mask=i < L)
        before_partial += tl.sum(partial, 0)
        before_kept += tl.sum(kept, 0)


@triton.jit
def shares(lse1, lse2):
    """(w1, w2, lse) of two lse; weights of 0 where both are -inf."""
    most = tl.maximum(lse1, lse2)
    nothing = most == float("-inf")
    less = tl.exp(tl.where(nothing, 0.0, -tl.abs(lse1 - lse2)))
    larger = 1.0 / (1.0 + less)
    first = lse1 > lse2
    w1 = tl.where(nothing, 0.0, tl.where(first, larger, less * larger))
    w2 = tl.where(nothing, 0.0, tl.where(first, less * larger, larger))
    # log1p: what the rounding of 1 + x leaves out is put back as a factor
    rounded = 1.0 + less
    rest = rounded - 1.0
    log1p = tl.where(rest == 0, less, tl.log(rounded) * (less / tl.where(rest == 0, 1.0, rest)))
    return w1, w2, tl.where(nothing, most, most + log1p)


@triton.jit
def merge_rows(out1, lse1, out2, lse2, out, lse, one, two, S, H, D, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of rows; `one` and `two` are the strides of the first three dims of out1 and out2."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = r < rows
    h, s, b = r % H, r // H % S, r // H // S
    at = (b * H + h) * S + s
    w1, w2, total = shares(tl.load(lse1 + at, mask=valid, other=0.0), tl.load(lse2 + at, mask=valid, other=0.0))
    tl.store(lse + at, total, mask=valid)
    cols = tl.arange(0, BLOCK)
    mask = valid[:, None] & (cols < D)[None, :]
    # a part of weight 0 may hold anything
    x1 = tl.load(out1 + (b * one[0] + s * one[1] + h * one[2])[:, None] + cols[None, :],
                 mask=mask & (w1 != 0)[:, None], other=0.0).to(tl.float32)  # fmt: skip
    x2 = tl.load(out2 + (b * two[0] + s * two[1] + h * two[2])[:, None] + cols[None, :],
                 mask=mask & (w2 != 0)[:, None], other=0.0).to(tl.float32)  # fmt: skip
    merged = w1[:, None] * x1 + w2[:, None] * x2
    tl.store(out + r[:, None] * D + cols[None, :], merged.to(out.dtype.element_ty), mask=mask)


@triton.jit
def merge_rows_backward(dout, dlse, out1, lse1, out2, lse2, dout1, dlse1, dout2, dlse2, grad, one, two, S, H, D, rows,
                        ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """`d out_i = w_i dout`, `d lse_1 = w_1 (dlse + w_2 t)`, `d lse_2 = w_2 (dlse - w_1 t)`, `t = dout (out_1 - out_2)`.

    `grad`, `one` and `two` are strides of dout, out1 and out2.
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = r < rows
    h, s, b = r % H, r // H % S, r // H // S
    at = (b * H + h) * S + s
    w1, w2, _ = shares(tl.load(lse1 + at, mask=valid, other=0.0), tl.load(lse2 + at, mask=valid, other=0.0))
    cols = tl.arange(0, BLOCK)
    mask = valid[:, None] & (cols < D)[None, :]
    g = tl.load(dout + (b * grad[0] + s * grad[1] + h * grad[2])[:, None] + cols[None, :], mask=mask,
                other=0.0).to(tl.float32)  # fmt: skip
    both = mask & ((w1 != 0) & (w2 != 0))[:, None]
    x1 = tl.load(out1 + (b * one[0] + s * one[1] + h * one[2])[:, None] + cols[None, :], mask=both,
                 other=0.0).to(tl.float32)  # fmt: skip
    x2 = tl.load(out2 + (b * two[0] + s * two[1] + h * two[2])[:, None] + cols[None, :], mask=both,
                 other=0.0).to(tl.float32)  # fmt: skip
    t = tl.sum(g * (x1 - x2), 1)
    moved = tl.zeros([ROWS], tl.float32)
    if dlse is not None:
        moved += tl.load(dlse + at, mask=valid, other=0.0)
    tl.store(dlse1 + at, w1 * (moved + w2 * t), mask=valid)
    tl.store(dlse2 + at, w2 * (moved - w1 * t), mask=valid)
    flat = r[:, None] * D + cols[None, :]
    tl.store(dout1 + flat, (w1[:, None] * g).to(dout1.dtype.element_ty), mask=mask)
    tl.store(dout2 + flat, (w2[:, None] * g).to(dout2.dtype.element_ty), mask=mask)
