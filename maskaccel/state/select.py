"""Which tokens are computed at a step that is computed in part.

Everything here is plain torch on the device of the scores, without a synchronisation, and the same on every device:
what looks random is a hash of the token's number and of what the caller names (step, site), so runs repeat, and a
sample gets the same draw alone, in a batch, and in every guidance branch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def hashed(count: int, *keys: int, device: torch.device | str | None = None) -> Tensor:
    """A pseudo-random number in 0 to 2^32 - 1 for each token.

    Args:
        count: Tokens.
        *keys: Integers that name the draw.
        device: Of the result.

    Returns:
        int64 `(count,)`.
    """
    seed = 0x9E3779B9
    for key in keys:
        seed = _mixed((seed ^ (key & _WORD)) * 0x85EBCA6B + 0xC2B2AE35 & _WORD)
    return _mixed((torch.arange(count, device=device) * 0x9E3779B1 + seed) & _WORD)


def _mixed(x):  # type: ignore[no-untyped-def]  # an int or a tensor of them
    """The finaliser of MurmurHash3: every bit of 32 depends on every other; int64 products wrap harmlessly."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _WORD
    return x ^ (x >> 16)


def unit(score: Tensor) -> Tensor:
    """Scores `(B, N)` scaled to Euclidean length 1 over the tokens of each sample."""
    return torch.nn.functional.normalize(score, dim=1)


def with_bonus(score: Tensor, bonus: float, cell: int, grid: tuple[int, int] | None = None) -> Tensor | None:
    """Scores with the best token of each cell of the image raised by `bonus` times its score (ToCa's s4).

    Args:
        score: `(B, N)`.
        bonus: Share of its own score that the best token of a cell gets on top.
        cell: Tokens along each side of a cell.
        grid: Tokens down and across; None is a square.

    Returns:
        `(B, N)`, or None where the tokens are no such grid or it has no whole number of cells.
    """
    batch, count = score.shape
    rows, columns = grid or (math.isqrt(count), math.isqrt(count))
    if rows * columns != count or rows % cell or columns % cell:
        return None
    cells = score.unflatten(1, (rows // cell, cell, columns // cell, cell)).transpose(2, 3)
    flat = cells.reshape(batch, -1, cell * cell)
    best = flat.argmax(-1, keepdim=True)
    raised = flat.scatter_add(-1, best, flat.gather(-1, best) * bonus)
    return raised.view(cells.shape).transpose(2, 3).reshape(batch, count)


def top_rows(score: Tensor, count: int, force: Tensor | None = None) -> Tensor:
    """The tokens of the highest scores; of equal ones the first.

    Args:
        score: `(B, N)`.
        count: Tokens wanted, 1 to N.
        force: Mask `(B, N)` or `(N,)` of tokens that come before all others (an edited region), or None.

    Returns:
        int64 `(B, count)`, ascending.

    Raises:
        ValueError: `count` is not 1 to N.
    """
    if not 1 <= count <= score.shape[1]:
        raise ValueError(f"count={count} must be 1 to the number of tokens, {score.shape[1]}")
    if force is not None:
        score = score.masked_fill(force, math.inf)
    return score.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


def one_per_cluster(labels: Tensor, clusters: int, order: Tensor) -> Tensor:
    """One token of each cluster: that of the highest `order`.

    Args:
        labels: Cluster of each token, integers `(B, N)`.
        clusters: Number of clusters.
        order: int64 below 2^32, `(N,)` or `(B, N)`.

    Returns:
        int64 `(B, clusters)`; an empty cluster repeats the token of the highest order of all, whose row is then
        computed twice and written twice alike.
    """
    batch, count = labels.shape
    tokens = torch.arange(count, device=labels.device)
    keys = (order * count + tokens).expand(batch, count)
    best = torch.full((batch, clusters), -1, device=labels.device, dtype=torch.int64)
    best = best.scatter_reduce(1, labels.long(), keys, "amax")
    return torch.where(best < 0, best.amax(1, keepdim=True), best) % count


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` `(B, M)` of `x` `(B, N, D)`."""
    return x.gather(1, index.long().unsqueeze(-1).expand(-1, -1, x.shape[-1]))
