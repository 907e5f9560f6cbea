"""Which kernels there are on a device, and which of them may be timed: those that passed their check."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from stage import Context

import maskaccel.ops  # noqa: F401  (defines the ops)

NAMESPACES = {"cuda": "maskaccel_raw", "triton": "maskaccel_triton", "cpu": "maskaccel_raw"}


def backends(device: str) -> tuple[str, ...]:
    """Backends whose kernels run on a device, the compiled ones first."""
    return ("cuda", "triton") if device == "cuda" else ("cpu", "reference")


def find(backend: str, op: str) -> Callable[..., Any] | None:
    """The kernel of a raw op; None where this build has none."""
    if backend == "reference":
        from _raw_cases import plain

        return plain(op)
    key = "CPU" if backend == "cpu" else "CUDA"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACES[backend]}::{op}", key):
        return None
    return getattr(getattr(torch.ops, NAMESPACES[backend]), op).default


def state(context: Context, backend: str, op: str) -> str:
    """What the stage `correctness` found: "ok", "absent", or "wrong or not checked" where it has no good record."""
    record = context.earlier.get("correctness", {}).get(f"{backend} {op}")
    return "wrong or not checked" if record is None else str(record["state"])


def usable(context: Context, *ops: str) -> tuple[list[str], dict[str, str]]:
    """Backends that passed their check of all `ops`; the others with their reasons."""
    good, refused = [], {}
    for backend in backends(context.device):
        states = {op: state(context, backend, op) for op in ops}
        bad = {op: what for op, what in states.items() if what != "ok"}
        if bad:
            refused[backend] = ", ".join(f"{op}: {what}" for op, what in bad.items())
        else:
            good.append(backend)
    return good, refused


def compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """A function by `torch.compile`, static shapes, apart from what was compiled for another item before."""
    from torch._functorch import config as functorch_config

    functorch_config.donated_buffer = False  # a backward is timed by running it again on one graph
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # beyond it the plain form would run, and be timed, unseen
    return torch.compile(function, backend="inductor" if device == "cuda" else "eager", dynamic=False)


def distance(got: Any, want: Any) -> float:
    """The largest distance of two results' floating tensors, each relative to the norm of the wanted.

    Empty tensors, which a call was not asked for, are left out; nan where the others do not pair up.
    """
    pairs = [_floating(result) for result in (got, want)]
    if [t.numel() for t in pairs[0]] != [t.numel() for t in pairs[1]]:
        return math.nan
    worst = 0.0
    for a, b in zip(*pairs, strict=True):
        a, b = a.float().reshape(-1), b.float().reshape(-1)
        norm, apart = torch.linalg.vector_norm(b), torch.linalg.vector_norm(a - b)
        one = (apart / norm.clamp(min=1e-20)).item()
        if math.isnan(one):
            return one
        worst = max(worst, one)
    return worst


def _floating(result: Any) -> list[torch.Tensor]:
    tensors = result if isinstance(result, (tuple, list)) else (result,)
    return [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()]
