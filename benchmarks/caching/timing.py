"""Seconds of a run against the baseline: pairs of the same batch in turns, the order changing every round."""

from __future__ import annotations

import statistics
import time
from typing import Any

from tqdm import tqdm

from .model import FashionPipeline, Setting, load, sample
from .runs import BASELINE, applied
from .store import Store, where


def _timed(pipe: FashionPipeline, setting: Setting, ids: range) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    sample(pipe, setting, ids)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "images": len(ids)}


def measure(text: str, setting: Setting, store: Store, rounds: int, progress: bool = True) -> dict[str, Any]:
    """Rounds of a run and the baseline, added to those that the folder holds.

    Returns:
        `rounds`, each with wall and processor seconds of both on one batch, and the fingerprint.
    """
    row = store.read(text, "timing.json") or {"run": text, **setting.as_dict(), "rounds": []}
    if len(row["rounds"]) >= rounds:
        return row
    batches = list(setting.batches())
    plain, pipe = load(setting), load(setting)
    with applied(text, pipe, setting):
        sides = {"baseline": plain, "run": pipe}
        for side in sides.values():
            sample(side, setting, range(1))
        for number in tqdm(range(len(row["rounds"]), rounds), unit="round", desc=text, disable=not progress):
            ids = batches[number % len(batches)]
            order = list(sides) if number % 2 == 0 else list(sides)[::-1]
            row["rounds"].append({side: _timed(sides[side], setting, ids) for side in order})
            row["environment"] = where()
            store.write(text, "timing.json", row)
    return row


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Medians, least and most: seconds an image, and the ratios to the baseline of the same round.

    With one thread, processor time is what a run costs whoever else uses the machine; with more it counts the waiting
    of threads, so the wall clock decides. `clock` says which.
    """
    clock = "cpu" if row["environment"]["threads"] == 1 else "wall"

    def three(values: list[float]) -> dict[str, float]:
        middle, low, high = statistics.median(values), min(values), max(values)
        return {"median": round(middle, 4), "min": round(low, 4), "max": round(high, 4)}

    rounds = row["rounds"]
    found: dict[str, Any] = {"clock": clock, "rounds": len(rounds)}
    for name in ("cpu", "wall"):
        found[f"{name}_seconds"] = three([r["run"][name] / r["run"]["images"] for r in rounds])
        found[f"{name}_seconds_{BASELINE}"] = three([r["baseline"][name] / r["baseline"]["images"] for r in rounds])
        found[f"{name}_speedup"] = three([r["baseline"][name] / r["run"][name] for r in rounds])
    found["speedup"] = found[f"{clock}_speedup"]
    found["seconds"] = found[f"{clock}_seconds"]
    return found
