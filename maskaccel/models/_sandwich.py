"""The block of Lumina2 and Z-Image: RMS norms before and after attention and MLP, tanh gates, no shift.

`x += tanh(gate) * norm_after(attention(norm_before(x) * (1 + scale)))`, then the same with the MLP; it rounds narrowly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import norm_modulate
from ._attention import readable
from ._parts import add_gated, add_gated_then_norm, norm_options, recall


@dataclass(frozen=True)
class Modulation:
    """What a block does to its norms and residuals; all None for a block without modulation.

    Attributes:
        scale: Of the norm before attention.
        gate: Of the attention.
        mlp_scale: Of the norm before the MLP.
        mlp_gate: Of the MLP.
        rows: Row of all four that each token reads.
    """

    scale: Tensor | None = None
    gate: Tensor | None = None
    mlp_scale: Tensor | None = None
    mlp_gate: Tensor | None = None
    rows: Tensor | None = None


def can_fuse(x: Tensor, norms: tuple[nn.Module, ...], modulation: Modulation) -> bool:
    """True if eager torch would stay in x's dtype with these norms and modulation, as the fused ops do."""
    scale = modulation.scale
    return readable(x, *norms) and (scale is None or torch.promote_types(scale.dtype, x.dtype) == x.dtype)


def run(
    x: Tensor,
    attn: nn.Module,
    attend: Callable[[Tensor], Tensor],
    mlp: nn.Module,
    norms: tuple[Any, Any, Any, Any],
    modulation: Modulation,
) -> Tensor:
    """The block.

    Args:
        x: Residual stream.
        attn: The attention module, a cached site.
        attend: Calls it on its normed input.
        mlp: The MLP, a cached site.
        norms: Before and after attention, before and after the MLP.
        modulation: Scales and gates.
    """
    before, after, mlp_before, mlp_after = norms
    m, common = modulation, {"law": "narrow", "rows": modulation.rows}

    out = recall(attn, x)
    if out is None:
        y: Any = norm_modulate(x, m.scale, None, **common, **norm_options(before))
        out = attend(y)
    mlp_out = recall(mlp, x)
    if mlp_out is None:
        x, y = add_gated_then_norm(
            x, out, m.gate, m.mlp_scale, None, **common, **_sandwich(after), **norm_options(mlp_before)
        )
        mlp_out = mlp(y)
    else:
        x = add_gated(x, out, m.gate, **common, **_sandwich(after))
    return add_gated(x, mlp_out, m.mlp_gate, **common, **_sandwich(mlp_after))


def _sandwich(norm: Any) -> dict[str, Any]:
    return {"gate_act": "tanh", "post_norm": "rms", "post_weight": norm.weight, "post_eps": norm.eps}
