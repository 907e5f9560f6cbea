"""`maskaccel calibrate`: measure what a method needs to know of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..calibration import Calibration, measure
from ..calibration.kinds import KINDS, kind_of
from ..calibration.measure import make_probe
from ._settings import settings
from ._target import load_target


def run_calibration(
    kind: str,
    model: str | None = None,
    *,
    out: Path | None = None,
    steps: int = 28,
    runs: int = 1,
    values: Sequence[str] = (),
    calls: Sequence[str] = (),
    component: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
) -> tuple[Calibration, Path]:
    """Run a model as it is, measure, write the file.

    Args:
        kind: A key of `KINDS`.
        model: As `load_target` takes it.
        out: The file; None is `KIND.json` here.
        steps: Sampling steps.
        runs: Runs that are measured; their seeds are 0, 1, ...
        values: `name=value` options of the kind.
        calls: `name=value` arguments of the pipeline's call.
        component: Of a pipeline with several transformers, the one to measure.
        device: See `load_target`.
        dtype: See `load_target`.
        progress: Show a bar.

    Returns:
        What was measured, and the file.

    Raises:
        ValueError: An argument is out of range, or the runs do not make a calibration.
        PatchError: The model has nothing to measure.
    """
    from tqdm import tqdm

    options = settings(values)
    make_probe(kind, options)  # before the model is loaded
    path = out or Path(f"{kind}.json")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"out={str(path)!r} must be a file in a folder that is there")
    target, run = load_target(model, steps, settings(calls, "--call"), device, dtype)
    wanted = None
    if component is not None:
        wanted = getattr(target, "components", {}).get(component)
        if wanted is None:
            raise ValueError(f"component={component!r} is no part of {type(target).__name__}")
    with (
        measure(target, kind, model=wanted, **options) as found,
        tqdm(total=steps * runs, desc=kind, unit="step", disable=not progress) as bar,
    ):
        found.probe.on_step = bar.update
        for number in range(runs):
            run(found, number)
    result = found.result()
    result.save(path)
    return result, path


def describe(result: Calibration, path: Path) -> str:
    """What was measured, in a few lines."""
    lines = [f"{result.kind} of {result.model}, {result.blocks} blocks, {result.steps} steps"]
    for name, value in result.values:
        lines.append(f"  {name}: {_short(value)}")
    lines.append(f"wrote {path}")
    use = kind_of(result.kind).use(result, str(path))
    if use:
        lines.append(f"use: {use}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        flat = [float(d) for row in value for d in row]
        return f"{len(value)} x {len(value[0])} numbers, {min(flat):.4g} to {max(flat):.4g}"
    if isinstance(value, tuple):
        return ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def kinds() -> str:
    """The kinds and their options, as text."""
    lines = []
    for name, kind in KINDS.items():
        options = ", ".join(f"{option}={default!r}" for option, default in kind.options.items())
        lines.append(f"{name}({options})  {kind.summary}")
    return "\n".join(lines)
