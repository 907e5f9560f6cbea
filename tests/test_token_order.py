"""One permutation for a whole model: the blocks run in the order of patches, and the model's result is the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo.all_models import MODELS
from zoo.common import run, run_with_gradients

import maskaccel
from maskaccel import methods as m
from maskaccel.masks import TokenOrder
from maskaccel.patching.attention import AttentionCall, attention_sites, bridge
from maskaccel.patching.order import order_stack, ordered_calls


class Watch:
    """Runs the model in the order of patches of two; its policy leaves attention alone and notes the order."""

    kind, models, name = "exact", "any", "Watch"

    def __init__(self) -> None:
        self.orders: list[TokenOrder | None] = []

    def attach(self, context: Any) -> None:
        for site in attention_sites(context, self.name, ("self", "joint")):
            bridge(context, self.name, site, self)
        self.reason = order_stack(
            context, self.name, lambda grid: (1,) * (len(grid) - 1) + (2,) if min(grid) > 1 else None
        )

    def __call__(self, call: AttentionCall) -> Tensor | None:
        self.orders.append(call.order)
        return None

    def activity(self, model: nn.Module) -> dict[str, Any]:
        return {}


# Models that run in raster order: their blocks cannot be followed, or the grid of their tokens is not known or a line.
RASTER = {
    "AceStepTransformer1DModel", "AnyFlowFARTransformer3DModel", "Cosmos3OmniTransformer",
    "DualTransformer2DModel", "ErnieImageTransformer2DModel", "HeliosTransformer3DModel",
    "HunyuanVideo15Transformer3DModel", "HunyuanVideoFramepackTransformer3DModel",
    "Ideogram4Transformer2DModel", "JoyImageEditPlusTransformer3DModel", "Kandinsky6SRTransformer3DModel",
    "Krea2Transformer2DModel", "LatteTransformer3DModel", "LongCatAudioDiTTransformer",
    "Lumina2Transformer2DModel", "MiniMaxH3Transformer3DModel", "MiniMaxMusic3RVQDepthDecoder",
    "MiniMaxMusic3Transformer1DModel", "PriorTransformer", "RFD4ProteinaTransformer",
    "SanaWMLTX2RefinerTransformer3DModel", "StableAudio3DiTModel", "StableAudioDiTModel",
    "TransformerTemporalModel", "WanAnimate2Transformer3DModel", "WanVACETransformer3DModel",
    "ZImageTransformer2DModel",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_in_another_order_is_the_same_model(name) -> None:
    model, inputs = MODELS[name]()
    with torch.no_grad():
        before = run(model, inputs)
        watch = Watch()
        try:
            patch = maskaccel.patch(model, [watch])
        except maskaccel.PatchError:
            pytest.skip("no attention of it can be taken over")
        with patch:
            after = run(model, inputs)
            stack = ordered_calls(model)
            ordered = stack is not None and stack.calls > 0
        again = run(model, inputs)
    for mine, theirs, restored in zip(after, before, again, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=2e-4)
        assert torch.equal(restored, theirs)
    assert ordered == (name not in RASTER)
    # the attentions of the latent tokens know that they are in order
    assert ordered == any(order is not None and not order.is_raster for order in watch.orders)


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel"])
def test_gradients(name) -> None:
    model, inputs = MODELS[name]()
    before = run_with_gradients(model, inputs)
    with maskaccel.patch(model, [Watch()]):
        after = run_with_gradients(model, inputs)
    for mine, theirs in zip(_tensors(after), _tensors(before), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    values = found.values() if isinstance(found, dict) else found
    return [t for value in values if value is not None for t in _tensors(value)]


@pytest.mark.parametrize(
    "others", [[], [m.FusedAdaLN()], [m.TaylorSeer(interval=2)], [m.FusedAdaLN(), m.FORA(interval=2)]]
)
def test_a_windowed_model_puts_its_tokens_in_order_once(others) -> None:
    """CLEAR over all of the image, with methods beside it: as without; with a window, as if each attention ordered."""
    model, inputs = MODELS["FluxTransformer2DModel"]()
    wide, narrow = (m.CLEAR(radius=radius, patch=(2, 2), block=(16, 32)) for radius in (1000.0, 1.5))

    def outputs(chosen: list) -> list[Tensor]:
        with torch.no_grad(), maskaccel.patch(model, chosen) as patch, patch.generation(4) as steps:
            found = []
            for _ in range(4):
                found += run(model, inputs)
                steps.step()
            report = patch.report().activity.get("CLEAR")
            assert report is None or report["model calls in order"] > 0
        return found

    plain = outputs(others) if others else run(model, inputs) * 4
    for mine, theirs in zip(outputs([*others, wide]), plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=2e-4)
    for chosen in ([*others, narrow], [narrow, *others]):
        windowed = outputs(chosen)
        assert not torch.allclose(windowed[0], plain[0], atol=1e-3)
        _Stay.calls = 0
        for mine, theirs in zip(windowed, outputs([*others, _stay(narrow)]), strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=2e-4)


class _Stay(m.CLEAR):
    """The same, with the model in raster order: each attention orders its tokens."""

    name = "Stay"
    calls = 0

    def patch_for(self, grid: tuple[int, ...]) -> None:
        return None


def _stay(method: m.CLEAR) -> _Stay:
    return _Stay(radius=method.radius, patch=method.patch, block=method.block)


def test_what_cannot_be_told_apart_stays_in_raster_order() -> None:
    model, inputs = MODELS["DiTTransformer2DModel"]()
    latents = inputs["hidden_states"]
    tokens = math.prod(latents.shape[2:]) // model.config.patch_size**2
    many = {k: v[:1].expand(tokens, *v.shape[1:]) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with torch.no_grad():
        before = run(model, many)
        with maskaccel.patch(model, [Watch()]):
            after = run(model, many)
            stack = ordered_calls(model)
    assert stack is not None
    assert stack.calls == 0
    assert stack.left is not None
    assert "cannot be told apart" in stack.left
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("cache", [m.SpeCa(), m.FBCache(threshold=0.5)], ids=lambda method: method.name)
@pytest.mark.parametrize("ordered_first", [False, True])
def test_tokens_are_put_back_where_a_cache_skips_the_last_block(cache, ordered_first) -> None:
    model, inputs = MODELS["DiTTransformer2DModel"]()
    wide = m.CLEAR(radius=1000.0, patch=(2, 2), block=(16, 32))

    def outputs(chosen: list) -> list[Tensor]:
        found = []
        with torch.no_grad(), maskaccel.patch(model, chosen) as patch, patch.generation(6) as steps:
            for step in range(6):
                found += run(model, {**inputs, "hidden_states": inputs["hidden_states"] + 0.01 * step})
                steps.step()
            assert patch.report().activity[cache.name]["reused"] > 0
        return found

    chosen = [wide, cache] if ordered_first else [cache, wide]
    for mine, theirs in zip(outputs(chosen), outputs([cache]), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=2e-4)


def test_control_residuals_keep_the_raster_order_however_they_are_given() -> None:
    model, inputs = MODELS["SD3Transformer2DModel"]()
    names = list(inputs)
    with torch.no_grad():
        hidden = model.pos_embed(inputs["hidden_states"])
        control = [torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))]
        before = model(**inputs, block_controlnet_hidden_states=control).sample
        with maskaccel.patch(model, [Watch()]):
            given = [
                inputs[name] for name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
            ]
            assert len(given) == len(names), names
            after = model(*given, control).sample
            stack = ordered_calls(model)
    assert stack is not None
    assert stack.calls == 0
    torch.testing.assert_close(after, before, atol=2e-4, rtol=2e-4)
