"""FoCa and DMD: their weights against the rules run on values, and the methods on real pipelines."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from zoo.pipelines import PIPELINES, dit, sample

import maskaccel
from maskaccel.methods import DMD, FoCa, FusedAdaLN
from maskaccel.state import DynamicModes, History, PredictCorrect, Storage, Taylor
from maskaccel.state.forecast_dmd import dmd_weights, evenly_spaced

STEPS = 9
METHODS = [FoCa(interval=3, first=3), DMD(interval=3, first=4)]
ALWAYS = [FoCa(interval=1), DMD(interval=1)]


@functools.cache
def built(name):
    pipeline, kwargs = PIPELINES[name]()
    return pipeline, kwargs, sample(pipeline, kwargs, steps=STEPS)


@pytest.fixture(params=["dit", "flux", "wan"])
def name(request):
    return request.param


# ------------------------------------------------------------------------------------------------ on pipelines
@pytest.mark.filterwarnings("ignore:.*can never reuse")
@pytest.mark.parametrize("method", ALWAYS, ids=lambda m: m.name)
def test_computing_always_is_the_unpatched_pipeline(name, method):
    pipeline, kwargs, plain = built(name)
    with maskaccel.patch(pipeline, method) as patch:
        assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain)
        assert patch.report().activity[method.name]["reused"] == 0
    assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain), "remove() did not restore the pipeline"


@pytest.mark.parametrize("level", ["stack", "block"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_runs_repeat_and_fused_blocks_agree(name, method, level):
    pipeline, kwargs, plain = built(name)
    method, outs = type(method)(interval=3, first=method.first, level=level), []
    for methods in ([method], [method, FusedAdaLN()]):
        with maskaccel.patch(pipeline, methods) as patch:
            outs.append(sample(pipeline, kwargs, steps=STEPS))
            activity = patch.report().activity[method.name]
            assert activity["reused"] > 0 and activity["bytes held"] == 0 < activity["peak bytes"]
            assert torch.equal(outs[-1], sample(pipeline, kwargs, steps=STEPS)), "two runs of one seed differ"
    assert not torch.equal(outs[0], plain)
    # The modes of a fit with nearly dependent snapshots amplify rounding, so the two laws agree less closely there.
    tolerance = 1e-3 if method.name == "FoCa" else 5e-2
    torch.testing.assert_close(outs[0], outs[1], rtol=tolerance, atol=tolerance * plain.abs().max().item())


def _batch(rows):
    """A DiT run under DMD for some samples of one batch."""
    model, generator = dit()[0].transformer, torch.Generator().manual_seed(1)
    start, move = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    labels, outs = torch.tensor([3, 5, 7]), []
    with torch.no_grad(), maskaccel.patch(model, DMD(first=4)) as patch, patch.generation(8) as run:
        for i in range(8):
            x, t = (start + 0.1 * i * move)[rows], torch.full((3,), 900 - 10 * i)[rows]
            outs.append(model(x, timestep=t, class_labels=labels[rows]).sample)
            run.step()
        assert patch.report().activity["DMD"]["reused"] > 0
    return torch.stack(outs)


def test_samples_of_a_batch_do_not_depend_on_each_other():
    together = _batch(slice(None))
    for i in range(3):
        torch.testing.assert_close(_batch(slice(i, i + 1)), together[:, i : i + 1], rtol=2e-3, atol=2e-3)


# ------------------------------------------------------------------------------------------------------- FoCa
def _foca_on_values(stamps, values, target):
    """Step by step over every step of a run, newest value last; the recursion with tensors instead of weights."""
    known = dict(zip(stamps, values, strict=True))
    full = []  # computed steps and values
    recent = []  # all steps and values
    for step in range(stamps[0], target + 1):
        if step in known:
            full.append((step, known[step]))
            recent.append((step, known[step]))
        elif len(full) >= 2:
            (s0, f0), (s1, f1) = full[-2:]
            (r0, v0), (r1, v1) = recent[-2:]
            anchor, local = (f1 - f0) / (s1 - s0), (v1 - v0) / (r1 - r0)
            recent.append((step, f1 + (step - s1) / 2 * (anchor + local)))
    return recent[-1][1]


@pytest.mark.parametrize("stamps", [(0, 1, 2, 7), (0, 5, 10, 15), (3, 4, 9), (0, 2), (1, 2, 3, 4, 9)])
@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_foca_is_its_recursion(stamps, ahead):
    values = torch.randn(len(stamps), 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = stamps[-1] + ahead
    weights = PredictCorrect(len(stamps)).weights(stamps[::-1], target)
    got = sum(w * v for w, v in zip(weights, reversed(list(values)), strict=True))
    torch.testing.assert_close(got, _foca_on_values(stamps, list(values), target), rtol=1e-12, atol=1e-12)
    assert sum(weights) == pytest.approx(1.0)
    assert sum(w * (3 - 2 * s) for w, s in zip(weights, stamps[::-1])) == pytest.approx(3 - 2 * target)


def test_foca_with_one_value_holds_and_with_three_is_no_line():
    assert PredictCorrect().weights((4.0,), 6) == [1.0]
    line = Taylor(1).weights((15.0, 10.0, 5.0), 17)
    assert PredictCorrect().weights((15.0, 10.0, 5.0), 17) != pytest.approx(line)


# -------------------------------------------------------------------------------------------------------- DMD
def _dmd_by_svd(snapshots, ahead, cut=1e-4):
    """Exact DMD of the snapshots (oldest first) as in its papers, fp64."""
    y = snapshots.flatten(1).double().T.numpy()
    before, after = y[:, :-1], y[:, 1:]
    u, s, vh = np.linalg.svd(before, full_matrices=False)
    keep = s > s[0] * cut
    u, s, v = u[:, keep], s[keep], vh[keep].T
    rates, w = np.linalg.eig(u.T @ after @ v / s)
    modes = (after @ v / s) @ w
    amplitudes = np.linalg.lstsq(modes, y[:, -1].astype(complex), rcond=None)[0]
    return torch.from_numpy((modes @ (rates.astype(complex) ** ahead * amplitudes)).real)


@pytest.mark.parametrize("count", [4, 6, 8])
@pytest.mark.parametrize("ahead", [1.0, 0.4, 2.2])
def test_dmd_is_that_of_the_svd(count, ahead):
    generator = torch.Generator().manual_seed(count)
    snapshots = torch.randn(count, 2, 7, 9, dtype=torch.float64, generator=generator).cumsum(0)
    flat = snapshots.flatten(1)
    weights = dmd_weights(flat @ flat.T, ahead, ridge=0.0)
    expected = _dmd_by_svd(snapshots, ahead)
    got = torch.tensor(weights, dtype=torch.float64) @ flat
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())


def _exponentials(steps, spacing=2.0):
    """A growing, a shrinking and an oscillating part, in fp64."""
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = torch.randn(4, 2, 5, 6, dtype=torch.float64, generator=generator)
    t = torch.tensor([spacing * i for i in steps], dtype=torch.float64).view(-1, 1, 1, 1)
    return a * 1.05**t + b * 0.7**t + 0.95**t * (c * torch.cos(0.6 * t) + d * torch.sin(0.6 * t))


def test_dmd_is_exact_on_sums_of_exponentials():
    history = History(6)
    for i in range(6):
        history.push(_exponentials([i])[0].float(), 2 * i)
    forecaster = DynamicModes(6)
    for target in (11, 12, 13):
        truth = _exponentials([target / 2])[0]
        got = history.combine(forecaster.weights(history.stamps, target, history))
        torch.testing.assert_close(got.double(), truth, rtol=1e-3, atol=1e-3 * truth.abs().max().item())
        line = history.combine(Taylor(1).weights(history.stamps, target))
        assert (line - truth).abs().max() > 20 * (got - truth).abs().max()


def test_dmd_leaves_out_values_at_other_gaps_and_falls_back():
    assert [evenly_spaced(s) for s in ((9,), (9, 6), (9, 6, 3, 2), (9, 6, 3, 0), (9, 6, 4, 2, 0))] == [1, 2, 3, 4, 2]
    history = History(6)
    for i, stamp in enumerate((0, 1, 4, 7, 10, 13)):
        history.push(_exponentials([i])[0].float(), stamp)
    weights = DynamicModes(6).weights(history.stamps, 14, history)
    assert weights[-1] == 0.0 and any(weights[:4])
    history.push(_exponentials([6])[0].float(), 14)
    fallback = DynamicModes(6).weights(history.stamps, 15, history)
    assert fallback == Taylor(1).weights(history.stamps, 15)


def test_dmd_of_zeros_and_of_nan_falls_back():
    for value in (0.0, float("nan")):
        history = History(4)
        for i in range(4):
            history.push(torch.full((1, 2, 3), value), i)
        assert DynamicModes(4).weights(history.stamps, 5, history) == Taylor(1).weights(history.stamps, 5)


@pytest.mark.parametrize("storage", [Storage(), Storage("bf16"), Storage("fp8")])
def test_inner_products_of_a_history(storage):
    history, values = History(4, storage), []
    for i in range(6):
        values.append(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(i)))
        history.push(values[-1], i)
        newest = torch.stack(values[::-1][:4]).flatten(1).double()
        tolerance = 1e-5 if storage.dtype is None else 0.05
        size = newest.square().sum(1).max().item()
        torch.testing.assert_close(history.gram(), newest @ newest.T, rtol=tolerance, atol=tolerance * size)
        assert history.gram() is history.gram(), "read more than once between pushes"
    history.clear()
    with pytest.raises(LookupError, match="empty"):
        history.gram()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FoCa(interval=0), "interval=0"),
        (lambda: FoCa(first=None), "first=None must be an integer, 1 or more"),
        (lambda: DMD(first=2.5), "first=2.5 must be an integer, 1 or more"),
        (lambda: FoCa(values=1), "values=1"),
        (lambda: FoCa(values=17), "values=17"),
        (lambda: FoCa(level="layer"), "level='layer'"),
        (lambda: DMD(snapshots=3), "snapshots=3"),
        (lambda: DMD(rank=-1), "rank=-1"),
        (lambda: DMD(level="module"), "level='module'"),
        (lambda: DynamicModes(cut=0), "cut=0"),
        (lambda: DynamicModes(ridge=float("inf")), "ridge=inf"),
    ],
)
def test_bad_fields(make, message):
    with pytest.raises(ValueError, match=message):
        make()
