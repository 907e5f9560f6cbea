"""Triton kernels of QK norm with rotary embedding, and of gated activations. Importing this needs triton.

A head is held as two tiles (heads, pairs): the first and the second element of each rotated pair. Statistics are the sums
over both, so one code serves interleaved and rotate-half tables, with and without rotation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_lib import load, rounded, sigmoid, tanh


@triton.jit
def pair_columns(D, PAIRS: tl.constexpr, HALF: tl.constexpr):
    i = tl.arange(0, PAIRS)
    if HALF:
        first = i
        second = i + D // 2
        mask = i < D // 2
        mask2 = mask
    else:
        first = 2 * i
        second = 2 * i + 1
        mask = first < D
        mask2 = second < D  # differs for odd D, which has no rotation
    return first, second, mask, mask2


@triton.jit
def load_pairs(pointer, row, D, heads, H, PAIRS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Both tiles of the heads that start at `pointer + row`. Interleaved pairs are loaded as they lie, then split."""
    if HALF:
        first, second, mask, _ = pair_columns(D, PAIRS, True)
        m = heads & mask[None, :]
        one = load(pointer, row + first[None, :], m)
        two = load(pointer, row + second[None, :], m)
    else:
        cols = tl.arange(0, 2 * PAIRS)
        both = load(pointer, row + cols[None, :], heads & (cols < D)[None, :])
        one, two = tl.split(tl.reshape(both, [HEADS, PAIRS, 2]))
    return one, two


@triton.jit
def store_pairs(pointer, row, one, two, D, heads, PAIRS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    dtype = pointer.dtype.element_ty
    if HALF:
        first, second, mask, _ = pair_columns(D, PAIRS, True)
        m = heads & mask[None, :]
        tl.store(pointer + row + first[None, :], one.to(dtype), mask=m)
        tl.store(pointer + row + second[None, :], two.to(dtype), mask=m)
    else:
        cols = tl.arange(0, 2 * PAIRS)
        both = tl.reshape(tl.join(one, two), [HEADS, 2 * PAIRS])
        tl.store(pointer + row + cols[None, :], both.to(dtype), mask=heads & (cols < D)[None, :])


@triton.jit
def head_sum(v, ACROSS: tl.constexpr):
    """Sum over what one statistic covers, as (heads or 1, 1)."""
    total = tl.sum(v, 1)[:, None]
    if ACROSS:
        total = tl.sum(total, 0)[:, None]
    return total


@triton.jit
def standardize_pairs(one, two, m1, m2, count, eps, KIND: tl.constexpr, ACROSS: tl.constexpr):
    if KIND == 0:
        mean = head_sum(one + two, ACROSS) / count
        one = tl.where(m1, one - mean, 0.0)
        two = tl.where(m2, two - mean, 0.0)
    if KIND == 2:
        rstd = tl.full([1, 1], 1.0, tl.float32)
    else:
        rstd = tl.rsqrt(head_sum(one * one + two * two, ACROSS) / count + eps)
    return one * rstd, two * rstd, rstd


@triton.jit
def weigh(one, two, weight, row, first, second, m1, m2, PLUS_ONE: tl.constexpr, NARROW: tl.constexpr):
    """Both tiles times their weight."""
    w1 = load(weight, row + first[None, :], m1)
    w2 = load(weight, row + second[None, :], m2)
    if PLUS_ONE:
        w1 += 1.0
        w2 += 1.0
        if NARROW:
            w1 = rounded(w1, weight.dtype.element_ty)
            w2 = rounded(w2, weight.dtype.element_ty)
    return one * w1, two * w2


@triton.jit
def rope_tables(cos, sin, at, first, second, pair_stride, m1, m2, PAIRS: tl.constexpr, FULL: tl.constexpr):
    """cos and sin of the first and the second element of each pair."""
    if FULL:
        c1 = load(cos, at + first[None, :] * pair_stride, m1)
        s1 = load(sin, at + first[None, :] * pair_stride, m1)
        c2 = load(cos, at + second[None, :] * pair_stride, m2)
        s2 = load(sin, at + second[None, :] * pair_stride, m2)
    else:
        i = tl.arange(0, PAIRS)
        c1 = load(cos, at + i[None, :] * pair_stride, m1)
        s1 = load(sin, at + i[None, :] * pair_stride, m1)
        c2 = c1
        s2 = s1
    return c1, s1, c2, s2


@triton.jit
def token_tables(rope, b, s, h, first, second, m1, m2, PAIRS: tl.constexpr, FULL: tl.constexpr,
                 PER_HEAD: tl.constexpr):  # fmt: skip
    """`rope` is (cos, sin, positions, strides of cos (batch, token, head, last), strides of sin, batch stride of positions)."""
    t = s
    if rope[2] is not None:
        t = tl.load(rope[2] + b * rope[5] + s)
    wide = t.to(tl.int64)
    at = b * rope[3][0] + wide * rope[3][1]
    if PER_HEAD:
        at_cos = at + h * rope[3][2]
        c1, c2 = table(rope[0], at_cos, first, second, rope[3][3], m1, m2, PAIRS, FULL)
        s1, s2 = table(rope[1], b * rope[4][0] + wide * rope[4][1] + h * rope[4][2], first, second, rope[4][3], m1, m2,
                       PAIRS, FULL)  # fmt: skip
    else:
        row1 = (first < 2147483647)[None, :]
        c1, c2 = table(rope[0], at, first, second, rope[3][3], m1, m2, PAIRS, FULL)
        s1, s2 = table(rope[1], b * rope[4][0] + wide * rope[4][1], first, second, rope[4][3], m1, m2, PAIRS, FULL)
    return c1, s1, c2, s2
