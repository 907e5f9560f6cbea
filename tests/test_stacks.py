"""Streams and stacks of real models, against their forwards."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from zoo import dit_original, flux, ltx, lumina2, qwen, sd3, wan, zimage
from zoo.common import run, tensors_of

import maskaccel
from maskaccel.methods import FusedAdaLN
from maskaccel.models import stack_of, streams_of

# Expected stacks: builder, then for each segment its lists with the number of blocks.
STACKS = {
    flux.flux: [{"transformer_blocks": 2, "single_transformer_blocks": 2}],
    flux.chroma: [{"transformer_blocks": 2}, {"single_transformer_blocks": 2}],
    flux.bria: [{"transformer_blocks": 2, "single_transformer_blocks": 2}],
    flux.bria_fibo: [{"transformer_blocks": 2}, {"single_transformer_blocks": 2}],
    flux.longcat_image: [{"transformer_blocks": 2, "single_transformer_blocks": 2}],
    flux.ovis_image: [{"transformer_blocks": 2, "single_transformer_blocks": 2}],
    ltx.ltx: [{"transformer_blocks": 2}],
    lumina2.lumina2: [{"layers": 2}],
    qwen.qwen: [{"transformer_blocks": 2}],
    sd3.sd3: [{"transformer_blocks": 3}],
    sd3.sd35: [{"transformer_blocks": 3}],
    wan.wan: [{"blocks": 2}],
    wan.vace: [{"blocks": 2}],
    wan.animate: [{"blocks": 2}],
    wan.helios: [{"blocks": 2}],
    zimage.zimage: [{"layers": 2}],
}


@contextmanager
def replaced(forwards):
    """Modules with another forward for a while; `forwards` gives it for each."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def recorded(model, blocks, kwargs):
    """One run: the model's outputs, and each block with its arguments and its output, in the order of the calls."""
    calls = []

    def note(block):
        def forward(*args, **keywords):
            output = type(block).forward(block, *args, **keywords)
            calls.append((block, streams_of(block).take(args, keywords), output))
            return output

        return forward

    with replaced({block: note(block) for block in blocks}):
        return run(model, kwargs), calls


def other(value, seed=99):
    """Other values of the same form."""
    if isinstance(value, Tensor):
        return torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value.dtype)
    return [other(item, seed + i) for i, item in enumerate(value)]


def shapes(values):
    return [None if value is None else value.shape for value in values]


def check_stack(model, kwargs, expected, varied=("hidden_states", "x")):
    stack = stack_of(model)
    modules = dict(model.named_modules())
    for segment, names, lists in zip(stack.segments, stack.names, expected, strict=True):
        assert segment == tuple(modules[name] for name in names)
        assert len(segment) == sum(lists.values())
        for name, count in lists.items():
            # all blocks of the main list, and no list is left half in
            assert sum(n.rpartition(".")[0] == name for n in names) == count == len(modules[name])

    flat = [block for segment in stack.segments for block in segment]
    outputs, calls = recorded(model, flat, kwargs)
    assert [block for block, _, _ in calls] == flat, "the order of execution"
    for block, taken, output in calls:
        streams = streams_of(block)
        assert all(value is None or isinstance(value, Tensor) for value in taken)
        assert isinstance(taken[0], Tensor)
        for before, after in zip(taken, streams.read(output), strict=True):
            assert after is None or after.shape == before.shape
        given = streams.give(streams.read(output))
        assert given is output or all(a is b for a, b in zip(given, output, strict=True))

    results = {block: output for block, _, output in calls}
    first = {block: taken for block, taken, _ in calls}
    last = {segment[-1] for segment in stack.segments}
    for segment in stack.segments:
        ends = shapes(streams_of(segment[-1]).read(results[segment[-1]]))
        starts = shapes(first[segment[0]])
        assert [b for b, a in zip(starts, ends, strict=True) if a is not None] == [a for a in ends if a is not None]

    def skipped(block):
        streams = streams_of(block)
        if block in last:
            return lambda *args, **keywords: results[block]
        return lambda *args, **keywords: streams.give(streams.take(args, keywords))

    changed = {key: other(value) if key in varied else value for key, value in kwargs.items()}
    ran = []
    hooks = [m.register_forward_hook(lambda *_: ran.append(1)) for b in flat for m in b.modules() if m is not b]
    with replaced({block: skipped(block) for block in flat}):
        again = run(model, changed)
    for hook in hooks:
        hook.remove()
    assert not ran, "a block that was skipped ran a part of itself"
    plain = run(model, changed)
    assert not all(map(torch.equal, plain, outputs)), "the other input changes nothing: the check is empty"
    return outputs, again, changed


@pytest.mark.parametrize("build", STACKS, ids=lambda build: build.__name__)
def test_the_stack_is_all_that_the_output_depends_on(build):
    """Every block skipped, the last ones returning what they returned before: another input gives the old output."""
    model, kwargs = build()
    outputs, again, _ = check_stack(model, kwargs, STACKS[build])
    assert all(map(torch.equal, outputs, again))


def test_blocks_without_diffusers():
    model, kwargs = dit_original.dit()
    assert streams_of(model.blocks[0]).inputs == ("x",)
    outputs, again, _ = check_stack(model, kwargs, [{"blocks": len(model.blocks)}])
    assert all(map(torch.equal, outputs, again))
    assert tensors_of(outputs)


def test_a_patched_model_has_the_same_stack():
    model, _ = flux.flux()
    before = stack_of(model)
    with maskaccel.patch(model, FusedAdaLN()):
        assert stack_of(model) == before
        assert streams_of(model.transformer_blocks[0]).outputs == (1, 0)
