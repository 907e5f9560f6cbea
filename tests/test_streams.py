"""Reading streams and stacks from sources: the ways in which blocks and models are written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maskaccel.models import Streams, stack_of, streams_of


class Dense(nn.Module):
    """A block of a projection: the forwards below differ in how they write the residual."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)


class ReturnsTheSum(Dense):
    def forward(self, x, c):
        return x + self.fc(self.norm(x)) * c


class NamesTheResidual(Dense):
    def forward(self, x, c):
        residual = x
        x = self.norm(x)
        out = (residual.float() + self.fc(x)).to(x.dtype)
        return out[:, :]


class AddsOnTheRight(Dense):
    def forward(self, x, mask, c=None):
        update = self.fc(x)
        return (update + x) * mask


class TwoStreams(Dense):
    def forward(self, encoder_states, hidden, c, *, scale=1.0):
        both = encoder_states + 1, hidden
        encoder_states, hidden = both
        return encoder_states, hidden


class ReturnsInside(Dense):
    def __init__(self):
        super().__init__()
        self.inner = ReturnsTheSum()

    def forward(self, cond, states):
        return self.inner(c=cond, x=states)


class ReturnsAsItIsBuilt(Dense):
    def __init__(self, tuple_):
        super().__init__()
        self.tuple_ = tuple_

    def forward(self, x, y):
        if self.tuple_:
            return x, y
        return x


class KeepsNothing(Dense):
    def forward(self, x, c):
        return self.fc(x)


class ReturnsWeightsToo(Dense):
    def forward(self, x, c):
        weights = self.fc(x).softmax(-1)
        return x + weights, weights


class ReturnsAsCalled(Dense):
    def forward(self, x, y=None):
        if y is None:
            return x
        return x, y


class ReturnsItTwice(Dense):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("block", "inputs", "positions", "outputs", "is_tuple"),
    [
        (ReturnsTheSum(), ("x",), (0,), (0,), False),
        (NamesTheResidual(), ("x",), (0,), (0,), False),
        (AddsOnTheRight(), ("x",), (0,), (0,), False),
        (TwoStreams(), ("hidden", "encoder_states"), (1, 0), (1, 0), True),
        (ReturnsInside(), ("states",), (1,), (0,), False),
        (ReturnsAsItIsBuilt(True), ("x", "y"), (0, 1), (0, 1), True),
        (ReturnsAsItIsBuilt(False), ("x",), (0,), (0,), False),
        (ReturnsWeightsToo(), ("x",), (0,), (0, None), True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_streams_are_read_from_the_source(block, inputs, positions, outputs, is_tuple):
    assert streams_of(block) == Streams(inputs, positions, outputs, is_tuple)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (KeepsNothing(), "does not say which of its inputs it returns"),
        (ReturnsAsCalled(), "different streams in different cases"),
        (ReturnsItTwice(), "returns x more than once"),
        (nn.Identity(), None),
        (torch.jit.script(nn.Identity()), "no source to read"),
    ],
)
def test_unknown_streams_say_why(block, reason):
    if reason is None:  # it hands on its input
        assert streams_of(block).inputs == ("input",)
        return
    with pytest.raises(LookupError, match=reason):
        streams_of(block)


def test_take_give_and_read():
    streams = streams_of(TwoStreams())
    hidden, text = torch.ones(1), torch.zeros(1)
    for args, kwargs in [((text, hidden), {}), ((text,), {"hidden": hidden, "c": 3}), ((), {"hidden": hidden})]:
        taken = streams.take(args, kwargs)
        assert taken[0] is hidden and taken[1] is (text if args else None)
    assert streams.give((hidden, text)) == (text, hidden)
    assert streams.read((text, hidden)) == (hidden, text)
    assert streams.read((None, hidden)) == (hidden, None)
    with pytest.raises(ValueError, match="values has 1 elements; the streams are hidden, encoder_states"):
        streams.give((hidden,))
    with pytest.raises(TypeError, match="returned Tensor, not a tuple of 2"):
        streams.read(hidden)
    with pytest.raises(TypeError, match="returned a tuple of 3, not a tuple of 2"):
        streams.read((text, hidden, hidden))
    with pytest.raises(LookupError, match="returned element 1 is no stream of x"):
        streams_of(ReturnsWeightsToo()).give((hidden,))


# ------------------------------------------------------------------------------------------------ loops of models


class Model(nn.Module):
    """Two lists of blocks; `forward` below says how they run."""

    def __init__(self, block=ReturnsTheSum, temporal=False):
        super().__init__()
        self.first, self.second = (nn.ModuleList(block() for _ in range(2)) for _ in range(2))
        self.temporal = temporal


class Follows(Model):
    def forward(self, x, c):
        for block in self.first:
            x = block(x, c)
        second = self.second
        for i, block in enumerate(second[:1]):
            args = (x, c)
            x = block(*args) + i
        for block in second[1:]:
            x = block(x, c=c)
        return x


class Joins(Model):
    def forward(self, x, c):
        for block in self.first:
            x = block(x, c)
        x = torch.cat([x, x], 1)
        for block in self.second:
            x = block(x, c)
        return x


class WritesBetween(Model):
    def forward(self, x, c):
        for block in self.first:
            x = block(x, c)
        x[:, 0] = 0
        for block in self.second:
            x = block(x, c)
        return x


class OtherVariable(Model):
    def forward(self, x, c):
        y = x
        for block in self.first:
            x = block(x, c)
        for block in self.second:
            y = block(y, c)
        return x + y


class Alternates(Model):
    def forward(self, x, c):
        for one, two in zip(self.first, self.second):
            x = one(x, c)
            x = two(x, c)
        return x


class AlternatesViews(Model):
    def forward(self, x, c):
        for one, two in zip(self.first, self.second):
            x = one(x, c)
            x = x.transpose(0, 1)
            if self.temporal:
                x = two(x, c)
            x = x.transpose(0, 1)
        return x


class InAMethod(Model):
    def forward(self, x, c):
        x = self.run_blocks(x, c)
        return x

    def run_blocks(self, x, c):
        for block in self.first:
            x = block(x, c)
        return x


class AsBuilt(Model):
    def forward(self, x, c):
        if self.temporal:
            for block in self.second:
                x = block(x, c)
        else:
            for block in self.first:
                x = block(x, c)
        return x


class AsCalled(Model):
    def forward(self, x, c=None):
        if c is None:
            for block in self.second:
                x = block(x, x)
        else:
            for block in self.first:
                x = block(x, c)
        return x


class MaybeMore(Model):
    def forward(self, x, c, more=False):
        for block in self.first:
            x = block(x, c)
        if more:
            for block in self.second:
                x = block(x, c)
        return x


class Heads(Model):
    def __init__(self):
        super().__init__()
        self.second = nn.ModuleList(KeepsNothing() for _ in range(2))

    def forward(self, x, c):
        for block in self.first:
            x = block(x, c)
        outputs = []
        for head in self.second:
            outputs.append(head(x, c))
        return outputs


class Recycles(Model):
    def forward(self, x, c):
        for _ in range(2):
            for block in self.first:
                x = block(x, c)
        return x


class Calls(Model):
    def forward(self, x, c):
        return self.first[0](x, c)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Follows(), [["first.0", "first.1", "second.0", "second.1"]]),
        (Joins(), [["first.0", "first.1"], ["second.0", "second.1"]]),
        (WritesBetween(), [["first.0", "first.1"], ["second.0", "second.1"]]),
        (OtherVariable(), [["first.0", "first.1"], ["second.0", "second.1"]]),
        (Alternates(), [["first.0", "second.0", "first.1", "second.1"]]),
        (AlternatesViews(temporal=True), [["first.0", "second.0", "first.1"], ["second.1"]]),
        (InAMethod(), [["first.0", "first.1"]]),
        (AsBuilt(), [["first.0", "first.1"]]),
        (AsBuilt(temporal=True), [["second.0", "second.1"]]),
        (Heads(), [["first.0", "first.1"]]),
        (MaybeMore(), [["first.0", "first.1"], ["second.0", "second.1"]]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_loops(model, names):
    stack = stack_of(model)
    assert [list(segment) for segment in stack.names] == names
    modules = dict(model.named_modules())
    assert [list(segment) for segment in stack.segments] == [[modules[n] for n in segment] for segment in names]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (AsCalled(), "AsCalled runs its blocks in different orders"),
        (Recycles(), "Recycles runs its blocks more than once in a call"),
        (Calls(), "no loop over a list of blocks"),
        (Joins(ReturnsWeightsToo), "ReturnsWeightsToo also returns something that is no stream"),
        (Joins(KeepsNothing), "does not say which of its inputs it returns"),
        (nn.Sequential(nn.Linear(2, 2)), "Linear.forward does not say which of its inputs it returns"),
        (nn.Linear(2, 2), "no loop over a list of blocks"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_models_without_a_stack_say_why(model, reason):
    with pytest.raises(LookupError, match=reason):
        stack_of(model)
