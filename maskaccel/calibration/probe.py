"""What looks at a model during an ordinary run and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..models import stack_of, streams_of
from ..models._decoupled import Encoder
from ..patching.patch import Context
from ..patching.transaction import PatchError
from ..state.generation import Generation


class Probe:
    """A method that measures. A subclass plans its hooks in `watch` and says the values in `values`.

    Attributes:
        model: The one model that is measured.
        generation: Its run.
        steps: Steps of the runs that were measured, 0 before the first.
        on_step: Called when the model first runs at a step of a run.
    """

    name = "Calibration"
    kind = "exact"

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.wanted: nn.Module | None = None
        self.generation = Generation()
        self.steps = 0
        self.on_step: Callable[[], Any] | None = None
        self._seen: set[int] = set()
        self._latest = (0, -1)

    def watch(self, context: Context) -> None:
        """Plan the hooks. LookupError if the model has nothing to measure, with the reason."""
        raise NotImplementedError

    def values(self) -> dict[str, Any]:
        """What was measured."""
        raise NotImplementedError

    def attach(self, context: Context) -> None:
        """Plan the hooks on the model that is measured."""
        if self.wanted is not None and context.model is not self.wanted:
            return
        if self.model is not None:
            raise PatchError(
                f"the pipeline has two transformers ({type(self.model).__name__}, {type(context.model).__name__}): say "
                "which one to measure, model=pipeline.transformer"
            )
        self.model, self.generation = context.model, context.track_generation(self.name)
        try:
            self.watch(context)
        except LookupError as error:
            raise PatchError(f"{type(context.model).__name__} cannot be measured: {error}") from None
        context.done(self.name, context.model, "measured")

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """Steps that were measured."""
        return {"steps measured": len(self._seen)}

    def arrived(self) -> bool:
        """Note that the model runs at a step; whether that is to be measured.

        Raises:
            ValueError: The run starts in the middle of a schedule, has another number of steps than the one before, or
                one that is not known.
        """
        at = self.generation
        if not at.active:
            return False
        if at.offset:
            raise ValueError("the run leaves out the first steps of its schedule; a calibration needs all of them")
        if at.num_steps is None:
            raise ValueError("the number of steps is not known; pass it to generation(num_steps=...)")
        if self.steps not in (0, at.num_steps):
            raise ValueError(f"this run has {at.num_steps} steps, the one before had {self.steps}; measure equal ones")
        self.steps = at.num_steps
        self._seen.add(at.index)
        if self.on_step is not None and self._latest != (at.run, at.index):
            self._latest = at.run, at.index
            self.on_step()
        return True

    def finish(self) -> dict[str, Any]:
        """The values, if whole runs were measured; ValueError otherwise."""
        if not self._seen:
            raise ValueError("nothing was measured: no run of the model was seen between enter and exit")
        missing = sorted(set(range(self.steps)) - self._seen)
        if missing:
            raise ValueError(
                f"the model did not run at {len(missing)} of {self.steps} steps (the first is step {missing[0]}), so "
                "its calibration would not hold for a run"
            )
        return self.values()


class FeatureProbe(Probe):
    """Looks at one feature, whole: the change of a run of blocks, the output of a module, or the state of DDT's model.

    A subclass gets it in `feature`.
    """

    def feature(self, parts: list[Tensor]) -> None:
        """The feature of this step and branch, `(B, tokens, D)` each."""
        raise NotImplementedError

    def watch_encoder(self, context: Context, encoder: Encoder) -> None:
        """Plan the hooks of one of the three forms of an encoder."""
        model = context.model
        if encoder.form == "blocks":
            self._watch_blocks(context, int(encoder.label))
            return
        module = model if encoder.form == "state" else model.get_submodule(str(encoder.label))

        def look(_: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            if self.arrived():
                value = output[1] if encoder.form == "state" else output
                parts = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]
                self.feature([as_tokens(part.detach()) for part in parts])
            return output

        context.transaction.wrap_forward(module, look)

    def _watch_blocks(self, context: Context, count: int) -> None:
        segments: list[list[nn.Module]] = []
        for segment in stack_of(context.model).segments:
            taken = list(segment[: max(count - sum(map(len, segments)), 0)])
            segments += [taken] if taken else []
        parts: list[Tensor] = []
        before: list[Tensor] = []

        def enter(block: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            if self.generation.active:
                start = streams_of(block).take(args, kwargs)[0]
                assert start is not None
                # A model may write to it before the last block is through.
                before[:] = [start.detach().clone()]
            return inner(*args, **kwargs)

        def leaver(number: int) -> Callable[..., Any]:
            def leave(block: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
                output = inner(*args, **kwargs)
                after = streams_of(block).read(output)[0]
                if before and after is not None and self.generation.active:
                    if number == 0:
                        parts.clear()
                    parts.append(as_tokens(after.detach() - before.pop()))
                    if number == len(segments) - 1 and self.arrived():
                        self.feature(parts)
                return output

            return leave

        for number, blocks in enumerate(segments):
            context.transaction.wrap_forward(blocks[0], enter)
            context.transaction.wrap_forward(blocks[-1], leaver(number))


def as_tokens(x: Tensor) -> Tensor:
    """`(B, tokens, D)` of a feature that may have more or fewer dims."""
    if x.dim() < 3:
        return x.reshape(x.shape[0], 1, -1)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def check_tokens(tokens: int | None) -> None:
    """ValueError unless it is a number of tokens, or None."""
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
        raise ValueError(f"tokens={tokens!r} must be an integer, 1 or more, or None")


def thinned(part: Tensor, tokens: int | None) -> Tensor:
    """So many tokens of `(B, tokens, D)`, evenly spread; None takes all."""
    count = part.shape[1]
    if tokens is None or count <= tokens:
        return part
    return part[:, torch.arange(tokens, device=part.device) * count // tokens]


def blocks_of(model: nn.Module) -> int:
    """Blocks of a model's stack, or of its longest list of modules."""
    try:
        return sum(map(len, stack_of(model).segments))
    except LookupError:
        return max((len(m) for m in model.modules() if isinstance(m, nn.ModuleList)), default=1) or 1


def mean(values: list[float]) -> float:
    """The mean of numbers, in double precision."""
    return float(torch.tensor(values, dtype=torch.float64).mean())
