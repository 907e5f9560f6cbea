"""The step mask."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskaccel.masks import Schedule, Window
from maskaccel.masks.schedule import reuses


def computed(schedule, steps):
    """The plan as bools, True where a step is computed."""
    plan = schedule.plan(steps)
    assert set(plan) <= {"compute", "reuse"}
    return [action == "compute" for action in plan]


def test_plan_of_interval_first_last():
    assert computed(Schedule(interval=3), 8) == [True, False, False, True, False, False, True, False]
    assert computed(Schedule(interval=3, first=2, last=1), 8) == [True, True, False, True, False, False, True, True]
    assert computed(Schedule(), 4) == [True] * 4


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 6), st.integers(1, 40))
def test_the_rule(interval, first, last, steps):
    plan = computed(Schedule(interval=interval, first=first, last=last), steps)
    assert plan == [s < first or s >= steps - last or s % interval == 0 for s in range(steps)]
    assert reuses(Schedule(interval=interval, first=first, last=last), steps) == (False in plan)


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_explicit_mask(mask):
    mask = [True, *mask]
    schedule = Schedule.from_mask(int(c) for c in mask)
    assert computed(schedule, len(mask)) == mask
    assert schedule == Schedule(computed=tuple(mask))
    assert reuses(schedule, len(mask)) == (False in mask)
    assert schedule.computes(len(mask) + 3, None), "beyond its end nothing is known: compute"


def test_last_replaces_the_end_of_an_explicit_mask():
    assert computed(Schedule.from_mask([1, 0, 0, 0], last=2), 4) == [True, False, True, True]


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


def test_a_cycle_of_actions_between_computed_steps():
    schedule = Schedule(interval=4, between=("partial", "reuse"))
    assert schedule.plan(8) == ["compute", "partial", "reuse", "partial"] * 2
    with pytest.raises(ValueError, match="between"):
        Schedule(between=("compute",))


def test_origin_moves_the_interval():
    assert computed(Schedule(interval=3, first=2, origin=1), 8) == [True, True, False, False, True, False, False, True]


def test_bins_are_run_lengths_and_stretch():
    schedule = Schedule.from_bins([2, 1], [3, 2], 8)
    assert computed(schedule, 8) == [True, True, False, False, False, True, False, False]
    assert computed(Schedule.from_bins([2, 1], [3, 2], 16), 16) == [c for c in schedule.computed for _ in range(2)]
    with pytest.raises(ValueError, match="must alternate"):
        Schedule.from_bins([2, 1], [3, 2, 1], 8)


def test_a_late_start_is_a_late_start_in_the_mask():
    from maskaccel.masks.schedule import At

    schedule = Schedule.from_mask([1, 1, 0, 0, 1, 0])
    assert [schedule.action(At(i, 4, offset=2)) for i in range(4)] == ["compute", "reuse", "compute", "reuse"]


def test_a_window_of_timesteps():
    window = Window(Schedule(interval=2), low=300, high=800)
    assert window.plan(5) == ["compute", "reuse", "compute", "reuse", "compute"]
    assert window.plan(4, [900, 850, 700, 100]) == ["compute", "compute", "compute", "compute"]
    assert window.plan(4, [900, 750, 700, 310]) == ["compute", "reuse", "compute", "reuse"]
    with pytest.raises(ValueError, match="low=800"):
        Window(Schedule(), low=800, high=300)
    with pytest.raises(ValueError, match="timesteps has 2 entries"):
        window.plan(3, [1, 2])
