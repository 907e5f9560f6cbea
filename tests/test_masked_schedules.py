"""Schedules, groups and orders of masked models: counts that sum, laws, distances."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from _masked_models import chi_square

from maskaccel.masks import unmasking
from maskaccel.masks.unmasking import NoiseSchedule


@pytest.mark.parametrize("schedule", unmasking.RATIOS)
@pytest.mark.parametrize(("total", "steps"), [(256, 8), (1024, 64), (5, 8), (1, 3), (0, 2), (7, 1)])
def test_a_schedule_reveals_every_token_once(schedule, total, steps):
    counts = unmasking.reveal_counts(total, steps, schedule)
    assert len(counts) == steps and sum(counts) == total and min(counts) >= 0
    left = total
    for step, count in enumerate(counts[:-1], 1):
        wanted = max(1, min(left - 1, math.floor(total * unmasking.RATIOS[schedule](step / steps))))
        left, before = left - count, left
        assert left == min(before, wanted)


def test_the_cosine_schedule_of_maskgit():
    assert unmasking.reveal_counts(256, 8) == (5, 15, 24, 31, 39, 45, 48, 49)
    assert unmasking.mask_ratio(0) == 1 and unmasking.mask_ratio(1) == pytest.approx(0)


def test_even_counts_are_lladas():
    counts = unmasking.even_counts(torch.tensor([10, 3, 0]), 4)
    assert counts.tolist() == [[3, 3, 2, 2], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert unmasking.even_counts(8, 3).tolist() == [[3, 3, 2]]


@pytest.mark.parametrize("schedule", [NoiseSchedule(), NoiseSchedule("cosine", eps=1e-4), NoiseSchedule("poly", 3.0)])
def test_the_posterior_chains_to_alpha(schedule):
    """The chance to stay masked from 1 to t is the product over any grid: `(1 - alpha_t) / (1 - alpha_1)`."""
    times = [1.0, 0.8, 0.55, 0.3, 0.1]
    stay = math.prod(1 - schedule.reveal_probability(t, s) for t, s in itertools.pairwise(times))
    assert stay == pytest.approx((1 - schedule.alpha(0.1)) / (1 - schedule.alpha(1.0)))
    assert NoiseSchedule().reveal_probability(0.8, 0.6) == pytest.approx(0.25)  # MDLM's log-linear: (t - s) / t


def test_ancestral_counts_are_binomial():
    counts = torch.tensor(unmasking.ancestral_counts([6] * 4000, [0.3, 0.5], seed=1, finish=False))
    law = torch.tensor([math.comb(6, k) * 0.3**k * 0.7 ** (6 - k) for k in range(7)])
    assert chi_square(counts[0].bincount(minlength=7), law) < 3.5
    law = torch.tensor([math.comb(6, k) * 0.35**k * 0.65 ** (6 - k) for k in range(7)])
    assert chi_square(counts[1].bincount(minlength=7), law) < 3.5  # 0.7 * 0.5
    left = 6 - counts[0]
    assert float(counts[1].sum() / left.sum()) == pytest.approx(0.5, abs=0.02)
    assert torch.tensor(unmasking.ancestral_counts([6, 9], [0.3, 0.5, 0.1], seed=1)).sum(0).tolist() == [6, 9]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 12, 32, 33])
def test_dilated_levels_have_no_neighbours(length):
    levels = unmasking.dilated_levels(length)
    assert int(levels.min()) == 0 and levels.unique().numel() == int(levels.max()) + 1
    assert length < 3 or not (levels[1:] == levels[:-1]).any()
    assert int(levels.max()) + 1 <= max(1, math.ceil(math.log2(length)))
    if length == 8:
        assert levels.tolist() == [0, 2, 1, 2, 0, 2, 1, 2]


@pytest.mark.parametrize("grid", [(8, 8), (6, 10), (1, 5), (16, 4)])
def test_the_stratified_order(grid):
    place = unmasking.stratified_order(grid, seed=3)
    order = place.argsort()
    assert place.sort().values.equal(torch.arange(grid[0] * grid[1]))
    for depth in (1, 2):
        side = 2**depth
        if min(grid) < side:
            continue
        first = order[: side * side]
        y, x = first // grid[1], first % grid[1]
        assert (y * side // grid[0] * side + x * side // grid[1]).unique().numel() == side * side
    assert not unmasking.stratified_order((8, 8), 1).equal(unmasking.stratified_order((8, 8), 2))


def test_subtokens_and_back():
    tokens = torch.arange(27)[None]
    digits = unmasking.subtokens(tokens, 3, 3)
    assert digits[0, 5].tolist() == [0, 1, 2] and unmasking.from_subtokens(digits, 3).equal(tokens)
