"""SpeCa, against its rule written out and on real pipelines."""

from __future__ import annotations

import functools

import pytest
import torch
from zoo.common import made
from zoo.pipelines import PIPELINES, sample

import maskaccel
from maskaccel.methods import FusedAdaLN, SpeCa
from maskaccel.methods.speca import relative_error

STEPS = 10


@functools.cache
def built(name):
    pipeline, kwargs = PIPELINES[name]()
    return pipeline, kwargs, sample(pipeline, kwargs, steps=STEPS)


@pytest.fixture(params=["dit", "flux", "wan", "qwen"])
def name(request):
    return request.param


@pytest.mark.filterwarnings("ignore:.*can never reuse")
def test_no_drafts_is_the_unpatched_pipeline(name):
    pipeline, kwargs, plain = built(name)
    with maskaccel.patch(pipeline, SpeCa(max_drafts=0)) as patch:
        assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain)
        assert patch.report().activity["SpeCa"]["reused"] == 0
    assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain), "remove() did not restore the pipeline"


@pytest.mark.parametrize("level", ["stack", "block"])
def test_runs_repeat_and_fused_blocks_agree(name, level):
    pipeline, kwargs, plain = built(name)
    method, outs = SpeCa(first=2, min_drafts=1, threshold=1e9, level=level), []
    for methods in ([method], [method, FusedAdaLN()]):
        with maskaccel.patch(pipeline, methods) as patch:
            outs.append(sample(pipeline, kwargs, steps=STEPS))
            activity = patch.report().activity["SpeCa"]
            assert activity["reused"] > 0 and activity["bytes held"] == 0 < activity["peak bytes"]
            branches = 2 if name in ("wan", "qwen") else 1
            # steps: 2 computed, drafts 1 to 5, one computed, drafts 1 and 2; of these all but the first are verified
            assert activity["verified"] == 5 * branches and activity["failed"] == 0
            assert torch.equal(outs[-1], sample(pipeline, kwargs, steps=STEPS)), "two runs of one seed differ"
    assert not torch.equal(outs[0], plain)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-3, atol=1e-3 * plain.abs().max().item())


def _deep():
    import diffusers

    return made(
        diffusers.DiTTransformer2DModel, sample_size=8, num_layers=4, patch_size=2, attention_head_dim=16,
        num_attention_heads=2, in_channels=4, out_channels=4, num_embeds_ada_norm=10,
    )  # fmt: skip


def _calls(steps):
    generator = torch.Generator().manual_seed(1)
    start, move = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    return [(start + 0.06 * i * move, torch.full((2,), 900 - 12 * i)) for i in range(steps)]


def _taylor(values, step):
    """The ladder of order 1 over the last two values."""
    (now, newest), *rest = reversed(values)
    return newest if not rest else newest + (newest - rest[0][1]) / (now - rest[0][0]) * (step - now)


@pytest.mark.parametrize("level", ["stack", "block"])
@pytest.mark.parametrize("threshold", [0.02, 0.03, 0.08, 10.0])
def test_the_rule_written_out(level, threshold):
    model, labels, steps = _deep(), torch.tensor([3, 5]), 16
    first, least, most, decay, floor = 2, 1, 4, 0.5, 0.001
    blocks, outs, letters, verified, failed = model.transformer_blocks, [], "", 0, 0
    parts = [[0, 1, 2], [3]] if level == "stack" else [[0], [1], [2], [3]]
    history = [[] for _ in parts]
    drafts, error = 0, None
    with torch.no_grad():
        for step, (x, t) in enumerate(_calls(steps)):
            limit = max(floor, threshold * decay ** (step / steps))
            if step >= first and drafts < most and not (error is not None and error > limit):
                drafts += 1
            else:
                failed += error is not None and error > limit
                drafts = 0
            error = None
            hidden = model.pos_embed(x)
            letters += "." if drafts else "C"
            for i, part in enumerate(parts):
                out = hidden
                if not drafts or (i == len(parts) - 1 and drafts > least):
                    for number in part:
                        out = blocks[number](out, timestep=t, class_labels=labels)
                if not drafts:
                    history[i] = [*history[i], (step, out - hidden)][-2:]
                else:
                    forecast = _taylor(history[i], step)
                    if i == len(parts) - 1 and drafts > least:
                        truth = out - hidden
                        verified += 1
                        each = (forecast - truth).flatten(1).abs().sum(1) / truth.flatten(1).abs().sum(1)
                        error = each.max().item()
                    else:
                        out = hidden + forecast
                hidden = out
            emb = blocks[0].norm1.emb(t, labels, hidden_dtype=hidden.dtype)
            shift, scale = model.proj_out_1(torch.nn.functional.silu(emb)).chunk(2, dim=1)
            y = model.proj_out_2(model.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None])
            y = y.reshape(-1, 4, 4, 2, 2, model.out_channels)
            outs.append(torch.einsum("nhwpqc->nchpwq", y).reshape(2, model.out_channels, 8, 8))
    method = SpeCa(threshold, decay, floor, least, most, order=1, first=first, level=level)
    got = []
    with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(steps) as run:
        for x, t in _calls(steps):
            got.append(model(x, timestep=t, class_labels=labels).sample)
            run.step()
        activity = patch.report().activity["SpeCa"]
    torch.testing.assert_close(torch.stack(got), torch.stack(outs), rtol=1e-4, atol=1e-4)
    assert (activity["verified"], activity["failed"]) == (verified, failed) and verified > 0
    per_step = len(parts)
    assert activity["computed"] == letters.count("C") * per_step + verified
    if threshold in (0.02, 10.0):
        assert (failed > 0) is (threshold < 1)


def test_errors_by_each_metric():
    generator = torch.Generator().manual_seed(0)
    draft, truth = (torch.randn(3, 5, 7, generator=generator, dtype=torch.float64).float() for _ in range(2))
    other, real = (torch.randn(3, 2, 7, generator=generator) for _ in range(2))
    d, t = (torch.cat([a.flatten(1), b.flatten(1)], 1).double() for a, b in ((draft, other), (truth, real)))
    expected = {
        "l1": ((d - t).abs().sum(1) / t.abs().sum(1)).max().item(),
        "l2": ((d - t).norm(dim=1) / t.norm(dim=1)).max().item(),
        "cosine": (1 - torch.cosine_similarity(d, t)).max().item(),
    }
    for metric, value in expected.items():
        assert relative_error([(draft, truth), (other, real)], metric) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": -1}, "threshold=-1"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"threshold": "0.1"}, "threshold='0.1' must be a number, 0 or more"),
        ({"decay": 0}, "decay=0"),
        ({"min_drafts": -1}, "min_drafts=-1"),
        ({"max_drafts": 1.5}, "max_drafts=1.5"),
        ({"first": 0}, "first=0"),
        ({"order": 16}, "order=16"),
        ({"metric": "linf"}, "metric='linf'"),
        ({"level": "module"}, "level='module'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        SpeCa(**fields)
