"""Calls of the Triton kernels of rows of tokens; the contract is checked here."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _triton as host
from ..adaln import triton_launch as adaln
from .schema import MERGES, NEED_FULL, NEED_GATE, NEED_MASK, NEED_ROWS, NO_ROWS
from .triton_check import check_ids, check_stack

_BLOCK = 1024


def _columns(x: Tensor, block: int = _BLOCK) -> tuple[int, int, int]:
    """(block, blocks of a row, warps) of programs that take a block of the channels of a row."""
    block, warps = host.block_and_warps(min(x.shape[2], block), 16 // x.element_size())
    return block, math.ceil(x.shape[2] / block), warps


def _gather(x: Tensor, ids: Tensor, name: str) -> Tensor:
    host.check_activation("x", x)
    batch, n, width = x.shape
    ids_batch, m = check_ids(name, ids, batch, x.device), ids.shape[1]
    out = x.new_empty(batch, m, width)
    if out.numel():
        from .triton_rows import copy_rows

        block, blocks, warps = _columns(x)
        rows = min(max(_BLOCK // block, 1), host.power_of_two(m))  # narrow rows share a program
        host.launch(copy_rows, (math.ceil(m / rows), blocks, batch), x, x, ids, out, *x.stride()[:2], ids_batch, n, m,
                    width, ROWS=rows, BLOCK=block, num_warps=max(warps, rows * block // 256))  # fmt: skip
    return out


def gather_rows(x: Tensor, ids: Tensor, inverse: Tensor | None) -> Tensor:
    return _gather(x, ids, "ids")


def unmerge_rows(x: Tensor, slot: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    return _gather(x, slot, "slot")


def segment_rows(x: Tensor, order: Tensor, offsets: Tensor, slot: Tensor, mean: bool) -> Tensor:
    host.check_activation("x", x)
    batch, n, width = x.shape
    order_batch = check_ids("order", order, batch, x.device, n)
    offsets_batch = check_ids("offsets", offsets, batch, x.device)
    if not offsets.shape[1]:
        raise RuntimeError(f"offsets must hold at least one number, got {tuple(offsets.shape)}")
    segments = offsets.shape[1] - 1
    out = x.new_empty(batch, segments, width)
    if out.numel():
        from .triton_rows import sum_segments

        block, blocks, warps = _columns(x)
        host.launch(sum_segments, (segments, blocks, batch), x, x, order, offsets, out, x.stride(0), x.stride(1),
                    order_batch, offsets_batch, n, segments, width, MEAN=bool(mean), BLOCK=block,
                    num_warps=warps)  # fmt: skip
    return out


def _operand(name: str, t: Tensor | None, like: Tensor, rows: tuple[int, ...]) -> tuple[Tensor, int, int] | None:
    """(tensor, batch stride, row stride) of `(B or 1, one of rows, D)`; a stride of 0 where one serves all."""
    if t is None:
        return None
    batch, _, width = like.shape
    if t.dim() != 3 or t.shape[0] not in (1, batch) or t.shape[1] not in rows or t.shape[2] != width:
        allowed = f"({batch} or 1, {' or '.join(map(str, rows))}, {width})"
        raise RuntimeError(f"{name} must be {allowed}, got {tuple(t.shape)}")
    if t.dtype not in (like.dtype, torch.float32) or t.device != like.device or (width > 1 and t.stride(2) != 1):
        raise RuntimeError(f"{name} must be {like.dtype} or fp32 on {like.device} with a dense last dim, got {t.dtype} "
                           f"on {t.device} of strides {t.stride()}")  # fmt: skip
    return t, 0 if t.shape[0] == 1 else t.stride(0), 0 if t.shape[1] == 1 else t.stride(1)


def _check_mode(mode: int, lam: float, **unused: Tensor | None) -> None:
    """Check mode and share, and that operands of other modes are not given."""
    if mode not in MERGES.values() or not math.isfinite(lam):
        raise RuntimeError(f"mode={mode} must be 0 to {len(MERGES) - 1}, lam={lam} finite")
    for name, t in unused.items():
        if t is not None:
            raise RuntimeError(f"mode={mode} takes no {name}")


def scatter_merge(
    full: Tensor | None, rows: Tensor, ids: Tensor, inverse: Tensor, gate: Tensor | None, mask_token: Tensor | None,
    pos: Tensor | None, lam: float, mode: int,
) -> Tensor:  # fmt: skip
    host.check_activation("rows", rows)
    batch, k, width = rows.shape
    check_ids("ids", ids, batch, rows.device, k)
    inverse_batch, n = check_ids("inverse", inverse, batch, rows.device), inverse.shape[1]
    alone = mode in (MERGES["mask_token"], MERGES["zero"])
    _check_mode(mode, lam, gate=None if mode == MERGES["add_gated"] else gate, pos=None if alone else pos,
                mask_token=None if mode == MERGES["mask_token"] else mask_token,
                full=full if alone else None)  # fmt: skip
    if not alone:
        if full is None:
            raise RuntimeError(f"mode={mode} needs full")
        check_stack("full", full, rows, n)
    gating, places = _operand("gate", gate, rows, (1, k)), _operand("pos", pos, rows, (n,))
    host.check_vector("mask_token", mask_token, width, rows)
    out = rows.new_empty(batch, n, width)
    if out.numel():
        from .triton_rows import merge_rows_of_tokens

        block, blocks, warps = _columns(rows)
        strides = (0, 0) if full is None else full.stride()[:2]
        host.launch(merge_rows_of_tokens, (n, blocks, batch), rows, full, rows, inverse, gating, mask_token, places,
                    out, strides, *rows.stride()[:2], inverse_batch, n, k, width, lam, 1 - lam, MODE=mode,
                    BLOCK=block, num_warps=warps)  # fmt: skip
    return out


def scatter_merge_backward(
    dout: Tensor, rows: Tensor | None, ids: Tensor, inverse: Tensor, gate: Tensor | None, lam: float, mode: int,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    host.check_activation("dout", dout)
    batch, n, width = dout.shape
    ids_batch, k = check_ids("ids", ids, batch, dout.device), ids.shape[1]
    inverse_batch = check_ids("inverse", inverse, batch, dout.device, n)
    _check_mode(mode, lam, gate=None if mode == MERGES["add_gated"] else gate)
    gating = _operand("gate", gate, dout, (1, k))
    if needs & NEED_FULL and mode not in (MERGES["replace"], MERGES["blend"]):
        raise RuntimeError(f"mode={mode} has no dfull of its own (needs={needs})")
    if needs & NEED_GATE and (gate is None or rows is None):
        raise RuntimeError("dgate needs gate and rows")
    if rows is not None:
        check_stack("rows", rows, dout, k)
    blend = mode == MERGES["blend"]
    fp32 = torch.float32
    dfull = dout.new_empty(dout.shape if needs & NEED_FULL else 0)
    dmask = _sum_dropped(dout, inverse, inverse_batch, k, dfull if needs & NEED_FULL else None,
                         bool(needs & NEED_MASK), lam if blend else 0.0)  # fmt: skip
    drows = dout.new_empty((batch, k, width) if needs & NEED_ROWS else 0)
    dgate = dout.new_empty(0, dtype=fp32)
    if gate is not None and needs & NEED_GATE:
        dgate = dout.new_zeros(batch, gate.shape[1], width, dtype=fp32) if not batch * k else dgate
    if needs & (NEED_ROWS | NEED_GATE) and batch * k * width:
        from .triton_rows import merge_backward_slots

        summed = gate is not None and needs & NEED_GATE and gate.shape[1] == 1 and k > 1
        each = needs & NEED_GATE and not summed
        run, chunks = host.runs(batch * k, k)
        block, blocks, warps = _columns(dout)
        partials = dout.new_empty(batch, chunks, width, dtype=fp32) if summed else None
        dgate = dout.new_empty(batch, k, width, dtype=fp32) if each else dgate
        used = rows if rows is not None and needs & NEED_GATE else None
        host.launch(merge_backward_slots, (chunks, blocks, batch), dout, dout, used, ids, gating,
                    drows if needs & NEED_ROWS else None, dgate if each else None, partials, dout.stride(0),
                    dout.stride(1), *((0, 0) if used is None else used.stride()[:2]), ids_batch, n, k, width, run,
                    1 - lam if blend else 1.0, BLOCK=block, num_warps=warps)  # fmt: skip
        if partials is not None:
            dgate = host.reduce_partials(partials, batch, 1)
    return dfull, drows, dgate, dmask


def _sum_dropped(dout: Tensor, inverse: Tensor, inverse_batch: int, k: int, dfull: Tensor | None, wanted: bool,
                 lam: float) -> Tensor:  # fmt: skip
    """Fill `dfull`; dmask if it is wanted, else no element."""
    batch, n, width = dout.shape
    if not batch * n or (dfull is None and not wanted):
        return dout.new_zeros(width if wanted else 0, dtype=torch.float32)
    from .triton_rows import merge_backward_tokens

    run, chunks = host.runs(batch * n, n)
    partials = dout.new_empty(batch, chunks, width, dtype=torch.float32) if wanted else None
    block, blocks, warps = _columns(dout)
    host.launch(merge_backward_tokens, (chunks, blocks, batch), dout, dout, inverse, dfull, partials, dout.stride(0),
                dout.stride(1), inverse_batch, n, k, width, run, lam, BLOCK=block, num_warps=warps)  # fmt: skip
    if partials is None:
        return dout.new_empty(0, dtype=torch.float32)
    return host.reduce_partials(partials.view(1, batch * chunks, width), 1, 1).view(width)


def gather_modulate(
    x: Tensor, ids: Tensor, inverse: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, eps: float, offset: float, flags: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    host.check_activation("x", x)
    batch, n, width = x.shape
    ids_batch, m = check_ids("ids", ids, batch, x.device), ids.shape[1]
    check_ids("inverse", inverse, batch, x.device, n)
    for name, t in (("scale", scale), ("shift", shift)):
        if t is not None and t.dim() != 2 and (t.dim() != 3 or t.shape[1] not in (1, n)):
            allowed = f"({batch} or 1, {width}) or ({batch} or 1, 1 or {n}, {width})"
            raise RuntimeError(f"{name} must be {allowed}, got {tuple(t.shape)}")
    plain = flags & ~NO_ROWS
    call = adaln.Call(x, plain, None, scale=scale, shift=shift, weight=weight, bias=bias)
    y = x.new_empty(batch, m, width)
    rows = x.new_empty(0) if flags & NO_ROWS else x.new_empty(batch, m, width)
    if y.numel():
        from .triton_modulate import gather_norm

        block, warps = host.block_and_warps(width, 16)
        host.launch(gather_norm, (batch * m,), x, x, ids, None if flags & NO_ROWS else rows, y, *call.mods[1:3], weight,
                    bias, x.stride(0), x.stride(1), ids_batch, n, m, width, eps, offset, FLAGS=plain, BLOCK=block,
                    num_warps=warps, **call.options)  # fmt: skip
    return rows, y


KERNELS: dict[str, Callable] = {
    "gather_rows": gather_rows,
    "unmerge_rows": unmerge_rows,
    "segment_rows": segment_rows,
    "scatter_merge": scatter_merge,
    "scatter_merge_backward": scatter_merge_backward,
    "gather_modulate": gather_modulate,
}
