"""The backward of attention on sm_90a on the host: TMA, wgmma and barriers as the documentation has them.

Products are formed when they are waited for, writes to shared memory reach them after the proxy fence alone, loads land
early or late at random: what is read too early or given away too early shows in the gradients.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import cuda_emulator
import pytest
import torch
from _numerics import assert_all_close_to_truth
from _raw_attention import run, run_plain
from _raw_cases import wanted, widened

from maskaccel.masks import TileMask
from maskaccel.ops import tile_attention
from maskaccel.ops.attention import autograd, reference
from maskaccel.ops.attention.schema import NEED_K, NEED_Q, NEED_S, NEED_V, SAME_BITS

pytestmark = pytest.mark.skipif(cuda_emulator.missing() is not None, reason=f"no emulation: {cuda_emulator.missing()}")
FOLDER = Path(__file__).resolve().parent.parent / "build" / "emulated"
OP = "tile_attention_backward"
THREADS = 256  # of the kernel that ends this path: no other of the backward has as many
QKV = NEED_Q | NEED_K | NEED_V


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """An emulated GPU of compute capability 9.0."""
    monkeypatch.setenv("MASKACCEL_EMULATE_CAPABILITY", "90")


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
        self.q, self.k, self.v, self.dout = (
            self.normal(batch, s, h, dim).to(dtype)
            for s, h in ((sq, heads), (sk, key_heads), (sk, key_heads), (sq, heads))
        )
        self.mask: TileMask | None = None
        self.block = (128, 128)
        self.dlse: torch.Tensor | None = None
        self.scale = dim**-0.5

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.gen)

    def masked(self, kept: torch.Tensor, block: tuple[int, int] = (128, 128)) -> Call:
        self.mask, self.block = TileMask.from_bool(kept, block), block
        return self

    def islands(self, share: float) -> torch.Tensor:
        """Empty, full and partial tiles, rows and keys that see nothing, an empty row and column of tiles."""
        batch, heads, sq, sk = self.shape
        coarse = torch.rand(batch, heads, -(-sq // 128), -(-sk // 128), generator=self.gen)
        coarse = coarse.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :sq, :sk]
        fine = torch.rand(self.shape, generator=self.gen)
        kept = (coarse < share) | ((coarse < 2 * share) & (fine < 0.3))
        kept[:, :, 3::50] = False
        kept[:, :, :, 5::70] = False
        kept[0, 0, :128] = False
        kept[..., 128:256] = False
        return kept

    def arguments(self, needs: int = QKV) -> tuple:
        lists: tuple = (None,) * 8
        if self.mask is not None:
            lists = (*self.mask.lists(), *self.mask.transposed_lists(), self.mask.pattern_of, self.mask.patterns)
        qkv, scores = (self.q, self.k, self.v), (None,) * 4
        out, lse, _ = reference.tile_attention(*qkv, *lists, *scores, None, None, None, *self.block, self.scale, 0.0, 0)
        return self.dout, self.dlse, *qkv, out, lse, *lists, *scores, *self.block, self.scale, needs

    def check(self, threads) -> tuple[torch.Tensor, ...]:
        args = self.arguments()
        got = run(OP, getattr(torch.ops.maskaccel_emulated, OP), args)
        assert threads() == THREADS
        results = wanted(got, run_plain(OP, args), run_plain(OP, widened(args)))
        assert_all_close_to_truth(*results, "dq, dk, dv")
        return got


@pytest.mark.parametrize("dim", [16, 64, 72, 80, 96, 104, 128])
def test_head_dims(threads, dim):
    """Without a mask: ragged lengths, Sq != Sk, two query heads to a key head."""
    dtype = torch.bfloat16 if dim % 16 else torch.float16
    Call(dim, 1, 150, 200, 2, 1, dim, dtype).check(threads)


@pytest.mark.parametrize(("dim", "block"), [(64, (128, 128)), (128, (128, 128)), (80, (256, 128)), (96, (128, 384))])
def test_masks(threads, dim, block):
    """Partial, full and empty tiles, a mask for each head, tiles of several pieces, cut at the last query and key."""
    call = Call(1, 1, 300, 450, 2, 1, dim)
    got = call.masked(call.islands(0.4), block).check(threads)
    assert not got[0][0, :128, 0].any() and not got[1][0, 128:256].any() and not got[2][0, 128:256].any()


@pytest.mark.parametrize("lead", [(1, 1), (1, 2), (2, 1)])
def test_shared_masks(threads, lead):
    """One mask for several samples or heads."""
    call = Call(2, 2, 200, 260, 2, 2, 32)
    call.masked(call.islands(0.5)[: lead[0], : lead[1]]).check(threads)


def test_gradient_of_lse(threads):
    call = Call(3, 1, 200, 200, 2, 2, 128)
    call.dlse = call.normal(1, 2, 200)
    call.masked(call.islands(0.6)).check(threads)


@pytest.mark.parametrize("scale", [-0.1, 0.0])
def test_scales_of_either_sign(threads, scale):
    """Keys past the last score zero, and pairs that are not kept anything."""
    call = Call(4, 1, 140, 150, 1, 1, 64)
    call.scale = scale
    call.masked(call.islands(0.5)).check(threads)


def test_large_scores(threads):
    """Pairs that are not kept, and keys past the last, may have weights above all numbers."""
    call = Call(5, 1, 200, 200, 1, 1, 64)
    kept = torch.ones(200, 200, dtype=torch.bool)
    kept[:, 30:60] = False
    call.q, call.k = call.q * 8, call.k * 8
    call.k[:, :30] = -call.q[:, :1]
    call.k[:, 30:60] = 8 * call.q[:, :1]
    call.check(threads)
    call.masked(kept).check(threads)


def test_strides(threads):
    """Slices of one tensor of queries, keys and values, and heads in front of tokens."""
    call = Call(6, 2, 150, 150, 2, 2, 64)
    call.q, call.k, call.v = call.normal(2, 150, 2, 192).to(torch.bfloat16).split(64, 3)
    call.dout = call.dout.transpose(1, 2).contiguous().transpose(1, 2)
    call.check(threads)


@pytest.mark.parametrize("order", ["first", "last", "random"])
def test_any_order_of_warps(threads, monkeypatch, order):
    """Warps that run ahead of the others as far as barriers let them."""
    monkeypatch.setenv("MASKACCEL_EMULATE_ORDER", order)
    for dim in (32, 128):
        call = Call(7, 1, 260, 150, 2, 1, dim)
        call.masked(call.islands(0.6)).check(threads)


def test_full_mask_is_no_mask(threads):
    """Bit by bit, where CTAs run in turn."""
    call = Call(8, 1, 260, 140, 1, 1, 64)
    want = call.check(threads)
    got = call.masked(torch.ones(260, 140, dtype=torch.bool)).check(threads)
    assert all(map(torch.equal, got, want))


def test_deterministic_mode_asks_for_the_same_bits(monkeypatch):
    """The other path then serves."""
    needs = []

    def backward(*args):
        needs.append(args[-1])
        return reference.tile_attention_backward(*args)

    monkeypatch.setattr(autograd, "op", lambda namespace, name: backward)
    q, k, v = (torch.randn(1, 20, 2, 16, requires_grad=True) for _ in range(3))
    for mode in (False, True):
        torch.use_deterministic_algorithms(mode)
        try:
            tile_attention(q, k, v).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    assert needs == [QKV, QKV | SAME_BITS]


@pytest.mark.parametrize("what", ["same bits", "part", "scores", "block", "stride", "dim"])
def test_the_rest_is_for_the_other_path(threads, what):
    """Where sums in a fixed order are asked for, some gradients alone, other tiles, and rows that TMA cannot read."""
    call = Call(9, 1, 40, 40, 1, 1, 136 if what == "dim" else 64)
    needs = {"same bits": QKV | SAME_BITS, "part": NEED_K, "scores": QKV | NEED_S}.get(what, QKV)
    if what == "block":
        call.masked(call.islands(0.5), (64, 64))
    if what == "stride":
        call.dout = call.normal(1, 40, 1, 68).to(torch.bfloat16)[..., :64]
    args = call.arguments(needs)
    got = run(OP, getattr(torch.ops.maskaccel_emulated, OP), args)
    assert threads() != THREADS
    results = wanted(got, run_plain(OP, args), run_plain(OP, widened(args)))
    assert_all_close_to_truth(*results, what)
