"""Token dropping on a GPU: routed training steps, partial calls over cached K/V, graphs and synchronisation.

Blocks are DiT's (`maskaccel.methods`), so nothing beside torch is needed. Peers: the dense stack, the same route with a
repeated index, gather and scatter, and a K/V cache written by index and concatenated in every layer.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from stage import Context, Record
from torch import Tensor, nn

from maskaccel import TokenRoute, ops
from maskaccel.methods._transformer import AdaLNBlock


@dataclass(frozen=True)
class Size:
    """A stack of blocks and its batch."""

    name: str
    batch: int
    tokens: int
    width: int
    heads: int
    depth: int


TRAINED = (Size("SiT-XL/2 256px", 64, 256, 1152, 16, 28), Size("SiT-XL/2 512px", 16, 1024, 1152, 16, 28))
TINY = (Size("tiny", 2, 16, 32, 2, 6),)
# (name, batch, text, image tokens, heads, head dim)
CACHED = (("FLUX.1 1024px", 1, 512, 4096, 24, 128), ("Wan2.1-1.3B 480p", 1, 0, 32760, 12, 128))
TINY_CACHED = (("tiny", 1, 4, 28, 2, 16),)
KEPT = (0.5, 0.25)
SECONDS = 60.0
EXPECTED = 5.0


class Stack(nn.Module):
    """Blocks, with a route around those from 2 to the last but two."""

    def __init__(self, size: Size, keep: float | None, by_hand: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(AdaLNBlock(size.width, size.heads) for _ in range(size.depth))
        for p in self.parameters():
            if p.ndim > 1 and not p.any():
                nn.init.normal_(p, std=0.02)
        self.first, self.last = 2, size.depth - 3
        self.keep, self.by_hand = keep, by_hand
        self.route = None if keep is None or by_hand else TokenRoute(self.first, self.last, keep)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """All blocks."""
        held: Any = None
        for number, block in enumerate(self.blocks):
            if number == self.first and self.keep is not None:
                x, held = self._enter(x)
            x = block(x, c)
            if number == self.last and self.keep is not None:
                x = self._leave(x, held)
        return x

    def _enter(self, x: Tensor) -> tuple[Tensor, Any]:
        if self.route is not None:
            return self.route.enter(x)
        batch, n, width = x.shape
        ids = torch.rand(batch, n, device=x.device).argsort(dim=1)[:, : n - int(n * (1 - (self.keep or 1)))]
        at = ids.unsqueeze(-1).repeat(1, 1, width)
        return torch.gather(x, 1, at), (x.clone(), at)

    def _leave(self, x: Tensor, held: Any) -> Tensor:
        if self.route is not None:
            return self.route.exit(x, held)
        stash, at = held
        return stash.clone().scatter(1, at, x)


def _step(size: Size, keep: float | None, by_hand: bool, device: str) -> Callable[[], None]:
    model = Stack(size, keep, by_hand).to(device, torch.bfloat16).train()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size.batch, size.tokens, size.width, generator=generator).to(device, torch.bfloat16)
    c = torch.randn(size.batch, size.width, generator=generator).to(device, torch.bfloat16)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(x, c).square().mean().backward()

    return step


def training(size: Size, context: Context) -> Record:
    """Forward and backward: dense, routed, and routed by hand; milliseconds and the peak of memory."""
    settings: dict[str, tuple[float | None, bool]] = {"dense": (None, False)}
    for keep in KEPT:
        settings |= {f"route {keep}": (keep, False), f"by hand {keep}": (keep, True)}
    steps = {name: _step(size, *setting, context.device) for name, setting in settings.items()}
    peak = {}
    for name, step in steps.items():
        step()
        if context.device == "cuda":
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            peak[name] = torch.cuda.max_memory_allocated() - held
    return {"what": "training step", **vars(size), **_medians(steps, context), "peak_bytes": peak}


def _medians(calls: dict[str, Callable[[], Any]], context: Context) -> Record:
    samples = context.samples(calls, min(context.rounds, 7))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {"median_ms": medians, "summary": ", ".join(f"{name} {ms:.3g} ms" for name, ms in medians.items())}


def cached(case: tuple, share: float, context: Context) -> Record:
    """K/V rows written and attended to by the active rows of one layer, text rows always active."""
    name, batch, text, image, heads, dim = case
    device = context.device
    index = ops.random_keep(batch, image, share, seed=0, device=device, shared=True).shift(text)
    rows, total = index.kept, text + image

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)

    q, k, v = (randn(batch, rows, heads, dim) for _ in range(3))
    weight, cos, sin = randn(dim), randn(total, dim).float(), randn(total, dim).float()
    k_cache, v_cache = randn(batch, total, heads, dim), randn(batch, total, heads, dim)
    image_k, image_v, at = k_cache[:, text:].clone(), v_cache[:, text:].clone(), index.keep[0].long()

    def ours() -> Tensor:
        turned = ops.write_kv_rows(
            k, v, k_cache, v_cache, index, q=q, q_weight=weight, k_weight=weight, cos=cos, sin=sin, norm="rms"
        )
        return ops.tile_attention(turned, k_cache, v_cache)

    def turned(x: Tensor) -> Tensor:
        x = F.rms_norm(x, (dim,), weight, 1e-6)
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        other = torch.stack((-second, first), dim=-1).flatten(-2)
        return (x.float() * cos[at][:, None] + other.float() * sin[at][:, None]).to(x.dtype)

    def eager() -> Tensor:
        query, key = turned(q), turned(k)
        image_k[:, at[text:] - text] = key[:, text:]
        image_v[:, at[text:] - text] = v[:, text:]
        keys, values = torch.cat([key[:, :text], image_k], 1), torch.cat([v[:, :text], image_v], 1)
        heads_first = (t.transpose(1, 2) for t in (query, keys, values))
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    with torch.no_grad():
        difference = (ours().float() - eager().float()).abs().max().item()
        medians = _medians({"maskaccel": ours, "index_put, cat, sdpa": eager}, context)
    return {"what": "active rows over cached K/V", "name": name, "active": share, "rows": rows, "keys": total,
            **medians, "largest_difference": difference}  # fmt: skip


@contextlib.contextmanager
def _no_sync(device: str) -> Iterator[None]:
    """Any wait for the device inside is an error."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def unwaiting(device: str) -> dict[str, str]:
    """Every step that must not wait for the device: `ok`, or what it raised."""
    step = torch.zeros(1, dtype=torch.int64, device=device)
    x = torch.randn(2, 64, 32, device=device, requires_grad=True)
    score, age = torch.rand(2, 64, device=device), torch.zeros(2, 64, dtype=torch.int32, device=device)
    logits, tokens = torch.randn(2, 64, 99, device=device), torch.full((2, 64), 99, device=device)

    def routed() -> None:
        index = ops.random_keep(2, 64, 32, seed=0, step=step)
        rows, y = ops.gather_modulate(x, index, None, None)
        ops.scatter_merge(x, rows + y, index).sum().backward()

    def cells() -> None:
        ops.random_keep(2, 64, 0.25, seed=0, step=step, scheme="cell", grid=(8, 8))

    calls: dict[str, Callable[[], Any]] = {
        "a routed step": routed,
        "cells": cells,
        "select_active": lambda: ops.select_active(score, age, 16),
        "confidence_unmask": lambda: ops.confidence_unmask(logits, tokens, 99, 4, step=step),
        "match_tokens": lambda: ops.match_tokens(x, 0.5, grid=(8, 8), step=step),
    }
    found = {}
    for name, call in calls.items():
        call()  # compiled and allocated before
        try:
            with _no_sync(device):
                call()
            found[name] = "ok"
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0][:200]
    return found


def captured(device: str) -> str:
    """A routed forward in a CUDA graph whose step counts up: the ids of every replay are those of its step."""
    if device != "cuda":
        return "no GPU"
    step = torch.zeros(1, dtype=torch.int64, device=device)
    x = torch.randn(4, 256, 64, device=device)

    def forward() -> Tensor:
        index = ops.random_keep(4, 256, 64, seed=7, step=step)
        return ops.scatter_merge(x, ops.gather_rows(x, index) + 1, index)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
        step += 1
    step.zero_()
    for number in range(3):
        graph.replay()
        index = ops.random_keep(4, 256, 64, seed=7, step=number, device=device)
        if not torch.equal((out != x).any(-1), index.mask):
            return f"replay {number} did not run the tokens of its step"
    return "ok"


def _todo(context: Context) -> dict[str, Callable[[], Record]]:
    """Every item; what may not go wrong first."""
    todo: dict[str, Callable[[], Record]] = {
        "no synchronisation": lambda: _all_well(unwaiting(context.device)),
        "CUDA graph": lambda: _all_well({"replays": captured(context.device)}),
    }
    for size in TINY if context.tiny else TRAINED:
        todo[f"training step {size.name}"] = lambda size=size: training(size, context)
    for case in TINY_CACHED if context.tiny else CACHED:
        for share in (0.5, 0.25, 0.1):
            name = f"active rows {share} over cached K/V {case[0]}"
            todo[name] = lambda case=case, share=share: cached(case, share, context)
    return todo


def _all_well(found: dict[str, str]) -> Record:
    wrong = {name: what for name, what in found.items() if what not in ("ok", "no GPU")}
    return {"calls": found, "wrong": wrong}


def items(context: Context) -> list[str]:
    """Names of what is checked and timed."""
    return list(_todo(context))


def run(item: str, context: Context) -> Record:
    """One of them."""
    return _todo(context)[item]()


def table(records: dict[str, Record]) -> str:
    """Milliseconds of each, beside the usual code."""
    lines = ["| what | median ms | peak MiB |", "|---|---|---|"]
    for item, record in records.items():
        if "median_ms" not in record:
            lines.append(f"| {item} | {', '.join(f'{name}: {what}' for name, what in record['calls'].items())} | |")
            continue
        times = ", ".join(f"{name} {ms:.3g}" for name, ms in record["median_ms"].items())
        peak = ", ".join(f"{name} {count / 2**20:.0f}" for name, count in record.get("peak_bytes", {}).items())
        lines.append(f"| {item} | {times} | {peak} |")
    return "\n".join(lines)
