"""Lets a pipeline move the generations of its models: its scheduler begins runs and ends steps, its progress bar ends
runs.

The hooks are instance attributes and find the generations on the object they are bound to, so that a copy of a
scheduler (some pipelines copy theirs for a second modality) moves generations of its own, and a copied pipeline works
like the original.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .generation import Generation
from .solver import Point

if TYPE_CHECKING:
    from ..patching.transaction import Transaction

FOLLOWERS = "_maskaccel_followers"
_RUNS = "_maskaccel_runs"


def follow_pipeline(pipeline: Any, generations: list[Generation], transaction: Transaction) -> None:
    """Plan the hooks. Without a scheduler, `patch.generation()` says where the run stands."""
    scheduler = getattr(pipeline, "scheduler", None)
    if not callable(getattr(scheduler, "set_timesteps", None)) or not callable(getattr(scheduler, "step", None)):
        return
    # Pipelines may share a scheduler: then it moves the models of both.
    followers = [*scheduler.__dict__.get(FOLLOWERS, ()), *generations]
    transaction.set(scheduler, FOLLOWERS, followers, "generation")
    kind: Any = type(scheduler)
    for name in ("set_timesteps", "step", "set_begin_index"):
        if hasattr(scheduler, name):
            transaction.set(scheduler, name, types.MethodType(_hook(kind, name), scheduler), "generation")
    if hasattr(pipeline, "progress_bar"):
        transaction.set(pipeline, FOLLOWERS, generations, "generation")
        transaction.set(pipeline, "progress_bar", types.MethodType(_progress_bar, pipeline), "generation")


def is_followed(scheduler: Any) -> bool:
    """Whether a patch hears of this scheduler's steps."""
    return FOLLOWERS in getattr(scheduler, "__dict__", {})


def _begin(scheduler: Any) -> None:
    timesteps = getattr(scheduler, "timesteps", None)
    for generation in scheduler.__dict__[FOLLOWERS]:
        generation.begin(timesteps=None if timesteps is None or len(timesteps) == 0 else timesteps)


def _step(scheduler: Any) -> None:
    for generation in scheduler.__dict__[FOLLOWERS]:
        generation.step()


def advance(scheduler: Any) -> None:
    """Another step than the scheduler's own was done in its place: the runs that it moves go on."""
    if is_followed(scheduler):
        _step(scheduler)


def _watched(scheduler: Any, call: inspect.BoundArguments) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call of the scheduler's step, with the output that the watchers make of it."""
    given = call.arguments
    for watcher in (watcher for one in scheduler.__dict__[FOLLOWERS] if one.active for watcher in one.watchers):
        watcher.check(scheduler, given | given.get("kwargs", {}))
        point = Point.of(scheduler, given["timestep"])
        given["model_output"] = watcher.seen(given["model_output"], given["sample"], point)
    return call.args[1:], call.kwargs


def _skip(scheduler: Any) -> None:
    for generation in scheduler.__dict__[FOLLOWERS]:
        generation.shorten(getattr(scheduler, "begin_index", None) or 0)


@functools.cache
def _hook(cls: type, name: str) -> Callable[..., Any]:
    """The scheduler's own method, and what it means for the run after it."""
    method = getattr(cls, name)
    move = {"set_timesteps": _begin, "step": _step, "set_begin_index": _skip}[name]

    signature = inspect.signature(method)

    @functools.wraps(method)  # pipelines read the signature to see which arguments it takes
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name == "step" and any(one.watchers for one in self.__dict__[FOLLOWERS]):
            args, kwargs = _watched(self, signature.bind(self, *args, **kwargs))
        result = method(self, *args, **kwargs)
        move(self)
        return result

    return hooked


def _progress_bar(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The pipeline's bar around its denoising loop: closed at the end, early or not, it ends the run."""
    if not is_followed(self.scheduler):
        warnings.warn(
            "the pipeline's scheduler was replaced after the patch, so nothing is reused: remove() and patch again",
            stacklevel=2,
        )
    bar = type(self).progress_bar(self, *args, **kwargs)
    if hasattr(bar, "__dict__") and hasattr(bar, "close"):
        bar.__class__ = _ending(type(bar))  # type: ignore[arg-type]
        bar.__dict__[_RUNS] = [(generation, generation.run) for generation in self.__dict__[FOLLOWERS]]
    return bar


@functools.cache
def _ending(cls: type) -> type:
    """The class of a progress bar, with a `close` that also ends the runs that the bar was opened in."""

    def close(self: Any) -> None:
        for generation, run in self.__dict__.pop(_RUNS, ()):
            # A bar that closes before the first step is another one; one closed late (by __del__) ends no later run.
            if generation.run == run and generation.index > 0:
                generation.end()
        cls.close(self)  # type: ignore[attr-defined]

    return type(cls.__name__, (cls,), {"close": close, "__module__": cls.__module__, "__doc__": cls.__doc__})
