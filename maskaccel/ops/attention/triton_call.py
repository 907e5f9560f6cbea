"""What the Triton attention calls share: the contract checked, operands as the kernels take them, grids."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .triton_config import L2_SHARE, split

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_heads(name: str, t: Tensor, like: Tensor | None = None, shape: tuple[int, ...] | None = None) -> None:
    """`(B, S, H, D)` with a contiguous last dim; of the dtype and device of `like`, and of `shape`."""
    if t.dim() != 4 or t.dtype not in _DTYPES:
        raise RuntimeError(f"{name} must be (B, S, H, D) of fp32, bf16 or fp16, got {t.dtype} {tuple(t.shape)}")
    if t.stride(3) != 1:
        raise RuntimeError(f"{name} must be contiguous in its last dim, got strides {t.stride()}")
    if like is not None and (t.dtype != like.dtype or t.device != like.device):
        raise RuntimeError(f"{name} must be {like.dtype} on {like.device}, got {t.dtype} on {t.device}")
    if shape is not None and tuple(t.shape) != shape:
        raise RuntimeError(f"{name} must have shape {shape}, got {tuple(t.shape)}")


def check_plain(name: str, t: Tensor, dtype: torch.dtype, like: Tensor, *shapes: tuple[int, ...]) -> None:
    """A contiguous tensor of a dtype and one of `shapes`, on the device of `like`."""
    if t.dtype != dtype or not t.is_contiguous() or t.device != like.device or tuple(t.shape) not in shapes:
        wanted = " or ".join(map(str, dict.fromkeys(shapes)))
        raise RuntimeError(f"{name} must be contiguous {dtype} {wanted} on {like.device}, got {t.dtype} "
                           f"{tuple(t.shape)} with strides {t.stride()} on {t.device}")  # fmt: skip


def broadcast_strides(t: Tensor) -> tuple[int, ...]:
    """Strides with 0 for dims of size 1."""
    return tuple(0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True))


class Call:
    """Operands that every kernel takes: shapes, element masks, bias, relative positions."""

    def __init__(self, q: Tensor, k: Tensor, pattern_of, patterns, bias, relpos_table, relpos_q, relpos_k, bm: int,
                 bn: int, scale: float) -> None:  # fmt: skip
        check_heads("q", q)
        batch, self.queries, self.heads, width = q.shape
        if width % 8 or not 16 <= width <= 256:
            raise RuntimeError(f"the head dim must be a multiple of 8 from 16 to 256, got {width}")
        check_heads("k", k, q)
        if k.shape[0] != batch or k.shape[3] != width or k.shape[2] == 0 or self.heads % k.shape[2]:
            raise RuntimeError(f"k must be ({batch}, Sk, a divisor of {self.heads}, {width}), got {tuple(k.shape)}")
        if bm < 16 or bm % 16 or bn < 32 or bn % 32:
            raise RuntimeError(f"bm must be a multiple of 16 and bn of 32, got {bm} and {bn}")
        self.batch, self.keys, self.key_heads, self.width = batch, k.shape[1], k.shape[2], width
        self.per_key_head = self.heads // self.key_heads
        self.q, self.bm, self.bn = q, bm, bn
        self.rows, self.tiles = math.ceil(self.queries / bm), math.ceil(self.keys / bn)
        self.parts = split(width)
        self.elements = self._elements(pattern_of, patterns)
        self.bias = self._bias(bias)
        self.relpos = self._relpos(relpos_table, relpos_q, relpos_k)
        self.added = bias is not None or relpos_table is not None
        # nothing is added to the scores: the kernels take their maximum before they scale
        self.fold = not self.added and scale > 0
        self.scale = scale * math.log2(math.e)

    def _elements(self, pattern_of: Tensor | None, patterns: Tensor | None) -> tuple | None:
        if (pattern_of is None) != (patterns is None):
            raise RuntimeError("pattern_of and patterns must both be given or both be None")
        if pattern_of is None or patterns is None:
            return None
        tiles = (self.rows, self.tiles)
        shapes = [(b, h, *tiles) for b in (1, self.batch) for h in (1, self.heads)]
        check_plain("pattern_of", pattern_of, torch.int32, self.q, *shapes)
        check_plain("patterns", patterns, torch.int32, self.q, (len(patterns), self.bm, self.bn // 32))
        one = self.rows * self.tiles
        by_batch, by_head = pattern_of.shape[0] > 1, pattern_of.shape[1] > 1
        return pattern_of, patterns, by_batch * pattern_of.shape[1] * one, by_head * one

    def _bias(self, bias: Tensor | None) -> tuple | None:
        if bias is None:
            return None
        full = (self.batch, self.heads, self.queries, self.keys)
        if bias.dim() != 4 or any(size not in (1, n) for size, n in zip(bias.shape, full, strict=True)):
            raise RuntimeError(f"bias must be {full}, each dim full or 1, got {tuple(bias.shape)}")
        if bias.dtype not in (self.q.dtype, torch.float32) or bias.device != self.q.device:
            raise RuntimeError(f"bias must be {self.q.dtype} or fp32 on {self.q.device}, got {bias.dtype} on "
                               f"{bias.device}")  # fmt: skip
        return bias, *broadcast_strides(bias)

    def _relpos(self, table: Tensor | None, of_query: Tensor | None, of_key: Tensor | None) -> tuple | None:
        if table is None or of_query is None or of_key is None:
            if not table is of_query is of_key is None:
                raise RuntimeError("relpos_table, relpos_q and relpos_k must all be given or all be None")
            return None
        size = table.shape[-1]
        check_plain("relpos_table", table, torch.float32, self.q, (1, size), (self.heads, size))
        for name, t, n in (("relpos_q", of_query, self.queries), ("relpos_k", of_key, self.keys)):
            check_plain(name, t, torch.int32, self.q, (1, n), (self.batch, n))
        return (table, size if len(table) > 1 else 0, of_query, self.queries if len(of_query) > 1 else 0, of_key,
                self.keys if len(of_key) > 1 else 0)  # fmt: skip

    def statistics(self, name: str, t: Tensor) -> None:
        """Check an fp32 `(B, H, Sq)`."""
        check_plain(name, t, torch.float32, self.q, (self.batch, self.heads, self.queries))


class Lists:
    """Tile lists of one orientation and the grid of programs that walk them.

    Args:
        call: Shapes.
        index: Ids of tiles, `count` of each row, `order` of the rows; all None: every tile is full.
        rows: Rows of tiles of a head.
        tiles: Tiles of a row.
        suffix: `_t` where these are the transposed lists, for messages.
    """

    def __init__(self, call: Call, index: Tensor | None, count: Tensor | None, order: Tensor | None, rows: int,
                 tiles: int, suffix: str = "") -> None:  # fmt: skip
        self.rows, self.operand, self.order = rows, None, order
        self.mask_batch = self.mask_heads = 1
        names = f"index{suffix}, count{suffix} and order{suffix}"
        if index is None or count is None or order is None:
            if not index is count is order is None:
                raise RuntimeError(f"{names} must all be given or all be None")
            return
        if index.dim() != 4 or index.shape[0] not in (1, call.batch) or index.shape[1] not in (1, call.heads):
            raise RuntimeError(f"index{suffix} must be (1 or {call.batch}, 1 or {call.heads}, {rows}, L), got "
                               f"{tuple(index.shape)}")  # fmt: skip
        b, h, _, length = index.shape
        check_plain(f"index{suffix}", index, torch.int32, call.q, (b, h, rows, length))
        check_plain(f"count{suffix}", count, torch.int32, call.q, (b, h, rows, 2))
        check_plain(f"order{suffix}", order, torch.int32, call.q, (b * h * rows,))
        self.mask_batch, self.mask_heads = b, h
        self.operand = (index, count, length, h * rows if b > 1 else 0, rows if h > 1 else 0)

    def grid(self, call: Call, parts: int, heads: int, read: int) -> tuple[tuple[int], tuple]:
        """(grid, arguments of `place` but the last two) for programs of `heads` heads, `parts` a row.

        `read` is how many bytes the programs of one head read from the other side.
        """
        order, mask_heads = self.order, self.mask_heads
        if mask_heads not in (1, heads):  # a program serves several heads that have rows of their own
            order, mask_heads = None, heads
        rows = self.mask_batch * mask_heads * self.rows
        copies = call.batch // self.mask_batch * (heads // mask_heads)
        group = max(1, min(copies, L2_SHARE // max(read, 1)))
        places = (order, rows, group, (mask_heads, heads // mask_heads), call.batch // self.mask_batch)
        return (rows * parts * copies,), places


def alignment(*tensors: Tensor | None) -> int:
    """8 if all leading strides are multiples of 8 elements, so that rows can be read 16 bytes at a time, else 1."""
    strides = [s for t in tensors if t is not None for s in broadcast_strides(t)[:3]]
    return 1 if any(s % 8 for s in strides) else 8


def rows_operand(t: Tensor | None, align: int) -> tuple | None:
    """A `(B, S, H, D)` tensor with its strides in units of `align`."""
    return None if t is None else (t, *(s // align for s in broadcast_strides(t)[:3]))
