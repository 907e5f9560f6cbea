"""The tiny pipelines do what their names promise: how often each model runs, in which branch, and that runs repeat."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from zoo.pipelines import MORE_PIPELINES, PIPELINES, sample

STEPS = 6
NAMED = ["cond", "uncond"]
# Guidance branches of each call in a step, by the name that the pipeline gives them.
CALLS = {
    "dit": [None], "pixart": [None], "sd3": [None], "flux": ["cond"], "wan": NAMED, "qwen": NAMED,
    "ltx": ["cond_uncond"], "zimage": [None], "hunyuan_video": ["cond"], "hunyuan_video_cfg": NAMED,
    "lumina2": [None, None], "flux_img2img": [None], "wan22": NAMED,
}  # fmt: skip


def recorded(pipeline, kwargs):
    """One run: the result, and for each call the model, the step and the branch."""
    calls, steps, branch, scheduler = [], [], [None], pipeline.scheduler
    models = [model for name, model in pipeline.components.items() if "transformer" in name and model is not None]

    def step(*args, **keywords):
        steps.append(1)
        return type(scheduler).step(scheduler, *args, **keywords)

    @contextmanager
    def named(name, **_):
        branch[0] = name
        yield
        branch[0] = None

    scheduler.step = step
    hooks = []
    for i, model in enumerate(models):
        hooks.append(model.register_forward_pre_hook(lambda *_, i=i: calls.append((i, len(steps), branch[0]))))
        model.cache_context = named
    out = sample(pipeline, kwargs, steps=STEPS)
    for model, hook in zip(models, hooks, strict=True):
        hook.remove()
        del model.cache_context
    del scheduler.step
    return out, calls


@pytest.mark.parametrize("name", [*PIPELINES, *MORE_PIPELINES])
def test_calls_of_a_run(name):
    pipeline, kwargs = {**PIPELINES, **MORE_PIPELINES}[name]()
    out, calls = recorded(pipeline, kwargs)
    assert torch.isfinite(out).all()
    again = sample(pipeline, kwargs, steps=STEPS)
    assert torch.equal(again, out)
    assert not torch.equal(sample(pipeline, kwargs, steps=STEPS, seed=1), out)
    steps = 4 if name == "flux_img2img" else STEPS
    assert [(step, branch) for _, step, branch in calls] == [(i, b) for i in range(steps) for b in CALLS[name]]
    models = [model for model, _, _ in calls]
    assert models == sorted(models)
    assert set(models) == ({0, 1} if name == "wan22" else {0})
