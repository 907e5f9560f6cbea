"""Correctness and speed of the CUDA and Triton kernels on this machine's GPU.

    python benchmarks/gpu/run.py                  every op against fp64, then benchmarks; JSON into benchmarks/results/
    python benchmarks/gpu/run.py --correctness    the first half alone
    python benchmarks/gpu/run.py --dry-run        all steps at tiny shapes on the CPU, to test this script

Needs Python, torch and (for those kernels) Triton; the CUDA kernels come from a prebuilt maskaccel/lib/libmaskaccel.so.
Exit status: 0 good, 1 a kernel is wrong (it is not timed), 3 no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402

NAMESPACES = {"cuda": "maskaccel_raw", "triton": "maskaccel_triton"}
L2_FACTOR = 4  # operand sets in rotation cover this many times the L2 cache


def fingerprint(device: str) -> dict[str, Any]:
    """Machine, versions and commit."""

    def command(*words: str) -> str:
        try:
            return subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    found: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": command("git", "rev-parse", "HEAD"),
        "dirty": command("git", "status", "--porcelain", "-uno") not in ("", "unknown"),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit"
        found |= {
            "device": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory, "l2_bytes": p.L2_cache_size,
            "driver, sm clock, memory clock, power limit": command("nvidia-smi", query, "--format=csv,noheader"),
        }  # fmt: skip
    else:
        found["device"] = "cpu (dry run: figures mean nothing)"
    return found


def kernels(device: str) -> dict[str, Callable[[str], Any | None]]:
    """For each backend: raw op by name, or None where the backend has no kernel for it here."""
    from _raw_cases import plain

    import maskaccel.ops  # noqa: F401  (defines the ops)

    key = "CUDA" if device == "cuda" else "CPU"

    def lookup(namespace: str) -> Callable[[str], Any | None]:
        def find(op: str) -> Any | None:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{op}", key):
                return None
            return getattr(getattr(torch.ops, namespace), op).default

        return find

    if device == "cuda":
        return {backend: lookup(namespace) for backend, namespace in NAMESPACES.items()}
    return {"cpu": lookup("maskaccel_raw"), "reference": plain}


def check_all(device: str, seeds: int) -> tuple[dict[str, dict[str, str]], bool]:
    """Every op of every backend against fp64 by the error rule: `ok`, `absent`, or what is wrong."""
    from _numerics import assert_all_close_to_truth
    from _raw_cases import OPS, describe, draw, run, run_plain, wanted, widened

    report: dict[str, dict[str, str]] = {}
    good = True
    for backend, find in kernels(device).items():
        for op in OPS:
            kernel = find(op)
            state = "absent" if kernel is None else "ok"
            for seed in range(seeds if kernel is not None else 0):
                dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
                args = draw(op, seed, dtype, device)
                try:
                    got = run(op, kernel, args)
                    results = wanted(got, run_plain(op, args), run_plain(op, widened(args)))
                    assert_all_close_to_truth(*results, f"{op} seed {seed}")
                except (AssertionError, RuntimeError, NotImplementedError) as e:
                    state = f"{type(e).__name__}: {e} | {describe(args)}"
                    good = False
                    break
            report.setdefault(backend, {})[op] = state
            print(f"  {backend:9} {op:42} {state[:160]}", flush=True)
    return report, good


def check_bare(device: str, seeds: int) -> tuple[dict[str, dict[str, str]], bool]:
    """The ops that calls without rare operands take: the same bits as the whole ops."""
    from _raw_cases import BARE, bare_differs

    report: dict[str, dict[str, str]] = {}
    backend = "cuda" if device == "cuda" else "cpu"
    find = kernels(device)[backend]
    for name in BARE:
        kernel, whole = find(name), find(name.removesuffix("_bare"))
        state = "absent" if kernel is None or whole is None else "ok"
        for seed in range(seeds if state == "ok" else 0):
            dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
            state = bare_differs(name, seed, dtype, kernel, whole, device) or "ok"
            if state != "ok":
                break
        report.setdefault(backend, {})[name] = state
        print(f"  {backend:9} {name:42} {state[:160]}", flush=True)
    return report, all(state in ("ok", "absent") for state in report[backend].values())


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


def providers(case: Any, sets: list[tuple], device: str, dtype: torch.dtype, usable: dict[str, Any]) -> dict[str, Any]:
    """Callables that run one call on the next operand set."""
    turn = {"at": 0}

    def rotate() -> int:
        turn["at"] = (turn["at"] + 1) % len(sets)
        return turn["at"]

    found: dict[str, Any] = {}
    for backend, kernel in usable.items():
        if case.call is None:
            found[backend] = lambda kernel=kernel: kernel(*sets[rotate()])
        else:
            calls = [case.call(backend, args) for args in sets]
            found[backend] = lambda calls=calls: calls[rotate()]()
    half = max(1, case.bytes(dtype) // 2 // torch.empty(0, dtype=dtype).element_size())
    pairs = [tuple(torch.empty(half, device=device, dtype=dtype).normal_() for _ in range(2)) for _ in sets]

    def copy() -> None:
        target, source = pairs[rotate()]
        target.copy_(source)

    found["copy"] = copy
    function, _ = case.eager(sets[0])
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="inductor" if device == "cuda" else "eager", dynamic=False)
    for name, run in (("eager", function), ("compile", compiled)):
        if case.graph is None:
            found[name] = lambda run=run: run(*case.eager(sets[rotate()])[1])
        else:
            graphs = [case.graph(args, run) for args in sets]
            found[name] = lambda graphs=graphs: torch.autograd.grad(*graphs[rotate()], retain_graph=True)
    return found


def measure(case: Any, device: str, dtype: torch.dtype, usable: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Median and spread of every provider, interleaved."""
    one = case.bytes(dtype)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    count = max(1, min(16, math.ceil(L2_FACTOR * l2 / one)))
    sets = [case.operands(device, dtype) for _ in range(count)]
    runs = providers(case, sets, device, dtype, usable)
    timer = Timer(device)
    not_compiled = None
    for name, run in list(runs.items()):  # compile, warm up
        try:
            for _ in range(3):
                run()
        except Exception as e:
            if name != "compile" or isinstance(e, torch.OutOfMemoryError):
                raise
            not_compiled = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200]}"
            del runs[name]
    calls = {name: max(1, min(50, int(2.0 / max(timer(run, 1), 1e-3)))) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for r in range(rounds):
        order = list(runs) if r % 2 == 0 else list(reversed(runs))
        for name in order:
            samples[name].append(timer(runs[name], calls[name]))
    medians = {name: statistics.median(s) for name, s in samples.items()}
    rows = {}
    for name, s in samples.items():
        rows[name] = {
            "median_ms": medians[name],
            "min_ms": min(s),
            "max_ms": max(s),
            "gb_per_s": one / medians[name] / 1e6,
            "of_copy": medians["copy"] / medians[name],
        }
    return {
        "op": case.op, "model": case.model, "shape": case.shape, "dtype": str(dtype).removeprefix("torch."),
        "bytes": one, "operand_sets": count, "footprint_over_l2": count * one / l2 if l2 else None, "rounds": rounds,
        "providers": rows, "not_compiled": not_compiled,
    }  # fmt: skip


def bench_all(device: str, correct: dict[str, dict[str, str]], rounds: int, tiny: bool) -> list[dict[str, Any]]:
    """Times every case with every backend that passed its correctness check."""
    from cases import all_cases
    from torch._functorch import config as functorch_config

    # A compiled backward is timed by running it again on one graph.
    functorch_config.donated_buffer = False
    results = []
    for case in all_cases(tiny):
        usable = {b: find(case.op) for b, find in kernels(device).items() if correct[b].get(case.op) == "ok"}
        for dtype in (torch.bfloat16,) if not tiny else (torch.float32, torch.bfloat16):
            try:
                result = measure(case, device, dtype, usable, rounds)
            except torch.OutOfMemoryError:
                print(f"{case.name}: not enough memory, left out", flush=True)
                continue
            results.append(result)
            print(f"{case.name} {result['dtype']}", flush=True)
            if result["not_compiled"]:
                print(f"  torch.compile does not take the plain form: {result['not_compiled']}", flush=True)
            for name, row in result["providers"].items():
                print(
                    f"  {name:9} {row['median_ms']:9.4f} ms  [{row['min_ms']:.4f}, {row['max_ms']:.4f}]"
                    f"  {row['gb_per_s']:8.1f} GB/s  {row['of_copy']:6.1%} of copy",
                    flush=True,
                )
            if device == "cuda":
                torch.cuda.empty_cache()
    return results


def bench_attention(device: str, correct: dict[str, dict[str, str]], rounds: int, tiny: bool) -> list[dict[str, Any]]:
    """Attention against density, with every backend whose attention passed its correctness check."""
    from attention import sweep

    both = ("tile_attention", "tile_attention_backward")
    usable = [b for b, states in correct.items() if all(states.get(op) == "ok" for op in both)]
    return sweep(device, Timer(device), usable, min(rounds, 7), tiny)


def bench_tokens(device: str, rounds: int, tiny: bool) -> list[dict[str, Any]]:
    """Routed training steps, partial calls, CUDA graphs, and what must not wait for the device."""
    from tokens import sweep

    return sweep(device, Timer(device), min(rounds, 7), tiny)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="walk every step on the CPU at tiny shapes")
    parser.add_argument("--correctness", action="store_true", help="check, do not time")
    parser.add_argument("--seeds", type=int, default=45, help="random calls per op in the check")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds per case")
    parser.add_argument(
        "--out", type=Path, help="JSON file (default benchmarks/results/gpu-<device>.json; none for a dry run)"
    )
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        print("make gpu: no CUDA device (torch.cuda.is_available() is false); nothing was run")
        return 3
    device = "cpu" if args.dry_run else "cuda"
    if args.dry_run:
        args.seeds, args.rounds = min(args.seeds, 3), min(args.rounds, 2)
        torch.set_num_threads(1)

    found = fingerprint(device)
    print(f"device: {found['device']}, torch {found['torch']}, triton {found['triton']}, commit {found['commit'][:12]}")
    print("correctness: every op against fp64, error at most twice that of plain torch")
    report, good = check_all(device, args.seeds)
    bare, same = check_bare(device, args.seeds)
    for backend, states in bare.items():
        report[backend] |= states
    good &= same
    results = [] if args.correctness else bench_all(device, report, args.rounds, args.dry_run)
    attention = [] if args.correctness else bench_attention(device, report, args.rounds, args.dry_run)
    tokens = [] if args.correctness else bench_tokens(device, args.rounds, args.dry_run)
    target = args.out
    if target is None and not args.dry_run:
        name = "".join(c if c.isalnum() else "-" for c in str(found["device"]).lower())
        target = ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    if target is not None:
        os.makedirs(target.parent, exist_ok=True)
        record = {"fingerprint": found, "correctness": report, "results": results, "attention": attention}
        record["tokens"] = tokens
        target.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written: {target.relative_to(ROOT) if target.is_relative_to(ROOT) else target}")
    absent = [b for b, ops in report.items() if all(state == "absent" for state in ops.values())]
    if absent and not args.dry_run:
        print(f"no kernels of: {', '.join(absent)} (is maskaccel/lib/libmaskaccel.so built with MASKACCEL_CUDA=1?)")
    print("all kernels correct" if good else "WRONG RESULTS, see above: those kernels were not timed")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
