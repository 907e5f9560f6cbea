"""Yume: masked video diffusion transformer (Mao et al. 2025, arXiv 2507.17744; the authors' code of version 1.5).

A span as MDT's, from the first block to the middle of a Wan-like video model: a ratio uniform in [0.3, 0.5] of the
tokens (history and the current frames alike) is dropped, and at block (L + 1) / 2 the mask token, a side block at the
dropped tokens, and all tokens from there on. History frames have another timestep than current ones, so the condition
is one of each token, and positions are rotary: both are read at the kept tokens inside the span (`positions` of
`qk_norm_rope`, no table is gathered) and at all of them after it.

Left out: the compression of old frames before the embedding, and Wan's table of modulation beside each block's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import ops
from ..masks import TokenIndex
from ._masked_rows import partial_block
from ._ratios import RatioRange
from ._transformer import AdaLNBlock, learned_token, positions_of, taken, touched

RATIO = RatioRange(0.3, 0.5, bucket=64)
"""Dropped part of the tokens."""


class YumeTransformer(nn.Module):
    """The blocks of the model.

    Args:
        dim: Channels (3072 in the 5 B model).
        depth: Blocks without the side block (30).
        heads: Attention heads (24).
        mlp_ratio: Hidden channels of the MLPs by channels.
        cross: Whether blocks attend to a text.
        block: Options of the blocks, such as `qk_norm="rms"`.

    Raises:
        ValueError: There are fewer than two blocks.
    """

    paper = "Yume: An Interactive World Generation Model (arXiv 2507.17744)"

    def __init__(
        self, dim: int, depth: int, heads: int, mlp_ratio: float = 4.0, *, cross: bool = False, **block: Any
    ) -> None:
        super().__init__()
        if depth < 2:
            raise ValueError(f"depth={depth}; the span and what follows it need a block each")

        def make() -> AdaLNBlock:
            return AdaLNBlock(dim, heads, mlp_ratio, cross=cross, **block)

        self.middle = (depth + 1) // 2
        self.blocks = nn.ModuleList(make() for _ in range(depth))
        self.side, self.mask_token = make(), learned_token(dim)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        index: TokenIndex | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """All tokens `(B, N, dim)`, of which those in the index run in the first half.

        Args:
            x: Embedded tokens of all frames, `(B, N, dim)`.
            c: Condition of each sample `(B, dim)`, or of each token `(B, N, dim)`.
            rope: Cosines and sines of all tokens, `(N, head dim / 2)`.
            index: Kept tokens; None: all (sampling).
            context: Text `(B, M, dim)`.
        """
        index = None if index is None or index.kept == index.n else index
        full: dict[str, Any] = {"context": context, "rope": None if rope is None else (*rope, None)}
        some, here = dict(full), c
        if index is not None:
            some["rope"] = None if rope is None else (*rope, positions_of(index))
            x, here = index.gather(x), taken(c, index) if c.dim() == 3 else c
        for block in self.blocks[: self.middle]:
            x = block(x, here, **some)
        if index is None:
            x = touched(x, self.mask_token, *self.side.parameters())
        else:
            x = ops.scatter_merge(None, x, index, mode="mask_token", mask_token=self.mask_token)
            dropped = index.complement()
            x = dropped.merge(x, partial_block(self.side, x, dropped, c, **full).to(x.dtype))
        for block in self.blocks[self.middle :]:
            x = block(x, c, **full)
        return x
