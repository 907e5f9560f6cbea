"""What a GPU measurement depends on: device, driver, versions, and exactly which code ran."""

from __future__ import annotations

import datetime
import hashlib
import platform
import subprocess
from typing import Any

import torch
from paths import ROOT

LIBRARY = ROOT / "maskaccel" / "lib" / "libmaskaccel.so"


def _said(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def _digest(*paths: Any) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def has_cuda_kernels() -> bool:
    """Whether the native library is there and holds machine code of a GPU."""
    return LIBRARY.is_file() and b".nv_fatbin" in LIBRARY.read_bytes()


def fingerprint(device: str) -> dict[str, Any]:
    """Machine, versions, commit and contents of the package and its library; `build` names what figures depend on."""
    found: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": _said("git", "rev-parse", "HEAD"),
        "dirty": _said("git", "status", "--porcelain", "-uno") not in ("", "unknown"),
        # A copied tree may have no history: the contents say which code it was.
        "sources": _digest(*sorted((ROOT / "maskaccel").rglob("*.py"))),
        "library": _digest(LIBRARY) if LIBRARY.is_file() else "absent",
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        found |= {
            "device": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory, "l2_bytes": p.L2_cache_size,
            "driver, largest sm clock, largest memory clock, power limit":
                _said("nvidia-smi", query, "--format=csv,noheader"),
        }  # fmt: skip
    else:
        found["device"] = "cpu (dry run: figures mean nothing)"
    parts = (found["device"], found["sources"], found["library"], found["torch"], found["triton"])
    found["build"] = hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:12]
    return found
