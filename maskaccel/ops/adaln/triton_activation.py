"""Triton kernels of gated activations. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_lib import load, sigmoid


@triton.jit
def activation(g, KIND: tl.constexpr):
    """silu, exact gelu or tanh gelu by KIND (0, 1, 2), and its derivative."""
    if KIND == 0:
        s = sigmoid(g)
        value = g * s
        slope = s * (1.0 + g * sigmoid(-g))
    elif KIND == 1:
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        value = g * cdf
        slope = cdf + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    else:
        # 0.5 (1 + tanh(u)) is sigmoid(2u), without the cancellation for negative u
        u = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        s = sigmoid(u)
        value = g * s
        # sigmoid(-u) is 1 - s, with digits left where s is close to 1 and the factor g ** 3 is large
        slope = s + g * s * sigmoid(-u) * 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    return value, slope


@triton.jit
def activation_forward(x, y, x_row, M, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    KIND: tl.constexpr = FLAGS & 3
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < M
    x += row * x_row
    if KIND == 2:
        out, _ = activation(load(x, cols, mask), KIND)
    else:
        first = load(x, cols, mask)
        second = load(x + M, cols, mask)
        if (FLAGS & 4) != 0:
            act, _ = activation(first, KIND)
            out = act * second
        else:
            act, _ = activation(second, KIND)
            out = first * act
    tl.store(y + row * M + cols, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def activation_backward(dy, x, dx, dy_row, x_row, M, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    KIND: tl.constexpr = FLAGS & 3
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < M
    dtype = dx.dtype.element_ty
    x += row * x_row
    d = load(dy + row * dy_row, cols, mask)
    if KIND == 2:
        _, slope = activation(load(x, cols, mask), KIND)
        tl.store(dx + row * M + cols, (d * slope).to(dtype), mask=mask)
    else:
        first = load(x, cols, mask)
        second = load(x + M, cols, mask)
        dx += row * 2 * M
        if (FLAGS & 4) != 0:
            act, slope = activation(first, KIND)
            tl.store(dx + cols, (d * second * slope).to(dtype), mask=mask)
            tl.store(dx + M + cols, (d * act).to(dtype), mask=mask)
        else:
            act, slope = activation(second, KIND)
            tl.store(dx + cols, (d * act).to(dtype), mask=mask)
            tl.store(dx + M + cols, (d * first * slope).to(dtype), mask=mask)
