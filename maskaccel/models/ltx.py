"""LTX-Video: adaLN-single on RMS norms without weights, rounding narrowly.

Cross-attention reads the residual itself, and is added without a gate. RoPE runs over the flat width: every head has
angles of its own. Image-to-video gives every token its own timestep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import norm_modulate
from ._adapter import Adapter, table
from ._attention import FusedProcessor, norm_and_rotate, readable
from ._parts import add_gated, add_gated_then_norm, add_some, norm_options, part_of, recall


def forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """LTXVideoTransformerBlock with fused adaLN sites; `temb` is `(B, 1, 6 D)`, or `(B, N, 6 D)` per token."""
    x = hidden_states
    tables = self.scale_shift_table
    wide = torch.promote_types(torch.promote_types(tables.dtype, temb.dtype), x.dtype)
    if wide != x.dtype or not readable(x, self.norm1, self.norm2):  # eager torch would leave the dtype of x
        return type(self).forward(self, x, encoder_hidden_states, temb, image_rotary_emb, encoder_attention_mask)
    tables = tables.to(temb.device).unbind(0)
    shift1, scale1, gate1, shift2, scale2, gate2 = temb.unflatten(2, (len(tables), -1)).unbind(2)

    attn = recall(self.attn1, x, late=True)
    if attn is None:
        options = dict(scale_table=tables[1], shift_table=tables[0], law="narrow", **norm_options(self.norm1))
        y = norm_modulate(x, scale1, shift1, **options)
        attn = self.attn1(hidden_states=y, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb)
    x = add_gated(x, attn, gate1, gate_table=tables[2], law="narrow")

    cross = recall(self.attn2, x, late=True)
    if cross is None:
        cross = self.attn2(
            x,
            encoder_hidden_states=encoder_hidden_states,
            image_rotary_emb=None,
            attention_mask=encoder_attention_mask,
        )

    mlp = recall(self.ff, x, late=True)
    options = dict(scale_table=tables[4], shift_table=tables[3], law="narrow", **norm_options(self.norm2))
    part = part_of(self.ff, x) if mlp is None and scale2.shape[1] == 1 else None
    if part is not None:
        x = add_gated(x, cross, law="narrow")
        return add_some(part, x, self.ff, gate2 + tables[5], scale2, shift2, **options)
    if mlp is None:
        x, y = add_gated_then_norm(x, cross, None, scale2, shift2, **options)
        mlp = self.ff(y)
    else:
        x = add_gated(x, cross, law="narrow")
    return add_gated(x, mlp, gate2, gate_table=tables[5], law="narrow")


class LTXFusedProcessor(FusedProcessor):
    """LTXVideoAttnProcessor with the RMS norms across heads and RoPE in one pass."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of the original processor."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            batch, tokens = context.shape[:2]
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])

        heads = (attn.heads, -1)
        q = attn.to_q(hidden_states).unflatten(2, heads)
        k, v = attn.to_k(context).unflatten(2, heads), attn.to_v(context).unflatten(2, heads)
        cos = sin = None
        if image_rotary_emb is not None:
            cos, sin = (t.unflatten(2, heads) for t in image_rotary_emb)
        q, k = norm_and_rotate(attn, q, k, cos, sin, across_heads=True)

        out = self._dispatch(
            q, k, v, attn_mask=attention_mask, dropout_p=0.0, is_causal=False, backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )  # fmt: skip
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).to(q.dtype)))


_MODULE = "diffusers.models.transformers.transformer_ltx:"

BLOCKS = table(
    Adapter(
        cls=_MODULE + "LTXVideoTransformerBlock",
        forward=forward,
        fingerprints=frozenset({"abcd1bbf6bb3"}),
        sites=("attn1", "attn2", "ff"),
    )
)
PROCESSORS = table(
    Adapter(
        cls=_MODULE + "LTXVideoAttnProcessor",
        forward=LTXFusedProcessor,
        fingerprints=frozenset({"5c456c41d1d3"}),
        method="__call__",
    )
)

__all__ = ["BLOCKS", "PROCESSORS", "LTXFusedProcessor", "forward"]
