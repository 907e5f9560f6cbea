"""The public token ops: what they compute, their gradients, and the structure of every scheme of random ids."""

from __future__ import annotations

import _raw_tokens
import pytest
import torch
from _raw_cases import Draw
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from maskaccel import ops
from maskaccel.masks import TokenIndex, TokenOrder
from maskaccel.ops import _registry
from maskaccel.ops.adaln import fallback
from maskaccel.ops.tokens import autograd, draw, philox, reference

F64 = torch.float64
ZERO = torch.zeros(1, dtype=torch.int64)


def _index(batch=2, n=12, keep=5, seed=1, **kwargs):
    return ops.random_keep(batch, n, keep, seed=seed, **kwargs)


# ------------------------------------------------------------------------------------------------------------ Philox
def test_philox_gives_the_published_words():
    """Known answers of Random123 1.14 (kat_vectors, philox4x32 10)."""
    word = 0xFFFFFFFF
    full = torch.full((1,), word)
    assert int(philox.words(0, ZERO, ZERO, ZERO, 0)) == 0x6627E8D5
    assert int(philox.words(word << 32 | word, full, full, full, word)) == 0x408F276D
    counter = [torch.tensor([c]) for c in (0x243F6A88, 0x85A308D3, 0x13198A2E)]
    assert int(philox.words(0x299F31D0 << 32 | 0xA4093822, *counter, 0x03707344)) == 0xD16CFE09


def test_noise_is_finite_at_both_ends():
    ends = philox.gumbel(torch.tensor([0, 2**32 - 1]))
    assert torch.isfinite(ends).all() and ends[0] < -2 and ends[1] > 15


# --------------------------------------------------------------------------------------------------------- random ids
@pytest.mark.parametrize("seed", [0, 5, -1, 2**64 - 1])
def test_uniform_ids_are_sorted_unique_and_match_their_inverse(seed):
    index = ops.random_keep(7, 50, 0.3, seed=seed, step=3, route=2)
    assert index.kept == 15 and index.keep.dtype == torch.int32
    assert (index.keep.diff(dim=1) > 0).all() and index.keep.min() >= 0 and index.keep.max() < 50
    for ids, inverse in zip(index.keep, index.inverse, strict=True):
        assert torch.equal(inverse[ids.long()], torch.arange(15, dtype=torch.int32))
        assert (inverse >= 0).sum() == 15
    assert len({tuple(row.tolist()) for row in index.keep}) == 7


def test_ids_are_those_of_the_smallest_words():
    index = ops.random_keep(2, 20, 6, seed=9, step=4, route=3, sample_offset=10)
    words = philox.words(9, torch.arange(20)[None], torch.tensor([[10], [11]]), torch.tensor([4]), 3)
    assert torch.equal(index.keep.long(), words.argsort(1)[:, :6].sort(1).values)


def test_a_batch_split_over_ranks_draws_what_the_whole_batch_draws():
    whole = ops.random_keep(6, 40, 10, seed=3, step=8)
    parts = [ops.random_keep(2, 40, 10, seed=3, step=8, sample_offset=2 * rank) for rank in range(3)]
    assert torch.equal(whole.keep, torch.cat([p.keep for p in parts]))
    again = ops.random_keep(6, 40, 10, seed=3, step=torch.tensor([8]))
    assert torch.equal(whole.keep, again.keep)
    for other in ({"step": 9}, {"route": 1}, {"seed": 4}):
        assert not torch.equal(whole.keep, ops.random_keep(6, 40, 10, **{"seed": 3, "step": 8, **other}).keep)


def test_every_token_is_kept_as_often_as_any_other():
    kept = torch.zeros(32)
    for step in range(200):
        kept += _index(batch=16, n=32, keep=8, step=step).mask.sum(0)
    expected = 200 * 16 * 8 / 32
    spread = (200 * 16 * 0.25 * 0.75) ** 0.5
    assert (kept - expected).abs().max() < 4.5 * spread  # 32 tokens, one in a million
    assert abs(kept.std().item() / spread - 1) < 0.5


@pytest.mark.parametrize(("keep", "cell", "share"), [(0.25, None, (4, 1)), (0.5, None, (4, 2)), (0.625, None, (16, 10)),
                                                     (0.125, None, (16, 2)), (32, (4, 4), (16, 8))])  # fmt: skip
def test_cells_of_two_dims_keep_as_many_each(keep, cell, share):
    index = ops.random_keep(3, 64, keep, seed=2, scheme="cell", grid=(8, 8), cell=cell)
    side = int(share[0] ** 0.5)
    cells = index.mask.view(3, 8 // side, side, 8 // side, side).sum((2, 4))
    assert (cells == share[1]).all()


def test_cells_of_three_dims_keep_as_many_each():
    index = ops.random_keep(2, 4 * 4 * 6, 0.25, seed=2, scheme="cell", grid=(4, 4, 6))
    assert (index.mask.view(2, 2, 2, 2, 2, 3, 2).sum((2, 4, 6)) == 2).all()


def test_rows_times_columns_is_a_product():
    index = ops.random_keep(4, 60, (0.5, 7), seed=2, scheme="rows_cols", grid=(6, 10))
    assert index.grid == (3, 7)
    mask = index.mask.view(4, 6, 10)
    rows, columns = mask.any(2), mask.any(1)
    assert torch.equal(mask, rows[:, :, None] & columns[:, None]) and (rows.sum(1) == 3).all()
    # Rows and columns are drawn apart from each other.
    assert len({tuple(m.tolist()) for m in rows.int()}) > 1 and len({tuple(m.tolist()) for m in columns.int()}) > 1


def test_equal_rows_form_a_narrower_grid():
    index = ops.random_keep(2, 3 * 4 * 8, 0.75, seed=2, scheme="row_equal", grid=(3, 4, 8))
    assert index.grid == (3, 4, 6)
    assert (index.mask.view(2, 3, 4, 8).sum(-1) == 6).all()
    rows = (index.keep // 8).view(2, 3, 4, 6)
    assert (rows == rows[..., :1]).all()  # a reshape to the grid pairs tokens of one row


def test_one_draw_for_all_frames():
    index = ops.random_keep(2, 3 * 20, 0.5, seed=2, frames=3)
    mask = index.mask.view(2, 3, 20)
    assert (mask == mask[:, :1]).all() and (mask.sum(-1) == 10).all()
    assert (index.keep.diff(dim=1) > 0).all()
    grid = ops.random_keep(2, 3 * 20, 0.5, seed=2, frames=3, scheme="row_equal", grid=(3, 4, 5)).grid
    assert grid == (3, 4, 2)


def test_classes_are_ragged():
    labels = (torch.arange(200) >= 180).long().repeat(2, 1)
    labels[1] = 0
    index = ops.random_keep(2, 200, (0.01, 0.5), seed=2, scheme="classes", labels=labels)
    assert index.counts.tolist() == [2 + 10, 2] and index.kept == 12
    assert (index.keep[1, 2:] == 200).all()
    assert index.mask[0, 180:].sum() == 10
    assert index.cu_seqlens().tolist() == [0, 12, 14]
    smaller = ops.random_keep(2, 200, (0.01, 0.5), seed=2, scheme="classes", labels=labels, capacity=5)
    assert smaller.counts.tolist() == [5, 2] and torch.equal(smaller.keep[0], index.keep[0, :5])


def test_forced_tokens_are_kept_and_the_others_fill_the_rest():
    force = torch.zeros(3, 40, dtype=torch.bool)
    force[0, :4], force[1, 7], force[2, 30:] = True, True, True
    index = ops.random_keep(3, 40, 10, seed=2, force=force)
    assert (index.mask & force).sum(1).tolist() == [4, 1, 10] and (index.mask.sum(1) == 10).all()
    free = ops.random_keep(3, 40, 10, seed=2)
    assert (index.mask & free.mask).sum(1).tolist()[1] >= 9  # the same words decide


def test_shared_ids_serve_any_batch():
    index = ops.random_keep(5, 12, 4, seed=2, shared=True)
    assert index.batch == 1
    assert ops.gather_rows(torch.randn(5, 12, 3), index).shape == (5, 4, 3)


# --------------------------------------------------------------------------------------------------------- the index
def test_index_algebra():
    index = _index()
    assert torch.equal(index.complement().mask, ~index.mask)
    assert index.complement().counts is None
    shifted = index.shift(3, 2)
    assert (shifted.prefix, shifted.suffix, shifted.n, shifted.kept) == (3, 2, 17, 10)
    assert torch.equal(shifted.keep[:, 3:-2] - 3, index.keep)
    assert torch.equal(shifted.inverse, TokenIndex.from_keep(shifted.keep, 17).inverse)
    same = TokenIndex.from_mask(index.mask)
    assert torch.equal(same.keep, index.keep) and torch.equal(same.inverse, index.inverse) and same.counts is None
    assert torch.equal(index.part(slice(1, 2)).keep, index.keep[1:])
    assert torch.equal(TokenIndex.all(4).keep, torch.arange(4, dtype=torch.int32)[None])
    leaves, spec = torch.utils._pytree.tree_flatten(shifted)
    back = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert torch.equal(back.keep, shifted.keep) and (back.prefix, back.suffix) == (3, 2)


def test_a_mask_of_other_counts_is_ragged():
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    index = TokenIndex.from_mask(mask)
    assert index.counts.tolist() == [3, 1] and index.keep.tolist() == [[0, 2, 3], [1, 4, 4]]
    assert TokenIndex.from_mask(mask, capacity=2).keep.tolist() == [[0, 2], [1, 4]]
    assert torch.equal(index.mask, mask)
    assert index.complement().mask.tolist() == (~mask).tolist()
    x = torch.arange(8.0).view(2, 4, 1)
    assert index.gather(x)[:, :, 0].tolist() == [[0, 2, 3], [5, 0, 0]]
    assert index.gather(x.long()).shape == (2, 3, 1)


def test_gather_serves_other_shapes():
    index = _index()
    table = torch.randn(12, 6)
    assert torch.equal(index.gather(table, 0), torch.stack([table[k.long()] for k in index.keep]))
    wide = torch.randn(2, 3, 12, 4)
    assert torch.equal(index.gather(wide, 2)[1, 2], wide[1, 2, index.keep[1].long()])
    freqs = torch.polar(torch.ones(12, 4), torch.randn(12, 4))
    assert torch.equal(index.gather(freqs, 0)[1], freqs[index.keep[1].long()])
    shared = ops.random_keep(2, 12, 5, seed=1, shared=True)
    assert torch.equal(shared.gather(table, 0), table[shared.keep[0].long()])
    assert shared.gather(wide, 2).shape == (2, 3, 5, 4)


# ---------------------------------------------------------------------------------------------------------- gradients
@pytest.fixture
def rules(monkeypatch):
    """The ops with their own derivative rules, over the plain forms: in fp64, which kernels do not take."""
    kernels = {**fallback.KERNELS, **reference.KERNELS}
    monkeypatch.setattr(autograd, "op", lambda namespace, name: kernels[name])

    def rule(name):
        parts = _registry._autograd_parts(_registry.SPECS[name], "plain")

        class Rule(torch.autograd.Function):
            @staticmethod
            def forward(*args):
                return kernels[name](*args)

            setup_context = staticmethod(parts.setup)
            backward = staticmethod(parts.backward_rule)

        return Rule.apply

    return rule


def _leaf(*shape):
    return torch.randn(*shape, dtype=F64, requires_grad=True)


def test_derivative_rules(rules):
    """Against numerical differentiation, fp64."""
    index, check = _index(n=6, keep=3), torch.autograd.gradcheck
    ids, inverse = index.keep, index.inverse
    gather, merge = rules("gather_rows"), rules("scatter_merge")
    full, rows, token = _leaf(2, 6, 3), _leaf(2, 3, 3), _leaf(3)
    assert check(lambda x: gather(x, ids, inverse), (full,))
    assert check(lambda f, r: merge(f, r, ids, inverse, None, None, None, 0.0, 0), (full, rows))
    assert check(lambda f, r: merge(f, r, ids, inverse, None, None, None, 0.3, 3), (full, rows))
    for gate in (_leaf(1, 1, 3), _leaf(2, 3, 3), _leaf(1, 3, 3)):
        assert check(lambda f, r, g: merge(f, r, ids, inverse, g, None, None, 0.0, 1), (full, rows, gate))
    for pos in (_leaf(1, 6, 3), _leaf(2, 6, 3)):
        assert check(lambda r, m, p: merge(None, r, ids, inverse, None, m, p, 0.0, 2), (rows, token, pos))
        assert check(lambda r, p: merge(None, r, ids, inverse, None, None, p, 0.0, 4), (rows, pos))
    modulate, options = rules("gather_modulate"), (1e-6, 1.0, 0)
    for scale, shift in ((_leaf(1, 6, 3), _leaf(2, 1, 3)), (_leaf(2, 1, 3), _leaf(2, 6, 3))):
        assert check(lambda x, s, b, w: modulate(x, ids, inverse, s, b, w, None, *options), (full, scale, shift, token))
    slots = ops.match_tokens(torch.randn(2, 6, 4), 0.5, grid=(2, 3), cell=(2, 1))
    order, offsets, slot = slots.order, slots.offsets, slots.slot
    for mean in (True, False):
        assert check(lambda x, mean=mean: rules("segment_rows")(x, order, offsets, slot, mean), (full,))
    assert check(lambda y: rules("unmerge_rows")(y, slot, order, offsets), (rows,))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_gradients_of_gather_modulate_are_those_of_its_parts(per_token, ragged):
    index = TokenIndex.from_mask(torch.rand(2, 9) < 0.6) if ragged else _index(n=9, keep=4)
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16)
    rows_of = 9 if per_token else 1
    operands = [x, torch.randn(1, rows_of, 16), torch.randn(2, rows_of, 16), torch.randn(16), torch.randn(16)]
    weights = torch.randn(2, index.kept, 16), torch.randn(2, index.kept, 16)

    def run(backend):
        leaves = [t.clone().requires_grad_() for t in operands]
        a, s, b, w, bias = leaves
        rows, y = ops.gather_modulate(a, index, s, b, weight=w, bias=bias, backend=backend)
        (rows * weights[0] + y * weights[1]).sum().backward()
        return [rows, y, *(leaf.grad for leaf in leaves)]

    for got, want in zip(run(None), run("reference"), strict=True):
        assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_fuse_is_the_concatenated_projection():
    """SPRINT's `W [g_pad ; f] + b`, with path drop, and all its gradients."""
    index = _index(batch=3, n=10, keep=4)
    torch.manual_seed(0)
    sizes = {"f": (3, 10, 6), "g": (3, 4, 6), "weight": (8, 12), "bias": (8,), "token": (1, 1, 6)}
    made = {name: torch.randn(*size, dtype=F64) for name, size in sizes.items()}
    keep = torch.tensor([True, False, True])
    weights = torch.randn(3, 10, 8, dtype=F64)

    def run(fused):
        leaf = {name: t.clone().requires_grad_() for name, t in made.items()}
        if fused:
            out = ops.sparse_dense_fuse(leaf["f"], leaf["g"], index, leaf["weight"], leaf["bias"], leaf["token"], keep)
        else:
            at = index.keep.long().unsqueeze(-1).expand(-1, -1, 6)
            padded = leaf["token"].expand(3, 10, 6).scatter(1, at, leaf["g"])
            padded = torch.where(keep[:, None, None], padded, leaf["token"])
            out = torch.nn.functional.linear(torch.cat([padded, leaf["f"]], -1), leaf["weight"], leaf["bias"])
        (out * weights).sum().backward()
        return [out, *(t.grad for t in leaf.values())]

    for got, want in zip(run(True), run(False), strict=True):
        assert_close(got, want)


def test_two_gathers_in_one_graph_add_up():
    x = torch.randn(2, 12, 4, requires_grad=True)
    first, second = _index(seed=1), _index(seed=2)
    (ops.gather_rows(x, first).sum() + 2 * ops.gather_rows(x, second).sum()).backward()
    assert torch.equal(x.grad[..., 0], first.mask.float() + 2 * second.mask.float())


# ---------------------------------------------------------------------------------------------------------- selection
def test_active_tokens_are_the_best_by_score_and_age():
    score = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.5]])
    index, age = ops.select_active(score, None, 2)
    assert index.keep.tolist() == [[0, 1]] and age.tolist() == [[0, 0, 1, 1, 1]]
    old = torch.tensor([[0, 0, 0, 0, 30]], dtype=torch.int32)  # 0.5 e^3 is above 4
    index, age = ops.select_active(score, old, 2)
    assert index.keep.tolist() == [[0, 4]] and age[0, 4] == 0
    assert ops.select_active(score, old, 2, beta=0.0)[0].keep.tolist() == [[0, 1]]


def test_some_of_the_dropped_are_the_highest():
    score = torch.arange(10.0)[None]
    assert ops.select_active(score, None, 4, high_fraction=0.5)[0].keep.tolist() == [[3, 4, 5, 6]]
    assert ops.select_active(score, None, 4, high_fraction=1.0)[0].keep.tolist() == [[0, 1, 2, 3]]
    force = torch.zeros(10, dtype=torch.bool)
    force[9] = True
    assert ops.select_active(score, None, 4, high_fraction=0.5, force=force)[0].keep.tolist() == [[3, 4, 5, 9]]


def test_a_threshold_is_ragged_up_to_its_capacity():
    score = torch.tensor([[0.1, 0.9, 0.8, 0.7], [0.1, 0.2, 0.3, 0.4], [torch.nan] * 4])
    index, age = ops.select_active(score, None, 2, threshold=0.35)
    assert index.counts.tolist() == [2, 1, 0]
    assert index.keep.tolist() == [[1, 2], [3, 4], [4, 4]]
    assert age.tolist() == [[1, 0, 0, 1], [1, 1, 1, 0], [1] * 4]


# ------------------------------------------------------------------------------------------------------------ merging
def test_matching_merges_the_most_similar_into_one_of_their_cell():
    torch.manual_seed(0)
    base = torch.randn(4, 8)
    metric = base[[0, 0, 1, 1, 0, 2, 3, 3]][None] + 1e-3 * torch.randn(1, 8, 8)
    merge = ops.match_tokens(metric, 0.25, grid=(2, 4), seed=0)
    assert merge.merged == 6 and merge.offsets[0, -1] == 8
    sizes = merge.offsets.diff(dim=1)[0]
    assert sizes.sum() == 8 and (sizes >= 1).all()
    for slot in range(6):
        members = merge.order[0, merge.offsets[0, slot] : merge.offsets[0, slot + 1]].long()
        assert (merge.slot[0, members] == slot).all() and (members.diff() > 0).all()
        together = torch.nn.functional.cosine_similarity(metric[0, members[:1]], metric[0, members])
        assert (together > 0.99).all()
    x = torch.randn(1, 8, 3)
    spread = ops.unmerge_tokens(ops.merge_tokens(x, merge), merge)
    for slot in range(6):
        members = (merge.slot[0] == slot).nonzero()[:, 0]
        assert_close(spread[0, members], x[0, members].mean(0).expand(len(members), 3))


def test_no_merging_leaves_everything():
    x = torch.randn(2, 16, 4)
    merge = ops.match_tokens(x, 0.0, grid=(4, 4))
    assert torch.equal(ops.unmerge_tokens(ops.merge_tokens(x, merge), merge), x)
    assert ops.match_tokens(x, 0.75, grid=(4, 4)).merged == 4


# --------------------------------------------------------------------------------------------------------------- ops
@pytest.mark.parametrize("op", _raw_tokens.DRAWS)
def test_opcheck(op):
    kinds = ("test_schema", "test_faketensor", "test_autograd_registration")
    for seed in range(6):
        args = _raw_tokens.DRAWS[op](Draw(seed, torch.float32))
        torch.library.opcheck(getattr(torch.ops.maskaccel, op).default, args, test_utils=kinds)


@pytest.mark.parametrize("op", _raw_tokens.DRAWS)
def test_fakes_tell_shape_dtype_and_strides(op):
    call = getattr(torch.ops.maskaccel, op).default
    for seed in range(6):
        args = _raw_tokens.DRAWS[op](Draw(seed, torch.float32))
        with torch.no_grad():
            real = call(*args)
            with FakeTensorMode() as mode:
                fake = call(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args))
        for r, f in zip(*((v if isinstance(v, tuple) else (v,)) for v in (real, fake)), strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


@pytest.mark.parametrize("op", [n for n in _raw_tokens.DRAWS if _registry.SPECS[n].backward is None])
def test_ops_without_a_derivative_refuse_gradients(op):
    """A caller of `torch.ops` must not get zeros in silence."""
    args = tuple(
        t.detach().clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in _raw_tokens.DRAWS[op](Draw(3, torch.float32))
    )
    leaves = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]
    fake = _registry.SPECS[op].fake(*args)
    if not any(t.is_floating_point() for t in (fake if isinstance(fake, tuple) else (fake,))):
        out = getattr(torch.ops.maskaccel, op)(*args)  # integers have no gradient to lose
        assert not any(t.requires_grad for t in (out if isinstance(out, tuple) else (out,)))
        return
    with pytest.raises((RuntimeError, NotImplementedError), match="has no derivative"):
        out = getattr(torch.ops.maskaccel, op)(*args)
        real = [t for t in (out if isinstance(out, tuple) else (out,)) if t.is_floating_point()]
        torch.autograd.grad(real[0].sum(), leaves)


def test_every_op_has_a_reference_and_a_draw():
    names = {name for name in _registry.SPECS if name in reference.KERNELS}
    assert names == set(reference.KERNELS) == set(_raw_tokens.DRAWS)


def test_cells_compile_without_a_break():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x, step):
        index = ops.random_keep(2, 24, 6, seed=1, step=step, scheme="cell", grid=(4, 6))
        match = ops.match_tokens(x, 0.5, grid=(4, 6))
        return index.keep, ops.unmerge_tokens(ops.merge_tokens(x, match), match)

    x, step = torch.randn(2, 24, 8), torch.tensor([3])
    for got, want in zip(both(x, step), both._torchdynamo_orig_callable(x, step), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("grid", "cell"), [((4, 6), (2, 3)), ((4, 4, 2), (2, 2, 2)), ((6,), (2,)), ((3, 4), (1, 2))])
def test_tokens_cell_by_cell(grid, cell):
    order = draw._cell_order(grid, cell, torch.device("cpu"))
    assert torch.equal(order.long(), TokenOrder(grid, cell).permutation)


def test_a_routed_step_compiles_without_a_break():
    step = torch.zeros(1, dtype=torch.int64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, scale, step):
        index = ops.random_keep(2, 12, 4, seed=1, step=step)
        rows, y = ops.gather_modulate(x, index, scale, None)
        return ops.scatter_merge(x, rows + y, index)

    for i in range(3):
        x = torch.randn(2, 12, 8, requires_grad=True)
        out = run(x, torch.ones(2, 8), step.fill_(i))
        index = ops.random_keep(2, 12, 4, seed=1, step=i)
        assert torch.equal((out != x).any(-1), index.mask)
        out.sum().backward()
        assert x.grad is not None
