"""Tile-skipping attention: which tiles of the score matrix are computed is data."""

from .api import Attention, attention_column_sums, linear_attention, merge_attention, tile_attention
from .relpos import RelativePosition
from .segments import segment_attention
from .select import tile_pool, tile_scores, tile_select

__all__ = [
    "Attention",
    "RelativePosition",
    "attention_column_sums",
    "linear_attention",
    "merge_attention",
    "segment_attention",
    "tile_attention",
    "tile_pool",
    "tile_scores",
    "tile_select",
]
