"""Which tokens are kept, drawn at random from counters."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _call, _checks
from . import _run
from .schema import KEEP_CLASSES, KEEP_GROUPS, KEEP_ROWS_COLS

if TYPE_CHECKING:
    from ...masks.tokens import TokenIndex

SCHEMES = ("uniform", "cell", "rows_cols", "row_equal", "classes")
MOST_TOKENS, MOST_ROUTES = 1 << 24, 1 << 24
_MOST = 1 << 63


def random_keep(
    batch: int,
    n: int,
    keep: Any,
    *,
    seed: int,
    step: int | Tensor = 0,
    route: int = 0,
    sample_offset: int = 0,
    scheme: str = "uniform",
    grid: Sequence[int] | None = None,
    cell: Sequence[int] | None = None,
    frames: int = 1,
    labels: Tensor | None = None,
    capacity: int | None = None,
    force: Tensor | None = None,
    shared: bool = False,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> TokenIndex:
    """Random kept tokens for every sample: a pure function of integers, equal bit for bit on every backend.

    Ids come from Philox 4x32-10 (Salmon et al. 2011) keyed by seed and counted by (token, sample, step, route), so they
    do not change with the device, the split of a batch over ranks, activation checkpointing or a resumed run.

    Args:
        batch: Samples.
        n: Tokens of a sample, below 2^24.
        keep: A count, or a fraction of n (rounded up); `(rows, columns)` counts or fractions for `"rows_cols"`; one
            fraction for each class for `"classes"`.
        seed: Of the run, 64 bits.
        step: Of the training, an int or an int64 tensor of one element on `device`, which a graph may count up.
        route: Number of the draw within a step, below 2^24.
        sample_offset: Number of the first sample among all samples of the step: rank * batch under data parallelism.
        scheme: `"uniform"`: any tokens (TREAD, MaskDiT). `"cell"`: the same number in every cell of the grid (SPRINT).
            `"rows_cols"`: random rows times random columns (QA-MDT). `"row_equal"`: the same number in every row, so
            that the kept tokens form a narrower grid (MaskGWM). `"classes"`: a share of each class of tokens, which
            is ragged (FastDiT-3D's foreground and background).
        grid: Sizes of the token grid in raster order, last axis fastest; needed by all schemes but uniform and classes.
        cell: Sizes of a cell; None: the smallest of 2, 4, 8, ... along every axis whose share is a whole number.
        frames: The draw of one frame holds for so many frames after each other (MaskGWM's constant mask); n, grid and
            a count `keep` are of all frames.
        labels: Class of each token, integers `(n,)` or `(batch, n)`; others than 0, 1, ... of `keep` are never kept.
        capacity: Slots of a ragged index; None reads the largest number from `labels`, which waits for a GPU.
        force: Bool `(n,)` or `(batch, n)`: tokens that are kept whatever is drawn; the random ones fill the rest.
        shared: One draw for all samples (classifier-free guidance halves).
        device: Of the result; None: that of `step`, `labels` or `force`, otherwise the CPU.
        backend: As in `maskaccel.ops.norm_modulate`.

    Returns:
        TokenIndex, of batch 1 if `shared`; ids ascending.

    Raises:
        TypeError: A tensor of another dtype.
        ValueError: `keep` below 1 or above n, a grid that does not fit n, a share that cells or rows cannot have, more
            forced tokens than kept ones (read on a CPU only; on a GPU the first of them are kept), unknown scheme.
    """
    if (
        backend is None and scheme == "uniform" and frames == 1 and not _call.tracing()
        and grid is cell is labels is capacity is force is None
    ):  # fmt: skip
        try:
            return _uniform(batch, shared, n, keep, seed, step, route, sample_offset, device)
        except _call.FAULTS:
            pass  # the checks below say what is wrong
    batch, n = _run.integer("batch", batch, 0), _run.integer("n", n, 1, MOST_TOKENS - 1)
    _checks.choice("scheme", scheme, SCHEMES)
    _run.integer("route", route, 0, MOST_ROUTES - 1)
    _run.integer("sample_offset", sample_offset, 0)
    frames = _run.integer("frames", frames, 1)
    if n % frames:
        raise ValueError(f"frames={frames} must divide n={n}")
    if frames > 1 and (scheme == "classes" or force is not None):
        raise ValueError(f"frames={frames} cannot be had with {'labels' if scheme == 'classes' else 'force'}")
    if device is None:
        device = next((t.device for t in (step, labels, force) if isinstance(t, Tensor)), torch.device("cpu"))
    device = torch.device(device)
    one = n // frames
    sizes = _grid(grid, scheme, n, frames)
    rows = 1 if shared else batch
    forced = _run.flags_of("force", force, rows, n, device)
    drawn = _Draw(_run.step_tensor(step, device), _run.seed_of(seed), route, sample_offset, rows, forced, backend)
    if scheme == "classes":
        return drawn.classes(n, keep, labels, capacity)
    if labels is not None or capacity is not None:
        raise ValueError(f"{'capacity' if labels is None else 'labels'} is for scheme='classes', not {scheme!r}")
    if frames > 1 and isinstance(keep, int) and not isinstance(keep, bool):
        if keep % frames:
            raise ValueError(f"keep={keep} must be a multiple of frames={frames}")
        keep = keep // frames
    if scheme == "uniform":
        index = drawn.groups(one, _run.kept_count("keep", keep, one), 1, None, None)
    elif scheme == "rows_cols":
        index = drawn.rows_cols(sizes, keep)
    elif scheme == "row_equal":
        height = math.prod(sizes[:-1])
        count = _per_group("keep", keep, one, height, "row")
        index = drawn.groups(one, count, height, None, (*sizes[:-1], count // height))
    else:
        count, groups, order = _cells(keep, one, sizes, cell, device)
        index = drawn.groups(one, count, groups, order, None)
    return index if frames == 1 else _repeated(index, frames)


def _uniform(
    batch: int, shared: bool, n: int, keep: Any, seed: int, step: int | Tensor, route: int, offset: int,
    device: torch.device | str | None,
) -> TokenIndex:  # fmt: skip
    """The everyday draw; LookupError for what is no plain integer in its range."""
    if not type(batch) is type(n) is type(seed) is type(route) is type(offset) is int:
        raise LookupError
    if not 0 <= batch < 1 << 31 or not 1 <= n < MOST_TOKENS or not 0 <= route < MOST_ROUTES:
        raise LookupError
    if not -_MOST <= seed < _MOST or not 0 <= offset < _MOST:
        raise LookupError
    if type(keep) is not int or not 1 <= keep <= n:
        keep = _run.kept_count("keep", keep, n)
    if isinstance(step, Tensor):
        if device is not None and torch.device(device) != step.device:
            raise LookupError
    else:
        step = _run.step_tensor(step, torch.device("cpu" if device is None else device))
    batch = 1 if shared else batch
    found = _call.bare("random_keep_bare", step, (step, seed, offset, batch | route << 32, n | keep << 32))
    if found is None:
        args = (step, None, None, None, None, seed, route, offset, batch, n, keep, 1, 0, KEEP_GROUPS)
        found = _call.undifferentiated("random_keep", step, args)
    return _run.token_index().of_kernel(found[0], found[1])


class _Draw:
    """The counters of one draw, and the calls of the op for its schemes."""

    def __init__(self, step: Tensor, seed: int, route: int, offset: int, batch: int, forced: Tensor | None,
                 backend: str | None) -> None:  # fmt: skip
        self.step, self.seed, self.route, self.offset, self.batch = step, seed, route, offset, batch
        self.forced, self.backend = forced, backend

    def _call(self, n: int, keep: int, mode: int, groups: int = 1, rows_kept: int = 0, order: Tensor | None = None,
              labels: Tensor | None = None, quota: Tensor | None = None) -> tuple:  # fmt: skip
        numbers = (self.seed, self.route, self.offset, self.batch, n, keep, groups, rows_kept, mode)
        args = (self.step, order, labels, quota, self.forced, *numbers)
        return _run.run("random_keep", args, self.step.device, self.backend)

    def groups(self, n: int, keep: int, groups: int, order: Tensor | None, grid: tuple | None) -> TokenIndex:
        from ...masks.tokens import TokenIndex

        _forced_fit(self.forced, n, keep, groups, order)
        ids, inverse, _ = self._call(n, keep, KEEP_GROUPS, groups, order=order)
        return TokenIndex(ids, inverse, grid=grid)

    def rows_cols(self, sizes: tuple[int, ...], keep: Any) -> TokenIndex:
        from ...masks.tokens import TokenIndex

        if self.forced is not None:
            raise ValueError("force cannot be had with scheme='rows_cols': what is kept is rows times columns")
        if len(sizes) != 2:
            raise ValueError(f"grid={sizes} must be (rows, columns) for scheme='rows_cols'")
        if not isinstance(keep, Sequence) or len(keep) != 2:
            raise ValueError(f"keep={keep!r} must be (rows, columns), counts or fractions, for scheme='rows_cols'")
        kept = tuple(
            _run.kept_count(f"keep[{i}]", k, size) for i, (k, size) in enumerate(zip(keep, sizes, strict=True))
        )
        ids, inverse, _ = self._call(math.prod(sizes), math.prod(kept), KEEP_ROWS_COLS, sizes[0], kept[0])
        return TokenIndex(ids, inverse, grid=kept)

    def classes(self, n: int, keep: Any, labels: Tensor | None, capacity: int | None) -> TokenIndex:
        from ...masks.tokens import TokenIndex

        if labels is None:
            raise ValueError("scheme='classes' needs labels: the class of each token")
        if not isinstance(keep, Sequence) or not keep or not all(
            isinstance(k, int | float) and not isinstance(k, bool) and 0 <= k <= 1 for k in keep
        ):  # fmt: skip
            raise ValueError(f"keep={keep!r} must be one fraction of 0 to 1 for each class")
        device = self.step.device
        labels = _run.rows_of("labels", labels, self.batch, n, device)
        shares = torch.tensor(list(keep), dtype=torch.float64).to(device, non_blocking=True)
        sizes = torch.stack([(labels == c).sum(1) for c in range(len(keep))], 1)
        # A share of a class is rounded to the nearest whole number, at least one token of a class with any share.
        quota = (sizes * shares).round().clamp(min=1) * (shares > 0)
        quota = torch.minimum(quota, sizes).to(torch.int32).contiguous()
        if capacity is None:
            capacity = max(1, int(quota.sum(1).max()))
        capacity = _run.integer("capacity", capacity, 1, n)
        ids, inverse, counts = self._call(n, capacity, KEEP_CLASSES, labels=labels, quota=quota)
        return TokenIndex(ids, inverse, counts)


def _grid(grid: Sequence[int] | None, scheme: str, n: int, frames: int) -> tuple[int, ...]:
    """Sizes of the grid of one frame."""
    if grid is None:
        if scheme in ("cell", "rows_cols", "row_equal"):
            raise ValueError(f"scheme={scheme!r} needs the grid of the tokens")
        return (n // frames,)
    sizes = grid_of(grid, n)
    if frames > 1:
        if sizes[0] != frames:
            raise ValueError(f"grid={grid!r} must begin with frames={frames}")
        sizes = sizes[1:] or (1,)
    return sizes


def grid_of(grid: Sequence[int], n: int) -> tuple[int, ...]:
    """Sizes of a grid of n tokens."""
    sizes = tuple(grid)
    if not all(isinstance(s, int) and s >= 1 for s in sizes) or math.prod(sizes) != n:
        raise ValueError(f"grid={grid!r} must be sizes whose product is n={n}")
    return sizes


def _per_group(name: str, keep: Any, n: int, groups: int, what: str) -> int:
    count = _run.kept_count(name, keep, n)
    if isinstance(keep, float):  # the nearest share that every group can have
        size = n // groups
        count = max(1, min(size, round(size * keep))) * groups
    if count % groups:
        raise ValueError(f"{name}={keep!r} keeps {count} of {n} tokens; every {what} of {groups} must have as many")
    return count


def _cells(keep: Any, n: int, sizes: tuple[int, ...], cell: Sequence[int] | None,
           device: torch.device) -> tuple[int, int, Tensor]:  # fmt: skip
    """Kept tokens, number of cells, and the tokens cell by cell."""
    _run.kept_count("keep", keep, n)
    wanted = n * keep if isinstance(keep, float) else keep
    if cell is None:
        tried = []
        side = 2
        while side <= max(sizes):
            candidate = tuple(min(side, s) for s in sizes)
            share = wanted * math.prod(candidate) / n
            fits = all(s % c == 0 for s, c in zip(sizes, candidate, strict=True))
            if fits and abs(share - round(share)) < 1e-6 and round(share) >= 1:
                cell = candidate
                break
            tried.append(candidate)
            side *= 2
        if cell is None:
            shown = ", ".join("x".join(map(str, c)) for c in tried)
            raise ValueError(f"keep={keep!r} is no whole number of tokens in a cell of the grid {sizes} ({shown})")
    cell = tuple(cell)
    if len(cell) != len(sizes) or any(
        not isinstance(c, int) or c < 1 or s % c for s, c in zip(sizes, cell, strict=True)
    ):
        raise ValueError(f"cell={cell} must be sizes that divide the grid {sizes}")
    share = wanted * math.prod(cell) / n
    if abs(share - round(share)) > 1e-6 or not 1 <= round(share) <= math.prod(cell):
        raise ValueError(
            f"keep={keep!r} is {share:g} tokens in a cell of {cell}; it must be a whole number of 1 or more"
        )
    groups = n // math.prod(cell)
    return round(share) * groups, groups, _cell_order(sizes, cell, device)


@functools.lru_cache(maxsize=64)
def _cell_order(sizes: tuple[int, ...], cell: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 `(n,)`: the tokens of the first cell, those of the second, ...; cells and tokens in raster order.

    `TokenOrder(sizes, cell).permutation`, in a form that `torch.compile` traces.
    """
    split = [part for size, side in zip(sizes, cell, strict=True) for part in (size // side, side)]
    raster = torch.arange(math.prod(sizes), dtype=torch.int32).view(split)
    axes = range(len(split))
    return raster.permute(*axes[::2], *axes[1::2]).reshape(-1).to(device)


def _forced_fit(forced: Tensor | None, n: int, keep: int, groups: int, order: Tensor | None) -> None:
    """No group has more forced tokens than it keeps. Read on a CPU only: elsewhere it would wait for the device."""
    if forced is None or forced.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ordered = forced if order is None else forced[:, order.long()]
    most = int(ordered.view(forced.shape[0], groups, -1).sum(-1, dtype=torch.int64).max()) if forced.numel() else 0
    if most > keep // groups:
        where = "" if groups == 1 else " in one group"
        raise ValueError(f"force names {most} tokens{where}, more than the {keep // groups} that are kept")


def _repeated(index: TokenIndex, frames: int) -> TokenIndex:
    """The draw of one frame for several frames after each other."""
    from ...masks.tokens import TokenIndex

    device = index.keep.device
    frame = torch.arange(frames, dtype=torch.int32, device=device)[None, :, None]
    keep = (index.keep[:, None] + frame * index.n).flatten(1)
    inverse = torch.where(index.inverse[:, None] >= 0, index.inverse[:, None] + frame * index.kept, -1).flatten(1)
    grid = None if index.grid is None else (frames, *index.grid)
    return TokenIndex(keep.contiguous(), inverse.to(torch.int32).contiguous(), grid=grid)
