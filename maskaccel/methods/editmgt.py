"""EditMGT: image editing by a masked generative transformer (Chow et al. 2025, arXiv 2512.11715).

The attention from the words of the instruction to the image says where the edit is (the mean over layers, heads and
words, scaled to [0, 1] and smoothed). Positions below a threshold hold the tokens of the reference image and are never
masked: region-hold sampling. So the edit stays inside its region whatever the model predicts outside.

Inferred: the smoothing, a Gaussian here; the authors' code has several kinds.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..masks.unmasking import reveal_counts
from ..ops._checks import count as check_count
from . import _masked
from ._masked import Draw, Reveal
from .maskgit import anneal


def localize(maps: Tensor, grid: tuple[int, int], sigma: float = 1.0) -> Tensor:
    """Where the edit is, from attention maps.

    Args:
        maps: `(L, B, N)` or `(B, N)`: attention that the N image tokens get from the words (`uncage.word_maps`, or
            `ops.attention_column_sums` over all text queries), of L layers.
        grid: Height and width of the image tokens.
        sigma: Standard deviation of the smoothing, in tokens; 0 does not smooth.

    Returns:
        fp32 `(B, N)`, each sample scaled to [0, 1].

    Raises:
        ValueError: `maps` does not fit the grid, or `sigma` is negative.
    """
    if maps.dim() not in (2, 3) or maps.shape[-1] != grid[0] * grid[1]:
        raise ValueError(f"maps has shape {tuple(maps.shape)}; for grid {grid} it must be (B, N) or (L, B, N)")
    if not sigma >= 0:
        raise ValueError(f"sigma={sigma!r} must be a number, 0 or more")
    scores = maps.float()
    scores = _rescaled(scores.mean(0) if scores.dim() == 3 else scores)
    if sigma > 0:
        reach = math.ceil(3 * sigma)
        places = torch.arange(-reach, reach + 1, dtype=torch.float32, device=maps.device)
        kernel = (-0.5 * (places / sigma).square()).exp()
        kernel = kernel / kernel.sum()
        image = scores.view(-1, 1, *grid)
        image = torch.nn.functional.pad(image, (reach,) * 4, mode="replicate")
        image = torch.nn.functional.conv2d(image, kernel.view(1, 1, -1, 1))
        image = torch.nn.functional.conv2d(image, kernel.view(1, 1, 1, -1))
        scores = _rescaled(image.flatten(1))
    return scores


def _rescaled(scores: Tensor) -> Tensor:
    low, high = scores.aminmax(dim=-1, keepdim=True)
    return (scores - low) / (high - low).clamp_min(1e-8)


@dataclass(frozen=True)
class EditMGT(_masked.MaskedSampling):
    """MaskGIT's steps inside the region of an edit; the rest keeps the reference's tokens.

    Attributes:
        threshold: Positions whose score is below it are held.
        steps: Calls of the model.
        schedule: Masked share over the steps.
        choice_temperature: Gumbel noise on the ranks at the first step; 0 at the last.
    """

    threshold: float = 0.5
    steps: int = 36
    schedule: str = "cosine"
    choice_temperature: float = 2.0

    name = "EditMGT"
    paper = "EditMGT: Unleashing Potentials of Masked Generative Transformers in Image Editing (arXiv 2512.11715)"

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        reveal_counts(0, self.steps, self.schedule)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold!r} must be from 0 to 1")

    def plan(self, free: Tensor, draw: Draw) -> Generator[Reveal, bool, None]:
        """MaskGIT's steps."""
        yield from anneal(free, self.steps, self.schedule, 1.0, self.choice_temperature, 0.0)

    def start(self, reference: Tensor, scores: Tensor, mask_id: int) -> Tensor:
        """The tokens that an edit starts from: the reference's outside of the region, `mask_id` inside.

        Args:
            reference: int64 `(B, N)`, tokens of the image.
            scores: fp32 `(B, N)`, as of `localize`.
            mask_id: Value of masked tokens.

        Raises:
            ValueError: Shapes do not fit, or no position is inside of the region.
        """
        _masked.check_tokens(reference, mask_id)
        if scores.shape != reference.shape:
            raise ValueError(f"scores has shape {tuple(scores.shape)}; reference has {tuple(reference.shape)}")
        inside = scores >= self.threshold
        if not bool(inside.any()):
            raise ValueError(f"threshold={self.threshold} is above all scores: nothing would be edited")
        return torch.where(inside, mask_id, reference)

    def edit(self, model: _masked.Model, reference: Tensor, scores: Tensor, mask_id: int, **options: Any) -> Tensor:
        """An edited image: `sample` from `start`."""
        return self.sample(model, self.start(reference, scores, mask_id), mask_id, **options)
