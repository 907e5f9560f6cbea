"""Lumina-Image 2.0: RMS sandwiches with tanh gates, grouped-query attention."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import _sandwich
from ._adapter import Adapter, table
from ._attention import FusedProcessor, complex_table, norm_and_rotate


def forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    image_rotary_emb: Tensor | None,
    temb: Tensor | None = None,
) -> Tensor:
    """Lumina2TransformerBlock with fused adaLN sites."""
    norm1, modulation = self.norm1, _sandwich.Modulation()
    if self.modulation:
        modulation = _sandwich.Modulation(*norm1.linear(norm1.silu(temb)).chunk(4, dim=1))
        norm1 = norm1.norm
    norms = (norm1, self.norm2, self.ffn_norm1, self.ffn_norm2)
    if not _sandwich.can_fuse(hidden_states, norms, modulation):
        return type(self).forward(self, hidden_states, attention_mask, image_rotary_emb, temb)

    def attend(y: Tensor) -> Tensor:
        return self.attn(
            hidden_states=y,
            encoder_hidden_states=y,
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )

    return _sandwich.run(hidden_states, self.attn, attend, self.feed_forward, norms, modulation)


class Lumina2FusedProcessor(FusedProcessor):
    """Lumina2AttnProcessor2_0 with QK norm and RoPE in one pass."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> Tensor:
        """Attention of the original processor."""
        batch, tokens, _ = hidden_states.shape
        q = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        heads = (-1, q.shape[-1])
        k, v = (to(encoder_hidden_states).unflatten(-1, heads) for to in (attn.to_k, attn.to_v))
        dtype = q.dtype
        cos_sin: tuple = (None, None) if image_rotary_emb is None else complex_table(image_rotary_emb)
        q, k = norm_and_rotate(attn, q, k, *cos_sin)
        q, k = q.to(dtype), k.to(dtype)

        scale = attn.scale
        if base_sequence_length is not None:  # proportional attention
            scale *= math.sqrt(math.log(tokens, base_sequence_length))
        repeats = attn.heads // k.shape[2]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
        if attention_mask is not None:
            attention_mask = attention_mask.bool().view(batch, 1, 1, -1)

        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=scale)
        out = out.transpose(1, 2).flatten(2).type_as(q)
        return attn.to_out[1](attn.to_out[0](out))


_MODULE = "diffusers.models.transformers.transformer_lumina2:"

BLOCKS = table(
    Adapter(
        cls=_MODULE + "Lumina2TransformerBlock",
        forward=forward,
        fingerprints=frozenset({"137651ba1fe2"}),
        sites=("attn", "feed_forward"),
    )
)
PROCESSORS = table(
    Adapter(
        cls=_MODULE + "Lumina2AttnProcessor2_0",
        forward=Lumina2FusedProcessor,
        fingerprints=frozenset({"887580b8996d"}),
        method="__call__",
    )
)

__all__ = ["BLOCKS", "PROCESSORS", "Lumina2FusedProcessor", "forward"]
