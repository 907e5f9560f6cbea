"""TileMask: exact conversions, algebra, and what a bad mask is told."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskaccel import ops
from maskaccel.masks import TileMask

BLOCKS = [(16, 32), (32, 32), (48, 64), (64, 32), (128, 128)]


@st.composite
def matrices(draw) -> tuple[torch.Tensor, tuple[int, int]]:
    """A boolean mask of any shape, with whole tiles kept and left out, and a block."""
    batch, heads = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3)]))
    sq, sk = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    block = draw(st.sampled_from(BLOCKS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.rand(batch, heads, sq, sk, generator=generator) < draw(st.sampled_from([0.02, 0.5, 0.98]))
    coarse = torch.randint(0, 3, (batch, heads, -(-sq // block[0]), -(-sk // block[1])), generator=generator)
    wide = coarse.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[..., :sq, :sk]
    return torch.where(wide == 0, False, torch.where(wide == 1, True, mask)), block


@settings(max_examples=60, deadline=None)
@given(matrices(), st.booleans())
def test_a_boolean_mask_comes_back(case, unique) -> None:
    mask, block = case
    tiled = TileMask.from_bool(mask, block, unique=unique)
    assert torch.equal(tiled.to_bool().expand_as(mask), mask)
    assert tiled.element_density() == pytest.approx(float(mask.double().mean()), abs=1e-12)
    rows, columns = tiled.rows, tiled.columns
    padded = torch.nn.functional.pad(mask, (0, columns * block[1] - mask.shape[3], 0, rows * block[0] - mask.shape[2]))
    any_kept = padded.unflatten(3, (columns, block[1])).unflatten(2, (rows, block[0])).any(5).any(3)
    assert torch.equal(tiled.tiles().expand_as(any_kept), any_kept)
    assert tiled.density() == pytest.approx(float(any_kept.double().mean()))


@settings(max_examples=60, deadline=None)
@given(matrices(), st.integers(0, 2**31))
def test_algebra_is_that_of_the_elements(case, seed) -> None:
    mask, block = case
    other = torch.rand(mask.shape[2:], generator=torch.Generator().manual_seed(seed)) < 0.5
    a, b = TileMask.from_bool(mask, block), TileMask.from_bool(other, block)
    for got, want in ((a & b, mask & other), (a | b, mask | other), (~a, ~mask)):
        assert torch.equal(got.to_bool().expand_as(mask), want)
        assert got == TileMask.from_bool(want, block)  # tiles that became empty or full are told as such
        assert torch.equal(got.tiles().expand_as(got.tiles()), TileMask.from_bool(want, block).tiles())
    assert (a & ~a).density() == 0
    assert (a | ~a).patterns is None
    turned = TileMask.from_bool(mask, (block[1] * 2, block[1])).transpose() if block[1] * 2 % 32 == 0 else None
    if turned is not None:
        assert torch.equal(turned.to_bool().expand(mask.mT.shape), mask.mT)


@settings(max_examples=40, deadline=None)
@given(matrices())
def test_lists_name_the_tiles(case) -> None:
    mask, block = case
    tiled = TileMask.from_bool(mask, block)
    for transpose, (index, count, order) in ((False, tiled.lists()), (True, tiled.transposed_lists())):
        tiles, partial = tiled.tiles(), torch.zeros_like(tiled.tiles())
        if tiled.pattern_of is not None:
            partial = tiles & (tiled.pattern_of >= 0)
        if transpose:
            tiles, partial = tiles.mT, partial.mT
        flat = count.flatten(0, 2)
        for row, (some, full) in enumerate(flat.tolist()):
            listed = index.flatten(0, 2)[row].tolist()
            assert listed[:some] == partial.flatten(0, 2)[row].nonzero().flatten().tolist()
            assert listed[some : some + full] == (tiles & ~partial).flatten(0, 2)[row].nonzero().flatten().tolist()
        digits = [n.bit_length() for n in flat.sum(1)[order.long()].tolist()]
        assert digits == sorted(digits, reverse=True)
        assert sorted(order.tolist()) == list(range(len(flat)))


def test_equal_patterns_are_stored_once() -> None:
    causal = torch.ones(1024, 1024, dtype=torch.bool).tril()
    mask = TileMask.from_bool(causal, (128, 128))
    assert mask.patterns is not None
    assert len(mask.patterns) == 1
    assert mask.nbytes < 8192


def test_dilate_and_whole() -> None:
    tiles = torch.zeros(5, 6, dtype=torch.bool)
    tiles[2, 3] = True
    mask = TileMask.from_tiles(tiles, (5 * 16, 6 * 32), (16, 32))
    grown = mask.dilate(1, 2).tiles()[0, 0]
    assert grown.sum() == 3 * 5
    assert grown[1:4, 1:6].all()
    part = TileMask.from_bool(torch.rand(40, 40) < 0.5, (16, 32))
    assert part.whole().patterns is None
    assert torch.equal(part.whole().bits, part.bits)


def test_heads_are_stacked() -> None:
    elements = torch.rand(2, 5, 40, 70) < 0.5
    elements[:, 2] = True
    elements[:, 3] = False
    masks = [TileMask.from_bool(elements[:, h : h + 1], (16, 32)) for h in range(5)]
    assert torch.equal(TileMask.stack(masks).to_bool(), elements)
    with pytest.raises(ValueError, match="cannot be heads of one mask"):
        TileMask.stack([masks[0], TileMask.full((40, 71), (16, 32))])


def test_flex_attention_round_trip() -> None:
    mask = torch.rand(2, 3, 200, 300) < 0.5
    mask[0, 1, :128, :128] = True
    mask[1, 0, 128:, 128:256] = False
    tiled = TileMask.from_bool(mask, (128, 128))
    block_mask = tiled.to_block_mask()
    assert block_mask.BLOCK_SIZE == (128, 128)
    assert TileMask.from_block_mask(block_mask) == tiled
    index = torch.arange(200)[:, None], torch.arange(300)[None]
    for b in range(2):
        for h in range(3):
            seen = block_mask.mask_mod(torch.tensor(b), torch.tensor(h), *index)
            assert torch.equal(seen, mask[b, h]), "what is not compiled looks at mask_mod alone"


def test_flex_attention_that_is_not_compiled_leaves_out_tiles() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    tiles = torch.tensor([[[True, False], [True, True]]])
    mask = TileMask.from_tiles(tiles, (256, 256), (128, 128))
    q, k, v = (torch.randn(2, 3, 256, 16) for _ in range(3))
    got = flex_attention(q, k, v, block_mask=mask.to_block_mask())
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_bool())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_empty_rows_dense() -> None:
    mask = torch.rand(2, 1, 10, 50) < 0.1
    mask[0, 0, 3] = False
    assert TileMask.from_bool(mask, (16, 32), empty_rows="dense").to_bool()[0, 0, 3].all()
    assert not TileMask.from_bool(mask, (16, 32)).to_bool()[0, 0, 3].any()


def test_copies_and_pickles() -> None:
    mask = TileMask.from_bool(torch.rand(2, 1, 40, 70) < 0.3, (16, 32))
    mask.lists()
    for twin in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert twin == mask
        assert twin.bits is not mask.bits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TileMask.full((64, 64), (8, 32)), "block=.*8.*multiple of 16"),
        (lambda: TileMask.full((64, 64), (16, 16)), "block=.*16.*32"),
        (lambda: TileMask.full((64, 64), (16, 32, 4)), "block"),
        (lambda: TileMask.from_tiles(torch.ones(3, 2, dtype=torch.bool), (64, 64), (16, 32)), r"\(3, 2\).*\(4, 2\)"),
        (lambda: TileMask(torch.zeros(1, 1, 4, 2, dtype=torch.int32), (16, 32), (64, 64)), "bits has shape"),
        (lambda: TileMask.from_bool(torch.ones(4, dtype=torch.bool)), "mask has shape"),
        (lambda: TileMask.from_bool(torch.ones(4, 4, dtype=torch.bool), empty_rows="fill"), "empty_rows='fill'"),
        (lambda: TileMask.full((64, 64)) & TileMask.full((64, 65)), "do not combine"),
        (
            lambda: TileMask(
                torch.zeros(1, 1, 1, 1, dtype=torch.int32),
                (16, 32),
                (16, 32),
                torch.full((1, 1, 1, 1), 3, dtype=torch.int32),
                torch.zeros(2, 16, 1, dtype=torch.int32),
            ),
            "names pattern 3; there are 2",
        ),
    ],
)
def test_bad_masks_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("bits", [torch.zeros(1, 1, 4, 1), torch.zeros(1, 1, 4, 1, dtype=torch.int64)])
def test_bad_dtypes_are_refused(bits) -> None:
    with pytest.raises(TypeError, match="int32"):
        TileMask(bits, (16, 32), (64, 32))


def test_a_mask_that_does_not_fit_the_call_is_refused() -> None:
    q = torch.randn(2, 64, 4, 16)
    for mask, message in (
        (TileMask.full((64, 65), (16, 32)), r"\(64, 65\).*\(64, 64\)"),
        (TileMask.from_tiles(torch.ones(3, 1, 4, 2, dtype=torch.bool), (64, 64), (16, 32)), "batch 3"),
        (TileMask.from_tiles(torch.ones(3, 4, 2, dtype=torch.bool), (64, 64), (16, 32)), "3 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.tile_attention(q, q, q, mask)
