"""What to compute: plain data and its algebra."""

from .schedule import Schedule

__all__ = ["Schedule"]
