"""`maskaccel doctor`: every op on every backend of this machine, forward and backward, against the fp64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..bench.registry import DTYPES, OPS, Op, Shape
from ..bench.runner import Oracle
from ..ops._backends import BACKENDS, refusal

# Widths that are no multiple of a vector, rows that are no multiple of a tile, and one ordinary size.
_TOKENS: tuple[Shape, ...] = ((2, 77, 1152), (3, 5, 67))
SHAPES: dict[str, tuple[Shape, ...]] = {
    "norm_modulate": _TOKENS,
    "gate_residual_norm_modulate": _TOKENS,
    "gate_residual": _TOKENS,
    "qk_norm_rope": ((2, 33, 4, 64), (1, 7, 3, 72)),
    "gated_activation.swiglu": ((2, 33, 2048), (3, 5, 134)),
    "gated_activation.geglu": ((2, 33, 2048), (3, 5, 134)),
    "relative_difference": _TOKENS,
    "combine_history": tuple((3, *shape) for shape in _TOKENS),
    "combine_sites": tuple((4, 2, *shape) for shape in _TOKENS),
    "gram": tuple((5, *shape) for shape in _TOKENS),
    "scatter_combine": tuple((2, *shape) for shape in _TOKENS),
    "scatter_combine.clusters": tuple((2, *shape) for shape in _TOKENS),
    "kmeans": _TOKENS,
    "combine_history_norm_modulate": tuple((3, *shape) for shape in _TOKENS),
    "norm_modulate_difference": _TOKENS,
    **dict.fromkeys(
        ("tile_attention", "tile_attention.quarter", "merge_attention", "linear_attention", "attention_column_sums"),
        ((2, 150, 4, 64), (1, 37, 2, 72)),
    ),
    **dict.fromkeys(("gather_rows", "gather_modulate", "scatter_merge", "sparse_dense_fuse", "select_active"), _TOKENS),
    **dict.fromkeys(("merge_tokens", "unmerge_tokens"), ((2, 64, 1152), (3, 6, 67))),
    **dict.fromkeys(("write_kv_rows", "read_kv_rows"), ((2, 33, 4, 64), (1, 8, 3, 72))),
    "confidence_unmask": ((2, 33, 1000), (1, 7, 37)),
}


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        op: Name of the op, or "all ops" for a backend that cannot run.
        backend: Backend that ran.
        device: Device it ran on.
        dtype: Short name of the dtype.
        direction: "forward" or "backward".
        outcome: "pass", "fail" or "unavailable".
        error: Largest error as a share of what the rule allows.
        note: Why it failed or is unavailable.
    """

    op: str
    backend: str
    device: str
    dtype: str
    direction: str
    outcome: str
    error: float | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def _judge(op: Op, backend: str, device: torch.device, dtype: str, backward: bool) -> Check:
    direction = "backward" if backward else "forward"
    worst = 0.0
    for shape in SHAPES[op.name]:
        inputs = op.inputs(shape, DTYPES[dtype], device, seed=7)
        verdict = Oracle(op, inputs, backward=backward).judge(lambda i: op.run(i, backend))
        if not verdict.passed:
            note = f"shape {shape}: {verdict.note}"
            return Check(op.name, backend, str(device), dtype, direction, "fail", None, note)
        worst = max(worst, verdict.error / verdict.allowed if verdict.allowed else 0.0)
    return Check(op.name, backend, str(device), dtype, direction, "pass", worst)


def _devices(device: str | None) -> Iterator[torch.device]:
    if device is not None:
        torch.empty(0, device=device)  # an unknown or absent device raises here, with torch's message
        yield torch.device(device)
        return
    if torch.cuda.is_available():
        yield torch.device("cuda", torch.cuda.current_device())
    yield torch.device("cpu")


def examine(device: str | None = None) -> list[Check]:
    """Check every op on every backend that serves the devices here.

    Args:
        device: Only this device; None takes the current GPU, if there is one, and the CPU.

    Returns:
        One check for each op, backend, dtype and direction, and one for each backend that cannot run.
    """
    checks = []
    for where in _devices(device):
        for backend in BACKENDS:
            reason = refusal(backend, where, torch.float32)
            if reason is not None:
                checks.append(Check("all ops", backend, str(where), "", "", "unavailable", note=reason))
                continue
            for op in OPS.values():
                reason = refusal(backend, where, torch.float32, op.raw)
                if reason is not None:
                    checks.append(Check(op.name, backend, str(where), "", "", "unavailable", note=reason))
                    continue
                for dtype in DTYPES:
                    for backward in (False, True) if op.wants_grad else (False,):
                        checks.append(_judge(op, backend, where, dtype, backward))
    return checks


def print_table(checks: list[Check]) -> None:
    """The checks as text, one line for each op and backend; failures in full."""
    print(f"{'op':30} {'device':8} {'backend':10} {'forward':22} {'backward':22}")
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.op, check.device, check.backend), []).append(check)
    for (op, device, backend), group in groups.items():
        if group[0].outcome == "unavailable":
            print(f"{op:30} {device:8} {backend:10} unavailable: {group[0].note}")
            continue
        print(f"{op:30} {device:8} {backend:10} {_cell(group, 'forward'):22} {_cell(group, 'backward'):22}".rstrip())
    failed = [check for check in checks if check.outcome == "fail"]
    for check in failed:
        print(f"FAIL {check.op} {check.backend} {check.device} {check.dtype} {check.direction}: {check.note}")
    passed = sum(check.outcome == "pass" for check in checks)
    print(
        f"{passed} checks passed, {len(failed)} failed (fp32, bf16, fp16; % is the error as a share of what is allowed)"
    )


def _cell(group: list[Check], direction: str) -> str:
    mine = [check for check in group if check.direction == direction]
    if not mine:
        return "no derivative"
    bad = [check.dtype for check in mine if check.outcome == "fail"]
    if bad:
        return f"FAIL {' '.join(bad)}"
    return f"pass ({max(check.error or 0.0 for check in mine):.0%})"
