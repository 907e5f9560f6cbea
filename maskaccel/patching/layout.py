"""What a model's call says of its tokens: their grid, the text beside them, the order they are in."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import TokenIndex, TokenOrder
from ..models._tokens import Tokens, parameters
from .transaction import NO_PICKLE, PatchError


class TokenLayout:
    """What one call of a model says of its tokens; read before every call, by a forward pre-hook.

    Attributes:
        grid: Grid of the latent tokens, or None.
        front: Where tokens of reference images follow those of the latents: the grid of the latents' alone.
        text: Number of text tokens in joint sequences, or None: whatever is not in the grid.
        order: The order in which the latent tokens run through the blocks now (`patching/order.py`); None: raster.
        routed: The latent tokens that the blocks run on now (`patching/span.py`); None: all.
        sample: The sample that they run for, where samples run one by one; else None.
    """

    def __init__(self, model: nn.Module, tokens: Tokens) -> None:
        self.tokens, self.names = tokens, parameters(model)
        self.grid: tuple[int, ...] | None = None
        self.front: tuple[int, ...] | None = None
        self.text: int | None = None
        self.order: TokenOrder | None = None
        self.routed: TokenIndex | None = None
        self.sample: int | None = None
        self._grid_of = None if tokens.grid is None else tokens.grid(model)
        self._seen: tuple[Tensor, int] | None = None  # what the grid was read from on the host

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenLayout:
        new = memo[id(self)] = object.__new__(TokenLayout)
        new.__dict__.update(copy.deepcopy({**self.__dict__, "_seen": None}, memo))
        return new

    def __reduce__(self) -> Any:
        # A hook, so it is what pickling a patched model comes to first.
        raise PatchError(NO_PICKLE)

    def read(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The hook."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        self.text = None if self.tokens.text_rows is None else self.tokens.text_rows(given)
        if self.tokens.positions is not None:
            self._read_positions(given)
        elif self._grid_of is not None:
            self.grid = self._grid_of(given)

    def _read_positions(self, given: dict[str, Any]) -> None:
        """The grid from the positions of tokens; waits for the device once for each tensor."""
        name, cut = self.tokens.positions or ("", None)
        ids = given.get(name)
        if torch.compiler.is_compiling() or ids is None or cut is None:
            self.grid = None  # values cannot be read in a graph
            return
        version = 0 if ids.is_inference() else ids._version
        if self._seen is None or self._seen[0] is not ids or self._seen[1] != version:
            self._seen = ids, version
            positions = cut(ids, given)
            self.grid, self.front = _extent(positions), None
            if self.grid is None:  # tokens of reference images follow, which the first column tells apart
                image = (ids[0] if ids.ndim == 3 else ids)[-positions.shape[0] :, 0]
                self.front = _extent(positions[image == image[0]])


def _extent(positions: Tensor) -> tuple[int, ...] | None:
    """The grid that positions `(tokens, axes)` fill; None if they are more or fewer."""
    grid = tuple(map(int, (positions.amax(0) - positions.amin(0) + 1).tolist()))
    return grid if math.prod(grid) == positions.shape[0] else None
