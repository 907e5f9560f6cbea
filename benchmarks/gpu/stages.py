"""The stages of `make gpu` in the order they run: most valuable first, since the time may end before the last."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple


class Plan(NamedTuple):
    """A stage.

    Attributes:
        module: Module of this folder (its interface: stage.py).
        seconds: The most of a run with a budget that it may take as a whole.
    """

    module: str
    seconds: float


STAGES = {
    "ceilings": Plan("ceilings", 40),
    "correctness": Plan("correctness", 150),
    "compile": Plan("compiling", 90),
    "micro": Plan("micro", 180),
    "attention": Plan("attention", 120),
    "host": Plan("host", 40),
    "lists": Plan("lists", 30),
    "models": Plan("models", 150),
    "variants": Plan("variants", 60),
    "fashion": Plan("fashion", 370),
    "tokens": Plan("tokens", 60),
    "sync": Plan("sync", 60),
    "sanitize": Plan("sanitize", 90),
    "tests": Plan("tests", 200),
}


def load(plan: Plan) -> ModuleType:
    """The module of a stage, or ImportError."""
    return importlib.import_module(plan.module)


def expected(module: ModuleType) -> float:
    """Usual seconds of an item."""
    return getattr(module, "EXPECTED", module.SECONDS / 4)
