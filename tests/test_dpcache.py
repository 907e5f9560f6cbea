"""DPCache: its paths against every possible one, its calibration and its outputs against plain torch."""

from __future__ import annotations

import itertools

import _plain_dit as plain
import pytest
import torch
from test_calibration import changes, measured
from zoo.pipelines import dit, sample

import maskaccel
from maskaccel.calibration import Calibration
from maskaccel.masks.paths import Paths, best_path
from maskaccel.masks.schedule import render
from maskaccel.methods import DPCache, FusedAdaLN
from maskaccel.state import Hold, Newton, Taylor

STEPS = 7


def features(steps, seed=0):
    """A smooth path with a bend, so that neither even nor held steps are best."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    at = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None]
    parts = torch.cat([torch.ones_like(at), at, (6 * at**2).sin(), (12 * at**3).cos()], 1)
    return parts @ waves


def loss_of(path, values, order):
    """Sum over the steps left out of the norm of the forecast's error, from the values themselves."""
    total = 0.0
    for t in range(len(values)):
        held = [s for s in path if s <= t]
        if held[-1] == t:
            continue
        forecast = values[held[-1]]
        if order == 1 and len(held) > 1:
            b, a = held[-1], held[-2]
            forecast = values[b] + (t - b) / (b - a) * (values[b] - values[a])
        total += (forecast - values[t]).norm().item()
    return total


def products(values):
    return tuple(map(tuple, (values @ values.T).tolist()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("forecaster", "order"), [(Hold(), 0), (Newton(1), 1), (Taylor(1), 1)])
def test_no_path_is_better(forecaster, order, seed):
    values = features(9, seed)
    for count in (1, 2, 3, 5, 8, 9):
        found, loss = best_path(products(values), count, forecaster)
        every = [(0, *rest) for rest in itertools.combinations(range(1, 9), count - 1)]
        least = min(loss_of(path, values, order) for path in every)
        assert found[0] == 0 and len(found) == count and found == sorted(set(found))
        assert loss == pytest.approx(least, rel=1e-6, abs=1e-6)
        assert loss_of(found, values, order) == pytest.approx(least, rel=1e-6, abs=1e-6)


def test_the_plan_is_the_best_path_and_scales_with_the_steps():
    rule = Paths(products(features(12)), refresh=3)
    assert rule.plan(12).count("compute") == 4
    path = best_path(rule.products, 4, Newton())[0]
    assert [i for i, action in enumerate(rule.plan(12)) if action == "compute"] == path
    assert path != [0, 3, 6, 9]
    assert rule.plan(24).count("compute") == 8 and rule.plan(1) == ["compute"] and rule.plan(2)[0] == "compute"
    assert Paths(rule.products, refresh=1).plan(12) == ["compute"] * 12


def test_products_of_a_run():
    model, total = dit()[0].transformer, 0
    for seed in (0, 9):
        flat = changes(model, seed=seed).flatten(1)
        total = total + flat @ flat.T
    want = total / total.diagonal().mean()
    found = measured(model, "products", runs=(0, 9))
    assert (found.kind, found.model, found.blocks, found.steps) == ("products", "DiTTransformer2DModel", 2, STEPS)
    torch.testing.assert_close(torch.tensor(found["products"], dtype=torch.float64), want, rtol=1e-5, atol=1e-6)


def test_outputs_against_a_plain_loop(tmp_path):
    model, labels = dit()[0].transformer, torch.tensor([3, 5])
    calibration = measured(model, "products")
    calibration.save(tmp_path / "products.json")
    method = DPCache(tmp_path / "products.json", refresh=2)
    path = best_path(calibration["products"], 3, Newton())[0]
    inputs, stored, want = list(plain.inputs(STEPS, 2, 4)), [], []
    with torch.no_grad():
        for step, (x, t) in enumerate(inputs):
            hidden = model.pos_embed(x)
            if step in path:
                out = plain.blocks(model, hidden, t, labels)
                stored = [(step, out - hidden), *stored][:2]
            else:
                change = stored[0][1]
                if len(stored) > 1:
                    (b, new), (a, old) = stored
                    change = new + (step - b) / (b - a) * (new - old)
                out = hidden + change
            want.append(plain.head(model, out, t, labels))
        got = []
        with maskaccel.patch(model, method) as patch, patch.generation(STEPS) as run:
            for x, t in inputs:
                got.append(model(x, timestep=t, class_labels=labels).sample)
                run.step()
            assert patch.report().activity["DPCache"]["reused"] == STEPS - 3
    torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-4, atol=1e-5)


def test_in_a_pipeline_and_undone():
    pipeline, kwargs = dit()
    before = sample(pipeline, kwargs)
    model = pipeline.transformer
    with maskaccel.patch(pipeline, [DPCache(measured(model, "products"), refresh=2), FusedAdaLN()]) as patch:
        during = sample(pipeline, kwargs)
        found = patch.report().activity["DPCache"]
        assert found["reused"] > 0 and found["peak bytes"] > 0
    assert not torch.equal(during, before)
    assert torch.equal(sample(pipeline, kwargs), before)


def test_what_is_refused(tmp_path):
    square = products(features(4))
    for make, match in (
        (lambda: DPCache("x.json", refresh=0.5), "refresh=0.5"),
        (lambda: DPCache("x.json", forecaster=Newton(2)), "uses 3 values"),
        (lambda: Paths(square[:3]), "square matrix"),
        (lambda: Paths(((float("nan"),),)), "finite numbers"),
        (lambda: best_path(square, 5, Newton()), "count=5 must be 1 to 4"),
        (lambda: Calibration.make("products", "A", 2, 3, {"products": [[1.0]]}).checked("products"), "3 rows"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    model = dit()[0].transformer
    for calibration, match in (
        (Calibration.make("products", "Another", 2, 1, {"products": [[1.0]]}), "made with Another"),
        (Calibration.make("magnitudes", "DiTTransformer2DModel", 2, 1, {"ratios": [1.0]}), "kind 'magnitudes'"),
    ):
        with pytest.raises(maskaccel.PatchError, match=match):
            maskaccel.patch(model, DPCache(calibration))
    assert render(Paths(square, refresh=2).plan(4)).count("C") == 2
