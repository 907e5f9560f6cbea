"""Steps in part: active rows over cached keys and values, on many models, and what may not be done with them."""

from __future__ import annotations

import copy
import re

import diffusers
import pytest
import torch
from _partial_oracle import Fixed, active_tokens, everything, oracle_run, outputs, partial_run, share, some, steps_of
from zoo.all_models import MODELS
from zoo.common import as_dtype
from zoo.pipelines import PIPELINES, sample

import maskaccel
from maskaccel import methods
from maskaccel.masks import DenseAt, TokenIndex
from maskaccel.methods import RAS, FusedAdaLN
from maskaccel.models._tokens import tokens_of
from maskaccel.patching.latents import LatentGrid
from maskaccel.patching.transaction import PatchError
from maskaccel.state import KVMemoryError, KVStorage
from maskaccel.state.solver import Point, refusal

NAMES = [
    "DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel",
    "ChromaTransformer2DModel", "QwenImageTransformer2DModel", "WanTransformer3DModel", "AuraFlowTransformer2DModel",
    "LTXVideoTransformer3DModel", "CogVideoXTransformer3DModel", "HunyuanVideoTransformer3DModel",
    "Kandinsky5Transformer3DModel", "Flux2Transformer2DModel", "StableAudioDiTModel",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
    yield
    torch.set_num_threads(threads)


def expected(model, calls, index, grid):
    """What each step has to give: the oracle's rows of active tokens, those of the first step in the others."""
    where = LatentGrid(grid, tokens_of(model).axes)
    rows = oracle_run(model, index, calls, tokens_of(model).text == "first")
    first = rows[0][0]
    mask = where.spread(index.mask, first)
    return [first, *(torch.where(mask, step[0], first) for step in rows[1:])]


# ------------------------------------------------------------------------------------------------------ many models


@pytest.mark.parametrize("name", NAMES)
def test_a_step_in_part_is_the_dense_one_with_stale_rows(name):
    model, kwargs = MODELS[name]()
    calls = steps_of(model, kwargs)
    with torch.no_grad():
        plain = [outputs(model, given)[0] for given in calls]
    method = Fixed(everything)
    got, activity = partial_run(model, method, calls)
    assert all(torch.equal(a[0], b) for a, b in zip(got, plain, strict=True)), "all active, and not the dense step"
    assert (activity["computed"], activity["in part"]) == (1, 2)
    assert activity["bytes held"] == 0 < activity["peak bytes"]
    (grid, tokens), *_ = method.seen
    index = some(tokens)
    got, _ = partial_run(model, Fixed(lambda _: index), calls)
    for step, (a, b) in enumerate(zip(got, expected(model, calls, index, grid), strict=True)):
        torch.testing.assert_close(a[0], b, rtol=0, atol=0, msg=f"step {step}")
    assert not torch.equal(got[2][0], plain[2])
    with torch.no_grad():
        assert torch.equal(outputs(model, calls[1])[0], plain[1]), "remove() did not restore the model"


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_samples_have_tokens_of_their_own(name):
    model, kwargs = MODELS[name]()  # Flux runs them one by one: its rotary table has no batch
    calls = steps_of(model, kwargs)
    method = Fixed(everything)
    partial_run(model, method, calls[:2])
    (grid, tokens), *_ = method.seen
    index = some(tokens, batch=2)
    assert not torch.equal(index.keep[0], index.keep[1])
    got, _ = partial_run(model, Fixed(lambda _: index), calls)
    for a, b in zip(got, expected(model, calls, index, grid), strict=True):
        torch.testing.assert_close(a[0], b, rtol=1e-5, atol=1e-5)


def test_fused_blocks_give_the_same_but_for_rounding():
    model, kwargs = MODELS["SD3Transformer2DModel"]()
    calls = steps_of(model, kwargs)
    plain, _ = partial_run(model, Fixed(some), calls)
    for more in ((FusedAdaLN(),),):
        got, _ = partial_run(model, Fixed(some), calls, more)
        torch.testing.assert_close(got[2][0], plain[2][0], rtol=1e-4, atol=1e-5)


def test_inference_mode_and_bf16():
    model, kwargs = as_dtype(*MODELS["PixArtTransformer2DModel"](), torch.bfloat16)
    calls = steps_of(model, kwargs)
    with torch.inference_mode():
        plain = [outputs(model, given)[0] for given in calls]
        got, _ = partial_run(model, Fixed(everything), calls)
    assert all(torch.equal(a[0], b) for a, b in zip(got, plain, strict=True))
    index = some(16)
    got, _ = partial_run(model, Fixed(lambda _: index), calls)
    assert torch.equal(got[2][0], expected(model, calls, index, (4, 4))[2])


def test_gradients_and_calls_outside_of_a_run_are_left_alone():
    model, kwargs = MODELS["DiTTransformer2DModel"]()
    with maskaccel.patch(model, Fixed(some)) as patch:
        with torch.no_grad():
            before = outputs(model, kwargs)[0]
            assert torch.equal(outputs(model, kwargs)[0], before)
        assert "calls as without a patch 2, since no run was begun" in str(patch.report())
        with patch.generation(3) as run:
            for _ in range(3):
                outputs(model, kwargs)[0].sum().backward()
                run.step()
        found = patch.report().activity["Fixed"]
        assert (found["computed"], found["in part"], found["calls as without a patch"]) == (0, 0, 5)
        assert "gradients were on" in found["since"]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "cache", [methods.FORA(), methods.FORA(level="stack"), methods.FBCache()], ids=["module", "stack", "signal"]
)
def test_features_of_some_tokens_are_not_kept_for_others(cache, first):
    model, _ = MODELS["DiTTransformer2DModel"]()
    before = {id(m): dict(m.__dict__) for m in model.modules()}
    for one in (Fixed(some), maskaccel.TokenRoute(0, 1, when="always")):
        text = re.escape(f"{cache.name} keeps features from step to step, and {one.name} runs the blocks of")
        with pytest.raises(maskaccel.PatchError, match=text):
            maskaccel.patch(model, [cache, one] if first else [one, cache])
    assert {id(m): dict(m.__dict__) for m in model.modules()} == before
    with maskaccel.patch(model, [cache, maskaccel.TokenRoute(0, 1)]):
        pass  # of training: a run is dense


def test_calls_of_another_shape_are_computed():
    model, kwargs = MODELS["DiTTransformer2DModel"]()
    calls = steps_of(model, kwargs, 5)
    calls[2] = {name: value[:1] for name, value in calls[2].items()}  # guidance ends in the middle of a run
    calls[3] = {name: value[:1] for name, value in calls[3].items()}
    got, activity = partial_run(model, Fixed(some), calls)
    assert activity["steps"] == "CpCpC"
    with torch.no_grad():
        assert torch.equal(got[2][0], outputs(model, calls[2])[0]) and torch.equal(
            got[4][0], outputs(model, calls[4])[0]
        )


def test_a_copy_has_a_run_of_its_own():
    model, kwargs = MODELS["DiTTransformer2DModel"]()
    calls = steps_of(model, kwargs)
    with maskaccel.patch(model, Fixed(some)) as patch, patch.generation(3) as run, torch.no_grad():
        outputs(model, calls[0])
        run.step()
        twin = copy.deepcopy(model)
        assert active_tokens(twin).kv.nbytes == 0 < active_tokens(model).kv.nbytes
        assert active_tokens(twin) is not active_tokens(model)


# --------------------------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "wan", "qwen", "ltx", "zimage"])
def test_pipelines(name):
    pipeline, kwargs = PIPELINES[name]()
    plain = sample(pipeline, kwargs, steps=6)
    with maskaccel.patch(pipeline, RAS(first=2, dense=(4,), multiple=1)) as patch:
        got = sample(pipeline, kwargs, steps=6)
        assert torch.equal(got, sample(pipeline, kwargs, steps=6)), "two runs of one seed differ"
        activity = patch.report().activity["RAS"]
    assert activity["in part"] > 0 and share(activity) == 0.5
    assert all(line == "CCppCp" for key, line in activity.items() if key.startswith("steps"))
    assert activity["bytes held"] == 0 < activity["peak bytes"]
    assert torch.isfinite(got).all() and not torch.equal(got, plain)
    assert torch.equal(sample(pipeline, kwargs, steps=6), plain), "remove() did not restore the pipeline"


def test_both_halves_of_a_guided_batch_share_tokens_that_each_image_has_of_its_own():
    pipeline, kwargs = PIPELINES["dit"]()  # two images
    seen = []
    with maskaccel.patch(pipeline, RAS(first=1, dense=(), multiple=1)) as patch:
        run = active_tokens(pipeline.transformer)
        choose = run.choose

        def noted(call):
            index = choose(call)
            seen.append(None if index is None else index.keep)
            return index

        run.choose = noted
        sample(pipeline, kwargs, steps=3)
        assert patch.report().activity["RAS"]["in part"] == 2
    assert seen[0] is None and all(ids.shape == (4, 8) for ids in seen[1:])
    for ids in seen[1:]:
        assert torch.equal(ids[:2], ids[2:]) and not torch.equal(ids[0], ids[1])


def test_image_to_image_starts_late_and_is_dense_first():
    from zoo.pipelines import MORE_PIPELINES

    pipeline, kwargs = MORE_PIPELINES["flux_img2img"]()
    with maskaccel.patch(pipeline, RAS(first=1, dense=(8,), multiple=1)) as patch:
        sample(pipeline, kwargs, steps=10)
        assert patch.report().activity["RAS"]["steps"] == "CpppCp"


# ------------------------------------------------------------------------------------------------------------ solvers


@pytest.mark.parametrize(("scheduler", "why"), [
    (diffusers.DPMSolverMultistepScheduler(), "mixes the outputs of several steps"),
    (diffusers.UniPCMultistepScheduler(), "mixes the outputs of several steps"),
    (diffusers.PNDMScheduler(), "mixes the outputs of several steps"),
    (diffusers.HeunDiscreteScheduler(), "mixes the outputs of several steps"),
    (diffusers.EulerAncestralDiscreteScheduler(), "adds noise at every step"),
    (diffusers.DDPMScheduler(), "adds noise at every step"),
    (diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling=True adds noise"),
])  # fmt: skip
def test_solvers_that_mix_outputs_are_refused(scheduler, why):
    pipeline, _ = PIPELINES["dit"]()
    pipeline.scheduler = scheduler
    before = dict(vars(pipeline.transformer))
    with pytest.raises(PatchError, match=f"RAS: {type(scheduler).__name__} .*{why}.*use one of FlowMatchEuler"):
        maskaccel.patch(pipeline, RAS())
    assert dict(vars(pipeline.transformer)) == before


def test_a_solver_that_is_put_in_later_computes_everything():
    pipeline, kwargs = PIPELINES["dit"]()
    with maskaccel.patch(pipeline, RAS(first=1)) as patch:
        pipeline.scheduler = diffusers.DPMSolverMultistepScheduler()
        with pytest.warns(UserWarning, match="scheduler was replaced after the patch"):
            sample(pipeline, kwargs, steps=3)
        assert patch.report().activity["RAS"]["in part"] == 0


def test_a_compiled_model_gives_the_same():
    model, kwargs = MODELS["DiTTransformer2DModel"]()
    calls = steps_of(model, kwargs)
    index = some(16)
    wanted, _ = partial_run(model, Fixed(lambda _: index), calls)
    with maskaccel.patch(model, Fixed(lambda _: index)) as patch, torch.no_grad():
        model.compile(backend="eager")
        with patch.generation(len(calls)) as run:
            for given, dense in zip(calls, wanted, strict=True):
                torch.testing.assert_close(outputs(model, given)[0], dense[0], rtol=1e-5, atol=1e-5)
                run.step()
        assert patch.report().activity["Fixed"]["in part"] == 2


def test_a_solver_of_ones_own_is_refused_unless_its_step_is_that_of_a_known_one():
    class Renamed(diffusers.DDIMScheduler):
        pass

    class Changed(diffusers.DDIMScheduler):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    assert refusal(Renamed()) is None
    assert "is not known to step from the current output alone" in refusal(Changed())


def test_noise_that_a_call_asks_for_is_refused():
    pipeline, kwargs = PIPELINES["pixart"]()
    with maskaccel.patch(pipeline, RAS(first=1)):
        with pytest.raises(ValueError, match=r"RAS: DDIMScheduler.step with eta=0.5 adds noise"):
            sample(pipeline, kwargs, steps=3, eta=0.5)
        sample(pipeline, kwargs, steps=3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_clean_latents_are_those_of_ddim(kind):
    scheduler = diffusers.DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(10)
    output, x = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    t = scheduler.timesteps[4]
    point = Point.of(scheduler, t)
    clean = scheduler.step(output, t, x).pred_original_sample
    torch.testing.assert_close(point.clean(output, x), clean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(point.output(clean, x), output, rtol=1e-4, atol=1e-4)
    noised = point.noised(clean, output) if kind == "epsilon" else x
    torch.testing.assert_close(noised, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_clean_latents_are_those_of_euler(kind):
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type=kind)
    scheduler.set_timesteps(10)
    output, x = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 3
    t = scheduler.timesteps[0]
    point = Point.of(scheduler, t)
    clean = scheduler.step(output, t, x).pred_original_sample
    torch.testing.assert_close(point.clean(output, x), clean, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(point.output(clean, x), output, rtol=1e-3, atol=1e-3)


def test_outputs_that_stand_for_a_reference_lead_to_it():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    reference, x = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        point = Point.of(scheduler, t)
        x = scheduler.step(point.output(reference, x), t, x).prev_sample
    torch.testing.assert_close(x, reference, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- keys and values


def test_fp8_is_close_and_what_is_computed_now_is_not_rounded():
    model, kwargs = MODELS["SD3Transformer2DModel"]()
    calls = steps_of(model, kwargs)
    with torch.no_grad():
        plain = [outputs(model, given)[0] for given in calls]
    got, fp8 = partial_run(model, Fixed(everything, storage=KVStorage(fp8=True)), calls)
    assert all(torch.equal(a[0], b) for a, b in zip(got, plain, strict=True))
    index = some(12)
    exact, wide = partial_run(model, Fixed(lambda _: index), calls)
    got, fp8 = partial_run(model, Fixed(lambda _: index, storage=KVStorage(fp8=True)), calls)
    difference = (got[2][0] - exact[2][0]).abs().max()
    assert 0 < difference < 0.02 * exact[2][0].abs().max()
    assert fp8["peak bytes"] < 0.6 * wide["peak bytes"]


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "ChromaTransformer2DModel"])
def test_the_kernel_gives_the_same_but_for_rounding(name):
    model, kwargs = MODELS[name]()  # Chroma masks its padding
    calls = steps_of(model, kwargs)
    index = some(15)
    wanted, _ = partial_run(model, Fixed(lambda _: index), calls)
    got, _ = partial_run(model, Fixed(lambda _: index, kernel=True), calls)
    torch.testing.assert_close(got[2][0], wanted[2][0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(got[2][0], wanted[2][0])


def test_offload_gives_the_same():
    model, kwargs = MODELS["FluxTransformer2DModel"]()
    calls = steps_of(model, kwargs)
    index = some(15, batch=2)
    for fp8 in (False, True):
        wanted, _ = partial_run(model, Fixed(lambda _: index, storage=KVStorage(fp8=fp8)), calls)
        got, _ = partial_run(model, Fixed(lambda _: index, storage=KVStorage(fp8=fp8, offload=True)), calls)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(got, wanted, strict=True))


def test_layers_without_cache_see_the_active_tokens_alone():
    model, kwargs = MODELS["DiTTransformer2DModel"]()
    calls = steps_of(model, kwargs)
    both, all_bytes = partial_run(model, Fixed(some), calls)
    got, one_bytes = partial_run(model, Fixed(some, storage=KVStorage(layers=(1,))), calls)
    assert not torch.equal(got[2][0], both[2][0])
    assert one_bytes["peak bytes"] < all_bytes["peak bytes"]
    with torch.no_grad():
        plain = outputs(model, calls[2])[0]
    got, _ = partial_run(model, Fixed(everything, storage=KVStorage(layers=(1,))), calls)
    assert torch.equal(got[2][0], plain)
    for layers, named in (((0, 7), r"\[7\]"), ((), "none")):
        with pytest.raises(PatchError, match=rf"names {named} of the 2 layers .*, which are 0 to 1"):
            maskaccel.patch(model, Fixed(some, storage=KVStorage(layers=layers)))


def test_memory_that_does_not_suffice_is_told_before_anything_is_allocated(monkeypatch):
    model, kwargs = MODELS["DiTTransformer2DModel"]()
    calls = steps_of(model, kwargs)
    need = 2 * 2 * 2 * 16 * 32 * 4  # layers, keys and values, samples, tokens, width, bytes
    storage = KVStorage(max_bytes=need - 1)
    with maskaccel.patch(model, Fixed(some, storage=storage)) as patch:
        message = rf"take {need} bytes .*max_bytes={need - 1} leaves.*fp8=True"
        with pytest.raises(KVMemoryError, match=message), torch.no_grad(), patch.generation(3):
            outputs(model, calls[0])
        assert active_tokens(model).kv.nbytes == 0
    partial_run(model, Fixed(some, storage=KVStorage(max_bytes=need)), calls)
    monkeypatch.setattr("maskaccel.state.kv.free_bytes", lambda device: 100)
    with pytest.raises(KVMemoryError, match=rf"{need} bytes for one guidance branch, 100 are free on cpu; use"):
        partial_run(model, Fixed(some), calls)


@pytest.mark.parametrize(("settings", "message"), [
    ({"layers": [1]}, r"layers=\[1\] must be a tuple"), ({"layers": (-1,)}, "layers="), ({"fp8": 1}, "fp8=1 must be"),
    ({"offload": None}, "offload=None"), ({"max_bytes": 0}, "max_bytes=0 must be"),
])  # fmt: skip
def test_settings_of_storage(settings, message):
    with pytest.raises(ValueError, match=message):
        KVStorage(**settings)


# --------------------------------------------------------------------------------------------------------- errors


def test_an_exception_ends_the_run_and_frees_what_it_held():
    model, kwargs = MODELS["DiTTransformer2DModel"]()
    calls = steps_of(model, kwargs)
    index = some(20)
    with maskaccel.patch(model, Fixed(lambda _: index)) as patch:
        with pytest.raises(ValueError), torch.no_grad(), patch.generation(3) as run:
            outputs(model, calls[0])
            run.step()
            outputs(model, calls[1])
        state = active_tokens(model)
        assert state.kv.nbytes == state.nbytes == 0 and state.mode is None
        with torch.no_grad():
            outputs(model, calls[1])


def test_models_that_need_the_whole_grid_are_refused():
    model, _ = MODELS["SanaTransformer2DModel"]()
    with pytest.raises(PatchError, match="convolves over the grid"):
        maskaccel.patch(model, RAS())


def test_steps_without_names_are_computed():
    model, kwargs = MODELS["DiTTransformer2DModel"]()
    with maskaccel.patch(model, Fixed(some)) as patch, patch.generation(3) as run, torch.no_grad():
        for given in steps_of(model, kwargs):
            outputs(model, given)
            outputs(model, given)  # a second branch that nobody names
            run.step()
        report = patch.report()
    assert report.activity["Fixed"]["in part"] == 0
    assert any("name the branches" in note for note in report.notes)


# -------------------------------------------------------------------------------------------------------- small parts


def test_dense_steps():
    assert "".join(a[0] for a in DenseAt(2, (4, 6), 7).plan(10)) == "ccppcpcpcc"
    assert "".join(a[0] for a in DenseAt().plan(3)) == "cpp"
    for bad in ({"first": 0}, {"at": [1]}, {"at": (-1,)}, {"end": 1.5}):
        with pytest.raises(ValueError, match="must be"):
            DenseAt(**bad)


def by_hand(value, grid, axes):
    """Tokens of latents, element by element: `{token: {(place in the patch): channels}}`."""
    rest = next(a for a in range(1, value.dim()) if a not in axes)
    sizes = [value.shape[a] // g for a, g in zip(axes, grid, strict=True)]
    found = torch.empty(value.shape[0], *grid, *sizes, value.shape[rest])
    for place in torch.cartesian_prod(*(torch.arange(value.shape[a]) for a in axes)).view(-1, len(axes)).tolist():
        picked = value.movedim((*axes, rest), (*range(1, value.dim()),))
        cell = [p // s for p, s in zip(place, sizes, strict=True)]
        inside = [p % s for p, s in zip(place, sizes, strict=True)]
        found[(slice(None), *cell, *inside)] = picked[(slice(None), *place)]
    return found.flatten(1, len(grid)).flatten(2, 1 + len(grid))


@pytest.mark.parametrize(("shape", "grid", "axes"), [
    ((2, 3, 4, 6), (2, 3), None), ((2, 3, 2, 4, 6), (2, 2, 3), None), ((2, 2, 3, 4, 6), (2, 2, 3), (1, 3, 4)),
    ((2, 2, 4, 6, 3), (2, 2, 3), (1, 2, 3)), ((2, 3, 8), (8,), (2,)), ((2, 8, 3), (8,), (1,)),
])  # fmt: skip
def test_elements_of_tokens(shape, grid, axes):
    where = LatentGrid(grid, axes)
    value = torch.randn(shape)
    tokens = where.tokens(value)
    wanted = by_hand(value, grid, axes or tuple(range(2, 2 + len(grid))))
    assert torch.equal(tokens, wanted)
    mask = torch.rand(2, where.count) > 0.5
    spread = where.spread(mask, value).expand(shape)
    assert torch.equal(where.tokens(spread.float()), mask.float()[:, :, None, None].expand_as(tokens))


def test_packed_latents_and_tokens_beyond_the_grid():
    where = LatentGrid((2, 3))
    value = torch.randn(2, 9, 4)
    assert torch.equal(where.tokens(value), value[:, :6, None])
    spread = where.spread(torch.ones(1, 6, dtype=torch.bool), value)
    assert spread.shape == (1, 9, 1) and spread[0, :, 0].tolist() == [True] * 6 + [False] * 3
    with pytest.raises(ValueError, match=r"\(2, 3, 5, 5\) are no grid \(2, 3\)"):
        where.tokens(torch.randn(2, 3, 5, 5))


def test_rows_of_joint_sequences():
    from maskaccel.patching.active_attention import row_ids

    index = TokenIndex.from_keep(torch.tensor([1, 3]), 5)
    assert row_ids(index, 0, True).tolist() == [[1, 3]]
    assert row_ids(index, 2, True).tolist() == [[0, 1, 3, 5]]
    assert row_ids(index, 2, False).tolist() == [[1, 3, 5, 6]]
