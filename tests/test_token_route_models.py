"""Spans of every transformer class of diffusers: the same as the span on all tokens with the dropped keys hidden.

Every sample keeps other tokens. What a block is given for each token (rotary tables, modulation, masks) has to follow
them, or the two differ.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _masked_dense import MaskedDense, SpanOf, alike, different
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor
from zoo import qwen
from zoo.all_models import MODELS
from zoo.common import Built, made, randn, run, run_with_gradients

import maskaccel
from maskaccel import methods as m
from maskaccel.masks import TokenIndex
from maskaccel.models import stack_of
from maskaccel.models._per_sample import SampleTables
from maskaccel.patching import _follow

_JOINED = "where its text is among the latent tokens differs from call to call"
_CONVOLUTION = "convolves over the grid"
REFUSED = {
    "AnyFlowFARTransformer3DModel": "key-value cache",
    "Cosmos3OmniTransformer": _JOINED,
    "DualTransformer2DModel": "no loop over a list of blocks",
    "ErnieImageTransformer2DModel": "its tokens are the first dim",
    "HeliosTransformer3DModel": "frames of its history",
    "HunyuanVideoFramepackTransformer3DModel": "frames of its history",
    "Ideogram4Transformer2DModel": _JOINED,
    "Kandinsky6SRTransformer3DModel": "tiles of the grid",
    "LatteTransformer3DModel": "puts frames into the batch",
    "MiniMaxH3Transformer3DModel": _JOINED,
    "MiniMaxMusic3RVQDepthDecoder": "levels of one code",
    "PriorTransformer": _JOINED,
    "RFD4ProteinaTransformer": "more than once",
    "SanaTransformer2DModel": _CONVOLUTION,
    "SanaVideoTransformer3DModel": _CONVOLUTION,
    "SanaWMTransformer3DModel": _CONVOLUTION,
    "TransformerTemporalModel": "frames of one place",
    "WanAnimate2Transformer3DModel": "key-value cache",
}
SERVED = sorted(set(MODELS) - set(REFUSED))
UNJUDGED = {"T5FilmDecoder"}  # its attention cannot be given a mask of keys
ONE_SAMPLE = {"JoyImageEditPlusTransformer3DModel", "Lumina2Transformer2DModel"}
BY_SAMPLE = {"AllegroTransformer3DModel"}  # looks its tables up at positions
# The last blocks of Motif attend to what the others made of all latent tokens.
LAST = {"MotifVideoTransformer3DModel": -2}


def built(name: str) -> Built:
    """The model of a class, and a call with two samples."""
    model, inputs = MODELS[name]()
    if name == "ZImageTransformer2DModel":  # samples of one size: of others it is not known where the text begins
        inputs["x"] = [randn(4, 1, 8, 16, seed=i) for i in range(2)]
    if name in ONE_SAMPLE:
        return model, {key: value[:1] if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return model, {key: _two(key, value) for key, value in inputs.items()}


def _two(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != 1:
        return value
    other = randn(*value.shape, seed=5).to(value.dtype) if value.is_floating_point() and value.dim() > 2 else value
    return torch.cat([value, value if "mask" in name or "ids" in name else other])


def compare(
    built: Built, end: int = -1, others: Any = (), grads: bool = True, choose: Any = different
) -> tuple[SpanOf, int]:
    """A span against the oracle; the span, and how many calls of blocks ran by sample."""
    model, inputs = built
    oracle, span = MaskedDense(0, end, choose), SpanOf(0, end, choose)
    call = run_with_gradients if grads else lambda model, inputs: (run(model, inputs), {})
    with maskaccel.patch(model, [oracle]):
        want, wanted = call(model, inputs)
    assert oracle.masked
    with maskaccel.patch(model, [*others, span]) as patch:
        got, found = call(model, inputs)
        slow = patch.report().activity["SpanOf"].get("block calls by sample (slower)", 0)
    plain = run(model, inputs)
    assert not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, plain, strict=True))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert set(found) == set(wanted)
    largest = max((g.abs().max().item() for g in wanted.values() if g.numel()), default=0.0)
    for key, theirs in wanted.items():
        torch.testing.assert_close(
            found[key], theirs, atol=1e-5 * largest, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}"
        )
    return span, slow


@pytest.mark.parametrize("name", sorted(set(SERVED) - UNJUDGED))
def test_a_span_is_the_dense_span_with_dropped_keys_hidden(name) -> None:
    span, slow = compare(built(name), LAST.get(name, -1))
    assert bool(slow) == (name in BY_SAMPLE)
    ((batch, *_),) = set(span.seen)
    assert batch == (1 if name in ONE_SAMPLE else 2)


@pytest.mark.parametrize("name", sorted(set(SERVED) - UNJUDGED - ONE_SAMPLE))
def test_samples_may_keep_the_same_tokens(name) -> None:
    _, slow = compare(built(name), LAST.get(name, -1), grads=False, choose=alike)
    assert slow == 0


@pytest.mark.parametrize("name", sorted(set(SERVED) - UNJUDGED - ONE_SAMPLE))
def test_tables_as_compiled_blocks_take_them(name, monkeypatch) -> None:
    """As objects that are no tensors, or samples one by one: the same as above."""
    model, inputs = built(name)
    compiled = all(
        type(block).__name__ in _follow._COMPILED for segment in stack_of(model).segments for block in segment
    )
    with maskaccel.patch(model, [SpanOf(0, LAST.get(name, -1))]) as patch:
        want = run(model, inputs)
        if compiled:
            monkeypatch.setattr(_follow, "tables_for", lambda block: SampleTables)
            torch.testing.assert_close(run(model, inputs), want, atol=1e-5, rtol=1e-4)
            assert "block calls by sample (slower)" not in patch.report().activity["SpanOf"]
        monkeypatch.setattr(_follow, "tables_for", lambda block: None)
        torch.testing.assert_close(run(model, inputs), want, atol=1e-5, rtol=1e-4)


def test_compiled_blocks_are_whole_graphs_with_tables_of_each_sample() -> None:
    model, inputs = built("FluxTransformer2DModel")
    with maskaccel.patch(model, [SpanOf(0, -1)]) as patch:
        want = run(model, inputs)
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        got = run(model, inputs)
        assert "block calls by sample (slower)" not in patch.report().activity["SpanOf"]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["CogVideoX", "Flux", "HunyuanVideo", "SD3", "Wan", "ZImage"])
def test_checkpointing_of_diffusers_changes_nothing(name) -> None:
    """Tables of each sample, text beside the tokens, residuals between blocks: recomputed as they were."""
    model, inputs = built(next(full for full in SERVED if full.startswith(f"{name}Transformer")))
    with maskaccel.patch(model, [SpanOf(0, -1)]):
        want, wanted = run_with_gradients(model, inputs)
        model.enable_gradient_checkpointing()
        got, found = run_with_gradients(model, inputs)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SERVED)
def test_a_span_of_all_tokens_is_the_model(name) -> None:
    model, inputs = built(name)
    before = run(model, inputs)
    span = SpanOf(0, LAST.get(name, -1), lambda batch, tokens, device: TokenIndex.all(tokens))
    with maskaccel.patch(model, [span]):
        after = run(model, inputs)
    assert span.seen
    for mine, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert all(map(torch.equal, run(model, inputs), before))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_classes_that_are_refused_and_why(name) -> None:
    model, _ = MODELS[name]()
    before = {id(module): set(module.__dict__) for module in model.modules()}
    with pytest.raises(maskaccel.PatchError, match=REFUSED[name]):
        maskaccel.patch(model, [SpanOf(0, -1)])
    assert all(set(module.__dict__) == before[id(module)] for module in model.modules())


def test_blocks_that_attend_to_all_tokens_of_others_are_refused() -> None:
    model, _ = MODELS["MotifVideoTransformer3DModel"]()
    with pytest.raises(maskaccel.PatchError, match="attends to all latent tokens of other blocks"):
        maskaccel.patch(model, [SpanOf(0, -1)])


def test_samples_of_different_sizes_are_refused_when_called() -> None:
    for name, message in [
        ("Lumina2Transformer2DModel", "it cannot be told which rows are latent tokens"),
        ("ZImageTransformer2DModel", "the grid of the latent tokens is not known"),
    ]:
        model, inputs = MODELS[name]()
        with maskaccel.patch(model, [SpanOf(0, -1)]), pytest.raises(ValueError, match=message):
            run(model, inputs)


FUSED = ("Flux", "Wan", "QwenImage", "LTXVideo", "ZImage", "SD3", "Lumina2")


@pytest.mark.parametrize("name", [name for name in MODELS if name.removesuffix("Model")[:-13] in FUSED])
def test_fused_blocks_and_processors_take_tables_for_each_sample(name) -> None:
    _, slow = compare(built(name), others=[m.FusedAdaLN()])
    assert slow == 0


# ------------------------------------------------------------------------------- what else follows the tokens


def flux_control() -> Built:
    """Control residuals of all tokens, added between blocks."""
    model, inputs = MODELS["FluxTransformer2DModel"]()
    rows = inputs["hidden_states"].shape[1]
    width = model.inner_dim
    return model, {
        **inputs,
        "controlnet_block_samples": [randn(2, rows, width, seed=3)],
        "controlnet_single_block_samples": [randn(2, rows, width, seed=4)],
    }


def sd3_control() -> Built:
    model, inputs = MODELS["SD3Transformer2DModel"]()
    return model, {**inputs, "block_controlnet_hidden_states": [randn(2, 12, 32, seed=3)]}


def wan_timesteps() -> Built:
    """A timestep, and so a modulation, for each token."""
    model, inputs = MODELS["WanTransformer3DModel"]()
    return model, {**inputs, "timestep": 900 * torch.rand(2, 18, generator=torch.Generator().manual_seed(3))}


def ltx_timesteps() -> Built:
    model, inputs = MODELS["LTXVideoTransformer3DModel"]()
    return model, {**inputs, "timestep": 900 * torch.rand(2, 18, generator=torch.Generator().manual_seed(3))}


def hunyuan_first_frame() -> Built:
    """The first frame is modulated by itself: its tokens are counted."""
    model, inputs = built("HunyuanVideoTransformer3DModel")
    config = {**model.config, "image_condition_type": "token_replace"}
    names = {key: value for key, value in config.items() if not key.startswith("_")}
    return made(HunyuanVideoTransformer3DModel, **names), inputs


@pytest.mark.parametrize(
    "build", [flux_control, sd3_control, wan_timesteps, ltx_timesteps, hunyuan_first_frame, qwen.qwen_edit]
)
def test_what_a_call_has_for_each_token_follows(build, monkeypatch) -> None:
    compare(build())
    monkeypatch.setattr(_follow, "tables_for", lambda block: None)
    compare(build(), grads=False)


def test_a_span_in_the_middle_of_two_kinds_of_blocks() -> None:
    """From the second double block of Flux.2 to its first single one: text joins the stream inside of the span."""
    model, inputs = built("Flux2Transformer2DModel")
    oracle, span = MaskedDense(1, 2), SpanOf(1, 2)
    with torch.no_grad():
        with maskaccel.patch(model, [oracle]):
            want = run(model, inputs)
        with maskaccel.patch(model, [span]):
            got = run(model, inputs)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_nothing_of_a_call_is_told_by_its_batch() -> None:
    """As many samples as latent tokens, or as text and latent ones: the names of tables tell."""
    for name, count in [("DiTTransformer2DModel", 16), ("FluxTransformer2DModel", 15), ("FluxTransformer2DModel", 21),
                        ("WanTransformer3DModel", 18), ("LTXVideoTransformer3DModel", 18)]:  # fmt: skip
        model, inputs = MODELS[name]()
        many = {
            key: value[torch.arange(count) % 2] if isinstance(value, Tensor) and value.shape[:1] == (2,) else value
            for key, value in inputs.items()
        }
        compare((model, many), grads=False)
