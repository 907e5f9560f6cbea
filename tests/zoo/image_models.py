"""Tiny image models that have no file of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .common import Built, randint, randn
from .shapes import (
    BOTH,
    CAPTIONS,
    CROSS,
    HEADS,
    LATENT,
    LAYERS,
    PATCHED,
    adder,
    image,
    ints,
    positions,
    text,
    tokens,
    video,
)

MODELS: dict[str, Callable[..., Built]] = {}
_add = adder(MODELS)

# ------------------------------------------------------------------------------- images, one stream

_add(
    "DiTTransformer2DModel", {**PATCHED, "num_embeds_ada_norm": 10},
    lambda: {"hidden_states": randn(2, 4, 8, 8), "timestep": ints(1, 7), "class_labels": ints(2, 5)},
)  # fmt: skip
_add(
    "PixArtTransformer2DModel", {**PATCHED, **CAPTIONS, "out_channels": 8, "use_additional_conditions": False},
    lambda: image(added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
)  # fmt: skip
_add("SanaTransformer2DModel", {**PATCHED, **CAPTIONS, **CROSS, "patch_size": 1}, image)
_add(
    "HunyuanDiT2DModel",
    {**HEADS, "num_layers": 4, "in_channels": 4, "sample_size": 8, "patch_size": 2, "hidden_size": 32,
     "cross_attention_dim": 24, "cross_attention_dim_t5": 24, "pooled_projection_dim": 8, "text_len": 6,
     "text_len_t5": 5, "activation_fn": "gelu-approximate"},
    lambda: image(
        timestep=torch.tensor([1.0, 7.0]), text_embedding_mask=torch.ones(2, 6), image_meta_size=randn(2, 6),
        encoder_hidden_states_t5=randn(2, 5, 24), text_embedding_mask_t5=torch.ones(2, 5), style=ints(0, 0),
        image_rotary_emb=[randn(16, 16), randn(16, 16, seed=1)]),
)  # fmt: skip
_add(
    "PRXTransformer2DModel",
    {"in_channels": 4, "patch_size": 2, "context_in_dim": 24, "hidden_size": 32, "num_heads": 2, "depth": 3,
     "axes_dim": [8, 8], "theta": 1000},
    lambda: image(timestep=torch.tensor([0.1, 0.7])),
)  # fmt: skip
_add(
    "PriorTransformer", {**HEADS, "num_layers": 2, "embedding_dim": 32, "num_embeddings": 7},
    lambda: {"hidden_states": randn(2, 32), "timestep": 2, "proj_embedding": randn(2, 32, seed=1), **text(2, 7, 32)},
)  # fmt: skip
_CONTINUOUS: dict[str, Any] = {**HEADS, "in_channels": 4, "num_layers": 2, "norm_num_groups": 2}
_add("Transformer2DModel", {**_CONTINUOUS, "cross_attention_dim": 24}, lambda: image(timestep=None))
_add(
    "DualTransformer2DModel", {**_CONTINUOUS, "cross_attention_dim": 24},
    lambda: image(timestep=None, **text(2, 77 + 257)),
)  # fmt: skip
_add("TransformerTemporalModel", _CONTINUOUS, lambda: {"hidden_states": randn(2, 4, 8, 8), "num_frames": 2})
_add(
    "DreamLiteTransformer2DModel", {**_CONTINUOUS, "cross_attention_dim": 24, "use_linear_projection": True},
    lambda: image(timestep=None),
)  # fmt: skip
_add(
    "LuminaNextDiT2DModel",
    {"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_kv_heads": 1,
     "num_attention_heads": 2, "multiple_of": 16, "learn_sigma": False, "qk_norm": True, "cross_attention_dim": 24},
    lambda: image(
        timestep=torch.tensor([0.1, 0.7]), encoder_mask=torch.ones(2, 6), cross_attention_kwargs={},
        image_rotary_emb=torch.polar(torch.ones(16, 16, 8), randn(16, 16, 8))),
)  # fmt: skip
_add(
    "BriaFibo2Transformer2DModel",
    {"in_channels": 4, "patch_size": 2, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
     "cap_feat_dim": 24, "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4,
     "max_num_gist_tokens": 8, "gist_step": 4, "gist_min_text_len": 4, "gist_max_text_len": 64,
     "axes_dims": (8, 4, 4), "axes_lens": (64, 16, 16)},
    lambda: image(
        1, timestep=torch.tensor([0.5]), encoder_hidden_states=randn(1, 2, 6, 24, seed=1),
        encoder_attention_mask=torch.ones(1, 6, dtype=torch.bool)),
)  # fmt: skip
_add(
    "Ideogram4Transformer2DModel",
    {**HEADS, "in_channels": 16, "num_layers": 2, "intermediate_size": 32, "adaln_dim": 16, "llm_features_dim": 24,
     "mrope_section": (4, 2, 2)},
    lambda: {
        "hidden_states": randn(1, 8, 16), **text(1, 8), "timestep": torch.tensor([0.5]),
        "position_ids": randint(8, 1, 8, 3), "segment_ids": torch.ones(1, 8).long(),
        "indicator": ints(1, 1, 1, 1, 2, 2, 2, 2)},
)  # fmt: skip
_add(
    "Krea2Transformer2DModel",
    {**HEADS, "in_channels": 16, "num_layers": 2, "num_key_value_heads": 1, "intermediate_size": 32,
     "timestep_embed_dim": 8, "text_hidden_dim": 16, "num_text_layers": 3, "text_num_attention_heads": 2,
     "text_num_key_value_heads": 1, "text_intermediate_size": 16, "num_layerwise_text_blocks": 1,
     "num_refiner_text_blocks": 1, "axes_dims_rope": (8, 4, 4)},
    lambda: {
        "hidden_states": randn(1, 4, 16), "encoder_hidden_states": randn(1, 4, 3, 16, seed=1),
        "timestep": torch.tensor([0.5]),
        "position_ids": torch.tensor([[0, 0, 0]] * 4 + [[0, y, x] for y in range(2) for x in range(2)]),
        "encoder_attention_mask": torch.ones(1, 4, dtype=torch.bool)},
)  # fmt: skip
_add(
    "ErnieImageTransformer2DModel",
    {**LATENT, "hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 32, "patch_size": 1,
     "text_in_dim": 24, "rope_axes_dim": (8, 4, 4)},
    lambda: {"hidden_states": randn(1, 4, 4, 4), "timestep": torch.tensor([0.5]), "text_bth": randn(1, 6, 24, seed=1),
             "text_lens": ints(6)},
)  # fmt: skip
_add(
    "OmniGenTransformer2DModel",
    {"in_channels": 4, "patch_size": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
     "intermediate_size": 32, "num_layers": 2, "pad_token_id": 0, "vocab_size": 32, "time_step_dim": 8,
     "pos_embed_max_size": 16,
     "rope_scaling": {"long_factor": list(range(1, 9)), "short_factor": list(range(1, 9))}},
    lambda: {
        "hidden_states": randn(1, 4, 8, 8), "timestep": torch.tensor([0.5]), "input_ids": randint(32, 1, 6),
        "input_img_latents": [], "input_image_sizes": {}, "attention_mask": torch.ones(1, 23, 23),
        "position_ids": torch.arange(23)[None]},
)  # fmt: skip

# ------------------------------------------------------------------------------- images, joint attention

_TXT: dict[str, Any] = {"joint_attention_dim": 24}
_add(
    "Flux2Transformer2DModel", {**BOTH, **_TXT, "patch_size": 1, "axes_dims_rope": (4, 4, 4, 4)},
    lambda: tokens(**positions(4), guidance=torch.tensor([3.5])),
)  # fmt: skip
_add(
    "Flux3Transformer2DModel",
    {**HEADS, **_TXT, "in_channels": 4, "cond_in_channels": 4, "num_layers": 1, "num_single_layers": 2,
     "axes_dims_rope": (4, 4, 4, 4)},
    lambda: tokens(**positions(4)),
)  # fmt: skip
_add(
    "AuraFlowTransformer2DModel",
    {**HEADS, **LATENT, **_TXT, "sample_size": 8, "patch_size": 2, "num_mmdit_layers": 2, "num_single_dit_layers": 2,
     "caption_projection_dim": 32, "pos_embed_max_size": 64},
    lambda: image(timestep=torch.tensor([0.1, 0.7])),
)  # fmt: skip
_JOY: dict[str, Any] = {
    "patch_size": [1, 2, 2], "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 24,
    "num_layers": 2, "rope_dim_list": [4, 6, 6], "theta": 256,
}  # fmt: skip
_add("JoyImageEditTransformer3DModel", _JOY, video)
_add(
    "JoyImageEditPlusTransformer3DModel", _JOY,
    lambda: video(hidden_states=randn(1, 2, 4, 1, 2, 2), shape_list=[[(1, 1, 1), (1, 1, 1)]]),
)  # fmt: skip
_add(
    "HiDreamImageTransformer2DModel",
    {**BOTH, "patch_size": 2, "caption_channels": [24, 12], "text_emb_dim": 16, "num_routed_experts": 2,
     "num_activated_experts": 2, "axes_dims_rope": (8, 4, 4), "max_resolution": (16, 16), "llama_layers": (0, 1, 1, 0),
     "force_inference_output": True},
    lambda: {
        "hidden_states": randn(2, 4, 8, 8), "timesteps": ints(1, 7),
        "encoder_hidden_states_t5": randn(2, 6, 24, seed=1), "pooled_embeds": randn(2, 16, seed=2),
        "encoder_hidden_states_llama3": randn(2, 2, 6, 12, seed=3)},
)  # fmt: skip


def _sizes() -> dict[str, Tensor]:
    size = torch.full((2, 2), 16)
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros(2, 2).long()}


_COGVIEW: dict[str, Any] = {**LAYERS, "patch_size": 2, "text_embed_dim": 24, "time_embed_dim": 16, "condition_dim": 4}
_add(
    "CogView3PlusTransformer2DModel", {**_COGVIEW, "pos_embed_max_size": 8, "sample_size": 8},
    lambda: image(**_sizes()),
)  # fmt: skip
_add("CogView4Transformer2DModel", _COGVIEW, lambda: image(**_sizes()))
_add(
    "GlmImageTransformer2DModel", {**_COGVIEW, "prior_vq_quantizer_codebook_size": 16},
    lambda: image(
        1, prior_token_id=randint(16, 1, 16), prior_token_drop=torch.zeros(1, 16, dtype=torch.bool),
        target_size=torch.full((1, 2), 16.0), crop_coords=torch.zeros(1, 2)),
)  # fmt: skip
_add(
    "HunyuanImageTransformer2DModel",
    {**BOTH, "num_refiner_layers": 1, "patch_size": (1, 1), "text_embed_dim": 24, "text_embed_2_dim": None,
     "rope_axes_dim": (8, 8)},
    lambda: image(1, timestep=torch.tensor([5.0]), encoder_attention_mask=torch.ones(1, 6)),
)  # fmt: skip
_GROUPED: dict[str, Any] = {**LAYERS, "axes_dims_rope": (8, 4, 4)}
_add(
    "NucleusMoEImageTransformer2DModel",
    {**_GROUPED, **_TXT, "in_channels": 16, "patch_size": 2, "num_key_value_heads": 2, "moe_enabled": False,
     "capacity_factors": [8.0, 8.0]},
    lambda: tokens(16, encoder_hidden_states_mask=torch.ones(1, 6).long(), img_shapes=[(1, 4, 4)]),
)  # fmt: skip
_add(
    "QwenImage21Transformer2DModel", {**_GROUPED, "patch_size": 1, "context_in_dim": 24, "causal_condition": True},
    lambda: tokens(img_shapes=[[(1, 4, 4)]], img_mask=torch.tensor([[False] * 6 + [True] * 4])),
)  # fmt: skip
