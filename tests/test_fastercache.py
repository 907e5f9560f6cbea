"""FasterCache, against its equations written out and on real pipelines."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from _plain_dit import inputs
from zoo.pipelines import PIPELINES, dit, sample

import maskaccel
from maskaccel.methods import FasterCache, FusedAdaLN
from maskaccel.state.guidance import split_bands

STEPS = 6
ALL = (0.0, 1000.0)
ANY = {"attention_window": ALL, "uncond_window": ALL}


@functools.cache
def built(name):
    pipeline, kwargs = PIPELINES[name]()
    return pipeline, kwargs, sample(pipeline, kwargs, steps=STEPS)


@pytest.fixture(params=["dit", "pixart", "sd3", "flux", "wan", "ltx", "zimage"])
def name(request):
    return request.param


@pytest.mark.filterwarnings("ignore:FasterCache can never reuse")
@pytest.mark.parametrize(
    "method",
    [FasterCache(attention=1, uncond=1), FasterCache(attention_window=(1e-3, 2e-3), uncond_window=(1e-3, 2e-3))],
    ids=["intervals", "windows"],
)
def test_computing_always_is_the_unpatched_pipeline(name, method):
    pipeline, kwargs, plain = built(name)
    with maskaccel.patch(pipeline, method) as patch:
        assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain)
        assert patch.report().activity["FasterCache"]["reused"] == 0
    assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain), "remove() did not restore the pipeline"
    assert "forward" not in pipeline.transformer.__dict__


def test_runs_repeat_and_fused_blocks_agree(name):
    pipeline, kwargs, plain = built(name)
    method, outs = FasterCache(attention=2, uncond=3, **ANY), []
    for methods in ([method], [method, FusedAdaLN()]):
        with maskaccel.patch(pipeline, methods) as patch:
            outs.append(sample(pipeline, kwargs, steps=STEPS))
            activity = patch.report().activity["FasterCache"]
            assert activity["reused"] > activity["unconditional reused"] == (0 if name == "flux" else 4)
            assert activity["bytes held"] == 0 < activity["peak bytes"] and "warning" not in activity
            assert torch.equal(outs[-1], sample(pipeline, kwargs, steps=STEPS)), "two runs of one seed differ"
    assert not torch.equal(outs[0], plain)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-3, atol=1e-3 * plain.abs().max().item())


def bands_of(image):
    """The low and high band of images `(B, C, H, W)` by a sum over every frequency, in fp64."""
    image = image.double()
    height, width = image.shape[-2:]
    radius, low = min(height, width) // 5, torch.zeros_like(image)
    y, x = torch.arange(height)[:, None].double(), torch.arange(width)[None].double()
    for ky in range(-(height // 2), height - height // 2):
        for kx in range(-(width // 2), width - width // 2):
            if ky * ky + kx * kx <= radius * radius:
                wave = 2 * math.pi * (ky * y / height + kx * x / width)
                real = (image * wave.cos()).sum((-2, -1), keepdim=True)
                imag = (image * wave.sin()).sum((-2, -1), keepdim=True)
                low += (real * wave.cos() + imag * wave.sin()) / (height * width)
    return low, image - low


@torch.no_grad()
def written_out(model, calls, times, labels, null, method, cond_first):
    """FasterCache of a DiT with both branches in one batch: `[(cond, uncond)]` for each step."""
    kept, held = {}, [b.attn1 for b in model.transformer_blocks]
    mode = {}

    def forward_of(module):
        inner = type(module).forward

        def forward(hidden, *args, **kwargs):
            values = kept.setdefault(module, [])
            if mode["extrapolate"] and not mode["both"]:
                w = mode["weight"]
                return values[-1] if len(values) < 2 else values[-1] + w * (values[-1] - values[-2])
            out = inner(module, hidden, *args, **kwargs)
            half = len(out) // 2
            values.append((out[:half] if cond_first else out[half:]) if mode["both"] else out)
            return out

        return forward

    for module in held:
        module.forward = forward_of(module)
    outs, low, high = [], None, None
    for step, ((x, _), time) in enumerate(zip(calls, times, strict=True)):
        t = torch.full((len(x),), time)
        (a0, a1), (u0, u1) = method.attention_window, method.uncond_window
        mode["both"] = low is None or step % method.uncond == 0 or not u0 <= time <= u1
        mode["extrapolate"] = step % method.attention != 0 and a0 <= time <= a1
        mode["weight"] = method.weight[0] + (method.weight[1] - method.weight[0]) * step / (len(calls) - 1)
        if mode["both"]:
            order = torch.cat([labels, null] if cond_first else [null, labels])
            one, two = model(torch.cat([x, x]), timestep=torch.cat([t, t]), class_labels=order).sample.chunk(2)
            cond, uncond = (one, two) if cond_first else (two, one)
            low, high = (a - b for a, b in zip(bands_of(uncond), bands_of(cond), strict=True))
        else:
            cond = model(x, timestep=t, class_labels=labels).sample
            low = low * (method.low_growth if method.low_window[0] <= time <= method.low_window[1] else 1)
            high = high * (method.high_growth if method.high_window[0] <= time <= method.high_window[1] else 1)
            own_low, own_high = bands_of(cond)
            uncond = (own_low + low + own_high + high).float()
        outs.append(torch.stack([cond, uncond]))
    for module in held:
        del module.forward
    return torch.stack(outs)


TIMES = [980, 900, 830, 760, 690, 610, 540, 450, 380, 310, 240, 170, 90, 20]
CASES = [
    FasterCache(order="cond_first"),
    FasterCache(order="uncond_first"),
    FasterCache(2, 3, (0.5, 0.5), ALL, ALL, 1.3, (300.0, 900.0), 0.8, (0.0, 500.0), "auto"),
    FasterCache(3, 4, (-0.2, 0.7), (200.0, 900.0), (100.0, 800.0), 0.9, ALL, 1.2, ALL, "uncond_first"),
]


@pytest.mark.parametrize("method", CASES, ids=range(len(CASES)))
def test_the_equations_written_out(method):
    model, labels, null = dit()[0].transformer, torch.tensor([3, 5]), torch.tensor([1000, 1000])
    cond_first, calls = method.order != "uncond_first", inputs(len(TIMES), batch=2)
    expected = written_out(model, calls, TIMES, labels, null, method, cond_first)
    got = []
    order = torch.cat([labels, null] if cond_first else [null, labels])
    with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(timesteps=TIMES) as run:
        for (x, _), time in zip(calls, TIMES, strict=True):
            t = torch.full((4,), time)
            out = model(torch.cat([x, x]), timestep=t, class_labels=order).sample.chunk(2)
            got.append(torch.stack(out if cond_first else out[::-1]))
            run.step()
        activity = patch.report().activity["FasterCache"]
    assert activity["unconditional reused"] > 3 and activity["reused"] > activity["unconditional reused"]
    torch.testing.assert_close(torch.stack(got), expected, rtol=1e-4, atol=1e-4)


def test_branches_of_their_own_calls_give_what_a_batch_gives():
    """Wan, step by step: named calls against one batch of both branches."""
    model = built("wan")[0].transformer
    prompts = {b: torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(s)) for s, b in enumerate(("u", "c"))}
    xs = [torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(3)) * (1 - 0.04 * i) for i in range(9)]
    method, outs = FasterCache(2, 4, **ANY, low_window=ALL, high_window=ALL), {}
    for batched in (False, True):
        with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(len(xs)) as run:
            for i, x in enumerate(xs):
                t = torch.tensor([900 - 20 * i])
                if batched:
                    both = torch.cat([prompts["u"], prompts["c"]])
                    uncond, cond = model(x.repeat(2, 1, 1, 1, 1), t.repeat(2), both, return_dict=False)[0].chunk(2)
                else:
                    with model.cache_context("cond"):
                        cond = model(x, t, prompts["c"], return_dict=False)[0]
                    with model.cache_context("uncond"):
                        uncond = model(x, t, prompts["u"], return_dict=False)[0]
                outs.setdefault(batched, []).append(torch.cat([cond, uncond]))
                run.step()
            assert patch.report().activity["FasterCache"]["unconditional reused"] == 6
    torch.testing.assert_close(torch.stack(outs[False]), torch.stack(outs[True]), rtol=1e-4, atol=1e-4)


def test_an_unconditional_call_that_comes_first_is_computed():
    """Nothing of this step is known then: neither an old output nor the other branch's may stand in."""
    model = built("wan")[0].transformer
    texts = [torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    x = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(7))
    method = FasterCache(attention=None, uncond=3, **ANY)
    with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(6) as run:
        for i in range(6):
            t = torch.tensor([900 - 30 * i])
            for branch, text in (("uncond", texts[1]), ("cond", texts[0])):
                with run.branch(branch):
                    got = model(x, t, text, return_dict=False)[0]
                expected = type(model).forward(model, x, t, text, return_dict=False)[0]
                assert torch.equal(got, expected)
            run.step()
        activity = patch.report().activity["FasterCache"]
    assert activity["unconditional computed"] == 6 and activity["unconditional reused"] == 0


def test_a_batch_of_two_images_is_no_guidance():
    model, times = dit()[0].transformer, TIMES[:6]
    calls = inputs(len(times), batch=2)
    with torch.no_grad(), maskaccel.patch(model, FasterCache(2, 3, **ANY)) as patch:
        outs = []
        for rows in (slice(0, 2), slice(0, 1), slice(1, 2)):
            with patch.generation(timesteps=times) as run:
                for (x, _), time in zip(calls, times, strict=True):
                    x = x[rows]
                    t, labels = torch.full((len(x),), time), torch.tensor([3, 5])[rows]
                    outs.append(model(timestep=t, class_labels=labels, hidden_states=x).sample)
                    run.step()
        activity = patch.report().activity["FasterCache"]
    assert activity["unconditional reused"] == 0 < activity["reused"]
    both, first, second = outs[:6], outs[6:12], outs[12:]
    torch.testing.assert_close(torch.stack(both), torch.cat([torch.stack(first), torch.stack(second)], 1))


def test_other_calls_of_a_step_do_not_disturb():
    """LTX-2 runs both branches in a batch and then a perturbed one alone; and keywords come in any order."""
    model, x = dit()[0].transformer, torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1)
    method, outs = FasterCache(2, 3, **ANY, low_window=ALL, high_window=ALL), {}
    for more in (False, True):
        with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(6) as run:
            for i in range(6):
                t, labels = torch.full((2,), 900 - 20 * i), torch.tensor([3, 1000])
                with run.branch("cond_uncond"):
                    out = model(timestep=t, class_labels=labels, hidden_states=x * (1 - 0.1 * i)).sample
                outs.setdefault(more, []).append(out)
                if more:
                    with run.branch("uncond_stg"):
                        model(hidden_states=x[:1] + i, timestep=t[:1], class_labels=labels[:1])
                run.step()
            assert patch.report().activity["FasterCache"]["unconditional reused"] == 4
    assert torch.equal(torch.stack(outs[False]), torch.stack(outs[True]))


def test_bands_of_images_and_of_tokens():
    generator = torch.Generator().manual_seed(0)
    uncond, cond = (torch.randn(2, 3, 10, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = torch.stack(bands_of(uncond - cond))
    torch.testing.assert_close(split_bands(uncond, cond, ()), expected, rtol=1e-10, atol=1e-10)
    assert expected[0].norm() > 0.1 < expected[1].norm()

    def tokens(image):
        return image.flatten(-2).transpose(-1, -2)

    found = split_bands(tokens(uncond), tokens(cond), (2, 1, 10, 11, 3))
    torch.testing.assert_close(found, tokens(expected), rtol=1e-10, atol=1e-10)
    narrow = split_bands(uncond.bfloat16(), cond.bfloat16(), ())
    assert narrow.dtype == torch.float32


def _tokens_out(method, steps=5):
    """FLUX-like true guidance in named calls: outputs are tokens, and nobody tells the grid."""
    model, calls = built("flux")[0].transformer, []
    x, texts = torch.randn(1, 16, 16), [torch.randn(1, 6, 24) for _ in range(2)]
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4)).float()
    with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(steps) as run:
        for i in range(steps):
            for branch, text in zip(("cond", "uncond"), texts, strict=True):
                with run.branch(branch):
                    calls.append(
                        model(
                            hidden_states=x, encoder_hidden_states=text, pooled_projections=torch.ones(1, 16),
                            timestep=torch.tensor([0.9 - 0.1 * i]), img_ids=ids, txt_ids=torch.zeros(6, 3),
                        ).sample
                    )  # fmt: skip
            run.step()
        return patch.report()


def test_outputs_of_tokens_need_a_grid():
    report = _tokens_out(FasterCache(2, 3, **ANY))
    assert report.activity["FasterCache"]["unconditional reused"] == 0
    assert any("pass grid=(rows, columns)" in note for note in report.notes)
    known = _tokens_out(FasterCache(2, 3, **ANY, grid=(4, 4), low_window=ALL, high_window=ALL))
    assert known.activity["FasterCache"]["unconditional reused"] == 3 and not known.notes
    with pytest.raises(ValueError, match=r"grid=\(3, 5\) does not fit outputs of 16 tokens"):
        _tokens_out(FasterCache(2, 3, **ANY, grid=(3, 5)))


def test_narrow_models_run():
    model = dit()[0].transformer.bfloat16()
    x = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16).repeat(2, 1, 1, 1)
    method = FasterCache(2, 3, **ANY, low_window=ALL, high_window=ALL)
    with torch.inference_mode(), maskaccel.patch(model, method) as patch, patch.generation(6) as run:
        for i in range(6):
            out = model(x, timestep=torch.full((2,), 900 - i), class_labels=torch.tensor([3, 1000])).sample
            assert out.dtype == torch.bfloat16 and out.isfinite().all() and out.shape[0] == 2
            run.step()
        assert patch.report().activity["FasterCache"]["unconditional reused"] == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": 0}, "attention=0"),
        ({"uncond": True}, "uncond=True"),
        ({"uncond": 2.0}, "uncond=2.0"),
        ({"attention": None, "uncond": None}, "nothing to reuse"),
        ({"weight": 0.5}, "weight=0.5 must be a tuple"),
        ({"weight": (0.0, float("nan"))}, "weight="),
        ({"attention_window": (681, 0)}, r"attention_window=\(681, 0\)"),
        ({"low_window": (-1, 5)}, r"low_window=\(-1, 5\)"),
        ({"low_growth": float("inf")}, "low_growth=inf"),
        ({"high_growth": -1}, "high_growth=-1"),
        ({"order": "first"}, "order='first'"),
        ({"grid": (4, 0)}, r"grid=\(4, 0\)"),
        ({"grid": 16}, "grid=16"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        FasterCache(**fields)


def test_a_run_that_does_not_say_enough():
    model, x = dit()[0].transformer, torch.ones(2, 4, 8, 8)
    with (
        maskaccel.patch(model, FasterCache()) as patch,
        pytest.raises(ValueError, match="pass them to generation"),
        patch.generation(4),
    ):
        pass
    with (
        torch.no_grad(),
        maskaccel.patch(model, FasterCache(uncond=None, **ANY)) as patch,
        pytest.raises(ValueError, match="needs the number of steps"),
        patch.generation() as run,
    ):
        for i in range(6):
            model(x * i, timestep=torch.full((2,), 900), class_labels=torch.tensor([3, 5]))
            run.step()


def test_a_model_without_blocks_is_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(maskaccel.PatchError, match="no self-attention"):
        maskaccel.patch(model, FasterCache(uncond=None))
    assert "forward" not in model.__dict__


def test_a_model_without_attention_that_it_knows_remembers_guidance_alone_and_says_so():
    with maskaccel.patch(torch.nn.Sequential(torch.nn.Linear(4, 4)), FasterCache()) as patch:
        assert "no self-attention in its blocks, so only guidance is remembered" in str(patch.report())
