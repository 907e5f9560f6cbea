"""The Triton backend of the adaLN ops. Importing this never imports triton; calling a kernel does.

The device code is in `triton_norm`, `triton_backward`, `triton_rope` and `triton_activation`; the calls, which check
the contract of the raw ops (`maskaccel.ops.adaln.schema`), in `triton_launch` and `triton_launch_rope`.
"""

from __future__ import annotations

from collections.abc import Callable

from .. import _triton
from . import triton_launch as norm
from . import triton_launch_rope as rope

KERNELS: dict[str, Callable] = {
    function.__name__: function
    for function in (
        norm.norm_modulate, norm.norm_modulate_pair, norm.norm_modulate_backward, norm.gate_residual_norm_modulate,
        norm.gate_residual_norm_modulate_pair, norm.gate_residual_norm_modulate_backward, norm.gate_residual,
        norm.gate_residual_backward, rope.qk_norm_rope, rope.qk_norm_rope_backward, rope.gated_activation,
        rope.gated_activation_backward,
    )
}  # fmt: skip


def available() -> str | None:
    """None if these kernels can run in this process, else the reason they cannot."""
    return _triton.available()


def register() -> None:
    """Implement `torch.ops.maskaccel_triton` for CUDA, and for CPU under TRITON_INTERPRET=1."""
    _triton.register(KERNELS)
