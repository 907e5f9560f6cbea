"""Stable Diffusion 3 and 3.5: MMDiT blocks (Esser et al. 2024), with SD3.5-medium's second self-attention.

Narrow rounding. In a dual-attention block one norm feeds two modulated outputs, one for each attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import norm_modulate
from ._adapter import Adapter, table
from ._attention import FusedProcessor, norm_and_rotate
from ._parts import add_gated, add_gated_then_mlp, norm_options, recall


def _unsupported(block: Any) -> str | None:
    if block._chunk_size is not None:
        return "chunked feed-forward is on"
    if getattr(block.norm1, "emb", None) is not None or getattr(block.norm1_context, "emb", None) is not None:
        return "its norms embed the timestep themselves"
    return None


def forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The joint block with fused adaLN sites."""
    if self._chunk_size is not None:  # switched on after the patch
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
    kwargs = joint_attention_kwargs or {}
    x, c = hidden_states, encoder_hidden_states
    norm1, norm1_c = self.norm1, self.norm1_context
    mods = norm1.linear(norm1.silu(temb)).chunk(9 if self.use_dual_attention else 6, dim=1)

    attn, c_attn = recall(self.attn, x, late=True) or (None, None)
    attn2 = recall(self.attn2, x, late=True) if self.use_dual_attention else None
    y, y2 = _norm1(x, norm1, mods, attn is None, self.use_dual_attention and attn2 is None)
    if self.context_pre_only:  # last block: the text only feeds attention
        scale, shift = norm1_c.linear(norm1_c.silu(temb).to(c.dtype)).chunk(2, dim=1)
        c_mods: tuple[Tensor, ...] = (shift, scale)
    else:
        c_mods = norm1_c.linear(norm1_c.silu(temb)).chunk(6, dim=1)
    if attn is None:
        y_c = norm_modulate(c, c_mods[1], c_mods[0], law="narrow", **norm_options(norm1_c.norm))
        attn, c_attn = self.attn(hidden_states=y, encoder_hidden_states=y_c, **kwargs)

    gate = mods[2]
    if self.use_dual_attention:
        if attn2 is None:
            attn2 = self.attn2(hidden_states=y2, **kwargs)
        x = add_gated(x, attn, gate, law="narrow")
        attn, gate = attn2, mods[8]
    x = add_gated_then_mlp(x, attn, gate, self.norm2, self.ff, mods[3:6])
    if self.context_pre_only:
        return None, x
    c = add_gated_then_mlp(c, c_attn, c_mods[2], self.norm2_context, self.ff_context, c_mods[3:])
    return c, x


def _norm1(x: Tensor, norm1: Any, mods: tuple[Tensor, ...], first: bool, second: bool) -> tuple[Any, Any]:
    """Inputs of the two attentions, those that are needed, from one norm."""
    options = {"law": "narrow", **norm_options(norm1.norm)}
    if first and second:
        return norm_modulate(x, mods[1], mods[0], scale2=mods[7], shift2=mods[6], **options)  # type: ignore[return-value]
    return (
        norm_modulate(x, mods[1], mods[0], **options) if first else None,
        norm_modulate(x, mods[7], mods[6], **options) if second else None,
    )


def single_forward(self: Any, hidden_states: Tensor, temb: Tensor) -> Tensor:
    """SD3's ControlNet block without text."""
    x, norm1 = hidden_states, self.norm1
    mods = norm1.linear(norm1.silu(temb)).chunk(6, dim=1)
    attn = recall(self.attn, x, late=True)
    if attn is None:
        y = norm_modulate(x, mods[1], mods[0], law="narrow", **norm_options(norm1.norm))
        attn = self.attn(hidden_states=y, encoder_hidden_states=None)
    return add_gated_then_mlp(x, attn, mods[2], self.norm2, self.ff, mods[3:])


class FusedJointAttention(FusedProcessor):
    """SD3 attention with the QK norms of each stream in one pass; the image comes first."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Attend, as the original does."""
        batch, tokens = hidden_states.shape[:2]

        def heads(t: Tensor) -> Tensor:
            return t.view(batch, -1, attn.heads, t.shape[-1] // attn.heads)

        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(hidden_states)), heads(attn.to_v(hidden_states))
        q, k = norm_and_rotate(attn, q, k)
        if encoder_hidden_states is not None:
            c = encoder_hidden_states
            c_q, c_k, c_v = heads(attn.add_q_proj(c)), heads(attn.add_k_proj(c)), heads(attn.add_v_proj(c))
            c_q, c_k = norm_and_rotate(attn, c_q, c_k, norms=("norm_added_q", "norm_added_k"))
            q, k, v = (torch.cat(pair, dim=1) for pair in ((q, c_q), (k, c_k), (v, c_v)))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=False)
        out = out.transpose(1, 2).flatten(2).to(q.dtype)
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](out))
        out, c = out[:, :tokens], out[:, tokens:]
        if not attn.context_pre_only:
            c = attn.to_add_out(c)
        return attn.to_out[1](attn.to_out[0](out)), c


BLOCKS = table(
    Adapter(
        cls="diffusers.models.attention:JointTransformerBlock",
        forward=forward,
        fingerprints=frozenset({"f12a42101b07"}),
        sites=("attn", "attn2", "ff", "ff_context"),
        unsupported=_unsupported,
    ),
    Adapter(
        cls="diffusers.models.transformers.transformer_sd3:SD3SingleTransformerBlock",
        forward=single_forward,
        fingerprints=frozenset({"6350df9ef738"}),
        sites=("attn", "ff"),
    ),
)

PROCESSORS = table(
    Adapter(
        cls="diffusers.models.attention_processor:JointAttnProcessor2_0",
        forward=FusedJointAttention,
        fingerprints=frozenset({"42343d48f37f"}),
        method="__call__",
        idle=lambda attn: "no QK norm" if attn.norm_q is None and attn.norm_added_q is None else None,
    )
)
