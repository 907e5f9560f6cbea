"""The raw ops in plain torch: what `torch.ops.maskaccel` runs on a device that no kernel serves.

Forward ops decode the flags and call the reference; backward ops differentiate the reference with autograd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import reference
from .schema import ACROSS_HEADS, ACTIVATIONS, CLIP, GATE_FIRST, LAWS, NO_RESIDUAL, NORMS, ROPE_HALF, WEIGHT_PLUS_ONE


def _norm_options(flags: int) -> dict:
    return {
        "norm": list(NORMS)[flags & 3],
        "law": "narrow" if flags & LAWS["narrow"] else "fp32",
        "weight_offset": 1.0 if flags & WEIGHT_PLUS_ONE else 0.0,
    }


def _gate_options(flags: int) -> dict:
    return {
        "gate_act": ("none", "tanh", "clamp_tanh", "sigmoid_1m")[flags >> 4 & 3],
        "post_norm": (None, "rms", "layer")[flags >> 6 & 3],
        "clip": bool(flags & CLIP),
    }


def norm_modulate(x, scale, shift, weight, bias, scale_table, shift_table, rows, eps, offset, flags):
    return reference.norm_modulate(
        x, scale, shift, weight=weight, bias=bias, eps=eps, offset=offset, rows=rows, scale_table=scale_table,
        shift_table=shift_table, **_norm_options(flags),
    ).contiguous()  # fmt: skip


def norm_modulate_pair(x, scale, shift, scale2, shift2, *rest):
    return norm_modulate(x, scale, shift, *rest), _second(x, scale2, shift2, rest)


def _second(x, scale2, shift2, rest):
    weight, bias, _, _, *end = rest
    return norm_modulate(x, scale2, shift2, weight, bias, None, None, *end)


def gate_residual(x, a, gate, gate_table, post_weight, rows, post_eps, flags):
    options = _norm_options(flags)
    return reference.gate_residual(
        x, a, gate, gate_table=gate_table, post_weight=post_weight, rows=rows, post_eps=post_eps, law=options["law"],
        weight_offset=options["weight_offset"], **_gate_options(flags),
    ).contiguous()  # fmt: skip


def gate_residual_norm_modulate(x, a, gate, gate_table, post_weight, scale, shift, weight, bias, scale_table,
                                shift_table, rows, eps, post_eps, offset, flags):  # fmt: skip
    r = gate_residual(x, a, gate, gate_table, post_weight, rows, post_eps, flags)
    y = norm_modulate(r, scale, shift, weight, bias, scale_table, shift_table, rows, eps, offset, flags)
    return (r.new_empty(0) if flags & NO_RESIDUAL else r), y


def gate_residual_norm_modulate_pair(x, a, gate, gate_table, post_weight, scale, shift, scale2, shift2, weight, bias,
                                     scale_table, shift_table, rows, eps, post_eps, offset, flags):  # fmt: skip
    r = gate_residual(x, a, gate, gate_table, post_weight, rows, post_eps, flags)
    rest = (weight, bias, scale_table, shift_table, rows, eps, offset, flags)
    y, y2 = norm_modulate(r, scale, shift, *rest), _second(r, scale2, shift2, rest)
    return (r.new_empty(0) if flags & NO_RESIDUAL else r), y, y2


def qk_norm_rope(q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, positions, eps, flags):
    out = reference.qk_norm_rope(
        q, k, q_weight, k_weight, cos, sin, across_heads=bool(flags & ACROSS_HEADS),
        rope="half" if flags & ROPE_HALF else "interleaved", positions=positions, eps=eps, q_bias=q_bias, k_bias=k_bias,
        **_norm_options(flags),
    )  # fmt: skip
    return tuple(t.contiguous() for t in out)


def gated_activation(x, flags):
    return reference.gated_activation(x, list(ACTIVATIONS)[flags & 3], gate_first=bool(flags & GATE_FIRST)).contiguous()


def _row_form(value: Tensor | None, table: Tensor | None, x: Tensor, rows: Tensor | None) -> Tensor | None:
    """Modulation as the tensor whose gradient a raw backward op returns."""
    if value is None:
        return None if table is None else table.new_zeros(1, 1, table.shape[-1])
    if rows is not None:
        return reference.spread(value, x, rows).expand(x.shape)
    return value if value.dim() == 3 else value[:, None]


@contextlib.contextmanager
def _autograd_on() -> Iterator[None]:
    """Autograd inside a kernel: the dispatcher and modes (a FLOP counter, say) run it with autograd switched off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    autograd = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded - autograd):
        yield


def _differentiate(run: Callable[..., tuple], leaves: list[Tensor | None], wanted: list[bool],
                   grads: list[Tensor | None], activations: int) -> list[Tensor]:  # fmt: skip
    """Gradients of `run(*leaves)`; activations keep their dtype, everything else comes back in fp32."""
    x = leaves[0]
    assert x is not None
    with torch.enable_grad(), _autograd_on():
        fresh = [None if t is None else t.detach().requires_grad_() for t in leaves]
        outputs = run(*fresh)
        at = [i for i, t in enumerate(fresh) if t is not None and wanted[i]]
        kept = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        ends, cotangents = [o for o, _ in kept], [g for _, g in kept]
        begins = [t for t in (fresh[i] for i in at) if t is not None]
        found = torch.autograd.grad(ends, begins, cotangents, allow_unused=True)
    out = [x.new_empty(0, dtype=x.dtype if i < activations else torch.float32) for i in range(len(leaves))]
    for i, g in zip(at, found, strict=True):
        leaf = leaves[i]
        assert leaf is not None
        g = torch.zeros_like(leaf) if g is None else g
        out[i] = (g if i < activations else g.float()).contiguous()
    return out


def _bits(needs: int, count: int) -> list[bool]:
    return [bool(needs >> i & 1) for i in range(count)]


def norm_modulate_backward(dy, dy2, x, scale, shift, scale2, shift2, weight, bias, scale_table, shift_table, rows, eps,
                           offset, flags, needs):  # fmt: skip
    need = _bits(needs, 9)

    def run(x, scale, shift, scale2, shift2, weight, bias):
        rest = (weight, bias, scale_table, shift_table, None, eps, offset, flags)
        y = norm_modulate(x, scale, shift, *rest)
        return (y,) if dy2 is None else (y, _second(x, scale2, shift2, rest))

    leaves = [x, _row_form(scale, scale_table, x, rows), _row_form(shift, shift_table, x, rows),
              _row_form(scale2, None, x, rows), _row_form(shift2, None, x, rows), weight, bias]  # fmt: skip
    wanted = [need[0], need[3], need[4], need[5], need[6], need[7], need[8]]
    return tuple(_differentiate(run, leaves, wanted, [dy] if dy2 is None else [dy, dy2], 1))


def gate_residual_backward(dr, a, gate, gate_table, post_weight, rows, post_eps, flags, needs):
    need = _bits(needs, 10)

    def run(a, gate, post_weight):
        return (gate_residual(torch.zeros_like(a), a, gate, gate_table, post_weight, None, post_eps, flags & ~CLIP),)

    leaves = [a, _row_form(gate, gate_table, a, rows), post_weight]
    return tuple(_differentiate(run, leaves, [need[1], need[2], need[9]], [dr], 1))


def gate_residual_norm_modulate_backward(dr, dy, dy2, r, a, gate, gate_table, post_weight, scale, shift, scale2, shift2,
                                         weight, bias, scale_table, shift_table, rows, eps, post_eps, offset, flags,
                                         needs):  # fmt: skip
    dx, *mods = norm_modulate_backward(dy, dy2, r, scale, shift, scale2, shift2, weight, bias, scale_table, shift_table,
                                       rows, eps, offset, flags, needs | 1)  # fmt: skip
    if dr is not None:
        dx = dx + dr
    da, dgate, dpost = gate_residual_backward(dx, a, gate, gate_table, post_weight, rows, post_eps, flags, needs)
    return (dx, da, dgate, *mods, dpost)


def qk_norm_rope_backward(dq, dk, q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, positions, eps, flags, needs):
    def run(q, k, q_weight, k_weight, q_bias, k_bias):
        return qk_norm_rope(q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, positions, eps, flags)

    leaves = [q, k, q_weight, k_weight, q_bias, k_bias]
    return tuple(_differentiate(run, leaves, _bits(needs, 6), [dq, dk], 2))


def gated_activation_backward(dy, x, flags):
    return _differentiate(lambda x: (gated_activation(x, flags),), [x], [True], [dy], 1)[0]


KERNELS: dict[str, Callable] = {
    function.__name__: function
    for function in (
        norm_modulate, norm_modulate_pair, norm_modulate_backward, gate_residual, gate_residual_backward,
        gate_residual_norm_modulate, gate_residual_norm_modulate_pair, gate_residual_norm_modulate_backward,
        qk_norm_rope, qk_norm_rope_backward, gated_activation, gated_activation_backward,
    )
}  # fmt: skip
