"""`maskaccel plan`: what a method would do at each step, before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from .. import methods, state
from ..masks.schedule import StepRule, Window, render
from ..masks.signal import Signal
from ..methods._attention import SparseAttention
from ..patching import TokenRoute
from ._settings import settings

# What a method calls its step mask.
_RULES = ("schedule", "signal", "rule")


def make_method(name: str, texts: Sequence[str]) -> Any:
    """A method from its name, in any case, and `name=value` texts.

    Raises:
        ValueError: There is no such method or argument, or a value is out of range.
    """
    found = {one.lower(): one for one in methods.PATCHES}.get(name.lower())
    if found is None:
        raise ValueError(f"no method {name!r}; there are {', '.join(sorted(methods.PATCHES, key=str.lower))}")
    cls = getattr(methods, found)
    calls = {one: getattr(state, one) for one in state.__all__ if one[:1].isupper()}
    given, parameters = settings(texts, calls=calls), inspect.signature(cls).parameters
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    for argument in given:
        if argument not in parameters and not open_ended:
            raise ValueError(f"{found} has no argument {argument}; it has {', '.join(parameters)}")
    needed = [
        one.name
        for one in parameters.values()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) and one.name not in given
    ]
    if needed:
        raise ValueError(
            f"{found} needs {', '.join(needed)}: give it with --set if it can be written, or plan in Python"
        )
    try:
        return cls(**given)
    except (TypeError, OSError) as error:
        raise ValueError(f"{found}: {error}") from None


def rules_of(method: Any) -> dict[str, StepRule]:
    """The step masks of a method, by the name of what they are for; empty if it computes always.

    Raises:
        ValueError: The mask depends on what is not known yet.
    """
    rules = getattr(method, "rules", None)
    if rules is not None:
        return dict(rules)
    for name in _RULES:
        rule: Any = getattr(method, name, None)
        if hasattr(rule, "plan"):
            return {"": rule}
    return {}


def describe_plan(
    name: str, texts: Sequence[str], steps: int, timesteps: Sequence[float] | None = None
) -> dict[str, Any]:
    """What a method would do, as data.

    Returns:
        `method`, `steps`, and `rules`: for each its `letters` (C computed, p in part, `.` reused, ? decided at run
        time), the numbers of them, and, where it is decided at run time, how. `warning` if nothing can be reused.
    """
    method = make_method(name, texts)
    found: dict[str, Any] = {"method": _shown(method, texts), "kind": method.kind, "steps": steps, "rules": {}}
    found["within"] = ", with attention over some of its tiles" if isinstance(method, SparseAttention) else ""
    if isinstance(method, TokenRoute):
        found["within"] = " with all tokens; some are dropped in training alone"
    for label, rule in rules_of(method).items():
        actions = rule.plan(steps, timesteps) if timesteps is not None else rule.plan(steps)
        how = at_run_time(rule)
        letters = render(actions)
        if how:
            letters = letters.replace(".", "?")
        found["rules"][label] = {
            "letters": letters,
            "computed": letters.count("C"),
            "in part": letters.count("p"),
            "reused": letters.count("."),
            "undecided": letters.count("?"),
            "decided at run time": how,
        }
        if isinstance(rule, Window) and timesteps is None:
            found["timesteps"] = "taken to fall evenly from 1000"
    if found["rules"] and all(one["computed"] == steps for one in found["rules"].values()):
        found["warning"] = f"{method.name} can never reuse anything in {steps} steps"
    return found


def at_run_time(rule: Any) -> str:
    """How a rule decides during the run; empty if its plan is all there is."""
    if isinstance(rule, Signal):
        of = "the sum of changes since the last computed step" if rule.accumulate else "the change of the feature"
        of += " since the step before" if rule.reference == "previous" and not rule.accumulate else ""
        of += " since the last computed step" if rule.reference == "computed" and not rule.accumulate else ""
        mapped = ", mapped by the polynomial," if rule.polynomial else ""
        most = "" if rule.max_consecutive is None else f", at most {rule.max_consecutive} steps in a row"
        return f"reused while {of}{mapped} is below {rule.threshold}{most}"
    return str(getattr(rule, "at_run_time", ""))


def _shown(method: Any, texts: Sequence[str]) -> str:
    return f"{type(method).__name__}({', '.join(texts)})"


def print_plan(data: dict[str, Any]) -> None:
    """`describe_plan` as text."""
    print(f"{data['method']}, {data['steps']} steps")
    if not data["rules"]:
        print(f"  it has no step mask: every step is computed{data['within']} ({data['kind']})")
    for label, one in data["rules"].items():
        counts = [f"{one[key]} {key}" for key in ("computed", "in part", "reused", "undecided") if one[key]]
        print(f"  {label + ': ' if label else ''}{one['letters']}  {', '.join(counts)}")
        if one["computed"] < data["steps"]:
            at = [i for i, letter in enumerate(one["letters"]) if letter == "C"]
            print(f"    computed at {', '.join(map(str, at))}")
        if one["undecided"]:
            print(f"    ? is {one['decided at run time']}")
    if "timesteps" in data:
        print(f"  timesteps are {data['timesteps']}; --timesteps gives those of a scheduler")
    if data["rules"]:
        print("  C computed, p in part, . reused, ? decided at run time")
