"""What the attention layers of papers share: projections, heads, and convolutions over tokens of a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])


def remembered(build: F) -> F:
    """`build`, once for each set of arguments: what depends on sizes and the device alone.

    Tensors made in inference mode could not be used in training later, so they are made outside of it.
    """
    cached = lru_cache(maxsize=128)(torch.inference_mode(False)(build))

    @wraps(build)
    def found(*args: Any) -> Any:
        return cached(*args)

    # Not traced into graphs. torch.compiler.disable sets this too, but imports the compiler.
    found._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast(F, found)


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A projection initialised as DiT's are: Xavier uniform, bias 0."""
    layer = nn.Linear(inputs, outputs, bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def head_dim(dim: int, heads: int) -> int:
    """Channels of a head, or ValueError."""
    if heads < 1 or dim < 1 or dim % heads:
        raise ValueError(f"heads={heads} must divide dim={dim}")
    return dim // heads


def split(projected: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """`(B, S, parts * C)` as `parts` views `(B, S, heads, C / heads)`."""
    return projected.unflatten(-1, (parts, heads, -1)).unbind(2)


def sizes(name: str, value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One size for each axis, or ValueError."""
    given = (value,) * axes if isinstance(value, int) else tuple(value)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in given)
    if len(given) != axes or not whole:
        raise ValueError(f"{name}={value!r} must be {axes} sizes of 1 or more")
    return given


def check_tokens(x: Tensor, dim: int, grid: Sequence[int]) -> None:
    """`x` is `(B, S, dim)` with the tokens of the grid."""
    if x.dim() != 3 or x.shape[2] != dim or x.shape[1] != math.prod(grid):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; on the grid {tuple(grid)} it must be (B, {math.prod(grid)}, {dim})"
        )


def on_grid(x: Tensor, grid: Sequence[int]) -> Tensor:
    """`(B, S, C)` as the channels-last view `(B, C, *grid)`."""
    return x.transpose(1, 2).unflatten(2, tuple(grid))


def off_grid(x: Tensor) -> Tensor:
    """`(B, C, *grid)` as `(B, S, C)`."""
    return x.flatten(2).transpose(1, 2)


def cut(x: Tensor, grid: Sequence[int], window: Sequence[int]) -> Tensor:
    """`(B, S, C)` on a grid of three axes as `(B, windows, w, windows, w, windows, w, C)`, padded with zeros."""
    missing = [(-n) % w for n, w in zip(grid, window)]
    x = x.unflatten(1, tuple(grid))
    if any(missing):
        x = nn.functional.pad(x, (0, 0, *(n for m in reversed(missing) for n in (0, m))))
    for axis, w in enumerate(window):
        x = x.unflatten(1 + 2 * axis, (-1, w))
    return x


def depthwise(channels: int, kernel: int) -> nn.Conv2d:
    """A depth-wise convolution that keeps the size of the grid."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel} must be odd")
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)


def convolve(convolution: nn.Module, x: Tensor, grid: Sequence[int]) -> Tensor:
    """A convolution over tokens `(B, S, C)` of a grid."""
    return off_grid(convolution(on_grid(x, grid)))
