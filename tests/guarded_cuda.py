"""Runs tests of the emulated CUDA kernels with every tensor in front of memory that nobody may touch.

    python tests/guarded_cuda.py                                    all tests/test_cuda_emulated*.py
    python tests/guarded_cuda.py tests/test_cuda_emulated.py -k x   or what pytest is to run

On a GPU, an access past a tensor reads another one, or ends the process's use of the device. Here it is a segmentation
fault, with the Python stack of the call. Tensors end with their last 16 bytes, which a kernel may read whole.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import cuda_emulator

TESTS = Path(__file__).resolve().parent


def main() -> int:
    """Exit status of pytest."""
    if why := cuda_emulator.missing():
        print(f"guarded_cuda: no emulation: {why}", file=sys.stderr)
        return 2
    cuda_emulator.build(TESTS.parent / "build" / "emulated")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guarded_memory.so"
        compiler = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(TESTS / "guarded_memory.c"), "-ldl"]
        subprocess.run(compiler, check=True)
        what = sys.argv[1:] or [str(path) for path in sorted(TESTS.glob("test_cuda_emulated*.py"))]
        command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-q", "-p", "no:cacheprovider", *what]
        return subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(library)}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
