"""`TileMask`: which tiles of a score matrix are computed, and which elements of those that are kept in part.

The mask is packed bits, one for a tile. A tile that is kept in part has a pattern, bits for its elements; equal
patterns are stored once, so a window in patch order needs few. A mask is checked once, where it is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import _checks
from ..ops.attention.check import check_block
from ..ops.attention.reference import kept_elements, pack_words, unpack_words
from .rules import ALL, NONE, SOME, Rule

DEFAULT_BLOCK = (128, 128)
_CHUNK = 1 << 25  # elements of tiles looked at together


def words_for(tiles: int) -> int:
    """int32 words that hold a bit for each of `tiles`."""
    return (tiles + 31) // 32


class TileMask:
    """Which tiles of the scores `(Sq, Sk)` are computed, for samples and heads alike or each.

    Args:
        bits: int32 `(B|1, H|1, ceil(Sq / bm), ceil(ceil(Sk / bn) / 32))`; bit `n % 32` of word `n / 32` is tile `n`.
        block: Tile size `(bm, bn)`: bm a multiple of 16, bn of 32.
        shape: `(Sq, Sk)`.
        pattern_of: int32 `(B|1, H|1, Mq, Nk)`, which pattern a tile has, -1 for full ones; or None.
        patterns: int32 `(P, bm, bn / 32)`, bits of the elements kept; or None.

    Raises:
        TypeError: A tensor has another dtype.
        ValueError: Shapes, devices or pattern numbers do not fit.
    """

    def __init__(
        self,
        bits: Tensor,
        block: Sequence[int],
        shape: Sequence[int],
        pattern_of: Tensor | None = None,
        patterns: Tensor | None = None,
    ) -> None:
        self.block = check_block(block)
        if len(shape) != 2 or min(shape) < 0 or any(int(n) != n for n in shape):
            raise ValueError(f"shape={tuple(shape)} must be (Sq, Sk)")
        self.shape = (int(shape[0]), int(shape[1]))
        bits = _checks.tensor("bits", bits)
        if bits.dtype != torch.int32:
            raise TypeError(f"bits has dtype {bits.dtype}; it must be int32")
        expected = (self.rows, words_for(self.columns))
        if bits.dim() != 4 or tuple(bits.shape[2:]) != expected:
            raise ValueError(
                f"bits has shape {tuple(bits.shape)}; for {self.shape} in tiles of {self.block} it must be"
                f" (B, H, {expected[0]}, {expected[1]})"
            )
        self.bits = bits.contiguous()
        self.pattern_of, self.patterns = pattern_of, patterns
        if (pattern_of is None) != (patterns is None):
            raise ValueError("pattern_of and patterns go together")
        if pattern_of is not None and patterns is not None:
            self._check_patterns(pattern_of, patterns)
        self._lists: dict[bool, tuple[Tensor, Tensor, Tensor]] = {}
        self._operands: dict[bool, tuple[Tensor | None, ...]] = {}

    def _check_patterns(self, pattern_of: Tensor, patterns: Tensor) -> None:
        bm, bn = self.block
        if pattern_of.dtype != torch.int32 or patterns.dtype != torch.int32:
            raise TypeError(f"pattern_of and patterns must be int32, got {pattern_of.dtype} and {patterns.dtype}")
        if pattern_of.dim() != 4 or tuple(pattern_of.shape[2:]) != (self.rows, self.columns):
            raise ValueError(
                f"pattern_of has shape {tuple(pattern_of.shape)}; it must be (B, H, {self.rows}, {self.columns})"
            )
        if patterns.dim() != 3 or tuple(patterns.shape[1:]) != (bm, bn // 32):
            raise ValueError(f"patterns has shape {tuple(patterns.shape)}; it must be (P, {bm}, {bn // 32})")
        if not self.bits.device == pattern_of.device == patterns.device:
            raise ValueError("bits, pattern_of and patterns must be on one device")
        batch, heads = (max(a, b) for a, b in zip(self.bits.shape[:2], pattern_of.shape[:2], strict=True))
        for have in (self.bits.shape[:2], pattern_of.shape[:2]):
            if have[0] not in (1, batch) or have[1] not in (1, heads):
                raise ValueError(f"bits {tuple(self.bits.shape)} and pattern_of {tuple(pattern_of.shape)} do not fit")
        self.bits = self.bits.expand(batch, heads, -1, -1).contiguous()
        self.pattern_of, self.patterns = pattern_of.contiguous(), patterns.contiguous()
        if pattern_of.device.type == "cpu" and pattern_of.numel() and int(pattern_of.max()) >= len(patterns):
            raise ValueError(f"pattern_of names pattern {int(pattern_of.max())}; there are {len(patterns)}")

    # ------------------------------------------------------------------------------------------------ shape
    @property
    def rows(self) -> int:
        """Rows of tiles, Mq."""
        return math.ceil(self.shape[0] / self.block[0])

    @property
    def columns(self) -> int:
        """Columns of tiles, Nk."""
        return math.ceil(self.shape[1] / self.block[1])

    @property
    def batch(self) -> int:
        """Samples told apart, 1 for a mask of all."""
        return self.bits.shape[0]

    @property
    def heads(self) -> int:
        """Heads told apart, 1 for a mask of all."""
        return self.bits.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the mask is."""
        return self.bits.device

    @property
    def nbytes(self) -> int:
        """Bytes of bits and patterns; of lists too, once they were asked for."""
        held = [self.bits, self.pattern_of, self.patterns, *(t for lists in self._lists.values() for t in lists)]
        return sum(t.nbytes for t in held if t is not None)

    def __repr__(self) -> str:
        kinds = "" if self.patterns is None else f", {len(self.patterns)} patterns"
        return (
            f"TileMask({self.shape[0]} x {self.shape[1]} in tiles of {self.block[0]} x {self.block[1]}, "
            f"batch {self.batch}, heads {self.heads}{kinds}, {self.device})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> TileMask:
        return self._same(*(None if t is None else t.clone() for t in (self.bits, self.pattern_of, self.patterns)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lists": {}, "_operands": {}}

    def _same(self, bits: Any, pattern_of: Tensor | None, patterns: Tensor | None) -> TileMask:
        return TileMask(bits, self.block, self.shape, pattern_of, patterns)

    # ------------------------------------------------------------------------------------------------ making
    @classmethod
    def from_tiles(cls, tiles: Tensor, shape: Sequence[int], block: Sequence[int] = DEFAULT_BLOCK) -> TileMask:
        """A mask of whole tiles.

        Args:
            tiles: bool `(Mq, Nk)`, `(H, Mq, Nk)` or `(B, H, Mq, Nk)`.
            shape: `(Sq, Sk)`.
            block: Tile size.
        """
        tiles = _checks.tensor("tiles", tiles)
        if tiles.dtype != torch.bool:
            raise TypeError(f"tiles has dtype {tiles.dtype}; it must be bool")
        if not 2 <= tiles.dim() <= 4:
            raise ValueError(
                f"tiles has shape {tuple(tiles.shape)}; it must be (Mq, Nk), (H, Mq, Nk) or (B, H, Mq, Nk)"
            )
        size = check_block(block)
        expected = tuple(math.ceil(n / b) for n, b in zip(shape, size, strict=True))
        if tuple(tiles.shape[-2:]) != expected:
            raise ValueError(f"tiles has shape {tuple(tiles.shape)}; {tuple(shape)} in tiles of {size} has {expected}")
        return cls(pack_words(tiles[(None,) * (4 - tiles.dim())]), size, shape)

    @classmethod
    def full(cls, shape: Sequence[int], block: Sequence[int] = DEFAULT_BLOCK, device: Any = None) -> TileMask:
        """The mask that keeps everything."""
        size = check_block(block)
        tiles = [math.ceil(n / b) for n, b in zip(shape, size, strict=True)]
        return cls.from_tiles(torch.ones(tiles, dtype=torch.bool, device=device), shape, size)

    @classmethod
    def from_bool(
        cls, mask: Tensor, block: Sequence[int] = DEFAULT_BLOCK, *, empty_rows: str = "zero", unique: bool = True
    ) -> TileMask:
        """The mask of any boolean matrix, exactly.

        Args:
            mask: bool `(Sq, Sk)`, `(H, Sq, Sk)` or `(B, H, Sq, Sk)`, True where a key is seen.
            block: Tile size.
            empty_rows: What becomes of queries that see nothing: `"zero"` gives them 0, `"dense"` lets them see
                everything (Mask2Former, Cheng et al. 2022).
            unique: Store equal patterns once. It needs a look at the result, so on a GPU it waits; False keeps one
                pattern a tile, and waits for nothing (a mask that is new in every layer).
        """
        mask = _checks.tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask has dtype {mask.dtype}; it must be bool")
        if not 2 <= mask.dim() <= 4:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; it must be (Sq, Sk), (H, Sq, Sk) or (B, H, Sq, Sk)")
        if empty_rows not in ("zero", "dense"):
            raise ValueError(f"empty_rows={empty_rows!r}; allowed are 'zero', 'dense'")
        bm, bn = check_block(block)
        mask = mask[(None,) * (4 - mask.dim())]
        if empty_rows == "dense":
            mask = mask | ~mask.any(-1, keepdim=True)
        sq, sk = mask.shape[2:]
        rows, columns = math.ceil(sq / bm), math.ceil(sk / bn)

        def cut(padding: bool) -> Tensor:
            padded = torch.nn.functional.pad(mask, (0, columns * bn - sk, 0, rows * bm - sq), value=padding)
            return padded.unflatten(3, (columns, bn)).unflatten(2, (rows, bm)).transpose(3, 4)

        tiles, full = cut(False).any(-1).any(-1), cut(True).all(-1).all(-1)
        partial = tiles & ~full
        words = pack_words(cut(False))  # (B, H, Mq, Nk, bm, bn / 32)
        if unique:
            chosen, which = torch.unique(words[partial].flatten(1), dim=0, return_inverse=True)
            pattern_of = torch.full(partial.shape, -1, dtype=torch.int32, device=mask.device)
            pattern_of[partial] = which.to(torch.int32)
            patterns = chosen.view(-1, bm, bn // 32)
            if not len(patterns):
                return cls(pack_words(tiles), (bm, bn), (sq, sk))
        else:
            numbers = torch.arange(partial.numel(), dtype=torch.int32, device=mask.device).view(partial.shape)
            pattern_of, patterns = torch.where(partial, numbers, -1), words.flatten(0, 3)
        return cls(pack_words(tiles), (bm, bn), (sq, sk), pattern_of, patterns)

    @classmethod
    def from_rule(
        cls, rule: Rule, shape: Sequence[int], block: Sequence[int] = DEFAULT_BLOCK, device: Any = None
    ) -> TileMask:
        """The tiles of a rule, exactly: a tile is left out, full or in part as its elements are.

        Args:
            rule: The rule.
            shape: `(Sq, Sk)`.
            block: Tile size.
            device: Where the mask is made.

        Raises:
            ValueError: The rule is for other lengths.
        """
        bm, bn = check_block(block)
        sq, sk = (int(n) for n in shape)
        rule.check(sq, sk)
        device = torch.device("cpu") if device is None else torch.device(device)
        rule = rule.to(device)
        # A token past the end counts as the last one, which adds nothing new to a tile.
        rows = torch.arange(math.ceil(sq / bm) * bm, device=device).clamp(max=sq - 1).view(-1, bm)
        columns = torch.arange(math.ceil(sk / bn) * bn, device=device).clamp(max=sk - 1).view(-1, bn)
        kind = rule.classify(rows, columns).expand(rule.batch, rule.heads, -1, -1).contiguous()
        at = (kind == SOME).any(0).any(0).nonzero()
        pattern_of = torch.full(kind.shape, -1, dtype=torch.int32, device=device)
        words: list[Tensor] = []
        places: list[Tensor] = []
        step = max(1, _CHUNK // max(1, bm * bn * rule.batch * rule.heads))
        for part in at.split(step):
            kept = rule.keep(rows[part[:, 0]], columns[part[:, 1]])
            kept = kept.expand(rule.batch, rule.heads, -1, -1, -1)
            every, some = kept.flatten(3).all(3), kept.flatten(3).any(3)
            exact = torch.where(every, ALL, torch.where(some, SOME, NONE)).to(torch.int8)
            kind[:, :, part[:, 0], part[:, 1]] = exact
            in_part = (exact == SOME).nonzero()
            b, h, t = in_part.unbind(1)
            chosen, which = torch.unique(pack_words(kept[b, h, t]).flatten(1), dim=0, return_inverse=True)
            words.append(chosen)
            places.append(torch.cat([in_part[:, :2], part[t], which[:, None]], dim=1))
        bits = pack_words(kind != NONE)
        total = sum(len(w) for w in words)
        if total == 0:
            return cls(bits, (bm, bn), (sq, sk))
        patterns, renamed = torch.unique(torch.cat(words), dim=0, return_inverse=True)
        before = 0
        for chosen, place in zip(words, places, strict=True):
            b, h, m, n, which = place.unbind(1)
            pattern_of[b, h, m, n] = renamed[before + which].to(torch.int32)
            before += len(chosen)
        return cls(bits, (bm, bn), (sq, sk), pattern_of, patterns.view(-1, bm, bn // 32))

    @classmethod
    def stack(cls, masks: Sequence[TileMask]) -> TileMask:
        """A mask for each head (masks of one head, block, shape and device) as one mask of all heads."""
        if not masks:
            raise ValueError("masks is empty; pass one for each head")
        first = masks[0]
        for mask in masks:
            if (mask.block, mask.shape, mask.device) != (first.block, first.shape, first.device) or mask.heads != 1:
                raise ValueError(f"{mask} and {first} cannot be heads of one mask")
        batch = max(mask.batch for mask in masks)
        bits = torch.cat([mask.bits.expand(batch, -1, -1, -1) for mask in masks], dim=1)
        if all(mask.patterns is None for mask in masks):
            return cls(bits, first.block, first.shape)
        tables: list[Tensor] = []
        numbers: list[Tensor] = []
        for mask in masks:
            before = sum(len(table) for table in tables)
            size = (batch, 1, mask.rows, mask.columns)
            if mask.pattern_of is None or mask.patterns is None:
                numbers.append(torch.full(size, -1, dtype=torch.int32, device=mask.device))
            else:
                numbers.append(torch.where(mask.pattern_of < 0, -1, mask.pattern_of + before).expand(size))
                tables.append(mask.patterns)
        merged, renamed = torch.unique(torch.cat(tables).flatten(1), dim=0, return_inverse=True)
        old = torch.cat(numbers, dim=1)
        pattern_of = torch.where(old < 0, -1, renamed[old.clamp(min=0).long()]).to(torch.int32)
        return cls(bits, first.block, first.shape, pattern_of, merged.view(-1, *tables[0].shape[1:]))

    # ------------------------------------------------------------------------------------------------ reading
    def tiles(self) -> Tensor:
        """Bool `(B|1, H|1, Mq, Nk)`: the tiles that are computed, in full or in part."""
        return unpack_words(self.bits, self.columns)

    def to_bool(self) -> Tensor:
        """Bool `(B|1, H|1, Sq, Sk)`: the elements that are kept."""
        return kept_elements(self.tiles(), self.pattern_of, self.patterns, *self.block, *self.shape)

    def density(self) -> float:
        """Fraction of tiles that are computed: what attention costs, of its dense cost."""
        tiles = self.tiles()
        return float(tiles.double().mean()) if tiles.numel() else 0.0

    def element_density(self) -> float:
        """Fraction of elements that are kept."""
        sq, sk = self.shape
        if not sq * sk:
            return 0.0
        total = 0.0
        bm, bn = self.block
        tiles = self.tiles()
        heights = torch.full((self.rows,), bm, dtype=torch.float64, device=self.device)
        widths = torch.full((self.columns,), bn, dtype=torch.float64, device=self.device)
        heights[-1], widths[-1] = sq - (self.rows - 1) * bm, sk - (self.columns - 1) * bn
        full = tiles if self.pattern_of is None else tiles & (self.pattern_of < 0)
        total += float((full * heights[:, None] * widths).sum())
        if self.pattern_of is not None and self.patterns is not None:
            # At the border only the part inside counts.
            kept = unpack_words(self.patterns, bn)
            for last_row in (False, True):
                for last_column in (False, True):
                    row = slice(-1, None) if last_row else slice(0, self.rows - 1)
                    column = slice(-1, None) if last_column else slice(0, self.columns - 1)
                    height = int(heights[-1]) if last_row else bm
                    width = int(widths[-1]) if last_column else bn
                    counts = kept[:, :height, :width].sum((1, 2)).double()
                    which = self.pattern_of[..., row, column]
                    used = tiles[..., row, column] & (which >= 0)
                    total += float(torch.where(used, counts[which.clamp(min=0).long()], 0.0).sum())
        return total / (sq * sk * self.batch * self.heads)

    def lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(index, count, order)` as `ops/attention/schema.py` says; made once."""
        return self._made(False)

    def transposed_lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the transposed mask, for the backward; made once."""
        return self._made(True)

    def _made(self, transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
        held = self._lists.get(transpose)
        if held is None:
            # Lists made in inference mode could not be saved for a backward later.
            with torch.inference_mode(False):
                made = torch.ops.maskaccel.tile_lists(self.bits, self.pattern_of, self.columns, transpose)
                # A longer list than the longest is only memory; on a GPU a look at it would wait.
                if self.device.type == "cpu" and not torch.compiler.is_compiling():
                    longest = int(made[1].sum(-1).max()) if made[1].numel() else 0
                    made = (made[0][..., : max(longest, 1)].contiguous(), *made[1:])
            held = self._lists[transpose] = made
        return held

    def operands(self, wants_grad: bool) -> tuple[Tensor | None, ...]:
        """The mask as kernels take it: lists, those of the transposed mask (None unless `wants_grad`), patterns."""
        compiling = torch.compiler.is_compiling()
        if not compiling and wants_grad in self._operands:
            return self._operands[wants_grad]
        transposed = self.transposed_lists() if wants_grad else (None, None, None)
        made = (*self.lists(), *transposed, self.pattern_of, self.patterns)
        if compiling:
            return made
        if wants_grad:  # of a mask that was made in inference mode: its tensors cannot be saved for the backward
            with torch.inference_mode(False):
                made = tuple(t.clone() if t is not None and t.is_inference() else t for t in made)
        self._operands[wants_grad] = made
        return made

    # ------------------------------------------------------------------------------------------------ algebra
    def _codes(self) -> Tensor:
        """0 left out, 1 full, 2 + p in part with pattern p: int64."""
        tiles = self.tiles().long()
        if self.pattern_of is None:
            return tiles
        return torch.where((tiles > 0) & (self.pattern_of >= 0), self.pattern_of.long() + 2, tiles)

    def _table(self) -> Tensor:
        """Words of every code, `(2 + P, bm, bn / 32)`."""
        bm, bn = self.block
        ends = torch.tensor([0, -1], dtype=torch.int32, device=self.device)[:, None, None].expand(2, bm, bn // 32)
        return ends if self.patterns is None else torch.cat([ends, self.patterns])

    def _combined(self, other: TileMask, operation: Any) -> TileMask:
        if not isinstance(other, TileMask):
            return NotImplemented
        if (self.block, self.shape) != (other.block, other.shape):
            raise ValueError(f"masks of {self.shape} in {self.block} and {other.shape} in {other.block} do not combine")
        if self.device != other.device:
            raise ValueError(f"masks on {self.device} and {other.device} do not combine")
        if self.patterns is None and other.patterns is None:
            return self._same(operation(self.bits, other.bits), None, None)
        mine, theirs = torch.broadcast_tensors(self._codes(), other._codes())
        base = len(other._table())
        pairs, which = torch.unique(mine * base + theirs, return_inverse=True)
        words = operation(self._table()[pairs // base], other._table()[pairs % base])
        return self._from_codes(which, words)

    def _from_codes(self, which: Tensor, words: Tensor) -> TileMask:
        """The mask whose tile has the words `words[which]`."""
        flat = words.flatten(1)
        every = torch.full_like(flat[:1], -1)
        kinds = torch.unique(torch.cat([torch.zeros_like(every), every, flat]), dim=0, return_inverse=True)
        table, names = kinds[0], kinds[1]
        nothing, full = names[0], names[1]
        code = names[2:][which]
        partial = (code != nothing) & (code != full)
        bits = pack_words(code != nothing)
        if not bool(partial.any()):
            return self._same(bits, None, None)
        used, renamed = torch.unique(code[partial], return_inverse=True)
        pattern_of = torch.full(code.shape, -1, dtype=torch.int32, device=self.device)
        pattern_of[partial] = renamed.to(torch.int32)
        bm, bn = self.block
        return self._same(bits, pattern_of, table[used].view(-1, bm, bn // 32))

    def __and__(self, other: TileMask) -> TileMask:
        return self._combined(other, torch.bitwise_and)

    def __or__(self, other: TileMask) -> TileMask:
        return self._combined(other, torch.bitwise_or)

    def __invert__(self) -> TileMask:
        if self.patterns is None:
            return self._same(pack_words(~self.tiles()), None, None)
        return self._from_codes(self._codes(), ~self._table())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TileMask):
            return NotImplemented
        if (self.block, self.shape, self.device) != (other.block, other.shape, other.device):
            return False
        return self.bits.shape == other.bits.shape and bool(torch.equal(self.to_bool(), other.to_bool()))

    __hash__ = None  # type: ignore[assignment]

    def transpose(self) -> TileMask:
        """The mask of the transposed scores; for blocks whose sizes may change places."""
        bits = pack_words(self.tiles().mT)
        block, shape = (self.block[1], self.block[0]), (self.shape[1], self.shape[0])
        if self.pattern_of is None or self.patterns is None:
            return TileMask(bits, block, shape)
        turned = pack_words(unpack_words(self.patterns, self.block[1]).mT)
        return TileMask(bits, block, shape, self.pattern_of.mT.contiguous(), turned)

    def part(
        self,
        queries: tuple[int, int] | None = None,
        keys: tuple[int, int] | None = None,
        heads: tuple[int, int] | None = None,
    ) -> TileMask:
        """The mask of some tokens or heads: what a rank of ring (queries, keys) or Ulysses (heads) attention needs.

        Args:
            queries: `(start, end)` in tokens, on borders of tiles; the end may be that of the sequence.
            keys: The same of the keys.
            heads: `(start, end)`; a mask of all heads stays one.
        """
        tiles, sizes = [], []
        for name, span, tokens, block in (
            ("queries", queries, self.shape[0], self.block[0]),
            ("keys", keys, self.shape[1], self.block[1]),
        ):
            start, end = (0, tokens) if span is None else span
            if not 0 <= start < end <= tokens or start % block or (end % block and end != tokens):
                raise ValueError(f"{name}={span} must lie in (0, {tokens}), on borders of tiles of {block}")
            tiles.append(slice(start // block, math.ceil(end / block)))
            sizes.append(end - start)
        one = heads is None or self.heads == 1
        if heads is not None and not one and not 0 <= heads[0] < heads[1] <= self.heads:
            raise ValueError(f"heads={heads} must lie in (0, {self.heads})")
        head = slice(None) if one or heads is None else slice(*heads)
        bits = pack_words(self.tiles()[:, head, tiles[0], tiles[1]])
        pattern_of = self.pattern_of
        if pattern_of is not None:
            mine = head if pattern_of.shape[1] > 1 else slice(None)
            pattern_of = pattern_of[:, mine, tiles[0], tiles[1]].contiguous()
        return TileMask(bits, self.block, sizes, pattern_of, self.patterns)

    def dilate(self, rows: int = 1, columns: int = 1) -> TileMask:
        """Tiles within so many rows and columns of a kept one are kept too, in full; partial tiles become full."""
        if rows < 0 or columns < 0:
            raise ValueError(f"rows={rows}, columns={columns} must be 0 or more")
        size = (2 * rows + 1, 2 * columns + 1)
        grown = torch.nn.functional.max_pool2d(self.tiles().float(), size, stride=1, padding=(rows, columns)) > 0
        return TileMask.from_tiles(grown, self.shape, self.block)

    def whole(self) -> TileMask:
        """The same tiles, all of them in full."""
        return self if self.patterns is None else self._same(self.bits, None, None)

    def to(self, device: Any) -> TileMask:
        """The mask on a device."""
        if torch.device(device) == self.device:
            return self
        return self._same(*(None if t is None else t.to(device) for t in (self.bits, self.pattern_of, self.patterns)))

    # ------------------------------------------------------------------------------------------------ FlexAttention
    def to_block_mask(self) -> Any:
        """The mask as FlexAttention's `BlockMask`, element for element."""
        from .flex import to_block_mask

        return to_block_mask(self)

    @classmethod
    def from_block_mask(cls, block_mask: Any) -> TileMask:
        """The mask of a FlexAttention `BlockMask`: its full blocks, and its `mask_mod` in the partial ones."""
        from .flex import from_block_mask

        return from_block_mask(block_mask)
