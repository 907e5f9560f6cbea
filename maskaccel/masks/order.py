"""The order of tokens on a grid: patches of neighbours next to each other make windows touch few tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def _sizes(name: str, values: Sequence[int], axes: int | None = None) -> tuple[int, ...]:
    sizes = tuple(values) if isinstance(values, Sequence) else ()
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in sizes)
    if not sizes or not whole or (axes is not None and len(sizes) != axes):
        count = "" if axes is None else f"{axes} "
        raise ValueError(f"{name}={values!r} must be {count}sizes of 1 or more")
    return sizes


@dataclass(frozen=True)
class TokenOrder:
    """Tokens of a grid, reordered so that patches of the grid are contiguous; tokens beside the grid keep their place.

    Attributes:
        grid: Sizes of the grid, such as (frames, height, width), in tokens; their product is the number of its tokens.
        patch: Sizes of a patch; None keeps raster order. Patches at the border may be smaller.
        prefix: Tokens before the grid (text), which stay first.
        suffix: Tokens after it, which stay last.
    """

    grid: tuple[int, ...]
    patch: tuple[int, ...] | None = None
    prefix: int = 0
    suffix: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", _sizes("grid", self.grid))
        if self.patch is not None:
            object.__setattr__(self, "patch", _sizes("patch", self.patch, len(self.grid)))
        for name in ("prefix", "suffix"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be 0 or more")

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.prefix + math.prod(self.grid) + self.suffix

    @property
    def is_raster(self) -> bool:
        """Whether nothing moves."""
        return self.patch is None or all(p == 1 for p in self.patch) or self.patch[1:] == self.grid[1:]

    @cached_property
    def permutation(self) -> Tensor:
        """int64 `(tokens,)`: row `i` of the new order is row `permutation[i]` of the raster order."""
        raster = torch.cartesian_prod(*(torch.arange(n) for n in self.grid)).reshape(-1, len(self.grid))
        inside = torch.arange(len(raster))
        if self.patch is not None:
            patch = torch.tensor(self.patch)
            key = torch.zeros(len(raster), dtype=torch.int64)
            for part, sizes in ((raster // patch, None), (raster % patch, self.patch)):
                for axis, n in enumerate(self.grid):
                    key = key * (n if sizes is None else sizes[axis]) + part[:, axis]
            inside = key.argsort(stable=True)
        first, last = torch.arange(self.prefix), torch.arange(self.suffix)
        return torch.cat([first, inside + self.prefix, last + self.prefix + len(raster)])

    @cached_property
    def inverse(self) -> Tensor:
        """int64 `(tokens,)`: row `i` of the raster order is row `inverse[i]` of the new one."""
        return torch.empty_like(self.permutation).scatter_(0, self.permutation, torch.arange(self.tokens))

    @cached_property
    def coordinates(self) -> Tensor:
        """int64 `(tokens, axes)`, the place on the grid of each row of the new order; -1 for tokens beside the grid."""
        at = (self.permutation - self.prefix).clone()
        outside = (at < 0) | (at >= math.prod(self.grid))
        columns = []
        for n in reversed(self.grid):
            columns.append(at % n)
            at = at // n
        return torch.stack(columns[::-1], dim=1).masked_fill(outside[:, None], -1)

    def to(self, device: Any) -> TokenOrder:
        """The same with its permutations on a device, made already."""
        moved = replace(self)
        made = {name: getattr(self, name).to(device) for name in ("permutation", "inverse", "coordinates")}
        moved.__dict__.update(made)  # where cached_property looks for them
        return moved

    def apply(self, x: Tensor, dim: int = 1) -> Tensor:
        """Rows of `x` along `dim` in the new order; a dim of another length than `tokens` is an error."""
        return self._moved(x, dim, self.permutation)

    def undo(self, x: Tensor, dim: int = 1) -> Tensor:
        """Rows of `x` along `dim` back in raster order."""
        return self._moved(x, dim, self.inverse)

    def _moved(self, x: Tensor, dim: int, index: Tensor) -> Tensor:
        if x.shape[dim] != self.tokens:
            raise ValueError(
                f"dim {dim} of a tensor {tuple(x.shape)} has {x.shape[dim]} rows; the order has {self.tokens}"
            )
        return x if self.is_raster else x.index_select(dim, index.to(x.device))
