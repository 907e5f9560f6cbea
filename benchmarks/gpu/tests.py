"""The tests of kernels, streams, graphs, long tensors and methods (tests/test_gpu_*.py) on this machine's GPU.

An item is one file, or a part of one. Where pytest is missing, the only item says so.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from paths import ROOT
from stage import Context, Record

SECONDS = 280.0
EXPECTED = 40.0
WORKERS = 8  # of pytest-xdist, where it is there: most of a test is host work and compilation
ABSENT = "pytest is not here"
# File, and which of its tests; what other stages do not look at first.
PARTS = {
    "execution cuda": ("test_gpu_execution.py", "cuda"),
    "large cuda": ("test_gpu_large.py", "cuda"),
    "methods": ("test_gpu_methods.py", "cuda"),
    "kernels cuda": ("test_gpu_kernels.py", "cuda"),
    "execution triton": ("test_gpu_execution.py", "triton"),
    "kernels triton": ("test_gpu_kernels.py", "triton"),
    "large triton": ("test_gpu_large.py", "triton"),
    "fuzz": ("test_gpu_fuzz.py", "cuda or triton"),
}


def items(context: Context) -> list[str]:
    """The parts; one of them at the sizes of a CPU for a dry run."""
    if importlib.util.find_spec("pytest") is None:
        return [ABSENT]
    return ["large cpu"] if context.device != "cuda" else list(PARTS)


def run(item: str, context: Context) -> Record:
    """Passed, failed and skipped tests; of those that failed their first lines."""
    if item == ABSENT:
        return {"summary": f"{ABSENT}: add it to requirements/gpu.txt"}
    name, which = PARTS.get(item, ("test_gpu_large.py", "cpu"))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-k", which]
        if context.device == "cuda":
            options += ["-m", "gpu"]
            if importlib.util.find_spec("xdist"):
                options += ["-n", str(WORKERS), "--dist", "loadgroup"]
        call = [sys.executable, "-m", "pytest", *options, str(ROOT / "tests" / name)]
        done = subprocess.run(
            call, capture_output=True, text=True, check=False, env=env, cwd=ROOT, timeout=SECONDS - 10
        )
        found = parsed(report.read_text()) if report.exists() else None
    record: Record = {"seconds": round(time.perf_counter() - begin, 1), "status": done.returncode}
    if found is None:
        return record | {"wrong": {"pytest": (done.stdout + done.stderr).strip()[-1500:]}, "summary": "did not run"}
    wrong: dict[str, str] = dict(found["failures"])
    if done.returncode not in (0, 1):  # 1: tests failed
        wrong["pytest"] = f"ended with {done.returncode}: {done.stderr.strip()[-600:] or done.stdout.strip()[-600:]}"
    return record | found | {"wrong": wrong, "summary": f"{found['passed']} passed, {found['failed']} failed, "
                                                        f"{found['skipped']} skipped"}  # fmt: skip


def parsed(report: str) -> dict[str, Any]:
    """What a JUnit report of pytest says: counts, reasons of skips, the first lines of failures by test, slowest."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": {}, "skips": {}, "slowest": {}}
    times = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        name = case.get("name", "?")
        times[name] = float(case.get("time", 0.0))
        bad = [part for part in case if part.tag in ("failure", "error")]
        skipped = case.find("skipped")
        if bad:
            found["failed"] += 1
            if len(found["failures"]) < 20:
                found["failures"][name] = _first_lines(bad[0])
        elif skipped is not None:
            found["skipped"] += 1
            reason = skipped.get("message", "")
            found["skips"][reason] = found["skips"].get(reason, 0) + 1
        else:
            found["passed"] += 1
    found["slowest"] = dict(sorted(times.items(), key=lambda pair: -pair[1])[:3])
    return found


def _first_lines(failure: ElementTree.Element) -> str:
    """The message of a failure and where it was raised."""
    text = failure.text or ""
    places = re.findall(r"^(\S+\.py:\d+): ", text, re.MULTILINE)
    message = " ".join((failure.get("message") or text).split())[:500]
    return message + (f" ({places[-1]})" if places else "")


def table(records: dict[str, Record]) -> str:
    """Tests by part."""
    lines = ["| tests | passed | failed | skipped |", "|---|---|---|---|"]
    lines += [
        f"| {item} | {r['passed']} | {r['failed']} | {r['skipped']} |" for item, r in records.items() if "passed" in r
    ]
    return "\n".join(lines)
