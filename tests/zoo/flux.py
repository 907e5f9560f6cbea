"""Tiny models with Flux blocks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    FluxTransformer2DModel,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
)
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

from .common import Built, made, randn

_CONFIG: dict[str, Any] = {
    "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip


def _grid(height: int, width: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros(height, width), rows, columns], -1).reshape(-1, 3).float()


def _inputs(**more: Any) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 15, 4), "encoder_hidden_states": randn(2, 6, 24, seed=1), "img_ids": _grid(3, 5),
        "txt_ids": torch.zeros(6, 3), "timestep": torch.tensor([0.3, 0.8]), **more,
    }  # fmt: skip


def flux() -> Built:
    """Flux with a guidance embedding."""
    model = made(FluxTransformer2DModel, **_CONFIG, pooled_projection_dim=16, guidance_embeds=True)
    return model, _inputs(pooled_projections=randn(2, 16, seed=2), guidance=torch.tensor([3.5, 2.0]))


def chroma() -> Built:
    """Chroma with a padding mask."""
    approximator = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    model = made(ChromaTransformer2DModel, **_CONFIG, **approximator)
    mask = torch.ones(2, 21)
    mask[1, 3:6] = 0
    return model, _inputs(attention_mask=mask)


def bria() -> Built:
    """Bria."""
    model = made(BriaTransformer2DModel, **{**_CONFIG, "axes_dims_rope": [0, 8, 8]}, pooled_projection_dim=None)
    return model, _inputs()


def bria_fibo() -> Built:
    """Bria-Fibo: text features of every layer."""
    config = {**_CONFIG, "axes_dims_rope": [0, 8, 8], "joint_attention_dim": 32}
    model = made(BriaFiboTransformer2DModel, **config, pooled_projection_dim=None, text_encoder_dim=16)
    layers = [randn(2, 6, 16, seed=4 + i) for i in range(4)]
    return model, _inputs(encoder_hidden_states=randn(2, 6, 32), text_encoder_layers=layers)


def longcat_image() -> Built:
    """LongCat-Image."""
    return made(LongCatImageTransformer2DModel, **_CONFIG, pooled_projection_dim=16), _inputs()


def ovis_image() -> Built:
    """Ovis-Image: SwiGLU in both kinds of block."""
    return made(OvisImageTransformer2DModel, **_CONFIG, out_channels=4), _inputs()


def _rotary(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(tokens).float(), 100.0 ** -torch.linspace(0, 1, dim // 2))
    return angles.cos().repeat_interleave(2, 1), angles.sin().repeat_interleave(2, 1)


def wide_block() -> Built:
    """One dual-stream block of a real width, 4 heads of 72, odd token counts."""
    block = made(FluxTransformerBlock, dim=288, num_attention_heads=4, attention_head_dim=72)
    return block, {
        "hidden_states": randn(2, 37, 288), "encoder_hidden_states": randn(2, 11, 288, seed=1),
        "temb": randn(2, 288, seed=2), "image_rotary_emb": _rotary(48, 72),
    }  # fmt: skip


def wide_single_block() -> Built:
    """One single-stream block of a real width."""
    block = made(FluxSingleTransformerBlock, dim=256, num_attention_heads=2, attention_head_dim=128)
    return block, {
        "hidden_states": randn(2, 37, 256), "encoder_hidden_states": randn(2, 11, 256, seed=1),
        "temb": randn(2, 256, seed=2), "image_rotary_emb": _rotary(48, 128),
    }  # fmt: skip
