"""SpargeAttn (Zhang et al. 2025, arXiv 2502.18137): tiles predicted from the means of alike tokens.

A block of tokens whose vectors point the same way (mean cosine of all pairs above `similarity`) is well told by its
mean. The softmax of the means' products says which tiles hold the mass of a row, and the fewest that hold `cdf` of it
are computed. Blocks that are not alike are always computed: their rows see all, their columns are seen by all. A second
test inside the kernel leaves out tiles far below the running maximum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..masks import TileMask
from ..ops import tile_select
from ..ops._checks import count as check_count
from ..ops.attention.check import check_block
from ..ops.attention.check import number as check_number
from ..ops.attention.select import check_top_k, products, tile_likeness
from ._attention import SelectingAttention


@dataclass(frozen=True)
class SpargeAttn(SelectingAttention):
    """Compute the tiles that block means predict to matter.

    Attributes:
        similarity: Mean cosine above which a block is told by its mean (`simthreshd1`, 0.6).
        cdf: Share of a row's predicted mass that is computed (`cdfthreshd`, 0.98).
        top_k: Tiles of each row, a number or a fraction, instead of `cdf`.
        pv_threshold: Tiles whose scores are all this far (log2) below the running maximum add nothing (`pvthreshd`);
            None computes all of them.
        dense_steps: Steps at the start that compute everything.
        block: Tile size.
    """

    similarity: float = 0.6
    cdf: float = 0.98
    top_k: int | float | None = None
    pv_threshold: float | None = None
    dense_steps: int = 0
    block: tuple[int, int] = (128, 64)

    name = "SpargeAttn"
    paper = "SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model Inference (2502.18137)"

    def __post_init__(self) -> None:
        check_number("similarity", self.similarity)
        check_number("cdf", self.cdf)
        if not 0 < self.cdf <= 1:
            raise ValueError(f"cdf={self.cdf!r} must be in (0, 1]")
        if self.top_k is not None:
            check_top_k(self.top_k)
        if self.pv_threshold is not None:
            check_number("pv_threshold", self.pv_threshold)
            if self.pv_threshold < 0:
                raise ValueError(f"pv_threshold={self.pv_threshold!r} must be 0 or more: log2 below the maximum")
        check_count("dense_steps", self.dense_steps)
        check_block(self.block)

    def options(self) -> dict[str, Any]:
        """The second test."""
        if self.pv_threshold is None or torch.is_grad_enabled():
            return {}
        return {"skip_threshold": -float(self.pv_threshold), "prune": True}

    def select(self, q: Tensor, k: Tensor, beside: TileMask | None) -> TileMask:
        """The mask of these queries and keys."""
        bm, bn = self.block
        heads = q.shape[2]
        k = k if k.shape[2] == heads else k.repeat_interleave(heads // k.shape[2], dim=2)
        (pooled_q, cosines_q), (pooled_k, cosines_k) = (tile_likeness(x, block) for x, block in ((q, bm), (k, bn)))
        unlike_q, unlike_k = ~(cosines_q > self.similarity), ~(cosines_k > self.similarity)  # (B, H, blocks)
        s = products(pooled_q.transpose(1, 2), pooled_k.transpose(1, 2)) * q.shape[3] ** -0.5
        # Columns that are always computed take no part in the prediction; finite, so that a row of them is uniform.
        s = s.masked_fill(unlike_k[:, :, None], torch.finfo(s.dtype).min)
        force = unlike_q[..., None] | unlike_k[:, :, None]
        if beside is not None:
            force = force | beside.tiles()
        shape = (q.shape[1], k.shape[1])
        if self.top_k is not None:
            return tile_select(s.softmax(-1), shape, self.block, top_k=self.top_k, force=force)
        return tile_select(s.softmax(-1), shape, self.block, cdf=self.cdf, force=force)
