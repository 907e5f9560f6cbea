"""What a calibration run found, as plain data in a JSON file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

VERSION = 1
_FIELDS = {"format": str, "version": int, "kind": str, "model": str, "blocks": int, "steps": int, "values": dict}
_FORMAT = "maskaccel calibration"
_BREAK = re.compile(r"\n\s*")


@dataclass(frozen=True)
class Calibration:
    """Measurements of one model that a method needs.

    Attributes:
        kind: What was measured: a key of `maskaccel.calibration.KINDS`.
        model: Class name of the model.
        blocks: Its number of blocks.
        steps: Steps of the run that was measured.
        values: Name and value of each result; values are numbers, strings, bools, and nested tuples of them. Hashable.
    """

    kind: str
    model: str
    blocks: int
    steps: int
    values: tuple[tuple[str, Any], ...]

    @classmethod
    def make(cls, kind: str, model: str, blocks: int, steps: int, values: Mapping[str, Any]) -> Calibration:
        """A calibration from a mapping of results, whose lists become tuples.

        Raises:
            ValueError: A value is no finite number, string, bool or list of them.
        """
        return cls(kind, model, blocks, steps, tuple((str(k), _frozen(k, v)) for k, v in values.items()))

    def __getitem__(self, name: str) -> Any:
        """The result of this name."""
        for key, value in self.values:
            if key == name:
                return value
        raise KeyError(name)

    def save(self, path: str | Path) -> None:
        """Write the JSON file, a list of numbers on one line."""
        text = json.dumps(self.as_dict(), indent=1)
        text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: f"[{re.sub(_BREAK, ' ', found[1])}]", text)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def as_dict(self) -> dict[str, Any]:
        """What the file holds."""
        return {
            "format": _FORMAT, "version": VERSION, "kind": self.kind, "model": self.model, "blocks": self.blocks,
            "steps": self.steps, "values": dict(self.values),
        }  # fmt: skip

    @classmethod
    def load(cls, path: str | Path, kind: str | None = None, model: str | None = None) -> Calibration:
        """Read a file.

        Args:
            path: Written by `save`.
            kind: The kind wanted; None takes any.
            model: Class name of the model that it is for; None takes any.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no calibration, or one of another version, kind or model.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file} is no file; `maskaccel calibrate` writes calibrations")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is no JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError(f"{file} is no calibration: its 'format' is not {_FORMAT!r}")
        if data.get("version") != VERSION:
            raise ValueError(f"{file} has version {data.get('version')!r}; this library reads version {VERSION}")
        for name, wanted in _FIELDS.items():
            if type(data.get(name)) is not wanted:
                raise ValueError(f"{file}: {name}={data.get(name)!r} must be of type {wanted.__name__}")
        for name in ("blocks", "steps"):
            if data[name] < 1:
                raise ValueError(f"{file}: {name}={data[name]} must be 1 or more")
        found = cls.make(data["kind"], data["model"], data["blocks"], data["steps"], data["values"])
        return found.checked(kind, model, str(file))

    def checked(
        self, kind: str | None = None, model: str | None = None, source: str = "the calibration"
    ) -> Calibration:
        """This calibration, if it is of this kind and for this model, and whole; ValueError otherwise."""
        if kind is not None and self.kind != kind:
            raise ValueError(f"{source} is of kind {self.kind!r}; needed is {kind!r}")
        if model is not None and self.model != model:
            raise ValueError(f"{source} was made with {self.model}; the model is a {model}")
        from .kinds import KINDS  # the kinds measure with what stands above this file

        if self.kind in KINDS:
            try:
                KINDS[self.kind].check(dict(self.values), self.steps)
            except ValueError as error:
                raise ValueError(f"{source} is no whole calibration of kind {self.kind!r}: {error}") from None
        return self


def class_name(model: nn.Module | str | None) -> str | None:
    """The name of a model's class; a name stays what it is."""
    return type(model).__name__ if isinstance(model, nn.Module) else model


def calibration_of(
    given: Calibration | str | Path,
    kind: str,
    model: nn.Module | str | None = None,
    *,
    field: str = "calibration",
    names: Iterable[str] = (),
) -> Calibration:
    """What a method was given, a calibration or the path of one, of this kind.

    Args:
        given: The calibration or its path.
        kind: The kind wanted.
        model: The model that it is for, or the name of its class; None takes any.
        field: How the method calls it.
        names: What it may be besides, for the error: a word that is neither is most likely one of them misspelt.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: It is neither a calibration nor a path.
        ValueError: It is of another kind or version, or of a model of another class or number of blocks.
    """
    if not isinstance(given, Calibration | str | Path):
        raise TypeError(f"{field}={given!r} must be a Calibration of kind {kind!r} or the path of one")
    if names and isinstance(given, str) and not Path(given).suffix and not Path(given).exists():
        raise ValueError(f"{field}={given!r} is no file; allowed names are {', '.join(map(repr, names))}")
    name = class_name(model)
    found = given.checked(kind, name) if isinstance(given, Calibration) else Calibration.load(given, kind, name)
    if isinstance(model, nn.Module):
        from .probe import blocks_of

        if found.blocks != blocks_of(model):
            raise ValueError(
                f"the calibration was made with a {name} of {found.blocks} blocks; this one has {blocks_of(model)}"
            )
    return found


def check_square(values: Mapping[str, Any], name: str, steps: int) -> None:
    """ValueError unless the value of this name is a square matrix of numbers, one row a step."""
    rows = values.get(name)
    if not isinstance(rows, tuple) or len(rows) != steps:
        raise ValueError(f"{name} must have {steps} rows, one a step")
    if any(not isinstance(row, tuple) or len(row) != steps for row in rows):
        raise ValueError(f"{name} must be a square matrix of {steps} rows")
    if any(isinstance(one, bool) or not isinstance(one, int | float) for row in rows for one in row):
        raise ValueError(f"{name} must hold numbers")


def _frozen(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_frozen(name, one) for one in value)
    if isinstance(value, str | bool) or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    raise ValueError(f"{name} holds {value!r}; allowed are finite numbers, strings, bools and lists of them")
