"""Stateless torch ops. Importing this package defines them; the native library is loaded if it is there."""

from . import _backends
from .adaln import autograd as _adaln_autograd
from .adaln import fallback as _adaln_fallback
from .adaln import gate_residual, gate_residual_norm_modulate, gated_activation, norm_modulate, qk_norm_rope
from .steps import api as _steps_api
from .steps import (
    combine_history,
    combine_history_norm_modulate,
    combine_sites,
    gram,
    kmeans,
    norm_modulate_difference,
    relative_difference,
    scatter_combine,
)
from .steps import reference as _steps_reference

__all__ = [
    "combine_history",
    "combine_history_norm_modulate",
    "combine_sites",
    "gate_residual",
    "gate_residual_norm_modulate",
    "gated_activation",
    "gram",
    "kmeans",
    "norm_modulate",
    "norm_modulate_difference",
    "qk_norm_rope",
    "relative_difference",
    "scatter_combine",
]

_adaln_autograd.register()
_steps_api.register()
_backends.native.load()  # after the schemas: its kernels attach to them
_backends.implement_fallbacks({**_adaln_fallback.KERNELS, **_steps_reference.KERNELS})
