"""What a run has cost so far: seconds, CPU seconds of all threads, peak memory."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator

import torch


class Clock:
    """Adds up the time of training alone.

    Args:
        seconds: Wall-clock seconds of the run so far, of a checkpoint.
        cpu_seconds: CPU seconds of this process, likewise.
    """

    def __init__(self, seconds: float = 0.0, cpu_seconds: float = 0.0) -> None:
        self._seconds = seconds - time.perf_counter()
        self._cpu = cpu_seconds - time.process_time()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds."""
        return self._seconds + time.perf_counter()

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of all threads of this process."""
        return self._cpu + time.process_time()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Time within it does not count: evaluation and writing."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self._seconds -= time.perf_counter() - wall
        self._cpu -= time.process_time() - cpu


def peak_memory_mib(device: torch.device) -> float:
    """The most memory that was held: of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
