"""Triton kernel of the forecast of a whole stack. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_lib import load


@triton.jit
def combine_all_sites(history, weights, x, gates, out, h_site, h_step, h_batch, w_site, w_step, S, N, D,
                      K: tl.constexpr, PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Store x + sum_s gates[s] * sum_k weights[s, k] * history[s, k] for a block of one token's channels.

    `gates` is None or (pointer, site stride, batch stride, row stride, tokens of a row).
    """
    row = tl.program_id(0)
    b = (row // N).to(tl.int64)
    n = row % N
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    past = history + b * h_batch + n.to(tl.int64) * D
    total = tl.zeros([BLOCK], tl.float32)
    for s in range(S):
        site = tl.full([], 0, tl.int64) + s
        one = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(K):
            if PER_CHANNEL:
                w = load(weights + site * w_site + k * w_step, cols, mask)
            else:
                w = tl.load(weights + site * w_site + k)
            one += w * load(past + site * h_site + tl.full([], k, tl.int64) * h_step, cols, mask)
        if gates is not None:
            at = site * gates[1] + b * gates[2] + (n // gates[4]).to(tl.int64) * gates[3]
            total += load(gates[0] + at, cols, mask) * one
        else:
            total += one
    wide = row.to(tl.int64) * D
    if x is not None:
        total += load(x + wide, cols, mask)
    tl.store(out + wide + cols, total.to(out.dtype.element_ty), mask=mask)
