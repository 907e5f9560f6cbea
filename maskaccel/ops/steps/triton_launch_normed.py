"""Calls of the Triton kernels of the step ops with a norm; the contract is checked here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import _triton as host
from ..adaln.triton_launch import Call
from .triton_launch import check_combine, check_history, gate_operand


def combine_history_norm_modulate(history, weights, x, gate, scale, shift, weight, bias, scale_table, shift_table, rows,
                                  eps, offset, flags):  # fmt: skip
    check_history(history)
    steps, _, n, width = history.shape
    check_combine(history, weights, x, ((steps,), (steps, width)))
    like = history[0] if x is None else x
    host.check_activation("history", like)
    operand = gate_operand(gate, like)
    call = Call(like, flags, rows, None, scale, shift, None, None, None, scale_table, shift_table, weight, bias)
    h, y = like.new_empty(like.shape), like.new_empty(like.shape)
    if like.numel():
        from .triton_normed import combine_norm

        block, warps = host.block_and_warps(width, 16)
        host.launch(
            combine_norm, (like.shape[0] * n,), history, history, weights, x, operand, h, y, *call.mods[1:3],
            *call.tables[1:], *call.vectors[:2], rows, history.stride(0), history.stride(1),
            width if weights.dim() == 2 else 1, call.rows_batch, n, width, eps, offset, K=steps,
            PER_CHANNEL=weights.dim() == 2, FLAGS=flags & 15, BLOCK=block, num_warps=warps, **call.options,
        )  # fmt: skip
    return h, y


def norm_modulate_difference(x, reference, scale, shift, weight, bias, scale_table, shift_table, rows, eps, offset,
                             flags):  # fmt: skip
    host.check_activation("x", x)
    host.check_activation("reference", reference, x)
    call = Call(x, flags, rows, None, scale, shift, None, None, None, scale_table, shift_table, weight, bias)
    batch, n, width = x.shape
    y = x.new_empty(x.shape)
    if batch * n == 0:
        return y, x.new_zeros(batch, 2, dtype=torch.float32)

    from .triton_normed import norm_difference

    run, chunks = host.runs(batch * n, n, least=2)
    partials = x.new_empty(batch, chunks, 2, dtype=torch.float32)
    block, warps = host.block_and_warps(width, 8)  # the running sums live in registers too
    host.launch(
        norm_difference, (batch * chunks,), x, x, reference, y, partials, *call.mods[1:3], *call.tables[1:],
        *call.vectors[:2], rows, x.stride(0), x.stride(1), reference.stride(0), reference.stride(1), call.rows_batch, n,
        width, run, chunks, eps, offset, FLAGS=flags & 15, BLOCK=block, num_warps=warps, **call.options,
    )  # fmt: skip
    return y, host.reduce_partials(partials, batch, 1).view(batch, 2)


KERNELS: dict[str, Callable] = {
    "combine_history_norm_modulate": combine_history_norm_modulate,
    "norm_modulate_difference": norm_modulate_difference,
}
