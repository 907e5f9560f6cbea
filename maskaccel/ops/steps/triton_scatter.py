"""Triton kernels of a forecast at a step that computed a few rows. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_lib import load, rounded


@triton.jit
def rows_of_tokens(index, labels, row_of, first, N, M, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """For each token the last fresh row that is its own, and the first one of its cluster; -1 where there is none."""
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    found = tl.full([TOKENS], -1, tl.int32)
    lead = tl.full([TOKENS], 0, tl.int32) + M
    if labels is not None:
        mine = tl.load(labels + b * N + n, mask=n < N, other=0)
    for start in range(0, M, ROWS):
        m = start + tl.arange(0, ROWS)
        token = tl.load(index + b * M + m, mask=m < M, other=-1)
        inside = (token >= 0) & (token < N)
        own = (token[None, :] == n[:, None]) & inside[None, :]
        found = tl.maximum(found, tl.max(tl.where(own, m[None, :], -1), 1))
        if labels is not None:
            cluster = tl.load(labels + b * N + token, mask=inside, other=0)
            same = (cluster[None, :] == mine[:, None]) & inside[None, :]
            lead = tl.minimum(lead, tl.min(tl.where(same, m[None, :], M), 1))
    tl.store(row_of + b * N + n, found, mask=n < N)
    if labels is not None:
        tl.store(first + b * N + n, tl.where(lead < M, lead, -1), mask=n < N)


@triton.jit
def cluster_means(fresh, index, first, mean, N, M, D, BLOCK: tl.constexpr):
    """The mean of the fresh rows of a cluster, stored at the first of them, for a block of channels."""
    m = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(2).to(tl.int64)
    mask = cols < D
    token = tl.load(index + b * M + m)
    inside = (token >= 0) & (token < N)
    if tl.load(first + b * N + token, mask=inside, other=-1) == m:
        total = tl.zeros([BLOCK], tl.float32)
        count = 0
        for r in range(M):
            other = tl.load(index + b * M + r)
            within = (other >= 0) & (other < N)
            lead = tl.load(first + b * N + other, mask=within, other=-1)
            total += load(fresh + (b * M + r) * D, cols, mask & (lead + 0 * cols == m))
            count += tl.where(lead == m, 1, 0)
        tl.store(mean + (b * M + m) * D + cols, total / count, mask=mask)


@triton.jit
def scatter_rows(history, weights, x, gate, out, fresh, row_of, first, mean, h_step, h_batch, weight_step, N, M, D,
                 newest, gamma, rest, K: tl.constexpr, PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Bring a block of one token's channels of the newest value up to date, then combine it with the older ones."""
    row = tl.program_id(0)
    b = (row // N).to(tl.int64)
    n = row % N
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    at = b * h_batch + n.to(tl.int64) * D
    here = history + (tl.full([], 0, tl.int64) + newest) * h_step + at
    dtype = history.dtype.element_ty
    value = load(here, cols, mask)
    mine = tl.load(row_of + row)
    own = mask & (mine + 0 * cols >= 0)  # not a scalar: the interpreter cannot spread one over a block of bits
    moved = own
    if first is not None:
        lead = tl.load(first + row)
        pulled = mask & (lead + 0 * cols >= 0)
        mu = load(mean + (b * M + tl.maximum(lead, 0)) * D, cols, pulled)
        value = tl.where(pulled, rounded(gamma * mu + rest * value, dtype), value)
        moved = own | pulled
    value = tl.where(own, load(fresh + (b * M + tl.maximum(mine, 0)) * D, cols, own), value)
    tl.store(here + cols, value.to(dtype), mask=moved)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        if PER_CHANNEL:
            w = load(weights + k * weight_step, cols, mask)
        else:
            w = tl.load(weights + k)
        old = load(history + tl.full([], k, tl.int64) * h_step + at, cols, mask & (newest + 0 * cols != k))
        total += w * tl.where(newest + 0 * cols == k, value, old)
    if gate is not None:
        total *= load(gate[0] + b * gate[1] + (n // gate[3]).to(tl.int64) * gate[2], cols, mask)
    wide = row.to(tl.int64) * D
    if x is not None:
        total += load(x + wide, cols, mask)
    tl.store(out + wide + cols, total.to(out.dtype.element_ty), mask=mask)
