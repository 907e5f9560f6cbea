"""MaskBit: masked generation of bit tokens (Weber et al. 2024, arXiv 2409.16211).

A token is K bits, cut into groups of K / groups bits; each group is masked, predicted (by a head of its own, over
`2^(K / groups)` values) and revealed by itself. The transformer has no embedding table: it reads the bits, -1 or 1, and
0 where a group is masked. So the vocabulary of a head is small: 2^7 = 128 for K = 14 in two groups.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..masks.unmasking import from_subtokens, reveal_counts, subtokens
from ..ops._checks import count as check_count
from . import _masked
from ._masked import Draw, Reveal
from .maskgit import anneal


@dataclass(frozen=True)
class MaskBit(_masked.MaskedSampling):
    """Groups of bits revealed by confidence, like tokens of their own.

    Attributes:
        bits: Bits of a token (K of the paper: 10 to 18).
        groups: Groups of a token, a divisor of `bits`.
        steps: Calls of the model.
        schedule: Masked share over the steps, a name of `masks.unmasking.RATIOS`.
        temperature: Of the softmax.
        choice_temperature: Gumbel noise on the log-confidence, annealed to 0 linearly.
    """

    bits: int = 14
    groups: int = 2
    steps: int = 64
    schedule: str = "arccos"
    temperature: float = 1.0
    choice_temperature: float = 4.5

    name = "MaskBit"
    paper = "MaskBit: Embedding-free Image Generation via Bit Tokens (arXiv 2409.16211)"

    def __post_init__(self) -> None:
        for field in ("bits", "groups", "steps"):
            check_count(field, getattr(self, field), 1)
        if self.bits % self.groups:
            raise ValueError(f"groups={self.groups} must divide bits={self.bits}")
        reveal_counts(0, self.steps, self.schedule)

    @property
    def values(self) -> int:
        """Values of a group, which is also the id of a masked one."""
        return int(2 ** (self.bits // self.groups))

    def plan(self, free: Tensor, draw: Draw) -> Generator[Reveal, bool, None]:
        """MaskGIT's steps, over groups instead of tokens."""
        yield from anneal(free, self.steps, self.schedule, self.temperature, self.choice_temperature)

    def generate(
        self, model: Callable[[Tensor], Any], batch: int, tokens: int, *, seed: int = 0, device: Any = None
    ) -> Tensor:
        """Tokens from nothing.

        Args:
            model: Given bits `(B, N, bits)` in fp32, logits `(B, N, groups, values)`, of one head for each group.
            batch: Samples.
            tokens: Tokens of a sample.
            seed: Of all random numbers.
            device: Of the tokens.

        Returns:
            Codebook ids, int64 `(B, N)`.
        """
        groups = torch.full((batch, tokens * self.groups), self.values, dtype=torch.int64, device=device)

        def flat(groups: Tensor) -> Tensor:
            return _masked.logits_of(model(self.to_bits(groups.view(batch, tokens, self.groups)))).flatten(1, 2)

        found = self.sample(flat, groups, self.values, seed=seed)
        return self.combine(found.view(batch, tokens, self.groups))

    def to_bits(self, groups: Tensor) -> Tensor:
        """What the transformer reads: `(B, N, groups)` to fp32 `(B, N, bits)`, -1 and 1, 0 for masked groups."""
        size = self.bits // self.groups
        ones = groups.unsqueeze(-1) >> torch.arange(size, device=groups.device) & 1
        return (2.0 * ones - 1.0).masked_fill((groups == self.values).unsqueeze(-1), 0.0).flatten(2)

    def split(self, ids: Tensor) -> Tensor:
        """Codebook ids `(B, N)` as groups `(B, N, groups)`, the lowest bits first."""
        return subtokens(ids, self.values, self.groups).flip(-1)

    def combine(self, groups: Tensor) -> Tensor:
        """The inverse of `split`."""
        return from_subtokens(groups.flip(-1), self.values)
