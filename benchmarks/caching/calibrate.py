"""Calibrations of the example model, from images of seeds that no run of the comparison uses."""

from __future__ import annotations

from pathlib import Path

from maskaccel.calibration import measure

from .model import Setting, load, sample

FOLDER = Path(__file__).parent / "calibrations"
# What the planned runs need.
KINDS = ("distances", "hyca", "magnitudes", "products", "teacache")
SEED = 1_000_000


def path(kind: str) -> Path:
    """Where the calibration of a kind lies."""
    return FOLDER / f"{kind}.json"


def make(setting: Setting, again: bool = False) -> None:
    """One batch of ten images for each kind that has no file yet."""
    chosen = Setting(**{**setting.as_dict(), "seed": SEED, "images": 10, "batch": 10})
    FOLDER.mkdir(exist_ok=True)
    for kind in KINDS:
        if path(kind).exists() and not again:
            continue
        pipe = load(chosen)
        options = {"encoder": "all"} if kind == "distances" else {}
        with measure(pipe, kind, **options) as found:
            sample(pipe, chosen, range(10))
        found.result().save(path(kind))
        print(f"{kind}: {path(kind)}")
