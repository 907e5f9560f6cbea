"""Learned unmasking policies of diffusion language models (Jazbec et al. 2025, arXiv 2512.09106).

A small network reads the confidence of every position, which of them are masked and how far the run is, and says for
each the probability of being revealed now. The policy is trained elsewhere; here it is a function.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from torch import Tensor

from ..ops._checks import count as check_count
from . import _masked
from ._masked import Draw, Reveal
from .llada import blocks_of


@dataclass(frozen=True)
class LearnedPolicy(_masked.MaskedSampling):
    """Blocks from left to right; in each a policy says which tokens are revealed at a step, at least one.

    Attributes:
        policy: Given the step of the block and the confidence of each position `(B, N)` (0 to 1; +inf where nothing is
            masked), the probability of being revealed, `(B, N)`.
        block: Tokens of a block; None: one block.
        temperature: Of the sampled tokens; 0 takes the most probable ones, whose probability the confidence is then.
    """

    policy: Callable[[int, Tensor], Tensor]
    block: int | None = 32
    temperature: float = 0.0

    name = "learned policy"
    paper = "Learning Unmasking Policies for Diffusion Language Models (arXiv 2512.09106)"

    def __post_init__(self) -> None:
        if self.block is not None:
            check_count("block", self.block, 1)

    def plan(self, free: Tensor, draw: Draw) -> Generator[Reveal, bool, None]:
        """Steps until each block is finished."""
        for within in blocks_of(free, self.block):
            for inside in range(int((free & within).sum(1).max())):

                def scores(step: int, ids: Tensor, log_confidence: Tensor, inside: int = inside) -> Tensor:
                    chances = self.policy(inside, log_confidence.exp())
                    # Revealed where the probability is above a uniform number: the score is 0 or more.
                    return chances - draw.uniform(step, ids)

                reveal = Reveal(
                    1, "scores", threshold=0.0, temperature=self.temperature, within=within, scores=scores, watch=True
                )
                if not (yield reveal):
                    break
