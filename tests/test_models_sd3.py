"""SD3 and SD3.5: fused joint blocks, dual attention, a last block without text, QK norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from zoo import sd3 as zoo
from zoo.common import Built, check_parity, run

import maskaccel
from maskaccel.methods import FORA, FusedAdaLN


def test_sd3() -> None:
    """Without QK norm there is nothing to fuse in attention, and the report says so."""
    report = check_parity(zoo.sd3, expect={"fused block": 3, "fused norm": 1, "fused QK norm and RoPE": 0}, skipped=3)
    assert ("FusedAdaLN", "JointAttnProcessor2_0", "no QK norm") in report.skipped


def test_sd35() -> None:
    check_parity(zoo.sd35, expect={"fused block": 3, "fused norm": 1, "fused QK norm and RoPE": 5})


@pytest.mark.parametrize("build", [zoo.wide_block, zoo.single_block], ids=["dual-attention", "without-text"])
def test_block(build: Callable[[], Built]) -> None:
    check_parity(build, expect={"fused block": 1}, skipped=1)


@pytest.mark.parametrize("only", [None, "attn", "attn2"])
def test_cached_attentions(only: str | None) -> None:
    """With one of the two attentions cached, the fused block makes the other's input alone."""
    model, kwargs = zoo.sd35()
    outputs = []
    for methods in ([FORA(interval=2)], [FORA(interval=2), FusedAdaLN()]):
        with torch.no_grad(), maskaccel.patch(model, methods) as patch, patch.generation(num_steps=4) as generation:
            for step in range(4):
                if only is not None and step == 1:  # forget one of them: it must be computed on a step that reuses
                    for block in model.transformer_blocks[:2]:
                        getattr(block, only).__dict__["_maskaccel_site"].feature.clear()
                outputs.append(run(model, {**kwargs, "timestep": kwargs["timestep"] + 20 * step})[0])
                generation.step()
            assert patch.report().activity["FORA"]["reused"] > 0
    for plain, fused in zip(outputs[:4], outputs[4:], strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_chunked_feed_forward_after_the_patch() -> None:
    model, kwargs = zoo.sd3()
    before = run(model, kwargs)
    maskaccel.patch(model)
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(1, dim=1)
    torch.testing.assert_close(run(model, kwargs)[0], before[0], rtol=1e-4, atol=1e-4)
