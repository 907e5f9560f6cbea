"""The Triton backend of the attention ops. Importing this never imports triton; calling a kernel does."""

from __future__ import annotations

from collections.abc import Callable

from .. import _triton as host
from . import triton_launch, triton_launch_backward, triton_select, triton_small

KERNELS: dict[str, Callable] = {
    **triton_launch.KERNELS,
    **triton_launch_backward.KERNELS,
    **triton_small.KERNELS,
    **triton_select.KERNELS,
}


def available() -> str | None:
    """None if these kernels can run in this process, else the reason they cannot."""
    return host.available()


def register() -> None:
    """Implement `torch.ops.maskaccel_triton` for CUDA, and for CPU under TRITON_INTERPRET=1."""
    host.register(KERNELS)
