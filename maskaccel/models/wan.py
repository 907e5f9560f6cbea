"""The Wan video family (Wan 2.1 and 2.2, VACE, Animate, ChronoEdit, SkyReels-V2, Helios, AnyFlow).

adaLN-single with a table per block and everything between two stored tensors in fp32; cross-attention reads an affine
LayerNorm and is added without a gate. Wan 2.2 TI2V, SkyReels-V2 with diffusion forcing, Helios and AnyFlow modulate
every token by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import norm_modulate
from ._adapter import Adapter, table
from ._attention import FusedProcessor, derived, hooked, norm_and_rotate
from ._parts import add_gated, add_gated_then_norm, add_some, norm_options, part_of, recall

Attend = Callable[[Tensor], Tensor]


def _modulation(self: Any, temb: Tensor, dim: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Six modulation tensors, views of `temb`, and the six rows of the block's table that are added in the kernels."""
    rows = self.scale_shift_table[0]
    if rows.dtype != temb.dtype and temb.dtype != torch.float32:  # checkpoints keep the table in fp32
        temb = derived(temb, "_maskaccel_fp32", Tensor.float)
    return temb.unbind(dim), rows.to(temb).unbind(0)


def _run(
    self: Any, x: Tensor, temb: Tensor, dim: int, attend: Attend, cross_attend: Attend, tail: int | None = None
) -> Tensor:
    """The body that all classes share; they differ in what they pass to their attentions.

    Args:
        self: The block.
        x: Residual stream.
        temb: Six modulations, stacked on dim `dim`.
        dim: See `temb`.
        attend: Self-attention of its normed input.
        cross_attend: Cross-attention of its normed input.
        tail: Number of tokens at the end that alone have cross-attention; None is all.
    """
    (shift1, scale1, gate1, shift2, scale2, gate2), tables = _modulation(self, temb, dim)
    if x.stride(-1) != 1:  # the first block of some models is given the transposed patch embedding: copy it once
        x = x.contiguous()

    attn = recall(self.attn1, x)
    if attn is None:
        options = dict(scale_table=tables[1], shift_table=tables[0], **norm_options(self.norm1))
        y: Any = norm_modulate(x, scale1, shift1, **options)
        attn = attend(y)
    attn = attn.to(x.dtype)

    if tail is not None:
        x = add_gated(x, attn, gate1, gate_table=tables[2])
        history, rest = x[:, : x.shape[1] - tail], x[:, x.shape[1] - tail :]
        cross = recall(self.attn2, rest)
        cross = cross_attend(self.norm2(rest.float()).to(x.dtype)) if cross is None else cross
        x, cross = torch.cat([history, rest + cross], dim=1), None
    else:
        x, cross = _add_and_cross(self, x, attn, gate1, tables[2], cross_attend)

    mlp = recall(self.ffn, x)
    options = dict(scale_table=tables[4], shift_table=tables[3], **norm_options(self.norm3))
    part = part_of(self.ffn, x) if mlp is None and scale2.ndim == 2 else None
    if part is not None:
        x = x if cross is None else add_gated(x, cross)
        return add_some(part, x, self.ffn, gate2 + tables[5], scale2, shift2, **options)
    if mlp is None:
        if cross is None:
            y = norm_modulate(x, scale2, shift2, **options)
        else:
            x, y = add_gated_then_norm(x, cross, None, scale2, shift2, **options)
        mlp = self.ffn(y)
    elif cross is not None:
        x = add_gated(x, cross)
    return add_gated(x, mlp.to(x.dtype), gate2, gate_table=tables[5])


def _add_and_cross(
    self: Any, x: Tensor, attn: Tensor, gate: Tensor, gate_table: Tensor, cross_attend: Attend
) -> tuple[Tensor, Tensor]:
    """The residual with self-attention added, and the cross-attention of its norm."""
    cross = recall(self.attn2, x)
    if cross is not None:
        return add_gated(x, attn, gate, gate_table=gate_table), cross
    if isinstance(self.norm2, nn.Identity):
        x = y = add_gated(x, attn, gate, gate_table=gate_table)
    elif hooked(self.norm2):
        x = add_gated(x, attn, gate, gate_table=gate_table)
        y = self.norm2(x.float()).to(x.dtype)
    else:
        x, y = add_gated_then_norm(x, attn, gate, gate_table=gate_table, **norm_options(self.norm2))
    return x, cross_attend(y)


def forward(self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
    """WanTransformerBlock with fused adaLN sites; `temb` is `(B, 6, D)`, or `(B, N, 6, D)` per token."""
    return _run(
        self, hidden_states, temb, 2 if temb.ndim == 4 else 1,
        lambda y: self.attn1(y, None, None, rotary_emb),
        lambda y: self.attn2(y, encoder_hidden_states, None, None),
    )  # fmt: skip


def skyreels_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
    attention_mask: Tensor | None,
) -> Tensor:
    """SkyReelsV2TransformerBlock: `temb` per token is `(B, 6, N, D)`, and self-attention takes a mask."""
    return _run(
        self, hidden_states, temb, 1,
        lambda y: self.attn1(y, None, attention_mask, rotary_emb),
        lambda y: self.attn2(y, encoder_hidden_states, None, None),
    )  # fmt: skip


def vace_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    control_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
) -> tuple[Tensor | None, Tensor]:
    """WanVACETransformerBlock: the same body on the control stream, between two optional projections."""
    if self.proj_in is not None:
        control_hidden_states = self.proj_in(control_hidden_states) + hidden_states
    x = _run(
        self, control_hidden_states, temb, 1,
        lambda y: self.attn1(y, None, None, rotary_emb),
        lambda y: self.attn2(y, encoder_hidden_states, None, None),
    )  # fmt: skip
    return (None if self.proj_out is None else self.proj_out(x)), x


def anyflow_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
    attention_mask: Any,
    kv_cache: Any = None,
    kv_cache_flag: Any = None,
) -> Tensor:
    """AnyFlowTransformerBlock: always per token, and attentions called by keyword."""
    cache = {} if kv_cache is None else {"kv_cache": kv_cache, "kv_cache_flag": kv_cache_flag}
    return _run(
        self, hidden_states, temb, 2,
        lambda y: self.attn1(hidden_states=y, rotary_emb=rotary_emb, attention_mask=attention_mask, **cache),
        lambda y: self.attn2(hidden_states=y, encoder_hidden_states=encoder_hidden_states),
    )  # fmt: skip


def helios_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
    original_context_length: int | None = None,
) -> Tensor:
    """HeliosTransformerBlock: the tokens of earlier frames may be left out of cross-attention."""
    return _run(
        self, hidden_states, temb, 2 if temb.ndim == 4 else 1,
        lambda y: self.attn1(y, None, None, rotary_emb, original_context_length),
        lambda y: self.attn2(y, encoder_hidden_states, None, None, original_context_length),
        tail=original_context_length if self.guidance_cross_attn else None,
    )  # fmt: skip


_TEXT_TOKENS = 512  # what follows the image tokens in the joint context of the image-to-video models


def _projections(attn: Any, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not attn.fused_projections:
        return attn.to_q(x), attn.to_k(context), attn.to_v(context)
    if hasattr(attn, "to_qkv"):
        return attn.to_qkv(x).chunk(3, dim=-1)
    return attn.to_q(x), *attn.to_kv(context).chunk(2, dim=-1)


def _image_projections(attn: Any, context: Tensor) -> tuple[Tensor, Tensor]:
    if attn.fused_projections:
        return attn.to_added_kv(context).chunk(2, dim=-1)
    return attn.add_k_proj(context), attn.add_v_proj(context)


class WanFusedProcessor(FusedProcessor):
    """WanAttnProcessor with the RMS norms across heads and RoPE in one pass."""

    _splits_cross_attention = False

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of the original processor."""
        image = None
        context = encoder_hidden_states
        if attn.add_k_proj is not None and context is not None:
            split = context.shape[1] - _TEXT_TOKENS
            image, context = context[:, :split], context[:, split:]
        parallel = self._parallel_config if context is None or self._splits_cross_attention else None

        heads = (attn.heads, -1)
        q, k, v = _projections(attn, hidden_states, hidden_states if context is None else context)
        q, k, v = q.unflatten(2, heads), k.unflatten(2, heads), v.unflatten(2, heads)
        cos = sin = None
        if rotary_emb is not None:
            # of each pair the model reads the first cosine and the second sine
            cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]
        q, k = norm_and_rotate(attn, q, k, cos, sin, across_heads=True)

        def attend(k: Tensor, v: Tensor, mask: Tensor | None, parallel: Any) -> Tensor:
            out = self._dispatch(
                q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False, backend=self._attention_backend,
                parallel_config=parallel,
            )  # fmt: skip
            return out.flatten(2, 3).type_as(q)

        out = attend(k, v, attention_mask, parallel)
        if image is not None:
            k_image, v_image = _image_projections(attn, image)
            k_image = attn.norm_added_k(k_image).unflatten(2, heads)
            out = out + attend(k_image, v_image.unflatten(2, heads), None, parallel)
        return attn.to_out[1](attn.to_out[0](out))


class SkyReelsFusedProcessor(WanFusedProcessor):
    """SkyReelsV2AttnProcessor, which also splits cross-attention under context parallelism."""

    _splits_cross_attention = True


_MODELS = "diffusers.models.transformers.transformer_"
_SITES = ("attn1", "attn2", "ffn")


def _block(name: str, run: Callable[..., Any], fingerprint: str) -> Adapter:
    return Adapter(cls=_MODELS + name, forward=run, fingerprints=frozenset({fingerprint}), sites=_SITES)


BLOCKS = table(
    _block("wan:WanTransformerBlock", forward, "b66600ab3dce"),
    _block("wan_animate:WanTransformerBlock", forward, "b66600ab3dce"),
    _block("chronoedit:WanTransformerBlock", forward, "b66600ab3dce"),
    _block("wan_vace:WanVACETransformerBlock", vace_forward, "08bf72d9affd"),
    _block("skyreels_v2:SkyReelsV2TransformerBlock", skyreels_forward, "82bbf0d4bb01"),
    _block("helios:HeliosTransformerBlock", helios_forward, "8cf722a62b9c"),
    _block("anyflow:AnyFlowTransformerBlock", anyflow_forward, "1516f18e1054"),
    _block("anyflow_far:AnyFlowTransformerBlock", anyflow_forward, "1516f18e1054"),
)


def _processor(name: str, make: Callable[..., Any], fingerprint: str) -> Adapter:
    return Adapter(cls=_MODELS + name, forward=make, fingerprints=frozenset({fingerprint}), method="__call__")


PROCESSORS = table(
    _processor("wan:WanAttnProcessor", WanFusedProcessor, "20835aad4064"),
    _processor("wan_animate:WanAttnProcessor", WanFusedProcessor, "20835aad4064"),
    _processor("chronoedit:WanAttnProcessor", WanFusedProcessor, "20835aad4064"),
    _processor("skyreels_v2:SkyReelsV2AttnProcessor", SkyReelsFusedProcessor, "80932ca391d3"),
)

__all__ = ["BLOCKS", "PROCESSORS", "SkyReelsFusedProcessor", "WanFusedProcessor", "forward"]
