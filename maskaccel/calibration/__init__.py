"""Measurements of a model that methods need: made by one ordinary run, kept as JSON."""

from .file import Calibration

__all__ = ["Calibration"]
