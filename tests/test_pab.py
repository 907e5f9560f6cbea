"""Pyramid Attention Broadcast, against its rule written out and on real pipelines."""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch
from zoo.common import made
from zoo.pipelines import PIPELINES, dit, sample

import maskaccel
from maskaccel.methods import PAB, FusedAdaLN

STEPS = 6
ALL = {"spatial": 2, "temporal": 2, "cross": 3, "low": 0, "high": 1000}


@functools.cache
def built(name):
    pipeline, kwargs = PIPELINES[name]()
    return pipeline, kwargs, sample(pipeline, kwargs, steps=STEPS)


@pytest.fixture(params=["dit", "pixart", "flux", "wan", "sd3"])
def name(request):
    return request.param


@pytest.mark.filterwarnings("ignore:PAB can never reuse")
@pytest.mark.parametrize(
    "method", [PAB(spatial=1, temporal=1, cross=1, mlp=1), PAB(**{**ALL, "low": 1e-3, "high": 2e-3})], ids=str
)
def test_computing_always_is_the_unpatched_pipeline(name, method):
    pipeline, kwargs, plain = built(name)
    with maskaccel.patch(pipeline, method) as patch:
        assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain)
        assert patch.report().activity["PAB"]["reused"] == 0
    assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain), "remove() did not restore the pipeline"


def test_runs_repeat_and_fused_blocks_agree(name):
    pipeline, kwargs, plain = built(name)
    outs = []
    for methods in ([PAB(**ALL)], [PAB(**ALL), FusedAdaLN()]):
        with maskaccel.patch(pipeline, methods) as patch:
            outs.append(sample(pipeline, kwargs, steps=STEPS))
            activity = patch.report().activity["PAB"]
            assert activity["reused"] > 0 and activity["bytes held"] == 0 < activity["peak bytes"]
            assert "warning" not in activity
            assert torch.equal(outs[-1], sample(pipeline, kwargs, steps=STEPS)), "two runs of one seed differ"
    assert not torch.equal(outs[0], plain)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-3, atol=1e-3 * plain.abs().max().item())


@pytest.mark.parametrize(("low", "high", "mlp"), [(0, 1000, None), (300, 800, None), (300, 800, 2)])
def test_the_rule_written_out(low, high, mlp):
    """Held in forward hooks by the paper's rule, against the method, for each step of a DiT."""
    model = dit()[0].transformer
    labels, times = torch.tensor([3, 5]), [980, 790, 600, 410, 320, 290, 100]
    xs = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(len(times))]
    ranges = {"attn1": 3} | ({"ff": mlp} if mlp else {})

    def held(module, every):
        inner, kept = module.forward, {}

        def forward(*args, **kwargs):
            if not (low <= times[step] <= high and step % every):
                kept["out"] = inner(*args, **kwargs)
            return kept["out"]

        module.forward = forward

    expected = []
    for block in model.transformer_blocks:
        for child, every in ranges.items():
            held(getattr(block, child), every)
    with torch.no_grad():
        for step, (x, t) in enumerate(zip(xs, times, strict=True)):  # noqa: B007  (the hooks read step)
            expected.append(model(x, timestep=torch.full((2,), t), class_labels=labels).sample)
    for block in model.transformer_blocks:
        for child in ranges:
            del getattr(block, child).forward
    method, got = PAB(spatial=3, mlp=mlp, low=low, high=high), []
    with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(timesteps=times) as run:
        for x, t in zip(xs, times, strict=True):
            got.append(model(x, timestep=torch.full((2,), t), class_labels=labels).sample)
            run.step()
        assert patch.report().activity["PAB"]["reused"] > 0
    assert torch.equal(torch.stack(got), torch.stack(expected))


def test_kinds_of_attention_have_ranges_of_their_own():
    model = made(
        diffusers.LatteTransformer3DModel, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
        num_layers=2, sample_size=8, patch_size=2, cross_attention_dim=16, caption_channels=16, video_length=3,
        norm_type="ada_norm_single", activation_fn="gelu-approximate", norm_elementwise_affine=False,
    )  # fmt: skip
    calls = {}
    for path, module in model.named_modules():
        if path.endswith(("attn1", "attn2", "ff")):
            kind = ("temporal " if path.startswith("temporal") else "") + path.rpartition(".")[2]
            module.register_forward_pre_hook(lambda *_, k=kind: calls.update({k: calls.get(k, 0) + 1}))
    times = [900 - 10 * i for i in range(12)]
    method = PAB(spatial=2, temporal=3, cross=4, low=100, high=1000)
    inner = {m: type(m).forward for m in model.modules() if hasattr(m, "processor")}
    counts = dict.fromkeys(("attn1", "attn2", "temporal attn1"), 0)
    for path, module in model.named_modules():
        if path.endswith(("attn1", "attn2")):
            kind = ("temporal " if path.startswith("temporal") else "") + path.rpartition(".")[2]

            def forward(*args, module=module, kind=kind, **kwargs):
                counts[kind] += 1
                return inner[module](module, *args, **kwargs)

            module.forward = forward
    with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(timesteps=times) as run:
        for t in times:
            model(torch.ones(1, 4, 3, 8, 8), torch.tensor([t]), encoder_hidden_states=torch.ones(1, 5, 16))
            run.step()
        sites = patch.report().sites
    assert counts == {"attn1": 2 * 6, "temporal attn1": 2 * 4, "attn2": 2 * 3}
    assert calls["ff"] == calls["temporal ff"] == 2 * 12, "MLPs are left alone"
    assert {action for *_, action in sites} == {"held (spatial)", "held (temporal)", "held (cross)"}


def test_guidance_branches_never_share():
    """The unconditional call of a step must not get what the conditional one computed."""
    pipeline, kwargs, _ = built("wan")
    model = pipeline.transformer
    prompts = [kwargs["prompt_embeds"], kwargs["negative_prompt_embeds"]]
    x, times = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0)), [900, 890, 880, 870]

    def call(prompt, t):
        return model(x, torch.tensor([t]), prompt, return_dict=False)[0]

    def run_of(order):
        outs = {}
        with torch.no_grad(), maskaccel.patch(model, PAB(**ALL)) as patch, patch.generation(timesteps=times) as run:
            for t in times:
                for i in order:
                    with run.branch(str(i)):
                        outs[i, t] = call(prompts[i], t)
                run.step()
            assert patch.report().activity["PAB"]["reused"] > 0
        return outs

    both, alone = run_of([0, 1]), {**run_of([0]), **run_of([1])}
    assert both.keys() == alone.keys() and all(torch.equal(both[key], alone[key]) for key in both)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"spatial": 0}, "spatial=0"),
        ({"cross": True}, "cross=True"),
        ({"mlp": 1.5}, "mlp=1.5"),
        ({"spatial": None, "temporal": None, "cross": None}, "nothing to hold"),
        ({"low": 900, "high": 100}, "low=900, high=100"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        PAB(**fields)


def test_a_model_without_the_kind_is_left_alone():
    model = dit()[0].transformer
    with pytest.raises(maskaccel.PatchError, match="has no modules of kind temporal, cross"):
        maskaccel.patch(model, PAB(spatial=None))
    assert "forward" not in model.__dict__


def test_a_run_without_timesteps_says_what_is_missing():
    with (
        maskaccel.patch(dit()[0].transformer, PAB()) as patch,
        pytest.raises(ValueError, match="pass them to generation"),
        patch.generation(4),
    ):
        pass


def test_a_window_of_all_timesteps_needs_none():
    model = dit()[0].transformer
    with torch.no_grad(), maskaccel.patch(model, PAB(**ALL)) as patch, patch.generation() as run:
        for _ in range(4):
            model(torch.ones(1, 4, 8, 8), timestep=torch.tensor([5]), class_labels=torch.tensor([1]))
            run.step()
        assert patch.report().activity["PAB"]["reused"] > 0
