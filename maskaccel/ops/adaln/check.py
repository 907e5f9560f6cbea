"""Checks and normalisation of the adaLN arguments: the slow path behind every fast call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _call, _checks
from .schema import ACTIVATIONS, GATE_ACTS, LAWS, NORMS

Named = Mapping[str, Tensor | None]


def _eps(name: str, value: object) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r} must be a finite number, 0 or above")


def norm_arguments(x: object, norm: str, law: str, weight_offset: float, weight: Tensor | None, bias: Tensor | None,
                   eps: float, offset: float) -> None:  # fmt: skip
    """Check `x` and the arguments of a norm."""
    x = _checks.activation("x", x)
    _checks.choice("norm", norm, NORMS)
    _checks.choice("law", law, LAWS)
    _checks.choice("weight_offset", weight_offset, (0.0, 1.0))
    _checks.vector("weight", weight, x.shape[-1], x)
    _checks.vector("bias", bias, x.shape[-1], x)
    _eps("eps", eps)
    if not isinstance(offset, int | float) or not math.isfinite(offset):
        raise ValueError(f"offset={offset!r} must be a finite number (1 for `1 + scale`, 0 for `scale`)")


def gate_arguments(x: Tensor, a: object, gate_act: str, post_norm: str | None, post_weight: Tensor | None,
                   post_eps: float | None) -> None:  # fmt: skip
    """Check the arguments of a gated residual."""
    _checks.like("a", a, "x", x)
    _checks.choice("gate_act", gate_act, GATE_ACTS)
    _checks.choice("post_norm", post_norm, (None, "none", "rms", "layer"))
    _checks.vector("post_weight", post_weight, x.shape[-1], x)
    if post_weight is not None and post_norm in (None, "none"):
        raise ValueError("post_weight is given but post_norm is None; name the norm, 'rms' or 'layer'")
    if post_eps is not None:
        _eps("post_eps", post_eps)


def modulations(x: Tensor, mods: Named, tables: Named, rows: Tensor | None) -> None:
    """Check scale, shift, gate and their tables against x, and the row index against the modulation."""
    for name, value in mods.items():
        _checks.modulation(name, value, x, rows)
    for name, value in tables.items():
        _checks.vector(name, value, x.shape[-1], x)
    if rows is not None:
        counts = {name: value.shape[0] for name, value in mods.items() if value is not None}
        if not counts:
            raise ValueError("rows is given without a modulation tensor to index; pass scale, shift or gate of (R, D)")
        _checks.indices("rows", rows, x.shape[0], x.shape[1], min(counts.values()), x)


def kernel_operands(x: Tensor, mods: Named, tables: Named, weight: Tensor | None, bias: Tensor | None,
                    rows: Tensor | None, *, a: Tensor | None = None,
                    post_weight: Tensor | None = None) -> dict:  # fmt: skip
    """All operands as the raw ops take them: one modulation dtype, dense last dims."""
    modulation = _checks.one_dtype(x, *mods.values(), *tables.values())
    affine = _checks.one_dtype(x, weight, bias, post_weight)
    out = dict(zip((*mods, *tables), modulation, strict=True))
    out.update(zip(("weight", "bias", "post_weight"), (_dense(t) for t in affine), strict=True))
    for name in tables:
        out[name] = _dense(out[name])
    out.update(x=_checks.dense_last(x), a=_checks.dense_last(a), rows=_dense(rows))
    return out


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def run(name: str, x: Tensor, args: tuple, backend: str | None, reference: Callable[[], Any],
        fault: Exception | None) -> Any:  # fmt: skip
    """The checked call. A fault of the fast path that repeats here was no argument's fault: it is raised as it is."""
    try:
        return _call.checked(name, x, args, backend, reference)
    except RuntimeError as error:
        raise error from fault


def qk_arguments(q: object, k: object, norm: str, law: str, weight_offset: float, rope: str, across_heads: bool,
                 eps: float) -> None:  # fmt: skip
    """Check the two projections and the options of `qk_norm_rope`."""
    q = _checks.activation("q", q, "B, S, H, Dh")
    k = _checks.activation("k", k, "B, S, H, Dh")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k has shape {tuple(k.shape)}; q is {tuple(q.shape)}: batch and head dim must be equal")
    if k.dtype != q.dtype:
        raise TypeError(f"k has dtype {k.dtype}; it must be that of q, {q.dtype}")
    _checks.same_device("k", k, "q", q)
    _checks.choice("norm", norm, NORMS)
    _checks.choice("law", law, LAWS)
    _checks.choice("weight_offset", weight_offset, (0.0, 1.0))
    _checks.choice("rope", rope, ("interleaved", "half"))
    _checks.choice("across_heads", across_heads, (False, True))
    _eps("eps", eps)


def qk_operands(q: Tensor, k: Tensor, vectors: tuple[Tensor | None, ...], cos: Tensor | None, sin: Tensor | None,
                positions: Tensor | None, across_heads: bool) -> None:  # fmt: skip
    """Check weights, biases, tables and positions of `qk_norm_rope`."""
    batch, s, heads, dim = q.shape
    for name, value in zip(("q_weight", "k_weight", "q_bias", "k_bias"), vectors, strict=True):
        count = (q if name[0] == "q" else k).shape[2]
        _checks.vector(name, value, count * dim if across_heads else dim, q)
    if (cos is None) != (sin is None):
        missing = "sin" if sin is None else "cos"
        raise ValueError(f"{missing} is missing; pass both cos and sin, or neither")
    if cos is None or sin is None:
        if positions is not None:
            raise ValueError("positions is given without cos and sin")
        return
    _checks.floating("cos", cos)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("cos and sin get no gradient; pass them detached")
    _checks.like("sin", sin, "cos", cos)
    _checks.same_device("cos", cos, "q", q)
    if dim % 2:
        raise ValueError(f"q has head dim {dim}; RoPE needs an even one")
    if k.shape[1] != s:
        raise ValueError(f"k has {k.shape[1]} tokens, q has {s}; with cos and sin they must be equal")
    if cos.dim() not in (2, 3, 4) or cos.shape[-1] not in (dim, dim // 2):
        raise ValueError(
            f"cos has shape {tuple(cos.shape)}; it must be (S, T), (B, S, T) or (B, S, H, T) with T={dim} or {dim // 2}"
        )
    length = cos.shape[0] if cos.dim() == 2 else cos.shape[1]
    if positions is None and length != s:
        shape = tuple(cos.shape)
        raise ValueError(f"cos has {length} rows (shape {shape}); q has {s} tokens: give positions, or {s} rows")
    if cos.dim() > 2 and cos.shape[0] not in (1, batch):
        raise ValueError(f"cos has batch {cos.shape[0]}; allowed are 1 and {batch}")
    if cos.dim() == 4 and cos.shape[2] != 1 and (cos.shape[2] != heads or k.shape[2] != heads):
        have = f"cos has {cos.shape[2]} heads; q has {heads} and k {k.shape[2]}"
        raise ValueError(f"{have}: per-head tables need all equal")
    _checks.indices("positions", positions, batch, s, length, q)


def qk_kernel_operands(q: Tensor, k: Tensor, vectors: tuple[Tensor | None, ...], cos: Tensor | None,
                       sin: Tensor | None, positions: Tensor | None) -> tuple:  # fmt: skip
    """Operands of `qk_norm_rope` as the raw op takes them."""
    dense = (_dense(t) for t in _checks.one_dtype(q, *vectors))
    if cos is not None and sin is not None and cos.dtype not in (q.dtype, torch.float32):
        cos, sin = cos.float(), sin.float()
    return (_checks.dense_last(q), _checks.dense_last(k), *dense, cos, sin, _dense(positions))


def activation_arguments(x: object, kind: str) -> None:
    """Check `gated_activation`."""
    x = _checks.floating("x", x)
    _checks.choice("kind", kind, ACTIVATIONS)
    if x.dim() == 0 or x.shape[-1] == 0 or (kind != "gelu_tanh" and x.shape[-1] % 2):
        need = "positive" if kind == "gelu_tanh" else "even and positive"
        raise ValueError(f"x has shape {tuple(x.shape)}; for {kind!r} its last dim must be {need}")
