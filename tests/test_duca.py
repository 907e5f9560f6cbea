"""DuCa, against the paper's rule written out, and on real pipelines."""

from __future__ import annotations

import functools

import pytest
import torch
from test_toca import FIXED, check_the_rule
from zoo.pipelines import PIPELINES, check_runs, sample

import maskaccel
from maskaccel.methods import DuCa

STEPS = 7


@functools.cache
def built(name):
    pipeline, kwargs = PIPELINES[name]()
    return pipeline, kwargs, sample(pipeline, kwargs, steps=STEPS)


@pytest.fixture(params=["dit", "pixart", "flux", "wan", "sd3", "qwen"])
def name(request):
    return request.param


@pytest.mark.parametrize(
    "method",
    [DuCa(ratio=0.2, score="attention"), DuCa(interval=5, ratio=0.3, score="attention", **FIXED)],
    ids=["ddim", "five"],
)
def test_the_rule_written_out(method):
    check_the_rule(method)


@pytest.mark.filterwarnings("ignore:DuCa can never reuse")
def test_computing_always_is_the_unpatched_pipeline(name):
    pipeline, kwargs, plain = built(name)
    with maskaccel.patch(pipeline, DuCa(interval=1, drift=0, dense=None)):
        assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain)
    assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain), "remove() did not restore the pipeline"


def test_runs_repeat_and_fused_blocks_agree(name):
    pipeline, kwargs, plain = built(name)
    for activity in check_runs(pipeline, kwargs, plain, DuCa(ratio=0.2, **FIXED), STEPS):
        assert activity["in part"] > 0 < activity["reused"]


def test_aggressive_steps_run_no_block():
    pipeline, kwargs, _ = built("flux")
    calls = []
    blocks = [*pipeline.transformer.transformer_blocks, *pipeline.transformer.single_transformer_blocks]
    norms = [b.norm1 if hasattr(b, "norm1") else b.norm for b in blocks]
    handles = [norm.register_forward_pre_hook(lambda *_: calls.append(1)) for norm in norms]
    with maskaccel.patch(pipeline, DuCa(ratio=0.2, **FIXED)):
        sample(pipeline, kwargs, steps=6)
    for handle in handles:
        handle.remove()
    assert len(calls) == 4 * len(blocks), "two of six steps are aggressive"
