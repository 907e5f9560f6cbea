"""The ring of raw features."""

from __future__ import annotations

import copy

import pytest
import torch
from _numerics import assert_close_to_truth
from hypothesis import given, settings
from hypothesis import strategies as st

from maskaccel.state import History, Storage


def _value(k: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 5, 8)) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(k)).to(dtype)


def test_values_come_back_newest_first():
    history = History(3)
    assert len(history) == 0
    assert history.nbytes == 0
    for k in range(5):
        history.push(_value(k), k)
        assert torch.equal(history.newest(), _value(k))
        assert history.stamps == tuple(range(k, max(-1, k - 3), -1))
    assert history.nbytes == 3 * 2 * 5 * 8 * 4


def test_a_push_copies():
    history, value = History(), _value(0)
    history.push(value, 0)
    value.zero_()
    assert torch.equal(history.newest(), _value(0))


@pytest.mark.parametrize(
    "other",
    [_value(1, shape=(2, 6, 8)), _value(1, torch.bfloat16), _value(1, shape=(1, 5, 8))],
    ids=["tokens", "dtype", "batch"],
)
def test_another_kind_of_value_clears_it(other):
    history = History(2)
    history.push(_value(0), 0)
    history.push(other, 1)
    assert history.stamps == (1,)
    assert torch.equal(history.newest(), other)
    assert history.nbytes == 2 * other.nbytes


def test_inference_mode_inside_and_outside():
    history = History()
    with torch.inference_mode():
        history.push(_value(0), 0)
    with torch.no_grad():
        history.push(_value(1), 1)
    assert torch.equal(history.newest(), _value(1))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 6), st.booleans(), st.sampled_from([None, 2, 3]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_combine_against_its_formula(capacity, pushes, with_x, gate_dims, dtype):
    history = History(capacity)
    values = [_value(k, dtype) for k in range(pushes)]
    for k, value in enumerate(values):
        history.push(value, k)
    held = values[::-1][:capacity]
    weights = [0.5 - 0.3 * k for k in range(len(held))]
    x = _value(50, dtype) if with_x else None
    gate = None if gate_dims is None else _value(60, dtype, (2, 8) if gate_dims == 2 else (2, 1, 8))

    def formula(wide):
        total = sum(w * v.to(wide) for w, v in zip(weights, held, strict=True))
        total = total if gate is None else total * (gate[:, None] if gate_dims == 2 else gate).to(wide)
        return total if x is None else x.to(wide) + total

    with torch.no_grad():
        got = history.combine(weights, x=x, gate=gate)
    assert_close_to_truth(got, formula(dtype).to(dtype), formula(torch.float64))


def test_an_unfilled_ring_reads_no_garbage():
    history = History(4)
    history.push(_value(0), 0)
    history._ring[[i for i in range(4) if i != history._head]] = float("nan")
    with torch.no_grad():
        assert torch.equal(history.combine([1.0]), _value(0))


def test_clear_and_errors():
    history = History(2)
    with pytest.raises(LookupError, match="the history is empty"):
        history.newest()
    with pytest.raises(ValueError, match="1 weights for 0 values"):
        history.combine([1.0])
    history.push(_value(0), 0)
    with pytest.raises(ValueError, match="2 weights for 1 values"):
        history.combine([1.0, 2.0])
    history.clear()
    assert (len(history), history.nbytes) == (0, 0)
    for capacity in (0, 17):
        with pytest.raises(ValueError, match=f"capacity={capacity} must be 1 to 16"):
            History(capacity)


@pytest.mark.parametrize("limit", [0, 2.5, float("nan"), "5", True])
def test_a_bound_is_a_whole_number_of_bytes(limit):
    with pytest.raises(ValueError, match=f"max_bytes={limit!r} must be an integer, 1 or more, or None"):
        Storage(max_bytes=limit)


def test_a_deepcopy_is_independent():
    history = History(2)
    history.push(_value(0), 0)
    other = copy.deepcopy(history)
    history.push(_value(1), 1)
    assert other.stamps == (0,)
    assert torch.equal(other.newest(), _value(0))


@pytest.mark.parametrize("storage", [Storage(), Storage("bf16"), Storage("fp8")], ids=str)
@pytest.mark.parametrize("pushes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("gamma", [0.0, 0.25])
def test_refreshed_rows_count_from_then_on(storage, pushes, gamma):
    history = History(3, storage)
    values = [torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(k)) for k in range(pushes)]
    for k, value in enumerate(values):
        history.push(value, k)
    held = min(pushes, 3)
    weights = [1.5, -0.75, 0.5][:held]
    fresh, index = torch.randn(2, 2, 16), torch.tensor([[4, 1], [0, 5]])
    labels = torch.tensor([[0, 1, 1, 0, 0, 2], [1, 1, 0, 2, 0, 0]])
    expected = values[-1].clone()
    for b in range(2):
        for n in range(6):
            of_cluster = [m for m in range(2) if labels[b, index[b, m]] == labels[b, n]]
            if n in index[b]:
                expected[b, n] = fresh[b, index[b].tolist().index(n)]
            elif of_cluster:
                expected[b, n] += gamma * (fresh[b, of_cluster].mean(0) - expected[b, n])
    got = history.refresh(weights, fresh, index, labels if gamma else None, gamma)
    truth = weights[0] * expected + sum(w * v for w, v in zip(weights[1:], values[::-1][1:held], strict=True))
    bound = {None: 1e-6, "bf16": 8e-3, "fp8": 8e-2}[storage.dtype]
    assert (got - truth).norm() <= bound * truth.norm()
    assert (history.newest() - expected).norm() <= bound * expected.norm()
    before = history.newest().clone()
    got.zero_()
    fresh.zero_()
    assert torch.equal(history.newest(), before), "the result or the rows alias the history"
