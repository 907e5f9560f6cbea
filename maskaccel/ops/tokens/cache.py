"""Rows of a K/V cache: written with norm and RoPE in the same pass, read back where they are fp8."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _call, _checks
from ..adaln.flags import NORM_FLAGS, ROPE_FLAGS, packed
from . import _run
from .schema import PRE_ROPE

if TYPE_CHECKING:
    from ...masks.tokens import TokenIndex

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STORES = {"post": 0, "pre": PRE_ROPE}


@functools.lru_cache(maxsize=1024)
def kv_numbers(norm: str, law: str, weight_offset: float, across: bool, rope: str, store: str,
               eps: float) -> int | None:  # fmt: skip
    """`packed` for `write_kv_rows_bare`."""
    return packed(NORM_FLAGS[norm, law, weight_offset] | ROPE_FLAGS[across, rope] | _STORES[store], eps, 0.0)


def write_kv_rows(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    index: TokenIndex | Tensor,
    *,
    q: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    norm: str = "none",
    across_heads: bool = False,
    rope: str = "interleaved",
    positions: Tensor | None = None,
    eps: float = 1e-6,
    law: str = "fp32",
    weight_offset: float = 0.0,
    store: str = "post",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | None:
    """QK norm, RoPE at the rows' own positions, and the rows of a K/V cache, in one pass.

    What partial-token inference needs at every layer (RAS, arXiv 2502.10389; SpotEdit): the K and V of the tokens that
    were computed replace their rows of a cache of all tokens, without a copy of the rest. **The caches are written in
    place.** With equal rows in `index` the last one counts.

    Args:
        k: `(B, M, Hk, Dh)` of the computed tokens.
        v: As `k`.
        k_cache: `(B, S, Hk, Dh)` of k's dtype, or `float8_e4m3fn` with `k_scale`; last dim contiguous, not expanded.
        v_cache: As `k_cache`.
        index: The row of each token in the caches: a TokenIndex of S tokens that keeps M, or integers `(M,)` or
            `(B, M)`. Rows outside the cache are written nowhere.
        q: `(B, M, H, Dh)`: normalised and rotated too, and returned.
        q_weight: Weight of the norm of q, `(Dh,)` or `(H * Dh,)` with `across_heads`.
        k_weight: The same of k.
        cos: RoPE table `(S', T)` or `(B, S', T)`, T = Dh / 2 or Dh, as in `maskaccel.ops.qk_norm_rope`.
        sin: As `cos`.
        norm: `"rms"`, `"layer"` or `"none"`, as there; `across_heads`, `rope`, `eps`, `law`, `weight_offset` too.
        across_heads: As there.
        rope: As there.
        positions: int32 `(M,)` or `(B, M)`: row of the table of each token; None: its row in the cache.
        eps: As there.
        law: As there.
        weight_offset: As there.
        store: `"post"` stores k after RoPE; `"pre"` before it (after the norm), for caches whose positions change.
        k_scale: fp32 `(B, S, Hk)` scales of an fp8 cache, written too: a row's largest magnitude / 448.
        v_scale: As `k_scale`.
        backend: As there.

    Returns:
        q as attention takes it, `(B, M, H, Dh)`; None without q.

    Raises:
        TypeError: Dtypes do not fit.
        ValueError: Shapes do not fit, an input requires grad, memory is shared with a cache, or `backend` cannot run
            the call. Nothing was written then.
    """
    if backend is None and positions is k_scale is v_scale is None and not _call.tracing():
        try:
            whole = k_cache.shape[1] == index.inverse.shape[1]  # type: ignore[union-attr]
            if whole and (q is not None or q_weight is None):
                numbers = kv_numbers(norm, law, weight_offset, across_heads, rope, store, eps)
                args: tuple = (q, k, v, k_cache, v_cache, index.keep, q_weight, k_weight, cos, sin, numbers)  # type: ignore[union-attr]
                out = _call.bare("write_kv_rows_bare", k, args)
                if out is not None:
                    return None if q is None else out
        except _call.FAULTS:
            pass  # the checks below say what is wrong, or make the operands dense
    from ...masks.tokens import TokenIndex

    k = _checks.activation("k", k, "B, M, Hk, Dh")
    v = _checks.like("v", v, "k", k)
    batch, rows, heads, width = k.shape
    if q is not None:
        q = _checks.activation("q", q, "B, M, H, Dh")
        _checks.same_device("q", q, "k", k)
        if q.dtype != k.dtype or (q.shape[0], q.shape[1], q.shape[3]) != (batch, rows, width):
            raise ValueError(f"q is {q.dtype} {tuple(q.shape)}; it must be {k.dtype} ({batch}, {rows}, H, {width})")
    _checks.choice("norm", norm, ("rms", "layer", "none"))
    _checks.choice("rope", rope, ("interleaved", "half"))
    _checks.choice("law", law, ("fp32", "narrow"))
    _checks.choice("store", store, ("post", "pre"))
    _checks.no_gradient("write_kv_rows", k=k, v=v, q=q, k_cache=k_cache, v_cache=v_cache)
    caches = [_cache(name, t, scale, k) for name, t, scale in
              (("k_cache", k_cache, k_scale), ("v_cache", v_cache, v_scale))]  # fmt: skip
    size = caches[0].shape[1]
    if caches[1].shape[1] != size or caches[1].dtype != caches[0].dtype:
        raise ValueError(f"v_cache is {v_cache.dtype} {tuple(v_cache.shape)}; it must be like k_cache")
    if isinstance(index, TokenIndex):
        if (index.n, index.kept) != (size, rows):
            raise ValueError(f"index keeps {index.kept} of {index.n} tokens; the call writes {rows} rows of {size}")
        index = index.keep
    ids = _run.rows_of("index", index, batch, rows, k.device)
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling() and int(ids.min()) < 0:
        raise ValueError(f"index holds {int(ids.min())}; rows are 0 to {size - 1}")
    sizes = {"q_weight": (width if q is None else q.shape[2]), "k_weight": heads}
    weights = []
    for name, t in (("q_weight", q_weight), ("k_weight", k_weight)):
        _checks.vector(name, t, sizes[name] * width if across_heads else width, k)
        weights.append(t)
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together")
    if cos is not None:
        _table(cos, sin, batch, width, k)
    if positions is not None:
        positions = _run.rows_of("positions", positions, batch, rows, k.device)
        positions = positions[0] if positions.shape[0] == 1 else positions
    weights = _checks.one_dtype(k, *weights)
    tables = [t if t is None or t.dtype in (k.dtype, torch.float32) or k.dtype == torch.float64 else t.float()
              for t in (cos, sin)]  # fmt: skip
    flags = NORM_FLAGS[norm, law, float(weight_offset)] | ROPE_FLAGS[across_heads, rope]
    flags |= PRE_ROPE if store == "pre" else 0
    for name, t in (("k", k), ("v", v), ("q", q)):
        for cache_name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            if _checks.overlap(t, cache):
                raise ValueError(f"{name} shares memory with {cache_name}, which this call writes; pass a copy")
    args = (_checks.dense_last(q), _checks.dense_last(k), _checks.dense_last(v), *caches, k_scale, v_scale, ids,
            *weights, *tables, positions, float(eps), flags)  # fmt: skip
    out = _run.run("write_kv_rows", args, k.device, backend, k.dtype)
    return None if q is None else out


def _cache(name: str, cache: Tensor, scale: Tensor | None, k: Tensor) -> Tensor:
    """A cache as the kernels take it: fp8 as its bits."""
    cache = _checks.tensor(name, cache)
    batch, _, heads, width = k.shape
    if cache.dim() != 4 or (cache.shape[0], *cache.shape[2:]) != (batch, heads, width):
        raise ValueError(f"{name} has shape {tuple(cache.shape)}; it must be ({batch}, S, {heads}, {width})")
    _checks.same_device(name, cache, "k", k)
    if cache.stride(-1) != 1 or any(s == 0 and n > 1 for s, n in zip(cache.stride(), cache.shape, strict=True)):
        raise ValueError(f"{name} is written to: its last dim must be contiguous and no dim expanded")
    if cache.dtype == torch.float8_e4m3fn:
        if scale is None:
            raise ValueError(f"{name} is float8_e4m3fn: it needs {name[0]}_scale, fp32 (B, S, Hk)")
        need = tuple(cache.shape[:3])
        if scale.dtype != torch.float32 or tuple(scale.shape) != need or not scale.is_contiguous():
            raise ValueError(f"{name[0]}_scale is {scale.dtype} {tuple(scale.shape)}; it must be dense fp32 {need}")
        return cache.view(torch.uint8)
    if scale is not None or cache.dtype != k.dtype:
        raise TypeError(f"{name} has dtype {cache.dtype}; it must be {k.dtype}, or float8_e4m3fn with scales")
    return cache


def _table(cos: Tensor, sin: Tensor | None, batch: int, width: int, k: Tensor) -> None:
    cos = _checks.floating("cos", cos)
    sin = _checks.like("sin", sin, "cos", cos)
    _checks.same_device("cos", cos, "k", k)
    if cos.dim() not in (2, 3) or cos.shape[-1] not in (width, width // 2):
        raise ValueError(f"cos has shape {tuple(cos.shape)}; it must be (S, T) or (B, S, T), T {width // 2} or {width}")
    if cos.dim() == 3 and cos.shape[0] not in (1, batch):
        raise ValueError(f"cos has a batch of {cos.shape[0]}; allowed are 1, {batch}")


def read_kv_rows(cache: Tensor, scale: Tensor, dtype: torch.dtype, *, backend: str | None = None) -> Tensor:
    """An fp8 cache as `dtype`: `value * scale` of its row and head.

    Args:
        cache: `float8_e4m3fn` `(B, S, Hk, Dh)`.
        scale: fp32 `(B, S, Hk)`.
        dtype: fp32, bf16 or fp16.
        backend: As in `maskaccel.ops.norm_modulate`.

    Raises:
        TypeError: Another dtype.
        ValueError: Shapes do not fit.
    """
    if backend is None and not _call.tracing():
        try:
            if cache.dtype is torch.float8_e4m3fn:
                args = (cache.view(torch.uint8), scale, _KINDS[dtype])
                return _call.undifferentiated("read_kv_rows", cache, args)  # type: ignore[no-any-return]
        except _call.FAULTS:
            pass  # the checks below say what is wrong, or make the operands dense
    cache = _checks.tensor("cache", cache)
    if cache.dtype != torch.float8_e4m3fn or cache.dim() != 4:
        raise TypeError(f"cache is {cache.dtype} {tuple(cache.shape)}; it must be float8_e4m3fn (B, S, Hk, Dh)")
    if dtype not in _KINDS:
        raise TypeError(f"dtype={dtype}; allowed are float32, bfloat16, float16")
    if scale.dtype != torch.float32 or scale.shape != cache.shape[:3]:
        need = tuple(cache.shape[:3])
        raise ValueError(f"scale is {scale.dtype} {tuple(scale.shape)}; it must be float32 {need}")
    args = (cache.view(torch.uint8), scale.contiguous(), _KINDS[dtype])
    return _run.run("read_kv_rows", args, cache.device, backend)
