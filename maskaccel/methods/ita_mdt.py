"""ITA-MDT: masked diffusion with cross-attention for virtual try-on (Hong et al. 2025, arXiv 2503.20418; their code).

MDTv2's span (ratio uniform in [0.3, 0.5], long skips, side block at dropped tokens) with blocks that have no adaLN: all
of the condition, the timestep among it, is a sequence that tokens attend to,

    x = x + attn(norm(x)),  x = x + cross(norm(x), context),  x = x + mlp(norm(x))

The context holds a token of the timestep and features of the garment that are aggregated over the layers of an image
encoder (`ITAFA`): softmax weights of the layers from the timestep and from how complex the features are,

    w = softmax(a W_t t + (1 - a) W_c [sparsity, variance, gradient])

Guidance is MDT's `power_cosine_scale`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..masks import TokenIndex
from ..ops.attention import RelativePosition
from ._layers import linear
from ._transformer import Attention, CrossAttention, Mlp, taken
from .mdt import MDTTransformer


class ITAMDTBlock(nn.Module):
    """A block without adaLN.

    Args:
        dim: Channels.
        heads: Attention heads.
        mlp_ratio: Hidden channels of the MLP by channels.
        skip: Whether it joins a long skip.
        offsets: Of the table of relative positions.
    """

    takes_rows = True

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, *, skip: bool = False, offsets: int = 1) -> None:
        super().__init__()
        self.attn, self.cross, self.mlp = (
            Attention(dim, heads, offsets=offsets),
            CrossAttention(dim, heads),
            Mlp(dim, mlp_ratio),
        )
        self.skip_linear = linear(2 * dim, dim) if skip else None

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        *,
        skip: Tensor | None = None,
        rows: TokenIndex | None = None,
        places: RelativePosition | None = None,
    ) -> Tensor:
        """The block, or the block at some query rows.

        Args:
            x: `(B, N, dim)`.
            c: Context `(B, M, dim)`.
            skip: `(B, N, dim)` of a block with a long skip.
            rows: Query rows, as in `AdaLNBlock`.
            places: Of the tokens on the grid.
        """
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        x = taken(x, rows) + self.attn(ops.norm_modulate(x), rows=rows, places=places)
        x = x + self.cross(ops.norm_modulate(x), c)
        return x + self.mlp(ops.norm_modulate(x))


class ITAFA(nn.Module):
    """Image-timestep adaptive aggregation of an encoder's layers.

    Args:
        layers: Number of layers of the image encoder.
        time: Channels of the timestep's embedding.
    """

    def __init__(self, layers: int, time: int) -> None:
        super().__init__()
        self.of_time, self.of_complexity = nn.Linear(time, layers), nn.Linear(3, layers)
        self.alpha = nn.Parameter(torch.tensor(0.5))

    @staticmethod
    def complexity(features: Tensor, threshold: float = 0.01) -> Tensor:
        """Part of small values, variance, and mean length of the gradient: `(B, 3)` of `(B, layers, M, C)`."""
        small = (features.abs() < threshold).to(features.dtype).mean((1, 2, 3))
        along, across = features.diff(dim=2)[..., :-1], features.diff(dim=3)[:, :, :-1]
        gradient = (along.square() + across.square()).sqrt().mean((1, 2, 3))
        return torch.stack([small, features.var((1, 2, 3)), gradient], 1)

    def forward(self, features: Tensor, t: Tensor) -> Tensor:
        """Features `(B, layers, M, C)` and the timestep's embedding `(B, time)` to `(B, M, C)`."""
        mixed = self.alpha * self.of_time(t) + (1 - self.alpha) * self.of_complexity(self.complexity(features))
        return torch.einsum("bl,blmc->bmc", mixed.softmax(-1), features)


class ITAMDTTransformer(MDTTransformer):
    """The blocks of ITA-MDT, called with a context `(B, M, dim)` in place of the condition.

    Args:
        dim: Channels.
        depth: Blocks without the side block.
        heads: Attention heads.
        grid: Sizes of the grid of tokens.
        mlp_ratio: Hidden channels of the MLPs by channels.
        options: Of `MDTTransformer`.
    """

    paper = "ITA-MDT: Image-Timestep-Adaptive Masked Diffusion Transformer for Image-Based Virtual Try-On (2503.20418)"

    def __init__(
        self, dim: int, depth: int, heads: int, grid: Sequence[int], *, mlp_ratio: float = 4.0, **options: Any
    ) -> None:
        offsets = math.prod(2 * n - 1 for n in grid)

        def block(skip: bool) -> nn.Module:
            return ITAMDTBlock(dim, heads, mlp_ratio, skip=skip, offsets=offsets)

        super().__init__(dim, depth, heads, grid, mlp_ratio=mlp_ratio, block=block, **options)
