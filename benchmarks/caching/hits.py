"""What a step costs that is taken from memory, as a share of a step that is computed, level by level."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

import maskaccel
from maskaccel import methods

from .model import Setting, load
from .store import where

STEPS = 12
LEVELS = {
    "output": methods.TaylorSeer(interval=STEPS, first=1, level="output"),
    "stack": methods.TaylorSeer(interval=STEPS, first=1),
    "stack, with FusedAdaLN": (methods.TaylorSeer(interval=STEPS, first=1), methods.FusedAdaLN()),
    "block": methods.TaylorSeer(interval=STEPS, first=1, level="block"),
    "module": methods.TaylorSeer(interval=STEPS, first=1, level="module"),
    "module, with FusedAdaLN": (methods.TaylorSeer(interval=STEPS, first=1, level="module"), methods.FusedAdaLN()),
}


def measure(setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """Rounds of one computed and eleven remembered steps of a guided batch, all levels in turns.

    Returns:
        For each level the medians of the seconds of a step, computed and remembered, and of their ratio in a round.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    pipes = {name: load(setting) for name in LEVELS}
    x = torch.randn(2 * setting.batch, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    x = x.to(getattr(torch, setting.dtype))
    labels = torch.arange(2 * setting.batch) % 10
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in LEVELS}
    with torch.no_grad():
        for number in range(rounds + 1):
            for name in list(LEVELS) if number % 2 else list(LEVELS)[::-1]:
                model = pipes[name].transformer
                seconds = []
                chosen = LEVELS[name]
                with (
                    maskaccel.patch(model, list(chosen) if isinstance(chosen, tuple) else chosen) as patch,
                    patch.generation(STEPS) as run,
                ):
                    for step in range(STEPS):
                        t = torch.full((len(x),), 900 - step)
                        start = clock()
                        model(x, timestep=t, class_labels=labels)
                        seconds.append(clock() - start)
                        run.step()
                    activity = patch.report().activity["TaylorSeer"]
                if activity["reused"] != (STEPS - 1) * (activity["computed"]):
                    raise RuntimeError(f"{name}: {activity} is not one computed step and {STEPS - 1} remembered ones")
                if number:  # the first round is for warming up
                    found[name].append((seconds[0], statistics.median(seconds[1:])))
    return [
        {
            "level": name,
            "computed_ms": round(1e3 * statistics.median(full for full, _ in pairs), 3),
            "remembered_ms": round(1e3 * statistics.median(hit for _, hit in pairs), 3),
            "share": round(statistics.median(hit / full for full, hit in pairs), 5),
        }
        for name, pairs in found.items()
    ]


def report(setting: Setting, rounds: int) -> dict[str, Any]:
    """Measure, print a table, return the figures and where they are from."""
    rows = measure(setting, rounds)
    print(f"{'level':26} {'computed':>10} {'remembered':>11} {'share':>8}")
    for row in rows:
        print(
            f"{row['level']:26} {row['computed_ms']:7.2f} ms {row['remembered_ms']:8.3f} ms {100 * row['share']:6.2f} %"
        )
    return {
        "steps": STEPS,
        "batch": 2 * setting.batch,
        "dtype": setting.dtype,
        "rounds": rounds,
        "rows": rows,
    } | where()
