"""Steps in part on the trained example at 1,024 tokens: likeness, class accuracy, seconds; a hole filled, an edit.

Three tasks. *Sampling*: the same seeds with a method and without it. *Filling*: a square hole of a tenth of an image
that the model made is filled again, the rest staying as it is; "all tokens" computes every token at every step, with
the rest on its way to the reference, and is what the methods are compared with. *Editing*: the noise of one class
denoised as another, with the image of the first for a reference.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import maskaccel
from maskaccel import methods
from maskaccel.bench.fingerprint import fingerprint
from maskaccel.cli.demo import psnr

from ..attention import page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "fashion"))
SIDE = 20  # pixels of the hole: 10 x 10 of 32 x 32 tokens
OTHER = {0: 6, 1: 3, 2: 4, 3: 1, 4: 2, 5: 7, 6: 0, 7: 9, 8: 5, 9: 7}  # into which class each one is edited


def sampling_methods() -> dict[str, Any]:
    """The methods of the first task by their label."""
    return {
        "RAS()": methods.RAS(dense=(12,), kernel=True),
        "RAS(), torch's attention": methods.RAS(dense=(12,)),
        "RAS(high_fraction=0)": methods.RAS(dense=(12,), high_fraction=0.0, kernel=True),
        "RAS(ratio=0.25, high_fraction=0)": methods.RAS(0.25, dense=(12,), high_fraction=0.0, kernel=True),
        "ToMe(0.5)": methods.ToMe(),
    }


def filling_methods(mask: Tensor, reference: Tensor) -> dict[str, Any]:
    """The methods of the second task; the first is what they are compared with."""
    every = 1024
    found = {"all tokens": methods.LazyDiffusion(mask, reference, None, multiple=every)}
    found |= {
        f"LazyDiffusion(level={level:g})": methods.LazyDiffusion(mask, reference, level, kernel=True)
        for level in (0, 0.6, 0.8, 0.9)
    }
    return found | {
        "LazyDiffusion(), torch's attention": methods.LazyDiffusion(mask, reference),
        "LazyDiffusion(level=None)": methods.LazyDiffusion(mask, reference, None, kernel=True),
        "LazyDiffusion(level=None, refresh=5)": methods.LazyDiffusion(mask, reference, None, 5, kernel=True),
    }


def editing_methods(reference: Tensor) -> dict[str, Any]:
    """The methods of the third task."""
    return {
        "SpotEdit()": methods.SpotEdit(reference, dense=(10, 15), kernel=True),
        "SpotEdit(threshold=0.05)": methods.SpotEdit(reference, 0.05, dense=(10, 15), kernel=True),
        "SpotEdit(fuse=True)": methods.SpotEdit(reference, dense=(10, 15), fuse=True, kernel=True),
    }


class Task:
    """The pipeline, its images, and runs of it beside each other.

    Args:
        weights: Pipeline folder.
        images: Images of a run, in one batch.
        steps: Sampling steps.
        rounds: Times that every run is timed, in turn.
    """

    def __init__(self, weights: Path, images: int, steps: int, rounds: int) -> None:
        from classifier import load_classifier
        from pipeline import FashionPipeline

        self.pipe = FashionPipeline.from_pretrained(weights, local_files_only=True)
        self.pipe.set_progress_bar_config(disable=True)
        self.judge = load_classifier()[0]
        self.images, self.steps, self.rounds = images, steps, rounds
        self.labels = [i % 10 for i in range(images)]
        self.pipe(self.labels, num_inference_steps=1, output_type="pt")  # what the first call alone has to do

    def sample(self, labels: list[int], first: int) -> Tensor:
        """Images `(n, 1, 64, 64)` in 0 to 1."""
        seeds = range(first, first + len(labels))
        return self.pipe(labels, seeds=seeds, num_inference_steps=self.steps, output_type="pt").images

    def accuracy(self, images: Tensor, labels: list[int]) -> float:
        """Share of the images that the classifier, of 32 x 32 pixels, takes for their class."""
        small = F.avg_pool2d(images, images.shape[-1] // 32)
        return float((self.judge.judge(small * 2 - 1)[0] == torch.tensor(labels)).float().mean())

    def timed(self, method: Any, labels: list[int], first: int) -> tuple[Tensor, dict[str, Any]]:
        """A run with a method, or without; its images, wall and processor seconds, and report."""
        if method is None:
            begin, cpu = time.perf_counter(), time.process_time()
            out = self.sample(labels, first)
            return out, {"wall": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
        with maskaccel.patch(self.pipe, method) as patch:
            out, row = self.timed(None, labels, first)
            activity = patch.report().activity[method.name]
        row["steps"] = activity.get("steps", "")
        part = activity.get("tokens in part")
        row["tokens"] = None if part is None else part / activity["tokens in all"]
        row["peak_bytes"] = activity.get("peak bytes", 0)
        return out, row

    def runs(self, chosen: dict[str, Any], labels: list[int], first: int) -> dict[str, tuple[Tensor, dict[str, Any]]]:
        """Every method, and `"dense"` without one, in turn; a round starts with another one than the round before."""
        everyone = {"dense": None, **chosen}
        names, found = list(everyone), {}
        for number in range(self.rounds):
            for name in tqdm(names[number % len(names) :] + names[: number % len(names)], desc=f"round {number}"):
                out, row = self.timed(everyone[name], labels, first)
                if name in found:
                    assert torch.equal(out, found[name][0]), f"{name}: two runs of a seed differ"
                    for clock in ("wall", "cpu"):
                        found[name][1][clock].append(row[clock])
                else:
                    found[name] = out, row | {clock: [row[clock]] for clock in ("wall", "cpu")}
        return found


def likeness(images: Tensor, target: Tensor) -> dict[str, float]:
    """Mean and least PSNR, dB."""
    found = psnr(images, target)
    return {"mean": round(found.mean().item(), 2), "lowest": round(found.min().item(), 2)}


def hole() -> Tensor:
    """The mask of the hole, `(64, 64)`: a square over the middle of the garment."""
    mask = torch.zeros(64, 64)
    mask[22 : 22 + SIDE, 22 : 22 + SIDE] = 1
    return mask


def seam(images: Tensor, mask: Tensor) -> float:
    """Mean difference of neighbours across the border of the hole, over that of neighbours within the image."""
    inside = mask > 0
    across = along = 0.0
    for dim in (-1, -2):
        step = (images.diff(dim=dim)).abs()
        border = inside.diff(dim=dim)
        across += step[..., border].mean().item()
        along += step.mean().item()
    return round(across / along, 3)


def measure(weights: Path, images: int, steps: int, rounds: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All tasks.

    Returns:
        Plain data for JSON, and images by task and method.
    """
    task = Task(weights, images, steps, rounds)
    pictures: dict[str, Tensor] = {}
    data: dict[str, Any] = {"fingerprint": fingerprint(), "settings": {
        "weights": weights.name, "images": images, "steps": steps, "rounds": rounds, "hole_tokens": (SIDE // 2) ** 2,
    }}  # fmt: skip

    def record(name: str, runs: dict[str, tuple[Tensor, dict[str, Any]]], labels: list[int], target: str,
               part: Tensor | None = None) -> None:  # fmt: skip
        rows = []
        for label, (out, row) in runs.items():
            at = slice(22, 22 + SIDE) if part is not None else slice(None)
            like = likeness(out[..., at, at], runs[target][0][..., at, at]) if label != target else None
            row |= {"run": label, "psnr_db": like, "accuracy": task.accuracy(out, labels)}
            if part is not None:
                row["seam"] = seam(out, part)
            rows.append(row)
            pictures[f"{name}/{label}"] = out
        data[name] = rows

    record("sampling", task.runs(sampling_methods(), task.labels, 0), task.labels, "dense")
    whole = task.sample(task.labels, 0)
    latents, mask = whole * 2 - 1, hole()
    pictures["reference"] = whole
    record("filling", task.runs(filling_methods(mask, latents), task.labels, 500), task.labels, "all tokens", mask)
    others = [OTHER[label] for label in task.labels]
    record("editing", task.runs(editing_methods(latents), others, 0), others, "dense")
    return data, pictures


def table(rows: list[dict[str, Any]]) -> str:
    """The figures of one task as Markdown."""
    dense = next(row for row in rows if row["run"] == "dense")
    has_seam = "seam" in dense
    head = "| run | steps | tokens in part | PSNR, dB: mean, lowest | class accuracy |"
    head += " seam |" if has_seam else ""
    head += " seconds | speed-up | state, MiB |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for row in rows:
        like = row["psnr_db"]
        shown = "" if like is None else f"{like['mean']:.1f}, {like['lowest']:.1f}"
        share = row.get("tokens")
        speed = statistics.median(a / b for a, b in zip(dense["wall"], row["wall"], strict=True))
        cells = [row["run"], f"`{row['steps']}`" if row.get("steps") else "", "" if share is None else f"{share:.1%}",
                 shown, f"{row['accuracy']:.0%}", *([f"{row['seam']:.2f}"] if has_seam else []),
                 f"{statistics.median(row['wall']):.2f}", f"{speed:.2f}x",
                 f"{row.get('peak_bytes', 0) / 2**20:.1f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(pictures: dict[str, Tensor], path: Path, images: int = 8) -> None:
    """A row of images for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = {name: out[:images] for name, out in pictures.items()}
    columns = min(images, next(iter(rows.values())).shape[0])
    figure, axes = plt.subplots(len(rows), 1, figsize=(0.75 * columns + 3.6, 0.75 * len(rows)), dpi=100)
    for ax, (name, out) in zip(axes, rows.items(), strict=True):
        ax.imshow(torch.cat(list(out[:, 0]), 1), cmap="gray", vmin=0, vmax=1)
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
        ax.set_xticks([])
        ax.set_yticks([])
    figure.subplots_adjust(left=3.5 / (0.75 * columns + 3.6), right=0.99, bottom=0.01, top=0.99, hspace=0.02)
    figure.savefig(path)
    plt.close(figure)


def run(weights: Path, images: int, steps: int, rounds: int, out: Path, docs: Path) -> None:
    """Measure, and write `token_regions.json`, the tables of the page and its picture."""
    data, pictures = measure(weights, images, steps, rounds)
    out.mkdir(parents=True, exist_ok=True)
    (out / "token_regions.json").write_text(json.dumps(data, indent=1) + "\n")
    for name in ("sampling", "filling", "editing"):
        page.update(docs / "partial-tokens.md", name, table(data[name]))
        print(name, table(data[name]), sep="\n")
    draw(pictures, docs / "partial-tokens.png")
