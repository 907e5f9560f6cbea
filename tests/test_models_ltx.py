"""LTX-Video: fused blocks and processors against the original models."""

from __future__ import annotations

import pytest
import torch
from zoo import ltx as zoo
from zoo.common import check_parity, run

import maskaccel
from maskaccel.methods import FORA, FusedAdaLN


@pytest.mark.parametrize("build", [zoo.ltx, zoo.ltx_per_token, zoo.ltx_affine], ids=lambda b: b.__name__)
def test_parity(build):
    check_parity(build, expect={"fused block": 2, "fused QK norm and RoPE": 4})


def test_real_width_and_an_odd_number_of_tokens():
    check_parity(zoo.wide_block, expect={"fused block": 1, "fused QK norm and RoPE": 2})


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's own norms, with fp32 weights under autocast
@pytest.mark.parametrize("build", [zoo.ltx, zoo.ltx_affine], ids=lambda b: b.__name__)
def test_autocast_promotes_as_the_original(build):
    model, inputs = build()
    with torch.autocast("cpu", torch.bfloat16):
        before = run(model, inputs)[0]
        with maskaccel.patch(model, FusedAdaLN()):
            after = run(model, inputs)[0]
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, atol=0.05, rtol=0.05)


def test_fp32_table_in_a_bf16_stream_is_left_to_the_original_block():
    """Eager torch then leaves bf16 for fp32 in mid-block, which only autocast can follow."""
    model, inputs = zoo.wide_block()
    inputs = {k: v if k == "image_rotary_emb" else v.bfloat16() for k, v in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16), maskaccel.patch(model, FusedAdaLN()):
        assert run(model, inputs)[0].dtype == torch.float32


def test_lora_is_applied():
    from peft import LoraConfig

    model, inputs = zoo.ltx()
    plain = run(model, inputs)[0]
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_out.0"], init_lora_weights=False))
    before = run(model, inputs)[0]
    assert not torch.allclose(before, plain, atol=1e-3)
    with maskaccel.patch(model, FusedAdaLN()):
        torch.testing.assert_close(run(model, inputs)[0], before, atol=1e-4, rtol=1e-4)


def test_cached_outputs_meet_the_gates_of_the_current_step():
    model, inputs = zoo.ltx()
    steps = [torch.full((2,), value) for value in (900, 500, 100)]

    def outputs(methods):
        with maskaccel.patch(model, methods) as patch, patch.generation(num_steps=3) as generation:
            found = []
            for timestep in steps:
                found.append(run(model, inputs | {"timestep": timestep})[0])
                generation.step()
            return found, patch.report().activity["FORA"]["reused"]

    plain, plain_reused = outputs([FORA(interval=2)])
    fused, fused_reused = outputs([FORA(interval=2), FusedAdaLN()])
    assert fused_reused == plain_reused == 2 * 3  # attn1, attn2 and ff of two blocks, on one step of three
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
