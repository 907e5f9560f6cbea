"""Ops that measure features: how far they moved."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .. import _call, _checks
from . import _check
from . import reference as plain


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
    if backend is None and not _call.tracing():
        try:
            args = (x, reference) if base is None else (x, reference, base)
            return _call.fast("relative_difference", x, args)
        except _call.FAULTS:
            pass  # the checks below say what is wrong, or make the operands dense
    x = _checks.floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be (B, ...) of two dims or more, got shape {tuple(x.shape)}")
    _checks.like("reference", reference, "x", x)
    if base is not None:
        _checks.like("base", base, "x", x)
    _checks.no_gradient("relative_difference", x=x, reference=reference, base=base)
    dense = [None if t is None else t.contiguous() for t in (x, reference, base)]
    return _call.checked(
        "relative_difference", x, tuple(dense), backend, partial(plain.relative_difference, x, reference, base)
    )


def gram(history: Tensor, *, per_sample: bool = False, backend: str | None = None) -> Tensor:
    """All inner products `<history[i], history[j]>` in one read of the history, fp64.

    The only reduction over features that a DMD forecast needs: dynamic mode decomposition by the method of snapshots
    (Sirovich 1987) takes its weights from this matrix. A rank cut at 1e-4 of the singular values is one at 1e-8 here,
    hence the fp64. Distances between steps, for schedules chosen by dynamic programming, follow from it too:
    `|H_i - H_j|^2 = G[i, i] + G[j, j] - 2 G[i, j]`.

    Args:
        history: `(K, B, N, D)` raw features of K steps, K at most 16; fp32, bf16 or fp16. Any stride of K and B.
        per_sample: One matrix for each sample instead of one over all.
        backend: As in `maskaccel.ops.norm_modulate`.

    Returns:
        fp64 `(K, K)`, or `(B, K, K)` with `per_sample`; exactly symmetric, on the device of `history`.

    Raises:
        TypeError: `history` is no tensor, or of a dtype that is not allowed.
        ValueError: Its shape does not fit, it requires grad, or `backend` cannot run the call.
    """
    if backend is None and not _call.tracing():
        try:
            return _call.fast("gram", history, (history, per_sample))
        except _call.FAULTS:
            pass  # the checks below say what is wrong, or make the history dense
    history = _check.history(history)
    _checks.choice("per_sample", per_sample, (False, True))
    _checks.no_gradient("gram", history=history)
    args = (_check.dense_steps(history), bool(per_sample))
    return _call.checked("gram", history, args, backend, partial(plain.gram, history, per_sample))
