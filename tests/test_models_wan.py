"""The Wan family: fused blocks and processors against the original models."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from zoo import wan as zoo
from zoo.common import as_dtype, check_parity, run

import maskaccel
from maskaccel.methods import FORA, FusedAdaLN
from maskaccel.models import block_adapter
from maskaccel.models._attention import derived

BLOCKS = {
    zoo.wan: 2, zoo.wan_without_cross_norm: 2, zoo.wan_per_token: 2, zoo.wan_image_to_video: 2, zoo.chronoedit: 2,
    zoo.skyreels: 2, zoo.skyreels_diffusion_forcing: 2, zoo.wide_block: 1,
}  # fmt: skip


@pytest.mark.parametrize("build", BLOCKS, ids=lambda build: build.__name__)
def test_parity(build):
    count = BLOCKS[build]
    check_parity(build, expect={"fused block": count, "fused QK norm and RoPE": 2 * count})


def test_vace_control_blocks_are_fused_too():
    report = check_parity(zoo.vace, expect={"fused block": 3, "fused QK norm and RoPE": 6})
    assert report.sites["FusedAdaLN", "WanVACETransformerBlock", "fused block"] == 1


def test_animate():
    check_parity(zoo.animate, expect={"fused block": 2, "fused QK norm and RoPE": 4})


@pytest.mark.parametrize("guidance", [True, False])
def test_helios_blocks(guidance):
    check_parity(functools.partial(zoo.helios, guidance), expect={"fused block": 2})


def test_anyflow_blocks():
    check_parity(zoo.anyflow, expect={"fused block": 2})


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_anyflow_far_blocks():
    # no gradients: the model's FlexAttention has no backward on the CPU
    check_parity(zoo.anyflow_far, gradients=False, expect={"fused block": 2})


def test_bf16_table_and_temb_are_read_in_place():
    """A model cast with `.to` has no fp32 islands; table and modulation are then both bf16."""
    model, inputs = as_dtype(*zoo.wide_block(), torch.bfloat16)
    assert model.scale_shift_table.dtype == inputs["temb"].dtype == torch.bfloat16
    before = run(model, inputs)[0]
    with maskaccel.patch(model, FusedAdaLN()):
        after = run(model, inputs)[0]
        assert not hasattr(inputs["temb"], "_maskaccel_fp32")
    torch.testing.assert_close(after, before, atol=0.06, rtol=0.02)


def test_fp32_modulation_is_made_once_for_all_blocks():
    seen = []
    model, inputs = as_dtype(*zoo.wan_per_token(), torch.bfloat16)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    with maskaccel.patch(model, FusedAdaLN()):
        run(model, inputs)
    assert seen[0] is seen[1]
    held = seen[0]._maskaccel_fp32[1]
    assert held.dtype == torch.float32
    assert torch.equal(held, seen[0].float())


def test_derived_follows_in_place_writes_and_gradients():
    source = torch.ones(3, dtype=torch.bfloat16)
    first = derived(source, "_wide", torch.Tensor.float)
    assert derived(source, "_wide", torch.Tensor.float) is first
    source.mul_(2)
    assert torch.equal(derived(source, "_wide", torch.Tensor.float), torch.full((3,), 2.0))
    leaf = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    made = derived(leaf, "_wide", torch.Tensor.float)
    assert made.requires_grad
    assert not hasattr(leaf, "_wide")


@pytest.mark.parametrize("build", [zoo.wan, zoo.wan_image_to_video])
def test_fused_projections(build):
    model, inputs = build()
    model.fuse_qkv_projections()
    assert model.blocks[0].attn1.fused_projections
    before = run(model, inputs)[0]
    with maskaccel.patch(model, FusedAdaLN()):
        torch.testing.assert_close(run(model, inputs)[0], before, atol=1e-4, rtol=1e-4)


def test_a_hook_on_the_affine_norm_still_runs():
    model, inputs = zoo.wan()
    before = run(model, inputs)[0]
    with maskaccel.patch(model, FusedAdaLN()):
        calls = []
        handle = model.blocks[0].norm2.register_forward_hook(lambda *args: calls.append(1))
        after = run(model, inputs)[0]
        handle.remove()
    assert len(calls) == 1
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's own norms, with fp32 weights under autocast
def test_autocast_keeps_its_dtypes():
    model, inputs = zoo.wan()
    with torch.autocast("cpu", torch.bfloat16):
        before = run(model, inputs)[0]
        with maskaccel.patch(model, FusedAdaLN()):
            after = run(model, inputs)[0]
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, atol=0.05, rtol=0.05)


def test_gradient_checkpointing_recomputes_the_fused_blocks():
    model, inputs = zoo.wan_per_token()
    inputs["hidden_states"].requires_grad_()

    def gradients():
        model(**inputs)[0].square().sum().backward()
        found = [inputs["hidden_states"].grad, *(p.grad for p in model.parameters() if p.grad is not None)]
        inputs["hidden_states"].grad = None
        model.zero_grad()
        return found

    with maskaccel.patch(model, FusedAdaLN()):
        stored = gradients()
        model.enable_gradient_checkpointing()
        recomputed = gradients()
    assert len(stored) == len(recomputed)
    assert all(map(torch.equal, stored, recomputed))


def test_lora_is_applied():
    from peft import LoraConfig

    model, inputs = zoo.wan()
    plain = run(model, inputs)[0]
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "net.2"], init_lora_weights=False))
    before = run(model, inputs)[0]
    assert not torch.allclose(before, plain, atol=1e-3)
    with maskaccel.patch(model, FusedAdaLN()):
        torch.testing.assert_close(run(model, inputs)[0], before, atol=1e-4, rtol=1e-4)


def test_processor_keeps_backend_and_state():
    model, _ = zoo.wan()
    processor = model.blocks[0].attn1.processor
    processor._attention_backend = "native"
    with maskaccel.patch(model, FusedAdaLN()):
        fused = model.blocks[0].attn1.processor
        assert fused is not processor
        assert fused._attention_backend == "native"
        assert model.blocks[1].attn1.processor._attention_backend is None
        assert copy.deepcopy(fused)._attention_backend == "native"
    assert model.blocks[0].attn1.processor is processor


@pytest.mark.parametrize("build", [zoo.wan, zoo.vace, zoo.skyreels, zoo.helios, zoo.anyflow], ids=lambda b: b.__name__)
def test_cached_outputs_meet_the_gates_of_the_current_step(build):
    """FORA alone wraps the children of the original block; with fused blocks the result must be the same."""
    model, inputs = build()
    steps = [torch.full_like(inputs["timestep"], value) for value in (900, 500, 100)]

    def outputs(methods):
        with maskaccel.patch(model, methods) as patch, patch.generation(num_steps=3) as generation:
            found = []
            for timestep in steps:
                found.append(run(model, inputs | {"timestep": timestep})[0])
                generation.step()
            return found, patch.report().activity["FORA"]["reused"]

    plain, plain_reused = outputs([FORA(interval=2)])
    fused, fused_reused = outputs([FORA(interval=2), FusedAdaLN()])
    blocks = [m for m in model.modules() if block_adapter(m) is not None]
    assert fused_reused == plain_reused == 3 * len(blocks)  # attn1, attn2 and ffn, on one step of three
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_other_versions_are_left_alone(monkeypatch):
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    class Changed(WanTransformerBlock):
        def forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb):
            return hidden_states + 1

    model, _ = zoo.wan()
    changed = Changed(dim=32, ffn_dim=64, num_heads=2)
    model.blocks[1] = changed
    Changed.__module__, Changed.__qualname__ = WanTransformerBlock.__module__, WanTransformerBlock.__qualname__
    with maskaccel.patch(model, FusedAdaLN()) as patch:
        assert patch.report().sites["FusedAdaLN", "WanTransformerBlock", "fused block"] == 1
        assert any("unknown version" in reason for _, _, reason in patch.report().skipped)
        assert "forward" not in changed.__dict__


def test_blocks_compile_without_graph_breaks():
    model, inputs = zoo.wide_block()
    before = run(model, inputs)[0]
    with maskaccel.patch(model, FusedAdaLN()):
        torch._dynamo.reset()
        compiled: nn.Module = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            after = compiled(**inputs)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
