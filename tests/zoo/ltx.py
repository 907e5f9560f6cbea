"""Tiny LTX-Video models."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock

from .common import Built, made, randint, randn

_CONFIG: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32,
    "num_layers": 2, "caption_channels": 24,
}  # fmt: skip
TOKENS = 2 * 3 * 3


def ltx() -> Built:
    """LTX-Video with prompts of two lengths; width 32 is padded by two in its RoPE tables."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {
        "hidden_states": randn(2, TOKENS, 4), "encoder_hidden_states": randn(2, 5, 24, seed=1),
        "timestep": torch.tensor([5, 700]), "encoder_attention_mask": mask, "num_frames": 2, "height": 3, "width": 3,
    }  # fmt: skip
    return made(LTXVideoTransformer3DModel, **_CONFIG), inputs


def ltx_per_token() -> Built:
    """Image-to-video: a timestep for every token."""
    model, inputs = ltx()
    return model, inputs | {"timestep": randint(1000, 2, TOKENS)}


def ltx_affine() -> Built:
    """With weights on the RMS norms."""
    _, inputs = ltx()
    return made(LTXVideoTransformer3DModel, **_CONFIG, norm_elementwise_affine=True), inputs


def wide_block() -> Built:
    """One block of real width over an odd number of tokens, angles of each head its own."""
    heads, head_dim, tokens = 4, 64, 37
    block = made(
        LTXVideoTransformerBlock, dim=256, num_attention_heads=heads, attention_head_dim=head_dim,
        cross_attention_dim=96,
    )  # fmt: skip
    angles = randn(2, tokens, 128, seed=3).repeat_interleave(2, dim=-1)
    inputs = {
        "hidden_states": randn(2, tokens, 256), "encoder_hidden_states": randn(2, 9, 96, seed=1),
        "temb": 0.3 * randn(2, 1, 6 * 256, seed=2), "image_rotary_emb": (angles.cos(), angles.sin()),
    }  # fmt: skip
    return block, inputs
