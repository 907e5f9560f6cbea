"""Calls of the Triton kernels of the attention backward and of column sums; see `triton_launch.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _triton as host
from .schema import NEED_K, NEED_Q, NEED_S, NEED_V
from .triton_call import Call, Lists, alignment, check_heads, rows_operand
from .triton_config import Blocks, backward_blocks, fit, precision


def _blocks(call: Call, lists: Lists, blocks: Blocks) -> tuple[Blocks, int, int]:
    """(blocks, bm, bn); without a mask the tiles are the blocks."""
    if lists.operand is None:
        return blocks, blocks.queries, blocks.keys
    return fit(blocks, call.bm, call.bn), call.bm, call.bn


def _delta(call: Call, dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    from .triton_backward import row_products

    delta = call.q.new_empty(call.batch, call.heads, call.queries, dtype=torch.float32)
    block = 64
    blocks = math.ceil(call.queries / block)
    align = alignment(dout, out)
    host.launch(
        row_products, (call.batch * call.heads * blocks,), dout, rows_operand(dout, align), rows_operand(out, align),
        dlse, delta, call.heads, call.queries, blocks, D=call.width, D1=call.parts[0], D2=call.parts[1], BLOCK=block,
        ALIGN=align, num_warps=4,
    )  # fmt: skip
    return delta


def _shape_arguments(call: Call, bm: int, bn: int) -> tuple:
    rows, tiles = math.ceil(call.queries / bm), math.ceil(call.keys / bn)
    return call.heads, call.per_key_head, call.queries, call.keys, rows, tiles, bm, bn, call.scale


def _options(call: Call, blocks: Blocks, align: int) -> dict:
    return {
        "D": call.width, "D1": call.parts[0], "D2": call.parts[1], "BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys,
        "ALIGN": align, "PRECISION": precision(), "num_warps": blocks.warps, "num_stages": blocks.stages,
    }  # fmt: skip


def tile_attention_backward(dout, dlse, q, k, v, out, lse, index, count, order, index_t, count_t, order_t, pattern_of,
                            patterns, bias, relpos_table, relpos_q, relpos_k, bm, bn, scale, needs):  # fmt: skip
    call = Call(q, k, pattern_of, patterns, bias, relpos_table, relpos_q, relpos_k, bm, bn, scale)
    check_heads("v", v, q, tuple(k.shape))
    check_heads("dout", dout, q, tuple(q.shape))
    check_heads("out", out, q, tuple(q.shape))
    call.statistics("lse", lse)
    if dlse is not None:
        call.statistics("dlse", dlse)
    forward = Lists(call, index, count, order, call.rows, call.tiles)
    transposed = Lists(call, index_t, count_t, order_t, call.tiles, call.rows, "_t")
    if (forward.operand is None) != (transposed.operand is None):
        raise RuntimeError("index and index_t must both be given or both be None")
    if call.elements is not None and forward.operand is None:
        raise RuntimeError("pattern_of and patterns need index, count and order")
    dq = q.new_empty(q.shape if needs & NEED_Q else 0)
    dk, dv = (k.new_empty(k.shape if needs & bit else 0) for bit in (NEED_K, NEED_V))
    ds = q.new_empty(0, dtype=torch.float32)
    if needs & NEED_S:
        ds = q.new_zeros(call.batch, call.heads, call.queries, call.keys, dtype=torch.float32)
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_(), ds

    delta = _delta(call, dout, out, dlse)
    align = alignment(q, k, v, dout)
    rows = [rows_operand(t, align) for t in (dout, q, k, v)]
    row_bytes = call.width * q.element_size()
    if needs & (NEED_Q | NEED_S):
        from .triton_backward import backward_queries

        blocks, bm, bn = _blocks(call, forward, backward_blocks(q, call.added)[0])
        forward.rows = math.ceil(call.queries / bm)
        grid, places = forward.grid(call, bm // blocks.queries, call.heads, 2 * call.keys * row_bytes)
        host.launch(
            backward_queries, grid, q, *rows, lse, delta, forward.operand, places[0], call.elements, call.bias,
            call.relpos, dq if needs & NEED_Q else None, ds if needs & NEED_S else None, *places[1:],
            *_shape_arguments(call, bm, bn), scale, M_PARTS=bm // blocks.queries, PARTS=bn // blocks.keys,
            RAGGED=call.keys % bn != 0, WANT_Q=bool(needs & NEED_Q), **_options(call, blocks, align),
        )  # fmt: skip
    if needs & (NEED_K | NEED_V):
        from .triton_backward import backward_keys

        blocks, bm, bn = _blocks(call, transposed, backward_blocks(q, call.added)[1])
        transposed.rows = math.ceil(call.keys / bn)
        read = 2 * call.queries * call.per_key_head * row_bytes
        grid, places = transposed.grid(call, bn // blocks.keys, call.key_heads, read)
        host.launch(
            backward_keys, grid, q, *rows, lse, delta, transposed.operand, places[0], call.elements, call.bias,
            call.relpos, dk if needs & NEED_K else None, dv if needs & NEED_V else None, *places[1:],
            *_shape_arguments(call, bm, bn), scale, N_PARTS=bn // blocks.keys, PARTS=bm // blocks.queries,
            RAGGED=call.queries % bm != 0, WANT_K=bool(needs & NEED_K), WANT_V=bool(needs & NEED_V),
            **_options(call, blocks, align),
        )  # fmt: skip
    return dq, dk, dv, ds


def attention_column_sums(q, k, lse, index_t, count_t, order_t, pattern_of, patterns, bias, relpos_table, relpos_q,
                          relpos_k, bm, bn, scale):  # fmt: skip
    call = Call(q, k, pattern_of, patterns, bias, relpos_table, relpos_q, relpos_k, bm, bn, scale)
    call.statistics("lse", lse)
    lists = Lists(call, index_t, count_t, order_t, call.tiles, call.rows, "_t")
    if call.elements is not None and lists.operand is None:
        raise RuntimeError("pattern_of and patterns need index_t, count_t and order_t")
    out = q.new_empty(call.batch, call.heads, call.keys, dtype=torch.float32)
    if not q.numel() or not k.numel():
        return out.zero_()

    from .triton_backward import column_sums

    blocks, bm, bn = _blocks(call, lists, backward_blocks(q, call.added)[1])
    lists.rows = math.ceil(call.keys / bn)
    align = alignment(q, k)
    grid, places = lists.grid(call, bn // blocks.keys, call.heads, call.queries * call.width * q.element_size())
    host.launch(
        column_sums, grid, q, rows_operand(q, align), rows_operand(k, align), lse, lists.operand, places[0],
        call.elements, call.bias, call.relpos, out, *places[1:], *_shape_arguments(call, bm, bn),
        N_PARTS=bn // blocks.keys, PARTS=bm // blocks.queries, RAGGED=call.queries % bm != 0,
        **_options(call, blocks, align),
    )  # fmt: skip
    return out


KERNELS = {"tile_attention_backward": tile_attention_backward, "attention_column_sums": attention_column_sums}
