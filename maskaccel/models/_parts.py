"""Steps that the fused blocks of several families share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import gate_residual, gate_residual_norm_modulate, norm_modulate, norm_modulate_difference
from ..state import part_of, recall
from ..state.feature import Pending
from ..state.select import gathered
from ..state.site import Part
from ._attention import hooked


def norm_options(norm: nn.Module) -> dict[str, Any]:
    """Kind, affine parameters and eps of a norm module, as arguments of the fused ops."""
    name = type(norm).__name__
    kind = "rms" if "RMS" in name else "layer"
    eps = getattr(norm, "eps", None)
    if eps is None:
        # torch.nn.RMSNorm(eps=None) takes the machine epsilon of its input's dtype; such norms are not fused
        raise TypeError(f"{name} has no fixed eps")
    return {"norm": kind, "weight": getattr(norm, "weight", None), "bias": getattr(norm, "bias", None), "eps": eps}


def one_dtype(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Residual and addend in the dtype that eager addition would give (they differ under autocast)."""
    if x.dtype == a.dtype:
        return x, a
    wide = torch.promote_types(x.dtype, a.dtype)
    return x.to(wide), a.to(wide)


_OF_GATE = ("gate_table", "gate_act", "post_norm", "post_weight", "post_eps")


def _sums(x: Tensor, a: Tensor | Pending, options: dict[str, Any]) -> bool:
    """Whether `a` is a forecast that is added as it is, with a gate at most."""
    return (
        isinstance(a, Pending)
        and a.fits(x)
        and all(options.get(name) is None for name in ("rows", *_OF_GATE))
        and not options.get("clip")
    )


def add_gated(x: Tensor, a: Tensor | Pending, gate: Tensor | None = None, **options: Any) -> Tensor:
    """`gate_residual` for tensors that may differ in dtype, or for a forecast that is formed here (and rounds once)."""
    if isinstance(a, Pending):
        if _sums(x, a, options):
            return a.added(x, gate)
        a = a.value()
    x, a = one_dtype(x, a)
    return gate_residual(x, a, gate, **options)


def add_gated_then_norm(
    x: Tensor,
    a: Tensor | Pending,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    **options: Any,
) -> Any:
    """`gate_residual_norm_modulate`, as `add_gated`."""
    if isinstance(a, Pending):
        if _sums(x, a, options):
            norm = {name: value for name, value in options.items() if name not in (*_OF_GATE, "clip")}
            return a.added_then_norm(x, gate, scale, shift, **norm)
        a = a.value()
    x, a = one_dtype(x, a)
    return gate_residual_norm_modulate(x, a, gate, scale, shift, **options)


def add_some(
    part: Part, x: Tensor, mlp: nn.Module, gate: Tensor, scale: Tensor, shift: Tensor, **options: Any
) -> Tensor:
    """`x + gate * mlp(...)` at a step in part: norm, modulation and MLP of the chosen tokens, others from memory."""
    y = norm_modulate(gathered(x, part.index), scale, shift, **options)
    return part.added(mlp, y, x, gate)


# Norm classes with a fused form: kind, and the law under which the fused op rounds where the class does, or less often.
_KNOWN_NORMS = {
    ("torch.nn.modules.normalization", "LayerNorm"): ("layer", "narrow"),
    ("torch.nn.modules.normalization", "RMSNorm"): ("rms", "fp32"),
    ("diffusers.models.normalization", "FP32LayerNorm"): ("layer", "narrow"),
    ("diffusers.models.normalization", "RMSNorm"): ("rms", "narrow"),
}


def exact_norm_options(norm: nn.Module, x: Tensor) -> dict[str, Any] | None:
    """Arguments of the fused ops, law included, that reproduce `norm(x)`; None where only calling the module does.

    An affine weight of another dtype changes the dtype or the rounding of the result, a norm without a fixed eps takes
    that of its input, and hooks would not run.
    """
    known = _KNOWN_NORMS.get((type(norm).__module__, type(norm).__name__))
    if known is None or getattr(norm, "eps", None) is None or hooked(norm):
        return None
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if type(norm).__name__ != "FP32LayerNorm" and weight is not None and weight.dtype != x.dtype:
        return None
    return {"norm": known[0], "weight": weight, "bias": bias, "eps": norm.eps, "law": known[1]}


def over_tokens(m: Tensor) -> Tensor:
    """A modulation row `(B, D)` as `(B, 1, D)`; others as they are."""
    return m.unsqueeze(1) if m.dim() == 2 else m


def _fused_options(norm: nn.Module, x: Tensor, *mods: Tensor | None) -> dict[str, Any] | None:
    """`exact_norm_options`, or None where the modulation would change the dtype of the result."""
    options = exact_norm_options(norm, x) if x.dim() == 3 else None
    narrow = all(m is None or torch.promote_types(m.dtype, x.dtype) == x.dtype for m in mods)
    return options if narrow else None


def modulated_norm(norm: nn.Module, x: Tensor, scale: Tensor | None, shift: Tensor | None = None) -> Tensor:
    """`norm(x) * (1 + scale) + shift`, fused wherever that gives what the modules would give."""
    options = _fused_options(norm, x, scale, shift)
    if options is not None:
        return norm_modulate(x, scale, shift, **options)
    y = norm(x)
    y = y if scale is None else y * (1 + over_tokens(scale))
    return y if shift is None else y + over_tokens(shift)


def modulated_norm_against(
    norm: nn.Module, x: Tensor, scale: Tensor | None, shift: Tensor | None, reference: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`modulated_norm`, and its `relative_difference` from `reference` where one pass gives both."""
    options = _fused_options(norm, x, scale, shift)
    alike = (reference.shape, reference.dtype, reference.device) == (x.shape, x.dtype, x.device)
    if options is None or not alike:
        return modulated_norm(norm, x, scale, shift), None
    return norm_modulate_difference(x, reference, scale, shift, **options)


def modulated_norm_pair(
    norm: nn.Module, x: Tensor, mods: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Two modulated outputs of one norm; `mods` are scale and shift of the first, then of the second."""
    scale, shift, scale2, shift2 = mods
    options = _fused_options(norm, x, *mods)
    if options is not None:
        return norm_modulate(x, scale, shift, scale2=scale2, shift2=shift2, **options)  # type: ignore[return-value]
    y = norm(x)
    first, second = (y * (1 + over_tokens(a)) + over_tokens(b) for a, b in ((scale, shift), (scale2, shift2)))
    return first, second


def add_gated_then_mlp(
    x: Tensor,
    a: Tensor | Pending,
    gate: Tensor,
    norm: nn.Module,
    mlp: nn.Module,
    mods: tuple[Tensor, ...],
    clip: bool = False,
    rows: Tensor | None = None,
) -> Tensor:
    """Second half of an adaLN-Zero block: `x += gate * a; x += mlp_gate * mlp(norm(x) * (1 + scale) + shift)`.

    Args:
        x: Residual stream.
        a: Output of attention.
        gate: Gate of `a`.
        norm: Norm before the MLP.
        mlp: The MLP, a cached site.
        mods: Shift, scale and gate of the MLP.
        clip: Clamp the result to the range of fp16, if it is fp16.
        rows: Row of `gate` and `mods` that each token reads.
    """
    shift, scale, mlp_gate = mods
    clip = clip and x.dtype == torch.float16
    out = recall(mlp, x, late=True)
    part = None if out is not None or clip or rows is not None else part_of(mlp, x)
    if part is not None:
        x = add_gated(x, a, gate, law="narrow")
        return add_some(part, x, mlp, mlp_gate, scale, shift, law="narrow", **norm_options(norm))
    if out is None:
        x, y = add_gated_then_norm(x, a, gate, scale, shift, law="narrow", rows=rows, **norm_options(norm))
        out = mlp(y)
    else:
        x = add_gated(x, a, gate, law="narrow", rows=rows)
    return add_gated(x, out, mlp_gate, law="narrow", clip=clip, rows=rows)


__all__ = [
    "add_gated",
    "add_gated_then_mlp",
    "add_gated_then_norm",
    "add_some",
    "exact_norm_options",
    "gathered",
    "modulated_norm",
    "modulated_norm_pair",
    "norm_options",
    "one_dtype",
    "over_tokens",
    "part_of",
    "recall",
]
