"""Tiny models of the Wan family."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AnyFlowFARTransformer3DModel,
    AnyFlowTransformer3DModel,
    ChronoEditTransformer3DModel,
    HeliosTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from .common import Built, made, randint, randn

_CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
    "text_dim": 24, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32,
}  # fmt: skip
TOKENS = 2 * 3 * 3


def _inputs(frames: int = 2, channels: int = 4, text: int = 5) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, channels, frames, 6, 6),
        "timestep": torch.tensor([5, 700]),
        "encoder_hidden_states": randn(2, text, 24, seed=1),
    }


def wan() -> Built:
    """Wan 2.1 text-to-video."""
    return made(WanTransformer3DModel, **_CONFIG), _inputs()


def wan_without_cross_norm() -> Built:
    """Wan whose cross-attention reads the residual itself."""
    return made(WanTransformer3DModel, **_CONFIG | {"cross_attn_norm": False}), _inputs()


def wan_per_token() -> Built:
    """Wan 2.2 TI2V: a timestep for every token."""
    return made(WanTransformer3DModel, **_CONFIG), _inputs() | {"timestep": randint(1000, 2, TOKENS)}


def wan_image_to_video() -> Built:
    """Wan 2.1 image-to-video: key and value projections for image tokens."""
    model = made(WanTransformer3DModel, **_CONFIG, image_dim=16, added_kv_proj_dim=32)
    return model, _inputs(text=512) | {"encoder_hidden_states_image": randn(2, 5, 16, seed=2)}


def vace() -> Built:
    """Wan VACE: a control stream with projections before and after its blocks."""
    model = made(WanVACETransformer3DModel, **_CONFIG, vace_layers=[0], vace_in_channels=4)
    return model, _inputs() | {"control_hidden_states": randn(2, 4, 2, 6, 6, seed=3)}


def animate() -> Built:
    """Wan Animate."""
    model = made(
        WanAnimateTransformer3DModel, **_CONFIG | {"in_channels": 12, "attention_head_dim": 12}, latent_channels=4,
        image_dim=16, motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16,
        motion_style_dim=8, motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )  # fmt: skip
    inputs = {
        "hidden_states": randn(2, 12, 3, 4, 4), "timestep": torch.tensor([5, 70]),
        "encoder_hidden_states": randn(2, 6, 24, seed=1), "encoder_hidden_states_image": randn(2, 6, 16, seed=2),
        "pose_hidden_states": randn(2, 4, 2, 4, 4, seed=3), "face_pixel_values": randn(2, 3, 5, 16, 16, seed=4),
    }  # fmt: skip
    return model, inputs


def chronoedit() -> Built:
    """ChronoEdit."""
    return made(ChronoEditTransformer3DModel, **_CONFIG, rope_temporal_skip_len=8), _inputs()


def skyreels() -> Built:
    """SkyReels-V2."""
    return made(SkyReelsV2Transformer3DModel, **_CONFIG), _inputs()


def skyreels_diffusion_forcing() -> Built:
    """SkyReels-V2 with a timestep for every frame."""
    inputs = _inputs() | {"timestep": randint(1000, 2, 2), "enable_diffusion_forcing": True}
    return made(SkyReelsV2Transformer3DModel, **_CONFIG), inputs


def anyflow() -> Built:
    """AnyFlow."""
    config = {key: value for key, value in _CONFIG.items() if key != "attention_head_dim"}
    model = made(AnyFlowTransformer3DModel, **config, attention_head_dim=12, gate_value=0.25, deltatime_type="r")
    inputs = {
        "hidden_states": randn(2, 2, 4, 4, 4), "timestep": randn(2, 2).abs(), "r_timestep": randn(2, 2, seed=1).abs(),
        "encoder_hidden_states": randn(2, 6, 24, seed=1),
    }  # fmt: skip
    return model, inputs


def anyflow_far() -> Built:
    """AnyFlow with chunks of frames that see the earlier ones."""
    config = {key: value for key, value in _CONFIG.items() if key != "attention_head_dim"}
    model = made(
        AnyFlowFARTransformer3DModel, **config, attention_head_dim=12, gate_value=0.25, deltatime_type="r",
        compressed_patch_size=(1, 4, 4), full_chunk_limit=3,
    )  # fmt: skip
    inputs = {
        "hidden_states": randn(2, 4, 4, 8, 8), "timestep": randn(2, 4).abs(), "r_timestep": randn(2, 4, seed=1).abs(),
        "encoder_hidden_states": randn(2, 6, 24, seed=1), "chunk_partition": [2, 2],
    }  # fmt: skip
    return model, inputs


def helios(guidance_cross_attn: bool = True) -> Built:
    """Helios with frames of history, which cross-attention skips under guidance."""
    config = _CONFIG | {"attention_head_dim": 12}
    del config["rope_max_seq_len"]
    model = made(
        HeliosTransformer3DModel, **config, rope_dim=(4, 4, 4), has_multi_term_memory_patch=True,
        guidance_cross_attn=guidance_cross_attn, zero_history_timestep=True, is_amplify_history=False,
    )  # fmt: skip
    inputs = {
        "hidden_states": randn(2, 4, 2, 16, 16), "timestep": torch.tensor([5, 70]),
        "encoder_hidden_states": randn(2, 6, 24, seed=1), "indices_hidden_states": torch.tensor([[6.0, 7.0]] * 2),
        "indices_latents_history_short": torch.tensor([[5.0]] * 2),
        "indices_latents_history_mid": torch.tensor([[4.0]] * 2),
        "indices_latents_history_long": torch.arange(4.0).repeat(2, 1),
        "latents_history_short": randn(2, 4, 1, 16, 16, seed=2),
        "latents_history_mid": randn(2, 4, 1, 16, 16, seed=3), "latents_history_long": randn(2, 4, 4, 16, 16, seed=4),
    }  # fmt: skip
    return model, inputs


def wide_block() -> Built:
    """One block of real width over an odd number of tokens."""
    heads, head_dim, tokens = 4, 64, 37
    block = made(
        WanTransformerBlock, dim=heads * head_dim, ffn_dim=320, num_heads=heads, cross_attn_norm=True, eps=1e-6
    )
    angles = randn(1, tokens, 1, head_dim // 2, seed=3).repeat_interleave(2, dim=-1)
    inputs = {
        "hidden_states": randn(2, tokens, 256), "encoder_hidden_states": randn(2, 9, 256, seed=1),
        "temb": 0.3 * randn(2, 6, 256, seed=2), "rotary_emb": (angles.cos(), angles.sin()),
    }  # fmt: skip
    return block, inputs
