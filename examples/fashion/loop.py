"""What training loops of the examples share: the learning rate's course, and files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import torch


def lr_factor(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Warm-up, constant, linear decay to 2 %."""
    decay_start = int(steps * (1 - cooldown))
    if step < warmup:
        return (step + 1) / warmup
    if step < decay_start:
        return 1.0
    return max(0.02, (steps - step) / max(1, steps - decay_start))


def save_atomically(state: dict, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
