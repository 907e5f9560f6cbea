"""Calls of the Triton kernels that choose tokens; the contract is checked here."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _triton as host
from .schema import KEEP_CLASSES, KEEP_GROUPS, KEEP_ROWS_COLS, PURPOSE_KEEP, THRESHOLD
from .triton_check import check_ids, check_rows, random_stream

WHOLE = 8192  # keys that a program holds in registers; longer rows are walked in blocks
_LONG_BLOCK = 4096
KEYS = 1024  # a program of the kernels that make them
MAX_TOKENS = 1 << 24


def blocks_of(count: int) -> tuple[int, bool, int]:
    """(block, whether it holds all of `count` keys, warps) for one row of keys."""
    whole = count <= WHOLE
    block = max(host.power_of_two(count), 32) if whole else min(_LONG_BLOCK, WHOLE)
    return block, whole, min(max(block // 512, 1), 16)


def _slots(marks: Tensor, keep: int, counted: bool, age: Tensor | None = None,
           new_age: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(keep, inverse, counts) of marks, which become `inverse`; `new_age` takes what follows `age`."""
    from .triton_select import slots_of_marks

    batch, n = marks.shape
    ids, counts = marks.new_empty(batch, keep), marks.new_empty(batch if counted else 0)
    block, _, warps = blocks_of(n)
    if batch:
        host.launch(slots_of_marks, (batch,), marks, marks, ids, counts if counted else None, age, new_age, n, keep,
                    BLOCK=block, num_warps=warps)  # fmt: skip
    return ids, marks, counts


def _check_keep(batch: int, n: int, keep: int, route: int) -> None:
    if batch < 0 or not 1 <= keep <= n < MAX_TOKENS or not 0 <= route < 1 << 24:
        raise RuntimeError(f"batch={batch} must be 0 or more, keep={keep} 1 to n={n}, n below {MAX_TOKENS}, "
                           f"route={route} 0 to {(1 << 24) - 1}")  # fmt: skip


def random_keep(
    step: Tensor, order: Tensor | None, labels: Tensor | None, quota: Tensor | None, force: Tensor | None, seed: int,
    route: int, offset: int, batch: int, n: int, keep: int, groups: int, rows_kept: int, mode: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_keep(batch, n, keep, route)
    stream = random_stream(step, step.device, seed, offset, route | PURPOSE_KEEP << 24)
    if mode not in (KEEP_GROUPS, KEEP_ROWS_COLS, KEEP_CLASSES):
        raise RuntimeError(f"mode={mode} must be 0 to 2")
    if mode != KEEP_CLASSES and (groups < 1 or n % groups):
        raise RuntimeError(f"groups={groups} must divide n={n}")
    if mode == KEEP_GROUPS and keep % groups:
        raise RuntimeError(f"groups={groups} must divide keep={keep}")
    if mode == KEEP_ROWS_COLS and (order is not None or force is not None):
        raise RuntimeError("order and force must be None where rows and columns are kept")
    if (order is not None and mode != KEEP_GROUPS) or (labels is None) != (mode != KEEP_CLASSES):
        raise RuntimeError(f"mode={mode}: order is for mode 0, labels and quota for mode 2 alone")
    if order is not None:
        check_rows("order", order[None], 1, (n,), torch.int32, step.device)
    force_batch = 0 if force is None else check_rows("force", force, batch, (n,), torch.uint8, step.device)
    # numbers below n; rows and columns are numbered through, up to n + 1 of them
    bits = (n if mode == KEEP_ROWS_COLS else n - 1).bit_length()
    depth = 32 + bits + (force is not None)
    marks = step.new_empty(batch, n, dtype=torch.int32)

    def keys(first: int, count: int) -> Tensor:
        from .triton_select import random_keys

        found = step.new_empty(batch, count, dtype=torch.int64)
        if batch:
            host.launch(random_keys, (math.ceil(count / KEYS), batch), step, found, order, force, *stream, force_batch,
                        first, count, TOKEN_BITS=bits, BLOCK=KEYS, num_warps=4)  # fmt: skip
        return found

    if mode == KEEP_ROWS_COLS:
        _mark_grid(keys(n, groups + n // groups), marks, groups, rows_kept, keep, depth)
    elif mode == KEEP_CLASSES:
        _mark_classes(keys(0, n), marks, labels, quota, depth)
    elif batch:
        from .triton_select import mark_runs

        size = n // groups
        block, whole, warps = blocks_of(size)
        block = host.power_of_two(size) if whole else block
        rows = max(min(1024 // block, host.power_of_two(groups)), 1)
        host.launch(mark_runs, (math.ceil(groups / rows), batch), step, keys(0, n), order, marks, n, groups, size,
                    keep // groups, ROWS=rows, BLOCK=block, WHOLE=whole, BITS=depth,
                    num_warps=max(warps, min(rows * block // 256, 4)))  # fmt: skip
    return _slots(marks, keep, mode == KEEP_CLASSES)


def _mark_grid(keys: Tensor, marks: Tensor, rows: int, kept_rows: int, keep: int, depth: int) -> None:
    batch, n = marks.shape
    columns = n // rows
    if not 1 <= kept_rows <= rows or keep % kept_rows or keep // kept_rows > columns:
        raise RuntimeError(f"rows_kept={kept_rows} must be 1 to {rows} and divide keep={keep} into at most {columns} "
                           f"columns")  # fmt: skip
    if not batch:
        return
    from .triton_select import mark_grid

    row_block, row_whole, row_warps = blocks_of(rows)
    block, whole, warps = blocks_of(columns)
    tile = max(min(1024 // block, host.power_of_two(rows)), 1)
    host.launch(mark_grid, (math.ceil(rows / tile), batch), marks, keys, marks, rows, columns, kept_rows,
                keep // kept_rows, ROWS=tile, BLOCK=block, ROW_BLOCK=row_block, ROW_WHOLE=row_whole, WHOLE=whole,
                BITS=depth, num_warps=max(warps, row_warps))  # fmt: skip


def _mark_classes(keys: Tensor, marks: Tensor, labels: Tensor | None, quota: Tensor | None, depth: int) -> None:
    batch, n = marks.shape
    if labels is None or quota is None or quota.dim() != 2 or not quota.shape[1]:
        raise RuntimeError("labels and quota must be given, quota (B or 1, C) with C of 1 or more")
    labels_batch = check_ids("labels", labels, batch, marks.device, n)
    quota_batch = check_ids("quota", quota, batch, marks.device)
    if not batch:
        return
    from .triton_select import mark_classes

    block, whole, warps = blocks_of(n)
    host.launch(mark_classes, (quota.shape[1], batch), marks, keys, labels, quota, marks, labels_batch, quota_batch, n,
                BLOCK=block, WHOLE=whole, BITS=depth, num_warps=warps)  # fmt: skip


def select_active(
    score: Tensor, age: Tensor, decay: Tensor, force: Tensor | None, keep: int, high: int, threshold: float, flags: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if score.dim() != 2:
        raise RuntimeError(f"score must have 2 dims, got shape {tuple(score.shape)}")
    batch, n = score.shape
    check_rows("score", score, batch, (n,), torch.float32, score.device)
    check_rows("age", age, batch, (n,), torch.int32, score.device)
    if age.shape[0] != batch or decay.dim() != 1 or not decay.numel():
        raise RuntimeError(f"age must have batch {batch} and decay at least one value, got {tuple(age.shape)} and "
                           f"{tuple(decay.shape)}")  # fmt: skip
    check_rows("decay", decay[None], 1, (decay.numel(),), torch.float32, score.device)
    force_batch = 0 if force is None else check_rows("force", force, batch, (n,), torch.uint8, score.device)
    _check_keep(batch, n, keep, 0)
    at_least = bool(flags & THRESHOLD)
    if not 0 <= high <= n - keep or (at_least and high):
        raise RuntimeError(f"high={high} must be 0 to {n - keep}, and 0 with a threshold")
    bits = (n - 1).bit_length()
    marks, new_age = age.new_empty(batch, n), age.new_empty(batch, n)
    if batch:
        from .triton_select import active_keys, mark_active

        keys = age.new_empty(batch, n, dtype=torch.int64)
        host.launch(active_keys, (math.ceil(n / KEYS), batch), score, score, age, decay, force, keys, force_batch, n,
                    decay.numel(), threshold, AT_LEAST=at_least, TOKEN_BITS=bits, BLOCK=KEYS,
                    num_warps=4)  # fmt: skip
        block, whole, warps = blocks_of(n)
        host.launch(mark_active, (batch,), score, keys, marks, n, keep, high, FORCED=force is not None, HIGH=high > 0,
                    BLOCK=block, WHOLE=whole, BITS=32 + bits, num_warps=warps)  # fmt: skip
    return *_slots(marks, keep, at_least, age, new_age), new_age


KERNELS: dict[str, Callable] = {"random_keep": random_keep, "select_active": select_active}
