"""`maskaccel methods` and `maskaccel explain`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch

import maskaccel

from ..bench.registry import dtype_of


def describe() -> list[dict[str, str]]:
    """Methods that patch a model: name, kind (exact or lossy), arguments with defaults, summary, models and paper."""
    rows = []
    for name in sorted(maskaccel.methods.PATCHES):
        method = getattr(maskaccel.methods, name)
        parameters = inspect.signature(method).parameters.values()
        rows.append({
            "name": name,
            "kind": str(getattr(method, "kind", "")),
            "arguments": ", ".join(str(p).split(":")[0] + _default(p) for p in parameters),
            "summary": (inspect.getdoc(method) or "").splitlines()[0],
            "models": str(getattr(method, "models", "")),
            "paper": str(getattr(method, "paper", "") or ""),
        })  # fmt: skip
    return rows


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is parameter.empty else f"={shown(parameter.default)}"


def shown(value: Any) -> str:
    """The repr of a value; of a dataclass only the fields that are not as they are by default."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value)
    fields = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
    changed = (f"{f.name}={shown(one)}" for f, one in fields if f.default is dataclasses.MISSING or one != f.default)
    return f"{type(value).__name__}({', '.join(changed)})"


def print_methods() -> None:
    """`describe` as text."""
    for row in describe():
        print(f"{row['name']}({row['arguments']})  [{row['kind']}]")
        print(f"    {row['summary']}")
        for label in ("models", "paper"):
            if row[label]:
                print(f"    {label}: {row[label]}")


def explain_op(op: str, dtype: str, device: str | None) -> dict[str, dict[str, Any]]:
    """Reasons of `maskaccel.explain` for one device, or for every kind of device here."""
    here = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    devices = [device] if device is not None else here
    chosen = dtype_of(dtype)
    return {name: maskaccel.explain(op, torch.empty(0, dtype=chosen, device=name)) for name in devices}


def print_explained(op: str, dtype: str, rows: dict[str, dict[str, Any]]) -> None:
    """`explain_op` as text; the backend that runs is marked."""
    for device, backends in rows.items():
        print(f"{op}, {dtype} on {device}")
        chosen = next((name for name, reason in backends.items() if reason is None), None)
        for name, reason in backends.items():
            mark = "*" if name == chosen else " "
            print(f"  {mark} {name:10} {'can run' if reason is None else 'cannot: ' + reason}")
    print("* runs when no backend is named")
