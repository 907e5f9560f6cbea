"""Qwen-Image: fused blocks and processors against the original models."""

from __future__ import annotations

import functools

import pytest
import torch
from zoo import qwen as zoo
from zoo.common import as_dtype, check_parity, run

import maskaccel
from maskaccel.methods import FORA, FusedAdaLN


@pytest.mark.parametrize("build", [zoo.qwen, zoo.qwen_without_mask, zoo.qwen_edit], ids=lambda b: b.__name__)
def test_parity(build):
    check_parity(build, expect={"fused block": 2, "fused QK norm and RoPE": 2})


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_real_width_and_an_odd_number_of_tokens(zero_cond_t):
    build = functools.partial(zoo.wide_block, zero_cond_t)
    check_parity(build, expect={"fused block": 1, "fused QK norm and RoPE": 1})


def test_edit_tokens_read_their_own_modulation():
    """Clean tokens take the second half of the modulation: turning all of them noisy must change the output."""
    model, inputs = zoo.wide_block(zero_cond_t=True)
    all_noisy = inputs | {"modulate_index": torch.zeros_like(inputs["modulate_index"])}
    before, before_noisy = run(model, inputs)[1], run(model, all_noisy)[1]
    with maskaccel.patch(model, FusedAdaLN()):
        after, after_noisy = run(model, inputs)[1], run(model, all_noisy)[1]
    assert not torch.allclose(before, before_noisy, atol=1e-2)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after_noisy, before_noisy, atol=1e-4, rtol=1e-4)


def test_one_modulate_index_serves_the_whole_batch():
    model, inputs = zoo.wide_block(zero_cond_t=True)
    one = inputs | {"modulate_index": inputs["modulate_index"][:1]}
    before = run(model, one)
    with maskaccel.patch(model, FusedAdaLN()):
        after = run(model, one)
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_fp16_is_clipped_to_its_finite_range():
    model, inputs = as_dtype(*zoo.wide_block(), torch.float16)
    inputs["hidden_states"][0, 0, 0] = 65504.0
    with torch.no_grad():
        model.img_mod[1].bias[5 * 256 :] = 300.0  # the MLP gate: drives the residual over the edge
    before = run(model, inputs)
    assert (before[1].abs() == 65504).any()
    with maskaccel.patch(model, FusedAdaLN()):
        after = run(model, inputs)
    assert torch.isfinite(after[1]).all()
    torch.testing.assert_close(after[1], before[1], atol=2.0, rtol=0.02)


def test_processor_refuses_what_the_original_refuses():
    model, inputs = zoo.wide_block()
    x, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
    with maskaccel.patch(model, FusedAdaLN()):
        processor = model.attn.processor
        with pytest.raises(ValueError, match="encoder_hidden_states is None"):
            processor(model.attn, x)
        with pytest.raises(ValueError, match="attention_mask is given"):
            processor(model.attn, x, text, attention_mask=torch.ones(2, 44))


def test_attention_without_rope_or_qk_norm():
    """A block may be run without tables; the norms then run alone."""
    model, inputs = zoo.wide_block()
    inputs["image_rotary_emb"] = None
    before = run(model, inputs)
    with maskaccel.patch(model, FusedAdaLN()):
        after = run(model, inputs)
        model.attn.norm_q = model.attn.norm_k = None
        bare = run(model, inputs)
    expected = run(model, inputs)
    for a, b in zip((*after, *bare), (*before, *expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_cached_outputs_meet_the_gates_of_the_current_step():
    model, inputs = zoo.qwen_edit()
    steps = [torch.full((2,), value) for value in (0.9, 0.5, 0.1)]

    def outputs(methods):
        with maskaccel.patch(model, methods) as patch, patch.generation(num_steps=3) as generation:
            found = []
            for timestep in steps:
                found.append(run(model, inputs | {"timestep": timestep})[0])
                generation.step()
            return found, patch.report().activity["FORA"]["reused"]

    plain, plain_reused = outputs([FORA(interval=2)])
    fused, fused_reused = outputs([FORA(interval=2), FusedAdaLN()])
    assert fused_reused == plain_reused == 2 * 3  # attn, img_mlp and txt_mlp of two blocks, on one step of three
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_lora_is_applied():
    from peft import LoraConfig

    model, inputs = zoo.qwen()
    plain = run(model, inputs)[0]
    targets = ["to_q", "add_k_proj", "to_out.0", "img_mod.1"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    before = run(model, inputs)[0]
    assert not torch.allclose(before, plain, atol=1e-3)
    with maskaccel.patch(model, FusedAdaLN()):
        torch.testing.assert_close(run(model, inputs)[0], before, atol=1e-4, rtol=1e-4)
