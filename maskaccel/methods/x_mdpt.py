"""X-MDPT: pose transfer with a side stage across views (Pham et al. 2024, arXiv 2402.01516; the authors' code).

MDTv1 with a fixed ratio, and tokens of a source image that run through the same blocks on all tokens and without a
gradient. Where dropped tokens are filled in, the side block is followed by a block that attends to them:

    S = Cross(Block_side(X, c), source),  queries of all tokens, keys and values of the source tokens

Both are used at dropped tokens alone, and a query needs no other query: both run at them only. Attention across views
has a table of relative positions too. Guidance is MDT's `power_cosine_scale`.

Left out: the condition (pooled features of pose, person and source image), which is any `(B, dim)` here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..masks import TokenIndex
from ..ops.attention import RelativePosition
from ._layers import check_tokens
from ._transformer import AdaLNBlock, CrossAttention, touched
from .mdt import MDTTransformer


class XMDPTTransformer(MDTTransformer):
    """The blocks of X-MDPT.

    Args:
        dim: Channels (1152 in XL).
        depth: Blocks without the side stage (28 in XL).
        heads: Attention heads (16 in XL).
        grid: Sizes of the grid of tokens.
        options: Of `MDTTransformer`, of version 1.
    """

    paper = "Cross-view Masked Diffusion Transformers for Person Image Synthesis (arXiv 2402.01516)"

    def __init__(self, dim: int, depth: int, heads: int, grid: Sequence[int], **options: Any) -> None:
        super().__init__(dim, depth, heads, grid, version=1, **options)
        self.side_cross = AdaLNBlock(dim, heads, options.get("mlp_ratio", 4.0))
        self.side_cross.attn = CrossAttention(dim, heads, offsets=math.prod(2 * n - 1 for n in self.grid))

    def forward(  # type: ignore[override]
        self, x: Tensor, c: Tensor, source: Tensor, index: TokenIndex | None = None
    ) -> Tensor:
        """The dense pass, or with an index the masked one.

        Args:
            x: Embedded tokens of the target without positions, `(B, N, dim)`.
            c: Condition `(B, dim)`.
            source: Embedded tokens of the source image without positions, `(B, N, dim)`; read in the masked pass only.
            index: Kept tokens of the masked pass.

        Returns:
            `(B, N, dim)`.
        """
        index = None if index is None or index.kept == index.n else index
        x, whole = self.encode(x, c, index)
        x = self.side(x, c, index)
        if index is None:
            x = touched(x, *self.side_cross.parameters())
        else:
            dropped = index.complement()
            places = RelativePosition.of_grid(self.side_cross.attn.relative_position, self.grid, dropped.keep)  # type: ignore[arg-type]
            side = self.side_cross(dropped.gather(x), c, memory=self.views(source, c), places=places)
            x = dropped.merge(x, side.to(x.dtype))
        return self.decode(x, whole, c)

    @torch.no_grad()
    def views(self, source: Tensor, c: Tensor) -> Tensor:
        """The tokens of the source image where the encoder ends, `(B, N, dim)`, without a gradient."""
        check_tokens(source, self.dim, self.grid)
        source, places = source + self.pos_embed.to(source.dtype), self.places()
        for block in self.en_inblocks:
            source = block(source, c, places=places)
        return source
