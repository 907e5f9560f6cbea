"""Triton kernels of the cached-feature ops. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_lib import load


@triton.jit
def difference_partials(x, reference, base, partials, size, run, BLOCK: tl.constexpr):
    """(sum |x - base - reference|, sum |reference|) of one run of elements of one sample."""
    b = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    start = chunk.to(tl.int64) * run
    lanes = tl.arange(0, BLOCK)
    moved = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, run, BLOCK):
        at = start + i + lanes
        mask = (i + lanes < run) & (at < size)
        value = load(x + b * size, at, mask)
        stored = load(reference + b * size, at, mask)
        if base is not None:
            value -= load(base + b * size, at, mask)
        moved += tl.abs(value - stored)
        total += tl.abs(stored)
    out = partials + (b * tl.num_programs(1) + chunk) * 2
    tl.store(out, tl.sum(moved, 0))
    tl.store(out + 1, tl.sum(total, 0))


@triton.jit
def combined(history, weights, x, gate, h_step, h_batch, weight_step, row, N, D, cols, mask, K: tl.constexpr,
             PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sum x + gate * sum_k weights[k] * history[k] for the columns `cols` of a token, fp32."""
    b = (row // N).to(tl.int64)
    n = row % N
    at = b * h_batch + n.to(tl.int64) * D
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        if PER_CHANNEL:
            w = load(weights + k * weight_step, cols, mask)
        else:
            w = tl.load(weights + k)
        total += w * load(history + tl.full([], k, tl.int64) * h_step + at, cols, mask)
    if gate is not None:
        total *= load(gate[0] + b * gate[1] + (n // gate[3]).to(tl.int64) * gate[2], cols, mask)
    if x is not None:
        total += load(x + row.to(tl.int64) * D, cols, mask)
    return total


@triton.jit
def combine(history, weights, x, gate, out, h_step, h_batch, weight_step, N, D, K: tl.constexpr,
            PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Store x + gate * sum_k weights[k] * history[k] for a block of one token's channels."""
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    total = combined(history, weights, x, gate, h_step, h_batch, weight_step, row, N, D, cols, mask, K, PER_CHANNEL,
                     BLOCK)  # fmt: skip
    tl.store(out + row.to(tl.int64) * D + cols, total.to(out.dtype.element_ty), mask=mask)
