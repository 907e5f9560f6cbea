"""What calls of attention need that depends on the places of their tokens alone: made once, and outside of graphs."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .attention import AttentionCall


@dataclass(frozen=True)
class Places:
    """Where the tokens of a call are.

    Attributes:
        grid: As `AttentionCall.grid`.
        text: As `AttentionCall.text`.
        queries: Number of queries.
        keys: Number of keys.
        heads: Number of heads of the queries.
        device: Of the tensors.
    """

    grid: tuple[int, ...] | None
    text: tuple[int, int] | None
    queries: int
    keys: int
    heads: int
    device: torch.device

    @property
    def maker(self) -> torch.device:
        """Where rules are looked at element by element: on a GPU; else on the CPU, which takes seconds for a video."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")


_NUMBERS = itertools.count()


class Once:
    """`make(places)` for the calls of all sites that share it, made once for each `Places`, outside of graphs.

    Args:
        make: Given `Places`; what it returns must not be changed.
    """

    def __init__(self, make: Callable[[Places], Any]) -> None:
        self.make, self._name = make, str(next(_NUMBERS))
        self._places: dict[Places, str] = {}
        self._held = types.SimpleNamespace()

    def __deepcopy__(self, memo: dict[int, Any]) -> Once:
        copied = memo[id(self)] = Once(self.make)
        return copied

    def __call__(self, call: AttentionCall) -> Any:
        """What was made for the places of a call."""
        p = call.places
        return getattr(self._held, self._attribute(self._name, p.grid, p.text, p.queries, p.keys, p.heads, p.device))

    def _attribute(self, name: str, *places: Any) -> str:
        """The attribute that holds what is made for these places; the name is for guards, this object's only."""
        key = Places(*places)
        found = self._places.get(key)
        if found is None:
            found = self._places[key] = f"made_{len(self._places)}"
            setattr(self._held, found, self.make(key))
        return found

    # The compiler calls it while it traces, and takes the string for a constant. torch.compiler's decorator sets this
    # too, but imports the compiler.
    _attribute._dynamo_marked_constant = True  # type: ignore[attr-defined]
