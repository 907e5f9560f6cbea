"""Which elements of latents belong to which token."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class LatentGrid:
    """The grid of tokens in latents, which are packed, `(B, N, C)`, or hold a patch of elements for each token.

    Attributes:
        grid: Sizes of the grid, row-major.
        axes: Axes of the grid in unpacked latents, batch included; None: those after the batch and the channels.
    """

    grid: tuple[int, ...]
    axes: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """Tokens of the grid, N."""
        return math.prod(self.grid)

    def _unpacked(self, value: Tensor) -> tuple[tuple[int, ...], list[int]] | None:
        """Axes of the grid in unpacked latents, and the size of a patch along each; None for packed ones."""
        axes = tuple(range(2, 2 + len(self.grid))) if self.axes is None else self.axes
        if value.dim() != len(self.grid) + 2:
            return None
        if any(value.shape[a] % extent for a, extent in zip(axes, self.grid, strict=True)):
            return None
        return axes, [value.shape[a] // extent for a, extent in zip(axes, self.grid, strict=True)]

    def _is_packed(self, value: Tensor) -> bool:
        # Tokens of reference images may follow those of the grid.
        return value.dim() == 3 and (len(self.grid) > 1 or self.axes is None) and value.shape[1] >= self.count

    def fits(self, value: Tensor) -> bool:
        """Whether it is known which elements belong to which token."""
        return self._is_packed(value) or self._unpacked(value) is not None

    def tokens(self, value: Tensor) -> Tensor:
        """Latents as `(B, N, elements of a patch, C)`; packed ones have patches of one element.

        Raises:
            ValueError: They are neither packed tokens nor a grid of whole patches.
        """
        if self._is_packed(value):
            return value[:, : self.count].unsqueeze(2)
        axes, sizes = self._checked(value)
        rest = next(a for a in range(1, value.dim()) if a not in axes)
        split = value.permute(0, *axes, rest)
        for number, size in enumerate(sizes):
            split = split.unflatten(1 + 2 * number, (self.grid[number], size))
        numbers = range(len(axes))
        split = split.permute(0, *(1 + 2 * n for n in numbers), *(2 + 2 * n for n in numbers), split.dim() - 1)
        return split.reshape(value.shape[0], self.count, math.prod(sizes), value.shape[rest])

    def spread(self, values: Tensor, like: Tensor) -> Tensor:
        """A value of each token, `(B|1, N)`, in a form that broadcasts against latents; 0 beyond the grid.

        Raises:
            ValueError: The latents are neither packed tokens nor a grid of whole patches.
        """
        if self._is_packed(like):
            return F.pad(values, (0, like.shape[1] - self.count)).unsqueeze(-1)
        axes, sizes = self._checked(like)
        shape = [1] * like.dim()
        shape[0] = values.shape[0]
        for axis, extent in zip(axes, self.grid, strict=True):
            shape[axis] = extent
        out = values.reshape(shape)
        for axis, size in zip(axes, sizes, strict=True):
            out = out.repeat_interleave(size, dim=axis)
        return out

    def _checked(self, value: Tensor) -> tuple[tuple[int, ...], list[int]]:
        found = self._unpacked(value)
        if found is None:
            raise ValueError(f"latents of shape {tuple(value.shape)} are no grid {self.grid} of tokens")
        return found
