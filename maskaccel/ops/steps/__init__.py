"""Cached-feature ops."""

from .api import (
    combine_history,
    combine_history_norm_modulate,
    combine_sites,
    gram,
    kmeans,
    norm_modulate_difference,
    relative_difference,
    scatter_combine,
)

__all__ = [
    "combine_history",
    "combine_history_norm_modulate",
    "combine_sites",
    "gram",
    "kmeans",
    "norm_modulate_difference",
    "relative_difference",
    "scatter_combine",
]
