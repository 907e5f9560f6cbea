"""Methods whose steps read nothing of the device, and how they are run so that a wait shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from _sparse_methods import GRID
from torch import Tensor
from torch.overrides import TorchFunctionMode

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


class NoUploads(TorchFunctionMode):
    """On meta tensors every read raises by itself; this also refuses copies from the host that a GPU waits for."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out, name = func(*args, **kwargs), getattr(func, "__name__", "")
        if name in ("tensor", "as_tensor"):
            self._refuse(name, args[0], out)
        elif name in ("to", "cuda", "copy_", "type_as") and not kwargs.get("non_blocking"):
            self._refuse(name, *((args[1], args[0]) if name == "copy_" else (args[0], out)))
        elif name in ("__getitem__", "__setitem__"):
            for index in args[1] if isinstance(args[1], tuple) else (args[1],):
                if isinstance(index, list) or (isinstance(index, Tensor) and index.dim()):
                    self._refuse(name, index, args[0])
        return out

    @staticmethod
    def _refuse(name: str, value: Any, to: Any) -> None:
        if isinstance(to, Tensor) and to.is_meta and not (isinstance(value, Tensor) and value.is_meta):
            raise RuntimeError(f"{name}: a copy from the host to a meta tensor, which a GPU waits for")


def no_waiting(device: str) -> contextlib.AbstractContextManager:
    """Fails where a step waits for the device: "cuda" by torch's own check, "meta" as if it were a GPU."""
    if device == "meta":
        return NoUploads()
    from _targets import Target

    return Target("cuda", device).no_waiting()


def run_twice(
    model: torch.nn.Module, methods: Any, device: str, steps: int, call: Callable[[], Any], times: tuple = ()
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
