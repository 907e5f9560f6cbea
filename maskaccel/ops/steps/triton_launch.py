"""Calls of the Triton kernels of stacks and matrices of remembered features; the contract is checked here."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _triton as host
from ._check import MAX_HISTORY

_BLOCK = 1024
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
    block = 1024 // rows  # 1024 fp64 sums a program, 4 a thread
    blocks, chunks = host.runs(math.ceil(size / block) * batch, math.ceil(size / block), least=8)
    partials = history.new_empty(batch, chunks, steps * steps, dtype=torch.float64)
    host.launch(gram_partials, (steps, chunks, batch), history, history, partials, history.stride(0),
                history.stride(1), size, blocks * block, K=steps, ROWS=rows, BLOCK=block, num_warps=8)  # fmt: skip
    return host.reduce_partials(partials, batch if per_sample else 1, 1).view(shape)


def check_combine(history: Tensor, weights: Tensor, x: Tensor | None, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Check weights of one of `shapes`, and the residual of a step of `history`."""
    if tuple(weights.shape) not in shapes or weights.dtype != torch.float32 or not weights.is_contiguous():
        raise RuntimeError(f"weights must be contiguous fp32 of {' or '.join(map(str, shapes))}, got {weights.dtype} "
                           f"{tuple(weights.shape)}")  # fmt: skip
    step = history.shape[-3:]
    if x is not None and (x.shape != step or x.dtype not in _DTYPES or not x.is_contiguous()):
        raise RuntimeError(f"x must be contiguous {tuple(step)}, got {x.dtype} {tuple(x.shape)}")
    if any(t is not None and t.device != history.device for t in (weights, x)):
        raise RuntimeError(f"weights and x must be on {history.device}")


def gate_operand(gate: Tensor | None, like: Tensor) -> tuple[Tensor, int, int, int] | None:
    """(tensor, batch stride, row stride, tokens of a row)."""
    if gate is None:
        return None
    batch, n, width = like.shape
    fits = gate.dim() == 3 and gate.shape[0] in (1, batch) and gate.shape[1] > 0 and gate.shape[2] == width
    if not fits or n % gate.shape[1] or (width > 1 and gate.stride(2) != 1):
        raise RuntimeError(f"gate must be ({batch} or 1, F, {width}), F a divisor of {n}, last dim contiguous, got "
                           f"{tuple(gate.shape)} of strides {gate.stride()}")  # fmt: skip
    if gate.dtype not in (like.dtype, torch.float32) or gate.device != like.device:
        raise RuntimeError(f"gate must be {like.dtype} or fp32 on {like.device}, got {gate.dtype} on {gate.device}")
    of_batch = 0 if gate.shape[0] == 1 else gate.stride(0)
    return gate, of_batch, gate.stride(1), max(n // gate.shape[1], 1)


def _gates_operand(gates: Tensor, like: Tensor, sites: int) -> tuple[Tensor, int, int, int, int]:
    """(tensor, site stride, batch stride, row stride, tokens of a row)."""
    batch, n, width = like.shape
    groups = gates.shape[2] if gates.dim() == 4 else 1
    fits = gates.dim() in (3, 4) and gates.shape[0] == sites and gates.shape[1] in (1, batch)
    if not fits or gates.shape[-1] != width or groups == 0 or n % groups or (width > 1 and gates.stride(-1) != 1):
        lead = f"({sites}, {batch} or 1, "
        raise RuntimeError(f"gates must be {lead}{width}) or {lead}F, {width}), F a divisor of {n}, last dim dense, "
                           f"got {tuple(gates.shape)}")  # fmt: skip
    if gates.dtype not in (like.dtype, torch.float32) or gates.device != like.device:
        raise RuntimeError(f"gates must be {like.dtype} or fp32 on {like.device}, got {gates.dtype} on {gates.device}")
    of_batch = 0 if gates.shape[1] == 1 else gates.stride(1)
    return gates, gates.stride(0), of_batch, gates.stride(2) if groups > 1 else 0, max(n // groups, 1)


def combine_sites(history: Tensor, weights: Tensor, x: Tensor | None, gates: Tensor | None) -> Tensor:
    check_history(history, "S, K, B, N, D")
    sites, steps, batch, n, width = history.shape
    if sites == 0:
        raise RuntimeError(f"history holds no site: {tuple(history.shape)}")
    check_combine(history, weights, x, ((steps,), (sites, steps), (sites, steps, width)))
    like = history[0, 0] if x is None else x
    operand = None if gates is None else _gates_operand(gates, like, sites)
    out = like.new_empty(like.shape)
    if out.numel():
        from .triton_sites import combine_all_sites

        block, warps = host.block_and_warps(min(width, _BLOCK), 16 // history.element_size())
        w_site = weights[0].numel() if weights.dim() > 1 else 0
        host.launch(combine_all_sites, (batch * n, math.ceil(width / block)), history, history, weights, x, operand,
                    out, *history.stride()[:3], w_site, width, sites, n, width, K=steps,
                    PER_CHANNEL=weights.dim() == 3, BLOCK=block, num_warps=warps)  # fmt: skip
    return out


KERNELS: dict[str, Callable] = {"gram": gram, "combine_sites": combine_sites}
