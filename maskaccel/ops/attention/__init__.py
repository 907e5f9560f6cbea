"""Tile-skipping attention: which tiles of the score matrix are computed is data."""
