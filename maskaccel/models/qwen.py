"""Qwen-Image and its Edit models: two streams with joint attention.

adaLN-Zero on each stream, rounding narrowly. Edit models condition on a clean image next to the noisy one: modulation
is projected for both timesteps, and every token picks one of the two rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import norm_modulate
from ._adapter import Adapter, table
from ._attention import FusedProcessor, complex_table, derived, norm_and_rotate
from ._parts import add_gated_then_mlp, norm_options, recall


def _rows(index: Tensor, batch: int) -> Tensor:
    """Row of the `(2 * batch, D)` modulation that each token reads: the second half where `index` is not 0."""

    def make(index: Tensor) -> Tensor:
        sample = torch.arange(batch, device=index.device, dtype=torch.int32)
        return (index != 0).to(torch.int32) * batch + sample[:, None]

    return derived(index, f"_maskaccel_rows_{batch}", make)


def forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """QwenImageTransformerBlock with fused adaLN sites; returns (text, image)."""
    x, text = hidden_states, encoder_hidden_states
    image_mod = self.img_mod(temb)
    text_mod = self.txt_mod(temb.chunk(2, dim=0)[0] if self.zero_cond_t else temb)
    shift, scale, gate, *image_mlp = image_mod.chunk(6, dim=-1)
    text_shift, text_scale, text_gate, *text_mlp = text_mod.chunk(6, dim=-1)
    rows = None if modulate_index is None else _rows(modulate_index, image_mod.shape[0] // 2)

    attn = recall(self.attn, x, late=True)
    if attn is None:
        attn = self.attn(
            hidden_states=norm_modulate(x, scale, shift, rows=rows, law="narrow", **norm_options(self.img_norm1)),
            encoder_hidden_states=norm_modulate(
                text, text_scale, text_shift, law="narrow", **norm_options(self.txt_norm1)
            ),
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
    image_attn, text_attn = attn

    # fp16 is clipped to its finite range at the end of the block
    x = add_gated_then_mlp(x, image_attn, gate, self.img_norm2, self.img_mlp, tuple(image_mlp), clip=True, rows=rows)
    text = add_gated_then_mlp(text, text_attn, text_gate, self.txt_norm2, self.txt_mlp, tuple(text_mlp), clip=True)
    return text, x


class QwenFusedProcessor(FusedProcessor):
    """QwenDoubleStreamAttnProcessor2_0 with QK norm and RoPE in one pass over each stream."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Joint attention of the original processor: text first."""
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states is None; joint attention needs the text stream")
        if attention_mask is not None:
            raise ValueError(
                "attention_mask is given; pass encoder_hidden_states_mask, from which the joint mask is built"
            )
        batch, image_tokens = hidden_states.shape[:2]
        text_tokens = encoder_hidden_states.shape[1]
        if encoder_hidden_states_mask is not None:
            image_mask = torch.ones((batch, image_tokens), dtype=torch.bool, device=hidden_states.device)
            attention_mask = torch.cat([encoder_hidden_states_mask, image_mask], dim=1)[:, None, None, :]

        heads = (-1, attn.inner_dim // attn.heads)
        q, k, v = (to(hidden_states).unflatten(-1, heads) for to in (attn.to_q, attn.to_k, attn.to_v))
        q_text, k_text, v_text = (
            to(encoder_hidden_states).unflatten(-1, heads) for to in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        image_table: tuple = (None, None)
        text_table: tuple = (None, None)
        if image_rotary_emb is not None:
            image_table, text_table = (complex_table(freqs) for freqs in image_rotary_emb)
        q, k = norm_and_rotate(attn, q, k, *image_table)
        q_text, k_text = norm_and_rotate(attn, q_text, k_text, *text_table, norms=("norm_added_q", "norm_added_k"))

        q = torch.cat([q_text, q], dim=1)
        out = self._dispatch(
            q, torch.cat([k_text, k], dim=1), torch.cat([v_text, v], dim=1), attn_mask=attention_mask, dropout_p=0.0,
            is_causal=False, backend=self._attention_backend, parallel_config=self._parallel_config,
        )  # fmt: skip
        out = out.flatten(2, 3).to(q.dtype)

        image_out = attn.to_out[0](out[:, text_tokens:].contiguous())
        if len(attn.to_out) > 1:
            image_out = attn.to_out[1](image_out)
        return image_out, attn.to_add_out(out[:, :text_tokens].contiguous())


_MODULE = "diffusers.models.transformers.transformer_qwenimage:"

BLOCKS = table(
    Adapter(
        cls=_MODULE + "QwenImageTransformerBlock",
        forward=forward,
        fingerprints=frozenset({"39d56a2ce793"}),
        sites=("attn", "img_mlp", "txt_mlp"),
    )
)
PROCESSORS = table(
    Adapter(
        cls=_MODULE + "QwenDoubleStreamAttnProcessor2_0",
        forward=QwenFusedProcessor,
        fingerprints=frozenset({"d1e5e0a289f2"}),
        method="__call__",
    )
)

__all__ = ["BLOCKS", "PROCESSORS", "QwenFusedProcessor", "forward"]
