"""LaViDa-O's stratified sampling (Li et al. 2025, arXiv 2509.19244).

By confidence, tokens near those that are revealed come next, and clusters of them are predicted as if independent. The
stratified order reveals tokens that are far apart: each quarter of the image gets one token before any gets a second
one, then each quarter of the quarters.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from ..masks.unmasking import reveal_counts, stratified_order
from ..ops._checks import count as check_count
from . import _masked
from ._masked import Draw, Reveal


@dataclass(frozen=True)
class LaViDaO(_masked.MaskedSampling):
    """Tokens of an image in a stratified random order, as many as a mask schedule says.

    Attributes:
        grid: Height and width of the image tokens, which are the last of the sequence (what is before them is given).
        steps: Calls of the model.
        schedule: Masked share over the steps, a name of `masks.unmasking.RATIOS`.
        temperature: Of the sampled tokens.
        order_seed: Of the order, which is the same for all samples.
    """

    grid: tuple[int, int]
    steps: int = 64
    schedule: str = "cosine"
    temperature: float = 1.0
    order_seed: int = 42

    name = "LaViDa-O"
    paper = "Lavida-O: Elastic Large Masked Diffusion Models (arXiv 2509.19244)"

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        reveal_counts(0, self.steps, self.schedule)
        stratified_order(self.grid)

    def plan(self, free: Tensor, draw: Draw) -> Generator[Reveal, bool, None]:
        """The steps: a run of places in the order each. Samples with fewer masked tokens have fewer to reveal."""
        image = self.grid[0] * self.grid[1]
        if free.shape[1] < image:
            raise ValueError(f"tokens are {free.shape[1]}, fewer than those of grid={self.grid}")
        if bool(free[:, : free.shape[1] - image].any()):
            raise ValueError(f"tokens before the last {image}, those of grid={self.grid}, are masked")
        place = free.new_full((1, free.shape[1]), -1).long() - 1
        place[0, -image:] = stratified_order(self.grid, self.order_seed)
        # Only places that are masked in some sample count, so that a given part of the image takes no steps.
        wanted = place.masked_fill(~free.any(0, keepdim=True), image).flatten().sort().values
        wanted = wanted[(wanted >= 0) & (wanted < image)]
        done = 0
        for count in reveal_counts(len(wanted), self.steps, self.schedule):
            if count:
                low, high = wanted[done], wanted[done + count - 1]
                within = (place >= low) & (place <= high)
                yield Reveal(count, temperature=self.temperature, within=within, rows=count)
            else:
                yield Reveal(0)
            done += count
