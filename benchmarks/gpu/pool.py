"""Runs the items of a stage in worker processes that may die or hang."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from paths import GPU

START_SECONDS = 120.0  # imports, the library and a CUDA context, on a cold disk
STARTS = 2  # workers that do not start, after which a stage is given up
INDUCTOR_CACHE, TRITON_CACHE = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
LOGGED = 100_000  # characters of each worker's output that are kept
TAIL = 2000  # characters of output that go with a failure


class Process:
    """One worker process, which imports `modules` first: its orders, its answers and what it printed."""

    def __init__(self, log: IO[bytes], *modules: str) -> None:
        self._log = log
        # Appended to: `tail` moves the place to read from alone. Closed by `stop`.
        self._output = tempfile.TemporaryFile(mode="a+b")  # noqa: SIM115
        reading, writing = os.pipe()
        self.popen = subprocess.Popen(
            [sys.executable, str(GPU / "worker.py"), str(writing), *modules],
            stdin=subprocess.PIPE, stdout=self._output, stderr=subprocess.STDOUT,
            pass_fds=(writing,), start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        os.set_blocking(reading, False)
        self.reading, self._held = reading, b""
        self.item: str | None = None
        self.began = time.monotonic()
        self.limit, self.cut = START_SECONDS, ""
        self.ready = False

    def order(self, **words: Any) -> None:
        """Sends an order. Orders are shorter than a pipe holds: this never waits for the process."""
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead, and found dead by whoever reads its answers
            self.popen.stdin.write(json.dumps(words).encode() + b"\n")
            self.popen.stdin.flush()

    def begin(self, item: str, limit: float, cut: str) -> None:
        """Sends an item, to be answered within `limit` seconds; `cut` says why where that is less than its due."""
        self.item, self.began, self.limit, self.cut = item, time.monotonic(), limit, cut
        self.order(item=item)

    @property
    def seconds(self) -> float:
        """Since the item or the start began."""
        return time.monotonic() - self.began

    def answers(self) -> list[dict[str, Any]]:
        """Whole answers so far."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.reading, 1 << 16):
                self._held += data
        *lines, self._held = self._held.split(b"\n")
        return [json.loads(line) for line in lines]

    def tail(self) -> str:
        """The end of what it printed."""
        return self._end(TAIL).decode(errors="replace").strip()

    def _end(self, length: int) -> bytes:
        end = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, end - length))
        return self._output.read()

    def died(self) -> str | None:
        """How the process ended; None while it runs."""
        code = self.popen.poll()
        if code is None:
            return None
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"the process died of {signal.Signals(-code).name}"
        return f"the process ended with status {code}"

    def stop(self) -> None:
        """Ends the process and all it started, and moves its output into the log."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may take its time to end a kernel
            self.popen.wait(timeout=30)
        os.close(self.reading)
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.close()
        self._log.write(self._end(LOGGED))
        self._log.flush()
        self._output.close()


def share_caches() -> None:
    """One cache of compiled code for all workers, so that what one compiled another finds.

    Torch would give Triton another folder once a process has compiled something, and the one before would not count.
    """
    folder = Path(tempfile.gettempdir()) / f"maskaccel-gpu-{os.getuid()}"
    os.environ.setdefault(INDUCTOR_CACHE, str(folder / "inductor"))
    os.environ.setdefault(TRITON_CACHE, str(folder / "triton"))


@dataclass
class Job:
    """A stage's items and limits.

    Attributes:
        module: Its module.
        items: What to run, in this order.
        context: Fields of the stage's context.
        seconds: The most that one item may take.
        expected: The usual time of an item.
        parallel: Workers at once.
        end: `time.monotonic()` at which the stage is over.
        why: What that end is.
        done: Called with every item and its entry.
        left: Items that time did not allow, once the stage is over.
    """

    module: str
    items: list[str]
    context: dict[str, Any]
    seconds: float
    expected: float
    parallel: int
    end: float
    why: str
    done: Callable[[str, dict[str, Any]], None]
    left: list[str] = field(default_factory=list)


class Pool:
    """Worker processes for one stage after the other.

    Args:
        log: Takes what workers print.
        keep: Let workers serve the next stage too, and start no spare one: for stages that touch no device.
    """

    def __init__(self, log: IO[bytes], keep: bool = False) -> None:
        self.keep, self._log = keep, log
        self._idle: list[Process] = []
        self._busy: list[Process] = []
        self._scratch = tempfile.TemporaryDirectory()

    def close(self) -> None:
        """Ends all processes."""
        for process in [*self._idle, *self._busy]:
            process.stop()
        self._idle, self._busy = [], []
        self._scratch.cleanup()

    def run(self, job: Job) -> str | None:
        """Runs a stage. Items without an entry are in `job.left`; returns why, if it is not that time was up."""
        waiting, starts_failed, problem = deque(job.items), 0, None
        path = Path(self._scratch.name) / "context.json"
        path.write_text(json.dumps(job.context))
        while waiting or any(p.item for p in self._busy):
            if starts_failed >= STARTS or (time.monotonic() >= job.end and not any(p.item for p in self._busy)):
                break
            while waiting and len(self._busy) < min(job.parallel, len(waiting) + sum(bool(p.item) for p in self._busy)):
                self._busy.append(self._take(job, path))
            for process in list(self._busy):
                if not process.ready or process.item is not None:
                    continue
                if waiting and job.end - time.monotonic() >= min(job.expected, job.seconds):
                    limit = min(job.seconds, job.end - time.monotonic())
                    process.begin(waiting.popleft(), limit, job.why if limit < job.seconds else "")
                else:
                    job.left += waiting
                    waiting.clear()
            self._wait()
            for process in list(self._busy):
                problem = self._look(process, job) or problem
                starts_failed += process not in self._busy and not process.ready
        job.left = [*job.left, *(p.item for p in self._busy if p.item is not None), *waiting]
        for process in list(self._busy):
            self._drop(process, reuse=process.ready)
        return problem if starts_failed >= STARTS else None

    def _take(self, job: Job, path: Path) -> Process:
        alive = [p for p in self._idle if p.died() is None]
        for process in self._idle:
            if process not in alive:
                process.stop()
        process = alive.pop() if alive else Process(self._log)
        self._idle = alive
        if not self.keep and not self._idle:
            self._idle = [Process(self._log, "maskaccel.ops")]  # imports while the other begins
        process.ready, process.item, process.began, process.limit = False, None, time.monotonic(), START_SECONDS
        process.order(module=job.module, context=str(path), parallel=job.parallel)
        return process

    def _drop(self, process: Process, reuse: bool = False) -> None:
        self._busy.remove(process)
        if reuse and self.keep:
            self._idle.append(process)
        else:
            process.stop()

    def _wait(self) -> None:
        """Until an answer may be there or a limit is over."""
        with selectors.DefaultSelector() as selector:
            for process in self._busy:
                selector.register(process.reading, selectors.EVENT_READ)
            rest = min((p.limit - p.seconds for p in self._busy), default=0.0)
            selector.select(timeout=max(0.0, min(rest, 0.5)))

    def _look(self, process: Process, job: Job) -> str | None:
        """Takes what a process answered; one that is dead, broken or late is ended. Why it did not start, if so."""
        tail, died = process.tail(), process.died()  # before the answers: what it said before its end is read
        for answer in process.answers():
            if "ready" in answer:
                process.ready = True
            elif process.item is None:
                self._drop(process)
                return f"a worker does not start: {answer['error']}"
            else:
                self._entry(process, job, answer)
                if answer.get("broken"):
                    self._drop(process)
                    return None
        late = process.seconds > process.limit and not (process.ready and process.item is None)
        if died is None and not late:
            return None
        why = died or f"took longer than {process.limit:.0f} s"
        if process.item is not None and late and process.cut:
            job.left.append(process.item)
        elif process.item is not None:
            self._entry(process, job, {"error": why})
        self._drop(process)
        return None if process.ready else f"a worker does not start: {why}\n{tail}"

    def _entry(self, process: Process, job: Job, answer: dict[str, Any]) -> None:
        assert process.item is not None
        entry: dict[str, Any] = {
            "state": "ok" if "record" in answer else "failed",
            "seconds": round(process.seconds, 2),
        }
        if "record" in answer:
            entry["record"] = answer["record"]
        else:
            entry |= {"error": answer["error"], "output": process.tail()}
        item, process.item = process.item, None
        job.done(item, entry)
