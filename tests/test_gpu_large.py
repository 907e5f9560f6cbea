"""Tensors of more than 2^31 elements: rows at their end against a small call with the same rows.

Skipped without a GPU of enough memory; the bodies then run on the CPU at a few rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _targets import ANYWHERE, Target, results_of
from torch import Tensor

from maskaccel.masks import TileMask
from maskaccel.ops.adaln.schema import NEED_A, NEED_GATE, NEED_SCALE, NEED_SHIFT, NEED_X
from maskaccel.ops.attention.schema import NEED_K, NEED_Q, NEED_V
from maskaccel.ops.tokens.schema import MERGES

TAIL = 3  # rows that hold numbers, at both ends; the others are zeros
Pairs = Iterator[tuple[Any, Any]]


class Big:
    """Makes tensors `(1, rows, *tail)` of just more than 2^31 elements, or small ones on a CPU."""

    def __init__(self, target: Target) -> None:
        self.target, self.tiny = target, target.device == "cpu"
        self.gen = torch.Generator().manual_seed(0)

    def rows(self, *tail: int) -> int:
        return 40 if self.tiny else (1 << 31) // math.prod(tail) + 2 * TAIL

    def small(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=self.gen).to(dtype).to(self.target.device)

    def tensor(self, rows: int, *tail: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        x = torch.zeros(1, rows, *tail, dtype=dtype, device=self.target.device)
        x[:, :TAIL] = self.small(1, TAIL, *tail, dtype=dtype)
        x[:, -TAIL:] = self.small(1, TAIL, *tail, dtype=dtype)
        return x

    def ids(self, *values: int) -> Tensor:
        return torch.tensor([values], dtype=torch.int32, device=self.target.device)

    def call(self, op: str, *args: Any) -> tuple[Tensor, ...]:
        return results_of(self.target.kernel(op)(*args))


def end(t: Tensor) -> Tensor:
    return t[:, -TAIL:].clone()


def adaln(big: Big) -> Pairs:
    x = big.tensor(big.rows(3072), 3072)
    scale, rest = big.small(1, 3072), (None,) * 5
    norm = (scale, scale, *rest, 1e-6, 1.0, 0)
    yield end(big.call("norm_modulate", x, *norm)[0]), big.call("norm_modulate", end(x), *norm)[0]
    gated = (scale, None, None, *norm[:-3], 1e-6, 1e-6, 1.0, 0)
    for got, want in zip(
        big.call("gate_residual_norm_modulate", x, x, *gated),
        big.call("gate_residual_norm_modulate", end(x), end(x), *gated),
        strict=True,
    ):
        yield end(got), want


def adaln_backward(big: Big) -> Pairs:
    x = big.tensor(big.rows(3072), 3072)
    scale = big.small(1, 3072)
    needs = NEED_X | NEED_A | NEED_GATE | NEED_SCALE | NEED_SHIFT
    rest = (scale, None, None, scale, scale, None, None, *[None] * 5, 1e-6, 1e-6, 1.0, 0, needs)
    op = "gate_residual_norm_modulate_backward"
    got = big.call(op, x, x, None, x, x, *rest)
    both = torch.cat([x[:, :TAIL], end(x)], 1)  # all rows that are not zero: their sums are those of the whole
    want = big.call(op, both, both, None, both, both, *rest)
    for g, w in zip(got, want, strict=True):
        if w.dim() == 3 and w.shape[1] == 2 * TAIL:
            yield end(g), end(w)
        elif w.numel():
            yield g, w


def rope(big: Big) -> Pairs:
    q, k = big.tensor(big.rows(24, 128), 24, 128), big.small(1, TAIL, 24, 128)
    weight = big.small(128)
    rest = (weight, weight, *[None] * 5, 1e-6, 1)
    yield end(big.call("qk_norm_rope", q, k, *rest)[0]), big.call("qk_norm_rope", end(q), k, *rest)[0]


def activation(big: Big) -> Pairs:
    x = big.tensor(big.rows(8192), 8192)
    yield end(big.call("gated_activation", x, 0)[0]), big.call("gated_activation", end(x), 0)[0]
    dy = x[..., :4096]
    got = big.call("gated_activation_backward", dy, x, 0)[0]
    yield end(got), big.call("gated_activation_backward", end(dy), end(x), 0)[0]


def steps(big: Big) -> Pairs:
    x = big.tensor(big.rows(3072), 3072)
    both = torch.cat([x[:, :TAIL], end(x)], 1)
    yield big.call("relative_difference", x, x, x)[0], big.call("relative_difference", both, both, both)[0]
    history, gate = x[None], big.small(1, 1, 3072)
    weights = torch.full((1,), 0.5, device=x.device)
    got = big.call("combine_history", history, weights, x, gate)[0]
    yield end(got), big.call("combine_history", end(x)[None], weights, end(x), gate)[0]
    del got
    yield big.call("gram", history, False)[0], big.call("gram", both[None], False)[0]
    rows = x.shape[1]
    fresh, index = big.small(1, 2, 3072), big.ids(1, rows - 1)
    small, at = end(x), big.ids(TAIL - 2, TAIL - 1)
    got = big.call("scatter_combine", history, weights, fresh, index, None, None, None, 0, 0.0)[0]
    yield (
        got[:, -1:].clone(),
        big.call("scatter_combine", small[None], weights, fresh, at, None, None, None, 0, 0.0)[0][:, -1:],
    )
    yield x[0, rows - 1], fresh[0, 1]


def rows_by_id(big: Big) -> Pairs:
    x = big.tensor(big.rows(3072), 3072)
    n = x.shape[1]
    ids = big.ids(0, n - 2, n - 1)
    yield big.call("gather_rows", x, ids, None)[0], torch.cat([x[:, :1], x[:, -2:]], 1)
    inverse = torch.full((1, n), -1, dtype=torch.int32, device=x.device)
    inverse[0, ids[0].long()] = torch.arange(3, dtype=torch.int32, device=x.device)
    scale = big.small(1, 1, 3072)
    norm = (scale, scale, None, None, 1e-6, 1.0, 0)
    small_inverse = torch.arange(3, dtype=torch.int32, device=x.device)[None]
    kept = torch.cat([x[:, :1], x[:, -2:]], 1)
    for got, want in zip(
        big.call("gather_modulate", x, ids, inverse, *norm),
        big.call("gather_modulate", kept, small_inverse, small_inverse, *norm),
        strict=True,
    ):
        yield got, want
    rows = big.small(1, 3, 3072)
    got = big.call("scatter_merge", x, rows, ids, inverse, None, None, None, 0.0, MERGES["replace"])[0]
    yield torch.cat([got[:, :2], got[:, -3:]], 1), torch.cat([rows[:, :1], x[:, 1:2], x[:, -3:-2], rows[:, 1:]], 1)
    got = big.call("scatter_merge", x, rows, ids, inverse, None, None, None, 0.25, MERGES["blend"])[0]
    want = torch.cat([x[:, -3:-2], 0.25 * x[:, -2:] + 0.75 * rows[:, 1:]], 1)
    yield got[:, -3:].clone(), want


def caches(big: Big) -> Pairs:
    slots = big.rows(24, 128)
    k_cache, v_cache = (big.tensor(slots, 24, 128) for _ in range(2))
    k, v = big.small(1, 2, 24, 128), big.small(1, 2, 24, 128)
    last = v_cache[:, -2:-1].clone()
    none = (None,) * 2
    big.call("write_kv_rows", None, k, v, k_cache, v_cache, *none, big.ids(0, slots - 1), *none, *none, None, 1e-6, 2)
    yield torch.cat([k_cache[:, :1], k_cache[:, -1:]], 1), k
    yield torch.cat([v_cache[:, :1], v_cache[:, -2:]], 1), torch.cat([v[:, :1], last, v[:, 1:]], 1)
    del k_cache, v_cache
    cache = torch.zeros(1, slots, 24, 128, dtype=torch.uint8, device=k.device)
    cache[:, -1] = 0x38  # 1 in e4m3
    scale = torch.ones(1, slots, 24, device=k.device)
    yield big.call("read_kv_rows", cache, scale, 1)[0][:, -1], torch.ones(1, 24, 128, device=k.device).bfloat16()


def logits(big: Big) -> Pairs:
    x = big.tensor(big.rows(32768), 32768)
    n = x.shape[1]
    step = torch.zeros(1, dtype=torch.int64, device=x.device)
    tokens = torch.zeros(1, n, dtype=torch.int64, device=x.device)
    ids, confidence = big.call("sample_logits", x, tokens, step, None, 0, 1, 0, 0.0, 0)
    last = x[:, -TAIL:].double()
    most = last == last.amax(-1, keepdim=True)
    best = torch.where(most, torch.arange(last.shape[-1], device=x.device), last.shape[-1]).amin(-1)
    yield (ids[:, -TAIL:] == best).double(), torch.ones_like(best).double()
    yield confidence[:, -TAIL:].double(), last.softmax(-1).amax(-1)


def attention(big: Big) -> Pairs:
    heads, dim = (1, 64) if big.tiny else (32, 128)
    n = 3 * 128 + 7 if big.tiny else big.rows(heads, dim)
    q = big.small(1, n, heads, dim) if big.tiny else big.tensor(n, heads, dim)
    side = -(-n // 128)
    tiles = torch.eye(side, dtype=torch.bool, device=q.device)[None, None]
    mask = TileMask.from_tiles(tiles, (n, n))
    rest = (*mask.lists(), *mask.transposed_lists(), *[None] * 6)
    first = (side - 1) * 128
    part = q[:, first:].clone()
    none = (None,) * 12
    out, lse, _ = big.call("tile_attention", q, q, q, *rest, *[None] * 3, 128, 128, dim**-0.5, 0.0, 0)
    alone, alone_lse, _ = big.call("tile_attention", part, part, part, *none, *[None] * 3, 128, 128, dim**-0.5, 0.0, 0)
    yield out[:, first:], alone
    yield lse[..., first:], alone_lse
    needs = (128, 128, dim**-0.5, NEED_Q | NEED_K | NEED_V)
    grads = big.call("tile_attention_backward", q, None, q, q, q, out, lse, *rest, *needs)
    small = big.call("tile_attention_backward", part, None, part, part, part, alone, alone_lse, *none, *needs)
    for got, want in zip(grads[:3], small[:3], strict=True):
        yield got[:, first:], want


FAMILIES: dict[str, tuple[Callable[[Big], Pairs], int]] = {  # and GiB of GPU memory
    "adaln": (adaln, 24),
    "adaln backward": (adaln_backward, 40),
    "rope": (rope, 16),
    "activation": (activation, 20),
    "steps": (steps, 24),
    "rows by id": (rows_by_id, 24),
    "caches": (caches, 16),
    "logits": (logits, 12),
    "attention": (attention, 60),
}


@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ANYWHERE)
def test_rows_beyond_int32(target, family):
    make, gib = FAMILIES[family]
    if target.device != "cpu":
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < gib * 2**30:
            pytest.skip(f"needs {gib} GiB of free GPU memory")
    count = 0
    for got, want in make(Big(target)):
        # The same rows in other places: the sums of a tile may be formed in another order.
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2, check_stride=False)
        assert want.abs().max() > 0
        count += 1
    assert count
