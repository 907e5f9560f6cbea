"""The CUDA attention kernels on the host, lane by lane: matrix products, ldmatrix, cp.async.

Needs the CUDA headers, not a GPU.
"""

from __future__ import annotations

import os
from pathlib import Path

import cuda_emulator
import pytest
import torch
from _numerics import assert_all_close_to_truth, assert_close_to_truth
from _raw_attention import draw, run, run_plain
from _raw_cases import describe, wanted, widened

from maskaccel.masks import TileMask
from maskaccel.ops.attention import reference
from maskaccel.ops.attention.schema import KEEP, NEED_K, NEED_Q, NEED_S, NEED_V, PRUNE
from maskaccel.ops.attention.serves import cuda_refusal

pytestmark = pytest.mark.skipif(cuda_emulator.missing() is not None, reason=f"no emulation: {cuda_emulator.missing()}")
SEEDS = int(os.environ.get("MASKACCEL_EMULATED_SEEDS", "16"))
DTYPES = (torch.bfloat16, torch.float16)
NO_LISTS, NO_SCORES = (None,) * 6, (None,) * 4


@pytest.fixture(scope="module")
def emulated():
    """The op namespace of the emulation."""
    cuda_emulator.load(Path(__file__).resolve().parent.parent / "build" / "emulated")
    return torch.ops.maskaccel_emulated


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("op", ["tile_attention", "tile_attention_backward", "attention_column_sums"])
def test_any_order_of_warps(emulated, monkeypatch, op, order):
    """Warps that run ahead of the others, as far as barriers let them, change no bit."""
    for seed in range(100, 102):
        args = draw(op, seed, DTYPES[seed % 2], lengths=(130, 200))
        if op == "tile_attention" and cuda_refusal(args[0], args[-5], args[-1]) is not None:
            continue
        monkeypatch.delenv("MASKACCEL_EMULATE_ORDER", raising=False)
        in_turns = run(op, getattr(emulated, op), args)
        monkeypatch.setenv("MASKACCEL_EMULATE_ORDER", order)
        assert all(map(torch.equal, in_turns, run(op, getattr(emulated, op), args)))


SMALL = ("merge_attention", "merge_attention_backward", "tile_lists")


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("op", ["tile_attention", "tile_attention_backward", "attention_column_sums", *SMALL])
def test_matches_reference(emulated, op, seed):
    """Random calls over the whole contract: masks, layouts, grouped heads, bias, epilogue, keep bits, pruning."""
    args = draw(op, seed, torch.float32 if op in SMALL and seed % 3 == 0 else DTYPES[seed % 2])
    if op == "tile_attention" and cuda_refusal(args[0], args[-5], args[-1]) is not None:
        pytest.skip("the kernel refuses this call")
    got = run(op, getattr(emulated, op), args)
    results = wanted(got, run_plain(op, args), run_plain(op, widened(args)))
    assert_all_close_to_truth(*results, f"{op} seed {seed} ({describe(args)})")


def test_one_row_at_an_odd_stride(emulated):
    """The stride of a dim of one element is arbitrary: no address of a copy may be made with it."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, 4 * 64 + 3, generator=gen).bfloat16()[:, :1, :256].unflatten(2, (4, 64)) for _ in "qkv"
    )
    out, lse, _ = emulated.tile_attention(q, k, v, *NO_LISTS, *[None] * 9, 64, 64, 0.125, 0.0, 0)
    assert torch.equal(out, v)
    grads = emulated.tile_attention_backward(
        q, None, q, k, v, out, lse, *NO_LISTS, *[None] * 6, 64, 64, 0.125, NEED_Q | NEED_K | NEED_V
    )
    torch.testing.assert_close(grads[2], q)
    torch.testing.assert_close(
        emulated.attention_column_sums(q, k, lse, *[None] * 9, 64, 64, 0.125), torch.ones(1, 4, 1)
    )


def test_empty_small_ops(emulated):
    """No rows, no tiles, no samples."""
    for shape in ((0, 3, 2, 8), (1, 0, 2, 8), (1, 3, 2, 0)):
        out, lse = torch.zeros(shape), torch.zeros(shape[0], shape[2], shape[1])
        merged = emulated.merge_attention(out, lse, out, lse)
        assert torch.equal(merged[0], out) and torch.allclose(merged[1], lse + 0.6931472)
        assert [t.shape for t in emulated.merge_attention_backward(out, lse, out, lse, out, lse)] == [
            out.shape, lse.shape, out.shape, lse.shape,
        ]  # fmt: skip
    for batch, rows, tiles in ((0, 3, 40), (1, 0, 40), (1, 3, 0)):
        bits = torch.zeros(batch, 2, rows, -(-tiles // 32), dtype=torch.int32)
        for transpose in (False, True):
            got = emulated.tile_lists(bits, None, tiles, transpose)
            assert all(map(torch.equal, got, reference.tile_lists(bits, None, tiles, transpose)))


def test_order_of_many_lines(emulated):
    """More lines than a CTA has threads, equal and unequal ones."""
    bits = torch.randint(0, 2**5, (2, 3, 70, 1), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for transpose in (False, True):
        got = emulated.tile_lists(bits, None, 30, transpose)
        assert all(map(torch.equal, got, reference.tile_lists(bits, None, 30, transpose)))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"tile_lists: bits must be contiguous int32 \(B, H, M, 2\), got \(1, 1, 2, 1\)",
         lambda ops: ops.tile_lists(torch.zeros(1, 1, 2, 1, dtype=torch.int32), None, 40, False)),
        (r"tile_lists: pattern_of must be contiguous int32 \(1\|1, 1\|1, 2, 30\), got \(1, 1, 2, 1\)",
         lambda ops: ops.tile_lists(*[torch.zeros(1, 1, 2, 1, dtype=torch.int32)] * 2, 30, False)),
        (r"merge_attention: lse2 must be contiguous float32 \(1, 3, 2\), got \(1, 2, 3\)",
         lambda ops: ops.merge_attention(torch.zeros(1, 2, 3, 8), torch.zeros(1, 3, 2), torch.zeros(1, 2, 3, 8),
                                         torch.zeros(1, 2, 3))),
        (r"merge_attention: out2 must be \(1, 2, 3, 8\) of the dtype of out1",
         lambda ops: ops.merge_attention(torch.zeros(1, 2, 3, 8), torch.zeros(1, 3, 2), torch.zeros(1, 2, 3, 9),
                                         torch.zeros(1, 3, 2))),
    ],
)  # fmt: skip
def test_bad_input_of_small_ops(emulated, message, call):
    """Named with what is allowed."""
    with pytest.raises(RuntimeError, match=message):
        call(emulated)


def _values(gen: torch.Generator, dtype: torch.dtype, *shape: int, loud: float = 0.0) -> torch.Tensor:
    """Normal values, every few rows larger by a factor of up to 1 + loud."""
    x = torch.randn(shape, generator=gen)
    return (x * (1 + loud * (torch.rand(*shape[:3], 1, generator=gen) > 0.97))).to(dtype)


def _whole_call(op, q, k, v, mask, block, threshold, flags, ref=None, scale=None, add=None):
    lists = (None,) * 8 if mask is None else (*mask.lists(), *NO_LISTS[:3], mask.pattern_of, mask.patterns)
    return op(q, k, v, *lists, *NO_SCORES, ref, scale, add, *block, q.shape[3] ** -0.5, threshold, flags)


@pytest.mark.parametrize("dim", [64, 72, 128, 256])
@pytest.mark.parametrize("flags", [KEEP, KEEP | PRUNE])
@pytest.mark.parametrize("with_reference", [False, True])
def test_skip_test(emulated, dim, flags, with_reference):
    """Keep bits and pruned results, with tiles that are kept by their first piece, by a later one, and not at all."""
    gen = torch.Generator().manual_seed(dim + flags)
    block = (64, 128) if dim == 256 else (128, 128)
    q, k, v = (_values(gen, torch.bfloat16, 1, n, h, dim, loud=1.0) for n, h in ((150, 2), (600, 1), (600, 1)))
    mask = TileMask.from_bool(torch.rand(1, 2, 150, 600, generator=gen) < 0.7, block)
    ref = reference.tile_attention(q, k, v, *[None] * 15, *block, dim**-0.5, 0.0, 0)[1] if with_reference else None

    def call(op, threshold, dtype):
        wide = (q.to(dtype), k.to(dtype), v.to(dtype), mask, block, threshold, flags)
        return _whole_call(op, *wide, ref.double() if with_reference and dtype == torch.float64 else ref)

    def share_of(threshold):
        keep = _whole_call(reference.tile_attention, q, k, v, mask, block, threshold, flags | KEEP, ref)[2]
        return reference.unpack_words(keep, 5).float().mean().item()

    shares = {threshold: share_of(threshold) for threshold in (-5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0)}
    threshold = min(shares, key=lambda at: abs(shares[at] - 0.6))
    assert 0.2 < shares[threshold] < 0.9, shares
    out, lse, keep = call(emulated.tile_attention, threshold, torch.bfloat16)
    truth = call(reference.tile_attention, threshold, torch.float64)
    assert torch.equal(keep, truth[2])
    plain = call(reference.tile_attention, threshold, torch.bfloat16)
    assert_close_to_truth(out, plain[0], truth[0], magnitude=v.abs().max().item())
    torch.testing.assert_close(lse.double(), truth[1], atol=1e-5, rtol=1e-5)


def test_pruned_tiles_too_tall(emulated):
    """Several CTAs cannot agree on one tile."""
    q = torch.zeros(1, 300, 1, 64, dtype=torch.half)
    with pytest.raises(RuntimeError, match="tile_attention: bm is 256; with PRUNE and head dim 64 at most 128"):
        _whole_call(emulated.tile_attention, q, q, q, None, (256, 128), 0.0, PRUNE)
    keep = _whole_call(emulated.tile_attention, q, q, q, None, (256, 128), -1.0, KEEP)[2]
    assert keep.tolist() == [[[[7], [7]]]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogue(emulated, dtype):
    """Row scale and residual in fp32, in the dtype of q, broadcast and not aligned."""
    gen = torch.Generator().manual_seed(1)
    q, k, v = (_values(gen, dtype, 2, n, h, 72) for n, h in ((70, 4), (50, 2), (50, 2)))
    scale = torch.rand(2, 4, 70, generator=gen)
    add = torch.randn(2, 70, 4, 73, generator=gen)[..., 1:]
    for by, residual in ((scale, add), (scale[:, :1], add.to(dtype)), (scale[:1, :, :1], None), (None, add)):
        call = (q, k, v, None, (128, 128), 0.0, 0, None, by, residual)
        got, plain = _whole_call(emulated.tile_attention, *call)[0], _whole_call(reference.tile_attention, *call)[0]
        wide = [t if t is None or not isinstance(t, torch.Tensor) else t.double() for t in call]
        assert_close_to_truth(got, plain, _whole_call(reference.tile_attention, *wide)[0])


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_full_mask_is_no_mask(emulated, dim):
    """The same bits, forward and backward."""
    gen = torch.Generator().manual_seed(2)
    q, k, v, dout = (_values(gen, torch.bfloat16, 1, 140, 1, dim) for _ in range(4))
    mask = TileMask.full((140, 140), (128, 128))
    whole = (*mask.lists(), *mask.transposed_lists(), None, None)
    results = []
    for lists in ((None,) * 8, whole, whole):
        out, lse, _ = emulated.tile_attention(q, k, v, *lists, *NO_SCORES, None, None, None, 128, 128, 0.1, 0.0, 0)
        grads = emulated.tile_attention_backward(
            dout, None, q, k, v, out, lse, *lists, *NO_SCORES, 128, 128, 0.1, NEED_Q | NEED_K | NEED_V
        )
        results.append((out, lse, *grads))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_empty(emulated):
    """No samples, queries, keys or tiles; only what is asked for."""
    none = (None,) * 8
    for batch, sq, sk in ((0, 5, 5), (1, 0, 5), (2, 5, 0)):
        q, k = torch.randn(batch, sq, 2, 32).half(), torch.randn(batch, sk, 1, 32).half()
        out, lse, keep = emulated.tile_attention(q, k, k, *none, *NO_SCORES, None, None, None, 64, 64, 1.0, 0.0, KEEP)
        assert torch.equal(out, torch.zeros_like(q)) and lse.shape == (batch, 2, sq) and lse.isneginf().all()
        assert keep.shape == (batch, 2, -(-sq // 64), 1 if sk else 0) and not keep.any()
        grads = emulated.tile_attention_backward(q, None, q, k, k, out, lse, *none, *NO_SCORES, 64, 64, 1.0, 15)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape, (batch, 2, sq, sk)]
        assert not any(g.any() for g in grads)
    q = torch.randn(1, 40, 1, 32).half()
    mask = TileMask.from_tiles(torch.zeros(1, 1, 1, 1, dtype=torch.bool), (40, 40), (64, 64))
    lists = (*mask.lists(), *mask.transposed_lists(), None, None)
    out, lse, _ = emulated.tile_attention(q, q, q, *lists, *NO_SCORES, None, None, None, 64, 64, 1.0, 0.0, 0)
    assert not out.any() and lse.isneginf().all()
    for needs in (0, NEED_Q, NEED_K, NEED_V, NEED_S):
        grads = emulated.tile_attention_backward(q, lse, q, q, q, out, lse, *lists, *NO_SCORES, 64, 64, 1.0, needs)
        assert [bool(g.numel()) for g in grads] == [bool(needs & 1 << i) for i in range(4)]
        assert not any(g.any() for g in grads)


Q = torch.randn(2, 6, 4, 32).half()


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("q is float32; the CUDA attention kernels take bfloat16 or float16", dict.fromkeys(range(3), Q.float())),
        ("k must have the dtype of q", {1: Q.float()}),
        ("q has head dim 20; allowed are multiples of 8 from 16 to 256", dict.fromkeys(range(3), Q[..., :20])),
        ("k has 3 heads, which must divide the 4 of q", {1: Q[:, :, :3], 2: Q[:, :, :3]}),
        (r"v must be \(2, 6, 4, 32\), got \(2, 5, 4, 32\)", {2: Q[:, :5]}),
        ("q must have a contiguous last dim, got stride 24", {0: Q.transpose(1, 3).contiguous().transpose(1, 3)}),
        ("index, count and order must be given together", {3: torch.zeros(1, 1, 1, 1, dtype=torch.int32)}),
        (r"index must be \(1\|2, 1\|4, 1, L\), got \(1, 3, 1, 1\)", {
            3: torch.zeros(1, 3, 1, 1, dtype=torch.int32), 4: torch.zeros(1, 3, 1, 2, dtype=torch.int32),
            5: torch.zeros(3, dtype=torch.int32)}),
        ("bias has 3 elements in dim 1; allowed are 1 and 4", {11: torch.zeros(1, 3, 1, 1)}),
        (r"reference_lse must be contiguous float32 \(2, 4, 6\)", {15: torch.zeros(2, 6, 4)}),
        ("bm is 24; allowed are multiples of 16", {18: 24}),
        ("bn is 16; allowed are multiples of 32", {19: 16}),
        ("flags are 4; allowed are 0 to 3", {22: 4}),
    ],
)  # fmt: skip
def test_bad_input(emulated, message, changes):
    """A call outside the contract is refused before any kernel runs."""
    args = [Q, Q, Q, *[None] * 15, 128, 128, 1.0, 0.0, 0]
    for at, value in changes.items():
        args[at] = value
    with pytest.raises(RuntimeError, match=f"tile_attention: {message}"):
        emulated.tile_attention(*args)
