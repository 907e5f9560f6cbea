"""What choosing tiles costs on a GPU, predicted: kernels and bytes of each method's selection, counted without a GPU.

The methods run on tensors without data; every torch op that is no view is taken as one kernel that reads its operands
and writes its results, a sort or a k-th value as four passes. Nothing here is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskaccel.masks import TileMask
from maskaccel.methods import VSA, DraftAttention, SpargeAttn, XAttention

from .page import show
from .schedule_model import CLOCK, MEMORY, MULTIPROCESSORS, PEAK, Kernel

SHAPES = ((4608, 24, 128), (16384, 24, 128), (65536, 24, 128))
METHODS: dict[str, Any] = {
    "SpargeAttn": SpargeAttn(block=(128, 128)),
    "VSA": VSA(),
    "DraftAttention": DraftAttention(),
    "XAttention": XAttention(),
}
KERNEL = 2e-6  # seconds of the smallest kernel behind another
FP32 = 256  # FLOP a cycle and multiprocessor without tensor cores
PASSES = {"sort": 4, "kthvalue": 4}
KERNELS = {"tile_lists": 2}  # of our ops that launch several
VIEWS = ("view", "expand", "transpose", "permute", "slice", "select", "squeeze", "t.", "alias", "as_strided", "detach",
         "split", "unbind", "empty", "sym_")  # fmt: skip


@dataclass
class Cost:
    """Of the calls that were counted.

    Attributes:
        kernels: Launched.
        moved: Bytes read and written.
        seconds: Predicted.
    """

    kernels: int = 0
    moved: float = 0.0
    seconds: float = 0.0


class Counting(TorchDispatchMode):
    """Adds up what torch would launch."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Run the op on tensors without data, and count it."""
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[-1]
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        operands = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        if name.removeprefix("_").startswith(VIEWS) or not results:
            return out
        passes = next((n for part, n in PASSES.items() if name.startswith(part)), 1)
        kernels = KERNELS.get(name, passes)
        moved = passes * sum(float(_stored(t)) for t in (*operands, *results))
        seconds = moved / MEMORY
        if name.startswith(("bmm", "mm", "baddbmm")):
            a, b = operands[-2:]
            peak = PEAK if a.element_size() == 2 else FP32
            flops = 2 * math.prod(a.shape) * b.shape[-1]
            seconds = max(seconds, flops / (peak * MULTIPROCESSORS * CLOCK * 0.7))
        self.cost.kernels += kernels
        self.cost.moved += moved
        self.cost.seconds += max(seconds, KERNEL * kernels)
        return out


def _stored(t: Tensor) -> int:
    """Bytes of the elements that are not repeated."""
    sizes = (n for n, stride in zip(t.shape, t.stride(), strict=True) if stride != 0)
    return math.prod(sizes) * t.element_size()


def cost(method: Any, tokens: int, heads: int, width: int) -> Cost:
    """Of choosing the tiles of one call in bf16, and of their lists."""
    q, k = (torch.empty(1, tokens, heads, width, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with torch.no_grad(), Counting() as counting:
        mask: TileMask = method.select(q, k, None)
        torch.ops.maskaccel.tile_lists(mask.bits, None, mask.columns, False)
    return counting.cost


def table() -> str:
    """As Markdown."""
    lines = [
        "| shape | method | kernels | moved, MB | us | of the attention saved at 75 % skipped |",
        "|---|---|---|---|---|---|",
    ]
    for tokens, heads, width in SHAPES:
        blocks = (tokens / 128) ** 2 * heads
        dense = blocks * Kernel("forward").block_cycles(width) / MULTIPROCESSORS / CLOCK
        for name, method in METHODS.items():
            found = cost(method, tokens, heads, width)
            share = found.seconds / (0.75 * dense)
            lines.append(
                f"| {tokens} x {heads} x {width} | {name} | {found.kernels} | {found.moved / 1e6:.0f} | "
                f"{found.seconds * 1e6:.0f} | {share:.1%} |"
            )
    return "\n".join(lines) + "\n"


def run(page: Path) -> None:
    """The table, into the page."""
    show(page, "selection", table())
