"""Calls of the Triton kernels that tell tokens apart; the contract is checked here."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _triton as host
from .schema import MAX_CLUSTERS, METRICS
from .triton_launch import check_combine, check_history, gate_operand

_BLOCK = 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _integers(name: str, t: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if t.dtype != torch.int32 or tuple(t.shape) != shape or not t.is_contiguous() or t.device != like.device:
        raise RuntimeError(f"{name} must be contiguous int32 {shape} on {like.device}, got {t.dtype} {tuple(t.shape)}")


def scatter_combine(
    history: Tensor, weights: Tensor, fresh: Tensor, index: Tensor, labels: Tensor | None, x: Tensor | None,
    gate: Tensor | None, newest: int, gamma: float,
) -> Tensor:  # fmt: skip
    check_history(history)
    steps, batch, n, width = history.shape
    check_combine(history, weights, x, ((steps,), (steps, width)))
    if not 0 <= newest < steps or any(history.stride(i) == 0 and history.shape[i] > 1 for i in (0, 1)):
        raise RuntimeError(f"newest={newest} must be 0 to {steps - 1}, and history must not be expanded")
    rows = index.shape[-1] if index.dim() else 0
    _integers("index", index, (batch, rows), history)
    if labels is not None:
        _integers("labels", labels, (batch, n), history)
    if not 0 <= gamma <= 1 or (gamma > 0 and labels is None):
        raise RuntimeError(f"gamma={gamma} must be 0 to 1, and 0 without labels")
    good = fresh.shape == (batch, rows, width) and fresh.dtype == history.dtype and fresh.is_contiguous()
    if not good or fresh.device != history.device:
        raise RuntimeError(f"fresh must be contiguous {history.dtype} {(batch, rows, width)} on {history.device}, got "
                           f"{fresh.dtype} {tuple(fresh.shape)}")  # fmt: skip
    like = history[0] if x is None else x
    operand = gate_operand(gate, like)
    out = like.new_empty(like.shape)
    if out.numel():
        from .triton_scatter import cluster_means, rows_of_tokens, scatter_rows

        row_of = index.new_empty(batch, n)
        blend = gamma > 0 and rows > 0
        first = index.new_empty(batch, n) if blend else None
        mean = history.new_empty(batch, rows, width, dtype=torch.float32) if blend else None
        host.launch(rows_of_tokens, (math.ceil(n / 128), batch), history, index, labels if blend else None, row_of,
                    first, n, rows, TOKENS=128, ROWS=32, num_warps=4)  # fmt: skip
        block, warps = host.block_and_warps(min(width, _BLOCK), 16 // history.element_size())
        blocks = math.ceil(width / block)
        if blend:
            host.launch(cluster_means, (rows, blocks, batch), history, fresh, index, first, mean, n, rows, width,
                        BLOCK=block, num_warps=warps)  # fmt: skip
        host.launch(scatter_rows, (batch * n, blocks), history, history, weights, x, operand, out, fresh, row_of,
                    first, mean, history.stride(0), history.stride(1), width if weights.dim() == 2 else 1, n, rows,
                    width, newest, gamma, 1 - gamma, K=steps, PER_CHANNEL=weights.dim() == 2, BLOCK=block,
                    num_warps=warps)  # fmt: skip
    return out


def kmeans(x: Tensor, init: Tensor | None, k: int, iters: int, metric: int) -> tuple[Tensor, Tensor, Tensor]:
    host.check_activation("x", x)
    batch, n, width = x.shape
    if not 1 <= k <= min(n, MAX_CLUSTERS) or not 0 <= iters <= 1000 or metric not in METRICS.values():
        raise RuntimeError(
            f"k={k} must be 1 to {min(n, MAX_CLUSTERS)}, iters={iters} 0 to 1000, metric={metric} 0 to 2"
        )
    if init is None:
        steps = torch.arange(k, device=x.device)
        centroids = x.index_select(1, (2 * steps + 1) * n // (2 * k)).to(torch.float32, copy=True).contiguous()
    else:
        good = init.shape == (batch, k, width) and init.dtype == torch.float32 and init.is_contiguous()
        if not good or init.device != x.device:
            raise RuntimeError(f"init must be contiguous fp32 {(batch, k, width)} on {x.device}, got {init.dtype} "
                               f"{tuple(init.shape)}")  # fmt: skip
        centroids = init.clone()
    labels = x.new_empty((batch, n), dtype=torch.int32)
    chosen = x.new_empty((batch, k), dtype=torch.int32)
    if batch:
        distance = x.new_empty((batch, n, k), dtype=torch.float32)
        _cluster(x, centroids, labels, distance, iters, metric)
        _represent(labels, distance, chosen)
    return labels, centroids, chosen


def _cluster(x: Tensor, centroids: Tensor, labels: Tensor, distance: Tensor, iters: int, metric: int) -> None:
    from .._triton_lib import row_scales
    from .triton_kmeans import assign_rows, center_rows

    batch, n, width = x.shape
    k = centroids.shape[1]
    strides = x.stride(0), x.stride(1)
    x_scale = scale = None
    if metric == METRICS["cosine"]:
        x_scale, scale = (x.new_empty((batch, size), dtype=torch.float32) for size in (n, k))
        host.launch(row_scales, (n, batch), x, x, x_scale, *strides, n, width, BLOCK=_BLOCK, num_warps=4)
    for i in range(iters + 1):
        if scale is not None:
            host.launch(row_scales, (k, batch), x, centroids, scale, k * width, width, k, width, BLOCK=_BLOCK,
                        num_warps=4)  # fmt: skip
        host.launch(assign_rows, (math.ceil(n / 16), batch), x, x, centroids, x_scale, scale, labels,
                    distance if i == iters else None, *strides, n, width, k, METRIC=metric, ROWS=16, COLS=16, BLOCK=32,
                    num_warps=8)  # fmt: skip
        if i < iters:
            host.launch(center_rows, (k, math.ceil(width / 128), batch), x, x, x_scale, labels, centroids, *strides, n,
                        width, k, ROWS=16, BLOCK=128, num_warps=4)  # fmt: skip


def _represent(labels: Tensor, distance: Tensor, chosen: Tensor) -> None:
    from .triton_kmeans import nearest_free, nearest_members

    batch, n, k = distance.shape
    host.launch(nearest_members, (k, batch), labels, labels, distance, chosen, n, k, BLOCK=_BLOCK, num_warps=4)
    taken = torch.zeros((batch, n), dtype=torch.int8, device=labels.device)
    host.launch(nearest_free, (batch,), labels, distance, chosen, taken, n, k, BLOCK=_BLOCK, num_warps=4)


KERNELS: dict[str, Callable] = {"scatter_combine": scatter_combine, "kmeans": kmeans}
