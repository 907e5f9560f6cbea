"""Triton kernels that choose tiles: means of blocks of tokens, the best tiles of a row. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_means(x, means, alike, H, S, D, M, x_b, x_s, x_h, ROWS: tl.constexpr, STEP: tl.constexpr,
                WIDTH: tl.constexpr):  # fmt: skip
    """One block of tokens of one head: its mean, and of unit vectors the squared length of theirs."""
    program = tl.program_id(0).to(tl.int64)
    h = program % H
    m = program // H % M
    b = program // H // M
    columns = tl.arange(0, WIDTH)
    lanes = tl.arange(0, STEP)
    total = tl.zeros([STEP, WIDTH], tl.float32)
    units = tl.zeros([STEP, WIDTH], tl.float32)
    from_row = x + b * x_b + h * x_h
    for start in range(0, ROWS, STEP):
        i = m * ROWS + start + lanes
        inside = (start + lanes < ROWS) & (i < S)
        rows = tl.load(from_row + i[:, None] * x_s + columns[None, :], mask=inside[:, None] & (columns < D)[None, :],
                       other=0.0).to(tl.float32)  # fmt: skip
        total += rows
        if alike is not None:
            # as torch.nn.functional.normalize
            length = tl.maximum(tl.sqrt(tl.sum(rows * rows, 1)), 1e-12)
            units += rows / length[:, None]
    count = tl.minimum(S - m * ROWS, ROWS).to(tl.float32)
    mean = tl.sum(total, 0) / count
    tl.store(means + program * D + columns, mean.to(means.dtype.element_ty), mask=columns < D)
    if alike is not None:
        unit = tl.sum(units, 0) / count
        tl.store(alike + (b * H + h) * M + m, tl.sum(unit * unit, 0))


@triton.jit
def above(keys, mass, at):
    """Sum of `mass` where keys are above `at`."""
    return tl.sum(tl.where(keys > at, mass, 0.0), 0)


@triton.jit
def first_of(keys, n):
    """The n with the largest keys, of equal ones those that come first; as 0 and 1."""
    # The largest number that n keys or more reach is the n-th largest key.
    least = tl.full([], -(1 << 31), tl.int64)
    for step in range(32):
        candidate = least + (tl.full([], 1, tl.int64) << (31 - step))
        least = tl.where(tl.sum((keys >= candidate).to(tl.int32), 0) >= n, candidate, least)
    more = keys > least
    equal = (keys == least).to(tl.int32)
    left = n - tl.sum(more.to(tl.int32), 0)
    return more.to(tl.int32) | ((equal == 1) & (tl.cumsum(equal, 0) <= left)).to(tl.int32)


@triton.jit
def choose_tiles(scores, force, forbid, limits, words, H, M, N, W, force_at, forbid_at, limit_b, limit_h, value, least,
                 RULE: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One row of tiles: which of them a rule of `schema.py` keeps, in words of 32. Nothing is sorted.

    `force_at` and `forbid_at` are the strides of these masks in the four dims of the scores.
    """
    row = tl.program_id(0).to(tl.int64)
    m = row % M
    h = row // M % H
    b = row // M // H
    n = tl.arange(0, BLOCK)
    inside = n < N
    score = tl.load(scores + row * N + n, mask=inside, other=-float("inf"))
    allowed = inside
    if forbid is not None:
        at = forbid + b * forbid_at[0] + h * forbid_at[1] + m * forbid_at[2] + n * forbid_at[3]
        allowed = inside & (tl.load(at, mask=inside, other=1) == 0)
        score = tl.where(allowed, score, -float("inf"))
    limit = value
    if limits is not None:
        limit = tl.load(limits + b * limit_b + h * limit_h)
    # Integers in the order of the scores, -0 as 0; what lies past the row has the smallest.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    keys = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)
    keys = tl.where(inside, keys, -(1 << 31))
    if RULE == 0:
        kept = first_of(keys, tl.minimum(limit, N).to(tl.int32))
    elif RULE == 1:
        mass = tl.where(inside, tl.maximum(score, 0.0), 0.0)
        limit = limit * tl.sum(mass, 0)
        # The largest number with more than the limit above it: tiles up to there come too late, those of the next key
        # as long as their forerunners leave room.
        late = tl.full([], -(1 << 31), tl.int64) - 1
        for step in range(33):
            candidate = late + (tl.full([], 1, tl.int64) << (32 - step))
            late = tl.where(above(keys, mass, candidate) > limit, candidate, late)
        equal = tl.where(keys == late + 1, 1.0, 0.0)
        before = above(keys, mass, late + 1) + (tl.cumsum(equal, 0) - equal) * mass
        kept = ((keys > late + 1) | ((equal > 0.0) & (before <= limit))).to(tl.int32)
    else:
        kept = (score >= limit).to(tl.int32)
    if LEAST:
        kept = kept | first_of(keys, tl.minimum(least, N))
    kept = tl.where(allowed, kept, 0)
    if force is not None:
        at = force + b * force_at[0] + h * force_at[1] + m * force_at[2] + n * force_at[3]
        kept = kept | (tl.load(at, mask=allowed, other=0) != 0).to(tl.int32)
    packed = tl.sum(tl.reshape(kept.to(tl.int64) << (n % 32).to(tl.int64), [BLOCK // 32, 32]), 1)
    w = tl.arange(0, BLOCK // 32)
    tl.store(words + row * W + w, packed.to(tl.int32), mask=w < W)
