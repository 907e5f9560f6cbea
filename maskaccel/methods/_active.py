"""What methods share that compute some tokens at a step, over cached keys and values of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import StepRule
from ..ops._checks import count as check_count
from ..patching.partial import activity, attach_active
from ..patching.patch import Context
from ..patching.selector import Selector
from ..state.kv import KVStorage

MODELS = "models whose blocks run on some of the tokens: text stays, attention through torch or diffusers' dispatch"

Given = Tensor | Callable[[], Tensor]


class PartialSteps:
    """Base of the methods with steps in part: all are lossy, and report alike.

    The base is no dataclass; a method is a frozen dataclass of its own that gives `rule` and `selector`.
    """

    kind = "lossy"
    name = ""
    models = MODELS
    grid: tuple[int, ...] | None = None
    storage: KVStorage = KVStorage()
    kernel = False

    @property
    def rule(self) -> StepRule:
        """The step mask."""
        raise NotImplementedError

    def selector(self) -> Selector:
        """How tokens are chosen on one model."""
        raise NotImplementedError

    def attach(self, context: Context) -> None:
        """Plan the span of all blocks, the cache of every attention, and the watch on the solver.

        Raises:
            PatchError: The model's blocks cannot run on some of the tokens, or the pipeline's solver mixes the outputs
                of several steps.
        """
        run = attach_active(context, self.name, self.rule, self.selector(), self.storage, self.grid)
        run.kernel = self.kernel

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """Calls in full and in part, tokens of the latter, bytes."""
        return activity(model)


def rounded(count: int, multiple: int, tokens: int) -> int:
    """A number of tokens, rounded up: matrix products of a few rows more cost the same."""
    return min(max(-(-count // multiple), 1) * multiple, tokens)


def check_common(method: Any) -> None:
    """ValueError or TypeError for the settings that the methods share."""
    check_count("multiple", method.multiple, 1)
    if not isinstance(method.storage, KVStorage):
        raise TypeError(f"storage={method.storage!r} must be a maskaccel.state.KVStorage")
    if not isinstance(method.kernel, bool):
        raise ValueError(f"kernel={method.kernel!r} must be True or False")
    grid = method.grid
    if grid is not None and (
        not isinstance(grid, tuple) or len(grid) not in (2, 3) or any(type(n) is not int or n < 1 for n in grid)
    ):
        raise ValueError(f"grid={grid!r} must be (height, width) or (frames, height, width), or None")


def check_steps(method: Any) -> None:
    """ValueError unless `first` and `dense` are steps."""
    check_count("first", method.first, 1)
    dense = method.dense
    if not isinstance(dense, tuple) or any(type(step) is not int or step < 0 for step in dense):
        raise ValueError(f"dense={dense!r} must be a tuple of step numbers, 0 or more")


def check_number(method: Any, name: str, low: float, high: float = math.inf) -> None:
    """ValueError unless a setting is a number in a range."""
    value = getattr(method, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        allowed = f"from {low:g} to {high:g}" if high < math.inf else f"{low:g} or more"
        raise ValueError(f"{name}={value!r} must be a number {allowed}")


def value_of(name: str, given: Given) -> Tensor:
    """A tensor that the user gave, or the one that the function gives which the user gave."""
    value = given() if callable(given) and not isinstance(given, Tensor) else given
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or a function that gives one, got {type(value).__name__}")
    return value


def grown(mask: Tensor, grid: tuple[int, ...], radius: int) -> Tensor:
    """A mask of tokens, bool `(B, N)`, with the neighbours within `radius` rows and columns of a frame."""
    if radius == 0:
        return mask
    planes = mask.view(-1, 1, *grid[-2:]).float()
    return torch.nn.functional.max_pool2d(planes, 2 * radius + 1, 1, radius).view_as(mask) > 0.5
