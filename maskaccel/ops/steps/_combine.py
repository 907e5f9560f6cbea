"""Ops that form a feature from remembered ones."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .. import _call, _checks
from . import _check
from . import reference as plain
from ._check import MAX_HISTORY

__all__ = ["MAX_HISTORY", "combine_history", "combine_sites"]


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
    if backend is None and not _call.tracing():
        try:
            return _call.fast("combine_history", history, (history, weights, x, gate))
        except _call.FAULTS:
            pass  # the checks below say what is wrong, or make the operands dense
    history = _check.history(history)
    steps, width = history.shape[0], history.shape[-1]
    _check.weights(weights, history, (steps,), (steps, width))
    _check.residual(x, history)
    _checks.modulation("gate", gate, history[0], None)
    _checks.no_gradient("combine_history", history=history, weights=weights, x=x, gate=gate)
    like = history[0] if x is None else x
    (gate_k,) = _checks.one_dtype(like, gate if gate is None or gate.dim() == 3 else gate[:, None])
    args = (_check.dense_steps(history), weights.float().contiguous(), None if x is None else x.contiguous(), gate_k)
    return _call.checked(
        "combine_history",
        _check.judged(history, x),
        args,
        backend,
        partial(plain.combine_history, history, weights, x, gate),
    )


def combine_sites(
    history: Tensor,
    weights: Tensor,
    *,
    x: Tensor | None = None,
    gates: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`x + sum_s gates[s] * sum_k weights[s, k] * history[s, k]`: the forecast of a whole stack in one launch.

    A step that computes nothing adds the forecast of every attention and MLP to the residual stream (FORA, TaylorSeer:
    a skipped step is this sum). Site by site the stream is read and written S times; here it is once.

    Args:
        history: `(S, K, B, N, D)` raw features of S sites at their last K computed steps, K at most 16; fp32, bf16 or
            fp16. Any stride of S, K and B.
        weights: fp32 (or fp64) `(K,)` for all sites, `(S, K)`, or `(S, K, D)` for one forecaster per channel, on the
            same device.
        x: `(B, N, D)` residual stream to add to, of any floating dtype; None returns the sum alone.
        gates: `(S, B, D)`, or `(S, B, F, D)` with F dividing N, gates of the current step; the batch may be 1.
        backend: As in `maskaccel.ops.norm_modulate`.

    Returns:
        `(B, N, D)` in the dtype of `x` (of `history` without `x`).

    Raises:
        TypeError: An argument is no tensor, or of a dtype that is not allowed.
        ValueError: Shapes do not fit, an input requires grad, or `backend` cannot run the call.
    """
    if backend is None and not _call.tracing():
        try:
            return _call.fast("combine_sites", history, (history, weights, x, gates))
        except _call.FAULTS:
            pass  # the checks below say what is wrong, or make the operands dense
    history = _check.history(history, "S, K, B, N, D")
    sites, steps, width = history.shape[0], history.shape[1], history.shape[-1]
    if sites == 0:
        raise ValueError(f"history holds S=0 sites: shape {tuple(history.shape)}; at least one is needed")
    _check.weights(weights, history, (steps,), (sites, steps), (sites, steps, width))
    _check.residual(x, history)
    _check.gates(gates, history)
    _checks.no_gradient("combine_sites", history=history, weights=weights, x=x, gates=gates)
    (gates_k,) = _checks.one_dtype(history[0, 0] if x is None else x, gates)
    args = (_check.dense_steps(history), weights.float().contiguous(), None if x is None else x.contiguous(), gates_k)
    return _call.checked(
        "combine_sites",
        _check.judged(history, x),
        args,
        backend,
        partial(plain.combine_sites, history, weights, x, gates),
    )
