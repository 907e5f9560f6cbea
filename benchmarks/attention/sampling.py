"""Methods of sparse attention on the trained example at 1,024 tokens: tiles by step, likeness, seconds, bytes.

Every method samples the same seeds as the unpatched model, in turn with it, batch by batch.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import maskaccel
from maskaccel import calibration, methods
from maskaccel.bench.fingerprint import fingerprint
from maskaccel.methods._attention import SparseAttention, kept_by_step, policies_of

from . import page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "fashion"))
BLOCK = (64, 64)


def planned(thresholds: str | None) -> dict[str, Any]:
    """The methods by their label."""
    lite = {f"LiteAttention({t:g})": methods.LiteAttention(float(t), block=BLOCK) for t in (-10, -4, -2, -1, 0)}
    if thresholds is not None:
        lite["LiteAttention, calibrated"] = methods.LiteAttention(thresholds=thresholds, block=BLOCK)
    for t in (-10, -7, -6):
        method = methods.LiteAttention(float(t), block=BLOCK, order_independent=True)
        lite[f"LiteAttention({t:g}), by lse"] = method
    return lite | {
        "Rettention()": methods.Rettention(block=BLOCK),
        "SlidingTile(3 x 3 tiles of 8 x 8)": methods.SlidingTile((3, 3), tile=(8, 8), dense_steps=4),
        "SpargeAttn(cdf=0.9)": methods.SpargeAttn(cdf=0.9, similarity=0.3, block=BLOCK, dense_steps=4),
        "XAttention(tau=0.9)": methods.XAttention(tau=0.9, block=BLOCK, dense_steps=4),
        "DraftAttention(0.5)": methods.DraftAttention(0.5, patch=(8, 8), dense_steps=4),
        "CLEAR(radius=8)": methods.CLEAR(radius=8, patch=(8, 8), block=BLOCK, dense_steps=4),
    }


def measure(weights: Path, images: int, batch: int, steps: int, dtype: str, error: float) -> dict[str, Any]:
    """All methods.

    Args:
        weights: Pipeline folder.
        images: Images of each method.
        batch: Images of a batch; both branches of guidance are one call of the model.
        steps: Sampling steps.
        dtype: Precision of the transformer.
        error: Error that the thresholds are calibrated for.

    Returns:
        Plain data for JSON.
    """
    from pipeline import FashionPipeline

    pipe = FashionPipeline.from_pretrained(weights, local_files_only=True)
    torch.nn.Module.to(pipe.transformer, getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)

    def sample(first: int, count: int) -> torch.Tensor:
        labels = [i % 10 for i in range(first, first + count)]
        return pipe(labels, seeds=range(first, first + count), num_inference_steps=steps, output_type="pt").images

    with calibration.measure(pipe, "skip", error=error, rows=BLOCK[0], columns=BLOCK[1]) as found:
        sample(10_000, batch)
    file = ROOT / "build" / "skip.json"
    file.parent.mkdir(exist_ok=True)
    found.result().save(file)

    results = []
    for label, method in tqdm(planned(str(file)).items(), desc="methods", unit="method"):
        row: dict[str, Any] = {"method": label, "dense_s": [], "sparse_s": [], "psnr_db": []}
        for first in range(0, images, batch):
            begin = time.perf_counter()
            dense = sample(first, batch)
            middle = time.perf_counter()
            row["dense_s"].append(middle - begin)
            with maskaccel.patch(pipe, method) as patch:
                sparse = sample(first, batch)
                row["sparse_s"].append(time.perf_counter() - middle)
                row |= _counted(pipe.transformer, patch, method)
                again = sample(first, batch) if first == 0 else None
            if again is not None:
                row["same_twice"] = bool(torch.equal(sparse, again))
            error_of = (sparse - dense).square().mean((1, 2, 3)).clamp(min=1e-12)
            row["psnr_db"] += (-10 * error_of.log10()).tolist()
        results.append(row)
    settings = {
        "weights": weights.name,
        "images": images,
        "batch": batch,
        "steps": steps,
        "dtype": dtype,
        "block": BLOCK,
    }
    return {"fingerprint": fingerprint(), "settings": settings | {"calibrated_error": error}, "methods": results}


def _counted(model: torch.nn.Module, patch: maskaccel.Patch, method: SparseAttention) -> dict[str, Any]:
    steps = kept_by_step(policies_of(model))
    activity = patch.report().activity[method.name]
    return {
        "kept_by_step": [kept / tiles for kept, tiles in steps.values()],
        "dense_calls": activity["dense calls"],
        "sparse_calls": activity["sparse calls"],
        "peak_bytes": activity.get("peak bytes", 0),
    }


def table(data: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| method | tiles computed | in the last step | PSNR, dB: mean, lowest | speed-up of sampling | state, KiB "
        "| same seed twice |",
        "|---" * 7 + "|",
    ]
    for row in data["methods"]:
        kept = row["kept_by_step"]
        share = row["sparse_calls"] / (row["sparse_calls"] + row["dense_calls"])
        total = statistics.mean(kept) * share + 1 - share
        speed = statistics.median(row["dense_s"]) / statistics.median(row["sparse_s"])
        lines.append(
            f"| {row['method']} | {total:.1%} | {kept[-1]:.1%} | {statistics.mean(row['psnr_db']):.1f}, "
            f"{min(row['psnr_db']):.1f} | {speed:.2f}x | {row['peak_bytes'] / 1024:.0f} | "
            f"{'equal' if row['same_twice'] else 'DIFFERS'} |"
        )
    return "\n".join(lines) + "\n"


def draw(data: dict[str, Any], path: Path) -> None:
    """Share of tiles computed by step, for LiteAttention."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(7.5, 4.5), dpi=110)
    for row in data["methods"]:
        if row["method"].startswith("LiteAttention"):
            label = f"{row['method']}: {statistics.mean(row['psnr_db']):.1f} dB"
            ax.plot([100 * share for share in row["kept_by_step"]], "o-", markersize=3, label=label)
    ax.set(xlabel="step", ylabel="tiles computed, %", ylim=(0, 102))
    ax.grid(alpha=0.25)
    ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def run(weights: Path, images: int, batch: int, steps: int, dtype: str, error: float, out: Path, docs: Path) -> None:
    """Measure, and write `attention_sampling.json`, the table of the page and its picture."""
    data = measure(weights, images, batch, steps, dtype, error)
    out.mkdir(parents=True, exist_ok=True)
    (out / "attention_sampling.json").write_text(json.dumps(data, indent=1) + "\n")
    page.update(docs / "attention-speed.md", "sampling", table(data))
    draw(data, docs / "attention-sampling.png")
    print(table(data))
