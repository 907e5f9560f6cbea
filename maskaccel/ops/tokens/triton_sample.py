"""Triton kernels that draw discrete tokens and choose which to keep. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_lib import NO_KEY, falling_key, gumbel, load_keys, mth_smallest, random_word

MOST_GUMBEL = tl.constexpr(17.0)  # -log(-log(u)) is at most 16.64
_SEED = ["key0", "key1", "sample", "mask_id"]  # a value of its own in many calls: no kernel is compiled for it


@triton.jit
def exponent(a, b, sharpness):
    """(a - b) * sharpness, at most 1000 in magnitude: beyond it exp is 0, and 0 times infinity would not be.

    -1000 where both are -inf: minimum and maximum return the operand that is no NaN.
    """
    return tl.minimum(tl.maximum((a - b) * sharpness, -1000.0), 1000.0)


@triton.jit
def log1p(v):
    """log(1 + v) for v >= 0: what 1 + v rounds off is given back in proportion."""
    u = 1.0 + v
    return tl.where(u == 1.0, v, tl.log(u) * (v / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def better_of(score, value, v, best, pick):
    """The best score of each lane and its id; logits of -inf are never taken."""
    better = (score > best) & (value > float("-inf"))
    return tl.where(better, score, best), tl.where(better, v, pick)


@triton.jit(do_not_specialize=_SEED)
def sample_rows(logits, tokens, noise, ids, confidence, key0, key1, sample, step, last, mask_id, l_batch, l_row, N, V,
                temperature, sharpness, KIND: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Draw one token of a row of logits and judge it, in one pass; a row that has its token is not read.

    Each lane keeps the largest and second largest logit it saw, the sum of exponentials of all but the largest
    relative to it (apart from the 1 of the largest itself, beside which a small sum would lose its digits), the same
    weighted by the exponents, and its best candidate.
    """
    row = tl.program_id(0)
    b = row // N
    n = row % N
    given = tl.load(tokens + row)
    if given != mask_id:
        tl.store(ids + row, given)
        tl.store(confidence + row, float("inf"))
    else:
        here = logits + b.to(tl.int64) * l_batch + n.to(tl.int64) * l_row
        lanes = tl.arange(0, BLOCK)
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        second = top
        others = tl.zeros([BLOCK], tl.float32)
        weighted = tl.zeros([BLOCK], tl.float32)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        pick = tl.zeros([BLOCK], tl.int32) + V
        bound = tl.max(best, 0)
        spoiled = tl.zeros([BLOCK], tl.int32)
        for start in range(0, V, BLOCK):
            v = start + lanes
            mask = v < V
            value = tl.load(here + v, mask=mask, other=float("-inf")).to(tl.float32)
            spoiled |= (~(value < float("inf"))).to(tl.int32)
            if NOISE == 1:
                # a block whose largest logit could not win with the largest noise there is draws none
                if tl.max(value, 0) + temperature * MOST_GUMBEL >= bound:
                    item = (n.to(tl.int64) * V + v).to(tl.uint32)
                    noisy = value + temperature * gumbel(random_word(item, (key0, key1, sample, step, last), b))
                    best, pick = better_of(noisy, value, v, best, pick)
                    bound = tl.max(best, 0)
            else:
                score = value
                if NOISE == 2:
                    score += temperature * tl.load(noise + row.to(tl.int64) * V + v, mask=mask, other=0.0)
                best, pick = better_of(score, value, v, best, pick)
            apart = exponent(value, top, sharpness)
            shrink = tl.exp(-tl.abs(apart))
            rises = apart > 0
            weighted = tl.where(rises, shrink * (weighted - apart * (1.0 + others)), weighted + shrink * apart)
            others = tl.where(rises, shrink * (1.0 + others), others + shrink)
            second = tl.where(rises, top, tl.maximum(second, value))
            top = tl.maximum(top, value)
        largest = tl.max(top, 0)
        leader = tl.min(tl.where(top == largest, lanes, BLOCK), 0)
        leads = lanes == leader
        part = exponent(top, largest, sharpness)
        share = tl.exp(part)
        rest = tl.sum(tl.where(leads, others, share * (1.0 + others)), 0)  # the sum of all exponentials less one
        chosen = tl.min(tl.where(best == tl.max(best, 0), pick, V), 0)
        good = (tl.max(spoiled, 0) == 0) & (chosen < V)
        if KIND == 1:
            next_one = tl.max(tl.where(leads, second, top), 0)
            result = (1.0 - tl.exp(exponent(next_one, largest, sharpness))) / (1.0 + rest)
        elif KIND == 2:
            sums = tl.sum(share * (weighted + part * (1.0 + others)), 0)
            result = sums / (1.0 + rest) - log1p(rest)
        else:
            mine = tl.load(here + chosen, mask=chosen < V, other=0.0).to(tl.float32)
            result = exponent(mine, largest, sharpness)
            if KIND == 0:
                result = tl.exp(result) / (1.0 + rest)
            else:
                result = (mine - largest) * sharpness - log1p(rest)
        tl.store(ids + row, tl.where(good, chosen.to(tl.int64), given))
        tl.store(confidence + row, tl.where(good, result, float("nan")))


@triton.jit(do_not_specialize=_SEED)
def open_keys(confidence, tokens, groups, hold, noise, keys, key0, key1, sample, step, last, mask_id, groups_batch,
              hold_batch, n, G, temperature, NOISE: tl.constexpr, TOKEN_BITS: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """Keys of the candidates by falling metric; NO_KEY for the other tokens."""
    b = tl.program_id(1)
    wide = b.to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = t < n
    metric = tl.load(confidence + wide * n + t, mask=mask, other=0.0)
    free = (metric == metric) & (tl.load(tokens + wide * n + t, mask=mask, other=0) == mask_id)
    if hold is not None:
        free = free & (tl.load(hold + wide * hold_batch + t, mask=mask, other=0) == 0)
    if groups is not None:
        group = tl.load(groups + wide * groups_batch + t, mask=mask, other=-1)
        free = free & (group >= 0) & (group < G)
    if NOISE == 1:
        metric += temperature * gumbel(random_word(t.to(tl.uint32), (key0, key1, sample, step, last), b))
    if NOISE == 2:
        metric += temperature * tl.load(noise + wide * n + t, mask=mask, other=0.0)
    key = (falling_key(metric) << TOKEN_BITS) | t
    tl.store(keys + wide * n + t, tl.where(free, key, NO_KEY), mask=mask)


@triton.jit
def take_best(keys, groups, count, confidence, sampled, tokens, out, groups_batch, count_batch, n, threshold,
              BLOCK: tl.constexpr, WHOLE: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """The tokens of one group after its best candidates took theirs. The first group copies those of none."""
    g = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    every = tl.full([1, 1], 0, tl.int32) == 0
    lanes = tl.arange(0, BLOCK)[None, :]
    mine = groups
    if groups is not None:
        mine = groups + b * groups_batch
    wanted = tl.load(count + b * count_batch + g)
    last = mth_smallest(keys + b * n, mine, g, 0, every, n, wanted, 1, BLOCK, WHOLE, BITS)
    for start in range(0, n, BLOCK):
        t = start + lanes
        mask = t < n
        if groups is not None:
            group = tl.load(mine + t, mask=mask, other=0)
            outside = (group < 0) | (group >= tl.num_programs(0))
            mask = mask & ((group == g) | (outside & (g + 0 * group == 0)))
        k = load_keys(keys + b * n, None, 0, 0, every, t, n)
        sure = tl.load(confidence + b * n + t, mask=mask, other=0.0) >= threshold
        taken = (k != NO_KEY) & ((k <= last) | sure)
        old = tl.load(tokens + b * n + t, mask=mask, other=0)
        new = tl.load(sampled + b * n + t, mask=mask, other=0)
        tl.store(out + b * n + t, tl.where(taken, new, old), mask=mask)
