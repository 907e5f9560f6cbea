"""SR-DiT: SPRINT with value residuals, in a speedrun of ImageNet diffusion (2025; SwayStar123's SpeedrunDiT code).

SPRINT's route with these settings: 75 % of the tokens dropped anywhere (not by cell), a path drop with probability 0.05
that is one for the whole batch, and a mask token that starts at 0 and is trained. A CLS token may be dropped as any
other. A patch, `SRDiT`, does that to a model's own blocks.

Blocks mix their values with those of the first block, `v = l v_1 + (1 - l) v` (`ValueResidual`, l starts at 0.5). v_1
is one more tensor with a row for each token: it crosses the boundary of the route with `v_1 = index.gather(v_1)`, or in
`route.enter(x, per_token=[v_1, ...])`.

The authors draw the path drop on one rank and broadcast it; here it is a function of seed and step, the same on every
rank. Their guided step runs the middle for the unconditional half and multiplies it by 0; `guided` leaves it out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..masks import TokenIndex
from .sprint import RATIO, SPRINT, SprintFusion

PATH_DROP = 0.05
"""Probability of a path drop of a batch."""


class SRDiT(SPRINT):
    """SPRINT's patch with the settings of SR-DiT.

    Args:
        start: First block of g.
        end: Last block of g, inclusive; negative numbers count from the end.
        ratio: Dropped part of the tokens.
        path_drop: Probability of a path drop of a batch.
        options: Of `SPRINT`.
    """

    paper = "Speedrunning ImageNet Diffusion (SpeedrunDiT)"
    batch_wide = True

    def __init__(
        self, start: int = 2, end: int = -3, ratio: float = RATIO, *, path_drop: float = PATH_DROP, **options: Any
    ) -> None:
        super().__init__(start, end, ratio, select="uniform", path_drop=path_drop, **options)

    def make_fusion(self, width: int) -> SprintFusion:
        """A fusion whose mask token starts at 0 and is trained."""
        fusion = SprintFusion(width, path_drop=self._path_drop, learn_mask=True, seed=self.seed)
        nn.init.zeros_(fusion.mask_token)
        return fusion


class ValueResidual(nn.Module):
    """`v = l v_1 + (1 - l) v`: the values of a block mixed with those of the first one.

    Args:
        initial: l at the start.
    """

    def __init__(self, initial: float = 0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(initial)))

    def forward(self, v: Tensor, first: Tensor, index: TokenIndex | None = None) -> Tensor:
        """Mixed values.

        Args:
            v: `(B, K, heads, head dim)` of the block.
            first: Of the first block, of the same tokens, or of all N with the index of the K that run.
            index: The tokens that run.
        """
        if index is not None and first.shape[1] == index.n:
            first = index.gather(first)
        return torch.lerp(v, first, self.weight.to(v.dtype))
