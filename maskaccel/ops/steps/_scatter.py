"""The forecast of a step at which a few rows were computed."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import _call, _checks
from . import _check
from . import reference as plain


def scatter_combine(
    history: Tensor,
    weights: Tensor,
    fresh: Tensor,
    index: Tensor,
    labels: Tensor | None = None,
    *,
    gamma: float = 0.0,
    x: Tensor | None = None,
    gate: Tensor | None = None,
    newest: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Write freshly computed rows into the newest remembered feature, then forecast: token-wise caching in one pass.

    The update of ToCa (Zou et al. 2024, arXiv 2410.05317) and ClusCa (Zheng et al. 2025, arXiv 2509.10312). With
    `H = history[newest]`:

    * rows `index` of H become `fresh`;
    * with `labels` and `gamma` > 0, every other row n becomes `gamma * mu[labels[n]] + (1 - gamma) * H[n]`, where mu is
      the mean of the fresh rows of that cluster; a cluster without fresh rows keeps its rows;
    * the result is `x + gate * sum_k weights[k] * history[k]`, with H as it is now.

    **`history` is written in place**: the next step forecasts from the updated rows, and copying the rest of H would
    cost more than the rest of this op. Pass a buffer of your own, as a ring of remembered features is: whoever holds a
    view of `history[newest]` sees the change. The result is a new tensor.

    Authors' ClusCa code blends rows of `index` too, which differs where a cluster has several fresh rows, and sums
    instead of averaging them; here a computed row is kept as computed.

    Args:
        history: `(K, B, N, D)` raw features of K computed steps, K at most 16; fp32, bf16 or fp16; dense in N and D,
            any stride of K and B, not expanded.
        weights: fp32 (or fp64) `(K,)`, or `(K, D)`, on the same device.
        fresh: `(B, M, D)` rows computed at this step, of any floating dtype; stored in that of `history`.
        index: int32 or int64 `(B, M)` (or `(1, M)`) token of each fresh row, 0 to N - 1. Where one occurs twice, the
            last row is stored. Values are checked on a CPU only; elsewhere rows of other tokens are left out.
        labels: int32 or int64 `(B, N)` (or `(1, N)`) cluster of each token, any numbers; needed for `gamma` > 0.
        gamma: Share of the cluster mean in the rows that were not computed, 0 to 1.
        x: `(B, N, D)` residual stream to add to, of any floating dtype; None returns the forecast alone.
        gate: Gate of the current step, as in `combine_history`.
        newest: Which of the K entries is the newest.
        backend: As in `maskaccel.ops.norm_modulate`.

    Returns:
        `(B, N, D)` in the dtype of `x` (of `history` without `x`).

    Raises:
        TypeError: An argument is no tensor or number, or of a dtype that is not allowed.
        ValueError: Shapes or values do not fit, an input requires grad, memory of `history[newest]` is shared with
            another argument, or `backend` cannot run the call. Nothing was written then.
    """
    if backend is None and not _call.tracing():
        try:
            at, of = _narrow(index, history.shape[2]), None if labels is None else _narrow(labels)
            args = (history, weights, fresh, at, of, x, gate, newest, gamma)
            return _written(history, _call.fast("scatter_combine", history, args))
        except _call.FAULTS:
            pass  # the checks below say what is wrong, or make the operands dense
    history = _check.history(history)
    steps, batch, n, width = history.shape
    newest = _check.writable_history(history, newest)
    _check.weights(weights, history, (steps,), (steps, width))
    index = _check.per_row("index", index, batch, None, history)
    _rows(fresh, index, history)
    if labels is not None:
        labels = _check.per_row("labels", labels, batch, n, history)
    gamma = _share(gamma, labels)
    _check.residual(x, history)
    _checks.modulation("gate", gate, history[0], None)
    _checks.no_gradient("scatter_combine", history=history, weights=weights, fresh=fresh, x=x, gate=gate)
    for name, t in (("fresh", fresh), ("x", x), ("gate", gate)):
        _check.apart(name, t, history[newest])
    like = history[0] if x is None else x
    (gate_k,) = _checks.one_dtype(like, gate if gate is None or gate.dim() == 3 else gate[:, None])
    args = (
        history,
        weights.float().contiguous(),
        fresh.to(history.dtype).contiguous(),
        _check.as_rows(_narrow(index, n), batch),
        None if labels is None or gamma == 0 else _check.as_rows(labels, batch),
        None if x is None else x.contiguous(),
        gate_k,
        newest,
        gamma,
    )
    whole = (history, weights, *args[2:5], x, gate, newest, gamma)
    out = _call.checked(
        "scatter_combine", _check.judged(history, x), args, backend, partial(plain.scatter_combine, *whole)
    )
    return _written(history, out)


def _narrow(t: Tensor, limit: int | None = None) -> Tensor:
    """int64, which top-k and sorting give, as int32; what is outside 0 to `limit` stays outside."""
    if t.dtype is not torch.int64:
        return t
    return (t if limit is None else t.clamp(-1, limit)).int()


def _written(history: Tensor, out: Tensor) -> Tensor:
    """Tell autograd, which may have saved `history`, that it changed."""
    if not _call.tracing() and not history.is_inference():
        torch.autograd.graph.increment_version(history)
    return out


def _rows(fresh: Tensor, index: Tensor, history: Tensor) -> None:
    _, batch, n, width = history.shape
    _checks.same_device("fresh", _checks.floating("fresh", fresh), "history", history)
    need = (batch, index.shape[1], width)
    if tuple(fresh.shape) != need:
        raise ValueError(f"fresh has shape {tuple(fresh.shape)}; it must be {need}, one row for each index")
    # On a GPU the check would wait for the device; there the values are the caller's promise.
    if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= n:
            raise ValueError(f"index holds values in [{low}, {high}]; allowed are 0 to {n - 1}")


def _share(gamma: object, labels: Tensor | None) -> float:
    if not isinstance(gamma, (int, float)):
        raise TypeError(f"gamma must be a number, got {type(gamma).__name__}")
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma={gamma}; allowed are 0 to 1")
    if gamma > 0 and labels is None:
        raise ValueError(f"gamma={gamma} needs labels: the cluster of each token")
    return float(gamma)
