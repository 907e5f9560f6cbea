"""Tiny models with SD3 blocks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_sd3 import SD3SingleTransformerBlock

from .common import Built, made, randn

_CONFIG: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_attention_heads": 2,
    "attention_head_dim": 16, "caption_projection_dim": 32, "joint_attention_dim": 24, "pooled_projection_dim": 16,
    "pos_embed_max_size": 16,
}  # fmt: skip


def _inputs() -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 8, 6), "encoder_hidden_states": randn(2, 5, 24, seed=1),
        "pooled_projections": randn(2, 16, seed=2), "timestep": torch.tensor([1, 700]),
    }  # fmt: skip


def sd3() -> Built:
    """SD3: no QK norm; the last block keeps no text."""
    return made(SD3Transformer2DModel, **_CONFIG), _inputs()


def sd35() -> Built:
    """SD3.5: QK norm, and two attentions in some blocks."""
    return made(SD3Transformer2DModel, **_CONFIG, qk_norm="rms_norm", dual_attention_layers=(0, 1)), _inputs()


def wide_block() -> Built:
    """One dual-attention block of a real width, odd token counts."""
    sizes = {"dim": 288, "num_attention_heads": 4, "attention_head_dim": 72}
    block = made(JointTransformerBlock, **sizes, qk_norm="rms_norm", use_dual_attention=True)
    return block, {
        "hidden_states": randn(2, 37, 288), "encoder_hidden_states": randn(2, 11, 288, seed=1),
        "temb": randn(2, 288, seed=2),
    }  # fmt: skip


def single_block() -> Built:
    """The ControlNet's block without text."""
    block = made(SD3SingleTransformerBlock, dim=32, num_attention_heads=2, attention_head_dim=16)
    return block, {"hidden_states": randn(2, 13, 32), "temb": randn(2, 32, seed=2)}
