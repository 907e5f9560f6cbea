"""Plain-torch forms of the cached-feature ops: oracle of the tests, and fallback of every device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..adaln import fallback
from .schema import METRICS


def relative_difference(x: Tensor, reference: Tensor, base: Tensor | None = None) -> Tensor:
    """Per sample: sum |x - base - reference| and sum |reference|, fp32 (fp64 for fp64)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    value = x.to(wide) if base is None else x.to(wide) - base.to(wide)
    stored = reference.to(wide)
    return torch.stack([(value - stored).abs().flatten(1).sum(1), stored.abs().flatten(1).sum(1)], 1)


def combine_history(history: Tensor, weights: Tensor, x: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    """`x + gate * sum_k weights[k] * history[k]`, fp32 inside (fp64 for fp64)."""
    wide = torch.float64 if history.dtype == torch.float64 else torch.float32
    w = weights.to(wide)
    total = torch.einsum("k,kbnd->bnd" if w.dim() == 1 else "kd,kbnd->bnd", w, history.to(wide))
    if gate is not None:
        g = gate.to(wide)
        g = g[:, None] if g.dim() == 2 else g
        n = history.shape[2]
        total = total * (g if g.shape[1] in (1, n) else g.repeat_interleave(n // g.shape[1], dim=1))
    if x is not None:
        return (x.to(wide) + total).to(x.dtype).contiguous()
    return total.to(history.dtype).contiguous()


def combine_sites(history: Tensor, weights: Tensor, x: Tensor | None = None, gates: Tensor | None = None) -> Tensor:
    """`x + sum_s gates[s] * sum_k weights[s, k] * history[s, k]`, fp32 inside (fp64 for fp64)."""
    wide = torch.float64 if history.dtype == torch.float64 else torch.float32
    total = history.new_zeros(history.shape[2:], dtype=wide) if x is None else x.to(wide)
    for s, site in enumerate(history):
        w = weights if weights.dim() == 1 else weights[s]
        total = total + combine_history(site.to(wide), w, None, None if gates is None else gates[s])
    return total.to(history.dtype if x is None else x.dtype).contiguous()


def gram(history: Tensor, per_sample: bool = False) -> Tensor:
    """`<history[i], history[j]>`, fp64, over all elements or over those of each sample."""
    steps, batch = history.shape[:2]
    if history.dtype != torch.float64:
        wide = history.flatten(2).transpose(0, 1).double()
        out = wide @ wide.mT
        out = (out + out.mT) / 2
        return out if per_sample else out.sum(0)
    # The truth of the tests: torch sums in a tree, where a matrix product adds one term after the other.
    out = history.new_empty((batch, steps, steps))
    for i in range(steps):
        for j in range(i, steps):
            out[:, i, j] = out[:, j, i] = (history[i] * history[j]).flatten(1).sum(1)
    return out if per_sample else out.sum(0)


def scatter_combine(
    history: Tensor,
    weights: Tensor,
    fresh: Tensor,
    index: Tensor,
    labels: Tensor | None,
    x: Tensor | None,
    gate: Tensor | None,
    newest: int,
    gamma: float,
) -> Tensor:
    """Writes `history[newest]`, then `combine_history`."""
    value = history[newest]
    if value.numel() and index.numel():
        value.copy_(_updated(value, fresh, index, labels, gamma))
    return combine_history(history, weights, x, gate)


def _updated(value: Tensor, fresh: Tensor, index: Tensor, labels: Tensor | None, gamma: float) -> Tensor:
    """`value` with rows `index` from `fresh`, the others moved towards the mean of the fresh rows of their cluster."""
    batch, n, width = value.shape
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    new, rows = value.to(wide), fresh.to(value.dtype).to(wide)

    def take(table: Tensor, at: Tensor) -> Tensor:
        return table.gather(1, at[..., None].expand(-1, -1, width))

    inside = (index >= 0) & (index < n)
    at = torch.where(inside, index, n).long()
    order = torch.arange(index.shape[1], device=index.device).expand_as(at)
    # The last of equal indices, -1 where there is none; column n takes what is outside.
    row_of = at.new_full((batch, n + 1), -1).scatter_reduce_(1, at, order, "amax")[:, :n, None]
    if labels is not None and gamma > 0:
        cluster = labels.gather(1, at.clamp(max=n - 1))
        first = ((cluster[:, :, None] == cluster[:, None, :]) & inside[:, None, :]).int().argmax(2)  # of its cluster
        first = torch.where(inside, first, order)
        to = first[..., None].expand(-1, -1, width)
        total = torch.zeros_like(rows).scatter_add_(1, to, torch.where(inside[..., None], rows, 0))
        count = torch.zeros_like(rows[..., 0]).scatter_add_(1, first, inside.to(wide))
        mean = total / count.clamp_min(1)[..., None]
        same = (labels[:, :, None] == cluster[:, None, :]) & inside[:, None, :]
        moved = gamma * take(mean, same.int().argmax(2)) + (1 - gamma) * new
        new = torch.where(same.any(2, keepdim=True), moved, new)
    return torch.where(row_of >= 0, take(rows, row_of[..., 0].clamp_min(0)), new).to(value.dtype)


def kmeans(x: Tensor, init: Tensor | None, k: int, iters: int, metric: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's iterations from `init` or from evenly spaced rows; fp32 inside (fp64 for fp64)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.to(wide)
    n = rows.shape[1]
    steps = torch.arange(k, device=x.device)
    centroids = rows[:, (2 * steps + 1) * n // (2 * k)] if init is None else init.to(wide)
    if metric == METRICS["cosine"]:
        rows = _unit(rows)
    for _ in range(iters):
        member = (distances(rows, centroids, metric).argmin(2)[:, None] == steps[:, None]).to(wide)
        count = member.sum(2, keepdim=True)
        centroids = torch.where(count > 0, member @ rows / count.clamp_min(1), centroids)
    distance = distances(rows, centroids, metric)
    labels = distance.argmin(2)
    member = labels[:, None] == steps[:, None]
    chosen = torch.where(member, distance.mT, torch.inf).argmin(2)
    empty = ~member.any(2)
    taken = torch.zeros_like(labels, dtype=torch.int32).scatter_add_(1, chosen, (~empty).int())
    for c in range(k):
        nearest = torch.where(taken > 0, torch.inf, distance[:, :, c]).argmin(1, keepdim=True)
        chosen[:, c : c + 1] = torch.where(empty[:, c : c + 1], nearest, chosen[:, c : c + 1])
        taken.scatter_add_(1, nearest, empty[:, c : c + 1].int())
    return labels.int(), centroids.contiguous(), chosen.int()


def distances(rows: Tensor, centroids: Tensor, metric: int) -> Tensor:
    """`(B, N, k)`: squared L2, L1, or one minus the cosine."""
    if metric == METRICS["cosine"]:
        return 1 - _unit(rows) @ _unit(centroids).mT
    if metric == METRICS["l1"]:
        return torch.cdist(rows, centroids, p=1)
    return torch.cdist(rows, centroids, compute_mode="donot_use_mm_for_euclid_dist").square()


def _unit(rows: Tensor) -> Tensor:
    length = rows.norm(dim=-1, keepdim=True)
    return rows / torch.where(length > 0, length, 1)


def combine_history_norm_modulate(history, weights, x, gate, scale, shift, weight, bias, scale_table, shift_table, rows,
                                  eps, offset, flags):  # fmt: skip
    """`combine_history`, and `norm_modulate` of its result as stored."""
    h = combine_history(history, weights, x, gate)
    y = fallback.norm_modulate(h, scale, shift, weight, bias, scale_table, shift_table, rows, eps, offset, flags)
    return h, y.clone() if y is h else y  # without a norm and modulation it is the same tensor


def norm_modulate_difference(x, reference, scale, shift, weight, bias, scale_table, shift_table, rows, eps, offset,
                             flags):  # fmt: skip
    """`norm_modulate`, and `relative_difference` of its result as stored."""
    y = fallback.norm_modulate(x, scale, shift, weight, bias, scale_table, shift_table, rows, eps, offset, flags)
    return y.clone() if y is x else y, relative_difference(y, reference)


KERNELS: dict[str, Callable] = {
    "relative_difference": relative_difference,
    "combine_history": combine_history,
    "combine_sites": combine_sites,
    "gram": gram,
    "scatter_combine": scatter_combine,
    "kmeans": kmeans,
    "combine_history_norm_modulate": combine_history_norm_modulate,
    "norm_modulate_difference": norm_modulate_difference,
}
