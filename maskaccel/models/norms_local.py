"""The adaLN norm modules that single diffusers model files define, output layers included.

Each keeps its model's chunk order, rows and rounding law. Helios, Wan-Animate 2 and Mochi modulate in fp32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..ops import norm_modulate
from ._adapter import Adapter, table
from ._parts import exact_norm_options, modulated_norm, norm_options


def _original(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)


def _fits(x: Tensor, *mods: Tensor | None) -> bool:
    """The modulation does not widen x: eager arithmetic would keep its dtype."""
    return x.dim() == 3 and all(m is None or torch.promote_types(m.dtype, x.dtype) == x.dtype for m in mods)


# ---------------------------------------------------------------- norm modules


def shift_only(self: Any, x: Tensor, emb: Tensor) -> Tensor:
    """HunyuanDiT's AdaLayerNormShift: an affine norm and a shift."""
    shift = self.linear(self.silu(emb.to(torch.float32)).to(emb.dtype))
    return modulated_norm(self.norm, x, None, shift)


def sana(self: Any, hidden_states: Tensor, temb: Tensor, scale_shift_table: Tensor) -> Tensor:
    """SanaModulatedNorm: table and embedding are added in registers."""
    options = exact_norm_options(self.norm, hidden_states)
    tables = scale_shift_table
    if options is None or not _fits(hidden_states, temb, tables):
        return _original(self, hidden_states, temb, tables)
    row = temb.to(tables.device)
    return norm_modulate(hidden_states, row, row, scale_table=tables[1], shift_table=tables[0], **options)


def chroma_zero(
    self: Any,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: Any = None,
    emb: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """ChromaAdaLayerNormZeroPruned: the modulation is given, `(B, 6, D)`."""
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, *rest = emb.flatten(1, 2).chunk(6, dim=1)  # type: ignore[union-attr]
    return (modulated_norm(self.norm, x, scale, shift), *rest)


def chroma_zero_single(self: Any, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
    """ChromaAdaLayerNormZeroSinglePruned: the modulation is given, `(B, 3, D)`."""
    shift, scale, gate = emb.flatten(1, 2).chunk(3, dim=1)
    return modulated_norm(self.norm, x, scale, shift), gate


def chroma_continuous(self: Any, x: Tensor, emb: Tensor) -> Tensor:
    """ChromaAdaLayerNormContinuousPruned: shift first."""
    shift, scale = emb.flatten(1, 2).to(x.dtype).chunk(2, dim=1)
    return modulated_norm(self.norm, x, scale, shift)


def cogview4_zero(self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
    """CogView4 and GLM-Image: image and text chunks alternate, no activation before the projection."""
    mods = self.linear(temb).chunk(12, dim=1)
    image, text = mods[0::2], mods[1::2]
    y = modulated_norm(self.norm, hidden_states, image[1], image[0])
    y_text = modulated_norm(self.norm_context, encoder_hidden_states, text[1], text[0])
    return (y, *image[2:], y_text, *text[2:])


def cogview4_continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """CogView4 and GLM-Image output norm: no activation before the projection."""
    scale, shift = self.linear(conditioning_embedding.to(x.dtype)).chunk(2, dim=1)
    return modulated_norm(self.norm, x, scale, shift)


def cosmos(self: Any, hidden_states: Tensor, embedded_timestep: Tensor, temb: Tensor | None = None) -> Tensor:
    """CosmosAdaLayerNorm (adaLN-LoRA), by sample or by token."""
    emb = self.linear_2(self.linear_1(self.activation(embedded_timestep)))
    emb = emb if temb is None else emb + temb[..., : 2 * self.embedding_dim]
    shift, scale = emb.chunk(2, dim=-1)
    return modulated_norm(self.norm, hidden_states, scale, shift)


def cosmos_zero(
    self: Any, hidden_states: Tensor, embedded_timestep: Tensor, temb: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """CosmosAdaLayerNormZero."""
    emb = self.linear_2(self.linear_1(self.activation(embedded_timestep)))
    emb = emb if temb is None else emb + temb
    shift, scale, gate = emb.chunk(3, dim=-1)
    return modulated_norm(self.norm, hidden_states, scale, shift), gate.unsqueeze(1) if emb.dim() == 2 else gate


def easyanimate_zero(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """EasyAnimateLayerNormZero: one affine norm for video and text."""
    shift, scale, gate, c_shift, c_scale, c_gate = self.linear(self.silu(temb)).chunk(6, dim=1)
    y = modulated_norm(self.norm, hidden_states, scale, shift)
    return y, modulated_norm(self.norm, encoder_hidden_states, c_scale, c_shift), gate, c_gate


def flux3(self: Any, hidden_states: Tensor, temb: Tensor) -> Tensor:
    """Flux3AdaLayerNorm: by token."""
    scale, shift = self.linear(self.act_fn(temb)).chunk(2, dim=-1)
    return modulated_norm(self.norm, hidden_states, scale, shift)


def helios(self: Any, hidden_states: Tensor, temb: Tensor, original_context_length: int) -> Tensor:
    """HeliosOutputNorm: fp32, by token, on the last tokens only."""
    x = hidden_states[:, -original_context_length:]
    row = temb[:, -original_context_length:].to(x.device)
    tables = self.scale_shift_table[0].to(x.device)
    options = {**norm_options(self.norm), "law": "fp32"}
    return norm_modulate(x, row, row, scale_table=tables[1], shift_table=tables[0], **options)


def _replaced_rows(x: Tensor, first: int) -> Tensor:
    """Row of two stacked modulations for each token: the replaced frame's own for the first tokens."""
    batch, tokens = x.shape[:2]
    sample = torch.arange(batch, device=x.device, dtype=torch.int32)[:, None]
    later = (torch.arange(tokens, device=x.device) >= first).to(torch.int32)[None]
    return sample + batch * later


def token_replace_zero(
    self: Any, hidden_states: Tensor, emb: Tensor, token_replace_emb: Tensor, first_frame_num_tokens: int
) -> tuple[Tensor, ...]:
    """HunyuanVideoTokenReplaceAdaLayerNormZero: the first frame has modulation of its own."""
    options = exact_norm_options(self.norm, hidden_states)
    if options is None or not _fits(hidden_states, emb, token_replace_emb):
        return _original(self, hidden_states, emb, token_replace_emb, first_frame_num_tokens)
    width = hidden_states.shape[-1]
    of_tokens = self.linear(self.silu(emb)).split(width, dim=1)
    of_replaced = self.linear(self.silu(token_replace_emb)).split(width, dim=1)
    shift, scale = (torch.cat([of_replaced[i], of_tokens[i]]) for i in (0, 1))
    rows = _replaced_rows(hidden_states, first_frame_num_tokens)
    y = norm_modulate(hidden_states, scale, shift, rows=rows, **options)
    return (y, *of_tokens[2:], *of_replaced[2:])


def mochi_scaled(self: Any, hidden_states: Tensor, scale: Tensor | None = None) -> Tensor:
    """MochiModulatedRMSNorm: the scale is the factor itself."""
    if hidden_states.dim() != 3:
        return _original(self, hidden_states, scale)
    return norm_modulate(hidden_states, scale, norm="rms", eps=self.norm.eps, offset=0.0, law="fp32")


def mochi_continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """MochiLayerNormContinuous: scale only."""
    scale = self.linear_1(self.silu(conditioning_embedding).to(x.dtype))
    return norm_modulate(x, scale, norm="rms", eps=self.norm.norm.eps, law="fp32")


def mochi_zero(self: Any, hidden_states: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
    """MochiRMSNormZero: scale only."""
    scale, *rest = self.linear(self.silu(emb)).chunk(4, dim=1)
    return (norm_modulate(hidden_states, scale, norm="rms", eps=self.norm.eps, law="fp32"), *rest)


def qwen21_continuous(
    self: Any, hidden_states: Tensor, conditioning_embedding: Tensor, target_token_mask: Tensor | None = None
) -> Tensor:
    """QwenImage21AdaLayerNormContinuous: scale only; with a mask, the other tokens read the last row."""
    scale = self.linear(self.silu(conditioning_embedding).to(hidden_states.dtype))
    if target_token_mask is None:
        return modulated_norm(self.norm, hidden_states, scale)
    options = exact_norm_options(self.norm, hidden_states)
    if options is None or not _fits(hidden_states, scale):
        return _original(self, hidden_states, conditioning_embedding, target_token_mask)
    samples = torch.arange(hidden_states.shape[0], device=hidden_states.device, dtype=torch.int32)[:, None]
    rows = torch.where(target_token_mask.view(1, -1), samples, scale.shape[0] - 1).to(torch.int32)
    return norm_modulate(hidden_states, scale, rows=rows, **options)


def proteina(self: Any, values: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
    """RFD4ProteinaAdaptiveNorm: the condition gives the factor itself, and a mask zeroes tokens."""
    options = exact_norm_options(self.norm, values)
    if options is None or values.dim() != 3 or condition.dim() not in (2, 3):
        return _original(self, values, condition, mask)
    normed = self.norm_cond(condition)
    gamma, beta = self.to_gamma(normed), self.to_beta(normed)
    return norm_modulate(values, gamma, beta, offset=0.0, **options) * mask[..., None]


def longcat_audio(self: Any, hidden_states: Tensor, embedding: Tensor) -> Tensor:
    """AudioDiTAdaLayerNormZeroFinal: scale first, by sample or by token."""
    scale, shift = self.linear(self.silu(embedding)).chunk(2, dim=-1)
    return modulated_norm(self.norm, hidden_states, scale, shift)


def minimax_h3(self: Any, hidden_states: Tensor, temb: Tensor, timestep_indices: Tensor) -> Tensor:
    """MiniMaxH3AdaLayerNormOut: each token names the row of its timestep."""
    options = exact_norm_options(self.norm, hidden_states)
    dtype = sys.modules[type(self).__module__].get_parameter_dtype(self.linear)  # type: ignore[attr-defined]
    wide = torch.promote_types(dtype, hidden_states.dtype)
    if options is None or hidden_states.dim() != 3 or wide != hidden_states.dtype:
        return _original(self, hidden_states, temb, timestep_indices)
    shift, scale = self.linear(silu(temb).to(dtype)).chunk(2, dim=-1)
    return norm_modulate(hidden_states, scale, shift, rows=timestep_indices.to(torch.int32), **options)


def ernie(self: Any, x: Tensor, conditioning: Tensor) -> Tensor:
    """ErnieImageAdaLNContinuous: tokens come first, `(N, B, D)`."""
    scale, shift = self.linear(conditioning).chunk(2, dim=-1)
    return modulated_norm(self.norm, x.transpose(0, 1), scale, shift).transpose(0, 1)


def auraflow(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """AuraFlowPreFinalBlock: modulation without a norm."""
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return norm_modulate(x, scale, shift, norm="none", law="narrow")


# ---------------------------------------------------------------- output layers: a modulated norm, then a projection


def scaled_final(
    self: Any,
    x: Tensor,
    c: Tensor | None = None,
    noise_mask: Tensor | None = None,
    c_noisy: Tensor | None = None,
    c_clean: Tensor | None = None,
) -> Tensor:
    """FinalLayer of Z-Image and Bria-Fibo-2: scale only. With a noise mask every token chooses between two rows."""
    if noise_mask is not None or c is None:
        return _original(self, x, c, noise_mask, c_noisy, c_clean)
    return self.linear(modulated_norm(self.norm_final, x, self.adaLN_modulation(c)))


def shifted_final(self: Any, x: Tensor, vec: Tensor) -> Tensor:
    """PRX's FinalLayer: shift first."""
    shift, scale = self.adaLN_modulation(vec).chunk(2, dim=1)
    return self.linear(modulated_norm(self.norm_final, x, scale, shift))


def hidream_final(self: Any, hidden_states: Tensor, temb: Tensor) -> Tensor:
    """HiDreamImageOutEmbed: shift first."""
    return shifted_final(self, hidden_states, temb)


def ideogram_final(self: Any, hidden_states: Tensor, conditioning: Tensor) -> Tensor:
    """Ideogram4FinalLayer: scale only, by sample (one row) or by token."""
    return self.linear(modulated_norm(self.norm_final, hidden_states, self.adaln_modulation(silu(conditioning))))


def krea2_final(self: Any, hidden_states: Tensor, temb: Tensor) -> Tensor:
    """Krea2FinalLayer: table plus embedding, on an fp32 RMS norm that multiplies by 1 + weight."""
    modulation = temb + self.scale_shift_table
    if not _fits(hidden_states, modulation):
        return _original(self, hidden_states, temb)
    scale, shift = modulation.chunk(2, dim=1)
    options = {"norm": "rms", "weight": self.norm.weight, "weight_offset": 1.0, "eps": self.norm.eps, "law": "fp32"}
    return self.linear(norm_modulate(hidden_states, scale, shift, **options))


def sana_wm_final(self: Any, x: Tensor, t: Tensor) -> Tensor:
    """Sana-WM's T2IFinalLayer: by frame, `t` is `(B, 1, F, D)`."""
    options = exact_norm_options(self.norm_final, x)
    tables = self.scale_shift_table
    row = t[:, 0]
    if options is None or t.shape[1] != 1 or not _fits(x, row, tables):
        return _original(self, x, t)
    return self.linear(norm_modulate(x, row, row, scale_table=tables[1], shift_table=tables[0], **options))


def wan_animate_head(self: Any, x: Tensor, e: Tensor) -> Tensor:
    """Head of Wan-Animate 2: fp32."""
    row, tables = e.float(), self.modulation[0]
    options = {**norm_options(self.norm), "law": "fp32"}
    return self.head(norm_modulate(x, row, row, scale_table=tables[1], shift_table=tables[0], **options))


def _adapter(module: str, name: str, forward: Callable[..., Any], *fingerprints: str) -> Adapter:
    cls = f"diffusers.models.transformers.{module}:{name}"
    return Adapter(cls=cls, forward=forward, fingerprints=frozenset(fingerprints))


_CHROMA, _HUNYUAN = "transformer_chroma", "transformer_hunyuan_video"

NORMS = table(
    _adapter("hunyuan_transformer_2d", "AdaLayerNormShift", shift_only, "c253188a2afd"),
    _adapter("sana_transformer", "SanaModulatedNorm", sana, "b99876702516"),
    _adapter("transformer_sana_video", "SanaModulatedNorm", sana, "2c289f87ab4d"),
    _adapter(_CHROMA, "ChromaAdaLayerNormZeroPruned", chroma_zero, "0bc7fbb4138b"),
    _adapter(_CHROMA, "ChromaAdaLayerNormZeroSinglePruned", chroma_zero_single, "e868200e7a32"),
    _adapter(_CHROMA, "ChromaAdaLayerNormContinuousPruned", chroma_continuous, "41f1ab62c5b6"),
    _adapter("transformer_cogview4", "CogView4AdaLayerNormZero", cogview4_zero, "51d1a9dee814"),
    _adapter("transformer_cogview4", "CogView4AdaLayerNormContinuous", cogview4_continuous, "0d1933ca4cc5"),
    _adapter("transformer_glm_image", "GlmImageAdaLayerNormZero", cogview4_zero, "51d1a9dee814"),
    _adapter("transformer_glm_image", "GlmImageAdaLayerNormContinuous", cogview4_continuous, "0d1933ca4cc5"),
    _adapter("transformer_cosmos", "CosmosAdaLayerNorm", cosmos, "bdbcd68f2d87"),
    _adapter("transformer_cosmos", "CosmosAdaLayerNormZero", cosmos_zero, "ffa03a77265c"),
    _adapter("transformer_easyanimate", "EasyAnimateLayerNormZero", easyanimate_zero, "d9cf932fd598"),
    _adapter("transformer_flux3", "Flux3AdaLayerNorm", flux3, "1f32b2315926"),
    _adapter("transformer_helios", "HeliosOutputNorm", helios, "3bd81e8dab57"),
    _adapter(_HUNYUAN, "HunyuanVideoTokenReplaceAdaLayerNormZero", token_replace_zero, "25eaa1efca68"),
    _adapter(_HUNYUAN, "HunyuanVideoTokenReplaceAdaLayerNormZeroSingle", token_replace_zero, "7f1597c9fb4d"),
    _adapter("transformer_mochi", "MochiModulatedRMSNorm", mochi_scaled, "82e6c67d2a0c"),
    _adapter("transformer_mochi", "MochiLayerNormContinuous", mochi_continuous, "4ec09a963424"),
    _adapter("transformer_mochi", "MochiRMSNormZero", mochi_zero, "bdaf627a9e09"),
    _adapter("transformer_qwenimage21", "QwenImage21AdaLayerNormContinuous", qwen21_continuous, "038695e75a0f"),
    _adapter("transformer_rfd4_proteina", "RFD4ProteinaAdaptiveNorm", proteina, "715b40c03d97"),
    _adapter("transformer_longcat_audio_dit", "AudioDiTAdaLayerNormZeroFinal", longcat_audio, "98cd2a7e6dca"),
    _adapter("transformer_minimax_h3", "MiniMaxH3AdaLayerNormOut", minimax_h3, "7f33b9951b42"),
    _adapter("transformer_ernie_image", "ErnieImageAdaLNContinuous", ernie, "aaf1057e16c4"),
    _adapter("auraflow_transformer_2d", "AuraFlowPreFinalBlock", auraflow, "3ff457248b5a"),
    _adapter("transformer_z_image", "FinalLayer", scaled_final, "d8e886083126"),
    _adapter("transformer_bria_fibo2", "FinalLayer", scaled_final, "d8e886083126"),
    _adapter("transformer_prx", "FinalLayer", shifted_final, "fc7026de823c"),
    _adapter("transformer_hidream_image", "HiDreamImageOutEmbed", hidream_final, "eb1eb692b621"),
    _adapter("transformer_ideogram4", "Ideogram4FinalLayer", ideogram_final, "f6afede24462"),
    _adapter("transformer_krea2", "Krea2FinalLayer", krea2_final, "d61ec2c29121"),
    _adapter("transformer_sana_wm", "T2IFinalLayer", sana_wm_final, "4c2ce01e8bb9"),
    _adapter("transformer_wan_animate_2", "Head", wan_animate_head, "6b26678e61ca"),
)
