"""How the persistent attention kernel deals out rows of tiles (`csrc/attention/cuda_schedule.h`), on the host."""

from __future__ import annotations

import ctypes
import heapq
import itertools
import random
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
HEADER = Path(__file__).resolve().parent.parent / "csrc" / "attention" / "cuda_schedule.h"
CTAS = 132
SOURCE = f"""
#include <initializer_list>
#include "{HEADER}"
using namespace maskaccel::cuda;
extern "C" int sequence(const int* order, const int* sizes, int* out) {{
  Schedule s{{order, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]}};
  for (int place = 0; place < s.items(); ++place) {{
    const Item i = s.item(place);
    for (int x : {{i.batch, i.head, i.tile_row, i.sub, i.line}}) *out++ = x;
  }}
  return s.items();
}}
extern "C" int walk(const int* index, int partial, int total, int bn, int block, int keys, int* out) {{
  int blocks = 0;
  for (Walk w(index, partial, total, bn, block, keys); w.next(); ++blocks) {{
    for (int x : {{w.begin, w.tile, int(w.is_partial()), int(w.last())}}) *out++ = x;
  }}
  return blocks;
}}
"""


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """The header behind two C functions."""
    folder = tmp_path_factory.mktemp("schedule")
    (folder / "schedule.cpp").write_text(SOURCE)
    command = ["g++", "-std=c++17", "-shared", "-fPIC", str(folder / "schedule.cpp"), "-o", str(folder / "schedule.so")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "schedule.so"))


def _sequence(native, order, tile_rows, subs, batch, heads, mask_batch, mask_heads, window):
    count = tile_rows * subs * batch * heads
    out = (ctypes.c_int * (5 * count))()
    pointer = None if order is None else (ctypes.c_int * len(order))(*order)
    sizes = (ctypes.c_int * 7)(tile_rows, subs, batch, heads, mask_batch, mask_heads, window)
    assert native.sequence(pointer, sizes, out) == count
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
    for at in range(0, len(items) - CTAS, CTAS):
        assert len(Counter(i[1] for i in items[at : at + CTAS])) <= CTAS // 16 + 2
    ranks = [i[2] for i in items]
    assert all(a // 16 <= b // 16 for a, b in itertools.pairwise(ranks))


def _claimed(lengths: list[int]) -> int:
    """Load of the busiest CTA when each takes the next item as it gets free."""
    load = [0] * CTAS
    for n in lengths:
        heapq.heapreplace(load, load[0] + n)
    return max(load)


def _in_turns(lengths: list[int]) -> int:
    """The same when every CTA takes every CTAS-th."""
    return max(sum(lengths[c::CTAS]) for c in range(CTAS))


@pytest.mark.parametrize("copies", [1, 24])
def test_balance(native, copies):
    """A tenth of the rows is ten times as long, as text tokens make them: claims lose little, turns would lose more."""
    rows = 6144 // copies
    rng = random.Random(1)
    length = [256 if rng.random() < 0.1 else 25 for _ in range(rows)]
    order = sorted(range(rows), key=lambda i: -length[i])
    items = _sequence(native, order, rows, 1, 1, copies, 1, 1, 16)
    lengths = [length[i[2]] for i in items]
    mean = sum(lengths) / CTAS
    assert _claimed(lengths) < 1.03 * mean
    assert _claimed(lengths) < _in_turns(lengths)


@pytest.mark.parametrize(("bn", "block"), [(128, 128), (512, 128), (128, 64)])
def test_blocks_of_a_row(native, bn, block):
    """All blocks of the listed tiles that have keys, in list order."""
    keys, index, partial = 1300, [0, 2, -(-1300 // bn) - 1, 1], 2
    out = (ctypes.c_int * 400)()
    n = native.walk((ctypes.c_int * len(index))(*index), partial, len(index), bn, block, keys, out)
    want = [(b, t, at < partial) for at, t in enumerate(index) for b in range(t * bn, min(t * bn + bn, keys), block)]
    assert [(*out[4 * i : 4 * i + 2], bool(out[4 * i + 2])) for i in range(n)] == want
    assert [out[4 * i + 3] for i in range(n)] == [0] * (n - 1) + [1]
