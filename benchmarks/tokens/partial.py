"""Calls of a DiT-S/2 that compute a quarter of the tokens over cached keys and values, and guided calls of SPRINT.

The ideal of a partial call is the call without its blocks, and a quarter of the blocks' part: their linear layers and
the queries of their attention are those of a quarter of the tokens. A block's part is measured against a model of one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import maskaccel
from maskaccel import methods
from maskaccel.bench.fingerprint import fingerprint

from ..attention import page
from ..interleaved import timed
from .training import DEPTH, build

ACTIVE = 0.25
# blocks, and how many of them are before and after SPRINT's middle; the first is the proportion of SiT-XL
STACKS = ((28, 2), (12, 2), (12, 1))


def measure(tokens: int, batch: int, rounds: int) -> dict[str, Any]:
    """Dense and partial calls at one length, interleaved."""
    side = 2 * round(tokens**0.5)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, side, side, generator=generator)
    t, labels = torch.full((batch,), 500), torch.zeros(batch, dtype=torch.int64)
    dense, one, model = build(tokens).eval(), build(tokens, 1).eval(), build(tokens).eval()
    method = methods.RAS(ratio=ACTIVE, first=1, dense=(), high_fraction=0.0)
    with torch.no_grad(), maskaccel.patch(model, [method]) as patch, patch.generation(num_steps=rounds + 4) as run:

        def partial() -> None:
            run.output(model(x, t, labels, return_dict=False)[0], x, 0.5)
            run.step()

        partial()  # the dense step that fills the cache
        calls = {"dense": lambda: dense(x, t, labels), "one block": lambda: one(x, t, labels), "partial": partial}
        seconds = timed(calls, rounds)
        report = str(patch.report())
    return {"tokens": tokens, "batch": batch, "seconds": seconds, "report": report}


def guided(tokens: int, batch: int, rounds: int, depth: int, outer: int) -> dict[str, Any]:
    """A guided step of SPRINT, whose unconditional half runs the outer blocks alone, beside one forward."""
    side = 2 * round(tokens**0.5)
    x = torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(1))
    t, labels = torch.full((batch,), 500), torch.zeros(batch, dtype=torch.int64)
    model, null = build(tokens, depth).eval(), {"class_labels": torch.full((batch,), 1000)}
    given = {"timestep": t, "class_labels": labels}
    sprint = methods.SPRINT(outer, -1 - outer)
    with torch.no_grad(), maskaccel.patch(model, [sprint]):
        calls = {
            "forward": lambda: model(x, **given),
            "guided": lambda: sprint.guided(model, 3.0, x, **given, null=null),
        }
        seconds = timed(calls, rounds)
    return {"tokens": tokens, "batch": batch, "depth": depth, "outer": outer, "seconds": seconds}


def run(lengths: list[int], batch: int, rounds: int, results: Path, docs: Path) -> None:
    """Measure, store and write the table of docs/partial-tokens.md."""
    cases = [measure(tokens, batch, rounds) for tokens in tqdm(lengths, unit="length")]
    steps = [guided(lengths[0], batch, rounds, *one) for one in tqdm(STACKS, unit="stack")]
    data = {"fingerprint": fingerprint(), "rounds": rounds, "active": ACTIVE, "depth": DEPTH, "cases": cases}
    data["guided"] = steps
    page.store(data, results / "tokens_partial.json")
    page.show(docs / "partial-tokens.md", "partial", table(data))
    page.show(docs / "tokens.md", "guided", guided_table(data))


def table(data: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| tokens | dense call, s | a quarter active, s | ideal, s | of ideal |", "|---|---|---|---|---|"]
    for case in data["cases"]:
        s = case["seconds"]
        block = (s["dense"] - s["one block"]) / (data["depth"] - 1)
        best = s["dense"] - (1 - data["active"]) * data["depth"] * block
        lines.append(
            f"| {case['tokens']} | {s['dense']:.3f} | {s['partial']:.3f} | {best:.3f} | {s['partial'] / best:.2f} |"
        )
    return "\n".join(lines) + "\n"


def guided_table(data: dict[str, Any]) -> str:
    """The figures of guided steps as Markdown."""
    lines = [
        "| blocks | before and after the middle | forward, s | guided step, s | forwards |",
        "|---|---|---|---|---|",
    ]
    for case in data["guided"]:
        s, outer = case["seconds"], case["outer"]
        lines.append(
            f"| {case['depth']} | {outer} + {outer} | {s['forward']:.3f} | {s['guided']:.3f} | "
            f"{s['guided'] / s['forward']:.2f} |"
        )
    return "\n".join(lines) + "\n"
