"""Methods whose steps read nothing of the device, run so that a wait shows.

Plain models: diffusers may be absent where a GPU is, and so may pytest.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from _sparse_methods import GRID, TOKENS, Model
from _waits import no_waiting
from torch import nn
from zoo import dit_original

import maskaccel
from maskaccel import methods as m
from maskaccel.state import Newton

STEPS = 7
SCHEDULED = {
    "FORA-module": m.FORA(interval=3),
    "FORA-stack": m.FORA(interval=3, level="stack"),
    "FORA-block": m.FORA(interval=3, level="block"),
    "FORA-output": m.FORA(interval=3, level="output"),
    "TaylorSeer": m.TaylorSeer(interval=3, order=2, first=1),
    "TaylorSeer-module": m.TaylorSeer(interval=3, first=1, level="module"),
    "FoCa": m.FoCa(interval=3, first=1),
    "MagCache": m.MagCache(ratios=(1.0,) * STEPS),
    "SCM": m.SCM(policy=(1, 0, 1, 0, 0, 1, 0), forecaster=Newton(1)),
    "PAB": m.PAB(low=0.0, high=1000.0),
    # With `uncond` it looks once a run whether the batch is one of guidance.
    "FasterCache": m.FasterCache(uncond=None),
    "SkipCache": m.SkipCache(interval=2, outer=1),
    "DDT": m.DDT(encoder=1, refresh=2),
}
# Steps in part: which tokens are computed is decided on the device.
IN_PART = {"ToCa": m.ToCa(), "DuCa": m.DuCa(), "ClusCa": m.ClusCa()}
BLOCK = (32, 32)
SPARSE = {
    "CLEAR": m.CLEAR(radius=4, grid=(12, 16), patch=(4, 8), block=BLOCK),
    "SlidingTile": m.SlidingTile(window=(3, 3, 3), tile=(2, 2, 2), grid=GRID),
    "RadialAttention": m.RadialAttention(decay=1.0, grid=(3, 8, 8), block=BLOCK),
    "LiteAttention": m.LiteAttention(threshold=-3.0, block=BLOCK),
    "Rettention": m.Rettention(density=1 / 8, dense_steps=1, refresh=3, grid=GRID, block=BLOCK),
    "SpargeAttn": m.SpargeAttn(similarity=0.3, cdf=0.7, block=BLOCK),
    "VSA": m.VSA(grid=GRID),
    "DraftAttention": m.DraftAttention(grid=GRID),
    "XAttention": m.XAttention(tau=0.6, stride=8, block=BLOCK),
    "SparseVideoGen": m.SparseVideoGen(grid=GRID),
}


def run_twice(
    model: nn.Module, methods: Any, device: str, steps: int, call: Callable[[], Any], times: tuple = ()
) -> Any:
    """Two runs of a patched model; what is made once is made in the first, the second must not wait. The patch."""
    patch = maskaccel.patch(model, methods)
    for again in (False, True):
        with torch.no_grad(), patch.generation(steps, timesteps=list(times) or None) as run:
            for _ in range(steps):
                with no_waiting(device) if again else contextlib.nullcontext():
                    call()
                    run.step()
    return patch


def four_blocks(device: str) -> tuple[nn.Module, dict]:
    """The original DiT, tiny, and the arguments of a call."""
    model = dit_original.made(dit_original.DiT, depth=4).to(device)
    return model, {
        "x": torch.zeros(2, 16, 4, device=device),
        "t": torch.zeros(2, device=device),
        "y": torch.zeros(2, dtype=torch.int64, device=device),
    }


def _cached(method: Any, beside: list, device: str) -> None:
    model, kwargs = four_blocks(device)
    times = tuple(900 - 100 * i for i in range(STEPS))
    patch = run_twice(model, [method, *beside], device, STEPS, lambda: model(**kwargs), times)
    found = patch.report().activity[method.name]
    assert found["reused"] + found.get("in part", 0) > 0, found


def _fused(device: str) -> None:
    model, kwargs = four_blocks(device)
    patch = run_twice(model, [m.FusedAdaLN()], device, 2, lambda: model(**kwargs))
    assert patch.report().activity["FusedAdaLN"]["fused calls"] == 4 * 5


def _sparse(method: Any, device: str) -> None:
    model = Model()
    dtype = torch.float32 if device == "meta" else torch.bfloat16
    q, k, v = torch.randn(3, 2, 3, TOKENS, 16).to(device, dtype)
    run_twice(model, [method], device, 4, lambda: model(q, k, v))
    policy = next(p for p in model.blocks[0].attn.__dict__.values() if hasattr(p, "calls"))
    assert policy.calls > 0, policy.left


def _trained(name: str, device: str) -> None:
    """Forward and backward with a part of the tokens."""
    model, kwargs = four_blocks(device)
    fusion = m.SprintFusion(32).to(device)
    method = m.TREAD(1, -2) if name == "TREAD" else m.SPRINT(1, -2, fusion=fusion, select="uniform")
    maskaccel.patch(model.train(), [method])
    for again in range(3):
        with no_waiting(device) if again == 2 else contextlib.nullcontext():
            model(**kwargs).square().sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


CACHED = {**SCHEDULED, **IN_PART}
# What runs on a device without waiting for it; each raises if it does.
CASES: dict[str, Callable[[str], None]] = {
    "FusedAdaLN": _fused,
    **{name: functools.partial(_cached, method, []) for name, method in CACHED.items()},
    **{f"{name}, fused": functools.partial(_cached, method, [m.FusedAdaLN()]) for name, method in CACHED.items()},
    **{name: functools.partial(_sparse, method) for name, method in SPARSE.items()},
    **{name: functools.partial(_trained, name) for name in ("TREAD", "SPRINT")},
}
