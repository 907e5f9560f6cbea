"""Plain-torch forms of the token ops: the oracle of every test and the fallback of every device.

They accept fp64 where the op is of real numbers, are differentiable by ordinary autograd where the op is, and take the
arguments of the raw ops (`maskaccel.ops.tokens.schema`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..adaln import fallback as adaln
from ..adaln import reference as adaln_reference
from . import philox
from .schema import (
    FP8_MAX,
    KEEP_CLASSES,
    KEEP_ROWS_COLS,
    MERGES,
    NEED_FULL,
    NEED_GATE,
    NEED_MASK,
    NEED_ROWS,
    NO_ROWS,
    PRE_ROPE,
    PURPOSE_KEEP,
    PURPOSE_SAMPLE,
    PURPOSE_SELECT,
    SCALED,
    THRESHOLD,
)  # fmt: skip


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------------- ids
def _index_of(mask: Tensor, keep: int, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """`keep` and `inverse` of a mask with `keep` tokens a sample, or `counts` of them."""
    n = mask.shape[1]
    ids = (~mask).sort(dim=1, stable=True).indices[:, :keep].to(torch.int32)
    if counts is not None:
        ids = ids.masked_fill(torch.arange(keep, device=mask.device) >= counts[:, None], n)
    slots = mask.cumsum(1, dtype=torch.int32) - 1
    return ids.contiguous(), torch.where(mask, slots, -1).to(torch.int32).contiguous()


def _smallest(keys: Tensor, count: int) -> Tensor:
    """Mask of the `count` smallest of the last dim; keys are unique."""
    ranks = keys.argsort(-1).argsort(-1)
    return ranks < count


def random_keep(step, order, labels, quota, force, seed, route, offset, batch, n, keep, groups, rows_kept, mode):
    """Ids of kept tokens from Philox words."""
    device = step.device
    sample = torch.arange(offset, offset + batch, device=device)[:, None]
    last = route | PURPOSE_KEEP << 24

    def keys_of(count: int, first: int) -> Tensor:
        items = torch.arange(count, device=device)
        return philox.words(seed, items[None] + first, sample, step, last) << 24 | items

    empty = step.new_empty(0, dtype=torch.int32)
    if mode == KEEP_ROWS_COLS:
        columns = n // groups
        rows = _smallest(keys_of(groups, n), rows_kept)
        cols = _smallest(keys_of(columns, n + groups), keep // rows_kept)
        mask = (rows[:, :, None] & cols[:, None]).flatten(1)
        return *_index_of(mask, keep, None), empty
    keys = keys_of(n, 0)
    if force is not None:
        keys = keys | (1 - force.to(torch.int64)) << 56
    if mode == KEEP_CLASSES:
        labels = labels.expand(batch, n)
        quota = quota.expand(batch, -1)
        mask = torch.zeros(batch, n, dtype=torch.bool, device=device)
        for c in range(quota.shape[1]):
            inside = labels == c
            ranks = torch.where(inside, keys, 1 << 60).argsort(1).argsort(1)
            mask |= inside & (ranks < quota[:, c : c + 1])
        mask &= mask.cumsum(1) <= keep
        counts = mask.sum(1, dtype=torch.int32)
        return *_index_of(mask, keep, counts), counts
    order = torch.arange(n, device=device) if order is None else order.long()
    runs = _smallest(keys[:, order].unflatten(1, (groups, n // groups)), keep // groups).flatten(1)
    mask = torch.empty_like(runs).scatter_(1, order.expand(batch, n), runs)
    return *_index_of(mask, keep, None), empty


def select_active(score, age, decay, force, keep, high, threshold, flags):
    """The tokens of largest score, weighted by age."""
    batch, n = score.shape
    metric = score.float() * decay.float()[age.long().clamp(0, decay.shape[0] - 1)] + 0.0
    metric = metric.masked_fill(metric.isnan(), -math.inf)
    forced = torch.zeros_like(score, dtype=torch.bool) if force is None else (force != 0).expand(batch, n)
    allowed = ~forced
    counts = None
    if flags & THRESHOLD:
        allowed = allowed & (metric >= threshold)
    # Stable sorts, the last key first: forced before others, then by metric, then by token.
    by_metric = metric.sort(dim=1, descending=True, stable=True).indices
    place = torch.where(forced, 0, torch.where(allowed, 1, 2)).gather(1, by_metric)
    order = by_metric.gather(1, place.sort(dim=1, stable=True).indices)
    rank = order.argsort(1)
    # Of more forced tokens than fit, the first ones are kept, whatever their metric.
    kept_forced = forced & (forced.cumsum(1) <= keep)
    fixed = kept_forced.sum(1, keepdim=True)
    others = rank - forced.sum(1, keepdim=True)
    mask = kept_forced | (allowed & (others >= high) & (others < high + keep - fixed))
    if flags & THRESHOLD:
        counts = mask.sum(1, dtype=torch.int32)
    ids, inverse = _index_of(mask, keep, counts)
    new_age = torch.where(mask, 0, age + 1).to(torch.int32)
    return ids, inverse, score.new_empty(0, dtype=torch.int32) if counts is None else counts, new_age


# ------------------------------------------------------------------------------------------------------------ rows
def gather_rows(x, ids, inverse=None):
    """Rows by id; zeros where there is no such row."""
    batch, n, width = x.shape
    ids = ids.expand(batch, -1).long()
    if n == 0:
        return x.new_zeros(batch, ids.shape[1], width)
    inside = (ids >= 0) & (ids < n)
    rows = x.gather(1, ids.clamp(0, n - 1).unsqueeze(-1).expand(-1, -1, width))
    return rows.masked_fill(~inside.unsqueeze(-1), 0).contiguous()


def unmerge_rows(x, slot, order, offsets):
    """Rows by slot, which may repeat."""
    return gather_rows(x, slot)


def segment_rows(x, order, offsets, slot, mean):
    """Sums or means of the rows of each slot."""
    batch, _, width = x.shape
    segments = offsets.shape[1] - 1
    where = slot.expand(batch, -1).long()
    inside = (where >= 0) & (where < segments)
    total = x.new_zeros(batch, segments + 1, width, dtype=_wide(x))
    where = where.masked_fill(~inside, segments)
    total = total.scatter_add(1, where.unsqueeze(-1).expand(-1, -1, width), x.to(_wide(x)))[:, :segments]
    if mean:
        counts = offsets.diff(dim=1).clamp(min=1).to(total.dtype)
        total = total / counts.unsqueeze(-1)
    return total.to(x.dtype).contiguous()


def scatter_merge(full, rows, ids, inverse, gate, mask_token, pos, lam, mode):
    """Kept rows among the others."""
    kind = {number: name for name, number in MERGES.items()}[mode]
    batch, wide = rows.shape[0], _wide(rows)
    kept = (inverse >= 0).expand(batch, -1).unsqueeze(-1)
    values = rows.to(wide)
    if gate is not None:
        values = values * gate.to(wide)
    spread = gather_rows(values, inverse)
    if kind in ("mask_token", "zero"):
        out = spread
        if mask_token is not None:
            out = torch.where(kept, out, mask_token.to(wide))
        out = out if pos is None else out + pos.to(wide)
        return out.to(rows.dtype).contiguous()
    base = full.to(wide)
    if kind == "replace":
        out = torch.where(kept, spread, base)
    elif kind == "add_gated":
        out = base + spread
    else:
        out = torch.where(kept, lam * base + (1 - lam) * spread, base)
    return out.to(rows.dtype).contiguous()


def scatter_merge_backward(dout, rows, ids, inverse, gate, lam, mode, needs):
    """Gradients of `scatter_merge`."""
    wide, batch = _wide(dout), dout.shape[0]
    kept = (inverse >= 0).expand(batch, -1).unsqueeze(-1)
    grad = dout.to(wide)
    dfull, drows = dout.new_empty(0), dout.new_empty(0)  # one each: results of an op must not share memory
    dgate, dmask = grad.new_empty(0), grad.new_empty(0)
    share = 1 - lam if mode == MERGES["blend"] else 1.0
    if needs & NEED_FULL:
        dfull = grad * torch.where(kept, lam if mode == MERGES["blend"] else 0.0, 1.0).to(wide)
        dfull = dfull.to(dout.dtype).contiguous()
    at = gather_rows(grad, ids) if needs & (NEED_ROWS | NEED_GATE) else grad
    if needs & NEED_ROWS:
        drows = (at * share if gate is None else at * gate.to(wide)).to(dout.dtype).contiguous()
    if needs & NEED_GATE:
        dgate = at * rows.to(wide)
        dgate = (dgate.sum(1, keepdim=True) if gate.shape[1] == 1 else dgate).contiguous()
    if needs & NEED_MASK:
        dmask = grad.masked_fill(kept, 0).sum((0, 1))
    return dfull, drows, dgate, dmask


def gather_modulate(x, ids, inverse, scale, shift, weight, bias, eps, offset, flags):
    """Kept rows, and their modulated norm."""
    rows, batch = gather_rows(x, ids), x.shape[0]

    def own(t: Tensor | None) -> Tensor | None:
        """Modulation of the kept rows."""
        return t if t is None or t.dim() == 2 or t.shape[1] == 1 else gather_rows(t.expand(batch, -1, -1), ids)

    plain = flags & ~NO_ROWS
    y = adaln_reference.norm_modulate(
        rows, own(scale), own(shift), weight=weight, bias=bias, eps=eps, offset=offset, **adaln._norm_options(plain)
    )
    valid = ((ids >= 0) & (ids < x.shape[1])).expand(batch, -1).unsqueeze(-1)
    y = y.masked_fill(~valid, 0).contiguous()
    return (x.new_empty(0) if flags & NO_ROWS else rows), y


# ------------------------------------------------------------------------------------------------------- K/V rows
def write_kv_rows(q, k, v, k_cache, v_cache, k_scale, v_scale, ids, q_weight, k_weight, cos, sin, positions, eps,
                  flags):  # fmt: skip
    """Norm, RoPE, and the rows of a K/V cache."""
    batch, rows, size = k.shape[0], k.shape[1], k_cache.shape[1]
    at = ids.expand(batch, rows)
    if cos is not None and positions is None:
        positions = at.contiguous()
    if positions is not None and cos is not None:
        positions = positions.clamp(0, cos.shape[0 if cos.dim() == 2 else 1] - 1)
    plain = flags & ~PRE_ROPE
    query = k[:, :, :1] if q is None else q
    args = (q_weight if q is not None else None, k_weight, None, None)
    roped_q, roped_k = adaln.qk_norm_rope(query, k, *args, cos, sin, positions, eps, plain)
    stored = roped_k
    if flags & PRE_ROPE:
        _, stored = adaln.qk_norm_rope(query, k, *args, None, None, None, eps, plain)
    inside = (at >= 0) & (at < size)
    # The last of equal ids counts: which row each cache row takes is the largest row number that names it.
    numbers = torch.arange(rows, device=k.device).expand(batch, rows)
    source = torch.full((batch, size + 1), -1, device=k.device)
    source = source.scatter_reduce(1, at.masked_fill(~inside, size).long(), numbers, "amax")[:, :size]
    written, source = source >= 0, source.clamp(min=0)
    for cache, scale, fresh in ((k_cache, k_scale, stored), (v_cache, v_scale, v)):
        value = fresh
        if scale is not None:
            value, factor = _to_fp8(fresh)
            new = factor.gather(1, source.unsqueeze(-1).expand(-1, -1, factor.shape[2]))
            scale.copy_(torch.where(written.unsqueeze(-1), new, scale))
        picked = value.gather(1, source[:, :, None, None].expand(-1, -1, *value.shape[2:]))
        cache.copy_(torch.where(written[:, :, None, None], picked, cache))
    return k.new_empty(0) if q is None else roped_q.contiguous()


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of e4m3fn, and the fp32 scale of each row and head."""
    scale = x.float().abs().amax(-1) / FP8_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    scaled = (x.float() / scale.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale


def read_kv_rows(cache, scale, kind):
    """An fp8 cache as real numbers."""
    dtype = (torch.float32, torch.bfloat16, torch.float16)[kind]
    return (cache.contiguous().view(torch.float8_e4m3fn).float() * scale.unsqueeze(-1)).to(dtype)


# -------------------------------------------------------------------------------------------------------- matching
def match_tokens(metric, src, dst):
    """For each source row the most similar destination row."""
    wide = metric.to(_wide(metric))
    length = wide.norm(dim=-1, keepdim=True)
    unit = wide / torch.where(length == 0, 1.0, length)
    similarity = gather_rows(unit, src) @ gather_rows(unit, dst).mT
    best = similarity.max(-1)
    return best.indices.to(torch.int32), best.values


# -------------------------------------------------------------------------------------------------------- sampling
def sample_logits(logits, tokens, step, noise, mask_id, seed, offset, temperature, flags):
    """One token and its confidence for each masked position."""
    batch, n, size = logits.shape
    masked, wide = tokens == mask_id, _wide(logits)
    values = logits.to(wide)
    bad = (values.isnan() | (values == math.inf)).any(-1) | (values == -math.inf).all(-1)
    scores = values
    if temperature != 0:
        if noise is None:
            items = torch.arange(n * size, device=logits.device).view(1, n, size)
            sample = torch.arange(offset, offset + batch, device=logits.device).view(-1, 1, 1)
            noise = philox.gumbel(philox.words(seed, items, sample, step, PURPOSE_SAMPLE << 24))
        scores = scores + temperature * noise.to(wide)
    ids = scores.argmax(-1)  # the first of equal ones
    if flags & SCALED:
        values = values / temperature
    logp = values.log_softmax(-1)
    chosen = logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    kind = flags & 3
    if kind == 0:
        confidence = chosen.exp()
    elif kind == 1:
        top = logp.topk(min(2, size), -1).values.exp()
        confidence = top[..., 0] - (top[..., 1] if size > 1 else 0.0)
    elif kind == 2:
        confidence = (logp.exp() * logp.masked_fill(logp == -math.inf, 0)).sum(-1)
    else:
        confidence = chosen
    ids = torch.where(bad, mask_id, ids)
    confidence = confidence.masked_fill(bad, math.nan).masked_fill(~masked, math.inf)
    return torch.where(masked, ids, tokens).contiguous(), confidence.contiguous()


def unmask_select(confidence, sampled, tokens, step, count, groups, hold, noise, mask_id, seed, offset, threshold,
                  temperature):  # fmt: skip
    """The masked positions that take their token."""
    batch, n = tokens.shape
    kinds = count.shape[1]
    group = torch.zeros_like(tokens) if groups is None else groups.long().expand(batch, n)
    open_ = (tokens == mask_id) & ~confidence.isnan() & (group >= 0) & (group < kinds)
    if hold is not None:
        open_ = open_ & (hold == 0)
    metric = confidence
    if temperature != 0:
        if noise is None:
            items = torch.arange(n, device=tokens.device)[None]
            sample = torch.arange(offset, offset + batch, device=tokens.device)[:, None]
            noise = philox.gumbel(philox.words(seed, items, sample, step, PURPOSE_SELECT << 24))
        metric = confidence + temperature * noise
    order = metric.sort(dim=1, descending=True, stable=True).indices
    taken = open_ & (confidence >= threshold)
    for g in range(kinds):
        inside = (open_ & (group == g)).gather(1, order)
        first = inside & (inside.cumsum(1) <= count[:, g : g + 1])
        taken = taken | torch.zeros_like(taken).scatter(1, order, first)
    return torch.where(taken, sampled, tokens).contiguous()


KERNELS: dict[str, Callable] = {
    "random_keep": random_keep,
    "select_active": select_active,
    "gather_rows": gather_rows,
    "unmerge_rows": unmerge_rows,
    "segment_rows": segment_rows,
    "scatter_merge": scatter_merge,
    "scatter_merge_backward": scatter_merge_backward,
    "gather_modulate": gather_modulate,
    "write_kv_rows": write_kv_rows,
    "read_kv_rows": read_kv_rows,
    "match_tokens": match_tokens,
    "sample_logits": sample_logits,
    "unmask_select": unmask_select,
}
