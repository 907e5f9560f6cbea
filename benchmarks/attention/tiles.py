"""Share of tiles that the masks of published methods touch, in raster order and in the order of patches.

Attention costs what its tiles cost, not what its elements do; the order of tokens decides how far apart the two are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from maskaccel.masks import GridWindow, Rule, Segments, TileMask, TokenOrder

from .page import update

Patch = tuple[int, ...] | None


@dataclass(frozen=True)
class Case:
    """A mask on a grid, in several orders of its tokens.

    Attributes:
        name: Whose mask it is.
        grid: Tokens along each axis.
        rule: The mask, given the order of the tokens.
        orders: Label -> (patch, block); the first one is raster order.
        text: Tokens before the grid; they see everything and are seen by all.
    """

    name: str
    grid: tuple[int, ...]
    rule: Callable[[TokenOrder], Rule]
    orders: dict[str, tuple[Patch, tuple[int, int]]]
    text: int = 0


def _orders(patch: Patch, **more: tuple[Patch, tuple[int, int]]) -> dict[str, tuple[Patch, tuple[int, int]]]:
    label = " x ".join(map(str, patch or ()))
    return {"raster": (None, (128, 128)), f"patches of {label}": (patch, (128, 128)), **more}


def _disc(side: int, radius: int) -> Case:
    smaller: dict[str, tuple[Patch, tuple[int, int]]] = {
        "patches of 8 x 8, tiles of 128 x 64": ((8, 8), (128, 64)),
        "patches of 8 x 8, tiles of 64 x 64": ((8, 8), (64, 64)),
    }
    return Case(
        f"CLEAR, radius {radius}", (side, side), lambda order: GridWindow(order, radius, "euclid"),
        _orders((8, 16), **smaller),
    )  # fmt: skip


def _phases(order: TokenOrder) -> Segments:
    """U-DiT's four sub-grids, as classes of tokens."""
    at = order.coordinates
    phase = at[:, 0] % 2 * 2 + at[:, 1] % 2
    return Segments(phase, phase)


def _scenes(order: TokenOrder) -> Segments:
    """Mask2DiT with three scenes: the text of a scene sees itself and its video, video sees its text and all video."""
    scenes, text = 3, order.prefix // 3
    frames = order.coordinates[order.prefix :, 0]
    video = frames * scenes // order.grid[0] + scenes
    ids = torch.cat([torch.arange(scenes).repeat_interleave(text), video])
    relation = torch.eye(2 * scenes, dtype=torch.int8)
    relation[scenes:, scenes:] = 1
    for scene in range(scenes):
        relation[scene, scene + scenes] = relation[scene + scenes, scene] = 1
    return Segments(ids, ids, relation)


VIDEO = (13, 30, 45)  # CogVideoX at 480 x 720: 13 latent frames of 30 x 45 patches

CASES = (
    *(_disc(side, radius) for side, radius in ((64, 8), (64, 16), (128, 8), (128, 16), (128, 32))),
    Case(
        "Re-ttention, CogVideoX: 21 places either way in every frame", (13, 1350),
        lambda order: GridWindow(order, (None, 21.0)), _orders((13, 1)), text=226,
    ),
    Case(
        "Re-ttention, PixArt: band of 3.1 %", (64, 64), lambda order: GridWindow(order, 64.0, "band"), _orders((8, 16)),
    ),
    Case("Box of 13 x 13", (64, 64), lambda order: GridWindow(order, 6.0), _orders((8, 16))),
    Case("NATTEN, 13 x 13, clamped", (64, 64), lambda order: GridWindow(order, 6.0, clamp=True), _orders((8, 16))),
    Case(
        "NATTEN, 13 x 13, clamped, dilation 2", (64, 64),
        lambda order: GridWindow(order, 6.0, clamp=True, dilation=2), _orders((8, 16)),
    ),
    Case(
        "NATTEN, 5 x 9 x 9 of a video, clamped", VIDEO,
        lambda order: GridWindow(order, (2.0, 4.0, 4.0), clamp=True), _orders((4, 4, 8)),
    ),
    Case(
        "Sliding tile attention, 3 x 3 x 3 tiles of 6 x 8 x 8", (18, 32, 40),
        lambda order: GridWindow(order, 1.0, clamp=True, unit=(6, 8, 8)), _orders((6, 8, 8)),
    ),
    Case(
        "DiT-3D, windows of 4 x 4 x 4", (16, 16, 16), lambda order: GridWindow(order, 0.0, unit=4), _orders((4, 4, 8)),
    ),
    Case("U-DiT, four sub-grids", (64, 64), _phases, _orders((8, 16))),
    Case("Mask2DiT, three scenes of a video", (12, 480), _scenes, {"raster": (None, (128, 128))}, text=3 * 226),
)  # fmt: skip


def row(case: Case, label: str) -> dict[str, Any]:
    """The figures of a case in one order, exactly."""
    patch, block = case.orders[label]
    order = TokenOrder(case.grid, patch, prefix=case.text)
    mask = TileMask.from_rule(case.rule(order), (order.tokens, order.tokens), block)
    tiles = mask.tiles()
    full = tiles if mask.pattern_of is None else tiles & (mask.pattern_of < 0)
    return {
        "mask": case.name, "grid": list(case.grid), "text": case.text, "order": label, "block": list(block),
        "elements": round(mask.element_density(), 5), "touched": round(mask.density(), 5),
        "full": round(float(full.double().mean()), 5), "patterns": 0 if mask.patterns is None else len(mask.patterns),
    }  # fmt: skip


def measure() -> list[dict[str, Any]]:
    """All rows."""
    jobs = [(case, label) for case in CASES for label in case.orders]
    return [row(case, label) for case, label in tqdm(jobs, desc="tiles", unit="mask")]


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| mask | grid | elements kept | order | tiles touched | of these in full | patterns |",
        "|---|---|---|---|---|---|---|",
    ]
    seen: set[tuple] = set()
    for r in rows:
        key = (r["mask"], *r["grid"])
        text = f" + {r['text']} text" if r["text"] else ""
        head = (
            (r["mask"], " x ".join(map(str, r["grid"])) + text, f"{r['elements']:.1%}")
            if key not in seen
            else ("",) * 3
        )
        seen.add(key)
        full = r["full"] / r["touched"] if r["touched"] else 0.0
        lines.append(
            "| " + " | ".join([*head, r["order"], f"{r['touched']:.1%}", f"{full:.0%}", str(r["patterns"])]) + " |"
        )
    return "\n".join(lines) + "\n"


def run(results: Path, page: Path) -> None:
    """Write the JSON and the table of the page."""
    rows = measure()
    results.write_text(json.dumps(rows, indent=1) + "\n")
    update(page, "tiles", table(rows))
    print(table(rows))
