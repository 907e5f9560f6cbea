"""DDT: its dynamic programme against every schedule, the method against the paper's equations in plain torch."""

from __future__ import annotations

import copy
import itertools

import _plain_dit as plain
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo.common import made
from zoo.pipelines import PIPELINES, dit, flux, sample

import maskaccel
from maskaccel.calibration import Calibration
from maskaccel.masks.dynamic import Dynamic, Uniform, best_steps
from maskaccel.masks.schedule import At, render
from maskaccel.methods import DDT, SCM, FusedAdaLN
from maskaccel.models import Decoupled

WIDTH, BLOCKS, ENCODERS = 16, 5, 3
LABELS = torch.tensor([1, 4])


# ------------------------------------------------------------------------------------------------ schedules
def loss(distances, steps):
    """What all steps lose by the last computed one."""
    return sum(row[max(s for s in steps if s <= k)] for k, row in enumerate(distances))


def random_distances(n, seed, symmetric=True):
    table = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    table = (table + table.T) / 2 if symmetric else table
    return tuple(map(tuple, table.fill_diagonal_(0).tolist()))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 6, 9])
def test_against_every_schedule(n, symmetric):
    for seed, count in itertools.product(range(3), range(1, n + 1)):
        distances = random_distances(n, seed, symmetric)
        every = [(0, *rest) for rest in itertools.combinations(range(1, n), count - 1)]
        found = best_steps(distances, count)
        assert tuple(found) in every
        assert loss(distances, found) == pytest.approx(min(loss(distances, one) for one in every), abs=1e-12)


def authors_loop(distances, count):
    """The recursion as it is written down, in plain Python."""
    n = len(distances)
    cost = [[sum(distances[k][j] for k in range(j, i)) for i in range(n + 1)] for j in range(n)]
    total, places = [cost[0]], []
    for _ in range(1, count):
        row = [min(((total[-1][j] if j else float("inf")) + cost[j][i], j) for j in range(i)) if i else None
               for i in range(n + 1)]  # fmt: skip
        total.append([float("inf") if one is None else one[0] for one in row])
        places.append([None if one is None else one[1] for one in row])
    chosen = [n]
    for row in reversed(places):
        chosen.insert(0, row[chosen[0]])
    return [0, *chosen[:-1]]


@pytest.mark.parametrize(("n", "count"), [(28, 7), (50, 10), (50, 1), (12, 12)])
def test_against_the_recursion(n, count):
    for seed in range(3):
        distances = random_distances(n, seed)
        assert best_steps(distances, count) == authors_loop(distances, count)


def test_it_finds_where_features_jump():
    scenes = [0] * 5 + [1] * 2 + [2] * 9
    distances = tuple(tuple(float(a != b) for b in scenes) for a in scenes)
    assert best_steps(distances, 3) == [0, 5, 7]
    rule = Dynamic(distances, refresh=5)
    assert render(rule.plan(16)) == "C....C.C........"
    assert render(rule.plan(32)).count("C") == 6
    assert render(Dynamic(distances, refresh=5 * 2).plan(32)).count("C") == 3
    assert render(rule.plan(1)) == "C"


@pytest.mark.parametrize(("steps", "refresh", "want"), [(8, 2, "C.C.C.C."), (8, 1, "C" * 8), (7, 2, "C.C.C.."),
                                                        (10, 4, "C....C...."), (3, 9, "C..")])  # fmt: skip
def test_the_uniform_schedule(steps, refresh, want):
    got = render(Uniform(refresh).plan(steps))
    assert got == want
    gaps = [len(run) for run in got.split("C")[1:]]
    assert max(gaps) - min(gaps) <= 1


def test_a_late_start_starts_late_in_the_schedule():
    rule = Uniform(3)
    assert [rule.action(At(i, 6, offset=3)) for i in range(6)] == ["compute", *rule.plan(9)[4:]]


# ------------------------------------------------------------------------------------------------ the authors' model
def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attn, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.adaLN_modulation = nn.Sequential(nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x, c, pos=None, mask=None):
        a, b, g, d, e, h = self.adaLN_modulation(c).chunk(6, dim=-1)
        y = modulate(self.norm1(x), a, b)
        x = x + g * self.attn(y + y.mean(1, keepdim=True))
        return x + h * self.mlp(modulate(self.norm2(x), d, e))


class Final(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 4)
        self.adaLN_modulation = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH))

    def forward(self, x, c):
        return self.linear(modulate(self.norm(x), *self.adaLN_modulation(c).chunk(2, dim=-1)))


class DDTModel(nn.Module):
    """Encoder and decoder as the paper has them: `s = silu(t + E(x, t, y))`, decoder modulated by s for each token."""

    def __init__(self):
        super().__init__()
        self.num_encoder_blocks = ENCODERS
        self.x_embedder, self.s_embedder, self.y = nn.Linear(4, WIDTH), nn.Linear(4, WIDTH), nn.Embedding(10, WIDTH)
        self.t = nn.Linear(1, WIDTH)
        self.blocks, self.final_layer = nn.ModuleList(Block() for _ in range(BLOCKS)), Final()

    def encode(self, x, t, y):
        time = self.t(t[:, None, None])
        s, c = self.s_embedder(x), F.silu(time + self.y(y)[:, None])
        for i in range(self.num_encoder_blocks):
            s = self.blocks[i](s, c)
        return F.silu(time + s)

    def forward(self, x, t, y, s=None, mask=None):
        if s is None:
            s = self.encode(x, t, y)
        x = self.x_embedder(x)
        for i in range(self.num_encoder_blocks, len(self.blocks)):
            x = self.blocks[i](x, s)
        return self.final_layer(x, s), s


def calls(steps):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(2, 6, 4, generator=generator), torch.full((2,), 1 - i / steps)) for i in range(steps)]


@torch.no_grad()
def shared(model, letters):
    """The authors' sampler: the state is passed on until it is to be computed."""
    outs, state = [], None
    for (x, t), letter in zip(calls(len(letters)), letters, strict=True):
        out, state = model(x, t, LABELS, None if letter == "C" else state)
        outs.append(out)
    return torch.stack(outs)


@torch.no_grad()
def patched(model, method, steps, **state):
    outs = []
    with maskaccel.patch(model, method) as patch, patch.generation(steps) as run:
        for x, t in calls(steps):
            out = model(x, t, LABELS, **state)
            outs.append(out[0] if isinstance(out, tuple) else out)
            run.step()
        report = patch.report()
    return torch.stack(outs), report.activity["DDT"]


@pytest.mark.parametrize("modulation", [False, True])
@pytest.mark.parametrize("schedule", ["uniform", (1, 0, 1, 1, 0, 0, 0, 1), "statistical"], ids=str)
def test_the_authors_model(schedule, modulation):
    model, letters = made(DDTModel), "C.C.C.C."
    if isinstance(schedule, tuple):
        letters = render("compute" if c else "reuse" for c in schedule)
    if schedule == "statistical":
        distances = random_distances(8, 1)
        letters = render("compute" if i in best_steps(distances, 4) else "reuse" for i in range(8))
        schedule = Calibration.make("distances", "DDTModel", BLOCKS, 8, {"distances": distances, "encoder": "s"})
        assert letters != "C.C.C.C."
    runs = []
    handles = [model.blocks[i].register_forward_hook(lambda *_, i=i: runs.append(i)) for i in (0, BLOCKS - 1)]
    mods = [model.blocks[-1].adaLN_modulation, model.final_layer.adaLN_modulation]
    made_anew = []
    handles += [m[0].register_forward_hook(lambda *_: made_anew.append(1)) for m in mods]
    got, activity = patched(model, DDT(schedule, modulation=modulation), 8)
    for handle in handles:
        handle.remove()
    assert (runs.count(0), runs.count(BLOCKS - 1)) == (letters.count("C"), 8)
    assert len(made_anew) == 2 * (letters.count("C") if modulation else 8)
    assert torch.equal(got, shared(model, letters))
    assert not torch.equal(got, shared(model, "C" * 8))
    z = 2 * 6 * WIDTH * 4
    assert activity["peak bytes"] == z * (1 + modulation * (6 * (BLOCKS - ENCODERS) + 2))


def test_refresh_1_is_the_model_and_a_state_of_ones_own_is_left_alone():
    model = made(DDTModel)
    with pytest.warns(UserWarning, match="DDT can never reuse"):
        got, _ = patched(model, DDT(refresh=1), 6)
    assert torch.equal(got, shared(model, "C" * 6))
    state = torch.randn(2, 6, WIDTH)
    with torch.no_grad():
        want = torch.stack([model(x, t, LABELS, state)[0] for x, t in calls(6)])
    got, activity = patched(model, DDT(modulation=True), 6, s=state)
    assert torch.equal(got, want) and activity["reused"] == 0


def test_what_the_model_returns_is_the_callers_to_change():
    model, outs = made(DDTModel), []
    with torch.no_grad(), maskaccel.patch(model, DDT(refresh=4)) as patch, patch.generation(4) as run:
        for x, t in calls(4):
            out, state = model(x, t, LABELS)
            outs.append(out)
            state.zero_()
            run.step()
    assert torch.equal(torch.stack(outs), shared(model, "C..."))


def test_a_copy_shares_a_state_of_its_own():
    model = made(DDTModel)
    with torch.no_grad(), maskaccel.patch(model, DDT(refresh=4, modulation=True)) as patch:
        other = copy.deepcopy(model)
        theirs = other.__dict__["_maskaccel_patch"]
        outs = {id(model): [], id(other): []}
        with patch.generation(4) as run, theirs.generation(4) as their_run:
            for i, (x, t) in enumerate(calls(4)):
                outs[id(model)].append(model(x, t, LABELS)[0])
                outs[id(other)].append(other(calls(4)[0][0] + i, t, LABELS)[0])
                run.step()
                their_run.step()
    assert torch.equal(torch.stack(outs[id(model)]), shared(model, "C..."))
    assert not torch.equal(torch.stack(outs[id(other)]), shared(model, "C..."))


def test_a_compiled_model_decides_outside_of_its_graphs():
    model, graphs = made(DDTModel), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with maskaccel.patch(model, DDT(refresh=2)):
        model.compile(backend=backend, fullgraph=True)
        outs = []
        for _ in range(2):
            patch = model.__dict__["_maskaccel_patch"]
            with torch.no_grad(), patch.generation(6) as run:
                for x, t in calls(6):
                    outs.append(model(x, t, LABELS)[0])
                    run.step()
        assert len(graphs) == 2  # with and without a state
    torch.testing.assert_close(torch.stack(outs), shared(made(DDTModel), "C.C.C.").repeat(2, 1, 1, 1))


# ------------------------------------------------------------------------------------------------ other models
class Encode(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, WIDTH)

    def forward(self, x, t, y):
        return F.silu(self.net(x) + t[:, None, None]), y.float()


class Decode(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, WIDTH)

    def forward(self, z, x, t, y):
        return z[0] * self.net(x) + z[1][:, None, None]


@pytest.mark.parametrize("encoder", [None, "encoder"])
def test_two_modules(encoder):
    model = made(Decoupled, encoder=Encode(), decoder=Decode())
    got, activity = patched(model, DDT(refresh=3, encoder=encoder), 6)
    outs, z = [], None
    with torch.no_grad():
        for i, (x, t) in enumerate(calls(6)):
            z = model.encoder(x, t, LABELS) if i % 3 == 0 else z
            outs.append(model.decoder(z, x, t, LABELS))
    assert torch.equal(got, torch.stack(outs))
    assert (activity["computed"], activity["reused"]) == (2, 4)


@pytest.mark.parametrize("fused", [False, True])
def test_the_first_blocks_of_a_stack(fused):
    model, labels, given = dit()[0].transformer, torch.tensor([3]), plain.inputs(6)
    got, activity = plain.patched(model, [DDT(refresh=3, encoder=1)] + [FusedAdaLN()] * fused, given, labels)
    assert activity["steps"] == "C..C.."
    want = plain.held(model, given, labels, [True, False, False] * 2, encoder=slice(0, 1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dit", "flux", "sd3", "wan", "qwen"])
def test_pipelines(name):
    pipeline, kwargs = PIPELINES[name]()
    expected = sample(pipeline, kwargs)
    outs = []
    for methods in ([DDT()], [DDT(), FusedAdaLN()]):
        with maskaccel.patch(pipeline, methods) as patch:
            outs.append(sample(pipeline, kwargs))
            assert torch.equal(sample(pipeline, kwargs), outs[-1]), "two runs of one seed differ"
            activity = patch.report().activity["DDT"]
            assert activity["computed"] == activity["reused"] > 0
    assert not torch.equal(outs[0], expected)
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=2e-5 * outs[0].abs().max().item())
    assert torch.equal(sample(pipeline, kwargs), expected)


def test_the_dynamic_schedule_serves_other_methods():
    pipeline, kwargs = dit()
    rule = Dynamic(random_distances(6, 2), refresh=2)
    with maskaccel.patch(pipeline, SCM(rule)) as patch:
        sample(pipeline, kwargs)
        assert patch.report().activity["SCM"]["steps"] == render(rule.plan(6))


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDT(refresh=0.5), "refresh=0.5 must be a finite number, 1 or more"),
        (lambda: DDT(encoder=0), "encoder=0 must be a number of blocks, 1 or more, or the name"),
        (lambda: DDT(encoder="all"), "leaves no decoder"),
        (lambda: DDT((1, 2)), "schedule=.1, 2. must be a tuple of 0 and 1"),
        (lambda: DDT((0, 1)), "first step"),
        (lambda: DDT(Calibration.make("magnitudes", "A", 1, 1, {})), "kind 'magnitudes'; needed is 'distances'"),
        (lambda: Dynamic(((0.0, 1.0),)), "square matrix"),
        (lambda: Dynamic(((float("nan"),),)), "finite numbers"),
        (lambda: best_steps([[0.0]], 2), "count=2 must be 1 to 1"),
    ],
)
def test_bad_fields(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_models_that_do_not_fit():
    model = dit()[0].transformer
    made_with = {"distances": random_distances(4, 0), "encoder": 2}
    other = Calibration.make("distances", "DiTTransformer2DModel", 2, 4, made_with)
    for method, message in [
        (DDT(encoder=3), "encoder=3, but DiTTransformer2DModel has 2 blocks"),
        (DDT(encoder=2), "leaves no block of 2"),
        (DDT(encoder="enc"), "no module named 'enc'; its children are pos_embed"),
        (DDT(modulation=True), "modulation=True is for the authors' model"),
        (DDT(other, encoder=1), "calibration is of encoder=2, the method shares 1"),
    ]:
        with pytest.raises(maskaccel.PatchError, match=message):
            maskaccel.patch(model, method)
    with pytest.raises(maskaccel.PatchError, match="made with DiTTransformer2DModel; the model is a Flux"):
        maskaccel.patch(flux()[0], DDT(other))
    assert not any("forward" in module.__dict__ for module in model.modules())
