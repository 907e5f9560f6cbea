"""What choosing tiles costs: selection and lists of each sparse method, beside the attention that they save.

Queries and keys have structure, else every tile would matter alike: tokens of a block share a direction, and blocks
differ. The goal is 2 % of what is saved, for methods that look at pooled tokens; XAttention multiplies a sixteenth of
all scores by design.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import paths  # noqa: F401
import torch
from stage import Context, Record, Target
from torch import Tensor

from maskaccel import methods, ops
from maskaccel.masks import TileMask

SECONDS = 60.0
EXPECTED = 10.0
GOAL = 0.02

# (tokens, heads, head dim): 16k and 64k of the goals, FLUX at 2048 px, Wan 1.3B at 480p
SHAPES = ((16384, 24, 128), (65536, 24, 128), (32760, 12, 128), (4608, 24, 128))


@dataclass(frozen=True)
class Choice:
    """How a method is asked for tiles, and the goal of its cost."""

    method: Any
    goal: float = GOAL


CHOICES = {
    "SpargeAttn": Choice(methods.SpargeAttn(cdf=0.9)),
    "SpargeAttn, 128 x 128": Choice(methods.SpargeAttn(cdf=0.9, block=(128, 128))),
    "VSA": Choice(methods.VSA(top_k=0.125)),
    "DraftAttention": Choice(methods.DraftAttention(sparsity=0.75)),
    "XAttention": Choice(methods.XAttention(tau=0.9), 0.15),
}


def items(context: Context) -> list[str]:
    """`TOKENS HEADS WIDTH method`."""
    shapes = ((256, 2, 16),) if context.tiny else SHAPES
    return [f"{s} {h} {d} {name}" for s, h, d in shapes for name in CHOICES]


def _operands(tokens: int, heads: int, width: int, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = -(-tokens // 128)
    found = []
    for share in (1.5, 1.5, 0.0):
        common = torch.randn(1, blocks, heads, width, generator=generator).to(device).repeat_interleave(128, 1)
        own = torch.randn(1, tokens, heads, width, generator=torch.Generator(device).manual_seed(1), device=device)
        found.append((share * common[:, :tokens] + own).to(torch.bfloat16))
    return found


def _kernels(call: Callable[[], Any], device: str) -> int | None:
    """Kernels, copies and clears that a call launches."""
    if device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages())


def run(item: str, context: Context) -> Record:
    """One method at one shape."""
    tokens, heads, width, name = item.split(maxsplit=3)
    q, k, v = _operands(int(tokens), int(heads), int(width), context.device)
    method = CHOICES[name].method

    def choose() -> TileMask:
        return method.select(q, k, None)

    def choose_and_list() -> TileMask:
        mask = choose()
        mask.lists()
        return mask

    with torch.no_grad():
        mask = choose_and_list()
        calls: dict[str, Callable[[], Any]] = {
            "select": choose,
            "lists": partial(torch.ops.maskaccel.tile_lists, mask.bits, None, mask.columns, False),
            "both": choose_and_list,
            "sparse": partial(ops.tile_attention, q, k, v, mask),
            "dense": partial(ops.tile_attention, q, k, v),
        }
        kernels = {what: _kernels(calls[what], context.device) for what in ("select", "lists")}
        ms = {what: statistics.median(times) for what, times in context.samples(calls).items()}
    saved = ms["dense"] - ms["sparse"]
    share = ms["both"] / saved if saved > 0 else None
    kept = mask.density()
    text = f"{kept:.0%} kept, {ms['both']:.3f} ms" + (f", {share:.1%} of what is saved" if share is not None else "")
    return {"kept": kept, "ms": ms, "kernels": kernels, "share": share, "summary": text}


def targets(records: dict[str, Record]) -> list[Target]:
    """Share of the attention saved, by method and shape from 16k tokens on."""
    found = []
    for item, record in records.items():
        tokens, heads, width, name = item.split(maxsplit=3)
        if int(tokens) < 16384 or "share" not in record:
            continue
        what = f"{name}: choosing tiles of the attention saved, {tokens} x {heads} x {width}"
        share = record["share"]
        found.append(Target(what, CHOICES[name].goal, share, "of it", at_most=True))
    return found


def table(records: dict[str, Record]) -> str:
    """Times and shares."""
    lines = [
        "| shape | method | kept | selection, ms (kernels) | lists, ms | dense, ms | sparse, ms | of what is saved |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for item, r in records.items():
        if "ms" not in r:
            continue
        tokens, heads, width, name = item.split(maxsplit=3)
        ms, share = r["ms"], "-" if r["share"] is None else f"{r['share']:.1%}"
        select = f"{ms['select']:.3f} ({r['kernels']['select']})"
        lines.append(
            f"| {tokens} x {heads} x {width} | {name} | {r['kept']:.0%} | {select} | "
            f"{ms['lists']:.3f} | {ms['dense']:.3f} | {ms['sparse']:.3f} | {share} |"
        )
    return "\n".join(lines) + "\n"
