"""What the library knows of a class of block, norm or attention processor, as data."""

from __future__ import annotations

import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


def _always(_: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Adapter:
    """A fused replacement for the forward of one class.

    Attributes:
        cls: `"module:Class"` of the original. Classes of one name live in several modules, so both are needed.
        forward: The replacement, `forward(self, *args, **kwargs)` with the original's signature; for an attention
            processor, a function that makes the fused processor from the original one.
        fingerprints: `fingerprint()` of the original methods it was written for; any other version is not replaced.
        sites: Children whose outputs are added to the residual stream before any gate: what a cache may remember.
        unsupported: Why this instance cannot use the replacement, or None.
        idle: For an attention processor: why it has nothing to fuse in this attention module, or None.
        method: Name of the original's method whose source is fingerprinted.
    """

    cls: str
    forward: Callable[..., Any]
    fingerprints: frozenset[str]
    sites: tuple[str, ...] = ()
    unsupported: Callable[[Any], str | None] = _always
    idle: Callable[[Any], str | None] = _always
    method: str = "forward"

    def refusal(self, instance: Any) -> str | None:
        """Why the replacement cannot be used on this instance; None if it can."""
        found = fingerprint(type(instance), self.method)
        if found not in self.fingerprints:
            return f"unknown version of {type(instance).__name__}.{self.method} (fingerprint {found})"
        return self.unsupported(instance)


def class_key(instance: Any) -> str:
    """`"module:Class"` of an object."""
    return f"{type(instance).__module__}:{type(instance).__qualname__}"


@functools.cache
def fingerprint(cls: type, method: str = "forward") -> str:
    """Twelve hex digits of a method's source without comments, blank lines and indentation; `"none"` without one."""
    try:
        source = inspect.getsource(inspect.unwrap(getattr(cls, method)))
    except (AttributeError, OSError, TypeError):
        return "none"
    lines = (line.strip() for line in textwrap.dedent(source).splitlines())
    kept = "\n".join(line for line in lines if line and not line.startswith("#"))
    return hashlib.sha256(kept.encode()).hexdigest()[:12]


def table(*adapters: Adapter) -> dict[str, Adapter]:
    """Adapters by class key."""
    return {adapter.cls: adapter for adapter in adapters}


def children_of(module: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The children of these dotted names that exist."""
    found = []
    for name in names:
        child: Any = module
        for part in name.split("."):
            child = getattr(child, part, None)
        if isinstance(child, nn.Module):
            found.append(child)
    return found
