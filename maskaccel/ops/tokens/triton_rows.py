"""Triton kernels that gather, merge and sum rows of tokens. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_lib import load


@triton.jit
def copy_rows(x, ids, out, x_batch, x_row, ids_batch, N, M, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[m] = x[ids[m]] for ROWS rows of one sample; zeros for an id that is no row."""
    b = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + b * ids_batch + m, mask=m < M, other=-1)
    held = ((token >= 0) & (token < N))[:, None] & (cols < D)[None, :]
    values = tl.load(x + b * x_batch + token.to(tl.int64)[:, None] * x_row + cols[None, :], mask=held, other=0.0)
    tl.store(out + (b * M + m)[:, None] * D + cols[None, :], values, mask=(m < M)[:, None] & (cols < D)[None, :])


@triton.jit
def sum_segments(x, order, offsets, out, x_batch, x_row, order_batch, offsets_batch, N, S, D, MEAN: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """A block of channels of the sum (mean) of the rows of one segment, in their order."""
    s = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(2).to(tl.int64)
    mask = cols < D
    first = tl.load(offsets + b * offsets_batch + s)
    end = tl.load(offsets + b * offsets_batch + s + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(first, end):
        row = tl.load(order + b * order_batch + i)
        held = mask & (row + 0 * cols >= 0) & (row + 0 * cols < N)
        total += load(x + b * x_batch + row.to(tl.int64) * x_row, cols, held)
    if MEAN:
        total /= tl.maximum(end - first, 1).to(tl.float32)
    tl.store(out + (b * S + s) * D + cols, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def merge_rows_of_tokens(full, rows, inverse, gate, mask_token, pos, out, full_strides, rows_batch, rows_row,
                         inverse_batch, N, K, D, lam, rest, MODE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A block of channels of one token of `scatter_merge`. `gate` and `pos` are None or (tensor, batch, row stride)."""
    n = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(2).to(tl.int64)
    mask = cols < D
    slot = tl.load(inverse + b * inverse_batch + n)
    some = mask & (slot + 0 * cols >= 0) & (slot + 0 * cols < K)  # not a scalar: the interpreter cannot spread one
    value = load(rows + b * rows_batch + slot.to(tl.int64) * rows_row, cols, some)
    if full is not None:
        here = full + b * full_strides[0] + n.to(tl.int64) * full_strides[1]
        if MODE == 0:
            value = tl.where(some, value, load(here, cols, mask & ~some))
        else:
            base = load(here, cols, mask)
            if MODE == 1:
                if gate is not None:
                    value *= load(gate[0] + b * gate[1] + slot.to(tl.int64) * gate[2], cols, some)
                value += base
            else:
                value = tl.where(some, lam * base + rest * value, base)
    else:
        if mask_token is not None:
            value = tl.where(some, value, load(mask_token, cols, mask & ~some))
        if pos is not None:
            value += load(pos[0] + b * pos[1] + n.to(tl.int64) * pos[2], cols, mask)
    tl.store(out + (b * N + n) * D + cols, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def merge_backward_tokens(dout, inverse, dfull, partials, dout_batch, dout_row, inverse_batch, N, K, D, run, lam,
                          BLOCK: tl.constexpr):  # fmt: skip
    """Write dfull of one run of tokens of a sample, and the sum of dout over the dropped ones of them."""
    chunk = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(2).to(tl.int64)
    mask = cols < D
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(tl.minimum(run, N - chunk * run)):
        n = chunk * run + step
        slot = tl.load(inverse + b * inverse_batch + n) + 0 * cols
        kept = (slot >= 0) & (slot < K)
        grad = load(dout + b * dout_batch + n.to(tl.int64) * dout_row, cols, mask)
        if dfull is not None:
            value = tl.where(kept, lam * grad, grad)
            tl.store(dfull + (b * N + n) * D + cols, value.to(dfull.dtype.element_ty), mask=mask)
        total += tl.where(kept, 0.0, grad)
    if partials is not None:
        tl.store(partials + (b * tl.num_programs(0) + chunk) * D + cols, total, mask=mask)


@triton.jit
def merge_backward_slots(dout, rows, ids, gate, drows, dgate, partials, dout_batch, dout_row, rows_batch, rows_row,
                         ids_batch, N, K, D, run, share, BLOCK: tl.constexpr):  # fmt: skip
    """Write drows of one run of slots of a sample, and dgate: of each slot, or summed over the run into `partials`."""
    chunk = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(2).to(tl.int64)
    mask = cols < D
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(tl.minimum(run, K - chunk * run)):
        k = chunk * run + step
        token = tl.load(ids + b * ids_batch + k)
        held = mask & (token + 0 * cols >= 0) & (token + 0 * cols < N)
        grad = load(dout + b * dout_batch + token.to(tl.int64) * dout_row, cols, held)
        at = (b * K + k) * D + cols
        if drows is not None:
            value = grad * share
            if gate is not None:
                value = grad * load(gate[0] + b * gate[1] + k.to(tl.int64) * gate[2], cols, held)
            tl.store(drows + at, value.to(drows.dtype.element_ty), mask=mask)
        if rows is not None:
            product = grad * load(rows + b * rows_batch + k.to(tl.int64) * rows_row, cols, held)
            if dgate is not None:
                tl.store(dgate + at, product, mask=mask)
            total += product
    if partials is not None:
        tl.store(partials + (b * tl.num_programs(0) + chunk) * D + cols, total, mask=mask)
