"""Tiny diffusers pipelines with random weights, built offline: real loops, real schedulers, toy models.

`PIPELINES[name]()` returns `(pipeline, kwargs)`; `sample` runs one.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import numpy as np
import torch
from torch import Tensor

from .common import made, randn

Built = tuple[Any, dict[str, Any]]


def _vae(**config: Any) -> Any:
    return made(
        diffusers.AutoencoderKL, in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        layers_per_block=1, sample_size=16, **config,
    )  # fmt: skip


def _ready(pipeline: Any, **kwargs: Any) -> Built:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, kwargs


def _text(*names: str, width: int = 24) -> dict[str, Any]:
    return {name: randn(1, 6, width, seed=20 + i) for i, name in enumerate(names)}


def dit() -> Built:
    """Class-conditional, CFG batched; labels have 1000 classes because the pipeline says so."""
    transformer = made(
        diffusers.DiTTransformer2DModel, sample_size=8, num_layers=2, patch_size=2, attention_head_dim=16,
        num_attention_heads=2, in_channels=4, out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipeline = diffusers.DiTPipeline(transformer=transformer, vae=_vae(), scheduler=diffusers.DDIMScheduler())
    return _ready(pipeline, class_labels=[1, 2], output_type="np")


def pixart() -> Built:
    """CFG batched, cross-attention, a learned variance."""
    transformer = made(
        diffusers.PixArtTransformer2DModel, sample_size=8, num_layers=2, patch_size=2, attention_head_dim=16,
        num_attention_heads=2, in_channels=4, out_channels=8, cross_attention_dim=32, caption_channels=24,
        use_additional_conditions=False,
    )  # fmt: skip
    pipeline = diffusers.PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=_vae(), transformer=transformer, scheduler=diffusers.DDIMScheduler()
    )
    return _ready(
        pipeline, **_text("prompt_embeds", "negative_prompt_embeds"), prompt_attention_mask=torch.ones(1, 6),
        negative_prompt=None, negative_prompt_attention_mask=torch.ones(1, 6), height=16, width=16,
        output_type="latent", use_resolution_binning=False,
    )  # fmt: skip


def sd3() -> Built:
    """CFG batched, two streams."""
    transformer = made(
        diffusers.SD3Transformer2DModel, sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        num_attention_heads=2, attention_head_dim=16, caption_projection_dim=32, joint_attention_dim=24,
        pooled_projection_dim=16, pos_embed_max_size=16,
    )  # fmt: skip
    nothing = dict.fromkeys([f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")])
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=_vae(shift_factor=0.0),
        **nothing,
    )  # fmt: skip
    return _ready(
        pipeline, **_text("prompt_embeds", "negative_prompt_embeds"), pooled_prompt_embeds=randn(1, 16),
        negative_pooled_prompt_embeds=randn(1, 16, seed=1), height=16, width=16, output_type="latent",
    )  # fmt: skip


def flux() -> Built:
    """Guidance distilled: one call a step; two lists of blocks."""
    transformer = made(
        diffusers.FluxTransformer2DModel, patch_size=1, in_channels=16, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 4, 8),
        pooled_projection_dim=16,
    )  # fmt: skip
    nothing = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipeline = diffusers.FluxPipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=_vae(shift_factor=0.0),
        **nothing,
    )  # fmt: skip
    return _ready(
        pipeline, **_text("prompt_embeds"), pooled_prompt_embeds=randn(1, 16), height=16, width=16, output_type="latent"
    )


def wan() -> Built:
    """CFG sequential: two calls a step, named by `cache_context`."""
    vae = made(
        diffusers.AutoencoderKLWan, base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    transformer = made(
        diffusers.WanTransformer3DModel, patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16,
        in_channels=4, out_channels=4, text_dim=24, freq_dim=32, ffn_dim=64, num_layers=2, cross_attn_norm=True,
        rope_max_seq_len=32,
    )  # fmt: skip
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
    )  # fmt: skip
    return _ready(
        pipeline, **_text("prompt_embeds", "negative_prompt_embeds"), height=32, width=32, num_frames=5,
        output_type="latent",
    )  # fmt: skip


def qwen() -> Built:
    """True CFG, sequential and named by `cache_context`."""
    vae = made(
        diffusers.AutoencoderKLQwenImage, base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1,
        temperal_downsample=[False, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    transformer = made(
        diffusers.QwenImageTransformer2DModel, patch_size=2, in_channels=16, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipeline = diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None,
        transformer=transformer,
    )  # fmt: skip
    return _ready(
        pipeline, **_text("prompt_embeds", "negative_prompt_embeds"), true_cfg_scale=2.0, height=16, width=16,
        prompt_embeds_mask=torch.ones(1, 6, dtype=torch.int64), output_type="latent",
        negative_prompt_embeds_mask=torch.ones(1, 6, dtype=torch.int64),
    )  # fmt: skip


def ltx() -> Built:
    """Video, CFG batched."""
    vae = made(
        diffusers.AutoencoderKLLTXVideo, in_channels=3, out_channels=3, latent_channels=4,
        block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1,
        patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    transformer = made(
        diffusers.LTXVideoTransformer3DModel, in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=16, cross_attention_dim=32, num_layers=2, caption_channels=24,
    )  # fmt: skip
    pipeline = diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None,
        transformer=transformer,
    )  # fmt: skip
    return _ready(
        pipeline, **_text("prompt_embeds", "negative_prompt_embeds"), height=32, width=32, num_frames=9,
        prompt_attention_mask=torch.ones(1, 6, dtype=torch.int64), output_type="latent",
        negative_prompt_attention_mask=torch.ones(1, 6, dtype=torch.int64),
    )  # fmt: skip


PIPELINES = {"dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux, "wan": wan, "qwen": qwen, "ltx": ltx}


def sample(pipeline: Any, kwargs: dict[str, Any], *, seed: int = 0, steps: int = 6, **more: Any) -> Tensor:
    """The pipeline's result (latents, or an image) for one seed."""
    generator = torch.Generator().manual_seed(seed)
    out = pipeline(**{**kwargs, **more}, num_inference_steps=steps, generator=generator)[0]
    return torch.from_numpy(out.copy()) if isinstance(out, np.ndarray) else out
