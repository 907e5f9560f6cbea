"""Which attention tiles were worth computing, remembered from step to step (LiteAttention's skip state).

One bit a tile. The bits of a step are those of the step before that passed the threshold, so tiles are only ever given
up, and what must be kept is put back; a refresh looks at all of them again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..masks import TileMask
from ..ops.attention.reference import unpack_words
from ._once import Key, OncePerStep
from .generation import Generation


class SkipState:
    """The tiles that one attention module still computes, for each guidance branch of a run.

    Args:
        generation: The model's generation; a new run begins with all tiles.
        block: Tile size.
        refresh: All tiles are computed again at every so-many-th step; None: never.
        min_tiles: A row of tiles that would keep fewer than this stays as it was.
    """

    def __init__(self, generation: Generation, block: tuple[int, int], refresh: int | None, min_tiles: int) -> None:
        self.generation, self.block, self.refresh, self.min_tiles = generation, block, refresh, min_tiles
        self._bits: dict[Key, Tensor] = {}
        self._lse: dict[Key, Tensor] = {}
        self._shape: dict[Key, tuple[int, ...]] = {}
        self._last: dict[Key, int] = {}
        self._calls = OncePerStep(generation, "no attention tile can be left out")
        self._key: Key | None = None  # of the call that is under way
        generation.memories.append(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bits": {}, "_lse": {}, "_shape": {}, "_last": {}, "_key": None}

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(t.nbytes for held in (self._bits, self._lse) for t in held.values())

    def clear(self) -> None:
        """Forget every branch."""
        for held in (self._bits, self._lse, self._shape, self._last):
            held.clear()
        self._calls.clear()

    def mask(self, q: Tensor, k: Tensor, limits: Limits, part: int = 0) -> TileMask | None:
        """A call begins: the tiles to compute in this step; None: all that may be computed at all.

        A call of another shape (another batch, another resolution), or a step that went back, starts anew.

        Args:
            q: Queries `(B, Sq, H, D)`.
            k: Keys.
            limits: What is kept and left out in any case.
            part: Number of this attention within the call of its module.
        """
        index, self._key = self.generation.index, self._calls.key(part)
        if self._key is None:  # whose tiles are remembered cannot be told
            return limits.allowed
        branch = self._key
        shape = (*q.shape, k.shape[1])
        if self._shape.get(branch) != shape or index < self._last.get(branch, -1):
            for held in (self._bits, self._lse):
                held.pop(branch, None)
        self._shape[branch], self._last[branch] = shape, index
        again = self.refresh is not None and index > 0 and index % self.refresh == 0
        bits = None if again else self._bits.get(branch)
        if bits is None:
            return limits.allowed
        return TileMask(bits, self.block, (q.shape[1], k.shape[1]))

    def reference_lse(self) -> Tensor | None:
        """The lse of the same call in the last step, if it was kept."""
        return None if self._key is None else self._lse.get(self._key)

    def update(self, keep: Tensor, limits: Limits, lse: Tensor | None = None) -> None:
        """Remember what the threshold kept.

        Args:
            keep: int32 `(B, H, Mq, W)`, what `tile_attention` returned.
            limits: What is kept and left out in any case.
            lse: fp32 `(B, H, Sq)`, the reference of the next step.
        """
        branch = self._key
        if branch is None:
            return
        bits = keep
        if limits.kept is not None:
            bits = bits | limits.kept.bits
        if self.min_tiles:
            before = self._bits.get(branch)
            columns = unpack_words(bits, bits.shape[-1] * 32)
            few = columns.sum(-1, keepdim=True) < self.min_tiles
            every = torch.full_like(bits, -1) if before is None else before
            bits = torch.where(few, every, bits)
        if limits.allowed is not None:
            bits = bits & limits.allowed.bits
        held = self._bits.get(branch)
        if held is None or held.shape != bits.shape or _sealed(held):
            self._bits[branch] = bits.clone() if bits is keep else bits
        else:
            held.copy_(bits)  # one buffer: a captured graph reads it again
        if lse is not None:
            self._lse[branch] = lse.detach()


def _sealed(t: Tensor) -> bool:
    """Whether a tensor was made in inference mode and may not be written to outside of it."""
    return not torch.compiler.is_compiling() and t.is_inference() and not torch.is_inference_mode_enabled()


class Limits:
    """What is kept, and what is left out, whatever the threshold says.

    Args:
        shape: `(Sq, Sk)`.
        block: Tile size.
        device: Where the masks are made.
        keep_keys: Ranges `(start, end)` of key tokens whose tiles are always kept.
        keep_queries: The same of queries.
        skip_keys: Ranges of key tokens that are never computed; only tiles that lie in one wholly.
        diagonal: Whether the tiles on the diagonal are kept.

    Attributes:
        kept: Tiles always kept, or None.
        allowed: Tiles that may be computed, or None for all.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        block: tuple[int, int],
        device: torch.device,
        *,
        keep_keys: tuple[tuple[int, int], ...] = (),
        keep_queries: tuple[tuple[int, int], ...] = (),
        skip_keys: tuple[tuple[int, int], ...] = (),
        diagonal: bool = False,
    ) -> None:
        rows, columns = (-(-n // b) for n, b in zip(shape, block, strict=True))
        kept = torch.zeros(rows, columns, dtype=torch.bool)
        for start, end in _inside("must_keep", keep_keys, shape[1]):
            kept[:, start // block[1] : -(-end // block[1])] = True
        for start, end in _inside("must_keep", keep_queries, shape[0]):
            kept[start // block[0] : -(-end // block[0])] = True
        if diagonal:
            starts = torch.arange(rows) * block[0]
            kept[torch.arange(rows), (starts // block[1]).clamp(max=columns - 1)] = True
        allowed = torch.ones(rows, columns, dtype=torch.bool)
        for start, end in _inside("must_skip", skip_keys, shape[1]):
            first, last = -(-start // block[1]), columns if end == shape[1] else end // block[1]
            allowed[:, first:last] = False
        if allowed.numel() and not bool(allowed.any()):
            raise ValueError(f"must_skip={skip_keys} leaves none of the {shape[1]} tokens")
        kept &= allowed
        self.kept = TileMask.from_tiles(kept, shape, block).to(device) if bool(kept.any()) else None
        self.allowed = None if bool(allowed.all()) else TileMask.from_tiles(allowed, shape, block).to(device)


def _inside(name: str, ranges: tuple[tuple[int, int], ...], tokens: int) -> tuple[tuple[int, int], ...]:
    for start, end in ranges:
        if not 0 <= start < end <= tokens:
            raise ValueError(f"{name} holds the range ({start}, {end}); the sequence has {tokens} tokens")
    return ranges
