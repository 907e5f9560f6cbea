"""The attention kernel of sm_90a on the host, over the documented behaviour of wgmma, TMA and their descriptors.

Products are formed when they are waited for, loads land early or late at random, barriers count as on the device: a
buffer that is given away too early stops the emulation, and so does a barrier that nobody completes.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import cuda_emulator
import pytest
import torch
from _numerics import assert_close_to_truth

from maskaccel.masks import TileMask
from maskaccel.ops.attention import reference
from maskaccel.ops.attention.schema import KEEP, PRUNE

pytestmark = pytest.mark.skipif(cuda_emulator.missing() is not None, reason=f"no emulation: {cuda_emulator.missing()}")
FOLDER = Path(__file__).resolve().parent.parent / "build" / "emulated"
THREADS = 384  # of the kernel under test: no other has as many


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """An emulated GPU of compute capability 9.0 with two multiprocessors, so that a CTA walks several items."""
    monkeypatch.setenv("MASKACCEL_EMULATE_CAPABILITY", "90")
    monkeypatch.setenv("MASKACCEL_EMULATE_MULTIPROCESSORS", "2")


@pytest.fixture(scope="module")
def threads():
    """Threads of a CTA of the last launch."""
    cuda_emulator.load(FOLDER)
    return ctypes.CDLL(str(cuda_emulator.build(FOLDER))).maskaccel_emulated_threads


class Call:
    """Operands of one call."""

    def __init__(self, seed: int, batch: int, sq: int, sk: int, heads: int, key_heads: int, dim: int,
                 dtype: torch.dtype = torch.bfloat16) -> None:  # fmt: skip
        self.gen = torch.Generator().manual_seed(seed)
        self.shape = (batch, heads, sq, sk)
        self.q, self.k, self.v = (
            torch.randn(batch, s, h, dim, generator=self.gen).to(dtype)
            for s, h in ((sq, heads), (sk, key_heads), (sk, key_heads))
        )
        self.mask: TileMask | None = None
        self.block = (128, 128)
        self.reference = self.out_scale = self.out_add = None
        self.threshold, self.flags = 0.0, 0

    def masked(self, kept: torch.Tensor, block: tuple[int, int]) -> Call:
        self.mask, self.block = TileMask.from_bool(kept, block), block
        return self

    def run(self, op, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
        def wide(t):
            return t if t is None or dtype is None or not t.is_floating_point() else t.to(dtype)

        lists = (None,) * 8
        if self.mask is not None:
            lists = (*self.mask.lists(), None, None, None, self.mask.pattern_of, self.mask.patterns)
        qkv = (wide(self.q), wide(self.k), wide(self.v))
        rest = (wide(self.reference), wide(self.out_scale), wide(self.out_add))
        scale = self.q.shape[3] ** -0.5
        return op(*qkv, *lists, *(None,) * 4, *rest, *self.block, scale, self.threshold, self.flags)

    def check(self, threads) -> tuple[torch.Tensor, ...]:
        got = self.run(torch.ops.maskaccel_emulated.tile_attention)
        assert threads() == THREADS
        plain, truth = self.run(reference.tile_attention), self.run(reference.tile_attention, torch.float64)
        assert_close_to_truth(got[0], plain[0], truth[0], magnitude=self.v.abs().max().item())
        assert torch.equal(got[1].isneginf(), truth[1].isneginf())
        torch.testing.assert_close(got[1].double(), truth[1], atol=2e-5, rtol=1e-5)
        assert torch.equal(got[2], truth[2])
        return got


def _islands(call: Call, share: float) -> torch.Tensor:
    """A mask with empty, full and partial tiles, rows that see nothing, and a row of tiles that is empty."""
    batch, heads, sq, sk = call.shape
    coarse = torch.rand(batch, heads, -(-sq // 128), -(-sk // 128), generator=call.gen)
    coarse = coarse.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :sq, :sk]
    fine = torch.rand(call.shape, generator=call.gen)
    kept = (coarse < share) | ((coarse < 2 * share) & (fine < 0.3))
    kept[:, :, 3::50] = False
    kept[0, 0, 128:256] = False
    return kept


@pytest.mark.parametrize("dim", [16, 64, 72, 80, 96, 104, 128, 160, 256])
def test_head_dims(threads, dim):
    """Without a mask: ragged lengths, Sq != Sk, two query heads to a key head."""
    dtype = torch.bfloat16 if dim % 16 else torch.float16
    Call(dim, 1, 150, 430, 2, 1, dim, dtype).check(threads)


@pytest.mark.parametrize(
    ("dim", "block"),
    [
        (64, (128, 128)),
        (64, (256, 128)),
        (80, (128, 256)),
        (128, (384, 512)),
        (256, (128, 128)),
        (64, (128, 192)),
        (128, (128, 64)),
        (256, (128, 64)),
    ],
)
def test_masks(threads, dim, block):
    """Partial, full and empty tiles; tiles of several blocks, cut at the last key."""
    call = Call(1, 1, 300, 700, 2, 2, dim)
    call.masked(_islands(call, 0.4), block).check(threads)


@pytest.mark.parametrize("lead", [(1, 1), (1, 2), (2, 1)])
def test_shared_masks(threads, lead):
    """One mask for several samples or heads: more rows than a window of the schedule holds."""
    call = Call(2, 2, 2200, 40, 2, 1, 16)
    kept = _islands(call, 0.5)[: lead[0], : lead[1]]
    call.masked(kept, (128, 128)).check(threads)


def test_counts_that_lie_anywhere(threads, monkeypatch):
    """Counts of lists as a view whose first pair lies on four bytes alone."""
    call = Call(7, 1, 300, 300, 2, 2, 16)
    call.masked(_islands(call, 0.5), (128, 128))
    index, count, order = call.mask.lists()
    count = torch.cat([count.new_zeros(1), count.flatten()])[1:].view(count.shape)
    assert count.data_ptr() % 8 == 4
    monkeypatch.setattr(call.mask, "lists", lambda: (index, count, order))
    call.check(threads)


def test_full_mask_is_no_mask(threads):
    """Bit by bit."""
    call = Call(3, 1, 260, 400, 1, 1, 128)
    want = call.check(threads)
    got = call.masked(torch.ones(260, 400, dtype=torch.bool), (128, 128)).check(threads)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(
    ("flags", "with_reference", "with_mask"),
    [(KEEP, False, True), (PRUNE, True, False), (KEEP | PRUNE, False, False), (KEEP | PRUNE, True, True)],
)
def test_skip_test(threads, flags, with_reference, with_mask):
    """Tiles that are kept and pruned in turn: first, last and in between."""
    call = Call(4, 1, 200, 1200, 2, 2, 96 if with_mask else 64)
    loud = torch.rand(1, 10, 2, generator=call.gen).repeat_interleave(128, 1)[:, :1200, :, None]
    call.k = (call.k * (loud * 1.5)).to(call.k.dtype)
    if with_mask:
        call.masked(_islands(call, 0.5), (128, 128))
    if with_reference:
        call.reference = call.run(reference.tile_attention)[1]
    call.flags = flags | KEEP
    shares = {}
    for threshold in range(-8, 8):
        call.threshold = float(threshold)
        keep = reference.unpack_words(call.run(reference.tile_attention, torch.float64)[2], 10)
        shares[call.threshold] = keep.float().mean().item()
    most = max(shares.values())
    call.threshold = min(shares, key=lambda at: abs(shares[at] - most / 2))
    assert most / 4 < shares[call.threshold] < most * 0.8, shares
    call.flags = flags
    call.check(threads)


def test_epilogue(threads):
    """Row scale and residual, aligned or not, also of rows that see nothing."""
    call = Call(5, 2, 140, 260, 2, 2, 72)
    call.masked(_islands(call, 0.5), (128, 128))
    scale, add = torch.rand(2, 2, 140, generator=call.gen), torch.randn(2, 140, 2, 73, generator=call.gen)[..., 1:]
    for by, residual in ((scale, add), (scale[:, :1], add.to(torch.bfloat16)), (scale[:1, :, :1], None), (None, add)):
        call.out_scale, call.out_add = by, residual
        call.check(threads)


def test_strides(threads):
    """Slices of one tensor of queries, keys and values, and heads in front of tokens."""
    call = Call(6, 2, 150, 150, 3, 3, 64)
    call.q, call.k, call.v = torch.randn(2, 150, 3, 192, generator=call.gen).to(torch.bfloat16).split(64, 3)
    call.check(threads)
    call.q, call.k, call.v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (call.q, call.k, call.v))
    call.check(threads)


@pytest.mark.parametrize("what", ["bias", "block", "stride", "scale"])
def test_the_rest_is_for_the_other_path(threads, what):
    """Biases, other tiles, rows that TMA cannot read, and scales that turn the order of scores around."""
    q = torch.randn(1, 150, 1, 64).half()
    args = [q, q, q, *[None] * 15, 128, 128, 0.1, 0.0, 0]
    if what == "bias":
        args[11] = torch.zeros(1, 1, 1, 150)
    if what == "block":
        args[18], args[22] = 64, KEEP
    if what == "stride":
        args[1] = torch.randn(1, 150, 1, 68).half()[..., :64]
    if what == "scale":
        args[20] = -0.1
    got = torch.ops.maskaccel_emulated.tile_attention(*args)
    assert threads() != THREADS
    want = reference.tile_attention(*args)
    torch.testing.assert_close(got[0], want[0], atol=2e-3, rtol=2e-3)
