"""The stages of `make gpu` in the order they run: most valuable first, since the time may end before the last."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from stage import Stage

# name: module of this folder (its interface: stage.py)
MODULES = {
    "ceilings": "ceilings",
    "correctness": "correctness",
    "compile": "compiling",
    "micro": "micro",
    "attention": "attention",
    "variants": "variants",
    "lists": "lists",
    "host": "host",
    "models": "models",
    "fashion": "fashion",
    "tokens": "tokens",
    "sync": "sync",
    "sanitize": "sanitize",
    "tests": "tests",
}
STAGES = tuple(name for name, module in MODULES.items() if Path(__file__).with_name(f"{module}.py").exists())


def load(name: str) -> Stage:
    """The module of a stage."""
    return cast("Stage", importlib.import_module(MODULES[name]))
