"""What the fused attention processors of several families share."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import qk_norm_rope
from ._per_sample import tables_of


class FusedProcessor:
    """An attention processor that stands in for the original one, with that one's state.

    diffusers writes attention backends and parallel settings to attributes of the processor, and only where they exist.

    Attributes:
        _dispatch: The `dispatch_attention_fn` of the original's module; None where that calls torch's function.
    """

    _attention_backend: Any
    _parallel_config: Any

    def __init__(self, original: Any) -> None:
        self._dispatch: Any = getattr(sys.modules[type(original).__module__], "dispatch_attention_fn", None)
        for name in ("_attention_backend", "_parallel_config"):
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))
        self.__dict__.update(original.__dict__)


def hooked(module: nn.Module) -> bool:
    """True if calling the module does more than its class's forward; its weights may be elsewhere between calls."""
    return bool("forward" in module.__dict__ or module._forward_pre_hooks or module._forward_hooks)


def readable(x: Tensor, *norms: nn.Module) -> bool:
    """True if a fused op may read the norms' weights: no hooks on them, and a result in x's dtype as in eager.

    diffusers' RMSNorm gives fp32 where its weight is fp32, whatever its input; a fused op gives x's dtype.
    """
    return not any(hooked(n) or (getattr(n, "weight", None) is not None and n.weight.dtype != x.dtype) for n in norms)


def complex_table(freqs: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of a complex RoPE table, as views of it; of a complex64 copy, made once, if it is wider."""
    freqs = tables_of(freqs)
    if freqs.dtype != torch.complex64:
        freqs = derived(freqs, "_maskaccel_complex64", lambda wide: wide.to(torch.complex64))
    parts = torch.view_as_real(freqs)
    return parts[..., 0], parts[..., 1]


def norm_and_rotate(
    attn: Any,
    q: Tensor,
    k: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norms: tuple[str, str] = ("norm_q", "norm_k"),
    across_heads: bool = False,
) -> tuple[Tensor, Tensor]:
    """QK norm and interleaved RoPE of `(B, S, H, Dh)` projections, in one pass where the norm modules allow it.

    Args:
        attn: The attention module.
        q: Query projection.
        k: Key projection; may be longer than q without RoPE.
        cos: Table as `qk_norm_rope` takes it, or None.
        sin: As `cos`.
        norms: Attributes of `attn` that hold the norms of q and k.
        across_heads: The norms run over all heads of a token.

    Returns:
        Normed and rotated q and k.
    """
    norm_q, norm_k = (getattr(attn, name) for name in norms)
    cos, sin = tables_of(cos), tables_of(sin)
    law = _fusable(norm_q, norm_k, q, k, across_heads)
    if law is not None:
        return qk_norm_rope(
            q, k, norm_q.weight, norm_k.weight, cos, sin, across_heads=across_heads, eps=norm_q.eps, law=law
        )
    q, k = _call(norm_q, q, across_heads), _call(norm_k, k, across_heads)
    if cos is None:
        return q, k
    if q.dtype != k.dtype:  # one of the two norms widened its input
        wide = torch.promote_types(q.dtype, k.dtype)
        narrow_q, narrow_k = q.dtype, k.dtype
        q, k = qk_norm_rope(q.to(wide), k.to(wide), None, None, cos, sin, norm="none")
        return q.to(narrow_q), k.to(narrow_k)
    return qk_norm_rope(q, k, None, None, cos, sin, norm="none")


def _fusable(norm_q: Any, norm_k: Any, q: Tensor, k: Tensor, across_heads: bool) -> str | None:
    """The law under which the op equals the two norm modules, or None."""
    if norm_q is None or norm_k is None or type(norm_q) is not type(norm_k) or type(norm_q).__name__ != "RMSNorm":
        return None
    if norm_q.eps is None or norm_q.eps != norm_k.eps or getattr(norm_q, "bias", None) is not None:
        return None
    if q.dtype != k.dtype or (across_heads and q.shape[2:] != k.shape[2:]) or not readable(q, norm_q, norm_k):
        return None
    # torch's norm rounds once, after the weight; diffusers' rounds before the weight product and after it
    return "fp32" if isinstance(norm_q, nn.RMSNorm) else "narrow"


def _call(norm: nn.Module | None, t: Tensor, across_heads: bool) -> Tensor:
    if norm is None:
        return t
    return norm(t.flatten(2)).view_as(t) if across_heads else norm(t)


def derived(source: Tensor, name: str, make: Any) -> Tensor:
    """`make(source)`, made once for all blocks of one model call: every block is given the same tensor object.

    Kept on the tensor itself, so it lives as long. Not under autograd or tracing, where each block makes its own.
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and source.requires_grad):
        return make(source)
    version = 0 if source.is_inference() else source._version
    held = getattr(source, name, None)
    if held is None or held[0] != version:
        held = (version, make(source))
        setattr(source, name, held)
    return held[1]
