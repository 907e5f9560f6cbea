"""Which calls the CUDA kernels of attention take. The others are for Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backends import limit
from .schema import PRUNE

CUDA_DTYPES = (torch.bfloat16, torch.float16)


def most_pruned_rows(head_dim: int) -> int:
    """Rows of a mask tile that one CTA holds, and so can judge (`most_pruned_rows` of `csrc/attention/cuda_args.h`)."""
    return 128 if head_dim <= 128 else 64


def cuda_refusal(q: Tensor, bm: int, flags: int) -> str | None:
    """Why the CUDA kernel of `tile_attention` does not take a call; None if it does.

    Args:
        q: Queries `(B, Sq, H, D)`.
        bm: Rows of a mask tile.
        flags: Of the raw op (`schema.py`).
    """
    if q.dtype not in CUDA_DTYPES:
        return f"the CUDA kernel takes bfloat16 and float16, q is {str(q.dtype).removeprefix('torch.')}"
    if flags & PRUNE and bm > most_pruned_rows(q.shape[3]):
        most = most_pruned_rows(q.shape[3])
        return f"mask tiles have {bm} rows; to prune at head dim {q.shape[3]} the CUDA kernel takes at most {most}"
    return None


def register() -> None:
    """Tell the choice of backends."""
    limit("cuda", "tile_attention", CUDA_DTYPES, lambda q, *args: cuda_refusal(q, args[-5], args[-1]))
    bare = ("tile_attention_bare", "tile_attention_tested_bare")
    for op in (*bare, "tile_attention_backward", "attention_column_sums"):
        limit("cuda", op, CUDA_DTYPES, lambda *args: None)
