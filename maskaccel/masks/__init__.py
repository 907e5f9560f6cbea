"""What to compute: plain data and its algebra."""

from .cycle import Cycle, DenseAt, Whole
from .order import TokenOrder
from .rules import Causal, Dense, Lengths, Rule, Segments, varlen
from .schedule import Action, Position, Schedule, StepRule, Window
from .tiles import TileMask
from .tokens import TokenIndex
from .windows import GridWindow

__all__ = [
    "Action",
    "Causal",
    "Cycle",
    "Dense",
    "DenseAt",
    "GridWindow",
    "Lengths",
    "Position",
    "Rule",
    "Schedule",
    "Segments",
    "StepRule",
    "TileMask",
    "TokenIndex",
    "TokenOrder",
    "Whole",
    "Window",
    "varlen",
]
