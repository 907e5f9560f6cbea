"""Packages that travel to a machine without network: wheels in build/wheels, unpacked there when they are needed.

pip download -d build/wheels --only-binary :all: pytest pytest-xdist hypothesis
pip download -d build/wheels --no-deps nvidia-cuda-sanitizer-api==13.5.25     (those before 13.4 lack a program)
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path

from paths import ROOT

WHEELS = ROOT / "build" / "wheels"


def unpacked(name: str, wheels: Path | None = None) -> list[Path]:
    """Folders of the wheels whose file names begin with `name`, newest version last."""
    folder, found = wheels or WHEELS, []
    for wheel in sorted(folder.glob(f"{name}*.whl"), key=_version):
        to = folder / "unpacked" / wheel.stem
        if not to.is_dir():
            part = to.with_name(f"{to.name}.{os.getpid()}")
            with zipfile.ZipFile(wheel) as archive:
                for entry in archive.infolist():
                    path = Path(archive.extract(entry, part))
                    if path.is_file() and entry.external_attr >> 16 & 0o100:  # zipfile forgets what may be run
                        path.chmod(0o755)
            with contextlib.suppress(OSError):  # another process was first
                part.rename(to)
        found.append(to)
    return found


def _version(wheel: Path) -> list[int]:
    return [int(part) for part in wheel.stem.split("-")[1].split(".") if part.isdigit()]
