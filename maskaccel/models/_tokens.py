"""Where the tokens of a model's attention come from: their grid, and the place of text in joint sequences.

One row for each class of model that needs more than the defaults; what is not known is None, never guessed. The rows
say how to read a call of the model: shapes, and for packed latents the positions.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Given = Mapping[str, Any]  # the arguments of one call of a model, by name
Grid = tuple[int, ...]
Kind = Literal["self", "joint", "cross", "other"]

# Words in the names of modules whose attention is not that of the latent tokens.
_APART = re.compile(
    r"context_refiner|token_refiner|text_fusion|perceiver|adapter|pooler|audio_(attn|dec|text)|video_to_|av_cross|"
    r"image_cond|(^|_)te?xt_"
)
_CROSS = re.compile(r"(attn2|cross_attn|cross_attention|crossattn|audio_to_video_attn)$")


@dataclass(frozen=True)
class Tokens:
    """How to tell the tokens of one class of model.

    Attributes:
        text: Where joint attention has the text: before or after the latent tokens, or None where it is not known.
        joint: Whether the self-attention of its blocks runs over text (or other tokens) too.
        text_rows: Number of text tokens of a call; without it, all tokens that are not in the grid are text.
        grid: Given the model, a function that gives the grid of a call.
        axes: Axes of the grid in unpacked latents, batch included; None: those after the batch and the channels.
        positions: In place of `grid`: the argument with the positions of packed latents, and what cuts the positions
            `(latent tokens, axes of the grid)` out of it.
        own: Names of sites among latent tokens alone in a model with joint attention.
        apart: Names of sites of another kind.
    """

    text: Literal["first", "last"] | None = None
    joint: bool = False
    text_rows: Callable[[Given], int | None] | None = None
    grid: Callable[[nn.Module], Callable[[Given], Grid | None]] | None = None
    axes: tuple[int, ...] | None = None
    positions: tuple[str, Callable[[Tensor, Given], Tensor]] | None = None
    own: str | None = None
    apart: str | None = None


def parameters(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a model's forward, `self` left out."""
    return tuple(inspect.signature(type(model).forward).parameters)[1:]


def tokens_of(model: nn.Module) -> Tokens:
    """The row of a model; for a class without one: no text, and unpacked latents in the first argument."""
    found = _TABLE.get(type(model).__name__)
    if found is None:
        names = parameters(model)
        return Tokens(grid=_latents(names[0]) if names else None)
    return found if isinstance(found, Tokens) else found(model)


def kind_of(tokens: Tokens, name: str, module: Any) -> Kind:
    """The kind of an attention module, by its name within the model."""
    if tokens.apart is not None and re.search(tokens.apart, name):
        return "other"
    if _APART.search(name) and not name.endswith("audio_to_video_attn"):
        return "other"
    if _CROSS.search(name):
        # A second self-attention (SD3.5's dual attention) says of itself that it attends to no other stream.
        return "cross" if getattr(module, "is_cross_attention", True) else "self"
    if not tokens.joint or (tokens.own is not None and re.search(tokens.own, name)):
        return "self"
    return "joint"


# ------------------------------------------------------------------------------------------------ ways to read a call


def _patch(model: nn.Module, axes: int) -> Grid:
    """The size of a patch along the axes of the grid."""
    config = getattr(model, "config", None)
    size = getattr(model if config is None else config, "patch_size", None)
    for name in ("x_embedder", "patch_embed", "pos_embed"):
        size = size or getattr(getattr(model, name, None), "patch_size", None)
    sizes = tuple(size) if isinstance(size, tuple | list) else (size or 1,) * min(axes, 2)
    if axes == 3 and len(sizes) == 2:
        sizes = (getattr(config, "patch_size_t", None) or 1, *sizes)
    return sizes[-axes:]


def _latents(name: str, *axes: int) -> Callable[[nn.Module], Callable[[Given], Grid | None]]:
    """Unpacked latents and their axes of the grid; without axes `(B, C, H, W)` or `(B, C, F, H, W)`."""

    def make(model: nn.Module) -> Callable[[Given], Grid | None]:
        patches = [_patch(model, n) for n in range(4)]

        def grid(given: Given) -> Grid | None:
            latents = given.get(name)
            if not isinstance(latents, Tensor) or (not axes and latents.ndim not in (4, 5)):
                return None
            chosen = axes or tuple(range(2, latents.ndim))
            if chosen[-1] >= latents.ndim:
                return None
            return tuple(latents.shape[a] // p for a, p in zip(chosen, patches[len(chosen)], strict=True))

        return grid

    return make


def _extents(*names: str) -> Callable[[nn.Module], Callable[[Given], Grid | None]]:
    """Arguments that are the extents of the latents."""

    def make(model: nn.Module) -> Callable[[Given], Grid | None]:
        patch = _patch(model, len(names))

        def grid(given: Given) -> Grid | None:
            extents = [given.get(name) for name in names]
            return None if None in extents else tuple(n // p for n, p in zip(extents, patch, strict=True))

        return grid

    return make


def _image_shapes(model: nn.Module) -> Callable[[Given], Grid | None]:
    """A list of (frames, height, width), one such for each sample; None where a sample has several images."""

    def grid(given: Given) -> Grid | None:
        shapes = given.get("img_shapes")
        first = shapes[0] if shapes else None
        if isinstance(first, list):
            first = first[0] if len(first) == 1 else None
        if first is None or len(first) != 3:
            return None
        return tuple(first) if first[0] > 1 else tuple(first[1:])

    return grid


def _kandinsky(model: nn.Module) -> Callable[[Given], Grid | None]:
    """Latents with the channels last; sparse attention reorders their tokens."""
    unpacked = _latents("hidden_states", 1, 2, 3)(model)

    def grid(given: Given) -> Grid | None:
        reordered = (given.get("sparse_params") or {}).get("to_fractal")
        return None if reordered else unpacked(given)

    return grid


def _z_image(model: nn.Module) -> Callable[[Given], Grid | None]:
    """A list of latents `(C, F, H, W)`, one for each sample, and patch sizes in the call."""
    defaults = {name: p.default for name, p in inspect.signature(type(model).forward).parameters.items()}

    def grid(given: Given) -> Grid | None:
        samples = given.get("x")
        if not isinstance(samples, list) or any(getattr(x, "shape", 0) != samples[0].shape for x in samples):
            return None
        size, frames = (given.get(name, defaults.get(name, 1)) for name in ("patch_size", "f_patch_size"))
        _, f, h, w = samples[0].shape
        return (h // size, w // size) if f == 1 else (f // frames, h // size, w // size)

    return grid


def _plane(ids: Tensor, given: Given) -> Tensor:
    """Rows and columns of the positions `(tokens, columns)`, which may be given for each sample."""
    return (ids[0] if ids.ndim == 3 else ids)[:, 1:3]


def _krea(ids: Tensor, given: Given) -> Tensor:
    """Text has positions in the same tensor."""
    return ids[given["encoder_hidden_states"].shape[1] :, 1:]


def _rows(*names: str) -> Callable[[Given], int | None]:
    """The tokens of some arguments `(B, tokens, width)`, those that are given."""

    def rows(given: Given) -> int | None:
        return sum(given[name].shape[1] for name in names if given.get(name) is not None)

    return rows


def _of_one(given: Given) -> int | None:
    """All tokens that are not in the grid, of a single sample: with more, each has its latents after its own text."""
    return None if given["hidden_states"].shape[0] == 1 else -1


def _motif(model: nn.Module) -> Tokens:
    """The last blocks, the decoder, attend to what the others made of the latents, and to no text."""
    config: Any = model.config
    first = config.num_single_layers - config.num_decoder_layers
    decoder = "|".join(map(str, range(first, config.num_single_layers)))
    apart = rf"^single_transformer_blocks\.({decoder})\." if decoder else None
    return Tokens("last", joint=True, grid=_IMAGE, apart=apart)


def _on(*axes: int, **more: Any) -> Tokens:
    """Unpacked latents with the grid on these axes."""
    return Tokens(grid=_latents(_H, *axes), axes=axes, **more)


# ------------------------------------------------------------------------------------------------------- the models

_H = "hidden_states"
_TEXT = _rows("encoder_hidden_states")
_IMAGE = _latents(_H)
_FLUX = Tokens("first", joint=True, text_rows=_TEXT, positions=("img_ids", _plane))
_FIRST, _LAST = Tokens("first", joint=True, grid=_IMAGE), Tokens("last", joint=True, grid=_IMAGE)
_FRAMES_FIRST = _on(1, 3, 4)
_COGVIDEO = _on(1, 3, 4, text="first", joint=True)
_VIDEO_EXTENTS = Tokens(grid=_extents("num_frames", "height", "width"))
_UNKNOWN, _NONE = Tokens(joint=True), Tokens()

_TABLE: dict[str, Tokens | Callable[[nn.Module], Tokens]] = {
    # Text, then packed latents whose positions are given.
    "BriaFiboTransformer2DModel": _FLUX,
    "BriaTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _FLUX,
    "Flux2Transformer2DModel": _FLUX,
    "Flux3Transformer2DModel": Tokens(**{**vars(_FLUX), "own": r"^mode_blocks\.image\."}),
    "FluxTransformer2DModel": _FLUX,
    "LongCatImageTransformer2DModel": _FLUX,
    "OvisImageTransformer2DModel": _FLUX,
    "Krea2Transformer2DModel": Tokens("first", joint=True, text_rows=_TEXT, positions=("position_ids", _krea)),
    "QwenImageTransformer2DModel": Tokens("first", joint=True, text_rows=_TEXT, grid=_image_shapes),
    "QwenImage21Transformer2DModel": Tokens("first", joint=True, grid=_image_shapes),
    "NucleusMoEImageTransformer2DModel": Tokens("last", joint=True, text_rows=_TEXT, grid=_image_shapes),
    # Text (registers, time tokens), then latents.
    "AuraFlowTransformer2DModel": _FIRST,
    "BriaFibo2Transformer2DModel": Tokens("first", joint=True, grid=_IMAGE, own=r"^noise_refiner\."),
    "CogView3PlusTransformer2DModel": _FIRST,
    "CogView4Transformer2DModel": _FIRST,
    "EasyAnimateTransformer3DModel": _FIRST,
    "GlmImageTransformer2DModel": _FIRST,
    "OmniGenTransformer2DModel": _FIRST,
    "PRXTransformer2DModel": _FIRST,
    "CogVideoXTransformer3DModel": _COGVIDEO,
    "ConsisIDTransformer3DModel": _COGVIDEO,
    "Lumina2Transformer2DModel": Tokens("first", joint=True, text_rows=_of_one, grid=_IMAGE, own=r"^noise_refiner\."),
    "StableAudioDiTModel": _on(2, text="first", joint=True),
    "StableAudio3DiTModel": _on(2, text="first", joint=True),
    "MiniMaxMusic3Transformer1DModel": _on(2, text="first", joint=True),
    # Latents, then text.
    "ErnieImageTransformer2DModel": _LAST,
    "HiDreamImageTransformer2DModel": _LAST,
    "HunyuanImageTransformer2DModel": _LAST,
    "HunyuanVideo15Transformer3DModel": _LAST,
    "HunyuanVideoTransformer3DModel": _LAST,
    "HunyuanVideoFramepackTransformer3DModel": Tokens(
        "last", joint=True, text_rows=_rows("encoder_hidden_states", "image_embeds"), grid=_IMAGE
    ),
    "JoyImageEditTransformer3DModel": _LAST,
    "JoyImageEditPlusTransformer3DModel": Tokens("last", joint=True, text_rows=_TEXT),
    "MochiTransformer3DModel": _LAST,
    "MotifVideoTransformer3DModel": _motif,
    "SD3Transformer2DModel": _LAST,
    "ZImageTransformer2DModel": Tokens("last", joint=True, grid=_z_image, own=r"^noise_refiner\."),
    # Joint, but where the text is differs from call to call.
    "Cosmos3OmniTransformer": _UNKNOWN,
    "Ideogram4Transformer2DModel": _UNKNOWN,
    "MiniMaxH3Transformer3DModel": _UNKNOWN,
    "PriorTransformer": _UNKNOWN,
    # No text in self-attention; latents in another layout than (B, C, H, W) or (B, C, F, H, W).
    "AceStepTransformer1DModel": _on(1),
    "AnyFlowTransformer3DModel": _FRAMES_FIRST,
    "AnyFlowFARTransformer3DModel": _FRAMES_FIRST,
    "Kandinsky5Transformer3DModel": Tokens(grid=_kandinsky, axes=(1, 2, 3)),
    "Kandinsky6Transformer3DModel": Tokens(grid=_kandinsky, axes=(1, 2, 3)),
    "Kandinsky6SRTransformer3DModel": _NONE,
    "LongCatAudioDiTTransformer": _on(1),
    "LTXVideoTransformer3DModel": _VIDEO_EXTENTS,
    "LTX2VideoTransformer3DModel": _VIDEO_EXTENTS,
    "TransformerTemporalModel": _NONE,
}
