"""Pooling of tokens, scores of tiles and their selection, against loops over what the docstrings say."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from benchmarks.attention import selection
from maskaccel.masks import TileMask, TokenOrder
from maskaccel.ops import tile_pool, tile_scores, tile_select


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("tokens", [12, 14])
def test_pool_of_blocks(tokens, mode):
    x = randn(2, tokens, 3, 4)
    want = torch.stack([getattr(part, mode)(1) for part in x.split(4, dim=1)], dim=1)
    torch.testing.assert_close(tile_pool(x, 4, mode=mode), want)


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize(("grid", "patch"), [((4, 6), (2, 3)), ((5, 7), (2, 3)), ((3, 4, 5), (2, 4, 2))])
def test_pool_of_the_patches_of_an_order(grid, patch, mode):
    order = TokenOrder(grid, patch, prefix=3, suffix=2)
    raster = randn(2, order.tokens, 2, 4)
    image = raster[:, 3:-2].unflatten(1, grid)
    corners = itertools.product(*(range(0, n, p) for n, p in zip(grid, patch, strict=True)))
    cuts = [tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True)) for corner in corners]
    want = torch.stack([getattr(image[(slice(None), *cut)].flatten(1, -3), mode)(1) for cut in cuts], dim=1)
    torch.testing.assert_close(tile_pool(order.apply(raster), order, mode=mode), want)


def test_pool_with_learned_weights():
    order = TokenOrder((4, 4), (2, 2))
    x, weight = randn(1, 16, 2, 4), randn(4, seed=1).requires_grad_()
    got = tile_pool(order.apply(x), order, mode="sum", weight=weight)
    squares = x.unflatten(1, (2, 2, 2, 2))  # patch, row in it, patch, column in it
    want = torch.einsum("bifjghd,fg->bijhd", squares, weight.view(2, 2)).flatten(1, 2)
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got.sum(), weight)
    torch.testing.assert_close(grad, squares.sum((0, 1, 3, 5, 6)).flatten())


@pytest.mark.parametrize("block", [4, TokenOrder((5, 6), (2, 3))])
def test_pool_in_a_graph(block):
    pool = torch.compile(lambda x: tile_pool(x, block), fullgraph=True, backend="eager")
    x = randn(1, 30, 2, 4)
    torch.testing.assert_close(pool(x), tile_pool(x, block))


@pytest.mark.parametrize(
    ("block", "options", "message"),
    [
        (0, {}, "block=0"),
        (True, {}, "block=True"),
        ("4", {}, "block='4'"),
        (TokenOrder((3, 4)), {}, "no patches"),
        (TokenOrder((4, 4), (2, 2)), {}, "12 tokens; the order has 16"),
        (4, {"mode": "max"}, "mode='max'"),
        (5, {"weight": torch.ones(5)}, "12 tokens are no multiple of 5"),
        (TokenOrder((3, 4), (2, 2)), {"weight": torch.ones(4)}, "3 tokens are no multiple of 2"),
        (4, {"weight": torch.ones(3)}, r"weight has shape \(3,\)"),
    ],
)
def test_pools_that_are_refused(block, options, message):
    with pytest.raises(ValueError, match=message):
        tile_pool(randn(1, 12, 1, 4), block, **options)


def test_antidiagonals_by_a_loop():
    """XAttention's scores: sums along every stride-th antidiagonal, softmax over the keys, summed over the tile."""
    q, k, stride, block = randn(1, 32, 2, 8), randn(1, 64, 1, 8, seed=1), 8, (16, 32)
    full = torch.einsum("bqhd,bkgd->bhqk", q, k.expand(-1, -1, 1, -1)) / math.sqrt(8)
    sums = torch.zeros(1, 2, 4, 8, dtype=torch.float64)
    for m, n, i in itertools.product(range(4), range(8), range(stride)):
        sums[:, :, m, n] += full[:, :, m * stride + stride - 1 - i, n * stride + i]
    shares = (sums / stride).softmax(-1).unflatten(3, (2, 4)).sum(4).unflatten(2, (2, 2)).sum(3) / 2
    torch.testing.assert_close(tile_scores(q, k, "antidiagonal", block=block, stride=stride), shares)


SCORES = torch.tensor([[[[0.5, 0.1, 0.3, 0.1], [0.25, 0.05, 0.6, 0.1], [0.4, 0.3, 0.2, 0.1]]]])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, ["1010", "1010", "1100"]),
        ({"top_k": 0.25}, ["1000", "0010", "1000"]),
        ({"cdf": 0.75}, ["1010", "1010", "1110"]),
        ({"cdf": 0.01, "min_per_row": 2}, ["1010", "1010", "1100"]),
        ({"percentile": 0.75}, ["1000", "0010", "1000"]),
        ({"percentile": 1.0, "min_per_row": 0}, ["0000", "0010", "0000"]),
        ({"top_k": 1, "force": torch.tensor([False, True, False, False])}, ["1100", "0110", "1100"]),
    ],
)
def test_selection(options, kept):
    mask = tile_select(SCORES, (90, 128), (32, 32), **options)
    want = torch.tensor([[c == "1" for c in row] for row in kept])
    assert torch.equal(mask.tiles()[0, 0], want)


def test_forbidden_tiles_are_never_chosen():
    forbid = TileMask.from_tiles(torch.tensor([[True, False, False, False]] * 3), (90, 128), (32, 32))
    mask = tile_select(SCORES, (90, 128), (32, 32), top_k=2, forbid=forbid)
    assert torch.equal(
        mask.tiles()[0, 0].int(), torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0]], dtype=torch.int)
    )


@pytest.mark.parametrize(("name", "most"), [("SpargeAttn", 16), ("VSA", 7), ("DraftAttention", 11), ("XAttention", 14)])
def test_choosing_tiles_is_few_kernels(name: str, most: int) -> None:
    """On a GPU, counted on tensors without data; two of them make the lists. Queries and keys are read once."""
    found = selection.cost(selection.METHODS[name], 4096, 8, 128)
    assert found.kernels <= most
    if name != "XAttention":
        assert found.moved < 1.25 * 2 * 4096 * 8 * 128 * 2
