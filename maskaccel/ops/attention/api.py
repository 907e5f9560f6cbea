"""Attention over the tiles that a mask keeps, and the ops around it."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import _call, _checks, _registry
from .._backends import BACKENDS, automatic, call_refusal, namespace, refusal, select, select_while_tracing
from . import check, quick, reference
from .quick import BLOCK as _BLOCK
from .quick import NO_MASK as _NO_MASK
from .schema import FEATURE_MAPS, KEEP, NORMALIZE, PRUNE

if TYPE_CHECKING:
    from ...masks.tiles import TileMask
    from .relpos import RelativePosition


class Attention(NamedTuple):
    """Results of `tile_attention` that were asked for; the others are None.

    Attributes:
        out: `(B, Sq, H, D)`.
        lse: fp32 `(B, H, Sq)`, natural logarithm of the sum of exponentials; -inf for a row that keeps nothing.
        keep: int32 `(B, H, Mq, ceil(Nk / 32))`, the tiles that passed the threshold: bits of a `TileMask`.
    """

    out: Tensor
    lse: Tensor | None
    keep: Tensor | None


def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TileMask | None = None,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    relpos: RelativePosition | None = None,
    out_scale: Tensor | None = None,
    out_add: Tensor | None = None,
    skip_threshold: float | None = None,
    reference_lse: Tensor | None = None,
    prune: bool = False,
    return_lse: bool = False,
    return_keep: bool = False,
    block: tuple[int, int] | None = None,
    backend: str | None = None,
) -> Any:
    """Softmax attention over the tiles of the score matrix that `mask` keeps.

    `s = scale * q k^T + bias`, elements that the mask leaves out are -inf, `out = out_scale * softmax(s) v + out_add`.
    Time and memory traffic are in proportion to the tiles kept. A query that keeps nothing gets 0 (and lse -inf, and
    zero gradients).
    On GPUs of compute capability 9.0 the gradient of q is summed in no fixed order, for speed; under
    `torch.use_deterministic_algorithms(True)` the same input gives the same bits there too.

    Args:
        q: `(B, Sq, H, D)`, fp32, bf16 or fp16 (fp64 on the reference); any strides with a dense last dim. Kernels take
            head dims D that are multiples of 8 from 16 to 256.
        k: `(B, Sk, Hk, D)` with Hk dividing H (grouped queries); dtype of q.
        v: As `k`.
        mask: Which tiles; None keeps all. Of `(Sq, Sk)` tokens; its batch and heads are those of q, or 1.
        scale: Of the scores; None is `D ** -0.5`.
        bias: Added to the scaled scores: `(B, H, Sq, Sk)`, any dim may be 1; fp32 or of q's dtype.
        relpos: Relative position table, added to the scaled scores.
        out_scale: fp32 `(B, H, Sq)`, any dim may be 1: factor of each row of the result (Re-ttention, eq. of rho).
        out_add: `(B, Sq, H, D)`, fp32 or of q's dtype: added to the result (Re-ttention's residual).
        skip_threshold: In units of log2, usually negative: a tile whose scores are all so far below what its rows
            have seen is not kept in `keep` (LiteAttention's test). Needs `return_keep` or `prune`.
        reference_lse: fp32 `(B, H, Sq)`: what the test compares with, instead of the largest score so far; the lse of
            an earlier step makes it independent of the order of tiles.
        prune: Tiles that fail the test are left out of this result too (BLASST, SpargeAttn's second stage).
        return_lse: Return lse too.
        return_keep: Return keep bits too, of whole mask tiles.
        block: Tile size of the keep bits of a call without a mask; None is 128 x 128.
        backend: `"cuda"`, `"cpu"`, `"triton"`, `"reference"`, or None for the best that can run.

    Returns:
        `out`, of the shape and dtype of q, contiguous; `Attention(out, lse, keep)` if more was asked for. With only
        `return_lse`: `(out, lse)`.

    Raises:
        TypeError: An argument is no tensor, or of a dtype that is not allowed.
        ValueError: Shapes do not fit, a number is not finite, the head dim is not served, or `backend` cannot run the
            call.
    """
    if backend is None and relpos is None and block is None and not _call.tracing():
        try:
            found = quick.attention(q, k, v, mask, scale, bias, out_scale, out_add, skip_threshold, reference_lse,
                                    prune, return_keep)  # fmt: skip
        except _call.FAULTS:
            found = None  # what follows names the fault, or puts the operands right
        if found is not None:
            if return_keep:
                return Attention(found[0], found[1] if return_lse else None, found[2])
            return found[:2] if return_lse else found[0]
    check.qkv(q, k, v)
    width = q.shape[3]
    if mask is not None:
        check.mask_fits(mask, q, k)
    scale = width**-0.5 if scale is None else check.number("scale", scale)
    whole = (q.shape[0], q.shape[2], q.shape[1])
    check.broadcastable("bias", bias, (*whole, k.shape[1]), "B, H, Sq, Sk", q)
    check.broadcastable("out_scale", out_scale, whole, "B, H, Sq", q)
    if out_add is not None:
        _same_shape("out_add", out_add, q)
    check.lse_of("reference_lse", reference_lse, q)
    flags = (KEEP if return_keep else 0) | (PRUNE if prune else 0)
    threshold = 0.0
    if skip_threshold is not None:
        if not flags:
            raise ValueError("skip_threshold needs return_keep=True or prune=True")
        threshold = check.number("skip_threshold", skip_threshold)
    elif flags or reference_lse is not None:
        named = "return_keep" if return_keep else "prune" if prune else "reference_lse"
        raise ValueError(f"{named} needs a skip_threshold")
    table = (None, None, None) if relpos is None else relpos.operands(q, k)

    wants_grad = _call.wants_grad((q, k, v, bias, table[0], out_scale, out_add))
    if wants_grad and prune:
        raise ValueError("prune=True has no derivative; call it under torch.no_grad()")
    q, k, v = _dense(q), _dense(k), _dense(v)
    # The epilogue is for inference; under autograd it is torch's.
    epilogue = (None, None) if wants_grad else (_fp32(out_scale), _checks.dense_last(out_add))
    if mask is not None and block is not None and check.check_block(block) != mask.block:
        raise ValueError(f"block={block} is not that of the mask, {mask.block}")
    bm, bn = check.check_block(block or _BLOCK) if mask is None else mask.block
    compared = None if reference_lse is None else reference_lse.contiguous()
    operands = _NO_MASK if mask is None else mask.operands(wants_grad)
    args = (
        q, k, v, *operands, bias, *table, compared, *epilogue, bm, bn, scale, threshold, flags,
    )  # fmt: skip
    out, lse, keep = _run("tile_attention", q, args, backend, wants_grad)
    if wants_grad and out_scale is not None:
        out = (out * out_scale.expand(whole).transpose(1, 2)[..., None]).to(q.dtype)
    if wants_grad and out_add is not None:
        out = (out + out_add).to(q.dtype)
    if return_keep:
        return Attention(out, lse if return_lse else None, keep)
    return (out, lse) if return_lse else out


def _same_shape(name: str, t: Any, q: Tensor) -> None:
    t = _checks.floating(name, t)
    if t.shape != q.shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be that of q, {tuple(q.shape)}")
    if t.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"{name} has dtype {t.dtype}; allowed are {q.dtype} and torch.float32")
    _checks.same_device(name, t, "q", q)


def _dense(t: Tensor) -> Tensor:
    dense = _checks.dense_last(t)
    assert dense is not None
    return dense


def _fp32(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dtype == torch.float64 else t.float()


def _choose(name: str, q: Tensor, backend: str | None) -> str:
    """The backend of an attention op, also by head dim."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; allowed are {', '.join(BACKENDS)}")
    why = None if backend == "reference" else check.head_dim_refusal(q.shape[3], q.dtype)
    if why is not None:
        if backend is None and q.dtype == torch.float64:
            return "reference"
        served = [b for b in BACKENDS if b != "reference" and refusal(b, q.device, torch.float32, name) is None]
        raise ValueError(f"{why} (here: {', '.join(served) or 'none'}); backend='reference' takes it")
    if torch.compiler.is_compiling():
        return select_while_tracing(backend, q.device, q.dtype, name)
    return automatic(name, q.device, q.dtype) if backend is None else select(backend, q.device, q.dtype, name)


def _run(name: str, q: Tensor, args: tuple, backend: str | None, wants_grad: bool) -> Any:
    chosen = _choose(name, q, backend)
    if torch.compiler.is_compiling() and backend is None and chosen != "reference":
        return _registry.op("maskaccel", name)(*args)
    if chosen == "cuda":
        why = call_refusal("cuda", name, args)
        if why is not None and backend is not None:
            raise ValueError(f"backend='cuda' cannot run this call: {why}")
        if why is not None:
            chosen = "reference" if refusal("triton", q.device, q.dtype, name) else "triton"
    if chosen == "reference":
        return reference.KERNELS[name](*args)
    if wants_grad:
        return _registry.differentiable(namespace(chosen), name, args)
    return _registry.op(namespace(chosen), name)(*args)


def attention_column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: TileMask | None = None,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    relpos: RelativePosition | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention that each key receives, summed over the queries, without the attention map.

    Args:
        q: `(B, Sq, H, D)`.
        k: `(B, Sk, Hk, D)`.
        lse: fp32 `(B, H, Sq)`, from `tile_attention` with the same mask and scale.
        mask: As there.
        scale: As there.
        bias: As there.
        relpos: As there.
        backend: As there.

    Returns:
        fp32 `(B, H, Sk)`. It has no derivative.

    Raises:
        TypeError: An argument is no tensor, or of a dtype that is not allowed.
        ValueError: Shapes do not fit, an argument requires grad, or `backend` cannot run the call.
    """
    if backend is None and relpos is None and not _call.tracing():
        try:
            sums = quick.column_sums(q, k, lse, mask, scale, bias)
        except _call.FAULTS:
            sums = None  # as in tile_attention
        if sums is not None:
            return sums
    check.qkv(q, k, k)
    if lse is None:
        raise TypeError("lse must be a torch.Tensor, got None")
    check.lse_of("lse", lse, q)
    if mask is not None:
        check.mask_fits(mask, q, k)
    scale = q.shape[3] ** -0.5 if scale is None else check.number("scale", scale)
    check.broadcastable("bias", bias, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), "B, H, Sq, Sk", q)
    table = (None, None, None) if relpos is None else relpos.operands(q, k)
    _checks.no_gradient("attention_column_sums", q=q, k=k, lse=lse, bias=bias, relpos=table[0])
    lists = (None,) * 5 if mask is None else (*mask.transposed_lists(), mask.pattern_of, mask.patterns)
    bm, bn = _BLOCK if mask is None else mask.block
    q, k = _dense(q), _dense(k)
    args = (q, k, lse.contiguous(), *lists, bias, *table, bm, bn, scale)
    return _run("attention_column_sums", q, args, backend, False)


def merge_attention(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from the attention over each (ring and split attention).

    Args:
        out1: `(B, S, H, D)`, attention over the first keys.
        lse1: fp32 `(B, H, S)`, natural logarithm; -inf where a row had no keys (whatever `out1` holds there).
        out2: Over the others, as `out1`.
        lse2: As `lse1`.
        backend: As in `tile_attention`.

    Returns:
        `(out, lse)`; rows without any key are 0 and -inf. Differentiable in all four.

    Raises:
        TypeError: Dtypes do not fit.
        ValueError: Shapes or devices do not fit.
    """
    if backend is None and not _call.tracing():
        try:
            return _call.fast("merge_attention", out1, (out1, lse1, out2, lse2))
        except _call.FAULTS:
            pass  # what follows names the fault, or puts the operands right
    out1 = _checks.activation("out1", out1, "B, S, H, D")
    out2 = _checks.like("out2", out2, "out1", out1)
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        if lse is None:
            raise TypeError(f"{name} must be a torch.Tensor, got None")
        check.lse_of(name, lse, out1)
    args = (_dense(out1), lse1.contiguous(), _dense(out2), lse2.contiguous())
    return _call.checked("merge_attention", out1, args, backend, partial(reference.merge_attention, *args))


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "relu",
    normalize: str = "sum",
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Linear attention: `phi(q) (phi(k)^T v) / (phi(q) . sum phi(k) + eps)`.

    Args:
        q: `(B, Sq, H, D)`.
        k: `(B, Sk, Hk, D)` with Hk dividing H.
        v: As `k`.
        feature_map: `"relu"` (LiT, Wang et al. 2025) or `"elu1"`, elu(x) + 1 (LinFusion, Liu et al. 2024).
        normalize: Whether the sums over keys are `"sum"`, or `"mean"` as in LinFusion; it matters beside `eps`.
        eps: Added to the denominator.
        backend: As in `tile_attention`.

    Returns:
        Of the shape and dtype of q. Differentiable.

    Raises:
        TypeError: Dtypes do not fit.
        ValueError: Shapes do not fit, or an option is unknown.
    """
    if backend is None and not _call.tracing():
        try:
            if not -math.inf < eps < math.inf:
                raise LookupError
            args = (q, k, v, FEATURE_MAPS[feature_map], NORMALIZE[normalize], eps)
            return _call.fast("linear_attention", q, args)
        except _call.FAULTS:
            pass  # what follows names the fault, or puts the operands right
    check.qkv(q, k, v)
    _checks.choice("feature_map", feature_map, FEATURE_MAPS)
    _checks.choice("normalize", normalize, NORMALIZE)
    eps = check.number("eps", eps)
    q, k, v = _dense(q), _dense(k), _dense(v)
    args = (q, k, v, FEATURE_MAPS[feature_map], NORMALIZE[normalize], eps)
    return _run("linear_attention", q, args, backend, _call.wants_grad((q, k, v)))
