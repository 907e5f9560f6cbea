"""`maskaccel.explain` and `maskaccel.info`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from ._native import native
from ._version import __version__
from .ops._backends import reasons


def explain(op: str, *args: Any) -> dict[str, str | None]:
    """Which backends can run an op on these arguments, and why the others cannot.

    Args:
        op: Name of a public op, such as `"norm_modulate"`.
        *args: Arguments of the call; the first tensor decides (device and dtype). None: fp32 on the default device.

    Returns:
        Backend -> None (it can run) or the reason it cannot, best first.

    Raises:
        ValueError: `op` names no op.
    """
    names = [
        name for name in ops.__all__ if not isinstance(getattr(ops, name), type)
    ]  # without MergeIndex and the like
    if op not in names:
        raise ValueError(f"op={op!r} is not known; allowed are {', '.join(names)}")
    first = next((a for a in args if isinstance(a, Tensor)), None)
    if first is None:
        return reasons(torch.empty(0).device, torch.float32, op)
    return reasons(first.device, first.dtype, op)


def info() -> dict[str, Any]:
    """Versions, devices and the state of the native library, as plain data."""
    return {
        "maskaccel": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "native": {
            "state": native.state,
            "reason": native.reason,
            "fix": native.fix,
            "path": str(native.path),
            "isa": native.isa,
            "cuda_archs": list(native.cuda_archs),
        },
        "backends": {
            device: reasons(torch.device(device), torch.float32)
            for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ()))
        },
    }
