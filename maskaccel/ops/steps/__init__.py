"""Cached-feature ops."""

from .api import combine_history, relative_difference

__all__ = ["combine_history", "relative_difference"]
