"""Fakes and derivatives of the token ops, and their definition in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import dense_last
from .._registry import OpSpec, define, define_bare, op
from ..adaln.flags import unpacked
from ..adaln.schema import NEED_BIAS, NEED_SCALE, NEED_SHIFT, NEED_WEIGHT, NEED_X
from .schema import (
    BARE,
    KEEP_CLASSES,
    MERGES,
    NEED_FULL,
    NEED_GATE,
    NEED_MASK,
    NEED_ROWS,
    NO_ROWS,
    SCHEMAS,
    THRESHOLD,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- fakes
def _ints(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.int32)


def _real(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _fake_random_keep(step, order, labels, quota, force, seed, route, offset, batch, n, keep, groups, rows_kept, mode):
    counts = _ints(step, batch) if mode == KEEP_CLASSES else _ints(step, 0)
    return _ints(step, batch, keep), _ints(step, batch, n), counts


def _fake_random_keep_bare(step, seed, offset, batch_route, n_keep):
    batch, n = batch_route & 0xFFFFFFFF, n_keep & 0xFFFFFFFF
    return _ints(step, batch, n_keep >> 32), _ints(step, batch, n)


def _fake_select_active(score, age, decay, force, keep, high, threshold, flags):
    batch, n = score.shape
    counts = _ints(score, batch) if flags & THRESHOLD else _ints(score, 0)
    return _ints(score, batch, keep), _ints(score, batch, n), counts, _ints(score, batch, n)


def _fake_gather(x, ids, *_):
    return x.new_empty((x.shape[0], ids.shape[1], x.shape[2]))


def _fake_segment(x, order, offsets, slot, mean):
    return x.new_empty((x.shape[0], offsets.shape[1] - 1, x.shape[2]))


def _fake_scatter_merge(full, rows, ids, inverse, *_):
    return rows.new_empty((rows.shape[0], inverse.shape[1], rows.shape[2]))


def _fake_scatter_merge_backward(dout, rows, ids, inverse, gate, lam, mode, needs):
    batch, n, width = dout.shape
    return (
        dout.new_empty((batch, n, width) if needs & NEED_FULL else (0,)),
        dout.new_empty((batch, ids.shape[1], width) if needs & NEED_ROWS else (0,)),
        _real(dout, batch, gate.shape[1], width) if needs & NEED_GATE else _real(dout, 0),
        _real(dout, width) if needs & NEED_MASK else _real(dout, 0),
    )


def _fake_gather_modulate(x, ids, *args):
    y = _fake_gather(x, ids)
    return (x.new_empty(0) if args[-1] & NO_ROWS else torch.empty_like(y)), y


def _fake_write_kv_rows(q, k, *_):
    return k.new_empty(0) if q is None else q.new_empty(q.shape)


def _fake_read_kv_rows(cache, scale, kind):
    return cache.new_empty(cache.shape, dtype=(torch.float32, torch.bfloat16, torch.float16)[kind])


def _fake_match_tokens(metric, src, dst):
    return _ints(metric, metric.shape[0], src.shape[1]), _real(metric, metric.shape[0], src.shape[1])


def _fake_sample_logits(logits, tokens, *_):
    return torch.empty_like(tokens), _real(logits, *tokens.shape)


def _fake_unmask_select(confidence, sampled, tokens, *_):
    return torch.empty_like(tokens)


# ---------------------------------------------------------------------------------------------- derivatives
def _unique(inverse: Tensor | None) -> Tensor:
    if inverse is None:
        raise RuntimeError("gather_rows without the inverse map has no derivative: ids may repeat")
    return inverse


def _save_gather(inputs: tuple, output: Any) -> tuple:
    return inputs[1], _unique(inputs[2])


def _backward_gather(ns: str, plain: tuple, needs: tuple, saved: tuple, grads: tuple) -> tuple:
    if grads[0] is None:
        return None, None, None
    ids, inverse = saved
    return op(ns, "gather_rows")(dense_last(grads[0]), inverse, ids), None, None


def _backward_unmerge(ns: str, plain: tuple, needs: tuple, saved: tuple, grads: tuple) -> tuple:
    if grads[0] is None:
        return None, None, None, None
    slot, order, offsets = saved
    return op(ns, "segment_rows")(dense_last(grads[0]), order, offsets, slot, False), None, None, None


def _backward_segment(ns: str, plain: tuple, needs: tuple, saved: tuple, grads: tuple) -> tuple:
    offsets, slot = saved
    grad = grads[0]
    if grad is None:
        return None, None, None, None, None
    if plain[-1]:
        grad = (grad / offsets.diff(dim=1).clamp(min=1).unsqueeze(-1)).to(grad.dtype)
    return op(ns, "gather_rows")(dense_last(grad), slot, None), None, None, None, None


def _save_merge(inputs: tuple, output: Any) -> tuple:
    rows, ids, inverse, gate, mask_token, pos = inputs[1:7]
    return (rows if gate is not None else None), ids, inverse, gate, mask_token, pos


def _backward_merge(ns: str, plain: tuple, needs: tuple, saved: tuple, grads: tuple) -> tuple:
    # inputs: full rows ids inverse gate mask_token pos lam mode
    rows, ids, inverse, gate, mask_token, pos = saved
    lam, mode = plain[-2:]
    grad = dense_last(grads[0])
    if grad is None:
        return (None,) * 9
    added = mode == MERGES["add_gated"]
    bits = (
        (NEED_FULL if needs[0] and not added else 0)
        | (NEED_ROWS if needs[1] else 0)
        | (NEED_GATE if needs[4] else 0)
        | (NEED_MASK if needs[5] else 0)
    )
    dfull, drows, dgate, dmask = op(ns, "scatter_merge_backward")(grad, rows, ids, inverse, gate, lam, mode, bits)
    dpos = None
    if needs[6]:
        dpos = grad if pos.shape[0] == grad.shape[0] else grad.sum(0, keepdim=True, dtype=dmask.dtype)
        dpos = dpos.to(pos.dtype)
    if needs[4]:
        dgate = (dgate if gate.shape[0] == dgate.shape[0] else dgate.sum(0, keepdim=True)).to(gate.dtype)
    return (
        (grad if added else dfull) if needs[0] else None,
        drows if needs[1] else None,
        None,
        None,
        dgate if needs[4] else None,
        dmask.to(mask_token.dtype) if needs[5] else None,
        dpos,
        None,
        None,
    )


def _save_modulate(inputs: tuple, output: Any) -> tuple:
    if inputs[-1] & NO_ROWS:
        raise RuntimeError("the NO_ROWS flag is for inference: the derivative needs the rows")
    return (output[0], *inputs[1:7])


def _backward_modulate(ns: str, plain: tuple, needs: tuple, saved: tuple, grads: tuple) -> tuple:
    # inputs: x ids inverse scale shift weight bias eps offset flags
    rows, ids, inverse, scale, shift, weight, bias = saved
    drows, dy = grads
    if drows is None and dy is None:
        return (None,) * 10
    gather, batch, n = op(ns, "gather_rows"), rows.shape[0], inverse.shape[1]
    total, vectors = drows, [None] * 4
    if dy is not None:
        # Nothing comes back from slots that hold no token.
        dy = dy.masked_fill((ids >= n).unsqueeze(-1), 0).contiguous()

        def of_tokens(t: Tensor | None) -> bool:
            return t is not None and t.dim() == 3 and t.shape[1] > 1

        own = [gather(t.expand(batch, -1, -1), ids, None) if of_tokens(t) else t for t in (scale, shift)]
        bits = (
            NEED_X
            | (NEED_SCALE if needs[3] else 0)
            | (NEED_SHIFT if needs[4] else 0)
            | (NEED_WEIGHT if needs[5] else 0)
            | (NEED_BIAS if needs[6] else 0)
        )
        dx, ds, db, _, _, dw, dbias = op(ns, "norm_modulate_backward")(
            dy, None, rows, *own, None, None, weight, bias, None, None, None, *plain[-3:], bits
        )
        total = dx if drows is None else dx + drows
        for i, (grad, value) in enumerate(((ds, scale), (db, shift), (dw, weight), (dbias, bias))):
            if not needs[3 + i]:
                continue
            if i < 2 and of_tokens(value):
                grad = gather(grad, inverse, None)
            if i < 2 and value.shape[0] < grad.shape[0]:
                grad = grad.sum(0, keepdim=True)
            vectors[i] = grad.view(value.shape).to(value.dtype)
    dx = gather(dense_last(total), inverse, None) if needs[0] else None
    return dx, None, None, *vectors, None, None, None


_DERIVED: dict[str, tuple[Callable, Callable | None, Callable | None]] = {
    "random_keep": (_fake_random_keep, None, None),
    "select_active": (_fake_select_active, None, None),
    "gather_rows": (_fake_gather, _save_gather, _backward_gather),
    "unmerge_rows": (_fake_gather, lambda inputs, output: inputs[1:4], _backward_unmerge),
    "segment_rows": (_fake_segment, lambda inputs, output: inputs[2:4], _backward_segment),
    "scatter_merge": (_fake_scatter_merge, _save_merge, _backward_merge),
    "scatter_merge_backward": (_fake_scatter_merge_backward, None, None),
    "gather_modulate": (_fake_gather_modulate, _save_modulate, _backward_modulate),
    "write_kv_rows": (_fake_write_kv_rows, None, None),
    "read_kv_rows": (_fake_read_kv_rows, None, None),
    "match_tokens": (_fake_match_tokens, None, None),
    "sample_logits": (_fake_sample_logits, None, None),
    "unmask_select": (_fake_unmask_select, None, None),
}


def register() -> None:
    """Define all token ops; called once by `maskaccel.ops`."""
    for name, (fake, save, backward) in _DERIVED.items():
        define(OpSpec(name, SCHEMAS[name], fake, save, backward))
    define_bare("gather_modulate_bare", BARE["gather_modulate_bare"], _fake_gather_modulate, unpacked)
    define_bare("write_kv_rows_bare", BARE["write_kv_rows_bare"], _fake_write_kv_rows)
    define_bare("random_keep_bare", BARE["random_keep_bare"], _fake_random_keep_bare)
