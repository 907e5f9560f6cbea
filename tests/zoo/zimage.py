"""Tiny Z-Image models."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock

from .common import Built, made, randn

_CONFIG: dict[str, Any] = {
    "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 32, "n_layers": 2,
    "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 24, "axes_dims": [8, 4, 4],
    "axes_lens": [64, 16, 16],
}  # fmt: skip


def zimage() -> Built:
    """Z-Image on images and prompts of two sizes."""
    inputs = {
        "x": [randn(4, 1, 8, 8), randn(4, 1, 4, 8, seed=1)],
        "t": torch.tensor([0.3, 0.8]),
        "cap_feats": [randn(6, 24, seed=2), randn(3, 24, seed=3)],
    }
    return made(ZImageTransformer2DModel, **_CONFIG), inputs


def _wide(modulation: bool) -> Built:
    heads, dim, tokens = 4, 256, 37
    block = made(
        ZImageTransformerBlock, layer_id=0, dim=dim, n_heads=heads, n_kv_heads=heads, norm_eps=1e-5, qk_norm=True,
        modulation=modulation,
    )  # fmt: skip
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[1, 30:] = False
    angles = randn(2, tokens, dim // heads // 2, seed=3)
    inputs = {
        "x": randn(2, tokens, dim), "attn_mask": mask, "freqs_cis": torch.polar(torch.ones_like(angles), angles),
    }  # fmt: skip
    return block, inputs


def wide_block() -> Built:
    """One block of real width over an odd number of tokens."""
    block, inputs = _wide(modulation=True)
    return block, inputs | {"adaln_input": randn(2, 256, seed=4)}


def wide_block_noisy_and_clean() -> Built:
    """The same with two modulations, one of which each token takes."""
    block, inputs = _wide(modulation=True)
    noisy = (torch.arange(37) % 3 > 0).int().repeat(2, 1)
    noisy[1] = 1 - noisy[1]
    return block, inputs | {
        "noise_mask": noisy, "adaln_noisy": randn(2, 256, seed=4), "adaln_clean": randn(2, 256, seed=5),
    }  # fmt: skip


def wide_block_without_modulation() -> Built:
    """A refiner of text tokens."""
    return _wide(modulation=False)
