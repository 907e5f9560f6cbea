"""Which backend runs a call, and why not the others.

A backend is `cuda`, `cpu` (the native library), `triton`, or `reference` (plain torch). `backend=None` takes the first
of that order that can run; naming one that cannot run is an error that gives the reason.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch

from .._native import native
from . import _registry
from ._triton import interpreting

BACKENDS = ("cuda", "cpu", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_MODULES = tuple(f"maskaccel.ops.{family}.triton" for family in ("adaln", "attention", "steps", "tokens"))


@functools.cache
def _triton_reason() -> str | None:
    """None once the Triton kernels are registered, else why they cannot be."""
    for name in _TRITON_MODULES:
        module = importlib.import_module(name)
        reason = module.available()
        if reason is not None:
            return str(reason)
        module.register()
    return None


def refusal(backend: str, device: torch.device, dtype: torch.dtype, op: str | None = None) -> str | None:
    """Why `backend` cannot run (the op of that name) on tensors of this device and dtype; None if it can."""
    if backend not in BACKENDS:
        return f"unknown backend {backend!r}; allowed are {', '.join(BACKENDS)}"
    if backend == "reference":
        return None
    if dtype not in KERNEL_DTYPES:
        return f"dtype {dtype} is not served by kernels (float32, bfloat16, float16)"
    if backend == "triton":
        reason = _triton_reason()
        if reason is None and device.type == "cpu" and not interpreting():
            return "Triton runs on GPUs; on CPU only interpreted (TRITON_INTERPRET=1)"
        return reason or _lacks(op, backend, device)
    if device.type != backend:
        return f"the tensors are on {device.type}"
    if native.state != "loaded":
        return f"native library {native.state}: {native.reason}"
    if backend == "cpu":
        reason = None if native.has_cpu else "the native library was built without CPU kernels"
    else:
        reason = _cuda_reason(device.index or 0)
    return reason or _lacks(op, backend, device) or _untaken(op, backend, dtype)


_Refuses = Callable[..., str | None]
_LIMITS: dict[tuple[str, str], tuple[tuple[torch.dtype, ...], _Refuses]] = {}


def limit(backend: str, op: str, dtypes: tuple[torch.dtype, ...], refuses: _Refuses) -> None:
    """Tell what kernels of an op on a backend take: `dtypes`, and no call that `refuses(*args)` gives a reason for."""
    _LIMITS[backend, op] = (dtypes, refuses)


def call_refusal(backend: str, op: str, args: tuple) -> str | None:
    """Why a backend that serves the op does not take this call; None if it does."""
    return _LIMITS[backend, op][1](*args) if (backend, op) in _LIMITS else None


def _untaken(op: str | None, backend: str, dtype: torch.dtype) -> str | None:
    taken = _LIMITS[backend, op][0] if op is not None and (backend, op) in _LIMITS else KERNEL_DTYPES
    if dtype in taken:
        return None
    names = " and ".join(str(t).removeprefix("torch.") for t in taken)
    return f"the {backend} kernel of {op} takes {names}, not {str(dtype).removeprefix('torch.')}"


def _lacks(op: str | None, backend: str, device: torch.device) -> str | None:
    """Why a backend that can run here cannot run this op: a library built from older sources does not hold it."""
    if op is None or _registry.implemented(namespace(backend), op, device.type):
        return None
    if backend == "triton":
        return f"there is no Triton kernel of {op}"
    return f"the native library holds no {backend} kernel of {op}; rebuild it: `make native`"


@functools.cache
def _cuda_reason(index: int) -> str | None:
    if not native.has_cuda:
        return "the native library was built without CUDA kernels"
    major, minor = torch.cuda.get_device_capability(index)
    # A cubin runs on its own major version and later minors; 90a runs on 9.0 alone; the newest target carries PTX.
    built = [(int(a.rstrip("af")) // 10, int(a.rstrip("af")) % 10) for a in native.cuda_archs]
    if any(major == have and minor >= low for have, low in built) or (built and (major, minor) > max(built)):
        return None
    return f"no kernels for sm_{major}{minor}; built for {', '.join('sm_' + a for a in native.cuda_archs)}"


def reasons(device: torch.device, dtype: torch.dtype, op: str | None = None) -> dict[str, str | None]:
    """Every backend with None (can run) or the reason it cannot."""
    return {backend: refusal(backend, device, dtype, op) for backend in BACKENDS}


def select(backend: str | None, device: torch.device, dtype: torch.dtype, op: str | None = None) -> str:
    """The backend that runs (the op of that name), by request or automatically.

    Raises:
        ValueError: `backend` names none, or one that cannot run here; the message gives the reason.
    """
    if backend is None:
        return next(name for name in BACKENDS if refusal(name, device, dtype, op) is None)
    reason = refusal(backend, device, dtype, op)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot run this call: {reason}")
    return backend


def select_while_tracing(backend: str | None, device: torch.device, dtype: torch.dtype, op: str | None = None) -> str:
    """`select`, whose answer tracing takes as a constant."""
    return select(backend, device, dtype, op)


# What torch.compiler.assume_constant_result does; calling it would import the whole compiler with this package.
select_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def namespace(backend: str) -> str:
    """The op namespace that holds the kernels of a backend other than the reference."""
    return "maskaccel_triton" if backend == "triton" else "maskaccel_raw"


@functools.cache
def automatic(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """`select` of `backend=None`, looked up once for each op, device and dtype."""
    return select(None, device, dtype, op)


@functools.cache
def automatic_namespace(op: str, device_type: str, index: int | None) -> str | None:
    """Namespace that `backend=None` uses for fp32, bf16 and fp16 on a device; None means the reference."""
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    chosen = select(None, device, torch.float32, op)
    return None if chosen == "reference" else namespace(chosen)


def implement_fallbacks(references: dict[str, Callable]) -> None:
    """Give `torch.ops.maskaccel` kernels for the devices that the native library does not serve, op by op."""
    for name, function in references.items():
        if not _registry.implemented("maskaccel", name, "cpu"):
            _registry.implement("maskaccel", name, function, "CPU")
        if not _registry.implemented("maskaccel", name, "cuda"):
            _registry.implement("maskaccel", name, _best_or(name, function), "CUDA")


def _best_or(name: str, function: Callable) -> Callable:
    def kernel(*args):
        if ("cuda", name) in _LIMITS:  # ops without limits are in this namespace where the native library holds them
            x = args[0]
            if refusal("cuda", x.device, x.dtype, name) is None and call_refusal("cuda", name, args) is None:
                return _registry.op("maskaccel_raw", name)(*args)
        if _triton_reason() is None and _registry.implemented("maskaccel_triton", name, "cuda"):
            return _registry.op("maskaccel_triton", name)(*args)
        return function(*args)

    return kernel
