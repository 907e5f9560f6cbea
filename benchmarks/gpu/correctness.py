"""Every op of every backend against fp64: an error of at most twice plain torch's, at random calls over the contract.

The ops that calls without rare operands take have to give the bits of the whole ops. A kernel that fails is not timed.
"""

from __future__ import annotations

import kernels
import torch
from stage import Context, Record

SECONDS = 140.0
EXPECTED = 6.0
PARALLEL = 12  # time goes into compiling Triton's kernels; the tensors are small

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# ops with goals: whatever else is cut off, these are checked
FIRST = (
    "norm_modulate", "gate_residual_norm_modulate", "qk_norm_rope", "tile_attention", "tile_lists", "combine_history",
    "scatter_combine", "relative_difference", "gather_modulate", "scatter_merge", "write_kv_rows",
)  # fmt: skip


def items(context: Context) -> list[str]:
    """`BACKEND OP`: what the targets need first, compiled kernels before those of Triton."""
    from _raw_cases import BARE, OPS

    def place(op: str) -> int:
        return 0 if op.removesuffix("_backward") in FIRST else 1

    first, second = kernels.backends(context.device)
    ops = sorted([*OPS, *BARE], key=place)
    return [f"{first} {op}" for op in ops] + [f"{second} {op}" for op in ops if op not in BARE]


def run(item: str, context: Context) -> Record:
    """Checks one op: state "ok" or "absent"; AssertionError if it is wrong."""
    from _raw_cases import BARE

    backend, op = item.split()
    kernel = kernels.find(backend, op)
    if kernel is None:
        return {"state": "absent", "summary": "absent"}
    # Each call of Triton's may be another kernel to compile; the interpreter has run many more of them.
    seeds = max(1, context.seeds // 3) if backend == "triton" else context.seeds
    check = _check_bare if op in BARE else _check
    for seed in range(seeds):
        check(op, backend, seed, context.device)
    return {"state": "ok", "calls": seeds}


def _check(op: str, backend: str, seed: int, device: str) -> None:
    from _numerics import assert_all_close_to_truth
    from _raw_cases import describe, draw, run, run_plain, wanted, widened

    args = draw(op, seed, DTYPES[seed % 3], device)
    try:
        got = run(op, kernels.find(backend, op), args)
        results = wanted(got, run_plain(op, args), run_plain(op, widened(args)))
        assert_all_close_to_truth(*results, f"{op} seed {seed}")
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise AssertionError(f"{type(error).__name__}: {error} | {describe(args)}") from error


def _check_bare(op: str, backend: str, seed: int, device: str) -> None:
    from _raw_cases import bare_differs, whole_of

    kernel, whole = kernels.find(backend, op), kernels.find(backend, whole_of(op))
    assert kernel is not None and whole is not None, f"{op} is there without its whole op"
    differs = bare_differs(op, seed, DTYPES[seed % 3], kernel, whole, device)
    assert not differs, differs


def table(records: dict[str, Record]) -> str:
    """How many ops of each backend are right, and which are absent."""
    lines = ["| backend | ops right | absent |", "|---|---|---|"]
    for backend in dict.fromkeys(item.split()[0] for item in records):
        states = {item.split()[1]: r["state"] for item, r in records.items() if item.split()[0] == backend}
        absent = ", ".join(f"`{op}`" for op, what in states.items() if what == "absent") or "-"
        lines.append(f"| {backend} | {sum(what == 'ok' for what in states.values())} | {absent} |")
    return "\n".join(lines)
