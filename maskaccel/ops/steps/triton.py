"""The Triton backend of the cached-feature ops. Importing this never imports triton; calling a kernel does."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _triton as host
from . import triton_launch, triton_launch_normed, triton_launch_tokens

MAX_HISTORY = 16
_BLOCK = 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def relative_difference(x: Tensor, reference: Tensor, base: Tensor | None = None) -> Tensor:
    if x.dtype not in _DTYPES or x.dim() < 2:
        raise RuntimeError(f"x must be (B, ...) of fp32, bf16 or fp16, got {x.dtype} {tuple(x.shape)}")
    for name, t in (("x", x), ("reference", reference), ("base", base)):
        if t is None:
            continue
        if t.shape != x.shape or t.dtype != x.dtype or t.device != x.device or not t.is_contiguous():
            raise RuntimeError(f"{name} must be contiguous {x.dtype} {tuple(x.shape)}, got {t.dtype} {tuple(t.shape)}")
    batch = x.shape[0]
    if x.numel() == 0:
        return x.new_zeros(batch, 2, dtype=torch.float32)

    from .triton_kernels import difference_partials

    size = x.numel() // batch
    # a run is a whole number of blocks, so that every load but the last of a sample is aligned and full
    blocks, chunks = host.runs(math.ceil(size / _BLOCK) * batch, math.ceil(size / _BLOCK), least=2)
    partials = x.new_empty(batch, chunks, 2, dtype=torch.float32)
    host.launch(difference_partials, (batch, chunks), x, x, reference, base, partials, size, blocks * _BLOCK,
                BLOCK=_BLOCK, num_warps=host.block_and_warps(_BLOCK, 16 // x.element_size())[1])  # fmt: skip
    return host.reduce_partials(partials, batch, 1).view(batch, 2)


def combine_history(history: Tensor, weights: Tensor, x: Tensor | None, gate: Tensor | None) -> Tensor:
    if history.dim() != 4 or history.dtype not in _DTYPES or not 1 <= history.shape[0] <= MAX_HISTORY:
        raise RuntimeError(f"history must be (1 to {MAX_HISTORY}, B, N, D) of fp32, bf16 or fp16, got {history.dtype} "
                           f"{tuple(history.shape)}")  # fmt: skip
    steps, batch, n, width = history.shape
    like = history[0] if x is None else x
    if (width > 1 and history.stride(3) != 1) or (n > 1 and history.stride(2) != width):
        raise RuntimeError(f"history must be dense in N and D, got strides {history.stride()}")
    if weights.shape not in ((steps,), (steps, width)) or weights.dtype != torch.float32 or not weights.is_contiguous():
        raise RuntimeError(f"weights must be contiguous fp32 ({steps},) or ({steps}, {width}), got {weights.dtype} "
                           f"{tuple(weights.shape)}")  # fmt: skip
    if x is not None and (x.shape != history.shape[1:] or x.dtype not in _DTYPES or not x.is_contiguous()):
        raise RuntimeError(f"x must be contiguous {tuple(history.shape[1:])}, got {x.dtype} {tuple(x.shape)}")
    if any(t is not None and t.device != history.device for t in (weights, x)):
        raise RuntimeError(f"weights and x must be on {history.device}")
    operand = triton_launch.gate_operand(gate, like)
    out = like.new_empty(like.shape)
    if out.numel():
        from .triton_kernels import combine

        block, warps = host.block_and_warps(min(width, _BLOCK), 8)
        host.launch(combine, (batch * n, math.ceil(width / block)), history, history, weights, x, operand, out,
                    history.stride(0), history.stride(1), width if weights.dim() == 2 else 1, n, width, K=steps,
                    PER_CHANNEL=weights.dim() == 2, BLOCK=block, num_warps=warps)  # fmt: skip
    return out


KERNELS: dict[str, Callable] = {
    "relative_difference": relative_difference,
    "combine_history": combine_history,
    **triton_launch.KERNELS,
    **triton_launch_normed.KERNELS,
    **triton_launch_tokens.KERNELS,
}


def available() -> str | None:
    """None if these kernels can run in this process, else the reason they cannot."""
    return host.available()


def register() -> None:
    """Implement `torch.ops.maskaccel_triton` for CUDA, and for CPU under TRITON_INTERPRET=1."""
    host.register(KERNELS)
