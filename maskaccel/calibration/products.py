"""Inner products of what all blocks add at the steps of a run, for planned paths (DPCache, arXiv 2602.22654)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models._decoupled import encoder_of
from ..patching.patch import Context
from .file import check_square
from .probe import FeatureProbe


class Products(FeatureProbe):
    """Measures `<F_s, F_t>` of all pairs of steps: summed over samples, tokens, guidance branches and runs.

    The features of a run are kept in host memory until the run is over, in their own dtype. The result is scaled to a
    mean of 1 on its diagonal.
    """

    def __init__(self) -> None:
        super().__init__()
        self._features: dict[tuple[int, str], list[Tensor]] = {}
        self._total: Tensor | None = None

    def watch(self, context: Context) -> None:
        """All blocks."""
        self.watch_encoder(context, encoder_of(context.model, "all"))

    def feature(self, parts: list[Tensor]) -> None:
        """Keep the feature of this step; of a run that is over, its products are all that is kept."""
        at = self.generation
        for key in [key for key in self._features if key[0] != at.run]:
            self._add(self._features.pop(key))
        self._features.setdefault((at.run, at.branch_key), []).append(torch.cat([p.flatten().cpu() for p in parts]))

    def _add(self, features: list[Tensor]) -> None:
        if len(features) != self.steps:  # a branch that did not run at every step
            return
        if len({one.shape for one in features}) > 1:
            raise ValueError("the feature changes its shape within a run, so its steps cannot be compared")
        found = torch.zeros(self.steps, self.steps, dtype=torch.float64)
        rows = max(1, (1 << 22) // self.steps)
        for start in range(0, features[0].numel(), rows):
            part = torch.stack([one[start : start + rows] for one in features]).double()
            found += part @ part.T
        self._total = found if self._total is None else self._total + found

    def values(self) -> dict[str, Any]:
        """The matrix."""
        for key in list(self._features):
            self._add(self._features.pop(key))
        if self._total is None:
            raise ValueError("no guidance branch ran at every step of a run")
        scale = self._total.diagonal().mean()
        if not bool(scale > 0) or not bool(scale.isfinite()):
            raise ValueError("what the blocks add is 0 or not finite: its steps cannot be compared")
        return {"products": (self._total / scale).tolist()}


def check(values: Mapping[str, Any], steps: int) -> None:
    """ValueError unless the products are a square matrix, one row a step."""
    check_square(values, "products", steps)
