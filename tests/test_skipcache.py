"""Skip-Cache and its branches against the paper's equations, and on real pipelines."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from torch.nn import functional as F
from zoo.common import made
from zoo.pipelines import PIPELINES, sample

import maskaccel
from maskaccel.methods import FusedAdaLN, SkipBranches, SkipCache

DEPTH, WIDTH, STEPS = 6, 32, 6


def deep_dit(depth=DEPTH):
    return made(
        diffusers.DiTTransformer2DModel, sample_size=8, num_layers=depth, patch_size=2, attention_head_dim=16,
        num_attention_heads=2, in_channels=4, out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip


def trained(depth=DEPTH, *, residual=True):
    """Branches with weights that matter."""
    branches = SkipBranches(WIDTH, depth, residual=residual)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in branches.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return branches


def calls(steps=STEPS):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([900 - 150 * i] * 2)) for i in range(steps)]


LABELS = torch.tensor([1, 2])


def run(model, methods):
    outs = []
    times = [float(t[0]) for _, t in calls()]
    with torch.no_grad(), maskaccel.patch(model, methods) as patch, patch.generation(timesteps=times) as steps:
        for x, t in calls():
            outs.append(model(x, timestep=t, class_labels=LABELS).sample)
            steps.step()
        return torch.stack(outs), patch.report().activity


def plain(model, branches, interval, outer, close=0.0, start=1000.0):
    """Skip-DiT with Skip-Cache, written out for diffusers' DiT."""
    depth, kept, outs = len(model.transformer_blocks), None, []
    for step, (latents, t) in enumerate(calls()):
        reuse = step % interval != 0 and close <= float(t[0]) <= start
        x, skips = model.pos_embed(latents), {}
        for i, block in enumerate(model.transformer_blocks):
            if reuse and outer <= i < depth - outer:
                continue
            if i == depth - outer:
                if reuse:
                    x = kept
                kept = x
            if branches is not None and i >= depth - depth // 2:
                n = i - (depth - depth // 2)
                norm, linear = branches.norms[n], branches.linears[n]
                cat = torch.cat([x, skips[depth - 1 - i]], -1)
                y = F.linear(F.layer_norm(cat, (2 * WIDTH,), norm.weight, norm.bias, 1e-6), linear.weight, linear.bias)
                x = x + y if branches.residual else y
            x = block(x, timestep=t, class_labels=LABELS)
            skips[i] = x
        emb = model.transformer_blocks[0].norm1.emb(t, LABELS, hidden_dtype=x.dtype)
        shift, scale = model.proj_out_1(F.silu(emb)).chunk(2, dim=1)
        y = model.proj_out_2(model.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        y = y.reshape(-1, 4, 4, 2, 2, model.out_channels)
        outs.append(torch.einsum("nhwpqc->nchpwq", y).reshape(2, model.out_channels, 8, 8))
    return torch.stack(outs)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("order", [1, -1], ids=["cache first", "branches first"])
@pytest.mark.parametrize(("depth", "outer"), [(6, 1), (6, 2), (7, 2)])
def test_against_the_equations(depth, outer, order, fused):
    model, branches = deep_dit(depth), trained(depth)
    methods = [SkipCache(interval=3, outer=outer, close=0), branches][::order] + [FusedAdaLN()] * fused
    got, activity = run(model, methods)
    with torch.no_grad():
        torch.testing.assert_close(got, plain(model, branches, 3, outer), rtol=1e-4, atol=1e-4)
    assert activity["SkipCache"]["steps"] == "C..C.." and activity["SkipBranches"] == {"branches": depth // 2}
    assert "skip branches" not in activity["SkipCache"]


def test_the_window():
    model, branches = deep_dit(), trained()
    got, activity = run(model, [SkipCache(interval=6, outer=2, start=700, close=300), branches])
    assert activity["SkipCache"]["steps"] == "CC...C"
    with torch.no_grad():
        torch.testing.assert_close(got, plain(model, branches, 6, 2, 300, 700), rtol=1e-4, atol=1e-4)


def test_without_branches_it_is_a_deep_feature_cache():
    model = deep_dit()
    got, activity = run(model, SkipCache(interval=2, outer=2))
    with torch.no_grad():
        torch.testing.assert_close(got, plain(model, None, 2, 2), rtol=1e-4, atol=1e-4)
    assert "none" in activity["SkipCache"]["skip branches"]
    assert activity["SkipCache"]["peak bytes"] == 2 * 16 * WIDTH * 4  # one hidden state


def test_the_form_of_the_paper():
    model, branches = deep_dit(), trained(residual=False)
    with torch.no_grad():
        torch.testing.assert_close(run(model, branches)[0], plain(model, branches, 1, 2), rtol=1e-4, atol=1e-4)


def test_untrained_branches_change_nothing_and_can_be_trained():
    model, branches = deep_dit(), SkipBranches(WIDTH, DEPTH)
    (x, t), keys = calls()[0], set(model.state_dict())
    with torch.no_grad():
        expected = model(x, timestep=t, class_labels=LABELS).sample
    with maskaccel.patch(model, branches):
        assert set(model.state_dict()) == keys
        out = model(x, timestep=t, class_labels=LABELS).sample
        assert torch.equal(out.detach(), expected)
        out.square().mean().backward()
        assert all(linear.weight.grad.abs().sum() > 0 for linear in branches.linears)
        torch.optim.SGD(branches.parameters(), lr=1.0).step()
        with torch.no_grad():
            after = model(x, timestep=t, class_labels=LABELS).sample
            assert not torch.equal(after, expected)
    fresh = SkipBranches(WIDTH, DEPTH)
    fresh.load_state_dict(branches.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x, timestep=t, class_labels=LABELS).sample, expected), "remove() left branches"
        with maskaccel.patch(model, fresh):
            assert torch.equal(model(x, timestep=t, class_labels=LABELS).sample, after)


def test_a_copy_of_a_patched_model_has_branches_of_its_own():
    model, branches = deep_dit(), trained()
    (x, t) = calls()[0]
    with torch.no_grad(), maskaccel.patch(model, branches):
        before = model(x, timestep=t, class_labels=LABELS).sample
        other = copy.deepcopy(model)
        branches.linears[0].weight.zero_()
        assert torch.equal(other(x, timestep=t, class_labels=LABELS).sample, before)
        assert not torch.equal(model(x, timestep=t, class_labels=LABELS).sample, before)


def _deep_pipeline(name):
    pipeline, kwargs = PIPELINES[name]()
    if name == "flux":  # four blocks already
        return pipeline, kwargs
    model = pipeline.transformer
    config = dict(model.config) | {"num_layers": 4}
    pipeline.register_modules(transformer=made(type(model), **{k: v for k, v in config.items() if k[0] != "_"}))
    return pipeline, kwargs


@pytest.mark.filterwarnings("ignore:SkipCache can never reuse")
@pytest.mark.parametrize("name", ["dit", "flux", "sd3", "wan"])
def test_pipelines(name):
    pipeline, kwargs = _deep_pipeline(name)
    expected = sample(pipeline, kwargs, steps=STEPS)
    with maskaccel.patch(pipeline, SkipCache(interval=1, outer=1)):
        assert torch.equal(sample(pipeline, kwargs, steps=STEPS), expected)
    outs = []
    for methods in ([SkipCache(outer=1)], [SkipCache(outer=1), FusedAdaLN()]):
        with maskaccel.patch(pipeline, methods) as patch:
            outs.append(sample(pipeline, kwargs, steps=STEPS))
            assert torch.equal(sample(pipeline, kwargs, steps=STEPS), outs[-1]), "two runs of one seed differ"
            assert patch.report().activity["SkipCache"]["reused"] > 0
    assert not torch.equal(outs[0], expected)
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=2e-5 * outs[0].abs().max().item())
    assert torch.equal(sample(pipeline, kwargs, steps=STEPS), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkipCache(interval=0), "interval=0"),
        (lambda: SkipCache(outer=0), "outer=0"),
        (lambda: SkipCache(start=10, close=20), "close=20 and start=10"),
        (lambda: SkipBranches(0, 4), "width=0"),
        (lambda: SkipBranches(8, 1), "depth=1"),
    ],
)
def test_bad_fields(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_models_that_do_not_fit():
    model = deep_dit()
    with pytest.raises(maskaccel.PatchError, match="depth=4, but DiTTransformer2DModel has 6 blocks"):
        maskaccel.patch(model, SkipBranches(WIDTH, 4))
    with pytest.raises(maskaccel.PatchError, match="has 6 blocks; 3 leading and 3 trailing"):
        maskaccel.patch(model, SkipCache(outer=3))
    with pytest.raises(maskaccel.PatchError, match="more than one stream"):
        maskaccel.patch(PIPELINES["flux"]()[0], SkipBranches(WIDTH, 4))
    assert not any("forward" in module.__dict__ for module in model.modules())
