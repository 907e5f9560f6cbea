"""Layers that see all tokens (mediators, time, linear attention) against the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from _attention_layers import DTYPES, check, conv, heads_of, places, project, softmax_attention, tokens
from torch import nn
from torch.nn import functional as F

from maskaccel import methods as m


# ------------------------------------------------------------------------------------------------ mediators
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("grid", "mediators"), [((9, 7), 4), ((6, 10), 16)])
def test_mediators(grid, mediators, dtype):
    dim, heads, count = 48, 2, math.prod(grid)

    def bias(p, of):
        terms = {name: p[f"bias_of_{of}.{name}"] for name in ("map", "rows", "columns")}
        resized = F.interpolate(terms["map"], size=grid, mode="bilinear").reshape(1, heads, mediators, count)
        axial = (terms["rows"] + terms["columns"]).reshape(1, heads, mediators, count)
        return resized + axial

    def formula(p, x):
        q, k, v = project(p, "qkv", x).chunk(3, -1)
        side = math.isqrt(mediators)
        pooled = F.adaptive_avg_pool2d(q.transpose(1, 2).reshape(2, dim, *grid), (side, side))
        pooled = heads_of(pooled.flatten(2).transpose(1, 2), heads)
        q, k, wide = (heads_of(t, heads) for t in (q, k, v))
        gathered = heads_of(softmax_attention(pooled, k, wide, 24**-0.5, bias=bias(p, "mediators")), heads)
        out = softmax_attention(q, pooled, gathered, 24**-0.5, bias=bias(p, "tokens").mT)
        return project(p, "proj", out + conv(p, "dwc", v, grid))

    check(m.MediatorAttention(dim, heads, grid, mediators), formula, [tokens(count, dim)], dtype)


def test_the_schedule_of_mediators():
    schedule = m.MediatorSchedule(3, (0.5, 0.25), first=2)
    for _ in range(2):
        latent, chosen = torch.zeros(2, 3), []
        for change in (0, 4, -4, 3, -1.9, 0.5, 0.1, 9):
            latent = latent + change
            chosen.append(schedule.update(latent))
        # changes are compared with 4: 3 is above half, 1.9 below it, 0.5 below a quarter
        assert chosen == [0, 0, 0, 0, 1, 2, 2, 2]
        schedule.reset()
    for bad in ((0, (), 1), (3, (0.5,), 1), (2, (0.5,), 0), (3, (0.2, 0.5), 1)):
        with pytest.raises(ValueError):
            m.MediatorSchedule(*bad)


# ------------------------------------------------------------------------------------------------ DiffiT
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relative_position", [False, True])
def test_diffit(relative_position, dtype):
    grid, dim, heads = (5, 7), 48, 2
    at = places(*grid)
    dy, dx = (at[:, None] - at[None]).unbind(-1)

    def formula(p, x, t):
        q, k, v = (
            heads_of(a + b[:, None], heads)
            for a, b in zip(project(p, "qkv", x).chunk(3, -1), project(p, "qkv_time", t).chunk(3, -1))
        )
        bias = p["relative_position"].view(heads, 9, 13)[:, dy + 4, dx + 6] if relative_position else 0.0
        return project(p, "proj", softmax_attention(q, k, v, 24**-0.5, bias=bias))

    layer = m.DiffiTAttention(dim, heads, grid, 20, relative_position=relative_position)
    check(layer, formula, [tokens(35, dim), tokens(1, 20)[:, 0]], dtype)


# ------------------------------------------------------------------------------------------------ linear attention
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [2, 3])
def test_lit(heads, dtype):
    grid, dim = (7, 9), 48

    def formula(p, x):
        q, k, v = project(p, "qkv", x).chunk(3, -1)
        wide_q, wide_k, wide_v = (heads_of(t, heads) for t in (q.relu(), k.relu(), v))
        weights = wide_q @ wide_k.mT
        out = (weights @ wide_v / (weights.sum(-1, keepdim=True) + 1e-6)).transpose(1, 2).flatten(2)
        return project(p, "proj", out + conv(p, "dwc", v, grid))

    layer = m.LiTAttention(dim, heads)
    check(layer, formula, [tokens(63, dim)], dtype, lambda x: layer(x, grid))


def test_lit_takes_heads_that_are_too_wide_for_kernels():
    layer = m.LiTAttention(576, 2)
    assert layer.backend == "reference"
    assert layer(tokens(6, 576), (2, 3)).shape == (2, 6, 576)


def dit_attention(dim, bias=True):
    attention = nn.Module()
    attention.qkv, attention.proj = nn.Linear(dim, 3 * dim, bias), nn.Linear(dim, dim)
    return attention


def test_lit_in_place_of_the_attention_of_a_dit():
    attention = dit_attention(48, bias=False).double()
    new = m.LiTAttention.from_attention(attention, 3)
    assert new.heads == 3 and new.qkv.bias is None and new.qkv.weight.dtype == torch.float64
    assert not torch.equal(new.qkv.weight, attention.qkv.weight)
    kept = m.LiTAttention.from_attention(attention, projections=True)
    assert torch.equal(kept.qkv.weight, attention.qkv.weight) and torch.equal(kept.proj.bias, attention.proj.bias)
    with pytest.raises(TypeError, match="qkv and proj"):
        m.LiTAttention.from_attention(nn.Linear(3, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linfusion(dtype):
    dim, heads = 48, 2

    def branch(p, name, x):
        x = F.layer_norm(project(p, f"{name}.0", x), (dim // 4,), p[f"{name}.1.weight"], p[f"{name}.1.bias"])
        return project(p, f"{name}.3", F.leaky_relu(x, 0.01))

    def formula(p, x):
        q, k = (heads_of(F.elu(project(p, f"to_{n}", x + branch(p, f"f_{n}", x))) + 1, heads) for n in ("q", "k"))
        v = heads_of(project(p, "to_v", x), heads)
        z = (q * k.mean(-2, keepdim=True)).sum(-1, keepdim=True) + 1e-4
        return project(p, "to_out", (q @ (k.mT @ v / x.shape[1]) / z).transpose(1, 2).flatten(2))

    check(m.LinFusionAttention(dim, heads), formula, [tokens(61, dim)], dtype)


def test_linfusion_in_place_of_a_diffusers_attention():
    attention_of = pytest.importorskip("diffusers.models.attention_processor").Attention
    attention = attention_of(48, heads=3, dim_head=16, bias=False)
    layer, x = m.LinFusionAttention.from_attention(attention), tokens(20, 48)
    q, k, v = (heads_of(getattr(attention, f"to_{n}")(x), 3) for n in "qkv")
    q, k = F.elu(q) + 1, F.elu(k) + 1  # the branches start at 0
    out = q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT + 1e-4 * 20)
    torch.testing.assert_close(layer(x), attention.to_out[0](out.transpose(1, 2).flatten(2)))
    with pytest.raises(TypeError, match="of one width"):
        m.LinFusionAttention.from_attention(attention_of(48, cross_attention_dim=32, heads=3, dim_head=16))
