"""ClusCa, against the paper's rule written out, and on real pipelines."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from zoo.common import randn
from zoo.pipelines import PIPELINES, check_runs, dit, sample

import maskaccel
from maskaccel.methods import ClusCa, TaylorSeer
from maskaccel.state import History, Ladder, Series, Storage, Taylor
from maskaccel.state.select import hashed

STEPS = 8


@functools.cache
def built(name):
    pipeline, kwargs = PIPELINES[name]()
    return pipeline, kwargs, sample(pipeline, kwargs, steps=STEPS)


@pytest.fixture(params=["dit", "pixart", "flux", "wan", "sd3", "qwen", "hunyuan_video"])
def name(request):
    return request.param


# ------------------------------------------------------------------------------------------------ the rule
def _clustered(x, centroids, count, iters):
    """Lloyd's iterations with L1 distances; the start is even over the tokens."""
    batch, tokens, _ = x.shape
    if centroids is None:
        centroids = x[:, [(2 * c + 1) * tokens // (2 * count) for c in range(count)]]
    for i in range(iters + 1):
        labels = torch.cdist(x, centroids, p=1).argmin(-1)
        if i < iters:
            centroids = torch.stack([
                torch.stack([
                    x[b, labels[b] == c].mean(0) if (labels[b] == c).any() else centroids[b, c] for c in range(count)
                ]) for b in range(batch)
            ])  # fmt: skip
    return labels, centroids


def written_out(model, xs, times, labels_in, method):
    """The authors' DiT code in plain torch, factor by factor; the draw itself is the library's."""
    blocks, step, full, before = model.transformer_blocks, 0, [], [None]
    clusters = {"labels": None, "centroids": None}

    def is_full():
        return step < method.first or (step - method.first + 1) % method.interval == 0

    def renewed(factors, value):
        new = {0: value.clone()}
        for i in range(method.order):
            if i not in factors:
                break
            new[i + 1] = (new[i] - factors[i]) / (step - before[0])
        return new

    def series(factors):
        e = step - full[-1]
        return sum(factor * e**i / math.factorial(i) for i, factor in factors.items())

    def attention(module):
        inner, state = module.forward, {"factors": {}}

        def forward(hidden, **kwargs):
            if is_full():
                state["factors"] = renewed(state["factors"], inner(hidden, **kwargs))
                return state["factors"][0].clone()
            return series(state["factors"])

        module.forward = forward

    def mlp(module, number):
        inner, state = module.forward, {"factors": {}}

        def forward(hidden):
            if is_full():
                state["factors"] = renewed(state["factors"], inner(hidden))
                return state["factors"][0].clone()
            order, value = hashed(hidden.shape[1], method.seed, number, step), state["factors"][0]
            for b in range(hidden.shape[0]):
                chosen = {}
                for c in clusters["labels"][b].unique().tolist():
                    members = (clusters["labels"][b] == c).nonzero()[:, 0]
                    chosen[c] = members[order[members].argmax()].item()
                fresh = {c: inner(hidden[b : b + 1, n : n + 1])[0, 0] for c, n in chosen.items()}
                for n in range(hidden.shape[1]):
                    c = clusters["labels"][b, n].item()
                    share = 1.0 if n == chosen[c] else method.gamma
                    value[b, n] = share * fresh[c] + (1 - share) * value[b, n]
            return series(state["factors"])

        module.forward = forward

    last = blocks[-1].forward

    def forward(hidden, *args, **kwargs):
        out = last(hidden, *args, **kwargs)
        if is_full():
            found = _clustered(out, clusters["centroids"], method.clusters, method.iters)
            clusters["labels"], clusters["centroids"] = found
        return out

    for number, block in enumerate(blocks):
        attention(block.attn1)
        mlp(block.ff, number)
    blocks[-1].forward = forward
    outs = []
    with torch.no_grad():
        for step, (x, t) in enumerate(zip(xs, times, strict=True)):
            if is_full():
                before[0] = full[-1] if full else None
                full.append(step)
            outs.append(model(x, timestep=torch.full((2,), t), class_labels=labels_in).sample)
    for block in blocks:
        del block.attn1.forward, block.ff.forward
    del blocks[-1].forward
    return torch.stack(outs)


@pytest.mark.parametrize(
    "method",
    [
        ClusCa(clusters=4),
        ClusCa(interval=4, order=0, first=1, clusters=3, gamma=0.0),
        ClusCa(interval=4, order=2, first=2, clusters=5, gamma=0.3, iters=3),
    ],
    ids=["flux", "hold", "second"],
)
def test_the_rule_written_out(method):
    model = dit()[0].transformer
    labels, times = torch.tensor([3, 5]), [990 - 60 * i for i in range(12)]
    xs = [randn(2, 4, 8, 8, seed=1) + 0.3 * randn(2, 4, 8, 8, seed=2 + i) for i in range(len(times))]
    expected = written_out(model, xs, times, labels, method)
    got = []
    with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(len(times)) as run:
        for x, t in zip(xs, times, strict=True):
            got.append(model(x, timestep=torch.full((2,), t), class_labels=labels).sample)
            run.step()
        assert patch.report().activity["ClusCa"]["in part"] > 0
    torch.testing.assert_close(torch.stack(got), expected, rtol=1e-4, atol=1e-4)


def test_without_fresh_tokens_it_is_taylorseer():
    """A DiT whose tokens are not those that were clustered is forecast alone."""
    model, outs = dit()[0].transformer, []
    xs = [randn(2, 4, 8, 8, seed=1) + 0.1 * i * randn(2, 4, 8, 8, seed=2) for i in range(9)]
    for method in (ClusCa(interval=3, order=2), TaylorSeer(interval=3, order=2, level="module")):
        with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(9) as run:
            for i, x in enumerate(xs):
                for held in model.transformer_blocks[-1].__dict__.get("_maskaccel_clusters", _Nothing)._held.values():
                    held.labels = held.labels[:, :-1]
                t = torch.full((2,), 900 - i)
                outs.append(model(x, timestep=t, class_labels=torch.tensor([1, 2])).sample)
                run.step()
    torch.testing.assert_close(torch.stack(outs[:9]), torch.stack(outs[9:]), rtol=1e-4, atol=1e-4)


class _Nothing:
    _held: dict = {}  # noqa: RUF012


# ------------------------------------------------------------------------------------------------ on pipelines
@pytest.mark.filterwarnings("ignore:ClusCa can never reuse")
def test_computing_always_is_the_unpatched_pipeline(name):
    pipeline, kwargs, plain = built(name)
    with maskaccel.patch(pipeline, ClusCa(interval=1)):
        assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain)
    assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain), "remove() did not restore the pipeline"


@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_runs_repeat_and_fused_blocks_agree(name, gamma):
    pipeline, kwargs, plain = built(name)
    for activity in check_runs(pipeline, kwargs, plain, ClusCa(interval=3, first=2, clusters=3, gamma=gamma), STEPS):
        assert activity["in part"] > 0 < activity["reused"]


def test_mlps_see_one_token_of_each_cluster_of_their_stream():
    pipeline, kwargs, _ = built("qwen")
    block, rows = pipeline.transformer.transformer_blocks[0], {"img_mlp": [], "txt_mlp": []}
    for n, seen in rows.items():
        module = getattr(block, n)
        inner = type(module).forward
        module.forward = lambda x, module=module, inner=inner, seen=seen: seen.append(x.shape[1]) or inner(module, x)
    with maskaccel.patch(pipeline, ClusCa(interval=3, first=1, clusters=3)):
        sample(pipeline, kwargs, steps=4)
    for n in rows:
        del getattr(block, n).forward
    assert rows == {"img_mlp": [4, 4, 3, 3, 3, 3, 4, 4], "txt_mlp": [6, 6, 3, 3, 3, 3, 6, 6]}, "both guidance branches"


def test_bytes_are_those_of_the_series_and_the_clusters():
    model, x = dit()[0].transformer, randn(2, 4, 8, 8)
    with torch.no_grad(), maskaccel.patch(model, ClusCa(clusters=3)) as patch, patch.generation(5) as run:
        for _ in range(4):
            model(x, timestep=torch.full((2,), 9), class_labels=torch.tensor([1, 2]))
            run.step()
        held = patch.report().activity["ClusCa"]["bytes held"]
        peak = model.__dict__["_maskaccel_generation"].peak_bytes
    values = 2 * 2 * 2 * (2 * 16 * 32 * 4)  # blocks, modules, order + 1
    assert held == values
    assert peak == values + 2 * 16 * 4 + 2 * 3 * 32 * 4


# ------------------------------------------------------------------------------------------------ ladders
@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("storage", [Storage(), Storage("bf16"), Storage("fp8")], ids=str)
def test_a_ladder_is_taylors_series_over_raw_values(order, storage):
    ladder, raw = Ladder(order + 1, storage), History(order + 1)
    series, taylor = Series(order), Taylor(order)
    bound = {None: 1e-5, "bf16": 5e-2, "fp8": 0.5}[storage.dtype]
    for k, stamp in enumerate([0, 1, 2, 5, 7, 12]):
        value = randn(2, 5, 16, seed=1) + 0.1 * stamp * randn(2, 5, 16, seed=2) + 0.02 * randn(2, 5, 16, seed=9 + k)
        for history in (ladder, raw):
            history.push(value, stamp)
        with torch.no_grad():
            got = ladder.combine(series.weights(ladder.stamps, stamp + 2))
            want = raw.combine(taylor.weights(raw.stamps, stamp + 2))
        assert (got - want).norm() <= bound * want.norm()


def test_a_written_row_counts_once():
    ladder = Ladder(2)
    ladder.push(torch.zeros(1, 3, 4), 0)
    ladder.push(torch.full((1, 3, 4), 2.0), 1)
    fresh = torch.full((1, 1, 4), 7.0)
    out = ladder.refresh(Series(1).weights(ladder.stamps, 3), fresh, torch.tensor([[1]]))
    assert out[0, :, 0].tolist() == [6, 11, 6], "the series' slope of 2 from what was written, not from the ladder anew"
    ladder.push(torch.full((1, 3, 4), 9.0), 3)
    out = ladder.combine(Series(1).weights(ladder.stamps, 4))
    assert out[0, :, 0].tolist() == [12.5, 10, 12.5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"interval": 0}, "interval=0"),
        ({"order": -1}, "order=-1"),
        ({"clusters": 0}, "clusters=0 must be an integer from 1 to 1024"),
        ({"iters": -1}, "iters=-1"),
        ({"first": "3"}, "first='3' must be an integer, 1 or more"),
        ({"seed": None}, "seed=None must be an integer"),
        ({"gamma": 2}, "gamma=2"),
        ({"metric": "l3"}, "metric='l3'; allowed are 'l2', 'l1', 'cosine'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        ClusCa(**fields)
