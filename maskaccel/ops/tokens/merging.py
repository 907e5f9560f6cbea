"""Token merging: similar tokens become one, and are spread again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _call, _checks
from . import _run
from .draw import grid_of, random_keep

_IS_MEAN = {"mean": True, "sum": False}


@dataclass(frozen=True, eq=False)
class MergeIndex:
    """Which token each of N tokens is merged into. Made by `match_tokens`.

    Attributes:
        slot: int32 `(B, N)`: row among the S merged ones of each token, in the order of the tokens.
        order: int32 `(B, N)`: the tokens by slot, ascending within one.
        offsets: int32 `(B, S + 1)`: where each slot begins in `order`.
    """

    slot: Tensor
    order: Tensor
    offsets: Tensor

    @property
    def n(self) -> int:
        """Tokens before, N."""
        return self.slot.shape[1]

    @property
    def merged(self) -> int:
        """Tokens after, S."""
        return self.offsets.shape[1] - 1


pytree.register_pytree_node(
    MergeIndex,
    lambda index: ([index.slot, index.order, index.offsets], None),
    lambda values, _: MergeIndex(*values),
    serialized_type_name="maskaccel.ops.MergeIndex",
)


def match_tokens(
    metric: Tensor,
    ratio: float,
    *,
    grid: Sequence[int],
    cell: Sequence[int] | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    route: int = 0,
    backend: str | None = None,
) -> MergeIndex:
    """Bipartite matching of ToMe for diffusion (Bolya and Hoffman 2023, arXiv 2303.17604, section 4).

    One token of each cell of the grid, drawn at random and for all samples alike, is a destination; of the others, the
    share `ratio` of all tokens that is most similar (cosine) to a destination is merged into it. The matrix of
    similarities is never stored.

    Args:
        metric: `(B, N, C)`, what is compared: the input of attention, or its keys.
        ratio: Share of all tokens that disappears, 0 up to the share that are no destinations.
        grid: Sizes of the token grid, of product N.
        cell: Sizes of a cell; None: 2 along every axis (1 along axes of odd size). They must divide the grid.
        seed: Of the draw of destinations, with `step` and `route` as in `random_keep`.
        step: As there.
        route: As there.
        backend: As in `maskaccel.ops.norm_modulate`.

    Raises:
        TypeError: `metric` is no floating tensor.
        ValueError: The grid does not fit, or more tokens would be merged than there are sources.
    """
    metric = _checks.activation("metric", metric, "B, N, C")
    batch, n, _ = metric.shape
    sizes = grid_of(grid, n)
    cell = tuple(2 if s % 2 == 0 else 1 for s in sizes) if cell is None else tuple(cell)
    cells = n // max(1, math.prod(cell))
    ratio = _run.number("ratio", ratio, 0.0, 1.0)
    count = int(n * ratio)
    if count > n - cells:
        raise ValueError(f"ratio={ratio} merges {count} of {n} tokens; with cells of {cell} at most {n - cells} can be")
    dst = random_keep(1, n, cells, seed=seed, step=step, route=route, scheme="cell", grid=sizes, cell=cell,
                      device=metric.device)  # fmt: skip
    metric = metric.detach()
    if cells == n:
        slot = torch.arange(n, dtype=torch.int32, device=metric.device).expand(batch, n).contiguous()
        offsets = torch.arange(n + 1, dtype=torch.int32, device=metric.device).expand(batch, n + 1).contiguous()
        return MergeIndex(slot, slot.clone(), offsets)
    src = dst.complement()
    args = (_checks.dense_last(metric), src.keep, dst.keep)
    best, similarity = _run.run("match_tokens", args, metric.device, backend, metric.dtype)
    ranked = similarity.sort(dim=1, descending=True, stable=True).indices
    gone = torch.zeros_like(best, dtype=torch.bool).scatter_(1, ranked[:, :count], True)
    source = src.keep.long().expand(batch, -1)
    stays = torch.ones(batch, n, dtype=torch.bool, device=metric.device).scatter_(1, source, ~gone)
    slot = stays.cumsum(1, dtype=torch.int32) - 1
    target = slot.gather(1, dst.keep.long().expand(batch, -1)).gather(1, best.long())
    slot = slot.scatter(1, source, torch.where(gone, target, slot.gather(1, source)))
    order = slot.sort(dim=1, stable=True)
    edges = torch.arange(n - count + 1, dtype=torch.int32, device=metric.device).expand(batch, -1).contiguous()
    offsets = torch.searchsorted(order.values.contiguous(), edges).to(torch.int32)
    return MergeIndex(slot.contiguous(), order.indices.to(torch.int32), offsets)


def merge_tokens(x: Tensor, index: MergeIndex, *, mode: str = "mean", backend: str | None = None) -> Tensor:
    """Each group of tokens as one: their mean (ToMe) or sum; differentiable.

    Args:
        x: `(B, N, D)`, as in `gather_rows`.
        index: Which tokens become one.
        mode: `"mean"` or `"sum"`.
        backend: As in `maskaccel.ops.norm_modulate`.

    Returns:
        `(B, S, D)`.

    Raises:
        TypeError: `x` is no floating tensor.
        ValueError: Shapes do not fit, or an unknown mode.
    """
    if backend is None and not _call.tracing():
        try:
            if x.shape[1] == index.slot.shape[1]:
                args: tuple = (x, index.order, index.offsets, index.slot, _IS_MEAN[mode])
                return _call.fast("segment_rows", x, args)  # type: ignore[no-any-return]
        except _call.FAULTS:
            pass  # the checks below say what is wrong
    x = _checks.activation("x", x)
    _checks.choice("mode", mode, _IS_MEAN)
    _fits(index, x, index.n, "tokens")
    args = (_checks.dense_last(x), index.order, index.offsets, index.slot, mode == "mean")
    return _run.run("segment_rows", args, x.device, backend, x.dtype)


def unmerge_tokens(y: Tensor, index: MergeIndex, *, backend: str | None = None) -> Tensor:
    """Every token takes the row of its group; differentiable.

    Args:
        y: `(B, S, D)`.
        index: As in `merge_tokens`.
        backend: As there.

    Returns:
        `(B, N, D)`.

    Raises:
        TypeError: `y` is no floating tensor.
        ValueError: Shapes do not fit.
    """
    if backend is None and not _call.tracing():
        try:
            if y.shape[1] == index.merged:
                args: tuple = (y, index.slot, index.order, index.offsets)
                return _call.fast("unmerge_rows", y, args)  # type: ignore[no-any-return]
        except _call.FAULTS:
            pass  # the checks below say what is wrong
    y = _checks.activation("y", y, "B, S, D")
    _fits(index, y, index.merged, "merged tokens")
    args = (_checks.dense_last(y), index.slot, index.order, index.offsets)
    return _run.run("unmerge_rows", args, y.device, backend, y.dtype)


def _fits(index: MergeIndex, x: Tensor, rows: int, what: str) -> None:
    if x.shape[1] != rows:
        raise ValueError(f"x has {x.shape[1]} rows; the index is of {rows} {what}")
    if index.slot.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"index is for {index.slot.shape[0]} samples; x has a batch of {x.shape[0]}")
    _checks.same_device("index", index.slot, "x", x)
