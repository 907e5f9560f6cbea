"""Triton kernels of clusters of tokens. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_lib import load


@triton.jit
def assign_rows(x, centroids, x_scale, scale, labels, distance, x_batch, x_row, N, D, K, METRIC: tl.constexpr,
                ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The nearest centroid of a block of tokens; `distance` is None or takes all distances."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    tokens = x + b * x_batch + n.to(tl.int64)[:, None] * x_row
    best = tl.full([ROWS], float("inf"), tl.float32)
    label = tl.zeros([ROWS], tl.int32)
    for start in range(0, K, COLS):
        c = start + tl.arange(0, COLS)
        rows = centroids + (b * K + c)[:, None] * D
        total = tl.zeros([ROWS, COLS], tl.float32)
        for done in range(0, D, BLOCK):
            d = done + lanes
            left = load(tokens, d[None, :], (n < N)[:, None] & (d < D)[None, :])
            right = load(rows, d[None, :], (c < K)[:, None] & (d < D)[None, :])
            if METRIC == 2:
                total += tl.sum(left[:, None, :] * right[None, :, :], 2)
            else:
                apart = left[:, None, :] - right[None, :, :]
                total += tl.sum(tl.abs(apart) if METRIC == 1 else apart * apart, 2)
        if METRIC == 2:
            lengths = tl.load(x_scale + b * N + n, mask=n < N, other=0.0)
            total = 1.0 - total * lengths[:, None] * tl.load(scale + b * K + c, mask=c < K, other=0.0)[None, :]
        if distance is not None:
            tl.store(distance + (b * N + n)[:, None] * K + c[None, :], total, mask=(n < N)[:, None] & (c < K)[None, :])
        total = tl.where((c < K)[None, :] & (total < float("inf")), total, float("inf"))
        least = tl.min(total, 1)
        lowest = tl.min(tl.where(total == least[:, None], c[None, :], K), 1)
        label = tl.where(least < best, lowest, label)
        best = tl.minimum(best, least)
    tl.store(labels + b * N + n, label, mask=n < N)


@triton.jit
def center_rows(x, x_scale, labels, centroids, x_batch, x_row, N, D, K, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The mean of the tokens of a cluster, for a block of channels. Tokens of other clusters are not loaded."""
    c = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(2).to(tl.int64)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    for start in range(0, N, ROWS):
        n = start + tl.arange(0, ROWS)
        member = tl.load(labels + b * N + n, mask=n < N, other=-1) == c
        v = load(
            x + b * x_batch + n.to(tl.int64)[:, None] * x_row, cols[None, :], member[:, None] & (cols < D)[None, :]
        )
        if x_scale is not None:
            v *= tl.load(x_scale + b * N + n, mask=member, other=0.0)[:, None]
        total += v
        count += member.to(tl.int32)
    number = tl.sum(count, 0)
    if number > 0:
        tl.store(centroids + (b * K + c) * D + cols, tl.sum(total, 0) / number, mask=cols < D)


@triton.jit
def nearest_members(labels, distance, chosen, N, K, BLOCK: tl.constexpr):
    """The token of a cluster that is nearest to its centroid; -1 for an empty cluster."""
    c = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    best = tl.full([BLOCK], float("inf"), tl.float32)
    at = tl.full([BLOCK], 0, tl.int32) + N
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        member = tl.load(labels + b * N + n, mask=n < N, other=-1) == c
        d = tl.load(distance + (b * N + n) * K + c, mask=member, other=float("inf"))
        better = member & ((d < best) | (at == N))
        best = tl.where(better, d, best)
        at = tl.where(better, n, at)
    least = tl.min(best, 0)
    lowest = tl.min(tl.where((at < N) & (best == least), at, N), 0)
    tl.store(chosen + b * K + c, tl.where(lowest < N, lowest, -1))


@triton.jit
def nearest_free(distance, chosen, taken, N, K, BLOCK: tl.constexpr):
    """For one empty cluster after the other the nearest token that represents none yet. `taken` starts as zeros."""
    b = tl.program_id(0).to(tl.int64)
    for c in range(K):
        at = tl.load(chosen + b * K + c)
        tl.store(taken + b * N + at, 1, mask=at >= 0)
    tl.debug_barrier()
    for c in range(K):
        if tl.load(chosen + b * K + c) < 0:
            best = tl.full([BLOCK], float("inf"), tl.float32)
            at = tl.full([BLOCK], 0, tl.int32) + N
            for start in range(0, N, BLOCK):
                n = start + tl.arange(0, BLOCK)
                free = tl.load(taken + b * N + n, mask=n < N, other=1) == 0
                d = tl.load(distance + (b * N + n) * K + c, mask=free, other=float("inf"))
                better = free & ((d < best) | (at == N))
                best = tl.where(better, d, best)
                at = tl.where(better, n, at)
            least = tl.min(best, 0)
            lowest = tl.min(tl.where((at < N) & (best == least), at, N), 0)
            tl.store(chosen + b * K + c, lowest)
            tl.store(taken + b * N + lowest, 1)
            tl.debug_barrier()
