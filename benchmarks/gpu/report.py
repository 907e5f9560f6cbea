"""Writes docs/performance.md from the result files of `make gpu`: goals, figures, what failed, and what they ran on.

python benchmarks/gpu/report.py [FILE...]     default: benchmarks/results/gpu-*.json
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attention
import stages
from paths import ROOT
from results import read, records
from stage import Target

from benchmarks.attention.page import put

PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
NOTHING = "Nothing has been measured on a GPU yet: there is no result file `benchmarks/results/gpu-*.json`.\n"
TITLES = {
    "ceilings": "Ceilings", "correctness": "Correctness", "micro": "Ops", "attention": "Attention against density",
    "variants": "Variants of kernels", "lists": "Index lists", "host": "Host work", "models": "Models end to end",
    "fashion": "Training and sampling of the example", "tokens": "Token dropping", "sync": "Synchronisation",
    "sanitize": "Sanitizer", "tests": "Tests",
}  # fmt: skip


def goals(found: Mapping[str, Any]) -> Iterator[Target]:
    """The goals of all stages, with what the file holds."""
    for name, plan in stages.STAGES.items():
        module = stages.load(plan)
        if hasattr(module, "targets"):
            yield from module.targets(records(found, name))


def goal_table(targets: Iterable[Target]) -> str:
    """Missed goals first, then those reached; those without a measurement by name alone."""
    rows = sorted(targets, key=lambda target: target.reached is not False)
    count = Counter(target.reached for target in rows)
    lines = [
        f"{count[True]} reached, {count[False]} missed, {count[None]} not measured.", "",
        "| what | goal | measured | |", "|---|---:|---:|---|",
    ]  # fmt: skip
    for target in rows:
        if target.got is not None:
            sign, words = "≤" if target.at_most else "≥", "reached" if target.reached else "**missed**"
            lines.append(
                f"| {target.what} | {sign} {target.goal:g} {target.unit} | {target.got:.3g} {target.unit} | {words} |"
            )
    absent = [target.what for target in rows if target.got is None]
    return "\n".join([*lines, *(["", f"Not measured: {'; '.join(absent)}."] if absent else [])])


def stage_text(name: str, found: Mapping[str, Any]) -> str:
    """The figures of a stage."""
    kept = records(found, name)
    module = stages.load(stages.STAGES[name]) if name in stages.STAGES else None
    if module is not None and hasattr(module, "table"):
        return module.table(kept)
    return "\n".join(["| item | |", "|---|---|", *(f"| {item} | {r.get('summary', '')} |" for item, r in kept.items())])


def troubles(found: Mapping[str, Any]) -> Iterator[str]:
    """A line for everything that failed, was wrong or was left out."""
    for stage, entries in found["stages"].items():
        for item, entry in entries.items():
            if entry["state"] == "failed":
                yield f"- {stage}, {item}: failed: {_line(entry['error'])}"
            elif entry["record"].get("wrong"):
                yield f"- {stage}, {item}: wrong results: {_line(str(entry['record']['wrong']))}"
    for note in found["left_out"]:
        yield f"- {stage_title(note['stage'])}: {len(note['items'])} items not run: {_line(note['why'])}"


def stage_title(name: str) -> str:
    """Heading of a stage."""
    return TITLES.get(name, name.capitalize())


def _line(words: str) -> str:
    return " ".join(words.split())[:240].replace("|", "/")


def device_text(found: Mapping[str, Any], plot: str | None) -> str:
    """Everything about one device."""
    about = found["fingerprint"]
    parts = [f"## {about['device']}", "", "| | |", "|---|---|"]
    parts += [f"| {name} | {value} |" for name, value in about.items() if name != "device"]
    held = Counter(entry["build"] for entries in found["stages"].values() for entry in entries.values())
    old = {build: count for build, count in held.items() if build != about["build"]}
    if old:
        words = ", ".join(f"{n} of {b} (commit {found['builds'][b].get('commit', '?')[:12]})" for b, n in old.items())
        parts += ["", f"Entries of earlier builds, not run again since: {words}."]
    parts += ["", "### Goals", "", goal_table(goals(found))]
    for name in [*TITLES, *(n for n in found["stages"] if n not in TITLES and n != "compile")]:
        if records(found, name):
            parts += ["", f"### {stage_title(name)}", "", stage_text(name, found)]
            if name == "attention" and plot is not None:
                parts += ["", f"![Gain over dense cuDNN against the share of tiles kept]({plot})"]
    trouble = list(troubles(found))
    if trouble:
        parts += ["", "### What went wrong or was left out", "", *trouble]
    return "\n".join(parts) + "\n"


def text(files: Mapping[str, Mapping[str, Any]], plots: Mapping[str, str]) -> str:
    """The measured part of the page, from result files by name."""
    if not files:
        return NOTHING
    return "\n".join(device_text(found, plots.get(name)) for name, found in files.items())


def draw(found: Mapping[str, Any], path: Path) -> bool:
    """Gain against the share of tiles kept, a line for each shape, and the ideal; whether there was any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), dpi=110, sharey=True)
    drawn = False
    for axes, direction in zip(panels, ("forward", "backward"), strict=True):
        for item, record in records(dict(found), "attention").items():
            size, way = item.split()
            gain = record["gain"]
            backend = "cuda" if "cuda 0.5" in gain else "triton"
            points = [(d, gain[f"{backend} {d}"]) for d in attention.DENSITIES if f"{backend} {d}" in gain]
            if way == direction and points:
                axes.plot(*zip(*points, strict=True), marker="o", label=f"{size} ({backend})")
                drawn = True
        axes.plot(attention.DENSITIES, [1 / d for d in attention.DENSITIES], "k--", label="ideal")
        axes.set(title=direction, xscale="log", yscale="log", xlabel="share of tiles kept")
        axes.legend(fontsize=7)
    panels[0].set_ylabel("gain over dense cuDNN")
    figure.tight_layout()
    if drawn:
        figure.savefig(path)
    plt.close(figure)
    return drawn


def main() -> int:
    """Writes the page, and plots where matplotlib is installed."""
    paths = [Path(word) for word in sys.argv[1:]] or sorted(RESULTS.glob("gpu-*.json"))
    files, plots = {path.stem: read(path) for path in paths}, {}
    for name, found in files.items():
        try:
            if draw(found, PAGE.with_name(f"{name}-attention.png")):
                plots[name] = f"{name}-attention.png"
        except ImportError:
            print("no plots: matplotlib is not installed")
    PAGE.write_text(put(PAGE.read_text(encoding="utf-8"), "measured", text(files, plots)), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(files)} devices")
    return 0


if __name__ == "__main__":
    sys.exit(main())
