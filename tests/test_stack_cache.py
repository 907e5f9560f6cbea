"""Features remembered at stack, segment and block level, on real pipelines: FBCache, DBCache, TaylorSeer, FORA."""

from __future__ import annotations

import functools

import pytest
import torch
from zoo.pipelines import MORE_PIPELINES, PIPELINES, dit, sample

import maskaccel
from maskaccel.methods import FORA, DBCache, FBCache, FusedAdaLN, TaylorSeer
from maskaccel.state import Newton, Storage, Taylor

STEPS = 6
EVERYWHERE = {**PIPELINES, "wan22": MORE_PIPELINES["wan22"], "flux_img2img": MORE_PIPELINES["flux_img2img"]}


@functools.cache
def built(name):
    pipeline, kwargs = EVERYWHERE[name]()
    return pipeline, kwargs, sample(pipeline, kwargs, steps=STEPS)


@pytest.fixture(params=EVERYWHERE)
def name(request):
    return request.param


@pytest.mark.filterwarnings("ignore:.*can never reuse")
@pytest.mark.parametrize(
    "method", [FBCache(threshold=0), FORA(interval=1, level="stack"), FORA(1, level="block")], ids=str
)
def test_computing_always_is_the_unpatched_pipeline(name, method):
    pipeline, kwargs, plain = built(name)
    with maskaccel.patch(pipeline, method) as patch:
        assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain)
        assert patch.report().activity[method.name]["reused"] == 0
    assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain), "remove() did not restore the pipeline"


@pytest.mark.parametrize("level", ["output", "stack", "block", "module", "kv"])
def test_every_level_reuses_by_the_schedule_and_repeats(name, level):
    pipeline, kwargs, plain = built(name)
    method = FORA(interval=3, level=level)
    with maskaccel.patch(pipeline, [method, FusedAdaLN()]) as patch:
        one = sample(pipeline, kwargs, steps=STEPS)
        activity = patch.report().activity["FORA"]
        two = sample(pipeline, kwargs, steps=STEPS)
        assert torch.equal(one, two), "two runs of one seed differ"
        assert activity["reused"] > 0 and activity["bytes held"] == 0 < activity["peak bytes"]
        assert not torch.equal(one, plain)
    assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain)


def test_queries_of_every_step_attend_to_remembered_keys_and_values():
    """Against attention in plain torch whose keys and values are those of the first step."""
    model, labels = PIPELINES["dit"]()[0].transformer, torch.tensor([3, 5])
    attention = model.transformer_blocks[0].attn1
    inputs = [
        torch.randn(2, 16, attention.to_q.in_features, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    ]

    def heads(x):
        return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

    with torch.no_grad():
        k, v = heads(attention.to_k(inputs[0])), heads(attention.to_v(inputs[0]))
        mixed = torch.nn.functional.scaled_dot_product_attention(heads(attention.to_q(inputs[1])), k, v)
        want = attention.to_out[0](mixed.transpose(1, 2).flatten(2))
        with maskaccel.patch(model, FORA(interval=2, level="kv")) as patch, patch.generation(2) as run:
            model(torch.ones(2, 4, 8, 8), torch.full((2,), 900), labels)
            attention.to_k.__dict__["_maskaccel_site"].feature.clear()
            attention.to_v.__dict__["_maskaccel_site"].feature.clear()
            attention(inputs[0])
            run.step()
            got = attention(inputs[1])
            held = patch.report().activity["FORA"]["bytes held"]
    torch.testing.assert_close(got, want)
    assert held == 2 * 2 * inputs[0].nbytes  # keys and values of both blocks


def test_keys_and_values_that_come_with_the_queries_are_refused():
    from zoo.dit_original import dit

    with pytest.raises(maskaccel.PatchError, match=r"no block of .* has projections named to_k or to_v"):
        maskaccel.patch(dit()[0], FORA(level="kv"))


def test_a_signal_that_always_fires_holds_the_first_step(name):
    """Every step after the first reuses: the same as a schedule that computes once."""
    pipeline, kwargs, _ = built(name)
    with maskaccel.patch(pipeline, FBCache(threshold=1e9)) as patch:
        got = sample(pipeline, kwargs, steps=STEPS)
        activity = patch.report().activity["FBCache"]
    assert activity["reused"] > 0
    with maskaccel.patch(pipeline, DBCache(threshold=1e9, lead=1, first=1)):
        assert torch.equal(got, sample(pipeline, kwargs, steps=STEPS))


def _calls(model, *, steps, batch, seed=0):
    """Hidden states that move along a line, so that signals differ between samples."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(batch, 4, 8, 8, generator=generator)
    move = torch.randn(batch, 4, 8, 8, generator=generator)
    pace = torch.linspace(0.02, 0.3, batch).view(-1, 1, 1, 1)
    return [(start + i * pace * move, torch.full((batch,), 900 - 4 * i)) for i in range(steps)]


def _run(model, methods, calls, labels, rows=None, **options):
    outs = []
    with torch.no_grad(), maskaccel.patch(model, methods) as patch, patch.generation(len(calls), **options) as run:
        for x, t in calls:
            pick = slice(None) if rows is None else rows
            outs.append(model(x[pick], timestep=t[pick], class_labels=labels[pick]).sample)
            run.step()
        report = patch.report()
    return torch.stack(outs), report.activity[methods[0].name]


@pytest.mark.parametrize("forecaster", [FBCache.forecaster, Taylor(1)], ids=["hold", "taylor"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_is_its_samples_by_themselves(forecaster, fused):
    model = dit()[0].transformer
    labels = torch.arange(4)
    calls = _calls(model, steps=8, batch=4)
    methods = [FBCache(threshold=0.1, forecaster=forecaster)] + [FusedAdaLN()] * fused
    together, activity = _run(model, methods, calls, labels)
    assert activity["in part"] > 0, "the samples never disagreed: the test shows nothing"
    alone = [_run(model, methods, calls, labels, slice(i, i + 1)) for i in range(4)]
    torch.testing.assert_close(together, torch.cat([out for out, _ in alone], 1), rtol=1e-5, atol=1e-5)
    assert len({found["steps"] for _, found in alone}) > 1


def test_reductions_over_the_batch():
    model = dit()[0].transformer
    labels = torch.arange(4)
    calls = _calls(model, steps=8, batch=4)
    reused = {}
    for reduce in ("mean", "any"):
        _, activity = _run(model, [FBCache(threshold=0.1, reduce=reduce)], calls, labels)
        assert "in part" not in activity
        reused[reduce] = activity["reused"]
    assert reused["any"] <= reused["mean"]
    worst = _run(model, [FBCache(threshold=0.1)], calls, labels, slice(3, 4))[1]["reused"]
    assert reused["any"] <= worst


def test_the_signal_against_its_formula():
    """First-Block Cache, written out for diffusers' DiT."""
    model = dit()[0].transformer
    labels = torch.tensor([3])
    calls = _calls(model, steps=8, batch=1)
    threshold, kept, outs, letters = 0.12, {}, [], ""
    with torch.no_grad():
        for x, t in calls:
            hidden = model.pos_embed(x)
            first = model.transformer_blocks[0](hidden, timestep=t, class_labels=labels)
            residual = first - hidden
            reuse = kept and (residual - kept["r"]).abs().mean() / kept["r"].abs().mean() < threshold
            letters += "." if reuse else "C"
            if reuse:
                last = first + kept["rest"]
            else:
                last = first
                for block in model.transformer_blocks[1:]:
                    last = block(last, timestep=t, class_labels=labels)
                kept = {"r": residual, "rest": last - first}
            emb = model.transformer_blocks[0].norm1.emb(t, labels, hidden_dtype=last.dtype)
            shift, scale = model.proj_out_1(torch.nn.functional.silu(emb)).chunk(2, dim=1)
            y = model.proj_out_2(model.norm_out(last) * (1 + scale[:, None]) + shift[:, None])
            y = y.reshape(-1, 4, 4, 2, 2, model.out_channels)
            outs.append(torch.einsum("nhwpqc->nchpwq", y).reshape(1, model.out_channels, 8, 8))
    got, activity = _run(model, [FBCache(threshold=threshold)], calls, labels)
    assert activity["steps"] == letters and "." in letters[1:] and "C" in letters[1:]
    torch.testing.assert_close(got, torch.stack(outs), rtol=1e-5, atol=1e-5)


def test_trailing_blocks_always_run():
    model = dit()[0].transformer
    seen = []
    handle = model.transformer_blocks[1].attn1.register_forward_hook(lambda *_: seen.append(1))
    wide = dit()[0].transformer
    wide.transformer_blocks.append(wide.transformer_blocks[1])
    handle.remove()
    with pytest.raises(maskaccel.PatchError, match="has 2 blocks; 1 leading and 1 trailing"):
        maskaccel.patch(model, DBCache(lead=1, tail=1))
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("level", ["stack", "block", "output"])
def test_a_line_is_forecast_exactly(level):
    """A model whose every block adds a feature that is linear in the step: order 1 reproduces it."""

    class Block(torch.nn.Module):
        def __init__(self, slope):
            super().__init__()
            self.attn, self.slope, self.calls = torch.nn.Identity(), slope, 0

        def forward(self, hidden_states, temb):
            self.calls += 1
            return hidden_states + self.slope * temb[:, None, :1]

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(0.5), Block(-2.0)])

        def forward(self, hidden_states, temb):
            for block in self.blocks:
                hidden_states = block(hidden_states, temb)
            return hidden_states

    model, x = Model(), torch.randn(2, 3, 8)
    method = TaylorSeer(interval=4, first=2, level=level)
    with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(10) as run:
        for step in range(10):
            temb = torch.full((2, 8), float(step))
            torch.testing.assert_close(model(x, temb), x - 1.5 * step)
            run.step()
    assert model.blocks[1].calls == 4  # steps 0, 1, 5 and 9


def test_newton_is_exact_where_taylor_is_not():
    stamps = (12.0, 7.0, 2.0)
    assert sum(w * s * s for w, s in zip(Newton(2).weights(stamps, 15), stamps)) == pytest.approx(225)
    assert sum(w * s * s for w, s in zip(Taylor(2).weights(stamps, 15), stamps)) != pytest.approx(225, abs=1)


@pytest.mark.parametrize(("storage", "ratio"), [(Storage(), 1.0), (Storage("bf16"), 0.5), (Storage("fp8"), 0.27)])
def test_bytes_held_are_the_declared_ones(storage, ratio):
    pipeline, kwargs, plain = built("flux")
    method = TaylorSeer(interval=3, order=1, first=1, storage=storage)
    with maskaccel.patch(pipeline, method) as patch:
        out = sample(pipeline, kwargs, steps=STEPS)
        held = patch.report().activity["TaylorSeer"]["peak bytes"]
    width = pipeline.transformer.inner_dim
    tokens = 16 + 6  # latents and text, both streams
    values = 2 * tokens * width * 4
    assert held == pytest.approx(ratio * values, rel=0.15) and (ratio != 1.0 or held == values)
    assert (out - plain).abs().max() < 2 * plain.abs().max()


def test_a_bound_too_small_is_an_error_and_the_model_goes_on():
    pipeline, kwargs, plain = built("dit")
    bounded = TaylorSeer(interval=3, storage=Storage(max_bytes=1000))
    message = "max_bytes=1000, but the features of this model take"
    with maskaccel.patch(pipeline, bounded), pytest.raises(ValueError, match=message):
        sample(pipeline, kwargs, steps=STEPS)
    assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain)


def test_a_returned_tensor_may_be_written_to():
    pipeline, _, _ = built("dit")
    model, labels = pipeline.transformer, torch.tensor([1, 2])
    calls = _calls(model, steps=5, batch=2)
    for level in ("output", "stack"):
        clean, _ = _run(model, [FORA(interval=4, level=level)], calls, labels)
        outs = []
        with (
            torch.no_grad(),
            maskaccel.patch(model, FORA(interval=4, level=level)) as patch,
            patch.generation(5) as run,
        ):
            for x, t in calls:
                out = model(x, timestep=t, class_labels=labels).sample
                outs.append(out.clone())
                out.fill_(float("nan"))
                run.step()
        assert torch.equal(torch.stack(outs), clean)


def test_two_methods_that_want_one_site():
    pipeline, _, _ = built("dit")
    with pytest.raises(maskaccel.PatchError, match="both want"):
        maskaccel.patch(pipeline, [FBCache(), TaylorSeer()])
    assert "forward" not in pipeline.transformer.__dict__


def test_a_lora_scale_that_changes_within_a_run_drops_the_memory():
    pipeline, kwargs, _ = built("flux")
    model = pipeline.transformer
    x, ids = torch.randn(1, 16, 16), torch.zeros(16, 3)
    arguments = {
        "encoder_hidden_states": kwargs["prompt_embeds"], "pooled_projections": kwargs["pooled_prompt_embeds"],
        "img_ids": ids, "txt_ids": torch.zeros(6, 3), "return_dict": False, "timestep": torch.tensor([0.5]),
    }  # fmt: skip
    with torch.no_grad(), maskaccel.patch(model, FORA(interval=9, level="stack")) as patch:
        with patch.generation(4) as run:
            for scale in (1.0, 1.0, 0.5, 0.5):
                model(x, joint_attention_kwargs={"scale": scale}, **arguments)
                run.step()
        report = patch.report()
    assert report.activity["FORA"]["steps"] == "C.C."
    assert any("LoRA scale changed to 0.5 at step 2" in note for note in report.notes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FBCache(threshold=-0.1), "threshold=-0.1"),
        (lambda: FBCache(threshold=float("nan")), "threshold=nan"),
        (lambda: DBCache(lead=0), "lead=0"),
        (lambda: DBCache(tail=-1), "tail=-1"),
        (lambda: FBCache(reduce="median"), "reduce='median'"),
        (lambda: FBCache(max_consecutive=0), "max_consecutive=0"),
        (lambda: TaylorSeer(order=16), "order=16"),
        (lambda: TaylorSeer(interval=0), "interval=0"),
        (lambda: TaylorSeer(level="layer"), "level='layer'"),
        (lambda: Storage(dtype="fp4"), "dtype='fp4'"),
        (lambda: Storage(max_bytes=0), "max_bytes=0"),
    ],
)
def test_bad_fields(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_without_blocks():
    with pytest.raises(maskaccel.PatchError, match="cannot be skipped"):
        maskaccel.patch(torch.nn.Linear(4, 4), FBCache())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (FORA(storage="fp8"), "storage='fp8' must be a maskaccel.state.Storage"),
        (TaylorSeer(storage=Storage), "must be a maskaccel.state.Storage"),
        (FBCache(forecaster=Taylor), r"must be one of maskaccel.state, such as Hold\(\)"),
        (DBCache(forecaster="taylor", lead=1), "forecaster='taylor' must be one of maskaccel.state"),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_a_storage_or_forecaster_of_another_kind_leaves_the_model_alone(method, message):
    model = dit()[0].transformer
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(TypeError, match=message):
        maskaccel.patch(model, method)
    assert [module.__dict__ for module in model.modules()] == before
