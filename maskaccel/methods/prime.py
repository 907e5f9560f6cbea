"""MDM-Prime: discrete diffusion via partial masking (Chao et al. 2025, arXiv 2505.18495).

A token is written as digits (sub-tokens) in base b; each is masked and revealed by itself, so that a token passes
through states that are known in part. The model reads the digits and predicts whole tokens: one is sampled,
and each of its masked digits is revealed with the probability of the posterior. Steps at which nothing changes are
fewer, since there are more digits than tokens; those that are left are not run, as in `MDLM`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..masks.unmasking import LINEAR, NoiseSchedule, ancestral_counts, from_subtokens, subtokens, time_grid
from ..ops._checks import count as check_count
from ..ops.tokens import sample_logits, unmask_select
from . import _masked


@dataclass(frozen=True)
class Prime:
    """Digits of tokens revealed with the probability of the posterior.

    Attributes:
        vocabulary: Tokens C.
        parts: Digits of a token. The base is the least b with `b^parts >= C`.
        steps: Steps of the time grid.
        schedule: `alpha(t)` of the digits.
        carry_over: Whether tokens that contradict a revealed digit are left out of the prediction.
    """

    vocabulary: int
    parts: int = 2
    steps: int = 1000
    schedule: NoiseSchedule = LINEAR
    carry_over: bool = True

    name = "MDM-Prime"
    paper = "Beyond Masked and Unmasked: Discrete Diffusion Models via Partial Masking (arXiv 2505.18495)"

    def __post_init__(self) -> None:
        check_count("vocabulary", self.vocabulary, 2)
        check_count("parts", self.parts, 1)
        time_grid(self.steps)

    @property
    def base(self) -> int:
        """Values of a digit, which is also the id of a masked one."""
        base = 2
        while base**self.parts < self.vocabulary:
            base += 1
        return base

    def consistent(self, logits: Tensor, digits: Tensor) -> Tensor:
        """Logits `(B, N, C)` with -inf for tokens that contradict a revealed digit of `(B, N, parts)`."""
        table = subtokens(torch.arange(self.vocabulary, device=logits.device), self.base, self.parts)
        wrong = torch.zeros_like(logits, dtype=torch.bool)
        for part in range(self.parts):
            seen = digits[..., part, None]
            wrong |= (seen != self.base) & (seen != table[:, part])
        return logits.masked_fill(wrong, -torch.inf)

    def counts(self, masked: list[int], seed: int, sample_offset: int = 0) -> list[list[int]]:
        """How many digits of each sample each step reveals."""
        times = time_grid(self.steps)
        chances = [self.schedule.reveal_probability(t, s) for t, s in itertools.pairwise(times)]
        return ancestral_counts(masked, chances, seed, sample_offset=sample_offset)

    @torch.no_grad()
    def sample(
        self,
        model: Callable[[Tensor], Any],
        digits: Tensor,
        *,
        seed: int = 0,
        sample_offset: int = 0,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Reveal the masked digits.

        Args:
            model: Given digits `(B, N, parts)`, the logits of tokens `(B, N, vocabulary)`, or an object that has them.
            digits: int64 `(B, N, parts)`; `base` where masked.
            seed: Of all random numbers.
            sample_offset: Number of the first sample among all ranks.
            on_step: Called with the number of the step and the digits after it.

        Returns:
            Tokens, int64 `(B, N)`.

        Raises:
            TypeError: `digits` is no int64 tensor.
            ValueError: `digits` has another shape.
        """
        if not isinstance(digits, Tensor) or digits.dtype != torch.int64:
            raise TypeError(f"digits must be a tensor of int64, got {getattr(digits, 'dtype', type(digits).__name__)}")
        if digits.dim() != 3 or digits.shape[2] != self.parts:
            raise ValueError(f"digits has shape {tuple(digits.shape)}; it must be (B, N, {self.parts})")
        draw: dict[str, Any] = {"seed": seed, "sample_offset": sample_offset}
        for step, count in enumerate(self.counts((digits == self.base).flatten(1).sum(1).tolist(), **draw)):
            if not any(count):
                continue
            logits = _masked.logits_of(model(digits))
            if self.carry_over:
                logits = self.consistent(logits, digits)
            hidden = (digits == self.base).any(-1)
            tokens = torch.where(hidden, self.vocabulary, from_subtokens(digits, self.base))
            ids, confidence = sample_logits(logits, tokens, self.vocabulary, step=step, **draw)
            # Which digits is chance alone; NaN stays where no token could be sampled.
            chance = torch.where(confidence.isnan(), confidence, 0.0).float().repeat_interleave(self.parts, 1)
            digits = unmask_select(
                chance, subtokens(ids, self.base, self.parts).flatten(1), digits.flatten(1), self.base,
                n=count, temperature=1.0, step=step, **draw,
            ).view_as(digits)  # fmt: skip
            if on_step is not None:
                on_step(step, digits)
        return from_subtokens(digits, self.base)
