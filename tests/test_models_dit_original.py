"""Blocks of the original DiT code, which have no class to be known by."""

from __future__ import annotations

import pytest
import torch
from zoo import dit_original as zoo
from zoo.common import check_parity, run

import maskaccel
from maskaccel.methods import FORA, FusedAdaLN
from maskaccel.models import block_adapter, norm_adapter
from maskaccel.models.dit_original import form_of


@pytest.mark.parametrize("build", [zoo.dit, zoo.sit_wide], ids=lambda build: build.__name__)
def test_parity(build):
    check_parity(build, expect={"fused block": 2, "fused norm": 1})


@pytest.mark.parametrize(
    ("build", "reason"),
    [(zoo.other_order, "unknown form of OtherOrderBlock.forward"), (zoo.affine, "without affine parameters")],
)
def test_a_block_that_only_looks_alike_is_left_and_the_report_says_why(build, reason):
    model, kwargs = build()
    before = run(model, kwargs)
    with maskaccel.patch(model, FusedAdaLN()) as patch:  # the last layer is still known
        assert sum(n for (_, _, why), n in patch.report().skipped.items() if reason in why) == 2
        after = run(model, kwargs)
    torch.testing.assert_close(after, before)


def test_another_modulate_is_refused(monkeypatch):
    model, _ = zoo.dit()
    adapter = block_adapter(model.blocks[0])
    assert adapter is not None
    assert adapter.refusal(model.blocks[0]) is None
    for other in (
        lambda x, shift, scale: x * scale.unsqueeze(1) + shift.unsqueeze(1),
        lambda x, scale, shift: x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1),
        lambda x, shift, scale: x * (1 + scale) + shift,
        lambda x: x,
    ):
        monkeypatch.setattr(zoo, "modulate", other)
        assert "modulate is not" in adapter.refusal(model.blocks[0])
    with pytest.raises(maskaccel.PatchError, match="modulate is not"):
        maskaccel.patch(model, FusedAdaLN())


def test_matching_needs_the_whole_structure():
    model, _ = zoo.dit()
    block = model.blocks[0]
    assert norm_adapter(model.final_layer) is not None
    assert block_adapter(model.final_layer) is None
    assert norm_adapter(block) is None
    block.adaLN_modulation = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(32, 9 * 32))
    assert block_adapter(block) is None
    assert form_of(len) == "none"


def test_fora_with_and_without_fused_blocks_agree():
    model, kwargs = zoo.dit()

    def steps(methods):
        outs = []
        with maskaccel.patch(model, methods) as patch, patch.generation(4) as generation:
            for i in range(4):
                outs += run(model, {**kwargs, "t": kwargs["t"] + 0.3 * i})
                generation.step()
            assert patch.report().activity["FORA"]["reused"] == 2 * 2 * 2
        return outs

    alone, fused = steps(FORA(interval=2)), steps([FORA(interval=2), FusedAdaLN()])
    torch.testing.assert_close(fused, alone)
