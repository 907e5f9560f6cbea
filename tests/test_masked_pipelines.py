"""Sampling in diffusers' masked pipelines: the tokens of the unpatched ones, on the same noise; undo; bad input."""

from __future__ import annotations

import copy

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from zoo.masked import MASK, TinyLLaDA, amused, amused_inputs, llada2

import maskaccel
from maskaccel import methods
from maskaccel.patching.transaction import PatchError

STEPS = 6


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def image(pipeline, output="latent", **options):
    given = {**amused_inputs(), "num_inference_steps": STEPS, "guidance_scale": 3.0, **options}
    return pipeline(**given, generator=generator(), output_type=output)[0]


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8))


# ------------------------------------------------------------------------------------------------------------ aMUSEd
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 0.0}, {"temperature": 1}, {"num_inference_steps": 1}])
def test_amused_gives_the_same_tokens(head, options):
    pipeline = amused()
    want = image(pipeline, **options)
    with maskaccel.patch(pipeline, [methods.MaskGIT(noise="pipeline", masked_head=head)]) as patch:
        assert image(pipeline, **options).equal(want)
        told = patch.report().activity["MaskGIT"]
    assert told["steps"] == options.get("num_inference_steps", STEPS)
    assert not head or told["head rows"] + told["head rows left out"] == 64 * told["steps"]
    assert not head or told["steps"] == 1 or told["head rows left out"] > 64


def test_amused_gives_the_same_image():
    pipeline = amused()
    want = image(pipeline, "np")
    with maskaccel.patch(pipeline, [methods.MaskGIT(noise="pipeline")]):
        assert np.array_equal(image(pipeline, "np"), want)


@pytest.mark.parametrize("strength", [0.4, 0.8])
def test_amused_from_an_image(strength):
    pipeline = amused("AmusedImg2ImgPipeline")
    given = {"image": picture(), "strength": strength, **amused_inputs(1)}
    want = image(pipeline, **given)
    with maskaccel.patch(pipeline, [methods.MaskGIT(noise="pipeline")]):
        assert image(pipeline, **given).equal(want)


def test_amused_inside_a_mask():
    pipeline = amused("AmusedInpaintPipeline")
    hole = np.zeros((16, 16), dtype=np.uint8)
    hole[4:12, 2:10] = 255
    given = {"image": picture(), "mask_image": Image.fromarray(hole), "strength": 1.0, **amused_inputs(1)}
    want = image(pipeline, **given)
    with maskaccel.patch(pipeline, [methods.MaskGIT(noise="pipeline")]) as patch:
        assert image(pipeline, **given).equal(want)
        told = patch.report().activity["MaskGIT"]
    assert told["head rows left out"] > 2 * told["head rows"]  # a quarter is masked at the start


def test_the_counters_noise():
    """Other tokens of the same law: repeatable from the pipeline's generator, none left masked."""
    pipeline = amused()
    plain = image(pipeline)
    with maskaccel.patch(pipeline, [methods.MaskGIT()]):
        first = image(pipeline)
        assert first.equal(image(pipeline)) and not first.equal(plain) and (first != MASK).all()
        other = pipeline(**amused_inputs(), num_inference_steps=STEPS, generator=generator(2), output_type="latent")[0]
        assert not first.equal(other)


def test_amused_is_as_it_was_after_remove():
    pipeline = amused()
    want, names = image(pipeline), set(pipeline.scheduler.__dict__)
    patch = maskaccel.patch(pipeline, [methods.MaskGIT()])
    image(pipeline)
    patch.remove()
    assert set(pipeline.scheduler.__dict__) == names and "step" not in pipeline.scheduler.__dict__
    assert not pipeline.transformer._forward_pre_hooks
    assert image(pipeline).equal(want)


def test_a_copied_pipeline_samples_for_itself():
    pipeline = amused()
    with maskaccel.patch(pipeline, [methods.MaskGIT()]) as patch:
        want = image(pipeline)
        copied = copy.deepcopy(pipeline)
        assert image(copied).equal(want)
        assert patch.report().activity["MaskGIT"]["steps"] == STEPS


def test_logits_outside_of_a_run_are_whole():
    pipeline = amused()
    given = {name: amused_inputs()[name] for name in ("encoder_hidden_states",)}
    call = {
        **given, "input_ids": torch.full((2, 8, 8), MASK), "pooled_text_emb": amused_inputs()["prompt_embeds"],
        "micro_conds": torch.zeros(2, 5),
    }  # fmt: skip
    call["input_ids"][:, 2:] = 3
    with maskaccel.patch(pipeline, [methods.MaskGIT()]), torch.no_grad():
        image(pipeline)
        assert pipeline.transformer(**call).shape == (2, 32, 8, 8)

        def broken(*_):
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            image(pipeline, callback=broken)
        assert pipeline.transformer(**call).shape == (2, 32, 8, 8)


def test_with_a_cache_of_features():
    """A method that follows the scheduler's steps hears of those that are taken over."""
    pipeline = amused()
    fora = methods.FORA(interval=2)
    with maskaccel.patch(pipeline, [fora]):
        want = image(pipeline)
    for chosen in ([fora, methods.MaskGIT(noise="pipeline")], [methods.MaskGIT(noise="pipeline"), fora]):
        with maskaccel.patch(pipeline, chosen) as patch:
            assert image(pipeline).equal(want)
            assert patch.report().activity["FORA"]["reused"] > 0


# ------------------------------------------------------------------------------------------------------------ LLaDA2
def text(pipeline, **options):
    prompt = torch.randint(0, 38, (3, 5), generator=generator(7))
    given = {
        "input_ids": prompt, "gen_length": 20, "block_length": 8, "num_inference_steps": 4, "mask_token_id": 39,
        "eos_token_id": 38, "output_type": "seq", "threshold": 0.3, **options,
    }  # fmt: skip
    return pipeline(**given, generator=generator(2)).sequences


OPTIONS = [
    {},
    {"editing_threshold": None},
    {"temperature": 1.0},
    {"temperature": 0.7, "editing_threshold": 0.3},
    {"temperature": 1.0, "threshold": 0.9, "eos_early_stop": False},
    {"temperature": 0.5, "sampling_method": "greedy", "threshold": 2.0},
    {"num_inference_steps": 8, "threshold": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_llada2_gives_the_same_tokens(options):
    pipeline = llada2()
    want = text(pipeline, **options)
    calls = len(pipeline.model.shapes)
    with maskaccel.patch(pipeline, [methods.LLaDA2(noise="pipeline")]) as patch:
        assert text(pipeline, **options).equal(want)
        told = patch.report().activity["LLaDA2"]
    shapes = pipeline.model.shapes[calls:]
    assert len(shapes) == calls == told["steps"]
    assert all(shape[1] == 8 for shape in shapes) and told["head rows left out"] > 0


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.8}])
def test_what_the_op_does_not_serve_stays_the_schedulers(options):
    pipeline = llada2()
    given = {"temperature": 1.0, **options}
    want = text(pipeline, **given)
    with maskaccel.patch(pipeline, [methods.LLaDA2()]) as patch:
        assert text(pipeline, **given).equal(want)
        told = patch.report().activity["LLaDA2"]
    assert told["steps"] == 0 and told[f"left to the scheduler ({next(iter(options))})"] > 0


def test_the_outputs_of_a_step():
    """Everything that the scheduler returns, from the same noise."""
    scheduler = diffusers.BlockRefinementScheduler()
    tokens = torch.randint(0, 9, (3, 8), generator=generator(1))
    tokens[:, ::2] = 9
    logits = torch.randn(3, 8, 10, generator=generator(2))
    pipeline = llada2()
    pipeline.scheduler = scheduler
    scheduler.set_timesteps(3, block_length=8)
    prompt = torch.arange(8) < 2
    given = {"mask_token_id": 9, "threshold": 0.2, "editing_threshold": 0.1, "prompt_mask": prompt}
    want = scheduler.step(logits, 1, tokens, **given, temperature=1.0, generator=generator(3), return_dict=False)
    with maskaccel.patch(pipeline, [methods.LLaDA2(noise="pipeline")]):
        scheduler.set_timesteps(3, block_length=8)
        got = scheduler.step(logits, 1, tokens, **given, temperature=1.0, generator=generator(3), return_dict=False)
        named = scheduler.step(logits, torch.tensor(1), tokens, **given)
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-6)
    assert bool(got[1].any()) and bool(got[2].any())  # committed and edited ones
    assert type(named).__name__ == "BlockRefinementSchedulerOutput"


def test_uniform_corruption_stays_the_schedulers():
    pipeline = llada2()
    scheduler = pipeline.scheduler
    logits, tokens = torch.randn(2, 8, 10, generator=generator()), torch.zeros(2, 8, dtype=torch.long)
    with maskaccel.patch(pipeline, [methods.LLaDA2()]) as patch:
        scheduler.set_timesteps(3, block_length=8)
        scheduler.step(logits, 0, tokens, mask_token_id=None, generator=generator())
        assert (
            "left to the scheduler (mask_token_id is None: tokens are replaced, not masked)"
            in (patch.report().activity["LLaDA2"])
        )


def test_others_get_all_logits():
    pipeline = llada2()
    with maskaccel.patch(pipeline, [methods.LLaDA2()]):
        text(pipeline)
        assert pipeline.model(torch.zeros(1, 30, dtype=torch.long)).logits.shape == (1, 30, 40)


def test_llada2_is_as_it_was_after_remove():
    pipeline = llada2()
    want, names = text(pipeline, temperature=1.0), set(pipeline.scheduler.__dict__)
    with maskaccel.patch(pipeline, [methods.LLaDA2()]):
        mine = text(pipeline, temperature=1.0)
        assert (mine != 39).all() and text(copy.deepcopy(pipeline), temperature=1.0).equal(mine)
    assert set(pipeline.scheduler.__dict__) == names and "forward" not in pipeline.model.lm_head.__dict__
    assert text(pipeline, temperature=1.0).equal(want)


# ---------------------------------------------------------------------------------------------------------- bad input
def test_what_cannot_be_patched():
    with pytest.raises(PatchError, match="it is no UVit2DModel"):
        maskaccel.patch(llada2(), [methods.MaskGIT()])
    with pytest.raises(PatchError, match="it is no BlockRefinementScheduler"):
        maskaccel.patch(amused(), [methods.LLaDA2()])
    with pytest.raises(PatchError, match="the target has no scheduler"):
        maskaccel.patch(TinyLLaDA(), [methods.LLaDA2()])
    with pytest.raises(ValueError, match="noise='pink'"):
        methods.LLaDA2(noise="pink")


def test_another_version_of_a_scheduler():
    class Later(diffusers.AmusedScheduler):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    pipeline = amused()
    pipeline.scheduler = Later(mask_token_id=MASK)
    with pytest.raises(PatchError, match=r"unknown version of Later.step"):
        maskaccel.patch(pipeline, [methods.MaskGIT()])


def test_a_head_that_is_not_there():
    pipeline = llada2()
    pipeline.model.output = pipeline.model.lm_head
    del pipeline.model.lm_head
    with maskaccel.patch(pipeline, [methods.LLaDA2()]) as patch:
        assert any("no lm_head" in reason for _, _, reason in patch.report().skipped)


def test_nan_logits_are_an_error():
    pipeline = llada2()
    with torch.no_grad():
        pipeline.model.lm_head.weight.fill_(torch.nan)
    with maskaccel.patch(pipeline, [methods.LLaDA2()]), pytest.raises(ValueError, match="hold a NaN"):
        text(pipeline)
