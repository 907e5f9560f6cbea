"""Predicted balance of the attention kernels on 132 multiprocessors, by mask and shape. Runs on a CPU in a minute.

Nothing here is measured: rows of tiles are dealt out by the kernels' own code, each step costs the cycles of its
products over an assumed rate (`schedule_model.Kernel`), and L2 is a least-recently-used cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from maskaccel.masks import Causal, GridWindow, Segments, TileMask, TokenOrder
from maskaccel.methods import RadialAttention, SlidingTile, SparseVideoGen

from .page import show
from .schedule_model import Kernel, Run, Shape, narrower, simulate

FLUX, FLUX_2048 = Shape("FLUX, 1024 px", 4608, 24, 128), Shape("FLUX, 2048 px", 16896, 24, 128)
WAN = Shape("Wan 1.3B, 480p", 32760, 12, 128)
WAN_14B = Shape("Wan 14B, 720p, on one of 4 GPUs", 75600, 10, 128)
TARGET, NARROW = Shape("16k", 16384, 24, 128), Shape("4k", 4096, 24, 64)
STA = Shape("30 x 48 x 80", 115200, 24, 128)
WAN_GRID, STA_GRID = (21, 30, 52), (30, 48, 80)

SM90 = Kernel("sm_90a")
# mma.sync has a lower peak, and two CTAs of a multiprocessor hide each other's waits.
SM80 = Kernel("sm_80", block=64, rate=0.45, residents=2)
ROWS = Kernel("dq", rows=64, block=32, products=3, rate=0.4, residents=2)
COLUMNS = Kernel("dk, dv", rows=64, block=32, products=4, rate=0.4, residents=2)


def even(shape: Shape, kept: float, block: tuple[int, int] = (128, 128)) -> TileMask:
    """As many tiles in every row, at random places of each head."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (-(-shape.tokens // b) for b in block)
    tiles = torch.zeros(shape.heads, rows, columns, dtype=torch.bool)
    for head in tiles:
        chosen = torch.rand(rows, columns, generator=generator).topk(max(1, round(kept * columns)), dim=-1).indices
        head.scatter_(-1, chosen, True)
    return TileMask.from_tiles(tiles, (shape.tokens,) * 2, block)


def uneven(shape: Shape, kept: float) -> TileMask:
    """Heads and rows of many densities, as predictors such as SpargeAttn's choose: log-normal, half of a decade."""
    generator = torch.Generator().manual_seed(0)
    rows = -(-shape.tokens // 128)
    heads, lines = (torch.randn(shape.heads, n, 1, generator=generator) for n in (1, rows))
    share = (0.7 * heads + 0.5 * lines).exp()
    share = (share * kept / share.mean()).clamp(max=1)
    tiles = torch.stack([torch.rand(rows, rows, generator=generator) < head for head in share])
    return TileMask.from_tiles(tiles, (shape.tokens,) * 2)


def _segments(shape: Shape) -> TileMask:
    """Samples of very different lengths in one sequence."""
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor([8, 4, 3, 1]) * (shape.tokens // 16))
    return TileMask.from_rule(Segments(ids, ids), (shape.tokens,) * 2)


def _disc(side: int, radius: int) -> TileMask:
    """CLEAR's window on an image with 512 tokens of text."""
    order = TokenOrder((side, side), (8, 16), prefix=512)
    return TileMask.from_rule(GridWindow(order, radius, "euclid"), (order.tokens,) * 2)


def _sliding() -> TileMask:
    order = TokenOrder(STA_GRID, (6, 8, 8))
    return SlidingTile().tile_mask(order, (3, 3, 3))


def _radial() -> TileMask:
    return RadialAttention().tile_mask(TokenOrder((WAN_GRID[0], math.prod(WAN_GRID[1:])), None))


def _video_heads() -> TileMask:
    """Spatial and temporal heads in turn; without the frame that all see."""
    spatial, temporal, _ = SparseVideoGen(sink=False).masks(WAN_GRID, (0, 0))
    return TileMask.stack([spatial, temporal] * (WAN.heads // 2))


def cases() -> Iterator[tuple[Shape, str, Callable[[], TileMask | None]]]:
    """Shape, name and maker of each mask; None is dense attention."""
    for shape in (FLUX, TARGET, FLUX_2048, WAN, WAN_14B, NARROW):
        yield shape, "dense", lambda: None
        for kept in (0.5, 0.25, 0.1):
            yield shape, f"even rows, {kept:.0%}", lambda s=shape, k=kept: even(s, k)
        yield shape, "uneven heads, 10%", lambda s=shape: uneven(s, 0.1)
    yield FLUX, "CLEAR, radius 8", lambda: _disc(64, 8)
    yield FLUX_2048, "CLEAR, radius 16", lambda: _disc(128, 16)
    yield WAN, "radial", _radial
    yield WAN, "SVG heads", _video_heads
    yield STA, "sliding tiles, 3 x 3 x 3", _sliding
    yield TARGET, "causal", lambda: TileMask.from_rule(Causal(), (TARGET.tokens,) * 2)
    yield TARGET, "four samples", lambda: _segments(TARGET)


def balances() -> str:
    """Balance of each kernel, and what the forward of sm_90a is predicted to gain, as Markdown."""
    lines = [
        "| shape | mask | kept | sm_90a | sm_80 | dq | dk, dv | keys from memory, TB/s | times dense (1 / kept) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    dense: dict[Shape, Run] = {}
    for shape, name, make in tqdm(list(cases()), desc="schedule", unit="mask"):
        mask = make()
        run = simulate(SM90, shape, mask)
        dense.setdefault(shape, run if mask is None else simulate(SM90, shape, None))
        others = [
            simulate(SM80, shape, mask),
            simulate(ROWS, shape, mask),
            simulate(COLUMNS, shape, mask, columns=True),
        ]
        kept = 1.0 if mask is None else mask.density()
        gain = dense[shape].seconds / run.seconds
        cells = [f"{r.balance:.1%}" for r in (run, *others)]
        lines.append(
            f"| {shape.name} x {shape.heads} x {shape.head_dim} | {name} | {kept:.1%} | {' | '.join(cells)} | "
            f"{run.bandwidth / 1e12:.1f} | {gain:.2f} ({1 / kept:.2f}) |"
        )
    return "\n".join(lines) + "\n"


def blocks() -> str:
    """What narrower tiles cost at the same share of the scores, as Markdown."""
    lines = [
        "| head dim | tiles | kept | times dense in blocks of 128 | keys through L2, bytes a cycle |",
        "|---|---|---|---|---|",
    ]
    for dim in (64, 128):
        shape = Shape("16k", 16384, 24, dim)
        dense = simulate(SM90, shape, None)
        for block in ((128, 128), (128, 64)):
            kernel = narrower(SM90, block[1])
            for kept in (0.5, 0.1):
                run = simulate(kernel, shape, even(shape, kept, block))
                moved = 4 * block[1] * dim / kernel.block_cycles(dim)
                gain = dense.seconds / run.seconds
                lines.append(f"| {dim} | {block[0]} x {block[1]} | {kept:.0%} | {gain:.2f} | {moved:.0f} |")
    return "\n".join(lines) + "\n"


def run(page: Path) -> None:
    """Both tables, into the page."""
    show(page, "schedule", balances())
    show(page, "blocks", blocks())
