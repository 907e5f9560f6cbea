"""The step mask."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskaccel.masks import Schedule


def test_plan_of_interval_first_last():
    assert Schedule(interval=3).plan(8) == [True, False, False, True, False, False, True, False]
    assert Schedule(interval=3, first=2, last=1).plan(8) == [True, True, False, True, False, False, True, True]
    assert Schedule().plan(4) == [True] * 4


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 6), st.integers(1, 40))
def test_the_rule(interval, first, last, steps):
    plan = Schedule(interval=interval, first=first, last=last).plan(steps)
    assert plan == [s < first or s >= steps - last or s % interval == 0 for s in range(steps)]
    assert Schedule(interval=interval, first=first, last=last).reuses(steps) == (False in plan)


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_explicit_mask(mask):
    mask = [True, *mask]
    schedule = Schedule.from_mask(int(c) for c in mask)
    assert schedule.plan(len(mask)) == mask
    assert schedule == Schedule(computed=tuple(mask))
    assert schedule.reuses(len(mask)) == (False in mask)
    assert schedule.computes(len(mask) + 3, None), "beyond its end nothing is known: compute"


def test_last_replaces_the_end_of_an_explicit_mask():
    assert Schedule.from_mask([1, 0, 0, 0], last=2).plan(4) == [True, False, True, True]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"interval": 0}, r"interval=0 must be an integer, 1 or more"),
        ({"interval": 2.0}, r"interval=2.0 must be an integer"),
        ({"interval": True}, r"interval=True must be an integer"),
        ({"first": 0}, r"first=0 must be an integer, 1 or more"),
        ({"last": -1}, r"last=-1 must be an integer, 0 or more"),
        ({"computed": ()}, r"computed must be a non-empty tuple of bools"),
        ({"computed": (1, 0)}, r"computed must be a non-empty tuple of bools"),
        ({"computed": [True]}, r"computed must be a non-empty tuple of bools"),
        ({"computed": (False, True)}, r"computed\[0\] is False"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**fields)


def test_bad_runs():
    with pytest.raises(ValueError, match="last=2 needs the number of steps"):
        Schedule(interval=2, last=2).computes(1, None)
    with pytest.raises(ValueError, match="computed has 3 entries; the run has 5 steps"):
        Schedule.from_mask([1, 0, 0]).plan(5)
    with pytest.raises(ValueError, match="num_steps=0 must be 1 or more"):
        Schedule().plan(0)
