"""`NAME=VALUE` of the command line as Python values."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any


def settings(texts: Sequence[str], option: str = "--set", calls: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`["interval=3", "level=stack", "forecaster=Taylor(2)"]` as a dictionary.

    A value is a Python literal, a call of one of `calls` with literals, or else the text itself.

    Raises:
        ValueError: A text has no `=`, a name is given twice, or a call is refused.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise ValueError(f"{option} {text!r} is not of the form name=value")
        if name in found:
            raise ValueError(f"{option} names {name} twice")
        found[name] = _value(value.strip(), name, calls or {})
    return found


def _value(text: str, name: str, calls: Mapping[str, Any]) -> Any:
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError:
        return text
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id not in calls:
            raise ValueError(f"{name}={text}: {node.func.id} is not known here; known are {', '.join(sorted(calls))}")
        try:
            arguments = [ast.literal_eval(one) for one in node.args]
            named = {str(one.arg): ast.literal_eval(one.value) for one in node.keywords}
            return calls[node.func.id](*arguments, **named)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}={text}: {error}") from None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return text
