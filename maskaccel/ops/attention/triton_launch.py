"""Calls of the Triton kernel of tile_attention; the contract is checked here, blocks and grids are worked out."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import _triton as host
from .schema import KEEP, PRUNE
from .triton_call import Call, Lists, alignment, broadcast_strides, check_heads, rows_operand
from .triton_config import Blocks, fit, forward_blocks, keep_blocks, precision


def _out_scale(call: Call, t: Tensor | None) -> tuple | None:
    if t is None:
        return None
    full = (call.batch, call.heads, call.queries)
    if t.dim() != 3 or any(size not in (1, n) for size, n in zip(t.shape, full, strict=True)):
        raise RuntimeError(f"out_scale must be {full}, each dim full or 1, got {tuple(t.shape)}")
    if t.dtype != torch.float32 or t.device != call.q.device:
        raise RuntimeError(f"out_scale must be fp32 on {call.q.device}, got {t.dtype} on {t.device}")
    return t, *broadcast_strides(t)


def _check_out_add(call: Call, t: Tensor | None) -> None:
    if t is None:
        return
    check_heads("out_add", t, None, tuple(call.q.shape))
    if t.dtype not in (call.q.dtype, torch.float32) or t.device != call.q.device:
        raise RuntimeError(f"out_add must be {call.q.dtype} or fp32 on {call.q.device}, got {t.dtype} on {t.device}")


def _blocks(call: Call, masked: bool, flags: int) -> tuple[Blocks, int, int]:
    """(blocks, bm, bn); where nothing depends on the mask tiles they are the blocks."""
    blocks = forward_blocks(call.q, call.added)
    if not masked and not flags & KEEP:
        return blocks, blocks.queries, blocks.keys
    if flags & PRUNE:
        whole = fit(keep_blocks(call.q), call.bm, call.bn)
        if (whole.queries, whole.keys) == (call.bm, call.bn):
            return whole, call.bm, call.bn
    return fit(blocks, call.bm, call.bn), call.bm, call.bn


def tile_attention(q, k, v, index, count, order, index_t, count_t, order_t, pattern_of, patterns, bias, relpos_table,
                   relpos_q, relpos_k, reference_lse, out_scale, out_add, bm, bn, scale, skip_threshold,
                   flags):  # fmt: skip
    call = Call(q, k, pattern_of, patterns, bias, relpos_table, relpos_q, relpos_k, bm, bn, scale)
    check_heads("v", v, q, tuple(k.shape))
    lists = Lists(call, index, count, order, call.rows, call.tiles)
    if call.elements is not None and lists.operand is None:
        raise RuntimeError("pattern_of and patterns need index, count and order")
    if reference_lse is not None:
        call.statistics("reference_lse", reference_lse)
    scale_operand = _out_scale(call, out_scale)
    _check_out_add(call, out_add)
    asked = flags & KEEP
    if flags & PRUNE:
        flags |= KEEP
    words = math.ceil(call.tiles / 32)
    out = q.new_empty(q.shape)
    lse = q.new_empty(call.batch, call.heads, call.queries, dtype=torch.float32)
    keep = q.new_empty((call.batch, call.heads, call.rows, words) if flags & KEEP else 0, dtype=torch.int32)
    if not out.numel():
        return out, lse, keep.zero_() if asked else keep.new_empty(0)

    from .triton_forward import tile_forward

    blocks, bm, bn = _blocks(call, lists.operand is not None, flags)
    if bm != call.bm or bn != call.bn:
        lists.rows = math.ceil(call.queries / bm)
    rows, tiles = lists.rows, math.ceil(call.keys / bn)
    parts, cut = bm // blocks.queries, bn // blocks.keys
    gate, found, prune = None, keep, bool(flags & PRUNE)
    if prune and (parts, cut) != (1, 1):
        _find_keep(call, lists, k, reference_lse, keep, blocks, words, skip_threshold)
        gate, prune, flags = keep, False, 0
    elif parts > 1 and flags & KEEP:
        found = keep.new_empty(call.batch, call.heads, rows, parts, words)
    grid, places = lists.grid(call, parts, call.heads, 2 * call.keys * call.width * k.element_size())
    align = alignment(q, k, v, out_add)
    q_op, k_op, v_op, add_op = (rows_operand(t, align) for t in (q, k, v, out_add))
    host.launch(
        tile_forward, grid, q, q_op, k_op, v_op, lists.operand, places[0], call.elements, call.bias, call.relpos,
        reference_lse if flags & KEEP else None, gate, scale_operand, add_op, out, lse,
        found if flags & KEEP else None, *places[1:], call.heads, call.per_key_head, call.queries, call.keys, rows,
        tiles, words, bm, bn, call.scale, skip_threshold, D=call.width, D1=call.parts[0], D2=call.parts[1],
        BLOCK_M=blocks.queries, BLOCK_N=blocks.keys, M_PARTS=parts, PARTS=cut,
        WORDS=max(host.power_of_two(words), 16) if flags & KEEP else 16, RAGGED=call.keys % bn != 0, FOLD=call.fold,
        KEEP=bool(flags & KEEP), PRUNE=prune, ALIGN=align, PRECISION=precision(), num_warps=blocks.warps,
        num_stages=blocks.stages,
    )  # fmt: skip
    if found is not keep:  # a tile is kept if one of its parts keeps it
        keep = functools.reduce(torch.bitwise_or, found.unbind(3))
    return out, lse, keep if asked else keep.new_empty(0)


def _find_keep(call: Call, lists: Lists, k: Tensor, reference_lse: Tensor | None, keep: Tensor, blocks: Blocks,
               words: int, threshold: float) -> None:  # fmt: skip
    from .triton_keep import find_keep

    q = call.q
    grid, places = lists.grid(call, 1, call.heads, call.keys * call.width * k.element_size())
    scratch = [q.new_empty(call.batch, call.heads, call.queries, dtype=torch.float32) for _ in range(2)]
    align = alignment(q, k)
    host.launch(
        find_keep, grid, q, rows_operand(q, align), rows_operand(k, align), lists.operand, places[0], call.elements,
        call.bias, call.relpos, reference_lse, *scratch, keep, *places[1:], call.heads, call.per_key_head, call.queries,
        call.keys, call.rows, call.tiles, words, call.bm, call.bn, call.scale, threshold, D=call.width,
        D1=call.parts[0], D2=call.parts[1], BLOCK_M=blocks.queries, BLOCK_N=blocks.keys,
        WORDS=max(host.power_of_two(words), 16), ALIGN=align, PRECISION=precision(), num_warps=blocks.warps,
        num_stages=blocks.stages,
    )  # fmt: skip


KERNELS = {"tile_attention": tile_attention}
