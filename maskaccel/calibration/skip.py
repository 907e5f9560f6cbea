"""Thresholds of LiteAttention for each layer and step (Shmilovich et al. 2025, arXiv 2511.11062).

A run computes everything. Beside it, for each of several thresholds, the attention is computed over the tiles that this
threshold would have kept, step after step, and its result is compared with the whole one. Of each layer and step the
largest threshold is taken whose relative error at the next step stays within what was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..masks import TileMask
from ..ops import tile_attention
from ..ops.attention.check import check_block
from ..patching.attention import AttentionCall, AttentionSite, attention_sites, bridge
from ..patching.patch import Context
from .probe import Probe, mean

CANDIDATES = (-14.0, -12.0, -10.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0)


class SkipThresholds(Probe):
    """Measures the error of several thresholds.

    Args:
        error: Largest relative error of an attention's result, `|sparse - dense| / |dense|` in the mean of absolutes.
        rows: Queries of a tile.
        columns: Keys of a tile.
    """

    def __init__(self, error: float = 0.05, rows: int = 128, columns: int = 128) -> None:
        super().__init__()
        if isinstance(error, bool) or not isinstance(error, int | float) or not 0 < error < math.inf:
            raise ValueError(f"error={error!r} must be above 0")
        self.error, self.block = error, check_block((rows, columns))
        self.layers = 0
        self._errors: dict[tuple[int, int, int], list[float]] = {}

    def watch(self, context: Context) -> None:
        """Every attention among the latent tokens."""
        for site in attention_sites(context, self.name, ("self", "joint")):
            self.layers = max(self.layers, site.layers)
            bridge(context, self.name, site, _Watched(self, site))
        if not self.layers:
            raise LookupError("no attention of it is known")

    def note(self, layer: int, step: int, candidate: int, error: float) -> None:
        """Remember the error of one threshold at one call."""
        self._errors.setdefault((layer, step, candidate), []).append(error)

    def values(self) -> dict[str, Any]:
        """The thresholds, one row for each layer."""
        table = []
        for layer in range(self.layers):
            row = []
            for step in range(self.steps):
                # What is kept at a step shows at the next; after the last step nothing does.
                seen = [self._errors.get((layer, min(step + 1, self.steps - 1), c)) for c in range(len(CANDIDATES))]
                within = [t for t, found in zip(CANDIDATES, seen, strict=True) if found and mean(found) <= self.error]
                row.append(max(within, default=CANDIDATES[0]))
            table.append(row)
        return {"thresholds": table, "rows": self.block[0], "columns": self.block[1]}


class _Watched:
    """The attention of one module, computed whole, with the tiles of each threshold beside it."""

    def __init__(self, probe: SkipThresholds, site: AttentionSite) -> None:
        self.probe, self.site = probe, site
        self._kept: dict[tuple[int, str, int], Tensor] = {}

    def __call__(self, call: AttentionCall) -> Tensor | None:
        if call.refusal() is not None or not self.probe.arrived():
            return None
        at = self.probe.generation
        self._kept = {key: bits for key, bits in self._kept.items() if key[0] == at.run}
        options: dict[str, Any] = {"scale": call.scale, "bias": call.bias()}
        dense = tile_attention(call.q, call.k, call.v, **options).float()
        size = dense.abs().mean()
        shape = (call.q.shape[1], call.k.shape[1])
        for number, threshold in enumerate(CANDIDATES):
            key = (at.run, at.branch_key, number)
            bits = self._kept.get(key)
            mask = None if bits is None else TileMask(bits, self.probe.block, shape)
            found = tile_attention(
                call.q, call.k, call.v, mask, skip_threshold=threshold, return_keep=True,
                block=self.probe.block, **options,
            )  # fmt: skip
            self._kept[key] = found.keep
            if mask is not None:
                error = (found.out.float() - dense).abs().mean() / size
                self.probe.note(self.site.layer, at.index, number, float(torch.nan_to_num(error)))
        return None


def check(values: Mapping[str, Any], steps: int) -> None:
    """ValueError unless there is a number for each layer and step."""
    table = values.get("thresholds")
    if not isinstance(table, tuple) or not table:
        raise ValueError("thresholds must be a list of layers")
    for row in table:
        if not isinstance(row, tuple) or len(row) != steps:
            raise ValueError(f"thresholds must have {steps} numbers in each layer, one a step")
        if any(isinstance(t, bool) or not isinstance(t, int | float) for t in row):
            raise ValueError("thresholds must hold numbers")
    check_block((values.get("rows"), values.get("columns")))  # type: ignore[arg-type]
