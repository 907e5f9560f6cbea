"""Every kernel under NVIDIA's compute-sanitizer: memory accesses, shared memory hazards, barriers, unwritten memory.

An item is one tool over one family of kernels at tiny shapes (`sanitized.py`). The tool comes from PATH, a CUDA toolkit
or a wheel (`make gpu-bundle BUNDLE_ARGS="--sanitizer --data none"`); where there is none, the only item says so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import paths
from stage import Context, Record

SECONDS = 150.0
EXPECTED = 30.0
PARALLEL = 8  # nothing is timed; most of an item is starting Python and instrumenting code
FAMILIES = ("adaln", "steps", "tokens", "attention", "sm90", "triton")
# Which bugs are worst, and which tools are fastest, first.
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
ABSENT = "compute-sanitizer is not here"
# Kernels whose hazards are meant, with the reason.
MEANT = {
    "sample_logits_kernel": "threads raise one shared number without order; any value that any of them wrote is right",
}
PREFIX = "========="
WHEEL = "nvidia/*/compute-sanitizer/compute-sanitizer"  # where its wheel puts it
LIMIT = 200  # reports that the tool prints


def sanitizer() -> str | None:
    """Path of compute-sanitizer."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [shutil.which("compute-sanitizer")]
    places += [str(Path(home) / "bin" / "compute-sanitizer") for home in homes if home]
    places += [str(found) for folder in sys.path for found in Path(folder).glob(WHEEL)]
    return next((place for place in places if place and os.access(place, os.X_OK) and Path(place).is_file()), None)


def items(context: Context) -> list[str]:
    """`TOOL FAMILY`; for a dry run one, whose calls nobody watches."""
    if context.device != "cuda":
        return ["none adaln"]
    if sanitizer() is None:
        return [ABSENT]
    return [f"{tool} {family}" for tool in TOOLS for family in FAMILIES]


def command(tool: str, family: str, log: Path, device: str, seeds: int) -> list[str]:
    """The call of the tool on the program of a family."""
    program = [sys.executable, str(paths.GPU / "sanitized.py"), family, "--device", device, "--seeds", str(seeds)]
    if tool == "none":
        return program
    options = ["--tool", tool, "--print-limit", str(LIMIT), "--log-file", str(log), "--show-backtrace", "no"]
    if tool == "memcheck":
        options += ["--padding", "64"]
    # Others' kernels need no watching, but what they write counts as written.
    if tool != "initcheck" and family != "triton":
        options += ["--kernel-name", "kernel_substring=maskaccel"]
    return [str(sanitizer()), *options, *program]


def run(item: str, context: Context) -> Record:
    """One tool over one family: how many reports, and the first of them."""
    if item == ABSENT:
        return {"summary": f"{ABSENT}: it belongs to a CUDA toolkit, or travels (make gpu-bundle)"}
    tool, family = item.split()
    # Every tensor in an allocation of its own: an access past its end would else fall into the next one.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        seeds = 1 if context.tiny or family == "triton" else 2
        done = subprocess.run(
            command(tool, family, log, context.device, seeds), capture_output=True, text=True, check=False, env=env,
            timeout=SECONDS - 10,
        )  # fmt: skip
        text = log.read_text(errors="replace") if log.exists() else done.stdout
    record: Record = {"seconds": round(time.perf_counter() - begin, 1), **_called(done.stdout)}
    found = {} if tool == "none" else parsed(text)
    wrong = {}
    if done.returncode != 0 and not found.get("errors"):
        wrong["program"] = f"ended with {done.returncode}: {done.stderr.strip()[-600:]}"
    if found:
        record |= found
        if found["problem"]:
            wrong[tool] = found["problem"]
        elif found["reports"]:
            first = found["reports"][0]
            wrong[tool] = f"{_counts(found)}; {first['what']} in {first['kernel']}"
    said = "not watched" if tool == "none" else _counts(found)
    return record | {"wrong": wrong, "summary": f"{record['calls']} calls, {said}"}


def _counts(found: dict[str, Any]) -> str:
    return f"{found['errors']} errors, {found['warnings']} warnings"


def _called(text: str) -> dict[str, Any]:
    """What the program said it called."""
    lines = [line for line in text.splitlines() if line.startswith('{"calls"')]
    return json.loads(lines[-1]) if lines else {"calls": 0, "ops": {}}


KERNEL = re.compile(r"\bat (?:void )?([\w:]+)(?:\(|\+0x|<)")


def parsed(text: str) -> dict[str, Any]:
    """What the tool found.

    Args:
        text: Its log.

    Returns:
        `errors` and `warnings` as the tool counts them, the first `reports`, each with `what`, `kernel` and `details`;
        `meant`: reports of kernels in `MEANT`, by kernel, which are not among them; `problem`: why the tool did not
        come to its end, or None.
    """
    lines = [line.removeprefix(PREFIX) for line in text.splitlines() if line.startswith(PREFIX)]
    total = re.search(r"ERROR SUMMARY: (\d+) errors?", text)
    races = re.search(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)", text)
    errors = int(total[1]) if total else int(races[1]) if races else None
    found: dict[str, Any] = {"errors": errors, "warnings": int(races[2]) if races else 0, "reports": [], "meant": {}}
    blocks: list[list[str]] = []
    for line in lines:
        said = line.strip()
        if not said or "SUMMARY" in said or said == "COMPUTE-SANITIZER":
            continue
        if line.startswith("     ") and blocks:
            blocks[-1].append(said)
        else:
            blocks.append([said])
    for what, *details in blocks:
        named = (KERNEL.search(part.replace("(anonymous namespace)::", "")) for part in (what, *details))
        kernel = next((match[1].split("::")[-1].split()[-1] for match in named if match), "?")
        if kernel in MEANT:
            found["meant"][kernel] = found["meant"].get(kernel, 0) + 1
        elif len(found["reports"]) < 10:
            found["reports"].append({"what": what, "kernel": kernel, "details": details[:4]})
    found["problem"] = None if errors is not None else f"no summary: {' '.join(' '.join(lines).split())[-400:]}"
    return found


def table(records: dict[str, Record]) -> str:
    """Errors by tool and family."""
    lines = ["| family | " + " | ".join(TOOLS) + " |", "|---" * (1 + len(TOOLS)) + "|"]
    for family in FAMILIES:
        cells = []
        for tool in TOOLS:
            record = records.get(f"{tool} {family}")
            cells.append("-" if record is None else "clean" if not record["wrong"] else str(record.get("errors")))
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
