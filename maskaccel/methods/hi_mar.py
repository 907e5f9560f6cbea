"""Hi-MAR: masked autoregression with pivots of low resolution (Zheng et al. 2025, arXiv 2505.20288).

First the tokens of a small image are generated, the pivots; then those of the image itself, given all pivots:

    p(x) = p(pivots) p(x | pivots),  each factor a MAR

The pivots fill a part of the second model's buffer, so its encoder sees them beside the kept tokens at every step, and
they are embedded once for a sampling run. Both phases keep a number of tokens that grows from step to step.

Left out: the transformer head of the second phase (MAR's diffusion head takes its place), and that the authors share
the weights of both phases. Inferred: that pivots stand beside the class in the buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..masks import TokenIndex
from ._layers import linear
from .mar import MAR


class HiMAR(nn.Module):
    """Two MARs, the second of which is given the tokens of the first.

    Args:
        low: The model of the pivots.
        high: The model of the image, whose buffer has room for the class and for every pivot.

    Raises:
        ValueError: The buffer of `high` has no room for the class.
    """

    paper = "Hierarchical Masked Autoregressive Models with Low-Resolution Token Pivots (arXiv 2505.20288)"

    def __init__(self, low: MAR, high: MAR) -> None:
        super().__init__()
        if high.buffer <= low.tokens:
            raise ValueError(f"high has a buffer of {high.buffer}; {low.tokens} pivots and the class need more")
        self.low, self.high = low, high
        self.pivot_embed = linear(low.head.values, high.embed.out_features)

    def context(self, condition: Tensor, pivots: Tensor) -> Tensor:
        """What the second model's buffer holds: the class, then the pivots, `(B, buffer, dim)`.

        Args:
            condition: Embedding of the class `(B, dim)`.
            pivots: Tokens `(B, low.tokens, values)`.
        """
        room = self.high.buffer - self.low.tokens
        return torch.cat([condition[:, None].expand(-1, room, -1), self.pivot_embed(pivots)], 1)

    def loss(
        self,
        pivots: Tensor,
        tokens: Tensor,
        conditions: tuple[Tensor, Tensor],
        indices: tuple[TokenIndex, TokenIndex],
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The sum of both models' losses.

        Args:
            pivots: `(B, low.tokens, values)`.
            tokens: `(B, high.tokens, values)`.
            conditions: Embeddings of the class for each model.
            indices: Of `visible` of each model.
            generator: Of timesteps and noise.
        """
        first = self.low.loss(pivots, conditions[0], indices[0], generator=generator)
        given = self.given(pivots, generator)
        return first + self.high.loss(tokens, self.context(conditions[1], given), indices[1], generator=generator)

    def given(self, pivots: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The pivots as the second model is given them in training."""
        return pivots

    @torch.no_grad()
    def sample(
        self,
        conditions: tuple[Tensor, Tensor],
        nulls: tuple[Tensor, Tensor] | None = None,
        *,
        low: dict[str, Any] | None = None,
        high: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Pivots, then tokens.

        Args:
            conditions: Embeddings of the class for each model.
            nulls: Those of no class, needed with guidance.
            low: Options of `MAR.sample` for the first phase.
            high: For the second.

        Returns:
            The pivots and the tokens.
        """
        pivots = self.low.sample(conditions[0], None if nulls is None else nulls[0], **(low or {}))
        context = self.context(conditions[1], pivots)
        null = None if nulls is None else self.context(nulls[1], pivots)
        return pivots, self.high.sample(context, null, **(high or {}))
