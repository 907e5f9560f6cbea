"""Every caching method on the trained example: runs repeat, samples stand alone, images stay what they were."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the example is built on diffusers")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "examples" / "fashion")) if path not in sys.path]

from pipeline import FashionPipeline  # noqa: E402

import maskaccel  # noqa: E402
from benchmarks.caching import calibrate  # noqa: E402
from maskaccel import methods as m  # noqa: E402
from maskaccel.state import Taylor  # noqa: E402

STEPS = 10
# The method, and the decibels that its images keep to the plain ones at ten steps, with room.
METHODS = {
    "FORA": (m.FORA(interval=2), 18),
    "FORA-stack": (m.FORA(interval=2, level="stack"), 18),
    "TaylorSeer": (m.TaylorSeer(interval=2, first=2), 18),
    "FoCa": (m.FoCa(interval=2, first=2), 18),
    "DMD": (m.DMD(interval=2, first=3), 18),
    "SCM": (m.SCM(policy="slow"), 18),
    "MagCache": (m.MagCache(ratios=calibrate.path("magnitudes"), max_consecutive=1), 18),
    "DPCache": (m.DPCache(calibrate.path("products"), refresh=2), 18),
    "HyCa": (m.HyCa(calibrate.path("hyca"), interval=2, first=2), 18),
    "DDT": (m.DDT(encoder=4, refresh=2), 18),
    "SkipCache": (m.SkipCache(interval=2, outer=1), 18),
    "FBCache": (m.FBCache(threshold=0.3, first=2, max_consecutive=1), 18),
    "DBCache": (m.DBCache(threshold=0.3, lead=2, tail=1, first=2, forecaster=Taylor(1), max_consecutive=1), 18),
    "TeaCache": (m.TeaCache(threshold=0.5, polynomial=(1.0, 0.0), first=2, max_consecutive=1), 18),
    "SpeCa": (m.SpeCa(threshold=0.5, first=2, max_drafts=1), 18),
    "Sortblock": (m.Sortblock(interval=2, beta=0.5, low=0, high=1000), 18),
    "PAB": (m.PAB(low=0.0, high=1000.0), 18),
    "FasterCache": (m.FasterCache(uncond=2), 18),
    "ToCa": (m.ToCa(interval=2), 15),
    "DuCa": (m.DuCa(interval=3), 12),
    "ClusCa": (m.ClusCa(interval=2, first=2), 15),
}


@functools.cache
def pipe():
    made = FashionPipeline.from_pretrained(ROOT / "examples" / "fashion" / "weights", local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


def sample(labels=(0, 7), seeds=(5, 6)):
    return pipe()(list(labels), 2.0, STEPS, seeds=list(seeds), output_type="pt").images


@functools.cache
def plain():
    return sample()


@pytest.mark.parametrize(("method", "decibels"), METHODS.values(), ids=METHODS)
def test_gates(method, decibels):
    before = plain()
    with maskaccel.patch(pipe(), method) as patch:
        first = sample()
        assert torch.equal(first, sample()), "the second run of the same seeds is another"
        activity = patch.report().activity[method.name]
        assert activity["reused"] + activity.get("in part", 0) > 0
        assert 0 < activity["peak bytes"] >= activity["bytes held"]
    assert not torch.equal(first, before)
    error = (first - before).square().flatten(1).mean(1)
    assert (-10 * error.log10()).min() >= decibels
    with maskaccel.patch(pipe(), [method, m.FusedAdaLN()]):
        fused = sample()
    assert (fused - first).abs().mean() < 5e-3


@pytest.mark.parametrize("method", [method for method, _ in METHODS.values()], ids=METHODS)
def test_a_sample_is_the_same_in_any_batch(method):
    with maskaccel.patch(pipe(), method):
        together, alone = sample(), sample((7,), (6,))
    assert (together[1] - alone[0]).abs().mean() < 2e-3


@pytest.mark.filterwarnings("ignore:FORA can never reuse anything")
def test_undone_after_an_exception():
    before, calls = plain(), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory, say")

    with maskaccel.patch(pipe(), m.TaylorSeer(interval=2, first=2)):
        expected = sample()
        handle = pipe().transformer.transformer_blocks[3].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            sample()
        handle.remove()
        assert torch.equal(sample(), expected)
    with maskaccel.patch(pipe(), m.FORA(interval=1, level="stack")):
        assert torch.equal(sample(), before)
    assert torch.equal(sample(), before)
