"""What is remembered between steps."""

from .feature import Feature
from .forecast import BDF, AdamsBashforth, Damped, Forecaster, Hold, Newton, Taylor
from .forecast_channels import PerChannel
from .forecast_dmd import DynamicModes
from .forecast_foca import PredictCorrect
from .generation import Generation
from .history import History, Storage
from .kv import KVMemoryError, KVRows, KVStorage
from .ladder import Ladder, Series
from .site import Site, part_of, recall

__all__ = [
    "BDF",
    "AdamsBashforth",
    "Damped",
    "DynamicModes",
    "Feature",
    "Forecaster",
    "Generation",
    "History",
    "Hold",
    "KVMemoryError",
    "KVRows",
    "KVStorage",
    "Ladder",
    "Newton",
    "PerChannel",
    "PredictCorrect",
    "Series",
    "Site",
    "Storage",
    "Taylor",
    "part_of",
    "recall",
]
