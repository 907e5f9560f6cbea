"""What is remembered between steps."""

from .feature import Feature
from .forecast import BDF, AdamsBashforth, Damped, Forecaster, Hold, Newton, Taylor
from .generation import Generation
from .history import History, Storage
from .site import Site, recall

__all__ = [
    "BDF",
    "AdamsBashforth",
    "Damped",
    "Feature",
    "Forecaster",
    "Generation",
    "History",
    "Hold",
    "Newton",
    "Site",
    "Storage",
    "Taylor",
    "recall",
]
