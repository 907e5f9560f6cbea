"""Tiny models of video, sound and other things that have no file of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .common import Built, randn
from .shapes import BOTH, CAPTIONS, CROSS, HEADS, LAYERS, PATCHED, adder, image, ints, text, tokens, video

MODELS: dict[str, Callable[..., Built]] = {}
_add = adder(MODELS)

# ------------------------------------------------------------------------------- video

_WAN: dict[str, Any] = {
    **LAYERS, "patch_size": (1, 2, 2), "text_dim": 24, "freq_dim": 32, "ffn_dim": 64, "cross_attn_norm": True,
}  # fmt: skip


def _wan_animate_2() -> dict[str, Any]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [randn(16, 2, 4, 4)], "timestep": torch.tensor([0.5]), "seq_len": 8,
        "encoder_hidden_states": [randn(6, 24, seed=1)], "condition_latents": [randn(20, 2, 4, 4, seed=2)],
        "encoder_hidden_states_image": randn(1, 4, 1280, seed=3), "kv_cache": WanAnimate2KVCache(num_layers=2),
        "kv_cache_mode": "extract", "offset_grid_sizes": torch.zeros(1, 3).long(),
    }  # fmt: skip


_add(
    "WanAnimate2Transformer3DModel",
    {"patch_size": (1, 2, 2), "text_len": 8, "in_dim": 36, "out_dim": 16, "dim": 64, "ffn_dim": 64, "freq_dim": 32,
     "text_dim": 24, "num_heads": 2, "num_layers": 2, "cross_attn_norm": True, "use_img_emb": True},
    _wan_animate_2,
)  # fmt: skip
_add(
    "AnyFlowFARTransformer3DModel",
    {**_WAN, "attention_head_dim": 12, "rope_max_seq_len": 32, "gate_value": 0.25, "deltatime_type": "r",
     "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3},
    lambda: video(
        hidden_states=randn(1, 4, 4, 8, 8), timestep=randn(1, 4).abs(), r_timestep=randn(1, 4, seed=1).abs(),
        chunk_partition=[2, 2]),
)  # fmt: skip
_KANDINSKY: dict[str, Any] = {
    "in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": 32, "ff_dim": 64, "num_visual_blocks": 2,
    "axes_dims": (8, 4, 4),
}  # fmt: skip
_KANDINSKY_TEXT: dict[str, Any] = {**_KANDINSKY, "in_text_dim": 24, "in_text_dim2": 16, "num_text_blocks": 1}


def _kandinsky(**more: Any) -> dict[str, Any]:
    return {"hidden_states": randn(1, 2, 8, 8, 4), **text(1), "timestep": torch.tensor([5.0]),
            "pooled_projections": randn(1, 16, seed=2), **more}  # fmt: skip


_add(
    "Kandinsky5Transformer3DModel", _KANDINSKY_TEXT,
    lambda: _kandinsky(
        text_rope_pos=torch.arange(6), visual_rope_pos=(torch.arange(2), torch.arange(4), torch.arange(4))),
)  # fmt: skip
_add(
    "Kandinsky6Transformer3DModel", {**_KANDINSKY_TEXT, "visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4},
    lambda: _kandinsky(audio_hidden_states=randn(1, 5, 4, seed=3)),
)  # fmt: skip
_add(
    "Kandinsky6SRTransformer3DModel", {**_KANDINSKY, "nabla_window": (1, 1, 1), "tile_sizes": ((8, 8),)},
    lambda: {"hidden_states": randn(1, 2, 16, 16, 9), "timestep": torch.tensor([5.0])},
)  # fmt: skip
_COGVIDEO: dict[str, Any] = {
    **LAYERS, "time_embed_dim": 8, "text_embed_dim": 24, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
    "patch_size": 2, "max_text_seq_length": 6,
}  # fmt: skip
_add("CogVideoXTransformer3DModel", _COGVIDEO, lambda: image(hidden_states=randn(2, 2, 4, 8, 8)))
_add(
    "ConsisIDTransformer3DModel",
    {**_COGVIDEO, "cross_attn_interval": 1, "is_kps": False, "is_train_face": True, "cross_attn_dim_head": 1,
     "cross_attn_num_heads": 1, "LFE_id_dim": 2, "LFE_vit_dim": 2, "LFE_depth": 5, "LFE_dim_head": 8,
     "LFE_num_heads": 2, "LFE_num_id_token": 1, "LFE_num_querie": 1, "LFE_output_dim": 21, "LFE_ff_mult": 1,
     "LFE_num_scale": 1},
    lambda: image(hidden_states=randn(2, 2, 4, 8, 8), id_cond=randn(2, 2), id_vit_hidden=[randn(2, 2, 2)]),
)  # fmt: skip
_add(
    "EasyAnimateTransformer3DModel",
    {**LAYERS, "mmdit_layers": 2, "patch_size": 2, "sample_height": 16, "sample_width": 16, "text_embed_dim": 24,
     "time_embed_dim": 8, "time_position_encoding_type": "3d_rope", "timestep_activation_fn": "silu"},
    lambda: video(2),
)  # fmt: skip


def _allegro() -> dict[str, Any]:
    positions = torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4))
    tables = tuple((randn(n, 8, seed=n).cos(), randn(n, 8, seed=n).sin()) for n in (2, 4, 5))
    return video(2, image_rotary_emb=(tables, tuple(positions.T[:, None])))


_add(
    "AllegroTransformer3DModel",
    {**LAYERS, "attention_head_dim": 24, "cross_attention_dim": 48, "caption_channels": 24, "sample_width": 8,
     "sample_height": 8, "sample_frames": 4},
    _allegro,
)  # fmt: skip
_add(
    "LatteTransformer3DModel",
    {**PATCHED, **CAPTIONS, "num_layers": 3, "out_channels": 8, "attention_bias": True, "norm_eps": 1e-6,
     "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
     "norm_elementwise_affine": False, "video_length": 2},
    lambda: video(2),
)  # fmt: skip
_add(
    "SanaVideoTransformer3DModel",
    {**LAYERS, **CROSS, "attention_head_dim": 12, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
     "caption_channels": 24, "sample_size": 8, "patch_size": (1, 2, 2), "qk_norm": "rms_norm_across_heads",
     "rope_max_seq_len": 32},
    video,
)  # fmt: skip
_add(
    "SanaWMTransformer3DModel",
    {"in_channels": 4, "num_layers": 3, "hidden_size": 48, "num_attention_heads": 2, "patch_size": (1, 1, 1),
     "softmax_every_n": 2, "linear_head_dim": 24, "conv_kernel_size": 4, "image_size": 64, "caption_channels": 24,
     "use_chunk_plucker_post_attn": False, "chunk_plucker_post_attn_blocks": 0},
    lambda: video(
        hidden_states=randn(1, 4, 2, 4, 4), timestep=torch.full((1, 1, 2), 5.0), mask=torch.ones(1, 6),
        encoder_hidden_states=randn(1, 1, 6, 24, seed=1)),
)  # fmt: skip
_add(
    "CosmosTransformer3DModel",
    {**LAYERS, "mlp_ratio": 2, "text_embed_dim": 24, "adaln_lora_dim": 4, "max_size": (4, 16, 16),
     "patch_size": (1, 2, 2), "concat_padding_mask": False, "extra_pos_embed_type": "learnable"},
    lambda: video(fps=30),
)  # fmt: skip
_HUNYUAN: dict[str, Any] = {
    **BOTH, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "text_embed_dim": 24,
    "pooled_projection_dim": 16, "rope_axes_dim": (4, 6, 6),
}  # fmt: skip


def _hunyuan(**more: Any) -> dict[str, Any]:
    return video(
        encoder_attention_mask=torch.ones(1, 6), pooled_projections=randn(1, 16, seed=2),
        guidance=torch.tensor([6.0]), **more,
    )  # fmt: skip


_add("HunyuanVideoTransformer3DModel", _HUNYUAN, _hunyuan)
_add(
    "HunyuanVideoFramepackTransformer3DModel",
    {**_HUNYUAN, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
    lambda: _hunyuan(
        indices_latents=torch.arange(2.0), image_embeds=randn(1, 5, 16, seed=3),
        latents_clean=randn(1, 4, 2, 8, 8, seed=4), indices_latents_clean=torch.arange(2.0),
        latents_history_2x=randn(1, 4, 2, 8, 8, seed=5), indices_latents_history_2x=torch.arange(2.0),
        latents_history_4x=randn(1, 4, 8, 8, 8, seed=6), indices_latents_history_4x=torch.arange(8.0)),
)  # fmt: skip
_add(
    "HunyuanVideo15Transformer3DModel",
    {**LAYERS, "num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 24, "text_embed_2_dim": 16,
     "image_embed_dim": 12, "rope_axes_dim": (4, 6, 6), "target_size": 16, "task_type": "t2v"},
    lambda: video(
        hidden_states=randn(1, 4, 1, 8, 8), timestep=torch.tensor([5.0]), encoder_attention_mask=torch.ones(1, 6),
        encoder_hidden_states_2=randn(1, 4, 16, seed=2), encoder_attention_mask_2=torch.ones(1, 4),
        image_embeds=randn(1, 3, 12, seed=3)),
)  # fmt: skip
_add(
    "MotifVideoTransformer3DModel",
    {**BOTH, "in_channels": 9, "num_single_layers": 3, "num_decoder_layers": 1, "text_embed_dim": 24,
     "image_embed_dim": 12, "rope_axes_dim": (4, 6, 6), "patch_size": 2},
    lambda: video(hidden_states=randn(1, 9, 2, 8, 8)),
)  # fmt: skip
_add(
    "MochiTransformer3DModel",
    {**HEADS, "in_channels": 4, "num_layers": 3, "patch_size": 2, "pooled_projection_dim": 16, "text_embed_dim": 24,
     "time_embed_dim": 8, "max_sequence_length": 8},
    lambda: video(2, encoder_attention_mask=torch.ones(2, 6, dtype=torch.bool)),
)  # fmt: skip

# ------------------------------------------------------------------------------- audio, video with audio, other

_AUDIO: dict[str, Any] = {
    "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
}  # fmt: skip
_LTX2: dict[str, Any] = {**LAYERS, **CAPTIONS, **_AUDIO, "rope_double_precision": False}
_add(
    "LTX2VideoTransformer3DModel", _LTX2,
    lambda: image(
        hidden_states=randn(2, 32, 4), audio_hidden_states=randn(2, 9, 4, seed=2),
        audio_encoder_hidden_states=randn(2, 6, 24, seed=3), timestep=torch.tensor([0.1, 0.7]),
        sigma=torch.tensor([0.1, 0.7]), encoder_attention_mask=torch.ones(2, 6, dtype=torch.bool), num_frames=2,
        height=4, width=4, fps=25.0, audio_num_frames=9),
)  # fmt: skip
_add(
    "SanaWMLTX2RefinerTransformer3DModel", _LTX2,
    lambda: tokens(video_rotary_emb=(randn(1, 16, 32), randn(1, 16, 32, seed=1))),
)  # fmt: skip
_add(
    "MiniMaxH3Transformer3DModel",
    {**HEADS, "hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1, "ffn_dim": 32, "in_channels": 4,
     "audio_in_channels": 6, "patch_size": (1, 2, 2), "text_dim": 24, "freq_dim": 8, "time_embed_hidden_dim": 24,
     "time_embed_dim": 16, "rope_freq_dim": 2},
    lambda: {
        "hidden_states": randn(2, 8, 16), "audio_hidden_states": randn(2, 6, 6, seed=1), **text(2, 4),
        "timestep": torch.tensor([0.0, 0.5]), "timestep_indices": ints(*[0] * 4, *[1] * 14),
        "token_tags": ints(*[0] * 4, *[1] * 8, *[2] * 6), "position_ids": randn(18, 3, seed=2),
        "text_indices": torch.arange(4), "video_indices": torch.arange(4, 12), "audio_indices": torch.arange(12, 18)},
)  # fmt: skip
_add(
    "Cosmos3OmniTransformer",
    {"head_dim": 16, "hidden_act": "relu2", "hidden_size": 32, "intermediate_size": 32, "latent_channel": 2,
     "latent_patch_size": 1, "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1,
     "patch_latent_dim": 2, "qk_norm_for_text": False, "rms_norm_eps": 1e-5, "rope_axes_dim": (4, 2, 2),
     "rope_theta": 1e8, "vocab_size": 32},
    lambda: {
        "input_ids": ints(1, 2), "text_indexes": ints(0, 1), "und_len": 2, "sequence_length": 3,
        "position_ids": torch.arange(3).repeat(3, 1), "vision_tokens": [randn(1, 2, 1, 1, 1)],
        "vision_token_shapes": [(1, 1, 1)], "vision_sequence_indexes": ints(2), "vision_mse_loss_indexes": ints(2),
        "vision_timesteps": torch.tensor([0.5]), "vision_noisy_frame_indexes": [ints(0)]},
)  # fmt: skip
_add(
    "AceStepTransformer1DModel",
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
     "num_key_value_heads": 1, "head_dim": 16, "in_channels": 24, "audio_acoustic_hidden_dim": 8, "patch_size": 2,
     "sliding_window": 16},
    lambda: {"hidden_states": randn(2, 8, 8), "timestep": torch.tensor([0.1, 0.7]), **text(2, 6, 32),
             "timestep_r": torch.tensor([0.1, 0.7]), "context_latents": randn(2, 8, 16, seed=2)},
)  # fmt: skip
_add(
    "StableAudio3DiTModel",
    {"io_channels": 8, "patch_size": 1, "embed_dim": 32, "depth": 2, "num_heads": 2, "cond_token_dim": 16,
     "global_cond_dim": 12, "local_add_cond_dim": 5, "timestep_features_dim": 16, "ff_mult": 2,
     "num_memory_tokens": 3, "use_differential_attention": False},
    lambda: {"hidden_states": randn(2, 8, 16), "timestep": torch.tensor([0.1, 0.7]), **text(2, 4, 16),
             "global_hidden_states": randn(2, 12, seed=2)},
)  # fmt: skip
_add(
    "StableAudioDiTModel",
    {**LAYERS, "sample_size": 8, "num_key_value_attention_heads": 2, "cross_attention_dim": 24, "time_proj_dim": 8,
     "global_states_input_dim": 8, "cross_attention_input_dim": 16},
    lambda: {"hidden_states": randn(2, 4, 8), "timestep": torch.tensor([0.5]), **text(2, 6, 16),
             "global_hidden_states": randn(2, 1, 8, seed=2), "rotary_embedding": (randn(9, 8), randn(9, 8, seed=1))},
)  # fmt: skip
_add(
    "LongCatAudioDiTTransformer",
    {"dit_dim": 64, "dit_depth": 2, "dit_heads": 4, "dit_text_dim": 24, "latent_dim": 8, "text_conv": False,
     "long_skip": False},
    lambda: tokens(
        8, encoder_attention_mask=torch.ones(1, 6, dtype=torch.bool),
        attention_mask=torch.ones(1, 16, dtype=torch.bool)),
)  # fmt: skip
_add(
    "MiniMaxMusic3Transformer1DModel",
    {**HEADS, "in_channels": 8, "condition_dim": 16, "num_layers": 2, "ff_inner_dim": 32, "rotary_dim": 8,
     "fourier_embedding_dim": 8},
    lambda: {"hidden_states": randn(1, 8, 24), "timestep": torch.tensor([0.5]), **text(1, 24, 16)},
)  # fmt: skip
_add(
    "MiniMaxMusic3RVQDepthDecoder",
    {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "audio_vocab_size": 16,
     "num_codebooks": 2},
    lambda: {"inputs_embeds": randn(1, 4, 32)},
)  # fmt: skip
_add(
    "T5FilmDecoder",
    {"input_dims": 8, "targets_length": 8, "d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 64},
    lambda: {"encodings_and_masks": [(randn(2, 6, 32), torch.ones(2, 6))], "decoder_input_tokens": randn(2, 8, 8),
             "decoder_noise_time": torch.tensor([0.1, 0.7])},
)  # fmt: skip
_add(
    "RFD4ProteinaTransformer",
    {"nlayers": 2, "token_dim": 32, "nheads": 2, "dim_cond": 16, "pair_repr_dim": 16, "latent_dim": 8,
     "token_type_emb_dim": 8, "cath_emb_dim": 8, "t_emb_dim": 16, "seq_sep_dim": 8, "tri_mult_c": 16,
     "feats_seq": ("xt_bb_ca", "xt_local_latents"), "feats_pair_repr": ("xt_bb_ca_pair_dists",),
     "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
     "feats_pair_cond": ("time_emb_bb_ca", "time_emb_local_latents")},
    lambda: {
        "bb_ca": randn(1, 6, 3), "local_latents": randn(1, 6, 8, seed=1), "bb_ca_time": torch.tensor([0.5]),
        "local_latents_time": torch.tensor([0.5]), "padding_mask": torch.ones(1, 6, dtype=torch.bool),
        "conditioning": dict.fromkeys(
            ("is_in_context_conditioning", "supports_local_latent"), torch.zeros(1, 6, dtype=torch.bool))},
)  # fmt: skip
