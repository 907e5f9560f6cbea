"""Every op at shapes of models: our kernels, eager torch, `torch.compile` and a copy of the same bytes, interleaved.

Operand sets rotate, so that together they exceed the L2 cache four times.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import kernels
import torch
from cases import Case, all_cases
from stage import Context, Record, Target

SECONDS = 60.0
EXPECTED = 2.5
L2_FACTOR = 4
DTYPE = torch.bfloat16
NEAR = 0.05  # at the size that is timed; the rule of numerics is checked at small ones


def items(context: Context) -> list[str]:
    """Cases, those with goals first."""
    return list(all_cases(context.tiny))


def _ours(case: Case, backend: str, sets: list[tuple]) -> list[Callable[[], Any]]:
    if case.call is not None:
        return [case.call(backend, args) for args in sets]
    kernel = kernels.find(backend, case.op)
    assert kernel is not None
    return [lambda args=args: kernel(*args) for args in sets]


def _plain(case: Case, run: Callable[..., Any], sets: list[tuple]) -> list[Callable[[], Any]]:
    if case.graph is None:
        return [lambda args=args: run(*case.eager(args)[1]) for args in sets]
    graphs = [case.graph(args, run) for args in sets]
    return [lambda graph=graph: torch.autograd.grad(*graph, retain_graph=True) for graph in graphs]


def _copies(case: Case, count: int, device: str) -> list[Callable[[], Any]]:
    half = max(1, case.bytes(DTYPE) // 2 // DTYPE.itemsize)
    pairs = [tuple(torch.empty(half, device=device, dtype=DTYPE).normal_() for _ in range(2)) for _ in range(count)]
    return [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]


def _in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """One call after the other, each on operands of its own."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def warm(item: str, context: Context) -> Record:
    """Compiles a case as `run` will: its plain form, and Triton's kernels where they are right."""
    case = all_cases(context.tiny)[item]
    args = case.operands(context.device, DTYPE)
    for call in _plain(case, kernels.compiled(case.eager(args)[0], context.device), [args]):
        call()
    good, _ = kernels.usable(context, case.op)
    for backend in set(good) & {"triton"}:
        _ours(case, backend, [args])[0]()
    return {}


def run(item: str, context: Context) -> Record:
    """Median and spread of every provider; a backend without a good check is named, not timed."""
    case, device = all_cases(context.tiny)[item], context.device
    one = case.bytes(DTYPE)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    count = max(1, min(16, math.ceil(L2_FACTOR * l2 / one)))
    sets = [case.operands(device, DTYPE) for _ in range(count)]
    good, refused = kernels.usable(context, case.op)
    ours = {backend: _ours(case, backend, sets) for backend in good}
    plain = _plain(case, case.eager(sets[0])[0], sets)
    want, wrong = plain[0](), {}
    distances = {backend: kernels.distance(ours[backend][0](), want) for backend in good}
    if case.goal is not None:  # others may choose: the larger of equal values, the nearest of equal centers
        wrong = {b: f"{d:.2g} from eager torch, relative to its norm" for b, d in distances.items() if not d <= NEAR}
    calls = {backend: _in_turn(ours[backend]) for backend in good if backend not in wrong}
    calls |= {"copy": _in_turn(_copies(case, count, device)), "eager": _in_turn(plain)}
    try:
        compiled = _in_turn(_plain(case, kernels.compiled(case.eager(sets[0])[0], device), sets))
        compiled()
        calls["compile"] = compiled
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # it does not take every plain form
        refused["compile"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    samples = context.samples(calls)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    rows = {
        name: {
            "median_ms": medians[name], "min_ms": min(values), "max_ms": max(values),
            "gb_per_s": one / medians[name] / 1e6, "of_copy": medians["copy"] / medians[name],
        }
        for name, values in samples.items()
    }  # fmt: skip
    words = [f"{name} {row['of_copy']:.0%} of copy" for name, row in rows.items() if name != "copy"]
    mine = best({"providers": rows})
    if mine is not None and "compile" in rows:
        words.append(f"{medians['compile'] / medians[mine]:.2f}x of torch.compile")
    return {
        "op": case.op, "model": case.model, "shape": case.shape, "dtype": str(DTYPE).removeprefix("torch."),
        "bytes": one, "operand_sets": count, "footprint_over_l2": count * one / l2 if l2 else None,
        "rounds": context.rounds, "goal": case.goal, "providers": rows, "refused": refused,
        "wrong": wrong, "distance_from_eager": distances,
        "summary": ", ".join(words),
    }  # fmt: skip


def best(record: Record) -> str | None:
    """The backend that the library takes: the compiled kernels where they were timed."""
    return next((name for name in ("cuda", "triton", "cpu", "reference") if name in record["providers"]), None)


def targets(records: dict[str, Record]) -> list[Target]:
    """The share of copy bandwidth of each op with a goal, and being no slower than torch.compile."""
    found = []
    for name, case in all_cases(False).items():
        if case.goal is None:
            continue
        record = records.get(name, {"providers": {}})
        rows, ours = record["providers"], best(record)
        found.append(Target(name, case.goal, rows[ours]["of_copy"] if ours else None, "of copy"))
        ahead = rows["compile"]["median_ms"] / rows[ours]["median_ms"] if ours and "compile" in rows else None
        if ours is None or ahead is not None:
            found.append(Target(f"{name} against torch.compile", 1.0, ahead))
    return found


def table(records: dict[str, Record]) -> str:
    """A line for each case: time, bandwidth, and the shares of the others."""
    head = ("case", "backend", "µs", "GB/s", "of copy", "eager", "torch.compile", "other backends, of copy")
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * 5 + "---|"]
    for item, record in records.items():
        rows, ours = record["providers"], best(record)
        if ours is None:
            why = "; ".join(f"{name}: {reason}" for name, reason in record["refused"].items())
            lines.append(f"| {item} | - | | | | | | {why} |")
            continue
        mine = rows[ours]
        ratios = [
            f"{rows[name]['median_ms'] / mine['median_ms']:.2f}x" if name in rows else "-"
            for name in ("eager", "compile")
        ]
        known = (ours, "copy", "eager", "compile")
        others = ", ".join(f"{name} {row['of_copy']:.0%}" for name, row in rows.items() if name not in known) or "-"
        slower = " **slower than torch.compile**" if ratios[1] != "-" and float(ratios[1][:-1]) < 1 else ""
        figures = f"{mine['median_ms'] * 1e3:.1f} | {mine['gb_per_s']:.0f} | {mine['of_copy']:.0%}"
        lines.append(f"| {item}{slower} | {ours} | {figures} | {' | '.join(ratios)} | {others} |")
    return "\n".join(lines)
