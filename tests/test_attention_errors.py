"""What the attention ops and their masks say to arguments that do not fit, and arguments at the edge that do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from maskaccel import ops
from maskaccel.masks import TileMask
from maskaccel.masks.rules import Lengths, Segments
from maskaccel.ops.attention import api, reference

LSE = torch.zeros(2, 4, 64)


def qkv(batch: int = 2, sq: int = 64, sk: int = 64, dim: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, tokens, 4, dim, generator=generator) for tokens in (sq, sk, sk)]


def trained(like: Tensor) -> Tensor:
    return like.clone().requires_grad_()


Q, K, V = qkv()
SCORES = torch.rand(2, 4, 4, 2)
SELECT = {"shape": (64, 64), "block": (16, 32)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.tile_attention(Q, K, V, torch.ones(64, 64).bool()), TypeError, "mask must be a TileMask"),
        (lambda: ops.tile_attention(Q, K, V, "all"), TypeError, "mask must be a TileMask, got str"),
        (lambda: ops.tile_attention(Q, K, V, block=32), ValueError, "block=32 must be two integers"),
        (lambda: ops.attention_column_sums(Q, K, LSE, "all"), TypeError, "mask must be a TileMask, got str"),
        (lambda: ops.attention_column_sums(Q, K, LSE, bias=trained(LSE[:1, :1, :1, None])), ValueError, "bias req"),
        (lambda: ops.tile_scores(Q, K[:1]), ValueError, "batch and head dim must be equal"),
        (lambda: ops.tile_scores(Q, K[..., :16]), ValueError, "batch and head dim must be equal"),
        (lambda: ops.tile_scores(Q, K, "antidiagonal", block=(32, 32), stride=True), ValueError, "stride=True"),
        (lambda: ops.tile_select(SCORES, (64,), (16, 32), top_k=1), ValueError, r"shape=\(64,\) must be"),
        (lambda: ops.tile_select(SCORES, **SELECT, cdf=torch.full((4,), torch.nan)), ValueError, "cdf holds values"),
        (lambda: ops.tile_select(SCORES, **SELECT, cdf=torch.full((4,), 2.0)), ValueError, r"allowed is \(0, 1\]"),
        (lambda: ops.tile_select(SCORES, **SELECT, top_k=1, force=torch.ones(3, 3).bool()), ValueError, "force has"),
        (lambda: ops.tile_select(SCORES, **SELECT, top_k=1, force=torch.ones(4, 2)), TypeError, "force must be"),
        (lambda: ops.tile_select(SCORES, **SELECT, top_k=1, forbid="x"), TypeError, "forbid must be"),
        (
            lambda: ops.tile_select(SCORES, **SELECT, top_k=1, force=TileMask.full((128, 128), (32, 64))),
            ValueError,
            r"force is for \(128, 128\) in tiles of \(32, 64\)",
        ),
        (lambda: Lengths(kv=[1, 2]), TypeError, "kv must be a torch.Tensor"),
        (lambda: Segments([0], [0]), TypeError, "q must be a torch.Tensor"),
        (lambda: TileMask([1], (128, 128), (64, 64)), TypeError, "bits must be a torch.Tensor, got list"),
        (lambda: TileMask.full((64.5, 64)), ValueError, "must be"),
        (lambda: TileMask.from_bool([[True]]), TypeError, "mask must be a torch.Tensor, got list"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("sizes", [(0, 64, 64), (2, 0, 64), (2, 64, 0)])
def test_gradients_of_empty_calls(sizes) -> None:
    leaves = [t.requires_grad_() for t in qkv(*sizes)]
    for out in (ops.tile_attention(*leaves), ops.linear_attention(*leaves)):
        for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
            assert torch.equal(grad, torch.zeros_like(leaf))


def test_reference_lse_of_any_strides() -> None:
    lse = torch.randn(2, 64, 4).transpose(1, 2)
    plain, mine = (
        ops.tile_attention(
            Q, K, V, reference_lse=t, skip_threshold=-1.0, return_keep=True, block=(16, 32), backend=backend
        ).keep
        for t, backend in ((lse.contiguous(), "reference"), (lse, None))
    )
    assert torch.equal(plain, mine)


def test_a_percentile_of_no_tiles() -> None:
    assert ops.tile_select(SCORES[:, :, :0], (0, 64), (16, 32), percentile=0.5).rows == 0


def test_a_call_that_the_cuda_kernel_refuses_goes_elsewhere(monkeypatch) -> None:
    """The choice by device and dtype says cuda; the call itself is one that its kernel does not take."""
    q, k, v = (t.bfloat16() for t in qkv(dim=160))
    options = {"skip_threshold": -1.0, "prune": True, "block": (128, 128)}
    expected = ops.tile_attention(q, k, v, **options, backend="reference")
    monkeypatch.setattr(api, "automatic", lambda *_: "cuda")
    monkeypatch.setattr(api, "select", lambda *_: "cuda")
    calls = []
    monkeypatch.setitem(reference.KERNELS, "tile_attention", _noting(calls, reference.KERNELS["tile_attention"]))
    assert torch.equal(ops.tile_attention(q, k, v, **options), expected)
    assert calls == [128]
    with pytest.raises(ValueError, match="backend='cuda' cannot run this call: mask tiles have 128 rows"):
        ops.tile_attention(q, k, v, **options, backend="cuda")


def _noting(calls: list, kernel):
    def noted(*args):
        calls.append(args[-5])
        return kernel(*args)

    return noted


def test_rules_of_no_tokens() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert TileMask.from_rule(Segments(none, torch.zeros(2, dtype=torch.int64), ((1,),)), (0, 2)).rows == 0
    assert TileMask.from_rule(Lengths(kv=none), (64, 64)).batch == 0
