"""Block prediction: pool tokens, score pairs of blocks, select the tiles worth computing.

`tile_pool` -> `tile_scores` -> `tile_select` covers the predictors of VSA (Zhang et al. 2025), SpargeAttn (Zhang et al.
2025), XAttention (Xu et al. 2025), DraftAttention (Shen et al. 2025) and NABLA. Plain torch, no wait for the device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _call, _checks
from .._registry import op
from . import check
from .check import check_block
from .schema import ABOVE, MASS, TOP

if TYPE_CHECKING:
    from ...masks.order import TokenOrder
    from ...masks.tiles import TileMask

_MODES = ("mean", "antidiagonal")


def tile_pool(x: Tensor, block: int | TokenOrder, *, mode: str = "mean", weight: Tensor | None = None) -> Tensor:
    """One vector for each block of tokens.

    Args:
        x: `(B, S, H, D)`. The last block may be shorter.
        block: Tokens of a block; or a `TokenOrder`, whose patches are the blocks: `x` is in that order, patches at the
            border may be smaller, and tokens beside the grid are in no block.
        mode: `"mean"`, or `"sum"` of the weighted tokens.
        weight: `(block,)`, a learned weight of each place in a block (CLEAR's pooled keys, summed); blocks must all be
            whole.

    Returns:
        `(B, ceil(S / block), H, D)`, or a row for each patch, in x's dtype, formed in fp32. Differentiable.

    Raises:
        TypeError: An argument is no floating tensor.
        ValueError: `block` is not positive, the order is for another number of tokens or has no patches, `mode` is
            unknown, or `weight` does not fit.
    """
    x = _checks.activation("x", x, "B, S, H, D")
    _checks.choice("mode", mode, ("mean", "sum"))
    if type(block) is int and block > 0 and weight is None and mode == "mean" and not _call.wants_grad((x,)):
        return op("maskaccel", "tile_means")(_checks.dense_last(x), block, False)[0]
    wide = x if x.dtype == torch.float64 else x.float()
    if isinstance(block, int):
        if isinstance(block, bool) or block < 1:
            raise ValueError(f"block={block!r} must be an integer, 1 or more, or a TokenOrder")
        size, axes = block, [(x.shape[1], block)]
        wide = torch.nn.functional.pad(wide, (0, 0, 0, 0, 0, -x.shape[1] % size))
    else:
        axes = _axes_of(block, x.shape[1])
        size = math.prod([p for _, p in axes])
        wide = _whole_patches(wide[:, block.prefix : block.tokens - block.suffix], axes, size)
    wide = wide.unflatten(1, (-1, size))
    if weight is not None:
        weight = _checks.floating("weight", weight)
        if tuple(weight.shape) != (size,):
            raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be ({size},)")
        for n, p in axes:
            if n % p:
                raise ValueError(f"weight needs whole blocks: {n} tokens are no multiple of {p}")
        wide = wide * weight.to(wide.dtype)[:, None, None]
    pooled = wide.sum(2)
    if mode == "mean":
        counts = torch.ones(1, dtype=pooled.dtype, device=x.device)
        for n, p in axes:
            along = torch.full((-(-n // p),), p, dtype=pooled.dtype, device=x.device)
            if n % p:
                along[-1:] = n % p
            counts = torch.outer(counts, along).flatten()
        pooled = pooled / counts[:, None, None]
    return pooled.to(x.dtype)


def tile_likeness(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The means of `tile_pool`, and the mean cosine of all pairs of a block's tokens, in one pass; no derivative.

    Args:
        x: `(B, S, H, D)`.
        block: Tokens of a block.

    Returns:
        `(B, ceil(S / block), H, D)` in x's dtype, and fp32 `(B, H, ceil(S / block))`.
    """
    with torch.no_grad():
        return op("maskaccel", "tile_means")(_checks.dense_last(x), block, True)  # type: ignore[no-any-return]


def _axes_of(order: TokenOrder, tokens: int) -> list[tuple[int, int]]:
    """Size of the grid and of a patch along each axis, or ValueError if `order` is not one of so many tokens."""
    from ...masks.order import TokenOrder  # as in tile_select

    if not isinstance(order, TokenOrder):
        raise ValueError(f"block={order!r} must be an integer, 1 or more, or a TokenOrder")
    if order.patch is None:
        raise ValueError(f"block={order!r} has no patches to pool")
    if order.tokens != tokens:
        raise ValueError(f"x has {tokens} tokens; the order has {order.tokens}")
    return list(zip(order.grid, order.patch, strict=True))


def _whole_patches(x: Tensor, axes: list[tuple[int, int]], size: int) -> Tensor:
    """Patches of `size` rows: those at the border of the grid that are smaller have zeros behind their rows."""
    counts = [1]
    for n, p in axes:
        counts = [have * min(p, n - start) for have in counts for start in range(0, n, p)]
    if all(count == size for count in counts):
        return x
    parts = [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, size - part.shape[1])) for part in x.split(counts, dim=1)]
    return torch.cat(parts, dim=1)


def tile_scores(
    q: Tensor, k: Tensor, mode: str = "mean", *, block: tuple[int, int] | None = None, stride: int = 16,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Softmax scores of pairs of blocks.

    Args:
        q: `"mean"`: pooled queries `(B, Mq, H, D)`; `"antidiagonal"`: the queries themselves, `(B, Sq, H, D)`.
        k: The same of the keys; grouped heads are repeated.
        mode: `"mean"`: softmax of the pooled dot products. `"antidiagonal"` (XAttention): every stride-th antidiagonal
            of each `stride x stride` square is summed, its softmax is summed over the block.
        block: Tile size, for `"antidiagonal"`; multiples of stride.
        stride: Distance of the antidiagonals (8 or 16 in the paper).
        scale: Of the dot products; None is `D ** -0.5`.

    Returns:
        fp32 `(B, H, Mq, Nk)`, each row a distribution. Differentiable.

    Raises:
        TypeError: An argument is no floating tensor.
        ValueError: Heads do not fit, `mode` is unknown, or `block` and `stride` do not fit each other.
    """
    _checks.choice("mode", mode, _MODES)
    q = _checks.activation("q", q, "B, S, H, D")
    k = _checks.activation("k", k, "B, S, Hk, D")
    if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(f"q is {tuple(q.shape)}, k is {tuple(k.shape)}; batch and head dim must be equal")
    _checks.same_device("k", k, "q", q)
    check.heads_divide(q, k)
    scale = q.shape[3] ** -0.5 if scale is None else check.number("scale", scale)
    heads = q.shape[2]
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if k.shape[1] != heads:
        k = k.repeat_interleave(heads // k.shape[1], dim=1)
    if mode == "mean":
        return (products(q, k) * scale).softmax(-1)
    if block is None:
        raise ValueError("mode='antidiagonal' needs the block")
    bm, bn = check_block(block)
    if not isinstance(stride, int) or isinstance(stride, bool) or stride < 1 or bm % stride or bn % stride:
        raise ValueError(f"stride={stride!r} must divide the block {(bm, bn)}")

    def groups(t: Tensor, flip: bool) -> Tensor:
        t = _padded(t, 0, -t.shape[2] % stride).unflatten(2, (-1, stride))
        return (t.flip(3) if flip else t).flatten(3)

    # Queries in reversed order within a group: pairs of equal place are those of an antidiagonal.
    p = (products(groups(q, True), groups(k, False)) * (scale / stride)).softmax(-1)
    m, n = math.ceil(q.shape[2] / bm), math.ceil(k.shape[2] / bn)
    rows, columns = bm // stride, bn // stride
    p = _padded(p, n * columns - p.shape[3], m * rows - p.shape[2])
    p = p.unflatten(3, (n, columns)).sum(-1).unflatten(2, (m, rows)).sum(3)
    return p / p.sum(-1, keepdim=True)


def _padded(x: Tensor, columns: int, rows: int) -> Tensor:
    """Zeros behind the last two dims; torch copies where there are none to add."""
    return torch.nn.functional.pad(x, (0, columns, 0, rows)) if columns or rows else x


def products(q: Tensor, k: Tensor) -> Tensor:
    """`q k^T` of `(B, H, M, D)` and `(B, H, N, D)` in fp32, or fp64."""
    if (
        q.device.type in ("cuda", "meta")
        and q.dtype == k.dtype
        and q.element_size() == 2
        and not _call.wants_grad((q, k))
    ):
        # 16-bit operands have the tensor cores, and are exact in fp32 sums.
        return torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT, torch.float32).unflatten(0, q.shape[:2])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.to(wide) @ k.to(wide).mT


def tile_select(
    scores: Tensor,
    shape: tuple[int, int],
    block: tuple[int, int],
    *,
    top_k: int | float | None = None,
    cdf: float | Tensor | None = None,
    percentile: float | None = None,
    force: TileMask | Tensor | None = None,
    forbid: TileMask | Tensor | None = None,
    min_per_row: int = 1,
) -> TileMask:
    """The mask of the tiles that score highest.

    Args:
        scores: `(B, H, Mq, Nk)`; not negative for `cdf`.
        shape: `(Sq, Sk)` of the mask.
        block: Tile size of the mask.
        top_k: So many tiles of each row; a fraction of the row below 1 (VSA, SLA).
        cdf: The fewest tiles of each row whose scores sum to more than this fraction of the row's (SpargeAttn, NABLA,
            XAttention); one number, or a tensor `(H,)`.
        percentile: Tiles above this percentile, in 0 to 1, of all tiles of a head (DraftAttention); rows may be empty
            but for `min_per_row`.
        force: Tiles kept in any case: a mask of whole tiles, or bool broadcastable to the scores.
        forbid: Tiles never kept; as `force`.
        min_per_row: The best tiles of each row that are kept in any case.

    Returns:
        A mask of whole tiles.

    Raises:
        ValueError: None or several of top_k, cdf and percentile are given, one is out of range, or shapes do not fit.
    """
    from ...masks.tiles import TileMask  # masks are made of ops; this op alone makes a mask

    scores = _checks.activation("scores", scores, "B, H, Mq, Nk")
    given = [name for name, value in (("top_k", top_k), ("cdf", cdf), ("percentile", percentile)) if value is not None]
    if len(given) != 1:
        raise ValueError(f"give one of top_k, cdf, percentile; got {', '.join(given) or 'none'}")
    block = check_block(block)
    columns = scores.shape[3]
    if len(shape) != 2:
        raise ValueError(f"shape={tuple(shape)} must be (Sq, Sk)")
    expected = tuple(math.ceil(n / b) for n, b in zip(shape, block, strict=True))
    if tuple(scores.shape[2:]) != expected:
        raise ValueError(
            f"scores has {tuple(scores.shape[2:])} tiles; {tuple(shape)} in tiles of {block} has {expected}"
        )
    if not isinstance(min_per_row, int) or isinstance(min_per_row, bool) or min_per_row < 0:
        raise ValueError(f"min_per_row={min_per_row!r} must be an integer, 0 or more")
    forced = _tiles("force", force, scores, block, shape)
    forbidden = _tiles("forbid", forbid, scores, block, shape)
    limits, value = None, 0.0
    if top_k is not None:
        rule, value = TOP, float(_count(top_k, columns))
    elif cdf is not None:
        rule, limit = MASS, _fraction("cdf", cdf, scores)
        limits, value = (limit[None], 0.0) if isinstance(limit, Tensor) else (None, float(limit))
    else:
        rule = ABOVE
        assert percentile is not None
        if not 0 <= check.number("percentile", percentile) <= 1:
            raise ValueError(f"percentile={percentile!r} must be in [0, 1]")
        limits = _percentile(scores if forbidden is None else scores.masked_fill(forbidden, -torch.inf), percentile)
    with torch.no_grad():
        bits = op("maskaccel", "select_tiles")(scores, forced, forbidden, limits, rule, value, min_per_row)
    return TileMask(bits, block, shape)


def _percentile(scores: Tensor, percentile: float) -> Tensor:
    """`(B, H)`: the score above which the rest of a head's tiles lies."""
    flat = scores.flatten(2)
    if not flat.shape[2]:
        return flat.new_zeros(flat.shape[:2])
    return flat.kthvalue(min(int(percentile * flat.shape[2]), flat.shape[2] - 1) + 1, dim=-1).values


def _tiles(name: str, value: Any, scores: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor | None:
    """Bool, broadcastable to the scores, of a mask or a tensor."""
    from ...masks.tiles import TileMask

    if isinstance(value, TileMask):
        if (value.block, value.shape) != (block, tuple(shape)):
            raise ValueError(f"{name} is for {value.shape} in tiles of {value.block}, not {tuple(shape)} in {block}")
        value = value.tiles()
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        seen = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a TileMask or a bool tensor, got {seen}")
    sizes = zip(reversed(value.shape), reversed(scores.shape), strict=False)
    if value.dim() > 4 or any(have not in (1, want) for have, want in sizes):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; it must broadcast to that of scores, {tuple(scores.shape)}"
        )
    _checks.same_device(name, value, "scores", scores)
    return value


def _count(top_k: int | float, columns: int) -> int:
    check_top_k(top_k)
    return max(1, round(top_k * columns)) if isinstance(top_k, float) else min(top_k, columns)


def check_top_k(top_k: Any) -> None:
    """ValueError unless it is a number of tiles or a fraction of them."""
    if isinstance(top_k, int) and not isinstance(top_k, bool) and top_k >= 1:
        return
    if isinstance(top_k, float) and 0 < top_k <= 1:
        return
    raise ValueError(f"top_k={top_k!r} must be a number of tiles, 1 or more, or a fraction in (0, 1]")


def _fraction(name: str, value: float | Tensor, scores: Tensor) -> float | Tensor:
    if isinstance(value, Tensor):
        if tuple(value.shape) != (scores.shape[1],):
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be a number or ({scores.shape[1]},)")
        on_host = value.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere a look would wait
        if on_host and value.numel() and not bool(((value > 0) & (value <= 1)).all()):
            raise ValueError(f"{name} holds values in [{float(value.min())}, {float(value.max())}]; allowed is (0, 1]")
        return value.to(scores)
    if not 0 < check.number(name, value) <= 1:
        raise ValueError(f"{name}={value!r} must be in (0, 1]")
    return value
