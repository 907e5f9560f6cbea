"""Models that papers make of a DiT: other feed-forwards, quantised or adapted layers, pruned heads and depth, hooks.

Each is a change to a model that patches serve; patched, it must be exact as the model itself is.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from zoo import dit_original, flux, sd3, wan
from zoo.common import Built, check_parity, made, randn, run

import maskaccel
from maskaccel.methods import FusedAdaLN


class Quantised(nn.Module):
    """A linear layer with 4-bit weights and 8-bit activations, each token and output channel with a scale (DiTAS)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 7
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        # Values, not gradients, are rounded; in float64 whatever the dtype, so that rounding falls alike in all.
        step = x.detach().double().abs().amax(dim=-1, keepdim=True).clamp_min(1e-9) / 127
        rounded = x + ((x.detach().double() / step).round() * step).to(x.dtype) - x.detach()
        return functional.linear(rounded, self.codes.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class WeightOnly(Quantised):
    """4-bit weights alone."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Experts(nn.Module):
    """Two experts and a shared one in the place of a feed-forward: each token takes what its gate says (DiT-MoE)."""

    def __init__(self, shared: nn.Module, width: int) -> None:
        super().__init__()
        self.shared, self.gate = shared, nn.Linear(width, 2)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        weights = self.gate(x).softmax(dim=-1)
        mixed = sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts))
        return self.shared(x) + mixed


class Adapter(nn.Module):
    """A layer with a low-rank term and a scale of its own beside it (Diffscaler)."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.down, self.up = inner, nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)
        self.scale = nn.Parameter(torch.full((width,), 1.25))

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return self.inner(x, *args, **kwargs) * self.scale + self.up(self.down(x))


def replaced(model: nn.Module, wanted: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """The model with the modules that `wanted(name, module)` gives in the place of its own."""
    torch.manual_seed(5)
    for name, module in list(model.named_modules()):
        new = wanted(name, module)
        if new is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new.eval())
    return model


def quantised(kind: type[Quantised]) -> Callable[[], Built]:
    def build() -> Built:
        model, inputs = flux.flux()
        blocks = ("transformer_blocks", "single_transformer_blocks")
        swap = lambda name, m: kind(m) if isinstance(m, nn.Linear) and name.startswith(blocks) else None  # noqa: E731
        return replaced(model, swap), inputs

    return build


def experts() -> Built:
    model, inputs = sd3.sd3()
    width = model.inner_dim
    return replaced(model, lambda name, m: Experts(m, width) if name.endswith(".ff") else None), inputs


def experts_of_the_original() -> Built:
    model, inputs = dit_original.dit()
    width = model.blocks[0].attn.proj.out_features
    return replaced(model, lambda name, m: Experts(m, width) if name.endswith(".mlp") else None), inputs


def adapted() -> Built:
    model, inputs = dit_original.dit()
    width = model.blocks[0].attn.proj.out_features
    return replaced(model, lambda name, m: Adapter(m, width) if name.endswith((".mlp", ".attn")) else None), inputs


def shallower() -> Built:
    """Every other block cut out (TinyFusion, PPCL)."""
    model, inputs = flux.flux()
    model.transformer_blocks = model.transformer_blocks[::2]
    model.single_transformer_blocks = model.single_transformer_blocks[::2]
    return model, inputs


def pruned_heads() -> Built:
    """Three heads of 12 in a model 36 wide (EcoDiff): no multiple of a vector, and an odd number of heads."""
    from diffusers import SD3Transformer2DModel

    model = made(
        SD3Transformer2DModel, sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=12,
        num_attention_heads=3, joint_attention_dim=20, caption_projection_dim=36, pooled_projection_dim=12,
        out_channels=4, pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    return model, {
        "hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(2, 5, 20, seed=1),
        "pooled_projections": randn(2, 12, seed=2), "timestep": torch.tensor([100.0, 700.0]),
    }  # fmt: skip


def extended_rope() -> Built:
    """Positions of injected tokens that lie beyond the grid, in a rotary embedding of another kind (GenCompositor)."""
    model, inputs = flux.flux()
    inner = model.pos_embed

    class Extended(nn.Module):
        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            return inner(ids * 1.5 + torch.tensor([0.0, 40.0, 0.0]))

    model.pos_embed = Extended()
    return model, inputs


CHANGED = {
    "4-bit weights": (quantised(WeightOnly), {"fused block": 4}),
    "experts": (experts, {"fused block": 3}),
    "experts of the original code": (experts_of_the_original, {}),
    "adapters": (adapted, {}),
    "fewer blocks": (shallower, {"fused block": 2}),
    "three heads of 12": (pruned_heads, {"fused block": 2}),
    "another rotary embedding": (extended_rope, {"fused block": 4}),
}


@pytest.mark.parametrize("name", CHANGED)
def test_changed_models_stay_exact(name) -> None:
    build, expect = CHANGED[name]
    check_parity(build, expect=expect, skipped=3)


def test_8_bit_activations() -> None:
    """Activations next to a rounding border may fall on its other side, so the outputs agree to a step of 8 bits."""
    model, inputs = quantised(Quantised)()
    want = run(model, inputs)
    with maskaccel.patch(model, FusedAdaLN()) as patch:
        got = run(model, inputs)
        assert sum(count for (_, _, action), count in patch.report().sites.items() if action == "fused block") == 4
    for mine, theirs in zip(got, want, strict=True):
        assert (mine - theirs).abs().max() <= theirs.abs().max() / 127


@pytest.mark.parametrize("build", [dit_original.dit, sd3.sd3, flux.flux, wan.wan], ids=lambda build: build.__name__)
def test_hooks_on_modules_see_what_they_saw(build) -> None:
    """Hooks that read or change activations (TIDE's sparse autoencoders) of blocks, attention and feed-forwards."""
    model, inputs = build()
    watched = [n for n, m in model.named_modules() if n.endswith((".attn", ".attn1", ".ff", ".ffn", ".mlp"))]
    watched += [
        n for n, m in model.named_modules() if n.rpartition(".")[2].isdigit() and "block" in n.rpartition(".")[0]
    ]
    watched = [n for n in watched if n.count(".") <= 2]
    seen: dict[str, list[Tensor]] = {}

    def change(name: str) -> Callable[..., object]:
        def hook(module: nn.Module, args: object, out: object) -> object:
            parts = out if isinstance(out, tuple) else (out,)
            seen.setdefault(name, []).extend(part.clone() for part in parts if part is not None)
            changed = tuple(None if part is None else part * 1.125 for part in parts)
            return changed if isinstance(out, tuple) else changed[0]

        return hook

    handles = [model.get_submodule(n).register_forward_hook(change(n)) for n in watched]
    want = run(model, inputs)
    plain, seen = seen, {}
    with maskaccel.patch(model, FusedAdaLN()):
        got = run(model, inputs)
    for handle in handles:
        handle.remove()
    assert len(watched) >= 4 and seen.keys() == plain.keys()
    for name, values in plain.items():
        for mine, theirs in zip(seen[name], values, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
