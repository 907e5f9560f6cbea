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

import maskaccel
from maskaccel.methods import FusedAdaLN

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


def _wan_vae() -> Any:
    return made(
        diffusers.AutoencoderKLWan, base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def _wan_transformer(seed: int = 0) -> Any:
    return made(
        diffusers.WanTransformer3DModel, seed, patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16,
        in_channels=4, out_channels=4, text_dim=24, freq_dim=32, ffn_dim=64, num_layers=2, cross_attn_norm=True,
        rope_max_seq_len=32,
    )  # fmt: skip


def _wan(**components: Any) -> Built:
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=_wan_vae(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=_wan_transformer(), **components,
    )  # fmt: skip
    return _ready(
        pipeline, **_text("prompt_embeds", "negative_prompt_embeds"), height=32, width=32, num_frames=5,
        output_type="latent",
    )  # fmt: skip


def wan() -> Built:
    """CFG sequential: two calls a step, named by `cache_context`."""
    return _wan()


def wan22() -> Built:
    """Two transformers: one for the noisy steps (half of the default ones), one for the rest."""
    return _wan(transformer_2=_wan_transformer(1), boundary_ratio=0.5)


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


def zimage() -> Built:
    """One stream of lists of samples; CFG batched."""
    transformer = made(
        diffusers.ZImageTransformer2DModel, all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32,
        n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24, axes_dims=[8, 4, 4],
        axes_lens=[64, 16, 16],
    )  # fmt: skip
    pipeline = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=_vae(shift_factor=0.0), text_encoder=None,
        tokenizer=None, transformer=transformer,
    )  # fmt: skip
    text = {"prompt_embeds": [randn(6, 24, seed=20)], "negative_prompt_embeds": [randn(3, 24, seed=21)]}
    return _ready(pipeline, **text, height=16, width=16, output_type="latent")


def lumina2() -> Built:
    """CFG sequential, and nobody names the branches."""
    transformer = made(
        diffusers.Lumina2Transformer2DModel, sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=2,
        num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=2, axes_dim_rope=(8, 4, 4),
        axes_lens=(32, 32, 32), cap_feat_dim=24,
    )  # fmt: skip
    pipeline = diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=_vae(shift_factor=0.0),
        text_encoder=None, tokenizer=None,
    )  # fmt: skip
    mask = torch.ones(1, 6, dtype=torch.bool)
    return _ready(
        pipeline, **_text("prompt_embeds", "negative_prompt_embeds"), prompt_attention_mask=mask,
        negative_prompt_attention_mask=mask, height=32, width=32, output_type="latent",
    )  # fmt: skip


def hunyuan_video() -> Built:
    """Guidance embedded: one call a step; two lists of blocks."""
    vae = made(
        diffusers.AutoencoderKLHunyuanVideo, in_channels=3, out_channels=3, latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )  # fmt: skip
    transformer = made(
        diffusers.HunyuanVideoTransformer3DModel, in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=16, num_layers=2, num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1,
        text_embed_dim=24, pooled_projection_dim=16, rope_axes_dim=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    nothing = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipeline = diffusers.HunyuanVideoPipeline(
        transformer=transformer, vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **nothing
    )
    return _ready(
        pipeline, **_text("prompt_embeds"), pooled_prompt_embeds=randn(1, 16), height=32, width=32, num_frames=5,
        prompt_attention_mask=torch.ones(1, 6).long(), output_type="latent",
    )  # fmt: skip


def hunyuan_video_cfg() -> Built:
    """HunyuanVideo with true CFG besides, sequential and named by `cache_context`."""
    pipeline, kwargs = hunyuan_video()
    return pipeline, kwargs | {
        "true_cfg_scale": 3.0, "negative_prompt_embeds": randn(1, 6, 24, seed=21),
        "negative_pooled_prompt_embeds": randn(1, 16, seed=1),
        "negative_prompt_attention_mask": torch.ones(1, 6).long(),
    }  # fmt: skip


def flux_img2img() -> Built:
    """Starts in the middle of the schedule: `strength` leaves out the first 40 percent of the steps."""
    base, kwargs = flux()
    pipeline = diffusers.FluxImg2ImgPipeline(**base.components)
    return _ready(pipeline, **kwargs, image=randn(1, 3, 16, 16, seed=5).sigmoid(), strength=0.6)


PIPELINES = {
    "dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux, "wan": wan, "qwen": qwen, "ltx": ltx, "zimage": zimage,
    "hunyuan_video": hunyuan_video, "hunyuan_video_cfg": hunyuan_video_cfg,
}  # fmt: skip

# Loops that a simple count of steps and calls does not fit: two transformers that take turns, a run that starts late,
# guidance whose branches have no names.
MORE_PIPELINES = {"wan22": wan22, "flux_img2img": flux_img2img, "lumina2": lumina2}


def sample(pipeline: Any, kwargs: dict[str, Any], *, seed: int = 0, steps: int = 6, **more: Any) -> Tensor:
    """The pipeline's result (latents, or an image) for one seed."""
    generator = torch.Generator().manual_seed(seed)
    out = pipeline(**{**kwargs, **more}, num_inference_steps=steps, generator=generator)[0]
    return torch.from_numpy(out.copy()) if isinstance(out, np.ndarray) else out


def check_runs(pipeline: Any, kwargs: dict[str, Any], plain: Tensor, method: Any, steps: int) -> list[dict[str, Any]]:
    """What holds for a method that remembers, alone and with fused blocks.

    Runs of one seed repeat, fused blocks agree, nothing is held after a run or warned about, and undo is exact.

    Returns:
        What the method says it did, alone and with fused blocks.
    """
    outs, found = [], []
    for methods in ([method], [method, FusedAdaLN()]):
        with maskaccel.patch(pipeline, methods) as patch:
            outs.append(sample(pipeline, kwargs, steps=steps))
            activity = patch.report().activity[method.name]
            assert activity["bytes held"] == 0 < activity["peak bytes"] and "warning" not in activity
            assert torch.equal(outs[-1], sample(pipeline, kwargs, steps=steps)), "two runs of one seed differ"
            found.append(activity)
    assert not torch.equal(outs[0], plain)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-3, atol=1e-3 * plain.abs().max().item())
    assert torch.equal(sample(pipeline, kwargs, steps=steps), plain), "remove() did not restore the pipeline"
    return found
