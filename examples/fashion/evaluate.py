"""Score samples of the example model: class accuracy, Fréchet distance, PSNR to the unpatched run, seconds.

    python examples/fashion/evaluate.py --images 200                                   # the model as it is
    python examples/fashion/evaluate.py --run none --run FORA:interval=3+FusedAdaLN    # the same seeds, patched
    python examples/fashion/evaluate.py --compare a.safetensors b.safetensors          # PSNR of two saved runs

Each `--run` names methods of `maskaccel.methods`, joined by `+`, with their arguments after `:`. Image i has class
i mod 10 and seed `--seed` + i in every run. The Fréchet distance is one between Gaussians fitted to the penultimate
features of the example's own classifier, samples against the real test split; it can be compared between runs of the
same number of images only, and not with figures made from Inception features.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from classifier import FashionClassifier, load_classifier
from data import CLASSES, DEFAULT_ROOT, load_split, to_float
from pipeline import FashionPipeline
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import maskaccel
from maskaccel import masks, methods, state
from maskaccel.cli.demo import psnr

WEIGHTS = Path(__file__).parent / "weights"
PARTS = {name: getattr(package, name) for package in (masks, state) for name in package.__all__}


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Squared Fréchet distance of two Gaussians fitted to features `(n, d)` and `(m, d)`."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be (n, d) and (m, d) with n, m >= 2, got {tuple(a.shape)}, {tuple(b.shape)}")
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(features.T)) for features in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    # tr((A B)^(1/2)) by the symmetric product A^(1/2) B A^(1/2), whose eigenvalues are the same and real.
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def _value(node: ast.expr) -> Any:
    """A literal, a part such as `Taylor(order=2)`, or a tuple or list of these."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PARTS:
        options = {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
        return PARTS[node.func.id](*map(_value, node.args), **options)
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(map(_value, node.elts))
    return ast.literal_eval(node)


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """`"FORA:interval=3,last=1"` as `("FORA", {"interval": 3, "last": 1})`.

    Values are Python literals, or parts from `maskaccel.state` and `maskaccel.masks`: `forecaster=Taylor(2)`.

    Raises:
        ValueError: What follows the colon is no list of `name=value`.
    """
    name, _, arguments = text.partition(":")
    try:
        call = ast.parse(f"_({arguments})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("positional argument")
        return name, {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"{text!r}: arguments must look like name=1,other='word', got {arguments!r}: {error}"
        ) from error


def parse_methods(text: str) -> list[Any]:
    """`"FORA:interval=3+FusedAdaLN"` as a list of method objects; `"none"` is the empty list."""
    if text == "none":
        return []
    chosen = []
    for part in text.split("+"):
        name, arguments = parse_call(part)
        if name not in methods.PATCHES:
            raise ValueError(f"--run: {name!r} is no method; known are {', '.join(sorted(methods.PATCHES))}")
        chosen.append(getattr(methods, name)(**arguments))
    return chosen


def sample(
    pipe: FashionPipeline, images: int, *, steps: int, guidance: float, seed: int, batch: int, text: str = ""
) -> torch.Tensor:
    """Images `(n, 1, 32, 32)` in 0..1; image i has class i mod 10 and seed `seed + i`."""
    parts = []
    bar = tqdm(total=images, unit="image", desc=text)
    for start in range(0, images, batch):
        ids = range(start, min(start + batch, images))
        labels, seeds = [i % len(CLASSES) for i in ids], [seed + i for i in ids]
        parts.append(pipe(labels, guidance, steps, seeds=seeds, output_type="pt").images.cpu())
        bar.update(len(ids))
    bar.close()
    return torch.cat(parts)


def score(images: torch.Tensor, judge: FashionClassifier, real_features: torch.Tensor | None) -> dict[str, Any]:
    """Accuracy over all and by class, and the Fréchet distance where the features of real images are given."""
    labels = torch.arange(len(images)) % len(CLASSES)
    predicted, features = judge.judge(images * 2 - 1)
    right = (predicted == labels).double()
    by_class = {name: round(right[labels == i].mean().item(), 4) for i, name in enumerate(CLASSES) if i < len(images)}
    result: dict[str, Any] = {"class_accuracy": round(right.mean().item(), 4), "by_class": by_class}
    if real_features is not None and len(images) > 1:
        result["frechet_distance"] = round(frechet_distance(features, real_features), 3)
    return result


def evaluate(args: argparse.Namespace) -> list[dict[str, Any]]:
    pipe = FashionPipeline.from_pretrained(args.model).to(args.device)
    torch.nn.Module.to(pipe.transformer, getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    judge, facts = load_classifier()
    try:
        real = judge.judge(to_float(load_split("test", args.data)[0]))[1]
    except FileNotFoundError as error:
        print(f"no Fréchet distance: {error}")
        real = None
    rows: list[dict[str, Any]] = []
    unpatched: torch.Tensor | None = None
    for text in args.run or ["none"]:
        chosen = parse_methods(text)
        context: Any = maskaccel.patch(pipe, chosen) if chosen else contextlib.nullcontext()
        options = {"steps": args.steps, "guidance": args.guidance, "seed": args.seed, "batch": args.batch}
        with context:
            began = time.perf_counter()
            images = sample(pipe, args.images, text=text, **options)
            seconds = time.perf_counter() - began
        row = {"run": text, "images": args.images, **options, "dtype": args.dtype, "seconds": round(seconds, 2)}
        row |= score(images, judge, real)
        if chosen and unpatched is not None:
            row["psnr_db"] = round(psnr(images, unpatched).mean().item(), 2)
        elif not chosen:
            unpatched = images
        rows.append(row)
        print(json.dumps(row))
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            save_file(
                {"images": images},
                args.out / f"{text.replace(':', '_').replace('=', '').replace('+', '_')}.safetensors",
            )
    if args.out is not None:
        (args.out / "scores.json").write_text(json.dumps({"runs": rows, "classifier": facts}, indent=2) + "\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="pipeline folder")
    parser.add_argument("--data", type=Path, default=DEFAULT_ROOT)
    parser.add_argument("--run", action="append", help="methods of one run; may be repeated; default none")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="folder for the images of each run and scores.json")
    parser.add_argument("--compare", type=Path, nargs=2, default=None, help="two files of --out; prints their PSNR")
    args = parser.parse_args()
    if args.compare is not None:
        a, b = (load_file(path)["images"] for path in args.compare)
        distance = psnr(a, b)
        print(json.dumps({"psnr_db": round(distance.mean().item(), 2), "lowest": round(distance.min().item(), 2)}))
    else:
        evaluate(args)


if __name__ == "__main__":
    main()
