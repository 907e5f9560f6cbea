"""LazyDiffusion: denoise the hole of an image alone (Nitzan et al. 2024, arXiv 2404.12382).

A mask says which part of an image is to be made. Its tokens alone are denoised; all others are the context, which stays
as it is: what attention sees of them is computed once. The paper trains a transformer with an encoder of the context
(section 3) whose result is the same at every step; this is its way of running for a model that was not trained so. The
model encodes the context itself: one call on the tokens outside of the hole, whose keys and values stay. They have
never seen the hole, and the price of a step is that of the hole.

Such a model has never seen clean tokens among noisy ones, so the context is encoded at a noise level of its own,
`level`, with the noise of the run. On the example model a level of 0.8 comes closest to computing all tokens at every
step; clean tokens, and those of the first step, are far off (docs/partial-tokens.md). With `level=None` the first step
is dense instead, at its own level, and with `refresh` every so-many-th step is. The context's latents follow the
straight way to the reference throughout, so they have the noise level of each step there, and at the end they are the
reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ..masks import Schedule, TokenIndex
from ..ops import select_active
from ..ops._checks import count as check_count
from ..patching.selector import Seen, Selector
from ..state.kv import KVStorage
from ._active import Given, PartialSteps, check_common, check_number, rounded, value_of
from ._reference import reference_like, towards

_NEVER = 1 << 20  # more steps than any run has


@dataclass(frozen=True, eq=False)
class LazyDiffusion(PartialSteps):
    """Denoise the tokens of a hole; the others stay a reference image.

    Attributes:
        mask: The hole: bool or numbers (not 0 is the hole), `(H, W)`, `(B, H, W)` or `(B, 1, H, W)` of any resolution,
            `(B, 1, F, H, W)` for video; or a function that gives it, called once a run. A token is in the hole if any
            part of it is.
        reference: Latents of the image around it, in the form that the scheduler is given and its scale (a batch of 1
            serves all images), or a function that gives them, called at every step.
        level: Noise level at which the context is encoded, 0 (clean) to below 1; None: a dense first step in its place.
        refresh: Every so-many-th step is dense; None: none but the first one with `level=None`.
        multiple: Numbers of tokens are rounded up to a multiple of it, by those that are nearest to the hole.
        grid: Grid of the latent tokens where the model does not tell it.
        storage: How keys and values are kept.
        kernel: Attend at steps in part through `tile_attention`: on a CPU faster than torch's function. Without it the
            model's own attention is called, and steps with all tokens active are dense ones bit for bit.
    """

    mask: Given = field(repr=False)
    reference: Given = field(repr=False)
    level: float | None = 0.8
    refresh: int | None = None
    multiple: int = 32
    grid: tuple[int, ...] | None = None
    storage: KVStorage = KVStorage()
    kernel: bool = False

    name = "LazyDiffusion"
    paper = "Lazy Diffusion Transformer for Interactive Image Editing (arXiv 2404.12382)"

    def __post_init__(self) -> None:
        check_common(self)
        if self.level is not None:
            check_number(self, "level", 0, 1)
            if self.level == 1:
                raise ValueError("level=1 is noise without a context; give a level below 1, or None")
        if self.refresh is not None:
            check_count("refresh", self.refresh, 2)
        for name in ("mask", "reference"):
            if not isinstance(getattr(self, name), Tensor) and not callable(getattr(self, name)):
                raise TypeError(f"{name}={getattr(self, name)!r} must be a tensor or a function that gives one")

    @property
    def rule(self) -> Schedule:
        """The step mask."""
        return Schedule(_NEVER if self.refresh is None else self.refresh, between=("partial",))

    def selector(self) -> Selector:
        """How tokens are chosen on one model."""
        return _Hole(self)


class _Hole(Selector):
    """The tokens of the mask, the same in all steps of a run."""

    static = True

    def __init__(self, method: LazyDiffusion) -> None:
        self.method = method
        self.level = method.level or 0.0
        self.clear()

    def clear(self) -> None:
        """A run begins or ends."""
        self._hole: Tensor | None = None
        self._index: TokenIndex | None = None

    def hole(self, grid: tuple[int, ...], device: torch.device) -> Tensor:
        """Bool `(B, N)`."""
        if self._hole is None:
            self._hole = token_mask(value_of("mask", self.method.mask), grid).to(device)
        return self._hole

    def fixed(self, grid: tuple[int, ...], tokens: int, device: torch.device) -> TokenIndex | None:
        """The tokens of every step in part; samples with smaller holes take more of what is around them."""
        if self._index is None:
            hole = self.hole(grid, device)
            keep = rounded(int(hole.sum(1).max()), self.method.multiple, hole.shape[1])
            if keep == hole.shape[1]:
                return None
            near = hole.view(-1, 1, *grid[-2:]).float()
            score = sum(F.avg_pool2d(near, 2 * r + 1, 1, r) for r in (1, 3, 7, 15) if r < min(grid[-2:]))
            score = near if isinstance(score, int) else score
            score = score.view_as(hole)
            self._index, _ = select_active(score, torch.zeros_like(score, dtype=torch.int32), keep, force=hole)
        return self._index

    def clean(self) -> Tensor | None:
        """The reference, whose tokens outside of the hole are encoded once."""
        return None if self.method.level is None else value_of("reference", self.method.reference)

    def clean_tokens(self, grid: tuple[int, ...], tokens: int, device: torch.device) -> TokenIndex | None:
        """The tokens that no step in part computes."""
        index = self.fixed(grid, tokens, device)
        return None if index is None else index.complement()

    def corrected(self, seen: Seen) -> Tensor:
        """The context moves straight to the reference."""
        outside = ~self.hole(seen.where.grid, seen.output.device)
        return towards(seen, reference_like(self.method.reference, seen.sample), outside.float())


def token_mask(mask: Tensor, grid: tuple[int, ...]) -> Tensor:
    """A mask of an image or video as a mask of tokens, bool `(B, N)`.

    Raises:
        ValueError: It has another number of dims, a resolution below that of the tokens, or a sample without a hole.
    """
    axes = len(grid)
    full = mask
    if full.dim() == 2:
        full = full[None]
    if full.dim() == 3:
        full = full[:, None]
    if axes == 3 and full.dim() == 4:
        full = full[:, :, None].expand(-1, -1, grid[0], -1, -1)
    if full.dim() != axes + 2 or full.shape[1] != 1:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; for a grid {grid} it must be (H, W), (B, H, W), "
                         "(B, 1, H, W) or (B, 1, F, H, W)")  # fmt: skip
    if any(size < extent for size, extent in zip(full.shape[2:], grid, strict=True)):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, less than the grid {grid} of tokens")
    pool = F.adaptive_max_pool2d if axes == 2 else F.adaptive_max_pool3d
    tokens = pool((full != 0).float(), grid).view(full.shape[0], math.prod(grid)) > 0
    if not bool(tokens.any(1).all()):
        raise ValueError("mask has a sample without a hole: nothing is to be denoised in it")
    return tokens
