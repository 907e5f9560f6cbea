"""The kinds of calibration: what each measures, and what its file has to hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..models._decoupled import STATE
from . import channels, distances, magnitudes, products, skip, teacache
from .file import Calibration
from .probe import Probe


@dataclass(frozen=True)
class Kind:
    """One kind of calibration.

    Attributes:
        summary: What is measured, and for which methods.
        probe: The class of what measures it; its arguments are the options of the kind.
        check: Raises ValueError if the values of a file, and the steps of its run, do not fit the kind.
        use: How a method is given the calibration, with its path, in words.
    """

    summary: str
    probe: type[Probe]
    check: Callable[[Mapping[str, Any], int], None]
    use: Callable[[Calibration, str], str] = lambda found, path: ""

    @property
    def options(self) -> dict[str, Any]:
        """The options and their defaults."""
        return {p.name: p.default for p in inspect.signature(self.probe).parameters.values()}


def _use_distances(found: Calibration, path: str) -> str:
    if found["encoder"] == found.blocks:
        return f"SCM(Dynamic(Calibration.load({path!r})['distances'], refresh=3))"
    number = f", encoder={found['encoder']!r}" if found["encoder"] != STATE else ""
    return f"DDT(schedule={path!r}{number})"


KINDS = {
    "distances": Kind(
        "pairwise distances of a feature between steps, for DDT and SCM",
        distances.Distances,
        distances.check,
        _use_distances,
    ),
    "hyca": Kind(
        "clusters of channels and their solvers, for HyCa",
        channels.Channels,
        channels.check,
        lambda found, path: f"HyCa({path!r}, interval={found['interval']})",
    ),
    "magnitudes": Kind(
        "ratios of the norm of the residual between steps, for MagCache",
        magnitudes.Magnitudes,
        magnitudes.check,
        lambda found, path: f"MagCache(ratios={path!r})",
    ),
    "products": Kind(
        "inner products of the residual between steps, for DPCache",
        products.Products,
        products.check,
        lambda found, path: f"DPCache({path!r})",
    ),
    "skip": Kind(
        "thresholds for each layer and step, for LiteAttention",
        skip.SkipThresholds,
        skip.check,
        lambda found, path: f"LiteAttention(thresholds={path!r}, block=({found['rows']}, {found['columns']}))",
    ),
    "teacache": Kind(
        "polynomial from the change of the modulated input to that of the output, for TeaCache",
        teacache.Fit,
        teacache.check,
        lambda found, path: f"TeaCache(polynomial={path!r}, tap={found['tap']!r})",
    ),
}


def kind_of(name: str) -> Kind:
    """The kind of this name; ValueError with the names there are."""
    if name not in KINDS:
        raise ValueError(f"kind={name!r}; allowed are {', '.join(map(repr, KINDS))}")
    return KINDS[name]
