"""The built library and the CUDA compile, as far as a machine without a GPU can tell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import check_cuda  # noqa: E402

LIBRARIES = sorted({p for folder in ("maskaccel/lib", "build") for p in (ROOT / folder).rglob("libmaskaccel.so")})
USAGE = """
Fatbin elf code:
================
arch = sm_90a
Resource usage:
 Function _Z3fooPf:
  REG:40 STACK:8 SHARED:512 LOCAL:16 CONSTANT[0]:536 TEXTURE:0
"""


def _cuda_library() -> Path:
    for library in LIBRARIES:
        if b".nv_fatbin" in library.read_bytes():
            return library
    pytest.skip("no library with CUDA kernels is built here (MASKACCEL_CUDA=1 python setup.py build_ext --inplace)")


def test_usage_is_parsed():
    """The report of cuobjdump becomes one record per kernel."""
    assert check_cuda.parse_usage(USAGE) == [
        {"arch": "sm_90a", "kernel": "_Z3fooPf", "registers": 40, "stack": 8, "local": 16, "shared": 512}
    ]


def test_summary_joins_the_instances_of_a_kernel():
    """Least and most registers of each template on each target, targets in order of age."""
    registers = {("sm_120", "copy<float>"): 40, ("sm_80", "copy<float>"): 24, ("sm_80", "copy<half_t>"): 32,
                 ("sm_120", "copy<half_t>"): 40}  # fmt: skip
    kernels = [{"arch": arch, "name": name, "registers": count} for (arch, name), count in registers.items()]
    assert check_cuda.summary(kernels).splitlines() == [
        "| kernel | instances | sm_80 | sm_120 |", "|---|---|---|---|", "| `copy` | 2 | 24-32 | 40 |",
    ]  # fmt: skip


def test_cuda_library_loads_without_cuda():
    """A library with CUDA kernels loads where torch has none, and registers them."""
    library = _cuda_library()
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    code = (
        "import torch; from maskaccel.ops.adaln import schema; import maskaccel.ops;"
        f"torch.ops.load_library({str(library)!r});"
        "assert torch._C._dispatch_has_kernel_for_dispatch_key('maskaccel_raw::norm_modulate', 'CUDA')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]


def test_one_source_compiles_clean():
    """The activation kernels compile for sm_90a without spills."""
    try:
        check_cuda.find_tool("nvcc"), check_cuda.find_tool("cuobjdump")
    except check_cuda.Missing as e:
        pytest.skip(str(e))
    command = [sys.executable, "tools/check_cuda.py", "--archs", "90a", "--only", "cuda_activation", "--jobs", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode == 2 and "not installed" in run.stderr:
        pytest.skip(run.stderr.strip())
    assert run.returncode == 0, run.stdout + run.stderr
    assert "activation_kernel" in run.stdout
