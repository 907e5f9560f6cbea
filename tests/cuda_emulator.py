"""Builds the CUDA kernels for the host: every thread a fiber (`csrc/common/cuda_emulation.h`).

The ops then are `torch.ops.maskaccel_emulated.<op>` on CPU tensors: the same kernels, launch plans and argument
checks as on a GPU, at the speed of an emulation.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import torch

from maskaccel.ops.adaln import schema as adaln
from maskaccel.ops.attention import schema as attention
from maskaccel.ops.steps import schema as steps
from maskaccel.ops.tokens import schema as tokens

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc").rglob("cuda*.cu"))
_LIBRARY = torch.library.Library("maskaccel_emulated", "FRAGMENT")


def cuda_include() -> Path | None:
    """Directory of cuda_runtime.h, of an installed toolkit."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc:
        homes.append(str(Path(nvcc).resolve().parent.parent))
    return next((Path(h) / "include" for h in homes if h and (Path(h) / "include" / "cuda_runtime.h").is_file()), None)


def cutlass_include() -> Path | None:
    """Directory of the CUTLASS headers, of the nvidia-cutlass wheel."""
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "source" / "include"


def missing() -> str | None:
    """Why the emulation cannot be built here, or None."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if cuda_include() is None:
        return "no CUDA toolkit headers (cuda_runtime.h)"
    return "the nvidia-cutlass wheel is not installed" if cutlass_include() is None else None


def build(folder: Path) -> Path:
    """Compile and link into `folder`, once per state of the sources."""
    headers = sorted((ROOT / "csrc").rglob("*.cuh")) + sorted((ROOT / "csrc").rglob("*.h"))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in [*SOURCES, *headers]) + torch.__version__.encode())
    library = folder / f"libmaskaccel_emulated_{digest.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    torch_dir, cuda = Path(torch.__file__).parent, cuda_include()
    includes = [cuda, Path(str(cuda)) / "cccl", cutlass_include(), torch_dir / "include"]
    flags = ["-std=c++17", "-O1", "-fPIC", "-w", "-DMASKACCEL_EMULATE", "-DMASKACCEL_SM90A"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", *(f"-I{path}" for path in includes)]

    def compile_one(source: Path) -> str:
        out = folder / f"{library.stem}_{source.stem}.{os.getpid()}.o"
        run = ["g++", "-x", "c++", *flags, "-c", str(source), "-o", str(out)]
        subprocess.run(run, check=True, capture_output=True, text=True)
        return str(out)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    part = library.with_suffix(f".{os.getpid()}.part")
    link = ["g++", "-shared", "-o", str(part), *objects, f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(link, check=True, capture_output=True, text=True)
    part.replace(library)  # another test process may have been first: either file is good
    for name in objects:
        Path(name).unlink()
    return library


@functools.cache
def load(folder: Path) -> None:
    """Build, define the ops and load the library, once a process."""
    library = build(folder)
    for family in (adaln, attention, steps, tokens):
        for name, schema in {**family.SCHEMAS, **getattr(family, "BARE", {})}.items():
            _LIBRARY.define(name + schema)
    torch.ops.load_library(str(library))
