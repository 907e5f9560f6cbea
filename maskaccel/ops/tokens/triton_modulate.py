"""Triton kernel of kept rows and their modulated norm. Importing this needs triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_lib import load
from ..adaln.triton_norm import affine, modulate, standardize


@triton.jit
def gather_norm(x, ids, rows, y, scale, shift, weight, bias, x_batch, x_row, ids_batch, N, M, D, eps, offset,
                FLAGS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One row x[ids[m]], stored if `rows` is given, and its norm and modulation from registers; zeros for no row.

    `scale` and `shift` are operands as in `maskaccel.ops.adaln.triton_norm`, read at the token's own row.
    """
    NARROW: tl.constexpr = (FLAGS & 4) != 0
    KIND: tl.constexpr = FLAGS & 3
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0)
    b = (row // M).to(tl.int64)
    m = row % M
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    token = tl.load(ids + b * ids_batch + m)
    held = mask & (token + 0 * cols >= 0) & (token + 0 * cols < N)
    v = load(x + b * x_batch + token.to(tl.int64) * x_row, cols, held)
    at = row.to(tl.int64) * D + cols
    if rows is not None:
        tl.store(rows + at, v.to(DTYPE), mask=mask)
    h, _ = standardize(v, mask, D, eps, KIND)
    h = affine(h, weight, bias, cols, mask, DTYPE, KIND, (FLAGS & 8) != 0, NARROW)
    h = modulate(h, scale, shift, None, None, b, token, cols, held, offset, NARROW)
    tl.store(y + at, tl.where(held, h, 0.0).to(DTYPE), mask=mask)
