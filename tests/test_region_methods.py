"""Methods of steps in part: which tokens they choose, and what becomes of the others."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import diffusers
import pytest
import torch
from _partial_oracle import StaleAttention, oracle_run, outputs, partial_run, share, steps_of
from _sparse_methods import Model
from torch.nn import functional as F
from zoo.all_models import MODELS
from zoo.common import randn
from zoo.pipelines import PIPELINES, sample

import maskaccel
from maskaccel.masks import TokenIndex
from maskaccel.methods import RAS, LazyDiffusion, ReferenceKV, SpotEdit, ToMe
from maskaccel.methods.lazy_diffusion import token_mask
from maskaccel.ops import random_keep
from maskaccel.patching.latents import LatentGrid
from maskaccel.patching.partial import active_tokens
from maskaccel.patching.selector import Seen
from maskaccel.patching.transaction import PatchError
from maskaccel.state import KVStorage
from maskaccel.state.solver import Levels, Point

ROOT = Path(__file__).resolve().parents[1]
GRID = LatentGrid((4, 4))


def seen(output, sample=None, step=3, sigma=0.5, active=None, steps=10):
    return Seen(output, output if sample is None else sample, Point(1 - sigma, sigma), GRID, step, steps, active)


# ---------------------------------------------------------------------------------------------------------------- RAS


def by_hand(v, left, keep, beta, high, metric):
    """The paper's choice, token by token."""
    chosen = []
    for sample_, count in zip(v, left, strict=True):
        scores = []
        for n in range(16):
            y, x = 2 * (n // 4), 2 * (n % 4)
            pixels = sample_[:, y : y + 2, x : x + 2].flatten(1).T
            values = [p.norm() if metric == "l2" else p.std() for p in pixels]
            scores.append(float(torch.stack(values).mean() * math.exp(beta * int(count[n]))))
        order = sorted(range(16), key=lambda n: -scores[n])
        chosen.append(sorted(order[high : high + keep]))
    return chosen


@pytest.mark.parametrize(("metric", "beta", "fraction"), [("std", 0.1, 0.0), ("l2", 0.5, 0.3), ("std", 0.0, 1.0)])
def test_focus_is_by_score_and_times_left_out(metric, beta, fraction):
    selector = RAS(metric=metric, beta=beta, high_fraction=fraction, multiple=1).selector()
    left = torch.zeros(2, 16, dtype=torch.int64)
    for step in range(5):
        v = randn(2, 4, 8, 8, seed=step)
        index = selector.select(seen(v, step=step))
        assert index.keep.tolist() == by_hand(v, left, 8, beta, round(fraction * 8), metric)
        left += index.inverse < 0
    assert torch.equal(selector.left, left.int())
    selector.clear()
    assert selector.left is None


def test_one_choice_for_all_images():
    index = RAS(shared=True, multiple=1).selector().select(seen(randn(3, 4, 8, 8)))
    assert index.keep.shape == (1, 8)


def test_latents_of_one_channel_are_scored_over_the_pixels_of_a_token():
    v = torch.zeros(1, 1, 8, 8)
    v[:, :, 2, 4], v[:, :, 0, 0] = 3.0, 1.0  # a pixel of token 6, one of token 0
    index = RAS(ratio=2 / 16, high_fraction=0, multiple=1).selector().select(seen(v))
    assert index.keep.tolist() == [[0, 6]]


def test_numbers_of_tokens():
    assert RAS(ratio=0.5).count(5, 30, 1000) == 512
    assert RAS(ratio=0.5, multiple=1).count(5, None, 1000) == 500
    assert RAS(ratio=0.9, multiple=64).count(5, 30, 100) == 100
    ramp = RAS(ratio=0.5, ramp=(256, 4), multiple=1)  # as the authors count for Lumina-Next: 30 steps, first 4
    assert [ramp.count(step, 30, 4096) for step in (4, 8, 16, 28)] == [
        4096 - (2048 + 256 * (step // 4 - 4)) for step in (4, 8, 16, 28)
    ]
    with pytest.raises(ValueError, match=r"ramp=\(256, 4\) needs the number of steps"):
        ramp.count(5, None, 4096)
    assert RAS(ratio=1.0).selector().select(seen(randn(1, 4, 8, 8))) is None


@pytest.mark.parametrize("settings", [
    {"ratio": 0}, {"ratio": 1.1}, {"first": 0}, {"dense": [3]}, {"metric": "l1"}, {"beta": -1}, {"high_fraction": 2},
    {"ramp": (1, 0)}, {"multiple": 0}, {"grid": (4,)}, {"storage": None}, {"kernel": 1},
])  # fmt: skip
def test_settings_of_ras(settings):
    (name,) = settings
    with pytest.raises((ValueError, TypeError), match=f"{name}="):
        RAS(**settings)


def test_a_loop_of_ones_own_tells_what_the_solver_is_given():
    model, kwargs = MODELS["DiTTransformer2DModel"]()
    with maskaccel.patch(model, RAS(first=1, dense=(), multiple=1)) as patch, torch.no_grad():
        for tells, line in ((True, "Cpp"), (False, "CCC")):
            with patch.generation(3) as run:
                for given in steps_of(model, kwargs):
                    v = outputs(model, given)[0]
                    if tells:
                        assert torch.equal(run.output(v, given["hidden_states"], 0.5), v)
                    run.step()
            assert patch.report().activity["RAS"]["steps"] == line
        with patch.generation(3) as run:
            for sigma in (0, 700.0, "a", torch.ones(2)):
                with pytest.raises(ValueError, match=re.escape(f"sigma={sigma!r} must be a number above 0")):
                    run.output(v, v, sigma)
            with pytest.raises(ValueError, match=r"output has shape .*; it must be that of the latents"):
                run.output(v[:, :2], v, 0.5)


def test_a_loop_that_shows_nothing_is_told_so():
    model, kwargs = MODELS["DiTTransformer2DModel"]()
    with maskaccel.patch(model, RAS(first=1, dense=(), multiple=1)) as patch, torch.no_grad():
        with patch.generation(3) as run:
            for given in steps_of(model, kwargs):
                outputs(model, given)
                run.step()
        assert "no step of a solver was seen; a loop of your own shows it" in str(patch.report())


# ----------------------------------------------------------------------------------------------------------- SpotEdit


def test_tokens_that_differ_from_the_reference_are_computed():
    reference = randn(1, 4, 8, 8)
    clean = reference.repeat(2, 1, 1, 1)
    clean[0, :, 2:4, 4:6] += 5  # token 6
    clean[1, :, 6:8, 0:2] -= 5  # token 12
    sample_ = randn(2, 4, 8, 8, seed=1)
    given = seen(Point(0.5, 0.5).output(clean, sample_), sample_)
    index = SpotEdit(reference, multiple=1).selector().select(given)
    assert index.keep.tolist() == [[6], [12]]
    index = SpotEdit(lambda: reference, multiple=1, dilation=1).selector().select(given)
    assert index.keep[0].tolist() == [1, 2, 3, 5, 6, 7, 9, 10, 11] and {8, 9, 12, 13} <= set(index.keep[1].tolist())
    index = SpotEdit(reference, multiple=4).selector().select(given)
    assert index.keep.shape == (2, 4) and 6 in index.keep[0] and 12 in index.keep[1]
    assert SpotEdit(reference, threshold=0.0).selector().select(given) is None
    marked = torch.zeros(2, 16)
    marked[:, 3] = 1
    index = SpotEdit(reference, score=lambda a, b: marked + 0 * a.sum() * b.sum(), multiple=1).selector().select(given)
    assert index.keep.tolist() == [[3], [3]]
    with pytest.raises(ValueError, match=r"score gave shape \(2, 4, 8, 8\) for 16 tokens"):
        SpotEdit(reference, score=lambda a, b: a - b).selector().select(given)
    with pytest.raises(ValueError, match=r"reference has shape \(1, 4, 4, 4\)"):
        SpotEdit(reference[..., :4, :4]).selector().select(given)


def test_the_rest_is_the_reference_at_the_end():
    reference, sample_ = randn(1, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    output = randn(2, 4, 8, 8, seed=2)
    active = TokenIndex.from_keep(torch.tensor([[0], [5]]), 16)
    last = seen(output, sample_, step=9, active=active)
    point = last.point
    for border, factor in ((1.0, 1.0), (0.8, 0.8)):
        found = point.clean(SpotEdit(reference, border=border).selector().corrected(last), sample_)
        own = point.clean(output, sample_)
        tokens, ref, mine = GRID.tokens(found), GRID.tokens(reference), GRID.tokens(own)
        for b, inside, near, far in ((0, 0, 1, 15), (1, 5, 10, 15)):
            torch.testing.assert_close(tokens[b, inside], mine[b, inside])
            torch.testing.assert_close(tokens[b, near], factor * ref[0, near] + (1 - factor) * mine[b, near])
            torch.testing.assert_close(tokens[b, far], ref[0, far])
    assert SpotEdit(reference).selector().corrected(seen(output, sample_, step=4, active=active)) is output


@pytest.mark.parametrize("fuse", [False, True])
def test_spotedit_in_a_pipeline(fuse):
    pipeline, kwargs = PIPELINES["sd3"]()
    reference = sample(pipeline, kwargs, steps=6)
    method = SpotEdit(reference, first=2, dense=(4,), threshold=1e6, border=1.0, fuse=fuse, multiple=4)
    with maskaccel.patch(pipeline, method) as patch:
        got = sample(pipeline, kwargs, seed=5, steps=6)
        assert torch.equal(got, sample(pipeline, kwargs, seed=5, steps=6))
        activity = patch.report().activity["SpotEdit"]
        state = active_tokens(pipeline.transformer)
        assert (state.beside is not None) is fuse and state.kv.nbytes == 0
    assert activity["steps"] == "CCppCp" and share(activity) == 0.25
    equal = (got - reference).abs().amax(1)[0] < 1e-4
    assert int(equal.sum()) == 64 - 16  # all but the four tokens that were computed
    assert torch.equal(sample(pipeline, kwargs, steps=6), reference)


def test_a_mixture_of_cached_and_reference_keys():
    selector = SpotEdit(torch.zeros(1), fuse=True).selector()
    for t in (0.0, 0.25, 1.0):
        assert selector.cached_share(Point(1 - t, t)) == pytest.approx(math.cos(math.pi * t / 2) ** 2)


# ------------------------------------------------------------------------------------------------------- LazyDiffusion


def test_masks_of_images_become_masks_of_tokens():
    mask = torch.zeros(2, 64, 64)
    mask[0, 17, 40] = 1
    mask[1, :16] = 2
    found = token_mask(mask, (4, 4))
    assert found[0].nonzero().flatten().tolist() == [6] and found[1].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert torch.equal(token_mask(mask[:, None] > 0, (4, 4)), found)
    assert torch.equal(token_mask(mask[0], (2, 4, 4))[0], torch.cat([found[0], found[0]]))
    for bad, message in ((mask * 0, "without a hole"), (mask[:, :2], "less than the grid"),
                         (mask[None, None, None], "it must be")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            token_mask(bad, (4, 4))


@pytest.mark.parametrize(("name", "level"), [
    ("DiTTransformer2DModel", 0.0), ("SD3Transformer2DModel", 0.0), ("SD3Transformer2DModel", 0.75),
])  # fmt: skip
def test_the_context_is_encoded_once_without_the_hole(name, level):
    model, kwargs = MODELS[name]()
    kwargs["hidden_states"] = randn(2, 4, 8, 8)
    calls = steps_of(model, kwargs)
    reference = randn(1, 4, 8, 8, seed=9)
    mask = torch.zeros(8, 8)
    mask[2:6, 4:6] = 1
    index = TokenIndex.from_keep(torch.tensor([6, 10]), 16)
    got, activity = partial_run(model, LazyDiffusion(mask, reference, level, multiple=1), calls)
    assert activity["computed"] == 0 and activity["in part"] == 3
    latents = (1 - level) * reference + level * kwargs["hidden_states"]  # the first step is noise
    clean = kwargs | {"hidden_states": latents, "timestep": (kwargs["timestep"] * level).round().long()}
    oracle, text = StaleAttention(), kwargs.get("encoder_hidden_states")
    beside = 0 if text is None else text.shape[1]
    with maskaccel.patch(model, oracle), torch.no_grad():
        oracle.keys = torch.cat([~index.mask[0], torch.ones(beside, dtype=torch.bool)])[None, None, None]
        outputs(model, clean)
        oracle.active = index
        wanted = [outputs(model, given)[0] for given in calls]
    for a, b in zip(got, wanted, strict=True):
        picked = GRID.tokens(a[0])[:, [6, 10]]
        torch.testing.assert_close(picked, GRID.tokens(b)[:, [6, 10]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "level", "refresh", "line"), [
    ("sd3", 0.8, None, "pppppp"), ("sd3", None, 3, "CppCpp"), ("pixart", 0.5, 4, "ppppCp"),
    ("flux", None, None, "Cppppp"), ("flux", 0.0, None, "pppppp"),
])  # fmt: skip
def test_the_context_is_the_reference_at_the_end(name, level, refresh, line):
    pipeline, kwargs = PIPELINES[name]()
    plain = sample(pipeline, kwargs, steps=6)
    reference = 0.5 * randn(*plain.shape, seed=9).clamp(-1, 1)
    mask = torch.zeros(8, 8)
    mask[2:4, 2:6] = 1
    with maskaccel.patch(pipeline, LazyDiffusion(mask, reference, level, refresh, multiple=1)) as patch:
        got = sample(pipeline, kwargs, steps=6)
        assert torch.equal(got, sample(pipeline, kwargs, steps=6))
        activity = patch.report().activity["LazyDiffusion"]
    assert next(v for k, v in activity.items() if k.startswith("steps")) == line
    equal = (GRID.tokens(got) - GRID.tokens(reference)).abs().amax((-1, -2))[0] < 1e-4
    hole = token_mask(mask, GRID.grid)[0]
    assert torch.equal(equal, ~hole)
    assert torch.equal(sample(pipeline, kwargs, steps=6), plain)


def test_samples_with_smaller_holes_compute_more_around_them():
    mask = torch.zeros(2, 4, 4)
    mask[0, 0, 0] = 1
    mask[1, 1:3, 1:3] = 1
    selector = LazyDiffusion(mask, torch.zeros(1), multiple=1).selector()
    index = selector.fixed((4, 4), 16, torch.device("cpu"))
    assert index.keep.shape == (2, 4) and index.keep[1].tolist() == [5, 6, 9, 10]
    assert 0 in index.keep[0] and set(index.keep[0].tolist()) <= {0, 1, 2, 4, 5, 6, 8, 9}
    assert LazyDiffusion(mask, torch.zeros(1)).selector().fixed((4, 4), 16, torch.device("cpu")) is None


@pytest.mark.parametrize(("settings", "message"), [
    ({"level": 1}, "level=1"), ({"level": -0.1}, "level="), ({"refresh": 1}, "refresh="), ({"mask": 3}, "mask=3"),
    ({"reference": None}, "reference=None"), ({"multiple": 0}, "multiple=0"),
])  # fmt: skip
def test_settings_of_lazy_diffusion(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LazyDiffusion(**({"mask": torch.ones(4, 4), "reference": torch.zeros(1)} | settings))


def test_references_that_the_model_cannot_be_called_with():
    pipeline, kwargs = PIPELINES["sd3"]()
    for reference, error, message in (
        (torch.zeros(1, 4, 4, 4), ValueError, r"cannot be called with those of the reference, \(1, 4, 4, 4\)"),
        (lambda: "a cat", TypeError, "reference must be a tensor or a function that gives one, got str"),
    ):
        with maskaccel.patch(pipeline, LazyDiffusion(torch.ones(8, 8), reference)), pytest.raises(error, match=message):
            sample(pipeline, kwargs, steps=3)


def test_levels_of_solvers():
    clean, eps = randn(1, 4, 8, 8), randn(1, 4, 8, 8, seed=1)
    ddim = Levels.of(diffusers.DDIMScheduler())
    scheduler = diffusers.DDIMScheduler()
    start = scheduler.add_noise(clean, eps, torch.tensor([999]))
    got = ddim.moved(start, clean, 1.0, 0.5)
    torch.testing.assert_close(got, scheduler.add_noise(clean, eps, torch.tensor([500])), rtol=1e-4, atol=1e-4)
    flow = Levels.of(diffusers.FlowMatchEulerDiscreteScheduler())
    torch.testing.assert_close(flow.moved(0.1 * clean + 0.9 * eps, clean, 0.9, 0.5), 0.5 * clean + 0.5 * eps)
    pipeline, _ = PIPELINES["dit"]()
    pipeline.scheduler = diffusers.EulerDiscreteScheduler()
    with pytest.raises(PatchError, match="EulerDiscreteScheduler scales latents before the model"):
        maskaccel.patch(pipeline, LazyDiffusion(torch.ones(8, 8), clean))


# -------------------------------------------------------------------------------------------------------- ReferenceKV


@pytest.mark.parametrize("storage", [KVStorage(), KVStorage(fp8=True)])
def test_reference_tokens_are_computed_once(storage):
    model, kwargs = MODELS["FluxTransformer2DModel"]()
    kwargs["hidden_states"] = torch.cat([kwargs["hidden_states"], randn(2, 6, 4, seed=7)], 1)
    ids = torch.tensor([[1.0, y, x] for y in range(2) for x in range(3)])
    kwargs["img_ids"] = torch.cat([kwargs["img_ids"], ids])
    calls = steps_of(model, kwargs)
    got, activity = partial_run(model, ReferenceKV(storage=storage), calls)
    assert activity["steps"] == "Cpp" and share(activity) == 15 / 21
    index = TokenIndex.from_keep(torch.arange(15), 21)
    wanted = oracle_run(model, index, calls, text_first=True)
    for a, b in zip(got, wanted, strict=True):
        bound = 0.02 if storage.fp8 else 1e-5
        assert (a[0][:, :15] - b[0][:, :15]).abs().max() < bound * b[0].abs().max()
    rows = 4 * 2 * 2 * 6 * (32 + 2 * 4 if storage.fp8 else 32 * 4)  # layers, K and V, samples, rows, bytes
    assert activity["peak bytes"] == rows
    _, activity = partial_run(model, ReferenceKV(refresh=2), calls)
    assert activity["steps"] == "CpC"


def kontext():
    """FLUX.1 Kontext: the tokens of an image behind those of the latents."""
    base, kwargs = PIPELINES["flux"]()
    pipeline = diffusers.FluxKontextPipeline(**base.components)
    pipeline.set_progress_bar_config(disable=True)
    image = randn(1, 3, 16, 16, seed=5).sigmoid()
    return pipeline, kwargs | {"image": image, "max_area": 256, "_auto_resize": False}


def test_an_editing_pipeline():
    pipeline, kwargs = kontext()
    plain = sample(pipeline, kwargs, steps=6)
    tokens = plain.shape[1]
    with maskaccel.patch(pipeline, ReferenceKV()) as patch:
        got = sample(pipeline, kwargs, steps=6)
        assert torch.equal(got, sample(pipeline, kwargs, steps=6)) and not torch.equal(got, plain)
        activity = patch.report().activity["ReferenceKV"]
    assert activity["steps"] == "Cppppp" and share(activity) == 0.5
    reference = sample(pipeline, kwargs, seed=3, steps=6)
    method = SpotEdit(reference, 1e6, first=2, dense=(4,), border=1.0, multiple=1)
    with maskaccel.patch(pipeline, method) as patch:
        got = sample(pipeline, kwargs, steps=6)
        activity = patch.report().activity["SpotEdit"]
    # The tokens of the image are left out with those of the latents.
    assert activity["steps"] == "CCppCp" and share(activity) == 0.5 / tokens
    assert int(((got - reference).abs().amax(-1) < 1e-4).sum()) == tokens - 1
    assert torch.equal(sample(pipeline, kwargs, steps=6), plain)


@pytest.mark.parametrize("scheduler", [diffusers.DPMSolverMultistepScheduler, diffusers.DDPMScheduler])
def test_reference_kv_goes_with_any_solver_and_leaves_calls_without_references(scheduler):
    pipeline, kwargs = PIPELINES["dit"]()
    pipeline.scheduler = scheduler()
    torch.manual_seed(0)  # the pipeline gives DDPM's step no generator
    plain = sample(pipeline, kwargs, steps=4)
    with maskaccel.patch(pipeline, ReferenceKV(tokens=16)):
        torch.manual_seed(0)
        assert torch.equal(sample(pipeline, kwargs, steps=4), plain)
    with pytest.raises(PatchError, match="use one of FlowMatchEuler"):
        maskaccel.patch(pipeline, RAS())


# ---------------------------------------------------------------------------------------------------------------- ToMe


def merged_by_hand(q, k, v, grid, ratio, cell, step=0):
    """Attention over merged tokens, `(B, H, N, D)`, source by source."""
    batch, _, n, _ = q.shape
    cells = n // math.prod(cell)
    dst = random_keep(1, n, cells, seed=0, step=step, route=0, scheme="cell", grid=grid, cell=cell).keep[0].tolist()
    src = [t for t in range(n) if t not in dst]
    outs = []
    for b in range(batch):
        metric = F.normalize(k[b].transpose(0, 1).reshape(n, -1), dim=-1)
        similarity = metric[src] @ metric[dst].T
        best = similarity.max(1)
        order = best.values.sort(descending=True, stable=True).indices[: int(n * ratio)].tolist()
        into = {src[i]: dst[int(best.indices[i])] for i in order}
        stays = [t for t in range(n) if t not in into]
        groups = [[t, *(s for s in into if into[s] == t)] for t in stays]
        few = [torch.stack([x[b][:, group].mean(1) for group in groups], 1) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*few)
        outs.append(torch.stack([out[:, stays.index(into.get(t, t))] for t in range(n)], 1))
    return torch.stack(outs)


@pytest.mark.parametrize(("grid", "cell", "ratio"), [((6, 8), (2, 2), 0.5), ((2, 4, 6), (2, 2), 0.25),
                                                     ((6, 8), (3, 4), 0.75), ((6, 8), (2, 2), 0.0)])  # fmt: skip
def test_attention_over_merged_tokens(grid, cell, ratio):
    q, k, v = (randn(2, 3, math.prod(grid), 16, seed=i) for i in range(3))
    model = Model()
    with maskaccel.patch(model, ToMe(ratio, cell, grid=grid)) as patch, torch.no_grad():
        got = model(q, k, v)
        assert patch.report().activity["ToMe"] == {"merged calls": 1, "dense calls": 0}
    wide = (1,) * (len(grid) - 2) + cell
    torch.testing.assert_close(got, merged_by_hand(q, k, v, grid, ratio, wide), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "pixart"])
def test_merging_in_pipelines(name):
    pipeline, kwargs = PIPELINES[name]()
    plain = sample(pipeline, kwargs, steps=3)
    with maskaccel.patch(pipeline, ToMe(ratio=0.0)):
        torch.testing.assert_close(sample(pipeline, kwargs, steps=3), plain, rtol=1e-3, atol=1e-3)
    with maskaccel.patch(pipeline, ToMe(dense_layers=1)) as patch:
        got = sample(pipeline, kwargs, steps=3)
        assert torch.equal(got, sample(pipeline, kwargs, steps=3)) and not torch.equal(got, plain)
        activity = patch.report().activity["ToMe"]
    assert activity["merged calls"] > 0 == activity["dense calls"]
    assert torch.equal(sample(pipeline, kwargs, steps=3), plain)


def test_calls_that_cannot_be_merged_stay_dense():
    model, q = Model(), randn(2, 3, 15, 16)
    for method, reason in ((ToMe(grid=(3, 5)), r"no whole number of cells"), (ToMe(), "not known")):
        with maskaccel.patch(model, method) as patch, torch.no_grad():
            assert torch.equal(model(q, q, q), F.scaled_dot_product_attention(q, q, q))
            activity = patch.report().activity["ToMe"]
        assert activity["warning"] and any(reason in key for key in activity)


@pytest.mark.parametrize("settings", [{"ratio": 1}, {"ratio": -0.1}, {"ratio": 0.76}, {"cell": (1, 1)},
                                      {"cell": [2, 2]}, {"dense_layers": -1}, {"seed": None}])  # fmt: skip
def test_settings_of_tome(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name}="):
        ToMe(**settings)


# ---------------------------------------------------------------------------------------------------------- benchmark


def test_the_page_shows_the_stored_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.tokens import regions

    page = (ROOT / "docs" / "partial-tokens.md").read_text(encoding="utf-8")
    data = json.loads((ROOT / "benchmarks" / "results" / "token_regions.json").read_text(encoding="utf-8"))
    for name in ("sampling", "filling", "editing"):
        assert regions.table(data[name]) in page
    # A hole of a tenth of the image takes a fifth of the time or less.
    dense, lazy = (next(r for r in data["filling"] if r["run"] == n) for n in ("dense", "LazyDiffusion(level=0.8)"))
    assert all(a >= 5 * b for a, b in zip(dense["wall"], lazy["wall"], strict=True))
    mask = regions.hole()
    assert int(token_mask(mask, (32, 32)).sum()) == data["settings"]["hole_tokens"] == 100
    flat = torch.arange(64.0).expand(1, 1, 64, 64)
    assert regions.seam(flat, mask) == pytest.approx(1.0)
    assert regions.seam(flat + 10 * mask, mask) > 5
