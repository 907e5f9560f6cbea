"""DDT: decoupled diffusion transformer (Wang et al. 2025, arXiv 2504.05741): the encoder's output is shared.

The model is an encoder `z_t = E(x_t, t, y)` and a decoder `v_t = D(x_t, t, z_t)`. Of N steps only K run the encoder;
the others decode the z of the last of them. Which steps those are is chosen evenly, or by dynamic programming over the
distances of a calibration run.

The authors' decoder reads x_t through an embedding of its own. A stack of blocks that was not trained so has one
embedding: there the first blocks are the encoder, what they *add* is shared, and the other blocks decode the embedding
of the current x_t plus it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..calibration.file import Calibration, calibration_of
from ..masks import Schedule, StepRule
from ..masks.dynamic import Dynamic, Uniform
from ..masks.schedule import Action, Position
from ..models._decoupled import Encoder, decoder_modulations, encoder_of, given_state, with_state
from ..patching.patch import Context
from ..patching.transaction import PatchError
from ..state.history import Storage
from ..state.site import SITE, Site, remember
from . import _cached


@dataclass(frozen=True)
class DDT(_cached.CachedFeatures):
    """Share the encoder's output between steps.

    Attributes:
        schedule: `"uniform"`, a `Calibration` of kind `"distances"` or the path of one for the statistical one, or
            a mask: a tuple with 1 (compute) or 0 for each step.
        refresh: Steps for each computation of the encoder: `floor(N / refresh)` of N steps compute it; 1 is exact. A
            mask does not need it.
        encoder: Number of leading blocks, or the name of a module. None is the encoder of the authors' model and of
            `maskaccel.models.Decoupled`, and of other models the paper's part of the blocks, 22 of 28.
        modulation: Authors' model: also remember the decoder's modulation, which depends on z alone, so it is exact. It
            takes 6 times the memory of z for each block of the decoder.
        storage: How z is kept.
    """

    schedule: str | Path | Calibration | tuple[int | bool, ...] = "uniform"
    refresh: float = 2
    encoder: int | str | None = None
    modulation: bool = False
    storage: Storage = Storage()

    name = "DDT"
    paper = "DDT: Decoupled Diffusion Transformer (arXiv 2504.05741)"
    models = f"the authors' model, two modules of your own, or {_cached.STACKS}"

    def __post_init__(self) -> None:
        Uniform(self.refresh)  # validates the field
        if isinstance(self.encoder, bool) or not (
            self.encoder is None
            or isinstance(self.encoder, str)
            or (isinstance(self.encoder, int) and self.encoder > 0)
        ):
            raise ValueError(f"encoder={self.encoder!r} must be a number of blocks, 1 or more, or the name of a module")
        if self.encoder == "all":
            raise ValueError("encoder='all' leaves no decoder")
        self.rule  # noqa: B018

    @property
    def rule(self) -> StepRule:
        """The step mask."""
        return self.rule_for(None)

    def rule_for(self, model: nn.Module | None) -> StepRule:
        """The step mask for a model, whose calibration it has to be.

        Raises:
            ValueError: `schedule` is no schedule, or one of another model or encoder.
        """
        given = self.schedule
        if given == "uniform":
            return Uniform(self.refresh)
        if isinstance(given, tuple):
            if any(c not in (0, 1) for c in given):
                raise ValueError(f"schedule={given!r} must be a tuple of 0 and 1, one a step")
            return Schedule.from_mask(given)
        found = calibration_of(given, "distances", model, field="schedule", names=("uniform",))
        if model is not None:
            label = encoder_of(model, self.encoder).label
            if found["encoder"] != label:
                raise ValueError(f"the calibration is of encoder={found['encoder']!r}, the method shares {label!r}")
        return Dynamic(found["distances"], self.refresh)

    def attach(self, context: Context) -> None:
        """Plan a memory of what the encoder gives."""
        try:
            encoder, rule = encoder_of(context.model, self.encoder), self.rule_for(context.model)
        except (LookupError, ValueError) as error:
            raise PatchError(f"{self.name}: {error}") from None
        if self.modulation and encoder.form != "state":
            raise PatchError(
                f"{self.name}: modulation=True is for the authors' model, whose decoder is modulated by z alone; "
                f"{type(context.model).__name__} is another"
            )
        if encoder.form == "state":
            self._attach_state(context, rule)
        elif encoder.form == "module":
            module = context.model.get_submodule(str(encoder.label))
            _cached.remember_modules(self, context, [module], rule, storage=self.storage, action="shared")
        else:
            self._attach_blocks(context, rule, encoder)

    def _attach_blocks(self, context: Context, rule: StepRule, encoder: Encoder) -> None:
        count = sum(map(len, _cached.segments_of(self, context.model)))
        tail = count - int(encoder.label)
        if tail == 0:
            raise PatchError(f"{self.name}: encoder={encoder.label} leaves no block of {count} to decode")
        _cached.attach_stack(self, context, rule, storage=self.storage, tail=tail)

    def _attach_state(self, context: Context, rule: StepRule) -> None:
        model, generation = context.model, _cached.watch(self, context, rule)
        site = StateSite(generation, rule, storage=self.storage)
        context.transaction.set(model, SITE, site, self.name)
        context.transaction.wrap_forward(model, _shared_forward)
        context.done(self.name, model, "shares the state of its encoder")
        for module in decoder_modulations(model) if self.modulation else ():
            remember(module, Site(generation, AsState(site), storage=self.storage), context.transaction, self.name)
            context.done(self.name, module, "remembered with the state")


class StateSite(Site):
    """The state of the authors' model.

    Attributes:
        shares: Whether the call at hand decodes a remembered state.
    """

    shares = False

    def run(self, model: nn.Module, inner: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """A call of the model."""
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        # A caller who passes a state shares it by himself.
        if x is None or given_state(model, args, kwargs) is not None:
            return inner(*args, **kwargs)
        state = self.recall(x, own=True)  # the model returns it
        if state is None:
            output = inner(*args, **kwargs)
            self.store(x, output[1])
            return output
        args, kwargs = with_state(model, args, kwargs, state)
        self.shares = True
        try:
            return inner(*args, **kwargs)
        finally:
            self.shares = False


class AsState:
    """The rule of what depends on the state alone: reused in the calls that reuse it."""

    def __init__(self, site: StateSite) -> None:
        self.site = site

    def action(self, at: Position) -> Action:
        """What happens at a step."""
        return "reuse" if self.site.shares else "compute"

    def plan(self, num_steps: int, timesteps: Sequence[float] | None = None) -> list[Action]:
        """What happens to the state."""
        return self.site.rule.plan(num_steps, timesteps)


def _shared_forward(self: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return self.__dict__[SITE].run(self, inner, args, kwargs)
