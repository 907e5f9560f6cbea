"""DraftAttention (Shen et al. 2025, arXiv 2505.14708): a low-resolution attention map chooses the tiles.

Frames are cut into patches of 8 x 16 tokens, which are tiles. Queries and keys are averaged over patches, and of the
softmax of their products the largest `1 - sparsity` of all a head's tiles are computed. Text is always computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..masks import TileMask, TokenOrder
from ..ops import tile_pool, tile_scores, tile_select
from ..ops._checks import count as check_count
from ..ops.attention.check import number as check_number
from ..patching.attention import Places
from ._attention import SelectingAttention, beside


@dataclass(frozen=True)
class DraftAttention(SelectingAttention):
    """Compute the tiles that score highest in a draft at the resolution of patches.

    Attributes:
        sparsity: Part of a head's tiles that is left out.
        patch: Tokens of a patch, (height, width).
        min_per_row: Tiles that each patch of queries computes at least; the authors' code has no such floor, and rows
            may end up empty there.
        dense_steps: Steps at the start that compute everything.
        grid: Grid of the latent tokens, where the model's call does not tell it.
    """

    sparsity: float = 0.9
    patch: tuple[int, int] = (8, 16)
    min_per_row: int = 1
    dense_steps: int = 0
    grid: tuple[int, ...] | None = None

    name = "DraftAttention"
    paper = "DraftAttention: Fast Video Diffusion via Low-Resolution Attention Guidance (arXiv 2505.14708)"

    def __post_init__(self) -> None:
        check_number("sparsity", self.sparsity)
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity!r} must be in [0, 1)")
        if len(self.patch) != 2:
            raise ValueError(f"patch={self.patch!r} must be (height, width)")
        for size in self.patch:
            check_count("patch", size, 1)
        if math.prod(self.patch) % 32:
            raise ValueError(f"patch={self.patch!r} has {math.prod(self.patch)} tokens; it must be a multiple of 32")
        check_count("min_per_row", self.min_per_row)
        check_count("dense_steps", self.dense_steps)

    @property
    def block(self) -> tuple[int, int]:
        """Tile size: a patch."""
        return (math.prod(self.patch),) * 2

    def patch_for(self, grid: tuple[int, ...]) -> tuple[int, ...] | None:
        """The patch, in every frame."""
        return (*(1,) * (len(grid) - 2), *self.patch) if len(grid) >= 2 else None

    def token_order(self, places: Places) -> TokenOrder | str:
        """The order of patches within frames."""
        if places.grid is None or places.text is None or len(places.grid) < 2:
            return "the token grid is not known"
        return beside(places.grid, places.text, self.patch_for(places.grid))

    def select(self, q: Tensor, k: Tensor, beside: TileMask | None) -> TileMask:
        """The mask of these queries and keys."""
        scores = tile_scores(tile_pool(q, self.block[0]), tile_pool(k, self.block[1]))
        shape = (q.shape[1], k.shape[1])
        return tile_select(
            scores, shape, self.block, percentile=self.sparsity, force=beside, min_per_row=self.min_per_row
        )
