"""The example trained larger on this device: without dropping, with TREAD and with SPRINT, each for the same time.

    python benchmarks/gpu/fashion.py --method TREAD --seconds 100            # one run, as an item of `make gpu`
    python benchmarks/gpu/fashion.py --method TREAD --seconds 300 --resume   # goes on from its checkpoint

The network is that of examples/fashion, deeper and at 64 pixels: 1,024 tokens. A run has as many steps as fit into the
time by the cost of a step, measured before. Read from the environment:

* MASKACCEL_FASHION_DATA: folder of the images;
* MASKACCEL_FASHION_SECONDS: of training in an item of `make gpu` (100);
* MASKACCEL_FASHION_OUT: where samples and weights go (build/gpu-fashion, where the runs are kept too).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paths
import torch
from stage import Context, Record

DENSE_SHARE = {"none": 0.0, "TREAD": 0.0, "SPRINT": 0.2}  # SPRINT's second stage; TREAD's paper has none
TRAINING_SECONDS = float(os.environ.get("MASKACCEL_FASHION_SECONDS") or 100)
SECONDS = 2 * TRAINING_SECONDS + 150  # compiling and judging come on top
EXPECTED = TRAINING_SECONDS + 50
RUNS = paths.ROOT / "build" / "gpu-fashion"
OUT = Path(os.environ.get("MASKACCEL_FASHION_OUT") or RUNS)
_LARGE = {
    "size": 64,
    "patch": 2,
    "width": 160,
    "depth": 11,
    "heads": 5,
    "batch": 128,
    "warmup": 100,
    "eval_images": 1024,
}
_TINY = {"size": 32, "patch": 8, "width": 32, "depth": 6, "heads": 2, "batch": 4, "warmup": 2, "eval_images": 4}
_COMMON = {"network": "dit", "dtype": "bf16", "ema": 0.995, "cooldown": 0.3, "resident": True}


def items(context: Context) -> list[str]:
    """The methods."""
    return list(DENSE_SHARE)


def run(item: str, context: Context) -> Record:
    """One training; it goes on where an earlier one was ended before its time."""
    if importlib.util.find_spec("diffusers") is None:
        return {"skipped": "no diffusers", "summary": "skipped: no diffusers"}
    folder = RUNS / ("tiny" if context.tiny else "") / item
    out = folder.parent if context.tiny else OUT
    return trained(item, 0.5 if context.tiny else TRAINING_SECONDS, folder, out, context, unfinished(folder))


def warm(item: str, context: Context) -> Record:
    """Compiles what the item will compile: a step of fewer blocks has the same graphs."""
    if importlib.util.find_spec("diffusers") is None:
        return {}
    _examples()
    import parallel
    from data import DEFAULT_ROOT
    from train_dit import Run

    if not (DEFAULT_ROOT / "train-images-idx3-ubyte.gz").is_file():
        return {}
    begin = time.perf_counter()
    make = _options(item, RUNS, context, steps=1000)
    with parallel.ranks(context.device) as where:
        one = Run(make(depth=6, eval_every=0), where)
    one.step(next(iter(one.batches())))
    _wait(context)
    return {"seconds": round(time.perf_counter() - begin, 2)}


def unfinished(folder: Path) -> bool:
    """Whether a run was ended before its last step."""
    return (folder / "plan.json").is_file() and not (folder / "result.json").is_file()


def _examples() -> None:
    for name in ("train", "fashion"):
        path = str(paths.ROOT / "examples" / name)
        if path not in sys.path:
            sys.path.append(path)


def trained(method: str, seconds: float, folder: Path, out: Path, context: Context, resume: bool) -> Record:
    """Train for so long in the folder of the run, judge what came out, and write samples and weights into another."""
    _examples()
    from train_dit import train

    plan_file, result_file = folder / "plan.json", folder / "result.json"
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        costs = json.loads(plan_file.read_text())["seconds_of_a_step"] if resume else _costs(method, folder, context)
    except FileNotFoundError as missing:  # the images
        return {"skipped": str(missing), "summary": f"skipped: {missing}"}
    result_file.unlink(missing_ok=True)
    share = DENSE_SHARE[method]
    steps = max(8, round(seconds / ((1 - share) * costs[0] + share * costs[1])))
    folder.mkdir(parents=True, exist_ok=True)
    plan_file.write_text(json.dumps({"seconds_of_a_step": costs, "steps": steps}) + "\n")
    make = _options(method, folder, context, steps)
    checkpoint = folder / "checkpoint.pt"
    done = torch.load(checkpoint, map_location="cpu", weights_only=True)["step"] if checkpoint.is_file() else 0
    if done < steps:
        train(make(resume=done > 0))
    record = _judged(method, folder, out, context) | {"seconds_of_a_step": costs, "planned_seconds": seconds}
    result_file.write_text(json.dumps(record, indent=1) + "\n")
    return record


def _options(method: str, folder: Path, context: Context, steps: int) -> Callable[..., Any]:
    """What makes the options of a run, given what is to differ."""
    from options import Options

    often = max(1, steps // 12)

    def make(**changes: Any) -> Options:
        settings = {
            "folder": folder, "method": method.lower(), "dense_share": DENSE_SHARE[method], "steps": steps,
            "log_every": often, "eval_every": often, "save_every": -(-steps // 4),
            "snapshot_every": -(-steps // 4), "device": context.device, "compile": context.device == "cuda",
            **_COMMON, **(_TINY if context.tiny else _LARGE),
        }  # fmt: skip
        return Options(**(settings | changes))

    return make


def _costs(method: str, folder: Path, context: Context) -> list[float]:
    """Seconds of a step `[before, within]` the dense stage, after steps that compile."""
    import parallel
    from train_dit import Run

    warm, measured = (2, 2) if context.tiny else (5, 20)
    make = _options(method, folder, context, steps=1000)
    found = []
    for share in (0.0, 1.0)[: 2 if DENSE_SHARE[method] else 1]:
        with parallel.ranks(context.device) as where:
            one = Run(make(dense_share=share, eval_every=0), where)
        for step, batch in zip(range(warm + measured), one.batches(), strict=False):
            if step == warm:
                _wait(context)
                begin = time.perf_counter()
            one.step(batch)
        _wait(context)
        found.append((time.perf_counter() - begin) / measured)
    return [found[0], found[-1]]


def _wait(context: Context) -> None:
    if context.device == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------------- judging
def _judged(method: str, folder: Path, out: Path, context: Context) -> Record:
    """Curves of loss and Fréchet distance, and the files of samples and weights."""
    from sample import grid, samples

    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    curve: dict[int, dict[str, Any]] = {}
    for line in lines:  # a resumed run tells some steps again
        curve.setdefault(line["step"], {}).update(line)
    last = curve[max(curve)]
    judge, sampling = _Judge(context), {"steps": 3 if context.tiny else 20, "batch": 250, "device": context.device}
    judged = []
    for path in sorted(folder.glob("ema-*.pt")):
        step = int(path.stem.partition("-")[2])
        images = samples(path, judge.count, **sampling)
        judged.append({"step": step, "seconds": curve.get(step, {}).get("seconds")} | judge(images))
    out.mkdir(parents=True, exist_ok=True)
    picture, weights = (out / f"fashion-{method}.{kind}" for kind in ("png", "safetensors"))
    shown = samples(path, 40, guidance=2.0, **sampling)
    grid(shown, 10).save(picture)
    _export(path, weights)
    final = judged[-1]
    return {
        "method": method, "steps": last["step"], "seconds": last["seconds"], "sizes": _TINY if context.tiny else _LARGE,
        "images_per_second": last["images_per_second"], "peak_memory_mib": last["peak_memory_mib"],
        "curve": list(curve.values()), "judged": judged, "files": [str(picture), str(weights)],
        "summary": f"{last['step']} steps in {last['seconds']:.0f} s, held-out loss {last['eval_loss']:.4f}, "
                   f"Fréchet distance {final['frechet_distance']:.1f}, accuracy {final['class_accuracy']:.1%}",
    }  # fmt: skip


class _Judge:
    """Class accuracy and Fréchet distance by the example's classifier, which sees 32 pixels."""

    def __init__(self, context: Context) -> None:
        from classifier import load_classifier
        from data import DEFAULT_ROOT, load_split, to_float

        self.count, self.device = 20 if context.tiny else 500, context.device
        self.classifier = load_classifier()[0].to(self.device)
        real = to_float(load_split("test", DEFAULT_ROOT)[0])[: 50 if context.tiny else None]
        self.real = self.classifier.judge(real.to(self.device))[1].cpu()

    def __call__(self, images: torch.Tensor) -> dict[str, float]:
        """Of images `(n, 1, size, size)` in -1..1, the i-th of class i mod 10."""
        from evaluate import frechet_distance

        small = torch.nn.functional.adaptive_avg_pool2d(images, 32).to(self.device)
        predicted, features = self.classifier.judge(small)
        right = predicted.cpu() == torch.arange(len(images)) % 10
        return {
            "images": len(images), "class_accuracy": right.double().mean().item(),
            "frechet_distance": frechet_distance(features.cpu(), self.real),
        }  # fmt: skip


def _export(path: Path, target: Path) -> None:
    """The averaged weights in fp16, with the network's configuration and what was trained in the metadata."""
    from safetensors.torch import save_file
    from sample import load

    objective, options = load(path)
    facts = {"config": json.dumps(dict(objective.network.config), default=str), "method": options.method}
    parameters = objective.named_parameters()
    save_file({name: p.detach().half().contiguous() for name, p in parameters}, target, facts)


def table(records: dict[str, Record]) -> str:
    """The runs as Markdown."""
    lines = [
        "| method | ms a step | steps | training, s | images/s | held-out loss | Fréchet distance | class accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, record in records.items():
        if "curve" not in record:
            continue
        final = record["judged"][-1]
        lines.append(
            f"| {name} | {record['seconds_of_a_step'][0] * 1e3:.1f} | {record['steps']} | {record['seconds']:.0f} | "
            f"{record['images_per_second']:.0f} | {record['curve'][-1]['eval_loss']:.4f} | "
            f"{final['frechet_distance']:.1f} | {final['class_accuracy']:.1%} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """One run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=tuple(DENSE_SHARE), default="none")
    parser.add_argument("--seconds", type=float, default=TRAINING_SECONDS, help="of training in all")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the runs")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of samples and weights")
    parser.add_argument("--resume", action="store_true", help="go on from the run that is there")
    parser.add_argument("--tiny", action="store_true", help="sizes of a dry run, on the CPU")
    args = parser.parse_args()
    context = Context(device="cpu" if args.tiny else "cuda", tiny=args.tiny)
    print(trained(args.method, args.seconds, args.runs / args.method, args.out, context, args.resume)["summary"])


if __name__ == "__main__":
    main()
