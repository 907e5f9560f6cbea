"""HyCa and its calibration, against plain torch and numpy, and on real pipelines."""

from __future__ import annotations

import functools
import random

import _plain_dit as plain
import numpy as np
import pytest
import test_cache_gates as gates
import torch
from zoo.pipelines import MORE_PIPELINES, PIPELINES, dit, sample

import maskaccel
from maskaccel.calibration import Calibration, measure
from maskaccel.calibration.channels import choose, descriptors, forecasts, sums
from maskaccel.masks import Schedule
from maskaccel.methods import FusedAdaLN, HyCa
from maskaccel.state import History, PerChannel
from maskaccel.state.forecast_channels import SOLVERS

STEPS = 10
NAMES = tuple(SOLVERS)


@functools.cache
def built(name):
    pipeline, kwargs = (PIPELINES | MORE_PIPELINES)[name]()
    return pipeline, kwargs, sample(pipeline, kwargs, steps=STEPS)


@functools.cache
def calibrated(name, level="stack"):
    pipeline, kwargs, expected = built(name)
    with measure(pipeline, "hyca", level=level, interval=3, first=2) as found:
        assert torch.equal(sample(pipeline, kwargs, steps=STEPS), expected), "measuring changed the model"
    assert not any("forward" in module.__dict__ for module in pipeline.transformer.modules())
    return found.result()


@pytest.fixture(params=["dit", "flux", "wan", "sd3"])
def name(request):
    return request.param


# ------------------------------------------------------------------------------------------------ on pipelines
@pytest.mark.filterwarnings("ignore:HyCa can never reuse")
def test_computing_always_is_the_unpatched_pipeline(name):
    pipeline, kwargs, plain_ = built(name)
    with maskaccel.patch(pipeline, HyCa(calibrated(name), interval=1)) as patch:
        assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain_)
        assert patch.report().activity["HyCa"]["reused"] == 0
    assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain_), "remove() did not restore the pipeline"


@pytest.mark.parametrize("level", ["stack", "block"])
def test_runs_repeat_and_fused_blocks_agree(name, level, tmp_path):
    pipeline, kwargs, plain_ = built(name)
    calibrated(name, level).save(path := tmp_path / "hyca.json")
    method, outs = HyCa(path, interval=3, first=2), []
    for methods in ([method], [method, FusedAdaLN()]):
        with maskaccel.patch(pipeline, methods) as patch:
            outs.append(sample(pipeline, kwargs, steps=STEPS))
            activity = patch.report().activity["HyCa"]
            assert activity["reused"] > 0 and activity["bytes held"] == 0 < activity["peak bytes"]
            assert sum(int(part.split()[0]) for part in activity["channels"].split(", ")) % 32 == 0
            assert torch.equal(outs[-1], sample(pipeline, kwargs, steps=STEPS)), "two runs of one seed differ"
    assert not torch.equal(outs[0], plain_)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-3, atol=1e-3 * plain_.abs().max().item())


GATES = {
    "test_a_run_after_an_exception_equals_one_without": "wan",
    "test_branches_are_told_apart_by_name_not_by_order": "wan",
    "test_batched_and_sequential_guidance_agree": "dit",
    "test_another_resolution_within_a_run_starts_anew_and_says_so": "dit",
    "test_two_transformers_of_one_pipeline": "wan",
}


@pytest.mark.parametrize("gate", GATES)
def test_the_gates_of_caching(gate):
    getattr(gates, gate)(HyCa(calibrated(GATES[gate]), interval=3, first=2))


def test_compiled_blocks_make_their_graphs_once():
    pipeline, kwargs = dit()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with maskaccel.patch(pipeline, [HyCa(calibrated("dit"), interval=3, first=2), FusedAdaLN()]):
        expected = sample(pipeline, kwargs)
        for block in pipeline.transformer.transformer_blocks:
            block.compile(backend=backend)
        torch.testing.assert_close(sample(pipeline, kwargs), expected, rtol=1e-5, atol=1e-5)
        count = len(graphs)
        sample(pipeline, kwargs, steps=9)
        assert len(graphs) == count > 0, "a step compiled something again"


# ------------------------------------------------------------------------------------------------ the forecast
def solved(solver, stamps, values, target):
    """One solver on values `(K, ...)`, newest first, in fp64: each by its own definition."""
    s, f = [float(x) for x in stamps], [v.double() for v in values]
    h, g = target - s[0], s[0] - s[1]
    slope, line = (f[0] - f[1]) / g, f[0] + h * (f[0] - f[1]) / g
    if solver == "hold":
        return f[0]
    if solver == "damped":
        return (f[0] + line) / 2
    if solver == "taylor1":
        return line
    before = (f[1] - f[2]) / (s[1] - s[2])
    if solver == "taylor2":
        return line + (slope - before) / g * h**2 / 2
    if solver == "bdf2":
        # The parabola through (s1, F1), (s0, F0), (target, F) has this slope at the target: solve for F.
        at = np.polynomial.Polynomial
        rows = []
        for i, node in enumerate((target, s[0], s[1])):
            basis = at([1.0])
            for j, other in enumerate((target, s[0], s[1])):
                if i != j:
                    basis = basis * at([-other, 1.0]) / (node - other)
            rows.append(basis.deriv()(target))
        return (slope - rows[1] * f[0] - rows[2] * f[1]) / rows[0]
    if solver == "ab2":
        # The integral from s0 to the target of the line through the slopes.
        grid = np.linspace(s[0], target, 3)
        parts = [slope + (slope - before) / g * (x - s[0]) for x in grid]
        return f[0] + torch.trapezoid(torch.stack(parts), torch.from_numpy(grid), dim=0)
    vandermonde = torch.tensor([[x**2, x, 1.0] for x in s[:3]], dtype=torch.float64)
    coefficients = torch.linalg.solve(vandermonde, torch.stack(f[:3]).flatten(1))
    return (torch.tensor([target**2, target, 1.0], dtype=torch.float64) @ coefficients).reshape(f[0].shape)


@pytest.mark.parametrize("stamps", [(5, 4, 3), (12, 6, 0), (9, 4, 2)])
def test_weights_of_each_channel(stamps):
    width, ahead = 21, 3
    rng = random.Random(0)
    channels = tuple(rng.randrange(len(NAMES)) for _ in range(width))
    history = History(3)
    for i, stamp in enumerate(stamps[::-1]):
        history.push(torch.randn(2, 5, width, generator=torch.Generator().manual_seed(i)), stamp)
    values = [torch.randn(2, 5, width, generator=torch.Generator().manual_seed(2 - i)) for i in range(3)]
    forecaster = PerChannel(NAMES, channels)
    assert forecaster.capacity == 3
    weights = forecaster.weights(history.stamps, stamps[0] + ahead, history)
    assert weights.shape == (3, width)
    x = torch.randn(2, 5, width)
    got = history.combine(weights, x=x)
    want = [solved(NAMES[c], stamps, [v[..., d] for v in values], stamps[0] + ahead) for d, c in enumerate(channels)]
    torch.testing.assert_close(got.double(), x + torch.stack(want, -1), rtol=1e-5, atol=1e-4)


def test_channels_of_one_solver_take_one_list_of_weights():
    forecaster = PerChannel(NAMES, (NAMES.index("newton2"),) * 4)
    assert forecaster.weights((5, 3, 2), 7) == SOLVERS["newton2"].weights((5, 3, 2), 7)
    assert PerChannel(NAMES, (0, 0)).capacity == 1 and PerChannel(NAMES, (0, 2)).capacity == 2


@pytest.mark.parametrize("level", ["stack", "block"])
def test_the_method_written_out(level):
    model, labels, calls = dit()[0].transformer, torch.tensor([3, 5]), plain.inputs(11, batch=2)
    rng, interval, first = random.Random(1), 4, 3
    parts = [[0, 1]] if level == "stack" else [[0], [1]]
    channels = ["".join(str(rng.randrange(len(NAMES))) for _ in range(32)) for _ in parts]
    values = {"level": level, "interval": 4, "first": 3, "solvers": list(NAMES), "channels": channels}
    calibration = Calibration.make("hyca", "DiTTransformer2DModel", 2, 11, values)
    kept, outs = [[] for _ in parts], []
    with torch.no_grad():
        for step, (x, t) in enumerate(calls):
            hidden = model.pos_embed(x)
            for part, digits, history in zip(parts, channels, kept, strict=True):
                if step < first or (step - first + 1) % interval == 0:
                    out = plain.blocks(model, hidden, t, labels, slice(part[0], part[-1] + 1))
                    history.insert(0, (step, out - hidden))
                else:
                    stamps, held = zip(*history[:3], strict=True)
                    each = [
                        solved(NAMES[int(c)], stamps, [h[..., d] for h in held], step) for d, c in enumerate(digits)
                    ]
                    out = hidden + torch.stack(each, -1).float()
                hidden = out
            outs.append(plain.head(model, hidden, t, labels))
    got, activity = plain.patched(model, HyCa(calibration, interval, first), calls, labels)
    assert activity["reused"] == 6 * len(parts)
    torch.testing.assert_close(got, torch.stack(outs), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ the calibration
def moving(steps=24, tokens=16, each=10):
    """Channels of three kinds: parabolas, lines, and noise around a level."""
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(steps, dtype=torch.float64)[:, None, None]
    a, b, c = (torch.randn(1, tokens, each, generator=generator, dtype=torch.float64) for _ in range(3))
    noise = torch.randn(steps, tokens, each, generator=generator, dtype=torch.float64)
    return torch.cat([a * t**2 / 20 + b * t / 10 + c, 3 + b * t + 1e-3 * noise, 1 + c + noise], -1)


@pytest.mark.parametrize("interval", [1, 3])
def test_channels_that_move_alike_get_the_solver_that_suits_them(interval):
    series = moving()
    found = sums(series, Schedule(interval=interval, first=3, origin=2))
    chosen = [NAMES[i] for i in choose(found[: -len(NAMES)], found[-len(NAMES) :], 3).tolist()]
    assert chosen[:10] == ["newton2"] * 10 and set(chosen[10:20]) == {"taylor1"}
    assert set(chosen[20:]) <= {"hold"}
    one = choose(found[: -len(NAMES)], found[-len(NAMES) :], 1)
    best = found[-len(NAMES) :].sum(1).argmin()
    assert (one == best).all()


def test_sums_and_descriptors_written_out():
    series, schedule = moving(steps=13, tokens=4, each=3), Schedule(interval=4, first=3, origin=2)
    found, names, rows = sums(series, schedule), list(NAMES), []
    f = series.numpy()
    steps, _, width = f.shape
    computed = [s for s in range(steps) if s < 3 or (s - 2) % 4 == 0]
    for d in range(width):
        want = [(np.diff(f[..., d], n=n, axis=0) ** 2).mean(0).sum() for n in range(4)]
        assert np.allclose(found[:4, d].numpy(), want, rtol=1e-9)
        centred = f[..., d] - f[..., d].mean(0)
        waves = np.exp(-2j * np.pi * np.outer(np.arange(1, steps // 2 + 1), np.arange(steps)) / steps)
        power = (abs(waves @ centred) ** 2).sum(1)
        assert np.allclose(found[4 : 4 + len(power), d].numpy(), power, rtol=1e-9)
        for row, solver in enumerate(names):
            error = 0.0
            for target in range(steps):
                past = [s for s in computed if s < target][::-1][:3]
                if target not in computed:
                    values = [series[s, :, d] for s in past]
                    error += (solved(solver, past, values, target) - series[target, :, d]).square().sum().item()
            assert found[len(found) - len(names) + row, d].item() == pytest.approx(error, rel=1e-5, abs=1e-9)
        v, a, j = want[1:]
        raw = [np.log(want[0]) / 2, np.log(v) / 2, np.log(a) / 2, np.log(a / v) / 2, np.log(j / a) / 2]
        raw.append(np.exp(np.log(power).mean()) / power.mean())
        rows.append(raw)
    want = (np.array(rows) - np.mean(rows, 0)) / np.std(rows, 0)
    torch.testing.assert_close(descriptors(found[: -len(names)]), torch.from_numpy(want), rtol=1e-6, atol=1e-8)
    assert [t for t, _ in forecasts(13, schedule)] == [3, 4, 5, 7, 8, 9, 11, 12]
    assert forecasts(5, Schedule(interval=1, first=2)) == [(2, (1, 0)), (3, (2, 1, 0)), (4, (3, 2, 1, 0))]


@pytest.mark.parametrize(("level", "tokens"), [("stack", None), ("block", 4)])
def test_what_is_measured_is_what_the_blocks_add(level, tokens):
    model, labels, calls = dit()[0].transformer, torch.tensor([3, 5]), plain.inputs(STEPS, batch=2)
    parts = [slice(0, 2)] if level == "stack" else [slice(0, 1), slice(1, 2)]
    series = [[] for _ in parts]
    with torch.no_grad():
        for x, t in calls:
            hidden = model.pos_embed(x)
            for part, kept in zip(parts, series, strict=True):
                out = plain.blocks(model, hidden, t, labels, part)
                change = out - hidden
                kept.append((change if tokens is None else change[:, ::4]).flatten(0, 1))
                hidden = out
        with measure(model, "hyca", level=level, tokens=tokens, interval=3, first=2, clusters=2) as found:
            for _ in range(2):
                with found.generation(STEPS) as run:
                    for x, t in calls:
                        model(x, timestep=t, class_labels=labels)
                        run.step()
    result = found.result()
    schedule = Schedule(interval=3, first=2, origin=1)
    for digits, kept, measured in zip(result["channels"], series, found.probe._sums, strict=True):
        want = 2 * sums(torch.stack(kept), schedule)
        torch.testing.assert_close(measured, want, rtol=1e-3, atol=1e-8)
        chosen = choose(measured[: -len(NAMES)], measured[-len(NAMES) :], 2)
        assert digits == "".join(map(str, chosen.tolist())) and len(digits) == 32
    assert (result["level"], result["interval"], result["first"]) == (level, 3, 2)


# ------------------------------------------------------------------------------------------------ refusals
def made(**changes):
    values = {
        "level": "stack",
        "interval": 3,
        "first": 2,
        "solvers": ["hold", "ab2"],
        "channels": ["01" * 16],
    } | changes
    return Calibration.make("hyca", "DiTTransformer2DModel", 2, 9, values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": "module"}, "level='module'"),
        ({"solvers": []}, r"solvers=\(\)"),
        ({"solvers": ["rk4"]}, "solvers="),
        ({"channels": []}, "channels must be a list"),
        ({"channels": ["01", ""]}, "channels must be a list"),
        ({"channels": ["012"]}, "digits from 0 to 1"),
        ({"channels": ["0a"]}, "digits from 0 to 1"),
    ],
)
def test_values_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        HyCa(made(**changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "module"}, "level='module'"),
        ({"clusters": 0}, "clusters=0"),
        ({"clusters": True}, "clusters=True"),
        ({"tokens": 0}, "tokens=0"),
        ({"interval": 0}, "interval=0"),
        ({"first": 0}, "first=0"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        measure(dit()[0].transformer, "hyca", **options)


def test_too_few_steps():
    pipeline, kwargs, _ = built("dit")
    with measure(pipeline, "hyca") as found:
        sample(pipeline, kwargs, steps=7)
    with pytest.raises(ValueError, match="7 steps do not show how a channel moves"):
        found.result()


def test_bad_arguments_and_other_models(tmp_path):
    for fields, message in (({"interval": 0}, "interval=0"), ({"first": 0}, "first=0"), ({"last": -1}, "last=-1")):
        with pytest.raises(ValueError, match=message):
            HyCa(made(), **fields)
    with pytest.raises(TypeError, match="calibration=None must be a Calibration"):
        HyCa(None)
    with pytest.raises(ValueError, match="is of kind 'magnitudes'; needed is 'hyca'"):
        HyCa(Calibration.make("magnitudes", "Dit", 2, 2, {"ratios": [1.0, 0.9]}))
    model = dit()[0].transformer
    with pytest.raises(maskaccel.PatchError, match="is no file"):
        maskaccel.patch(model, HyCa(tmp_path / "none.json"))
    with pytest.raises(maskaccel.PatchError, match="made with DiTTransformer2DModel; the model is a Flux"):
        maskaccel.patch(built("flux")[0], HyCa(made()))
    with pytest.raises(maskaccel.PatchError, match="of 3 features; this DiTTransformer2DModel has 1"):
        maskaccel.patch(model, HyCa(made(channels=["01"] * 3)))
    assert not any("forward" in module.__dict__ for module in model.modules())
    with pytest.raises(ValueError, match="calibration is of 2 channels; the feature has 32"):
        plain.patched(model, HyCa(made(channels=["01"])), plain.inputs(6), torch.tensor([3]))
    for solvers, channels, message in ((("rk4",), (0,), "solvers="), (("hold",), (1,), "from 0 to 0"),
                                       (("hold",), (), "one for each channel")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            PerChannel(solvers, channels)
