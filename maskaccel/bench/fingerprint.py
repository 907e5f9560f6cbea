"""What a measurement depends on: machine, software, commit. Standard library only, apart from torch."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "diffusers", "numpy", "liger-kernel")
_ISA = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "f16c", "fma")


def cpu() -> dict[str, Any]:
    """Model, cores and the vector instructions that matter here."""
    model, flags = platform.processor() or platform.machine(), set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    return {"model": model, "cores": os.cpu_count(), "isa": [name for name in _ISA if name in flags]}


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed versions; a package that is not installed is left out."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the source tree, with `+changes` if files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10
        )
        state = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", "--", "maskaccel", "csrc"],
            capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if state.stdout.strip() else "")


def fingerprint() -> dict[str, Any]:
    """Everything above, with torch's threads, the native library and the GPUs."""
    import torch

    from .. import _native

    native = _native.native
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            gpus.append({"name": p.name, "sm": f"{p.major}{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)})
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "native": {"state": native.state, "isa": native.isa, "cuda_archs": list(native.cuda_archs)},
        "gpus": gpus,
        "environment": {k: os.environ[k] for k in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES") if k in os.environ},
    }
