"""Mask2DiT (Qi et al. 2025, arXiv 2503.19881): videos of several scenes, each with a text of its own.

Tokens are `[T_1 .. T_n, V_1 .. V_n]`. The text of a scene and its video see each other, and all videos see each other:

    T_s sees T_s and V_s;    V_s sees T_s and V_1 .. V_n
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..masks import Segments, TileMask
from ..masks.rules import ALWAYS, NEVER
from ..masks.tiles import DEFAULT_BLOCK
from ..ops._checks import count as check_count
from ..ops.attention.check import check_block
from ..patching.attention import AttentionSite, Places
from ..state.generation import Generation
from ._attention import FixedMask, SparseAttention


@dataclass(frozen=True)
class Mask2DiT(SparseAttention):
    """The symmetric mask of scenes on joint attention. The model must have been trained with it.

    Attributes:
        texts: Text tokens of each scene.
        videos: Video tokens of each scene.
        block: Tile size.
    """

    texts: tuple[int, ...]
    videos: tuple[int, ...]
    block: tuple[int, int] = DEFAULT_BLOCK

    name = "Mask2DiT"
    kind = "lossy"
    kinds = ("joint",)
    paper = "Mask2DiT: Dual Mask-based Diffusion Transformer for Multi-Scene Long Video Generation (arXiv 2503.19881)"

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.videos) or not self.texts:
            raise ValueError(f"texts={self.texts!r} and videos={self.videos!r} must have an entry for each scene")
        for name in ("texts", "videos"):
            for tokens in getattr(self, name):
                check_count(name, tokens, 1)
        check_block(self.block)

    def policy(self, site: AttentionSite, generation: Generation) -> FixedMask:
        """The attention of one module."""
        return FixedMask(self, site, generation)

    def rule(self) -> Segments:
        """The rule of all tokens."""
        scenes = len(self.texts)
        ids = torch.arange(2 * scenes).repeat_interleave(torch.tensor((*self.texts, *self.videos)))
        relation = torch.full((2 * scenes, 2 * scenes), NEVER)
        relation[scenes:, scenes:] = ALWAYS
        for s in range(scenes):
            for a, b in ((s, s), (s, scenes + s), (scenes + s, s)):
                relation[a, b] = ALWAYS
        return Segments(ids, ids, relation)

    def tile_mask(self) -> TileMask:
        """The mask of all tokens."""
        tokens = sum(self.texts) + sum(self.videos)
        return TileMask.from_rule(self.rule(), (tokens, tokens), self.block)

    def fixed(self, places: Places) -> tuple[None, TileMask]:
        """The mask."""
        tokens = sum(self.texts) + sum(self.videos)
        if places.queries != tokens or places.keys != tokens:
            raise ValueError(
                f"{self.name}: texts and videos have {tokens} tokens, the attention has {places.queries} queries and "
                f"{places.keys} keys"
            )
        if places.text is not None and places.text != (0, sum(self.texts)):
            raise ValueError(
                f"{self.name}: the text is at {places.text}; it must be the first {sum(self.texts)} tokens"
            )
        return None, self.tile_mask()
