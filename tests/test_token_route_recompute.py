"""Routes with several forwards alive, and under recomputation: each finds the tokens of its own forward."""

from __future__ import annotations

import functools

import pytest
import torch
from _masked_dense import SpanOf
from _routed_dit import DEPTH, built, close
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import maskaccel
from maskaccel.patching.route import TokenRoute


@pytest.fixture
def dit():
    """A DiT in training mode, and the arguments of a call."""
    return built()


def found_in(model, outs, latents) -> list[Tensor]:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [*(o.detach() for o in outs), *(x.grad for x in latents), *grads]


def routed(model, inputs, wrap=lambda m: None, forwards=2, keep=0.5):
    """Losses and gradients of some forwards before one backward."""
    model.zero_grad(set_to_none=True)
    with maskaccel.patch(
        model,
        [TokenRoute(1, -2, keep, seed=3)],
    ):
        undo = wrap(model)
        try:
            latents = [(inputs["hidden_states"] + i).requires_grad_() for i in range(forwards)]
            outs = [model(**{**inputs, "hidden_states": x}).sample for x in latents]
            sum((out * (i + 1)).square().sum() for i, out in enumerate(outs)).backward()
        finally:
            if undo is not None:
                undo()
    return [
        *(o.detach() for o in outs),
        *(x.grad for x in latents),
        *(p.grad for p in model.parameters() if p.grad is not None),
    ]


def test_two_forwards_before_one_backward(dit) -> None:
    model, inputs = dit
    both = routed(model, inputs)
    model.zero_grad(set_to_none=True)
    route = TokenRoute(1, -2, seed=3)
    outs, grads = [], []
    with maskaccel.patch(model, [route]):
        for i in range(2):
            x = (inputs["hidden_states"] + i).requires_grad_()
            out = model(**{**inputs, "hidden_states": x}).sample
            (out * (i + 1)).square().sum().backward()
            outs.append(out.detach())
            grads.append(x.grad)
    close(both, [*outs, *grads, *(p.grad for p in model.parameters() if p.grad is not None)])


def diffusers_checkpointing(model):
    model.enable_gradient_checkpointing()
    return model.disable_gradient_checkpointing


def around_blocks(model, reentrant=False, numbers=range(DEPTH)):
    """What a user may do: each block's call is checkpointed."""
    before = {}
    for number in numbers:
        block = model.transformer_blocks[number]
        before[number] = block.__dict__.get("forward")
        inner = block.forward

        def forward(hidden, inner=inner, **kwargs):
            return checkpoint(functools.partial(inner, **kwargs), hidden, use_reentrant=reentrant)

        block.__dict__["forward"] = forward

    def undo():
        for number, was in before.items():
            block = model.transformer_blocks[number]
            del block.__dict__["forward"]
            if was is not None:
                block.__dict__["forward"] = was

    return undo


@pytest.mark.parametrize(
    "wrap",
    [
        diffusers_checkpointing,
        around_blocks,
        functools.partial(around_blocks, numbers=[0, 2, 3]),
        functools.partial(around_blocks, reentrant=True, numbers=[0, 1, 2, 3, 5]),
    ],
    ids=["diffusers", "blocks", "some blocks", "reentrant"],
)
def test_checkpointing_changes_nothing(dit, wrap) -> None:
    model, inputs = dit
    close(routed(model, inputs, wrap), routed(model, inputs))


def test_a_checkpoint_around_several_blocks_or_all_of_the_model(dit) -> None:
    model, inputs = dit
    want = routed(model, inputs)
    model.zero_grad(set_to_none=True)
    with maskaccel.patch(model, [TokenRoute(1, -2, seed=3)]):
        latents = [(inputs["hidden_states"] + i).requires_grad_() for i in range(2)]
        others = {name: value for name, value in inputs.items() if name != "hidden_states"}
        outs = [checkpoint(lambda x: model(x, **others).sample, x, use_reentrant=False) for x in latents]
        sum((out * (i + 1)).square().sum() for i, out in enumerate(outs)).backward()
    close(found_in(model, outs, latents), want)


def test_a_reentrant_checkpoint_around_the_end_is_refused(dit) -> None:
    model, inputs = dit
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        routed(model, inputs, functools.partial(around_blocks, reentrant=True))


def test_no_activation_is_kept_for_the_way_around(dit) -> None:
    """The stash is freed once the route has been left, unless something else needs it."""
    import gc
    import weakref

    model, inputs = dit
    held = []

    class Watch(SpanOf):
        def reenter(self, call, rows):
            held.append(weakref.ref(call.hidden))
            return super().reenter(call, rows)

    with torch.no_grad(), maskaccel.patch(model, [Watch(1, -2)]):
        gc.disable()
        try:
            model(**inputs)
            assert held[0]() is None
        finally:
            gc.enable()


def test_compiled_blocks(dit) -> None:
    model, inputs = dit
    want = routed(model, inputs, forwards=1)

    def compiled(model):
        for block in model.transformer_blocks:
            block.compile(backend="eager")

    close(routed(model, inputs, compiled, forwards=1), want)
