"""MAR-3D: masked autoregression over latents of a shape, from coarse to fine (Chen et al. 2025, arXiv 2503.20519).

Two MARs, the second given the tokens of the first as in Hi-MAR (tokens of a shape have no grid: `grid` is their
number). What the second sees in training are clean tokens, in sampling those that the first made; so in training they
are noised (condition augmentation),

    given = t x + (1 - t) e,  t uniform in [1 - augment, 1] for each sample

Inferred: the range of t (the code was not at hand).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .hi_mar import HiMAR
from .mar import MAR


class MAR3D(HiMAR):
    """The cascade.

    Args:
        low: The model of the coarse tokens.
        high: The model of the fine ones, whose buffer has room for the condition and every coarse token.
        augment: How far coarse tokens may be noised in training.

    Raises:
        ValueError: `augment` is not in [0, 1], or the buffer of `high` is too small.
    """

    paper = "MAR-3D: Progressive Masked Auto-regressor for High-Resolution 3D Generation (arXiv 2503.20519)"

    def __init__(self, low: MAR, high: MAR, augment: float = 0.5) -> None:
        super().__init__(low, high)
        if not 0 <= augment <= 1:
            raise ValueError(f"augment={augment} must lie in [0, 1]")
        self.augment = augment

    def given(self, pivots: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The coarse tokens with noise; as they are in eval mode."""
        if not self.training or not self.augment:
            return pivots

        like: Any = {"device": pivots.device, "dtype": pivots.dtype, "generator": generator}
        t = 1 - self.augment * torch.rand(len(pivots), 1, 1, **like)
        noise = torch.randn(pivots.shape, **like)
        return t * pivots + (1 - t) * noise
