"""What the bridge to attention promises: per module, reversible, copied with the model, compiled, in any order."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from _attention_probes import Probe, Scaled, Second, equal, same, state_of
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers import transformer_flux
from torch import Tensor
from zoo import dit_original, flux, sd3
from zoo.all_models import MODELS
from zoo.common import run, run_with_gradients

import maskaccel
from maskaccel import methods
from maskaccel.masks import GridWindow, TileMask, TokenOrder
from maskaccel.methods import FORA, FusedAdaLN, TaylorSeer
from maskaccel.ops import tile_attention
from maskaccel.patching.attention import AttentionCall, Once, Places
from maskaccel.patching.transaction import PatchError

# --------------------------------------------------------------------------------------------- with other methods


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel",
                                  "SD3Transformer2DModel", "ZImageTransformer2DModel", "LTXVideoTransformer3DModel",
                                  "Lumina2Transformer2DModel", "DiTTransformer2DModel"])  # fmt: skip
def test_fused_processors_are_taken_over_in_either_order(name):
    model, inputs = MODELS[name]()
    before = state_of(model)
    with maskaccel.patch(model, FusedAdaLN()):
        exact = run(model, inputs)
    with maskaccel.patch(model, Probe()):
        unfused = run(model, inputs)
    for order in ([FusedAdaLN(), Probe()], [Probe(), FusedAdaLN()]):
        with maskaccel.patch(model, order) as patch:
            found = run(model, inputs)
            for got, expected in zip(found, unfused, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
            assert not equal(found, exact)
            report = patch.report()
        assert report.activity["Probe"]["attention calls"] == sum(
            n for (m, *_), n in report.sites.items() if m == "Probe"
        )
        assert report.activity["FusedAdaLN"]["fused calls"]
    with maskaccel.patch(model, [Probe(Scaled(1.0)), FusedAdaLN()]):
        assert equal(run(model, inputs), exact)
    assert same(state_of(model), before)


def test_caching_skips_the_policy_with_the_attention():
    model, inputs = MODELS["DiTTransformer2DModel"]()
    found = []
    for order in itertools.permutations([FusedAdaLN(), Probe(), FORA(interval=2, level="module")]):
        outs = []
        with maskaccel.patch(model, order) as patch, patch.generation(4) as run_:
            for step in range(4):
                outs += run(model, {**inputs, "hidden_states": inputs["hidden_states"] + 0.1 * step})
                run_.step()
            assert patch.report().activity["Probe"]["attention calls"] == 2 * 2  # two blocks at two of four steps
        found.append(outs)
    assert all(equal(outs, found[0]) for outs in found)


def test_calls_know_step_and_branch():
    model, inputs = MODELS["DiTTransformer2DModel"]()
    seen = []

    def policy(call: AttentionCall) -> None:
        seen.append((call.generation.index, call.generation.branch_key, call.site.layer, call.site.layers))

    with maskaccel.patch(model, [Probe(policy), TaylorSeer(interval=2)]) as patch, patch.generation(6) as run_:
        for _ in range(6):
            for branch in ("cond", "uncond"):
                with run_.branch(branch):
                    run(model, inputs)
            run_.step()
    assert seen[:4] == [(0, "cond", 0, 2), (0, "cond", 1, 2), (0, "uncond", 0, 2), (0, "uncond", 1, 2)]
    assert patch.report().activity["Probe"] == {"attention calls": len(seen), "left dense": len(seen)}


def test_two_methods_share_a_model_but_not_a_site():
    model, inputs = MODELS["WanTransformer3DModel"]()
    before, plain = state_of(model), run(model, inputs)
    with pytest.raises(PatchError, match="Second and Probe both want attention of one WanAttention"):
        maskaccel.patch(model, [Probe(), Second()])
    assert same(state_of(model), before)
    crossed, own = Scaled(), Scaled()
    with maskaccel.patch(model, [Probe(crossed, ["cross"]), Second(own, ["self"])]):
        assert not equal(run(model, inputs), plain)
    assert (crossed.calls, own.calls) == (2, 2)


# ------------------------------------------------------------------------------------------------ sites and kinds


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("WanTransformer3DModel", {"self": 2, "cross": 2}), ("PixArtTransformer2DModel", {"self": 2, "cross": 2}),
     ("FluxTransformer2DModel", {"joint": 4}), ("HunyuanVideoTransformer3DModel", {"joint": 4, "other": 1}),
     ("LTX2VideoTransformer3DModel", {"self": 2, "cross": 4, "other": 6}), ("SanaTransformer2DModel", {"cross": 2})],
)  # fmt: skip
def test_kinds(name, kinds):
    model, _ = MODELS[name]()
    for kind, count in kinds.items():
        with maskaccel.patch(model, Probe(kinds=[kind])) as patch:
            assert sum(patch.report().sites.values()) == count
    for kind in {"self", "joint", "cross", "other"} - set(kinds):
        with pytest.raises(PatchError, match="Probe found nothing to patch"):
            maskaccel.patch(model, Probe(kinds=[kind]))


def test_the_second_attention_of_a_dual_block_is_self_attention():
    model, inputs = sd3.sd35()
    seen = []
    policy = lambda call: seen.append((call.site.kind, call.site.name[-5:], call.text))  # noqa: E731
    with maskaccel.patch(model, Probe(policy)):
        run(model, inputs)
    assert set(seen) == {("joint", ".attn", (12, 5)), ("self", "attn2", (0, 0))}


def test_kinds_that_are_none_are_refused():
    model, _ = MODELS["DiTTransformer2DModel"]()
    with pytest.raises(ValueError, match=r"kinds=\('spatial',\); allowed are 'self', 'joint', 'cross', 'other'"):
        maskaccel.patch(model, Probe(kinds=("spatial",)))


def test_attention_that_cannot_be_reached_is_reported():
    model, _ = MODELS["SanaTransformer2DModel"]()
    with maskaccel.patch(model, Probe()) as patch:
        reasons = {(c, why) for (_, c, why) in patch.report().skipped}
    assert reasons == {
        (
            "Attention",
            "SanaLinearAttnProcessor2_0.__call__ calls no scaled_dot_product_attention or dispatch_attention_fn",
        )
    }


def test_blocks_are_numbered_in_the_order_of_execution():
    model, inputs = MODELS["LatteTransformer3DModel"]()
    seen = []
    policy = lambda call: seen.append(call.site.layer)  # noqa: E731
    with maskaccel.patch(model, Probe(policy, ["self"])):
        run(model, inputs)
    assert seen == [0, 1, 2, 3, 4, 5]


# ----------------------------------------------------------------------------------------- copies, other instances


def test_remove_restores_every_attribute():
    for build in (MODELS["FluxTransformer2DModel"], MODELS["SanaWMTransformer3DModel"], dit_original.dit):
        model, inputs = build()
        before, plain = state_of(model), run(model, inputs)
        patch = maskaccel.patch(model, Probe())
        assert not equal(run(model, inputs), plain)
        patch.remove()
        assert same(state_of(model), before) and equal(run(model, inputs), plain)
        assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs


def test_a_copy_has_policies_of_its_own():
    for build in (MODELS["FluxTransformer2DModel"], dit_original.dit):
        model, inputs = build()
        policy = Scaled()
        patch = maskaccel.patch(model, Probe(policy))
        expected, count = run(model, inputs), policy.calls
        other = copy.deepcopy(model)
        policy.factor = 3.0
        assert equal(run(other, inputs), expected) and policy.calls == count
        assert not equal(run(model, inputs), expected)
        patch.remove()
        assert equal(run(other, inputs), expected)


def test_other_models_and_the_library_are_left_alone():
    first, inputs = MODELS["FluxTransformer2DModel"]()
    second, _ = MODELS["FluxTransformer2DModel"]()
    plain = run(second, inputs)
    held = dict(vars(transformer_flux))
    with maskaccel.patch(first, Probe()):
        assert not equal(run(first, inputs), plain)
        assert equal(run(second, inputs), plain)
        assert dict(vars(transformer_flux)) == held
        with maskaccel.patch(second, Probe(Scaled(3.0))):
            a, b = run(first, inputs), run(second, inputs)
            assert not equal(a, b) and not equal(b, plain)


def test_one_processor_that_many_modules_share():
    model, inputs = MODELS["FluxTransformer2DModel"]()
    model.set_attn_processor(transformer_flux.FluxAttnProcessor())
    layers = []
    policy = lambda call: layers.append(call.site.name)  # noqa: E731
    with maskaccel.patch(model, Probe(policy)):
        run(model, inputs)
    assert len(set(layers)) == 4


# --------------------------------------------------------------------------------------- backends, adapters, hooks


def test_dense_calls_use_the_backend_that_is_set_later(monkeypatch):
    model, inputs = MODELS["WanTransformer3DModel"]()
    # Setting it for a model also sets it for whatever has none of its own: diffusers keeps that in a global.
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    with maskaccel.patch(model, [Probe(Scaled(1.0)), FusedAdaLN()]):
        model.set_attention_backend("_native_math")
        backends = {m.processor._attention_backend for m in model.modules() if hasattr(m, "processor")}
        assert {str(b.value) for b in backends} == {"_native_math"}
        run(model, inputs)


def test_lora_and_module_hooks():
    model, inputs = flux.flux()
    peft = pytest.importorskip("peft")
    with maskaccel.patch(model, Probe()):
        without = run(model, inputs)
        config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_out.0"])
        model.add_adapter(config)
        assert not equal(run(model, inputs), without)
        called = []
        attention = model.transformer_blocks[0].attn
        handle = attention.register_forward_hook(lambda *_: called.append(1))
        run(model, inputs)
        handle.remove()
        assert called == [1]


def test_offload_hooks_before_the_patch():
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = MODELS["FluxTransformer2DModel"]()
    for module in (model, model.transformer_blocks[0].attn):
        hooks.add_hook_to_module(module, hooks.ModelHook())
    policy = Scaled()
    with maskaccel.patch(model, Probe(policy)):
        run(model, inputs)
    assert policy.calls == 4
    plain, _ = dit_original.dit()
    attention = next(m for m in plain.modules() if type(m).__name__ == "SelfAttention")
    hooks.add_hook_to_module(attention, hooks.ModelHook())
    with pytest.raises(PatchError, match="Patch first, then enable the hook"):
        maskaccel.patch(plain, Probe())


def test_gradients():
    for name in ("FluxTransformer2DModel", "WanTransformer3DModel"):
        model, inputs = MODELS[name]()
        outputs, gradients = run_with_gradients(model, inputs)
        with maskaccel.patch(model, Probe(Scaled(1.0))):
            got, found = run_with_gradients(model, inputs)
        assert equal(got, outputs) and found.keys() == gradients.keys()
        assert all(torch.equal(found[key], gradients[key]) for key in found)


def test_a_policy_gets_what_autocast_would_cast():
    model, inputs = MODELS["DiTTransformer2DModel"]()
    dtypes = set()

    def policy(call: AttentionCall) -> Tensor:
        dtypes.add(call.q.dtype)
        q, k, v = (t.transpose(1, 2) for t in (call.q, call.k, call.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model, inputs)
        with maskaccel.patch(model, Probe(policy)):
            assert equal(run(model, inputs), expected)
    assert dtypes == {torch.bfloat16}


def test_context_parallelism_is_refused():
    model, inputs = MODELS["WanTransformer3DModel"]()
    with maskaccel.patch(model, Probe()):
        model.blocks[0].attn1.processor._parallel_config = object()
        with pytest.raises(PatchError, match=r"Probe: blocks.0.attn1 runs under context parallelism \(parallel_config"):
            run(model, inputs)


def test_a_result_of_another_shape_is_refused():
    model, inputs = MODELS["DiTTransformer2DModel"]()
    refused = pytest.raises(ValueError, match=r"transformer_blocks.0.attn1 returned shape .* be \(B, Sq, H, Dv\)")
    with maskaccel.patch(model, Probe(lambda call: call.dense()[:, 1:])), refused:
        run(model, inputs)


# ------------------------------------------------------------------------------------------------ grids


def test_a_grid_that_the_user_gives():
    model, inputs = MODELS["FluxTransformer2DModel"]()
    grids = set()
    policy = lambda call: grids.add(call.grid)  # noqa: E731
    with maskaccel.patch(model, Probe(policy, grid=(5, 3))):
        run(model, inputs)
    assert grids == {(5, 3)}
    refused = pytest.raises(ValueError, match=r"Probe: grid=\(4, 4\) has 16 tokens, transformer_blocks.0.attn has 15")
    with maskaccel.patch(model, Probe(policy, grid=(4, 4))), refused:
        run(model, inputs)


def test_positions_are_read_once_for_each_tensor(monkeypatch):
    model, inputs = MODELS["FluxTransformer2DModel"]()
    reads, grids = [], []
    amax = Tensor.amax
    monkeypatch.setattr(Tensor, "amax", lambda self, *args: (reads.append(1), amax(self, *args))[1])
    policy = lambda call: grids.append(call.grid)  # noqa: E731
    with maskaccel.patch(model, Probe(policy)):
        run(model, inputs)
        run(model, inputs)
        assert len(reads) == 1 and set(grids) == {(3, 5)}
        turned = inputs["img_ids"].clone()
        turned[:, 1:] = torch.cartesian_prod(torch.arange(5), torch.arange(3))
        run(model, {**inputs, "img_ids": turned})
        assert len(reads) == 2 and grids[-1] == (5, 3)
        inputs["img_ids"].copy_(turned)  # another image in the same tensor
        run(model, inputs)
        assert len(reads) == 3 and grids[-1] == (5, 3)


# ------------------------------------------------------------------------------------------------ compiled


class Windowed:
    """A policy with a mask of the places, made once for the model."""

    def __init__(self) -> None:
        self.made = Once(self.window)
        self.times = 0

    def window(self, places: Places) -> TileMask:
        self.times += 1
        line = TokenOrder((places.queries,))
        return TileMask.from_rule(GridWindow(line, 3, "box"), (places.queries, places.keys), (16, 32))

    def __call__(self, call: AttentionCall) -> Tensor:
        return tile_attention(call.q, call.k, call.v, self.made(call), scale=call.scale)


def test_masks_are_made_once_and_outside_of_graphs():
    model, inputs = MODELS["FluxTransformer2DModel"]()
    policy = Windowed()
    with maskaccel.patch(model, Probe(policy)):
        torch._dynamo.reset()
        found = run(torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager"), inputs)
        expected = run(model, inputs)
        assert policy.times == 2, "once in the graph of the copy, and once here"
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


class Tiled:
    """A policy that needs the grid."""

    def __call__(self, call: AttentionCall) -> Tensor | None:
        if call.grid is None and call.site.kind != "cross":
            return None
        q, k, v = (t.transpose(1, 2) for t in (call.q, call.k, call.v))
        return 2 * F.scaled_dot_product_attention(q, k, v, attn_mask=call.bias(), scale=call.scale).transpose(1, 2)


@pytest.mark.parametrize(
    ("name", "grid", "more"),
    [("DiTTransformer2DModel", None, []), ("WanTransformer3DModel", None, [FusedAdaLN()]),
     ("FluxTransformer2DModel", (3, 5), [])],  # positions cannot be read in a graph
)  # fmt: skip
def test_whole_models_in_one_graph(name, grid, more):
    model, inputs = MODELS[name]()
    plain = run(model, inputs)
    with maskaccel.patch(model, [Probe(Tiled(), grid=grid), *more]) as patch:
        expected = run(model, inputs)
        calls = patch.report().activity["Probe"]
        assert calls["left dense"] == 0 and not equal(expected, plain)
        torch._dynamo.reset()
        found = run(torch.compile(model, fullgraph=True, backend="eager"), inputs)
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert patch.report().activity["Probe"] == calls, "the compiled call ran in Python"
    torch._dynamo.reset()


def test_blocks_compiled_one_by_one_share_their_graphs():
    from torch._dynamo.utils import counters

    model, inputs = MODELS["FluxTransformer2DModel"]()
    with maskaccel.patch(model, Probe(Tiled())):
        expected = run(model, inputs)
        torch._dynamo.reset()
        counters.clear()
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        for got, want in zip(run(model, inputs), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert counters["stats"]["unique_graphs"] <= 3  # two classes of block, four blocks
    torch._dynamo.reset()


def test_blocks_of_a_video_model_share_their_graph() -> None:
    """What a policy reads of a site is the same for all blocks, or each would be compiled by itself."""
    from torch._dynamo.utils import counters

    model, inputs = MODELS["WanTransformer3DModel"]()
    with maskaccel.patch(model, methods.RadialAttention(block=(16, 32))), torch.no_grad():
        expected = run(model, inputs)
        torch._dynamo.reset()
        counters.clear()
        model.compile_repeated_blocks(backend="eager")
        for got, want in zip(run(model, inputs), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
