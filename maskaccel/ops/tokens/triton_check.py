"""Checks that the calls of the Triton token kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

Stream = tuple[int, int, int, Tensor, int]


def check_rows(
    name: str, t: Tensor, batch: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> int:
    """Check a contiguous `(batch or 1, *shape)` operand; its batch stride, 0 for one that all samples share."""
    lead = t.shape[0] if t.dim() else 0
    if t.dtype != dtype or tuple(t.shape) != (lead, *shape) or lead not in (1, batch) or not t.is_contiguous():
        allowed = f"({batch} or 1, {', '.join(map(str, shape))})"
        raise RuntimeError(f"{name} must be contiguous {dtype} {allowed}, got {t.dtype} {tuple(t.shape)} of strides "
                           f"{t.stride()}")  # fmt: skip
    if t.device != device:
        raise RuntimeError(f"{name} must be on {device}, got {t.device}")
    return 0 if lead == 1 else t.stride(0)


def check_ids(name: str, t: Tensor, batch: int, device: torch.device, rows: int | None = None) -> int:
    """Check int32 `(batch or 1, rows)`, of any number of rows for None; its batch stride."""
    if t.dim() != 2:
        raise RuntimeError(f"{name} must have 2 dims, got shape {tuple(t.shape)}")
    return check_rows(name, t, batch, (t.shape[1] if rows is None else rows,), torch.int32, device)


def check_stack(name: str, t: Tensor, like: Tensor, rows: int | None = None) -> None:
    """Check `(B, rows, D)` beside `like`: its batch, width, dtype and device, and a dense last dim."""
    fits = t.dim() == 3 and t.shape[0] == like.shape[0] and t.shape[2] == like.shape[2]
    if not fits or (rows is not None and t.shape[1] != rows) or t.dtype != like.dtype or t.device != like.device:
        allowed = f"({like.shape[0]}, {'any' if rows is None else rows}, {like.shape[2]})"
        raise RuntimeError(f"{name} must be {like.dtype} {allowed} on {like.device}, got {t.dtype} {tuple(t.shape)} on "
                           f"{t.device}")  # fmt: skip
    if t.shape[2] > 1 and t.stride(2) != 1:
        raise RuntimeError(f"{name} must be contiguous in its last dim, got {t.stride()}")


def random_stream(step: Tensor, device: torch.device, seed: int, offset: int, last: int) -> Stream:
    """What all random words of a call share, as `triton_lib.random_word` takes it."""
    if step.dtype != torch.int64 or step.numel() != 1 or step.device != device:
        raise RuntimeError(f"step must be int64 of one element on {device}, got {step.dtype} {tuple(step.shape)} on "
                           f"{step.device}")  # fmt: skip
    return _word(seed), _word(seed >> 32), _word(offset), step, last


def _word(value: int) -> int:
    """The low 32 bits as an int32: a kernel argument is one whatever the number, so nothing is compiled twice."""
    low = value & 0xFFFFFFFF
    return low - (1 << 32) if low >> 31 else low
