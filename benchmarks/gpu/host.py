"""Host work of every public op: the time in which a call hands its kernels to the device.

Operands are tiny and the queue is empty when a round begins, so that nothing but the host holds the calls up: the
Python of the call, checks, dispatch, allocation of results, and launches. Beside torch's add and attention, in
interleaved rounds. `block` is a DiT block as its authors wrote it and patched; `launches` counts what an op asks of the
device.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import paths  # noqa: F401
import torch
from stage import Context, Record, Target

import interleaved  # isort: skip
import overhead  # isort: skip

SECONDS = 60.0
EXPECTED = 4.0
GOAL_US = 4.0
CALLS = 100  # of a round: fewer than the queue of a device holds, with some launches each
FAMILIES = {
    "adaln": ("norm_modulate", "gate_residual", "qk_norm_rope", "gated_activation"),
    "attention": ("tile_attention", "merge_attention", "segment_attention", "linear_attention", "attention_column"),
    "tokens": ("gather", "scatter_merge", "merge_tokens", "unmerge", "random_keep", "select", "write_kv", "read_kv",
               "sample", "unmask_select", "confidence"),
    "steps": ("relative_difference", "combine", "scatter_combine", "gram", "kmeans", "norm_modulate_difference"),
}  # fmt: skip
# Ops that call several others, or have no kernel of their own on this device: named, and outside the goal.
COMPOSED = ("segment_attention", "confidence_unmask", "linear_attention")


def items(context: Context) -> list[str]:
    """The families of ops, the block, training, launches."""
    return ["adaln", "attention", "tokens", "steps", "block", "training", "launches"]


def run(item: str, context: Context) -> Record:
    """One family, or another part."""
    special = {"block": _block, "training": _training, "launches": _launches}
    return special[item](context) if item in special else _family(item, context)


def _operands(context: Context, grad: bool) -> overhead.Operands:
    return overhead.Operands(context.device, torch.bfloat16, grad)


def _of_family(item: str, calls: Mapping[str, overhead.Call]) -> dict[str, overhead.Call]:
    """The calls whose name begins like that of an op of the family; the longest such beginning decides."""
    found = {}
    for name, call in calls.items():
        fits = {start: family for family, starts in FAMILIES.items() for start in starts if name.startswith(start)}
        if fits and fits[max(fits, key=len)] == item:
            found[name] = call
    return found


def _waits(context: Context) -> Callable[[], None]:
    return torch.cuda.synchronize if context.device == "cuda" else lambda: None


def microseconds(calls: Mapping[str, overhead.Call], context: Context) -> dict[str, dict[str, float]]:
    """Median, least and largest microseconds of a call, over the rounds."""
    wait, count = _waits(context), 5 if context.tiny else CALLS

    def round_of(call: overhead.Call) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - begin) * 1e6 / count

    for call in calls.values():
        call()
    wait()
    collecting = gc.isenabled()
    gc.disable()
    try:
        measures = {name: (lambda call=call: round_of(call)) for name, call in calls.items()}
        rounds = interleaved.samples(measures, 2 if context.tiny else context.rounds)
    finally:
        if collecting:
            gc.enable()
    wait()
    return {name: {"median_us": statistics.median(values), "min_us": min(values), "max_us": max(values)}
            for name, values in rounds.items()}  # fmt: skip


def _measured(calls: Mapping[str, overhead.Call], context: Context) -> tuple[dict[str, overhead.Call], dict[str, str]]:
    """The calls that can run here, and what the others raise."""
    good, bad = {}, {}
    for name, call in calls.items():
        try:
            call()
            good[name] = call
        except (RuntimeError, ValueError, NotImplementedError) as error:
            bad[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return good, bad


def _record(calls: Mapping[str, overhead.Call], peers: Mapping[str, overhead.Call], context: Context) -> Record:
    good, bad = _measured(calls, context)
    found = microseconds({**peers, **good}, context)
    add = found["torch.add"]["median_us"]
    ops = {name: {**found[name], "beyond_add_us": found[name]["median_us"] - add} for name in good}
    judged = {name: row["median_us"] for name, row in ops.items() if not name.startswith(COMPOSED)}
    within = [name for name, value in judged.items() if value <= GOAL_US]
    worst = max(judged, key=judged.__getitem__, default="")
    told = f"; slowest {worst} {judged[worst]:.1f} us, torch.add {add:.1f}" if worst else ""
    return {
        "ops": ops, "peers": {name: found[name] for name in peers}, "failed": bad, "goal_us": GOAL_US,
        "over": sorted(set(judged) - set(within)), "worst_us": max(judged.values(), default=None),
        "summary": f"{len(within)} of {len(judged)} within {GOAL_US:g} us{told}",
    }  # fmt: skip


def _family(item: str, context: Context) -> Record:
    o = _operands(context, False)
    with torch.no_grad():
        calls = _of_family(item, {**overhead.differentiable(o), **overhead.others(o), **_whole_tiles(context)})
        return _record(calls, overhead.peers(o), context)


def _whole_tiles(context: Context) -> dict[str, overhead.Call]:
    """Attention as the kernels of sm_90a take it: tiles of 128 x 128, heads of 128."""
    from maskaccel import ops
    from maskaccel.masks import TileMask

    q = torch.randn(1, 256, 2, 128, device=context.device, dtype=torch.bfloat16)
    mask = TileMask.full((256, 256), device=context.device)
    return {
        "tile_attention, 128 x 128": partial(ops.tile_attention, q, q, q),
        "tile_attention, 128 x 128, mask": partial(ops.tile_attention, q, q, q, mask),
        "tile_attention, 128 x 128, keep bits": partial(
            ops.tile_attention, q, q, q, mask, skip_threshold=-6.0, return_keep=True
        ),
    }


def _training(context: Context) -> Record:
    """Forward calls under autograd, which record what their derivative needs."""
    o = _operands(context, True)
    return _record(overhead.differentiable(o), overhead.peers(o), context)


# --------------------------------------------------------------------------------------------------------- a block
def _block(context: Context) -> Record:
    """Microseconds of host work for a block of the original DiT: as written, and patched with FusedAdaLN."""
    from zoo.dit_original import DiT

    import maskaccel
    from maskaccel import methods as m

    depth = 4
    torch.manual_seed(0)
    models = []
    for _ in range(2):
        model = DiT(width=64, heads=2, depth=depth).to(context.device, torch.bfloat16).eval().requires_grad_(False)
        models.append(model)
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(1, 16, 4, device=context.device, dtype=torch.bfloat16)
    t, y = torch.ones(1, device=context.device, dtype=torch.bfloat16), torch.ones(1, device=context.device).long()

    def empty(model: torch.nn.Module) -> overhead.Call:
        """The model without its blocks, whose time is taken off."""
        rest = torch.nn.ModuleList()

        def call() -> None:
            blocks, model.blocks = model.blocks, rest
            try:
                model(x, t, y)
            finally:
                model.blocks = blocks

        return call

    with torch.no_grad(), maskaccel.patch(models[1], [m.FusedAdaLN()]):
        difference = (models[0](x, t, y).float() - models[1](x, t, y).float()).abs().max().item()
        calls: dict[str, overhead.Call] = {
            "eager": lambda: models[0](x, t, y),
            "patched": lambda: models[1](x, t, y),
            "without blocks": empty(models[0]),
        }
        found = microseconds(calls, context)
    least = found["without blocks"]["median_us"]
    per_block = {name: (found[name]["median_us"] - least) / depth for name in ("eager", "patched")}
    return {
        "per_block_us": per_block, "models": found, "depth": depth, "largest_difference": difference,
        "summary": f"a block: eager {per_block['eager']:.1f} us, patched {per_block['patched']:.1f} us",
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- launches
def _launches(context: Context) -> Record:
    """Kernels, memsets and copies of a call, and the runtime calls that torch's profiler sees, if it sees any."""
    o = _operands(context, False)
    with torch.no_grad():
        every = {**overhead.peers(o), **overhead.differentiable(o), **overhead.others(o), **_whole_tiles(context)}
        calls, bad = _measured(every, context)
        found = _events(calls, context)
    seen = sum(1 for row in found.values() if row["kernels"])
    return {"ops": found, "failed": bad, "summary": f"{len(found)} ops, kernels seen of {seen}"}


def _events(calls: Mapping[str, overhead.Call], context: Context, repeats: int = 4) -> dict[str, Any]:
    """What falls into the span of each call in one session; the device is idle where a span begins and ends."""
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if context.device == "cuda" else [])
    wait = _waits(context)
    wait()
    with profile(activities=activities) as profiler:
        for name, call in calls.items():
            with record_function(f"op: {name}"):
                for _ in range(repeats):
                    call()
                wait()
    events = list(profiler.events() or ())
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    spans = {event.name[4:]: event.time_range for event in on_host if event.name.startswith("op: ")}
    found = {}
    for name, span in spans.items():
        inside = [event for event in events if span.start <= event.time_range.start <= span.end]
        device = Counter(e.name for e in inside if e.device_type == torch.autograd.DeviceType.CUDA)
        del device[f"op: {name}"]  # the span has a shadow on the device
        runtime = Counter(e.name for e in inside if e.name.startswith("cu"))
        moved = sum(n for kind, n in device.items() if kind.startswith(("Memset", "Memcpy")))
        found[name] = {
            "kernels": (sum(device.values()) - moved) / repeats,
            "memsets_and_copies": moved / repeats,
            "runtime_calls": {kind: n / repeats for kind, n in sorted(runtime.items())},
        }
    return found


# --------------------------------------------------------------------------------------------------------- reports
def targets(records: dict[str, Record]) -> list[Target]:
    """The goal for the slowest op of each family."""
    names = [item for item in FAMILIES if item in records]
    return [Target(f"host work of the slowest op of {item}", GOAL_US, records[item].get("worst_us"), "us", True)
            for item in names]  # fmt: skip


def table(records: dict[str, Record]) -> str:
    """Microseconds of host work, by op."""
    lines = ["| call | host work, us (median) | least | beyond `torch.add` |", "|---|---|---|---|"]
    shown: set[str] = set()
    for item in FAMILIES:
        record = records.get(item, {})
        for name, row in {**record.get("peers", {}), **record.get("ops", {})}.items():
            if name not in shown:
                shown.add(name)
                beyond = f"{row['beyond_add_us']:.2f}" if "beyond_add_us" in row else ""
                lines.append(f"| {name} | {row['median_us']:.2f} | {row['min_us']:.2f} | {beyond} |")
    for name, value in records.get("block", {}).get("per_block_us", {}).items():
        lines.append(f"| a DiT block, {name} | {value:.1f} | | |")
    return "\n".join(lines)
