"""The native library as an object: loaded, absent or incompatible, and why.

Importing this module loads nothing. `maskaccel.ops` calls `native.load()` once its schemas are defined.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

MINIMUM_TORCH = (2, 10)


@dataclass
class NativeLibrary:
    """State of `libmaskaccel.so`.

    Attributes:
        path: Where the library is expected.
        state: `"loaded"`, `"absent"` (not built, or switched off) or `"incompatible"` (it would not load).
        reason: Why it is not loaded; empty when it is.
        fix: What to do about it; empty when loaded.
        has_cpu: CPU kernels are registered.
        has_cuda: CUDA kernels are registered.
        cuda_archs: Architectures of the CUDA kernels, such as `("80", "90a")`.
        isa: Instruction set that the CPU kernels chose.
    """

    path: Path
    state: str = "absent"
    reason: str = "not loaded yet"
    fix: str = ""
    has_cpu: bool = False
    has_cuda: bool = False
    cuda_archs: tuple[str, ...] = ()
    isa: str = ""

    def load(self) -> None:
        """Load the library once. Never raises: the outcome is in `state`, `reason` and `fix`."""
        if self.state == "loaded":
            return
        if os.environ.get("MASKACCEL_NO_NATIVE") == "1":
            self._fail("absent", "switched off by MASKACCEL_NO_NATIVE=1", "unset MASKACCEL_NO_NATIVE")
            return
        if not self.path.is_file():
            self._fail("absent", f"{self.path} does not exist", "build it: `make native`, or install the wheel")
            return
        if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < MINIMUM_TORCH:
            need = ".".join(map(str, MINIMUM_TORCH))
            reason = f"built for torch >= {need}, found {torch.__version__}"
            self._fail("incompatible", reason, f"install torch >= {need}")
            return
        try:
            torch.ops.load_library(str(self.path))
            info = dict(part.split("=", 1) for part in torch.ops.maskaccel_raw._info().split(";"))
        except (OSError, RuntimeError, AttributeError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self._fail("incompatible", first, "rebuild it against the installed torch: `make native`")
            return
        self.state, self.reason, self.fix = "loaded", "", ""
        self.isa = info.get("isa", "")
        self.has_cpu = bool(self.isa)
        self.cuda_archs = tuple(filter(None, info.get("cuda_archs", "").split(",")))
        self.has_cuda = bool(self.cuda_archs)

    def _fail(self, state: str, reason: str, fix: str) -> None:
        self.state, self.reason, self.fix = state, reason, fix


native = NativeLibrary(Path(__file__).parent / "lib" / "libmaskaccel.so")
