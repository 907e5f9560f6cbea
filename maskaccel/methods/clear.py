"""CLEAR (Liu et al. 2024, arXiv 2412.16112): image tokens see the disc of tokens around them.

Token `(y, x)` sees `(y', x')` iff `(y - y')^2 + (x - x')^2 < radius^2`. Text sees everything and is seen by all. Raster
order would touch far more tiles than the disc needs, so tokens are put in the order of patches. The variant with
downsampling lets image tokens also see one pooled key and value for each `factor x factor` square, of learned weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..masks import GridWindow, Segments, TileMask, TokenOrder
from ..masks.rules import ALWAYS, NEVER, WHERE
from ..masks.tiles import DEFAULT_BLOCK
from ..ops import tile_attention
from ..ops._checks import count as check_count
from ..ops.attention.check import check_block
from ..ops.attention.check import number as check_number
from ..patching.attention import AttentionCall, AttentionSite, Places
from ..state.generation import Generation
from ._attention import FixedMask, SparseAttention, beside, in_order


class ClearPooling(nn.Module):
    """The learned weights of CLEAR's downsampled keys and values, one square for each layer.

    Args:
        layers: Layers of the model.
        factor: Side of a square of tokens (4 in the paper).

    Attributes:
        weight: `(layers, factor, factor)`, initially the mean, `1 / factor^2`.
    """

    def __init__(self, layers: int, factor: int = 4) -> None:
        super().__init__()
        check_count("layers", layers, 1)
        check_count("factor", factor, 1)
        self.factor = factor
        self.weight = nn.Parameter(torch.full((layers, factor, factor), factor**-2.0))

    def forward(self, x: Tensor, grid: tuple[int, ...], layer: int) -> Tensor:
        """Weighted sums over squares.

        Args:
            x: `(B, h * w, H, D)`, tokens in raster order.
            grid: `(h, w)`, multiples of `factor`.
            layer: Whose weights.

        Returns:
            `(B, h * w / factor^2, H, D)`.
        """
        f = self.factor
        squares = x.unflatten(1, (grid[0] // f, f, grid[1] // f, f))
        pooled = torch.einsum("bifjghd,fg->bijhd", squares, self.weight[layer].to(x.dtype))
        return pooled.flatten(1, 2)


@dataclass(frozen=True)
class CLEAR(SparseAttention):
    """Attend to the disc of image tokens around one's own, and to the text.

    Made for models distilled to it; gradients pass, so it can be trained as the paper does.

    Attributes:
        radius: Of the disc, in tokens; 8, 16 or 32 in the paper.
        pooling: Weights of the downsampled keys and values, or None to go without.
        trained_tokens: If given, scores are scaled by `sqrt(log(keys) / log(trained_tokens))` (the paper's proportional
            attention, 4608 for FLUX at 1024 pixels).
        patch: Tokens are ordered by patches of this size.
        dense_steps: Steps at the start that compute everything.
        grid: `(height, width)` of the image tokens, where the model's call does not tell it.
        block: Tile size.
    """

    radius: float = 16
    pooling: ClearPooling | None = None
    trained_tokens: int | None = None
    patch: tuple[int, int] = (8, 16)
    dense_steps: int = 0
    grid: tuple[int, ...] | None = None
    block: tuple[int, int] = DEFAULT_BLOCK

    name = "CLEAR"
    paper = "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up (arXiv 2412.16112)"

    def __post_init__(self) -> None:
        check_number("radius", self.radius)
        if self.radius <= 0:
            raise ValueError(f"radius={self.radius!r} must be above 0")
        if self.pooling is not None and not isinstance(self.pooling, ClearPooling):
            raise TypeError(f"pooling must be a ClearPooling, got {type(self.pooling).__name__}")
        TokenOrder((1, 1), self.patch)  # checks it
        if self.trained_tokens is not None:
            check_count("trained_tokens", self.trained_tokens, 2)
        check_count("dense_steps", self.dense_steps)
        check_block(self.block)

    def patch_for(self, grid: tuple[int, ...]) -> tuple[int, ...] | None:
        """The patch of the mask's order."""
        return self.patch if len(grid) == 2 else None

    def policy(self, site: AttentionSite, generation: Generation) -> FixedMask:
        """The attention of one module."""
        return _Disc(self, site, generation)

    def fixed(self, places: Places) -> tuple[TokenOrder, TileMask] | str:
        """Patch order and disc."""
        if places.grid is None or places.text is None:
            return "the token grid is not known"
        if len(places.grid) != 2:
            return "it is for images"
        f = 1 if self.pooling is None else self.pooling.factor
        if places.grid[0] % f or places.grid[1] % f:
            raise ValueError(f"{self.name}: the grid {places.grid} is no multiple of the pooling's factor {f}")
        order = beside(places.grid, places.text, self.patch)
        return order, self.tile_mask(order, places.maker)

    def tile_mask(self, order: TokenOrder, device: torch.device | None = None) -> TileMask:
        """The mask of tokens in the order of patches; with pooling, the pooled tokens are the last keys."""
        if self.pooling is None:
            disc = GridWindow(order, self.radius, "euclid")
            return TileMask.from_rule(disc, (order.tokens,) * 2, self.block, device)
        pooled = math.prod(order.grid) // self.pooling.factor**2
        keys = TokenOrder(order.grid, order.patch, order.prefix, order.suffix + pooled)
        image = (order.coordinates[:, 0] >= 0).long()
        classes = torch.cat([image, torch.full((pooled,), 2)])
        relation = ((ALWAYS, ALWAYS, NEVER), (ALWAYS, WHERE, ALWAYS))  # text and image see text, image, pooled
        rule = Segments(image, classes, relation, GridWindow(order, self.radius, "euclid", keys=keys))
        return TileMask.from_rule(rule, (order.tokens, keys.tokens), self.block, device)


class _Disc(FixedMask):
    def __call__(self, call: AttentionCall) -> Tensor | None:
        method = self.method
        why = call.refusal() or self.dense_step()
        found = why if why is not None else self.made(call)
        if isinstance(found, str):
            return self.leave(found)
        order, mask = found
        assert order is not None
        q, k, v, bias, back = in_order(call, order)
        if method.pooling is not None:
            start = order.prefix
            image = slice(start, start + math.prod(order.grid))
            layer = self.site.layer
            k, v = (torch.cat([t, method.pooling(order.undo(t)[:, image], order.grid, layer)], dim=1) for t in (k, v))
            if bias is not None and bias.shape[3] > 1:
                bias = torch.nn.functional.pad(bias, (0, k.shape[1] - bias.shape[3]))
        scale = call.scale
        if method.trained_tokens is not None:
            scale = scale * math.sqrt(math.log(k.shape[1]) / math.log(method.trained_tokens))
        self.count(mask, call)
        return back(tile_attention(q, k, v, mask, scale=scale, bias=bias))
