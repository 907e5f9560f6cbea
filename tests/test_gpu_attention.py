"""Every attention op of the CUDA library on a GPU against the fp64 reference, by the error rule.

Skipped without a GPU.
"""

from __future__ import annotations

import pytest
import torch
from _numerics import assert_all_close_to_truth
from _raw_attention import DRAWS, draw, run, run_plain
from _raw_cases import describe, wanted, widened

import maskaccel  # noqa: F401  (defines the ops, loads the library)
from maskaccel.masks import TileMask
from maskaccel.ops import tile_attention
from maskaccel.ops._backends import call_refusal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = (torch.bfloat16, torch.float16)
LONG = (1000, 1023, 2048)


def _op(name: str):
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"maskaccel_raw::{name}", "CUDA"):
        pytest.skip(f"the native library holds no CUDA kernel of {name}")
    return getattr(torch.ops.maskaccel_raw, name).default


def _check(op: str, seed: int, **options) -> None:
    args = draw(op, seed, DTYPES[seed % 2], "cuda", **options)
    if call_refusal("cuda", op, args) is not None:
        return
    got = run(op, _op(op), args)
    results = wanted(got, run_plain(op, args), run_plain(op, widened(args)))
    assert_all_close_to_truth(*results, f"{op} seed {seed} ({describe(args)})")


@pytest.mark.parametrize("op", sorted(DRAWS))
def test_matches_reference(op):
    """Random calls over the whole contract."""
    for seed in range(120):
        _check(op, seed)


@pytest.mark.parametrize("op", ["tile_attention", "tile_attention_backward", "attention_column_sums"])
def test_long(op):
    """Lines of many tiles, more CTAs than the GPU runs at once."""
    for seed in range(24):
        _check(op, seed, lengths=LONG)


@pytest.mark.parametrize("dim", [64, 72, 128, 256])
def test_deterministic_and_graphed(dim):
    """Two runs give the same bits, forward and backward, and so does a CUDA graph."""
    _op("tile_attention")
    gen = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (torch.randn(2, 1500, 4, dim, device="cuda", generator=gen).bfloat16().requires_grad_() for _ in range(3))
    tiles = torch.rand(2, 4, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    mask = TileMask.from_tiles(tiles.cuda(), (1500, 1500), (128, 128))

    def once() -> list[torch.Tensor]:
        out, lse = tile_attention(q, k, v, mask, return_lse=True, backend="cuda")
        return [out, lse, *torch.autograd.grad(out.float().square().sum() + lse.nan_to_num(neginf=0).sum(), (q, k, v))]

    first, second = once(), once()
    assert all(map(torch.equal, first, second))
    with torch.no_grad():
        tile_attention(q, k, v, mask, backend="cuda")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = tile_attention(q, k, v, mask, backend="cuda")
        graph.replay()
    assert torch.equal(out, first[0])
