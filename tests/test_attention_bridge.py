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
# Attention whose mask is a flex BlockMask stays the model's own.
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

    def policy(call: AttentionCall) -> Tensor:
        called.add(call.site.name)
        return plain(call)

    probe = Probe(policy)
    if name in UNREACHED:
        with pytest.raises(PatchError, match=UNREACHED[name]):
            maskaccel.patch(model, probe)
        return
    with maskaccel.patch(model, probe) as patch:
        assert all(map(torch.equal, run(model, inputs), before))
        activity = patch.report().activity["Probe"]
    idle = {site.name for site in probe.sites} - called
    assert all(IDLE.get(name, "flex") in site for site in idle) or name in FLEX, idle
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
