"""The common path of a public op: raw kernel without grad, autograd function with it, reference as the last resort."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _registry
from ._backends import KERNEL_DTYPES, automatic_namespace, namespace, select, select_while_tracing

# What a fast call may raise before it did anything; the checked path then finds the fault and names it.
FAULTS = (RuntimeError, LookupError, AttributeError, TypeError)

# False when it runs, True in what torch.compile traces, as `torch.compiler.is_compiling` at a sixth of the cost.
tracing = torch.compiler.is_dynamo_compiling

# Looked up once: a name with a dot in it costs as much as a test.
_compiler = torch.compiler
_is_grad_enabled = torch.is_grad_enabled
transformed = torch._C._are_functorch_transforms_active
_cpu: dict[str, Callable[..., Any]] = {}  # what the automatic backend calls for CPU tensors, by op


def wants_grad(args: tuple) -> bool:
    """True if autograd is on and an argument requires grad; also in forward mode, which the derivative then refuses."""
    if forward_ad._current_level >= 0:
        return True
    if not _is_grad_enabled():
        return False
    # A loop costs half of `any` over a generator; isinstance, for what is no tensor, more than all the rest.
    for t in args:  # noqa: SIM110
        if t is not None and getattr(t, "requires_grad", False):
            return True
    return False


def fast(name: str, x: Tensor, args: tuple) -> Any:
    """The unchecked call of the automatic backend.

    The kernels check their whole contract before any work. A violation (RuntimeError) or a device without kernels
    (LookupError) sends the caller to the checked path, which explains the fault or normalises the arguments.
    """
    if _compiler._is_compiling_flag:  # an export that traces by running, which `tracing` does not see
        raise LookupError
    if (_is_grad_enabled() or forward_ad._current_level >= 0) and wants_grad(args):
        if transformed():
            return _registry.differentiable(_automatic(name, x.device), name, args)
        return _derived(name, x.device)(*args)
    kernel = _cpu.get(name) if x.is_cpu else None
    return (kernel or _kernel(name, x.device))(*args)


def bare(name: str, x: Tensor, args: tuple) -> Any:
    """A native op of few arguments, the last of them its numbers; None where the whole op is needed instead.

    That is where the numbers do not fit, another backend serves the device, or an argument of an op without a
    derivative requires grad.
    """
    if args[-1] is None or _compiler._is_compiling_flag:
        return None
    if (_is_grad_enabled() or forward_ad._current_level >= 0) and wants_grad(args):
        derived = None if transformed() else _bare_derived(name, x.device)
        return None if derived is None else derived(*args)
    kernel = _cpu.get(name) if x.is_cpu else None
    if kernel is None:
        if automatic_namespace(name, x.device.type, x.device.index) != "maskaccel_raw":
            return None
        kernel = _kernel(name, x.device)
    return kernel(*args)


def undifferentiated(name: str, x: Tensor, args: tuple) -> Any:
    """The unchecked call of the automatic backend for an op of integers, or after a look at what requires grad."""
    if _compiler._is_compiling_flag:
        raise LookupError
    kernel = _cpu.get(name) if x.is_cpu else None
    return (kernel or _kernel(name, x.device))(*args)


def _automatic(name: str, device: torch.device) -> str:
    ns = automatic_namespace(name, device.type, device.index)
    if ns is None:
        raise LookupError
    return ns


@functools.cache
def _kernel(name: str, device: torch.device) -> Callable[..., Any]:
    kernel = _registry.quick(_registry.op(_automatic(name, device), name))
    if device.type == "cpu":
        _cpu[name] = kernel
    return kernel


@functools.cache
def _derived(name: str, device: torch.device) -> Callable[..., Any]:
    """The call of the automatic backend under autograd."""
    return _registry.direct(_automatic(name, device), name)


@functools.cache
def _bare_derived(name: str, device: torch.device) -> Callable[..., Any] | None:
    """The call of a bare op under autograd, where there is one."""
    native = automatic_namespace(name, device.type, device.index) == "maskaccel_raw"
    return _registry.direct("maskaccel_raw", name) if native and name in _registry.BARE_SPECS else None


def checked(name: str, x: Tensor, args: tuple, backend: str | None, reference: Callable[[], Any]) -> Any:
    """The call after the arguments were checked and normalised."""
    compiling = torch.compiler.is_compiling()
    if compiling and backend is None:
        # The op whose kernel and derivative the dispatcher knows: tracing needs no look at the backends.
        return _registry.op("maskaccel", name)(*args) if x.dtype in KERNEL_DTYPES else reference()
    chosen = (select_while_tracing if compiling else select)(backend, x.device, x.dtype, name)
    if chosen == "reference":
        return reference()
    if wants_grad(args):
        return _registry.differentiable(namespace(chosen), name, args)
    return _registry.op(namespace(chosen), name)(*args)
