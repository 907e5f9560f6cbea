"""What the output folder holds, as a compact JSON file, a table in the documentation and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import timing
from .runs import BASELINE, absent, family, is_peer
from .store import Store

BEGIN, END = "<!-- table: made by `python -m benchmarks.caching report` -->", "<!-- end of table -->"

Row = dict[str, Any]


def collect(texts: Sequence[str], store: Store) -> dict[str, Any]:
    """Rows of all runs that were measured, fastest first, and what the rest lacks.

    Raises:
        ValueError: The baseline was not measured.
    """
    base = store.read(BASELINE, "quality.json")
    if base is None:
        raise ValueError(f"{store.folder} holds no baseline: run `python -m benchmarks.caching quality` first")
    rows, left_out, marks = [], {}, []
    commits: set[str] = set()  # of maskaccel's own runs; the others do not depend on it
    for text in texts:
        quality = store.read(text, "quality.json")
        if quality is None:
            left_out[text] = absent(text) or "not measured"
            continue
        marks.append(quality["environment"])
        timed = store.read(text, "timing.json")
        if timed is not None:
            marks.append(timed["environment"])
        if text != BASELINE and not is_peer(text):
            commits.update(str(mark["commit"]) for mark in (quality["environment"], (timed or quality)["environment"]))
        if text != BASELINE:
            rows.append(_row(text, quality, base, timing.summary(timed) if timed is not None else None))
    rows.sort(key=lambda row: speed(row, timed="timing" in row), reverse=True)
    return {
        "setting": store.setting.as_dict(),
        "environment": {
            **{key: base["environment"][key] for key in ("system", "python", "versions", "cpu", "threads", "native")},
            "commits": sorted(commits),
            "from": min(mark["time"] for mark in marks),
            "to": max(mark["time"] for mark in marks),
            "highest_load_average": max(mark["load_average"][0] for mark in marks),
        },
        "baseline": {key: base.get(key) for key in ("class_accuracy", "by_class", "frechet_distance")}
        | {"gflop_per_image": round(base["flops"] / base["images"] / 1e9, 3)},
        "rows": rows,
        "left_out": left_out,
    }


def _row(text: str, quality: Row, base: Row, timed: Row | None) -> Row:
    peak = [part["peak bytes"] for part in quality["reported"].values() if "peak bytes" in part]
    row = {
        "run": text,
        "family": family(text),
        "peer": is_peer(text),
        "compute": round(quality["flops"] / base["flops"], 4),
        "reduced_calls": round(quality["reduced_calls"] / quality["calls"], 4),
        "psnr_db": quality["psnr_db"],
        "class_accuracy": quality["class_accuracy"],
        "accuracy_points": round(100 * (quality["class_accuracy"] - base["class_accuracy"]), 2),
        "by_class": list(quality["by_class"].values()),
        "frechet_distance": quality.get("frechet_distance"),
        "bytes_held": quality["bytes_held"],
        "bytes_reported": sum(peak) if peak else None,
        "repeatable": quality["repeatable"],
    }
    if timed is not None:
        row["timing"] = timed
    return row


def speed(row: Row, *, timed: bool) -> float:
    """The measured speed-up, or the operations saved while some row has no timing."""
    return row["timing"]["speedup"]["median"] if timed else 1 / row["compute"]


def _settings(text: str) -> str:
    """The run without its first name: options, and the methods beside it."""
    return text.removeprefix(family(text)).removeprefix(":").replace("+", " + ").strip()


def table(data: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| method | settings | compute | s / image | speed-up | PSNR mean (lowest) | accuracy | Fréchet | held |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    baseline = data["baseline"]
    timed = [row["timing"] for row in data["rows"] if "timing" in row]
    first = timed[0][f"{timed[0]['clock']}_seconds_{BASELINE}"]["median"] if timed else None
    lines.append(
        f"| *unaccelerated* | | 100 % | {'' if first is None else f'{first:.3f}'} | 1 | | "
        f"{baseline['class_accuracy']:.1%} | {_number(baseline['frechet_distance'])} | 0 |"
    )
    for row in data["rows"]:
        name = row["family"] if row["peer"] else f"**{row['family']}**"
        seconds = ratio_text = ""
        if "timing" in row:
            ratio = row["timing"]["speedup"]
            seconds = f"{row['timing']['seconds']['median']:.3f}"
            ratio_text = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        warning = "" if row["repeatable"] else " (not repeatable)"
        lines.append(
            f"| {name} | {_settings(row['run'])}{warning} | {row['compute']:.1%} | {seconds} | {ratio_text} "
            f"| {row['psnr_db']['mean']:.1f} ({row['psnr_db']['lowest']:.1f}) | {row['accuracy_points']:+.1f} "
            f"| {_number(row['frechet_distance'])} | {_bytes(row['bytes_held'])} |"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _bytes(value: int) -> str:
    return f"{value / 1e6:.1f} MB" if value >= 1e5 else f"{value / 1e3:.0f} kB"


def conditions(data: dict[str, Any]) -> str:
    """How the figures were made, in a paragraph."""
    setting, mark = data["setting"], data["environment"]
    timed = [row["timing"] for row in data["rows"] if "timing" in row]
    seconds = "No timings yet: sorted by compute."
    if timed:
        clock = "processor seconds of the process" if timed[0]["clock"] == "cpu" else "wall-clock seconds"
        rounds = sorted({row["rounds"] for row in timed})
        seconds = (
            f"Seconds are {clock}; the speed-up is the median (least to most) of the ratios of "
            f"{' to '.join(str(n) for n in rounds)} rounds, each a batch of the run beside the same unaccelerated."
        )
    versions = ", ".join(f"{name} {version}" for name, version in mark["versions"].items())
    return (
        f"{setting['images']} images, {setting['steps']} steps, guidance {setting['guidance']:g}, {setting['dtype']}, "
        f"batch {setting['batch']}, seeds from {setting['seed']}. {seconds} "
        f"{mark['cpu']['model']}, {mark['threads']} thread{'s' if mark['threads'] > 1 else ''}, load average up to "
        f"{mark['highest_load_average']:g}; Python {mark['python']}, {versions}; "
        f"maskaccel at {', '.join(mark['commits']) or 'no commit'}."
    )


def as_json(data: dict[str, Any]) -> str:
    """The document with one row a line, so that a changed run is a changed line."""
    head = {key: value for key, value in data.items() if key != "rows"}
    rows = ",\n".join(json.dumps(row) for row in data["rows"])
    return json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n'


def make(texts: Sequence[str], store: Store, results: Path, page: Path) -> dict[str, Any]:
    """Write the JSON file, the table between the two marks of `page`, and the plot beside it.

    Raises:
        ValueError: The baseline was not measured, or `page` has not both marks.
    """
    data = collect(texts, store)
    written = page.read_text() if page.exists() else f"{BEGIN}\n{END}\n"
    before, begin, rest = written.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} must hold the lines {BEGIN!r} and {END!r}: the table goes between them")
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(as_json(data))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{before}{BEGIN}\n{conditions(data)}\n\n{table(data)}\n{END}{after}")
    if data["rows"]:
        from .plot import draw

        try:
            draw(data["rows"], page.with_suffix(".png"))
        except ImportError as error:
            print(f"no plot: {error}")
    for text, reason in data["left_out"].items():
        print(f"{text}: not in the table, {reason}")
    return data
