"""Steps of patched models wait for nothing: on a GPU by torch's own check, and without one on meta tensors.

On meta tensors a value that is read raises, and so does here a copy from the host. Plain models: diffusers may be
absent where a GPU is.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from _sparse_methods import TOKENS, Model
from _waitless import IN_PART, SCHEDULED, SPARSE, STEPS, no_waiting, run_twice
from zoo import dit_original

import maskaccel
from maskaccel import methods as m

DEVICES = [
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
    "meta",
]


def four_blocks(device: str) -> tuple[torch.nn.Module, dict]:
    """The original DiT, tiny, and the arguments of a call."""
    model = dit_original.made(dit_original.DiT, depth=4).to(device)
    return model, {
        "x": torch.zeros(2, 16, 4, device=device),
        "t": torch.zeros(2, device=device),
        "y": torch.zeros(2, dtype=torch.int64, device=device),
    }


@pytest.mark.parametrize("fused", [False, True], ids=["alone", "fused"])
@pytest.mark.parametrize("name", [*SCHEDULED, *IN_PART])
@pytest.mark.parametrize("device", DEVICES)
def test_cached_steps(device, name, fused):
    model, kwargs = four_blocks(device)
    method = {**SCHEDULED, **IN_PART}[name]
    methods = [method, m.FusedAdaLN()] if fused else [method]
    times = tuple(900 - 100 * i for i in range(STEPS))
    patch = run_twice(model, methods, device, STEPS, lambda: model(**kwargs), times)
    found = patch.report().activity[method.name]
    assert found["reused"] + found.get("in part", 0) > 0


@pytest.mark.parametrize("device", DEVICES)
def test_fused_steps(device):
    model, kwargs = four_blocks(device)
    patch = run_twice(model, [m.FusedAdaLN()], device, 2, lambda: model(**kwargs))
    assert patch.report().activity["FusedAdaLN"]["fused calls"] == 4 * 5


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("device", DEVICES)
def test_sparse_steps(device, name):
    model = Model()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = torch.randn(3, 2, 3, TOKENS, 16).to(device, dtype)
    run_twice(model, [SPARSE[name]], device, 4, lambda: model(q, k, v))
    policy = next(p for p in model.blocks[0].attn.__dict__.values() if hasattr(p, "calls"))
    assert policy.calls > 0, policy.left


@pytest.mark.parametrize("name", ["TREAD", "SPRINT"])
@pytest.mark.parametrize("device", DEVICES)
def test_training_steps(device, name):
    """Forward and backward with a part of the tokens."""
    model, kwargs = four_blocks(device)
    fusion = m.SprintFusion(32).to(device)
    method = m.TREAD(1, -2) if name == "TREAD" else m.SPRINT(1, -2, fusion=fusion, select="uniform")
    maskaccel.patch(model.train(), [method])
    for again in range(3):
        with no_waiting(device) if again == 2 else contextlib.nullcontext():
            model(**kwargs).square().sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


def test_a_wait_would_be_seen():
    """What decides by a measured change reads it."""
    model, kwargs = four_blocks("meta")
    with pytest.raises(Exception, match="meta"):
        run_twice(model, [m.FBCache()], "meta", 3, lambda: model(**kwargs))


@pytest.mark.parametrize(
    "upload",
    [
        lambda x: x + torch.tensor([1.0], device=x.device),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x[[0, 1]],
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
    ],
)
def test_every_kind_of_wait_is_seen(upload):
    with pytest.raises(Exception, match="meta"), no_waiting("meta"):
        upload(torch.ones(3, device="meta"))


def test_what_does_not_wait_passes():
    x = torch.ones(3, device="meta")
    with no_waiting("meta"):
        x[1:] += torch.ones(2).to("meta", non_blocking=True) * torch.tensor(2.0)
        x[x.argsort()] = torch.full((3,), 0.5, device="meta")
