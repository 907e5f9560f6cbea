"""`maskaccel info`: what is installed, what is loaded, and where the two differ. Standard library only.

torch and the native library are probed in a process of their own (`_probe.py`), so that neither can take the report
down.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "maskaccel", "torch", "triton", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "typer",
    "tqdm", "liger-kernel", "xformers", "flash-attn", "cache-dit",
)  # fmt: skip
ENVIRONMENT = ("MASKACCEL_", "CUDA_", "TORCH", "TRITON_", "OMP_", "MKL_", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH")
_PROBE_SECONDS = 120


def _installed() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        except Exception as error:  # broken metadata of one package must not hide the others
            found[name] = f"unreadable: {error}"
    return found


def _owners() -> dict[str, str]:
    """Real path of every shared object that an installed package of interest lists -> `name version`."""
    owners: dict[str, str] = {}
    for dist in importlib.metadata.distributions():
        name = str(dist.metadata["Name"] or "")
        if name not in ("torch", "triton", "maskaccel") and not name.startswith(("nvidia-", "cuda-")):
            continue
        for file in dist.files or ():
            if ".so" in file.name:
                owners[os.path.realpath(str(dist.locate_file(file)))] = f"{name} {dist.version}"
    return owners


def _libraries(loaded: list[str], owners: dict[str, str], native: str | None) -> list[dict[str, str]]:
    """Each loaded library, the package it belongs to, and a note where that looks wrong."""
    rows = []
    stems = [Path(path).name.split(".so")[0] for path in loaded]
    by_stem: dict[str, list[str]] = {}
    for path in owners:
        by_stem.setdefault(Path(path).name.split(".so")[0], []).append(path)
    for path, stem in zip(loaded, stems, strict=True):
        owner = owners.get(path) or ("source tree" if path == native else "")
        note = ""
        if stems.count(stem) > 1:
            note = "loaded more than once"
        if not owner and by_stem.get(stem):
            note = f"not the installed one ({by_stem[stem][0]}, of {owners[by_stem[stem][0]]})"
        rows.append({"library": stem, "path": path, "belongs to": owner or "system", "note": note})
    return rows


def _probe() -> dict[str, Any]:
    """Answers of `_probe.py`; a probe that did not finish says how the process ended."""
    script = Path(__file__).with_name("_probe.py")
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, str(script), root]
    output, ending = "", "ended without a word"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS)
        output = done.stdout
        if done.returncode < 0:
            ending = f"the process was ended by {signal.Signals(-done.returncode).name}"
        elif done.returncode:
            ending = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        ending = f"no answer in {_PROBE_SECONDS} s"
    except OSError as error:
        ending = str(error)
    answers: dict[str, Any] = {}
    for line in output.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # something printed by a library
        if not isinstance(record, dict):
            continue
        if "begin" in record:
            answers[record["begin"]] = {"error": ending}
        elif "probe" in record:
            answers[record["probe"]] = record["value"]
    for name in ("torch", "maskaccel", "backends", "loaded"):
        answers.setdefault(name, {"error": ending})
    return answers


def _driver() -> str | None:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None


def _cpu() -> dict[str, Any]:
    flags: set[str] = set()
    model = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    except OSError:
        pass
    return {
        "model": model,
        "cores": os.cpu_count(),
        "isa": [name for name in ("avx2", "fma", "f16c", "avx512f", "avx512_bf16") if name in flags],
    }


def collect() -> dict[str, Any]:
    """Everything, as plain data. Never raises because of torch, a driver or a library."""
    answers = _probe()
    loaded = answers["loaded"] if isinstance(answers["loaded"], list) else []
    native = answers["maskaccel"].get("native path")
    try:
        libraries: Any = _libraries(loaded, _owners(), os.path.realpath(native) if native else None)
    except Exception as error:  # metadata of some package cannot be read
        libraries = {"error": str(error)}
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "cpu": _cpu(),
        "nvidia driver": _driver(),
        "installed": _installed(),
        "torch": answers["torch"],
        "maskaccel": answers["maskaccel"],
        "backends": answers["backends"],
        "loaded libraries": libraries if loaded else answers["loaded"],
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(ENVIRONMENT)},
    }


def _lines(value: Any, indent: int) -> list[str]:
    pad = " " * indent
    if isinstance(value, dict):
        lines = []
        for key, item in value.items():
            if isinstance(item, dict | list) and item and not (isinstance(item, list) and _flat(item)):
                lines += [f"{pad}{key}", *_lines(item, indent + 2)]
            else:
                lines.append(f"{pad}{key:{max(1, 22 - indent)}} {_text(item)}")
        return lines
    if isinstance(value, list):
        return [line for item in value for line in _lines(item, indent)]
    return [f"{pad}{value}"]


def _flat(items: list[Any]) -> bool:
    return all(not isinstance(item, dict | list) for item in items)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value in (None, "", {}) else str(value)


def print_info(*, as_json: bool = False) -> None:
    """Print the report."""
    data = collect()
    if as_json:
        print(json.dumps(data, indent=1))
        return
    libraries = data.pop("loaded libraries")
    backends = data.pop("backends")
    print("\n".join(_lines(data, 0)))
    print("backends")
    if "error" in backends:
        print(f"  not known: {backends['error']}")
    else:
        for device, reasons in backends.items():
            for name, reason in reasons.items():
                print(f"  {device:5} {name:10} {'can run' if reason is None else 'cannot: ' + reason}")
    print("loaded libraries")
    if isinstance(libraries, dict):
        print(f"  not known: {libraries['error']}")
        return
    for row in libraries:
        print(
            f"  {row['library']:18} {row['belongs to']:24} {row['path']}{'  ! ' + row['note'] if row['note'] else ''}"
        )
