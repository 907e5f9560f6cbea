"""Audit the wheel: what it holds, its tag, its size, and that the library asks torch for stable symbols alone.

python tools/audit_wheel.py dist/*.whl                    # audit
python tools/audit_wheel.py --repair dist build/x.whl     # tag it manylinux where possible, audit
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SIZE_LIMIT = 30 * 2**20
LIBRARY = "maskaccel/lib/libmaskaccel.so"
NEEDED = re.compile(r"lib(torch_cpu|c10|stdc\+\+|gcc_s|c|m|dl|pthread|rt|gomp)\.so(\.\d+)*|ld-linux-x86-64\.so\.2")
# What torch promises to keep: its C shims. Everything else that the C++ library of torch exports is mangled (_Z...).
STABLE = re.compile(r"(aoti_torch|torch)_\w+")
# Mangled names of torch's namespaces: at, c10, torch, caffe2
UNSTABLE = re.compile(r"_Z\w*?(2at|3c10|5torch|6caffe2)")
PACKAGE = re.compile(r"(maskaccel|maskaccel-[^/]+\.dist-info)/")
# torch is there already when the library is loaded; carrying it along would load it twice.
EXCLUDE = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so", "libgomp.so.1")


class AuditError(Exception):
    """The wheel breaks a promise."""


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise AuditError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def undefined_symbols(library: Path) -> list[str]:
    """Names that the library expects from others, without symbol versions."""
    lines = _run("nm", "-D", "--undefined-only", str(library)).splitlines()
    return sorted({line.split()[-1].split("@")[0] for line in lines if line.strip()})


def exported_symbols(library: Path) -> list[str]:
    """Names that the library offers to others."""
    lines = _run("nm", "-D", "--defined-only", str(library)).splitlines()
    return sorted({line.split()[-1] for line in lines if line.strip()})


def needed_libraries(library: Path) -> list[str]:
    """Libraries that the loader must find."""
    return re.findall(r"\(NEEDED\).*\[(.+?)\]", _run("readelf", "-d", str(library)))


def audit_library(library: Path) -> dict[str, list[str]]:
    """Check the symbols and needs of the library.

    Returns:
        `stable`: the torch shims it calls; `needed`: libraries it needs; `exported`: symbols it offers.

    Raises:
        AuditError: It calls torch beyond the stable shims, or needs a library that is not promised.
    """
    undefined = undefined_symbols(library)
    unstable = [name for name in undefined if UNSTABLE.match(name)]
    if unstable:
        raise AuditError(f"{library.name} calls unstable torch symbols: {', '.join(unstable[:8])}")
    python = [name for name in undefined if name.startswith(("Py", "_Py"))]
    if python:
        raise AuditError(f"{library.name} calls Python: {', '.join(python[:8])}")
    stable = [name for name in undefined if STABLE.fullmatch(name)]
    if not stable:
        raise AuditError(f"{library.name} calls no torch shim at all: it cannot register an op")
    needed = needed_libraries(library)
    stray = [name for name in needed if not NEEDED.fullmatch(name)]
    if stray:
        raise AuditError(f"{library.name} needs {', '.join(stray)}, which not every torch brings")
    return {"stable": stable, "needed": needed, "exported": exported_symbols(library)}


def audit_contents(names: list[str]) -> None:
    """Raise AuditError unless the wheel holds the package, its library and its licence, and nothing else."""
    stray = [name for name in names if not PACKAGE.match(name)]
    if stray:
        raise AuditError(f"the wheel holds files outside the package: {', '.join(stray[:8])}")
    bad = [name for name in names if name.endswith((".pyc", ".o", ".cpp", ".cu", ".h", ".cuh")) or "/tests/" in name]
    if bad:
        raise AuditError(f"the wheel holds files that belong to the source tree: {', '.join(bad[:8])}")
    for wanted in (LIBRARY, "maskaccel/__init__.py", "maskaccel/py.typed", "maskaccel/cli/app.py"):
        if wanted not in names:
            raise AuditError(f"the wheel lacks {wanted}")
    libraries = [name for name in names if name.endswith(".so")]
    if libraries != [LIBRARY]:
        raise AuditError(f"the wheel holds other libraries than its own: {', '.join(libraries)}")
    if not any(name.endswith("/LICENSE") for name in names):
        raise AuditError("the wheel lacks the licence")


def audit(wheel: Path) -> str:
    """Audit one wheel; returns a report.

    Raises:
        AuditError: It breaks a promise; the message says which.
    """
    if not re.search(r"-py3-none-[^-]*linux[^-]*_x86_64\.whl$", wheel.name):
        raise AuditError(f"{wheel.name}: the tag must be py3-none-<linux>_x86_64")
    size = wheel.stat().st_size
    if size > SIZE_LIMIT:
        raise AuditError(f"{wheel.name} is {size / 2**20:.1f} MiB; at most {SIZE_LIMIT / 2**20:.0f}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        audit_contents(names)
        library = Path(archive.extract(LIBRARY, folder))
        found = audit_library(library)
        library_size = library.stat().st_size
    return "\n".join([
        f"{wheel.name}: {size / 2**20:.2f} MiB, {len(names)} files, library {library_size / 2**20:.2f} MiB",
        f"  needs {', '.join(found['needed'])}",
        f"  exports {', '.join(found['exported']) or 'no symbol'}",
        f"  calls {len(found['stable'])} stable torch symbols and no other of torch: {', '.join(found['stable'])}",
    ])  # fmt: skip


def repair(wheel: Path, folder: Path) -> Path:
    """Put the wheel into `folder`, tagged manylinux if auditwheel finds that it may be; else as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    excluded = [part for name in EXCLUDE for part in ("--exclude", name)]
    command = [sys.executable, "-m", "auditwheel", "repair", *excluded, "--plat", "auto", "-w", str(folder), str(wheel)]
    before = set(folder.glob("*.whl"))
    done = subprocess.run(command, capture_output=True, text=True)
    made = set(folder.glob("*.whl")) - before
    if done.returncode == 0 and made:
        return made.pop()
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    print(f"auditwheel leaves the linux_x86_64 tag: {reason}")
    return Path(shutil.copy(wheel, folder))


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--repair", type=Path, metavar="FOLDER", help="put them there, as manylinux where possible")
    options = parser.parse_args(arguments)
    for wheel in options.wheels:
        try:
            print(audit(repair(wheel, options.repair) if options.repair else wheel))
        except AuditError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
