"""2,000 random calls of `tile_attention`, forward and backward, by the error rule."""

from __future__ import annotations

import pytest
import torch
from _attention_cases import magnitudes, random_case, results
from _numerics import assert_close_to_truth
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskaccel import ops
from maskaccel.masks import TileMask
from maskaccel.ops._backends import refusal

NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")


def check(seed: int, backend: str | None, **limits) -> None:
    case = random_case(seed, **limits)
    got, plain, truth = results(case, backend)
    sizes = magnitudes(case)
    for name, g, p, t in zip(NAMES, got, plain, truth, strict=False):
        empty = torch.isneginf(t)
        assert torch.equal(torch.isneginf(g), empty), f"{name} of {case}"
        g, p, t = (x.masked_fill(empty, 0.0) for x in (g, p, t))
        # The gradient of an fp32 bias is as exact as the half precision of the scores' gradient.
        size = sizes.get(name, 0.0) * torch.finfo(case.q.dtype).eps / torch.finfo(g.dtype).eps
        assert_close_to_truth(g, p, t, what=f"{name} of seed {seed}: {case}", magnitude=size)


@pytest.mark.skipif(
    refusal("cpu", torch.device("cpu"), torch.float32, "tile_attention") is not None
    or refusal("cpu", torch.device("cpu"), torch.float32, "tile_attention_backward") is not None,
    reason="no native library",
)
# The same cases in every run: a rule about the size of errors fails for one draw in very many.
@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**40))
def test_native_kernels(seed) -> None:
    check(seed, "cpu")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**40))
def test_reference(seed) -> None:
    check(seed, "reference")


@pytest.mark.parametrize("kind", ["mask", "empty rows", "bias", "grouped"])
def test_gradcheck(kind) -> None:
    """The reference in fp64, by finite differences."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads = 4, 2 if kind == "grouped" else 4
    q, k, v = (
        torch.randn(2, n, h, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for n, h in ((20, heads), (33, kv_heads), (33, kv_heads))
    )
    kept = torch.rand(2, heads, 20, 33, generator=generator) < 0.4
    if kind == "empty rows":
        kept[:, 1] = False
        kept[0, :, 3:9] = False
    bias = torch.randn(1, heads, 1, 33, generator=generator, dtype=torch.float64).requires_grad_(kind == "bias")
    mask = TileMask.from_bool(kept, (16, 32))

    def attention(q, k, v, bias):
        out, lse = ops.tile_attention(q, k, v, mask, bias=bias, return_lse=True, backend="reference")
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    assert torch.autograd.gradcheck(attention, (q, k, v, bias))
