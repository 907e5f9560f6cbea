"""Triton kernel of the adaLN backward. Importing this needs triton.

One program walks a run of consecutive tokens that lie in one group of every modulation operand, adds the gradients that
tokens share in registers, and stores them once as fp32 partials; `reduce_rows` sums those. Gradients of per-token
modulation (the bits of DIRECT) are stored token by token instead. Nothing depends on the order programs run in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_lib import load
from .triton_norm import gate_act, load_modulation, load_weight, standardize


@triton.jit
def standardize_backward(d, unit, rstd, mask, D, KIND: tl.constexpr):
    """Gradient through `standardize`, given its result `unit`. Lanes outside `mask` come out arbitrary."""
    if KIND == 2:
        out = d
    else:
        d = tl.where(mask, d, 0.0)
        along = tl.sum(d * unit, 0) / D
        out = d - unit * along
        if KIND == 0:
            out -= tl.sum(d, 0) / D
        out *= rstd
    return out


@triton.jit
def demodulate(dy, scale, scale_table, b, index, cols, mask, offset):
    """Gradient of the norm's result from that of the modulated output."""
    if (scale is not None) or (scale_table is not None):
        dy *= offset + load_modulation(scale, scale_table, b, index, cols, mask, False)
    return dy


@triton.jit
def collect(total, value, out, at, cols, mask, DIRECT: tl.constexpr):
    """Add the gradient of one token to the running sum, or store it where each token has its own."""
    if out is not None:
        if DIRECT:
            tl.store(out + at + cols, value, mask=mask)
        else:
            total += value
    return total


@triton.jit
def finish(total, out, at, cols, mask, DIRECT: tl.constexpr):
    if (out is not None) and (not DIRECT):
        tl.store(out + at + cols, total, mask=mask)


@triton.jit
def adaln_backward(dr, dy, dy2, r, a, gate, scale, shift, scale2, shift2, gate_table, scale_table, shift_table, weight,
                   bias, post_weight, rows, dx, da, dgate, dscale, dshift, dscale2, dshift2, dweight, dbias, dpost,
                   dr_batch, dr_row, dy_batch, dy_row, dy2_batch, dy2_row, r_batch, r_row, a_batch, a_row, rows_batch,
                   N, D, segment, run, segment_runs, sample_runs, eps, post_eps, offset, FLAGS: tl.constexpr,
                   DIRECT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Gradients of norm and modulation (with `dy`) and of the gated residual (with `a`) over one run of tokens."""
    PLUS_ONE: tl.constexpr = (FLAGS & 8) != 0
    KIND: tl.constexpr = FLAGS & 3
    ACT: tl.constexpr = (FLAGS >> 4) & 3
    POST: tl.constexpr = 2 - ((FLAGS >> 6) & 3)  # as KIND; 2 is no norm
    pid = tl.program_id(0)
    b = (pid // sample_runs).to(tl.int64)
    chunk = pid % sample_runs
    part = chunk % segment_runs
    first = (chunk // segment_runs) * segment + part * run
    count = tl.minimum(run, segment - part * run)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    zero = tl.zeros([BLOCK], tl.float32)
    sum_gate = zero
    sum_scale = zero
    sum_shift = zero
    sum_scale2 = zero
    sum_shift2 = zero
    sum_weight = zero
    sum_bias = zero
    sum_post = zero
    for i in range(count):
        n = first + i
        wide = n.to(tl.int64)
        token = (b * N + wide) * D
        index = n
        if rows is not None:
            index = tl.load(rows + b * rows_batch + n)
        d = zero
        if dy is not None:
            unit, rstd = standardize(load(r + b * r_batch + wide * r_row, cols, mask), mask, D, eps, KIND)
            h = unit
            if (dscale is not None) or (dscale2 is not None):
                if weight is not None:
                    h *= load_weight(weight, cols, mask, PLUS_ONE, False)
                if bias is not None:
                    h += load(bias, cols, mask)
            g = load(dy + b * dy_batch + wide * dy_row, cols, mask)
            sum_shift = collect(sum_shift, g, dshift, token, cols, mask, (DIRECT & 4) != 0)
            sum_scale = collect(sum_scale, g * h, dscale, token, cols, mask, (DIRECT & 2) != 0)
            dn = demodulate(g, scale, scale_table, b, index, cols, mask, offset)
            if dy2 is not None:
                g2 = load(dy2 + b * dy2_batch + wide * dy2_row, cols, mask)
                sum_shift2 = collect(sum_shift2, g2, dshift2, token, cols, mask, (DIRECT & 16) != 0)
                sum_scale2 = collect(sum_scale2, g2 * h, dscale2, token, cols, mask, (DIRECT & 8) != 0)
                dn += demodulate(g2, scale2, None, b, index, cols, mask, offset)
            sum_bias = collect(sum_bias, dn, dbias, token, cols, mask, False)
            sum_weight = collect(sum_weight, dn * unit, dweight, token, cols, mask, False)
            if weight is not None:
                dn *= load_weight(weight, cols, mask, PLUS_ONE, False)
            d = standardize_backward(dn, unit, rstd, mask, D, KIND)
        if dr is not None:  # late, so that the norm has its registers
            d += load(dr + b * dr_batch + wide * dr_row, cols, mask)
        if dx is not None:
            tl.store(dx + token + cols, d.to(dx.dtype.element_ty), mask=mask)
        if a is not None:
            if (gate is not None) or (gate_table is not None):  # early: tanh wants registers
                t, slope = gate_act(load_modulation(gate, gate_table, b, index, cols, mask, False), ACT)
            unit_a, rstd_a = standardize(load(a + b * a_batch + wide * a_row, cols, mask), mask, D, post_eps, POST)
            p = unit_a
            if post_weight is not None:
                w = load_weight(post_weight, cols, mask, PLUS_ONE, False)
                p *= w
            if (gate is not None) or (gate_table is not None):
                sum_gate = collect(sum_gate, d * p * slope, dgate, token, cols, mask, (DIRECT & 1) != 0)
                d *= t
            sum_post = collect(sum_post, d * unit_a, dpost, token, cols, mask, False)
            if da is not None:
                if post_weight is not None:
                    d *= w
                d = standardize_backward(d, unit_a, rstd_a, mask, D, POST)
                tl.store(da + token + cols, d.to(da.dtype.element_ty), mask=mask)
    partial = pid.to(tl.int64) * D
    finish(sum_gate, dgate, partial, cols, mask, (DIRECT & 1) != 0)
    finish(sum_scale, dscale, partial, cols, mask, (DIRECT & 2) != 0)
    finish(sum_shift, dshift, partial, cols, mask, (DIRECT & 4) != 0)
    finish(sum_scale2, dscale2, partial, cols, mask, (DIRECT & 8) != 0)
    finish(sum_shift2, dshift2, partial, cols, mask, (DIRECT & 16) != 0)
    finish(sum_weight, dweight, partial, cols, mask, False)
    finish(sum_bias, dbias, partial, cols, mask, False)
    finish(sum_post, dpost, partial, cols, mask, False)
