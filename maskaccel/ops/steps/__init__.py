"""Cached-feature ops."""

from .api import combine_history, gram, relative_difference

__all__ = ["combine_history", "gram", "relative_difference"]
