"""Triton kernel of the inner products of remembered features. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gram_partials(history, partials, h_step, h_batch, size, run, K: tl.constexpr, ROWS: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """One row of the matrix, `<history[i], history[:]>`, over one run of elements of one sample.

    The programs of all rows of a run are neighbours in the grid: the run comes from memory once, and then from L2.
    """
    i = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    start = chunk.to(tl.int64) * run
    lanes = tl.arange(0, BLOCK)
    steps = tl.arange(0, ROWS)
    rows = history + b * h_batch + steps.to(tl.int64)[:, None] * h_step
    total = tl.zeros([ROWS, BLOCK], tl.float64)
    for done in range(0, run, BLOCK):
        at = start + done + lanes
        mask = (done + lanes < run) & (at < size)
        one = tl.load(history + b * h_batch + i * h_step + at, mask=mask, other=0.0).to(tl.float64)
        every = tl.load(rows + at[None, :], mask=(steps < K)[:, None] & mask[None, :], other=0.0).to(tl.float64)
        total += every * one[None, :]
    out = partials + ((b * tl.num_programs(1) + chunk) * K + i) * K + steps
    tl.store(out, tl.sum(total, 1), mask=steps < K)
