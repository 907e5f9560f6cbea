"""Calls of the Triton kernels of the rows of a K/V cache; the contract is checked here."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _triton as host
from ..adaln.schema import LAWS
from ..adaln.triton_launch_rope import Rope, check_qk, launch_shape
from .schema import PRE_ROPE
from .triton_check import check_ids, check_rows

_KINDS = (torch.float32, torch.bfloat16, torch.float16)


def _check_cache(name: str, cache: Tensor, scale: Tensor | None, like: Tensor | None = None) -> None:
    """Check a cache `(B, S, H, Dh)`, of the shape and dtype of rows `like` if given, and its scales."""
    dtype = torch.uint8 if scale is not None or like is None else like.dtype
    fits = cache.dim() == 4 and cache.dtype == dtype and (cache.shape[3] < 2 or cache.stride(3) == 1)
    if fits and like is not None:
        fits = (cache.shape[0], *cache.shape[2:]) == (like.shape[0], *like.shape[2:]) and cache.device == like.device
    if not fits:
        beside = "(B, S, H, Dh)" if like is None else f"{(like.shape[0], 'S', *like.shape[2:])} on {like.device}"
        raise RuntimeError(f"{name} must be {dtype} {beside} with a dense last dim, got {cache.dtype} "
                           f"{tuple(cache.shape)} of strides {cache.stride()}")  # fmt: skip
    if like is not None and any(size > 1 and step == 0 for size, step in zip(cache.shape, cache.stride(), strict=True)):
        raise RuntimeError(f"{name} is written and must not be expanded, got strides {cache.stride()}")
    if scale is not None:
        if not scale.dim() or scale.shape[0] != cache.shape[0]:
            raise RuntimeError(f"the scales of {name} must be {tuple(cache.shape[:3])}, got {tuple(scale.shape)}")
        check_rows(f"scales of {name}", scale, cache.shape[0], tuple(cache.shape[1:3]), torch.float32, cache.device)


def write_kv_rows(
    q: Tensor | None, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None,
    v_scale: Tensor | None, ids: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, positions: Tensor | None, eps: float, flags: int,
) -> Tensor:  # fmt: skip
    query, plain = k if q is None else q, flags & ~PRE_ROPE
    check_qk(query, k, (None if q is None else q_weight, k_weight, None, None), plain)
    host.check_activation("v", v, k, dims=4)
    if query.shape[1] != k.shape[1]:
        raise RuntimeError(f"q and k must have as many rows, got {tuple(query.shape)} and {tuple(k.shape)}")
    if (k_scale is None) != (v_scale is None):
        raise RuntimeError("k_scale and v_scale must be given together")
    _check_cache("k_cache", k_cache, k_scale, k)
    _check_cache("v_cache", v_cache, v_scale, v)
    batch, m, size = k.shape[0], k.shape[1], k_cache.shape[1]
    if v_cache.shape[1] != size:
        raise RuntimeError(f"v_cache must have {size} rows as k_cache, got {tuple(v_cache.shape)}")
    if cos is not None and cos.dim() not in (2, 3):
        raise RuntimeError(f"cos must be (S', T) or (B or 1, S', T), got {tuple(cos.shape)}")
    ids_batch = check_ids("ids", ids, batch, k.device, m)
    rope = Rope(query, k, cos, sin, positions if positions is not None else ids if ids_batch else ids[0])
    out = k.new_empty(0) if q is None else q.new_empty(q.shape)
    if batch * m:
        from .triton_kv import write_rows

        shape = launch_shape(query, k, rope, plain, 16)
        del shape["PER_HEAD"]
        table = 1 if cos is None else cos.shape[cos.dim() - 2]
        host.launch(write_rows, (batch * m, 2 if q is None else 3), k, q, k, v, None if q is None else out, k_cache,
                    v_cache, k_scale, v_scale, ids, q_weight, k_weight, *rope.tables[:3], ids_batch,
                    rope.positions_batch, query.stride()[:3], k.stride()[:3], v.stride()[:3], k_cache.stride()[:3],
                    v_cache.stride()[:3], m, size, table, query.shape[2], k.shape[2], k.shape[3], eps,
                    PRE_ROPE=bool(flags & PRE_ROPE), BLOCK=min(host.power_of_two(m), 1024), **shape,
                    enable_fp_fusion=not flags & LAWS["narrow"])  # fmt: skip
    return out


def read_kv_rows(cache: Tensor, scale: Tensor, kind: int) -> Tensor:
    _check_cache("cache", cache, scale)
    if not 0 <= kind < len(_KINDS):
        raise RuntimeError(f"kind={kind} must be 0 to {len(_KINDS) - 1}")
    out = cache.new_empty(cache.shape, dtype=_KINDS[kind])
    if out.numel():
        from .triton_kv import read_rows

        batch, size, heads, width = cache.shape
        block, _ = host.block_and_warps(width, 16)
        rows = max(2048 // block, 1)
        host.launch(read_rows, (math.ceil(size * heads / rows), batch), cache, cache, scale, out, cache.stride()[:3],
                    size, heads, width, ROWS=rows, BLOCK=block, num_warps=4)  # fmt: skip
    return out


KERNELS: dict[str, Callable] = {"write_kv_rows": write_kv_rows, "read_kv_rows": read_kv_rows}
