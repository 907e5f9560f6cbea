"""Fused adaLN: norm, modulate, gate, residual, QK norm, RoPE and gated activations, each in one pass over memory.

One formula covers every diffusion transformer: `r = x + act(gate) * post_norm(a)`, `y = norm(r) * (offset + scale) +
shift` (DiT, Peebles and Xie 2023, section 3.2; PixArt-alpha, Chen et al. 2024, for tables; Lumina-Next for sandwich
norms).
"""

from __future__ import annotations

from functools import partial  # not closures: each argument that one captures costs every call 30 ns

from torch import Tensor

from .. import _call
from .._call import FAULTS, bare, fast, tracing
from . import check, reference
from .flags import ACTIVATION_FLAGS, GATE_FLAGS, NORM_FLAGS, ROPE_FLAGS, gate_numbers, norm_numbers, qk_numbers
from .schema import ACROSS_HEADS, ACTIVATIONS, CLIP, GATE_FIRST, NO_RESIDUAL, POST_NORMS, ROPE_HALF

_POSTS = POST_NORMS["rms"] | POST_NORMS["layer"]
_INF = float("inf")


def norm_modulate(
    x: Tensor,
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
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`norm(x) * (offset + scale) + shift` in one read of `x` and one write.

    Args:
        x: `(B, N, D)`, fp32, bf16 or fp16 (fp64 on the reference), any strides with a dense last dim.
        scale: `(B, D)`, `(B, 1, D)`, `(B, F, D)` with F dividing N (one row for N / F tokens), `(B, N, D)`, or `(R,
            D)` with `rows`. The batch may be 1. Chunks of a projection are read in place. Any of x's dtype or fp32.
        shift: As `scale`.
        norm: `"layer"`, `"rms"` or `"none"`.
        weight: `(D,)` affine weight of the norm.
        bias: `(D,)` affine bias of the norm.
        eps: Added to the variance (or mean square).
        offset: 1 for `1 + scale`, 0 for time-dependent norms.
        rows: int32 `(N,)` or `(B, N)`: row of `scale` and `shift` that each token reads.
        law: Where values are rounded: `"fp32"` once per stored tensor, `"narrow"` after every eager operation.
        weight_offset: 1 if the norm multiplies by `1 + weight`.
        scale_table: `(D,)` added to `scale` in registers (adaLN-single).
        shift_table: `(D,)` added to `shift`.
        scale2: Modulation of a second output from the same norm (SD3.5, LTX-2).
        shift2: As `scale2`.
        backend: `"cuda"`, `"cpu"`, `"triton"`, `"reference"`, or None for the best that can run.

    Returns:
        `y` of the shape and dtype of `x`; `(y, y2)` when `scale2` or `shift2` is given.

    Raises:
        TypeError: An argument is no tensor, or of a dtype that is not allowed.
        ValueError: Shapes do not fit, an option is unknown, or `backend` cannot run the call.
    """
    pair = scale2 is not None or shift2 is not None
    fault = None
    if backend is None and not tracing():
        try:
            if weight is None and bias is None and scale_table is None and shift_table is None and rows is None:
                numbers = norm_numbers(norm, law, weight_offset, eps, offset)
                if pair:
                    y = bare("norm_modulate_pair_bare", x, (x, scale, shift, scale2, shift2, numbers))
                else:
                    y = bare("norm_modulate_bare", x, (x, scale, shift, numbers))
                if y is not None:
                    return y
            flags = NORM_FLAGS[norm, law, weight_offset]
            if not (0.0 <= eps < _INF and -_INF < offset < _INF):
                raise LookupError
            if rows is not None and scale is None and shift is None and not pair:
                raise LookupError
            end = (weight, bias, scale_table, shift_table, rows, eps, offset, flags)
            if pair:
                return fast("norm_modulate_pair", x, (x, scale, shift, scale2, shift2, *end))
            return fast("norm_modulate", x, (x, scale, shift, *end))
        except FAULTS as error:
            fault = error

    check.norm_arguments(x, norm, law, weight_offset, weight, bias, eps, offset)
    mods = {"scale": scale, "shift": shift, "scale2": scale2, "shift2": shift2}
    check.modulations(x, mods, {"scale_table": scale_table, "shift_table": shift_table}, rows)

    plain = partial(
        reference.norm_modulate,
        x, scale, shift, norm=norm, weight=weight, bias=bias, eps=eps, offset=offset, rows=rows, law=law,
        weight_offset=weight_offset, scale_table=scale_table, shift_table=shift_table, scale2=scale2, shift2=shift2,
    )  # fmt: skip
    k = check.kernel_operands(x, mods, {"scale_table": scale_table, "shift_table": shift_table}, weight, bias, rows)
    flags = NORM_FLAGS[norm, law, float(weight_offset)]
    common = (k["weight"], k["bias"], k["scale_table"], k["shift_table"], k["rows"], float(eps), float(offset), flags)
    second = (k["scale2"], k["shift2"]) if pair else ()
    args = (k["x"], k["scale"], k["shift"], *second, *common)
    name = "norm_modulate_pair" if pair else "norm_modulate"
    return check.run(name, x, args, backend, plain, fault)


def gate_residual_norm_modulate(
    x: Tensor,
    a: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    gate_act: str = "none",
    post_norm: str | None = None,
    post_weight: Tensor | None = None,
    post_eps: float | None = None,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 1.0,
    rows: Tensor | None = None,
    law: str = "fp32",
    weight_offset: float = 0.0,
    gate_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    clip: bool = False,
    return_residual: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`r = x + act(gate) * post_norm(a)` and `y = norm(r) * (offset + scale) + shift`: reads x and a, writes r and y.

    The norm reads the residual as stored (rounded to x's dtype), as every model does.

    Args:
        x: `(B, N, D)` residual stream.
        a: `(B, N, D)` output of attention or MLP, of x's dtype.
        gate: Modulation of `a`; shapes as `scale` of `norm_modulate`. None adds `a` as it is.
        scale: As in `norm_modulate`, like all arguments not named here.
        shift: As `scale`.
        gate_act: `"none"`, `"tanh"`, `"clamp_tanh"` (clamp to +-2, then tanh) or `"sigmoid_1m"` (`sigmoid(1 - gate)`).
        post_norm: `"rms"` or `"layer"` for a sandwich norm of `a` before the gate (Lumina, Z-Image), else None.
        post_weight: `(D,)` weight of the sandwich norm (`weight_offset` applies to it too).
        post_eps: eps of the sandwich norm; None takes `eps`.
        norm: As in `norm_modulate`.
        weight: As in `norm_modulate`.
        bias: As in `norm_modulate`.
        eps: As in `norm_modulate`.
        offset: As in `norm_modulate`.
        rows: As in `norm_modulate`; also for `gate`.
        law: As in `norm_modulate`.
        weight_offset: As in `norm_modulate`.
        gate_table: `(D,)` added to `gate` before the activation.
        scale_table: As in `norm_modulate`.
        shift_table: As in `norm_modulate`.
        scale2: As in `norm_modulate`.
        shift2: As in `norm_modulate`.
        clip: Clamp `r` to the range of fp16 (its gradient is passed straight through).
        return_residual: False if `r` is not needed (AuraFlow): it is not written, and not returned.
        backend: As in `norm_modulate`.

    Returns:
        `(r, y)`, or `(r, y, y2)` with a second modulation; without `return_residual`, `y` or `(y, y2)`.

    Raises:
        TypeError: An argument is no tensor, or of a dtype that is not allowed.
        ValueError: Shapes do not fit, an option is unknown, or `backend` cannot run the call.
    """
    pair = scale2 is not None or shift2 is not None
    fault = None
    name = "gate_residual_norm_modulate_pair" if pair else "gate_residual_norm_modulate"
    args: tuple
    if backend is None and not tracing():
        try:
            few = weight is None and bias is None and scale_table is None and shift_table is None and rows is None
            # what is not returned cannot be saved for the derivative
            few = few and (return_residual or not _call.wants_grad((x, a, gate, scale, shift, scale2, shift2)))
            if few and gate_table is None and post_weight is None and post_eps is None:
                numbers = gate_numbers(
                    norm, law, weight_offset, gate_act, post_norm, clip, eps, offset, return_residual
                )
                if pair:
                    args = (x, a, gate, scale, shift, scale2, shift2, numbers)
                    out = bare("gate_residual_norm_modulate_pair_bare", x, args)
                else:
                    out = bare("gate_residual_norm_modulate_bare", x, (x, a, gate, scale, shift, numbers))
                if out is not None:
                    return out if return_residual else out[1:] if pair else out[1]
            flags = NORM_FLAGS[norm, law, weight_offset] | GATE_FLAGS[gate_act, post_norm] | (CLIP if clip else 0)
            post = eps if post_eps is None else post_eps
            if not (0.0 <= eps < _INF and 0.0 <= post < _INF and -_INF < offset < _INF):
                raise LookupError
            if post_weight is not None and not flags & _POSTS:
                raise LookupError
            if rows is not None and gate is None and scale is None and shift is None and not pair:
                raise LookupError
            second = (scale2, shift2) if pair else ()
            norms = (scale, shift, *second, weight, bias, scale_table, shift_table)
            tensors = (x, a, gate, gate_table, post_weight, *norms, rows)
            if not return_residual and not _call.wants_grad(tensors):
                flags |= NO_RESIDUAL
            out = fast(name, x, (*tensors, eps, post, offset, flags))
            return out if return_residual else out[1:] if pair else out[1]
        except FAULTS as error:
            fault = error

    check.norm_arguments(x, norm, law, weight_offset, weight, bias, eps, offset)
    check.gate_arguments(x, a, gate_act, post_norm, post_weight, post_eps)
    mods = {"gate": gate, "scale": scale, "shift": shift, "scale2": scale2, "shift2": shift2}
    tables = {"gate_table": gate_table, "scale_table": scale_table, "shift_table": shift_table}
    check.modulations(x, mods, tables, rows)

    plain = partial(
        reference.gate_residual_norm_modulate,
        x, a, gate, scale, shift, gate_act=gate_act, post_norm=post_norm, post_weight=post_weight,
        post_eps=post_eps, norm=norm, weight=weight, bias=bias, eps=eps, offset=offset, rows=rows, law=law,
        weight_offset=weight_offset, gate_table=gate_table, scale_table=scale_table, shift_table=shift_table,
        scale2=scale2, shift2=shift2, clip=clip,
    )  # fmt: skip
    k = check.kernel_operands(x, mods, tables, weight, bias, rows, a=a, post_weight=post_weight)
    flags = NORM_FLAGS[norm, law, float(weight_offset)] | GATE_FLAGS[gate_act, post_norm] | (CLIP if clip else 0)
    args = (k["x"], k["a"], k["gate"], k["gate_table"], k["post_weight"], k["scale"], k["shift"])
    if pair:
        args += (k["scale2"], k["shift2"])
    args += (k["weight"], k["bias"], k["scale_table"], k["shift_table"], k["rows"])
    if not return_residual and not _call.wants_grad(args):
        flags |= NO_RESIDUAL
    args += (float(eps), float(eps if post_eps is None else post_eps), float(offset), flags)
    out = check.run(name, x, args, backend, plain, fault)
    if return_residual:
        return out
    return out[1:] if pair else out[1]


def gate_residual(
    x: Tensor,
    a: Tensor,
    gate: Tensor | None = None,
    *,
    gate_act: str = "none",
    post_norm: str | None = None,
    post_weight: Tensor | None = None,
    post_eps: float = 1e-6,
    clip: bool = False,
    rows: Tensor | None = None,
    law: str = "fp32",
    weight_offset: float = 0.0,
    gate_table: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`x + act(gate) * post_norm(a)`, the residual alone (last site of a block).

    Args:
        x: `(B, N, D)` residual stream.
        a: `(B, N, D)`, as `x`.
        gate: As in `gate_residual_norm_modulate`, like all other arguments.
        gate_act: See there.
        post_norm: See there.
        post_weight: See there.
        post_eps: eps of the sandwich norm.
        clip: See there.
        rows: See there.
        law: See there.
        weight_offset: Added to `post_weight`.
        gate_table: See there.
        backend: See there.

    Returns:
        The new residual, shape and dtype of `x`.

    Raises:
        TypeError: An argument is no tensor, or of a dtype that is not allowed.
        ValueError: Shapes do not fit, an option is unknown, or `backend` cannot run the call.
    """
    fault = None
    if backend is None and not tracing():
        try:
            if gate_table is None and post_weight is None and rows is None:
                numbers = gate_numbers("none", law, weight_offset, gate_act, post_norm, clip, post_eps, 0.0)
                r = bare("gate_residual_bare", x, (x, a, gate, numbers))
                if r is not None:
                    return r
            flags = NORM_FLAGS["none", law, weight_offset] | GATE_FLAGS[gate_act, post_norm] | (CLIP if clip else 0)
            if not 0.0 <= post_eps < _INF or (post_weight is not None and not flags & _POSTS):
                raise LookupError
            if rows is not None and gate is None:
                raise LookupError
            return fast("gate_residual", x, (x, a, gate, gate_table, post_weight, rows, post_eps, flags))
        except FAULTS as error:
            fault = error

    check.norm_arguments(x, "none", law, weight_offset, None, None, post_eps, 1.0)
    check.gate_arguments(x, a, gate_act, post_norm, post_weight, post_eps)
    check.modulations(x, {"gate": gate}, {"gate_table": gate_table}, rows)

    plain = partial(
        reference.gate_residual,
        x, a, gate, gate_act=gate_act, post_norm=post_norm, post_weight=post_weight, clip=clip, rows=rows, law=law,
        gate_table=gate_table, post_eps=post_eps, weight_offset=weight_offset,
    )  # fmt: skip
    mods, tables = {"gate": gate}, {"gate_table": gate_table}
    k = check.kernel_operands(x, mods, tables, None, None, rows, a=a, post_weight=post_weight)
    flags = NORM_FLAGS["none", law, float(weight_offset)] | GATE_FLAGS[gate_act, post_norm] | (CLIP if clip else 0)
    args = (k["x"], k["a"], k["gate"], k["gate_table"], k["post_weight"], k["rows"], float(post_eps), flags)
    return check.run("gate_residual", x, args, backend, plain, fault)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norm: str = "rms",
    across_heads: bool = False,
    rope: str = "interleaved",
    positions: Tensor | None = None,
    eps: float = 1e-6,
    law: str = "fp32",
    weight_offset: float = 0.0,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """QK norm and rotary embedding of both projections in one pass (RoFormer, Su et al. 2021, eq. 34).

    Args:
        q: `(B, S, H, Dh)`.
        k: `(B, Sk, Hk, Dh)` of q's dtype; `Sk = S` where RoPE is applied.
        q_weight: `(Dh,)`, or `(H * Dh,)` with `across_heads`.
        k_weight: As `q_weight`, for k.
        cos: `(S, T)`, `(B|1, S, T)` or `(B|1, S, H|1, T)`, T = Dh (one value an element) or Dh / 2 (one a pair). Real
            and imaginary views of a complex table are read in place. None leaves out the rotation.
        sin: As `cos`.
        norm: `"rms"`, `"layer"` or `"none"`.
        across_heads: One statistic per token over all heads (Wan, LTX) instead of one per head.
        rope: `"interleaved"`: pairs (2i, 2i + 1). `"half"`: pairs (i, i + Dh / 2).
        positions: int32 `(S,)` or `(B, S)`: row of `cos` and `sin` for each token (kept tokens).
        eps: Added to the mean square or variance.
        law: `"fp32"` or `"narrow"`, as in `norm_modulate`.
        weight_offset: 1 if the norm multiplies by `1 + weight`.
        q_bias: Bias of a LayerNorm, shaped as `q_weight`.
        k_bias: As `q_bias`, for k.
        backend: As in `norm_modulate`.

    Returns:
        `(q, k)`, new dense tensors.

    Raises:
        TypeError: An argument is no tensor, or of a dtype that is not allowed.
        ValueError: Shapes do not fit, an option is unknown, or `backend` cannot run the call.
    """
    fault = None
    if backend is None and not tracing():
        try:
            if q_bias is None and k_bias is None and positions is None:
                numbers = qk_numbers(norm, law, weight_offset, across_heads, rope, eps)
                out = bare("qk_norm_rope_bare", q, (q, k, q_weight, k_weight, cos, sin, numbers))
                if out is not None:
                    return out
            flags = NORM_FLAGS[norm, law, weight_offset] | ROPE_FLAGS[across_heads, rope]
            if not 0.0 <= eps < _INF or (positions is not None and cos is None):
                raise LookupError
            args = (q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, positions, eps, flags)
            return fast("qk_norm_rope", q, args)
        except FAULTS as error:
            fault = error

    check.qk_arguments(q, k, norm, law, weight_offset, rope, across_heads, eps)
    check.qk_operands(q, k, (q_weight, k_weight, q_bias, k_bias), cos, sin, positions, across_heads)

    plain = partial(
        reference.qk_norm_rope,
        q, k, q_weight, k_weight, cos, sin, norm=norm, across_heads=across_heads, rope=rope, positions=positions,
        eps=eps, law=law, weight_offset=weight_offset, q_bias=q_bias, k_bias=k_bias,
    )  # fmt: skip
    args = check.qk_kernel_operands(q, k, (q_weight, k_weight, q_bias, k_bias), cos, sin, positions)
    flags = NORM_FLAGS[norm, law, float(weight_offset)]
    flags |= (ACROSS_HEADS if across_heads else 0) | (ROPE_HALF if rope == "half" else 0)
    return check.run("qk_norm_rope", q, (*args, float(eps), flags), backend, plain, fault)


def gated_activation(
    x: Tensor, kind: str = "swiglu", *, gate_first: bool = False, backend: str | None = None
) -> Tensor:
    """`value * act(gate)` of the two halves of the last dim (GLU Variants, Shazeer 2020), or an elementwise tanh-GELU.

    Args:
        x: `(..., 2 M)`; `(..., M)` for `"gelu_tanh"`.
        kind: `"swiglu"` (SiLU), `"geglu"` (exact GELU) or `"gelu_tanh"`.
        gate_first: The first half is the gate (Flux.2, Llama order); otherwise the second (diffusers order).
        backend: As in `norm_modulate`.

    Returns:
        `(..., M)` in x's dtype.

    Raises:
        TypeError: `x` is no floating tensor.
        ValueError: The last dim is empty or odd, an option is unknown, or `backend` cannot run the call.
    """
    if backend is None and not tracing():
        try:
            return fast("gated_activation", x, (x, ACTIVATION_FLAGS[kind, gate_first]))
        except FAULTS:
            pass  # the checks below say what is wrong, or make the argument dense

    check.activation_arguments(x, kind)
    flags = ACTIVATIONS[kind] | (GATE_FIRST if gate_first else 0)
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()

    plain = partial(reference.gated_activation, flat, kind, gate_first=gate_first)
    out = _call.checked("gated_activation", x, (flat, flags), backend, plain)
    return out.view(*x.shape[:-1], out.shape[-1])
