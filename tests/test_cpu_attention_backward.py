"""The CPU backward of tiled attention and the column sums, against fp64: every argument of the contract."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from _numerics import assert_close_to_truth
from torch import Tensor

from maskaccel._native import native
from maskaccel.ops.attention import reference
from maskaccel.ops.attention.schema import NEED_K, NEED_Q, NEED_S, NEED_V

pytestmark = pytest.mark.skipif(not native.has_cpu, reason=f"native library {native.state}: {native.reason}")

RAW = torch.ops.maskaccel_raw
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL = NEED_Q | NEED_K | NEED_V | NEED_S
NAMES = ("dq", "dk", "dv", "ds")
NO_LISTS: tuple = (None,) * 8
NO_TERMS: tuple = (None,) * 4


@dataclass
class Case:
    """Shapes of one call, and what it is made of."""

    sq: int = 200
    sk: int = 170
    heads: int = 2
    kv_heads: int = 2
    dim: int = 64
    batch: int = 1
    dtype: torch.dtype = torch.float32
    heads_first: bool = False
    block: tuple[int, int] = (64, 64)
    density: float | None = None  # of the tiles; None: no mask
    mask_dims: tuple[int, int] = (1, 1)
    partial: float = 0.0  # of the kept tiles
    bias: tuple[bool, bool, bool, bool] | None = None  # which dims are full
    bias_dtype: torch.dtype | None = None
    relpos: bool = False
    dlse: bool = False
    seed: int = 0


class Call:
    """Tensors of a case, and its results by the kernel, by plain torch and in fp64."""

    def __init__(self, case: Case) -> None:
        """Draw the tensors; lse and out are those of plain torch."""
        self.case, self.generator = case, torch.Generator().manual_seed(case.seed)
        c = case
        self.q, self.dout = self.randn(c.sq, c.heads), self.randn(c.sq, c.heads)
        self.k, self.v = self.randn(c.sk, c.kv_heads), self.randn(c.sk, c.kv_heads)
        self.scale = c.dim**-0.5
        self.lists = NO_LISTS if c.density is None else self.mask()
        self.terms = (self.bias(), *self.relpos())
        double = [t.double() for t in (self.q, self.k, self.v)]
        out, lse, _ = reference.tile_attention(
            *double, *self.lists, *self.terms, None, None, None, *c.block, self.scale, 0.0, 0
        )
        self.out, self.lse = out.to(c.dtype), lse.float()
        self.dlse = torch.randn(self.lse.shape, generator=self.generator) if c.dlse else None

    def randn(self, tokens: int, heads: int) -> Tensor:
        """`(B, S, H, D)`."""
        c = self.case
        order = (c.batch, heads, tokens, c.dim) if c.heads_first else (c.batch, tokens, heads, c.dim)
        x = torch.randn(order, generator=self.generator).to(c.dtype)
        return x.transpose(1, 2) if c.heads_first else x

    def mask(self) -> tuple:
        """Lists, transposed lists, pattern_of, patterns; a row of tiles and a column of tiles keep nothing."""
        c, g = self.case, self.generator
        bm, bn = c.block
        rows, columns = math.ceil(c.sq / bm), math.ceil(c.sk / bn)
        kept = torch.rand((*c.mask_dims, rows, columns), generator=g) < c.density
        if c.density < 1:
            kept[0, 0, rows // 2], kept[0, 0, :, -1] = False, False
        bits = reference.pack_words(kept)
        pattern_of = patterns = None
        if c.partial:
            patterns = reference.pack_words(torch.rand((3, bm, bn), generator=g) < 0.5)
            patterns[0, :] = 0  # a partial tile that keeps nothing
            some = torch.rand(kept.shape, generator=g) < c.partial
            pattern_of = torch.where(some, torch.randint(3, kept.shape, generator=g), -1).to(torch.int32)
        lists = reference.tile_lists(bits, pattern_of, columns, False)
        return (*lists, *reference.tile_lists(bits, pattern_of, columns, True), pattern_of, patterns)

    def bias(self) -> Tensor | None:
        """Any strides: the last two dims are swapped in memory."""
        c = self.case
        if c.bias is None:
            return None
        full = (c.batch, c.heads, c.sk, c.sq)
        sizes = [full[i] if c.bias[(0, 1, 3, 2)[i]] else 1 for i in range(4)]
        return torch.randn(sizes, generator=self.generator).to(c.bias_dtype or torch.float32).mT

    def relpos(self) -> tuple:
        """Table and positions."""
        c, g = self.case, self.generator
        if not c.relpos:
            return (None, None, None)
        table = torch.randn((c.heads, 40), generator=g)
        q = torch.randint(20, 40, (1, c.sq), generator=g).to(torch.int32)
        return table, q, torch.randint(0, 20, (c.batch, c.sk), generator=g).to(torch.int32)

    def args(self, needs: int = ALL) -> tuple:
        """Of the backward."""
        first = (self.dout, self.dlse, self.q, self.k, self.v, self.out, self.lse)
        return (*first, *self.lists, *self.terms, *self.case.block, self.scale, needs)

    def sums_args(self) -> tuple:
        """Of the column sums."""
        return (self.q, self.k, self.lse, *self.lists[3:], *self.terms, *self.case.block, self.scale)

    def truth(self) -> tuple[Tensor, ...]:
        """Gradients in fp64 by torch's own rules, of the forward in fp64."""
        leaves = [t.detach().double().requires_grad_() for t in (self.q, self.k, self.v)]
        terms = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in self.terms]
        shape = (self.case.batch, self.case.heads, self.case.sq, self.case.sk)
        zero = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        terms[0] = zero if terms[0] is None else terms[0] + zero
        out, lse, _ = reference.tile_attention(
            *leaves, *self.lists, *terms, None, None, None, *self.case.block, self.scale, 0.0, 0
        )
        lost = lse.isneginf()
        dlse = torch.zeros_like(lse) if self.dlse is None else self.dlse.double()
        loss = (out * self.dout.double()).sum() + (lse.masked_fill(lost, 0.0) * dlse).sum()
        return torch.autograd.grad(loss, (*leaves, zero))

    def plain(self) -> tuple[Tensor, ...]:
        """Plain torch: the formula in fp32 from the same lse; for 16-bit dtypes eager attention in the dtype."""
        return reference.tile_attention_backward(*self.args()) if self.case.dtype == torch.float32 else self.eager()

    def eager(self) -> tuple[Tensor, ...]:
        """Gradients by torch's own rules, products and softmax in the dtype of the call."""
        c = self.case
        leaves = [t.detach().clone().requires_grad_() for t in (self.q, self.k, self.v)]
        q, k, v = (t.transpose(1, 2) for t in leaves)
        k, v = (t.repeat_interleave(c.heads // c.kv_heads, 1) for t in (k, v))
        kept = reference.kept_elements(
            reference._tiles_of(self.q, self.k, *self.lists[:2], *c.block), *self.lists[6:], *c.block, c.sq, c.sk
        )
        shape = (c.batch, c.heads, c.sq, c.sk)
        term = torch.zeros(shape, dtype=c.dtype)
        if self.terms[0] is not None:
            term = term + self.terms[0].to(c.dtype)
        if self.terms[1] is not None:
            at = (self.terms[2][:, :, None] - self.terms[3][:, None, :]).long()
            term = term + self.terms[1][:, at].transpose(0, 1).to(c.dtype)
        term = term.requires_grad_()
        s = (q @ k.mT * self.scale + term).masked_fill(~kept, -torch.inf)
        lse = s.float().logsumexp(-1)
        lost = lse.isneginf()
        p = torch.where(lost[..., None], 0.0, s.softmax(-1))
        loss = ((p @ v).transpose(1, 2) * self.dout).sum(dtype=torch.float32)
        if self.dlse is not None:
            loss = loss + (lse.masked_fill(lost, 0.0) * self.dlse).sum()
        *grads, ds = torch.autograd.grad(loss, (*leaves, term))
        return *(torch.where(g.isnan(), 0.0, g) for g in grads), torch.where(ds.isnan(), 0.0, ds).float()


def check(case: Case) -> None:
    """The error rule for all gradients and for the column sums."""
    call = Call(case)
    got = RAW.tile_attention_backward(*call.args())
    for name, g, p, t in zip(NAMES, got, call.plain(), call.truth(), strict=True):
        assert g.is_contiguous()
        assert_close_to_truth(g, p, t, what=f"{name} of {case}")
    check_sums(call)


def check_sums(call: Call) -> None:
    """Column sums; the scores of plain torch are rounded to the dtype before the exponential."""
    args = call.sums_args()
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    truth = reference.attention_column_sums(*wide)
    plain = reference.attention_column_sums(*args)
    assert_close_to_truth(RAW.attention_column_sums(*args), plain, truth, what=f"column sums of {call.case}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 24, 40, 64, 72, 80, 128, 160, 256])
def test_head_dims(dim, dtype):
    check(Case(dim=dim, dtype=dtype))
    check(Case(dim=dim, dtype=dtype, sq=70, sk=150, density=0.6, partial=0.5, heads_first=True, seed=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths(dtype):
    for i, (sq, sk) in enumerate([(1, 300), (300, 2), (63, 65), (128, 127), (129, 257), (17, 33)]):
        check(Case(sq=sq, sk=sk, dim=40, dtype=dtype, seed=i))
        check(Case(sq=sq, sk=sk, dim=40, dtype=dtype, density=0.7, partial=0.3, block=(32, 32), seed=i))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_key(dtype):
    # The gradients of q and k are zero, but for the rounding of what cancels.
    for sq in (1, 300):
        call = Call(Case(sq=sq, sk=1, dim=40, dtype=dtype))
        got, truth = RAW.tile_attention_backward(*call.args()), call.truth()
        for g, t in zip(got, truth, strict=True):
            torch.testing.assert_close(g.double(), t, rtol=8 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_and_mask_dims(dtype):
    blocks = [(16, 32), (48, 96), (80, 160), (128, 128), (256, 64), (64, 320)]
    for i, block in enumerate(blocks):
        dims = ((1, 1), (2, 1), (1, 4), (2, 4))[i % 4]
        shape = {"batch": 2, "heads": 4, "kv_heads": (4, 2, 1)[i % 3], "dim": 24}
        check(
            Case(**shape, dtype=dtype, block=block, density=0.6, mask_dims=dims, partial=0.4, dlse=i % 2 == 1, seed=i)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_terms_of_the_scores(dtype):
    for i in range(8):
        full = (bool(i & 1), bool(i & 2), bool(i & 4), not i & 1)
        shape = {"batch": 2, "heads": 4, "kv_heads": 2, "dim": 32, "sq": 90, "sk": 100}
        more = {"bias_dtype": (torch.float32, dtype)[i % 2], "relpos": i % 3 == 0, "dlse": i % 2 == 0, "seed": i}
        check(Case(**shape, **more, dtype=dtype, bias=full))
        check(Case(**shape, **more, dtype=dtype, bias=full, density=0.7, partial=0.5, block=(32, 64)))
    check(Case(dtype=dtype, relpos=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_what_is_needed(dtype):
    for density in (None, 0.6):
        call = Call(Case(dtype=dtype, density=density, partial=0.3, dim=72))
        every = RAW.tile_attention_backward(*call.args())
        for needs in range(16):
            got = RAW.tile_attention_backward(*call.args(needs))
            for i, (g, e) in enumerate(zip(got, every, strict=True)):
                assert g.dtype == e.dtype
                assert torch.equal(g, e) if needs >> i & 1 else g.numel() == 0


def test_rows_and_columns_that_keep_nothing():
    call = Call(Case(sq=192, sk=192, density=0.8, dlse=True))
    assert call.lse.isneginf().any()
    call.out[call.lse.isneginf().transpose(1, 2)] = float("nan")  # whatever stands there
    dq, dk, dv, ds = RAW.tile_attention_backward(*call.args())
    assert (dq[:, 64:128] == 0).all() and (dk[:, 128:] == 0).all() and (dv[:, 128:] == 0).all()
    assert (ds[:, :, 64:128] == 0).all()
    for t in (dq, dk, dv, ds):
        assert t.isfinite().all()
    nothing = Call(Case(density=0.0))
    assert all((t == 0).all() for t in RAW.tile_attention_backward(*nothing.args()))
    assert (RAW.attention_column_sums(*nothing.sums_args()) == 0).all()


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_bias_that_leaves_out(lowest):
    call = Call(Case(sq=150, sk=140, density=0.7, partial=0.6, block=(32, 32), dlse=True))
    kept = reference.kept_elements(
        reference.kept_tiles(*call.lists[:2], 5), *call.lists[6:], *call.case.block, call.case.sq, call.case.sk
    )
    assert (~kept).all(-1).any() and kept.any()
    want = RAW.tile_attention_backward(*call.args())
    sums = RAW.attention_column_sums(*call.sums_args())
    call.lists, call.terms = NO_LISTS, (torch.where(kept, 0.0, lowest), None, None, None)
    call.lse.clamp_(min=lowest)
    for got, w in zip(
        (*RAW.tile_attention_backward(*call.args()), RAW.attention_column_sums(*call.sums_args())),
        (*want, sums),
        strict=True,
    ):
        torch.testing.assert_close(got, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_that_keeps_everything_changes_no_bit(dtype):
    for dim in (64, 136):
        dense = Call(Case(sq=300, sk=290, dim=dim, dtype=dtype, block=(128, 128), dlse=True))
        full = Call(Case(sq=300, sk=290, dim=dim, dtype=dtype, block=(256, 128), density=1.0, dlse=True))
        full.dlse = dense.dlse
        for a, b in zip(*(RAW.tile_attention_backward(*c.args()) for c in (dense, full)), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(*(RAW.attention_column_sums(*c.sums_args()) for c in (dense, full)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(dtype):
    calls = [
        Call(Case(sq=700, sk=700, heads=1, kv_heads=1, dtype=dtype)),
        Call(
            Case(sq=500, sk=700, heads=6, kv_heads=2, dim=24, dtype=dtype, density=0.5, partial=0.5, mask_dims=(1, 6))
        ),
        Call(Case(sq=300, sk=200, heads=3, kv_heads=3, dim=40, dtype=dtype, density=0.7, block=(16, 32))),
    ]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(
                [(*RAW.tile_attention_backward(*c.args()), RAW.attention_column_sums(*c.sums_args())) for c in calls]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for mine, first in zip(other, results[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_the_gradients_of_sdpa(dtype):
    call = Call(Case(sq=512, sk=512, heads=4, kv_heads=4, dtype=dtype))
    leaves = [t.detach().clone().requires_grad_() for t in (call.q, call.k, call.v)]
    out = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in leaves)).transpose(1, 2)
    plain = torch.autograd.grad(out, leaves, call.dout)
    got = RAW.tile_attention_backward(*call.args(NEED_Q | NEED_K | NEED_V))
    for name, g, p, t in zip(NAMES, got, plain, call.truth(), strict=False):
        assert_close_to_truth(g, p, t, what=name)


def test_large_scores():
    call = Call(Case(sq=150, sk=150, dim=32))
    call.q *= 40
    call.out, call.lse, _ = reference.tile_attention(
        call.q, call.k, call.v, *call.lists, *call.terms, None, None, None, *call.case.block, call.scale, 0.0, 0
    )
    got = RAW.tile_attention_backward(*call.args())
    for name, g, p, t in zip(NAMES, got, call.plain(), call.truth(), strict=True):
        assert_close_to_truth(g, p, t, what=name)


def test_empty():
    for shape in ({"sq": 0}, {"sk": 0}, {"batch": 0}):
        case = Case(**{"sq": 40, "sk": 50, "batch": 1, "dim": 16} | shape)
        q, k = torch.zeros(case.batch, case.sq, 2, 16), torch.zeros(case.batch, case.sk, 2, 16)
        lse = torch.full((case.batch, 2, case.sq), -torch.inf)
        args = (q, None, q, k, k, q, lse, *NO_LISTS, *NO_TERMS, 64, 64, 1.0, ALL)
        dq, dk, dv, ds = RAW.tile_attention_backward(*args)
        assert dq.shape == q.shape and dk.shape == dv.shape == k.shape
        assert ds.shape == (case.batch, 2, case.sq, case.sk)
        assert (dq == 0).all() and (dk == 0).all() and (dv == 0).all()
        sums = RAW.attention_column_sums(q, k, lse, *NO_LISTS[3:], *NO_TERMS, 64, 64, 1.0)
        assert sums.shape == (case.batch, 2, case.sk) and (sums == 0).all()


BACKWARD_ARGS = (
    "dout", "dlse", "q", "k", "v", "out", "lse", "index", "count", "order", "index_t", "count_t", "order_t",
    "pattern_of", "patterns", "bias", "relpos_table", "relpos_q", "relpos_k", "bm", "bn", "scale", "needs",
)  # fmt: skip


def test_bad_arguments_are_refused():
    case = Case(sq=130, sk=130, density=0.7, partial=0.5, bias=(False, True, True, True), relpos=True, dlse=True)
    good = dict(zip(BACKWARD_ARGS, Call(case).args(), strict=True))
    RAW.tile_attention_backward(*good.values())
    far = good["index_t"].clone()
    far[..., 0] = 3
    bad = {
        "dout": (good["dout"][:, :-1], "dout must be"),
        "out": (good["out"].double(), "out must have the dtype of q"),
        "v": (good["v"][..., :32], "v must be"),
        "q": (good["q"][:, :, :, :20], "head dim 20"),
        "k": (good["k"].expand(1, 130, 2, 64)[:, :, [0, 1, 1]], "multiple of the 3 heads"),
        "lse": (good["lse"].double(), "lse must be contiguous float32"),
        "dlse": (good["dlse"].mT, "dlse must be"),
        "index": (None, "index, count and order must be given together"),
        "index_t": (far, "index_t holds values from"),
        "count_t": (good["count_t"] + 9, "count_t counts"),
        "order_t": (good["order_t"] + 9, "order_t holds values"),
        "pattern_of": (good["pattern_of"] + 3, "pattern_of holds values"),
        "patterns": (good["patterns"][:, :8], "patterns must be"),
        "bias": (good["bias"].double(), "bias must be float32"),
        "relpos_q": (good["relpos_q"] + 40, "relpos_q - relpos_k goes from"),
        "relpos_k": (good["relpos_k"].long(), "relpos_k must be contiguous int32"),
        "bm": (24, "bm is 24"),
        "bn": (0, "bn is 0"),
        "needs": (32, "needs is 32"),
    }
    for name, (value, message) in bad.items():
        with pytest.raises(RuntimeError, match=message):
            RAW.tile_attention_backward(*(good | {name: value}).values())


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_other_instruction_sets(isa):
    here = Path(__file__)
    code = f"""
import sys
sys.path.insert(0, {str(here.parent)!r})
import torch
from test_cpu_attention_backward import Case, check
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    check(Case(dim=72, dtype=dtype, dlse=True))
    check(Case(dim=24, sq=90, sk=110, dtype=dtype, density=0.6, partial=0.5, block=(32, 96), heads=4, relpos=True))
    check(Case(dim=104, sq=65, sk=129, dtype=dtype, bias=(True, True, False, True), heads_first=True))
"""
    env = dict(os.environ, MASKACCEL_CPU_ISA=isa)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
