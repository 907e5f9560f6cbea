"""`ops.gram`: accuracy, layouts, bad input, and the forecast weights it is for."""

from __future__ import annotations

import math

import pytest
import torch
from _numerics import assert_close_to_truth
from hypothesis import given, settings
from hypothesis import strategies as st

from maskaccel import ops
from maskaccel.ops._backends import refusal
from maskaccel.ops.steps import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = [b for b in ("cpu", "triton") if refusal(b, torch.device("cpu"), torch.float32) is None]
fuzz = settings(max_examples=60, deadline=None, derandomize=True)


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@fuzz
@given(
    st.integers(0, 999), st.integers(1, 16), st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(1, 70)),
    st.sampled_from(DTYPES), st.booleans(), st.sampled_from(["dense", "sliced", "batch first", "strided"]),
    st.sampled_from([None, "reference"]),
)  # fmt: skip
def test_gram(seed, steps, shape, dtype, per_sample, layout, backend):
    history = _random(seed, steps, *shape).to(dtype)
    if layout == "sliced":
        history = torch.cat([history, torch.full_like(history, float("nan"))], 1)[:, : shape[0]]
    elif layout == "batch first":
        history = history.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "strided":  # copied: features are not dense
        history = torch.stack([history, torch.full_like(history, float("nan"))], -1)[..., 0]
    with torch.no_grad():
        got = ops.gram(history, per_sample=per_sample, backend=backend)
        truth = reference.gram(history.double(), per_sample)
        assert_close_to_truth(got, reference.gram(history, per_sample), truth)
    assert got.dtype == torch.float64
    assert torch.equal(got, got.mT)


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_differences_survive(dtype, backend):
    """Features that hardly move: fp32 sums would lose what the small eigenvalues are made of."""
    first = _random(0, 1, 2, 96, 64)
    history = torch.cat([first, first * (1 + 2**-7), first]).to(dtype)
    history[2, 0, 0, 0] *= 1.5
    exact = [
        [math.fsum((a.double() * b.double()).flatten().tolist()) for b in history]  # products of 24 bits fit 53
        for a in history
    ]
    with torch.no_grad():
        got = ops.gram(history, backend=backend)
    assert ((got - torch.tensor(exact, dtype=torch.float64)) / torch.tensor(exact)).abs().max() < 1e-12


def test_samples_add_up():
    history = _random(1, 4, 3, 50, 40)
    with torch.no_grad():
        each, whole = ops.gram(history, per_sample=True), ops.gram(history)
    assert each.shape == (3, 4, 4)
    torch.testing.assert_close(each.sum(0), whole, rtol=1e-14, atol=1e-11)


def test_weights_of_a_linear_recurrence():
    """What a DMD forecast asks of it: the weights by which the last steps give the next one."""
    base = _random(2, 2, 1, 30, 20)
    steps = [base[0], base[1]]
    while len(steps) < 5:
        steps.append(0.3 * steps[-1] + 0.6 * steps[-2])
    with torch.no_grad():
        matrix = ops.gram(torch.stack(steps))
    known, target = matrix[2:4, 2:4], matrix[2:4, 4]
    weights = torch.linalg.solve(known, target)
    torch.testing.assert_close(weights, torch.tensor([0.6, 0.3], dtype=torch.float64), rtol=1e-5, atol=0)


H = torch.zeros(3, 2, 4, 8)
BAD = [
    (([1.0],), {}, TypeError, "history must be a torch.Tensor, got list"),
    ((H.int(),), {}, TypeError, "history has dtype torch.int32"),
    ((H[0],), {}, ValueError, r"history must be \(K, B, N, D\), got shape \(2, 4, 8\)"),
    ((H[..., :0],), {}, ValueError, "history has an empty last dimension"),
    ((H[:0],), {}, ValueError, "history holds K=0 steps; allowed are 1 to 16"),
    ((torch.zeros(17, 1, 1, 1),), {}, ValueError, "history holds K=17 steps"),
    ((H,), {"per_sample": "yes"}, ValueError, "per_sample='yes' is not known; allowed are False, True"),
    ((H,), {"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
]


@pytest.mark.parametrize(("args", "keywords", "error", "message"), BAD)
def test_bad_input_is_named(args, keywords, error, message):
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            ops.gram(*args, **keywords)


def test_gradients_are_refused():
    leaf = H.clone().requires_grad_()
    with pytest.raises(ValueError, match="gram has no derivative, but history requires grad"):
        ops.gram(leaf)
    with torch.no_grad():
        assert ops.gram(leaf).shape == (3, 3)
