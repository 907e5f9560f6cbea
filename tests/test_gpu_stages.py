"""Stages of `make gpu`: what is wrong or unchecked is not timed, and what is timed keeps its figures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"))

import attention
import cases
import compiling
import correctness
import interleaved
import kernels
import micro
import stages
from pool import INDUCTOR_CACHE
from stage import Context

GOOD = {"state": "ok"}


def context(*checked: str, **more) -> Context:
    """A dry run in which these were found right."""
    return Context("cpu", tiny=True, rounds=1, seeds=1, earlier={"correctness": dict.fromkeys(checked, GOOD)}, **more)


def test_a_wrong_kernel_fails_its_check(monkeypatch):
    """The check of an op sees an error of a hundredth; an op that a build lacks is absent."""
    real = kernels.find("reference", "norm_modulate")
    found = {"reference": lambda *args: real(*args) * 1.01, "cpu": None}
    monkeypatch.setattr(kernels, "find", lambda backend, op: found[backend])
    with pytest.raises(AssertionError, match="norm_modulate seed 0"):
        correctness.run("reference norm_modulate", context())
    assert correctness.run("cpu norm_modulate", context())["state"] == "absent"


def test_what_was_not_checked_is_not_timed():
    """Backends without a good check are named with their reason, beside those that are timed."""
    item = "norm_modulate 2x8x64 (tiny)"
    record = micro.run(item, context("reference norm_modulate"))
    assert record["providers"].keys() == {"reference", "copy", "eager", "compile"}
    assert record["refused"] == {"cpu": "norm_modulate: wrong or not checked"}
    assert record["wrong"] == {} and record["goal"] == 0.92
    assert record["bytes"] == 2 * 2 * 8 * 64 * 2
    row = record["providers"]["reference"]
    assert row["min_ms"] <= row["median_ms"] <= row["max_ms"]
    assert row["of_copy"] == pytest.approx(record["providers"]["copy"]["median_ms"] / row["median_ms"])


def test_a_wrong_result_at_the_measured_size_is_not_timed(monkeypatch):
    """An op with a goal is compared with eager torch, attention with exact attention, at the size that is timed."""
    real = kernels.find("reference", "norm_modulate")
    monkeypatch.setattr(kernels, "find", lambda backend, op: lambda *args: real(*args) * 1.2)
    record = micro.run("norm_modulate 2x8x64 (tiny)", context("reference norm_modulate"))
    assert record["wrong"].keys() == {"reference"} and "reference" not in record["providers"]

    whole = attention.ops.tile_attention

    def swapped(q, k, v, mask=None, **options):
        """With a mask, that of another head."""
        return whole(q, k, v, mask, **options) if mask is None else whole(q, k, v, mask, **options).flip(1)

    monkeypatch.setattr(attention.ops, "tile_attention", swapped)
    both = context("reference tile_attention", "reference tile_attention_backward")
    for direction in ("forward", "backward"):
        record = attention.run(f"256x2x64 {direction}", both)
        assert record["wrong"].keys() == {f"reference {density}" for density in attention.DENSITIES}
        assert {"sdpa", "reference dense"} == record["median_ms"].keys()


def test_distance_sees_what_is_not_a_number_and_what_does_not_pair():
    """Nothing passes for near that is not."""
    one = torch.ones(4)
    assert kernels.distance(one, one) == 0.0
    assert kernels.distance((one, one * 1.1), (one, one)) == pytest.approx(0.1)
    assert not kernels.distance(one * torch.nan, one) <= 1
    assert not kernels.distance(torch.tensor([torch.inf] * 4), one) <= 1
    assert not kernels.distance((one, one), one) <= 1
    assert kernels.distance((one, torch.empty(0)), one) == 0.0


def test_a_budget_leaves_every_stage_time_for_its_first_item():
    """No item is begun with less time left than it usually takes, so a stage's share must be longer."""
    for name, plan in stages.STAGES.items():
        module = stages.load(plan)
        assert plan.seconds >= min(stages.expected(module), module.SECONDS) + 15, name


def test_every_op_with_a_goal_has_the_shapes_of_models():
    """Five models, forward, and backward where there is one; those with goals come first."""
    with_goals = [case for case in cases.all_cases(False).values() if case.goal is not None]
    assert list(cases.all_cases(False).values())[: len(with_goals)] == with_goals
    forward = {"norm_modulate", "gate_residual_norm_modulate", "qk_norm_rope", *cases.MOVERS}
    shapes = {(case.op, case.shape[-1]) for case in with_goals if case.graph is None}
    assert {op for op, _ in shapes} == forward
    for op in forward - {"qk_norm_rope", "write_kv_rows"}:
        assert {width for name, width in shapes if name == op} == {3072, 1536, 5120, 2432}
    assert all(case.goal == 0.85 for case in with_goals if case.op.startswith(("norm_", "gate_")) and case.graph)


def test_rounds_are_interleaved():
    """Every call once a round; who is first, and who runs after whom, changes."""
    order: list[str] = []
    measures = {name: (lambda name=name: order.append(name) or float(len(order))) for name in "abc"}
    found = interleaved.samples(measures, 6)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(round_) == ["a", "b", "c"] for round_ in rounds)
    assert {round_[0] for round_ in rounds} == set("abc") and {"ab", "ba"} <= {round_[:2] for round_ in rounds}
    assert {name: len(values) for name, values in found.items()} == {"a": 6, "b": 6, "c": 6}
    assert interleaved.medians({"a": iter([5.0, 1.0, 2.0]).__next__}, 3) == {"a": 2.0}


def test_compiling_forgets_which_configuration_was_fastest(tmp_path, monkeypatch):
    """What was compiled stays; choices made while other processes were on the device go."""
    monkeypatch.setenv(INDUCTOR_CACHE, str(tmp_path))
    (tmp_path / "ab").mkdir()
    for name in ("a.best_config", "a.py"):
        (tmp_path / "ab" / name).touch()
    compiling.finish()
    assert [path.name for path in (tmp_path / "ab").iterdir()] == ["a.py"]
    pending = {"micro": ["x", "y"], "tokens": ["z"]}
    assert compiling.items(context(pending=pending)) == ["micro x", "micro y"]
    found = compiling.run("micro nothing of this name", context())
    assert found["summary"].startswith("not compiled: KeyError")
