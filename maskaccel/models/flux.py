"""Flux and the models that share its blocks: Chroma, Bria, Bria-Fibo, LongCat-Image, Ovis-Image.

Dual-stream (MMDiT, Esser et al. 2024) blocks with adaLN-Zero for image and text, then single-stream blocks where
attention and MLP run side by side behind one projection. Both round narrowly, and clip fp16 residuals.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import gated_activation, norm_modulate
from ._adapter import Adapter, table
from ._attention import FusedProcessor, norm_and_rotate
from ._parts import add_gated, add_gated_then_mlp, gathered, norm_options, part_of, recall

_TRANSFORMERS = "diffusers.models.transformers.transformer_"


def _projected(norm: Any, temb: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Modulation that the norm's own projection makes."""
    return norm.linear(norm.silu(temb)).chunk(parts, dim=1)


def _given(norm: Any, temb: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Modulation that was made for all layers at once (Chroma)."""
    return temb.flatten(1, 2).chunk(parts, dim=1)


def _no_embedding(block: Any) -> str | None:
    return "its norms embed the timestep themselves" if block.norm1.emb or block.norm1_context.emb else None


def _dual(self: Any, x: Tensor, c: Tensor, mods: tuple, c_mods: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    found = recall(self.attn, x, late=True)
    if found is None:
        found = self.attn(
            hidden_states=norm_modulate(x, mods[1], mods[0], law="narrow", **norm_options(self.norm1.norm)),
            encoder_hidden_states=norm_modulate(
                c, c_mods[1], c_mods[0], law="narrow", **norm_options(self.norm1_context.norm)
            ),
            **kwargs,
        )
    attn, c_attn, *ip = found
    x = add_gated_then_mlp(x, attn, mods[2], self.norm2, self.ff, mods[3:])
    if ip:  # IP-Adapter: added without a gate, after the MLP
        x = add_gated(x, ip[0], law="narrow")
    c = add_gated_then_mlp(c, c_attn, c_mods[2], self.norm2_context, self.ff_context, c_mods[3:], clip=True)
    return c, x


def dual_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Dual-stream block with fused adaLN sites."""
    mods, c_mods = _projected(self.norm1, temb, 6), _projected(self.norm1_context, temb, 6)
    kwargs = {"image_rotary_emb": image_rotary_emb, **(joint_attention_kwargs or {})}
    return _dual(self, hidden_states, encoder_hidden_states, mods, c_mods, kwargs)


def bria_dual_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Dual-stream block whose attention arguments have another name."""
    return dual_forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)


def chroma_dual_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Dual-stream block with given modulation and a padding mask."""
    mods, c_mods = _given(self.norm1, temb[:, :6], 6), _given(self.norm1_context, temb[:, 6:], 6)
    kwargs = {"image_rotary_emb": image_rotary_emb, "attention_mask": _pairs(attention_mask)}
    kwargs |= joint_attention_kwargs or {}
    return _dual(self, hidden_states, encoder_hidden_states, mods, c_mods, kwargs)


def _pairs(mask: Tensor | None) -> Tensor | None:
    """A padding mask (B, S) as an attention mask (B, 1, S, S)."""
    return None if mask is None else mask[:, None, None, :] * mask[:, None, :, None]


def _gelu_mlp(self: Any, y: Tensor) -> Tensor:
    return self.act_mlp(self.proj_mlp(y))


def _swiglu_mlp(self: Any, y: Tensor) -> Tensor:
    return gated_activation(self.proj_mlp(y), "swiglu")


def _single(
    self: Any, x: Tensor, mods: tuple, kwargs: dict[str, Any], mlp: Callable[[Any, Tensor], Tensor] = _gelu_mlp
) -> Tensor:
    shift, scale, gate = mods
    # Only the shape of the projection's input is known before it is computed.
    joined = x[..., :1].expand(-1, -1, x.shape[-1] + self.mlp_hidden_dim)
    out, clip = recall(self.proj_out, joined), x.dtype == torch.float16
    part = None if out is not None or clip else part_of(self.proj_out, joined)
    attn = None if part is None else recall(self.attn, x)
    if part is not None and attn is not None:
        some = gathered(x, part.index)
        y = norm_modulate(some, scale, shift, law="narrow", **norm_options(self.norm.norm))
        return part.added(self.proj_out, torch.cat([gathered(attn, part.index), mlp(self, y)], dim=2), x, gate)
    if out is None:
        y = norm_modulate(x, scale, shift, law="narrow", **norm_options(self.norm.norm))
        hidden = mlp(self, y)
        out = self.proj_out(torch.cat([self.attn(hidden_states=y, **kwargs), hidden], dim=2))
    return add_gated(x, out, gate, law="narrow", clip=clip)


def _joined(self: Any, x: Tensor, c: Tensor, temb: Tensor, kwargs: dict[str, Any], mlp: Any) -> tuple[Tensor, Tensor]:
    both = _single(self, torch.cat([c, x], dim=1), _projected(self.norm, temb, 3), kwargs, mlp)
    return both[:, : c.shape[1]], both[:, c.shape[1] :]


def single_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Single-stream block on the text tokens followed by the image tokens."""
    kwargs = {"image_rotary_emb": image_rotary_emb, **(joint_attention_kwargs or {})}
    return _joined(self, hidden_states, encoder_hidden_states, temb, kwargs, _gelu_mlp)


def bria_single_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Single-stream block whose attention arguments have another name."""
    return single_forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)


def ovis_single_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Single-stream block with a SwiGLU MLP."""
    kwargs = {"image_rotary_emb": image_rotary_emb, **(joint_attention_kwargs or {})}
    return _joined(self, hidden_states, encoder_hidden_states, temb, kwargs, _swiglu_mlp)


def fibo_single_forward(
    self: Any,
    hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """Single-stream block on a stream that is joined already."""
    kwargs = {"image_rotary_emb": image_rotary_emb, **(joint_attention_kwargs or {})}
    return _single(self, hidden_states, _projected(self.norm, temb, 3), kwargs)


def chroma_single_forward(
    self: Any,
    hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """Single-stream block with given modulation and a padding mask."""
    kwargs = {"image_rotary_emb": image_rotary_emb, "attention_mask": _pairs(attention_mask)}
    kwargs |= joint_attention_kwargs or {}
    return _single(self, hidden_states, _given(self.norm, temb, 3), kwargs)


class FusedFluxAttention(FusedProcessor):
    """Flux attention with QK norm and RoPE in one pass."""

    @staticmethod
    def heads(t: Tensor, attn: Any) -> Tensor:
        """`(B, S, H, Dh)`; the head dim is fixed and not the number of heads, which tensor parallelism divides."""
        return t.unflatten(-1, (-1, attn.head_dim))

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        # The projections, fused or not, stay those of the installed diffusers.
        module: Any = sys.modules[type(original).__module__]
        self._project = module._get_qkv_projections

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """Attend, as the original does."""
        q, k, v, c_q, c_k, c_v = self._project(attn, hidden_states, encoder_hidden_states)
        q, k, v = (self.heads(t, attn) for t in (q, k, v))
        cos = sin = None
        if image_rotary_emb is not None:
            cos, sin = (t.to(q.device) for t in image_rotary_emb)
        text = 0
        if attn.added_kv_proj_dim is not None:
            # Text tokens come first. Their norms have weights of their own, so they take a call of their own.
            c_q, c_k, c_v = (self.heads(t, attn) for t in (c_q, c_k, c_v))
            text = c_q.shape[1]
            norms = ("norm_added_q", "norm_added_k")
            c_q, c_k = norm_and_rotate(attn, c_q, c_k, _rows(cos, 0, text), _rows(sin, 0, text), norms=norms)
        q, k = norm_and_rotate(attn, q, k, _rows(cos, text, None), _rows(sin, text, None))
        if text:
            q, k, v = (torch.cat([c, t], dim=1) for c, t in ((c_q, q), (c_k, k), (c_v, v)))
        out = self._dispatch(
            q, k, v, attn_mask=attention_mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        out = out.flatten(2, 3).to(q.dtype)
        if encoder_hidden_states is None:
            return out
        c_out, out = out.split_with_sizes([text, out.shape[1] - text], dim=1)
        out = attn.to_out[1](attn.to_out[0](out.contiguous()))
        return out, attn.to_add_out(c_out.contiguous())


class FusedFluxLikeAttention(FusedFluxAttention):
    """The same for attention modules that know their number of heads only."""

    @staticmethod
    def heads(t: Tensor, attn: Any) -> Tensor:
        """`(B, S, H, Dh)`."""
        return t.unflatten(-1, (attn.heads, -1))


def _rows(table_: Tensor | None, start: int, end: int | None) -> Tensor | None:
    return None if table_ is None else table_[start:end]


def _dual_block(module: str, name: str, forward: Callable[..., Any], *fingerprints: str) -> Adapter:
    return Adapter(
        cls=f"{_TRANSFORMERS}{module}:{name}",
        forward=forward,
        fingerprints=frozenset(fingerprints),
        sites=("attn", "ff", "ff_context"),
        unsupported=_no_embedding,
    )


def _single_block(module: str, name: str, forward: Callable[..., Any], *fingerprints: str) -> Adapter:
    cls = f"{_TRANSFORMERS}{module}:{name}"
    return Adapter(cls=cls, forward=forward, fingerprints=frozenset(fingerprints), sites=("proj_out",))


def _processor(module: str, name: str, forward: Callable[..., Any], *fingerprints: str) -> Adapter:
    cls = f"{_TRANSFORMERS}{module}:{name}"
    return Adapter(cls=cls, forward=forward, fingerprints=frozenset(fingerprints), method="__call__")


BLOCKS = table(
    _dual_block("flux", "FluxTransformerBlock", dual_forward, "e988c2bc5431"),
    _single_block("flux", "FluxSingleTransformerBlock", single_forward, "bdc8d269208a"),
    _dual_block("chroma", "ChromaTransformerBlock", chroma_dual_forward, "ace344d7f22f"),
    _single_block("chroma", "ChromaSingleTransformerBlock", chroma_single_forward, "02ed30258b6c"),
    _dual_block("bria", "BriaTransformerBlock", bria_dual_forward, "a2feb5c76012"),
    _single_block("bria", "BriaSingleTransformerBlock", bria_single_forward, "f2b5415d8fea"),
    _dual_block("bria_fibo", "BriaFiboTransformerBlock", dual_forward, "e988c2bc5431"),
    _single_block("bria_fibo", "BriaFiboSingleTransformerBlock", fibo_single_forward, "7ba3c02c8f85"),
    _dual_block("longcat_image", "LongCatImageTransformerBlock", dual_forward, "e988c2bc5431"),
    _single_block("longcat_image", "LongCatImageSingleTransformerBlock", single_forward, "bdc8d269208a"),
    _dual_block("ovis_image", "OvisImageTransformerBlock", dual_forward, "e988c2bc5431"),
    _single_block("ovis_image", "OvisImageSingleTransformerBlock", ovis_single_forward, "015c8c928118"),
)

PROCESSORS = table(
    _processor("flux", "FluxAttnProcessor", FusedFluxAttention, "eee98f764420"),
    _processor("bria", "BriaAttnProcessor", FusedFluxLikeAttention, "db17ab1c4067"),
    _processor("bria_fibo", "BriaFiboAttnProcessor", FusedFluxLikeAttention, "afc56d1aebcd"),
    _processor("longcat_image", "LongCatImageAttnProcessor", FusedFluxLikeAttention, "aa43bd1d917d"),
    _processor("ovis_image", "OvisImageAttnProcessor", FusedFluxLikeAttention, "77702d51a3dd"),
)
