"""Cached-feature ops: how far features moved, and the forecast from a history of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _call, _checks
from .._registry import OpSpec, define
from . import reference as plain
from .schema import SCHEMAS

MAX_HISTORY = 16
_FAULTS = (RuntimeError, LookupError, AttributeError, TypeError)


def relative_difference(
    x: Tensor, reference: Tensor, *, base: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Sums for the relative L1 change of a feature, in one pass and without a synchronisation.

    The ratio of the two columns is the indicator of First-Block Cache (residual against the last computed one) and of
    TeaCache (Liu et al. 2024, eq. 5: modulated input against the previous step).

    Args:
        x: `(B, ...)`, fp32, bf16 or fp16.
        reference: As `x`, the remembered feature.
        base: As `x`; the feature is then `x - base` (a residual formed on the fly).
        backend: As in `maskaccel.ops.norm_modulate`.

    Returns:
        fp32 `(B, 2)`: sum |feature - reference| and sum |reference| of each sample, on x's device.

    Raises:
        TypeError: An argument is no tensor, or of another dtype than `x`.
        ValueError: Shapes differ, an input requires grad, or `backend` cannot run the call.
    """
    if backend is None and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        try:
            if x.dim() > 1:
                return _call.fast("relative_difference", x, (x, reference, base))
        except _FAULTS:
            pass  # the checks below say what is wrong, or make the operands dense
    x = _checks.floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be (B, ...) of two dims or more, got shape {tuple(x.shape)}")
    _checks.like("reference", reference, "x", x)
    if base is not None:
        _checks.like("base", base, "x", x)
    _no_grad("relative_difference", x=x, reference=reference, base=base)
    dense = [None if t is None else t.contiguous() for t in (x, reference, base)]
    return _call.checked(
        "relative_difference", x, tuple(dense), backend, lambda: plain.relative_difference(x, reference, base)
    )


def combine_history(
    history: Tensor,
    weights: Tensor,
    *,
    x: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`x + gate * sum_k weights[k] * history[k]`: every forecaster of cached features is this sum.

    Args:
        history: `(K, B, N, D)` raw features of the last K computed steps, K at most 16; fp32, bf16 or fp16.
        weights: fp32 (or fp64) `(K,)`, or `(K, D)` for one forecaster per channel (HyCa), on the same device.
        x: `(B, N, D)` residual stream to add to, of any floating dtype; None returns the forecast alone.
        gate: `(B, D)`, `(B, 1, D)`, `(B, F, D)` or `(B, N, D)` gate of the current step; the batch may be 1.
        backend: As in `maskaccel.ops.norm_modulate`.

    Returns:
        `(B, N, D)` in the dtype of `x` (of `history` without `x`).

    Raises:
        TypeError: An argument is no tensor, or of a dtype that is not allowed.
        ValueError: Shapes do not fit, an input requires grad, or `backend` cannot run the call.
    """
    if backend is None and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        try:
            return _call.fast("combine_history", history, (history, weights, x, gate))
        except _FAULTS:
            pass  # the checks below say what is wrong, or make the operands dense
    history = _checks.activation("history", history, "K, B, N, D")
    steps, width = history.shape[0], history.shape[-1]
    if not 1 <= steps <= MAX_HISTORY:
        raise ValueError(f"history holds K={steps} steps; allowed are 1 to {MAX_HISTORY}")
    if _checks.tensor("weights", weights).dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weights has dtype {weights.dtype}; it must be float32")
    if tuple(weights.shape) not in ((steps,), (steps, width)):
        raise ValueError(f"weights has shape {tuple(weights.shape)}; it must be ({steps},) or ({steps}, {width})")
    _checks.same_device("weights", weights, "history", history)
    if x is not None:
        _checks.same_device("x", _checks.floating("x", x), "history", history)
        if x.shape != history.shape[1:]:
            need = tuple(history.shape[1:])
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be {need}, as a step of history")
    _checks.modulation("gate", gate, history[0], None)
    _no_grad("combine_history", history=history, weights=weights, x=x, gate=gate)
    like = history[0] if x is None else x
    dense = history if history.stride(3) == 1 and history.stride(2) == width else history.contiguous()
    (gate_k,) = _checks.one_dtype(like, gate if gate is None or gate.dim() == 3 else gate[:, None])
    args = (dense, weights.float().contiguous(), None if x is None else x.contiguous(), gate_k)
    return _call.checked(
        "combine_history", history, args, backend, lambda: plain.combine_history(history, weights, x, gate)
    )


def _no_grad(op: str, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if torch.is_grad_enabled() and t is not None and t.requires_grad:
            raise ValueError(f"{op} has no derivative, but {name} requires grad; call it under torch.no_grad()")


def register() -> None:
    """Define the step ops; called once by `maskaccel.ops`."""

    def relative_difference_fake(x, reference, base):
        return x.new_empty((x.shape[0], 2), dtype=torch.float32)

    def combine_history_fake(history, weights, x, gate):
        return (history if x is None else x).new_empty(history.shape[1:])

    define(OpSpec("relative_difference", SCHEMAS["relative_difference"], relative_difference_fake))
    define(OpSpec("combine_history", SCHEMAS["combine_history"], combine_history_fake))
