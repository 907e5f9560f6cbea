"""A tiny model of every transformer class of diffusers: `MODELS[class name]()` gives `(model, kwargs)`.

The families with fused blocks have builders of their own, with more configurations; here is one of each class.
"""

from __future__ import annotations

from collections.abc import Callable

from . import flux, image_models, ltx, lumina2, qwen, sd3, video_models, wan, zimage
from .common import Built

MODELS: dict[str, Callable[..., Built]] = {
    "AnyFlowTransformer3DModel": wan.anyflow,
    "BriaFiboTransformer2DModel": flux.bria_fibo,
    "BriaTransformer2DModel": flux.bria,
    "ChromaTransformer2DModel": flux.chroma,
    "ChronoEditTransformer3DModel": wan.chronoedit,
    "FluxTransformer2DModel": flux.flux,
    "HeliosTransformer3DModel": wan.helios,
    "LTXVideoTransformer3DModel": ltx.ltx,
    "LongCatImageTransformer2DModel": flux.longcat_image,
    "Lumina2Transformer2DModel": lumina2.lumina2,
    "OvisImageTransformer2DModel": flux.ovis_image,
    "QwenImageTransformer2DModel": qwen.qwen,
    "SD3Transformer2DModel": sd3.sd3,
    "SkyReelsV2Transformer3DModel": wan.skyreels,
    "WanAnimateTransformer3DModel": wan.animate,
    "WanTransformer3DModel": wan.wan,
    "WanVACETransformer3DModel": wan.vace,
    "ZImageTransformer2DModel": zimage.zimage,
    **image_models.MODELS,
    **video_models.MODELS,
}
