"""FORA on real pipelines: what is computed, what is reused, and with which gates."""

from __future__ import annotations

import copy
import functools

import diffusers
import pytest
import torch
from _numerics import assert_close_to_truth
from zoo.all_models import MODELS
from zoo.common import tensors_of
from zoo.pipelines import MORE_PIPELINES, PIPELINES, dit, sample

import maskaccel
from maskaccel.methods import FORA, FusedAdaLN
from maskaccel.state.site import SITE

STEPS = 6
# Calls of the model in one step, and remembered modules, of each tiny pipeline.
BRANCHES = {
    "dit": 1, "pixart": 1, "sd3": 1, "flux": 1, "wan": 2, "qwen": 2, "ltx": 1, "zimage": 1, "hunyuan_video": 1,
    "hunyuan_video_cfg": 2,
}  # fmt: skip


@functools.cache
def built(name):
    """One pipeline of a kind for the whole file (every test removes its patch), and its plain result."""
    pipeline, kwargs = PIPELINES[name]()
    return pipeline, kwargs, sample(pipeline, kwargs, steps=STEPS)


@pytest.fixture(params=PIPELINES)
def name(request):
    return request.param


@pytest.mark.filterwarnings("ignore:FORA can never reuse")
def test_interval_1_is_the_unpatched_pipeline(name):
    pipeline, kwargs, plain = built(name)
    with maskaccel.patch(pipeline, FORA(interval=1)) as patch:
        assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain)
        activity = patch.report().activity["FORA"]
        assert (activity["reused"], activity["warning"]) == (0, "never reused anything")
        assert activity["computed"] > 0
    assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain), "remove() did not restore the pipeline"


def test_fused_adaln_in_a_pipeline_keeps_the_error_rule(name):
    """Every call that the pipeline makes, replayed on the patched model, the plain one, and an fp64 copy."""
    pipeline, kwargs, _ = built(name)
    model, calls = pipeline.transformer, []
    handle = model.register_forward_pre_hook(lambda _, args, kw: calls.append((args, kw)), with_kwargs=True)
    sample(pipeline, kwargs, steps=2)
    handle.remove()
    assert len(calls) == 2 * BRANCHES[name]
    wide = copy.deepcopy(model).double()

    def run(net, args, kw, dtype=None):
        def cast(value):
            if isinstance(value, list):
                return [cast(item) for item in value]
            return value.to(dtype) if dtype and isinstance(value, torch.Tensor) and value.is_floating_point() else value

        with torch.no_grad():
            return tensors_of(net(*map(cast, args), **{key: cast(value) for key, value in kw.items()}))[0]

    expected = [(run(model, *call), run(wide, *call, torch.float64)) for call in calls]
    with maskaccel.patch(pipeline, FusedAdaLN()) as patch:
        for call, (plain, truth) in zip(calls, expected, strict=True):
            assert_close_to_truth(run(model, *call), plain, truth, what=name)
        assert patch.report().activity["FusedAdaLN"]["fused calls"] > 0


def test_the_schedule_is_followed_exactly(name):
    """What every remembered module had computed at the end of each step."""
    pipeline, kwargs, plain = built(name)
    fora = FORA(interval=3, first=2, last=1)
    with maskaccel.patch(pipeline, fora) as patch:
        sites = [m for m in pipeline.transformer.modules() if SITE in m.__dict__]
        steps: list[list[int]] = []
        blocks = sum(len(v) for v in pipeline.transformer.children() if isinstance(v, torch.nn.ModuleList))

        # The scheduler's own step tells where a step ends.
        hooked = pipeline.scheduler.__dict__["step"]

        def step(*args, **keywords):
            steps.append([site.__dict__[SITE].computed for site in sites])
            return hooked(*args, **keywords)

        pipeline.scheduler.__dict__["step"] = step
        out = sample(pipeline, kwargs, steps=STEPS)
        pipeline.scheduler.__dict__["step"] = hooked
        assert len(sites) >= blocks > 0
        done = [0] * len(sites)
        for now, computes in zip(steps, fora.schedule.plan(STEPS), strict=True):
            done = [before + (BRANCHES[name] if computes == "compute" else 0) for before in done]
            assert now == done
        activity = patch.report().activity["FORA"]
        computed = fora.schedule.plan(STEPS).count("compute") * BRANCHES[name] * len(sites)
        assert activity["computed"] == computed
        assert activity["reused"] == STEPS * BRANCHES[name] * len(sites) - computed
        assert activity["bytes held"] == 0
        assert not torch.equal(out, plain)
        assert torch.isfinite(out).all()
        assert torch.equal(sample(pipeline, kwargs, steps=STEPS), out), "two runs of one seed differ"


def test_fused_blocks_and_plain_blocks_agree(name):
    """FORA asked by fused blocks, and FORA as a wrapper of the children, are one method."""
    pipeline, kwargs, _ = built(name)
    outs = []
    for methods in ([FORA(interval=3)], [FORA(interval=3), FusedAdaLN()], [FusedAdaLN(), FORA(interval=3)]):
        with maskaccel.patch(pipeline, methods) as patch:
            outs.append(sample(pipeline, kwargs, steps=STEPS))
            activity = patch.report().activity["FORA"]
            assert activity["reused"] == 2 * activity["computed"] > 0
            assert "warning" not in activity
    scale = outs[0].abs().max().item()
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=2e-5 * scale)


# ------------------------------------------------------------------------------------- against the equations
class PlainFORA:
    """FORA's equations for diffusers' DiT, written out: `x += gate(t) * cached` with the gates of the step at hand."""

    def __init__(self, model, interval):
        self.model, self.interval, self.kept, self.step = model, interval, {}, 0

    @staticmethod
    def norm(x, eps):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)

    def __call__(self, latents, timestep, labels):
        model, computes = self.model, self.step % self.interval == 0
        height = latents.shape[-2] // model.patch_size
        x = model.pos_embed(latents)
        for i, block in enumerate(model.transformer_blocks):
            emb = block.norm1.emb(timestep, labels, hidden_dtype=x.dtype)
            b1, s1, g1, b2, s2, g2 = block.norm1.linear(torch.nn.functional.silu(emb))[:, None].chunk(6, dim=-1)
            if computes:
                self.kept["attn", i] = block.attn1(self.norm(x, block.norm1.norm.eps) * (1 + s1) + b1)
            x = x + g1 * self.kept["attn", i]
            if computes:
                self.kept["ff", i] = block.ff(self.norm(x, block.norm3.eps) * (1 + s2) + b2)
            x = x + g2 * self.kept["ff", i]
        conditioning = model.transformer_blocks[0].norm1.emb(timestep, labels, hidden_dtype=x.dtype)
        shift, scale = model.proj_out_1(torch.nn.functional.silu(conditioning)).chunk(2, dim=1)
        x = model.proj_out_2(model.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        x = x.reshape(-1, height, height, model.patch_size, model.patch_size, model.out_channels)
        self.step += 1
        return torch.einsum("nhwpqc->nchpwq", x).reshape(latents.shape[0], model.out_channels, *latents.shape[-2:])


@pytest.mark.parametrize("methods", [[FORA(interval=3)], [FORA(interval=3), FusedAdaLN()]], ids=["alone", "fused"])
def test_gates_are_those_of_the_current_step(methods):
    pipeline, _, _ = built("dit")
    model = pipeline.transformer
    labels = torch.tensor([1, 2])
    plain, wide = PlainFORA(model, 3), PlainFORA(copy.deepcopy(model).double(), 3)
    with torch.no_grad():
        steps = [(torch.randn(2, 4, 8, 8), torch.tensor([900 - 150 * i] * 2)) for i in range(5)]
        expected = [(plain(x, t, labels), wide(x.double(), t, labels)) for x, t in steps]
        with maskaccel.patch(model, methods) as patch, patch.generation(len(steps)) as run:
            for i, ((x, t), (mine, truth)) in enumerate(zip(steps, expected, strict=True)):
                got = model(x, timestep=t, class_labels=labels).sample
                assert_close_to_truth(got, mine, truth, what=f"step {i}")
                run.step()


# ---------------------------------------------------------------------------------------------------- runs
def test_two_pipelines_side_by_side_do_not_interact():
    """Steps interleaved: the second pipeline runs inside the first one's loop."""
    (one, kwargs, _), (two, _) = built("dit"), dit()
    other = {**kwargs, "class_labels": [3, 4]}
    with maskaccel.patch(one, FORA(interval=3)), maskaccel.patch(two, FORA(interval=2)):
        alone = sample(one, kwargs), sample(two, other, seed=1)
        hooked, inner = one.scheduler.__dict__["step"], []

        def step(*args, **keywords):
            inner.append(sample(two, other, seed=1))
            return hooked(*args, **keywords)

        one.scheduler.__dict__["step"] = step
        together = sample(one, kwargs)
        one.scheduler.__dict__["step"] = hooked
        assert torch.equal(together, alone[0])
        assert all(torch.equal(out, alone[1]) for out in inner)
        assert len(inner) == 6


def test_a_run_after_an_exception_equals_one_without():
    pipeline, kwargs, _ = built("wan")
    with maskaccel.patch(pipeline, FORA(interval=3)) as patch:
        ours = sample(pipeline, kwargs)
        calls = []

        def fail(*_):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("out of memory, say")

        handle = pipeline.transformer.blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            sample(pipeline, kwargs, seed=5)
        handle.remove()
        assert patch.report().activity["FORA"]["bytes held"] == 0
        assert torch.equal(sample(pipeline, kwargs), ours)


def test_batched_and_sequential_guidance_agree():
    pipeline, _, _ = built("dit")
    model = pipeline.transformer

    def run_with(batched):
        outs = []
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad(), maskaccel.patch(model, FORA(interval=3)) as patch, patch.generation(6) as run:
            for i in range(6):
                x, t = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([900 - 100 * i])
                if batched:
                    both = model(x.repeat(2, 1, 1, 1), t.repeat(2), torch.tensor([1, 1000])).sample.chunk(2)
                else:
                    both = []
                    for branch, label in (("cond", 1), ("uncond", 1000)):
                        with run.branch(branch):
                            both.append(model(x, t, torch.tensor([label])).sample)
                outs.append(both[1] + 4 * (both[0] - both[1]))
                run.step()
        return torch.stack(outs)

    torch.testing.assert_close(run_with(batched=False), run_with(batched=True), rtol=1e-4, atol=1e-4)


def test_branches_are_told_apart_by_name_not_by_order():
    """The first call of a step is the unconditional one on odd steps: each branch still meets its own features."""
    pipeline, _, _ = built("wan")
    model = pipeline.transformer
    given = [torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]

    def run_with(swapped):
        outs = []
        with torch.no_grad(), maskaccel.patch(model, FORA(interval=4)) as patch, patch.generation(4) as run:
            for i in range(4):
                x = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(i))
                t, out = torch.tensor([900 - 100 * i]), {}
                order = [("cond", given[0]), ("uncond", given[1])]
                for branch, text in order[::-1] if swapped and i % 2 else order:
                    with model.cache_context(branch):
                        out[branch] = model(x, timestep=t, encoder_hidden_states=text, return_dict=False)[0]
                outs.append(torch.stack([out["cond"], out["uncond"]]))
                run.step()
        return torch.stack(outs)

    assert torch.equal(run_with(swapped=True), run_with(swapped=False))


def test_another_resolution_between_calls():
    pipeline, kwargs, _ = built("pixart")
    with maskaccel.patch(pipeline, [FORA(interval=3), FusedAdaLN()]) as patch:
        small = sample(pipeline, kwargs)
        large = sample(pipeline, kwargs, height=32, width=32)
        assert large.shape != small.shape
        assert torch.equal(sample(pipeline, kwargs), small)
        assert patch.report().activity["FORA"]["resets"] == 0, "each call begins with an empty memory"


def test_a_scheduler_with_two_evaluations_a_step():
    """Heun's method calls the model and the scheduler 2 N - 1 times: each evaluation is a step of the mask."""
    pipeline, kwargs, _ = built("flux")
    before = pipeline.scheduler
    pipeline.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    model, x = pipeline.transformer, torch.randn(1, 16, 16)
    scheduler = pipeline.scheduler
    ids = torch.zeros(16, 3)
    arguments = {
        "encoder_hidden_states": kwargs["prompt_embeds"], "pooled_projections": kwargs["pooled_prompt_embeds"],
        "img_ids": ids, "txt_ids": torch.zeros(6, 3), "return_dict": False,
    }  # fmt: skip
    with torch.no_grad(), maskaccel.patch(pipeline, FORA(interval=3)) as patch:
        sites = sum(SITE in m.__dict__ for m in model.modules())
        scheduler.set_timesteps(5)
        evaluations = len(scheduler.timesteps)
        assert evaluations == 9
        for t in scheduler.timesteps:
            noise = model(x, timestep=t[None] / 1000, **arguments)[0]
            x = scheduler.step(noise, t, x, return_dict=False)[0]
        activity = patch.report().activity["FORA"]
        assert activity["computed"] == 3 * sites
        assert activity["reused"] == 6 * sites
        assert activity["bytes held"] == 0
    pipeline.scheduler = before


def test_the_result_is_not_a_view_of_the_memory():
    pipeline, kwargs, _ = built("dit")
    with maskaccel.patch(pipeline, [FORA(interval=3), FusedAdaLN()]):
        first = sample(pipeline, kwargs)
        kept = first.clone()
        sample(pipeline, kwargs, seed=9)
        assert torch.equal(first, kept)


def test_memory_is_what_the_features_need():
    """One output of each remembered module and branch, held once; nothing after the run."""
    for name in ("dit", "wan"):
        pipeline, kwargs, _ = built(name)
        sizes = {}

        def note(module, _, out, sizes=sizes):
            sizes[id(module)] = sum(t.nbytes for t in (out if isinstance(out, tuple) else (out,)))

        with maskaccel.patch(pipeline, FORA(interval=3)) as patch:
            hooks = [m.register_forward_hook(note) for m in pipeline.transformer.modules() if SITE in m.__dict__]
            sample(pipeline, kwargs)
            for hook in hooks:
                hook.remove()
            activity = patch.report().activity["FORA"]
            assert activity["peak bytes"] == BRANCHES[name] * sum(sizes.values())
            assert activity["bytes held"] == 0


def test_a_run_with_no_step_to_reuse_warns_and_the_report_says_so():
    pipeline, kwargs, _ = built("dit")
    with maskaccel.patch(pipeline, FORA(interval=4, first=2)) as patch:
        with pytest.warns(UserWarning, match="FORA can never reuse anything in 2 steps"):
            out = sample(pipeline, kwargs, steps=2)
        assert "never reused anything" in str(patch.report())
    assert torch.equal(out, sample(pipeline, kwargs, steps=2))


def test_the_report_of_two_transformers_is_of_their_sum():
    """The second one runs for the last two steps alone, which are always computed."""
    pipeline, kwargs = MORE_PIPELINES["wan22"]()
    with maskaccel.patch(pipeline, FORA(interval=3, last=2, level="stack")) as patch:
        sample(pipeline, kwargs, steps=5)
        activity = patch.report().activity["FORA"]
        assert [method.activity(model)["reused"] for method in patch.methods for model in patch.models] == [4, 0]
    assert (activity["computed"], activity["reused"]) == (6, 4) and "warning" not in activity
    assert activity["steps cond"] == activity["steps uncond"] == "C..CC"
    with maskaccel.patch(pipeline, FORA(interval=1)) as patch, pytest.warns(UserWarning, match="can never reuse"):
        sample(pipeline, kwargs, steps=5)
        assert patch.report().activity["FORA"]["warning"] == "never reused anything"


@pytest.mark.parametrize("fields", [{"interval": 0}, {"first": 0}, {"last": -1}, {"interval": 1.5}])
def test_bad_fields(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}=.* must be an integer"):
        FORA(**fields)


@pytest.mark.parametrize(
    ("name", "children"),
    {
        "BriaFibo2Transformer2DModel": {"attention", "feed_forward", "cross_attention", "self_attention", "ffn"},
        "Ideogram4Transformer2DModel": {"attention", "feed_forward"},
        "Kandinsky5Transformer3DModel": {"self_attention", "cross_attention", "feed_forward"},
        "Kandinsky6SRTransformer3DModel": {"self_attention", "feed_forward"},
        "LongCatAudioDiTTransformer": {"self_attn", "cross_attn", "ffn"},
        "LuminaNextDiT2DModel": {"attn1", "attn2", "feed_forward"},
        "PRXTransformer2DModel": {"attention"},
        "StableAudio3DiTModel": {"self_attn", "cross_attn", "ff"},
        "WanAnimate2Transformer3DModel": {"self_attn", "cross_attn", "ffn"},
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_blocks_without_an_adapter_by_the_names_of_their_children(name, children):
    model, kwargs = MODELS[name]()
    with torch.no_grad():
        plain = tensors_of(model(**kwargs))
        with maskaccel.patch(model, FORA(interval=2)) as patch, patch.generation(2) as run:
            sites = [path.rsplit(".", 1)[1] for path, module in model.named_modules() if SITE in module.__dict__]
            for _ in range(2):
                torch.testing.assert_close(tensors_of(model(**kwargs)), plain, rtol=0, atol=0)
                run.step()
            activity = patch.report().activity["FORA"]
    assert set(sites) == children
    assert activity["computed"] == activity["reused"] == len(sites)
