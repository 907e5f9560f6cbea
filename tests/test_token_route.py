"""Routes: what runs, what comes back, and what it depends on; on diffusers' DiT, Flux and Wan."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import queue
import socket
import warnings

import _route_ranks
import pytest
import torch
from _masked_dense import SpanOf, different
from _routed_dit import built, close, gradients
from torch import nn
from zoo.all_models import MODELS
from zoo.common import run, run_with_gradients

import maskaccel
from maskaccel.masks import TokenIndex
from maskaccel.patching.route import MaskToken, TokenRoute
from maskaccel.patching.span import attach_span, current_span, spans_of


@pytest.fixture
def dit():
    """A DiT in training mode, and the arguments of a call."""
    return built()


# ------------------------------------------------------------------------------------------------- what a route does


def test_all_tokens_kept_is_the_model(dit) -> None:
    model, inputs = dit
    want = gradients(model, inputs)
    for route in (TokenRoute(1, -2, 1.0), TokenRoute(1, -2, 16), SpanOf(1, -2, lambda b, n, d: TokenIndex.all(n))):
        with maskaccel.patch(model, [route]):
            close(gradients(model, inputs), want)


def test_undo_is_exact(dit) -> None:
    model, inputs = dit
    keys, before = set(model.__dict__), {id(m): dict(m.__dict__) for m in model.modules()}
    names = list(model.state_dict())
    want = gradients(model, inputs)
    patch = maskaccel.patch(model, [TokenRoute(1, -2)])
    assert list(model.state_dict()) == names
    routed = gradients(model, inputs)
    assert not torch.allclose(routed[0], want[0])
    patch.remove()
    assert set(model.__dict__) == keys
    assert all(set(m.__dict__) == set(before[id(m)]) for m in model.modules())
    assert all(map(torch.equal, gradients(model, inputs), want))


def test_a_route_in_eval_mode_is_dense_and_says_so(dit) -> None:
    model, inputs = dit
    model.eval()
    want = run(model, inputs)
    with maskaccel.patch(model, [TokenRoute(1, -2)]) as patch:
        assert torch.equal(run(model, inputs)[0], want[0])
        report = str(patch.report())
        assert "dense because the model is in eval mode" in report
        assert "dense calls 1" in report
    with maskaccel.patch(model, [TokenRoute(1, -2, when="always")]) as patch:
        assert not torch.equal(run(model, inputs)[0], want[0])
        assert "tokens 8 of 16" in str(patch.report())


def test_dropped_rows_pass_their_gradient_on_unchanged(dit) -> None:
    model, _ = dit
    index = different(2, 16)
    hidden = torch.randn(2, 16, 32, requires_grad=True)
    route = TokenRoute(0, 1, select=lambda call: index)
    rows, frame = route.enter(hidden)
    for block in model.transformer_blocks[:2]:
        rows = block(rows, timestep=torch.tensor([1, 2]), class_labels=torch.tensor([1, 2]))
    upstream = torch.randn(2, 16, 32)
    (route.exit(rows, frame) * upstream).sum().backward()
    dropped = ~index.mask
    assert torch.equal(hidden.grad[dropped], upstream[dropped])
    assert not torch.equal(hidden.grad[~dropped], upstream[~dropped])


def test_exit_after_enter_is_the_identity() -> None:
    x, table, modulation = torch.randn(3, 20, 8), torch.randn(20, 4), torch.randn(3, 20, 2, 4)
    route = TokenRoute(0, 0, 0.3, seed=5)
    rows, frame = route.enter(x, per_token=[(table, table[None]), modulation, None])
    assert rows.shape == (3, 6, 8)
    assert torch.equal(route.exit(rows, frame), x)
    index = route.index
    assert index is not None
    assert frame.index is index
    (cut, also), per_sample, none = frame.per_token
    assert none is None
    for b in range(3):
        keep = index.keep[b].long()
        assert torch.equal(cut[b], table[keep])
        assert torch.equal(also[b], table[keep])
        assert torch.equal(per_sample[b], modulation[b, keep])
    rows, frame = route.enter(x, per_token=[table], enabled=False)
    assert rows is x
    assert route.exit(rows, frame) is x
    with pytest.raises(ValueError, match=r"per_token holds a tensor of shape \(19, 4\)"):
        route.enter(x, per_token=[table[1:]])


@pytest.mark.parametrize("reenter", ["mask_token", "zero", "function", "module"])
def test_what_comes_back_in_place_of_dropped_tokens(dit, reenter) -> None:
    model, inputs = dit
    index = different(3, 16)

    def doubled(call, rows):
        return 2 * call.restored(rows)

    given = {"function": doubled, "module": MaskToken(32)}.get(reenter, reenter)
    route = TokenRoute(1, -2, select=lambda call: index, reenter=given)
    seen = {}

    def note(module, args, kwargs):
        seen["x"] = args[0] if args else kwargs["hidden_states"]

    with maskaccel.patch(model, [route]):
        handle = model.transformer_blocks[-1].register_forward_pre_hook(note, with_kwargs=True)
        model(**inputs).sample.sum().backward()
        handle.remove()
    dropped = seen["x"][~index.mask]
    if reenter in ("mask_token", "module"):
        (token,) = route.parameters()
        assert torch.equal(dropped, token.expand_as(dropped))
        assert token.grad.abs().sum() > 0
        assert "reenter_with.token" in route.state_dict()
    else:
        assert not list(route.parameters())
        assert (dropped == 0).all() == (reenter == "zero")


@pytest.mark.parametrize(("first", "second"), [((0, 1), (3, 4)), ((0, 5), (2, 3)), ((2, 3), (0, 5)), ((1, 4), (1, 4))])
def test_routes_that_follow_each_other_or_are_nested(dit, first, second) -> None:
    """Against the same written out with enter and exit."""
    model, inputs = dit
    routes = [TokenRoute(*span, 0.5, seed=i, route=i) for i, span in enumerate((first, second))]
    with maskaccel.patch(model, routes):
        got = gradients(model, inputs)
        assert len(spans_of(model)) == 2
        current = current_span(model)
        assert current is not None
        assert current.hidden is None

    routes = [TokenRoute(*span, 0.5, seed=i, route=i) for i, span in enumerate((first, second))]
    order = sorted(range(2), key=lambda i: (routes[i].start - routes[i].end, i))

    def by_hand(self, hidden, timestep=None, class_labels=None):
        frames = {}
        for number, block in enumerate(self):
            for i in order:
                if routes[i].start == number:
                    hidden, frames[i] = routes[i].enter(hidden)
            hidden = block(hidden, timestep=timestep, class_labels=class_labels)
            for i in reversed(order):
                if routes[i].end == number:
                    hidden = routes[i].exit(hidden, frames[i])
        return hidden

    class Blocks(nn.ModuleList):
        pass

    Blocks.forward = by_hand
    wrapper = Blocks(model.transformer_blocks)

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = wrapper

        def forward(self, hidden, *args, timestep=None, class_labels=None, **kwargs):
            return self.blocks(hidden, timestep, class_labels)

    blocks = model.transformer_blocks
    one = One()
    model.transformer_blocks = nn.ModuleList([one])
    try:
        # the output head reads the norm of the first block
        one.norm1 = blocks[0].norm1
        want = gradients(model, inputs)
    finally:
        model.transformer_blocks = blocks
    torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[1], want[1], atol=1e-5, rtol=1e-4)


def test_a_copy_of_a_routed_model_routes_by_itself(dit) -> None:
    model, inputs = dit
    route = TokenRoute(1, -2, seed=1)
    with maskaccel.patch(model, [route]), torch.no_grad():
        copied = copy.deepcopy(model)
        mine, theirs = model(**inputs).sample, copied(**inputs).sample
        assert torch.equal(mine, theirs)
        assert int(route.step) == 1
    assert current_span(copied) is not current_span(model)


# ---------------------------------------------------------------------------------------------- which tokens they are


def test_ids_depend_on_seed_step_route_and_sample_alone(dit) -> None:
    model, inputs = dit

    def keeps(route, batch=3, calls=1):
        found = []
        with maskaccel.patch(model, [route]), torch.no_grad():
            for _ in range(calls):
                model(**{name: value[:batch] for name, value in inputs.items()})
                found.append(route.index.keep)
        return found

    first, second = keeps(TokenRoute(1, 2, seed=1), calls=2)
    assert first.shape == (3, 8)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, keeps(TokenRoute(1, 2, seed=2))[0])
    assert not torch.equal(first, keeps(TokenRoute(1, 2, seed=1, route=1))[0])
    assert torch.equal(first[:2], keeps(TokenRoute(1, 2, seed=1), batch=2)[0])
    assert torch.equal(first[1:], keeps(TokenRoute(1, 2, seed=1, sample_offset=1), batch=2)[0])

    resumed = TokenRoute(1, 2, seed=1)
    resumed.load_state_dict({"steps": torch.tensor([1])})
    assert torch.equal(keeps(resumed)[0], second)
    assert int(resumed.step) == 2
    for step in (1, torch.tensor([1])):
        resumed.step = step
        assert torch.equal(keeps(resumed)[0], second)
    resumed.step.fill_(0)
    assert torch.equal(keeps(resumed)[0], first)


def test_ranks_draw_what_one_process_draws() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    mine, theirs = queue.SimpleQueue(), context.SimpleQueue()
    other = context.Process(target=_route_ranks.rank, args=(1, 2, port, 2, theirs))
    other.start()
    _route_ranks.rank(0, 2, port, 2, mine)
    first, second = mine.get(), theirs.get()
    other.join(30)
    assert [one + two for one, two in zip(first, second, strict=True)] == _route_ranks.drawn(4)


def test_numbers_of_a_range_are_few_multiples_of_the_bucket() -> None:
    route, seen = TokenRoute(0, 0, (0.5, 0.7), seed=2, bucket=32), set()
    for _ in range(30):
        rows, _ = route.enter(torch.zeros(1, 256, 1))
        seen.add(rows.shape[1])
    assert seen == {128, 160}
    # No multiple of 64 lies in the range: a smaller one is taken, so that tokens are dropped all the same.
    few, seen = TokenRoute(0, 0, (0.5, 0.7), seed=2), set()
    for _ in range(30):
        seen.add(few.enter(torch.zeros(1, 16, 1))[0].shape[1])
    assert seen == {8}
    with pytest.warns(UserWarning, match="9 different numbers of tokens"):
        many = TokenRoute(0, 0, (0.1, 0.9), bucket=1)
        for _ in range(40):
            many.enter(torch.zeros(1, 64, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        many.enter(torch.zeros(1, 64, 1))


def test_schemes_and_forced_tokens() -> None:
    x = torch.zeros(2, 64, 1)
    route = TokenRoute(0, 0, 0.25, select="cell", options={"cell": (2, 2)})
    route.enter(x, grid=(8, 8))
    index = route.index
    assert index is not None
    cells = index.mask.view(2, 4, 2, 4, 2).sum((2, 4))
    assert (cells == 1).all()

    route = TokenRoute(0, 0, 0.5, select="row_equal")
    route.enter(x, grid=(8, 8))
    assert route.index is not None
    assert route.index.grid == (8, 4)

    route = TokenRoute(0, 0, (0.5, 0.25), select="rows_cols")
    route.enter(x, grid=(8, 8))
    assert route.index is not None
    assert route.index.grid == (4, 2)

    route = TokenRoute(0, 0, 0.5, frames="shared")
    route.enter(x, grid=(4, 4, 4))
    assert route.index is not None
    frames = route.index.mask.view(2, 4, 16)
    assert (frames == frames[:, :1]).all()

    route = TokenRoute(0, 0, 0.5, shared=True)
    route.enter(x)
    assert route.index is not None
    assert route.index.batch == 1

    labels = torch.arange(64) % 2
    route = TokenRoute(0, 0, (0.25, 0.75), select="classes", options={"labels": labels})
    route.enter(x)
    assert route.index is not None
    assert route.index.mask[:, labels == 0].sum(1).tolist() == [8, 8]
    assert route.index.mask[:, labels == 1].sum(1).tolist() == [24, 24]

    forced = torch.zeros(64, dtype=torch.bool)
    forced[5:9] = True
    for given in (forced, forced.expand(2, -1), lambda call: forced):
        route = TokenRoute(0, 0, 16, forced=given)
        route.enter(x)
        assert route.index is not None
        assert route.index.mask[:, 5:9].all()


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 3, "end": 2}, "end=2 is before start=3"),
        ({"start": -2, "end": -3}, "end=-3 is before start=-2"),
        ({"start": 1.0}, "start=1.0 must be the number of a block"),
        ({"keep": 0}, "keep=0"),
        ({"keep": -3}, "keep=-3"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": (0.7, 0.5)}, r"keep=\(0.7, 0.5\)"),
        ({"keep": True}, "keep=True"),
        ({"select": "importance"}, "select='importance'"),
        ({"select": "classes"}, "needs options"),
        ({"reenter": "mean"}, "reenter='mean'"),
        ({"when": "never"}, "when='never'"),
        ({"frames": "all"}, "frames='all'"),
        ({"bucket": 0}, "bucket=0"),
        ({"seed": 0.5}, "seed=0.5 must be an integer of 64 bits"),
        ({"sample_offset": -3}, "sample_offset=-3; allowed are None and integers of 0 or more"),
        ({"options": {"cel": (2, 2)}}, "options has 'cel'; allowed are cell, labels, backend"),
        ({"route": -1}, "route=-1"),
        ({"forced": torch.ones(16)}, "forced is torch.float32"),
        ({"forced": torch.ones(16, dtype=torch.bool), "keep": 4}, "forced has 16 tokens in a sample, but 4 are kept"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        TokenRoute(**{"start": 1, "end": 2, **arguments})


@pytest.mark.parametrize(
    ("routes", "error", "message"),
    [
        ([(4, -4)], ValueError, "end=-4 is block 2 of 6, before start=4"),
        ([(0, 6)], ValueError, "end=6; the model has 6 blocks: allowed are -6 to 5"),
        ([(0, 3), (2, 5)], maskaccel.PatchError, "blocks 2 to 5 overlap blocks 0 to 3 of TokenRoute"),
        ([(0, 2), (1, 3)], maskaccel.PatchError, "overlap"),
    ],
)
def test_routes_that_a_model_cannot_have(dit, routes, error, message) -> None:
    model, inputs = dit
    before = {id(m): set(m.__dict__) for m in model.modules()}
    with pytest.raises(error, match=message):
        maskaccel.patch(model, [TokenRoute(*span) for span in routes])
    assert all(set(m.__dict__) == before[id(m)] for m in model.modules())
    model(**inputs)


def test_calls_that_cannot_be_routed(dit) -> None:
    model, inputs = dit
    cases = [
        (TokenRoute(1, 2, 17), "keep=17, but there are 16 latent tokens"),
        (TokenRoute(1, 2, 4, forced=torch.ones(9, dtype=torch.bool)[:3]), "forced is of 3 tokens; the route has 16"),
        (TokenRoute(1, 2, 0.25, forced=torch.arange(16) < 9), "forced has 9 tokens in a sample, but 4 are kept"),
        (TokenRoute(1, 2, select=lambda call: TokenIndex.all(15)), "of 15 tokens and a batch of 1; the span has 16"),
        (TokenRoute(1, 2, reenter=lambda call, rows: rows), r"reenter returned shape \(3, 8, 32\)"),
        (TokenRoute(1, 2, frames="shared"), "frames='shared' needs a grid"),
    ]
    for route, message in cases:
        with maskaccel.patch(model, [route]), pytest.raises(ValueError, match=message):
            model(**inputs)
    ragged = torch.zeros(3, 16, dtype=torch.bool)
    ragged[0, :4] = ragged[1, :5] = ragged[2, :6] = True
    span = SpanOf(1, 2, lambda b, n, d: TokenIndex.from_mask(ragged))
    with maskaccel.patch(model, [span]), pytest.raises(ValueError, match="ragged"):
        model(**inputs)
    want = gradients(model, inputs)
    with maskaccel.patch(model, [TokenRoute(1, 2, 1.0)]):  # an error in one call leaves nothing behind for the next
        close(gradients(model, inputs), want)


def test_a_tread_configuration() -> None:
    config = {"routes": [{"selection_ratio": 0.25, "start_layer_idx": 2, "end_layer_idx": -2}]}
    (route,) = TokenRoute.from_tread_config(config, seed=4)
    assert (route.start, route.end, route.keep, route.seed) == (2, -2, 0.75, 4)
    two = [
        {"selection_ratio": 0.5, "start_layer_idx": 0, "end_layer_idx": 1},
        {"selection_ratio": 0.0, "start_layer_idx": -3, "end_layer_idx": -1},
    ]
    assert [r.keep for r in TokenRoute.from_tread_config({"routes": two})] == [0.5, 1.0]
    for bad, message in [
        ({}, "has no routes"),
        ({"routes": [{"selection_ratio": 0.5}]}, "must have the keys"),
        ({"routes": [{**config["routes"][0], "selection_ratio": 1.0}]}, "selection_ratio=1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            TokenRoute.from_tread_config(bad)


def test_names_of_what_cannot_be_followed() -> None:
    """Arguments whose tokens cannot be told are named before anything runs."""
    model, inputs = MODELS["FluxTransformer2DModel"]()

    class Odd(SpanOf):
        def attach(self, context):
            attach_span(context, self.name, 0, -1, self)
            block = context.model.transformer_blocks[0]
            context.transaction.wrap_forward(block, self.given, outermost=True)

        def given(self, block, inner, *args, **kwargs):
            return inner(*args, **{**kwargs, "joint_attention_kwargs": {"odd": self.value}})

    for value, message in [
        (torch.zeros(15, 15, 3), r"joint_attention_kwargs.odd of shape \(15, 15, 3\) has 2 dims"),
        (object(), "joint_attention_kwargs.odd is a object"),
    ]:
        odd = Odd()
        odd.value = value
        with maskaccel.patch(model, [odd]), pytest.raises(ValueError, match=message):
            run(model, inputs)


def test_tokens_in_the_order_of_patches_are_refused() -> None:
    from maskaccel import methods as m

    model, inputs = MODELS["FluxTransformer2DModel"]()
    windows = m.CLEAR(radius=1.5, patch=(2, 2), block=(16, 32))
    for methods in ([windows, SpanOf(0, -1)], [SpanOf(0, -1), windows]):
        with maskaccel.patch(model, methods), pytest.raises(ValueError, match="in the order of patches"):
            run(model, inputs)


def test_the_report_counts_each_model_by_itself(dit) -> None:
    model, inputs = dit
    other = copy.deepcopy(model)

    class Pair:
        def __init__(self):
            self.components = {"transformer": model, "transformer_2": other}

    route = TokenRoute(1, -2)
    with maskaccel.patch(Pair(), [route]) as patch, torch.no_grad():
        model(**inputs)
        model(**inputs)
        other.eval()(**inputs)
        activity = patch.report().activity[route.name]
    assert (activity["routed calls"], activity["dense calls"]) == (2, 1)
    assert activity["tokens"] == "8 of 16"


def test_with_other_methods() -> None:
    """FusedAdaLN and a cache beside a route."""
    from maskaccel import methods as m

    for name in ("DiTTransformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel"):
        model, inputs = MODELS[name]()
        with maskaccel.patch(model, [SpanOf(0, -1)]):
            want, wanted = run_with_gradients(model, inputs)
        with maskaccel.patch(model, [m.FusedAdaLN(), SpanOf(0, -1)]):
            got, found = run_with_gradients(model, inputs)
        close(got, want)
        assert set(found) == set(wanted)
        for key in found:
            torch.testing.assert_close(found[key], wanted[key], atol=2e-4, rtol=2e-3)


def test_what_enter_cannot_take_is_refused_before_anything_is_drawn() -> None:
    x = torch.zeros(2, 16, 8)
    route = TokenRoute(0, 0)
    for bad, given, message in (
        (x[0], (), r"x is torch.float32 \(16, 8\); it must be floating \(B, N, D\)"),
        (x[..., None], (), r"\(2, 16, 8, 1\)"),
        (x.long(), (), "x is torch.int64"),
        (x, (3,), "per_token holds a int"),
        (x, ((x, x[:, :4]),), r"per_token holds a tensor of shape \(2, 4, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            route.enter(bad, given)
    assert int(route.step) == 0
    # A token that is made after the optimizer would never be trained, and differ between ranks.
    with pytest.raises(ValueError, match=r"reenter=maskaccel.patching.MaskToken\(8\)"):
        TokenRoute(0, 0, reenter="mask_token").enter(x)
    with pytest.raises(ValueError, match="select='cell' needs the grid of the tokens"):
        TokenRoute(0, 0, 0.25, select="cell").enter(x)


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_a_step_is_a_whole_number(value) -> None:
    with pytest.raises(ValueError, match=f"step={value}; it must be an integer of 0 or more"):
        TokenRoute(0, 0).step = value


def test_a_mask_token_of_another_width_is_refused(dit) -> None:
    model, _ = dit
    before = {id(m): dict(m.__dict__) for m in model.modules()}
    with pytest.raises(maskaccel.PatchError, match="its mask token is 64 wide; the stream of DiTTransformer2DModel is"):
        maskaccel.patch(model, [TokenRoute(1, 2, reenter=MaskToken(64))])
    assert {id(m): dict(m.__dict__) for m in model.modules()} == before


def test_a_patched_model_cannot_be_pickled(dit) -> None:
    with (
        maskaccel.patch(dit[0], [TokenRoute(1, 2)]),
        pytest.raises(maskaccel.PatchError, match="a patched model cannot be pickled"),
    ):
        pickle.dumps(dit[0])


def test_what_wraps_a_model_is_refused_with_what_to_patch(dit) -> None:
    class Wrapped(nn.parallel.DataParallel):  # as DistributedDataParallel, which needs a process group
        pass

    with pytest.raises(maskaccel.PatchError, match="Wrapped wraps a DiTTransformer2DModel: patch that one, before it"):
        maskaccel.patch(Wrapped(dit[0]), [TokenRoute(1, 2)])
