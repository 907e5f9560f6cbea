"""Which tokens run: the kept rows of each sample, and their way back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class TokenIndex:
    """The kept rows among N tokens, ascending, for each sample or for all of them alike.

    Made by `maskaccel.ops.random_keep`, `select_active`, or `from_keep` and `from_mask`, which check what they are
    given; the constructor itself trusts its caller. A pytree: it passes through checkpointing and `torch.compile`.

    Attributes:
        keep: int32 `(B, K)`, or `(1, K)` for all samples: kept tokens, ascending and unique. Slots past `counts`
            hold N, which no row has: they are gathered as zeros and written nowhere.
        inverse: int32 `(B, N)` or `(1, N)`: slot of each token in `keep`, -1 for a dropped one.
        counts: int32 `(B,)` or `(1,)`: valid slots of each sample where they differ (ragged), else None.
        grid: Sizes of the grid that the kept tokens still form, such as (h, w') with w' kept tokens in each row; None
            where they form none.
        prefix: The first rows that are kept whatever is drawn (text before the latent tokens).
        suffix: The last rows likewise.
    """

    keep: Tensor
    inverse: Tensor
    counts: Tensor | None = None
    grid: tuple[int, ...] | None = None
    prefix: int = 0
    suffix: int = 0

    # -------------------------------------------------------------------------------------------------- made from
    @classmethod
    def from_keep(cls, keep: Tensor, n: int, *, grid: tuple[int, ...] | None = None) -> TokenIndex:
        """From the kept tokens themselves.

        Args:
            keep: Integers `(K,)`, `(1, K)` or `(B, K)`, strictly ascending, 0 to n - 1. Their values are read once,
                here, which waits for a GPU.
            n: Number of all tokens.
            grid: As the attribute.

        Raises:
            TypeError: `keep` is no integer tensor.
            ValueError: Values are out of range, repeated or not ascending.
        """
        if not isinstance(keep, Tensor) or keep.dtype not in (torch.int32, torch.int64):
            found = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
            raise TypeError(f"keep must be a tensor of int32 or int64, got {found}")
        n = _count("n", n)
        keep = keep[None] if keep.dim() == 1 else keep
        if keep.dim() != 2 or not 1 <= keep.shape[1] <= n:
            raise ValueError(f"keep has shape {tuple(keep.shape)}; it must be (K,) or (B, K) with K from 1 to n={n}")
        if not torch.compiler.is_compiling() and keep.numel():
            low, high = int(keep.min()), int(keep.max())
            if low < 0 or high >= n:
                raise ValueError(f"keep holds tokens from {low} to {high}; allowed are 0 to {n - 1}")
            if not bool((keep[:, 1:] > keep[:, :-1]).all()):
                raise ValueError("keep must be strictly ascending in every row: no token twice, none out of order")
        keep = keep.to(torch.int32).contiguous()
        return cls(keep, inverse_of(keep, n), grid=grid)

    @classmethod
    def from_mask(cls, mask: Tensor, *, capacity: int | None = None, grid: tuple[int, ...] | None = None) -> TokenIndex:
        """From a mask of kept tokens.

        Args:
            mask: bool `(N,)`, `(1, N)` or `(B, N)`, True for kept tokens.
            capacity: Slots for each sample, for samples that keep different numbers: the index is ragged then, and
                nothing is read on the host. A sample that keeps more loses its last ones. None reads the numbers
                (which waits for a GPU): equal ones give an index without `counts`, others a ragged one of the largest.
            grid: As the attribute.

        Raises:
            TypeError: `mask` is no bool tensor.
            ValueError: Another shape, nothing is kept, or a capacity outside 1 to N.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, got {found}")
        mask = mask[None] if mask.dim() == 1 else mask
        if mask.dim() != 2 or 0 in mask.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; it must be (N,) or (B, N)")
        if capacity is not None:
            _count("capacity", capacity)
        n, counts = mask.shape[1], mask.sum(1, dtype=torch.int32)
        ragged = capacity is not None
        if capacity is None:
            capacity = int(counts.max())
            ragged = int(counts.min()) != capacity
        if not 1 <= capacity <= n:
            raise ValueError(f"the index would have {capacity} slots a sample; allowed are 1 to {n}")
        order = (~mask).sort(dim=1, stable=True).indices[:, :capacity].to(torch.int32)
        counts = counts.clamp(max=capacity)
        if ragged:
            order = order.masked_fill(torch.arange(capacity, device=mask.device) >= counts[:, None], n)
        keep = order.contiguous()
        return cls(keep, inverse_of(keep, n), counts if ragged else None, grid)

    @classmethod
    def all(cls, n: int, device: Any = None) -> TokenIndex:
        """Every one of n tokens, for all samples.

        Raises:
            ValueError: `n` is no integer of 1 or more.
        """
        n = _count("n", n)
        ids = torch.arange(n, dtype=torch.int32, device=device)[None]
        return cls(ids, ids.clone())

    @classmethod
    def of_kernel(cls, keep: Tensor, inverse: Tensor) -> TokenIndex:
        """The constructor of two tensors at a third of its cost, which a frozen class has in setting every field."""
        made = object.__new__(cls)
        made.__dict__.update(keep=keep, inverse=inverse, counts=None, grid=None, prefix=0, suffix=0)
        return made

    # ------------------------------------------------------------------------------------------------- what it says
    @property
    def batch(self) -> int:
        """Samples that it tells apart; 1 serves any batch."""
        return self.keep.shape[0]

    @property
    def kept(self) -> int:
        """Slots for each sample, K."""
        return self.keep.shape[1]

    @property
    def n(self) -> int:
        """All tokens, N."""
        return self.inverse.shape[1]

    @property
    def mask(self) -> Tensor:
        """Bool `(B|1, N)`: True for kept tokens."""
        return self.inverse >= 0

    def cu_seqlens(self, batch: int | None = None) -> Tensor:
        """int32 `(B + 1,)`: where each sample's kept rows begin once the slots that hold none are left out."""
        batch = self.batch if batch is None else batch
        counts = self.keep.new_full((self.batch,), self.kept) if self.counts is None else self.counts
        return torch.nn.functional.pad(counts.expand(batch).cumsum(0, dtype=torch.int32), (1, 0))

    # ------------------------------------------------------------------------------------------------- made of it
    def complement(self) -> TokenIndex:
        """The dropped tokens.

        Raises:
            ValueError: Every token is kept.
        """
        if self.counts is not None:
            return TokenIndex.from_mask(~self.mask, capacity=self.n)
        if self.kept == self.n:
            raise ValueError(f"all {self.n} tokens are kept: none is left for the complement")
        return TokenIndex.from_mask(~self.mask, capacity=self.n - self.kept)._without_counts()

    def _without_counts(self) -> TokenIndex:
        return replace(self, counts=None)

    def shift(self, prefix: int = 0, suffix: int = 0) -> TokenIndex:
        """The same among `prefix` rows before and `suffix` rows after, all of them kept.

        Raises:
            ValueError: The numbers are negative, or rows would be added after slots that hold no token.
        """
        if prefix < 0 or suffix < 0:
            raise ValueError(f"prefix={prefix}, suffix={suffix}: both must be 0 or more")
        if suffix and self.counts is not None:
            raise ValueError(f"suffix={suffix}: a ragged index can be shifted by a prefix alone")
        if not prefix and not suffix:
            return self
        total, batch = prefix + self.n + suffix, self.batch
        rows = torch.arange(total, dtype=torch.int32, device=self.keep.device).expand(batch, -1)
        keep = torch.cat([rows[:, :prefix], self.keep + prefix, rows[:, prefix + self.n :]], 1)
        counts = None if self.counts is None else self.counts + prefix
        return TokenIndex(
            keep, inverse_of(keep, total), counts, prefix=self.prefix + prefix, suffix=self.suffix + suffix
        )

    def expand(self, batch: int) -> TokenIndex:
        """The same with rows of its own for each of `batch` samples.

        Raises:
            ValueError: It tells another number of samples apart.
        """
        if self.batch not in (1, batch):
            raise ValueError(f"the index is for {self.batch} samples; it cannot serve {batch}")
        if self.batch == batch:
            return self
        counts = None if self.counts is None else self.counts.expand(batch).contiguous()
        keep, inverse = self.keep.expand(batch, -1).contiguous(), self.inverse.expand(batch, -1).contiguous()
        return replace(self, keep=keep, inverse=inverse, counts=counts)

    def part(self, samples: slice) -> TokenIndex:
        """The index of some samples of the batch; one that serves all of them is returned as it is."""
        if self.batch == 1:
            return self
        counts = None if self.counts is None else self.counts[samples]
        return replace(self, keep=self.keep[samples], inverse=self.inverse[samples], counts=counts)

    def to(self, device: Any) -> TokenIndex:
        """The same on a device."""
        counts = None if self.counts is None else self.counts.to(device)
        return replace(self, keep=self.keep.to(device), inverse=self.inverse.to(device), counts=counts)

    # ------------------------------------------------------------------------------------------------- what it does
    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The kept rows of a tensor along `dim`; differentiable.

        Args:
            x: A tensor with N rows along `dim`. With `dim` of 1 or more its first dim is the batch (that of the index,
                or 1); with `dim=0` it has none, such as a table of positions for all samples.
            dim: The dim of the tokens.

        Returns:
            K rows in place of N. The batch is that of `x` or of the index, whichever is not 1; a tensor without a batch
            gets one as its first dim where the index tells samples apart.

        Raises:
            ValueError: `x` has another number of rows, or another batch.
        """
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"dim={dim}; a tensor {tuple(x.shape)} has {x.dim()} dims")
        dim = dim % x.dim()
        if x.shape[dim] != self.n:
            raise ValueError(
                f"dim {dim} of a tensor {tuple(x.shape)} has {x.shape[dim]} rows; the index is of {self.n}"
            )
        if dim == 0:
            if self.batch > 1:
                return self.gather(x[None], 1)
            return self.gather(x[None], 1)[0]
        if x.shape[0] != self.batch and 1 not in (x.shape[0], self.batch):
            raise ValueError(f"a tensor {tuple(x.shape)} has a batch of {x.shape[0]}; the index is of {self.batch}")
        batch = max(x.shape[0], self.batch)
        if dim == 1 and x.is_floating_point() and x.dim() >= 3:
            from ..ops.tokens import gather_rows

            flat = x.flatten(2) if x.dim() > 3 else x
            return gather_rows(flat.expand(batch, -1, -1), self).unflatten(-1, x.shape[2:])
        x = x.expand(batch, *x.shape[1:])
        valid = self.keep < self.n
        shape = [self.keep.shape[0] if i == 0 else self.kept if i == dim else 1 for i in range(x.dim())]
        at = self.keep.clamp(max=self.n - 1).long().view(shape).expand([*x.shape[:dim], self.kept, *x.shape[dim + 1 :]])
        rows = x.gather(dim, at)
        return rows if self.counts is None else rows * valid.view(shape)

    def merge(self, full: Tensor, rows: Tensor) -> Tensor:
        """`full` `(B, N, D)` with its kept rows replaced by `rows` `(B, K, D)`; differentiable."""
        from ..ops.tokens import scatter_merge

        return scatter_merge(full, rows, self)


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer, 1 or more")
    return value


def inverse_of(keep: Tensor, n: int) -> Tensor:
    """int32 `(B, n)`: the slot of each token in `keep` `(B, K)`, -1 where it has none; ids from n on are none."""
    slots = torch.arange(keep.shape[1], dtype=torch.int32, device=keep.device).expand(keep.shape[0], -1)
    wide = torch.full((keep.shape[0], n + 1), -1, dtype=torch.int32, device=keep.device)
    return wide.scatter_(1, keep.clamp(max=n).long(), slots)[:, :n].contiguous()


def _flatten(index: TokenIndex) -> tuple[list[Any], tuple]:
    return [index.keep, index.inverse, index.counts], (index.grid, index.prefix, index.suffix)


def _unflatten(values: Iterable[Any], context: Any) -> TokenIndex:
    return TokenIndex(*values, *context)


pytree.register_pytree_node(TokenIndex, _flatten, _unflatten, serialized_type_name="maskaccel.masks.TokenIndex")
