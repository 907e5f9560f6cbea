"""Z-Image: fused blocks and processors against the original models."""

from __future__ import annotations

import pytest
import torch
from zoo import zimage as zoo
from zoo.common import check_parity, run

import maskaccel
from maskaccel.methods import FORA, FusedAdaLN


def test_parity():
    # two layers, a refiner of noise and one of text, which has no modulation
    check_parity(zoo.zimage, expect={"fused block": 4, "fused QK norm and RoPE": 4})


@pytest.mark.parametrize(
    "build",
    [zoo.wide_block, zoo.wide_block_noisy_and_clean, zoo.wide_block_without_modulation],
    ids=lambda b: b.__name__,
)
def test_real_width_and_an_odd_number_of_tokens(build):
    check_parity(build, expect={"fused block": 1, "fused QK norm and RoPE": 1})


def test_tokens_take_the_modulation_of_their_mask():
    """With all tokens noisy, the block must equal one with the noisy modulation for all."""
    model, inputs = zoo.wide_block_noisy_and_clean()
    noisy = inputs.pop("adaln_noisy")
    mask, clean = inputs.pop("noise_mask"), inputs.pop("adaln_clean")
    per_token = {"noise_mask": torch.ones_like(mask), "adaln_noisy": noisy, "adaln_clean": clean}
    with maskaccel.patch(model, FusedAdaLN()):
        same = run(model, inputs | per_token)[0]
        mixed = run(model, inputs | per_token | {"noise_mask": mask})[0]
        globally = run(model, inputs | {"adaln_input": noisy})[0]
    torch.testing.assert_close(same, globally, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed, globally, atol=1e-2)


def test_autocast_promotes_as_the_original():
    """fp32 norm weights turn a bf16 stream into fp32: such a block runs as it was."""
    model, inputs = zoo.zimage()
    with torch.autocast("cpu", torch.bfloat16):
        before = run(model, inputs)
        with maskaccel.patch(model, FusedAdaLN()):
            after = run(model, inputs)
    for a, b in zip(after, before, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=0.06, rtol=0.06)


def test_a_hook_on_a_norm_still_runs():
    model, inputs = zoo.wide_block()
    before = run(model, inputs)[0]
    with maskaccel.patch(model, FusedAdaLN()):
        calls = []
        handle = model.ffn_norm1.register_forward_hook(lambda *args: calls.append(1))
        after = run(model, inputs)[0]
        handle.remove()
    assert len(calls) == 1
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_lora_is_applied():
    from peft import LoraConfig

    model, inputs = zoo.zimage()
    plain = run(model, inputs)[0]
    targets = r"layers\.\d+\.(attention\.to_q|feed_forward\.w2|adaLN_modulation\.0)"
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    before = run(model, inputs)[0]
    assert not torch.allclose(before, plain, atol=1e-3)
    with maskaccel.patch(model, FusedAdaLN()):
        torch.testing.assert_close(run(model, inputs)[0], before, atol=1e-4, rtol=1e-4)


def test_cached_outputs_meet_the_gates_of_the_current_step():
    model, inputs = zoo.zimage()
    steps = [torch.full((2,), value) for value in (0.9, 0.5, 0.1)]

    def outputs(methods):
        with maskaccel.patch(model, methods) as patch, patch.generation(num_steps=3) as generation:
            found = []
            for t in steps:
                found += run(model, inputs | {"t": t})
                generation.step()
            return found, patch.report().activity["FORA"]["reused"]

    plain, plain_reused = outputs([FORA(interval=2)])
    fused, fused_reused = outputs([FORA(interval=2), FusedAdaLN()])
    assert fused_reused == plain_reused == 4 * 2  # attention and MLP of four blocks, on one step of three
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
