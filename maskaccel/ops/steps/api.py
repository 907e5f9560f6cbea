"""Cached-feature ops: how far features moved, and the forecast from a history of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._registry import OpSpec, define
from ._cluster import kmeans
from ._combine import MAX_HISTORY, combine_history, combine_sites
from ._measure import gram, relative_difference
from ._normed import combine_history_norm_modulate, norm_modulate_difference
from ._scatter import scatter_combine
from .schema import SCHEMAS

__all__ = [
    "MAX_HISTORY",
    "combine_history",
    "combine_history_norm_modulate",
    "combine_sites",
    "gram",
    "kmeans",
    "norm_modulate_difference",
    "register",
    "relative_difference",
    "scatter_combine",
]


def _relative_difference_fake(x, reference, base=None):
    return x.new_empty((x.shape[0], 2), dtype=torch.float32)


def _combine_history_fake(history, weights, x, gate):
    return (history if x is None else x).new_empty(history.shape[1:])


def _combine_sites_fake(history, weights, x, gates):
    return (history if x is None else x).new_empty(history.shape[2:])


def _gram_fake(history, per_sample):
    steps, batch = history.shape[:2]
    return history.new_empty((batch, steps, steps) if per_sample else (steps, steps), dtype=torch.float64)


def _scatter_combine_fake(history, weights, fresh, index, labels, x, gate, newest, gamma):
    return (history if x is None else x).new_empty(history.shape[1:])


def _kmeans_fake(x, init, k, iters, metric):
    batch, n, width = x.shape
    rows = x.new_empty((batch, n), dtype=torch.int32)
    return rows, x.new_empty((batch, k, width), dtype=torch.float32), x.new_empty((batch, k), dtype=torch.int32)


def _combine_history_norm_modulate_fake(history, weights, x, gate, *_):
    like = history if x is None else x
    return like.new_empty(history.shape[1:]), like.new_empty(history.shape[1:])


def _norm_modulate_difference_fake(x, *_):
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 2), dtype=torch.float32)


_FAKES: dict[str, Callable[..., Any]] = {
    "relative_difference": _relative_difference_fake,
    "combine_history": _combine_history_fake,
    "combine_sites": _combine_sites_fake,
    "gram": _gram_fake,
    "scatter_combine": _scatter_combine_fake,
    "kmeans": _kmeans_fake,
    "combine_history_norm_modulate": _combine_history_norm_modulate_fake,
    "norm_modulate_difference": _norm_modulate_difference_fake,
}


def register() -> None:
    """Define the step ops; called once by `maskaccel.ops`."""
    for name, schema in SCHEMAS.items():
        define(OpSpec(name, schema, _FAKES[name]))
