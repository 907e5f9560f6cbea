"""What a stage of `make gpu` is, and what the runner hands to it.

A stage is a module of this folder with

    SECONDS: float                                     the most that one item may take; a worker beyond it is killed
    def items(context: Context) -> list[str]           the pieces of work, most important first; touches no device
    def run(item: str, context: Context) -> Record     one piece, in a worker process; returns what JSON can hold

and, where they apply,

    EXPECTED: float = SECONDS / 4                      usual seconds of an item; none is begun with less time left
    PARALLEL: int = 1                                  workers at once: above 1 only where nothing is timed
    def warm(item: str, context: Context) -> Record    compiles what the item will compile; several run at once
    def finish() -> None                               after the last item, in the runner
    def targets(records: dict[str, Record]) -> list[Target]   goals, and what was reached
    def table(records: dict[str, Record]) -> str       Markdown of the records, by item, for docs/performance.md

A worker serves one stage: a kernel that faults or hangs takes its process along. The item is then recorded as failed,
with the reason and the last lines of output, and the next one starts in a fresh process. An item whose `run` raises has
failed too: an assertion is how a check says so. Keys of a record that the runner reads: "summary" is printed beside the
item's name; "wrong", where it is not empty, counts as a failure, and what else was measured is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import paths  # noqa: F401

import interleaved  # isort: skip

Record = dict[str, Any]
CYCLES_PER_MS = 2_000_000  # of a clock near 2 GHz


class Timer:
    """Milliseconds of one call: CUDA events on a GPU, the clock elsewhere."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def __call__(self, run: Callable[[], Any], calls: int, ahead_ms: float = 0.2) -> float:
        """Mean of `calls` calls in a row.

        Args:
            run: The call.
            calls: How many.
            ahead_ms: The device waits so long while the queue fills, so that the host's part stays out of the figure.
        """
        if not self.cuda:
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - begin) * 1e3 / calls
        import torch

        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(ahead_ms * CYCLES_PER_MS))
        begin_event.record()
        for _ in range(calls):
            run()
        end_event.record()
        end_event.synchronize()
        return begin_event.elapsed_time(end_event) / calls

    def repeated(self, run: Callable[[], Any]) -> Callable[[], float]:
        """A measurement of as many calls as take about 2 ms, and whose queue is filled before the first begins."""
        run()
        calls = max(1, min(50, int(2.0 / max(self(run, 1), 1e-3))))
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        ahead_ms = 0.1 + 1.2e3 * (time.perf_counter() - begin)
        return partial(self, run, calls, ahead_ms)


@dataclass(frozen=True)
class Context:
    """How a stage is to run.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        tiny: Sizes for a dry run: every path, in seconds, on a CPU.
        rounds: Interleaved rounds of a timing.
        seeds: Random calls of a correctness check.
        earlier: Records of the stages before, by stage and item; of this build of the library on this device only.
        pending: Items that this run has yet to do, by stage; for the stage that compiles them.
    """

    device: str = "cuda"
    tiny: bool = False
    rounds: int = 15
    seeds: int = 45
    earlier: dict[str, dict[str, Record]] = field(default_factory=dict)
    pending: dict[str, list[str]] = field(default_factory=dict)

    @property
    def timer(self) -> Timer:
        """A timer for the device."""
        return Timer(self.device)

    def samples(self, calls: Mapping[str, Callable[[], Any]], rounds: int | None = None) -> dict[str, list[float]]:
        """Milliseconds of one call, for each round, interleaved: as many calls in a row as take about 2 ms."""
        measures = {name: self.timer.repeated(call) for name, call in calls.items()}
        return interleaved.samples(measures, rounds or self.rounds)


def broken(device: str) -> bool:
    """Whether the device's context is of no more use to this process."""
    if device != "cuda":
        return False
    import torch

    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").sum().item()
    except torch.OutOfMemoryError:
        return False
    except RuntimeError:
        return True
    return False


@dataclass(frozen=True)
class Target:
    """A goal of the project, and the figure that was measured.

    Attributes:
        what: Op, shape and peer.
        goal: The figure to reach.
        got: The figure measured; None where nothing was.
        unit: What both count.
        at_most: The goal is not to be exceeded, instead of reached.
    """

    what: str
    goal: float
    got: float | None
    unit: str = "x"
    at_most: bool = False

    @property
    def reached(self) -> bool | None:
        """Whether the goal was reached; None where nothing was measured."""
        if self.got is None:
            return None
        return self.got <= self.goal if self.at_most else self.got >= self.goal
