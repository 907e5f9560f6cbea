"""Triton kernels that choose tokens: keys, thresholds, slots. Importing this needs triton.

Three steps: a key for each token; for each set of tokens (a run, a class, a sample) the largest key that is kept, and a
mark of 1 or 0 for each token in `inverse`; the slots of the marked ones, in place. A set of more than BLOCK tokens is
walked in blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_lib import NO_KEY, falling_key, load_keys, mth_smallest, random_word

_SEED = ["key0", "key1", "sample"]  # a value of its own in every call: no kernel is compiled for it


@triton.jit(do_not_specialize=[*_SEED, "route"])
def random_keys(keys, order, force, key0, key1, sample, step, route, force_batch, first, count,
                TOKEN_BITS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Keys of `count` items from `first` on: not forced, random word, token; in the order of `order`."""
    b = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    token = at
    if order is not None:
        token = tl.load(order + at, mask=mask, other=0)
    word = random_word((token + first).to(tl.uint32), (key0, key1, sample, step, route), b)
    key = (word.to(tl.int64) << TOKEN_BITS) | token
    if force is not None:
        free = tl.load(force + b.to(tl.int64) * force_batch + token, mask=mask, other=0) == 0
        key += free.to(tl.int64) << (32 + TOKEN_BITS)
    tl.store(keys + b.to(tl.int64) * count + at, key, mask=mask)


@triton.jit
def mark_runs(keys, order, marks, n, runs, size, kept, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
              BITS: tl.constexpr):  # fmt: skip
    """Mark the `kept` tokens of smallest keys in each of ROWS runs of `size` keys."""
    b = tl.program_id(1).to(tl.int64)
    run = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    lanes = tl.arange(0, BLOCK)[None, :]
    row = run * size
    last = mth_smallest(keys + b * n, None, 0, row, run < runs, size, kept, ROWS, BLOCK, WHOLE, BITS)
    for start in range(0, size, BLOCK):
        k = load_keys(keys + b * n, None, 0, row, run < runs, start + lanes, size)
        mask = (run < runs) & (start + lanes < size)
        token = row + start + lanes
        if order is not None:
            token = tl.load(order + token, mask=mask, other=0)
        tl.store(marks + b * n + token, (k <= last).to(tl.int32), mask=mask)


@triton.jit
def mark_grid(keys, marks, rows, columns, kept_rows, kept_columns, ROWS: tl.constexpr, BLOCK: tl.constexpr,
              ROW_BLOCK: tl.constexpr, ROW_WHOLE: tl.constexpr, WHOLE: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """Mark the tokens of ROWS rows of the grid that lie in a kept row and a kept column."""
    b = tl.program_id(1).to(tl.int64)
    every = tl.full([1, 1], 0, tl.int32) == 0
    mine = keys + b * (rows + columns)
    last_row = mth_smallest(mine, None, 0, 0, every, rows, kept_rows, 1, ROW_BLOCK, ROW_WHOLE, BITS)
    last = mth_smallest(mine + rows, None, 0, 0, every, columns, kept_columns, 1, BLOCK, WHOLE, BITS)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row_kept = tl.load(mine + r, mask=r < rows, other=NO_KEY) <= last_row
    for start in range(0, columns, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        kept = row_kept & (tl.load(mine + rows + c, mask=c < columns, other=NO_KEY) <= last)
        at = (b * rows + r) * columns + c
        tl.store(marks + at, kept.to(tl.int32), mask=(r < rows) & (c < columns))


@triton.jit
def mark_classes(keys, labels, quota, marks, labels_batch, quota_batch, n, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
                 BITS: tl.constexpr):  # fmt: skip
    """Mark the tokens of smallest keys of one class, as many as its quota. The first class clears those of none."""
    c = tl.program_id(0)
    classes = tl.num_programs(0)
    b = tl.program_id(1).to(tl.int64)
    mine = labels + b * labels_batch
    every = tl.full([1, 1], 0, tl.int32) == 0
    limit = tl.load(quota + b * quota_batch + c)
    last = mth_smallest(keys + b * n, mine, c, 0, every, n, limit, 1, BLOCK, WHOLE, BITS)
    for start in range(0, n, BLOCK):
        t = start + tl.arange(0, BLOCK)[None, :]
        label = tl.load(mine + t, mask=t < n, other=0)
        k = tl.load(keys + b * n + t, mask=t < n, other=NO_KEY)
        nobody = (c + 0 * label == 0) & ((label < 0) | (label >= classes))
        tl.store(marks + b * n + t, ((label == c) & (k <= last)).to(tl.int32),
                 mask=(t < n) & ((label == c) | nobody))  # fmt: skip


@triton.jit
def active_keys(score, age, decay, force, keys, force_batch, n, ages, threshold, AT_LEAST: tl.constexpr,
                TOKEN_BITS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Keys by falling metric; -1 for forced tokens, NO_KEY for those below the threshold (with AT_LEAST)."""
    b = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = t < n
    waited = tl.load(age + b * n + t, mask=mask, other=0)
    waited = tl.minimum(tl.maximum(waited, 0), ages - 1)
    metric = tl.load(score + b * n + t, mask=mask, other=0.0) * tl.load(decay + waited, mask=mask, other=0.0)
    metric = tl.where(metric == metric, metric, float("-inf"))
    key = (falling_key(metric) << TOKEN_BITS) | t
    if AT_LEAST:
        key = tl.where(metric >= threshold, key, NO_KEY)
    if force is not None:
        key = tl.where(tl.load(force + b * force_batch + t, mask=mask, other=0) != 0, -1, key)
    tl.store(keys + b * n + t, key, mask=mask)


@triton.jit
def mark_active(keys, marks, n, keep, high, FORCED: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr,
                WHOLE: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """Mark the first `keep` forced tokens (keys of -1), and of the others the ranks from `high` on that still fit."""
    b = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    every = tl.full([1, 1], 0, tl.int32) == 0
    forced = 0
    if FORCED:
        total = tl.zeros([BLOCK], tl.int32)
        for start in range(0, n, BLOCK):
            t = start + lanes
            total += (tl.load(keys + b * n + t, mask=t < n, other=0) < 0).to(tl.int32)
        forced = tl.sum(total, 0)
    # keys of -1 lie below every number that the search tries: they count as the smallest
    room = tl.maximum(keep - forced, 0)
    last = mth_smallest(keys + b * n, None, 0, 0, every, n, tl.where(room > 0, forced + high + room, 0), 1, BLOCK,
                        WHOLE, BITS)  # fmt: skip
    last = tl.sum(last, 1)
    before = tl.full([1], -1, tl.int64)
    if HIGH:
        before = tl.sum(mth_smallest(keys + b * n, None, 0, 0, every, n, forced + high, 1, BLOCK, WHOLE, BITS), 1)
    seen = 0
    for start in range(0, n, BLOCK):
        t = start + lanes
        k = tl.load(keys + b * n + t, mask=t < n, other=NO_KEY)
        kept = (k >= 0) & (k > before) & (k <= last) & (k != NO_KEY)
        if FORCED:
            one = (k < 0).to(tl.int32)
            kept = kept | ((k < 0) & (seen + tl.cumsum(one, 0) <= keep))
            seen += tl.sum(one, 0)
        tl.store(marks + b * n + t, kept.to(tl.int32), mask=t < n)


@triton.jit
def slots_of_marks(inverse, keep, counts, age, new_age, n, K, BLOCK: tl.constexpr):
    """Turn the marks of one sample into slots, the first K of them; tokens into `keep`, n into what is left of it."""
    b = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    before = 0
    for start in range(0, n, BLOCK):
        t = start + lanes
        mark = tl.load(inverse + b * n + t, mask=t < n, other=0)
        slot = before + tl.cumsum(mark, 0) - mark
        kept = (mark > 0) & (slot < K)
        tl.store(inverse + b * n + t, tl.where(kept, slot, -1), mask=t < n)
        tl.store(keep + b * K + slot, t, mask=kept)
        if age is not None:
            old = tl.load(age + b * n + t, mask=t < n, other=0)
            tl.store(new_age + b * n + t, tl.where(kept, 0, old + 1), mask=t < n)
        before += tl.sum(mark, 0)
    count = tl.minimum(before, K)
    for start in range(0, K, BLOCK):
        slot = start + lanes
        tl.store(keep + b * K + slot, n + 0 * slot, mask=(slot >= count) & (slot < K))
    if counts is not None:
        tl.store(counts + b, count)
