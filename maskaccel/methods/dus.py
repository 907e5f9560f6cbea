"""DUS: the dilated unmasking scheduler (Luxembourg et al. 2025, arXiv 2506.19037).

Tokens that are revealed in one call are predicted as if they were independent; neighbours are not. DUS reveals a block
in dilated levels, tokens far apart first, so that a block of B tokens takes log2(B) calls of the model
whatever it says, and no neighbours are revealed together.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks.unmasking import dilated_levels
from ..ops._checks import count as check_count
from . import _masked
from ._masked import Draw, Reveal
from .llada import blocks_of


@dataclass(frozen=True)
class DUS(_masked.MaskedSampling):
    """Blocks from left to right, each in dilated levels.

    Attributes:
        block: Tokens of a block.
        base: Ratio of the strides of two levels.
        skip: Levels that are left out at the start, at least 1.
        temperature: Of the sampled tokens; 0 takes the most probable ones.
        threshold: Tokens of a level below this confidence wait for the block's last level; None: none waits.
            (Inferred: in the authors' code they stay masked.)
    """

    block: int = 32
    base: int = 2
    skip: int = 1
    temperature: float = 0.0
    threshold: float | None = None

    name = "DUS"
    paper = "Plan for Speed: Dilated Scheduling for Masked Diffusion Language Models (arXiv 2506.19037)"

    def __post_init__(self) -> None:
        dilated_levels(check_count("block", self.block, 1), self.base, self.skip)

    def plan(self, free: Tensor, draw: Draw) -> Generator[Reveal, bool, None]:
        """The levels of each block."""
        for block in blocks_of(free, self.block):
            places = block[0].nonzero().flatten()
            levels = torch.full((1, free.shape[1]), -1)
            levels[0, places] = dilated_levels(len(places), self.base, self.skip).long()
            last = int(levels.max())
            for level in range(last + 1):
                waiting = self.threshold is not None and level == last
                within = block if waiting else levels == level
                masked = (free & within).sum(1).tolist()
                later = self.threshold is not None and level < last
                yield Reveal(
                    0 if later else tuple(masked), temperature=self.temperature, within=within, rows=max(masked),
                    block=block, threshold=self.threshold if later and any(masked) else None,
                )  # fmt: skip
