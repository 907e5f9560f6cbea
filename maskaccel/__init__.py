"""maskaccel: custom kernels and reversible patches that make diffusion transformers faster.

    import maskaccel
    from maskaccel import methods

    patch = maskaccel.patch(pipe, [methods.FORA(interval=3), methods.FusedAdaLN()])
    image = pipe(prompt).images[0]
    print(patch.report())
    patch.remove()
"""

from . import masks, methods, ops
from ._explain import explain, info
from ._native import native
from ._version import __version__
from .patching import Patch, PatchError, PatchReport, patch

__all__ = [
    "Patch",
    "PatchError",
    "PatchReport",
    "__version__",
    "explain",
    "info",
    "masks",
    "methods",
    "native",
    "ops",
    "patch",
]
