"""Models as an encoder and a decoder (Wang et al. 2025, DDT, arXiv 2504.05741): where the encoder ends.

Three forms: the authors' model, whose `forward(x, t, y, s=None)` takes the encoder's output s instead of computing it,
and returns it as its second value; a model whose encoder is a module of its own; any stack of blocks, the first of
which are the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ._stack import stack_of
from ._streams import parameters_of

STATE = "s"  # the parameter of the authors' forward, and the label of what it carries
_BLOCKS = "num_encoder_blocks"  # and the attribute that says how many blocks are the encoder


class Decoupled(nn.Module):
    """A model of two modules of your own: `decoder(encoder(*args), *args)`.

    Args:
        encoder: Takes the model's arguments and gives the self-condition z, a tensor or a tuple of tensors.
        decoder: Takes z and then the model's arguments.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the decoder gives for these arguments and the encoder's output for them."""
        return self.decoder(self.encoder(*args, **kwargs), *args, **kwargs)


@dataclass(frozen=True)
class Encoder:
    """The part of a model that is shared between steps.

    Attributes:
        form: `"state"` is the authors' model, `"module"` one module, `"blocks"` the first blocks of the stack.
        label: `"s"`, the module's name, or the number of blocks: what calibrations call it.
    """

    form: Literal["state", "module", "blocks"]
    label: str | int


def encoder_of(model: nn.Module, wanted: int | str | None = None) -> Encoder:
    """Where the encoder of a model ends.

    Args:
        model: Any of the three forms.
        wanted: Number of blocks, `"all"` for all of them, or name of a module. None finds the encoder of the authors'
            model and of `Decoupled`, and of others takes the paper's part of the blocks, 22 of 28.

    Raises:
        LookupError: There is no such encoder, with the reason.
    """
    if wanted is None and isinstance(model, Decoupled):
        wanted = "encoder"
    if wanted is None and isinstance(getattr(model, _BLOCKS, None), int) and STATE in parameters_of(type(model)):
        return Encoder("state", STATE)
    if isinstance(wanted, str) and wanted != "all":
        try:
            model.get_submodule(wanted)
        except AttributeError:
            children = ", ".join(name for name, _ in model.named_children()) or "none"
            raise LookupError(
                f"{type(model).__name__} has no module named {wanted!r}; its children are {children}"
            ) from None
        return Encoder("module", wanted)
    count = sum(map(len, stack_of(model).segments))
    if wanted == "all":
        return Encoder("blocks", count)
    if wanted is None:
        if count < 2:
            raise LookupError(f"{type(model).__name__} has {count} block; an encoder and a decoder need two")
        return Encoder("blocks", min(max(round(count * 22 / 28), 1), count - 1))
    if not 1 <= int(wanted) <= count:
        raise LookupError(f"encoder={wanted}, but {type(model).__name__} has {count} blocks")
    return Encoder("blocks", int(wanted))


def given_state(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The state that a caller of the authors' model passes."""
    at = parameters_of(type(model)).index(STATE)
    return args[at] if at < len(args) else kwargs.get(STATE)


def with_state(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], state: Tensor) -> tuple[tuple, dict]:
    """The arguments of a call of the authors' model, with a state."""
    at = parameters_of(type(model)).index(STATE)
    if at < len(args):
        return (*args[:at], state, *args[at + 1 :]), kwargs
    return tuple(args), {**kwargs, STATE: state}


def decoder_modulations(model: nn.Module) -> list[nn.Module]:
    """The modules of the authors' model that make modulation of the state alone: of its decoder blocks and its head."""
    blocks = model.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    owners = [*list(blocks)[getattr(model, _BLOCKS) :], getattr(model, "final_layer", None)]
    return [m for m in (getattr(owner, "adaLN_modulation", None) for owner in owners) if isinstance(m, nn.Module)]
