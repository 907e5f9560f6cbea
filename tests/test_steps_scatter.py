"""`ops.scatter_combine`: the update of the newest feature, the forecast from it, layouts, bad input."""

from __future__ import annotations

import pytest
import torch
from _numerics import assert_close_to_truth
from hypothesis import given, settings
from hypothesis import strategies as st

from maskaccel import ops
from maskaccel.ops._backends import refusal
from maskaccel.ops.steps import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
KERNELS = [b for b in ("cpu", "triton") if refusal(b, CPU, torch.float32, "scatter_combine") is None]
fuzz = settings(max_examples=80, deadline=None, derandomize=True)


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _integers(seed: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def _updated(value, fresh, index, labels, gamma):
    """The newest feature after the update, token by token, fp64."""
    new = value.double().clone()
    for b in range(value.shape[0]):
        computed = {int(token): fresh[b, m].double() for m, token in enumerate(index[b])}
        for n in range(value.shape[1]):
            if n in computed:
                new[b, n] = computed[n]
            elif labels is not None and gamma > 0:
                rows = [fresh[b, m].double() for m, token in enumerate(index[b]) if labels[b, token] == labels[b, n]]
                if rows:
                    new[b, n] = gamma * torch.stack(rows).mean(0) + (1 - gamma) * value[b, n].double()
    return new


@fuzz
@given(
    st.integers(0, 999), st.integers(1, 4),
    st.tuples(st.integers(0, 2), st.integers(1, 9), st.sampled_from([1, 8, 33, 130])), st.integers(0, 6),
    st.sampled_from(DTYPES), st.sampled_from([None, 0.0, 0.005, 0.3, 1.0]), st.booleans(),
    st.sampled_from([None, *DTYPES]), st.sampled_from([None, "2d", "sample", "token"]),
    st.sampled_from([None, "reference"]), st.sampled_from(["dense", "sliced", "batch first"]),
    st.sampled_from([torch.int32, torch.int64]),
)  # fmt: skip
def test_scatter_combine(seed, steps, shape, rows, dtype, gamma, per_channel, x_dtype, gated, backend, layout, integer):
    batch, n, width = shape
    history = _random(seed, steps, *shape).to(dtype)
    if layout == "sliced":
        history = torch.cat([history, torch.full_like(history, float("nan"))], 1)[:, :batch]
    elif layout == "batch first":
        history = history.transpose(0, 1).contiguous().transpose(0, 1)
    before, newest = history.clone(), seed % steps
    weights = _random(seed + 1, *((steps, width) if per_channel else (steps,)))
    fresh = _random(seed + 4, batch, rows, width).to(DTYPES[seed % 3])
    index = _integers(seed + 5, n, batch, rows).to(integer)  # with some tokens twice
    labels = None if gamma is None else _integers(seed + 6, 4, batch, n).to(integer) - 1
    gamma = gamma or 0.0
    x = None if x_dtype is None else _random(seed + 2, *shape).to(x_dtype)
    gates = {"2d": (batch, width), "sample": (batch, 1, width), "token": shape}
    gate = None if gated is None else _random(seed + 3, *gates[gated]).to(dtype)

    stored = fresh.to(dtype)
    newer = _updated(before[newest], stored, index, labels, gamma)
    whole = before.double()
    whole[newest] = newer
    total = (weights.double().view(steps, 1, 1, -1) * whole).sum(0)
    if gate is not None:
        total = total * (gate[:, None] if gated == "2d" else gate).double()
    truth = total if x is None else total + x.double()
    plain_history = before.clone()
    plain = reference.scatter_combine(plain_history, weights, stored, index, labels, x, gate, newest, gamma)
    with torch.no_grad():
        got = ops.scatter_combine(
            history, weights, fresh, index, labels, gamma=gamma, x=x, gate=gate, newest=newest, backend=backend
        )
    assert_close_to_truth(got, plain, truth)
    assert_close_to_truth(history[newest], plain_history[newest], newer, what="the newest feature")
    others = [k for k in range(steps) if k != newest]
    assert torch.equal(history[others], before[others])


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_forecast_of_what_was_stored(dtype, backend):
    """The same bits as combining afterwards: the next step sees the rounded rows, so this one does."""
    history, x = _random(0, 2, 2, 40, 72).to(dtype), _random(1, 2, 40, 72).to(dtype)
    index = torch.stack([torch.arange(0, 40, 9), torch.arange(1, 40, 8)])
    call = {"x": x, "gate": _random(3, 2, 72).to(dtype), "backend": backend}
    with torch.no_grad():
        got = ops.scatter_combine(
            history, torch.tensor([1.5, -0.5]), _random(4, 2, 5, 72), index, _integers(5, 3, 2, 40), gamma=0.2, **call
        )
        assert torch.equal(got, ops.combine_history(history, torch.tensor([1.5, -0.5]), **call))


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_clusters(backend):
    """One fresh row a cluster, several, none; gamma 1 replaces, gamma 0 leaves alone; computed rows stay."""
    before = _random(0, 1, 1, 8, 16)
    fresh, index = _random(1, 1, 3, 16), torch.tensor([[0, 3, 4]])
    labels = torch.tensor([[0, 0, 0, 1, 1, 1, 7, 7]])
    both = (fresh[0, 1] + fresh[0, 2]) / 2
    for gamma in (0.0, 0.25, 1.0):
        history = before.clone()
        with torch.no_grad():
            ops.scatter_combine(history, torch.ones(1), fresh, index, labels, gamma=gamma, backend=backend)
        new, old = history[0, 0], before[0, 0]
        assert torch.equal(new[[0, 3, 4]], fresh[0])
        torch.testing.assert_close(new[[1, 2]], gamma * fresh[0, :1] + (1 - gamma) * old[[1, 2]])
        torch.testing.assert_close(new[5], gamma * both + (1 - gamma) * old[5])
        assert torch.equal(new[[6, 7]], old[[6, 7]])


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_a_spoiled_row_stays_in_its_cluster(backend):
    history, fresh = torch.zeros(1, 1, 4, 8), torch.ones(1, 2, 8)
    fresh[0, 1] = float("nan")
    labels, index = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 2]])
    with torch.no_grad():
        out = ops.scatter_combine(history, torch.ones(1), fresh, index, labels, gamma=0.5, backend=backend)
    assert torch.equal(out[0, :2], torch.tensor([[1.0], [0.5]]).expand(2, 8))
    assert out[0, 2:].isnan().all()


def test_one_index_for_all_samples():
    history, fresh = torch.zeros(1, 3, 5, 8), _random(0, 3, 2, 8)
    with torch.no_grad():
        out = ops.scatter_combine(history, torch.ones(1), fresh, torch.tensor([[4, 1]]))
    assert torch.equal(out[:, [4, 1]], fresh)
    assert not out[:, [0, 2, 3]].any()


def test_autograd_hears_of_the_write():
    history = torch.ones(1, 1, 4, 8)
    leaf = torch.ones(4, 8, requires_grad=True)
    product = leaf * history[0, 0]
    with torch.no_grad():
        ops.scatter_combine(history, torch.ones(1), torch.zeros(1, 1, 8), torch.tensor([[0]]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_in_inference_mode():
    with torch.inference_mode():
        history = torch.zeros(1, 1, 4, 8)
        out = ops.scatter_combine(history, torch.ones(1), torch.ones(1, 1, 8), torch.tensor([[2]]))
        assert out.sum() == history.sum() == 8


def test_the_result_is_not_the_history():
    history = torch.zeros(1, 1, 4, 8)
    with torch.no_grad():
        out = ops.scatter_combine(history, torch.ones(1), torch.ones(1, 1, 8), torch.tensor([[2]]))
    out.fill_(9)
    assert history.sum() == 8


def test_compiled_code_writes_the_history():
    def step(history, weights, fresh, index, labels, x):
        return ops.scatter_combine(history, weights, fresh, index, labels, gamma=0.1, x=x) * 2

    rest = (torch.tensor([2.0, -1.0]), _random(1, 2, 2, 8), torch.tensor([[0, 3], [1, 2]]), _integers(2, 2, 2, 6))
    eager, compiled, x = _random(0, 2, 2, 6, 8), _random(0, 2, 2, 6, 8), _random(3, 2, 6, 8)
    with torch.no_grad():
        want = step(eager, *rest, x)
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, *rest, x)
    assert torch.equal(got, want)
    assert torch.equal(compiled, eager)


H, W, F = torch.zeros(3, 2, 4, 8), torch.ones(3), torch.zeros(2, 2, 8)
AT, L = torch.tensor([[0, 1], [2, 3]]), torch.zeros(2, 4, dtype=torch.int32)
BAD = [
    ((1, W, F, AT), {}, TypeError, "history must be a torch.Tensor, got int"),
    ((H[0], W, F, AT), {}, ValueError, r"history must be \(K, B, N, D\), got shape \(2, 4, 8\)"),
    ((torch.zeros(17, 2, 4, 8), W, F, AT), {}, ValueError, "history holds K=17 steps"),
    ((H.transpose(2, 3), W, F, AT), {}, ValueError, "history is written to, so it must be dense in N and D"),
    ((H[:, :1].expand(3, 2, 4, 8), W, F, AT), {}, ValueError, "history is written to, but it is expanded"),
    ((H, W[:2], F, AT), {}, ValueError, r"weights has shape \(2,\); it must be \(3,\) or \(3, 8\)"),
    ((H, W, F[:, :1], AT), {}, ValueError, r"fresh has shape \(2, 1, 8\); it must be \(2, 2, 8\)"),
    ((H, W, F.int(), AT), {}, TypeError, "fresh has dtype torch.int32"),
    ((H, W, F.to("meta"), AT), {"backend": "reference"}, ValueError, "fresh is on meta, history on cpu"),
    ((H, W, F, [0]), {}, TypeError, "index must be a torch.Tensor, got list"),
    ((H, W, F, AT.float()), {}, TypeError, "index has dtype torch.float32; it must be int32"),
    ((H, W, F, AT[0]), {}, ValueError, r"index has shape \(2,\); it must be \(2, M\)"),
    ((H, W, F, AT + 1), {}, ValueError, r"index holds values in \[1, 4\]; allowed are 0 to 3"),
    ((H, W, F, AT - 1), {}, ValueError, r"index holds values in \[-1, 2\]; allowed are 0 to 3"),
    ((H, W, F, AT + 2**40), {}, ValueError, r"index holds values in \[1099511627776, 1099511627779\]"),
    ((H, W, F, (AT + 1).int()), {}, ValueError, r"index holds values in \[1, 4\]; allowed are 0 to 3"),
    ((H, W, F, AT, L[:, :3]), {}, ValueError, r"labels has shape \(2, 3\); it must be \(2, 4\)"),
    ((H, W, F, AT, L.bool()), {}, TypeError, "labels has dtype torch.bool"),
    ((H, W, F, AT), {"gamma": 0.1}, ValueError, "gamma=0.1 needs labels"),
    ((H, W, F, AT, L), {"gamma": 1.5}, ValueError, "gamma=1.5; allowed are 0 to 1"),
    ((H, W, F, AT.int(), L), {"gamma": float("nan")}, ValueError, "gamma=nan; allowed are 0 to 1"),
    ((H, W, F, AT, L), {"gamma": "all"}, TypeError, "gamma must be a number, got str"),
    ((H, W, F, AT), {"newest": 3}, ValueError, "newest=3; allowed are 0 to 2"),
    ((H, W, F, AT.int()), {"newest": -1}, ValueError, "newest=-1; allowed are 0 to 2"),
    ((H, W, F, AT), {"newest": 1.0}, TypeError, "newest must be an int, got float"),
    ((H, W, F, AT), {"x": H[0, :1]}, ValueError, r"x has shape \(1, 4, 8\); it must be \(2, 4, 8\)"),
    ((H, W, F, AT.int()), {"x": H[0]}, ValueError, r"x shares memory with history\[newest\]"),
    ((H, W, H[0, :, :2], AT.int()), {}, ValueError, r"fresh shares memory with history\[newest\]"),
    ((H, W, F, AT), {"gate": torch.zeros(2, 3, 8)}, ValueError, r"gate has 3 rows .* must divide N=4"),
    ((H, W, F, AT), {"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
]


@pytest.mark.parametrize(("args", "keywords", "error", "message"), BAD)
def test_bad_input_is_named_and_nothing_is_written(args, keywords, error, message):
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            ops.scatter_combine(*args, **keywords)
    assert not H.any()


@pytest.mark.parametrize("name", ["history", "weights", "fresh", "x", "gate"])
def test_gradients_are_refused(name):
    call = {"history": H.clone(), "weights": W, "fresh": F + 1, "x": H[0].clone(), "gate": torch.zeros(2, 8)}
    call[name] = call[name].clone().requires_grad_()
    history = call.pop("history")
    with pytest.raises(ValueError, match=f"scatter_combine has no derivative, but {name} requires grad"):
        ops.scatter_combine(history, call.pop("weights"), call.pop("fresh"), AT.int(), **call)
    assert not history.any()
