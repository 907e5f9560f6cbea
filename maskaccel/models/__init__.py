"""One file per model family: which classes it knows, and their fused replacements."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType
from typing import Any

from torch import nn

from ._adapter import Adapter, class_key, fingerprint
from ._decoupled import Decoupled
from ._stack import Stack, stack_of
from ._streams import Streams, streams_of


@functools.cache
def _families() -> list[ModuleType]:
    names = [info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")]
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


@functools.cache
def _tables(kind: str) -> dict[str, Adapter]:
    found: dict[str, Adapter] = {}
    for family in _families():
        found.update(getattr(family, kind, {}))
    return found


def _by_structure(kind: str, instance: Any) -> Adapter | None:
    """The adapter of a module of no known class that is built like one of a known kind."""
    if not isinstance(instance, nn.Module):
        return None
    adapters = (adapter for family in _families() for adapter in getattr(family, kind, ()))
    return next((adapter for adapter in adapters if adapter.matches(instance)), None)


def block_adapter(instance: Any) -> Adapter | None:
    """The adapter of a transformer block, or None."""
    return _tables("BLOCKS").get(class_key(instance)) or _by_structure("STRUCTURAL_BLOCKS", instance)


def norm_adapter(instance: Any) -> Adapter | None:
    """The adapter of an adaLN norm module, or None."""
    return _tables("NORMS").get(class_key(instance)) or _by_structure("STRUCTURAL_NORMS", instance)


def processor_adapter(instance: Any) -> Adapter | None:
    """The adapter of an attention processor, or None."""
    return _tables("PROCESSORS").get(class_key(instance))


def known_blocks() -> dict[str, Adapter]:
    """Every block adapter by class key."""
    return dict(_tables("BLOCKS"))


def known_norms() -> dict[str, Adapter]:
    """Every norm adapter by class key."""
    return dict(_tables("NORMS"))


def known_processors() -> dict[str, Adapter]:
    """Every attention processor adapter by class key."""
    return dict(_tables("PROCESSORS"))


__all__ = [
    "Adapter",
    "Decoupled",
    "Stack",
    "Streams",
    "block_adapter",
    "fingerprint",
    "known_blocks",
    "known_norms",
    "known_processors",
    "norm_adapter",
    "processor_adapter",
    "stack_of",
    "streams_of",
]
