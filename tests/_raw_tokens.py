"""Random calls of the raw token ops, and what of their results is compared. Needs torch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maskaccel.ops.adaln.schema import ACROSS_HEADS, ROPE_HALF
from maskaccel.ops.tokens import reference
from maskaccel.ops.tokens.schema import (
    KEEP_CLASSES,
    KEEP_GROUPS,
    KEEP_ROWS_COLS,
    MERGES,
    NO_ROWS,
    PRE_ROPE,
    SCALED,
    THRESHOLD,
)

if TYPE_CHECKING:
    from _raw_cases import Draw

EXACT = ("random_keep", "select_active", "unmask_select")
"""Ops whose results have the same bits on every backend (`unmask_select` without noise of its own)."""


def _ints(d: Draw, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=d.generator, dtype=torch.int32).to(d.device)


def _flags(d: Draw, *shape: int, p: float = 0.2) -> Tensor:
    return (torch.rand(shape, generator=d.generator) < p).to(torch.uint8).to(d.device)


def _step(d: Draw) -> Tensor:
    return torch.full((1,), d.rng.choice([0, 1, 77, 1 << 33]), dtype=torch.int64, device=d.device)


def _seed(d: Draw) -> int:
    return d.rng.choice([0, 1, 2**32 + 5, -1, 2**62 + 12345])


def index(d: Draw, batch: int, n: int, ragged: bool | None = None) -> tuple[Tensor, Tensor]:
    """`ids` and `inverse` of some kept tokens of n."""
    b, keep = d.rng.choice([1, batch]), d.rng.randint(1, n)
    noise = torch.rand(b, n, generator=d.generator)
    ids = noise.argsort(1)[:, :keep].sort(1).values
    if ragged if ragged is not None else d.rng.random() < 0.3:
        counts = torch.randint(0, keep + 1, (b, 1), generator=d.generator)
        ids = ids.masked_fill(torch.arange(keep) >= counts, n)
    inverse = torch.full((b, n + 1), -1, dtype=torch.int64)
    inverse.scatter_(1, ids, torch.arange(keep).expand(b, -1))
    at = [t.to(torch.int32).contiguous().to(d.device) for t in (ids, inverse[:, :n])]
    return at[0], at[1]


# ------------------------------------------------------------------------------------------------------------- ids
def _random_keep(d: Draw) -> tuple:
    mode, batch = d.rng.choice([KEEP_GROUPS, KEEP_GROUPS, KEEP_ROWS_COLS, KEEP_CLASSES]), d.rng.choice([1, 2, 5])
    order = labels = quota = force = None
    rows_kept, groups = 0, d.rng.choice([1, 1, 4, 7])
    size = d.rng.choice([1, 3, 8, 33, 200])
    n = groups * size
    if mode == KEEP_ROWS_COLS:
        rows_kept = d.rng.randint(1, groups)
        keep = rows_kept * d.rng.randint(1, size)
    elif mode == KEEP_CLASSES:
        keep, classes = d.rng.randint(1, n), d.rng.choice([1, 2, 5])
        labels = _ints(d, -1, classes + 1, d.rng.choice([1, batch]), n)
        quota = _ints(d, 0, n // classes + 2, d.rng.choice([1, batch]), classes)
        groups = 1
    else:
        keep = groups * d.rng.randint(1, size)
        if d.rng.random() < 0.5:
            order = torch.randperm(n, generator=d.generator).to(torch.int32).to(d.device)
    if mode != KEEP_ROWS_COLS and d.rng.random() < 0.4:
        force = _flags(d, d.rng.choice([1, batch]), n, p=d.rng.choice([0.05, 0.5]))
    numbers = (_seed(d), d.rng.choice([0, 3, (1 << 24) - 1]), d.rng.choice([0, 7, 2**32 - 2]), batch, n, keep)
    return _step(d), order, labels, quota, force, *numbers, groups, rows_kept, mode


def _select_active(d: Draw) -> tuple:
    batch, n = d.rng.choice([1, 2, 3]), d.rng.choice([1, 5, 32, 33, 300])
    score = torch.randn(batch, n, generator=d.generator)
    if d.rng.random() < 0.5:  # ties
        score = (score * 2).round()
    if d.rng.random() < 0.3:
        score[0, 0] = float("nan")
    decay = torch.exp(0.1 * torch.arange(d.rng.choice([1, 4, 9])))
    keep = d.rng.randint(1, n)
    force = d.maybe(lambda: _flags(d, d.rng.choice([1, batch]), n, p=d.rng.choice([0.1, 0.8])), p=0.4)
    flags = d.rng.choice([0, THRESHOLD])
    high = 0 if flags else d.rng.randint(0, n - keep)
    return (score.to(d.device), _ints(d, -3, 12, batch, n), decay.to(d.device), force, keep, high,
            d.rng.choice([-1.0, 0.0, 0.5]), flags)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ rows
def _gather_rows(d: Draw) -> tuple:
    batch, n, width = d.adaln_shape()
    ids, inverse = index(d, batch, n)
    x = d.tensor((batch, n, width), d.dtype)
    if d.rng.random() < 0.2:
        x = x[:1].expand(batch, -1, -1)
    return x, ids, d.rng.choice([inverse, None])


def _groups(d: Draw, batch: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    b, count = d.rng.choice([1, batch]), d.rng.choice([1, 3, 2 * n])
    slot = torch.randint(0, count, (b, n), generator=d.generator)
    order = slot.sort(dim=1, stable=True)
    edges = torch.arange(count + 1).expand(b, -1).contiguous()
    offsets = torch.searchsorted(order.values.contiguous(), edges)
    slot, order, offsets = (t.to(torch.int32).to(d.device) for t in (slot, order.indices, offsets))
    return slot, order, offsets


def _unmerge_rows(d: Draw) -> tuple:
    batch, n, width = d.adaln_shape()
    slot, order, offsets = _groups(d, batch, n)
    return d.tensor((batch, offsets.shape[1] - 1, width), d.dtype), slot, order, offsets


def _segment_rows(d: Draw) -> tuple:
    batch, n, width = d.adaln_shape()
    slot, order, offsets = _groups(d, batch, n)
    return d.tensor((batch, n, width), d.dtype), order, offsets, slot, d.rng.random() < 0.5


def _merge_gate(d: Draw, batch: int, kept: int, width: int) -> Tensor:
    return d.tensor((d.rng.choice([1, batch]), d.rng.choice([1, kept]), width), d.other)


def _scatter_merge(d: Draw) -> tuple:
    batch, n, width = d.adaln_shape()
    ids, inverse = index(d, batch, n)
    mode = d.rng.choice(list(MERGES))
    rows = d.tensor((batch, ids.shape[1], width), d.dtype)
    full = d.tensor((batch, n, width), d.dtype) if mode in ("replace", "add_gated", "blend") else None
    gate = d.maybe(_merge_gate, d, batch, ids.shape[1], width) if mode == "add_gated" else None
    token = d.vector(width, d.other) if mode == "mask_token" else None
    places = (d.rng.choice([1, batch]), n, width)
    pos = d.maybe(d.tensor, places, d.other) if mode in ("mask_token", "zero") else None
    return full, rows, ids, inverse, gate, token, pos, 0.3 if mode == "blend" else 0.0, MERGES[mode]


def _scatter_merge_backward(d: Draw) -> tuple:
    batch, n, width = d.adaln_shape()
    ids, inverse = index(d, batch, n)
    mode = d.rng.choice(list(MERGES))
    allowed = {"replace": 3, "add_gated": 6, "mask_token": 10, "blend": 3, "zero": 2}[mode]
    gate = d.maybe(_merge_gate, d, batch, ids.shape[1], width) if mode == "add_gated" else None
    if gate is None:
        allowed &= ~4
    needs = allowed & d.rng.choice([15, 15, 15, 1, 2, 12])
    rows = d.tensor((batch, ids.shape[1], width), d.dtype) if needs & 4 or d.rng.random() < 0.3 else None
    lam = 0.3 if mode == "blend" else 0.0
    return d.tensor((batch, n, width), d.dtype), rows, ids, inverse, gate, lam, MERGES[mode], needs


def _gather_modulate(d: Draw) -> tuple:
    batch, n, width = d.adaln_shape()
    ids, inverse = index(d, batch, n)

    def modulation() -> Tensor:
        drawn = d.tensor((d.rng.choice([1, batch]), d.rng.choice([1, n]), width), d.other, 0.5)
        return drawn[:, 0] if drawn.shape[1] == 1 and d.rng.random() < 0.5 else drawn

    scale, shift = d.maybe(modulation), d.maybe(modulation)
    weight, bias = d.maybe(d.vector, width, d.affine, p=0.4), d.maybe(d.vector, width, d.affine, p=0.3)
    flags = d.norm_flags() | d.rng.choice([0, NO_ROWS])
    return d.tensor((batch, n, width), d.dtype), ids, inverse, scale, shift, weight, bias, 1e-5, 1.0, flags


# ------------------------------------------------------------------------------------------------------- K/V rows
def _write_kv_rows(d: Draw) -> tuple:
    batch, rows, size = d.rng.choice([1, 2]), d.rng.choice([1, 4, 9]), d.rng.choice([9, 12])
    heads, dim = d.rng.choice([1, 2, 3]), d.rng.choice([8, 16, 64, 72, 128])
    k, v = d.tensor((batch, rows, heads, dim), d.dtype), d.tensor((batch, rows, heads, dim), d.dtype)
    q_heads = heads * d.rng.choice([1, 2])
    q = d.maybe(d.tensor, (batch, rows, q_heads, dim), d.dtype)
    fp8 = d.rng.random() < 0.3
    across, flags = d.rng.random() < 0.3, d.norm_flags() & ~3 | d.rng.choice([0, 1, 2])
    if fp8:  # values that are stored as given: a rounding to fp8 that falls the other way is no error
        flags = flags & ~3 | 2
    cos = sin = positions = q_weight = k_weight = None
    if not fp8:
        if d.rng.random() < 0.6:
            k_weight = d.vector(heads * dim if across else dim, d.affine)
            q_weight = d.vector(q_heads * dim if across else dim, d.affine) if q is not None else None
        if d.rng.random() < 0.7:
            length, table = size, d.rng.choice([dim, dim // 2])
            if d.rng.random() < 0.4:
                length = 7
                positions = _ints(d, 0, 8, *d.rng.choice([(rows,), (batch, rows)]))
            shape = d.rng.choice([(length, table), (d.rng.choice([1, batch]), length, table)])
            cos, sin = d.tensor(shape, d.other), d.tensor(shape, d.other)
    flags |= (ACROSS_HEADS if across else 0) | d.rng.choice([0, ROPE_HALF]) | d.rng.choice([0, 0, PRE_ROPE])
    if d.rng.random() < 0.3:  # some written twice, some nowhere
        ids = _ints(d, 0, size + 2, d.rng.choice([1, batch]), rows)
    else:
        ids = torch.rand(d.rng.choice([1, batch]), size, generator=d.generator).argsort(1)[:, :rows]
        ids = ids.to(torch.int32).contiguous().to(d.device)
    shape = (batch, size, heads, dim)
    if fp8:
        caches = [torch.zeros(shape, dtype=torch.uint8, device=d.device) for _ in range(2)]
        scales: list = [torch.ones(shape[:3], device=d.device) for _ in range(2)]
    else:
        caches, scales = [d.tensor(shape, d.dtype) for _ in range(2)], [None, None]
    return q, k, v, *caches, *scales, ids, q_weight, k_weight, cos, sin, positions, 1e-5, flags


def _read_kv_rows(d: Draw) -> tuple:
    shape = (d.rng.choice([1, 2]), d.rng.choice([1, 5, 9]), d.rng.choice([1, 3]), d.rng.choice([8, 24, 128]))
    bits = torch.randn(shape, generator=d.generator).to(torch.float8_e4m3fn).view(torch.uint8)
    scale = torch.rand(shape[:3], generator=d.generator) + 0.1
    kind = (torch.float32, torch.bfloat16, torch.float16).index(d.dtype)
    return bits.to(d.device), scale.to(d.device), kind


def _match_tokens(d: Draw) -> tuple:
    batch, n, width = d.rng.choice([1, 2]), d.rng.choice([40, 130]), d.rng.choice([8, 20, 72])
    order = torch.rand(d.rng.choice([1, batch]), n, generator=d.generator).argsort(1).to(torch.int32).to(d.device)
    cut = d.rng.randint(1, n - 20)  # few rows have errors that are a matter of luck
    return d.tensor((batch, n, width), d.dtype), order[:, cut:].contiguous(), order[:, :cut].contiguous()


# -------------------------------------------------------------------------------------------------------- sampling
def _sample_logits(d: Draw) -> tuple:
    batch, n, size = d.rng.choice([1, 2]), d.rng.choice([1, 6]), d.rng.choice([1, 2, 9, 130, 2053])
    logits = d.tensor((batch, n, size), d.dtype, 2.0)
    if d.rng.random() < 0.3:
        logits = logits.masked_fill(_flags(d, *logits.shape, p=0.3).bool(), -torch.inf)
    if d.rng.random() < 0.2:
        logits = logits.clone()
        logits[0, 0, -1] = float("nan")
    mask_id = d.rng.choice([0, size, size + 5])
    tokens = torch.where(_flags(d, batch, n, p=0.7).bool().cpu(), mask_id, 1).to(torch.int64).to(d.device)
    temperature = d.rng.choice([0.0, 0.7, 1.0])
    noise = None
    if temperature and d.rng.random() < 0.4:
        u = torch.rand(batch, n, size, generator=d.generator).clamp(1e-6, 1 - 1e-6)
        noise = (-torch.log(-torch.log(u))).to(d.device)
    flags = d.rng.choice([0, 1, 2, 3]) | (d.rng.choice([0, SCALED]) if temperature else 0)
    return logits, tokens, _step(d), noise, mask_id, _seed(d), d.rng.choice([0, 3]), temperature, flags


def _unmask_select(d: Draw) -> tuple:
    batch, n, mask_id = d.rng.choice([1, 3]), d.rng.choice([1, 7, 64, 200]), 9
    masked = _flags(d, batch, n, p=0.7).bool()
    tokens = torch.where(masked, mask_id, 1).to(torch.int64)
    confidence = torch.rand(batch, n, generator=d.generator).to(d.device)
    if d.rng.random() < 0.4:
        confidence = (confidence * 4).round() / 4
    confidence = confidence.masked_fill(_flags(d, batch, n, p=0.05).bool(), float("nan"))
    kinds = d.rng.choice([1, 1, 3])
    groups = _ints(d, -1, kinds + 1, d.rng.choice([1, batch]), n) if kinds > 1 else None
    count = _ints(d, 0, n // kinds + 2, d.rng.choice([1, batch]), kinds)
    hold = d.maybe(lambda: _flags(d, d.rng.choice([1, batch]), n), p=0.4)
    temperature = d.rng.choice([0.0, 0.0, 0.5])
    noise = torch.randn(batch, n, generator=d.generator).to(d.device) if temperature else None
    sampled = torch.arange(batch * n, device=d.device).view(batch, n) + 100
    threshold = d.rng.choice([float("inf"), 0.9, -1.0])
    return (confidence.masked_fill(~masked, torch.inf), sampled, tokens, _step(d), count, groups, hold, noise, mask_id,
            _seed(d), 0, threshold, temperature)  # fmt: skip


DRAWS: dict[str, Callable[[Draw], tuple]] = {
    "random_keep": _random_keep,
    "select_active": _select_active,
    "gather_rows": _gather_rows,
    "unmerge_rows": _unmerge_rows,
    "segment_rows": _segment_rows,
    "scatter_merge": _scatter_merge,
    "scatter_merge_backward": _scatter_merge_backward,
    "gather_modulate": _gather_modulate,
    "write_kv_rows": _write_kv_rows,
    "read_kv_rows": _read_kv_rows,
    "match_tokens": _match_tokens,
    "sample_logits": _sample_logits,
    "unmask_select": _unmask_select,
}


def run(op: str, kernel: Callable[..., Any], args: tuple) -> tuple[Tensor, ...]:
    """What a call gives that can be compared: its results and what it wrote, which `args` do not see."""
    if op == "write_kv_rows":
        written = [t if t is None else t.clone(memory_format=torch.preserve_format) for t in args[3:7]]
        q = kernel(*args[:3], *written, *args[7:])
        k_cache, v_cache, *scales = written
        if scales[0] is None:
            return q, k_cache, v_cache
        caches = [reference.read_kv_rows(c, s, 0) for c, s in ((k_cache, scales[0]), (v_cache, scales[1]))]
        return q, *caches, *scales
    out = kernel(*args)
    out = out if isinstance(out, tuple) else (out,)
    if op == "match_tokens":
        metric, src, dst = args
        batch, (best, similarity) = metric.shape[0], out
        unit = torch.nn.functional.normalize(metric.double(), dim=-1, eps=1e-30)
        all_of = reference.gather_rows(unit, src) @ reference.gather_rows(unit, dst).mT
        assert best.shape == (batch, src.shape[1])
        # Which of two equally near rows is a matter of rounding.
        near = all_of.gather(2, best.long().unsqueeze(-1)).squeeze(-1) >= all_of.amax(-1) - 1e-3
        return similarity, (~near).to(similarity.dtype)
    if op == "sample_logits":
        ids, confidence = out
        kind = confidence.isnan().to(confidence.dtype) + 2 * (confidence == torch.inf)
        return ids.to(torch.float32), torch.where(kind > 0, 0.0, confidence), kind
    return tuple(t if t.is_floating_point() else t.to(torch.float32) for t in out)


def run_plain(op: str, args: tuple) -> tuple[Tensor, ...]:
    """The results of plain torch; of fp64 arguments, the truth."""
    return run(op, reference.KERNELS[op], args)
