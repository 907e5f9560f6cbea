"""Tile-skipping attention on a GPU against density: cuDNN's and torch's attention, FlexAttention, our kernels."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from maskaccel import ops
from maskaccel.masks import TileMask

DENSITIES = (1.0, 0.5, 0.25, 0.1)
# (tokens, heads, head dim): about equal work at each length
SHAPES = tuple((s, max(1, 24 * 4096 // s), d) for s in (4096, 16384, 65536) for d in (64, 72, 128))
TINY = ((256, 2, 64),)
BLOCK = (128, 128)


def masked(tokens: int, heads: int, density: float, device: str) -> TileMask:
    """Whole tiles at random places, as many in every row."""
    rows, columns = (-(-tokens // b) for b in BLOCK)
    scores = torch.rand(heads, rows, columns, generator=torch.Generator().manual_seed(0))
    chosen = scores.topk(max(1, round(density * columns)), dim=-1).indices
    tiles = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, chosen, True)
    return TileMask.from_tiles(tiles, (tokens, tokens), BLOCK).to(device)


def calls(q: Tensor, k: Tensor, v: Tensor, usable: list[str], flex: bool) -> dict[str, Callable[..., Tensor]]:
    """Attention of `(q, k, v)` by provider and density."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    tokens, heads, device = q.shape[1], q.shape[2], q.device.type

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(q, k, v)

    found: dict[str, Callable[..., Tensor]] = {"sdpa": sdpa}
    if device == "cuda":
        found["cudnn"] = cudnn
    for backend in usable:
        found[f"{backend} dense"] = lambda q, k, v, b=backend: ops.tile_attention(q, k, v, backend=b)
        for density in DENSITIES:
            mask = masked(tokens, heads, density, device)
            mask.lists()
            found[f"{backend} {density}"] = lambda q, k, v, b=backend, m=mask: ops.tile_attention(q, k, v, m, backend=b)
    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        for density in DENSITIES:
            block_mask = masked(tokens, heads, density, device).to_block_mask()
            found[f"flex {density}"] = lambda q, k, v, m=block_mask: compiled(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=m
            ).transpose(1, 2)
    return found


def sweep(device: str, timer: Any, usable: list[str], rounds: int, tiny: bool) -> list[dict[str, Any]]:
    """Every shape, forward and backward; a provider that cannot run a case is named with its reason."""
    results = []
    for tokens, heads, width in TINY if tiny else SHAPES:
        generator = torch.Generator().manual_seed(0)
        leaves = [
            torch.randn(1, tokens, heads, width, generator=generator).to(device, torch.bfloat16).requires_grad_()
            for _ in range(3)
        ]
        dout = torch.randn(leaves[0].shape, generator=generator).to(device, torch.bfloat16)
        flops = 4 * tokens * tokens * heads * width
        for direction in ("forward", "backward"):
            runs, refused = {}, {}
            for name, call in calls(*leaves, usable, flex=device == "cuda").items():
                try:
                    runs[name] = _one(call, leaves, dout, direction)
                    runs[name]()
                except Exception as error:
                    refused[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
                    runs.pop(name, None)
            samples: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(rounds):
                for name in list(runs) if turn % 2 == 0 else list(reversed(runs)):
                    samples[name].append(timer(runs[name], 3))
            medians = {name: statistics.median(values) for name, values in samples.items()}
            work = flops if direction == "forward" else 2.5 * flops
            results.append({
                "tokens": tokens, "heads": heads, "head_dim": width, "direction": direction, "dtype": "bfloat16",
                "median_ms": medians, "refused": refused,
                "dense_tflops": {name: work / ms / 1e9 for name, ms in medians.items()},
            })  # fmt: skip
            base = medians.get("cudnn", medians.get("sdpa"))
            print(f"attention {tokens} x {heads} x {width} {direction}", flush=True)
            for name, ms in medians.items():
                print(f"  {name:14} {ms:9.3f} ms  {base / ms if base else 0:6.2f}x of the peer", flush=True)
            for name, reason in refused.items():
                print(f"  {name:14} {reason}", flush=True)
    return results


def _one(call: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor, direction: str) -> Callable[[], Any]:
    if direction == "forward":
        inputs = [t.detach() for t in leaves]
        return lambda: call(*inputs)
    out = call(*leaves)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
