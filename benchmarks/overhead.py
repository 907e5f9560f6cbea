"""One call of every public op on operands so small that the kernel costs next to nothing.

    python -m benchmarks.overhead [NAME ...]    microseconds of a call on this CPU, beside torch's add and attention

What is left of the time is host work: the Python of the call, checks, dispatch, allocation of results and, on a GPU,
the launch. `benchmarks/gpu/host.py` reads the same table on a GPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskaccel import ops
from maskaccel.masks import TileMask, TokenIndex

Call = Callable[[], Any]
TOKENS, WIDTH, HEADS, DIM = 32, 64, 2, 32


class Operands:
    """What the calls share: made once for a device and dtype, leaves of a graph where `grad` is set.

    With `batch` 0 kernels have no work, and what is left of a call is the host's.
    """

    def __init__(self, device: str, dtype: torch.dtype, grad: bool, batch: int = 1) -> None:
        self.device, self.dtype, self.grad, self.batch = torch.device(device), dtype, grad, batch
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int, dtype: torch.dtype = dtype, leaf: bool = grad) -> Tensor:
            made = torch.randn(shape, generator=generator).to(self.device, dtype)
            return made.requires_grad_() if leaf else made

        self.x, self.a = randn(batch, TOKENS, WIDTH), randn(batch, TOKENS, WIDTH)
        self.mods = [randn(batch, WIDTH) for _ in range(5)]
        self.table, self.weight = randn(WIDTH), randn(WIDTH)
        self.q, self.k, self.v = (randn(batch, TOKENS, HEADS, DIM) for _ in range(3))
        self.head_weight = randn(DIM)
        self.cos, self.sin = (randn(TOKENS, DIM // 2, dtype=torch.float32, leaf=False) for _ in range(2))
        self.lse = randn(batch, HEADS, TOKENS, dtype=torch.float32)
        tiles = torch.ones(2, 1, dtype=torch.bool, device=self.device)
        self.mask = TileMask.from_tiles(tiles, (TOKENS, TOKENS), (16, 32))
        self.mask.lists(), self.mask.transposed_lists()
        self.index = TokenIndex.from_keep(torch.arange(0, TOKENS, 2, device=self.device), TOKENS)
        self.rows = randn(batch, TOKENS // 2, WIDTH)
        self.history = randn(3, batch, TOKENS, WIDTH, leaf=False)
        self.sites = self.history[None]
        self.weights = randn(3, dtype=torch.float32, leaf=False)
        self.fresh = randn(batch, 4, WIDTH, leaf=False)
        self.ids = torch.arange(4, dtype=torch.int32, device=self.device).repeat(batch, 1)
        self.labels = torch.zeros(batch, TOKENS, dtype=torch.int32, device=self.device)
        self.heads = [randn(batch, TOKENS // 2, HEADS, DIM, leaf=False) for _ in range(3)]
        self.caches = [randn(batch, TOKENS, HEADS, DIM, leaf=False) for _ in range(2)]
        self.score, self.age = randn(batch, TOKENS, dtype=torch.float32, leaf=False), self.labels
        self.logits = randn(batch, TOKENS, 40, leaf=False)
        self.masked = torch.full((batch, TOKENS), 40, device=self.device)
        self.step = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.merge = ops.match_tokens(randn(1, TOKENS, WIDTH, leaf=False), 0.5, grid=(4, TOKENS // 4), seed=0)
        self.fp8 = self.caches[0].to(torch.float8_e4m3fn)
        self.fp8_scale = torch.ones(batch, TOKENS, HEADS, device=self.device)


def peers(o: Operands) -> dict[str, Call]:
    """What torch's own calls cost: an elementwise op, and attention."""
    q, k, v = (t.transpose(1, 2) for t in (o.q, o.k, o.v))
    add, attention = partial(torch.add, o.x, o.a), partial(F.scaled_dot_product_attention, q, k, v)
    return {"torch.add": add, "scaled_dot_product_attention": attention}


def differentiable(o: Operands) -> dict[str, Call]:
    """Calls of the ops with a derivative."""
    gate, scale, shift, scale2, shift2 = o.mods
    fused = partial(ops.gate_residual_norm_modulate, o.x, o.a, gate, scale, shift)
    return {
        "norm_modulate": partial(ops.norm_modulate, o.x, scale, shift),
        "norm_modulate, weight": partial(ops.norm_modulate, o.x, scale, shift, weight=o.weight),
        "norm_modulate, pair": partial(ops.norm_modulate, o.x, scale, shift, scale2=scale2, shift2=shift2),
        "gate_residual_norm_modulate": fused,
        "gate_residual_norm_modulate, tables": partial(fused, gate_table=o.table, scale_table=o.table),
        "gate_residual": partial(ops.gate_residual, o.x, o.a, gate),
        "qk_norm_rope": partial(ops.qk_norm_rope, o.q, o.k, o.head_weight, o.head_weight, o.cos, o.sin),
        "gated_activation": partial(ops.gated_activation, o.x),
        "tile_attention": partial(ops.tile_attention, o.q, o.k, o.v),
        "tile_attention, mask": partial(ops.tile_attention, o.q, o.k, o.v, o.mask),
        "tile_attention, mask, lse": partial(ops.tile_attention, o.q, o.k, o.v, o.mask, return_lse=True),
        "merge_attention": partial(ops.merge_attention, o.q, o.lse, o.k, o.lse),
        "segment_attention, two": partial(ops.segment_attention, o.q, [(o.k, o.v), (o.k, o.v)]),
        "linear_attention": partial(ops.linear_attention, o.q, o.k, o.v),
        "gather_rows": partial(ops.gather_rows, o.x, o.index),
        "gather_modulate": partial(ops.gather_modulate, o.x, o.index, scale, shift),
        "scatter_merge": partial(ops.scatter_merge, o.x, o.rows, o.index),
        "scatter_merge, mask_token": partial(
            ops.scatter_merge, None, o.rows, o.index, mode="mask_token", mask_token=o.weight
        ),
        "merge_tokens": partial(ops.merge_tokens, o.x, o.merge),
        "unmerge_tokens": partial(ops.unmerge_tokens, o.rows, o.merge),
    }


def others(o: Operands) -> dict[str, Call]:
    """Calls of the ops without a derivative."""
    gate, scale, shift, _, _ = (m.detach() for m in o.mods)
    x, a = o.x.detach(), o.a.detach()
    q, k, v = o.heads
    return {
        "tile_attention, keep bits": partial(
            ops.tile_attention, o.q.detach(), o.k.detach(), o.v.detach(), o.mask, skip_threshold=-6.0, return_keep=True
        ),
        "attention_column_sums": partial(
            ops.attention_column_sums, o.q.detach(), o.k.detach(), o.lse.detach(), o.mask
        ),
        "relative_difference": partial(ops.relative_difference, x, a),
        "combine_history": partial(ops.combine_history, o.history, o.weights, x=x, gate=gate),
        "combine_sites": partial(ops.combine_sites, o.sites, o.weights, x=x),
        "scatter_combine": partial(ops.scatter_combine, o.history, o.weights, o.fresh, o.ids, x=x),
        "scatter_combine, labels": partial(
            ops.scatter_combine, o.history, o.weights, o.fresh, o.ids, o.labels, gamma=0.1, x=x
        ),
        "gram": partial(ops.gram, o.history),
        "kmeans": partial(ops.kmeans, x, 2, iters=1),
        "combine_history_norm_modulate": partial(
            ops.combine_history_norm_modulate, o.history, o.weights, scale, shift, x=x, gate=gate
        ),
        "norm_modulate_difference": partial(ops.norm_modulate_difference, x, a, scale, shift),
        "random_keep": partial(ops.random_keep, o.batch, TOKENS, 16, seed=0, step=o.step),
        "select_active": partial(ops.select_active, o.score, o.age, 16),
        "write_kv_rows": partial(
            ops.write_kv_rows, k, v, *o.caches, o.index, q=q, q_weight=o.head_weight.detach(),
            k_weight=o.head_weight.detach(), cos=o.cos, sin=o.sin, norm="rms",
        ),
        "read_kv_rows": partial(ops.read_kv_rows, o.fp8, o.fp8_scale, o.dtype),
        "sample_logits": partial(ops.sample_logits, o.logits, o.masked, 40, temperature=0.0, step=o.step),
        "unmask_select": partial(
            ops.unmask_select, o.score, o.masked, o.masked, 40, 1, step=o.step
        ),
        "confidence_unmask": partial(
            ops.confidence_unmask, o.logits, o.masked, 40, 1, temperature=0.0, step=o.step
        ),
    }  # fmt: skip


def microseconds(call: Call, calls: int = 200, rounds: int = 25) -> float:
    """The quickest round of `calls` calls, for one of them."""
    for _ in range(calls):
        call()
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter() - begin)
    return best * 1e6 / calls


def main(names: list[str]) -> None:
    """Print the table for this CPU."""
    torch.set_num_threads(1)
    columns: dict[str, dict[str, Call]] = {}
    for title, batch, grad in (("no_grad", 1, False), ("no work", 0, False), ("autograd", 1, True)):
        o = Operands("cpu", torch.float32, grad, batch)
        columns[title] = {**peers(o), **differentiable(o), **({} if grad else others(o))}
    print(f"{'':40}" + "".join(f"{title:>10}" for title in columns))
    for name in columns["no_grad"]:
        if names and not any(part in name for part in names):
            continue
        line = f"{name:40}"
        for title, calls in columns.items():
            with torch.set_grad_enabled(title == "autograd"):
                line += f"{microseconds(calls[name]):10.2f}" if name in calls else ""
        print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
