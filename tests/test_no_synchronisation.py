"""Methods whose schedule is known before the run never read a value of the device: on meta tensors they would fail."""

from __future__ import annotations

import copy

import pytest
import torch
from _waitless import SCHEDULED, STEPS, run_twice
from test_calibration import measured
from zoo.all_models import MODELS
from zoo.pipelines import dit

import maskaccel
from maskaccel.methods import DPCache, FBCache, FusedAdaLN, SlidingTile
from maskaccel.patching.order import ordered_calls


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


def test_a_model_in_the_order_of_tiles_copies_nothing():
    """The permutation of its tokens is on the device after the first call."""
    model, kwargs = MODELS["WanTransformer3DModel"]()
    model.to("meta")
    kwargs = {name: value.to("meta") for name, value in kwargs.items()}
    run_twice(model, [SlidingTile(window=(1, 1, 3), tile=(2, 3, 1))], "meta", 2, lambda: model(**kwargs))
    assert ordered_calls(model).calls == 4


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
