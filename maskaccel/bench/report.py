"""Results as JSON files and Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .fingerprint import fingerprint
from .runner import COPIES, OURS, Case, Settings

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def document(cases: Iterable[Case], settings: Settings) -> dict[str, Any]:
    """Everything a reader needs to judge the figures."""
    return {
        "fingerprint": fingerprint(),
        "settings": {"rounds": settings.rounds, "min_seconds": settings.min_seconds, "warmup": settings.warmup},
        "notes": [
            "seconds per call: median, 20th and 80th percentile of interleaved rounds with rotated order",
            "bytes: what the op must read and write; of_copy_*: time of a copy of as many bytes / time of the provider",
            "refused: not timed, because ours failed the error rule or another could not run; verdict: the error rule",
        ],
        "cases": [case.as_dict() for case in cases],
    }


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _ours(providers: dict[str, Any]) -> str | None:
    timed = [name for name, entry in providers.items() if name.startswith(OURS) and "median_s" in entry]
    return min(timed, key=lambda name: providers[name]["median_s"]) if timed else None


def markdown(data: dict[str, Any]) -> str:
    """A table of a document: our fastest backend against the others."""
    lines = [
        "| op | shape | dtype | direction | ours (ms) | spread | GB/s | of copy | of copy to new | eager (ms) "
        "| x eager | compile (ms) | x compile |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in data["cases"]:
        providers = case["providers"]
        ours = _ours(providers)
        head = f"| {case['op']} | {'x'.join(map(str, case['shape']))} | {_SHORT.get(case['dtype'], case['dtype'])} "
        head += f"| {case['direction']} "
        if ours is None:
            reasons = [f"{n}: {e['refused']}" for n, e in providers.items() if n.startswith(OURS)]
            lines.append(head + f"| not timed ({'; '.join(reasons) or 'no kernel backend here'}) " + "| " * 8 + "|")
            continue
        mine = providers[ours]
        spread = f"{_milliseconds(mine['p20_s'])} to {_milliseconds(mine['p80_s'])}"
        row = f"| {_milliseconds(mine['median_s'])} ({ours.removeprefix(OURS)}) | {spread} "
        row += f"| {mine['bytes_per_s'] / 1e9:.1f} | {mine['of_copy_into']:.2f} | {mine['of_copy_to_new']:.2f} "
        for other in ("eager", "compile"):
            entry = providers.get(other, {})
            if "median_s" in entry:
                row += f"| {_milliseconds(entry['median_s'])} | {entry['median_s'] / mine['median_s']:.2f} "
            else:
                row += "| | "
        lines.append(head + row + "|")
    mark = data["fingerprint"]
    where = mark["gpus"][0]["name"] if mark["gpus"] else mark["cpu"]["model"]
    versions = ", ".join(f"{name} {version}" for name, version in mark["versions"].items())
    lines += [
        "",
        f"{where}, {mark['threads']} threads, ISA {mark['native']['isa'] or 'none'}, Python {mark['python']}, "
        f"{versions}; commit {mark['commit']}, {mark['time']}. "
        f"Medians of {data['settings']['rounds']} interleaved rounds; "
        'spread: 20th to 80th percentile. "of copy": time of a copy that moves as many bytes into memory that is there '
        'already, divided by our time; "to new": a copy that allocates its output, as our ops do.',
    ]
    return "\n".join(lines) + "\n"


def detail(case: dict[str, Any]) -> str:
    """Every provider of one case, as plain text."""
    head = f"{case['op']} {'x'.join(map(str, case['shape']))} {case['dtype']} {case['direction']} on {case['device']}"
    lines = [
        head,
        f"  {'provider':22} {'median ms':>10} {'p20':>9} {'p80':>9} {'GB/s':>8} {'of copy':>8} {'error':>10}",
    ]
    for name, entry in case["providers"].items():
        if "median_s" not in entry:
            lines.append(f"  {name:22} not timed: {entry['refused']}")
            continue
        times = " ".join(
            f"{entry[key] * 1e3:{width}.4f}" for key, width in (("median_s", 10), ("p20_s", 9), ("p80_s", 9))
        )
        line = f"  {name:22} {times} {entry['bytes_per_s'] / 1e9:8.1f}"
        if name not in COPIES:
            verdict = entry["verdict"]
            line += f" {entry['of_copy_into']:8.2f} {verdict['error']:10.2e}"
            line += "" if verdict["passed"] else f"  (outside the error rule: {verdict['note']})"
        lines.append(line)
    return "\n".join(lines)


def write(data: dict[str, Any], folder: Path, name: str) -> tuple[Path, Path]:
    """Write `name.json` and `name.md`; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    json_path, table_path = folder / f"{name}.json", folder / f"{name}.md"
    json_path.write_text(json.dumps(data, indent=1) + "\n")
    table_path.write_text(markdown(data))
    return json_path, table_path
