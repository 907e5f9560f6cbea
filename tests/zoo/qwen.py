"""Tiny Qwen-Image models."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

from .common import Built, made, randn

_CONFIG: dict[str, Any] = {
    "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def _inputs(images: int, mask: bool) -> dict[str, Any]:
    shapes = [(1, 4, 3), (1, 2, 3)][:images]
    inputs: dict[str, Any] = {
        "hidden_states": randn(2, sum(h * w for _, h, w in shapes), 16),
        "encoder_hidden_states": randn(2, 5, 24, seed=1),
        "encoder_hidden_states_mask": None,
        "timestep": torch.tensor([0.5, 0.9]),
        "img_shapes": [shapes] * 2,
    }
    if mask:
        inputs["encoder_hidden_states_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return inputs


def qwen() -> Built:
    """Qwen-Image with prompts of two lengths."""
    return made(QwenImageTransformer2DModel, **_CONFIG), _inputs(1, mask=True)


def qwen_without_mask() -> Built:
    """Qwen-Image with prompts of one length."""
    return made(QwenImageTransformer2DModel, **_CONFIG), _inputs(1, mask=False)


def qwen_edit() -> Built:
    """Qwen-Image-Edit: noisy tokens, then those of a clean image with a modulation of its own."""
    return made(QwenImageTransformer2DModel, **_CONFIG, zero_cond_t=True), _inputs(2, mask=True)


def wide_block(zero_cond_t: bool = False) -> Built:
    """One block of real width over an odd number of tokens."""
    heads, head_dim, tokens, text = 4, 64, 37, 7
    block = made(
        QwenImageTransformerBlock, dim=heads * head_dim, num_attention_heads=heads, attention_head_dim=head_dim,
        zero_cond_t=zero_cond_t,
    )  # fmt: skip
    tables = tuple(torch.polar(torch.ones(n, head_dim // 2), randn(n, head_dim // 2, seed=n)) for n in (tokens, text))
    inputs: dict[str, Any] = {
        "hidden_states": randn(2, tokens, 256), "encoder_hidden_states": randn(2, text, 256, seed=1),
        "encoder_hidden_states_mask": None, "temb": randn(4 if zero_cond_t else 2, 256, seed=2),
        "image_rotary_emb": tables,
    }  # fmt: skip
    if zero_cond_t:
        inputs["modulate_index"] = (torch.arange(tokens) > 20).int().repeat(2, 1)
    return block, inputs
