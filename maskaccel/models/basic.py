"""diffusers' BasicTransformerBlock as DiT and PixArt (and Latte) use it.

adaLN-Zero (DiT, Peebles and Xie 2023) and adaLN-single (PixArt-alpha, Chen et al. 2024). Both round narrowly.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops import norm_modulate
from ._adapter import Adapter, table
from ._parts import add_gated, add_gated_then_norm, add_some, norm_options, part_of, recall


def _unsupported(block: Any) -> str | None:
    if block.norm_type not in ("ada_norm_zero", "ada_norm_single"):
        return f"norm_type {block.norm_type!r} has no adaLN gates"
    if block.pos_embed is not None:
        return "it adds position embeddings inside the block"
    if block._chunk_size is not None:
        return "chunked feed-forward is on"
    if block.norm_type == "ada_norm_zero" and block.attn2 is not None:
        return "adaLN-Zero with cross-attention"
    return None


def forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """The block with fused adaLN sites."""
    extra = dict(cross_attention_kwargs or {})
    if hidden_states.ndim != 3 or extra.get("gligen") is not None:
        return type(self).forward(
            self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
            cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    extra.pop("gligen", None)
    if self.norm_type == "ada_norm_zero":
        return _zero(self, hidden_states, attention_mask, encoder_hidden_states, timestep, class_labels, extra)
    return _single(self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep, extra)


def _zero(self: Any, x: Tensor, attention_mask, encoder_hidden_states, timestep, class_labels, extra) -> Tensor:
    norm1: nn.Module = self.norm1
    emb = norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = norm1.linear(norm1.silu(emb)).chunk(6, dim=1)

    attn = recall(self.attn1, x, late=True)
    if attn is None:
        y = norm_modulate(x, scale_msa, shift_msa, law="narrow", **norm_options(norm1.norm))
        context = encoder_hidden_states if self.only_cross_attention else None
        attn = self.attn1(y, encoder_hidden_states=context, attention_mask=attention_mask, **extra)

    mlp = recall(self.ff, x, late=True)
    part = part_of(self.ff, x) if mlp is None else None
    if part is not None:
        x = add_gated(x, attn, gate_msa, law="narrow")
        return add_some(part, x, self.ff, gate_mlp, scale_mlp, shift_mlp, law="narrow", **norm_options(self.norm3))
    if mlp is None:
        x, y = add_gated_then_norm(x, attn, gate_msa, scale_mlp, shift_mlp, law="narrow", **norm_options(self.norm3))
        mlp = self.ff(y)
    else:
        x = add_gated(x, attn, gate_msa, law="narrow")
    return add_gated(x, mlp, gate_mlp, law="narrow")


def _single(
    self: Any, x: Tensor, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep, extra
) -> Tensor:
    temb = timestep.reshape(x.shape[0], 6, -1)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = temb.unbind(1)
    tables = self.scale_shift_table

    attn = recall(self.attn1, x, late=True)
    if attn is None:
        y = norm_modulate(
            x,
            scale_msa,
            shift_msa,
            scale_table=tables[1],
            shift_table=tables[0],
            law="narrow",
            **norm_options(self.norm1),
        )
        context = encoder_hidden_states if self.only_cross_attention else None
        attn = self.attn1(y, encoder_hidden_states=context, attention_mask=attention_mask, **extra)
    x = add_gated(x, attn, gate_msa, gate_table=tables[2], law="narrow")

    if self.attn2 is not None:  # reads the residual without a norm
        cross = recall(self.attn2, x, late=True)
        if cross is None:
            cross = self.attn2(
                x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask, **extra
            )
    else:
        cross = None

    mlp = recall(self.ff, x, late=True)
    options = dict(scale_table=tables[4], shift_table=tables[3], law="narrow", **norm_options(self.norm2))
    part = part_of(self.ff, x) if mlp is None else None
    if part is not None:
        x = x if cross is None else add_gated(x, cross, law="narrow")
        return add_some(part, x, self.ff, gate_mlp + tables[5], scale_mlp, shift_mlp, **options)
    if mlp is not None:
        x = x if cross is None else add_gated(x, cross, law="narrow")
    else:
        if cross is None:
            y = norm_modulate(x, scale_mlp, shift_mlp, **options)
        else:
            x, y = add_gated_then_norm(x, cross, None, scale_mlp, shift_mlp, **options)
        mlp = self.ff(y)
    return add_gated(x, mlp, gate_mlp, gate_table=tables[5], law="narrow")


BLOCKS = table(
    Adapter(
        cls="diffusers.models.attention:BasicTransformerBlock",
        forward=forward,
        fingerprints=frozenset({"fe4764e16c58"}),
        sites=("attn1", "attn2", "ff"),
        unsupported=_unsupported,
    )
)
