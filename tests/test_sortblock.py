"""Sortblock, against its equations written out and on real pipelines."""

from __future__ import annotations

import functools

import _plain_dit as plain
import diffusers
import numpy as np
import pytest
import torch
from zoo.common import made
from zoo.pipelines import PIPELINES, dit, sample

import maskaccel
from maskaccel.masks.schedule import At
from maskaccel.methods import FusedAdaLN, Sortblock
from maskaccel.methods.sortblock import POLYNOMIALS

STEPS = 10


@functools.cache
def built(name):
    pipeline, kwargs = PIPELINES[name]()
    return pipeline, kwargs, sample(pipeline, kwargs, steps=STEPS)


@pytest.fixture(params=["dit", "flux", "wan", "sd3"])
def name(request):
    return request.param


@pytest.mark.filterwarnings("ignore:Sortblock can never reuse")
@pytest.mark.parametrize("method", [Sortblock(interval=1), Sortblock(low=1e-3, high=2e-3)], ids=["interval", "window"])
def test_computing_always_is_the_unpatched_pipeline(name, method):
    pipeline, kwargs, plain_ = built(name)
    with maskaccel.patch(pipeline, method) as patch:
        assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain_)
        assert patch.report().activity["Sortblock"]["reused"] == 0
    assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain_), "remove() did not restore the pipeline"


def test_runs_repeat_and_fused_blocks_agree(name):
    pipeline, kwargs, plain_ = built(name)
    method, outs = Sortblock(interval=4, beta=0.5), []
    branches, groups = (2 if name == "wan" else 1), (2 if name == "flux" else 1)
    for methods in ([method], [method, FusedAdaLN()]):
        with maskaccel.patch(pipeline, methods) as patch:
            outs.append(sample(pipeline, kwargs, steps=STEPS))
            activity = patch.report().activity["Sortblock"]
            assert activity["reused"] > 0 and activity["bytes held"] == 0 < activity["peak bytes"]
            assert activity["computed by rank"] >= groups * activity["rankings"] >= groups * branches
            assert torch.equal(outs[-1], sample(pipeline, kwargs, steps=STEPS)), "two runs of one seed differ"
    assert not torch.equal(outs[0], plain_)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-3, atol=1e-3 * plain_.abs().max().item())


@functools.cache
def deep():
    return made(
        diffusers.DiTTransformer2DModel, sample_size=8, num_layers=6, patch_size=2, attention_head_dim=16,
        num_attention_heads=2, in_channels=4, out_channels=4, num_embeds_ada_norm=10,
    )  # fmt: skip


def ahead(values, step):
    """A change continued along the line through the last two values; one value is held."""
    (s0, b), *rest = values[::-1]
    return b if not rest else b + (b - rest[0][1]) / (s0 - rest[0][0]) * (step - s0)


@torch.no_grad()
def written_out(model, calls, times, labels, interval, beta, polynomial, low, high):
    """Outputs, for each step a letter for each block (C whole step, r by its rank), and the similarities ranked."""
    kept = [[] for _ in model.transformer_blocks]  # (step, change) of each block
    outs, letters, rankings, since, unstable = [], "", [], 0, set()
    for step, ((x, _), time) in enumerate(zip(calls, times, strict=True)):
        t = torch.full((len(x),), time)
        since = 0 if step % interval == 0 or not low <= time <= high else since + 1
        if since == 1:
            ratio, cosines, unstable = float(np.clip(np.polyval(polynomial, time) * beta, 0, 1)), [], set()
            for values in kept:
                some = values[-1][1].shape[-1] // 8
                pair = values[-1][1][..., :some], ahead(values, step)[..., :some]
                cosines.append(torch.cosine_similarity(*pair, dim=-1).mean().item())
            if len(kept[0]) > 1:
                order = sorted(range(len(kept)), key=cosines.__getitem__)
                unstable = set(order[: min(int(len(kept) * ratio), len(kept) - 1) + 1])
        if since == 2 and unstable:
            rankings.append(cosines)
        hidden = model.pos_embed(x)
        for number, block in enumerate(model.transformer_blocks):
            letter = "C" if since == 0 else "r" if since > 1 and number in unstable else "."
            letters += letter
            if letter == ".":
                hidden = hidden + ahead(kept[number], step)
                continue
            out = block(hidden, timestep=t, class_labels=labels)
            kept[number] = [*kept[number], (step, out - hidden)][-2:]
            hidden = out
        outs.append(plain.head(model, hidden, t, labels))
    return torch.stack(outs), letters, rankings


TIMES = [990 - 60 * i for i in range(17)]
CASES = [
    Sortblock(4, 0.5),
    Sortblock(6, 0.2, low=0, high=1000, polynomial=(0.0005, 0.5)),
    Sortblock(5, 1.0, "flux", 100, 800),
    Sortblock(5, 3.0, (-0.001, 0.8), 50, 700),
    Sortblock(5, 50.0, "wan"),
    Sortblock(4, 0.0),
]


@pytest.mark.parametrize("method", CASES, ids=range(len(CASES)))
def test_the_equations_written_out(method):
    model, labels, calls = deep(), torch.tensor([3, 5]), plain.inputs(len(TIMES), batch=2)
    p = method.polynomial
    p = POLYNOMIALS[p] if isinstance(p, str) else p or (1.0,)
    expected, letters, rankings = written_out(
        model, calls, TIMES, labels, method.interval, method.beta, p, method.low, method.high
    )
    got = []
    with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(timesteps=TIMES) as run:
        for (x, _), time in zip(calls, TIMES, strict=True):
            got.append(model(x, timestep=torch.full((2,), time), class_labels=labels).sample)
            run.step()
        activity = patch.report().activity["Sortblock"]
    for row in rankings:  # equal similarities would make the order a matter of rounding
        assert min(b - a for a, b in zip(sorted(row), sorted(row)[1:], strict=False)) > 1e-6
    assert activity["rankings"] == len(rankings) > 1
    assert activity["computed by rank"] == letters.count("r") > 0 < letters.count(".")
    assert (activity["computed"], activity["reused"]) == (len(letters) - letters.count("."), letters.count("."))
    torch.testing.assert_close(torch.stack(got), expected, rtol=1e-4, atol=1e-4)


def test_lists_of_blocks_are_ranked_each_for_itself():
    """FLUX: one block of two in each list, whatever their similarities are to those of the other list."""
    pipeline, kwargs, _ = built("flux")
    lists = {n: getattr(pipeline.transformer, n) for n in ("transformer_blocks", "single_transformer_blocks")}
    counts = dict.fromkeys(lists, 0)

    def counted(block, name):
        def call(*args, **kwargs_):
            counts[name] += 1
            return type(block).forward(block, *args, **kwargs_)

        block.forward = call

    for name, blocks in lists.items():
        for block in blocks:
            counted(block, name)
    with maskaccel.patch(pipeline, Sortblock(interval=5, beta=0.0, low=0, high=1000)):
        sample(pipeline, kwargs, steps=10)
    for block in (block for blocks in lists.values() for block in blocks):
        del block.forward
    # steps 0 and 5 compute both blocks; the first cycle knows one value of each and ranks nothing; 7, 8, 9 compute one
    assert counts == dict.fromkeys(lists, 2 * 2 + 3)


def test_guidance_branches_are_ranked_each_for_itself():
    pipeline, kwargs, _ = built("wan")
    model = pipeline.transformer
    prompts = [kwargs["prompt_embeds"], kwargs["negative_prompt_embeds"]]
    times = [900 - 50 * i for i in range(10)]
    xs = [torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(3)) * (1 - 0.04 * i) for i in range(10)]

    def run_of(order):
        outs = {}
        with (
            torch.no_grad(),
            maskaccel.patch(model, Sortblock(4, 0.1, (1.0,))) as patch,
            patch.generation(timesteps=times) as run,
        ):
            for x, t in zip(xs, times, strict=True):
                for i in order:
                    with run.branch(str(i)):
                        outs[i, t] = model(x, torch.tensor([t]), prompts[i], return_dict=False)[0]
                run.step()
            assert patch.report().activity["Sortblock"]["computed by rank"] > 0
        return outs

    both, alone = run_of([0, 1]), {**run_of([0]), **run_of([1])}
    assert both.keys() == alone.keys() and all(torch.equal(both[key], alone[key]) for key in both)


def test_ranks_that_share_a_sequence_rank_by_the_sum_of_theirs(monkeypatch):
    model, group, seen = dit()[0].transformer, object(), []
    mesh = type("Mesh", (), {"get_group": staticmethod(lambda: group)})
    shared = type("Shared", (), {"_flattened_mesh": mesh})
    calls, labels = plain.inputs(10), torch.tensor([3])
    method = Sortblock(interval=5, beta=0.0, low=0, high=1000)
    alone, _ = plain.patched(model, method, calls, labels)

    def reduced(values, group):
        seen.append((group, values.tolist()))
        values.neg_()

    monkeypatch.setattr(torch.distributed, "all_reduce", reduced)
    model._parallel_config = type("Config", (), {"context_parallel_config": shared})
    together, activity = plain.patched(model, method, calls, labels)
    assert activity["rankings"] == len(seen) == 1 and seen[0][0] is group and len(seen[0][1]) == 2
    assert torch.equal(together[:7], alone[:7]) and not torch.equal(together[7:], alone[7:])


def test_the_ratio_of_a_class_of_model():
    at = At(0, 1, (500.0,))
    for name, coefficients in POLYNOMIALS.items():
        expected = min(max(float(np.polyval(coefficients, 500.0)), 0.0), 1.0)
        assert Sortblock(beta=1.0, polynomial=name).ratio(at) == pytest.approx(expected)
    assert Sortblock(beta=1.0).ratio(at, "WanTransformer3DModel") == Sortblock(beta=1.0, polynomial="wan").ratio(at)
    assert Sortblock(beta=0.3).ratio(At(0), "DiTTransformer2DModel") == 0.3
    assert Sortblock(beta=3.0).ratio(At(0)) == 1.0 and Sortblock(polynomial=(-1.0,)).ratio(At(0)) == 0.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"interval": 0}, "interval=0"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"polynomial": "sd3"}, "polynomial='sd3'"),
        ({"polynomial": ()}, r"polynomial=\(\)"),
        ({"polynomial": (1.0, float("inf"))}, "polynomial="),
        ({"polynomial": 0.5}, "polynomial=0.5"),
        ({"low": 900, "high": 50}, "low=900, high=50"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Sortblock(**fields)


def test_a_model_without_blocks_is_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(maskaccel.PatchError, match="cannot be skipped"):
        maskaccel.patch(model, Sortblock())
    assert "forward" not in model.__dict__


def test_a_run_without_timesteps_says_what_is_missing():
    with (
        maskaccel.patch(dit()[0].transformer, Sortblock()) as patch,
        pytest.raises(ValueError, match="pass them to generation"),
        patch.generation(4),
    ):
        pass
