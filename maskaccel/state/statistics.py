"""What Re-ttention remembers of a dense attention: the share of each row's softmax in its mask, and the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._once import Key, OncePerStep
from .generation import Generation


class SoftmaxStats:
    """Ratio and residual of one attention module, for each guidance branch of a run.

    Args:
        generation: The model's generation; a new run begins with nothing.
    """

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self._held: dict[Key, tuple[tuple[int, ...], int, Tensor, Tensor]] = {}
        self._calls = OncePerStep(generation, "no softmax statistics can be kept")
        self._key: Key | None = None  # of the call that is under way
        generation.memories.append(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}, "_key": None}

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(ratio.nbytes + residual.nbytes for _, _, ratio, residual in self._held.values())

    def clear(self) -> None:
        """Forget every branch."""
        self._held.clear()
        self._calls.clear()

    def begin(self, part: int) -> None:
        """A call begins: this attention within the call of its module."""
        self._key = self._calls.key(part)

    @torch.no_grad()
    def store(self, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, shape: tuple[int, ...]) -> None:
        """Remember the statistics of a step that was computed in full.

        `ratio = exp(part_lse - lse)` is the share of the softmax's sum that lies in the mask, and
        `residual = out - ratio * part` what the rest gave.

        Args:
            out: `(B, Sq, H, D)`, attention over everything.
            lse: fp32 `(B, H, Sq)` of it.
            part: Attention over the mask.
            part_lse: fp32 `(B, H, Sq)` of it.
            shape: Of the call.
        """
        if self._key is None:
            return
        ratio = (part_lse - lse.masked_fill(lse.isneginf(), 0.0)).exp()
        residual = (out.float() - ratio.transpose(1, 2)[..., None] * part.float()).to(out.dtype)
        self._held[self._key] = shape, self.generation.index, ratio, residual

    def get(self, shape: tuple[int, ...], growth: float, clamp: bool) -> tuple[Tensor, Tensor] | None:
        """`(ratio, residual)` for this step, or None if nothing fits.

        Args:
            shape: Of the call; a memory of another shape, or of a later step, does not fit.
            growth: Added to the ratio for each step since it was measured, but the first.
            clamp: Whether the ratio stays at 1 or below.
        """
        held = None if self._key is None else self._held.get(self._key)
        if held is None or held[0] != shape or held[1] >= self.generation.index:
            return None
        _, measured, ratio, residual = held
        ratio = ratio + growth * (self.generation.index - measured - 1)
        return ratio.clamp(max=1.0) if clamp else ratio, residual
