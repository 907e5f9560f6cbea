"""Methods whose schedule is known before the run never read a value of the device: on meta tensors they would fail."""

from __future__ import annotations

import copy

import pytest
import torch
from test_calibration import measured
from zoo.pipelines import dit

import maskaccel
from maskaccel.methods import (
    DDT,
    FORA,
    PAB,
    SCM,
    DPCache,
    FasterCache,
    FBCache,
    FoCa,
    FusedAdaLN,
    MagCache,
    SkipCache,
    TaylorSeer,
)
from maskaccel.state import Newton

STEPS = 7
SCHEDULED = {
    "FORA-module": FORA(interval=3),
    "FORA-stack": FORA(interval=3, level="stack"),
    "FORA-block": FORA(interval=3, level="block"),
    "FORA-output": FORA(interval=3, level="output"),
    "TaylorSeer": TaylorSeer(interval=3, order=2, first=1),
    "TaylorSeer-module": TaylorSeer(interval=3, first=1, level="module"),
    "FoCa": FoCa(interval=3, first=1),
    "MagCache": MagCache(ratios=(1.0,) * STEPS),
    "SCM": SCM(policy=(1, 0, 1, 0, 0, 1, 0), forecaster=Newton(1)),
    "PAB": PAB(low=0.0, high=1000.0),
    # With `uncond` it looks once a run whether the batch is one of guidance.
    "FasterCache": FasterCache(uncond=None),
    "SkipCache": SkipCache(interval=2, outer=1),
    "DDT": DDT(encoder=1, refresh=2),
}


def four_blocks():
    """The tiny DiT with its blocks twice, on the meta device."""
    model = dit()[0].transformer
    model.transformer_blocks.extend(copy.deepcopy(model.transformer_blocks))
    return model.to("meta")


def calls(model, steps=STEPS):
    """A run on the meta device, where every `item()`, `tolist()`, `bool()` and copy to the host raises."""
    with torch.no_grad():
        for step in range(steps):
            x = torch.empty(2, 4, 8, 8, device="meta")
            t = torch.empty(2, device="meta", dtype=torch.int64)
            out = model(x, timestep=t, class_labels=torch.empty(2, device="meta", dtype=torch.int64)).sample
            assert out.is_meta and out.shape == (2, 8, 8, 8)
            yield step


@pytest.mark.parametrize("fused", [False, True], ids=["alone", "fused"])
@pytest.mark.parametrize("method", SCHEDULED.values(), ids=SCHEDULED)
def test_a_known_schedule_reads_nothing(method, fused):
    model = four_blocks()
    timesteps = [900 - 100 * i for i in range(STEPS)]
    with maskaccel.patch(model, [method, FusedAdaLN()] if fused else method) as patch:
        with patch.generation(STEPS, timesteps=timesteps) as run:
            for _ in calls(model):
                run.step()
        found = patch.report().activity[method.name]
    assert found["reused"] + found.get("in part", 0) > 0


def test_a_planned_path_reads_nothing():
    calibration = measured(dit()[0].transformer, "products")
    model = dit()[0].transformer.to("meta")
    with maskaccel.patch(model, DPCache(calibration, refresh=2)) as patch, patch.generation(STEPS) as run:
        for _ in calls(model):
            run.step()
        assert patch.report().activity["DPCache"]["reused"] == STEPS - 3


def test_a_signal_would_be_seen():
    """The other way round: what decides by a measured change has to read it."""
    model = dit()[0].transformer.to("meta")
    with (
        maskaccel.patch(model, FBCache()) as patch,
        patch.generation(STEPS) as run,
        pytest.raises(Exception, match="meta"),
    ):
        for _ in calls(model):
            run.step()
