"""Measurements that run in turn, round after round, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any


def samples(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each of `measures` returned in each round. Who is first and who is next to whom changes every round."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    names = list(measures)
    for i in range(rounds):
        order = names[i % len(names) :] + names[: i % len(names)]
        for name in order if i % 2 == 0 else reversed(order):
            found[name].append(measures[name]())
    return found


def medians(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of the rounds of each."""
    return {name: statistics.median(values) for name, values in samples(measures, rounds).items()}


def timed(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each call by the clock: the median of its rounds, after one call of each."""
    for call in calls.values():
        call()
    return medians({name: partial(_seconds, call) for name, call in calls.items()}, rounds)


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
