"""Forecasts that fused blocks add and normalise in one pass, against the same forecasts formed first."""

from __future__ import annotations

import _plain_dit as plain
import pytest
import torch
from _numerics import assert_all_close_to_truth, assert_close_to_truth
from zoo.pipelines import dit

from maskaccel import ops
from maskaccel.methods import FusedAdaLN, TaylorSeer
from maskaccel.models import _parts
from maskaccel.state import History, history
from maskaccel.state.feature import Pending


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _pending(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 6, 16)) -> Pending:
    held = History(3)
    for step in range(4):  # the ring has turned
        held.push(_random(step, *shape).to(dtype), step)
    return Pending(held, [2.0, -1.5, 0.5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("law", ["fp32", "narrow"])
def test_a_forecast_is_added_in_one_pass(law, dtype, monkeypatch):
    a, x = _pending(dtype), _random(9, 2, 6, 16).to(dtype)
    gate, scale, shift = _random(10, 2, 48).to(dtype).chunk(3, 1)
    values = [_random(step, 2, 6, 16).to(dtype).double() for step in (3, 2, 1)]
    wide = sum(w * value for w, value in zip(a.weights, values, strict=True))
    truth = x.double() + gate.double()[:, None] * wide
    norm = {"norm": "layer", "eps": 1e-6, "law": law}
    with torch.no_grad():
        plain_r = ops.gate_residual(x, a.value(), gate, law=law)
        plain_both = ops.gate_residual_norm_modulate(x, a.value(), gate, scale, shift, **norm)
        for name in ("gate_residual", "gate_residual_norm_modulate"):
            monkeypatch.delattr(_parts, name)  # a pass of its own
        monkeypatch.delattr(Pending, "value")
        assert_close_to_truth(_parts.add_gated(x, a, gate, law=law), plain_r, truth)
        h, y = _parts.add_gated_then_norm(x, a, gate, scale, shift, rows=None, gate_table=None, clip=False, **norm)
        normed = ops.norm_modulate(truth, scale.double(), shift.double(), norm="layer", backend="reference")
        assert_all_close_to_truth((h, y), plain_both, (truth, normed))


@pytest.mark.parametrize(
    "options",
    [{"gate_table": _random(1, 16)}, {"clip": True}, {"rows": torch.tensor([0, 1, 2, 2, 1, 0], dtype=torch.int32)},
     {"gate_act": "tanh"}, {"post_norm": "rms"}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_what_the_pass_does_not_do_is_done_apart(options):
    a, x, gate = _pending(), _random(9, 2, 6, 16), _random(10, 3 if "rows" in options else 2, 16)
    with torch.no_grad():
        assert torch.equal(_parts.add_gated(x, a, gate, **options), ops.gate_residual(x, a.value(), gate, **options))
        got = _parts.add_gated_then_norm(x, a, gate, gate, **options)
        assert all(map(torch.equal, got, ops.gate_residual_norm_modulate(x, a.value(), gate, gate, **options)))


def test_another_dtype_or_shape_is_promoted_as_ever():
    a, x = _pending(torch.bfloat16), _random(9, 2, 6, 16)
    with torch.no_grad():
        assert torch.equal(_parts.add_gated(x, a), x + a.value().float())
    assert not _pending(shape=(2, 2, 3, 16)).fits(x)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_reused_block_is_two_passes(dtype, order, monkeypatch):
    """One for attention and one for the MLP, as against the same cache on unfused blocks."""
    model, labels = dit()[0].transformer, torch.tensor([3])
    method = TaylorSeer(interval=3, order=order, first=2, level="module")

    def run(dtype, *more):
        calls = [(x.to(dtype), t) for x, t in plain.inputs(8)]
        return plain.patched(model.to(dtype), [method, *more], calls, labels)

    truth, activity = run(torch.float64)
    unfused, _ = run(dtype)
    passes = {"combine_history": 0, "gate_residual": 0}

    def counted(module, name):
        function = getattr(module, name)

        def call(*args, **kwargs):
            passes[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(_parts, "gate_residual")
    counted(history, "combine_history")
    fused, found = run(dtype, FusedAdaLN())
    assert (found["computed"], found["reused"]) == (activity["computed"], activity["reused"])
    assert_close_to_truth(fused, unfused, truth)
    assert found["reused"] > 0
    assert passes["combine_history"] == (found["reused"] if order else 0)
    blocks_computed = found["computed"] // 2  # each ends with a gate of its own
    assert passes["gate_residual"] == blocks_computed + (0 if order else found["reused"])
