"""What to compute: plain data and its algebra."""

from .cycle import Cycle, Whole
from .schedule import Action, Position, Rule, Schedule, Window

__all__ = ["Action", "Cycle", "Position", "Rule", "Schedule", "Whole", "Window"]
