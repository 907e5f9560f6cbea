"""What to compute: plain data and its algebra."""

from .schedule import Action, Position, Rule, Schedule, Window

__all__ = ["Action", "Position", "Rule", "Schedule", "Window"]
