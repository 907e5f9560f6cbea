"""The common path of a public op: raw kernel without grad, autograd function with it, reference as the last resort."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _registry
from ._backends import KERNEL_DTYPES, automatic_namespace, namespace, select, select_while_tracing

# What a fast call may raise before it did anything; the checked path then finds the fault and names it.
FAULTS = (RuntimeError, LookupError, AttributeError, TypeError)
_RAW: dict[tuple[str, str], Any] = {}


def raw(ns: str, name: str) -> Any:
    """`torch.ops.<ns>.<name>.default`, looked up once."""
    key = (ns, name)
    found = _RAW.get(key)
    if found is None:
        found = _RAW[key] = _registry.op(ns, name)
    return found


def wants_grad(args: tuple) -> bool:
    """True if autograd is on and an argument requires grad; also in forward mode, which the derivative then refuses."""
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(t, Tensor) and t.requires_grad for t in args)


def fast(name: str, x: Tensor, args: tuple) -> Any:
    """The unchecked call of the automatic backend.

    The kernels check their whole contract before any work. A violation (RuntimeError) or a device without kernels
    (LookupError) sends the caller to the checked path, which explains the fault or normalises the arguments.
    """
    ns = automatic_namespace("cpu", None) if x.is_cpu else automatic_namespace(x.device.type, x.device.index)
    if ns is None:
        raise LookupError
    if wants_grad(args):
        return _registry.autograd_function(ns, name).apply(*args)
    return raw(ns, name)(*args)


def checked(name: str, x: Tensor, args: tuple, backend: str | None, reference: Callable[[], Any]) -> Any:
    """The call after the arguments were checked and normalised."""
    compiling = torch.compiler.is_compiling()
    if compiling and backend is None:
        # The op whose kernel and derivative the dispatcher knows: tracing needs no look at the backends.
        return raw("maskaccel", name)(*args) if x.dtype in KERNEL_DTYPES else reference()
    chosen = (select_while_tracing if compiling else select)(backend, x.device, x.dtype)
    if chosen == "reference":
        return reference()
    if wants_grad(args):
        return _registry.autograd_function(namespace(chosen), name).apply(*args)
    return raw(namespace(chosen), name)(*args)
