"""Builds the native library with CMake and packs it into one wheel for every Python.

Read from the environment:

* `MASKACCEL_BUILD`: `native` (default) builds the library, `pure` packs the Python files alone.
* `MASKACCEL_CUDA`: `1` builds the CUDA kernels, `0` leaves them out. Unset: built if nvcc is there and the installed
  torch is a CUDA build.
* `MASKACCEL_CUDA_ARCHS`: targets such as `80;90a`; unset: all that CMakeLists.txt names.
* `MAX_JOBS`: parallel compilers.

Nothing here looks at the hardware or the network: a build gives the same wheel on any machine.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

ROOT = Path(__file__).resolve().parent
LIBRARY = "libmaskaccel.so"


def _choice(name: str, allowed: tuple[str, ...], default: str) -> str:
    value = os.environ.get(name) or default
    if value not in allowed:
        raise SystemExit(f"{name}={value!r} is not known; allowed are {', '.join(allowed)}")
    return value


def _wants_native() -> bool:
    return _choice("MASKACCEL_BUILD", ("native", "pure"), "native") == "native"


def _torch_directory() -> Path:
    # find_spec, not import: a build needs the headers only, and importing a CUDA torch may look for a driver.
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "maskaccel: the native library is built against the headers of the installed torch, and none is here.\n"
            "  * install torch >= 2.10, then `pip install --no-build-isolation .` (isolation would hide it), or\n"
            "  * set MASKACCEL_BUILD=pure for a package without native kernels (Triton and reference backends only)."
        )
    return Path(spec.submodule_search_locations[0])


def _torch_is_cuda_build(torch: Path) -> bool:
    version = (torch / "version.py").read_text()
    return re.search(r"^cuda\b[^=]*=\s*['\"]", version, re.MULTILINE) is not None


def _find_nvcc() -> str | None:
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if root and (Path(root) / "bin" / "nvcc").exists():
            return str(Path(root) / "bin" / "nvcc")
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def _wants_cuda(torch: Path) -> bool:
    asked = _choice("MASKACCEL_CUDA", ("0", "1", "auto"), "auto")
    if asked == "1" and _find_nvcc() is None:
        raise SystemExit("MASKACCEL_CUDA=1, but nvcc was found neither in PATH nor in CUDA_HOME/bin")
    if asked == "auto":
        return _find_nvcc() is not None and _torch_is_cuda_build(torch)
    return asked == "1"


class BuildNative(build_ext):
    """Runs CMake; the library lands in `maskaccel/lib` of the wheel, or of the source tree for an in-place build."""

    def run(self) -> None:
        """Configure and build."""
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "maskaccel" if in_place else Path(self.build_lib).resolve() / "maskaccel"
        torch = _torch_directory()
        cuda = _wants_cuda(torch)
        # One tree per configuration, so that switching CUDA on and off does not rebuild the other.
        tree = ROOT / "build" / ("native-cuda" if cuda else "native-cpu")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "MASKACCEL_CUDA": "ON" if cuda else "OFF",
            "MASKACCEL_TORCH_DIR": torch,
            "MASKACCEL_OUTPUT_DIR": package / "lib",
            "Python_EXECUTABLE": sys.executable,
            "Python3_EXECUTABLE": sys.executable,
        }
        if cuda:
            options["CMAKE_CUDA_COMPILER"] = _find_nvcc()
            if os.environ.get("MASKACCEL_CUDA_ARCHS"):
                options["MASKACCEL_CUDA_ARCHS"] = os.environ["MASKACCEL_CUDA_ARCHS"]
        if shutil.which("ninja"):
            generator = ["-G", "Ninja"]
        else:
            generator = []
        configure = ["cmake", "-S", str(ROOT), "-B", str(tree), *generator]
        configure += [f"-D{key}={value}" for key, value in options.items()]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(tree), "--parallel", jobs], check=True)
        if not (package / "lib" / LIBRARY).is_file():
            raise SystemExit(f"CMake finished, but {package / 'lib' / LIBRARY} is not there")

    def get_outputs(self) -> list[str]:
        """The one file built."""
        return [str(Path(self.build_lib) / "maskaccel" / "lib" / LIBRARY)]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing is mapped: CMake writes each library where it belongs."""
        return {}


class PlatformWheel(bdist_wheel):
    """Tag `py3-none-<platform>`: the library has no Python in it, so one wheel serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Wheel tag."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


class NativeDistribution(Distribution):
    """Says that the wheel belongs to a platform when it holds the library."""

    def has_ext_modules(self) -> bool:
        """Whether a native library is built."""
        return _wants_native()


setup(
    distclass=NativeDistribution,
    # The name makes setuptools run build_ext; CMake knows the sources.
    ext_modules=[Extension("maskaccel.lib.libmaskaccel", sources=[])] if _wants_native() else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
