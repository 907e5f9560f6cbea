"""Calibrations: what is measured against plain torch, files that are checked, and methods that use them."""

from __future__ import annotations

import functools
import itertools
import json

import _plain_dit as plain
import pytest
import torch
from test_ddt import LABELS, DDTModel, calls
from torch import nn
from torch.nn.functional import cosine_similarity
from zoo.common import made
from zoo.pipelines import MORE_PIPELINES, PIPELINES, dit, sample

import maskaccel
from maskaccel.calibration import Calibration, measure
from maskaccel.calibration.teacache import fit
from maskaccel.masks.dynamic import Dynamic
from maskaccel.masks.schedule import render
from maskaccel.methods import DDT, SCM, DPCache, MagCache, TeaCache
from maskaccel.models import Decoupled

STEPS = 7


@functools.cache
def built(name):
    return (PIPELINES | MORE_PIPELINES)[name]()


def measured(model, kind, steps=STEPS, batch=2, runs=(0,), **options):
    labels = torch.tensor([3, 5][:batch])
    with torch.no_grad(), measure(model, kind, **options) as found:
        for seed in runs:
            with found.generation(steps) as run:
                for x, t in plain.inputs(steps, batch, seed):
                    model(x, timestep=t, class_labels=labels)
                    run.step()
    return found.result()


@torch.no_grad()
def changes(model, steps=STEPS, batch=2, seed=0, count=None):
    """What the first blocks add at each step, `(steps, batch, tokens, D)`."""
    out, labels = [], torch.tensor([3, 5][:batch])
    for x, t in plain.inputs(steps, batch, seed):
        hidden = model.pos_embed(x)
        out.append(plain.blocks(model, hidden, t, labels, slice(0, count)) - hidden)
    return torch.stack(out).double()


def test_magnitudes():
    model, ratios = dit()[0].transformer, []
    for seed in (0, 9):
        norms = changes(model, seed=seed).norm(dim=-1).flatten(1)
        ratios.append((norms[1:] / norms[:-1]).mean(1))
    want = torch.stack(ratios).mean(0)
    found = measured(model, "magnitudes", runs=(0, 9))
    assert (found.kind, found.model, found.blocks, found.steps) == ("magnitudes", "DiTTransformer2DModel", 2, STEPS)
    assert found["ratios"][0] == 1 and want.std() > 1e-3
    torch.testing.assert_close(torch.tensor(found["ratios"][1:], dtype=torch.float64), want, rtol=1e-4, atol=1e-6)


def cosine_distances(features):
    """`1 - mean cos` of each pair, one by one."""
    pairs = [[cosine_similarity(a, b, dim=-1).mean() for b in features] for a in features]
    return 1 - torch.tensor(pairs, dtype=torch.float64)


@pytest.mark.parametrize(("encoder", "count"), [("all", 2), (1, 1), (None, 1)])
def test_distances_of_blocks(encoder, count):
    model = dit()[0].transformer
    found = measured(model, "distances", encoder=encoder)
    want = cosine_distances(changes(model, count=count))
    assert found["encoder"] == count and want.max() > 1e-3
    torch.testing.assert_close(torch.tensor(found["distances"], dtype=torch.float64), want, rtol=1e-4, atol=2e-7)


def test_distances_of_some_tokens():
    model = dit()[0].transformer
    found = measured(model, "distances", encoder="all", tokens=4)
    want = cosine_distances(changes(model)[:, :, ::4])
    torch.testing.assert_close(torch.tensor(found["distances"], dtype=torch.float64), want, rtol=1e-4, atol=2e-7)


def test_distances_of_a_state_and_of_a_module():
    model = made(DDTModel)
    with torch.no_grad(), measure(model, "distances") as found, found.generation(STEPS) as run:
        for x, t in calls(STEPS):
            model(x, t, LABELS)
            run.step()
    with torch.no_grad():
        want = cosine_distances([model.encode(x, t, LABELS).double() for x, t in calls(STEPS)])
    result = found.result()
    assert result["encoder"] == "s" and result.blocks == 5
    torch.testing.assert_close(torch.tensor(result["distances"], dtype=torch.float64), want, rtol=1e-4, atol=2e-7)
    assert DDT(result).rule_for(model).plan(STEPS)

    class Add(nn.Module):
        def forward(self, z, x):
            return x[..., :2] + z

    class Turn(nn.Module):
        def forward(self, x):
            return torch.stack([x, x.square()], -1)[:, :, 0]

    pair = Decoupled(Turn(), Add())
    xs = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with torch.no_grad(), measure(pair, "distances") as found, found.generation(3) as run:
        for x in xs:
            pair(x)
            run.step()
    # `(2, 3, 2)`: the encoder's output, whatever its width
    want = cosine_distances([pair.encoder(x).double() for x in xs])
    assert found.result()["encoder"] == "encoder"
    torch.testing.assert_close(torch.tensor(found.result()["distances"], dtype=torch.float64), want)


def test_the_mean_is_over_guidance_branches_by_name():
    """Each of the two calls of a step is compared with its own like."""
    model = built("wan")[0].transformer

    def table(branches):
        with torch.no_grad(), measure(model, "distances", encoder=1) as found, found.generation(4) as run:
            for i in range(4):
                for branch in branches:
                    x = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(7)) * (1 + 0.3 * i)
                    text = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(len(branch)))
                    with model.cache_context(branch):
                        model(x, timestep=torch.tensor([900 - 200 * i]), encoder_hidden_states=text)
                run.step()
        return torch.tensor(found.result()["distances"])

    both, cond, uncond = table(["cond", "uncond"]), table(["cond"]), table(["uncond"])
    assert not torch.allclose(cond, uncond, rtol=1e-3)
    torch.testing.assert_close(both, (cond + uncond) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("degree", [1, 3])
def test_the_points_of_teacache(degree):
    model, labels = dit()[0].transformer, torch.tensor([3, 5])
    norm, features, outputs = model.transformer_blocks[0].norm1, [], []
    with torch.no_grad():
        for x, t in plain.inputs(STEPS, 2):
            hidden = model.pos_embed(x)
            features.append(norm(hidden, t, labels, hidden_dtype=x.dtype)[0].double())
            outputs.append(model(x, timestep=t, class_labels=labels).sample.double())

    def moved(values):
        return [((b[i] - a[i]).abs().mean() / a[i].abs().mean()).item() for a, b in itertools.pairwise(values)
                for i in range(2)]  # fmt: skip

    with torch.no_grad(), measure(model, "teacache", degree=degree) as found, found.generation(STEPS) as run:
        for x, t in plain.inputs(STEPS, 2):
            model(x, timestep=t, class_labels=labels)
            run.step()
    points = torch.tensor(found.probe.points, dtype=torch.float64)
    want = torch.tensor([moved(features), moved(outputs)], dtype=torch.float64).T
    torch.testing.assert_close(points, want, rtol=1e-3, atol=1e-6)
    result = found.result()
    polynomial = torch.tensor(result["polynomial"], dtype=torch.float64)
    vandermonde = points[:, :1] ** torch.arange(degree, -1, -1)
    residual = vandermonde @ polynomial - points[:, 1]
    assert result["error"] == pytest.approx(residual.square().mean().sqrt().item(), rel=1e-6)
    # Normal equations: no polynomial of the degree is nearer.
    slack = vandermonde.T @ residual
    assert slack.abs().max() < 1e-9 * (vandermonde.abs().T @ points[:, 1].abs()).max()


def test_a_fit_finds_the_polynomial_that_made_the_points():
    polynomial = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
    points = [(x, sum(c * x**k for k, c in enumerate(reversed(polynomial)))) for x in torch.linspace(0.01, 0.2, 40)]
    found, error = fit([(float(x), float(y)) for x, y in points], 4)
    assert found == pytest.approx(polynomial, rel=1e-2) and error < 1e-6


# ------------------------------------------------------------------------------------------------ pipelines
@pytest.mark.parametrize("kind", ["distances", "magnitudes", "teacache"])
@pytest.mark.parametrize("name", ["dit", "flux", "sd3", "wan"])
def test_pipelines_are_measured_unchanged_and_their_calibration_is_used(name, kind, tmp_path):
    pipeline, kwargs = built(name)
    expected = sample(pipeline, kwargs, steps=STEPS)
    options = {"degree": 2} if kind == "teacache" else {}
    with measure(pipeline, kind, **options) as found:
        assert torch.equal(sample(pipeline, kwargs, steps=STEPS), expected)
    assert not any("forward" in module.__dict__ for module in pipeline.transformer.modules())
    found.result().save(path := tmp_path / "found.json")
    assert Calibration.load(path, kind, type(pipeline.transformer).__name__) == found.result()
    method = {
        "distances": lambda: DDT(str(path)),
        "magnitudes": lambda: MagCache(ratios=path, threshold=9.0),
        "teacache": lambda: TeaCache(1e9, path),
    }[kind]()
    with maskaccel.patch(pipeline, method) as patch:
        sample(pipeline, kwargs, steps=STEPS)
        assert patch.report().activity[method.name]["reused"] > 0
    if kind == "distances":
        table = found.result()["distances"]
        assert len(table) == STEPS and all(table[i][i] == 0 for i in range(STEPS))


def test_a_dynamic_schedule_for_all_blocks():
    pipeline, kwargs = built("dit")
    with measure(pipeline, "distances", encoder="all") as found:
        sample(pipeline, kwargs, steps=STEPS)
    rule = Dynamic(found.result()["distances"], refresh=2)
    with maskaccel.patch(pipeline, SCM(rule)) as patch:
        sample(pipeline, kwargs, steps=STEPS)
        assert patch.report().activity["SCM"]["steps"] == render(rule.plan(STEPS))


# ------------------------------------------------------------------------------------------------ refusals
def test_runs_that_do_not_make_a_calibration():
    pipeline, kwargs = built("dit")
    with measure(pipeline, "magnitudes") as found, pytest.raises(ValueError, match="nothing was measured"):
        found.result()
    with measure(pipeline, "magnitudes") as found:
        sample(pipeline, kwargs, steps=4)
        with pytest.raises(ValueError, match="this run has 5 steps, the one before had 4"):
            sample(pipeline, kwargs, steps=5)
    with measure(pipeline, "teacache") as found:
        sample(pipeline, kwargs, steps=2)
        with pytest.raises(ValueError, match=r"a polynomial of degree 4 needs more than 4: measure more steps"):
            found.result()
    late, more = built("flux_img2img")
    with measure(late, "distances"), pytest.raises(ValueError, match="leaves out the first steps"):
        sample(late, more)
    model = dit()[0].transformer
    unknown = pytest.raises(ValueError, match="number of steps is not known")
    with torch.no_grad(), measure(model, "magnitudes") as found, found.generation(), unknown:
        model(torch.ones(1, 4, 8, 8), timestep=torch.ones(1), class_labels=torch.tensor([1]))
    with pytest.raises(RuntimeError, match="inside `with measure"):
        found.generation(3)


def test_one_of_two_transformers_is_named_and_has_to_run_always():
    pipeline, kwargs = built("wan22")
    with pytest.raises(maskaccel.PatchError, match=r"two transformers.*say which one to measure"):
        measure(pipeline, "magnitudes").__enter__()
    with measure(pipeline, "magnitudes", model=pipeline.transformer_2) as found:
        sample(pipeline, kwargs, steps=8)
    with pytest.raises(ValueError, match=r"did not run at 4 of 8 steps \(the first is step 0\)"):
        found.result()
    assert not any("forward" in m.__dict__ for m in pipeline.transformer.modules())


def test_a_model_of_the_class_with_other_blocks_is_another_model():
    model = dit()[0].transformer
    table = [[0.0, 1.0], [1.0, 0.0]]
    values = {"magnitudes": {"ratios": [1.0, 1.0]}, "distances": {"distances": table, "encoder": 1},
              "products": {"products": table}, "teacache": {"polynomial": [1.0], "tap": "modulated"}}  # fmt: skip
    for blocks in (2, 3):
        found = {k: Calibration.make(k, "DiTTransformer2DModel", blocks, 2, v) for k, v in values.items()}
        for method in (MagCache(ratios=found["magnitudes"]), DDT(found["distances"]), DPCache(found["products"]),
                       TeaCache(polynomial=found["teacache"])):  # fmt: skip
            if blocks == 2:
                maskaccel.patch(model, method).remove()
                continue
            with pytest.raises(maskaccel.PatchError, match="Model of 3 blocks; this one has 2"):
                maskaccel.patch(model, method)


def test_unknown_kinds_options_and_models():
    model = dit()[0].transformer
    with pytest.raises(ValueError, match="kind='mood'; allowed are 'distances', 'hyca', 'magnitudes'"):
        measure(model, "mood")
    with pytest.raises(ValueError, match="size=3 is no option of kind 'distances'; it has encoder, tokens"):
        measure(model, "distances", size=3)
    for kind, options, message in [
        ("distances", {"tokens": 0}, "tokens=0"), ("distances", {"encoder": 0}, "encoder=0"),
        ("teacache", {"tap": "x"}, "tap='x'"), ("teacache", {"degree": 0}, "degree=0"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            measure(model, kind, **options)
    with pytest.raises(maskaccel.PatchError, match=r"cannot be measured: .*no module named 'enc'"):
        measure(model, "distances", encoder="enc").__enter__()
    with maskaccel.patch(model, SCM()), pytest.raises(maskaccel.PatchError, match="already patched"):
        measure(model, "magnitudes").__enter__()
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2; this library reads version 1"),
        ({"format": "recipe"}, "is no calibration"),
        ({"model": "FluxTransformer2DModel"}, "made with FluxTransformer2DModel; the model is a Dit"),
        ({"kind": "teacache"}, "is of kind 'teacache'; needed is 'magnitudes'"),
        ({"steps": 3}, "no whole calibration of kind 'magnitudes': ratios must be a list of 3 numbers"),
        ({"values": {}}, "ratios must be a list of 2"),
        ({"values": {"ratios": [1.0, -1.0]}}, "ratios must be positive"),
        ({"values": {"ratios": [1.0, None]}}, "ratios holds None"),
        ({"blocks": 0}, "blocks=0 must be 1 or more"),
        ({"blocks": "two"}, "blocks='two' must be of type int"),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, message):
    good = Calibration.make("magnitudes", "Dit", 2, 2, {"ratios": [1.0, 0.9]})
    good.save(path := tmp_path / "file.json")
    assert Calibration.load(path, "magnitudes", "Dit") == good
    path.write_text(json.dumps(good.as_dict() | change))
    with pytest.raises(ValueError, match=message):
        Calibration.load(path, "magnitudes", "Dit")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("distances", {"distances": [[0.0, 1.0], [1.0]], "encoder": 1}, "square matrix"),
        ("distances", {"distances": [[0.0, 1.0]], "encoder": 1}, "2 rows"),
        ("distances", {"distances": [[0.0, 1.0], ["a", 0.0]], "encoder": 1}, "hold numbers"),
        ("distances", {"distances": [[0.0, 1.0], [1.0, 0.0]]}, "encoder=None"),
        ("teacache", {"polynomial": [], "tap": "time"}, "polynomial must be a list"),
        ("teacache", {"polynomial": ["x"], "tap": "time"}, "hold numbers"),
        ("teacache", {"polynomial": [1.0], "tap": "ear"}, "tap='ear'"),
    ],
)
def test_values_that_do_not_fit(kind, values, message):
    with pytest.raises(ValueError, match=message):
        Calibration.make(kind, "Dit", 2, 2, values).checked(kind)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MagCache(ratios="fluxx"), ValueError, "ratios='fluxx' is no file; allowed names are 'flux'"),
        (lambda: TeaCache(polynomial="wan"), ValueError, "polynomial='wan' is no file; allowed names are 'flux'"),
        (lambda: DDT("even"), ValueError, "schedule='even' is no file; allowed names are 'uniform'"),
        (lambda: MagCache(ratios=1.0), TypeError, "ratios=1.0 must be a Calibration of kind 'magnitudes' or the path"),
        (lambda: DDT(3), TypeError, "schedule=3 must be a Calibration of kind 'distances' or the path"),
        (lambda: DPCache(None), TypeError, "calibration=None must be a Calibration or the path"),
        (lambda: maskaccel.patch(dit()[0].transformer, DPCache("no.json")), maskaccel.PatchError, "no.json is no file"),
    ],
)
def test_what_is_no_calibration(make, error, message):
    with pytest.raises(error, match=message):
        make()
