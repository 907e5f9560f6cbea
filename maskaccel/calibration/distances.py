"""Pairwise distances of a feature between the steps of a run, for dynamic schedules (DDT, arXiv 2504.05741).

`d[k][j] = 1 - mean over tokens of cos(F_k, F_j)`; the mean over samples, guidance branches and runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..models._decoupled import Encoder, encoder_of
from ..patching.patch import Context
from .file import check_square
from .probe import FeatureProbe, check_tokens, thinned

_CHUNK = 1 << 22  # doubles that are compared at a time


class Distances(FeatureProbe):
    """Measures the distances of what a method remembers.

    The features of a run are kept in host memory until the run is over, in their own dtype.

    Args:
        encoder: Whose output: a number of leading blocks, `"all"` blocks, the name of a module; None as in `DDT`.
        tokens: Look at this many tokens, evenly spread; None looks at all.
    """

    def __init__(self, encoder: int | str | None = None, tokens: int | None = None) -> None:
        super().__init__()
        if isinstance(encoder, bool) or (isinstance(encoder, int) and encoder < 1):
            raise ValueError(
                f"encoder={encoder!r} must be a number of blocks, 1 or more, 'all' or the name of a module"
            )
        check_tokens(tokens)
        self.encoder, self.tokens = encoder, tokens
        self._site: Encoder | None = None
        self._features: dict[str, dict[int, list[Tensor]]] = {}
        self._run = 0
        self._tables: list[tuple[float, Tensor]] = []  # of each branch of each run: the tokens compared, their mean

    def watch(self, context: Context) -> None:
        """The encoder."""
        self._site = encoder_of(context.model, self.encoder)
        self.watch_encoder(context, self._site)

    def feature(self, parts: list[Tensor]) -> None:
        """Keep the feature of this step."""
        at = self.generation
        if at.run != self._run:
            self._compare()
            self._run = at.run
        self._features.setdefault(at.branch_key, {})[at.index] = [thinned(part, self.tokens).cpu() for part in parts]

    def _compare(self) -> None:
        """The table of the run that is over, where it was whole."""
        for steps in self._features.values():
            if len(steps) == self.steps:
                ordered = [steps[i] for i in range(self.steps)]
                for of_part in zip(*ordered, strict=True):
                    table, count = _similarities(of_part)
                    self._tables.append((count, table / count))
        self._features = {}

    def values(self) -> dict[str, Any]:
        """The matrix, and the encoder it is of."""
        self._compare()
        if not self._tables:
            raise ValueError("no guidance branch ran at every step of a run")
        assert self._site is not None
        total = sum(count for count, _ in self._tables)
        similar = torch.stack([table * (count / total) for count, table in self._tables]).sum(0)
        # Rounding may leave a feature at a distance from itself.
        distances = (1 - similar).clamp_min(0).fill_diagonal_(0)
        return {"distances": distances.tolist(), "encoder": self._site.label}


def _similarities(features: tuple[Tensor, ...]) -> tuple[Tensor, int]:
    """The sum over tokens of the cosine similarities of N features `(B, tokens, D)`: `(N, N)`, and the tokens."""
    flat = [feature.flatten(0, 1) for feature in features]
    if len({one.shape for one in flat}) > 1:
        raise ValueError("the feature changes its shape within a run, so its steps cannot be compared")
    count, width = flat[0].shape
    table = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    rows = max(1, _CHUNK // (len(flat) * width))
    for start in range(0, count, rows):
        part = normalize(torch.stack([one[start : start + rows] for one in flat], 1).double(), dim=-1)
        table += torch.bmm(part, part.transpose(1, 2)).sum(0)
    return table, count


def check(values: Mapping[str, Any], steps: int) -> None:
    """ValueError unless the distances are a square matrix, one row a step."""
    check_square(values, "distances", steps)
    if isinstance(values.get("encoder"), bool) or not isinstance(values.get("encoder"), int | str):
        raise ValueError(f"encoder={values.get('encoder')!r} must be a number of blocks or a name")
