"""Attention that plain modules reach in any way, and what a policy is told of one call."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.functional as functional_by_another_name
from _attention_probes import Probe, same, state_of
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend
from zoo.common import randn

import maskaccel
from maskaccel.ops import tile_attention
from maskaccel.patching.attention import AttentionCall
from maskaccel.patching.transaction import PatchError

# ------------------------------------------------------------------------------------------------ plain modules


def helper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def decorated(function: Any) -> Any:
    def wrapper(self: Any, *args: Any) -> Any:
        return function(self, *args)

    return wrapper


class ByAlias(nn.Module):
    """Attention in the forward of a module; the classes below reach the function in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = F.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        return functional_by_another_name.scaled_dot_product_attention(x, x, x)


class ByTorch(ByAlias):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class ByNN(ByAlias):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


class ByName(ByAlias):
    def forward(self, x: Tensor) -> Tensor:
        return attend(x, x, value=x)


class ByHelper(ByAlias):
    def forward(self, x: Tensor) -> Tensor:
        return helper(x, x, x)


class ByMethod(ByAlias):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x) + self.still(x)

    def run(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    @staticmethod
    def still(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class ByDecorator(ByAlias):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class ByAttribute(ByAlias):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)


class ByLambda(ByAlias):
    def forward(self, x: Tensor) -> Tensor:
        def run(t: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(t, t, t)

        return run(x)


class ByDispatch(ByAlias):
    def forward(self, x: Tensor) -> Tensor:
        return dispatch_attention_fn(x, x, x)


WAYS = [ByAlias, ByTorch, ByNN, ByName, ByHelper, ByMethod, ByDecorator, ByAttribute, ByLambda, ByDispatch]


@pytest.mark.parametrize("cls", WAYS)
def test_every_way_to_the_function(cls):
    x = randn(2, 3, 5, 16)
    model = nn.Sequential(nn.Identity(), cls())
    plain, before = model(x), state_of(model)
    with maskaccel.patch(model, Probe()):
        assert torch.equal(model(x), 2 * plain)
        assert torch.equal(copy.deepcopy(model)(x), 2 * plain)
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), 2 * plain)
        torch._dynamo.reset()
    assert torch.equal(model(x), plain) and same(state_of(model), before)


class ByHand(nn.Module):
    """Names itself attention, and reaches no function."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(-2, -1)).softmax(-1) @ x


class HandAttention(ByHand):
    pass


def test_attention_by_hand_is_named():
    with pytest.raises(PatchError, match=r"HandAttention: HandAttention.forward calls no scaled_dot_product_attention"):
        maskaccel.patch(nn.Sequential(HandAttention()), Probe())


# --------------------------------------------------------------------------------------------- masks and refusals


def calls_of(**given: Any) -> tuple[AttentionCall, Tensor]:
    """The call of a module that attends with these arguments, and its result."""
    seen: list[AttentionCall] = []
    module = types.new_class("Attend", (nn.Module,))
    q, k, v = randn(2, 3, 5, 16), randn(2, 3, 7, 16, seed=1), randn(2, 3, 7, 16, seed=2)
    q, k, v = (given.pop(name, t) for name, t in (("q", q), ("k", k), ("v", v)))

    def forward(self: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **given)

    module.forward = forward
    model = nn.Sequential(module())
    with maskaccel.patch(model, Probe(seen.append)):
        out = model[0]()
    return seen[0], out.transpose(1, 2)


_BOOL = randn(2, 1, 5, 7, seed=3) > -0.5
_BOOL[..., 0] = True


@pytest.mark.parametrize("mask", [_BOOL, _BOOL[:, :, :1], _BOOL[0, 0], _BOOL[0], randn(2, 3, 5, 7),
                                  randn(5, 1), None])  # fmt: skip
@pytest.mark.parametrize("scale", [None, 0.5])
def test_the_bias_of_a_mask_gives_the_same_attention(mask, scale):
    call, expected = calls_of(attn_mask=mask, scale=scale)
    bias = call.bias()
    assert (bias is None) == (mask is None) and (bias is None or bias.ndim == 4)
    assert call.scale == (scale or 0.25)
    got = tile_attention(call.q, call.k, call.v, scale=call.scale, bias=bias)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(call.dense(), expected, rtol=0, atol=0)


def test_a_padding_mask_of_diffusers_is_one_of_keys():
    """`dispatch_attention_fn` takes a mask of (batch, keys); for torch two dims are (queries, keys)."""
    seen: list[AttentionCall] = []

    class Dispatched(nn.Module):
        def forward(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
            return dispatch_attention_fn(q, k, k, attn_mask=mask)

    model = nn.Sequential(Dispatched())
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    with maskaccel.patch(model, Probe(seen.append)):
        expected = model[0](randn(2, 5, 3, 16), randn(2, 7, 3, 16, seed=1), mask)
    got = tile_attention(seen[0].q, seen[0].k, seen[0].v, scale=seen[0].scale, bias=seen[0].bias())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "reason"),
    [({"dropout_p": 0.25}, "dropout_p=0.25"), ({"is_causal": True}, "is_causal=True"),
     ({"v": randn(2, 3, 7, 24)}, "values of width 24, queries of 16"),
     ({name: randn(2, 3, 7, 20) for name in "qkv"}, "head dim 20, not a multiple of 8 from 16 to 256"), ({}, None)],
)  # fmt: skip
def test_refusals_have_names(given, reason):
    call, _ = calls_of(**given)
    assert call.refusal() == reason
