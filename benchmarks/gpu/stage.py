"""What a stage of `make gpu` is, and what the runner hands to it.

A stage is a module of this folder with

    SECONDS: float                                     the most that one item may take; a worker beyond it is killed
    def items(context: Context) -> list[str]           the pieces of work, most important first; touches no device
    def run(item: str, context: Context) -> Record     one piece, in a worker process; returns what JSON can hold

The runner gives every stage worker processes of its own, because a kernel that faults or hangs takes its process along:
the item is then recorded as failed, with the reason, and the next one starts in a fresh process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Record = dict[str, Any]


class Timer:
    """Milliseconds of one call: CUDA events on a GPU, the clock elsewhere."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def __call__(self, run: Callable[[], Any], calls: int) -> float:
        """Mean of `calls` calls in a row."""
        if not self.cuda:
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - begin) * 1e3 / calls
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(400_000)  # the queue fills meanwhile, so that host overhead stays out of the figure
        begin_event.record()
        for _ in range(calls):
            run()
        end_event.record()
        end_event.synchronize()
        return begin_event.elapsed_time(end_event) / calls


@dataclass(frozen=True)
class Context:
    """How a stage is to run.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        tiny: Sizes for a dry run: every path, in seconds, on a CPU.
        rounds: Interleaved rounds of a timing.
        seeds: Random calls of a correctness check.
        earlier: Records of the stages before, by stage and item.
    """

    device: str = "cuda"
    tiny: bool = False
    rounds: int = 15
    seeds: int = 45
    earlier: dict[str, dict[str, Record]] = field(default_factory=dict)

    @property
    def timer(self) -> Timer:
        """A timer for the device."""
        return Timer(self.device)


class Stage(Protocol):
    """The module of a stage."""

    SECONDS: float

    def items(self, context: Context) -> list[str]:
        """Names of the pieces of work, most important first."""

    def run(self, item: str, context: Context) -> Record:
        """One piece of work."""
