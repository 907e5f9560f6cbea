"""QA-MDT: rows and columns of a spectrogram are dropped (Li et al. 2024, arXiv 2405.15863; the authors' code).

Tokens lie on a grid of time and frequency. One number u, uniform in [0, 1], sets both ratios of a step,

    r_time = 0.17 + 0.13 u,  r_freq = 0.15 + 0.13 u,

and the kept tokens are those in a kept row *and* in a kept column: they are a smaller grid again. The rest is MDTv2's
(`QAMDTTransformer`), but a training step has the masked pass alone. The authors sort the kept ids
by keys that fail above 999 tokens; these are in order for any number.

Blocks attend to a text of another length in each sample. The authors pack the texts, which reads the lengths on the
host; here padding is left out by a bias of the scores, which reads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..masks import TokenIndex
from ._ratios import drawn
from ._transformer import AdaLNBlock, padding_bias
from .mdt import MDTTransformer


@dataclass(frozen=True)
class RowsAndColumns:
    """How many rows and columns are kept.

    Attributes:
        rows: Least and largest dropped part of the first axis (time).
        columns: Of the second axis (frequency).
        seed: Of the draws.
    """

    rows: tuple[float, float] = (0.17, 0.30)
    columns: tuple[float, float] = (0.15, 0.28)
    seed: int = 0

    paper = "QA-MDT: Quality-aware Masked Diffusion Transformer for Enhanced Music Generation (arXiv 2405.15863)"

    def __post_init__(self) -> None:
        for name, (low, high) in (("rows", self.rows), ("columns", self.columns)):
            if not 0 <= low <= high < 1:
                raise ValueError(f"{name}=({low}, {high}) must satisfy 0 <= low <= high < 1")

    def kept(self, grid: tuple[int, int], step: int) -> tuple[int, int]:
        """Rows and columns that a step keeps: one u for both, `floor(n (1 - ratio))`, at least one."""
        u = drawn(self.seed, step)
        parts = (low + (high - low) * u for low, high in (self.rows, self.columns))
        height, width = (max(1, math.floor(n * (1 - part) + 1e-9)) for n, part in zip(grid, parts))
        return height, width

    def choose(
        self, batch: int, grid: tuple[int, int], step: int, *, offset: int = 0, device: Any = None
    ) -> TokenIndex:
        """The kept tokens; `grid` of the index is what they form.

        Args:
            batch: Samples, each with rows and columns of its own.
            grid: Rows and columns of tokens.
            step: Training step.
            offset: Number of this rank's first sample.
            device: Of the index.
        """
        return ops.random_keep(
            batch, math.prod(grid), self.kept(grid, step), seed=self.seed, step=step, sample_offset=offset,
            scheme="rows_cols", grid=grid, device=device,
        )  # fmt: skip


class QAMDTBlock(AdaLNBlock):
    """The block with cross-attention to a text; its condition is `(c, text, bias)`, as `QAMDTTransformer` makes it."""

    def forward(self, x: Tensor, c: Any, **options: Any) -> Tensor:
        """As of `AdaLNBlock`."""
        condition, text, bias = c
        return super().forward(x, condition, context=text, context_bias=bias, **options)


class QAMDTTransformer(MDTTransformer):
    """The blocks of QA-MDT.

    Args:
        dim: Channels.
        depth: Blocks without the side block.
        heads: Attention heads.
        grid: Rows (time) and columns (frequency) of tokens.
        mlp_ratio: Hidden channels of the MLPs by channels.
        options: Of `MDTTransformer`.
    """

    paper = RowsAndColumns.paper

    def __init__(
        self, dim: int, depth: int, heads: int, grid: Sequence[int], *, mlp_ratio: float = 4.0, **options: Any
    ) -> None:
        offsets = math.prod([2 * n - 1 for n in grid])

        def block(skip: bool) -> nn.Module:
            return QAMDTBlock(dim, heads, mlp_ratio, skip=skip, cross=True, offsets=offsets)

        super().__init__(dim, depth, heads, grid, mlp_ratio=mlp_ratio, block=block, **options)

    def forward(  # type: ignore[override]
        self, x: Tensor, c: Tensor, text: Tensor, lengths: Tensor | None = None, index: TokenIndex | None = None
    ) -> Tensor:
        """The dense pass, or with an index the masked one.

        Args:
            x: Embedded tokens without positions, `(B, N, dim)`.
            c: Condition `(B, dim)`.
            text: `(B, M, dim)`, padded.
            lengths: Integers `(B,)`: tokens of each text, at least one; None: all M.
            index: Kept tokens of the masked pass, of `RowsAndColumns.choose`.

        Returns:
            `(B, N, dim)`.
        """
        bias = None
        if lengths is not None:
            bias = padding_bias(torch.arange(text.shape[1], device=text.device) < lengths[:, None])
        return super().forward(x, (c, text, bias), index)  # type: ignore[arg-type]
