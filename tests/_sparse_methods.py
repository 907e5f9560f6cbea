"""A model that is nothing but attention, and what sparse methods have to give on it."""

from __future__ import annotations

import itertools
import math

import torch
from _numerics import assert_close_to_truth
from torch import Tensor, nn
from torch.nn import functional as F

import maskaccel

GRID = (4, 6, 8)
TOKENS = math.prod(GRID)
CELLS = list(itertools.product(*map(range, GRID)))


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attn(q, k, v)


class Model(nn.Module):
    """Nothing but attention: its inputs are what the policies get."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.blocks[0](q, k, v)


def qkv(tokens: int = TOKENS, *, smooth: int = 0, sharp: float = 4.0, heads: int = 3, seed: int = 0) -> tuple:
    """`(2, heads, tokens, 16)` each; if smooth, queries and keys of neighbours are alike."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, tokens, 16, generator=generator) for _ in range(3))
    if smooth:
        size = 2 * smooth + 1
        q, k = (F.avg_pool2d(F.pad(t, (0, 0, smooth, smooth)), (size, 1), 1) * sharp for t in (q, k))
    return q, k, v


def masked(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """Dense attention under a boolean mask, in fp64."""
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=kept)


def check(method, inputs: tuple[Tensor, ...], kept: Tensor) -> None:
    """The patched model computes attention over what the rule keeps, and is itself again afterwards."""
    model = Model()
    before = model(*inputs)
    with maskaccel.patch(model, [method]) as patch, torch.no_grad():
        got = model(*inputs)
        assert patch.report().activity[method.name]["sparse calls"] == 1, patch.report()
    plain = F.scaled_dot_product_attention(*inputs, attn_mask=kept)
    assert_close_to_truth(got, plain, masked(*inputs, kept))
    assert torch.equal(model(*inputs), before)


def pairs(near) -> Tensor:
    return torch.tensor([[near(a, b) for b in CELLS] for a in CELLS])
