"""LLaDA: large language diffusion models (Nie et al. 2025, arXiv 2502.09992), and parallel decoding of Fast-dLLM.

The answer starts masked. Each step samples a token for every masked position and reveals those of highest confidence
("low-confidence remasking"), equally many at each step since the noise schedule is linear (eq. 8). Blocks
are finished from left to right (semi-autoregressive). With a threshold, every token at least that certain is revealed
(Fast-dLLM, Wu et al. 2025, arXiv 2505.22618), and always the best one.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..masks.unmasking import even_counts
from ..ops._checks import choice
from ..ops._checks import count as check_count
from . import _masked
from ._masked import Draw, Model, Order, Reveal, Scores

_ORDERS = ("confidence", "margin", "entropy", "random", "scores")


def blocks_of(free: Tensor, size: int | None) -> Iterator[Tensor]:
    """The blocks of what is masked, from left to right: bool `(1, N)` each.

    Args:
        free: bool `(B, N)` on the host: masked tokens that may be revealed. Blocks begin at the first of any sample.
        size: Tokens of a block; None: one block.
    """
    places = torch.arange(free.shape[1])[None]
    taken = free.any(0).nonzero().flatten().tolist()
    if not taken:
        return
    first, end = taken[0], taken[-1] + 1
    size = end - first if size is None else size
    for start in range(first, end, size):
        yield (places >= start) & (places < start + size)


@dataclass(frozen=True)
class LLaDA(_masked.MaskedSampling):
    """Blocks from left to right, in each the most confident tokens first.

    Attributes:
        steps: Calls of the model for the whole answer, at least one for each block. Without effect with a threshold.
        block: Tokens of a block; None: the answer is one block.
        temperature: Of the sampled tokens; 0 takes the most probable ones.
        order: `"confidence"` (the paper's), `"margin"` (Kim et al. 2025, arXiv 2502.06768), `"entropy"`, `"random"`, or
            `"scores"`.
        threshold: Fast-dLLM: all tokens of this confidence or more, and always the best one. A read of the device after
            each step says whether the block is finished. None: as many a step as the schedule says.
        guidance: Scale of the unsupervised guidance, whose other branch has the prompt masked; 0: none.
        scores: With order `"scores"`: what tokens are ranked by, such as a planner's.
    """

    steps: int = 128
    block: int | None = None
    temperature: float = 0.0
    order: Order = "confidence"
    threshold: float | None = None
    guidance: float = 0.0
    scores: Scores | None = None

    name = "LLaDA"
    paper = "Large Language Diffusion Models (arXiv 2502.09992)"

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        if self.block is not None:
            check_count("block", self.block, 1)
        choice("order", self.order, _ORDERS)
        for field in ("temperature", "guidance"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}={getattr(self, field)!r} must be a number, 0 or more")
        threshold = self.threshold
        if threshold is not None and (not isinstance(threshold, int | float) or math.isnan(threshold)):
            raise ValueError(f"threshold={threshold!r} must be a number, or None")
        self._reveal(0)  # order and scores go together

    def _reveal(self, count: int | tuple[int, ...], **options: Any) -> Reveal:
        return Reveal(count, self.order, temperature=self.temperature, scores=self.scores, **options)

    def plan(self, free: Tensor, draw: Draw) -> Generator[Reveal, bool, None]:
        """The steps, block by block."""
        blocks = list(blocks_of(free, self.block))
        if not blocks:
            return
        if self.threshold is None and self.steps < len(blocks):
            raise ValueError(f"steps={self.steps} is below the number of blocks, {len(blocks)}")
        for within, steps in zip(blocks, even_counts(self.steps, len(blocks))[0].tolist(), strict=True):
            masked = (free & within).sum(1)
            if self.threshold is not None:
                # Each call reveals one token of a sample at least, but where logits are NaN, which stay masked.
                for _ in range(int(masked.max())):
                    if not (yield self._reveal(1, within=within, threshold=self.threshold, watch=True)):
                        break
                continue
            counts = even_counts(masked, steps).T.tolist()
            bounds = _masked.remaining(masked.tolist(), counts)
            for count, rows in zip(counts, bounds, strict=True):
                yield self._reveal(tuple(count), within=within, rows=rows)

    def generate(self, model: Model, prompt: Tensor, length: int, mask_id: int, **options: Any) -> Tensor:
        """An answer to a prompt.

        Args:
            model: As of `sample`.
            prompt: int64 `(B, P)`.
            length: Tokens of the answer.
            mask_id: Value of masked tokens.
            options: Of `sample`: `seed`, `hold`, `head`, `on_step`, `cache`.

        Returns:
            int64 `(B, P + length)`.

        Raises:
            ValueError: Fewer steps than blocks, guidance with a `head`, or as `sample` says.
        """
        _masked.check_tokens(prompt, mask_id)
        check_count("length", length, 1)
        answer = prompt.new_full((prompt.shape[0], length), mask_id)
        if self.guidance:
            if options.get("head") is not None:
                raise ValueError("head is given with guidance, which is of logits; pass a model that gives logits")
            model = self._guided(model, prompt.shape[1], mask_id)
        return self.sample(model, torch.cat([prompt, answer], 1), mask_id, **options)

    def _guided(self, model: Model, prompt: int, mask_id: int) -> Model:
        def guided(tokens: Tensor) -> Tensor:
            without = tokens.clone()
            without[:, :prompt] = mask_id
            cond, uncond = _masked.logits_of(model(torch.cat([tokens, without]))).chunk(2)
            return uncond + (self.guidance + 1) * (cond - uncond)

        return guided
