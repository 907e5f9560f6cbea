"""A launch of an attention kernel without a GPU: which multiprocessor works on what when, and what L2 has to fetch.

The sequence of items and the walk along a row of tiles are the kernels' own code (`csrc/attention/cuda_grid.h`,
`cuda_schedule.h`); costs are cycles that a `Kernel` assumes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from maskaccel.masks import TileMask

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_suffix(".cpp")
HEADERS = tuple(ROOT / "csrc" / "attention" / f"cuda_{name}.h" for name in ("schedule", "grid"))

MULTIPROCESSORS, CLOCK = 132, 1.755e9  # of an H100 or H200
PEAK = 4096  # FLOP a cycle and multiprocessor: wgmma of 16-bit operands
L2_BYTES = 40 << 20  # of 50 MB: queries, results and lists take some
MEMORY = 0.9 * 4.3e12  # bytes a second: nine tenths of what a copy on an H200 is assumed to reach
LAUNCH = 4e-6  # seconds that a launch costs beside its items


class Launch(ctypes.Structure):
    """Sizes of a launch, as schedule_model.cpp has them."""

    _fields_ = [
        *((name, ctypes.c_int) for name in (
            "tile_rows", "subs", "batch", "heads", "mask_batch", "mask_heads", "window",
            "width", "bn", "block", "keys", "key_heads", "workers", "cached_blocks",
        )),
        *((name, ctypes.c_double) for name in ("per_item", "per_block", "per_partial")),
    ]  # fmt: skip


class _Outcome(ctypes.Structure):
    _fields_ = [("makespan", ctypes.c_double), ("busy", ctypes.c_double)]
    _fields_ += [("blocks", ctypes.c_int64), ("missed", ctypes.c_int64)]


@functools.cache
def native() -> ctypes.CDLL:
    """The headers behind C functions, compiled once per state of the sources."""
    text = b"".join(p.read_bytes() for p in (SOURCE, *HEADERS))
    folder = ROOT / "build" / "schedule"
    library = folder / f"schedule_{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{library.stem}.{id(library)}.part"
        subprocess.run(["g++", "-std=c++17", "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(part)], check=True)
        part.replace(library)  # another process may have been first: either file is good
    found = ctypes.CDLL(str(library))
    found.simulate.restype = _Outcome
    return found


@dataclass(frozen=True)
class Kernel:
    """What a kernel does with an item, in cycles of a multiprocessor.

    Attributes:
        name: For tables.
        rows: Query rows of an item.
        block: Keys of a step.
        products: Matrix products of a block; two in the forward.
        rate: Share of the peak that steps in a row reach.
        per_item: Cycles that an item costs beside its blocks: the first scores and the last product run alone, the
            softmax of the first block has nothing beside it, results are written.
        per_partial: Cycles of the bits of a block that is kept in part.
        residents: CTAs of a multiprocessor.
        window: Rows of a shared mask before the next head takes its turn.
    """

    name: str
    rows: int = 128
    block: int = 128
    products: int = 2
    rate: float = 0.75
    per_item: float = 1200.0
    per_partial: float = 400.0
    residents: int = 1
    window: int = 16

    def block_cycles(self, head_dim: int) -> float:
        """Of one step, alone on a multiprocessor."""
        return self.products * 2 * self.rows * self.block * head_dim / PEAK / self.rate


@dataclass(frozen=True)
class Shape:
    """`(batch, tokens, heads, head_dim)` of a model's attention."""

    name: str
    tokens: int
    heads: int
    head_dim: int
    batch: int = 1


@dataclass(frozen=True)
class Run:
    """A simulated launch.

    Attributes:
        cycles: From the first item's start to the last one's end.
        balance: Share of that time that multiprocessors work.
        blocks: Steps of all items.
        missed: Steps whose keys and values were not in L2.
        fetched: Bytes of these.
    """

    cycles: float
    balance: float
    blocks: int
    missed: int
    fetched: float

    @property
    def seconds(self) -> float:
        """With the launch; memory may be slower than the products."""
        return LAUNCH + max(self.cycles / CLOCK, self.fetched / MEMORY)

    @property
    def bandwidth(self) -> float:
        """Bytes a second that memory has to give for the products to go on."""
        return self.fetched * CLOCK / self.cycles if self.cycles else 0.0


def simulate(kernel: Kernel, shape: Shape, mask: TileMask | None, *, order: Tensor | None = None,
             columns: bool = False) -> Run:  # fmt: skip
    """One launch.

    Args:
        kernel: Its costs.
        shape: Of the operands.
        mask: Which tiles; None: all.
        order: Of the lists, instead of the one that `tile_lists` makes.
        columns: Whether an item is keys and walks queries, as for dk and dv.
    """
    bm, bn = (kernel.rows, kernel.block) if mask is None else mask.block
    launch = Launch(
        batch=shape.batch, heads=shape.heads, mask_batch=1, mask_heads=1, keys=shape.tokens, key_heads=shape.heads,
        block=kernel.block, workers=MULTIPROCESSORS * kernel.residents,
        per_item=kernel.per_item * kernel.residents, per_block=kernel.block_cycles(shape.head_dim) * kernel.residents,
        per_partial=kernel.per_partial * kernel.residents,
        cached_blocks=L2_BYTES // (4 * kernel.block * shape.head_dim),
    )  # fmt: skip
    pointers: tuple[ctypes.c_void_p | None, ...] = (None, None, None)
    if mask is not None:
        lists = mask.transposed_lists() if columns else mask.lists()
        tensors = (*lists[:2], lists[2] if order is None else order.to(torch.int32).contiguous())
        pointers = tuple(ctypes.c_void_p(t.data_ptr()) for t in tensors)
        launch.mask_batch, launch.mask_heads, launch.width = mask.batch, mask.heads, lists[0].shape[3]
    if columns:
        bm, bn = bn, bm
    launch.bn, launch.tile_rows, launch.subs = bn, -(-shape.tokens // bm), -(-bm // kernel.rows)
    lines = launch.tile_rows * launch.mask_batch * launch.mask_heads
    launch.window = launch.tile_rows if mask is None else min(kernel.window, lines)
    out = native().simulate(ctypes.byref(launch), *pointers)
    balance = out.busy / (out.makespan * launch.workers) if out.makespan else 1.0
    return Run(out.makespan, balance, out.blocks, out.missed, 4.0 * out.missed * kernel.block * shape.head_dim)


def narrower(kernel: Kernel, block: int) -> Kernel:
    """The kernel with other blocks of keys: a step costs as much beside its products however many keys it has."""
    beside = kernel.block_cycles(128) * (1 - kernel.rate)
    products = Kernel(kernel.name, kernel.rows, block, kernel.products, 1.0).block_cycles(128)
    return replace(kernel, block=block, rate=products / (products + beside))
