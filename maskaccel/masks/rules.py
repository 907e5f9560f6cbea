"""Element rules: which pairs of query and key tokens may attend, as data that tiles can be made from.

A `Rule` answers two questions: which elements of some tiles it keeps, exactly, and, cheaply from summaries of whole
tiles, whether a tile is kept nowhere, everywhere, or in part. Rules combine with `&`, `|` and `~`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import _checks

NONE, SOME, ALL = 0, 1, 2  # what a rule keeps of a tile; SOME may also be either of the others

NEVER, ALWAYS, WHERE = 0, 1, 2  # entries of a relation between segments


class Rule:
    """Which pairs of tokens attend.

    Attributes:
        batch: Samples that the rule tells apart, 1 for a rule of all.
        heads: Heads that it tells apart, 1 for a rule of all.
    """

    batch: int = 1
    heads: int = 1

    def check(self, sq: int, sk: int) -> None:
        """ValueError unless the rule fits sequences of these lengths."""

    def to(self, device: torch.device) -> Rule:
        """The rule with its tensors on a device."""
        return self

    def classify(self, rows: Tensor, columns: Tensor) -> Tensor:
        """What is kept of whole tiles.

        Args:
            rows: int64 `(Mq, bm)`, the queries of each row of tiles.
            columns: int64 `(Nk, bn)`, the keys of each column of tiles.

        Returns:
            int8 `(batch, heads, Mq, Nk)` of NONE, SOME, ALL; dims of the rule's own batch and heads.
        """
        return torch.full((1, 1, len(rows), len(columns)), SOME, dtype=torch.int8, device=rows.device)

    def keep(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Which elements of tiles are kept.

        Args:
            rows: int64 `(T, bm)`, the queries of each tile.
            columns: int64 `(T, bn)`, the keys of each tile.

        Returns:
            bool `(batch, heads, T, bm, bn)`.
        """
        raise NotImplementedError

    def __and__(self, other: Rule) -> Rule:
        return Both(self, other)

    def __or__(self, other: Rule) -> Rule:
        return Either(self, other)

    def __invert__(self) -> Rule:
        return Not(self)


def _joint(name: str, a: int, b: int) -> int:
    if a != b and 1 not in (a, b):
        raise ValueError(f"rules for {a} and for {b} {name} cannot be combined")
    return max(a, b)


@dataclass(frozen=True, eq=False)
class Both(Rule):
    """Pairs that both rules keep."""

    first: Rule
    second: Rule

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch", _joint("samples", self.first.batch, self.second.batch))
        object.__setattr__(self, "heads", _joint("heads", self.first.heads, self.second.heads))

    def check(self, sq: int, sk: int) -> None:
        """As of both."""
        self.first.check(sq, sk)
        self.second.check(sq, sk)

    def to(self, device: torch.device) -> Rule:
        """Both moved."""
        return type(self)(self.first.to(device), self.second.to(device))

    def classify(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The lesser of both."""
        return torch.minimum(self.first.classify(rows, columns), self.second.classify(rows, columns))

    def keep(self, rows: Tensor, columns: Tensor) -> Tensor:
        """What both keep."""
        return self.first.keep(rows, columns) & self.second.keep(rows, columns)


class Either(Both):
    """Pairs that one of the rules keeps, or both."""

    def classify(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The greater of both."""
        return torch.maximum(self.first.classify(rows, columns), self.second.classify(rows, columns))

    def keep(self, rows: Tensor, columns: Tensor) -> Tensor:
        """What either keeps."""
        return self.first.keep(rows, columns) | self.second.keep(rows, columns)


@dataclass(frozen=True, eq=False)
class Not(Rule):
    """Pairs that a rule leaves out."""

    rule: Rule

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch", self.rule.batch)
        object.__setattr__(self, "heads", self.rule.heads)

    def check(self, sq: int, sk: int) -> None:
        """As of the rule."""
        self.rule.check(sq, sk)

    def to(self, device: torch.device) -> Rule:
        """The rule moved."""
        return Not(self.rule.to(device))

    def classify(self, rows: Tensor, columns: Tensor) -> Tensor:
        """ALL where the rule keeps NONE, and the reverse."""
        return ALL - self.rule.classify(rows, columns)

    def keep(self, rows: Tensor, columns: Tensor) -> Tensor:
        """What the rule leaves out."""
        return ~self.rule.keep(rows, columns)


@dataclass(frozen=True, eq=False)
class Causal(Rule):
    """Key `j` is kept for query `i` if `j <= i + offset`."""

    offset: int = 0

    def classify(self, rows: Tensor, columns: Tensor) -> Tensor:
        """From the first and last index of each tile."""
        low, high = rows.amin(1)[:, None] + self.offset, rows.amax(1)[:, None] + self.offset
        first, last = columns.amin(1)[None], columns.amax(1)[None]
        return torch.where(last <= low, ALL, torch.where(first > high, NONE, SOME)).to(torch.int8)[None, None]

    def keep(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Exactly."""
        return (columns[:, None, :] <= rows[:, :, None] + self.offset)[None, None]


@dataclass(frozen=True, eq=False)
class Lengths(Rule):
    """Samples padded to a common length: keys from `kv[b]` on and queries from `q[b]` on take no part.

    Attributes:
        kv: Keys of each sample, int64 `(B,)`, or None.
        q: Queries of each sample, or None.
    """

    kv: Tensor | None = None
    q: Tensor | None = None

    def __post_init__(self) -> None:
        given = [t for t in (self.kv, self.q) if t is not None]
        if not given:
            raise ValueError("lengths need kv or q")
        for name, lengths in (("kv", self.kv), ("q", self.q)):
            if lengths is None:
                continue
            _checks.tensor(name, lengths)
            if lengths.dim() != 1 or lengths.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{name} must be integers (B,), got {lengths.dtype} {tuple(lengths.shape)}")
            if lengths.numel() and int(lengths.min()) < 0:
                raise ValueError(f"{name} holds {int(lengths.min())}; a length is 0 or more")
        if len({len(t) for t in given}) > 1:
            raise ValueError(f"kv has {len(given[0])} samples, q has {len(given[1])}")
        object.__setattr__(self, "batch", len(given[0]))

    def check(self, sq: int, sk: int) -> None:
        """No length is above that of the sequence."""
        for name, lengths, most in (("kv", self.kv, sk), ("q", self.q, sq)):
            if lengths is not None and len(lengths) and int(lengths.max()) > most:
                raise ValueError(f"{name} holds {int(lengths.max())}; the sequence has {most} tokens")

    def to(self, device: torch.device) -> Rule:
        """Moved."""
        return Lengths(*(None if t is None else t.to(device) for t in (self.kv, self.q)))

    def classify(self, rows: Tensor, columns: Tensor) -> Tensor:
        """From the first and last index of each tile."""
        result = torch.full((self.batch, 1, len(rows), len(columns)), ALL, dtype=torch.int8, device=rows.device)
        for lengths, tiles, dim in ((self.kv, columns, -2), (self.q, rows, -1)):
            if lengths is not None:
                limit = lengths[:, None]
                part = torch.where(tiles.amax(1) < limit, ALL, torch.where(tiles.amin(1) >= limit, NONE, SOME))
                result = torch.minimum(result, part.to(torch.int8)[:, None].unsqueeze(dim))
        return result

    def keep(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Exactly."""
        result = torch.ones((), dtype=torch.bool, device=rows.device)
        if self.kv is not None:
            result = result & (columns < self.kv[:, None, None])[:, None, :, None, :]
        if self.q is not None:
            result = result & (rows < self.q[:, None, None])[:, None, :, :, None]
        return result.expand(self.batch, 1, len(rows), rows.shape[1], columns.shape[1])


@dataclass(frozen=True, eq=False)
class Dense(Rule):
    """Any mask, element by element (learned masks, Mask2Former): bool `(B|1, H|1, Sq, Sk)`."""

    mask: Tensor

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool or self.mask.dim() != 4:
            raise ValueError(f"mask must be bool (B, H, Sq, Sk), got {self.mask.dtype} {tuple(self.mask.shape)}")
        object.__setattr__(self, "batch", self.mask.shape[0])
        object.__setattr__(self, "heads", self.mask.shape[1])

    def check(self, sq: int, sk: int) -> None:
        """It has the shape of the scores."""
        if tuple(self.mask.shape[2:]) != (sq, sk):
            raise ValueError(f"mask is for {tuple(self.mask.shape[2:])} tokens; the scores are {(sq, sk)}")

    def to(self, device: torch.device) -> Rule:
        """Moved."""
        return Dense(self.mask.to(device))

    def keep(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Looked up."""
        return self.mask[:, :, rows[:, :, None], columns[:, None, :]]


@dataclass(frozen=True, eq=False)
class Segments(Rule):
    """Tokens belong to classes, and a table says which classes see which (Mask2DiT, varlen, masked cross-attention).

    Attributes:
        q: Class of each query, int `(Sq,)` or `(B, Sq)`.
        k: Class of each key, int `(Sk,)` or `(B, Sk)`.
        relation: `relation[class of query][class of key]` of NEVER, ALWAYS, WHERE; None: equal classes see each other.
        where: The rule for WHERE.
    """

    q: Tensor
    k: Tensor
    relation: Tensor | Sequence[Sequence[int]] | None = None
    where: Rule | None = None

    def __post_init__(self) -> None:
        for name in ("q", "k"):
            ids = _checks.tensor(name, getattr(self, name))
            if ids.dim() not in (1, 2) or ids.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{name} must be integers (S,) or (B, S), got {ids.dtype} {tuple(ids.shape)}")
            object.__setattr__(self, name, ids.long()[(None,) * (2 - ids.dim())])
        batch = _joint("samples", len(self.q), len(self.k))
        if self.relation is not None:
            table = torch.as_tensor(self.relation, dtype=torch.int8, device=self.q.device)
            if table.dim() != 2 or not bool(((table >= NEVER) & (table <= WHERE)).all()):
                raise ValueError(f"relation must be a table of 0 (never), 1 (always), 2 (where), got {self.relation}")
            if bool((table == WHERE).any()) and self.where is None:
                raise ValueError("relation holds 2 (where), which needs the rule `where`")
            for name, ids, classes in (("q", self.q, table.shape[0]), ("k", self.k, table.shape[1])):
                low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
                if low < 0 or high >= classes:
                    raise ValueError(f"{name} holds classes {low} to {high}; the relation has 0 to {classes - 1}")
            object.__setattr__(self, "relation", table)
        if self.where is not None:
            if self.relation is None:
                raise ValueError("where needs a relation that says where it applies")
            batch = _joint("samples", batch, self.where.batch)
            object.__setattr__(self, "heads", self.where.heads)
        object.__setattr__(self, "batch", batch)

    def check(self, sq: int, sk: int) -> None:
        """There is a class for every token."""
        for name, ids, tokens in (("q", self.q, sq), ("k", self.k, sk)):
            if ids.shape[1] != tokens:
                raise ValueError(f"segments have {ids.shape[1]} classes in {name}; the sequence has {tokens} tokens")
        if self.where is not None:
            self.where.check(sq, sk)

    def to(self, device: torch.device) -> Rule:
        """Moved."""
        table = self.relation
        return Segments(
            self.q.to(device),
            self.k.to(device),
            table.to(device) if isinstance(table, Tensor) else table,
            None if self.where is None else self.where.to(device),
        )

    def classify(self, rows: Tensor, columns: Tensor) -> Tensor:
        """From the classes that occur in each tile."""
        q, k = self.q[:, rows], self.k[:, columns]  # (B, M, bm), (B, N, bn)
        if self.relation is None:
            q_low, q_high, k_low, k_high = q.amin(2), q.amax(2), k.amin(2), k.amax(2)
            apart = (q_high[:, :, None] < k_low[:, None]) | (k_high[:, None] < q_low[:, :, None])
            same = (q_low == q_high)[:, :, None] & (k_low == k_high)[:, None] & (q_low[:, :, None] == k_low[:, None])
            return torch.where(apart, NONE, torch.where(same, ALL, SOME)).to(torch.int8)[:, None]
        table = torch.as_tensor(self.relation)
        q_in = torch.nn.functional.one_hot(q, table.shape[0]).amax(2).float()
        k_in = torch.nn.functional.one_hot(k, table.shape[1]).amax(2).float()
        never, always, where = (
            (q_in @ (table == kind).float() @ k_in.mT > 0)[:, None] for kind in (NEVER, ALWAYS, WHERE)
        )
        inner = torch.full_like(never, SOME, dtype=torch.int8)
        if self.where is not None:
            inner = self.where.classify(rows, columns)
        everything = ~never & (~where | (inner == ALL))
        nothing = ~always & (~where | (inner == NONE))
        return torch.where(everything, ALL, torch.where(nothing, NONE, SOME)).to(torch.int8)

    def keep(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Exactly."""
        q, k = self.q[:, rows][..., :, None], self.k[:, columns][..., None, :]
        if self.relation is None:
            return (q == k)[:, None]
        kind = torch.as_tensor(self.relation)[q, k][:, None]
        if self.where is None:
            return kind == ALWAYS
        return (kind == ALWAYS) | ((kind == WHERE) & self.where.keep(rows, columns))


def varlen(cu_seqlens_q: Sequence[int], cu_seqlens_k: Sequence[int]) -> Segments:
    """The rule of packed sequences: tokens attend within their own sample.

    Args:
        cu_seqlens_q: Offsets of the samples' queries, starting with 0, as `(B + 1,)`.
        cu_seqlens_k: Of the keys.

    Returns:
        `Segments` of the samples.

    Raises:
        ValueError: The offsets do not start with 0, decrease, or tell different numbers of samples.
    """
    ids = []
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        at = torch.as_tensor(offsets, dtype=torch.int64)
        if at.dim() != 1 or len(at) < 2 or int(at[0]) != 0 or bool((at.diff() < 0).any()):
            raise ValueError(f"{name}={at.tolist()} must start with 0 and not decrease, and hold two offsets or more")
        ids.append(torch.repeat_interleave(torch.arange(len(at) - 1, device=at.device), at.diff()))
    if len(torch.as_tensor(cu_seqlens_q)) != len(torch.as_tensor(cu_seqlens_k)):
        raise ValueError("cu_seqlens_q and cu_seqlens_k tell different numbers of samples")
    return Segments(ids[0], ids[1])
