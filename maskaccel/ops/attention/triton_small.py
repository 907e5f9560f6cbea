"""Calls of the Triton kernels of tile lists, merged attention and linear attention; the contract is checked here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _triton as host
from .reference import line_order
from .triton_call import check_heads, check_plain
from .triton_config import precision

_LIST_BLOCK = 1024
_PROGRAMS = 256  # of a sum over tokens: enough for a large GPU, few enough that partial sums stay small
_LEAST_RUN = 256  # tokens of a partial sum
# Head dim up to -> rows of a block, step of a product's sum, warps: the parts of TF32 of both sides fit the registers.
_LINEAR = {64: (32, 32, 4), 128: (32, 32, 8), 256: (32, 16, 8)}


def tile_lists(bits: Tensor, pattern_of: Tensor | None, tiles: int, transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
    if tiles < 0:
        raise RuntimeError(f"tiles={tiles} must be 0 or more")
    if bits.dim() != 4:
        raise RuntimeError(f"bits must be (B, H, M, W), got {tuple(bits.shape)}")
    batch, heads, m, _ = bits.shape
    words = math.ceil(tiles / 32)
    check_plain("bits", bits, torch.int32, bits, (batch, heads, m, words))
    p_batch = p_head = 0
    if pattern_of is not None:
        shapes = [(b, h, m, tiles) for b in (1, batch) for h in (1, heads)]
        check_plain("pattern_of", pattern_of, torch.int32, bits, *shapes)
        p_head = int(pattern_of.shape[1] > 1)
        p_batch = pattern_of.shape[1] if pattern_of.shape[0] > 1 else 0
    rows, length = (tiles, m) if transpose else (m, tiles)
    index = bits.new_empty(batch, heads, rows, length)
    count = bits.new_zeros(batch, heads, rows, 2)
    if index.numel():
        from .triton_small_kernels import list_rows

        block, warps = host.block_and_warps(min(length, _LIST_BLOCK), 4)
        host.launch(list_rows, (batch * heads * rows,), bits, bits, pattern_of, index, count, heads, m, words, tiles,
                    rows, length, p_batch, p_head, TRANSPOSE=transpose, BLOCK=block, num_warps=warps)  # fmt: skip
    return index, count, line_order(count)


def _check_parts(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> None:
    check_heads("out1", out1)
    check_heads("out2", out2, out1, tuple(out1.shape))
    batch, tokens, heads, width = out1.shape
    if not 0 < width <= host.MAX_WIDTH:
        raise RuntimeError(f"the last dim of out1 must be 1 to {host.MAX_WIDTH}, got {width}")
    check_plain("lse1", lse1, torch.float32, out1, (batch, heads, tokens))
    check_plain("lse2", lse2, torch.float32, out1, (batch, heads, tokens))


def _row_blocks(width: int) -> tuple[int, int, int]:
    """(rows of a program, columns, warps): 1024 elements, more where a row is longer."""
    block, warps = host.block_and_warps(width, 8)
    return max(1024 // block, 1), block, max(warps, 4)


def _rows_grid(out: Tensor, rows: int) -> tuple[tuple[int], tuple[int, int, int, int]]:
    batch, tokens, heads, width = out.shape
    total = batch * tokens * heads
    return (math.ceil(total / rows),), (tokens, heads, width, total)


def merge_attention(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    _check_parts(out1, lse1, out2, lse2)
    out, lse = out1.new_empty(out1.shape), lse1.new_empty(lse1.shape)
    if out.numel():
        from .triton_small_kernels import merge_rows

        rows, block, warps = _row_blocks(out.shape[3])
        grid, sizes = _rows_grid(out, rows)
        host.launch(merge_rows, grid, out1, out1, lse1, out2, lse2, out, lse, out1.stride()[:3], out2.stride()[:3],
                    *sizes, ROWS=rows, BLOCK=block, num_warps=warps)  # fmt: skip
    return out, lse


def merge_attention_backward(
    dout: Tensor, dlse: Tensor | None, out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_parts(out1, lse1, out2, lse2)
    check_heads("dout", dout, out1, tuple(out1.shape))
    if dlse is not None:
        check_plain("dlse", dlse, torch.float32, out1, tuple(lse1.shape))
    dout1, dout2 = (out1.new_empty(out1.shape) for _ in range(2))
    dlse1, dlse2 = (lse1.new_empty(lse1.shape) for _ in range(2))
    if dout1.numel():
        from .triton_small_kernels import merge_rows_backward

        rows, block, warps = _row_blocks(out1.shape[3])
        grid, sizes = _rows_grid(out1, rows)
        host.launch(merge_rows_backward, grid, out1, dout, dlse, out1, lse1, out2, lse2, dout1, dlse1, dout2, dlse2,
                    dout.stride()[:3], out1.stride()[:3], out2.stride()[:3], *sizes, ROWS=rows, BLOCK=block,
                    num_warps=warps)  # fmt: skip
    return dout1, dlse1, dout2, dlse2


class _Linear:
    """One call of linear attention: shapes checked, block shapes, sums over tokens."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, feature_map: int, normalize: int) -> None:
        check_heads("q", q)
        check_heads("k", k, q)
        batch, self.queries, self.heads, width = q.shape
        if width % 8 or not 16 <= width <= 256:
            raise RuntimeError(f"the head dim must be a multiple of 8 from 16 to 256, got {width}")
        self.keys, self.key_heads = k.shape[1:3]
        if k.shape[0] != batch or k.shape[3] != width or self.key_heads == 0 or self.heads % self.key_heads:
            raise RuntimeError(f"k must be ({batch}, Sk, a divisor of the {self.heads} heads, {width}), got "
                               f"{tuple(k.shape)}")  # fmt: skip
        check_heads("v", v, q, tuple(k.shape))
        if feature_map not in (0, 1):
            raise RuntimeError(f"feature_map={feature_map} must be 0 (relu) or 1 (elu + 1)")
        if normalize not in (0, 1):
            raise RuntimeError(f"normalize={normalize} must be 0 (sum) or 1 (mean)")
        self.q, self.k, self.v, self.batch, self.width = q, k, v, batch, width
        self.factor = 1.0 / max(self.keys, 1) if normalize else 1.0
        wide = host.power_of_two(width)
        self.rows, block, warps = next(shape for most, shape in _LINEAR.items() if wide <= most)
        self.options: dict[str, Any] = {"PRECISION": precision(), "ELU": feature_map == 1, "WIDE": wide,
                                        "BLOCK": min(wide, block), "num_warps": warps, "num_stages": 1}  # fmt: skip

    def sums(self, x: Tensor, y: Tensor, divisor: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of each key head `(B * Hk, D * D)` and `(B * Hk, D)`, fp32, over the tokens of x."""
        from .triton_small_linear import sum_outer

        tokens, heads = x.shape[1:3]
        options = self.options | {"BLOCK": min(self.options["WIDE"], 64 if self.width <= 128 else 32)}
        blocks = math.ceil(self.width / options["BLOCK"])
        run, chunks = host.runs(self.batch * heads * max(tokens, 1), max(tokens, 1),
                                programs=max(_PROGRAMS // blocks, 1), least=_LEAST_RUN)  # fmt: skip
        count = self.batch * self.key_heads
        per_head = heads // self.key_heads * chunks
        matrices = x.new_empty(count, per_head, self.width**2, dtype=torch.float32)
        vectors = x.new_empty(count, per_head, self.width, dtype=torch.float32)
        host.launch(sum_outer, (chunks, blocks, self.batch * heads), x, x, y, divisor, weight, matrices, vectors,
                    x.stride()[:3], y.stride()[:3], self.factor, tokens, self.width, heads, run, ROWS=32,
                    **options)  # fmt: skip
        return host.reduce_partials(matrices, count, 1), host.reduce_partials(vectors, count, 1)

    def grid(self, tokens: int, heads: int) -> tuple[int, int]:
        return math.ceil(tokens / self.rows), self.batch * heads


def linear_attention(q: Tensor, k: Tensor, v: Tensor, feature_map: int, normalize: int, eps: float) -> Tensor:
    call = _Linear(q, k, v, feature_map, normalize)
    out = q.new_empty(q.shape)
    if out.numel():
        from .triton_small_linear import query_rows

        matrices, vectors = call.sums(k, v, None, None)
        host.launch(query_rows, call.grid(call.queries, call.heads), q, q, matrices, vectors, out, q.stride()[:3], eps,
                    call.queries, call.width, call.heads, call.key_heads, ROWS=call.rows, **call.options)  # fmt: skip
    return out


def linear_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, feature_map: int, normalize: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Linear(q, k, v, feature_map, normalize)
    check_heads("dout", dout, q, tuple(q.shape))
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    if not dq.numel() and not dk.numel():
        return dq, dk, dv
    from .triton_small_linear import key_rows_backward, query_rows_backward

    matrices, vectors = call.sums(k, v, None, None)
    z, dz = (q.new_empty(call.batch, call.heads, call.queries, dtype=torch.float32) for _ in range(2))
    if dq.numel():
        host.launch(query_rows_backward, call.grid(call.queries, call.heads), q, dout, q, matrices, vectors, dq, z, dz,
                    dout.stride()[:3], q.stride()[:3], eps, call.queries, call.width, call.heads, call.key_heads,
                    ROWS=call.rows, **call.options)  # fmt: skip
    if dk.numel():
        matrices, vectors = call.sums(q, dout, z, dz)
        host.launch(key_rows_backward, call.grid(call.keys, call.key_heads), k, k, v, matrices, vectors, dk, dv,
                    k.stride()[:3], v.stride()[:3], call.keys, call.width, call.key_heads, ROWS=call.rows,
                    **call.options)  # fmt: skip
    return dq, dk, dv


KERNELS: dict[str, Callable] = {
    "tile_lists": tile_lists,
    "merge_attention": merge_attention,
    "merge_attention_backward": merge_attention_backward,
    "linear_attention": linear_attention,
    "linear_attention_backward": linear_attention_backward,
}
