"""Quality of a run: images of the same seeds, judged beside the baseline's, and what they cost to compute."""

from __future__ import annotations

from typing import Any

import torch
from classifier import FashionClassifier
from evaluate import score
from tqdm import tqdm

from maskaccel.cli.demo import psnr

from .meter import Meter
from .model import Setting, load, sample
from .runs import BASELINE, applied
from .store import Store, where


def sample_run(text: str, setting: Setting, progress: bool = True) -> tuple[torch.Tensor, dict[str, Any]]:
    """All images of a run, and what it computed and held.

    The first batch is sampled once more at the end: it comes out bit-equal if the run starts every batch afresh.
    """
    pipe = load(setting)
    parts = []
    with applied(text, pipe, setting) as reported:
        with Meter(pipe.transformer) as meter:
            for ids in tqdm(list(setting.batches()), unit="batch", desc=text, disable=not progress):
                parts.append(sample(pipe, setting, ids).cpu())
        report = reported()
        again = sample(pipe, setting, next(setting.batches())).cpu()
    return torch.cat(parts), {**meter.totals(), "repeatable": torch.equal(again, parts[0]), "reported": report}


def measure(
    text: str,
    setting: Setting,
    store: Store,
    judge: FashionClassifier,
    real: torch.Tensor | None,
    progress: bool = True,
) -> dict[str, Any]:
    """Sample and judge one run, or read the result that is there. The baseline must have been measured before.

    Returns:
        Accuracy over all and by class, Fréchet distance, PSNR to the baseline, operations, calls, bytes.
    """
    row = store.read(text, "quality.json")
    if row is not None:
        return row
    images, work = sample_run(text, setting, progress)
    images = store.write_images(text, images)
    row = {"run": text, **setting.as_dict(), **score(images, judge, real), **work}
    if text != BASELINE:
        distance = psnr(images, store.images(BASELINE))
        row["psnr_db"] = {
            "mean": round(distance.mean().item(), 2),
            "median": round(distance.median().item(), 2),
            "lowest": round(distance.min().item(), 2),
        }
    row["environment"] = where()
    store.write(text, "quality.json", row)
    if not row["repeatable"]:
        print(f"{text}: the same seeds gave other images the second time: its state outlives a batch")
    if text != BASELINE and not row["reduced_calls"]:
        print(f"{text}: every call of the model computed everything")
    return row
