"""XAttention (Xu et al. 2025, arXiv 2503.16428): tiles chosen by the sums of their antidiagonals.

Every stride-th antidiagonal of a tile is summed, which meets each query and each key once, and the softmax of the sums
says how much of a row's attention a tile holds. The fewest tiles that hold the share `tau` of it are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..masks import TileMask
from ..ops import tile_scores, tile_select
from ..ops._checks import count as check_count
from ..ops.attention.check import check_block
from ..ops.attention.check import number as check_number
from ._attention import SelectingAttention


@dataclass(frozen=True)
class XAttention(SelectingAttention):
    """Compute the tiles whose antidiagonals hold most of the attention.

    Attributes:
        tau: Share of a row's attention that is computed.
        stride: Distance of the antidiagonals: 8 is finer, 16 cheaper.
        dense_steps: Steps at the start that compute everything.
        block: Tile size, multiples of stride.
    """

    tau: float = 0.9
    stride: int = 16
    dense_steps: int = 0
    block: tuple[int, int] = (128, 128)

    name = "XAttention"
    paper = "XAttention: Block Sparse Attention with Antidiagonal Scoring (arXiv 2503.16428)"

    def __post_init__(self) -> None:
        check_number("tau", self.tau)
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau={self.tau!r} must be in (0, 1]")
        check_count("stride", self.stride, 1)
        check_block(self.block)
        if self.block[0] % self.stride or self.block[1] % self.stride:
            raise ValueError(f"stride={self.stride} must divide the block {self.block}")
        check_count("dense_steps", self.dense_steps)

    def select(self, q: Tensor, k: Tensor, beside: TileMask | None) -> TileMask:
        """The mask of these queries and keys."""
        scores = tile_scores(q, k, "antidiagonal", block=self.block, stride=self.stride)
        return tile_select(scores, (q.shape[1], k.shape[1]), self.block, cdf=self.tau, force=beside)
