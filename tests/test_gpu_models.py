"""The stage `models` of `make gpu`, at the sizes of its dry run."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"))

import models
import paths  # noqa: F401
import setups
from denoise import SHAPES, build, conditions, denoiser, relative_error, timed, twin
from stage import Context

from benchmarks.caching.meter import Meter

DRY = Context(device="cpu", tiny=True, rounds=1)


def test_items_name_plans_on_known_models() -> None:
    assert set(models.items(DRY)) == set(models.PLANS)
    assert {plan.model for plan in models.PLANS.values()} <= set(SHAPES)
    for plan in models.PLANS.values():
        names = [setup.name for setup in plan.setups]
        assert len(set(names)) == len(names), "a setup would hide another"


@pytest.mark.parametrize("name", ["FLUX 1024 px", "Wan 1.3B 480p"])
def test_random_models_are_alive(name: str) -> None:
    """Blocks change what they are given by a good part of it, and a twin is another module over the same weights."""
    model = build(SHAPES[name].small(), "cpu")
    latents, inputs = conditions(SHAPES[name].small(), "cpu")
    blocks = list(model.blocks if hasattr(model, "blocks") else model.single_transformer_blocks)
    seen = []
    for block in (blocks[0], blocks[-1]):
        block.register_forward_hook(lambda _, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True)
    denoiser(twin(model))(latents, inputs, 1)
    assert len(seen) == 2
    first, last = (args[0] if args else kwargs["hidden_states"] for args, kwargs, _ in seen)
    assert 0.05 < relative_error(last, first) < 50
    assert all(a is b for a, b in zip(model.parameters(), twin(model).parameters(), strict=True))


def test_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setups are timed and ranked; one that fails is said to, and leaves the others."""

    def broken(pipe: object) -> None:
        raise RuntimeError("cannot")

    plan = models.PLANS["Wan 1.3B 480p, sparse"]
    chosen = (models.CUDNN, models.FUSED, setups.ours(setups.TOP), setups.Setup("broken", broken))
    chosen += (setups.Setup("absent", broken, needs="no_such_package"),)
    monkeypatch.setitem(models.PLANS, "some", replace(plan, setups=chosen, steps=2))
    record = models.run("some", DRY)
    rows = record["setups"]
    assert rows["broken"]["failed"] == "RuntimeError: cannot" and rows["absent"]["skipped"] == "no no_such_package"
    assert rows["FusedAdaLN"]["error"] < 2e-2 < 1 and rows["eager"]["error"] == 0
    assert rows["SpargeAttn"]["activity"]["SpargeAttn"]["tiles computed"] > 0
    for name in ("FusedAdaLN", "SpargeAttn"):
        row = rows[name]
        assert row["over_eager"] == rows["eager"]["run_ms"] / row["run_ms"]
        assert row["over_best_peer"] == rows[row["best_peer"]]["run_ms"] / row["run_ms"]
        assert 0 <= row["short_steps"] < 2 == len(row["step_ms"]) and math.isclose(sum(row["step_ms"]), row["run_ms"])
    assert "failed: broken" in record["summary"]
    assert "| broken | | | RuntimeError: cannot |" in models.table({"some": record})
    best = max(("FusedAdaLN", "SpargeAttn"), key=lambda name: rows[name]["over_eager"])
    (target,) = models.targets({"some": record, "other": {"skipped": "no diffusers"}})
    assert target.got == rows[best]["over_best_peer"] and target.what.startswith(f"some: {best} over ")


def test_equal_schedules_compute_equal_steps() -> None:
    """What is compared at one schedule computes as many steps, counted by what torch dispatched."""
    shape, steps = SHAPES["FLUX 1024 px"].small(), 11
    model, (latents, inputs) = build(shape, "cpu"), conditions(shape, "cpu")
    computed: dict[str, dict[str, int]] = {}
    for setup in setups.caches(steps):
        if models._missing(setup.needs):
            continue
        pipe = denoiser(twin(model))
        setup.apply(pipe)
        with Meter(pipe.transformer) as meter:
            timed(pipe, latents, inputs, steps)
        totals = meter.totals()
        computed.setdefault(setup.schedule, {})[setup.name] = totals["calls"] - totals["reduced_calls"]
    for schedule, found in computed.items():
        assert len(set(found.values())) == 1, f"{schedule}: {found}"
    assert set(computed[setups.QUARTER].values()) == {3 + (steps - 3) // 4}
    assert set(computed[setups.HITS].values()) == {1}


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_missing", lambda package: f"no {package}")
    item = models.items(DRY)[0]
    assert models.run(item, DRY)["skipped"] == "no diffusers" and models.warm(item, DRY) == {}


def test_compiled_setups_are_warmed_on_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs that a warm-up compiled serve the model of the item: it compiles none anew."""
    plan = replace(models.PLANS["Wan 1.3B 480p, compiled"], setups=(models.COMPILE, models.FUSED))
    monkeypatch.setitem(models.PLANS, "some", plan)
    torch._dynamo.reset()
    assert set(models.warm("some", DRY)["seconds"]) == {"torch.compile"}
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model = models._weights(plan, DRY)
    pipe, _ = models._prepared(models.COMPILE, model, DRY)
    pipe(*conditions(SHAPES["Wan 1.3B 480p"].small(), "cpu"), 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before > 0
