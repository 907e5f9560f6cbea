"""What one rank of a process group draws; apart from the tests, so that a new process imports little."""

from __future__ import annotations

from typing import Any

import torch

from maskaccel import TokenRoute

STEPS, TOKENS = 3, 64


def drawn(batch: int) -> list[list[list[int]]]:
    """The kept tokens of a few steps."""
    route = TokenRoute(0, 0, (0.25, 0.75), seed=9, bucket=4)
    found = []
    for _ in range(STEPS):
        route.enter(torch.zeros(batch, TOKENS, 1))
        assert route.index is not None
        found.append(route.index.keep.tolist())
    return found


def rank(number: int, world: int, port: int, batch: int, out: Any) -> None:
    """Puts what a rank of a group draws into a queue."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=world)
    out.put(drawn(batch))
    torch.distributed.destroy_process_group()
