"""What is remembered between steps."""

from .generation import Generation
from .history import History
from .site import Site, recall

__all__ = ["Generation", "History", "Site", "recall"]
