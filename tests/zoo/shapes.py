"""Configurations and inputs that many tiny models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models import transformers
from torch import Tensor

from .common import Built, made, randn

Inputs = Callable[[], dict[str, Any]]


def adder(models: dict[str, Callable[..., Built]]) -> Callable[[str, dict[str, Any], Inputs], None]:
    """A function that adds the builder of a class of diffusers to a table; the builder takes changes of the config."""

    def add(name: str, config: dict[str, Any], inputs: Inputs) -> None:
        def build(**more: Any) -> Built:
            cls = getattr(transformers, name, None) or getattr(diffusers, name)
            return made(cls, **{**config, **more}), inputs()

        models[name] = build

    return add


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


def text(batch: int = 2, tokens: int = 6, width: int = 24) -> dict[str, Tensor]:
    return {"encoder_hidden_states": randn(batch, tokens, width, seed=1)}


# An image of 8 x 8 latents with 4 channels, a video of two such frames, and a sequence of 16 tokens.
def image(batch: int = 2, **more: Any) -> dict[str, Any]:
    return {"hidden_states": randn(batch, 4, 8, 8), **text(batch), "timestep": ints(1, 7)[:batch], **more}


def video(batch: int = 1, **more: Any) -> dict[str, Any]:
    return image(batch, **{"hidden_states": randn(batch, 4, 2, 8, 8), **more})


def tokens(width: int = 4, **more: Any) -> dict[str, Any]:
    return {"hidden_states": randn(1, 16, width), **text(1), "timestep": torch.tensor([0.5]), **more}


def positions(columns: int) -> dict[str, Tensor]:
    image = torch.zeros(16, columns)
    image[:, 1:3] = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    return {"img_ids": image, "txt_ids": torch.zeros(6, columns)}


HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
LATENT: dict[str, Any] = {"in_channels": 4, "out_channels": 4}
LAYERS: dict[str, Any] = {**HEADS, **LATENT, "num_layers": 2}
CAPTIONS: dict[str, Any] = {"cross_attention_dim": 32, "caption_channels": 24}
BOTH: dict[str, Any] = {**LAYERS, "num_single_layers": 2}
PATCHED: dict[str, Any] = {**LAYERS, "sample_size": 8, "patch_size": 2}
CROSS: dict[str, Any] = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16}
