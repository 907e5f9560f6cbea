"""The Triton kernels that choose tiles against the reference, run by `test_triton_kernels.py` as its siblings."""

from __future__ import annotations

import pytest
import torch

from maskaccel.ops.attention import reference
from maskaccel.ops.attention import triton as attention
from maskaccel.ops.attention.schema import ABOVE, MASS, TOP

attention.register()
TRITON = torch.ops.maskaccel_triton


@pytest.mark.parametrize("rule", [TOP, MASS, ABOVE])
@pytest.mark.parametrize("tiles", [1, 31, 64, 70])
@pytest.mark.parametrize("least", [0, 2])
def test_select_tiles(rule, tiles, least):
    """The same words: ties, masks of any broadcast shape, limits of each head. Sums of these scores are exact."""
    generator = torch.Generator().manual_seed(tiles + 100 * rule + least)
    scores = torch.randint(-3, 9, (1, 2, 2, tiles), generator=generator) / 64
    scores[0, 0, 0] = 0.0
    masks = [torch.rand(shape, generator=generator) < 0.2 for shape in ((1, 2, 2, tiles), (2, 1, tiles), (2, 1))]
    for force, forbid in ((None, None), (masks[1], masks[2]), (None, masks[0])):
        for value in {TOP: (1.0, 99.0), MASS: (0.7, 1.0), ABOVE: (3 / 64,)}[rule]:
            limits = torch.full((1, 2), value) * torch.tensor([1.0, 0.5])
            for limit in (None, limits) if rule != TOP else (None,):
                args = (scores, force, forbid, limit, rule, value, least)
                assert torch.equal(TRITON.select_tiles(*args), reference.select_tiles(*args))


@pytest.mark.parametrize(("tokens", "block", "width"), [(70, 16, 24), (5, 128, 16), (50, 20, 72)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tile_means(tokens, block, width, dtype):
    """Means to a rounding (the interpreter cuts bf16 off), cosines to fp32; the last block is shorter, x is a slice."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, tokens, 2, 2 * width, generator=generator).to(dtype)[..., :width] + 0.5
    x = torch.cat([x, x], 3)[..., :width]
    x[0, 0] = 0
    for alike in (False, True):
        got, cosines = TRITON.tile_means(x, block, alike)
        means, want = reference.tile_means(x.double(), block, alike)
        torch.testing.assert_close(got.double(), means, atol=1e-6, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5)
        assert got.dtype == dtype
        torch.testing.assert_close(cosines.double(), want, atol=1e-6, rtol=1e-5)


def test_errors():
    scores = torch.rand(1, 1, 2, 4)
    with pytest.raises(RuntimeError, match="rule=3 must be 0 to 2"):
        TRITON.select_tiles(scores, None, None, None, 3, 1.0, 0)
    with pytest.raises(RuntimeError, match="force must be bool"):
        TRITON.select_tiles(scores, scores, None, None, TOP, 1.0, 0)
    with pytest.raises(RuntimeError, match="block=0 must be 1 or more"):
        TRITON.tile_means(torch.rand(1, 4, 1, 16), 0, False)
