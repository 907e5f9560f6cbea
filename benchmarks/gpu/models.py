"""FLUX- and Wan-shaped models end to end: each family of methods alone and together, beside the strongest peers.

An item is one model and all that is compared on it: every setup denoises the same noise with the same weights, in
turns.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import setups
import torch
from setups import COMPILE, CUDNN, EAGER, FUSED, FUSED_COMPILE, SEER, TILE, TOP, Activity, Setup, cached, ours
from stage import Context, Record, Target
from torch import nn

from maskaccel import methods as m

if TYPE_CHECKING:
    from denoise import Denoiser, Shape

SECONDS = 180.0
EXPECTED = 40.0
_MEASURE = 35.0  # seconds of an item after which no further round is begun
_ROUNDS = 3


@dataclass(frozen=True)
class Plan:
    """What one item compares.

    Attributes:
        model: Name of the shape (`denoise.SHAPES`).
        setups: What is run beside the eager model.
        steps: Steps of a run.
    """

    model: str
    setups: tuple[Setup, ...]
    steps: int


_FLUX, _LARGE, _WAN, _WAN14 = "FLUX 1024 px", "FLUX 2048 px", "Wan 1.3B 480p", "Wan 14B 480p"
_RAS = m.RAS(ratio=0.5, first=4, dense=(8,))
_VIDEO = (m.RadialAttention(), TOP, m.VSA(top_k=0.25, cube=(4, 4, 8)), m.DraftAttention(sparsity=0.75))
_TOKENS = (_RAS, m.ToCa(score="random"), m.DuCa(), m.ClusCa(interval=setups.INTERVAL))
PLANS = {
    f"{_FLUX}, exact": Plan(_FLUX, (CUDNN, FUSED), 4),
    f"{_WAN}, sparse": Plan(_WAN, (CUDNN, ours(TILE), ours(m.FusedAdaLN(), TILE), *map(ours, _VIDEO)), 4),
    f"{_FLUX}, caches": Plan(_FLUX, setups.caches(11), 11),
    f"{_FLUX}, compiled": Plan(_FLUX, (COMPILE, FUSED, FUSED_COMPILE), 4),
    f"{_FLUX}, composed": Plan(_FLUX, setups.composed(TOP), 11),
    f"{_WAN}, composed": Plan(_WAN, setups.composed(TILE), 11),
    f"{_WAN14}, exact and sparse": Plan(_WAN14, (CUDNN, FUSED, ours(m.FusedAdaLN(), TILE)), 2),
    f"{_LARGE}, sparse": Plan(
        _LARGE, (CUDNN, FUSED, ours(TOP), ours(m.CLEAR(radius=16)), ours(m.FusedAdaLN(), TOP)), 4
    ),
    f"{_FLUX}, tokens": Plan(_FLUX, (*map(ours, _TOKENS), ours(m.FusedAdaLN(), _RAS)), 12),
    f"{_WAN}, compiled": Plan(_WAN, (COMPILE, FUSED, FUSED_COMPILE), 4),
    f"{_WAN}, caches": Plan(_WAN, setups.caches(11), 11),
    f"{_WAN14}, compiled": Plan(_WAN14, (COMPILE, ours(m.FusedAdaLN(), TILE, compiled=True)), 2),
    f"{_WAN14}, composed": Plan(_WAN14, (setups.taylorseer(), cached(m.FusedAdaLN(), TILE, SEER)), 7),
}


def items(context: Context) -> list[str]:
    """Names of the plans, most important first."""
    return list(PLANS)


def run(item: str, context: Context) -> Record:
    """Every setup of a plan: milliseconds of a run and of its steps, memory, speed-ups, error."""
    reason = _missing("diffusers")
    return {"skipped": reason, "summary": f"skipped: {reason}"} if reason else _compare(PLANS[item], context)


def warm(item: str, context: Context) -> Record:
    """Compiles what the item will compile, on two blocks of each kind: all the others have the same graphs."""
    plan = PLANS[item]
    chosen = [setup for setup in plan.setups if setup.compiled and not _missing(setup.needs)]
    if _missing("diffusers") or not chosen:
        return {}
    from denoise import build, conditions

    shape = _shape(plan, context)
    fewer = {name: 2 for name in ("num_layers", "num_single_layers") if name in shape.config}
    model = build(replace(shape, config={**shape.config, **fewer}), context.device)
    latents, inputs = conditions(shape, context.device)
    seconds = {}
    for setup in chosen:
        begin = time.perf_counter()
        pipe, _ = _prepared(setup, model, context)
        pipe(latents, inputs, plan.steps)
        seconds[setup.name] = round(time.perf_counter() - begin, 2)
    return {"seconds": seconds}


def _missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"no {package}"


def _shape(plan: Plan, context: Context) -> Shape:
    from denoise import SHAPES

    shape = SHAPES[plan.model]
    return shape.small() if context.tiny else shape


# ------------------------------------------------------------------------------------------------------ comparison
@dataclass
class _Contender:
    """A setup on a pipeline of its own."""

    setup: Setup
    pipe: Denoiser
    activity: Activity
    runs: list[dict[str, Any]] = field(default_factory=list)


_base: dict[str, nn.Module] = {}  # the weights of one model, for the items of this process


def _weights(plan: Plan, context: Context) -> nn.Module:
    from denoise import build

    if plan.model not in _base:
        _base.clear()
        _free()
        _base[plan.model] = build(_shape(plan, context), context.device)
    return _base[plan.model]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _prepared(setup: Setup, model: nn.Module, context: Context) -> tuple[Denoiser, Activity]:
    """A pipeline of its own around the same weights, with a setup on it."""
    from denoise import denoiser, twin

    pipe = denoiser(twin(model))
    activity = setup.apply(pipe)
    if setup.compiled:
        # Every setup compiles the same code objects, for classes and patches of its own.
        torch._dynamo.config.recompile_limit = 64
        backend = "inductor" if context.device == "cuda" else "eager"
        pipe.transformer.compile_repeated_blocks(dynamic=False, backend=backend)
    return pipe, activity


@contextlib.contextmanager
def _recorded(setup: Setup, rows: dict[str, Record]) -> Iterator[None]:
    """A setup that fails leaves the others, unless it took the device with it."""
    try:
        yield
    except Exception as error:
        rows[setup.name]["failed"] = f"{type(error).__name__}: {error}"[:400]
        _free()
        try:
            torch.cuda.synchronize() if torch.cuda.is_available() else None
        except RuntimeError:
            known = {name: row.get("first_ms") for name, row in rows.items()}
            raise RuntimeError(f"{setup.name}: {error}; first runs until then, ms: {known}") from error


def _compare(plan: Plan, context: Context) -> Record:
    from denoise import conditions, relative_error

    begin = time.perf_counter()
    model, shape = _weights(plan, context), _shape(plan, context)
    latents, inputs = conditions(shape, context.device)
    rows: dict[str, Record] = {}
    contenders: list[_Contender] = []
    for setup in (EAGER, *plan.setups):
        rows[setup.name] = {"peer": setup.peer, "schedule": setup.schedule or "all"}
        if reason := _missing(setup.needs):
            rows[setup.name]["skipped"] = reason
            continue
        with _recorded(setup, rows):
            one = _Contender(setup, *_prepared(setup, model, context))
            first = _timed(one, latents, inputs, plan.steps)
            if setup is EAGER:
                wanted = first["latents"]
            rows[setup.name] |= {
                "first_ms": first["run_ms"], "error": relative_error(first["latents"], wanted),
                "finite": bool(first["latents"].isfinite().all()),
            }  # fmt: skip
            contenders.append(one)
    if not contenders or contenders[0].setup is not EAGER:
        raise RuntimeError(f"the eager model does not run: {rows[EAGER.name]}")
    for turn in range(min(_ROUNDS, context.rounds)):
        if turn and time.perf_counter() - begin > _MEASURE:
            break
        for one in contenders if turn % 2 == 0 else reversed(contenders):
            if "failed" not in rows[one.setup.name]:
                with _recorded(one.setup, rows):
                    one.runs.append(_timed(one, latents, inputs, plan.steps) | {"latents": None})
    for one in contenders:
        rows[one.setup.name] |= _medians(one.runs) | one.activity()
    _rank(rows)
    return {
        "model": plan.model, "steps": plan.steps, "tokens": list(shape.grid), "text": shape.text,
        "parameters": sum(p.numel() for p in model.parameters()), "setups": rows,
        "seconds": time.perf_counter() - begin, "summary": _summary(rows),
    }  # fmt: skip


def _timed(one: _Contender, latents: torch.Tensor, inputs: dict[str, torch.Tensor], steps: int) -> dict[str, Any]:
    from denoise import timed

    return timed(one.pipe, latents, inputs, steps)


def _medians(runs: list[dict[str, Any]]) -> Record:
    """Of the rounds of one setup: a run, its steps, those well below the longest, memory beyond the weights."""
    if not runs:
        return {}
    totals = [run["run_ms"] for run in runs]
    steps = [statistics.median(step) for step in zip(*(run["step_ms"] for run in runs))]
    return {
        "run_ms": statistics.median(totals), "min_ms": min(totals), "max_ms": max(totals), "rounds": len(runs),
        "step_ms": steps, "short_steps": sum(step < 0.8 * max(steps) for step in steps),
        "peak_bytes": max(run["peak_bytes"] or 0 for run in runs),
    }  # fmt: skip


def _rank(rows: dict[str, Record]) -> None:
    """Speed-ups over the eager run, and of ours over the fastest peer that computes as many steps or all."""
    eager = rows[EAGER.name]["run_ms"]
    for row in rows.values():
        if "run_ms" not in row:
            continue
        row["over_eager"] = eager / row["run_ms"]
        if not row["peer"]:
            rivals = {
                name: rival["run_ms"] for name, rival in rows.items()
                if rival["peer"] and "run_ms" in rival and rival["schedule"] in ("all", row["schedule"])
            }  # fmt: skip
            row["best_peer"] = min(rivals, key=rivals.__getitem__)
            row["over_best_peer"] = rivals[row["best_peer"]] / row["run_ms"]


def _fastest(rows: dict[str, Record]) -> str | None:
    """The fastest of ours, if any was timed."""
    timed = {name: row["over_eager"] for name, row in rows.items() if "over_best_peer" in row}
    return max(timed, key=timed.__getitem__, default=None)


def _summary(rows: dict[str, Record]) -> str:
    """The fastest of ours, in a line."""
    text = f"eager {rows[EAGER.name]['run_ms']:.1f} ms"
    if name := _fastest(rows):
        row = rows[name]
        text += f"; {name}: {row['over_eager']:.2f}x of it, {row['over_best_peer']:.2f}x of {row['best_peer']}"
    failed = [name for name, row in rows.items() if "failed" in row]
    return text + (f"; failed: {', '.join(failed)}" if failed else "")


def targets(records: dict[str, Record]) -> list[Target]:
    """The fastest of ours is ahead of every peer, in each item."""
    found = []
    for item, record in records.items():
        if name := _fastest(record.get("setups", {})):
            row = record["setups"][name]
            found.append(Target(f"{item}: {name} over {row['best_peer']}", 1.0, row["over_best_peer"]))
    return found


def table(records: dict[str, Record]) -> str:
    """The comparisons as Markdown."""
    lines = []
    for item, record in records.items():
        if "setups" not in record:
            continue
        lines += [
            f"**{item}**: {record['steps']} steps", "",
            "| setup | computed steps | short ones | run, ms | over eager | over the best peer | memory, MiB | error |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for name, row in record["setups"].items():
            if "run_ms" not in row:
                lines.append(f"| {name} | | | {row.get('failed') or row.get('skipped')} | | | | |")
                continue
            over = f"{row['over_best_peer']:.2f} ({row['best_peer']})" if "best_peer" in row else ""
            cells = (
                name, row["schedule"], str(row["short_steps"]), f"{row['run_ms']:.1f}", f"{row['over_eager']:.2f}",
                over, f"{row['peak_bytes'] / 2**20:.0f}", f"{row['error']:.2e}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
