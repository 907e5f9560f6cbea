"""Ops that form or measure a feature in the pass of the norm and modulation that stand beside it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import _call, _checks
from ..adaln import check
from ..adaln.flags import NORM_FLAGS
from . import _check
from . import reference as plain

__all__ = ["combine_history_norm_modulate", "norm_modulate_difference"]

_INF = float("inf")


def _flags(norm: str, law: str, weight_offset: float, eps: float, offset: float, rows: Tensor | None,
           scale: Tensor | None, shift: Tensor | None) -> int:  # fmt: skip
    """Flags of the kernel, or LookupError where the checks have something to say that no kernel does."""
    if not (0.0 <= eps < _INF and -_INF < offset < _INF) or (rows is not None and scale is None and shift is None):
        raise LookupError
    return NORM_FLAGS[norm, law, weight_offset]


def _operands(x: Tensor, scale: Tensor | None, shift: Tensor | None, norm: str, weight: Tensor | None,
              bias: Tensor | None, eps: float, offset: float, rows: Tensor | None, law: str, weight_offset: float,
              scale_table: Tensor | None, shift_table: Tensor | None) -> tuple[tuple, tuple, tuple]:  # fmt: skip
    """The norm's operands as they are and as kernels take them, and its numbers, after the checks of `norm_modulate`.

    `x` tells shape, dtype and device of what is normalised.
    """
    check.norm_arguments(x, norm, law, weight_offset, weight, bias, eps, offset)
    mods, tables = {"scale": scale, "shift": shift}, {"scale_table": scale_table, "shift_table": shift_table}
    check.modulations(x, mods, tables, rows)
    k = check.kernel_operands(x, mods, tables, weight, bias, rows)
    names = ("scale", "shift", "weight", "bias", "scale_table", "shift_table", "rows")
    given = (scale, shift, weight, bias, scale_table, shift_table, rows)
    numbers = (float(eps), float(offset), NORM_FLAGS[norm, law, float(weight_offset)])
    return given, tuple(k[name] for name in names), numbers


def combine_history_norm_modulate(
    history: Tensor,
    weights: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    x: Tensor | None = None,
    gate: Tensor | None = None,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 1.0,
    rows: Tensor | None = None,
    law: str = "fp32",
    weight_offset: float = 0.0,
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`h = x + gate * sum_k weights[k] * history[k]` and `y = norm(h) * (offset + scale) + shift` in one pass.

    `combine_history` followed by `norm_modulate`: a reused module whose successor is computed (TaylorSeer, FORA). The
    norm reads `h` as stored.

    Args:
        history: As in `combine_history`, like `weights`, `x` and `gate`.
        weights: See there.
        scale: As in `norm_modulate`, like all arguments not named here.
        shift: As `scale`.
        x: See `combine_history`.
        gate: See `combine_history`; `rows` is not for it.
        norm: As in `norm_modulate`.
        weight: As in `norm_modulate`.
        bias: As in `norm_modulate`.
        eps: As in `norm_modulate`.
        offset: As in `norm_modulate`.
        rows: As in `norm_modulate`.
        law: As in `norm_modulate`; `h` is rounded once under both.
        weight_offset: As in `norm_modulate`.
        scale_table: As in `norm_modulate`.
        shift_table: As in `norm_modulate`.
        backend: As in `norm_modulate`.

    Returns:
        `(h, y)`, both `(B, N, D)` in the dtype of `x` (of `history` without `x`).

    Raises:
        TypeError: An argument is no tensor, or of a dtype that is not allowed.
        ValueError: Shapes do not fit, an option is unknown, an input requires grad, or `backend` cannot run the call.
    """
    name = "combine_history_norm_modulate"
    if backend is None and not _call.tracing():
        try:
            flags = _flags(norm, law, weight_offset, eps, offset, rows, scale, shift)
            end = (weight, bias, scale_table, shift_table, rows, eps, offset, flags)
            return _call.fast(name, history, (history, weights, x, gate, scale, shift, *end))
        except _call.FAULTS:
            pass  # the checks below say what is wrong, or make the operands dense
    history = _check.history(history)
    steps, width = history.shape[0], history.shape[-1]
    _check.weights(weights, history, (steps,), (steps, width))
    _check.residual(x, history)
    _checks.modulation("gate", gate, history[0], None)
    like = history[0] if x is None else x
    given, operands, numbers = _operands(like, scale, shift, norm, weight, bias, eps, offset, rows, law, weight_offset,
                                         scale_table, shift_table)  # fmt: skip
    _checks.no_gradient(name, history=history, weights=weights, x=x, gate=gate, scale=scale, shift=shift, weight=weight,
                        bias=bias, scale_table=scale_table, shift_table=shift_table)  # fmt: skip
    (gate_k,) = _checks.one_dtype(like, gate if gate is None or gate.dim() == 3 else gate[:, None])
    dense = (_check.dense_steps(history), weights.float().contiguous(), None if x is None else x.contiguous(), gate_k)
    reference = partial(plain.combine_history_norm_modulate, history, weights, x, gate, *given, *numbers)
    judged = history if history.dtype == torch.float64 else like  # no kernel serves fp64, whichever has it
    return _call.checked(name, judged, (*dense, *operands, *numbers), backend, reference)


def norm_modulate_difference(
    x: Tensor,
    reference: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 1.0,
    rows: Tensor | None = None,
    law: str = "fp32",
    weight_offset: float = 0.0,
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`y = norm(x) * (offset + scale) + shift`, and how far `y` is from a remembered one, in one pass.

    `norm_modulate` followed by `relative_difference(y, reference)`, without reading `y` again and without a
    synchronisation: the indicator of TeaCache (Liu et al. 2024, eq. 5) beside the input of the attention.

    Args:
        x: `(B, N, D)`, fp32, bf16 or fp16.
        reference: As `x`: the `y` of an earlier step.
        scale: As in `norm_modulate`, like all arguments not named here.
        shift: As `scale`.
        norm: As in `norm_modulate`.
        weight: As in `norm_modulate`.
        bias: As in `norm_modulate`.
        eps: As in `norm_modulate`.
        offset: As in `norm_modulate`.
        rows: As in `norm_modulate`.
        law: As in `norm_modulate`.
        weight_offset: As in `norm_modulate`.
        scale_table: As in `norm_modulate`.
        shift_table: As in `norm_modulate`.
        backend: As in `norm_modulate`.

    Returns:
        `(y, sums)`: `y` of the shape and dtype of `x`; fp32 `(B, 2)`, sum |y - reference| and sum |reference| of each
        sample, with `y` as stored.

    Raises:
        TypeError: An argument is no tensor, or of a dtype that is not allowed.
        ValueError: Shapes do not fit, an option is unknown, an input requires grad, or `backend` cannot run the call.
    """
    name = "norm_modulate_difference"
    if backend is None and not _call.tracing():
        try:
            flags = _flags(norm, law, weight_offset, eps, offset, rows, scale, shift)
            end = (weight, bias, scale_table, shift_table, rows, eps, offset, flags)
            return _call.fast(name, x, (x, reference, scale, shift, *end))
        except _call.FAULTS:
            pass  # the checks below say what is wrong, or make the operands dense
    x = _checks.activation("x", x)
    _checks.like("reference", reference, "x", x)
    given, operands, numbers = _operands(x, scale, shift, norm, weight, bias, eps, offset, rows, law, weight_offset,
                                         scale_table, shift_table)  # fmt: skip
    _checks.no_gradient(name, x=x, reference=reference, scale=scale, shift=shift, weight=weight, bias=bias,
                        scale_table=scale_table, shift_table=shift_table)  # fmt: skip
    args = (_checks.dense_last(x), _checks.dense_last(reference), *operands, *numbers)
    plainly = partial(plain.norm_modulate_difference, x, reference, *given, *numbers)
    return _call.checked(name, x, args, backend, plainly)
