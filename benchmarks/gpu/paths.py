"""Importing this lets the modules of this folder be found, and those of the tests and benchmarks that they share."""

from __future__ import annotations

import sys
from pathlib import Path

GPU = Path(__file__).resolve().parent
ROOT = GPU.parent.parent
# This folder first: names such as `tokens` are also folders of benchmarks/.
sys.path[:0] = [str(path) for path in (GPU, ROOT, ROOT / "tests", ROOT / "benchmarks")]
