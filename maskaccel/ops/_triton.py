"""Host side of the Triton kernels: availability, launching, argument checks. Imports triton only when a kernel runs."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import _registry

MAX_WIDTH = 1 << 20  # a row lives in one program, and Triton limits a block to this many elements
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (kernel, grid, arguments, options) -> None. `tools/compile_triton.py` swaps it to compile what would be launched.
Launcher = Callable[[Any, tuple, tuple, dict], None]


def _launch_on_device(kernel: Any, grid: tuple, args: tuple, options: dict) -> None:
    kernel[grid](*args, **options)


launcher: Launcher = _launch_on_device


def interpreting() -> bool:
    """True if Triton runs its kernels in Python (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def available() -> str | None:
    """None if Triton kernels can run in this process, else the reason they cannot."""
    if importlib.util.find_spec("triton") is None:
        return "the package `triton` is not installed"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False (TRITON_INTERPRET=1 runs the kernels slowly on CPU)"
    return None


def register(kernels: Mapping[str, Callable]) -> None:
    """Implement `maskaccel_triton::<name>` by each kernel, for CUDA, and for CPU when interpreting."""
    for name, kernel in kernels.items():
        _registry.implement("maskaccel_triton", name, kernel, "CUDA")
        if interpreting():
            _registry.implement("maskaccel_triton", name, kernel, "CPU")


def launch(kernel: Any, grid: tuple, like: Tensor, *args: Any, **options: Any) -> None:
    """Run `kernel` on the device of `like`."""
    options.setdefault("enable_fp_fusion", True)  # Triton versions differ in the default
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            launcher(kernel, grid, args, options)
    else:
        launcher(kernel, grid, args, options)


def check_activation(name: str, t: Tensor, like: Tensor | None = None, dims: int = 3) -> None:
    """Check rank, dtype, last stride and, against `like`, shape, dtype and device."""
    if t.dim() != dims:
        raise RuntimeError(f"{name} must have {dims} dims, got shape {tuple(t.shape)}")
    if t.dtype not in _DTYPES:
        raise RuntimeError(f"{name} must be fp32, bf16 or fp16, got {t.dtype}")
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        raise RuntimeError(f"{name} must be contiguous in its last dim, got {t.stride()}")
    if not 0 < t.shape[-1] <= MAX_WIDTH:
        raise RuntimeError(f"the last dim of {name} must be 1 to {MAX_WIDTH}, got {t.shape[-1]}")
    if like is not None:
        same = t.shape == like.shape and t.dtype == like.dtype and t.device == like.device
        if not same:
            got = f"{t.dtype} {tuple(t.shape)} on {t.device}"
            raise RuntimeError(f"{name} must be {like.dtype} {tuple(like.shape)} on {like.device}, got {got}")


def check_vector(name: str, t: Tensor | None, width: int, x: Tensor) -> None:
    """Check an optional contiguous `(width,)` operand of `x.dtype` or fp32."""
    if t is None:
        return
    if t.shape != (width,) or not t.is_contiguous():
        raise RuntimeError(f"{name} must be contiguous ({width},), got {tuple(t.shape)}")
    if t.dtype not in (x.dtype, torch.float32):
        raise RuntimeError(f"{name} must be {x.dtype} or fp32, got {t.dtype}")
    if t.device != x.device:
        raise RuntimeError(f"{name} must be on {x.device}, got {t.device}")


def one_dtype(what: str, *tensors: Tensor | None) -> None:
    """Check that the given operands share a dtype."""
    found = {t.dtype for t in tensors if t is not None}
    if len(found) > 1:
        raise RuntimeError(f"{what} must be of one dtype, got {sorted(map(str, found))}")


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def block_and_warps(width: int, per_thread: int) -> tuple[int, int]:
    """Block that covers `width`, and the warps that leave each thread `per_thread` elements of it."""
    block = max(power_of_two(width), 32)
    return block, min(max(block // (32 * per_thread), 1), 16)


def runs(total: int, segment: int, *, programs: int = 1024, least: int = 8) -> tuple[int, int]:
    """Split segments of equal length into runs: `(rows of a run, runs of a segment)`.

    A program owns one run, so a reduction has an order that depends on the shape alone. About `programs` of them fill a
    large GPU several times over; `least` rows keep the partial sums small against the rows read.
    """
    run = min(max(math.ceil(total / programs), least), segment)
    count = math.ceil(segment / run)
    return math.ceil(segment / count), count


def reduce_partials(partials: Tensor, batch: int, groups: int) -> Tensor:
    """Sum partials `(B, chunks, D)`, fp32 or fp64, to `(batch, groups, D)`; groups divides chunks, batch is 1 or B."""
    from ._triton_lib import reduce_rows

    full, chunks, width = partials.shape
    if batch == full and groups == chunks:
        return partials
    out = partials.new_empty(batch, groups, width)
    block = 64
    grid = (batch * groups, math.ceil(width / block))
    launch(reduce_rows, grid, out, partials, out, full // batch, chunks, chunks // groups, groups, width,
           ROWS=32, BLOCK=block, num_warps=4)  # fmt: skip
    return out
