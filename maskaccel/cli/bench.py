"""`maskaccel bench`: one op on a user's own shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..bench import report
from ..bench.registry import OPS, dtype_of, find
from ..bench.runner import Settings, run_case


def print_ops() -> None:
    """The ops with the shapes of real models."""
    for op in OPS.values():
        print(f"{op.name}  --shape {op.dims.replace(', ', ',').replace(' ', '_')}")
        for model, shape in op.shapes.items():
            print(f"    {','.join(map(str, shape)):24} {model}")


def time_op(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[str],
    backends: Sequence[str] | None,
    device: str | None,
    backward: bool,
    compiled: bool,
    rounds: int,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Time one op; prints each case unless `progress` is off.

    Args:
        name: Of the registry; `gated_activation` alone means its SwiGLU.
        shapes: As the op's dims say; none given: the first real model.
        dtypes: Names of dtypes.
        backends: Of ours; None takes every kernel backend that can run.
        device: None takes a GPU if there is one.
        backward: Time the backward.
        compiled: Also time `torch.compile`.
        rounds: Samples of each provider.
        progress: Show bars and tables.

    Returns:
        The document that `maskaccel.bench.report` writes.

    Raises:
        ValueError: The op, a shape, dtype or backend is not known or cannot run; the message says which.
    """
    op = find("gated_activation.swiglu" if name == "gated_activation" else name)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: this torch sees no GPU")
    settings = Settings(rounds=rounds)
    cases = []
    for shape in shapes or [next(iter(op.shapes.values()))]:
        for dtype in dtypes:
            case = run_case(
                op, shape, dtype_of(dtype), where, backward=backward, backends=backends, compiled=compiled,
                settings=settings, progress=progress,
            )  # fmt: skip
            cases.append(case)
            if progress:
                print(report.detail(case.as_dict()))
    return report.document(cases, settings)
