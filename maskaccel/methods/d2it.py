"""D2iT: tokens of two grains (Jia et al. 2025, arXiv 2504.09454).

A region of an image is one coarse token where it holds little information, and four fine ones (2 x 2) where it holds
much: the regions of highest entropy are fine. Images of a batch then have different numbers of tokens, which are packed
as those of FiT (`Packing` with no padding), with rows of modulation for each image.

    tokens of an image = regions + 3 (fine regions)

`Grains` says which token is where, and goes both ways: fine features to tokens (a coarse token is the mean of its four
cells), and tokens back to the fine grid (a coarse token is copied to its four cells), with exact gradients.

Inferred: the fraction of fine regions is that of the whole batch's images alike (the paper sets a ratio of grains for
training), and what joins the grains (mean and copy), since the code was not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks import TileMask, varlen


def entropy(image: Tensor, cell: int, bins: int = 32, width: float = 0.01) -> Tensor:
    """The entropy of the grey values of each region, in nats.

    A histogram with Gaussian bins over [-1, 1], as in VQ models with dynamic grains (Huang et al. 2023).

    Args:
        image: `(B, C, H, W)` in [-1, 1].
        cell: Side of a region.
        bins: Number of bins.
        width: Deviation of a bin.

    Returns:
        fp32 `(B, H / cell, W / cell)`.

    Raises:
        ValueError: `cell` does not divide the image.
    """
    height, wide = image.shape[-2:]
    if cell < 1 or height % cell or wide % cell:
        raise ValueError(f"cell={cell} does not divide the image {height} x {wide}")
    grey = image.float().mean(1).unflatten(2, (-1, cell)).unflatten(1, (-1, cell))  # (B, h, c, w, c)
    values = grey.transpose(2, 3).flatten(3)  # (B, h, w, c * c)
    centres = torch.linspace(-1, 1, bins, device=image.device)
    weight = torch.exp(-((values[..., None] - centres) ** 2) / (2 * width**2)).mean(3) + 1e-10
    p = weight / weight.sum(-1, keepdim=True)
    return -(p * p.log()).sum(-1)


def fine_regions(scores: Tensor, part: float) -> Tensor:
    """The regions of highest score: bool `(B, h, w)` of `(B, h, w)`, `round(part h w)` of each image.

    Raises:
        ValueError: `part` is not in [0, 1].
    """
    if not 0 <= part <= 1:
        raise ValueError(f"part={part} must lie in [0, 1]")
    flat = scores.flatten(1)
    ranks = flat.argsort(dim=1, descending=True, stable=True).argsort(1)
    return (ranks < round(part * flat.shape[1])).view_as(scores)


@dataclass(frozen=True, eq=False)
class Grains:
    """Where the tokens of two grains are. Made by `of`.

    Attributes:
        fine: bool `(B, h, w)`.
        token: int64 `(B, 2 h * 2 w)`: the token of each cell of the fine grid, among those of all images.
        source: int64 `(tokens,)`: the cell of each fine token, and the number of all cells plus the region of a coarse
            one.
        counts: Tokens of each image, on the host.
    """

    fine: Tensor
    token: Tensor
    source: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, fine: Tensor) -> Grains:
        """For a map of fine regions, bool `(B, h, w)`; reads how many tokens there are, which waits for a GPU.

        Tokens are in raster order of the regions, those of a fine region in raster order of its cells.

        Raises:
            ValueError: `fine` is no such map.
        """
        if fine.dim() != 3 or fine.dtype != torch.bool:
            raise ValueError(f"fine is {fine.dtype} {tuple(fine.shape)}; it must be bool (B, h, w)")
        size = torch.where(fine, 4, 1)
        counts = tuple(size.flatten(1).sum(1).tolist())
        first = (size.flatten().cumsum(0) - size.flatten()).view_as(fine)
        inner = torch.arange(4, device=fine.device).view(2, 2)  # cells of a region
        token = first[..., None, None] + torch.where(fine[..., None, None], inner, 0)  # (B, h, w, 2, 2)
        token = token.transpose(2, 3).flatten(1)
        cell = torch.arange(token.numel(), device=fine.device)
        wide = fine.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
        source = cell.new_empty(sum(counts))
        source[token[wide]] = cell[wide.flatten()]
        source[first[~fine]] = token.numel() + torch.arange(fine.numel(), device=fine.device)[~fine.flatten()]
        return cls(fine, token, source, counts)

    @property
    def tokens(self) -> int:
        """Tokens of all images."""
        return sum(self.counts)

    def samples(self) -> Tensor:
        """int32 `(tokens,)`: the image of each token."""
        counts = torch.tensor(self.counts, device=self.fine.device)
        images = torch.arange(len(self.counts), device=self.fine.device)
        return torch.repeat_interleave(images, counts, output_size=self.tokens).int()

    def mask(self, block: tuple[int, int] = (128, 128)) -> TileMask | None:
        """The mask of attention within images, for packed tokens; None for one image."""
        if len(self.counts) == 1:
            return None
        offsets = [0, *torch.tensor(self.counts).cumsum(0).tolist()]
        return TileMask.from_rule(varlen(offsets, offsets), (self.tokens, self.tokens), block, self.fine.device)

    def pack(self, cells: Tensor) -> Tensor:
        """Features of the fine grid `(B, 2 h * 2 w, D)` as tokens `(1, tokens, D)`: coarse ones are means of four."""
        height, width = self.fine.shape[1:]
        regions = cells.unflatten(1, (height, 2, width, 2)).mean((2, 4))
        return torch.cat([cells.flatten(0, 1), regions.flatten(0, 2)])[self.source][None]

    def unpack(self, x: Tensor) -> Tensor:
        """Tokens `(1, tokens, D)` on the fine grid, `(B, 2 h * 2 w, D)`: coarse ones are copied to their four cells."""
        return x[0][self.token]
