"""Calls of the Triton kernels of stacks and matrices of remembered features; the contract is checked here."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _triton as host
from ._check import MAX_HISTORY

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_history(history: Tensor, dims: str = "K, B, N, D") -> None:
    """Check rank, dtype, number of steps, and that each step of each sample is dense."""
    rank = dims.count(",") + 1
    if history.dim() != rank or history.dtype not in _DTYPES or not 1 <= history.shape[-4] <= MAX_HISTORY:
        raise RuntimeError(f"history must be ({dims}) of fp32, bf16 or fp16 with K from 1 to {MAX_HISTORY}, got "
                           f"{history.dtype} {tuple(history.shape)}")  # fmt: skip
    n, width = history.shape[-2:]
    if width == 0:
        raise RuntimeError(f"history has an empty last dim: {tuple(history.shape)}")
    if (width > 1 and history.stride(-1) != 1) or (n > 1 and history.stride(-2) != width):
        raise RuntimeError(f"history must be dense in N and D, got strides {history.stride()}")


def gram(history: Tensor, per_sample: bool) -> Tensor:
    check_history(history)
    steps, batch = history.shape[:2]
    shape = (batch, steps, steps) if per_sample else (steps, steps)
    if history.numel() == 0:
        return history.new_zeros(shape, dtype=torch.float64)

    from .triton_gram import gram_partials

    size = history[0, 0].numel()
    rows = host.power_of_two(steps)
    block = 1024 // rows  # 1024 fp64 sums a program, 8 a thread
    blocks, chunks = host.runs(math.ceil(size / block) * batch, math.ceil(size / block), least=8)
    partials = history.new_empty(batch, chunks, steps * steps, dtype=torch.float64)
    host.launch(gram_partials, (steps, chunks, batch), history, history, partials, history.stride(0),
                history.stride(1), size, blocks * block, K=steps, ROWS=rows, BLOCK=block, num_warps=4)  # fmt: skip
    return host.reduce_partials(partials, batch if per_sample else 1, 1).view(shape)


KERNELS: dict[str, Callable] = {"gram": gram}
