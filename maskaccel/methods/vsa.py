"""Video sparse attention (VSA, Zhang et al. 2025, arXiv 2505.13389): cubes of the video, chosen by their means.

Tokens are ordered by cubes of 4 x 4 x 4. The means of queries and keys of the cubes attend to each other (the coarse
stage), and each cube of queries computes the tokens of the cubes of keys that got most of its attention. A trained
model adds the coarse result through a learned gate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..masks import TileMask, TokenOrder
from ..ops import tile_attention, tile_pool, tile_scores, tile_select
from ..ops._checks import count as check_count
from ..ops.attention.check import number as check_number
from ..ops.attention.select import check_top_k
from ..patching.attention import AttentionSite, Places
from ..state.generation import Generation
from ._attention import SelectedTiles, SelectingAttention, beside


@dataclass(frozen=True)
class VSA(SelectingAttention):
    """Attend to the cubes whose means score highest.

    Attributes:
        top_k: Cubes that each cube of queries sees, a number or a fraction of all.
        cube: Tokens of a cube on each axis; their product is the tile size.
        coarse: Weight of the coarse result; 0 for a model that was not trained with it.
        dense_steps: Steps at the start that compute everything.
        grid: Grid of the latent tokens, where the model's call does not tell it.
    """

    top_k: int | float = 0.125
    cube: tuple[int, ...] = (4, 4, 4)
    coarse: float = 0.0
    dense_steps: int = 0
    grid: tuple[int, ...] | None = None

    name = "VSA"
    paper = "VSA: Faster Video Diffusion with Trainable Sparse Attention (arXiv 2505.13389)"

    def __post_init__(self) -> None:
        for size in self.cube:
            check_count("cube", size, 1)
        if math.prod(self.cube) % 32:
            raise ValueError(f"cube={self.cube!r} has {math.prod(self.cube)} tokens; it must be a multiple of 32")
        check_top_k(self.top_k)
        check_number("coarse", self.coarse)
        check_count("dense_steps", self.dense_steps)

    @property
    def block(self) -> tuple[int, int]:
        """Tile size: a cube."""
        return (math.prod(self.cube),) * 2

    def patch_for(self, grid: tuple[int, ...]) -> tuple[int, ...] | None:
        """The cube."""
        return self.cube if len(grid) == len(self.cube) else None

    def policy(self, site: AttentionSite, generation: Generation) -> SelectedTiles:
        """The attention of one module."""
        return _Cubes(self, site, generation)

    def token_order(self, places: Places) -> TokenOrder | str:
        """The order of cubes."""
        if places.grid is None or places.text is None:
            return "the token grid is not known"
        if len(places.grid) != len(self.cube):
            return f"cube={self.cube} is not for the grid {places.grid}"
        return beside(places.grid, places.text, self.cube)

    def select(self, q: Tensor, k: Tensor, beside: TileMask | None) -> TileMask:
        """The mask of these queries and keys."""
        scores = tile_scores(tile_pool(q, self.block[0]), tile_pool(k, self.block[1]))
        return tile_select(scores, (q.shape[1], k.shape[1]), self.block, top_k=self.top_k, force=beside)


class _Cubes(SelectedTiles):
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: TileMask, scale: float | None, bias: Tensor | None
    ) -> Tensor:
        fine = super().attend(q, k, v, mask, scale, bias)
        if not self.method.coarse:
            return fine
        size = self.method.block[0]
        rough = tile_attention(tile_pool(q, size), tile_pool(k, size), tile_pool(v, size), scale=scale)
        return fine + self.method.coarse * rough.repeat_interleave(size, dim=1)[:, : q.shape[1]]
