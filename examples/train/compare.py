"""Training without dropping, with TREAD and with SPRINT, at equal compute time on Fashion-MNIST.

    OMP_NUM_THREADS=1 python examples/train/compare.py cost                # CPU seconds of a step, side by side
    OMP_NUM_THREADS=1 python examples/train/compare.py train --method none # and tread, sprint; may run side by side
    OMP_NUM_THREADS=1 python examples/train/compare.py report              # judges the weights, writes figures and plot

Time is CPU time of one thread (`time.process_time`), since other work may share the machine. That work also makes a CPU
second do less, so the budget is counted in steps: `cost` runs a step of every method in turn, and a run has as many
steps as fit into the time of `--units` steps without dropping. The log has the CPU seconds that were really taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import parallel
import torch
from options import Options
from sample import grid, samples
from train_dit import Run, snapshot_path, train

from maskaccel.bench.fingerprint import fingerprint

from classifier import load_classifier  # isort: skip  of the example model
from data import DEFAULT_ROOT, load_split, to_float  # isort: skip
from evaluate import score  # isort: skip

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("none", "tread", "sprint")
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


def judge(path: Path, images: int, real: torch.Tensor) -> dict[str, Any]:
    """Fréchet distance and class accuracy of samples without guidance."""
    found = samples(path, images, steps=20) / 2 + 0.5
    return {k: v for k, v in score(found, load_classifier()[0], real).items() if k != "by_class"} | {"images": images}


def report(out: Path, costs: dict[str, list[float]], units: int, images: int) -> dict[str, Any]:
    """Everything that was measured. Weights are judged at every snapshot."""
    real = load_classifier()[0].judge(to_float(load_split("test", DEFAULT_ROOT)[0]))[1]
    result: dict[str, Any] = {
        "fingerprint": fingerprint(),
        "settings": {k: v for k, v in COMMON.items() if k != "device"} | {"dense_share": DENSE_SHARE, "units": units},
        "cpu_seconds_of_a_step": costs,
        "budget_cpu_seconds": round(units * costs["none"][0], 1),
        "runs": {},
    }
    for method in METHODS:
        steps = steps_of(method, costs, units)
        run = options(out, method, steps=steps)
        points = [point for point in curve(run, costs) if point["step"] <= steps]
        judged = []
        for path in sorted(run.folder.glob("ema-*.pt")):
            step = int(path.stem.partition("-")[2])
            if step <= steps:
                judged.append(
                    {"step": step, "time": round(seconds_at(step, run, costs), 1)} | judge(path, images, real)
                )
        result["runs"][method] = {"steps": steps, "images_seen": steps * run.batch, "curve": points, "judged": judged}
    return result


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
        weights = snapshot_path(options(out, method), run["judged"][-1]["step"])
        rows.append(samples(weights, 20, steps=20, guidance=2.0))
    axes["samples"].imshow(grid(torch.cat(rows), 20), cmap="gray")
    axes["samples"].set_yticks([16 + 32 * i for i in range(len(rows))], list(result["runs"]))
    axes["samples"].set_xticks([])
    axes["samples"].set_title("the same noise and classes at the end of the budget, guidance 2", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "train", "report"))
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the runs")
    parser.add_argument("--method", choices=METHODS, default="none")
    parser.add_argument("--units", type=int, default=600, help="the budget, in steps without dropping")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of cost")
    parser.add_argument("--images", type=int, default=500, help="samples for a Fréchet distance")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/train_compare.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/training.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
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
    draw(result, args.out, args.plot)


if __name__ == "__main__":
    main()
