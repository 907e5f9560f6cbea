"""Where a denoising run stands: its step, and which guidance branch is being computed.

The step comes from a scheduler (`maskaccel.state.follow`) or from the user (`patch.generation()`), never from counting
model calls. Two transformers of one pipeline each have a generation of their own that follows the same scheduler.
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

if TYPE_CHECKING:
    from ..masks import Schedule
    from ..patching.transaction import Transaction

STATE = "_maskaccel_generation"


class Memory(Protocol):
    """Something that remembers features."""

    @property
    def nbytes(self) -> int:
        """Bytes held now."""

    def clear(self) -> None:
        """Forget everything."""


class Generation:
    """Position in one denoising run of one model.

    Attributes:
        index: Step of the run, from 0.
        num_steps: Steps of the run, if known.
        active: A run was begun and has not ended. Outside a run nothing is ever reused.
        run: Number of the run, from 1.
        branch_key: Name of the guidance branch being computed; empty where nobody names it.
        memories: Whatever remembers features of this run; cleared when a run begins or ends.
        schedules: Step mask of each method, by its name: a run in which one can never reuse anything is warned about.
        peak_bytes: Most bytes that the memories held at the end of a step.
    """

    def __init__(self) -> None:
        self.index = 0
        self.num_steps: int | None = None
        self.active = False
        self.run = 0
        self.branch_key = ""
        self.memories: list[Memory] = []
        self.schedules: dict[str, Schedule] = {}
        self.peak_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        # A copy stands in no run, whatever the original was doing.
        return {**self.__dict__, "index": 0, "num_steps": None, "active": False, "branch_key": ""}

    def begin(self, num_steps: int | None = None) -> None:
        """Start a run; everything remembered from earlier ones is forgotten.

        Raises:
            ValueError: `num_steps` is below 1.
        """
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps={num_steps} must be 1 or more")
        self.end()
        self.index, self.num_steps, self.active, self.run = 0, num_steps, True, self.run + 1
        for name, schedule in self.schedules.items():
            if num_steps is not None and not schedule.reuses(num_steps):
                warnings.warn(f"{name} can never reuse anything in {num_steps} steps: {schedule}", stacklevel=3)

    def shorten(self, skipped: int) -> None:
        """The run leaves out this many of its first steps (image to image)."""
        if self.active and self.index == 0 and self.num_steps is not None and 0 < skipped < self.num_steps:
            self.num_steps -= skipped

    def end(self) -> None:
        """End the run (also after an exception) and free what was remembered."""
        self._measure()
        self.active = False
        for memory in self.memories:
            memory.clear()

    def step(self) -> None:
        """End a step; the last one ends the run."""
        self._measure()
        self.index += 1
        if self.num_steps is not None and self.index >= self.num_steps:
            self.end()

    @contextlib.contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Name the guidance branch of the model calls inside."""
        before, self.branch_key = self.branch_key, name
        try:
            yield
        finally:
            self.branch_key = before

    def _measure(self) -> None:
        self.peak_bytes = max(self.peak_bytes, sum(memory.nbytes for memory in self.memories))


class Run:
    """A denoising run of a loop of your own: what `patch.generation()` gives.

    Args:
        members: The generations of all models of the target, moved together.
    """

    def __init__(self, members: list[Generation]) -> None:
        self._members = members

    @property
    def index(self) -> int:
        """Step of the run, from 0."""
        return self._members[0].index

    @property
    def num_steps(self) -> int | None:
        """Steps of the run, if known."""
        return self._members[0].num_steps

    def step(self) -> None:
        """End a step; the last one ends the run."""
        for one in self._members:
            one.step()

    @contextlib.contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Name the guidance branch of the model calls inside; needed where a model runs several times a step."""
        with contextlib.ExitStack() as stack:
            for one in self._members:
                stack.enter_context(one.branch(name))
            yield


def track(model: nn.Module, generation: Generation, transaction: Transaction, claimant: str) -> None:
    """Let exceptions in the model end its run, and diffusers' cache contexts name its branch."""
    transaction.set(model, STATE, generation, claimant)
    transaction.wrap_forward(model, _tracked_forward, claimant)
    if hasattr(model, "cache_context"):
        transaction.set(model, "cache_context", types.MethodType(_tracked_cache_context, model), claimant)


def _tracked_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    from ..patching.transaction import original

    try:
        return original(self)(*args, **kwargs)
    except BaseException:
        self.__dict__[STATE].end()
        raise


@contextlib.contextmanager
def _tracked_cache_context(self: nn.Module, name: str, **kwargs: Any) -> Iterator[None]:
    """Diffusers pipelines name their guidance branches with this method of the model."""
    generation: Generation = self.__dict__[STATE]
    with generation.branch(name), type(self).cache_context(self, name, **kwargs):  # type: ignore[attr-defined]
        yield
