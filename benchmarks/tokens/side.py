"""MDT's side block at masked rows only, beside the whole block whose result is then selected: forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from maskaccel import ops
from maskaccel.bench.fingerprint import fingerprint
from maskaccel.methods import SideInterpolater

from ..attention import page
from ..interleaved import timed

WIDTH, HEADS, GRID, BATCH = 384, 6, (16, 16), 4  # MDT-S/2 on latents of 32 x 32
MASKED = (0.3, 0.4, 0.5, 0.75)


def _calls(masked: float) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    side = SideInterpolater(WIDTH, GRID, HEADS)
    n = GRID[0] * GRID[1]
    index = ops.random_keep(BATCH, n, 1 - masked, seed=0)
    x, c = torch.randn(BATCH, index.kept, WIDTH, requires_grad=True), torch.randn(BATCH, WIDTH)
    everywhere = ops.RelativePosition.of_grid(side.block.attn.relative_position, GRID)

    def whole() -> None:
        full = ops.scatter_merge(
            None, x, index, mode="mask_token", mask_token=side.mask_token, pos=side.decoder_pos_embed
        )
        filled = side.block(full, c, places=everywhere)
        torch.where(index.mask[..., None], full, filled).sum().backward()

    def some() -> None:
        side(x, c, index).sum().backward()

    return {"whole": whole, "masked rows": some}


def operations(masked: float) -> float:
    """Operations at masked rows by those of the whole block."""
    n, d = GRID[0] * GRID[1], WIDTH
    return (4 * d + masked * (20 * d + 4 * n)) / (24 * d + 4 * n)


def run(rounds: int, results: Path, docs: Path) -> None:
    """Measure, store and write the table of docs/tokens.md."""
    cases = [{"masked": masked, "seconds": timed(_calls(masked), rounds)} for masked in MASKED]
    data = {"fingerprint": fingerprint(), "rounds": rounds, "cases": cases}
    page.store(data, results / "tokens_side.json")
    page.show(docs / "tokens.md", "side", table(data))


def table(data: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| masked | whole block, ms | at masked rows, ms | part | of operations |", "|---|---|---|---|---|"]
    for case in data["cases"]:
        whole, some = (1e3 * case["seconds"][name] for name in ("whole", "masked rows"))
        expected = operations(case["masked"])
        lines.append(f"| {case['masked']:.0%} | {whole:.1f} | {some:.1f} | {some / whole:.2f} | {expected:.2f} |")
    return "\n".join(lines) + "\n"
