"""Attention over keys in several places equals attention over their concatenation."""

from __future__ import annotations

import pytest
import torch
from _numerics import assert_close_to_truth

from maskaccel import ops

SIZES = (5, 0, 33, 1)


def _operands(dtype, seed=0):
    torch.manual_seed(seed)
    q = torch.randn(2, 7, 4, 32).to(dtype)
    return q, [(torch.randn(2, n, 2, 32).to(dtype), torch.randn(2, n, 2, 32).to(dtype)) for n in SIZES]


def _joined(q, parts):
    k, v = (torch.cat([part[i] for part in parts], 1).transpose(1, 2).repeat_interleave(2, 1) for i in (0, 1))
    return torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_are_one_attention(dtype):
    q, parts = _operands(dtype)
    truth = _joined(q.double(), [(k.double(), v.double()) for k, v in parts])
    out, lse = ops.segment_attention(q, parts, return_lse=True)
    # A result of each segment is rounded before they are joined.
    assert_close_to_truth(out, _joined(q, parts), truth, magnitude=4 * truth.abs().max().item())
    keys = torch.cat([k for k, _ in parts], 1).double().repeat_interleave(2, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), keys) * 32**-0.5
    assert torch.allclose(lse.double(), scores.logsumexp(-1), atol=1e-4 if dtype == torch.float32 else 1e-2)
    assert torch.equal(ops.segment_attention(q, parts[2:3]), ops.tile_attention(q, *parts[2]))


def test_gradients_reach_every_segment():
    q, parts = _operands(torch.float32)
    leaves = [t.requires_grad_() for t in (q, *(t for part in parts for t in part if t.numel()))]
    ops.segment_attention(q, parts).square().sum().backward()
    got = [t.grad.clone() for t in leaves]
    for t in leaves:
        t.grad = None
    _joined(q, parts).square().sum().backward()
    for mine, want in zip(got, leaves, strict=True):
        assert torch.allclose(mine, want.grad, atol=1e-5, rtol=1e-4)


def test_no_keys_is_an_error():
    q, parts = _operands(torch.float32)
    with pytest.raises(ValueError, match="segments has no keys in 1 segments"):
        ops.segment_attention(q, parts[1:2])
    with pytest.raises(TypeError, match=r"segments\[0\] must be \(k, v\), got Tensor"):
        ops.segment_attention(q, [q])
