"""Fakes and derivatives of the attention ops, and their definition in torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._registry import OpSpec, define, define_bare, op
from . import reference
from .schema import BARE, KEEP, NEED_K, NEED_Q, NEED_S, NEED_V, PRUNE, SAME_BITS, SCHEMAS, unpacked

# Arguments of `tile_attention` by position.
_MASK, _SCORES, _EPILOGUE, _NUMBERS = slice(3, 11), slice(11, 15), slice(16, 18), slice(18, 23)


def _lse(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=dtype)


def _fake_tile_attention(q, k, v, *args):
    bm, bn, _, _, flags = args[-5:]
    keep = q.new_empty(0, dtype=torch.int32)
    if flags & KEEP:
        rows, words = math.ceil(q.shape[1] / bm), math.ceil(math.ceil(k.shape[1] / bn) / 32)
        keep = q.new_empty((q.shape[0], q.shape[2], rows, words), dtype=torch.int32)
    return q.new_empty(q.shape), _lse(q), keep


def _fake_bare(q, *_):
    return q.new_empty(q.shape), _lse(q)


def _fake_tested(q, k, v, *args):
    numbers = unpacked(args[-2])
    return _fake_tile_attention(q, k, v, numbers["bm"], numbers["bn"], 0, 0, args[-1] & 0xFFFF)


def _fake_tile_attention_backward(dout, dlse, q, k, v, *args):
    needs = args[-1]
    (batch, sq, heads, _), sk = q.shape, k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        q.new_empty(q.shape if needs & NEED_Q else (0,)),
        k.new_empty(k.shape if needs & NEED_K else (0,)),
        v.new_empty(v.shape if needs & NEED_V else (0,)),
        q.new_empty((batch, heads, sq, sk) if needs & NEED_S else (0,), dtype=wide),
    )


def _fake_column_sums(q, k, lse, *args):
    return lse.new_empty((q.shape[0], q.shape[2], k.shape[1]))


def _fake_merge(out1, lse1, out2, lse2):
    return out1.new_empty(out1.shape), lse1.new_empty(lse1.shape)


def _fake_merge_backward(dout, dlse, out1, lse1, out2, lse2):
    return tuple(t.new_empty(t.shape) for t in (out1, lse1, out2, lse2))


def _fake_tile_lists(bits, pattern_of, tiles, transpose):
    batch, heads, rows, _ = bits.shape
    m, length = (tiles, rows) if transpose else (rows, tiles)
    return (
        bits.new_empty(batch, heads, m, length),
        bits.new_empty(batch, heads, m, 2),
        bits.new_empty(batch * heads * m),
    )


def _fake_tile_means(x, block, alike):
    b, s, h, d = x.shape
    blocks = -(-s // block)
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    return x.new_empty(b, blocks, h, d), x.new_empty((b, h, blocks) if alike else (0,), dtype=wide)


def _fake_select_tiles(scores, force, forbid, limits, rule, value, min_per_row):
    return scores.new_empty((*scores.shape[:3], -(-scores.shape[3] // 32)), dtype=torch.int32)


def _fake_linear(q, k, v, *_):
    return q.new_empty(q.shape)


def _fake_linear_backward(dout, q, k, v, *_):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


# ---------------------------------------------------------------------------------------------------- derivatives
def _save_attention(inputs: tuple, output: Any) -> tuple:
    if inputs[_EPILOGUE] != (None, None):
        raise RuntimeError("tile_attention: out_scale and out_add have no derivative; apply them to the result")
    if inputs[-1] & PRUNE:
        raise RuntimeError("tile_attention: a pruned result has no derivative")
    out, lse, _ = output
    return (*inputs[:3], out, lse, *inputs[_MASK], *inputs[_SCORES])


def _with_transposed(mask: tuple, q: Tensor, k: Tensor, bm: int, bn: int) -> tuple:
    """The lists with their transposed form, made here where the caller had none."""
    index, count = mask[:2]
    if index is None or mask[3] is not None:
        return mask
    tiles = reference.kept_tiles(index, count, math.ceil(k.shape[1] / bn))
    bits = reference.pack_words(tiles)
    pattern_of = mask[6]
    if pattern_of is not None:
        lead = [max(a, b) for a, b in zip(bits.shape[:2], pattern_of.shape[:2], strict=True)]
        bits = bits.expand(*lead, -1, -1).contiguous()
    made = op("maskaccel", "tile_lists")(bits, pattern_of, tiles.shape[-1], True)
    return (*mask[:3], *made, *mask[6:])


def _attention_backward(namespace: str, plain: tuple, needs: tuple, saved: tuple, grads: tuple) -> tuple:
    dout, dlse, _ = grads
    q, k, v, out, lse, *rest = saved
    mask, scores = tuple(rest[:8]), tuple(rest[8:])
    bm, bn, scale, _, _ = plain[_NUMBERS]
    bias, table = scores[:2]
    wanted = [needs[0], needs[1], needs[2], needs[11] or needs[12]]
    asked = sum(bit for bit, want in zip((NEED_Q, NEED_K, NEED_V, NEED_S), wanted, strict=True) if want)
    none: tuple = (None,) * len(needs)
    if not asked or (dout is None and dlse is None):
        return none
    if torch.are_deterministic_algorithms_enabled():
        asked |= SAME_BITS
    dout = torch.zeros_like(out) if dout is None else _checks.dense_last(dout)
    dlse = None if dlse is None else dlse.contiguous()
    mask = _with_transposed(mask, q, k, bm, bn)
    dq, dk, dv, ds = op(namespace, "tile_attention_backward")(
        dout, dlse, q, k, v, out, lse, *mask, *scores, bm, bn, scale, asked
    )
    result = list(none)
    result[:3] = [grad if want else None for grad, want in zip((dq, dk, dv), wanted[:3], strict=True)]
    if needs[11]:
        result[11] = ds.sum_to_size(bias.shape).to(bias.dtype)
    if needs[12]:
        result[12] = _table_gradient(ds, table, scores[2], scores[3])
    return tuple(result)


def _table_gradient(ds: Tensor, table: Tensor, relpos_q: Tensor, relpos_k: Tensor) -> Tensor:
    at = relpos_q[:, :, None] - relpos_k[:, None, :]  # (1|B, Sq, Sk)
    if at.shape[0] == 1:
        ds = ds.sum(0, keepdim=True)
    total = ds.new_zeros(ds.shape[1], table.shape[1])
    for b in range(ds.shape[0]):
        total.index_add_(1, at[b].flatten().long(), ds[b].flatten(1))
    return total.sum_to_size(table.shape).to(table.dtype)


def _save_merge(inputs: tuple, output: Any) -> tuple:
    return inputs


def _merge_backward(namespace: str, plain: tuple, needs: tuple, saved: tuple, grads: tuple) -> tuple:
    dout, dlse = grads
    if dout is None and dlse is None:
        return (None,) * 4
    dout = torch.zeros_like(saved[0]) if dout is None else _checks.dense_last(dout)
    dlse = None if dlse is None else dlse.contiguous()
    return op(namespace, "merge_attention_backward")(dout, dlse, *saved)


def _save_linear(inputs: tuple, output: Any) -> tuple:
    return inputs[:3]


def _linear_backward(namespace: str, plain: tuple, needs: tuple, saved: tuple, grads: tuple) -> tuple:
    if grads[0] is None:
        return (None,) * 6
    dout = _checks.dense_last(grads[0])
    return (*op(namespace, "linear_attention_backward")(dout, *saved, *plain[3:]), None, None, None)


_FAKES: dict[str, Callable[..., Any]] = {
    "tile_attention": _fake_tile_attention,
    "tile_attention_backward": _fake_tile_attention_backward,
    "attention_column_sums": _fake_column_sums,
    "merge_attention": _fake_merge,
    "merge_attention_backward": _fake_merge_backward,
    "tile_lists": _fake_tile_lists,
    "tile_means": _fake_tile_means,
    "select_tiles": _fake_select_tiles,
    "linear_attention": _fake_linear,
    "linear_attention_backward": _fake_linear_backward,
}
_DERIVATIVES: dict[str, tuple[Callable, Callable]] = {
    "tile_attention": (_save_attention, _attention_backward),
    "merge_attention": (_save_merge, _merge_backward),
    "linear_attention": (_save_linear, _linear_backward),
}


def register() -> None:
    """Define the attention ops."""
    for name, schema in SCHEMAS.items():
        save, backward = _DERIVATIVES.get(name, (None, None))
        define(OpSpec(name, schema, _FAKES[name], save, backward))
    define_bare("tile_attention_bare", BARE["tile_attention_bare"], _fake_bare, unpacked)
    define_bare("tile_attention_tested_bare", BARE["tile_attention_tested_bare"], _fake_tested)
