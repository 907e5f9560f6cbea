"""Magnitude ratios, for MagCache (Ma et al. 2025, arXiv 2506.09045).

`ratio_t = mean over tokens of |R_t| / |R_(t-1)|`, R what all blocks add to the hidden states; the mean over samples,
guidance branches and runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models._decoupled import encoder_of
from ..patching.patch import Context
from .probe import FeatureProbe, mean


class Magnitudes(FeatureProbe):
    """Measures the ratios."""

    def __init__(self) -> None:
        super().__init__()
        self._ratios: dict[int, list[float]] = {}
        self._before: dict[tuple[int, str], Tensor] = {}

    def watch(self, context: Context) -> None:
        """All blocks."""
        self.watch_encoder(context, encoder_of(context.model, "all"))

    def feature(self, parts: list[Tensor]) -> None:
        """Compare the norm of each token with the one of the step before."""
        at = self.generation
        norms = torch.cat([part.double().norm(dim=-1).flatten() for part in parts])
        self._before = {key: value for key, value in self._before.items() if key[0] == at.run}
        before = self._before.get((at.run, at.branch_key))
        if before is not None and at.index > 0:
            known = before > 0
            ratio = (norms[known] / before[known]).mean()
            if bool(known.any()) and bool(ratio > 0) and bool(ratio.isfinite()):
                self._ratios.setdefault(at.index, []).append(float(ratio))
        self._before[at.run, at.branch_key] = norms

    def values(self) -> dict[str, Any]:
        """A ratio for each step; 1 for the first."""
        unknown = [step for step in range(1, self.steps) if step not in self._ratios]
        if unknown:
            raise ValueError(f"what the blocks add is 0 or not finite at step {unknown[0]}: there is no ratio")
        return {"ratios": [1.0, *(mean(self._ratios[step]) for step in range(1, self.steps))]}


def check(values: Mapping[str, Any], steps: int) -> None:
    """ValueError unless there is a positive ratio for each step."""
    ratios = values.get("ratios")
    if not isinstance(ratios, tuple) or len(ratios) != steps:
        raise ValueError(f"ratios must be a list of {steps} numbers, one a step")
    if not all(isinstance(r, int | float) and not isinstance(r, bool) and r > 0 for r in ratios):
        raise ValueError("ratios must be positive numbers")
