"""Where a denoising run stands: its step, and which guidance branch is being computed.

The step comes from a scheduler (`maskaccel.state.follow`) or from the user (`patch.generation()`), never from counting
model calls. Two transformers of one pipeline each have a generation of their own that follows the same scheduler.
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from ..masks.schedule import At, StepRule, Window, reuses
from .solver import Point

if TYPE_CHECKING:
    from ..patching.transaction import Transaction

STATE = "_maskaccel_generation"

_LATE = 1 << 20  # a step after all that are special at the start of a run


class Memory(Protocol):
    """Something that remembers features."""

    @property
    def nbytes(self) -> int:
        """Bytes held now."""

    def clear(self) -> None:
        """Forget everything."""


class Watcher(Protocol):
    """Something that sees what a solver is about to be given."""

    def seen(self, output: Tensor, sample: Tensor, point: Point) -> Tensor:
        """What the solver is to be given in place of `output`.

        Args:
            output: The guided output of the model at this step.
            sample: The latents of this step.
            point: Their noise level.
        """

    def check(self, scheduler: Any, given: Mapping[str, Any]) -> None:
        """ValueError if a scheduler's step with these arguments cannot go with what the method does."""


class Generation:
    """Position in one denoising run of one model.

    Attributes:
        index: Step of the run, from 0.
        num_steps: Steps of the run, if known.
        offset: Steps that an image-to-image run left out at its start.
        active: A run was begun and has not ended. Outside a run nothing is ever reused.
        run: Number of the run, from 1.
        branch_key: Name of the guidance branch being computed; empty where nobody names it.
        memories: Whatever remembers features of this run; cleared when a run begins or ends.
        rules: Step masks by the name of their method: a run in which one can never reuse anything is warned about.
        notes: What a person should know of the runs so far, for the report.
        peak_bytes: Most bytes that the memories held at the end of a step.
        watchers: Told of every output before the solver is given it.
    """

    def __init__(self) -> None:
        self.index = 0
        self.num_steps: int | None = None
        self.offset = 0
        self.active = False
        self.run = 0
        self.branch_key = ""
        self.memories: list[Memory] = []
        self.rules: dict[str, list[StepRule]] = {}
        self.notes: list[str] = []
        self.peak_bytes = 0
        self.watchers: list[Watcher] = []
        self._timesteps: Any = None
        self._adapter_scale: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy stands in no run, whatever the original was doing.
        fresh = {"index": 0, "num_steps": None, "offset": 0, "active": False, "branch_key": "", "_timesteps": None}
        return {**self.__dict__, **fresh}

    @property
    def timestep(self) -> float:
        """The scheduler's timestep of this step, 1000 (noise) to 0.

        Raises:
            ValueError: Nobody told the timesteps.
        """
        times = self.timesteps
        if times is None or self.index >= len(times):
            raise ValueError("a rule needs the timesteps of the run; pass them to generation(timesteps=...)")
        return times[self.index]

    @property
    def timesteps(self) -> tuple[float, ...] | None:
        """The scheduler's timesteps; read from its device once a run, and only if a rule asks."""
        if self._timesteps is not None and not isinstance(self._timesteps, tuple):
            values = self._timesteps.tolist() if hasattr(self._timesteps, "tolist") else self._timesteps
            self._timesteps = tuple(float(t) for t in values)
        return None if self._timesteps is None else self._timesteps[self.offset :]

    def begin(self, num_steps: int | None = None, timesteps: Any = None) -> None:
        """Start a run; everything remembered from earlier ones is forgotten.

        Args:
            num_steps: Steps of the run, if known.
            timesteps: Timesteps of the run, a tensor or sequence, if known; they tell `num_steps`.

        Raises:
            ValueError: `num_steps` is below 1, or another number than that of the timesteps; or a method needs what is
                not told. No run begins then.
        """
        whole = hasattr(num_steps, "__index__") and not isinstance(num_steps, bool)
        if num_steps is not None and not (whole and num_steps >= 1):
            raise ValueError(f"num_steps={num_steps!r} must be an integer, 1 or more, or None")
        if timesteps is not None:
            if num_steps is not None and num_steps != len(timesteps):
                raise ValueError(f"num_steps={num_steps}, but timesteps has {len(timesteps)} entries")
            num_steps = len(timesteps) or None
        self.end()
        self.index, self.num_steps, self.offset, self.active, self.run = 0, num_steps, 0, True, self.run + 1
        self._timesteps, self._adapter_scale = timesteps, None
        try:
            for name, rules in self.rules.items():
                self._check(name, rules)
        except BaseException:  # a warning may be an error too
            self.active = False
            raise

    def _check(self, name: str, rules: list[StepRule]) -> None:
        """ValueError if a method needs what is not told; a warning if it can never reuse anything."""
        if not rules:
            return
        # Timesteps are read only where a rule needs them: that may wait for the device.
        timed = any(isinstance(rule, Window) for rule in rules)
        if timed and self.timesteps is None:
            raise ValueError(f"{name} needs the timesteps of the run; pass them to generation(timesteps=...)")
        if self.num_steps is None:
            for rule in rules:
                try:
                    rule.action(At(_LATE))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
            return
        times = self.timesteps if timed else None
        if not any(reuses(rule, self.num_steps, times) for rule in rules):
            shown = ", ".join(sorted({str(rule) for rule in rules}))
            warnings.warn(f"{name} can never reuse anything in {self.num_steps} steps: {shown}", stacklevel=4)

    def shorten(self, skipped: int) -> None:
        """The run leaves out this many of its first steps (image to image)."""
        if self.active and self.index == 0 and self.num_steps is not None and 0 < skipped < self.num_steps:
            self.num_steps -= skipped
            self.offset += skipped

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

    def enter(self, kwargs: dict[str, Any]) -> None:
        """A call of the model begins: a LoRA scale that changed within the run makes what is remembered stale."""
        scale = next((v["scale"] for k, v in kwargs.items() if k.endswith("_kwargs") and v and "scale" in v), None)
        if self.active and self.index > 0 and scale != self._adapter_scale:
            self.note(f"the LoRA scale changed to {scale} at step {self.index}: memory dropped")
            for memory in self.memories:
                memory.clear()
        self._adapter_scale = scale

    def note(self, text: str) -> None:
        """Say something in the report, once."""
        if text not in self.notes:
            self.notes.append(text)

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

    def output(self, output: Tensor, sample: Tensor, sigma: float | Tensor) -> Tensor:
        """Tell the methods what the solver is about to be given; some choose tokens by it.

        Args:
            output: The model's guided output `eps - clean` (flow matching).
            sample: The latents `(1 - sigma) * clean + sigma * eps` of this step.
            sigma: Their noise level, above 0 to 1; a tensor of one element is read on the host.

        Returns:
            What the solver is to be given in its place.

        Raises:
            ValueError: `sigma` is out of range, or output and latents are of different shapes.
        """
        number = sigma.item() if isinstance(sigma, Tensor) and sigma.numel() == 1 else sigma
        if not isinstance(number, int | float) or not 0 < number <= 1:
            raise ValueError(f"sigma={sigma!r} must be a number above 0, at most 1")
        if output.shape != sample.shape:
            raise ValueError(f"output has shape {tuple(output.shape)}; it must be that of the latents, "
                             f"{tuple(sample.shape)}: what the solver's step is given")  # fmt: skip
        for one in self._members:
            for watcher in one.watchers:
                output = watcher.seen(output, sample, Point(1 - number, number))
        return output

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
    transaction.wrap_forward(model, _tracked_forward)
    if hasattr(model, "cache_context"):
        transaction.set(model, "cache_context", types.MethodType(_tracked_cache_context, model), claimant)


def _tracked_forward(self: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    generation: Generation = self.__dict__[STATE]
    generation.enter(kwargs)
    try:
        return inner(*args, **kwargs)
    except BaseException:
        generation.end()
        raise


@contextlib.contextmanager
def _tracked_cache_context(self: nn.Module, name: str, **kwargs: Any) -> Iterator[None]:
    """Diffusers pipelines name their guidance branches with this method of the model."""
    generation: Generation = self.__dict__[STATE]
    with generation.branch(name), type(self).cache_context(self, name, **kwargs):  # type: ignore[attr-defined]
        yield
