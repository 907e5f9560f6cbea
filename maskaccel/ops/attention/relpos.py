"""Relative position tables: a learned number for each offset between two tokens of a grid (Swin, MDT)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks


class RelativePosition:
    """`table[h, q_at[i] - k_at[j]]` is added to the score of query i and key j.

    Args:
        table: fp32 `(H, R)` or `(1, R)`.
        q_at: int32 `(Sq,)` or `(B, Sq)`.
        k_at: int32 `(Sk,)` or `(B, Sk)`. Every difference must lie in [0, R).

    Raises:
        TypeError: Other dtypes.
        ValueError: Other shapes, or differences outside the table.
    """

    def __init__(self, table: Tensor, q_at: Tensor, k_at: Tensor) -> None:
        self._set(table, q_at, k_at)
        if self.q_at.numel() and self.k_at.numel():
            low = int(self.q_at.min()) - int(self.k_at.max())
            high = int(self.q_at.max()) - int(self.k_at.min())
            if low < 0 or high >= table.shape[1]:
                raise ValueError(
                    f"q_at - k_at reaches from {low} to {high}; the table has entries 0 to {table.shape[1] - 1}"
                )

    def _set(self, table: Tensor, q_at: Tensor, k_at: Tensor) -> None:
        """The operands, without a look at their values, which would wait for a GPU."""
        table = _checks.floating("table", table)
        if table.dim() != 2:
            raise ValueError(f"table has shape {tuple(table.shape)}; it must be (H, R) or (1, R)")
        at = []
        for name, t in (("q_at", q_at), ("k_at", k_at)):
            if t.dtype != torch.int32:
                raise TypeError(f"{name} has dtype {t.dtype}; it must be int32")
            if t.dim() not in (1, 2):
                raise ValueError(f"{name} has shape {tuple(t.shape)}; it must be (S,) or (B, S)")
            at.append(t.reshape(-1, t.shape[-1]).contiguous())
        self.table, (self.q_at, self.k_at) = table, at

    @classmethod
    def of_grid(
        cls, table: Tensor, grid: Sequence[int], q_rows: Tensor | None = None, k_rows: Tensor | None = None
    ) -> RelativePosition:
        """For the tokens of a grid, or some of them (MDT's kept tokens). Reads no values: it does not wait for a GPU.

        Args:
            table: `(H, R)` with `R = prod(2 n - 1)` over the grid's sizes: offsets query - key in raster order, from
                `-(n - 1)` on.
            grid: Sizes of the grid.
            q_rows: int `(K,)` or `(B, K)`: which tokens the queries are, each on the grid; None: all.
            k_rows: The same of the keys.

        Raises:
            ValueError: The table has another number of offsets than the grid.
        """
        sizes = tuple(grid)
        entries = math.prod([2 * n - 1 for n in sizes])  # lists: generators break graphs
        if table.dim() != 2 or table.shape[1] != entries:
            raise ValueError(f"table has shape {tuple(table.shape)}; the grid {sizes} has {entries} offsets")
        axes = [torch.arange(n, device=table.device) for n in sizes]
        raster = torch.cartesian_prod(*axes).reshape(-1, len(sizes))
        at = torch.zeros(len(raster), dtype=torch.int64, device=table.device)
        centre = 0
        for axis, n in enumerate(sizes):
            at, centre = at * (2 * n - 1) + raster[:, axis], centre * (2 * n - 1) + n - 1
        q = at if q_rows is None else at[q_rows.long()]
        k = at if k_rows is None else at[k_rows.long()]
        made = cls.__new__(cls)  # places on the grid have no offset outside of its table
        made._set(table, (q + centre).int(), k.int())
        return made

    def with_table(self, table: Tensor) -> RelativePosition:
        """The same places with another table of as many entries, such as one that is trained; checks no values again.

        Raises:
            ValueError: The table has another number of entries.
        """
        table = _checks.floating("table", table)
        if table.dim() != 2 or table.shape[1] != self.table.shape[1]:
            raise ValueError(f"table has shape {tuple(table.shape)}; it must be (H, {self.table.shape[1]})")
        other = copy.copy(self)
        other.table = table
        return other

    def operands(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(table, q_at, k_at)` for a call, or ValueError if they do not fit it."""
        if self.table.shape[0] not in (1, q.shape[2]):
            raise ValueError(f"the relative position table has {self.table.shape[0]} heads; q has {q.shape[2]}")
        for name, at, t in (("q_at", self.q_at, q), ("k_at", self.k_at, k)):
            if at.shape[0] not in (1, t.shape[0]) or at.shape[1] != t.shape[1]:
                raise ValueError(f"{name} is for {tuple(at.shape)} tokens; the call has {(t.shape[0], t.shape[1])}")
            _checks.same_device(name, at, "q", q)
        _checks.same_device("table", self.table, "q", q)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return self.table.to(wide).contiguous(), self.q_at, self.k_at
