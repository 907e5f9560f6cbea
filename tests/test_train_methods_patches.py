"""Training methods as patches of diffusers' DiT: against the same blocks called by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from _plain_dit import blocks, head
from torch.utils.checkpoint import checkpoint
from zoo.all_models import MODELS
from zoo.common import made

import maskaccel
from maskaccel import methods as m
from maskaccel.methods._transformer import sincos
from maskaccel.methods.tread import route_guidance

DEPTH, N, DIM = 7, 16, 32


@pytest.fixture
def dit(monkeypatch):
    """Seven blocks of DiT on 4 x 4 tokens, in training mode, and the arguments of a call."""
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import LabelEmbedding

    # DiT drops labels at random in training mode, which no two calls would do alike.
    monkeypatch.setattr(LabelEmbedding, "token_drop", lambda self, labels, force_drop_ids=None: labels)
    model = made(DiTTransformer2DModel, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
                 num_layers=DEPTH, sample_size=8, patch_size=2, num_embeds_ada_norm=10, dropout=0.0)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    given = {"timestep": torch.tensor([10, 500, 900]), "class_labels": torch.tensor([1, 2, 3])}
    return model.train(), {"hidden_states": torch.randn(3, 4, 8, 8, generator=generator)} | given


def call(model, given):
    return model(**given).sample


def parts(model, given):
    """Embedded tokens, and functions that run some blocks and the head."""
    t, y = given["timestep"], given["class_labels"]
    hidden = model.pos_embed(given["hidden_states"])
    return hidden, lambda h, which: blocks(model, h, t, y, which), lambda h: head(model, h, t, y)


def counted(model):
    """Samples and tokens that every block sees, in order."""
    seen = []
    for block in model.transformer_blocks:
        # the MLP runs once in a block, whatever stands around the block
        block.ff.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    return seen


def weighted(out):
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum()


def gradients(out, *modules):
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return torch.autograd.grad(weighted(out), parameters, allow_unused=True)


def close(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None or a.abs().max() == 0) if b is None else True
        if b is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------ TREAD
def test_tread_is_the_paper(dit):
    model, given = dit
    route = m.TREAD(end=-3, ratio=0.7)
    with maskaccel.patch(model, [route]):
        seen = counted(model)
        out = call(model, given)
        index, mine = route.index, gradients(out, model)
    assert index.kept == N - int(N * 0.7) == 5 and seen == [(3, N)] * 2 + [(3, 5)] * 3 + [(3, N)] * 2
    hidden, run, end = parts(model, given)
    x = run(hidden, slice(0, 2))
    keep = index.keep.long()[..., None].expand(-1, -1, DIM)
    x = x.scatter(1, keep, run(x.gather(1, keep), slice(2, 5)))
    want = end(run(x, slice(5, None)))
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    close(mine, gradients(want, model))
    assert (m.TREAD().start, m.TREAD().end, m.TREAD().keep) == (2, -4, 0.5)


def test_tread_is_of_training_alone(dit):
    model, given = dit
    want = call(model.eval(), given)
    with maskaccel.patch(model, [m.TREAD()]) as patch:
        assert torch.equal(call(model, given), want)
        assert "eval mode" in str(patch.report())
    with maskaccel.patch(model.train(), [m.TREAD(ratio=0.0)]):
        torch.testing.assert_close(call(model, given), want)
    assert torch.equal(call(model, given), want)
    with pytest.raises(ValueError, match="ratio=1"):
        m.TREAD(ratio=1.0)


def test_route_guidance(dit):
    model, given = dit
    route = m.TREAD(seed=4)
    with maskaccel.patch(model.eval(), [route]):
        seen = counted(model)
        guided = route_guidance(route, lambda: call(model, given), 1.8, (0.25, 0.75), step=7)
        assert seen[2] == (3, 12) and seen[DEPTH + 2] == (3, 4)
        assert int(route.step) == 0  # the training goes on as if nothing had been
        with route.routed(0.25, step=7):
            good, index = call(model, given), route.index
        with route.routed(0.75, step=7):
            bad = call(model, given)
        want = maskaccel.ops.random_keep(3, N, 12, seed=4, step=7)
        assert torch.equal(index.keep, want.keep)
        found = []
        for _ in range(2):  # others at every step of a sampling run
            with route.routed(0.5):
                call(model, given)
            found.append(route.index.keep)
        assert not torch.equal(*found)
        torch.testing.assert_close(guided, bad + 1.8 * (good - bad))
        seen.clear()
        call(model, given)
        assert set(seen) == {(3, N)}
    with pytest.raises(ValueError, match="routes is empty"):
        route_guidance([], lambda: guided)
    with pytest.raises(ValueError, match=r"ratio=1\.5"):
        route_guidance(route, lambda: guided, gammas=(1.5, 0.5))


def test_several_routes(dit):
    model, given = dit
    routes = [m.TREAD(0, 1, 0.5), m.TREAD(3, 5, 0.25)]
    with maskaccel.patch(model, routes):
        seen = counted(model)
        call(model, given)
        assert seen == [(3, 8)] * 2 + [(3, N)] + [(3, 12)] * 3 + [(3, N)]
        assert not torch.equal(routes[0].index.mask[:, :8], routes[1].index.mask[:, :8])
        seen.clear()
        route_guidance(routes, lambda: call(model.eval(), given), gammas=(0.25, 0.75))
        assert [k for _, k in seen] == [12, 12, N, 12, 12, 12, N, 4, 4, N, 4, 4, 4, N]


# ------------------------------------------------------------------------------------------------------ SPRINT
def by_hand(model, given, fusion, index, path_keep):
    """SPRINT with the model's own blocks; index None keeps all tokens, path_keep all False runs no middle."""
    hidden, run, end = parts(model, given)
    f = run(hidden, slice(0, 2))
    if path_keep is not None and not path_keep.any():
        padded = fusion.mask_token.expand_as(f)
    else:
        keep = torch.arange(N).expand(len(f), N) if index is None else index.keep.long()
        at = keep[..., None].expand(-1, -1, DIM)
        padded = fusion.mask_token.expand_as(f).scatter(1, at, run(f.gather(1, at), slice(2, -2)))
        if path_keep is not None:
            padded = torch.where(path_keep[:, None, None], padded, fusion.mask_token)
    joined = torch.nn.functional.linear(torch.cat([padded, f], -1), fusion.weight, fusion.bias)
    return end(run(joined, slice(-2, None)))


@pytest.mark.parametrize("kind", [m.SPRINT, m.SRDiT])
def test_sprint_is_the_paper(dit, kind):
    model, given = dit
    route = kind(path_drop=0.5, seed=3)
    with maskaccel.patch(model, [route]):
        fusion, seen, drops = route.fusion, counted(model), []
        for step in range(4):
            seen.clear()
            out = call(model, given)
            index, mine = route.index, gradients(out, model, fusion)
            path_keep = fusion.drawn(3, step) if kind is m.SPRINT else fusion.drawn(1, step).expand(3)
            drops.append(path_keep.tolist())
            assert seen == [(3, N)] * 2 + [(3, 4)] * 3 + [(3, N)] * 2
            if kind is m.SPRINT:
                assert (index.mask.view(3, 2, 2, 2, 2).sum((2, 4)) == 1).all()
            with maskaccel_off(model):
                want = by_hand(model, given, fusion, index, path_keep)
                theirs = gradients(want, model, fusion)
            torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
            close(mine, theirs)
            assert all(g is not None for g in gradients(call_again(model, given, route), fusion))
    assert any(not all(d) for d in drops) and any(any(d) for d in drops)
    assert all(len(set(d)) == 1 for d in drops) == (kind is m.SRDiT)


def call_again(model, given, route):
    """The same step again."""
    route.step = int(route.step) - 1
    return call(model, given)


class maskaccel_off:
    """The model's blocks as they are without the patch."""

    def __init__(self, model):
        self.saved = [(b, b.__dict__.pop("forward", None)) for b in model.transformer_blocks]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for block, forward in self.saved:
            if forward is not None:
                block.__dict__["forward"] = forward


def test_sprint_fuses_in_eval_mode_and_when_all_are_kept(dit):
    model, given = dit
    for route, mode in ((m.SPRINT(), False), (m.SPRINT(ratio=0.0, path_drop=0.0), True)):
        model.train(mode)
        with maskaccel.patch(model, [route]):
            out = call(model, given)
        torch.testing.assert_close(out, by_hand(model, given, route.fusion, None, None), atol=1e-5, rtol=1e-5)


def test_path_drop_guidance_leaves_the_middle_out(dit):
    model, given = dit
    null = {"class_labels": torch.full((3,), 10)}
    route = m.SPRINT(fusion=m.SprintFusion(DIM))
    with maskaccel.patch(model.eval(), [route]), torch.no_grad():
        seen = counted(model)
        guided = route.guided(model, 3.0, **given, null=null)
        assert seen == [(3, N)] * DEPTH + [(3, N)] * 4  # the unconditional half: f and h alone
        cond, uncond = call(model, given), None
        with maskaccel_off(model):
            uncond = by_hand(model, given | null, route.fusion, None, torch.zeros(3, dtype=torch.bool))
        torch.testing.assert_close(guided, uncond + 3.0 * (cond - uncond), atol=1e-4, rtol=1e-4)
        seen.clear()
        call(model, given)
        assert len(seen) == DEPTH  # guidance is over


@pytest.mark.parametrize("null", ["first", "second"])
def test_a_guided_batch_is_split(dit, null):
    model, given = dit
    route = m.SPRINT(fusion=m.SprintFusion(DIM))
    halves = [given, given | {"class_labels": torch.full((3,), 10)}][:: 1 if null == "second" else -1]
    both = {name: torch.cat([half[name] for half in halves]) for name in given}
    with maskaccel.patch(model.eval(), [route]), torch.no_grad():
        whole = [call(model, half) for half in halves]
        with route.path_dropped():
            part = [call(model, half) for half in halves]
        seen = counted(model)
        with route.halves(null):
            out = call(model, both)
        assert len(seen) == DEPTH + 4 and set(seen) == {(3, N)}
        want = [whole[0], part[1]] if null == "second" else [part[0], whole[1]]
        torch.testing.assert_close(out, torch.cat(want))
        torch.testing.assert_close(call(model, both), torch.cat(whole), atol=1e-5, rtol=1e-5)
        with route.halves(null), pytest.raises(ValueError, match="a batch of 3 has no halves"):
            call(model, given)
        assert len(call(model, given)) == 3
    with pytest.raises(ValueError, match="null='third'"), route.halves("third"):
        pass


def test_sprint_in_a_model_of_ones_own():
    x = torch.randn(3, N, DIM)
    route = m.SPRINT(ratio=0.75, fusion=m.SprintFusion(DIM, path_drop=0.5, seed=1), seed=1)
    rows, frame = route.enter(x, grid=(4, 4))
    assert rows.shape == (3, 4, DIM)
    want = route.fusion(x, rows * 2, frame.index, route.fusion.drawn(3, 0))
    torch.testing.assert_close(route.exit(rows * 2, frame), want)
    rows, frame = route.eval().enter(x, enabled=False)
    torch.testing.assert_close(route.exit(rows, frame), route.fusion(x, x))
    with pytest.raises(ValueError, match="fusion is None"):
        m.SPRINT().exit(rows, frame)


def test_sprint_under_checkpointing_and_in_a_copy(dit):
    model, given = dit
    route = m.SPRINT(path_drop=0.5, seed=3, fusion=m.SprintFusion(DIM, path_drop=0.5, learn_mask=True, seed=3))
    with maskaccel.patch(model, [route]):
        want = gradients(call(model, given), model, route.fusion)
        route.step = 0
        latents = given["hidden_states"].clone().requires_grad_()
        rest = {name: value for name, value in given.items() if name != "hidden_states"}
        out = checkpoint(lambda x: call(model, {"hidden_states": x} | rest), latents, use_reentrant=False)
        close(gradients(out, model, route.fusion), want)

        route.step = 0
        twin = copy.deepcopy(model)
        torch.testing.assert_close(call(twin.train(), given), call(model, given))
        # In one module, as for averaged weights: the copied model runs with the copied fusion.
        pair = copy.deepcopy(torch.nn.ModuleList([model, route])).eval()
        with torch.no_grad():
            for p in pair[1].fusion.parameters():
                p.mul_(2)
            changed = call(pair[0], given)
            route.fusion.weight.mul_(2), route.fusion.bias.mul_(2), route.fusion.mask_token.mul_(2)
            torch.testing.assert_close(changed, call(model.eval(), given))
    state = route.state_dict()
    assert {"steps", "fusion.weight", "fusion.bias", "fusion.mask_token"} <= set(state)
    fresh = m.SPRINT(fusion=m.SprintFusion(DIM))
    fresh.load_state_dict(state)
    assert torch.equal(fresh.fusion.weight, route.fusion.weight)


def test_sr_dit_settings():
    route = m.SRDiT()
    fusion = route.make_fusion(8)
    assert route.select == "uniform" and route.keep == 0.25 and fusion.path_drop == 0.05
    assert fusion.mask_token.requires_grad and fusion.mask_token.abs().max() == 0
    residual = m.ValueResidual()
    v, first = torch.randn(2, 4, 2, 8), torch.randn(2, N, 2, 8)
    index = maskaccel.ops.random_keep(2, N, 4, seed=0)
    kept = first.gather(1, index.keep.long()[..., None, None].expand(-1, -1, 2, 8))
    torch.testing.assert_close(residual(v, first, index), 0.5 * kept + 0.5 * v)
    torch.testing.assert_close(residual(v, kept), 0.5 * kept + 0.5 * v)


# ------------------------------------------------------------------------------------------------------ MDT
def masked(h, index, token):
    """Kept rows, and the mask token with its position elsewhere."""
    keep = index.keep.long()[..., None].expand(-1, -1, DIM)
    return (token + sincos((4, 4), DIM)).expand(3, -1, -1).scatter(1, keep, h)


def kept_rows(x, index):
    return x.gather(1, index.keep.long()[..., None].expand(-1, -1, DIM))


def test_mdt_is_span_and_side_block(dit):
    model, given = dit
    method = m.MDT(decode_layer=2, bucket=2)
    dense = call(model, given)
    with maskaccel.patch(model, [method]):
        assert torch.equal(method.side.ff.net[0].proj.weight, model.transformer_blocks[5].ff.net[0].proj.weight)
        seen = counted(model)
        with method.dense():
            torch.testing.assert_close(call(model, given), dense)
        seen.clear()
        out = call(model, given)
        index = method.index
        mine = gradients(out, model, method)
        assert index.kept in (8, 10) and seen == [(3, index.kept)] * 5 + [(3, N)] * 2
        found = {call(model, given) is not None and method.index.kept for _ in range(12)}
        assert found == {8, 10}
    hidden, run, end = parts(model, given)
    x = masked(run(kept_rows(hidden, index), slice(0, 5)), index, method.mask_token)
    side = method.side(x, timestep=given["timestep"], class_labels=given["class_labels"])
    want = end(run(torch.where(index.mask[..., None], x, side), slice(5, None)))
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    close(mine, gradients(want, model, method))
    of = {id(p): g for p, g in zip((*model.parameters(), *method.parameters()), mine, strict=True)}
    assert all(of[id(p)].abs().max() > 0 for p in (method.mask_token, *method.side.ff.parameters()))


def test_mdt_refuses_blocks_that_cannot_run_in_part(dit):
    model, _ = dit
    with pytest.raises(maskaccel.PatchError, match="side block cannot run"):
        maskaccel.patch(model, [m.MDT(side=torch.nn.Linear(2, 2))])
    with pytest.raises(ValueError, match="decode_layer=0"):
        m.MDT(0)


def test_maskdit_patch(dit):
    model, given = dit
    method = m.MaskDiT(decoder=2)
    want = call(model.eval(), given)
    with maskaccel.patch(model, [method]):
        assert torch.equal(call(model, given), want)
        seen = counted(model.train())
        out, index = call(model, given), method.index
        assert seen == [(3, 8)] * 5 + [(3, N)] * 2
        mine = gradients(out, model, method)
    hidden, run, end = parts(model, given)
    want = end(run(masked(run(kept_rows(hidden, index), slice(0, 5)), index, method.mask_token), slice(5, None)))
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    close(mine, gradients(want, model, method))
    assert mine[-1].abs().max() > 0
    with pytest.raises(ValueError, match="ratio=1"):
        m.MaskDiT(ratio=1)


def test_microdit_patch(dit):
    model, given = dit
    method = m.MicroDiT(mixer=2)
    with maskaccel.patch(model, [method]):
        seen = counted(model)
        out, index = call(model, given), method.index
        assert seen == [(3, N)] * 2 + [(3, 4)] * 5
        loss = m.token_mean(m.per_token(out.square(), 2), index)
    hidden, run, end = parts(model, given)
    rows = run(kept_rows(run(hidden, slice(0, 2)), index), slice(2, None))
    want = end(torch.zeros(3, N, DIM).scatter(1, index.keep.long()[..., None].expand(-1, -1, DIM), rows))
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    kept = want.square().mean(1).unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4)).flatten(1)
    torch.testing.assert_close(loss, torch.stack([v[i] for v, i in zip(kept, index.mask)]).mean(1))


# ------------------------------------------------------------------------------------------------------ other models
def test_methods_on_a_video_model():
    model, inputs = MODELS["WanTransformer3DModel"]()
    depth = len(model.blocks)

    def result():
        return model(**inputs).sample

    route = m.SPRINT(0, depth - 1, 0.5, select="uniform")
    with maskaccel.patch(model.eval(), [route]), torch.no_grad():
        calls = []
        handles = [b.ffn.register_forward_pre_hook(lambda *a: calls.append(1)) for b in model.blocks]
        route.fusion.weight[:, : route.fusion.weight.shape[0]] = 0  # g says nothing
        whole = result()
        assert len(calls) == depth
        with route.path_dropped():
            torch.testing.assert_close(result(), whole, atol=1e-5, rtol=1e-5)
        assert len(calls) == depth  # no block of the middle ran
        for handle in handles:
            handle.remove()
    for method in (m.TREAD(0, depth - 1), m.MaskDiT(1), m.MicroDiT(1, 0.5)):
        with maskaccel.patch(model.train(), [method]):
            result().square().mean().backward()
            assert 0 < method.index.kept < method.index.n
        assert all(p.grad.abs().max() > 0 for p in method.parameters())


def test_sprint_leaves_text_as_it_is_where_its_blocks_do_not_run():
    model, inputs = MODELS["FluxTransformer2DModel"]()
    route = m.SPRINT(0, 0, 0.5, select="uniform")
    with maskaccel.patch(model.eval(), [route]), torch.no_grad():
        seen = []
        block = model.transformer_blocks[1]
        handle = block.register_forward_pre_hook(lambda mod, args, kwargs: seen.append(kwargs), with_kwargs=True)
        with route.path_dropped():
            model(**inputs)
        handle.remove()
        text = model.context_embedder(inputs["encoder_hidden_states"])
        torch.testing.assert_close(seen[0]["encoder_hidden_states"], text)
        latents = route.fusion.without_middle(model.x_embedder(inputs["hidden_states"]))
        torch.testing.assert_close(seen[0]["hidden_states"], latents)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (m.MDT(7), "MDT: decode_layer=7; DiTTransformer2DModel has 7 blocks: allowed are 1 to 6"),
        (m.MaskDiT(), "MaskDiT: decoder=8; DiTTransformer2DModel has 7 blocks: allowed are 1 to 6"),
        (m.MicroDiT(9), "MicroDiT: mixer=9; DiTTransformer2DModel has 7 blocks: allowed are 1 to 6"),
        (m.SPRINT(5), r"SPRINT: end=-3 is block 4 of 7, before start=5"),
    ],
)
def test_a_model_with_too_few_blocks_is_refused(dit, method, message):
    with pytest.raises(ValueError, match=message):
        maskaccel.patch(dit[0], [method])
    assert not list(method.parameters())  # nothing was made for a model that is not patched


def test_what_was_made_for_another_width_or_dtype_is_refused(dit):
    model, given = dit
    wider = made(type(model), num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4,
                 num_layers=DEPTH, sample_size=8, patch_size=2, num_embeds_ada_norm=10)  # fmt: skip
    for method, what in ((m.SPRINT(), "fusion"), (m.MDT(1), "mask token")):
        with maskaccel.patch(model, [method]):
            pass
        with pytest.raises(maskaccel.PatchError, match=f"its {what} is 32 wide; the stream of DiTTransformer2DMod"):
            maskaccel.patch(wider, [method])
    given = given | {"hidden_states": given["hidden_states"].bfloat16()}
    for method, what in ((m.SPRINT(), "fusion"), (m.MDT(1), "side block")):
        with maskaccel.patch(model.float(), [method]):
            model.bfloat16()
            with pytest.raises(ValueError, match=f"its {what} is torch.float32 on cpu, the stream torch.bfloat16"):
                call(model, given)
            method.bfloat16()
            assert call(model, given).dtype == torch.bfloat16
