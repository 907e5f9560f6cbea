"""Lumina2: fused blocks and processors against the original models."""

from __future__ import annotations

import functools

import pytest
import torch
from zoo import lumina2 as zoo
from zoo.common import check_parity, run

import maskaccel
from maskaccel.methods import FORA, FusedAdaLN
from maskaccel.models._attention import complex_table


def test_parity():
    # two layers, a refiner of noise and one of text, which has no modulation
    check_parity(zoo.lumina2, expect={"fused block": 4, "fused QK norm and RoPE": 4})


@pytest.mark.parametrize("modulation", [True, False])
def test_real_width_and_an_odd_number_of_tokens(modulation):
    build = functools.partial(zoo.wide_block, modulation)
    check_parity(build, expect={"fused block": 1, "fused QK norm and RoPE": 1})


def test_complex_tables_are_read_in_place_or_narrowed_once():
    table = torch.polar(torch.ones(3, 4), torch.arange(12.0).reshape(3, 4))
    cos, sin = complex_table(table)
    assert cos.data_ptr() == table.data_ptr()
    assert torch.equal(cos, table.real)
    assert torch.equal(sin, table.imag)
    wide = table.to(torch.complex128)
    assert complex_table(wide)[0].data_ptr() == complex_table(wide)[0].data_ptr()
    torch.testing.assert_close(complex_table(wide)[1], table.imag)


def test_proportional_attention():
    model, inputs = zoo.wide_block()
    x = inputs["hidden_states"]
    arguments = {"hidden_states": x, "encoder_hidden_states": x, "image_rotary_emb": inputs["image_rotary_emb"]}
    with torch.no_grad():
        before = model.attn(**arguments, base_sequence_length=16)
        with maskaccel.patch(model, FusedAdaLN()):
            after = model.attn(**arguments, base_sequence_length=16)
            plain = model.attn(**arguments)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, after, atol=1e-4)


def test_autocast_promotes_as_the_original():
    model, inputs = zoo.lumina2()
    with torch.autocast("cpu", torch.bfloat16):
        before = run(model, inputs)[0]
        with maskaccel.patch(model, FusedAdaLN()):
            after = run(model, inputs)[0]
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, atol=0.06, rtol=0.06)


def test_lora_is_applied():
    from peft import LoraConfig

    model, inputs = zoo.lumina2()
    plain = run(model, inputs)[0]
    targets = ["to_v", "linear_2", "norm1.linear"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    before = run(model, inputs)[0]
    assert not torch.allclose(before, plain, atol=1e-3)
    with maskaccel.patch(model, FusedAdaLN()):
        torch.testing.assert_close(run(model, inputs)[0], before, atol=1e-4, rtol=1e-4)


def test_cached_outputs_meet_the_gates_of_the_current_step():
    model, inputs = zoo.lumina2()
    steps = [torch.full((2,), value) for value in (0.1, 0.5, 0.9)]

    def outputs(methods):
        with maskaccel.patch(model, methods) as patch, patch.generation(num_steps=3) as generation:
            found = []
            for timestep in steps:
                found.append(run(model, inputs | {"timestep": timestep})[0])
                generation.step()
            return found, patch.report().activity["FORA"]["reused"]

    plain, plain_reused = outputs([FORA(interval=2)])
    fused, fused_reused = outputs([FORA(interval=2), FusedAdaLN()])
    assert fused_reused == plain_reused == 4 * 2  # attention and MLP of four blocks, on one step of three
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
