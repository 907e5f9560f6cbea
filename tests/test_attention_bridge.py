"""Taking over the attention of models: every attention of every transformer of diffusers, and plain modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.all_models import MODELS
from zoo.common import randn, run

import maskaccel
from maskaccel.masks import TileMask
from maskaccel.models._joint import text_first
from maskaccel.models._tokens import tokens_of
from maskaccel.ops import tile_attention
from maskaccel.patching.attention import (
    KINDS,
    AttentionCall,
    AttentionSite,
    attention_activity,
    attention_sites,
    bridge,
)
from maskaccel.patching.transaction import PatchError

ALL = tuple(KINDS)

# Softmax attention by hand: neither torch's function nor diffusers' is called.
UNREACHED = {"T5FilmDecoder": "AttnProcessor.__call__ calls no scaled_dot_product_attention"}
# Attention that these calls do not reach: other modes, sound without sound.
IDLE = {
    "Flux3Transformer2DModel": "image_cond",
    "SanaWMTransformer3DModel": "cam_attn",
    "SanaWMLTX2RefinerTransformer3DModel": "audio",
}
# Attention whose mask is a flex BlockMask: the policies here leave it dense.
FLEX = ("AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel")


class Probe:
    """A method that gives every site of some kinds one policy."""

    kind, models = "exact", "any"

    def __init__(self, policy: Any, kinds: Any = ALL, grid: Any = None, name: str = "Probe") -> None:
        self.policy, self.kinds, self.grid, self.name = policy, kinds, grid, name
        self.sites: list[AttentionSite] = []

    def attach(self, context: Any) -> None:
        self.sites = attention_sites(context, self.name, self.kinds)
        for site in self.sites:
            bridge(context, self.name, site, self.policy, grid=self.grid)

    def activity(self, model: nn.Module) -> dict[str, Any]:
        return attention_activity(model, self.name)


def heads_first(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    return call.q.transpose(1, 2), call.k.transpose(1, 2), call.v.transpose(1, 2)


def plain(call: AttentionCall, mask: Any = "the model's") -> Tensor:
    """torch's attention on what the policy is given."""
    mask = call.mask if mask == "the model's" else mask
    out = F.scaled_dot_product_attention(
        *heads_first(call), attn_mask=mask, dropout_p=call.dropout_p, is_causal=call.is_causal, scale=call.scale,
        enable_gqa=call.enable_gqa,
    )  # fmt: skip
    return out.transpose(1, 2)


# ------------------------------------------------------------------------------------------------ every model


@pytest.mark.parametrize("name", MODELS)
def test_a_policy_that_computes_plain_attention_changes_nothing(name):
    model, inputs = MODELS[name]()
    before, held = run(model, inputs), dict(model.__dict__)
    called: set[str] = set()

    def policy(call: AttentionCall) -> Tensor | None:
        called.add(call.site.name)
        return None if "BlockMask" in (call.refusal() or "") else plain(call)

    probe = Probe(policy)
    if name in UNREACHED:
        with pytest.raises(PatchError, match=UNREACHED[name]):
            maskaccel.patch(model, probe)
        return
    with maskaccel.patch(model, probe) as patch:
        assert all(map(torch.equal, run(model, inputs), before))
        activity = patch.report().activity["Probe"]
    idle = {site.name for site in probe.sites} - called
    assert all(name in IDLE and IDLE[name] in site for site in idle), idle
    assert activity["left dense"] == 0 or name in FLEX
    assert all(map(torch.equal, run(model, inputs), before))
    assert model.__dict__.keys() == held.keys() and not any(
        "maskaccel" in key for m in model.modules() for key in vars(m)
    )


def _kept(call: AttentionCall) -> Tensor:
    """A random element mask that keeps the first key of every row, the same in every call of a site."""
    queries, keys = call.q.shape[1], call.k.shape[1]
    kept = randn(queries, keys, seed=queries + 7 * keys + call.site.layer) > 0.3
    kept[:, 0] = True
    return kept


def tiled(call: AttentionCall) -> Tensor | None:
    if call.refusal() is not None:
        return None
    return tile_attention(call.q, call.k, call.v, scale=call.scale, bias=call.bias())


def tiled_and_masked(call: AttentionCall) -> Tensor | None:
    if call.refusal() is not None:
        return None
    kept = _kept(call)
    mask = TileMask.from_bool(kept[None, None], block=(16, 32))
    return tile_attention(call.q, call.k, call.v, mask, scale=call.scale, bias=call.bias())


def masked_by_torch(call: AttentionCall) -> Tensor | None:
    """What `tiled_and_masked` is to give."""
    if call.refusal() is not None:
        return None
    mask, kept = call.mask, _kept(call)
    if mask is None or mask.dtype == torch.bool:
        return plain(call, kept if mask is None else kept & mask)
    return plain(call, mask.masked_fill(~kept, -torch.inf))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in UNREACHED])
def test_tile_attention_in_every_model(name):
    model, inputs = MODELS[name]()
    with maskaccel.patch(model, Probe(masked_by_torch)) as patch:
        masked = run(model, inputs)
    with maskaccel.patch(model, Probe(tiled_and_masked)):
        for got, expected in zip(run(model, inputs), masked, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-4)
    unmasked = run(model, inputs)
    with maskaccel.patch(model, Probe(tiled)):
        for got, expected in zip(run(model, inputs), unmasked, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-4)
    activity = patch.report().activity["Probe"]
    if activity["left dense"] < activity["attention calls"]:
        assert any(not torch.equal(a, b) for a, b in zip(masked, unmasked, strict=True)), "the mask changed nothing"


# ------------------------------------------------------------------------------------------------ what a call tells

# Axes of the grid in the latents, where they are not those after the channels.
_AXES = {
    "AceStepTransformer1DModel": (1,), "LongCatAudioDiTTransformer": (1,), "StableAudioDiTModel": (2,),
    "StableAudio3DiTModel": (2,), "MiniMaxMusic3Transformer1DModel": (2,), "AnyFlowTransformer3DModel": (1, 3, 4),
    "CogVideoXTransformer3DModel": (1, 3, 4), "ConsisIDTransformer3DModel": (1, 3, 4),
    "Kandinsky5Transformer3DModel": (1, 2, 3), "Kandinsky6Transformer3DModel": (1, 2, 3),
}  # fmt: skip
# Packed latents, a token in each row.
_PACKED = {
    "BriaFiboTransformer2DModel": (3, 5), "BriaTransformer2DModel": (3, 5), "ChromaTransformer2DModel": (3, 5),
    "Flux2Transformer2DModel": (4, 4), "Flux3Transformer2DModel": (4, 4), "FluxTransformer2DModel": (3, 5),
    "Krea2Transformer2DModel": (2, 2), "LongCatImageTransformer2DModel": (3, 5),
    "LTX2VideoTransformer3DModel": (2, 4, 4), "LTXVideoTransformer3DModel": (2, 3, 3),
    "NucleusMoEImageTransformer2DModel": (4, 4), "OvisImageTransformer2DModel": (3, 5),
    "QwenImage21Transformer2DModel": (4, 4), "QwenImageTransformer2DModel": (4, 3),
}  # fmt: skip
# Something else than softmax attention mixes tokens: a norm over all of them, convolutions, pooled text.
_MIXED = (
    "DreamLite", "DualT", "HunyuanDiT", "LongCatAudioDiT", "LuminaNext", "MiniMaxMusic3Transformer1D", "Sana",
    "Transformer2D",
)  # fmt: skip
_WHOLE = {"LatteTransformer3DModel": (2, 4, 4)}  # attends within frames or along time only
# No grid: other data than latents, tokens in another order, or (Helios, Framepack) latents of several sizes.
_NO_GRID = (
    "AnyFlowFAR", "Cosmos3", "Helios", "Framepack", "Ideogram4", "JoyImageEditPlus", "Kandinsky6SR", "MiniMaxH3",
    "RVQ", "Prior", "RFD4", "Refiner", "Temporal", "WanAnimate2", "ZImage",
)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_and_blocks_agree_on_the_place_of_text(name):
    model, _ = MODELS[name]()
    told = {text_first(module) for module in model.modules()} - {None}
    assert told <= {tokens_of(model).text == "first"}


class Rows:
    """Records queries and keys, with what the call tells, and lets no attention mix tokens."""

    def __init__(self) -> None:
        self.calls: list[tuple[AttentionSite, Tensor, Tensor, Any, Any]] = []

    def __call__(self, call: AttentionCall) -> Tensor:
        self.calls.append((call.site, call.q.clone(), call.k.clone(), call.text, call.grid))
        return call.v.new_zeros(*call.q.shape[:3], call.v.shape[3])

    def of(self, model: nn.Module, inputs: dict[str, Any]) -> list[tuple[AttentionSite, Tensor, Tensor, Any, Any]]:
        """The attention calls of one call of the model."""
        self.calls = []
        run(model, inputs)
        return self.calls


def _changed(a: Tensor, b: Tensor) -> set[int]:
    """The tokens that differ in any sample."""
    rows = ((a - b).abs() > 1e-6).any(3).any(2).any(0)
    return set(rows.nonzero().flatten().tolist())


def _moved(value: Any) -> Any:
    return [_moved(value[0]), *value[1:]] if isinstance(value, list) else value + randn(*value.shape, seed=11)


def _mixed(name: str) -> bool:
    return name.startswith(_MIXED)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in UNREACHED])
def test_text_and_grid_are_where_the_tokens_are(name):
    """What calls tell is compared with which tokens change where the text, or one latent, is changed."""
    model, inputs = MODELS[name]()
    record = Rows()
    with maskaccel.patch(model, Probe(record)):
        base = record.of(model, inputs)
        _check_text(name, base, record, model, inputs)
        grids = {grid for site, *_, grid in base if site.kind in ("self", "joint")}
        if any(word in name for word in _NO_GRID):
            assert grids <= {None}, grids
        else:
            _check_grid(name, base, record, model, inputs)


def _check_text(name: str, base: list, record: Rows, model: nn.Module, inputs: dict[str, Any]) -> None:
    named = [k for k in inputs if k.startswith(("encoder_hidden_states", "cap_feats", "text_b")) and "mask" not in k]
    if not named or _mixed(name):
        return
    moved = record.of(model, {**inputs, **{key: _moved(inputs[key]) for key in named}})
    lengths = []
    for (site, _, keys, text, _), (_, _, others, _, _) in zip(base, moved, strict=True):
        if text is not None and site.kind in ("self", "joint"):
            start, length = text
            lengths.append(length)
            assert _changed(keys, others) <= set(range(start, start + length)), f"{site.name}: text={text}"
    assert any(lengths) or not any(text for site, _, _, text, _ in base if site.kind == "joint"), "no text was told"


def _check_grid(name: str, base: list, record: Rows, model: nn.Module, inputs: dict[str, Any]) -> None:
    latents = inputs["hidden_states"].clone()
    whole = _PACKED.get(name) or _WHOLE.get(name) or max((grid for *_, grid in base if grid is not None), key=len)
    # Not the last token, and not on the diagonal: axes that are swapped would be seen.
    position = [extent - 1 for extent in whole]
    position[-1] -= whole[-1] > 2
    if name in _PACKED:
        latents[:, _flat(position, whole)] += 1
    else:
        index: list[Any] = [slice(None)] * latents.ndim
        for axis, extent, at in zip(_AXES.get(name) or range(2, latents.ndim), whole, position, strict=True):
            index[axis] = at * (latents.shape[axis] // extent)
        latents[tuple(index)] += 1
    seen = 0
    moved = record.of(model, {**inputs, "hidden_states": latents})
    for (site, queries, keys, text, grid), (_, others, _, _, _) in zip(base, moved, strict=True):
        if grid is None or site.kind == "other" or _mixed(name):
            continue
        within = position if grid == whole else position[:1] if "temporal" in site.name else position[1:]
        before = text[1] if text[0] == 0 and queries.shape[1] == keys.shape[1] else 0
        assert _changed(queries, others) == {before + _flat(within, grid)}, f"{site.name}: grid={grid}"
        seen += 1
    assert seen or _mixed(name)


def _flat(position: list[int], grid: tuple[int, ...]) -> int:
    """The number of a token in row-major order."""
    number = 0
    for at, extent in zip(position, grid, strict=True):
        number = number * extent + at
    return number
