"""TeaCache: its taps against what attention is really given, its rule against a plain loop."""

from __future__ import annotations

import _plain_dit as plain
import pytest
import torch
from zoo.all_models import MODELS
from zoo.dit_original import DiT
from zoo.pipelines import PIPELINES, dit, flux, sample

import maskaccel
from maskaccel.calibration import Calibration
from maskaccel.methods import FusedAdaLN, TeaCache
from maskaccel.methods.teacache import POLYNOMIALS
from maskaccel.models import stack_of
from maskaccel.models._modulated import modulated_tap, time_tap
from maskaccel.ops import relative_difference

ATTENTIONS = ("attn", "attn1", "attention", "self_attn")
KNOWN = [
    "FluxTransformer2DModel", "ChromaTransformer2DModel", "SD3Transformer2DModel", "HunyuanVideoTransformer3DModel",
    "MochiTransformer3DModel", "WanTransformer3DModel", "LTXVideoTransformer3DModel", "QwenImageTransformer2DModel",
    "Lumina2Transformer2DModel", "ZImageTransformer2DModel", "Flux2Transformer2DModel", "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
]  # fmt: skip


class _Reached(Exception):
    pass


def _given_to_attention(model, kwargs, tap):
    """What the tap says at the first block, and what its attention gets in the same call."""
    block = stack_of(model).segments[0][0]
    attention = next(getattr(block, name) for name in ATTENTIONS if hasattr(block, name))
    seen = {}

    def at_block(module, args, kwargs):
        attention_calls = []
        handle = attention.register_forward_pre_hook(lambda *_: attention_calls.append(1))
        seen["tap"] = tap(module, args, kwargs)
        handle.remove()
        assert not attention_calls, "the tap ran the attention"

    def at_attention(module, args, kwargs):
        seen["attention"] = args[0] if args else kwargs["hidden_states"]
        raise _Reached

    handles = [
        block.register_forward_pre_hook(at_block, with_kwargs=True),
        attention.register_forward_pre_hook(at_attention, with_kwargs=True),
    ]
    try:
        with torch.no_grad(), pytest.raises(_Reached):
            model(**kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("name", KNOWN)
def test_the_tap_is_what_attention_is_given(name):
    model, kwargs = MODELS[name]()
    tap = modulated_tap(stack_of(model).segments[0][0])
    seen = _given_to_attention(model, kwargs, tap)
    torch.testing.assert_close(seen["tap"], seen["attention"], rtol=1e-5, atol=1e-5)


def test_the_tap_of_the_original_code():
    model = DiT().eval()
    x, t, y = torch.randn(2, 16, 4), torch.tensor([0.005, 0.7]), torch.tensor([1, 2])
    seen = {}
    block = model.blocks[0]
    tap = modulated_tap(block)
    block.register_forward_pre_hook(lambda m, a, k: seen.update(tap=tap(m, a, k)), with_kwargs=True)
    block.attn.register_forward_pre_hook(lambda m, a: seen.update(attention=a[0]))
    with torch.no_grad():
        model(x, t, y)
    torch.testing.assert_close(seen["tap"], seen["attention"], rtol=1e-5, atol=1e-5)


ONE_PASS = [
    "FluxTransformer2DModel", "SD3Transformer2DModel", "LTXVideoTransformer3DModel", "ZImageTransformer2DModel",
    "Flux2Transformer2DModel", "DiTTransformer2DModel", "PixArtTransformer2DModel",
]  # fmt: skip


@pytest.mark.parametrize("name", ONE_PASS)
def test_one_pass_gives_the_tap_and_its_change(name):
    model, kwargs = MODELS[name]()
    tap = modulated_tap(stack_of(model).segments[0][0])
    seen = {}

    def both(block, args, kwargs):
        value = seen["value"] = tap(block, args, kwargs)
        reference = value + torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        seen["moved"], seen["wanted"] = (
            tap.against(block, args, kwargs, reference),
            relative_difference(value, reference),
        )
        seen["other"] = tap.against(block, args, kwargs, reference[:, :1])
        norm = next(m for n, m in block.named_children() if "norm" in n)
        handle = norm.register_forward_hook(lambda *_: seen.update(called=True))
        seen["hooked"] = tap.against(block, args, kwargs, reference)
        handle.remove()
        return value

    _given_to_attention(model, kwargs, both)
    value, sums = seen["moved"]
    torch.testing.assert_close(value, seen["value"])
    torch.testing.assert_close(sums, seen["wanted"])
    for way in ("other", "hooked"):  # a reference of another shape, a norm that has to be called
        torch.testing.assert_close(seen[way][0], seen["value"])
        assert seen[way][1] is None
    assert seen["called"]


@pytest.mark.parametrize("fused", [False, True])
def test_the_indicator_costs_no_pass_of_its_own(fused, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return relative_difference(*args, **kwargs)

    monkeypatch.setattr("maskaccel.state.stack.relative_difference", counted)
    model = dit()[0].transformer
    methods = [TeaCache(0.1, (1.0, 0.0))] + [FusedAdaLN()] * fused
    plain.patched(model, methods, plain.inputs(6), torch.tensor([3]))
    assert len(calls) == 1  # the first step, which has nothing to compare with


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel", "DiTTransformer2DModel"])
def test_the_time_tap_follows_the_timestep_alone(name):
    model, kwargs = MODELS[name]()
    tap = time_tap(stack_of(model).segments[0][0])
    first = _given_to_attention(model, kwargs, tap)["tap"]
    other = {**kwargs, "hidden_states": kwargs["hidden_states"] + 1}
    assert torch.equal(first, _given_to_attention(model, other, tap)["tap"])
    later = {**kwargs, "timestep": kwargs["timestep"] * 0.5}
    assert not torch.equal(first, _given_to_attention(model, later, tap)["tap"])


def rescaled(feature, before, polynomial):
    moved = ((feature - before).abs().mean() / before.abs().mean()).item()
    return sum(c * moved**k for k, c in enumerate(reversed(polynomial)))


def papers_loop(features, polynomial, threshold):
    """Distances, polynomial, accumulation and reset as the paper's code has them; first and last step computed."""
    letters, total, before = "", 0.0, None
    for step, feature in enumerate(features):
        if step in (0, len(features) - 1):
            compute, total = True, 0.0
        else:
            total += rescaled(feature, before, polynomial)
            compute = total >= threshold
            total = 0.0 if compute else total
        before = feature
        letters += "C" if compute else "."
    return letters


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("polynomial", [(1.0, 0.0), (3.0, 0.5, 0.02), "lumina2"], ids=str)
@pytest.mark.parametrize("tap", ["modulated", "time"])
def test_the_rule_against_a_plain_loop(tap, polynomial, fused):
    model, labels, calls = dit()[0].transformer, torch.tensor([3]), plain.inputs(10)
    norm, features = model.transformer_blocks[0].norm1, []
    with torch.no_grad():
        for x, t in calls:
            time = norm.emb.timestep_embedder(norm.emb.time_proj(t))
            silu = torch.nn.functional.silu(time + norm.emb.class_embedder(labels))
            shift, scale = norm.linear(silu).chunk(6, dim=1)[:2]
            hidden = torch.nn.functional.layer_norm(model.pos_embed(x), (32,), eps=norm.norm.eps)
            features.append(time if tap == "time" else hidden * (1 + scale[:, None]) + shift[:, None])
    coefficients = POLYNOMIALS.get(polynomial, polynomial)
    found = []
    typical = sum(rescaled(a, b, coefficients) for a, b in zip(features[1:], features)) / (len(features) - 1)
    for threshold in (0.5 * abs(typical), 1.5 * abs(typical), 3.5 * abs(typical)):
        letters = papers_loop(features, coefficients, threshold)
        method = TeaCache(threshold, polynomial, tap=tap)
        got, activity = plain.patched(model, [method] + [FusedAdaLN()] * fused, calls, labels)
        assert activity["steps"] == letters
        want = plain.held(model, calls, labels, [letter == "C" for letter in letters])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        found.append(letters)
    if polynomial != "lumina2":
        assert len(set(found)) > 1, f"the thresholds make no difference: {found}"


@pytest.mark.filterwarnings("ignore:.*can never reuse")
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("tap", ["modulated", "time"])
def test_pipelines(name, tap):
    pipeline, kwargs = PIPELINES[name]()
    plain_result = sample(pipeline, kwargs)
    with maskaccel.patch(pipeline, [TeaCache(threshold=0, tap=tap)]):
        assert torch.equal(sample(pipeline, kwargs), plain_result)
    with maskaccel.patch(pipeline, TeaCache(threshold=1e9, polynomial=(1.0, 0.0), tap=tap)) as patch:
        sample(pipeline, kwargs)
        lines = [line for key, line in patch.report().activity["TeaCache"].items() if key.startswith("steps")]
    assert lines and set(lines) == {"C....C"}
    assert torch.equal(sample(pipeline, kwargs), plain_result)


def test_the_fit_of_the_class_and_the_note_where_there_is_none(tmp_path):
    assert TeaCache().signal_for("FluxTransformer2DModel").polynomial == POLYNOMIALS["flux"]
    assert TeaCache(tap="time").signal_for("FluxTransformer2DModel").polynomial == ()
    assert not maskaccel.patch(flux()[0], TeaCache()).report().notes
    (note,) = maskaccel.patch(dit()[0], TeaCache()).report().notes
    assert "no polynomial for DiTTransformer2DModel" in note
    made = Calibration.make("teacache", "DiTTransformer2DModel", 2, 9, {"polynomial": [2.0, 0.5], "tap": "modulated"})
    made.save(tmp_path / "fit.json")
    assert TeaCache(polynomial=tmp_path / "fit.json").signal.polynomial == (2.0, 0.5)
    with pytest.raises(ValueError, match="tap='modulated', the method watches tap='time'"):
        TeaCache(polynomial=made, tap="time")


def test_an_unknown_block_points_to_fbcache():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = torch.nn.Identity()

        def forward(self, hidden_states):
            return hidden_states + self.attn(hidden_states)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(), Block()])

        def forward(self, hidden_states):
            for block in self.blocks:
                hidden_states = block(hidden_states)
            return hidden_states

    for tap, message in (("modulated", "modulated input of a Block"), ("time", "given no time embedding")):
        model = Model()
        with pytest.raises(maskaccel.PatchError, match=f"{message}.*FBCache"):
            maskaccel.patch(model, TeaCache(tap=tap))
        assert "forward" not in model.__dict__


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TeaCache(threshold=-1), "threshold=-1"),
        (lambda: TeaCache(tap="hidden"), "tap='hidden'"),
        (lambda: TeaCache(first=0), "first=0"),
        (lambda: TeaCache(polynomial=(1.0, float("nan"))), "polynomial="),
        (lambda: TeaCache(reduce="median"), "reduce='median'"),
    ],
)
def test_bad_fields(make, message):
    with pytest.raises(ValueError, match=message):
        make()
