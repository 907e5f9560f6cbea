"""Fakes and derivatives of the fused adaLN ops, and their definition in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import dense_last
from .._registry import OpSpec, define, define_bare, op
from .flags import unpacked
from .schema import (
    BARE,
    NEED_A,
    NEED_BIAS,
    NEED_GATE,
    NEED_POST,
    NEED_SCALE,
    NEED_SCALE2,
    NEED_SHIFT,
    NEED_SHIFT2,
    NEED_WEIGHT,
    NEED_X,
    NO_RESIDUAL,
    SCHEMAS,
)  # fmt: skip


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _bits(*pairs: tuple[int, bool]) -> int:
    return sum(bit for bit, wanted in pairs if wanted)


# ---------------------------------------------------------------------------------------------------- fakes
def _modulation_grad(needs: int, bit: int, x: Tensor, value: Tensor | None, table: Tensor | None, rows: Tensor | None):
    if not needs & bit or (value is None and table is None):
        shape: tuple = (0,)
    elif value is None:
        shape = (1, 1, x.shape[-1])
    elif rows is not None:
        shape = tuple(x.shape)
    else:
        shape = tuple(value.shape) if value.dim() == 3 else (value.shape[0], 1, value.shape[1])
    return x.new_empty(shape, dtype=torch.float32)


def _vector_grad(needs: int, bit: int, x: Tensor, vector: Tensor | None) -> Tensor:
    return x.new_empty(vector.shape if needs & bit and vector is not None else (0,), dtype=torch.float32)


def _fake_norm_modulate(x, scale, shift, weight, bias, scale_table, shift_table, rows, eps, offset, flags):
    return _like(x)


def _fake_norm_modulate_pair(x, *_):
    return _like(x), _like(x)


def _fake_norm_modulate_backward(dy, dy2, x, scale, shift, scale2, shift2, weight, bias, scale_table, shift_table, rows,
                                 eps, offset, flags, needs):  # fmt: skip
    return (
        _like(x) if needs & NEED_X else x.new_empty(0),
        _modulation_grad(needs, NEED_SCALE, x, scale, scale_table, rows),
        _modulation_grad(needs, NEED_SHIFT, x, shift, shift_table, rows),
        _modulation_grad(needs, NEED_SCALE2, x, scale2, None, rows),
        _modulation_grad(needs, NEED_SHIFT2, x, shift2, None, rows),
        _vector_grad(needs, NEED_WEIGHT, x, weight),
        _vector_grad(needs, NEED_BIAS, x, bias),
    )


def _fake_grnm(x, *args):
    return (x.new_empty(0) if args[-1] & NO_RESIDUAL else _like(x)), _like(x)


def _fake_grnm_pair(x, *args):
    return (*_fake_grnm(x, *args), _like(x))


def _fake_grnm_backward(dr, dy, dy2, r, a, gate, gate_table, post_weight, scale, shift, scale2, shift2, weight, bias,
                        scale_table, shift_table, rows, eps, post_eps, offset, flags, needs):  # fmt: skip
    dx, *rest = _fake_norm_modulate_backward(
        dy, dy2, r, scale, shift, scale2, shift2, weight, bias, scale_table, shift_table, rows, eps, offset, flags,
        needs,
    )  # fmt: skip
    da, dgate, dpost = _fake_gate_residual_backward(r, a, gate, gate_table, post_weight, rows, post_eps, flags, needs)
    return (dx, da, dgate, *rest, dpost)


def _fake_gate_residual(x, *_):
    return _like(x)


def _fake_gate_residual_backward(dr, a, gate, gate_table, post_weight, rows, post_eps, flags, needs):
    return (
        _like(a) if needs & NEED_A else a.new_empty(0),
        _modulation_grad(needs, NEED_GATE, a, gate, gate_table, rows),
        _vector_grad(needs, NEED_POST, a, post_weight),
    )


def _fake_qk_norm_rope(q, k, *_):
    return _like(q), _like(k)


def _fake_qk_norm_rope_backward(dq, dk, q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, positions, eps, flags,
                                needs):  # fmt: skip
    vectors = (q_weight, k_weight, q_bias, k_bias)
    return (
        _like(q) if needs & 1 else q.new_empty(0),
        _like(k) if needs & 2 else k.new_empty(0),
        *(_vector_grad(needs, 4 << i, q, v) for i, v in enumerate(vectors)),
    )


def _fake_gated_activation(x, flags):
    return x.new_empty(x.shape if flags & 3 == 2 else (*x.shape[:-1], x.shape[-1] // 2))


def _fake_gated_activation_backward(dy, x, flags):
    return _like(x)


# ---------------------------------------------------------------------------------------------- derivatives
def _to_operand(grad: Tensor, operand: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """A raw modulation gradient as the gradient of the operand the caller passed."""
    if operand is None or grad.numel() == 0:
        return None if operand is None else torch.zeros_like(operand)
    if rows is not None:
        per_row = grad.new_zeros(operand.shape)
        if rows.dim() == 1:
            grad = grad.sum(0)
        # accumulate=True sorts on CUDA and is sequential on CPU: deterministic on both
        grad = per_row.index_put_((rows.long().flatten(),), grad.reshape(-1, grad.shape[-1]), accumulate=True)
    return grad.reshape(operand.shape).to(operand.dtype)


def _to_table(grad: Tensor, table: Tensor | None) -> Tensor | None:
    if table is None:
        return None
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(table.dtype) if grad.numel() else torch.zeros_like(table)


def _vector(grad: Tensor, operand: Tensor | None, needed: bool) -> Tensor | None:
    return grad.to(operand.dtype) if operand is not None and needed else None


def _dense(grad: Tensor | None, like: Tensor) -> Tensor | None:
    """Incoming gradients may be missing, expanded or transposed; the kernels need a dense last dim."""
    if grad is None:
        return torch.zeros_like(like, memory_format=torch.contiguous_format)
    return dense_last(grad)


class _ModulationGrads:
    """Routes the raw gradients of scale and shift (value and table) to the inputs that want them."""

    def __init__(self, needs: tuple[bool, ...], scale: int, shift: int, scale_table: int, shift_table: int) -> None:
        self.needs, self.at = needs, (scale, shift, scale_table, shift_table)
        self.scale = needs[scale] or needs[scale_table]
        self.shift = needs[shift] or needs[shift_table]

    def route(self, ds: Tensor, db: Tensor, operands: tuple[Tensor | None, ...], rows: Tensor | None) -> tuple:
        scale, shift, scale_table, shift_table = operands
        n = [self.needs[i] for i in self.at]
        return (
            _to_operand(ds, scale, rows) if n[0] else None,
            _to_operand(db, shift, rows) if n[1] else None,
            _to_table(ds, scale_table) if n[2] else None,
            _to_table(db, shift_table) if n[3] else None,
        )


def _backward_norm_modulate(ns: str, plain: tuple, needs: tuple, saved: tuple, grads: tuple) -> tuple:
    # inputs: x scale shift [scale2 shift2] weight bias scale_table shift_table rows eps offset flags
    pair = len(grads) == 2
    x, scale, shift, *second, weight, bias, scale_table, shift_table, rows = saved
    scale2, shift2 = second if pair else (None, None)
    k = 5 if pair else 3  # index of weight
    mod = _ModulationGrads(needs, 1, 2, k + 2, k + 3)
    need_scale2, need_shift2 = (needs[3], needs[4]) if pair else (False, False)
    bits = _bits(
        (NEED_X, needs[0]), (NEED_SCALE, mod.scale), (NEED_SHIFT, mod.shift), (NEED_SCALE2, need_scale2),
        (NEED_SHIFT2, need_shift2), (NEED_WEIGHT, needs[k]), (NEED_BIAS, needs[k + 1]),
    )  # fmt: skip
    dx, ds, db, ds2, db2, dw, dbias = op(ns, "norm_modulate_backward")(
        _dense(grads[0], x), _dense(grads[1], x) if pair else None, x, scale, shift, scale2, shift2, weight, bias,
        scale_table, shift_table, rows, *plain[-3:], bits,
    )  # fmt: skip
    gscale, gshift, gst, gbt = mod.route(ds, db, (scale, shift, scale_table, shift_table), rows)
    out: list[Any] = [dx if needs[0] else None, gscale, gshift]
    if pair:
        out += [_to_operand(ds2, scale2, rows) if need_scale2 else None]
        out += [_to_operand(db2, shift2, rows) if need_shift2 else None]
    out += [_vector(dw, weight, needs[k]), _vector(dbias, bias, needs[k + 1]), gst, gbt]
    return (*out, None, None, None, None)


def _backward_grnm(ns: str, plain: tuple, needs: tuple, saved: tuple, grads: tuple) -> tuple:
    # inputs: x a gate gate_table post_weight scale shift [scale2 shift2] weight bias scale_table shift_table rows
    #         eps post_eps offset flags
    pair = len(grads) == 3
    r, a, gate, gate_table, post_weight, scale, shift, *second, weight, bias, scale_table, shift_table, rows = saved
    scale2, shift2 = second if pair else (None, None)
    k = 9 if pair else 7  # index of weight
    mod = _ModulationGrads(needs, 5, 6, k + 2, k + 3)
    need_scale2, need_shift2 = (needs[7], needs[8]) if pair else (False, False)
    bits = _bits(
        (NEED_X, needs[0]), (NEED_A, needs[1]), (NEED_GATE, needs[2] or needs[3]), (NEED_POST, needs[4]),
        (NEED_SCALE, mod.scale), (NEED_SHIFT, mod.shift), (NEED_SCALE2, need_scale2), (NEED_SHIFT2, need_shift2),
        (NEED_WEIGHT, needs[k]), (NEED_BIAS, needs[k + 1]),
    )  # fmt: skip
    dr = None if grads[0] is None else _dense(grads[0], r)
    dx, da, dg, ds, db, ds2, db2, dw, dbias, dpost = op(ns, "gate_residual_norm_modulate_backward")(
        dr, _dense(grads[1], r), _dense(grads[2], r) if pair else None, r, a, gate, gate_table, post_weight, scale,
        shift, scale2, shift2, weight, bias, scale_table, shift_table, rows, *plain[-4:], bits,
    )  # fmt: skip
    gscale, gshift, gst, gbt = mod.route(ds, db, (scale, shift, scale_table, shift_table), rows)
    out: list[Any] = [
        dx if needs[0] else None,
        da if needs[1] else None,
        _to_operand(dg, gate, rows) if needs[2] else None,
        _to_table(dg, gate_table) if needs[3] else None,
        _vector(dpost, post_weight, needs[4]),
        gscale,
        gshift,
    ]
    if pair:
        out += [_to_operand(ds2, scale2, rows) if need_scale2 else None]
        out += [_to_operand(db2, shift2, rows) if need_shift2 else None]
    out += [_vector(dw, weight, needs[k]), _vector(dbias, bias, needs[k + 1]), gst, gbt]
    return (*out, None, None, None, None, None)


def _save_grnm(inputs: tuple, output: tuple) -> tuple:
    if inputs[-1] & NO_RESIDUAL:
        raise RuntimeError("the NO_RESIDUAL flag is for inference: the derivative needs the residual")
    return (output[0], *inputs[1:-4])


def _backward_gate_residual(ns: str, plain: tuple, needs: tuple, saved: tuple, grads: tuple) -> tuple:
    # inputs: x a gate gate_table post_weight rows post_eps flags
    a, gate, gate_table, post_weight, rows = saved
    dr = _dense(grads[0], a)
    bits = _bits((NEED_A, needs[1]), (NEED_GATE, needs[2] or needs[3]), (NEED_POST, needs[4]))
    da, dg, dpost = op(ns, "gate_residual_backward")(dr, a, gate, gate_table, post_weight, rows, *plain[-2:], bits)
    return (
        dr if needs[0] else None,
        da if needs[1] else None,
        _to_operand(dg, gate, rows) if needs[2] else None,
        _to_table(dg, gate_table) if needs[3] else None,
        _vector(dpost, post_weight, needs[4]),
        None, None, None,
    )  # fmt: skip


def _backward_qk_norm_rope(ns: str, plain: tuple, needs: tuple, saved: tuple, grads: tuple) -> tuple:
    # inputs: q k q_weight k_weight q_bias k_bias cos sin positions eps flags
    q, k = saved[:2]
    bits = _bits(*((1 << i, needs[i]) for i in range(6)))
    raw = op(ns, "qk_norm_rope_backward")(_dense(grads[0], q), _dense(grads[1], k), *saved, *plain[-2:], bits)
    vectors = tuple(_vector(g, v, n) for g, v, n in zip(raw[2:], saved[2:6], needs[2:6], strict=True))
    return (raw[0] if needs[0] else None, raw[1] if needs[1] else None, *vectors, None, None, None, None, None)


def _save_qk_norm_rope(inputs: tuple, output: Any) -> tuple:
    if any(t is not None and t.requires_grad for t in inputs[6:8]):
        raise RuntimeError("qk_norm_rope gives no gradient to cos and sin: pass them detached")
    return inputs[:9]


def _backward_gated_activation(ns: str, plain: tuple, needs: tuple, saved: tuple, grads: tuple) -> tuple:
    # contiguous: the leading dims of an incoming gradient need not have one common stride
    return op(ns, "gated_activation_backward")(grads[0].contiguous(), saved[0], plain[-1]), None


def _tensors(count: int):
    return lambda inputs, output: inputs[:count]


_DERIVED: dict[str, tuple[Callable, Callable | None, Callable | None]] = {
    "norm_modulate": (_fake_norm_modulate, _tensors(8), _backward_norm_modulate),
    "norm_modulate_pair": (_fake_norm_modulate_pair, _tensors(10), _backward_norm_modulate),
    "gate_residual_norm_modulate": (_fake_grnm, _save_grnm, _backward_grnm),
    "gate_residual_norm_modulate_pair": (_fake_grnm_pair, _save_grnm, _backward_grnm),
    "gate_residual": (_fake_gate_residual, lambda inputs, output: inputs[1:6], _backward_gate_residual),
    "qk_norm_rope": (_fake_qk_norm_rope, _save_qk_norm_rope, _backward_qk_norm_rope),
    "gated_activation": (_fake_gated_activation, _tensors(1), _backward_gated_activation),
    "norm_modulate_backward": (_fake_norm_modulate_backward, None, None),
    "gate_residual_norm_modulate_backward": (_fake_grnm_backward, None, None),
    "gate_residual_backward": (_fake_gate_residual_backward, None, None),
    "qk_norm_rope_backward": (_fake_qk_norm_rope_backward, None, None),
    "gated_activation_backward": (_fake_gated_activation_backward, None, None),
}


_BARE_FAKES: dict[str, Callable] = {
    "norm_modulate_bare": lambda x, *_: _like(x),
    "norm_modulate_pair_bare": _fake_norm_modulate_pair,
    "gate_residual_norm_modulate_bare": _fake_grnm,
    "gate_residual_norm_modulate_pair_bare": _fake_grnm_pair,
    "gate_residual_bare": _fake_gate_residual,
    "qk_norm_rope_bare": _fake_qk_norm_rope,
}


def register() -> None:
    """Define all adaLN ops; called once by `maskaccel.ops`."""
    for name, (fake, save, backward) in _DERIVED.items():
        define(OpSpec(name, SCHEMAS[name], fake, save, backward))
    for name, bare_fake in _BARE_FAKES.items():
        define_bare(name, BARE[name], bare_fake, unpacked)
