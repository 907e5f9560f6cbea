"""Sample images from a run, with its averaged weights.

python examples/train/sample.py --folder runs/none --out grid.png --guidance 2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import recipes
import torch
from objective import Objective
from options import DTYPES, Options
from PIL import Image
from sources import Images, random_numbers
from torch import Tensor
from tqdm import tqdm

_NOISE = 3  # purpose of random numbers, beside those of `sources`


@torch.no_grad()
def euler(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor], noise: Tensor, labels: Tensor, steps: int, *,
    guidance: float = 1.0, no_class: int | None = None,
) -> Tensor:  # fmt: skip
    """Images `(B, C, H, W)` in -1..1 from noise, by Euler steps of equal length from t = 1 to 0.

    Args:
        velocity: Of images, times `(B,)` and labels `(B,)`.
        noise: Where they begin.
        labels: int64 `(B,)`.
        steps: Number of steps.
        guidance: Weight w of classifier-free guidance, v_u + w (v_c - v_u); 1 is none, and half the work.
        no_class: The label of v_u; needed with guidance.
    """
    x = noise
    for i in range(steps):
        t = torch.full((len(x),), 1 - i / steps, device=x.device)
        v = velocity(x, t, labels).float()
        if guidance != 1:
            v = torch.lerp(velocity(x, t, torch.full_like(labels, no_class)).float(), v, guidance)
        x = x - v / steps
    return x.clamp(-1, 1)


def load(path: Path, device: str = "cpu") -> tuple[Objective, Options]:
    """The model of a checkpoint or snapshot with its averaged weights, in eval mode, and the run's options.

    Raises:
        ValueError: The weights are of another network.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    options = Options(folder=path.parent, **state["options"])
    objective = recipes.build(options, Images(**state["images"]))
    missing, unknown = objective.load_state_dict(state["ema"], strict=False)
    missing = sorted({name for name, _ in objective.named_parameters()} & set(missing))
    if unknown or missing:
        raise ValueError(f"{path} is of another network: it lacks {missing[:3]} and has {unknown[:3]} beside")
    return objective.to(device).eval(), options


def samples(
    path: Path, count: int, *, steps: int = 20, guidance: float = 1.0, seed: int = 0, batch: int = 50,
    device: str = "cpu",
) -> Tensor:  # fmt: skip
    """Images `(count, C, H, W)` in -1..1 of the weights in a file; image i has class i modulo the number of classes.

    Noise follows from the seed and the number of the image, so other weights give the same image from the same noise.
    """
    objective, options = load(path, device)
    images = objective.images
    shape, classes = (images.channels, images.size, images.size), len(images.classes)
    parts = []
    dtype = DTYPES[options.dtype]
    for start in tqdm(range(0, count, batch), unit="batch", desc=path.name, leave=False):
        ids = range(start, min(start + batch, count))
        noise = [random_numbers(seed, _NOISE, i).standard_normal(shape, dtype=np.float32) for i in ids]
        labels = torch.tensor([i % classes for i in ids], device=device)
        with torch.autocast(device, dtype, enabled=dtype is not None):
            x = torch.from_numpy(np.stack(noise)).to(device)
            parts.append(euler(objective.velocity, x, labels, steps, guidance=guidance, no_class=classes).cpu())
    return torch.cat(parts)


def grid(images: Tensor, columns: int) -> Image.Image:
    """Images `(n, C, H, W)` in -1..1 beside each other, in rows of `columns`."""
    rows = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    pixels = ((rows + 1) * 127.5).round().byte().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the run")
    parser.add_argument("--snapshot", default="checkpoint.pt", help="file of the folder")
    parser.add_argument("--out", type=Path, default=Path("samples.png"))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    columns = min(len(load(args.folder / args.snapshot)[0].images.classes), 16)
    images = samples(
        args.folder / args.snapshot, args.rows * columns, steps=args.steps, guidance=args.guidance, seed=args.seed,
        device=args.device,
    )  # fmt: skip
    grid(images, columns).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
