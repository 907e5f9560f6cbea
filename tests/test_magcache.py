"""MagCache and SCM: schedules that are known before the run, against the papers' loops."""

from __future__ import annotations

import _plain_dit as plain
import numpy as np
import pytest
import torch
from zoo.pipelines import MORE_PIPELINES, dit, flux, sample

import maskaccel
from maskaccel.calibration import Calibration
from maskaccel.masks.planned import Bins, Magnitudes
from maskaccel.masks.schedule import At, render
from maskaccel.methods import SCM, MagCache
from maskaccel.methods.magcache import RATIOS
from maskaccel.state import Taylor


def papers_loop(ratios, steps, threshold, most, retention):
    """The authors' counters, step by step, with numpy's rounding."""
    if len(ratios) != steps:
        ratios = np.array(ratios)[np.round(np.arange(steps) * ((len(ratios) - 1) / (steps - 1))).astype(int)]
    product, err, n, letters = 1.0, 0.0, 0, ""
    for step in range(steps):
        skip = False
        if step >= int(retention * steps + 0.5):
            product, n = product * ratios[step], n + 1
            err += abs(1 - product)
            skip = err <= threshold and n <= most
            if not skip:
                product, err, n = 1.0, 0.0, 0
        letters += "." if skip else "C"
    return letters


@pytest.mark.parametrize("table", RATIOS)
@pytest.mark.parametrize("steps", [8, 20, 28, 50])
@pytest.mark.parametrize(("threshold", "most", "retention"), [(0.06, 3, 0.2), (0.24, 5, 0.1), (0.02, 2, 0.35)])
def test_the_plan_is_the_papers(table, steps, threshold, most, retention):
    method = MagCache(threshold, most, retention, ratios=table)
    got = render(method.schedule.plan(steps))
    assert got == papers_loop(RATIOS[table], steps, threshold, most, retention)


def test_the_published_defaults_reuse():
    assert "..." in render(MagCache(ratios="flux").schedule.plan(28))
    assert render(MagCache(threshold=0, ratios=(1.0, 0.9, 0.9, 0.9)).schedule.plan(4)) == "CCCC"


def test_a_run_that_starts_late_starts_late_in_the_table():
    rule = MagCache(ratios="flux").schedule
    whole = rule.plan(28)
    late = [rule.action(At(step, 18, offset=10)) for step in range(18)]
    assert late[0] == "compute" and late[1:] == whole[11:]


def test_reuse_against_a_plain_loop():
    model, labels = dit()[0].transformer, torch.tensor([3])
    ratios = (1.0, 1.05, 1.02, 0.99, 0.97, 1.0, 1.04, 0.93, 1.0, 0.98)
    calls = plain.inputs(len(ratios))
    letters = papers_loop(ratios, len(ratios), 0.08, 2, 0.2)
    got, activity = plain.patched(model, MagCache(0.08, 2, 0.2, ratios=ratios), calls, labels)
    assert activity["steps"] == letters and "." in letters
    want = plain.held(model, calls, labels, [letter == "C" for letter in letters])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_flux_has_a_table_and_others_ask_for_one():
    pipeline, kwargs = flux()
    with maskaccel.patch(pipeline, MagCache()) as patch:
        sample(pipeline, kwargs, steps=28)
        activity = patch.report().activity["MagCache"]
    (line,) = [value for key, value in activity.items() if key.startswith("steps")]
    assert line == papers_loop(RATIOS["flux"], 28, 0.06, 3, 0.2)
    with pytest.raises(maskaccel.PatchError, match="DiTTransformer2DModel: measure them with `maskaccel calibrate"):
        maskaccel.patch(dit()[0], MagCache())
    with pytest.raises(ValueError, match="no magnitude ratios for no model"):
        MagCache().schedule  # noqa: B018


def test_image_to_image_follows_the_end_of_the_table():
    pipeline, kwargs = MORE_PIPELINES["flux_img2img"]()
    with maskaccel.patch(pipeline, MagCache(threshold=0.3)) as patch:
        sample(pipeline, kwargs, steps=20)
        activity = patch.report().activity["MagCache"]
    (line,) = [value for key, value in activity.items() if key.startswith("steps")]
    whole = papers_loop(RATIOS["flux"], 20, 0.3, 3, 0.2)
    assert len(line) == 12 and line == "C" + whole[-11:]


def test_ratios_from_a_calibration(tmp_path):
    model = dit()[0].transformer
    made = Calibration.make("magnitudes", "DiTTransformer2DModel", 2, 4, {"ratios": [1.0, 0.99, 1.01, 0.9]})
    path = tmp_path / "dit.json"
    made.save(path)
    want = Magnitudes((1.0, 0.99, 1.01, 0.9))
    assert MagCache(ratios=made).schedule_for("DiTTransformer2DModel") == want
    assert MagCache(ratios=str(path)).schedule_for("DiTTransformer2DModel") == want
    _, activity = plain.patched(model, MagCache(retention=0.0, ratios=path), plain.inputs(4), torch.tensor([1]))
    assert activity["steps"] == "C..C"
    with pytest.raises(maskaccel.PatchError, match="made with DiTTransformer2DModel; the model is a Flux"):
        maskaccel.patch(flux()[0], MagCache(ratios=path))


def cache_dits_mask(compute, reuse):
    return "".join("C" * c + "." * r for c, r in zip(compute, [*reuse, 0]))


@pytest.mark.parametrize(
    ("policy", "compute", "reuse"),
    [
        ("slow", [8, 3, 3, 2, 1, 1], [1, 2, 2, 2, 3]),
        ("medium", [6, 2, 2, 2, 2, 1], [1, 3, 3, 3, 3]),
        ("fast", [6, 1, 1, 1, 1, 1], [1, 3, 4, 5, 4]),
        ("ultra", [4, 1, 1, 1, 1], [2, 5, 6, 7]),
    ],
)
def test_presets_of_28_steps_and_stretched(policy, compute, reuse):
    want = cache_dits_mask(compute, reuse)
    assert len(want) == 28
    rule = SCM(policy).schedule
    assert render(rule.plan(28)) == want
    assert render(rule.plan(56)) == "".join(letter * 2 for letter in want)
    assert render(rule.plan(14)) == want[::2]


@pytest.mark.parametrize("forecaster", [SCM.forecaster, Taylor(1)], ids=["hold", "taylor"])
def test_a_mask_of_ones_own(forecaster):
    model, labels, calls = dit()[0].transformer, torch.tensor([3]), plain.inputs(6)
    mask = (1, 1, 0, 0, 1, 0)
    got, activity = plain.patched(model, SCM(mask, forecaster), calls, labels)
    assert activity["steps"] == "CC..C."
    want = plain.held(model, calls, labels, mask)
    same = torch.isclose(got, want, rtol=1e-5, atol=1e-5).flatten(1).all(1).tolist()
    assert same == [True] * 6 if forecaster == SCM.forecaster else same == [True, True, False, False, True, False]


def test_a_preset_on_a_pipeline():
    pipeline, kwargs = dit()
    with maskaccel.patch(pipeline, SCM("ultra")) as patch:
        sample(pipeline, kwargs, steps=14)
        assert patch.report().activity["SCM"]["steps"] == cache_dits_mask([4, 1, 1, 1, 1], [2, 5, 6, 7])[::2]


def test_the_number_of_steps_is_needed():
    for rule in (SCM().schedule, MagCache(ratios="flux").schedule):
        with pytest.raises(ValueError, match="needs the number of steps"):
            rule.action(At(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MagCache(threshold=-1), "threshold=-1"),
        (lambda: MagCache(max_consecutive=0), "max_consecutive=0"),
        (lambda: MagCache(retention=1.5), "retention=1.5"),
        (lambda: MagCache(ratios=(1.0, -0.5)), "ratios=.1.0, -0.5. must be"),
        (lambda: MagCache(ratios=()), "ratios=.. must be a non-empty tuple"),
        (lambda: SCM("turbo"), "policy='turbo'; allowed are slow, medium, fast, ultra"),
        (lambda: SCM((1, 2)), "policy=.1, 2. must be"),
        (lambda: SCM((0, 1)), "first step"),
        (lambda: Bins((1, 2), (0,)), "must alternate"),
    ],
)
def test_bad_fields(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="maskaccel calibrate"):
        MagCache(ratios="nowhere.json")
