"""Tiny Lumina2 models."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel
from diffusers.models.transformers.transformer_lumina2 import Lumina2TransformerBlock

from .common import Built, made, randn

_CONFIG: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1,
    "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (8, 4, 4),
    "axes_lens": (32, 32, 32), "cap_feat_dim": 24,
}  # fmt: skip


def lumina2() -> Built:
    """Lumina2 with one key-value head for two query heads, and prompts of two lengths."""
    inputs = {
        "hidden_states": randn(2, 4, 6, 6), "timestep": torch.tensor([0.1, 0.7]),
        "encoder_hidden_states": randn(2, 5, 24, seed=1),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool),
    }  # fmt: skip
    return made(Lumina2Transformer2DModel, **_CONFIG), inputs


def wide_block(modulation: bool = True, dtype: torch.dtype = torch.complex128) -> Built:
    """One block of real width over an odd number of tokens; tables are complex128, as the model makes them."""
    heads, dim, tokens = 4, 256, 37
    block = made(
        Lumina2TransformerBlock, dim=dim, num_attention_heads=heads, num_kv_heads=2, multiple_of=16,
        ffn_dim_multiplier=0.5, norm_eps=1e-5, modulation=modulation,
    )  # fmt: skip
    angles = randn(2, tokens, dim // heads // 2, seed=3)
    inputs: dict[str, Any] = {
        "hidden_states": randn(2, tokens, dim), "attention_mask": None,
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles).to(dtype),
    }  # fmt: skip
    if modulation:
        inputs["temb"] = randn(2, 256, seed=4)
    return block, inputs
