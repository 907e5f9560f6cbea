"""Block shapes of the Triton attention kernels, by head dim and by what the GPU's shared memory holds.

Chosen for registers and shared memory as `tools/compile_triton.py` reports them (docs/triton-kernels.md), not by time:
none of these has been timed. To try others on a GPU change a line here; any powers of two are correct.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _triton as host

L2_SHARE = 16 << 20  # bytes of keys and values that programs which run together should read; an A100 has 40 MiB of L2


class Blocks(NamedTuple):
    """Queries and keys of a block, warps of a program, loop iterations whose loads are in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


# head dim up to -> blocks, for 227 KiB of shared memory a program (sm_90, sm_100), 163 KiB (sm_80), 99 KiB (others)
_FORWARD = {
    227: {64: Blocks(128, 128, 8, 3), 128: Blocks(128, 128, 8, 2), 256: Blocks(128, 64, 8, 2)},
    163: {64: Blocks(128, 64, 8, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(64, 64, 8, 2)},
    99: {64: Blocks(128, 64, 8, 3), 128: Blocks(128, 32, 8, 2), 256: Blocks(64, 32, 8, 2)},
}
# The parts of a product of TF32 fill the registers, whatever the shared memory.
_FORWARD_FP32 = {64: Blocks(32, 32, 4, 2), 128: Blocks(32, 32, 4, 1), 256: Blocks(32, 32, 8, 1)}


# The same for the backward: the kernel of queries and that of keys.
_BACKWARD = {
    227: {
        64: (Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
        128: (Blocks(128, 64, 8, 2), Blocks(32, 128, 8, 2)),
        256: (Blocks(32, 64, 8, 1), Blocks(64, 32, 8, 1)),
    },
    163: {
        64: (Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 2)),
        128: (Blocks(128, 32, 8, 2), Blocks(64, 64, 8, 2)),
        256: (Blocks(64, 32, 8, 1), Blocks(32, 64, 8, 1)),
    },
    99: {
        64: (Blocks(128, 32, 8, 2), Blocks(32, 128, 8, 2)),
        128: (Blocks(64, 32, 8, 2), Blocks(32, 64, 8, 2)),
        256: (Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1)),
    },
}
_BACKWARD_FP32 = {
    64: (Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
    128: (Blocks(16, 32, 4, 1), Blocks(32, 32, 8, 1)),
    256: (Blocks(16, 32, 8, 1), Blocks(16, 32, 8, 1)),
}


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


def shared_memory(t: Tensor) -> int:
    """KiB of shared memory that a program on the device of `t` may use (a class of GPUs: 227, 163 or 99)."""
    if host.interpreting():
        return 163
    if t.is_cuda:
        arch = _capability(t.device.index)
    else:  # compiled ahead of time for the active target
        from triton.runtime import driver

        arch = int(driver.active.get_current_target().arch)
    if arch in (80, 87):
        return 163
    return 227 if 90 <= arch < 120 else 99


def precision() -> str | None:
    """How a product of fp32 tiles is formed: as three TF32 products on tensor cores, accurate as fp32 (docs)."""
    return None if host.interpreting() else "tf32x3"


def split(width: int) -> tuple[int, int]:
    """A head dim as D1 + D2: a power of two, and 0 or the power of two (16 at least) that holds the rest."""
    one = min(1 << (width.bit_length() - 1), 128)
    rest = width - one
    two = max(host.power_of_two(rest), 16) if rest else 0
    return (2 * one, 0) if two == one < 128 else (one, two)


def forward_blocks(q: Tensor, added: bool = False) -> Blocks:
    """Blocks of the forward kernel for tensors like `q`, before the mask tiles limit them.

    `added`: a bias or relative positions, whose addresses and values take registers of their own.
    """
    table = _FORWARD_FP32 if q.dtype == torch.float32 else _FORWARD[shared_memory(q)]
    blocks = next(blocks for width, blocks in table.items() if q.shape[-1] <= width)
    return blocks._replace(keys=blocks.keys // 2) if added and blocks.keys > 32 else blocks


def backward_blocks(q: Tensor, added: bool = False) -> tuple[Blocks, Blocks]:
    """Blocks of the kernels of dq and of dk and dv; `added` as in `forward_blocks`."""
    table = _BACKWARD_FP32 if q.dtype == torch.float32 else _BACKWARD[shared_memory(q)]
    one, two = next(blocks for width, blocks in table.items() if q.shape[-1] <= width)
    if added:
        one, two = (
            one._replace(keys=min(one.keys, 32)),
            two._replace(queries=min(two.queries, 32), keys=min(two.keys, 64)),
        )
    return one, two


def keep_blocks(q: Tensor) -> Blocks:
    """Blocks large enough for a whole mask tile of 128 x 128, where one decision per tile is wanted at once."""
    stages = 2 if shared_memory(q) == 227 else 1
    narrow = q.dtype != torch.float32 and q.shape[-1] <= 128
    return forward_blocks(q)._replace(queries=128, keys=128, warps=8, stages=stages) if narrow else forward_blocks(q)


def fit(blocks: Blocks, bm: int, bn: int) -> Blocks:
    """Blocks that divide mask tiles of (bm, bn), with warps in proportion to the queries."""
    queries, keys = min(blocks.queries, bm & -bm), min(blocks.keys, bn & -bn)
    return blocks._replace(queries=queries, keys=keys, warps=max(blocks.warps * queries // blocks.queries, 2))
