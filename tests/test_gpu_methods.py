"""Steps of patched models wait for nothing: on a GPU by torch's own check, and without one on meta tensors.

On meta tensors a value that is read raises, and so does here a copy from the host.
"""

from __future__ import annotations

import pytest
import torch
from _waitless import CASES, four_blocks, run_twice
from _waits import no_waiting

from maskaccel import methods as m

DEVICES = [
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
    "meta",
]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_steps_do_not_wait(device, name):
    CASES[name](device)


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
