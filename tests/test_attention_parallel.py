"""Ring and Ulysses attention from `tile_attention`, its lse, `merge_attention` and parts of masks, on two ranks."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from maskaccel import ops
from maskaccel.masks import TileMask

RANKS, TOKENS, HEADS, WIDTH = 2, 128, 4, 16


def inputs() -> tuple:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, TOKENS, HEADS, WIDTH, generator=generator) for _ in range(3))
    elements = torch.rand(2, HEADS, TOKENS, TOKENS, generator=generator) < 0.2
    elements[:, 1, :40] = False
    elements[0, :, :, 64:] = False  # a whole shard of keys left out
    return q, k, v, TileMask.from_bool(elements, (32, 32))


def ring(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries stay; keys and values go round, and each part's result is merged by lse."""
    q, k, v, mask = inputs()
    span = TOKENS // RANKS
    mine = (rank * span, (rank + 1) * span)
    q, k, v = (t[:, mine[0] : mine[1]].contiguous() for t in (q, k, v))
    out = lse = None
    for turn in range(RANKS):
        owner = (rank - turn) % RANKS
        part = mask.part(queries=mine, keys=(owner * span, (owner + 1) * span))
        found = ops.tile_attention(q, k, v, part, return_lse=True)
        out, lse = found if out is None else ops.merge_attention(out, lse, *found)
        moved = []
        for t in (k, v):
            received = torch.empty_like(t)
            work = [dist.isend(t, (rank + 1) % RANKS), dist.irecv(received, (rank - 1) % RANKS)]
            for one in work:
                one.wait()
            moved.append(received)
        k, v = moved
    return out, lse


def ulysses(rank: int) -> torch.Tensor:
    """Tokens are exchanged for heads, and back."""
    q, k, v, mask = inputs()
    span, heads = TOKENS // RANKS, HEADS // RANKS

    def exchange(t: torch.Tensor, split: int, join: int) -> torch.Tensor:
        parts = [part.contiguous() for part in t.chunk(RANKS, dim=split)]
        received = [torch.empty_like(part) for part in parts]
        for turn in range(RANKS):
            other = (rank + turn) % RANKS
            if other == rank:
                received[rank] = parts[rank]
                continue
            work = [dist.isend(parts[other], other), dist.irecv(received[other], other)]
            for one in work:
                one.wait()
        return torch.cat(received, dim=join)

    q, k, v = (exchange(t[:, rank * span : (rank + 1) * span], 2, 1) for t in (q, k, v))
    out = ops.tile_attention(q, k, v, mask.part(heads=(rank * heads, (rank + 1) * heads)))
    return exchange(out, 1, 2)


def _worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    torch.save((*ring(rank), ulysses(rank)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_ranks_give_what_one_gives(tmp_path) -> None:
    q, k, v, mask = inputs()
    out, lse = ops.tile_attention(q, k, v, mask, return_lse=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.spawn(_worker, args=(port, str(tmp_path)), nprocs=RANKS)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    torch.testing.assert_close(torch.cat([p[0] for p in parts], 1), out, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cat([p[1] for p in parts], 2), lse, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cat([p[2] for p in parts], 1), out, atol=1e-6, rtol=1e-5)


def test_parts_of_masks() -> None:
    *_, mask = inputs()
    dense = mask.to_bool()
    got = mask.part(queries=(32, 128), keys=(64, 96), heads=(1, 3))
    assert torch.equal(got.to_bool(), dense[:, 1:3, 32:128, 64:96])
    for kwargs, message in (
        ({"queries": (8, 64)}, r"queries=\(8, 64\)"),
        ({"keys": (0, 200)}, r"keys=\(0, 200\)"),
        ({"heads": (3, 3)}, "heads="),
    ):
        with pytest.raises(ValueError, match=message):
            mask.part(**kwargs)
