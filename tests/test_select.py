"""Selectors of tokens."""

from __future__ import annotations

import pytest
import torch
from zoo.common import randn

from maskaccel.state.select import gathered, hashed, one_per_cluster, top_rows, with_bonus


def test_hashes_are_even_and_depend_on_every_key():
    draw = hashed(1 << 14, 3, 1)
    assert draw.dtype == torch.int64 and draw.min() >= 0 and draw.max() < 2**32
    assert torch.equal(draw, hashed(1 << 14, 3, 1)), "a hash has no state"
    assert torch.equal(draw[:100], hashed(100, 3, 1)), "a token's number does not depend on how many there are"
    assert draw.unique().numel() == draw.numel()
    share = torch.bincount(draw >> 28, minlength=16) / draw.numel()
    assert (share - 1 / 16).abs().max() < 0.01
    for other in (hashed(1 << 14, 3, 2), hashed(1 << 14, 4, 1), hashed(1 << 14, 1, 3)):
        pair = torch.stack([draw, other]).double()
        assert torch.corrcoef(pair)[0, 1].abs() < 0.05


def test_top_rows():
    score = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert top_rows(score, 2).tolist() == [[1, 2], [0, 1]], "of equal scores the first"
    assert top_rows(score, 2, force=torch.tensor([False, False, False, True])).tolist() == [[1, 3], [0, 3]]
    with pytest.raises(ValueError, match="count=5 must be 1 to the number of tokens, 4"):
        top_rows(score, 5)


def test_the_best_of_each_cell_gets_a_bonus():
    score = randn(2, 24).abs()
    raised = with_bonus(score, 0.5, 2, (4, 6))
    ratio = (raised / score).reshape(2, 4, 6)
    for b in range(2):
        for top in range(0, 4, 2):
            for left in range(0, 6, 2):
                cell = score.reshape(2, 4, 6)[b, top : top + 2, left : left + 2]
                expected = torch.where(cell == cell.max(), 1.5, 1.0)
                torch.testing.assert_close(ratio[b, top : top + 2, left : left + 2], expected)
    assert with_bonus(score, 0.5, 2) is None, "24 tokens are no square"
    assert with_bonus(score, 0.5, 4, (4, 6)) is None, "6 columns are no whole cells of 4"


def test_one_token_of_each_cluster():
    labels = torch.randint(0, 5, (3, 40), generator=torch.Generator().manual_seed(0))
    order = hashed(40, 7)
    rows = one_per_cluster(labels, 5, order)
    assert rows.shape == (3, 5)
    for b in range(3):
        for cluster in range(5):
            members = (labels[b] == cluster).nonzero()[:, 0]
            assert rows[b, cluster] == members[order[members].argmax()]


def test_an_empty_cluster_repeats_a_token():
    labels = torch.tensor([[0, 0, 2, 2]])
    rows = one_per_cluster(labels, 3, torch.tensor([5, 9, 7, 6]))
    assert rows.tolist() == [[1, 1, 2]]


def test_gathered():
    x, index = randn(2, 5, 3), torch.tensor([[4, 0], [2, 2]])
    assert torch.equal(gathered(x, index), torch.stack([x[0, [4, 0]], x[1, [2, 2]]]))
