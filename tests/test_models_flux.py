"""The Flux family: fused blocks and attention; what patching promises about LoRA, hooks, copies, unknown versions."""

from __future__ import annotations

import copy
import inspect
import pickle
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _numerics import assert_close_to_truth
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import FirstBlockCacheConfig
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor, FluxTransformerBlock
from peft import LoraConfig
from torch import nn
from zoo import flux as zoo
from zoo.common import Built, as_dtype, check_parity, check_report, made, randn, run

import maskaccel
from maskaccel import PatchError
from maskaccel.methods import FORA, FusedAdaLN
from maskaccel.models import fingerprint

LORA = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}
LORA_TARGETS = ["to_q", "to_out.0", "add_k_proj", "linear", "ff.net.2", "proj_mlp", "proj_out"]


MODELS = [zoo.flux, zoo.chroma, zoo.bria, zoo.bria_fibo, zoo.longcat_image, zoo.ovis_image]


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_model_is_exact(build: Callable[[], Built]) -> None:
    check_parity(build, expect={"fused block": 4, "fused norm": 1, "fused QK norm and RoPE": 4})


@pytest.mark.parametrize("build", [zoo.wide_block, zoo.wide_single_block], ids=["dual", "single"])
def test_wide_block_is_exact(build: Callable[[], Built]) -> None:
    check_parity(build, expect={"fused block": 1, "fused QK norm and RoPE": 1})


def test_ip_adapter_output_is_added() -> None:
    def build() -> Built:
        block = made(FluxTransformerBlock, dim=32, num_attention_heads=2, attention_head_dim=16)
        torch.manual_seed(3)
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 24, scale=0.7))
        more = {"joint_attention_kwargs": {"ip_hidden_states": [randn(2, 4, 24, seed=5)]}}
        return block, {
            "hidden_states": randn(2, 9, 32), "encoder_hidden_states": randn(2, 5, 32, seed=1),
            "temb": randn(2, 32, seed=2), **more,
        }  # fmt: skip

    check_parity(build, expect={"fused block": 1, "fused QK norm and RoPE": 0})


def test_fused_projections() -> None:
    def build() -> Built:
        model, kwargs = zoo.flux()
        model.fuse_qkv_projections()
        return model, kwargs

    check_parity(build, dtypes=(torch.float32,), gradients=False)


def test_fp16_residual_is_clipped() -> None:
    block, kwargs = as_dtype(*zoo.wide_single_block(), torch.float16)
    kwargs["hidden_states"][0, 3, ::2] = 65000.0
    with torch.no_grad():
        block.proj_out.weight.mul_(2000)  # leaves the range of fp16
    before = run(block, kwargs)
    assert any((t.abs() == 65504).any() for t in before), "the case clips nothing"
    with maskaccel.patch(block):
        after = run(block, kwargs)
    for got, expected in zip(after, before, strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, expected, rtol=4e-3, atol=1.0)


@pytest.mark.parametrize("after_patch", [False, True], ids=["adapter-first", "patch-first"])
def test_lora(after_patch: bool) -> None:
    def build() -> Built:
        model, kwargs = zoo.flux()
        if not after_patch:
            add_lora(model)
        return model, kwargs

    if not after_patch:
        check_parity(build, dtypes=(torch.float32,), expect={"fused block": 4})
        return
    model, kwargs = build()
    without = run(model, kwargs)
    patch = maskaccel.patch(model)
    add_lora(model)
    got = run(model, kwargs)
    patch.remove()
    expected = run(model, kwargs)
    for g, e, w in zip(got, expected, without, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(e, w, atol=1e-3), "the adapter changes nothing"


def add_lora(model: Any) -> None:
    torch.manual_seed(4)
    model.add_adapter(LoraConfig(target_modules=LORA_TARGETS, **LORA))


def test_cached_sites_are_skipped() -> None:
    """FORA gives the same with and without fused blocks, and fused blocks do not compute what is cached."""
    model, kwargs = zoo.flux()
    calls = {"attn": 0}
    single = model.single_transformer_blocks[0]
    single.attn.register_forward_hook(lambda *_: calls.__setitem__("attn", calls["attn"] + 1))
    outputs = []
    for methods in ([FORA(interval=2)], [FORA(interval=2), FusedAdaLN()]):
        calls["attn"] = 0
        with torch.no_grad(), maskaccel.patch(model, methods) as patch, patch.generation(num_steps=4) as generation:
            for step in range(4):
                outputs.append(run(model, {**kwargs, "timestep": kwargs["timestep"] + 0.05 * step})[0])
                generation.step()
            assert patch.report().activity["FORA"]["reused"] == 2 * (2 * 3 + 2)
    assert calls["attn"] == 2, "attention ran on a step that reuses the block's output"
    for plain, fused in zip(outputs[:4], outputs[4:], strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_enable_cache_before_patch_is_refused() -> None:
    model, kwargs = zoo.flux()
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(PatchError, match=r"already has a forward of its own .*Patch first, then enable the hook"):
        maskaccel.patch(model)
    model.disable_cache()
    check_report(patched_report(model, kwargs), {"fused block": 4})


def patched_report(model: nn.Module, kwargs: dict[str, Any]) -> maskaccel.PatchReport:
    with maskaccel.patch(model) as patch:
        run(model, kwargs)
        return patch.report()


def test_accelerate_hook_on_a_block_is_refused() -> None:
    model, kwargs = zoo.flux()
    before = run(model, kwargs)
    add_hook_to_module(model.single_transformer_blocks[1], ModelHook())
    with pytest.raises(PatchError, match="forward of its own"):
        maskaccel.patch(model)
    # all or nothing: the blocks before the refused one are untouched
    assert "forward" not in model.transformer_blocks[0].__dict__
    assert all(map(torch.equal, run(model, kwargs), before))


def test_hooks_on_leaves_and_after_the_patch_work() -> None:
    model, kwargs = zoo.flux()
    before = run(model, kwargs)
    seen: list[str] = []

    class Seen(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **given: Any) -> Any:
            seen.append(type(module).__name__)
            return args, given

    add_hook_to_module(model.transformer_blocks[0].attn.to_q, Seen())
    add_hook_to_module(model.transformer_blocks[0].norm1.linear, Seen())
    patch = maskaccel.patch(model)
    add_hook_to_module(model.transformer_blocks[1], Seen())
    got = run(model, kwargs)
    assert seen == ["Linear", "Linear", "FluxTransformerBlock"]
    for g, b in zip(got, before, strict=True):
        torch.testing.assert_close(g, b, rtol=1e-4, atol=1e-4)
    assert patch.report().activity["FusedAdaLN"]["fused calls"] == 5


class Taker:
    """A method that wants the forward of every dual-stream block."""

    name = "Taker"

    def attach(self, context: Any) -> None:
        for module in context.model.modules():
            if isinstance(module, FluxTransformerBlock):
                context.transaction.replace_forward(module, type(module).forward, self.name)
                context.done(self.name, module, "taken")

    def activity(self, model: nn.Module) -> dict[str, Any]:
        return {}


def test_two_methods_that_want_one_site() -> None:
    model, kwargs = zoo.flux()
    before = run(model, kwargs)
    with pytest.raises(PatchError, match="FusedAdaLN and Taker both want forward of one FluxTransformerBlock"):
        maskaccel.patch(model, [Taker(), FusedAdaLN()])
    assert all(map(torch.equal, run(model, kwargs), before))


def test_unknown_version_falls_back_to_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    source = inspect.getsource(FluxTransformerBlock.forward)
    changed = source.replace("hidden_states + ff_output", "hidden_states + 1.5 * ff_output")
    assert changed != source
    # a version of diffusers whose block adds another multiple of the MLP
    space = {**transformer_flux.__dict__}
    exec("from __future__ import annotations\n" + textwrap.dedent(changed), space)
    forward = space["forward"]
    monkeypatch.setattr(inspect, "getsource", _getsource(forward, changed, inspect.getsource))
    monkeypatch.setattr(FluxTransformerBlock, "forward", forward)
    fingerprint.cache_clear()
    try:
        report = check_parity(zoo.flux, expect={"fused block": 2, "fused norm": 5}, skipped=2, dtypes=(torch.float32,))
    finally:
        monkeypatch.undo()
        fingerprint.cache_clear()
    assert "not patched: unknown version of FluxTransformerBlock.forward" in str(report)


def _getsource(function: Any, text: str, original: Callable[..., str]) -> Callable[..., str]:
    return lambda thing: text if thing is function else original(thing)


def test_subclassed_block_gets_the_norm_level() -> None:
    class Custom(FluxTransformerBlock):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            c, x = super().forward(*args, **kwargs)
            return c, 0.5 * x

    def build() -> Built:
        _, kwargs = zoo.wide_block()
        return made(Custom, dim=288, num_attention_heads=4, attention_head_dim=72), kwargs

    check_parity(build, expect={"fused block": 0, "fused norm": 2}, dtypes=(torch.float32,), copies=False)


def test_copies_are_independent() -> None:
    model, kwargs = zoo.flux()
    before = run(model, kwargs)
    patch = maskaccel.patch(model)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.mul_(0.5)
    patch.remove()
    assert all(map(torch.equal, run(model, kwargs), before))
    assert not torch.allclose(run(clone, kwargs)[0], before[0], atol=1e-3), "the copy still uses the original's weights"


def test_pickling() -> None:
    model, kwargs = zoo.flux()
    before = run(model, kwargs)
    patch = maskaccel.patch(model)
    with pytest.raises(PatchError, match=r"remove\(\) the patch first"):
        pickle.dumps(model)
    patch.remove()
    assert all(map(torch.equal, run(pickle.loads(pickle.dumps(model)), kwargs), before))


def test_autocast() -> None:
    model, kwargs = zoo.flux()
    truth_model, truth_kwargs = as_dtype(model, kwargs, torch.float64)
    truth = run(truth_model, truth_kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(model, kwargs)
        with maskaccel.patch(model):
            got = run(model, kwargs)
    for g, p, t in zip(got, plain, truth, strict=True):
        assert_close_to_truth(g, p, t)
