"""Runs `triton_interpreted*.py`: the Triton kernels under Triton's interpreter.

TRITON_INTERPRET is read when a kernel is defined and changes which backends a process has, hence one of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
def test_kernels_under_the_interpreter() -> None:
    options = ["-q", "-x", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, sorted(HERE.glob("triton_interpreted*.py")))]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "2"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_importing_does_not_need_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from maskaccel.ops import _registry\n"
        "from maskaccel.ops.adaln import triton as a; from maskaccel.ops.steps import triton as s\n"
        "from maskaccel.ops.attention import triton as t; from maskaccel.ops.tokens import triton as k\n"
        "assert {*a.KERNELS, *s.KERNELS, *t.KERNELS, *k.KERNELS} == set(_registry.SPECS), set(_registry.SPECS)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
