"""`random_keep` beside what training code does: noise, argsort, a slice, and a second argsort for the way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from maskaccel import ops
from maskaccel.bench.fingerprint import fingerprint

from ..attention import page
from ..interleaved import timed

# (batch, tokens, kept)
SHAPES = ((256, 256, 64), (32, 1024, 512), (1, 32760, 16380))


def eager(batch: int, n: int, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As in MAE's, MDT's and MaskDiT's code."""
    shuffle = torch.rand(batch, n).argsort(dim=1)
    return shuffle[:, :keep], shuffle.argsort(dim=1)


def _calls(batch: int, n: int, keep: int) -> dict[str, Callable[[], Any]]:
    return {
        "argsort": lambda: eager(batch, n, keep),
        "maskaccel": lambda: ops.random_keep(batch, n, keep, seed=0),
    }


def run(rounds: int, results: Path, docs: Path) -> None:
    """Measure, store and write the table of docs/tokens.md."""
    cases = [{"shape": list(shape), "seconds": timed(_calls(*shape), rounds)} for shape in SHAPES]
    data = {"fingerprint": fingerprint(), "rounds": rounds, "cases": cases}
    page.store(data, results / "tokens_ids.json")
    page.show(docs / "tokens.md", "ids", table(data))


def table(data: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| batch x tokens, kept | two argsorts, ms | random_keep, ms |", "|---|---|---|"]
    for case in data["cases"]:
        batch, n, keep = case["shape"]
        s = {name: 1e3 * value for name, value in case["seconds"].items()}
        lines.append(f"| {batch} x {n}, {keep} | {s['argsort']:.2f} | {s['maskaccel']:.2f} |")
    return "\n".join(lines) + "\n"
