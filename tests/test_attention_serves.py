"""Which attention calls the CUDA kernels take, as far as it can be told without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from maskaccel.ops import _backends
from maskaccel.ops.attention.schema import KEEP, PRUNE
from maskaccel.ops.attention.serves import cuda_refusal, most_pruned_rows

HEADER = Path(__file__).resolve().parent.parent / "csrc" / "attention" / "cuda_args.h"


def _q(dim: int = 64, dtype: torch.dtype = torch.half) -> torch.Tensor:
    return torch.zeros(1, 4, 2, dim, dtype=dtype)


def test_refusals():
    """fp32, and pruning of tiles that no CTA holds."""
    assert cuda_refusal(_q(), 4096, KEEP) is None
    assert cuda_refusal(_q(128), 128, PRUNE) is None
    assert cuda_refusal(_q(dtype=torch.float32), 128, 0) == "the CUDA kernel takes bfloat16 and float16, q is float32"
    message = "mask tiles have 128 rows; to prune at head dim 160 the CUDA kernel takes at most 64"
    assert cuda_refusal(_q(160), 128, KEEP | PRUNE) == message
    args = (_q(160), *[None] * 17, 128, 128, 1.0, 0.0, PRUNE)
    assert _backends.call_refusal("cuda", "tile_attention", args) == message
    assert _backends.call_refusal("triton", "tile_attention", args) is None


@pytest.mark.parametrize("op", ["tile_attention", "tile_attention_backward", "attention_column_sums"])
def test_dtypes(op):
    """The choice of a backend knows them."""
    assert _backends._untaken(op, "cuda", torch.bfloat16) is None
    message = f"the cuda kernel of {op} takes bfloat16 and float16, not float32"
    assert _backends._untaken(op, "cuda", torch.float32) == message
    assert _backends._untaken(op, "triton", torch.float32) is None
    assert _backends._untaken("merge_attention", "cuda", torch.float32) is None


def test_rows_are_those_of_the_kernels():
    """Python and C++ state one rule."""
    rule = re.search(r"most_pruned_rows\(int dim\) \{ return dim <= (\d+) \? (\d+) : (\d+); \}", HEADER.read_text())
    assert rule is not None
    limit, narrow, wide = map(int, rule.groups())
    assert [most_pruned_rows(d) for d in (16, limit, limit + 8, 256)] == [narrow, narrow, wide, wide]
