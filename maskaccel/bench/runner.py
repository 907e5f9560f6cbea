"""Checks and times one op on one shape: correctness first, then every provider in turn, round after round.

Providers are our backends, eager, `torch.compile` of eager, installed peers, and two copies of as many bytes as the
op must
move: into memory that is there already, and into a new tensor (large CPU outputs pay for fresh pages, which no kernel
can avoid while it returns a new tensor). A backend of ours that fails the error rule is not timed.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from ..ops._backends import BACKENDS, refusal
from .accuracy import Verdict, judge_all
from .eager import Inputs
from .peers import PEERS
from .registry import Op, Outputs, Shape

COPIES = ("copy into", "copy to new")
OURS = "maskaccel "


@dataclass(frozen=True)
class Settings:
    """How a case is timed.

    Attributes:
        rounds: Samples of each provider.
        min_seconds: Least time of one sample; a short call is repeated within it.
        warmup: Calls before the first sample.
    """

    rounds: int = 15
    min_seconds: float = 0.005
    warmup: int = 3


@dataclass
class Timing:
    """Samples of one provider, in seconds per call, and the verdict that let it run."""

    provider: str
    verdict: Verdict | None = None
    refused: str | None = None
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.samples)

    def quantile(self, share: float) -> float:
        """The sample below which `share` of all samples lie."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass
class Case:
    """One op, shape, dtype and direction, with the timings of its providers."""

    op: str
    shape: Shape
    dtype: str
    device: str
    direction: str
    bytes: int
    model: str | None = None
    timings: dict[str, Timing] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        copy = {name: self.timings[name].median for name in COPIES}
        providers = {}
        for name, timing in self.timings.items():
            if not timing.samples:
                verdict = None if timing.verdict is None else asdict(timing.verdict)
                providers[name] = {"refused": timing.refused, "verdict": verdict}
                continue
            entry: dict[str, Any] = {
                "median_s": timing.median,
                "p20_s": timing.quantile(0.2),
                "p80_s": timing.quantile(0.8),
                "rounds": len(timing.samples),
                "bytes_per_s": self.bytes / timing.median,
            }
            if name not in COPIES:
                entry["of_copy_into"] = copy["copy into"] / timing.median
                entry["of_copy_to_new"] = copy["copy to new"] / timing.median
                entry["verdict"] = asdict(timing.verdict) if timing.verdict else None
            providers[name] = entry
        head = {k: getattr(self, k) for k in ("op", "model", "shape", "dtype", "device", "direction", "bytes")}
        return {**head, "providers": providers}


def backends_for(device: torch.device, dtype: torch.dtype, op: str | None = None) -> list[str]:
    """Kernel backends (not the reference) that can run (the op of that name) on this device."""
    return [name for name in BACKENDS if name != "reference" and refusal(name, device, dtype, op) is None]


def _label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _run(op: Op, backend: str | None, inputs: Inputs) -> Outputs:
    return op.run(inputs, backend)


def _forwards(op: Op, backends: Sequence[str | None], device: torch.device, compiled: bool) -> dict[str, Callable]:
    calls: dict[str, Callable[[Inputs], Outputs]] = {}
    for backend in backends:
        calls[f"{OURS}{backend or 'auto'}"] = functools.partial(_run, op, backend)
    calls["eager"] = op.eager
    if compiled:
        torch._dynamo.reset()  # every case compiles for its own static shape, as a served model would
        calls["compile"] = torch.compile(op.eager, dynamic=False)
    for peer in PEERS.get(op.name, ()):
        if peer.reason(device) is None:
            calls[peer.name] = peer.run
    return calls


def _grads(op: Op, inputs: Inputs, outputs: Outputs, cotangents: Outputs) -> Outputs:
    return torch.autograd.grad(outputs, [inputs[name] for name in op.wants_grad], cotangents)


def _cotangents(outputs: Outputs) -> Outputs:
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(t.shape, generator=g).to(device=t.device, dtype=t.dtype) for t in outputs)


class Oracle:
    """The truth in fp64 and plain torch's results for some inputs, computed once for all providers.

    Args:
        op: The op.
        inputs: Its inputs, without grad.
        backward: Hold the gradients instead of the outputs.
    """

    def __init__(self, op: Op, inputs: Inputs, *, backward: bool = False) -> None:
        self.op, self.inputs, self.backward = op, inputs, backward
        self.names = tuple(f"d{name}" for name in op.wants_grad) if backward else op.outputs
        self.plain = self._results(op.eager, inputs)
        self.truth = self._results(lambda i: op.run(i, "reference"), op.in_double(inputs))

    def _results(self, call: Callable[[Inputs], Outputs], inputs: Inputs) -> Outputs:
        if not self.backward:
            with torch.no_grad():
                return call(inputs)
        leaves = self.op.with_grad(inputs)
        outputs = call(leaves)
        dtype = self.inputs[self.op.wants_grad[0]].dtype  # values that are exact in it are exact in fp64 too
        return _grads(self.op, leaves, outputs, tuple(c.to(dtype).to(c.dtype) for c in _cotangents(outputs)))

    def judge(self, call: Callable[[Inputs], Outputs]) -> Verdict:
        """The error rule for one callable; `passed` is False, with the message in `note`, if it raises."""
        try:
            return judge_all(self._results(call, self.inputs), self.plain, self.truth, self.names)
        except Exception as error:  # the kernel under test may fail in any way; that is a verdict, not a crash
            return Verdict(False, math.inf, 0.0, 0.0, (str(error).strip() or type(error).__name__).splitlines()[0])


class _Clock:
    """Seconds of one call on a device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        # Larger than any L2, so that a sample does not find its inputs there.
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if self.cuda else None

    def measure(self, call: Callable[[], object], repeat: int) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            for _ in range(repeat):
                call()
            return (time.perf_counter() - begin) / repeat
        assert self.flush is not None
        self.flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _copies(count: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    source = torch.ones(max(count // 2, 1), dtype=dtype, device=device)
    target = torch.empty_like(source).fill_(0)
    return {"copy into": lambda: target.copy_(source), "copy to new": source.clone}


def run_case(
    op: Op,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    backward: bool = False,
    backends: Sequence[str | None] | None = None,
    compiled: bool = True,
    settings: Settings | None = None,
    model: str | None = None,
    progress: bool = True,
) -> Case:
    """Check, then time, every provider of an op on one shape.

    Args:
        op: From the registry.
        shape: As `op.dims` says.
        dtype: Of the activations.
        device: Where to run.
        backward: Time the backward alone (its forward runs before the clock starts).
        backends: Of ours; None takes every kernel backend that can run here.
        compiled: Also time `torch.compile` of the eager baseline.
        settings: Rounds and repeats.
        model: Name of the model that the shape is from.
        progress: Show a bar.

    Returns:
        The case with its timings.

    Raises:
        ValueError: The shape does not fit, the op has no backward, or a named backend cannot run here.
    """
    op.check_shape(shape)
    if backward and not op.wants_grad:
        raise ValueError(f"{op.name} has no backward")
    for backend in backends or ():
        reason = None if backend is None else refusal(backend, device, dtype, op.raw)
        if reason is not None:
            raise ValueError(f"backend={backend!r} cannot run here: {reason}")
    settings = settings or Settings()
    chosen = list(backends) if backends is not None else list(backends_for(device, dtype, op.raw))
    inputs = op.inputs(shape, dtype, device)
    count = op.elements_backward(shape) if backward else op.elements(shape)
    direction = "backward" if backward else "forward"
    case = Case(op.name, shape, _label(dtype), str(device), direction, count * dtype.itemsize, model)

    calls: dict[str, Callable[[], Any]] = {}
    setups: dict[str, Callable[[], Any]] = {}
    oracle = Oracle(op, inputs, backward=backward)
    for name, forward in _forwards(op, chosen, device, compiled).items():
        verdict = oracle.judge(forward)
        ours = name.startswith(OURS)
        # A baseline that runs is timed even if it is less exact than the rule: what it costs is the question.
        refused = None if verdict.passed or (not ours and math.isfinite(verdict.error)) else verdict.note
        case.timings[name] = Timing(name, verdict, refused)
        if refused is not None:
            continue
        if backward:
            setups[name], calls[name] = _backward_call(op, forward, inputs)
        else:
            calls[name] = functools.partial(forward, inputs)
    for name, copy in _copies(count, dtype, device).items():
        case.timings[name], calls[name] = Timing(name), copy
    _time(case, calls, setups, _Clock(device), settings, progress)
    return case


def _backward_call(op: Op, forward: Callable[[Inputs], Outputs], inputs: Inputs) -> tuple[Callable, Callable]:
    leaves = op.with_grad(inputs)
    cotangents = _cotangents(tuple(t.detach() for t in forward(leaves)))
    graph: list[Outputs] = []

    def setup() -> None:
        graph[:] = [forward(leaves)]

    def call() -> Outputs:
        return _grads(op, leaves, graph.pop(), cotangents)

    return setup, call


def _time(
    case: Case,
    calls: dict[str, Callable],
    setups: dict[str, Callable],
    clock: _Clock,
    settings: Settings,
    progress: bool,
) -> None:
    names = list(calls)
    repeat = {}
    with torch.set_grad_enabled(bool(setups)):
        for name in names:
            for _ in range(settings.warmup):
                if name in setups:
                    setups[name]()
                calls[name]()
            if name in setups:
                repeat[name] = 1  # a graph is spent by one backward
            else:
                once = clock.measure(calls[name], 1)
                repeat[name] = max(1, min(1000, int(settings.min_seconds / max(once, 1e-9))))
        title = f"{case.op} {'x'.join(map(str, case.shape))} {case.dtype} {case.direction}"
        for number in tqdm(range(settings.rounds), desc=title, disable=not progress, leave=False):
            # Another provider starts each round: nobody always runs after the one that leaves the caches warm.
            first = number % len(names)
            for name in names[first:] + names[:first]:
                if name in setups:
                    setups[name]()
                case.timings[name].samples.append(clock.measure(calls[name], repeat[name]))
