"""The example pipeline as the curve samples it: which images, in which batches, in which precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from data import CLASSES
from pipeline import FashionPipeline

from . import ROOT


@dataclass(frozen=True)
class Setting:
    """What all runs of one output folder share.

    Attributes:
        images: Number of images; image i has class i mod 10 and seed `seed + i`.
        steps: Euler steps.
        guidance: Classifier-free guidance scale; both branches are one batch.
        batch: Images in one call of the pipeline. Methods that decide once a batch decide over all of them.
        seed: Seed of image 0.
        dtype: Precision of the transformer.
        model: Pipeline folder.
    """

    images: int = 200
    steps: int = 50
    guidance: float = 2.0
    batch: int = 10
    seed: int = 0
    dtype: str = "bfloat16"
    model: str = "examples/fashion/weights"

    def __post_init__(self) -> None:
        for name in ("images", "steps", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def batches(self) -> Iterator[range]:
        """Image numbers of each batch."""
        for start in range(0, self.images, self.batch):
            yield range(start, min(start + self.batch, self.images))


def load(setting: Setting) -> FashionPipeline:
    """A pipeline of its own, so that nothing a run leaves behind reaches another run."""
    folder = Path(setting.model)
    pipe = FashionPipeline.from_pretrained(folder if folder.is_absolute() else ROOT / folder, local_files_only=True)
    torch.nn.Module.to(pipe.transformer, getattr(torch, setting.dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: FashionPipeline, setting: Setting, ids: range) -> torch.Tensor:
    """Images `(n, 1, h, w)` in 0..1 of the given numbers, in one call of the pipeline."""
    labels, seeds = [i % len(CLASSES) for i in ids], [setting.seed + i for i in ids]
    return pipe(labels, setting.guidance, setting.steps, seeds=seeds, output_type="pt").images
