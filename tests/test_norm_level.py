"""Norm modules replaced one by one: every adaLN norm class of diffusers, and models that no block adapter knows."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn
from zoo import flux, sd3
from zoo.common import Built, check_parity, made, randn

from maskaccel.methods import FusedAdaLN
from maskaccel.models import known_norms

D, TOKENS = 40, 9
NORMALIZATION = "diffusers.models.normalization"


def x(seed: int = 0, tokens: int = TOKENS, width: int = D) -> Tensor:
    """Rows of different mean and spread."""
    return randn(2, tokens, width, seed=seed) * (1 + 3 * randn(2, tokens, 1, seed=50 + seed).abs()) + randn(
        2, tokens, 1, seed=60 + seed
    )


def row(seed: int = 9, width: int = D) -> Tensor:
    return randn(2, width, seed=seed)


def per_token(seed: int = 9) -> Tensor:
    return randn(2, TOKENS, D, seed=seed)


def norm(module: str, name: str, *args: Any, **config: Any) -> nn.Module:
    cls = getattr(
        import_module(module if module.startswith("diffusers") else f"diffusers.models.transformers.{module}"), name
    )
    return made(lambda **given: cls(*args, **given), **config)


def plain(name: str, inputs: dict[str, Tensor], *args: Any, module: str = NORMALIZATION, **config: Any) -> Any:
    """A case: `module:name` of the class, and its builder."""
    return name, lambda: (norm(module, name, *args, **config), inputs)


def local(module: str, name: str, inputs: dict[str, Tensor], *args: Any, **config: Any) -> Any:
    return plain(name, inputs, *args, module=module, **config)


class WithEmbedding(nn.Module):
    """AdaLayerNormZero that embeds timestep and class, called as DiT calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = AdaLayerNormZero(D, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Any:
        return self.norm(x, timestep, torch.tensor([1, 2]), hidden_dtype=x.dtype)


COND = {"x": x(), "conditioning_embedding": row()}
HIDDEN_COND = {"hidden_states": x(), "conditioning_embedding": row()}
COG = {"x": x(), "context": x(1, 5), "emb": row(width=24)}
VIDEO = {"hidden_states": x(), "encoder_hidden_states": x(1, 5), "temb": row(width=24)}
REPLACE = {"hidden_states": x(), "emb": row(), "token_replace_emb": row(10), "first_frame_num_tokens": 4}
MASK = torch.tensor([0.0] * 4 + [1.0] * 5)

CASES: list[tuple[str, Callable[[], Built]]] = [
    plain("AdaLayerNorm", {"x": x(), "timestep": torch.tensor(3)}, D, 10),
    plain("AdaLayerNorm", {"x": x(), "temb": row()}, D, output_dim=2 * D, chunk_dim=1),
    plain("AdaLayerNorm", {"x": x(), "temb": row()}, D, norm_elementwise_affine=True, chunk_dim=1),
    plain("AdaLayerNormZero", {"x": x(), "emb": row()}, D),
    plain("AdaLayerNormZero", {"x": x(), "emb": row()}, D, norm_type="fp32_layer_norm", bias=False),
    ("AdaLayerNormZero", lambda: (made(WithEmbedding), {"x": x(), "timestep": torch.tensor([1, 7])})),
    plain("AdaLayerNormZeroSingle", {"x": x(), "emb": row()}, D),
    plain("SD35AdaLayerNormZeroX", {"hidden_states": x(), "emb": row()}, D),
    plain("LuminaRMSNormZero", {"x": x(), "emb": row()}, D, norm_eps=1e-5, norm_elementwise_affine=True),
    plain("AdaLayerNormContinuous", {"x": x(), "conditioning_embedding": row(width=24)}, D, 24),
    plain(
        "AdaLayerNormContinuous",
        {"x": x(), "conditioning_embedding": row()},
        D,
        D,
        elementwise_affine=False,
        norm_type="rms_norm",
    ),
    plain("LuminaLayerNormContinuous", COND, D, D, out_dim=12),
    plain("LuminaLayerNormContinuous", COND, D, D, norm_type="rms_norm"),
    plain("CogView3PlusAdaLayerNormZeroTextImage", COG, 24, D),
    plain("CogVideoXLayerNormZero", VIDEO, 24, D),
    local("hunyuan_transformer_2d", "AdaLayerNormShift", {"x": x(), "emb": row()}, D),
    local(
        "sana_transformer",
        "SanaModulatedNorm",
        {"hidden_states": x(), "temb": row(), "scale_shift_table": randn(2, D)},
        D,
    ),
    local(
        "transformer_sana_video",
        "SanaModulatedNorm",
        {"hidden_states": x(), "temb": per_token(), "scale_shift_table": randn(2, D)},
        D,
    ),
    local("transformer_chroma", "ChromaAdaLayerNormZeroPruned", {"x": x(), "emb": randn(2, 6, D)}, D),
    local("transformer_chroma", "ChromaAdaLayerNormZeroSinglePruned", {"x": x(), "emb": randn(2, 3, D)}, D),
    local("transformer_chroma", "ChromaAdaLayerNormContinuousPruned", {"x": x(), "emb": randn(2, 2, D)}, D, D),
    local("transformer_cogview4", "CogView4AdaLayerNormZero", VIDEO, 24, D),
    local("transformer_cogview4", "CogView4AdaLayerNormContinuous", COND, D, D),
    local("transformer_glm_image", "GlmImageAdaLayerNormZero", VIDEO, 24, D),
    local("transformer_glm_image", "GlmImageAdaLayerNormContinuous", COND, D, D),
    local(
        "transformer_cosmos",
        "CosmosAdaLayerNorm",
        {"hidden_states": x(), "embedded_timestep": row(), "temb": row(3, 3 * D)},
        D,
        8,
    ),
    local("transformer_cosmos", "CosmosAdaLayerNorm", {"hidden_states": x(), "embedded_timestep": per_token()}, D, 8),
    local(
        "transformer_cosmos",
        "CosmosAdaLayerNormZero",
        {"hidden_states": x(), "embedded_timestep": row(), "temb": row(3, 3 * D)},
        D,
        8,
    ),
    local(
        "transformer_cosmos", "CosmosAdaLayerNormZero", {"hidden_states": x(), "embedded_timestep": per_token()}, D, 8
    ),
    local("transformer_easyanimate", "EasyAnimateLayerNormZero", VIDEO, 24, D),
    local("transformer_flux3", "Flux3AdaLayerNorm", {"hidden_states": x(), "temb": per_token()}, D),
    local(
        "transformer_helios",
        "HeliosOutputNorm",
        {"hidden_states": x(), "temb": per_token(), "original_context_length": 6},
        D,
    ),
    local("transformer_hunyuan_video", "HunyuanVideoTokenReplaceAdaLayerNormZero", REPLACE, D),
    local("transformer_hunyuan_video", "HunyuanVideoTokenReplaceAdaLayerNormZeroSingle", REPLACE, D),
    local("transformer_mochi", "MochiModulatedRMSNorm", {"hidden_states": x(), "scale": randn(2, 1, D)}, 1e-6),
    local("transformer_mochi", "MochiLayerNormContinuous", COND, D, D),
    local("transformer_mochi", "MochiRMSNormZero", {"hidden_states": x(), "emb": row(width=24)}, 24, 4 * D),
    local(
        "transformer_qwenimage21",
        "QwenImage21AdaLayerNormContinuous",
        {"hidden_states": x(), "conditioning_embedding": row()},
        D,
        D,
    ),
    local(
        "transformer_qwenimage21",
        "QwenImage21AdaLayerNormContinuous",
        {"hidden_states": x(), "conditioning_embedding": randn(3, D), "target_token_mask": MASK.bool()},
        D,
        D,
    ),
    local(
        "transformer_rfd4_proteina",
        "RFD4ProteinaAdaptiveNorm",
        {"values": x(), "condition": x(1, TOKENS, 24), "mask": MASK.expand(2, TOKENS)},
        D,
        24,
        "layer_norm",
    ),
    local(
        "transformer_rfd4_proteina",
        "RFD4ProteinaAdaptiveNorm",
        {"values": x(), "condition": row(width=24), "mask": MASK.expand(2, TOKENS)},
        D,
        24,
        "layer_norm",
    ),
    local(
        "transformer_longcat_audio_dit", "AudioDiTAdaLayerNormZeroFinal", {"hidden_states": x(), "embedding": row()}, D
    ),
    local(
        "transformer_longcat_audio_dit",
        "AudioDiTAdaLayerNormZeroFinal",
        {"hidden_states": x(), "embedding": per_token()},
        D,
    ),
    local(
        "transformer_minimax_h3",
        "MiniMaxH3AdaLayerNormOut",
        {"hidden_states": x(), "temb": randn(3, 24), "timestep_indices": torch.tensor([0, 2, 2, 1, 0, 0, 1, 2, 1])},
        D,
        24,
        1e-5,
    ),
    local("transformer_ernie_image", "ErnieImageAdaLNContinuous", {"x": x().transpose(0, 1), "conditioning": row()}, D),
    local(
        "auraflow_transformer_2d", "AuraFlowPreFinalBlock", {"x": x(), "conditioning_embedding": row(width=24)}, D, 24
    ),
    local("transformer_z_image", "FinalLayer", {"x": x(), "c": row()}, D, 12),
    local(
        "transformer_z_image",
        "FinalLayer",
        {"x": x(), "noise_mask": MASK.expand(2, TOKENS), "c_noisy": row(), "c_clean": row(2)},
        D,
        12,
    ),
    local("transformer_bria_fibo2", "FinalLayer", {"x": x(), "c": row()}, D, 12),
    local("transformer_prx", "FinalLayer", {"x": x(), "vec": row()}, D, 2, 3),
    local("transformer_hidream_image", "HiDreamImageOutEmbed", {"hidden_states": x(), "temb": row()}, D, 2, 3),
    local(
        "transformer_ideogram4",
        "Ideogram4FinalLayer",
        {"hidden_states": x(), "conditioning": randn(2, 1, 24)},
        D,
        12,
        24,
    ),
    local("transformer_krea2", "Krea2FinalLayer", {"hidden_states": x(), "temb": randn(2, 1, D)}, D, 12, 1e-5),
    local("transformer_sana_wm", "T2IFinalLayer", {"x": x(), "t": randn(2, 1, 3, D)}, D, 1, 12),
    local("transformer_wan_animate_2", "Head", {"x": x(), "e": row()}, D, 3, (1, 2, 2)),
]


@pytest.mark.parametrize(("name", "build"), CASES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)])
def test_norm_module_is_exact(name: str, build: Callable[[], Built]) -> None:
    check_parity(build, expect={"fused norm": 2 if name == "MochiLayerNormContinuous" else 1})


def test_every_norm_adapter_has_a_case() -> None:
    assert {key.split(":")[1] for key in known_norms()} == {name for name, _ in CASES}


@pytest.mark.parametrize("build", [flux.flux, flux.ovis_image, sd3.sd35], ids=["flux", "ovis", "sd35"])
def test_model_without_block_adapters(build: Callable[[], Built]) -> None:
    report = check_parity(build, methods=FusedAdaLN(blocks=False, attention=False), expect={"fused block": 0})
    assert sum(report.sites.values()) > 4
