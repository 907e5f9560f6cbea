"""`make gpu`'s script, as far as it runs without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from maskaccel.ops._registry import SPECS

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu" / "run.py"


def test_no_gpu_is_said_in_one_line():
    """Without a device: status 3, one line."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, env=env)
    assert run.returncode == 3, run.stderr
    assert len(run.stdout.splitlines()) == 1 and "no CUDA device" in run.stdout


def test_dry_run(tmp_path):
    """Every step at tiny shapes on the CPU: correctness report, all providers timed, JSON with a fingerprint."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--dry-run", "--seeds", "1", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    record = json.loads(out.read_text())
    assert {"device", "torch", "commit"} <= record["fingerprint"].keys()
    assert set(record["correctness"]["reference"].values()) == {"ok"}
    assert record["correctness"]["reference"].keys() == SPECS.keys(), "an op is not checked (tests/_raw_cases.py)"
    assert {r["op"] for r in record["results"]} == SPECS.keys(), "an op is not timed (maskaccel/bench/registry.py)"
    for case in record["attention"]:
        assert {"sdpa", "reference dense", "reference 0.1"} <= case["median_ms"].keys(), case["refused"]
    assert not [row for row in record["tokens"] if row["what"] == "failed"]
    assert set(record["tokens"][0]["calls"].values()) == {"ok"}
    for result in record["results"]:
        assert {"reference", "copy", "eager", "compile"} <= result["providers"].keys(), result
