"""The checked call of a token op, and checks that several of them share."""

from __future__ import annotations

import functools
import numbers
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _call, _checks, _registry
from .._backends import namespace, select, select_while_tracing
from . import reference

if TYPE_CHECKING:
    from ...masks.tokens import TokenIndex


def run(name: str, args: tuple, device: torch.device, backend: str | None, dtype: torch.dtype = torch.float32) -> Any:
    """The call after the arguments were checked; `dtype` is that of the activations, if there are any."""
    compiling = torch.compiler.is_compiling()
    if compiling and backend is None and dtype != torch.float64:
        return _registry.op("maskaccel", name)(*args)
    chosen = (select_while_tracing if compiling else select)(backend, device, dtype, name)
    if chosen == "reference":
        return reference.KERNELS[name](*args)
    if _registry.SPECS[name].backward is not None and _call.wants_grad(args):
        return _registry.differentiable(namespace(chosen), name, args)
    return _registry.op(namespace(chosen), name)(*args)


@functools.cache
def token_index() -> type[TokenIndex]:
    """The class, which is made of these ops, for calls that an import of it would cost half a microsecond."""
    from ...masks.tokens import TokenIndex

    return TokenIndex


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """An int from `low` to `high`; integers of numpy are taken too."""
    if not isinstance(value, int) and isinstance(value, numbers.Integral):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        allowed = f"{low} or more" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}={value!r} must be an integer, {allowed}")
    return value


def number(name: str, value: object, low: float, high: float) -> float:
    """A number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}={value}; allowed are {low:g} to {high:g}")
    return float(value)


def kept_count(name: str, value: object, n: int) -> int:
    """A count of 1 to n, or a fraction above 0 up to 1 of n, rounded up as in TREAD (`n - floor(n * dropped)`)."""
    if not isinstance(value, int | float) and isinstance(value, numbers.Real):  # of numpy
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, float):
        if not 0.0 < value <= 1.0:
            raise ValueError(f"{name}={value} must be a fraction above 0 up to 1, or a count of 1 to {n}")
        dropped = int(n * (1.0 - value) + 1e-9 * n)
        return max(1, n - dropped)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= n:
        raise ValueError(f"{name}={value!r} must be a count of 1 to {n}, or a fraction above 0 up to 1")
    return value


def step_tensor(step: int | Tensor, device: torch.device) -> Tensor:
    """A step as the kernels read it, int64 of one element on the device; made without waiting for it."""
    if isinstance(step, Tensor):
        if step.dtype != torch.int64 or step.numel() != 1:
            raise TypeError(f"step is a tensor of {step.dtype} {tuple(step.shape)}; it must be int64 of one element")
        same_place("step", step, device)
        return step.reshape(1)
    return constant(integer("step", step, 0, (1 << 63) - 1), (1,), torch.int64, device)


def constant(value: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of one number for kernels to read; held, since making one costs a launch, on the stream that made it."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():  # of a mode its tensors are not of memory
        return torch.full(shape, value, dtype=dtype, device=device)
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.full(shape, value, dtype=dtype, device=device)
        index = torch.cuda.current_device() if device.index is None else device.index
        device, stream = torch.device("cuda", index), torch._C._cuda_getCurrentRawStream(index)
    return _held(value, shape, dtype, device, stream)


@functools.lru_cache(maxsize=256)
def _held(value: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    return torch.full(shape, value, dtype=dtype, device=device)


def same_place(name: str, t: Tensor, device: torch.device) -> None:
    """A tensor on a device; a device without an index is any of its type."""
    if t.device.type != device.type or (device.index is not None and t.device.index != device.index):
        raise ValueError(f"{name} is on {t.device}; it must be on {device}")


def seed_of(seed: object) -> int:
    """A key of 64 bits, as the signed integer that schemas take."""
    if not isinstance(seed, int) and isinstance(seed, numbers.Integral):
        seed = int(seed)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed={seed!r} must be an integer of 64 bits")
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _as_rows(name: str, t: Tensor, batch: int, n: int) -> Tensor:
    """A tensor `(n,)`, `(1, n)` or `(batch, n)` with the batch as its first dim."""
    if tuple(t.shape) not in ((n,), (1, n), (batch, n)):
        raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be ({n},), (1, {n}) or ({batch}, {n})")
    return t[None] if t.dim() == 1 else t


def flags_of(name: str, mask: object, batch: int, n: int, device: torch.device) -> Tensor | None:
    """A bool mask `(n,)`, `(1, n)` or `(batch, n)` as uint8 `(B|1, n)`, or None."""
    if mask is None:
        return None
    mask = _checks.tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} has dtype {mask.dtype}; it must be bool")
    mask = _as_rows(name, mask, batch, n)
    same_place(name, mask, device)
    return mask.to(torch.uint8).contiguous()


def rows_of(name: str, value: object, batch: int, n: int, device: torch.device) -> Tensor:
    """Integers `(n,)`, `(1, n)` or `(batch, n)` as int32 `(B|1, n)`."""
    t = _checks.tensor(name, value)
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {t.dtype}; it must be int32 or int64")
    t = _as_rows(name, t, batch, n)
    same_place(name, t, device)
    return t.to(torch.int32).contiguous()


def index_fits(index: object, batch: int, n: int, x: Tensor, name: str = "x") -> TokenIndex:
    """A TokenIndex of `n` tokens that serves a batch."""
    from ...masks.tokens import TokenIndex

    if not isinstance(index, TokenIndex):
        raise TypeError(f"index must be a TokenIndex, got {type(index).__name__}; TokenIndex.from_keep makes one")
    if index.n != n:
        raise ValueError(f"index is of {index.n} tokens; {name} has {n}")
    if index.batch not in (1, batch):
        raise ValueError(f"index is for {index.batch} samples; {name} has a batch of {batch}")
    _checks.same_device("index", index.keep, name, x)
    return index
