"""Where a denoising run stands: its step, and which guidance branch is being computed.

The step comes from the scheduler (`set_timesteps` begins a run, `step` ends a step), never from counting model calls. Two
transformers of one pipeline each have a generation of their own that follows the same scheduler.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

if TYPE_CHECKING:
    from ..patching.transaction import Transaction

STATE = "_maskaccel_generation"


class Memory(Protocol):
    """Something that remembers features."""

    def clear(self) -> None: ...


class Generation:
    """Position in one denoising run of one model.

    Attributes:
        index: Step of the run, from 0.
        num_steps: Steps of the run, if known.
        active: A run was begun and has not ended. Outside a run nothing is ever reused.
        memories: Whatever remembers features of this run; cleared when a run begins or ends.
    """

    def __init__(self) -> None:
        self.index = 0
        self.num_steps: int | None = None
        self.active = False
        self.memories: list[Memory] = []
        self._named: str | None = None
        self._calls = 0

    def begin(self, num_steps: int | None = None) -> None:
        """Start a run; everything remembered from earlier ones is forgotten.

        Raises:
            ValueError: `num_steps` is below 1.
        """
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps={num_steps} must be 1 or more")
        self.end()
        self.index, self.num_steps, self.active, self._calls = 0, num_steps, True, 0

    def end(self) -> None:
        """End the run (also after an exception) and free what was remembered."""
        self.active = False
        for memory in self.memories:
            memory.clear()

    def step(self) -> None:
        """End a step; the last one ends the run."""
        self.index += 1
        self._calls = 0
        if self.num_steps is not None and self.index >= self.num_steps:
            self.end()

    @contextlib.contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Name the guidance branch of the model calls inside."""
        before, self._named = self._named, name
        try:
            yield
        finally:
            self._named = before

    @property
    def branch_key(self) -> str:
        """The branch by name, or the call's number within its step where nobody names it."""
        return self._named if self._named is not None else f"call {self._calls}"

    def call_done(self, failed: bool) -> None:
        """A call of the model is over; after an exception the run is over too."""
        self._calls += 1
        if failed:
            self.end()


def track(model: nn.Module, generation: Generation, transaction: Transaction, claimant: str) -> None:
    """Let the model's calls, and its cache contexts, move its generation."""
    transaction.set(model, STATE, generation, claimant)
    transaction.wrap_forward(model, _tracked_forward, claimant)
    if hasattr(model, "cache_context"):
        transaction.set(model, "cache_context", types.MethodType(_tracked_cache_context, model), claimant)


def _tracked_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    from ..patching.transaction import original

    generation: Generation = self.__dict__[STATE]
    failed = True
    try:
        result = original(self)(*args, **kwargs)
        failed = False
        return result
    finally:
        generation.call_done(failed)


@contextlib.contextmanager
def _tracked_cache_context(self: nn.Module, name: str, **kwargs: Any) -> Iterator[None]:
    """diffusers pipelines name their guidance branches with this method of the model."""
    generation: Generation = self.__dict__[STATE]
    with generation.branch(name), type(self).cache_context(self, name, **kwargs):  # type: ignore[attr-defined]
        yield


def follow_scheduler(pipeline: Any, generations: list[Generation], transaction: Transaction) -> None:
    """Let the pipeline's scheduler begin runs and end steps."""
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None or not hasattr(scheduler, "set_timesteps") or not hasattr(scheduler, "step"):
        return  # without one, `patch.generation()` says where the run stands

    @functools.wraps(type(scheduler).set_timesteps)  # pipelines read the signature to see which arguments it takes
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = type(self).set_timesteps(self, *args, **kwargs)
        timesteps = getattr(self, "timesteps", None)
        for generation in generations:
            generation.begin(None if timesteps is None or len(timesteps) == 0 else len(timesteps))
        return result

    @functools.wraps(type(scheduler).step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = type(self).step(self, *args, **kwargs)
        for generation in generations:
            generation.step()
        return result

    for name, function in (("set_timesteps", set_timesteps), ("step", step)):
        transaction.set(scheduler, name, types.MethodType(function, scheduler), "generation")
