"""What to compute: plain data and its algebra."""

from .cycle import Cycle, Whole
from .schedule import Action, Position, Schedule, StepRule, Window

__all__ = ["Action", "Cycle", "Position", "Schedule", "StepRule", "Whole", "Window"]
