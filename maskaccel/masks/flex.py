"""Masks of tiles as FlexAttention's block masks, and the reverse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.attention.check import check_block
from ..ops.attention.reference import kept_elements
from .tiles import TileMask


def to_block_mask(mask: TileMask) -> Any:
    """The mask as a `BlockMask`, element for element."""
    from torch.nn.attention.flex_attention import BlockMask

    bm, bn = mask.block
    tiles = mask.tiles()
    partial = torch.zeros_like(tiles) if mask.pattern_of is None else tiles & (mask.pattern_of >= 0)
    parts: list[Any] = []
    for kept in (partial, tiles & ~partial):
        parts += [kept.sum(-1).to(torch.int32), (~kept).long().sort(dim=-1, stable=True).indices.to(torch.int32)]
    pattern_of, patterns = mask.pattern_of, mask.patterns
    tile_at = _broadcasting(tiles)
    pattern_at = None if pattern_of is None or patterns is None else _broadcasting(pattern_of)

    # Whole, not of partial tiles alone: FlexAttention that is not compiled looks at nothing else.
    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        kept = tile_at(b, h, i // bm, j // bn)
        if pattern_at is None or patterns is None:
            return kept
        which = pattern_at(b, h, i // bm, j // bn)
        word = patterns[which.clamp(min=0), i % bm, j % bn // 32]
        return kept & ((which < 0) | (((word >> (j % 32)) & 1) != 0))

    return BlockMask.from_kv_blocks(  # type: ignore[misc]
        *parts, BLOCK_SIZE=(bm, bn), mask_mod=mask_mod, seq_lengths=mask.shape
    )


def _broadcasting(table: Tensor) -> Callable[..., Tensor]:
    """Reads a (B|1, H|1, M, N) tensor at samples, heads, rows and columns."""
    by_sample, by_head = (int(n > 1) for n in table.shape[:2])
    return lambda b, h, m, n: table[b * by_sample, h * by_head, m, n]


def from_block_mask(block_mask: Any) -> TileMask:
    """The mask of a `BlockMask`: its full blocks, and its `mask_mod` in the partial ones."""
    block = check_block(block_mask.BLOCK_SIZE)
    sq, sk = block_mask.seq_lengths
    device = block_mask.kv_num_blocks.device
    columns = math.ceil(sk / block[1])

    def tiles(counts: Tensor, index: Tensor) -> Tensor:
        used = torch.arange(index.shape[-1], device=device) < counts[..., None]
        kept = torch.zeros((*index.shape[:-1], columns + 1), dtype=torch.bool, device=device)
        return kept.scatter_(-1, torch.where(used, index.long(), columns), True)[..., :columns]

    partial = tiles(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None:
        full = tiles(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    keep = kept_elements(full, None, None, *block, sq, sk)
    some = kept_elements(partial, None, None, *block, sq, sk)
    if bool(partial.any()):
        batch, heads = partial.shape[:2]
        index = [torch.arange(n, device=device) for n in (batch, heads, sq, sk)]
        elements = block_mask.mask_mod(
            index[0][:, None, None, None], index[1][:, None, None], index[2][:, None], index[3]
        )
        some = some & elements
    return TileMask.from_bool(keep | some, block)
