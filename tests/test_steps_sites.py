"""`ops.combine_sites`: every form of weights and gates, layouts, bad input, and what it replaces."""

from __future__ import annotations

import pytest
import torch
from _numerics import assert_close_to_truth
from hypothesis import given, settings
from hypothesis import strategies as st

from maskaccel import ops
from maskaccel.ops.steps import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
fuzz = settings(max_examples=80, deadline=None, derandomize=True)


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@fuzz
@given(
    st.integers(0, 999), st.integers(1, 5), st.integers(1, 4),
    st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 2, 6]), st.sampled_from([1, 8, 33, 150])),
    st.sampled_from(DTYPES), st.sampled_from(["K", "SK", "SKD"]), st.sampled_from([None, *DTYPES]),
    st.sampled_from([None, "2d", "sample", "frame", "token", "shared"]), st.sampled_from([None, "reference"]),
    st.sampled_from(["dense", "sliced", "steps first", "transposed"]),
)  # fmt: skip
def test_combine_sites(seed, sites, steps, shape, dtype, form, x_dtype, gated, backend, layout):
    batch, n, width = shape
    history = _random(seed, sites, steps, *shape).to(dtype)
    if layout == "sliced":
        history = torch.cat([history, torch.full_like(history, float("nan"))], 2)[:, :, :batch]
    elif layout == "steps first":
        history = history.permute(1, 2, 0, 3, 4).contiguous().permute(2, 0, 1, 3, 4)
    elif layout == "transposed":  # copied: features are not dense
        history = history.transpose(3, 4).contiguous().transpose(3, 4)
    weights = _random(seed + 1, *{"K": (steps,), "SK": (sites, steps), "SKD": (sites, steps, width)}[form])
    x = None if x_dtype is None else _random(seed + 2, *shape).to(x_dtype)
    rows = {"2d": (batch,), "sample": (batch, 1), "frame": (batch, n // 2 if n > 1 else 1), "token": (batch, max(n, 1)),
            "shared": (1, 1)}  # fmt: skip
    gates = None if gated is None else _random(seed + 3, sites, *rows[gated], width).to(dtype)

    w = weights.double().view({"K": (1, steps, 1), "SK": (sites, steps, 1), "SKD": (sites, steps, width)}[form])
    each = (w[:, :, None, None] * history.double()).sum(1)
    if gates is not None:
        g = gates.double()
        g = g[:, :, None] if g.dim() == 3 else g
        each = each * g.repeat_interleave(max(n // g.shape[2], 1), dim=2)[:, :, :n]
    truth = each.sum(0) if x is None else each.sum(0) + x.double()
    with torch.no_grad():
        got = ops.combine_sites(history, weights, x=x, gates=gates, backend=backend)
        assert_close_to_truth(got, reference.combine_sites(history, weights, x, gates), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_the_loop_over_sites(dtype):
    """One launch in place of one per site: the same sum, rounded once instead of S times."""
    history, weights = _random(0, 6, 2, 2, 5, 24).to(dtype), _random(1, 6, 2)
    x, gates = _random(2, 2, 5, 24).to(dtype), _random(3, 6, 2, 24).to(dtype)
    with torch.no_grad():
        got = ops.combine_sites(history, weights, x=x, gates=gates)
        loop = x
        for s in range(6):
            loop = ops.combine_history(history[s], weights[s], x=loop, gate=gates[s])
        truth = reference.combine_sites(history.double(), weights.double(), x.double(), gates.double())
    assert (got - truth).abs().max() <= (loop - truth).abs().max() + 1e-6


H, W = torch.zeros(4, 3, 2, 6, 8), torch.ones(3)
BAD = [
    ((1, W), {}, TypeError, "history must be a torch.Tensor, got int"),
    ((H[0], W), {}, ValueError, r"history must be \(S, K, B, N, D\), got shape \(3, 2, 6, 8\)"),
    ((H[..., :0], W), {}, ValueError, "history has an empty last dimension"),
    ((H.int(), W), {}, TypeError, "history has dtype torch.int32"),
    ((H[:0], W), {}, ValueError, "history holds S=0 sites"),
    ((H[:, :0], W[:0]), {}, ValueError, "history holds K=0 steps; allowed are 1 to 16"),
    ((torch.zeros(1, 17, 1, 1, 1), torch.ones(17)), {}, ValueError, "history holds K=17 steps"),
    ((H, [1.0]), {}, TypeError, "weights must be a torch.Tensor, got list"),
    ((H, W.half()), {}, TypeError, "weights has dtype torch.float16; it must be float32"),
    ((H, W[:2]), {}, ValueError, r"weights has shape \(2,\); it must be \(3,\) or \(4, 3\) or \(4, 3, 8\)"),
    ((H, torch.ones(3, 4)), {}, ValueError, r"weights has shape \(3, 4\)"),
    ((H, W.to("meta")), {"backend": "reference"}, ValueError, "weights is on meta, history on cpu"),
    ((H, W), {"x": H[0, 0, :1]}, ValueError, r"x has shape \(1, 6, 8\); it must be \(2, 6, 8\)"),
    ((H, W), {"x": H[0, 0].int()}, TypeError, "x has dtype torch.int32"),
    ((H, W), {"gates": torch.zeros(3, 2, 8)}, ValueError, r"gates has shape \(3, 2, 8\); it must be \(4, 2, 8\) or"),
    ((H, W), {"gates": torch.zeros(4, 3, 8)}, ValueError, r"gates has shape \(4, 3, 8\).* a batch of 2 or 1"),
    ((H, W), {"gates": torch.zeros(4, 8)}, ValueError, r"gates has shape \(4, 8\)"),
    ((H, W), {"gates": torch.zeros(4, 2, 4, 8)}, ValueError, "gates has 4 rows a sample .* must divide N=6"),
    ((H, W), {"gates": torch.zeros(4, 2, 8).int()}, TypeError, "gates has dtype torch.int32"),
    ((H, W), {"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
]


@pytest.mark.parametrize(("args", "keywords", "error", "message"), BAD)
def test_bad_input_is_named(args, keywords, error, message):
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            ops.combine_sites(*args, **keywords)


@pytest.mark.parametrize("name", ["history", "weights", "x", "gates"])
def test_gradients_are_refused(name):
    call = {"history": H, "weights": W, "x": H[0, 0], "gates": torch.zeros(4, 2, 8)}
    call[name] = call[name].clone().requires_grad_()
    with pytest.raises(ValueError, match=f"combine_sites has no derivative, but {name} requires grad"):
        ops.combine_sites(call.pop("history"), call.pop("weights"), **call)
