"""Arguments of a block, or of a model, for some samples of the batch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Words in the names of a model's arguments that belong to positions, not to samples.
_SHARED = ("ids", "rotary", "rope", "freqs")


class _Unclear(Exception):
    """A tensor does not say which of its rows belong to which sample."""


def slice_batch(
    args: tuple, kwargs: dict[str, Any], streams: Sequence[Tensor | None], rows: Sequence[int]
) -> tuple[tuple, dict[str, Any]] | None:
    """The arguments of a block with every per-sample tensor cut to `rows`.

    A tensor whose first dim is the batch is per sample; one whose first dim is 1 or the number of tokens (of a stream,
    or of all together) is shared. Anything else, such as frames folded into the batch, is unclear.

    Returns:
        Arguments and keywords, or None if some tensor is unclear.
    """
    known = [s for s in streams if s is not None]
    batch, tokens = known[0].shape[0], {s.shape[1] for s in known if s.dim() > 2}
    tokens |= {sum(s.shape[1] for s in known if s.dim() > 2)}
    if batch in tokens:
        return None
    index = torch.tensor(rows, device=known[0].device)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dim() == 0 or value.shape[0] == 1:
                return value
            if value.shape[0] == batch:
                return value.index_select(0, index if value.device == index.device else index.to(value.device))
            if value.shape[0] in tokens:
                return value
            raise _Unclear
        if isinstance(value, tuple | list):
            return type(value)(cut(v) for v in value)
        if isinstance(value, dict):
            return {k: cut(v) for k, v in value.items()}
        return value

    try:
        return cut(args), cut(kwargs)
    except _Unclear:
        return None


@functools.cache
def _parameters(cls: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def as_named(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model's call by name, in the order of its signature."""
    kind: Any = type(model)
    given = {**dict(zip(_parameters(kind), args, strict=False)), **kwargs}
    return {name: given[name] for name in _parameters(kind) if name in given} | given


def cut_batch(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], batch: int, rows: slice
) -> tuple[tuple, dict[str, Any]] | None:
    """The arguments of a model's call for some samples.

    Tensors whose first dim is the batch are per sample, and so are lists of that length; numbers, tensors of one row
    and those whose name speaks of positions are shared. Anything else is unclear.

    Returns:
        Arguments and keywords, or None if some tensor is unclear.
    """

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dim() and value.shape[0] == batch:
                return value[rows]
            if value.dim() and value.shape[0] != 1:
                raise _Unclear
            return value
        if isinstance(value, list) and len(value) == batch:
            return value[rows]
        if isinstance(value, tuple | list):
            return type(value)(cut(v) for v in value)
        if isinstance(value, dict):
            return {k: named(k, v) for k, v in value.items()}
        return value

    def named(name: Any, value: Any) -> Any:
        return value if any(word in str(name) for word in _SHARED) else cut(value)

    kind: Any = type(model)
    names = (*_parameters(kind), *("",) * len(args))
    try:
        picked = tuple(named(n, v) for n, v in zip(names, args, strict=False))
        return picked, {k: named(k, v) for k, v in kwargs.items()}
    except _Unclear:
        return None
