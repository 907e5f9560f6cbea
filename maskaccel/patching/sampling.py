"""How methods take over the step of a scheduler that samples tokens, and the head before it.

A method plans a `SamplingStep` with `sample_with`: the scheduler of the pipeline then asks it at every step, and does
its own step where it declines. The step that is taken over moves the run like any other (`maskaccel.state.follow`).
"""

from __future__ import annotations

import functools
import inspect
import types
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ..models._adapter import fingerprint
from ..ops._checks import choice
from ..state.follow import advance
from ..state.generation import Generation
from .patch import Context
from .transaction import PatchError

SAMPLER = "_maskaccel_sampler"
NOISES = ("counter", "pipeline")


class SamplingStep:
    """Takes over the steps of one scheduler.

    Attributes:
        scheduler: Name of the scheduler's class that it stands in for.
        fingerprints: Of the versions of that class's `step`.
        generation: Of the model whose logits are sampled.
        noise: `"counter"` or `"pipeline"`: where random numbers come from.
        steps: Steps that were taken over.
        declined: Why steps were left to the scheduler, and how many.
    """

    scheduler = ""
    fingerprints: frozenset[str] = frozenset()

    def __init__(self, generation: Generation, noise: str) -> None:
        self.generation, self.noise = generation, noise
        self.steps = 0
        self.declined: Counter[str] = Counter()
        self.head_rows, self.head_left_out = 0, 0
        self._run, self._seed, self._seeded = -1, 0, False

    def refusal(self, given: dict[str, Any]) -> str | None:
        """Why a step is the scheduler's own, or None."""
        raise NotImplementedError

    def step(self, scheduler: Any, given: dict[str, Any]) -> Any:
        """The step, with the arguments of the scheduler's `step` by name; returns what that returns."""
        raise NotImplementedError

    def begin(self, scheduler: Any) -> None:
        """The first step of a run, whoever does it."""

    def take(self, scheduler: Any, given: dict[str, Any]) -> Any | None:
        """The step, or None where it is left to the scheduler."""
        if self._run != self.generation.run:
            self._run, self._seeded = self.generation.run, False
            self.begin(scheduler)
        why = self.refusal(given)
        if why is not None:
            self.declined[why] += 1
            return None
        # The pipeline's own numbers come from the same generator, so nothing else is drawn from it then.
        if self.noise == "counter" and not self._seeded:
            self._seed, self._seeded = drawn_seed(given.get("generator")), True
        self.steps += 1
        return self.step(scheduler, given)

    def activity(self) -> dict[str, Any]:
        """For the report."""
        told: dict[str, Any] = {"steps": self.steps}
        if self.head_rows or self.head_left_out:
            told |= {"head rows": self.head_rows, "head rows left out": self.head_left_out}
        told |= {f"left to the scheduler ({why})": n for why, n in self.declined.items()}
        if not self.steps:
            told["warning"] = "never sampled anything"
        return told


def sample_with(context: Context, method: str, step: SamplingStep) -> bool:
    """Plan that `step` takes over the pipeline's scheduler; False, and a reason in the report, if it cannot."""
    scheduler = context.scheduler
    if scheduler is None:
        context.skip(method, context.model, "the target has no scheduler: patch the pipeline")
        return False
    if step.scheduler not in (kind.__name__ for kind in type(scheduler).__mro__):
        context.skip(method, scheduler, f"it is no {step.scheduler}")
        return False
    found = fingerprint(type(scheduler), "step")
    if found not in step.fingerprints:
        context.skip(method, scheduler, f"unknown version of {type(scheduler).__name__}.step (fingerprint {found})")
        return False
    if "step" in scheduler.__dict__ and SAMPLER in scheduler.__dict__:
        raise PatchError(f"{method}: another patch already samples for this {type(scheduler).__name__}")
    context.transaction.set(scheduler, SAMPLER, step, method)
    context.transaction.derive(scheduler, "step", _taken_over)
    context.done(method, scheduler, "sampling step")
    return True


def _taken_over(method: types.MethodType) -> types.MethodType:
    """A scheduler's step that asks its sampler first. It is bound, so a copied scheduler asks its own."""
    inner = method.__func__
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        result = self.__dict__[SAMPLER].take(self, bound.arguments)
        if result is None:
            return inner(self, *args, **kwargs)
        advance(self)
        return result

    return types.MethodType(step, method.__self__)


def output_class(scheduler: Any, name: str) -> Any:
    """The class of a scheduler's output, from the module that its class is in."""
    for kind in type(scheduler).__mro__:
        found = getattr(inspect.getmodule(kind), name, None)
        if found is not None:
            return found
    raise PatchError(f"{type(scheduler).__name__} has no {name} beside it")


# ------------------------------------------------------------------------------------------------------------- noise
def check_noise(noise: str) -> None:
    """A known source of random numbers, or ValueError."""
    choice("noise", noise, NOISES)


def drawn_seed(generator: torch.Generator | None) -> int:
    """A seed for the counter-based noise of a run, drawn from the pipeline's generator (torch's own for None)."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(0, 2**62, (), generator=generator, device=device))


def multinomial_noise(shape: tuple[int, ...], dtype: torch.dtype, device: Any, generator: Any) -> Tensor:
    """The Gumbel noise by which `torch.multinomial(p, 1)` chooses: it takes the largest p / q, q exponential."""
    q = torch.empty(shape, dtype=dtype, device=device).exponential_(1, generator=generator)
    return -q.float().log()
