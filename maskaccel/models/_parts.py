"""Steps that the fused blocks of several families share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import gate_residual, gate_residual_norm_modulate
from ..state import recall


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


def add_gated(x: Tensor, a: Tensor, gate: Tensor | None = None, **options: Any) -> Tensor:
    """`gate_residual` for tensors that may differ in dtype."""
    x, a = one_dtype(x, a)
    return gate_residual(x, a, gate, **options)


def add_gated_then_norm(
    x: Tensor, a: Tensor, gate: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None, **options: Any
) -> Any:
    """`gate_residual_norm_modulate` for tensors that may differ in dtype."""
    x, a = one_dtype(x, a)
    return gate_residual_norm_modulate(x, a, gate, scale, shift, **options)


__all__ = ["add_gated", "add_gated_then_norm", "norm_options", "one_dtype", "recall"]
