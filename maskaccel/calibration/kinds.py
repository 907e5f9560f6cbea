"""The kinds of calibration: what each measures, and what its file has to hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import distances, magnitudes, products, teacache
from .probe import Probe


@dataclass(frozen=True)
class Kind:
    """One kind of calibration.

    Attributes:
        summary: What is measured, and for which methods.
        probe: The class of what measures it; its arguments are the options of the kind.
        check: Raises ValueError if the values of a file, and the steps of its run, do not fit the kind.
    """

    summary: str
    probe: type[Probe]
    check: Callable[[Mapping[str, Any], int], None]

    @property
    def options(self) -> dict[str, Any]:
        """The options and their defaults."""
        return {p.name: p.default for p in inspect.signature(self.probe).parameters.values()}


KINDS = {
    "distances": Kind("pairwise distances of a feature between steps (DDT, SCM)", distances.Distances, distances.check),
    "magnitudes": Kind(
        "ratios of the residual's norm between steps (MagCache)", magnitudes.Magnitudes, magnitudes.check
    ),
    "products": Kind("inner products of the residual between steps (DPCache)", products.Products, products.check),
    "teacache": Kind(
        "polynomial from the change of the modulated input to that of the output (TeaCache)",
        teacache.Fit,
        teacache.check,
    ),
}


def kind_of(name: str) -> Kind:
    """The kind of this name; ValueError with the names there are."""
    if name not in KINDS:
        raise ValueError(f"kind={name!r}; allowed are {', '.join(map(repr, KINDS))}")
    return KINDS[name]
