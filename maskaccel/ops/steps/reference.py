"""Plain-torch forms of the cached-feature ops: oracle of the tests, and fallback of every device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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


KERNELS: dict[str, Callable] = {
    "relative_difference": relative_difference,
    "combine_history": combine_history,
    "combine_sites": combine_sites,
    "gram": gram,
}
