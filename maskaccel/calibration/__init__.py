"""Measurements of a model that methods need: made by ordinary runs, kept as JSON."""

from .file import Calibration
from .kinds import KINDS, Kind
from .measure import Measurement, measure

__all__ = ["KINDS", "Calibration", "Kind", "Measurement", "measure"]
