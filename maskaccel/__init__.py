"""maskaccel: custom kernels and reversible patches that make diffusion transformers faster.

import maskaccel
from maskaccel import methods

patch = maskaccel.patch(pipe, [methods.FORA(interval=3), methods.FusedAdaLN()])
image = pipe(prompt).images[0]
print(patch.report())
patch.remove()
"""

from typing import NoReturn

from ._version import __version__

_torch_error: Exception | None = None
try:
    import torch as _torch  # noqa: F401
except (ImportError, OSError) as error:
    # A broken torch must not hide what is wrong with it: `maskaccel info` lives in this package.
    _torch_error = error

if _torch_error is None:
    from . import calibration, masks, methods, ops
    from ._explain import explain, info
    from ._native import native
    from .patching import Patch, PatchError, PatchReport, TokenRoute, patch
else:

    def __getattr__(name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        message = f"maskaccel needs torch, which cannot be imported: {_torch_error}. `maskaccel info` shows more."
        raise ImportError(message) from _torch_error


__all__ = [
    "Patch",
    "PatchError",
    "PatchReport",
    "TokenRoute",
    "__version__",
    "calibration",
    "explain",
    "info",
    "masks",
    "methods",
    "native",
    "ops",
    "patch",
]
