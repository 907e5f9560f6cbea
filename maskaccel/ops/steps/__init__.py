"""Cached-feature ops."""

from .api import combine_history, combine_sites, gram, kmeans, relative_difference, scatter_combine

__all__ = ["combine_history", "combine_sites", "gram", "kmeans", "relative_difference", "scatter_combine"]
