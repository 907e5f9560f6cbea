"""The adaLN norm modules of `diffusers.models.normalization`: `norm(x) * (1 + scale) + shift` in one pass.

This level needs no knowledge of a block, so it also serves models that no block adapter knows. Where a module's
settings or dtypes leave no exact fused form, its eager expression runs (`modulated_norm` decides).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ._adapter import Adapter, table
from ._parts import modulated_norm, modulated_norm_pair


def layer_norm(self: Any, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
    """AdaLayerNorm: one embedding for the batch (`chunk_dim` 0), or one a sample."""
    if self.emb is not None:
        temb = self.emb(timestep)
    emb = self.linear(self.silu(temb))
    if self.chunk_dim == 1:
        shift, scale = emb.chunk(2, dim=1)
        return modulated_norm(self.norm, x, scale, shift)
    scale, shift = emb.chunk(2, dim=0)
    if scale.dim() == 1:
        return modulated_norm(self.norm, x, scale[None], shift[None])
    return self.norm(x) * (1 + scale) + shift


def zero(
    self: Any,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: Any = None,
    emb: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """AdaLayerNormZero."""
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, gate, *mlp = self.linear(self.silu(emb)).chunk(6, dim=1)
    return (modulated_norm(self.norm, x, scale, shift), gate, *mlp)


def zero_single(self: Any, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """AdaLayerNormZeroSingle."""
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return modulated_norm(self.norm, x, scale, shift), gate


def zero_x(self: Any, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
    """SD35AdaLayerNormZeroX: one norm, two modulated outputs."""
    shift, scale, gate, *mlp, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, dim=1)
    y, y2 = modulated_norm_pair(self.norm, hidden_states, (scale, shift, scale2, shift2))
    return (y, gate, *mlp, y2, gate2)


def lumina_zero(self: Any, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
    """LuminaRMSNormZero: scale only."""
    scale, *rest = self.linear(self.silu(emb)).chunk(4, dim=1)
    return (modulated_norm(self.norm, x, scale), *rest)


def continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """AdaLayerNormContinuous: scale first."""
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return modulated_norm(self.norm, x, scale, shift)


def lumina_continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """LuminaLayerNormContinuous: scale only, then a projection."""
    scale = self.linear_1(self.silu(conditioning_embedding).to(x.dtype))
    y = modulated_norm(self.norm, x, scale)
    return y if self.linear_2 is None else self.linear_2(y)


def text_image_zero(self: Any, x: Tensor, context: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
    """CogView3PlusAdaLayerNormZeroTextImage: six chunks of the image, then six of the text."""
    mods = self.linear(self.silu(emb)).chunk(12, dim=1)
    y = modulated_norm(self.norm_x, x, mods[1], mods[0])
    y_context = modulated_norm(self.norm_c, context, mods[7], mods[6])
    return (y, *mods[2:6], y_context, *mods[8:])


def video_zero(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CogVideoXLayerNormZero: one affine norm for video and text."""
    shift, scale, gate, c_shift, c_scale, c_gate = self.linear(self.silu(temb)).chunk(6, dim=1)
    y = modulated_norm(self.norm, hidden_states, scale, shift)
    y_text = modulated_norm(self.norm, encoder_hidden_states, c_scale, c_shift)
    return y, y_text, gate[:, None, :], c_gate[:, None, :]


def _adapter(name: str, forward: Callable[..., Any], *fingerprints: str) -> Adapter:
    cls = f"diffusers.models.normalization:{name}"
    return Adapter(cls=cls, forward=forward, fingerprints=frozenset(fingerprints))


NORMS = table(
    _adapter("AdaLayerNorm", layer_norm, "2761cb696e7e"),
    _adapter("AdaLayerNormZero", zero, "690b44401a6e"),
    _adapter("AdaLayerNormZeroSingle", zero_single, "ff138e112a4f"),
    _adapter("SD35AdaLayerNormZeroX", zero_x, "4f1a3bc7c343"),
    _adapter("LuminaRMSNormZero", lumina_zero, "78c65079dc74"),
    _adapter("AdaLayerNormContinuous", continuous, "55cf4ec15e80"),
    _adapter("LuminaLayerNormContinuous", lumina_continuous, "6d3f38db9243"),
    _adapter("CogView3PlusAdaLayerNormZeroTextImage", text_image_zero, "19376d58ced4"),
    _adapter("CogVideoXLayerNormZero", video_zero, "7d71688946c0"),
)
