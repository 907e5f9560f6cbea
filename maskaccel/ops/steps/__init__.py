"""Cached-feature ops."""

from .api import combine_history, combine_sites, gram, relative_difference

__all__ = ["combine_history", "combine_sites", "gram", "relative_difference"]
