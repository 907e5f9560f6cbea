"""Methods of sparse attention against the papers' rules, written here element by element."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from _sparse_methods import CELLS, GRID, TOKENS, Block, Model, check, masked, pairs, qkv
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import maskaccel
from maskaccel import methods as m
from maskaccel.masks import TileMask
from maskaccel.patching.once import Places
from maskaccel.patching.transaction import PatchError


class _Asked(Exception):
    """`TileMask.from_rule` was called: with a rule, and a device."""


@pytest.mark.parametrize(
    ("method", "grid"),
    [
        (m.SlidingTile(window=(3, 3, 3), tile=(2, 2, 4)), GRID),
        (m.RadialAttention(block=(32, 32)), GRID),
        (m.CLEAR(radius=3, patch=(4, 4), block=(32, 32)), (8, 24)),
    ],
)
def test_masks_are_made_where_the_tokens_are(method, grid, monkeypatch) -> None:
    """On a GPU by its own work: a rule that is moved leaves nothing behind, and meta tensors do not mix with others."""

    def asked(rule, shape, block, device):
        raise _Asked(rule, device)

    monkeypatch.setattr(TileMask, "from_rule", asked)
    for place, maker in (("cuda:0", "cuda:0"), ("cpu", "cpu"), ("meta", "cpu")):
        with pytest.raises(_Asked) as found:
            method.fixed(Places(grid, (0, 0), TOKENS, TOKENS, 3, torch.device(place)))
        rule, device = found.value.args
        assert device == torch.device(maker)
    rows = torch.arange(64, device="meta").view(2, 32)
    moved = rule.to(torch.device("meta"))
    assert moved.classify(rows, rows).shape[2:] == (2, 2) and moved.keep(rows, rows).shape[2:] == (2, 32, 32)


@pytest.mark.parametrize("radius", [2, 3.5, 6])
def test_clear_is_a_disc(radius) -> None:
    grid = (12, 16)
    cells = list(itertools.product(*map(range, grid)))
    kept = torch.tensor([[(a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 < radius**2 for b in cells] for a in cells])
    check(m.CLEAR(radius=radius, grid=grid, patch=(4, 8), block=(32, 32)), qkv(len(cells)), kept)


def test_clear_with_pooled_keys() -> None:
    grid, factor = (8, 12), 4
    q, k, v = qkv(96)
    pooling = m.ClearPooling(1, factor)
    with torch.no_grad():
        pooling.weight += 0.1 * torch.randn(pooling.weight.shape)
    model = Model()
    with maskaccel.patch(model, [m.CLEAR(radius=3, pooling=pooling, grid=grid, patch=(4, 4), block=(16, 32))]):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        got = model(*leaves)
    squares = list(itertools.product(range(grid[0] // factor), range(grid[1] // factor)))

    def pooled(t: Tensor) -> Tensor:
        cells = []
        for y, x in squares:
            parts = [
                pooling.weight[0, i, j].double() * t[:, :, (y * factor + i) * grid[1] + x * factor + j]
                for i in range(factor)
                for j in range(factor)
            ]
            cells.append(sum(parts))
        return torch.cat([t, torch.stack(cells, 2)], 2)

    twins = [t.double().requires_grad_() for t in (q, k, v)]
    cells = list(itertools.product(*map(range, grid)))
    disc = torch.tensor([[(a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 < 9 for b in cells] for a in cells])
    kept = torch.cat([disc, torch.ones(96, len(squares), dtype=torch.bool)], 1)
    want = F.scaled_dot_product_attention(twins[0], pooled(twins[1]), pooled(twins[2]), attn_mask=kept)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)
    weight = torch.randn(want.shape, dtype=torch.float64)
    (want * weight).sum().backward()
    wanted, pooling.weight.grad = pooling.weight.grad, None
    (got * weight.float()).sum().backward()
    for mine, theirs in zip((*leaves, pooling.weight), (*twins, None), strict=True):
        reference = wanted if theirs is None else theirs.grad
        torch.testing.assert_close(mine.grad.double(), reference.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [(3, 1, 3), (1, 3, 3), ((3, 3, 1), (1, 1, 1), (3, 3, 3))])
def test_sliding_tiles(window) -> None:
    tile = (2, 2, 4)
    counts = [-(-n // t) for n, t in zip(GRID, tile, strict=True)]

    def near(window, a, b) -> bool:
        for x, y, w, t, n in zip(a, b, window, tile, counts, strict=True):
            half = w // 2
            centre = min(max(x // t, half), max(n - 1 - half, half))
            if abs(centre - y // t) > half:
                return False
        return True

    each = window if isinstance(window[0], tuple) else (window,)
    kept = torch.stack([pairs(lambda a, b, w=w: near(w, a, b)) for w in each])
    check(m.SlidingTile(window=window, tile=tile, grid=GRID), qkv(), kept)


@pytest.mark.parametrize(("decay", "sink"), [(1.0, True), (0.3, False)])
def test_radial_bands(decay, sink) -> None:
    grid = (8, 4, 8)
    frames, n = grid[0], 32
    kept = torch.zeros(frames * n, frames * n, dtype=torch.bool)
    for i, j in itertools.product(range(frames), repeat=2):
        d = abs(i - j)
        reach = 2 ** n.bit_length() / 2 ** d.bit_length()
        width = n if d <= 1 else max(reach * decay, 16)
        seen = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= width
        if d > 1 and reach < 128 and d % int(128 / reach):
            seen[:] = False
        if sink and 0 in (i, j):
            seen[:] = True
        kept[i * n : (i + 1) * n, j * n : (j + 1) * n] = seen
    check(m.RadialAttention(decay=decay, sink=sink, whole_tiles=False, grid=grid, block=(16, 32)), qkv(256), kept)
    tiles = kept.view(16, 16, 8, 32).transpose(1, 2)
    some = tiles.any(2)
    dense = tiles.double().mean(2) > 1 / 3
    whole = (dense & some).sum(2) > 0.6 * some.sum(2)
    whole |= tiles.all(3).all(2)
    coarse = whole.repeat_interleave(16, 0).repeat_interleave(32, 1)
    check(m.RadialAttention(decay=decay, sink=sink, grid=grid, block=(16, 32)), qkv(256), coarse)


def test_mask2dit_scenes() -> None:
    texts, videos = (5, 7), (40, 30)
    ids = [("T", 0)] * 5 + [("T", 1)] * 7 + [("V", 0)] * 40 + [("V", 1)] * 30
    kept = torch.tensor([[a[1] == b[1] or (a[0] == "V" and b[0] == "V") for b in ids] for a in ids])
    method = m.Mask2DiT(texts, videos, block=(16, 32))
    assert torch.equal(method.tile_mask().to_bool()[0, 0], kept)
    assert torch.equal(kept, kept.T)


def test_rettention_step_is_the_formula() -> None:
    """Steps 0 to 8: dense, measured at 2 and at 4, 6, 8; sparse between, with rho and the residual of the paper."""
    density, growth, tokens = 0.2, 0.04, TOKENS
    method = m.Rettention(
        density=density, dense_steps=3, refresh=2, growth=growth, clamp=False, grid=(TOKENS,), block=(16, 32)
    )
    radius = int(tokens * density) // 2
    kept = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs() <= radius
    model, held = Model(), None
    with maskaccel.patch(model, [method]) as patch, torch.no_grad(), patch.generation(9) as run:
        for step in range(9):
            inputs = qkv(seed=step)
            got = model(*inputs)
            run.step()
            q, k, v = (t.double() for t in inputs)
            s = q @ k.mT / 4
            full, window = s.exp(), s.exp() * kept
            dense = full @ v / full.sum(-1, keepdim=True)
            sparse = window @ v / window.sum(-1, keepdim=True)
            if step >= 2 and (step == 2 or step % 2 == 0):
                rho = window.sum(-1, keepdim=True) / full.sum(-1, keepdim=True)
                held = rho, dense - rho * sparse, step
            want = dense
            if step >= 3 and step % 2:
                assert held is not None
                want = (held[0] + growth * (step - held[2] - 1)) * sparse + held[1]
            torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)


def test_rettention_on_video_sees_all_frames() -> None:
    method = m.Rettention(density=0.25, block=(16, 32))
    mask = method.window(GRID, (0, 5)).to_bool()[0, 0]
    place = [None] * 5 + [y * GRID[2] + x for _, y, x in CELLS]
    want = torch.tensor([[a is None or b is None or abs(a - b) <= 6 for b in place] for a in place])
    assert torch.equal(mask, want)


def test_liteattention_skips_what_fell_below() -> None:
    """Every step: this step's scores decide the next step's tiles; here with the running maximum, tile by tile."""
    threshold, bm, bn = -3.0, 16, 32
    method = m.LiteAttention(threshold=threshold, block=(bm, bn), min_tiles=1)
    model = Model()
    mask = torch.ones(2, 3, TOKENS // bm, TOKENS // bn, dtype=torch.bool)
    densities = []
    with maskaccel.patch(model, [method]) as patch, torch.no_grad(), patch.generation(5) as run:
        for step in range(5):
            inputs = qkv(smooth=8, sharp=16.0)
            inputs = tuple(t + 0.05 * n for t, n in zip(inputs, qkv(seed=step), strict=True))
            got = model(*inputs)
            run.step()
            kept = mask.repeat_interleave(bm, 2).repeat_interleave(bn, 3)
            torch.testing.assert_close(got.double(), masked(*inputs, kept), atol=2e-5, rtol=1e-5)
            densities.append(mask.double().mean().item())
            s = (inputs[0].double() @ inputs[1].double().mT / 4).unflatten(3, (-1, bn)).unflatten(2, (-1, bm))
            s = s.transpose(3, 4)  # (B, H, Mq, Nk, bm, bn)
            new = torch.zeros_like(mask)
            for b, h, i in itertools.product(*map(range, mask.shape[:3])):
                top = torch.full((bm,), -math.inf, dtype=torch.float64)
                for j in range(mask.shape[3]):
                    if mask[b, h, i, j]:
                        local = s[b, h, i, j].amax(1)
                        new[b, h, i, j] = bool(((local - top) * math.log2(math.e) > threshold).any())
                        top = torch.maximum(top, local)
            mask = new
        report = patch.report().activity["LiteAttention"]
        assert report["tiles computed"] == pytest.approx(sum(densities) / 5 * report["tiles in all"])
    assert densities[0] == 1
    assert densities[-1] < 0.9, densities
    assert all(a >= b for a, b in itertools.pairwise(densities))


def test_liteattention_keeps_branches_and_runs_apart() -> None:
    method = m.LiteAttention(threshold=-2.0, block=(16, 32))
    model, calm = Model(), qkv(smooth=8, sharp=16.0)
    wild = qkv(smooth=8, sharp=16.0, seed=5)
    with maskaccel.patch(model, [method]) as patch, torch.no_grad():

        def outputs(order: tuple[str, ...]) -> dict[str, list[Tensor]]:
            found: dict[str, list[Tensor]] = {"cond": [], "uncond": []}
            with patch.generation(4) as run:
                for _ in range(4):
                    for name in order:
                        with run.branch(name):
                            found[name].append(model(*(calm if name == "cond" else wild)))
                    run.step()
            return found

        both, alone, again = outputs(("cond", "uncond")), outputs(("cond",)), outputs(("uncond", "cond"))
        for a, b, c in zip(both["cond"], alone["cond"], again["cond"], strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
        assert not torch.equal(both["cond"][0], both["cond"][3])  # something was left out
        dense = F.scaled_dot_product_attention(*calm)
        assert torch.equal(model(*calm), dense)  # outside of a run: everything
        torch.testing.assert_close(both["cond"][0], dense)


def test_liteattention_limits() -> None:
    model, inputs = Model(), qkv(smooth=8, sharp=16.0)
    for options in ({"must_keep": ((0, 192),)}, {"refresh": 1}, {"min_tiles": 6}):
        method = m.LiteAttention(threshold=-0.5, block=(16, 32), **options)
        with maskaccel.patch(model, [method]) as patch, torch.no_grad(), patch.generation(3) as run:
            first = model(*inputs)
            run.step()
            assert torch.equal(model(*inputs), first), options
    method = m.LiteAttention(threshold=-100.0, block=(16, 32), must_skip=((64, 192),))
    kept = torch.arange(TOKENS) < 64
    with maskaccel.patch(model, [method]) as patch, torch.no_grad(), patch.generation(3):
        got = model(*inputs)
    torch.testing.assert_close(got.double(), masked(*inputs, kept.expand(TOKENS, TOKENS)), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: m.LiteAttention(threshold=math.nan), "threshold=nan"),
        (lambda: m.LiteAttention(threshold=()), "must hold a number"),
        (lambda: m.LiteAttention(threshold=(-3.0, math.inf)), "threshold=inf"),
        (lambda: m.LiteAttention(refresh=0), "refresh=0"),
        (lambda: m.LiteAttention(must_keep=((5, 3),)), "must_keep"),
        (lambda: m.LiteAttention(block=(100, 64)), "block"),
        (lambda: m.Rettention(density=0), "density=0"),
        (lambda: m.Rettention(growth=math.nan), "growth=nan"),
        (lambda: m.CLEAR(radius=-1), "radius=-1"),
        (lambda: m.SlidingTile(window=(2, 3, 3)), "odd numbers"),
        (lambda: m.SlidingTile(window=()), "window"),
        (lambda: m.RadialAttention(decay=0), "decay=0"),
        (lambda: m.Mask2DiT((5,), (6, 7)), "entry for each scene"),
        (lambda: m.SpargeAttn(cdf=1.5), "cdf=1.5"),
        (lambda: m.VSA(cube=(3, 3, 3)), "27 tokens"),
        (lambda: m.VSA(top_k=0), "top_k=0"),
        (lambda: m.DraftAttention(sparsity=1.0), "sparsity=1.0"),
        (lambda: m.XAttention(stride=24), "stride=24"),
        (lambda: m.SparseVideoGen(samples=0), "samples=0"),
        (lambda: m.LiteAttention(must_keep=((0.0, 5.5),)), "must_keep"),
        (lambda: m.LiteAttention(must_skip=(0, 5)), "must_skip"),
        (lambda: m.LiteAttention(block=64), "block=64"),
        (lambda: m.CLEAR(patch=4), "patch=4"),
        (lambda: m.CLEAR(patch=(1, 2, 4)), "patch"),
        (lambda: m.VSA(top_k=2.5), "top_k=2.5"),
        (lambda: m.SpargeAttn(top_k=-1), "top_k=-1"),
        (lambda: m.SpargeAttn(pv_threshold=-5.0), "pv_threshold=-5.0"),
        (lambda: m.DraftAttention(patch=(2, 4, 4)), "patch"),
        (lambda: m.ByLayer(((0, m.XAttention()),)), "first layer"),
    ],
)
def test_bad_settings_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [block(q, k, v) for block in self.blocks]


def test_layers_have_methods_of_their_own() -> None:
    model, inputs = Deep(), qkv()
    narrow, wide = (
        m.SlidingTile((1, 1, 1), tile=(2, 2, 4), grid=GRID),
        m.SlidingTile((1, 3, 3), tile=(2, 2, 4), grid=GRID),
    )
    alone = []
    for method in (narrow, wide):
        with maskaccel.patch(model, [method]), torch.no_grad():
            alone.append(model(*inputs)[0])
    dense = model(*inputs)[0]
    with maskaccel.patch(model, [m.ByLayer(((0, 1, narrow), (2, None, wide)))]) as patch, torch.no_grad():
        got = model(*inputs)
        report = patch.report()
    for out, want in zip(got, (alone[0], dense, alone[1], alone[1]), strict=True):
        assert torch.equal(out, want)
    assert report.activity["ByLayer"]["sparse calls"] == 3
    assert ("ByLayer", "Attention", "layer 1 is in none of the ranges") in report.skipped
    with pytest.raises(ValueError, match="overlaps"):
        m.ByLayer(((0, 3, narrow), (2, 4, wide)))
    with pytest.raises(TypeError, match="must be a method of sparse attention"):
        m.ByLayer(((0, 3, m.FORA()),))


def test_what_does_not_fit_a_call_is_told() -> None:
    model = Model()
    two = m.SlidingTile(window=((3, 3, 3),) * 2, grid=GRID)
    with maskaccel.patch(model, [two]), pytest.raises(ValueError, match="2 heads; the attention has 3"):
        model(*qkv())
    with maskaccel.patch(model, [m.SlidingTile()]) as patch, torch.no_grad():
        assert torch.equal(model(*qkv()), F.scaled_dot_product_attention(*qkv()))
        assert patch.report().activity["SlidingTile"]["dense: the token grid is not known"] == 1
    with pytest.raises(PatchError, match=r"both want|found nothing"):
        maskaccel.patch(model, [m.SlidingTile(grid=GRID), m.LiteAttention()])


def test_calibrated_thresholds(tmp_path) -> None:
    """Within the error asked for, and less is asked for less skipping; a file binds its block."""
    from maskaccel import calibration

    class Two(Deep):
        def forward(self, sharp: tuple, flat: tuple) -> None:
            self.blocks[0](*sharp)
            self.blocks[1](*flat)

    model = Two()
    del model.blocks[2:]
    inputs = qkv(smooth=8, sharp=16.0), qkv(smooth=8, sharp=1.0)
    results = []
    for error in (1e-5, 0.02):
        found = calibration.measure(model, "skip", error=error, rows=16, columns=32)
        with found, torch.no_grad(), found.generation(4) as run:
            for _ in range(4):
                model(*inputs)
                run.step()
        results.append(found.result())
    strict, result = results
    assert [len(row) for row in result["thresholds"]] == [4, 4]
    pairs = list(zip(*(itertools.chain(*r["thresholds"]) for r in results), strict=True))
    assert all(low <= high for low, high in pairs)
    assert any(low < high for low, high in pairs), strict["thresholds"]
    path = tmp_path / "skip.json"
    result.save(path)
    method = m.LiteAttention(thresholds=str(path), block=(16, 32))
    outputs = {}
    for name, one in (("dense", None), ("sparse", method)):
        with maskaccel.patch(model, [one]) if one else maskaccel.patch(model, [m.LiteAttention(-100.0)]) as patch:
            with torch.no_grad(), patch.generation(4) as run:
                for _ in range(4):
                    outputs[name] = model.blocks[0](*inputs[0])
                    run.step()
            report = patch.report().activity["LiteAttention"]
    error = (outputs["sparse"] - outputs["dense"]).abs().mean() / outputs["dense"].abs().mean()
    assert error <= 0.02
    assert report["tiles computed"] < 0.97 * report["tiles in all"]
    with pytest.raises(PatchError, match=r"tiles of \(16, 32\), not \(128, 128\)"):
        maskaccel.patch(model, [m.LiteAttention(thresholds=str(path))])
    with pytest.raises(ValueError, match="error=0"):
        calibration.measure(model, "skip", error=0)


@pytest.mark.parametrize("method", [m.XAttention(stride=8, block=(32, 32), tau=0.6), m.RadialAttention(grid=GRID)])
def test_what_does_not_follow_steps_is_one_graph(method) -> None:
    inputs, model = qkv(smooth=10), Model()
    with maskaccel.patch(model, [method]), torch.no_grad():
        want = model(*inputs)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), want)


STATEFUL = [
    m.LiteAttention(threshold=-3.0, block=(16, 32)),
    m.Rettention(density=1 / 8, dense_steps=1, refresh=5, grid=GRID, block=(16, 32)),
]


@pytest.mark.parametrize("method", STATEFUL, ids=lambda method: method.name)
def test_two_calls_a_step_without_names_share_no_memory(method) -> None:
    """A guidance loop that does not name its branches: nothing of one may show in the other."""
    model, branches = Model(), [qkv(smooth=8, sharp=20.0, seed=seed) for seed in (0, 1)]
    with torch.no_grad(), maskaccel.patch(model, [method]) as patch, patch.generation(4) as steps:
        for _ in range(4):
            for inputs in branches:
                got = model(*inputs)
                torch.testing.assert_close(got, F.scaled_dot_product_attention(*inputs), atol=1e-4, rtol=1e-4)
            steps.step()
        assert any("several times a step" in note for note in patch.report().notes)


class _Each(nn.Module):
    """Attention to one sample after the other (Mochi)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(t.split(1) for t in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])


@pytest.mark.parametrize("method", STATEFUL, ids=lambda method: method.name)
def test_samples_that_attend_one_by_one_have_memories_of_their_own(method) -> None:
    def outputs(attention: nn.Module) -> Tensor:
        model = Model()
        model.blocks[0].attn = attention
        with torch.no_grad(), maskaccel.patch(model, [method]) as patch, patch.generation(3) as steps:
            for _ in range(3):
                got = model(*qkv(smooth=8, sharp=20.0))
                steps.step()
        return got

    torch.testing.assert_close(outputs(_Each()), outputs(Model().blocks[0].attn))


@pytest.mark.parametrize("method", STATEFUL, ids=lambda method: method.name)
def test_a_run_may_leave_inference_mode(method) -> None:
    model, inputs = Model(), qkv(smooth=8)
    leaves = [t.clone().requires_grad_() for t in inputs]
    with maskaccel.patch(model, [method]) as patch, patch.generation(4) as steps:
        with torch.inference_mode():
            model(*inputs)
        steps.step()
        with torch.no_grad():
            expected = model(*inputs)
        steps.step()
        assert expected.isfinite().all()
        model(*leaves).sum().backward()
        steps.step()
        model(*leaves).sum().backward()  # nothing of the earlier step's graph is held


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (m.CLEAR(grid=[12, 16]), r"CLEAR: grid=\[12, 16\] can be changed; give a tuple"),
        (m.LiteAttention(must_keep=[(0, 5)]), "must_keep"),
        (m.CLEAR(grid=(0, 16)), r"grid=\(0, 16\) must be sizes of 1 or more"),
        (m.CLEAR(grid="ab"), "grid='ab'"),
    ],
)  # fmt: skip
def test_settings_that_no_site_can_take_leave_the_model_alone(method, message) -> None:
    model = Model()
    before = dict(model.blocks[0].attn.__dict__)
    with pytest.raises((maskaccel.PatchError, ValueError), match=message):
        maskaccel.patch(model, [method])
    assert model.blocks[0].attn.__dict__ == before


def test_a_sequence_of_which_nothing_is_left() -> None:
    model, method = Model(), m.LiteAttention(must_skip=((0, TOKENS),))
    with maskaccel.patch(model, [method]) as patch, patch.generation(2), pytest.raises(ValueError, match="leaves none"):
        model(*qkv())


@pytest.mark.parametrize(
    "method",
    [m.LiteAttention(-0.5, block=(16, 32)), m.Rettention(density=0.2, grid=(TOKENS,), dense_steps=2, block=(16, 32))],
)
def test_steps_are_not_compiled_anew(method) -> None:
    """Twelve steps of a compiled model: the results of eager, and no graph for each step."""
    model, counter = Model(), CompileCounterWithBackend("aot_eager")

    def outputs(seen: list[int]) -> list[Tensor]:
        with torch.no_grad(), patch.generation(12) as run:
            found = []
            for step in range(12):
                found.append(model(*qkv(smooth=8, sharp=16.0, seed=step)))
                seen.append(counter.frame_count)
                run.step()
        return found

    with maskaccel.patch(model, [method]) as patch:
        want = outputs([])
        model.compile(backend=counter)
        graphs: list[int] = []
        got = outputs(graphs)
    assert all(map(torch.equal, got, want))
    assert len(set(graphs[6:])) == 1, graphs  # every way through has been seen by then
    assert not all(torch.equal(a, b) for a, b in itertools.pairwise(want))
