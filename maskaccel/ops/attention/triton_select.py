"""Calls of the Triton kernels that choose tiles; the contract is checked here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _triton as host
from .schema import ABOVE, TOP

_MOST_TILES = 1 << 14  # of a row: it lives in one program


def tile_means(x: Tensor, block: int, alike: bool) -> tuple[Tensor, Tensor]:
    host.check_activation("x", x, dims=4)
    if block < 1:
        raise RuntimeError(f"block={block} must be 1 or more")
    batch, tokens, heads, width = x.shape
    blocks = math.ceil(tokens / block)
    means = x.new_empty(batch, blocks, heads, width)
    cosines = x.new_empty((batch, heads, blocks) if alike else (0,), dtype=torch.float32)
    if means.numel():
        from .triton_select_kernels import block_means

        columns = host.power_of_two(width)
        step = min(host.power_of_two(block), max(2048 // columns, 1))
        host.launch(block_means, (batch * blocks * heads,), x, x, means, cosines if alike else None, heads, tokens,
                    width, blocks, *x.stride()[:3], ROWS=block, STEP=step, WIDTH=columns, num_warps=4)  # fmt: skip
    return means, cosines


def _mask(name: str, mask: Tensor | None, scores: Tensor) -> tuple[Tensor | None, tuple[int, ...]]:
    """The mask as bytes, and its strides when broadcast to the scores."""
    if mask is None:
        return None, (0, 0, 0, 0)
    if mask.dtype != torch.bool or mask.device != scores.device:
        raise RuntimeError(f"{name} must be bool on {scores.device}, got {mask.dtype} on {mask.device}")
    spread = mask.expand(scores.shape)
    return mask.view(torch.uint8), tuple(spread.stride())


def select_tiles(scores: Tensor, force: Tensor | None, forbid: Tensor | None, limits: Tensor | None, rule: int,
                 value: float, min_per_row: int) -> Tensor:  # fmt: skip
    if scores.dim() != 4 or not scores.is_floating_point():
        raise RuntimeError(f"scores must be floating (B, H, M, N), got {scores.dtype} {tuple(scores.shape)}")
    if not TOP <= rule <= ABOVE:
        raise RuntimeError(f"rule={rule} must be {TOP} to {ABOVE}")
    batch, heads, rows, tiles = scores.shape
    if tiles > _MOST_TILES:
        raise RuntimeError(f"scores has {tiles} tiles in a row; at most {_MOST_TILES}")
    limit_strides: tuple[int, ...] = (0, 0)
    if limits is not None:
        limits = limits.float()
        limit_strides = limits.expand(batch, heads).stride()
    words = scores.new_empty(batch, heads, rows, math.ceil(tiles / 32), dtype=torch.int32)
    if words.numel():
        from .triton_select_kernels import choose_tiles

        force, force_at = _mask("force", force, scores)
        forbid, forbid_at = _mask("forbid", forbid, scores)
        block, warps = host.block_and_warps(tiles, 8)
        host.launch(choose_tiles, (batch * heads * rows,), scores, scores.float().contiguous(), force, forbid, limits,
                    words, heads, rows, tiles, words.shape[3], force_at, forbid_at, *limit_strides, value,
                    min_per_row, RULE=rule, LEAST=min_per_row > 0, BLOCK=block, num_warps=warps)  # fmt: skip
    return words


KERNELS: dict[str, Callable[..., Any]] = {"tile_means": tile_means, "select_tiles": select_tiles}
