"""Training without dropping, with TREAD and with SPRINT, at equal compute time on Fashion-MNIST.

    OMP_NUM_THREADS=1 python examples/train/compare.py cost                # CPU seconds of a step, side by side
    OMP_NUM_THREADS=1 python examples/train/compare.py train --method none # and tread, sprint; may run side by side
    OMP_NUM_THREADS=1 python examples/train/compare.py judge --method none # samples and scores; report does it too
    OMP_NUM_THREADS=1 python examples/train/compare.py report              # figures and plot

Time is CPU time of one thread (`time.process_time`), since other work may share the machine. That work also makes a CPU
second do less, so the budget is counted in steps: `cost` runs a step of every method in turn, and a run has as many
steps as fit into the time of `--units` steps without dropping. The log has the CPU seconds that were really taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import parallel
import torch
from objective import loss
from options import DTYPES, Options
from sample import grid, load, samples
from sources import FashionImages, held_out
from train_dit import Run, snapshot_path, train

from maskaccel.bench.fingerprint import fingerprint

from classifier import load_classifier  # isort: skip  of the example model
from data import DEFAULT_ROOT, load_split, to_float  # isort: skip
from evaluate import score  # isort: skip

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
from benchmarks.attention import page  # noqa: E402  isort: skip  the tables of pages

METHODS = ("none", "tread", "sprint")
SAMPLING_STEPS, HELD_OUT = 10, 256
BUDGET_SLACK = 1.02  # snapshots are not taken at the very step
DENSE_SHARE = {"none": 0.0, "tread": 0.0, "sprint": 0.2}  # SPRINT's second stage; TREAD's paper has none
COMMON = {
    "width": 192,
    "depth": 10,
    "heads": 6,
    "batch": 32,
    "dtype": "bf16",
    "ema": 0.99,
    "cooldown": 0.0,  # a constant rate after the warm-up, so that runs can be compared at any time
    "eval_every": 50,
    "log_every": 10,
    "device": "cpu",
}


def options(out: Path, method: str, **changes: Any) -> Options:
    return Options(folder=out / method, method=method, dense_share=DENSE_SHARE[method], **COMMON, **changes)


# ------------------------------------------------------------------------------------------------------------ cost
def cost(out: Path, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of a step `[before, within]` the dense stage, medians of rounds in which every kind has a turn."""
    runs: dict[tuple[str, bool], Run] = {}
    with parallel.ranks("cpu") as where:
        for method in METHODS:
            plain = options(out, method, steps=1000)
            runs[method, False] = Run(replace(plain, dense_share=0.0), where)
            if DENSE_SHARE[method]:
                runs[method, True] = Run(replace(plain, dense_share=1.0), where)
        batches = {key: run.batches() for key, run in runs.items()}
        taken: dict[tuple[str, bool], list[float]] = {key: [] for key in runs}
        for _ in range(rounds + 1):
            for key, run in runs.items():
                batch = next(batches[key])
                begin = time.process_time()
                run.step(batch)
                taken[key].append(time.process_time() - begin)
    median = {key: statistics.median(values[1:]) for key, values in taken.items()}
    return {m: [median[m, False], median.get((m, True), median[m, False])] for m in METHODS}


def steps_of(method: str, costs: dict[str, list[float]], units: int) -> int:
    """Steps of a method that take the time of `units` steps without dropping."""
    masked, dense = costs[method]
    share = DENSE_SHARE[method]
    return round(units * costs["none"][0] / ((1 - share) * masked + share * dense))


def seconds_at(step: int, run: Options, costs: dict[str, list[float]]) -> float:
    """CPU seconds of the first `step` steps, at the cost that was measured side by side."""
    masked, dense = costs[run.method]
    before = min(step, run.dense_from)
    return before * masked + (step - before) * dense


# ---------------------------------------------------------------------------------------------------------- report
def curve(run: Options, costs: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Losses of the averaged weights on held-out images, by step and time; training losses where they were logged."""
    points: dict[int, dict[str, Any]] = {}
    for line in (run.folder / "log.jsonl").read_text().splitlines():
        record = json.loads(line)  # a resumed run tells some steps again
        point = points.setdefault(record["step"], {"step": record["step"]})
        point |= {k: record[k] for k in ("loss", "eval_loss", "cpu_seconds") if k in record}
    for point in points.values():
        point["time"] = round(seconds_at(point["step"], run, costs), 1)
    return [points[step] for step in sorted(points)]


def real_features() -> torch.Tensor:
    """Of the test images, which Fréchet distances are measured to."""
    return load_classifier()[0].judge(to_float(load_split("test", DEFAULT_ROOT)[0]))[1]


@torch.no_grad()
def judge(path: Path, images: int, real: torch.Tensor) -> dict[str, Any]:
    """Held-out loss, Fréchet distance and class accuracy of weights; kept beside them, since it takes long."""
    file = path.with_name(f"{path.stem}-{images}.json")
    if not file.is_file():
        objective, run = load(path)
        parts = held_out(FashionImages(DEFAULT_ROOT, "test"), HELD_OUT).split(4)
        with torch.autocast("cpu", DTYPES[run.dtype], enabled=DTYPES[run.dtype] is not None):
            losses = torch.cat([loss(objective, part) for part in parts])
        found = samples(path, images, steps=SAMPLING_STEPS) / 2 + 0.5
        scores = score(found, load_classifier()[0], real)
        scores.pop("by_class")
        file.write_text(json.dumps({"loss": round(losses.mean().item(), 6)} | scores | {"images": images}) + "\n")
    return json.loads(file.read_text())


def snapshots(run: Options) -> list[tuple[int, Path]]:
    """Steps and files of the weights that were kept."""
    return [(int(path.stem.partition("-")[2]), path) for path in sorted(run.folder.glob("ema-*.pt"))]


def report(out: Path, costs: dict[str, list[float]], units: int, images: int) -> dict[str, Any]:
    """Everything that was measured; the weights of every snapshot are judged."""
    real, budget = real_features(), units * costs["none"][0]
    result: dict[str, Any] = {
        "fingerprint": fingerprint(),
        "settings": {k: v for k, v in COMMON.items() if k != "device"},
        "cpu_seconds_of_a_step": costs,
        "budget_cpu_seconds": round(budget, 1),
        "runs": {},
    }
    for method in METHODS:
        planned = torch.load(snapshots(options(out, method))[-1][1], weights_only=True)["steps"]
        run = options(out, method, steps=planned)
        judged = []
        for step, path in snapshots(run):
            at = {"step": step, "time": round(seconds_at(step, run, costs), 1)}
            judged.append(at | judge(path, images, real))
        result["runs"][method] = {"dense_from": run.dense_from, "curve": curve(run, costs), "judged": judged}
    return result


def within(run: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The last weights of a run within the budget."""
    return [at for at in run["judged"] if at["time"] <= BUDGET_SLACK * result["budget_cpu_seconds"]][-1]


def table(result: dict[str, Any]) -> str:
    """All weights that were judged, by time, as a table of Markdown; those at the end of the budget in bold."""
    lines = [
        "| CPU s | method | steps | images | held-out loss | Fréchet distance | class accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [(at["time"], method, at) for method, run in result["runs"].items() for at in run["judged"]]
    for seconds, method, at in sorted(rows, key=lambda row: row[0]):
        mark = "**" if at == within(result["runs"][method], result) else ""
        images = at["step"] * result["settings"]["batch"]
        lines.append(
            f"| {seconds:.0f} | {mark}{method}{mark} | {at['step']} | {images:,} | {at['loss']:.3f} | "
            f"{at['frechet_distance']:.1f} | {at['class_accuracy']:.1%} |"
        )
    return "\n".join([*lines, ""])


def cost_table(result: dict[str, Any]) -> str:
    """CPU seconds of a step, as a table of Markdown."""
    costs = result["cpu_seconds_of_a_step"]
    lines = ["| method | CPU s of a step | of a step without dropping | in the dense stage |", "|---|---|---|---|"]
    for method, (masked, dense) in costs.items():
        last = f"{dense / costs['none'][0]:.2f}" if DENSE_SHARE[method] else ""
        lines.append(f"| {method} | {masked:.2f} | {masked / costs['none'][0]:.2f} | {last} |")
    return "\n".join([*lines, ""])


def draw(result: dict[str, Any], out: Path, path: Path) -> None:
    """Losses and distances over time, and samples of the last weights with guidance 2.

    Raises:
        ImportError: matplotlib is not installed (`requirements/bench.txt`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplot_mosaic([["loss", "distance"], ["samples", "samples"]], figsize=(10, 7), dpi=110)
    for method, run in result["runs"].items():
        losses = [(p["time"], p["eval_loss"]) for p in run["curve"] if "eval_loss" in p]
        axes["loss"].plot(*zip(*losses, strict=True), marker="o", markersize=3, label=method)
        distances = [(p["time"], p["frechet_distance"]) for p in run["judged"]]
        axes["distance"].plot(*zip(*distances, strict=True), marker="o", label=method)
    for name, label in (("loss", "held-out loss, averaged weights"), ("distance", "Fréchet distance, no guidance")):
        axes[name].set(xlabel="CPU seconds of training (steps x measured cost)", ylabel=label, yscale="log")
        axes[name].grid(alpha=0.25, which="both")
        axes[name].legend()
    rows = []
    for method, run in result["runs"].items():
        weights = snapshot_path(options(out, method), within(run, result)["step"])
        rows.append(samples(weights, 10, steps=SAMPLING_STEPS, guidance=2.0))
    axes["samples"].imshow(grid(torch.cat(rows), 10), cmap="gray")
    axes["samples"].set_yticks([16 + 32 * i for i in range(len(rows))], list(result["runs"]))
    axes["samples"].set_xticks([])
    axes["samples"].set_title("the same noise and classes at the end of the budget, guidance 2", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "train", "judge", "report"))
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the runs")
    parser.add_argument("--method", choices=METHODS, default="none")
    parser.add_argument("--units", type=int, default=600, help="the budget, in steps without dropping")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of cost")
    parser.add_argument("--images", type=int, default=200, help="samples for a Fréchet distance")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/train_compare.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/training.md", help="page with the table")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/training.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "judge":
        real = real_features()
        for step, path in reversed(snapshots(options(args.out, args.method))):
            print(args.method, step, judge(path, args.images, real))
        return
    file = args.out / "cost.json"
    if args.what == "cost":
        args.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(cost(args.out, args.rounds), indent=1) + "\n")
        print(file.read_text())
        return
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: run `compare.py cost` first")
    costs = json.loads(file.read_text())
    if args.what == "train":
        steps = steps_of(args.method, costs, args.units)
        train(options(args.out, args.method, steps=steps, snapshot_every=-(-steps // 4), resume=args.resume))
        return
    result = report(args.out, costs, args.units, args.images)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    for mark, text in (("compare", table(result)), ("costs", cost_table(result))):
        page.update(args.page, mark, text)
    draw(result, args.out, args.plot)


if __name__ == "__main__":
    main()
