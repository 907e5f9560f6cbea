"""ToCa, against the paper's rule written out, and on real pipelines."""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch
from torch.nn import functional as F
from zoo.all_models import MODELS
from zoo.common import made, randn
from zoo.pipelines import PIPELINES, check_runs, dit, sample

import maskaccel
from maskaccel.masks import Cycle
from maskaccel.methods import FusedAdaLN, ToCa
from maskaccel.state import site

STEPS = 7
FIXED = {"drift": 0, "dense": None, "step_weight": 0, "layer_weight": 0}


@functools.cache
def built(name):
    pipeline, kwargs = PIPELINES[name]()
    return pipeline, kwargs, sample(pipeline, kwargs, steps=STEPS)


@pytest.fixture(params=["dit", "pixart", "flux", "wan", "sd3", "qwen", "hunyuan_video"])
def name(request):
    return request.param


# ------------------------------------------------------------------------------------------------ the rule
def written_out(model, xs, times, labels, method):
    """The authors' DiT code in plain torch: maps kept, all tokens sorted, rows gathered and scattered.

    Of DuCa too: at its aggressive steps the last block returns what it returned at the step before.
    """
    blocks, steps, step = model.transformer_blocks, len(xs), 0
    computed = Cycle(method.interval, method.first, method.drift, method.dense).mask(steps)
    since = [0] * steps
    for i in range(1, steps):
        since[i] = 0 if computed[i] else since[i - 1] + 1

    def aggressive():
        return len(method.between) == 2 and since[step] and since[step] % 2 == 0

    def skipped(block, last):
        inner = block.forward

        def forward(hidden, *args, **kwargs):
            if not aggressive():
                block.kept_output = inner(hidden, *args, **kwargs)
            return hidden if aggressive() and not last else block.kept_output

        block.forward = forward

    def held_attention(block):
        attn, inner = block.attn1, block.attn1.forward

        def forward(hidden, **kwargs):
            if computed[step]:
                q, k = (t(hidden).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (attn.to_q, attn.to_k))
                weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
                block.kept_scores, block.kept_attention = weights.mean(1).sum(1), inner(hidden, **kwargs)
            return block.kept_attention.clone()

        attn.forward = forward

    def some_rows(block, layer):
        inner = block.ff.forward

        def forward(hidden):
            batch, count, width = hidden.shape
            if computed[step]:
                block.kept, block.age = inner(hidden).clone(), torch.zeros(batch, count)
                return block.kept.clone()
            down = (steps - 1 - step) / steps  # the authors count steps down
            share = method.ratio * (1 + method.layer_weight - 2 * method.layer_weight * layer / (len(blocks) - 1))
            share *= (1 + method.step_weight - 2 * method.step_weight * down) * method.mlp
            chosen = int(min(max(share, 0), 1) * count)
            score = F.normalize(block.kept_scores, dim=1) + method.age_weight * block.age / method.interval
            side = int(count**0.5)
            for b in range(batch):
                for top in range(0, side, method.cell):
                    for left in range(0, side, method.cell):
                        cell = [
                            (top + i) * side + left + j for i in range(method.cell) for j in range(method.cell)
                        ]  # fmt: skip
                        best = max(cell, key=lambda n: score[b, n].item())
                        score[b, best] *= 1 + method.bonus
            index = score.argsort(dim=-1, descending=True)[:, :chosen]
            block.age += 1
            block.age.scatter_(1, index, 0)
            if chosen:
                where = index.unsqueeze(-1).expand(-1, -1, width)
                block.kept.scatter_(1, where, inner(hidden.gather(1, where)))
            return block.kept.clone()

        block.ff.forward = forward

    for layer, block in enumerate(blocks):
        held_attention(block)
        some_rows(block, layer)
        skipped(block, layer == len(blocks) - 1)
    out = []
    with torch.no_grad():
        for step, (x, t) in enumerate(zip(xs, times, strict=True)):  # noqa: B007  (the forwards read step)
            out.append(model(x, timestep=torch.full((2,), t), class_labels=labels).sample)
    for block in blocks:
        del block.attn1.forward, block.ff.forward, block.forward
    return torch.stack(out)


@pytest.mark.parametrize(
    "method",
    [
        ToCa(ratio=0.2),
        ToCa(interval=4, ratio=0.15, step_weight=0.4, layer_weight=0.8),
        ToCa(interval=4, ratio=0.3, first=2, bonus=0.3, cell=4, drift=0, dense=None, step_weight=-0.9),
    ],
    ids=["ddim", "ddpm", "other"],
)
def test_the_rule_written_out(method):
    check_the_rule(method)


def check_the_rule(method):
    """A method on a DiT against the rule in plain torch."""
    model = dit()[0].transformer
    labels, times = torch.tensor([3, 5]), [990 - 60 * i for i in range(14)]
    # Not smooth in the step: only the right tokens at the right steps give the same outputs.
    xs = [randn(2, 4, 8, 8, seed=i) for i in range(len(times))]
    expected = written_out(model, xs, times, labels, method)
    got = []
    with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(timesteps=times) as run:
        for x, t in zip(xs, times, strict=True):
            got.append(model(x, timestep=torch.full((2,), t), class_labels=labels).sample)
            run.step()
        activity = patch.report().activity[method.name]
    assert activity["in part"] > 0 < activity["reused"]
    torch.testing.assert_close(torch.stack(got), expected, rtol=1e-4, atol=1e-4)


def test_all_tokens_chosen_is_attention_held(name):
    """With every token computed only attention is from memory, in single-stream blocks too."""
    pipeline, kwargs, plain = built(name)
    model, calls = pipeline.transformer, {}

    def held(module):
        inner = module.forward

        def forward(*args, **kwargs):
            key = model._cache_branch, id(module)
            count, value = calls.get(key, (0, None))
            if count % 3 == 0:
                value = inner(*args, **kwargs)
            calls[key] = count + 1, value
            return tuple(v.clone() for v in value) if isinstance(value, tuple) else value.clone()

        module.forward = forward

    outs, attention = [], []
    for path, module in model.named_modules():
        listed = "." in path and path.split(".")[-2].isdigit()
        if listed and path.endswith(("attn", "attn1")):
            attention.append(module)
    model._cache_branch, inner = None, model.forward

    def forward(*args, **kwargs):  # branches by what they are called with: the text differs
        text = kwargs.get("encoder_hidden_states")
        model._cache_branch = None if text is None else tuple(text.flatten()[:4].tolist())
        return inner(*args, **kwargs)

    model.forward = forward
    for module in attention:
        held(module)
    expected = sample(pipeline, kwargs, steps=STEPS)
    for module in (model, *attention):
        del module.forward
    method = ToCa(ratio=1, mlp=1, cross=1, single=1, score="random", bonus=0, **FIXED)
    for methods in ([method], [method, FusedAdaLN()]):
        with maskaccel.patch(pipeline, methods) as patch:
            outs.append(sample(pipeline, kwargs, steps=STEPS))
            assert patch.report().activity["ToCa"]["in part"] > 0
    scale = plain.abs().max().item()
    torch.testing.assert_close(outs[0], expected, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(outs[1], expected, rtol=1e-3, atol=1e-3 * scale)
    assert not torch.allclose(expected, plain, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.filterwarnings("ignore:ToCa can never reuse")
def test_computing_always_is_the_unpatched_pipeline(name):
    pipeline, kwargs, plain = built(name)
    with maskaccel.patch(pipeline, ToCa(interval=1, drift=0, dense=None)) as patch:
        assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain)
        assert "in part" not in patch.report().activity["ToCa"]
    assert torch.equal(sample(pipeline, kwargs, steps=STEPS), plain), "remove() did not restore the pipeline"


@pytest.mark.parametrize("score", ["attention", "random"])
def test_runs_repeat_and_fused_blocks_agree(name, score):
    pipeline, kwargs, plain = built(name)
    for activity in check_runs(pipeline, kwargs, plain, ToCa(ratio=0.2, score=score, **FIXED), STEPS):
        assert activity["in part"] > 0


def test_scores_of_cross_attention_follow_the_tokens_that_are_computed():
    """s2 is the entropy of each token's own row, so it is renewed with the row."""
    model, maps = built("pixart")[0].transformer, []
    attn = model.transformer_blocks[0].attn2
    with maskaccel.patch(model, ToCa(ratio=0.5, score="cross", **FIXED)) as patch:
        scores = attn.__dict__["_maskaccel_attention_scores"]

        def expected(hidden, text):
            q, k = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (attn.to_q(hidden), attn.to_k(text)))
            weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)
            return 1 - (weights * (weights + 1e-7).log()).sum(-1)

        with torch.no_grad(), patch.generation(3) as run:
            for step in range(3):
                hidden, text = randn(2, 16, 32, seed=step), randn(2, 6, 32, seed=50 + step)
                attn(hidden, encoder_hidden_states=text)
                want = expected(hidden, text)
                maps.append((scores.get().clone(), want))
                run.step()
    (first, want), (second, again), _ = maps
    torch.testing.assert_close(first, want)
    renewed = (second != first).sum(1)
    assert (renewed == int(0.5 * 0.6 * 16)).all()
    torch.testing.assert_close(torch.where(second != first, second, again), again)


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen", "hunyuan_video"])
def test_scores_of_joint_attention_are_of_the_right_tokens(name, monkeypatch):
    """Values say which row is whose: no norm and no rotation touches them."""
    pipeline, kwargs, _ = built(name)
    block = next(b for b in pipeline.transformer.transformer_blocks)
    image, text = (next(getattr(block, n) for n in names if hasattr(block, n)) for names in (
        ("ff", "img_mlp"), ("ff_context", "txt_mlp")))  # fmt: skip
    projected, seen = {}, []
    block.attn.to_v.register_forward_hook(lambda m, i, out: projected.update(image=out))
    block.attn.add_v_proj.register_forward_hook(lambda m, i, out: projected.update(text=out))

    def marked(q, k, v, mask, scale):
        rows = v.transpose(1, 2).flatten(2)
        seen.append(rows)
        return rows.sum(-1)

    monkeypatch.setitem(__import__("maskaccel.methods.toca", fromlist=["MEASURES"]).MEASURES, "value", marked)
    with maskaccel.patch(pipeline, ToCa(score="value", **FIXED)):
        sites = {kind: m.__dict__["_maskaccel_site"].refresh.choice for kind, m in (("image", image), ("text", text))}

        generation = pipeline.transformer.__dict__["_maskaccel_generation"]

        def check(*_):
            if generation.index:
                return  # attention was not computed
            for kind, choice in sites.items():
                rows = projected[kind].sum(-1)
                got = choice._base(projected[kind])
                torch.testing.assert_close(got, F.normalize(rows, dim=1), rtol=1e-3, atol=1e-4)
            checked.append(1)

        checked = []
        handle = block.attn.register_forward_hook(check)
        sample(pipeline, kwargs, steps=2)
        handle.remove()
    assert checked and seen


def test_only_chosen_tokens_are_computed_and_every_token_gets_its_turn():
    """Rows that modules see: a share of them at steps in part; ages leave nobody out."""
    model = built("flux")[0].transformer
    block = model.single_transformer_blocks[0]
    kept = {n: type(getattr(block, n)).forward for n in ("proj_mlp", "proj_out")}
    seen = {"proj_mlp": [], "proj_out": []}
    for n, inner in kept.items():
        module = getattr(block, n)
        module.forward = lambda x, module=module, inner=inner, n=n: seen[n].append(x.shape[1]) or inner(module, x)
    pipeline, kwargs, _ = built("flux")
    try:
        with maskaccel.patch(pipeline, ToCa(ratio=0.25, single=1, score="random", interval=4, **FIXED)):
            sample(pipeline, kwargs, steps=8)
    finally:
        for n in kept:
            del getattr(block, n).forward
    tokens = seen["proj_out"][0]
    part = int(0.25 * tokens)
    assert seen["proj_out"] == seen["proj_mlp"] == [tokens, part, part, part] * 2

    ff = dit()[0].transformer
    method = ToCa(ratio=0.25, mlp=1, score="random", interval=9, bonus=0, age_weight=20, **FIXED)
    counts = torch.zeros(16)
    with torch.no_grad(), maskaccel.patch(ff, method) as patch, patch.generation(9) as run:
        module = ff.transformer_blocks[0].ff
        choice = module.__dict__["_maskaccel_site"].refresh.choice
        for _ in range(9):
            module(randn(1, 16, 32))
            if run.index:
                counts[choice._made[1].index[0]] += 1
            run.step()
    assert (counts == 2).all(), "ages that outweigh the scores are a rotation"


@pytest.mark.parametrize("name", ["dit", "pixart", "flux", "sd3", "qwen", "wan", "ltx"])
def test_fused_blocks_prepare_chosen_tokens_alone(name, monkeypatch):
    pipeline, kwargs, _ = built(name)
    seen, inner = [], site.Part.added
    monkeypatch.setattr(site.Part, "added", lambda part, *a: seen.append(part.index.shape[1]) or inner(part, *a))
    with maskaccel.patch(pipeline, [ToCa(ratio=0.5, mlp=1, score="random", **FIXED), FusedAdaLN()]) as patch:
        sample(pipeline, kwargs, steps=3)
        activity = patch.report().activity["ToCa"]
    expected = {"flux": {8, 3, 17}, "sd3": {8, 3}, "qwen": {2, 3}, "wan": {4}, "ltx": {96}}.get(name, {8})
    assert set(seen) == expected
    cross = sum(path.endswith("attn2") for path, _ in pipeline.transformer.named_modules())
    calls = 2 * (2 if name == "wan" else 1)  # steps in part, guidance branches
    assert len(seen) == activity["in part"] - calls * cross


def test_what_a_module_returns_is_the_callers():
    """The caller may write to it; a later step in part takes the other tokens from memory all the same."""
    model = dit()[0].transformer
    ff, x = model.transformer_blocks[0].ff, randn(2, 16, 32)
    with torch.no_grad():
        truth = ff(x)
        method = ToCa(ratio=0.25, mlp=1, score="random", interval=4, **FIXED)
        with maskaccel.patch(model, method) as patch, patch.generation(4) as run:
            for _ in range(4):
                out = ff(x)
                torch.testing.assert_close(out, truth)
                out.zero_()
                run.step()
            assert patch.report().activity["ToCa"]["in part"] == 3


def test_bytes_are_those_of_the_values_the_ages_and_the_scores():
    model, x = dit()[0].transformer, randn(2, 4, 8, 8)
    with torch.no_grad(), maskaccel.patch(model, ToCa(**FIXED)) as patch, patch.generation(4) as run:
        for _ in range(3):
            model(x, timestep=torch.full((2,), 9), class_labels=torch.tensor([1, 2]))
            run.step()
        held = patch.report().activity["ToCa"]["bytes held"]
        peak = model.__dict__["_maskaccel_generation"].peak_bytes
    tokens = 2 * 16
    values, ages, scores = 2 * 2 * tokens * 32 * 4, 2 * tokens * 4, 2 * tokens * 4
    assert held == values
    assert peak == values + ages + scores


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_narrow_storage(dtype):
    pipeline, kwargs, _ = built("flux")
    outs = []
    for storage in (maskaccel.state.Storage(), maskaccel.state.Storage(dtype)):
        with maskaccel.patch(pipeline, ToCa(ratio=0.3, score="random", storage=storage, **FIXED)):
            outs.append(sample(pipeline, kwargs, steps=STEPS))
    error = (outs[1] - outs[0]).norm() / outs[0].norm()
    assert 0 < error < {"bf16": 2e-3, "fp8": 2e-2}[dtype]


@pytest.mark.parametrize(
    "name",
    [
        "AuraFlowTransformer2DModel", "HunyuanImageTransformer2DModel", "Kandinsky5Transformer3DModel",
        "LuminaNextDiT2DModel", "MochiTransformer3DModel", "MotifVideoTransformer3DModel",
        "NucleusMoEImageTransformer2DModel", "SanaWMTransformer3DModel",
    ],
)  # fmt: skip
def test_modules_in_which_tokens_meet_are_not_called_with_some(name):
    """Rotary embeddings, convolutions, experts that choose: on a constant input every step gives the same."""
    model, kwargs = MODELS[name]()
    score = "random" if "Sana" in name or "Lumina" in name else "attention"
    with torch.no_grad():
        plain = model(**kwargs)[0]
        with maskaccel.patch(model, ToCa(ratio=0.3, score=score, **FIXED)) as patch, patch.generation(4) as run:
            for _ in range(4):
                torch.testing.assert_close(model(**kwargs)[0], plain, rtol=1e-4, atol=2e-4 * plain.abs().max().item())
                run.step()
            assert patch.report().activity["ToCa"]["in part"] > 0


# ------------------------------------------------------------------------------------------------ cycles
def test_cycles():
    assert Cycle(3).mask(7) == (True, False, False, True, False, False, True)
    assert Cycle(3, first=3).mask(7) == (True, True, True, False, False, True, False)
    # Lengths round(4 / (0.6 + 0.8 (i + 1) / 20)) fall from 6 to 3; two in the steps 12 to 15.
    computed = [i for i, c in enumerate(Cycle(4, drift=0.4, dense=(0.6, 0.8)).mask(20)) if c]
    assert computed == [0, 5, 9, 12, 14, 17]
    actions = Cycle(4, between=("partial", "reuse")).plan(9)
    assert [a[0] for a in actions] == list("cprpcprpc")
    with pytest.raises(ValueError, match="needs the number of steps"):
        Cycle(4).action(maskaccel.masks.schedule.At(1))


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"interval": 0}, "interval=0"),
        ({"ratio": 1.5}, "ratio=1.5"),
        ({"score": "best"}, "score='best'; allowed are 'random', 'attention', 'cross', 'value'"),
        ({"bonus": -1}, "bonus=-1"),
        ({"cell": 0}, "cell=0"),
        ({"grid": (4,)}, r"grid=\(4,\)"),
        ({"drift": 1}, "drift=1"),
        ({"dense": (0.5, 0.2)}, r"dense=\(0.5, 0.2\)"),
        ({"ratio": "0.1"}, "ratio='0.1' must be a number from 0 to 1"),
        ({"age_weight": float("inf")}, "age_weight=inf must be a finite number, 0 or more"),
        ({"step_weight": float("nan")}, "step_weight=nan must be a finite number"),
        ({"layer_weight": "1"}, "layer_weight='1' must be a finite number"),
        ({"seed": 0.5}, "seed=0.5 must be an integer"),
        ({"grid": 4}, "grid=4 must be two integers"),
        ({"grid": ()}, r"grid=\(\) must be integers"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        ToCa(**fields)


def test_models_without_the_attention_that_scores_need_are_left_alone():
    model = dit()[0].transformer
    with pytest.raises(maskaccel.PatchError, match="no cross-attention, which score='cross' needs"):
        maskaccel.patch(model, ToCa(score="cross"))
    assert "forward" not in model.__dict__


def test_attention_that_nobody_can_see_is_an_error_that_says_so():
    model = made(
        diffusers.DiTTransformer2DModel, sample_size=8, num_layers=2, patch_size=2, attention_head_dim=16,
        num_attention_heads=2, in_channels=4, out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    for block in model.transformer_blocks:
        block.attn1.set_processor(diffusers.models.attention_processor.AttnProcessor())
    x, t, y = randn(1, 4, 8, 8), torch.tensor([9]), torch.tensor([1])
    with torch.no_grad(), maskaccel.patch(model, ToCa(ratio=1, **FIXED)) as patch, patch.generation(4) as run:
        model(x, timestep=t, class_labels=y)
        run.step()
        with pytest.raises(RuntimeError, match=r"saw no attention .* use score='random'"):
            model(x, timestep=t, class_labels=y)
