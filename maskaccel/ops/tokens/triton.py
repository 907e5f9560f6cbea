"""The Triton backend of the token ops. Importing this never imports triton; calling a kernel does."""

from __future__ import annotations

from collections.abc import Callable

from .. import _triton as host
from . import triton_launch_kv, triton_launch_rows, triton_launch_sample, triton_launch_select

KERNELS: dict[str, Callable] = {
    **triton_launch_select.KERNELS,
    **triton_launch_rows.KERNELS,
    **triton_launch_kv.KERNELS,
    **triton_launch_sample.KERNELS,
}


def available() -> str | None:
    """None if these kernels can run in this process, else the reason they cannot."""
    return host.available()


def register() -> None:
    """Implement `torch.ops.maskaccel_triton` for CUDA, and for CPU under TRITON_INTERPRET=1."""
    host.register(KERNELS)
