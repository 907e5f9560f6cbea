"""Random calls of the raw attention ops, and the same calls in plain torch. Needs torch alone; see `_raw_cases.py`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskaccel.masks import TileMask
from maskaccel.ops.attention import reference
from maskaccel.ops.attention.schema import ABOVE, KEEP, MASS, PRUNE, TOP

HEAD_DIMS = (16, 24, 40, 64, 72, 80, 96, 128, 160, 256)
LENGTHS = (15, 16, 33, 64, 65, 96, 130, 200)
BLOCKS = ((16, 32), (32, 64), (64, 64), (48, 96), (128, 64), (128, 128), (96, 384))


class Draw:
    """Draws the operands of one call; made on the CPU, so that every device gets the same."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str, lengths: tuple[int, ...],
                 dims: tuple[int, ...]) -> None:  # fmt: skip
        self.rng, self.dtype, self.device = random.Random(seed), dtype, device
        self.generator = torch.Generator().manual_seed(seed)
        self.batch, self.kv_heads = self.rng.choice([1, 2]), self.rng.choice([1, 2])
        self.heads = self.kv_heads * self.rng.choice([1, 1, 3])
        self.sq, self.sk = self.rng.choice(lengths), self.rng.choice(lengths)
        self.width = self.rng.choice(dims)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype).to(self.device)

    def rows(self, n: int, heads: int, dtype: torch.dtype | None = None) -> Tensor:
        """`(B, n, heads, D)`: dense, a view of (B, heads, n, D), a slice of a projection, every second row."""
        kind = self.rng.randrange(4)
        if kind == 1:
            return self.normal(self.batch, heads, n, self.width, dtype=dtype).transpose(1, 2)
        if kind == 2:
            return self.normal(self.batch, n, heads, 3, self.width, dtype=dtype)[..., 1, :]
        if kind == 3:
            return self.normal(self.batch, 2 * n, heads, self.width, dtype=dtype)[:, ::2]
        return self.normal(self.batch, n, heads, self.width, dtype=dtype)

    def lead(self, *full: int) -> list[int]:
        return [n if self.rng.random() < 0.6 else 1 for n in full]

    def mask(self) -> tuple[tuple, tuple[int, int]]:
        """The mask's eight arguments and its block."""
        block = self.rng.choice(BLOCKS)
        kind, lead = self.rng.randrange(5), self.lead(self.batch, self.heads)
        size = self.sq, self.sk
        if kind == 0:
            return (None,) * 8, block
        tiles = torch.rand(*lead, -(-self.sq // block[0]), -(-self.sk // block[1]), generator=self.generator) < 0.6
        if kind == 1:
            made = TileMask.from_tiles(tiles, size, block)
        else:
            elements = tiles.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[:, :, : self.sq, : self.sk]
            noise = torch.rand(elements.shape, generator=self.generator)
            elements = elements & ((noise < 0.4) | (noise[:, :, :1, :1] < 0.2))
            if kind == 2:
                elements[:, :, : self.sq // 2] = False  # rows of nothing
            made = TileMask.from_bool(elements, block)
        operands = (*made.lists(), *made.transposed_lists(), made.pattern_of, made.patterns)
        return tuple(None if t is None else t.to(self.device) for t in operands), block

    def scores(self) -> tuple:
        """bias, relpos_table, relpos_q, relpos_k."""
        bias = table = of_query = of_key = None
        if self.rng.random() < 0.35:
            dtype = self.rng.choice([self.dtype, torch.float32])
            bias = self.normal(*self.lead(self.batch, self.heads, self.sq, self.sk), dtype=dtype)
            if self.rng.random() < 0.3:
                bias = bias.transpose(2, 3).contiguous().transpose(2, 3)
        if self.rng.random() < 0.25:
            table = self.normal(self.rng.choice([1, self.heads]), self.sq + self.sk, dtype=torch.float32)
            at = [torch.arange(n, dtype=torch.int32).repeat(self.rng.choice([1, self.batch]), 1)
                  for n in (self.sq, self.sk)]  # fmt: skip
            of_query, of_key = (at[0] + self.sk - 1).to(self.device), at[1].to(self.device)
        return bias, table, of_query, of_key


def _tile_attention(d: Draw, plain_only: bool = False) -> tuple:
    q, k, v = d.rows(d.sq, d.heads), d.rows(d.sk, d.kv_heads), d.rows(d.sk, d.kv_heads)
    mask, block = d.mask()
    flags = 0 if plain_only else d.rng.choice([0, 0, KEEP, KEEP, PRUNE, KEEP | PRUNE])
    reference_lse = out_scale = out_add = None
    if flags and d.rng.random() < 0.4:
        reference_lse = 3.0 + d.normal(d.batch, d.heads, d.sq, dtype=torch.float32)
    if not plain_only and d.rng.random() < 0.4:
        out_scale = torch.rand(d.lead(d.batch, d.heads, d.sq), generator=d.generator).to(d.device)
    if not plain_only and d.rng.random() < 0.4:
        out_add = d.rows(d.sq, d.heads, d.rng.choice([d.dtype, torch.float32]))
    threshold = d.rng.choice([-math.inf, -3.0, -0.5, 0.0, 1.0])
    scale = d.width**-0.5 * d.rng.choice([1.0, 1.0, 2.0, -1.0, 0.0])
    return q, k, v, *mask, *d.scores(), reference_lse, out_scale, out_add, *block, scale, threshold, flags


def _tile_attention_backward(d: Draw) -> tuple:
    call = _tile_attention(d, True)
    out, lse, _ = reference.tile_attention(*call)
    dout = d.rows(d.sq, d.heads)
    dlse = d.normal(d.batch, d.heads, d.sq, dtype=torch.float32) if d.rng.random() < 0.4 else None
    needs = d.rng.choice([15, 7, 7, 1, 2, 4, 8, 6])
    return dout, dlse, *call[:3], out, lse, *call[3:15], *call[18:21], needs


def _column_sums(d: Draw) -> tuple:
    call = _tile_attention(d, True)
    return *call[:2], reference.tile_attention(*call)[1], *call[6:15], *call[18:21]


def _merge(d: Draw) -> tuple:
    lse = [d.normal(d.batch, d.heads, d.sq, dtype=torch.float32) for _ in range(2)]
    lse[0][..., ::3] = -math.inf
    lse[1][..., ::2] = -math.inf
    return d.rows(d.sq, d.heads), lse[0], d.rows(d.sq, d.heads), lse[1]


def _merge_backward(d: Draw) -> tuple:
    dlse = d.normal(d.batch, d.heads, d.sq, dtype=torch.float32) if d.rng.random() < 0.5 else None
    return d.rows(d.sq, d.heads), dlse, *_merge(d)


def _tile_lists(d: Draw) -> tuple:
    lead, tiles, rows = d.lead(d.batch, d.heads), d.rng.choice([1, 7, 32, 70]), d.rng.choice([1, 5, 40])
    bits = torch.randint(-(2**31), 2**31, (*lead, rows, -(-tiles // 32)), generator=d.generator)
    pattern_of = None
    if d.rng.random() < 0.6:
        shape = (*(d.rng.choice([1, n]) for n in lead), rows, tiles)
        pattern_of = torch.randint(-2, 3, shape, generator=d.generator).clamp_min(-1).to(torch.int32).to(d.device)
    return bits.to(torch.int32).to(d.device), pattern_of, tiles, d.rng.random() < 0.5


def _tile_means(d: Draw) -> tuple:
    return d.rows(d.sq, d.heads), d.rng.choice([16, 32, 64, 128]), d.rng.random() < 0.5


def _select_tiles(d: Draw) -> tuple:
    """Scores whose sums are exact, so that every order of summation chooses the same tiles; many are equal."""
    tiles, rows, rule = d.rng.choice([1, 7, 32, 70]), d.rng.choice([1, 5, 40]), d.rng.choice([TOP, MASS, ABOVE])
    scores = torch.randint(-8, 64, (d.batch, d.heads, rows, tiles), generator=d.generator) / 64
    masks = [torch.rand(*d.lead(d.batch, d.heads, rows, tiles), generator=d.generator) < 0.2 for _ in range(2)]
    force, forbid = (m.to(d.device) if d.rng.random() < 0.5 else None for m in masks)
    value = {TOP: float(d.rng.choice([1, 5, 100])), MASS: d.rng.choice([0.25, 0.625, 1.0]), ABOVE: 0.5}[rule]
    limits = None
    if rule != TOP and d.rng.random() < 0.5:
        limits = torch.randint(1, 5, tuple(d.lead(d.batch, d.heads)), generator=d.generator).to(d.device) / 4
    return scores.to(d.device), force, forbid, limits, rule, value, d.rng.choice([0, 1, 3])


def _linear(d: Draw) -> tuple:
    q, k, v = d.rows(d.sq, d.heads), d.rows(d.sk, d.kv_heads), d.rows(d.sk, d.kv_heads)
    return q, k, v, d.rng.choice([0, 1]), d.rng.choice([0, 1]), 1e-4


def _linear_backward(d: Draw) -> tuple:
    return d.rows(d.sq, d.heads), *_linear(d)


DRAWS: dict[str, Callable[[Draw], tuple]] = {
    "tile_attention": _tile_attention,
    "tile_attention_backward": _tile_attention_backward,
    "attention_column_sums": _column_sums,
    "merge_attention": _merge,
    "merge_attention_backward": _merge_backward,
    "tile_lists": _tile_lists,
    "tile_means": _tile_means,
    "select_tiles": _select_tiles,
    "linear_attention": _linear,
    "linear_attention_backward": _linear_backward,
}


def draw(op: str, seed: int, dtype: torch.dtype, device: str = "cpu", lengths: tuple[int, ...] = LENGTHS,
         dims: tuple[int, ...] = HEAD_DIMS) -> tuple:  # fmt: skip
    """Arguments of one random call."""
    return DRAWS[op](Draw(seed, dtype, device, lengths, dims))


def run(op: str, kernel: Callable[..., Any], args: tuple) -> tuple[Tensor, ...]:
    """The results of a call as numbers that can be compared: bits apart, -inf and unread entries as marks."""
    out = kernel(*args)
    if op in ("tile_attention", "merge_attention"):
        lse = out[1]
        marks = [lse.masked_fill(lse.isneginf(), 0.0), lse.isneginf().float()]
        bits = [reference.unpack_words(t, 32 * t.shape[-1]).float() for t in out[2:] if t.numel()]
        return (out[0], *marks, *bits)
    if op == "tile_lists":
        index, count, order = out
        used = torch.arange(index.shape[-1], device=index.device) < count.sum(-1, keepdim=True)
        return torch.where(used, index, -1).float(), count.float(), order.float()
    if op == "select_tiles":
        return (reference.unpack_words(out, 32 * out.shape[-1]).float(),)
    return out if isinstance(out, tuple) else (out,)


# ------------------------------------------------------------------------------------- plain torch in the same dtype
def _parts(q: Tensor, k: Tensor, tiles: Tensor, pattern_of: Any, patterns: Any, bias: Any, table: Any, of_query: Any,
           of_key: Any, bm: int, bn: int, scale: float) -> Tensor:  # fmt: skip
    """Scores, rounded to the dtype of q after each step as plain torch does."""
    kept = reference.kept_elements(tiles, pattern_of, patterns, bm, bn, q.shape[1], k.shape[1])
    s = _heads(q, q.shape[2]) @ _heads(k, q.shape[2]).mT * scale
    if bias is not None:
        s = s + bias.to(s.dtype)
    if table is not None:
        s = s + table.to(s.dtype)[:, (of_query[:, :, None] - of_key[:, None, :]).long()].transpose(0, 1)
    return s.masked_fill(~kept, -math.inf)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.transpose(1, 2).repeat_interleave(heads // x.shape[2], dim=1)


def _weights(s: Tensor, lse: Tensor) -> Tensor:
    lse = lse[..., None]
    return (s.float() - lse.masked_fill(lse.isneginf(), 0.0)).exp().to(s.dtype)


def _tiles(q: Tensor, k: Tensor, index: Any, count: Any, bm: int, bn: int) -> Tensor:
    rows, columns = -(-q.shape[1] // bm), -(-k.shape[1] // bn)
    if index is None:
        return torch.ones(1, 1, rows, columns, dtype=torch.bool, device=q.device)
    return reference.kept_tiles(index, count, columns)


def _plain_attention(*args: Any) -> tuple:
    q, k, v, index, count = args[:5]
    out_scale, out_add, bm, bn, scale, _, flags = args[16:]
    _, lse, keep = reference.tile_attention(*args)
    tiles = _tiles(q, k, index, count, bm, bn)
    if flags & PRUNE:
        bits = reference.tile_attention(*args[:-1], flags | KEEP)[2]
        tiles = reference.unpack_words(bits, tiles.shape[-1])
    s = _parts(q, k, tiles, *args[9:15], bm, bn, scale)
    out = (s.softmax(-1).masked_fill(lse.isneginf()[..., None], 0.0) @ _heads(v, q.shape[2])).transpose(1, 2)
    if out_scale is not None:
        out = out * out_scale.expand(lse.shape).transpose(1, 2)[..., None]
    if out_add is not None:
        out = out + out_add
    return out.to(q.dtype), lse, keep


def _plain_backward(dout: Tensor, dlse: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                    *args: Any) -> tuple:  # fmt: skip
    index, count = args[:2]
    bm, bn, scale, needs = args[12:]
    heads, dtype = q.shape[2], q.dtype
    s = _parts(q, k, _tiles(q, k, index, count, bm, bn), *args[6:12], bm, bn, scale)
    p, do = _weights(s, lse), _heads(dout, heads)
    delta = (do.float() * _heads(out, heads).float()).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse[..., None]
    ds = (p * (do @ _heads(v, heads).mT - delta)).to(dtype)

    def grouped(x: Tensor) -> Tensor:
        return x.unflatten(1, (k.shape[2], -1)).sum(2).transpose(1, 2)

    grads = [
        (ds @ _heads(k, heads) * scale).transpose(1, 2), grouped(ds.mT @ _heads(q, heads) * scale), grouped(p.mT @ do)
    ]  # fmt: skip
    wanted = [g if needs >> i & 1 else q.new_empty(0) for i, g in enumerate(grads)]
    return (*wanted, ds.float() if needs & 8 else q.new_empty(0).float())


def _plain_sums(q: Tensor, k: Tensor, lse: Tensor, index_t: Any, count_t: Any, order_t: Any, *args: Any) -> Tensor:
    bm, bn, scale = args[6:]
    tiles = _tiles(k, q, index_t, count_t, bn, bm).mT
    return _weights(_parts(q, k, tiles, *args[:6], bm, bn, scale), lse).float().sum(-2)


_PLAIN = {
    "tile_attention": _plain_attention,
    "tile_attention_backward": _plain_backward,
    "attention_column_sums": _plain_sums,
}


def run_plain(op: str, args: tuple) -> tuple[Tensor, ...]:
    """The same call in plain torch; the truth for fp64 arguments."""
    wide = any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
    return run(op, reference.KERNELS[op] if wide or op not in _PLAIN else _PLAIN[op], args)
