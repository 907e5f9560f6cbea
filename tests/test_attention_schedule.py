"""How the persistent attention kernel deals out rows of tiles (`csrc/attention/cuda_schedule.h`), on the host."""

from __future__ import annotations

import ctypes
import itertools
import random
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks.attention import schedule, schedule_model
from benchmarks.attention.schedule_model import MULTIPROCESSORS, Kernel, Launch, Shape, simulate
from maskaccel.masks import TileMask

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
FORWARD = Kernel("forward")


@pytest.fixture(scope="module")
def native():
    """The headers behind C functions."""
    return schedule_model.native()


def _sequence(native, order, tile_rows, subs, batch, heads, mask_batch, mask_heads, window):
    count = tile_rows * subs * batch * heads
    out = (ctypes.c_int * (5 * count))()
    pointer = None if order is None else (ctypes.c_int * len(order))(*order)
    launch = Launch(tile_rows, subs, batch, heads, mask_batch, mask_heads, window)
    assert native.sequence(ctypes.byref(launch), pointer, out) == count
    return [tuple(out[i : i + 5]) for i in range(0, 5 * count, 5)]


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 6), (2, 6)])
@pytest.mark.parametrize("window", [1, 4, 9])
def test_every_item_once(native, lead, window):
    """Whatever dims of the mask are shared; with the row of the lists that belongs to it."""
    tile_rows, subs, batch, heads = 9, 3, 2, 6
    order = random.Random(0).sample(range(lead[0] * lead[1] * tile_rows), lead[0] * lead[1] * tile_rows)
    items = _sequence(native, order, tile_rows, subs, batch, heads, *lead, window)
    assert len({i[:4] for i in items}) == len(items)
    for b, h, row, sub, line in items:
        assert 0 <= b < batch
        assert 0 <= h < heads
        assert 0 <= sub < subs
        assert line == ((b if lead[0] > 1 else 0) * lead[1] + (h if lead[1] > 1 else 0)) * tile_rows + row


def test_without_a_mask_heads_come_one_after_the_other(native):
    items = _sequence(native, None, 4, 1, 2, 3, 1, 1, 4)
    assert [i[:3] for i in items] == [(b, h, row) for b in range(2) for h in range(3) for row in range(4)]


def test_neighbours_share_keys(native):
    """At most a few heads at a time, and longest first to within a window."""
    items = _sequence(native, list(range(64)), 64, 1, 1, 24, 1, 1, 16)
    for at in range(0, len(items) - MULTIPROCESSORS, MULTIPROCESSORS):
        assert len(Counter(i[1] for i in items[at : at + MULTIPROCESSORS])) <= MULTIPROCESSORS // 16 + 2
    ranks = [i[2] for i in items]
    assert all(a // 16 <= b // 16 for a, b in itertools.pairwise(ranks))


def _in_turns(lengths: list[int]) -> int:
    """Load of the busiest CTA when every one takes every so-many-th item."""
    return max(sum(lengths[c::MULTIPROCESSORS]) for c in range(MULTIPROCESSORS))


@pytest.mark.parametrize("heads", [1, 24])
def test_balance(heads):
    """A tenth of the rows is ten times as long, as text tokens make them: claims lose little, turns would lose more."""
    rows = 3072 // heads
    generator = torch.Generator().manual_seed(1)
    length = torch.where(torch.rand(rows, generator=generator) < 0.1, 120, 12)
    mask = TileMask.from_tiles(torch.arange(rows) < length[:, None], (128 * rows,) * 2)
    run = simulate(replace(FORWARD, per_item=0.0), Shape("text", 128 * rows, heads, 16), mask)
    assert run.blocks == int(length.sum()) * heads
    assert run.balance > 0.97
    longest_first = sorted(length.tolist(), reverse=True) * heads
    assert sum(longest_first) / MULTIPROCESSORS / _in_turns(longest_first) < run.balance


def test_order_of_masks_by_head():
    """Rows of every length in every head: nearly as balanced as longest first over all heads, with less to fetch."""
    shape = Shape("uneven", 16384, 24, 128)
    mask = schedule.uneven(shape, 0.1)
    count = mask.lists()[1].sum(-1).flatten()
    longest_first = count.sort(descending=True, stable=True).indices
    run, plain = simulate(FORWARD, shape, mask), simulate(FORWARD, shape, mask, order=longest_first)
    assert run.blocks == plain.blocks == int(count.sum())
    assert run.balance > plain.balance - 0.01
    assert run.balance > 0.98
    assert run.missed < 0.6 * plain.missed


def test_busy_time_and_ends():
    """One item a multiprocessor: as long as an item, and every step misses L2 once for each head."""
    shape = Shape("one", 128, MULTIPROCESSORS, 128)
    run = simulate(FORWARD, shape, None)
    assert run.cycles == pytest.approx(FORWARD.per_item + FORWARD.block_cycles(128))
    assert run.balance == pytest.approx(1.0)
    assert (run.blocks, run.missed) == (MULTIPROCESSORS, MULTIPROCESSORS)


@pytest.mark.parametrize(("bn", "block"), [(128, 128), (512, 128), (128, 64)])
def test_blocks_of_a_row(native, bn, block):
    """All blocks of the listed tiles that have keys, in list order."""
    keys, index, partial = 1300, [0, 2, -(-1300 // bn) - 1, 1], 2
    out = (ctypes.c_int * 400)()
    n = native.walk((ctypes.c_int * len(index))(*index), partial, len(index), bn, block, keys, out)
    want = [(b, t, at < partial) for at, t in enumerate(index) for b in range(t * bn, min(t * bn + bn, keys), block)]
    assert [(*out[4 * i : 4 * i + 2], bool(out[4 * i + 2])) for i in range(n)] == want
    assert [out[4 * i + 3] for i in range(n)] == [0] * (n - 1) + [1]
