"""A table without a batch that is another one in every sample.

Rotary tables have no batch where all samples have the same places: `(S, d)`, and code that reads them inserts dims
where it needs them. Where samples keep different tokens there is one such table for each. `PerSample` looks like the
table of one sample to that code, and holds those of all: what is done to it alone is done to each of them, and where it
meets a tensor of the batch, each sample meets its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# what is said of one sample's table without looking into it
_METADATA = {"dim", "ndimension", "size", "numel", "nelement", "stride", "element_size", "get_device", "is_complex"}
_METADATA |= {"is_floating_point", "is_contiguous", "is_inference", "__len__", "__hash__", "__repr__"}
# what may be done between tables and tensors of the batch: element by element
_BETWEEN = {
    "mul",
    "__mul__",
    "__rmul__",
    "multiply",
    "add",
    "__add__",
    "__radd__",
    "sub",
    "__sub__",
    "__rsub__",
    "where",
}
_BETWEEN |= {"div", "__truediv__", "true_divide", "addcmul", "lerp"}
_TENSORS = {"real", "imag", "T", "mT"}  # attributes that are tensors


def tables_of(value: Any) -> Any:
    """`(B, ...)` tables for code that takes those; what is not one table for each sample is returned as it is."""
    if not isinstance(value, PerSample | SampleTables):
        return value
    return value.rows.squeeze(1) if value.rows.dim() > 3 and value.rows.shape[1] == 1 else value.rows


class NeedsSamples(Exception):
    """A value is one for all samples in a form that cannot be one for each: samples have to run one by one."""


class PerSample(Tensor):
    """A table for each sample, with the sizes of one of them.

    Args:
        rows: The tables, `(B, ...)`.
    """

    rows: Tensor

    @staticmethod
    def __new__(cls, rows: Tensor) -> PerSample:
        """Of the sizes of one sample's table."""
        return Tensor._make_wrapper_subclass(cls, rows.shape[1:], dtype=rows.dtype, device=rows.device)  # type: ignore[attr-defined]

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PerSample({tuple(self.rows.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An operation on such tables."""
        kwargs = kwargs or {}
        name = func.__name__
        attribute = func.__self__.__name__ if name == "__get__" else ""
        if name in _METADATA or (attribute and attribute not in _TENSORS):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if attribute:
            return cls(torch.vmap(lambda table: getattr(table, attribute))(args[0].rows))
        if name == "__getitem__" and _plain(args[1]):
            own = args[1] if isinstance(args[1], tuple) else (args[1],)
            at = (slice(None), *own)
            return cls(args[0].rows[at])
        if name in ("to", "float", "double", "type_as", "contiguous", "conj", "resolve_conj"):
            return cls(func(args[0].rows, *args[1:], **kwargs))
        if name == "unsqueeze":
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return cls(args[0].rows.unsqueeze(dim + 1 if dim >= 0 else dim))
        leaves, spec = pytree.tree_flatten((args, kwargs))
        others = [
            leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, PerSample) and leaf.dim()
        ]
        if not others:
            return _each(func, leaves, spec)
        dims = max(leaf.dim() for leaf in others)
        batch = next(leaf.rows.shape[0] for leaf in leaves if isinstance(leaf, PerSample))
        if name not in _BETWEEN or any(leaf.dim() == dims and leaf.shape[0] not in (1, batch) for leaf in others):
            raise NeedsSamples(f"{name} of a table for each sample and a tensor")
        met = [_batched(leaf, dims) if isinstance(leaf, PerSample) else leaf for leaf in leaves]
        given, named = pytree.tree_unflatten(met, spec)
        return func(*given, **named)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Reached by code that looks below: it needs the table of one sample."""
        raise NeedsSamples(str(func))


class SampleTables:
    """What a `PerSample` is to compiled code, which takes no tensors of another class: an object that is no tensor.

    It has what rotary code asks of its tables, and nothing else: a table that is used in another way is an error.

    Args:
        rows: The tables, `(B, ...)`.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @property
    def shape(self) -> torch.Size:
        """The sizes of one sample's table."""
        return self.rows.shape[1:]

    @property
    def ndim(self) -> int:
        """The dims of one sample's table."""
        return self.rows.dim() - 1

    def __getitem__(self, at: Any) -> SampleTables:
        own = at if isinstance(at, tuple) else (at,)
        where = (slice(None), *own)
        return SampleTables(self.rows[where])

    def unsqueeze(self, dim: int) -> SampleTables:
        """As of a tensor."""
        return SampleTables(self.rows.unsqueeze(dim + 1 if dim >= 0 else dim))

    def to(self, *args: Any, **kwargs: Any) -> SampleTables:
        """As of a tensor."""
        return SampleTables(self.rows.to(*args, **kwargs))

    def float(self) -> SampleTables:
        """As of a tensor."""
        return SampleTables(self.rows.float())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Between a table and a tensor of the batch: each sample meets its own."""
        one, other = args
        if isinstance(one, SampleTables):
            return func(_batched(one, other.dim()), other)
        return func(one, _batched(other, one.dim()))


def _plain(at: Any) -> bool:
    parts = at if isinstance(at, tuple) else (at,)
    return all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts)


def _each(func: Any, leaves: list[Any], spec: Any) -> Any:
    """An operation on tables alone, for each sample."""
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, PerSample)]

    def one(*tables: Tensor) -> Any:
        given = list(leaves)
        for i, table in zip(where, tables, strict=True):
            given[i] = table
        args, kwargs = pytree.tree_unflatten(given, spec)
        return func(*args, **kwargs)

    found = torch.vmap(one)(*(leaves[i].rows for i in where))
    return pytree.tree_map_only(Tensor, PerSample, found)


def _batched(table: PerSample | SampleTables, dims: int) -> Tensor:
    """The tables as one tensor whose first dim is the batch, to meet one of so many dims."""
    rows = table.rows
    if rows.dim() == dims + 1 and rows.shape[1] == 1:  # a dim was inserted for the batch
        return rows.squeeze(1)
    if rows.dim() > dims:
        raise NeedsSamples(f"a table {tuple(rows.shape[1:])} for each sample meets a tensor of {dims} dims")
    return rows.reshape(rows.shape[0], *[1] * (dims - rows.dim()), *rows.shape[1:])
