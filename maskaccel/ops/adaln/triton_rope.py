"""Triton kernels of QK norm with rotary embedding, forward and backward. Importing this needs triton.

A head is held as two tiles (heads, pairs): the first and the second element of each rotated pair. Statistics are the
sums over both, so one code serves interleaved and rotate-half tables, with and without rotation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_lib import load, rounded


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
def load_pairs(pointer, row, D, heads, PAIRS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
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
def affine_pairs(one, two, weight, bias, row, first, second, m1, m2, DTYPE: tl.constexpr, KIND: tl.constexpr,
                 PLUS_ONE: tl.constexpr, NARROW: tl.constexpr):  # fmt: skip
    """Weight and bias, rounded where `triton_norm.affine` rounds."""
    STEPS: tl.constexpr = NARROW and KIND != 0
    if STEPS:
        one = rounded(one, DTYPE)
        two = rounded(two, DTYPE)
    if weight is not None:
        one, two = weigh(one, two, weight, row, first, second, m1, m2, PLUS_ONE, STEPS)
        if STEPS:
            one = rounded(one, DTYPE)
            two = rounded(two, DTYPE)
    if bias is not None:
        one += load(bias, row + first[None, :], m1)
        two += load(bias, row + second[None, :], m2)
    if NARROW:
        one = rounded(one, DTYPE)
        two = rounded(two, DTYPE)
    return one, two


@triton.jit
def load_table(t, b, s, h, first, second, m1, m2, PAIRS: tl.constexpr, FULL: tl.constexpr):
    """Values of a table, (pointer, batch, token, head and last stride), for both elements of each pair of a token."""
    at = t[0] + b * t[1] + s * t[2] + h * t[3]
    if FULL:
        v1 = load(at, first[None, :] * t[4], m1)
        v2 = load(at, second[None, :] * t[4], m2)
    else:
        v1 = load(at, tl.arange(0, PAIRS)[None, :] * t[4], m1)
        v2 = v1
    return v1, v2


@triton.jit
def load_rope(cos, sin, positions, positions_batch, b, s, h, first, second, m1, m2, r1, r2, PAIRS: tl.constexpr,
              FULL: tl.constexpr, PER_HEAD: tl.constexpr):  # fmt: skip
    """Values of cos and sin for both elements: (heads, pairs) with PER_HEAD, else one row that all heads share."""
    if positions is not None:
        s = tl.load(positions + b * positions_batch + s)
    s = s.to(tl.int64)
    if PER_HEAD:
        c1, c2 = load_table(cos, b, s, h, first, second, m1, m2, PAIRS, FULL)
        s1, s2 = load_table(sin, b, s, h, first, second, m1, m2, PAIRS, FULL)
    else:
        c1, c2 = load_table(cos, b, s, 0, first, second, r1, r2, PAIRS, FULL)
        s1, s2 = load_table(sin, b, s, 0, first, second, r1, r2, PAIRS, FULL)
    return c1, s1, c2, s2


@triton.jit
def normed_pairs(x, weight, bias, strides, b, s, H, D, eps, HEADS: tl.constexpr, PAIRS: tl.constexpr,
                 FLAGS: tl.constexpr):  # fmt: skip
    """All heads of row `s` of sample `b` after their norm. `strides` are those of batch, token and head."""
    KIND: tl.constexpr = FLAGS & 3
    NARROW: tl.constexpr = (FLAGS & 4) != 0
    HALF: tl.constexpr = (FLAGS & 32) != 0
    h = tl.arange(0, HEADS).to(tl.int64)[:, None]
    heads = h < H
    first, second, r1, r2 = pair_columns(D, PAIRS, HALF)
    r1 = r1[None, :]
    r2 = r2[None, :]
    m1 = heads & r1
    m2 = heads & r2
    row = b * strides[0] + s.to(tl.int64) * strides[1] + h * strides[2]
    one, two = load_pairs(x, row, D, heads, PAIRS, HEADS, HALF)
    if (FLAGS & 16) != 0:
        one, two, _ = standardize_pairs(one, two, m1, m2, D * H, eps, KIND, True)
        one, two = affine_pairs(one, two, weight, bias, h * D, first, second, m1, m2, x.dtype.element_ty, KIND,
                                (FLAGS & 8) != 0, NARROW)  # fmt: skip
    else:
        one, two, _ = standardize_pairs(one, two, m1, m2, D, eps, KIND, False)
        one, two = affine_pairs(one, two, weight, bias, 0, first, second, r1, r2, x.dtype.element_ty, KIND,
                                (FLAGS & 8) != 0, NARROW)  # fmt: skip
    return one, two


@triton.jit
def rotated_pairs(one, two, cos, sin, positions, positions_batch, b, s, H, D, HEADS: tl.constexpr, PAIRS: tl.constexpr,
                  FLAGS: tl.constexpr, FULL: tl.constexpr, PER_HEAD: tl.constexpr):  # fmt: skip
    """Both tiles after their rotation; the tables are None for none."""
    if cos is not None:
        h = tl.arange(0, HEADS).to(tl.int64)[:, None]
        first, second, r1, r2 = pair_columns(D, PAIRS, (FLAGS & 32) != 0)
        r1 = r1[None, :]
        r2 = r2[None, :]
        c1, s1, c2, s2 = load_rope(cos, sin, positions, positions_batch, b, s, h, first, second, (h < H) & r1,
                                   (h < H) & r2, r1, r2, PAIRS, FULL, PER_HEAD)  # fmt: skip
        turned = one * c1 - two * s1
        two = two * c2 + one * s2
        one = turned
    return one, two


@triton.jit
def norm_rope_token(x, out, weight, bias, cos, sin, positions, positions_batch, strides, token, S, H, D, eps,
                    HEADS: tl.constexpr, PAIRS: tl.constexpr, FLAGS: tl.constexpr, FULL: tl.constexpr,
                    PER_HEAD: tl.constexpr):  # fmt: skip
    """Norm and rotation of all heads of one token of q or k."""
    b = (token // S).to(tl.int64)
    s = token % S
    one, two = normed_pairs(x, weight, bias, strides, b, s, H, D, eps, HEADS, PAIRS, FLAGS)
    one, two = rotated_pairs(one, two, cos, sin, positions, positions_batch, b, s, H, D, HEADS, PAIRS, FLAGS, FULL,
                             PER_HEAD)  # fmt: skip
    h = tl.arange(0, HEADS).to(tl.int64)[:, None]
    store_pairs(out, (token.to(tl.int64) * H + h) * D, one, two, D, h < H, PAIRS, HEADS, (FLAGS & 32) != 0)


@triton.jit
def qk_forward(q, k, q_out, k_out, q_weight, k_weight, q_bias, k_bias, cos, sin, positions, positions_batch,
               q_strides, k_strides, q_tokens, k_tokens, S, SK, H, HK, D, eps, Q_HEADS: tl.constexpr,
               K_HEADS: tl.constexpr, PAIRS: tl.constexpr, FLAGS: tl.constexpr, FULL: tl.constexpr,
               PER_HEAD: tl.constexpr):  # fmt: skip
    """A program is one token of q (second grid index 0) or of k (1)."""
    token = tl.program_id(0)
    if tl.program_id(1) == 0:
        if token < q_tokens:
            norm_rope_token(q, q_out, q_weight, q_bias, cos, sin, positions, positions_batch, q_strides, token, S, H, D,
                            eps, Q_HEADS, PAIRS, FLAGS, FULL, PER_HEAD)  # fmt: skip
    else:
        if token < k_tokens:
            norm_rope_token(k, k_out, k_weight, k_bias, cos, sin, positions, positions_batch, k_strides, token, SK, HK,
                            D, eps, K_HEADS, PAIRS, FLAGS, FULL, PER_HEAD)  # fmt: skip


@triton.jit
def store_sum(out, program, one, two, h, first, second, m1, m2, r1, r2, H, D, ACROSS: tl.constexpr):
    """Store a partial gradient of a weight: (H, D) with one statistic for all heads, else summed over the heads."""
    if out is not None:
        if ACROSS:
            at = program * H * D + h * D
            tl.store(out + at + first[None, :], one, mask=m1)
            tl.store(out + at + second[None, :], two, mask=m2)
        else:
            # heads that only pad the tile hold NaN when eps is 0
            at = program * D
            tl.store(out + at + first[None, :], tl.sum(tl.where(m1, one, 0.0), 0)[None, :], mask=r1)
            tl.store(out + at + second[None, :], tl.sum(tl.where(m2, two, 0.0), 0)[None, :], mask=r2)


@triton.jit
def norm_rope_run(d, x, dx, dweight, dbias, weight, cos, sin, positions, positions_batch, d_strides, x_strides, program,
                  run, tokens, S, H, D, eps, HEADS: tl.constexpr, PAIRS: tl.constexpr, FLAGS: tl.constexpr,
                  FULL: tl.constexpr, PER_HEAD: tl.constexpr):  # fmt: skip
    """Backward of `norm_rope_token` over a run of tokens, weight gradients summed in registers."""
    KIND: tl.constexpr = FLAGS & 3
    PLUS_ONE: tl.constexpr = (FLAGS & 8) != 0
    ACROSS: tl.constexpr = (FLAGS & 16) != 0
    HALF: tl.constexpr = (FLAGS & 32) != 0
    h = tl.arange(0, HEADS).to(tl.int64)[:, None]
    heads = h < H
    first, second, r1, r2 = pair_columns(D, PAIRS, HALF)
    r1 = r1[None, :]
    r2 = r2[None, :]
    m1 = heads & r1
    m2 = heads & r2
    weight1 = tl.zeros([HEADS, PAIRS], tl.float32)
    weight2 = tl.zeros([HEADS, PAIRS], tl.float32)
    bias1 = tl.zeros([HEADS, PAIRS], tl.float32)
    bias2 = tl.zeros([HEADS, PAIRS], tl.float32)
    for i in range(tl.minimum(run, tokens - program * run)):
        token = program * run + i
        b = (token // S).to(tl.int64)
        s = token % S
        wide = s.to(tl.int64)
        d1, d2 = load_pairs(d, b * d_strides[0] + wide * d_strides[1] + h * d_strides[2], D, heads, PAIRS, HEADS, HALF)
        if cos is not None:
            c1, s1, c2, s2 = load_rope(cos, sin, positions, positions_batch, b, s, h, first, second, m1, m2, r1, r2,
                                       PAIRS, FULL, PER_HEAD)  # fmt: skip
            turned = d1 * c1 + d2 * s2
            d2 = d2 * c2 - d1 * s1
            d1 = turned
        if dbias is not None:
            bias1 += d1
            bias2 += d2
        if (dx is not None) or (dweight is not None):
            row = b * x_strides[0] + wide * x_strides[1] + h * x_strides[2]
            one, two = load_pairs(x, row, D, heads, PAIRS, HEADS, HALF)
            if ACROSS:
                count = D * H
            else:
                count = D
            one, two, rstd = standardize_pairs(one, two, m1, m2, count, eps, KIND, ACROSS)
            if dweight is not None:
                weight1 += d1 * one
                weight2 += d2 * two
            if dx is not None:
                if weight is not None:
                    if ACROSS:
                        d1, d2 = weigh(d1, d2, weight, h * D, first, second, m1, m2, PLUS_ONE, False)
                    else:
                        d1, d2 = weigh(d1, d2, weight, 0, first, second, r1, r2, PLUS_ONE, False)
                if KIND != 2:
                    along = head_sum(d1 * one + d2 * two, ACROSS) / count
                    one = d1 - one * along
                    two = d2 - two * along
                    if KIND == 0:
                        mean = head_sum(d1 + d2, ACROSS) / count
                        one -= mean
                        two -= mean
                    d1 = one * rstd
                    d2 = two * rstd
                store_pairs(dx, (token.to(tl.int64) * H + h) * D, d1, d2, D, heads, PAIRS, HEADS, HALF)
    wide_program = program.to(tl.int64)
    store_sum(dweight, wide_program, weight1, weight2, h, first, second, m1, m2, r1, r2, H, D, ACROSS)
    store_sum(dbias, wide_program, bias1, bias2, h, first, second, m1, m2, r1, r2, H, D, ACROSS)


@triton.jit
def qk_backward(dq, dk, q, k, q_weight, k_weight, cos, sin, positions, positions_batch, dq_out, dk_out, dq_weight,
                dk_weight, dq_bias, dk_bias, dq_strides, dk_strides, q_strides, k_strides, run, q_tokens, k_tokens, S,
                SK, H, HK, D, eps, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, PAIRS: tl.constexpr,
                FLAGS: tl.constexpr, FULL: tl.constexpr, PER_HEAD: tl.constexpr):  # fmt: skip
    """A program is a run of tokens of q (second grid index 0) or of k (1)."""
    program = tl.program_id(0)
    if tl.program_id(1) == 0:
        norm_rope_run(dq, q, dq_out, dq_weight, dq_bias, q_weight, cos, sin, positions, positions_batch, dq_strides,
                      q_strides, program, run, q_tokens, S, H, D, eps, Q_HEADS, PAIRS, FLAGS, FULL,
                      PER_HEAD)  # fmt: skip
    else:
        norm_rope_run(dk, k, dk_out, dk_weight, dk_bias, k_weight, cos, sin, positions, positions_batch, dk_strides,
                      k_strides, program, run, k_tokens, SK, HK, D, eps, K_HEADS, PAIRS, FLAGS, FULL,
                      PER_HEAD)  # fmt: skip
