"""Calls every kernel of a family at tiny shapes, for `sanitize.py` to watch.

    python benchmarks/gpu/sanitized.py FAMILY [--device cpu] [--seeds 2]

Prints one line of JSON: how many calls of which ops. Nothing is compared: that is the part of other stages.
"""

from __future__ import annotations

import argparse
import json
import sys

import kernels
import paths  # noqa: F401
import torch
from sanitize import FAMILIES

from maskaccel.ops._backends import call_refusal, refusal
from maskaccel.ops.attention.schema import KEEP, NEED_K, NEED_Q, NEED_V, PRUNE

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def ops_of(family: str) -> list[str]:
    """The raw ops of a family."""
    import _raw_attention
    import _raw_tokens
    from _raw_cases import ADALN, OPS, STEPS

    parts = {"adaln": ADALN, "steps": STEPS, "tokens": _raw_tokens.DRAWS, "attention": _raw_attention.DRAWS}
    return list(OPS if family == "triton" else parts[family])


def random_calls(family: str, device: str, seeds: int) -> dict[str, int]:
    """Calls of each op with random operands over its contract."""
    from _raw_cases import draw, run

    backend = "triton" if family == "triton" else device
    counts = {}
    for op in ops_of(family):
        if refusal(backend, torch.device(device), torch.bfloat16, op) is not None:
            continue
        kernel = kernels.find(backend, op)
        for seed in range(seeds):
            args = draw(op, seed, DTYPES[seed % 3], device)
            dtype = next((t.dtype for t in args if isinstance(t, torch.Tensor) and t.is_floating_point()), DTYPES[0])
            if refusal(backend, torch.device(device), dtype, op) or call_refusal(backend, op, args):
                continue
            run(op, kernel, args)
            counts[op] = counts.get(op, 0) + 1
    return counts


def hopper_calls(device: str) -> dict[str, int]:
    """Attention that the kernels of sm_90a take: head dims, masks, keep bits, pruning, gradients."""
    from maskaccel.masks import TileMask

    kernel, backward = kernels.find(device, "tile_attention"), kernels.find(device, "tile_attention_backward")
    counts: dict[str, int] = {}
    if kernel is None or backward is None:
        return counts
    generator = torch.Generator().manual_seed(0)
    for dim in (64, 72, 96, 128, 256):
        q, k, v = (torch.randn(1, n, 2, dim, generator=generator).bfloat16().to(device) for n in (300, 520, 520))
        tiles = (torch.rand(1, 2, 3, 5, generator=generator) < 0.5).to(device)
        some = (torch.rand(1, 2, 300, 520, generator=generator) < 0.7).to(device)
        masks = (None, TileMask.from_tiles(tiles, (300, 520)), TileMask.from_bool(some, (128, 128)))
        for mask in masks:
            lists: tuple = (None,) * 8
            if mask is not None:
                lists = (*mask.lists(), *mask.transposed_lists(), mask.pattern_of, mask.patterns)
            for flags in (KEEP, KEEP | PRUNE, 0) if dim <= 128 else (0,):
                out, lse, _ = kernel(q, k, v, *lists, *(None,) * 7, 128, 128, dim**-0.5, -1.0, flags)
                counts[f"dim {dim}"] = counts.get(f"dim {dim}", 0) + 1
            gradients = NEED_Q | NEED_K | NEED_V
            backward(q, None, q, k, v, out, lse, *lists, *(None,) * 4, 128, 128, dim**-0.5, gradients)
            counts[f"gradients, dim {dim}"] = counts.get(f"gradients, dim {dim}", 0) + 1
    return counts


def main() -> int:
    """Calls one family, waits, says what was called."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    with torch.no_grad():
        if args.family == "sm90":
            counts = hopper_calls(args.device)
        else:
            counts = random_calls(args.family, args.device, args.seeds)
        if args.device == "cuda":
            torch.cuda.synchronize()
    print(json.dumps({"calls": sum(counts.values()), "ops": counts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
