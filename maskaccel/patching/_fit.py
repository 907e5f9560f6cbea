"""Whether the modules that a method brings fit a model: width, dtype and device of its stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .transaction import PatchError


def width_of(model: nn.Module, method: str) -> int:
    """The width of a model's stream, as its config tells."""
    inner = getattr(model, "inner_dim", None)
    if isinstance(inner, int):
        return inner
    config: Any = getattr(model, "config", None) or {}
    for name in ("hidden_size", "inner_dim", "dim", "hidden_dim", "model_dim"):
        if isinstance(config.get(name), int):
            return config[name]
    heads, width = config.get("num_attention_heads"), config.get("attention_head_dim")
    if isinstance(heads, int) and isinstance(width, int):
        return heads * width
    raise PatchError(
        f"{method}: the width of {type(model).__name__} is not known; give reenter=maskaccel.patching.MaskToken(width)"
    )


def same_width(model: nn.Module, method: str, what: str, width: int) -> None:
    """What a method was given, or made for another model, fits the stream of this one, where its width is known."""
    try:
        found = width_of(model, method)
    except PatchError:
        return
    if found != width:
        raise PatchError(f"{method}: its {what} is {width} wide; the stream of {type(model).__name__} is {found}")


def moved_along(method: str, what: str, parameter: Tensor, rows: Tensor) -> None:
    """A method's own modules were cast and moved with the model, of which they are no part; autocast needs no cast."""
    cast = parameter.dtype == rows.dtype or torch.is_autocast_enabled(rows.device.type)
    if not cast or parameter.device != rows.device:
        raise ValueError(
            f"{method}: its {what} is {parameter.dtype} on {parameter.device}, the stream {rows.dtype} on {rows.device}"
            ". It is no part of the model: cast and move the method too, with .to(...)"
        )


def like_of(model: nn.Module) -> Tensor:
    """A tensor of the device and dtype of a model's parameters."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
