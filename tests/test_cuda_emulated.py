"""The CUDA kernels on the host, thread by thread, against the fp64 reference. Needs the CUDA headers, not a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import cuda_emulator
import pytest
import torch
from _numerics import assert_all_close_to_truth
from _raw_cases import ADALN, BARE, OPS, STEPS, bare_differs, describe, draw, run, run_plain, wanted, whole_of, widened

from maskaccel.ops.adaln.schema import NEED_SCALE, NEED_SHIFT, NEED_X

pytestmark = pytest.mark.skipif(cuda_emulator.missing() is not None, reason=f"no emulation: {cuda_emulator.missing()}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = int(os.environ.get("MASKACCEL_EMULATED_SEEDS", "5"))


@pytest.fixture(scope="module")
def emulated():
    """The op namespace of the emulation."""
    cuda_emulator.load(Path(__file__).resolve().parent.parent / "build" / "emulated")
    return torch.ops.maskaccel_emulated


def _check(emulated, op: str, seed: int, dtype: torch.dtype, **options) -> None:
    args = draw(op, seed, dtype, **options)
    got = run(op, getattr(emulated, op), args)
    got, plain, truth = wanted(got, run_plain(op, args), run_plain(op, widened(args)))
    assert_all_close_to_truth(got, plain, truth, f"{op} seed {seed} ({describe(args)})")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [*ADALN, *STEPS])
def test_matches_reference(emulated, op, dtype):
    """Random calls over the whole contract: strides, groups, rows, tables, laws, gates, post norms, pairs, needs."""
    for seed in range(SEEDS):
        _check(emulated, op, seed, dtype)


@pytest.mark.parametrize("name", BARE)
def test_bare_ops_are_the_whole_ops(emulated, name):
    """The same bits as the op with every operand."""
    for seed in range(SEEDS):
        dtype = DTYPES[1 + seed % 2 if name.startswith("tile") else seed % 3]
        kernel, whole = getattr(emulated, name), getattr(emulated, whole_of(name))
        assert not bare_differs(name, seed, dtype, kernel, whole)


@pytest.mark.parametrize("op", [op for op in (*ADALN, *STEPS) if "norm_modulate" in op])
def test_wide_rows(emulated, op):
    """Rows that need several warps, the general kernel's loop, and more than the fast kernels take."""
    _check(emulated, op, 1, torch.bfloat16, widths=(3072,))
    _check(emulated, op, 2, torch.float32, widths=(6152,))


def test_accumulators_beyond_shared_memory(emulated, monkeypatch):
    """The backward accumulates in its workspace where shared memory is too small for its sums."""
    monkeypatch.setenv("MASKACCEL_EMULATE_SHARED", "2048")
    for seed in range(3):
        _check(emulated, "gate_residual_norm_modulate_backward", seed, torch.float32, widths=(256, 1152))


def test_accumulators_of_all_unasked_shared_memory(emulated):
    """Accumulators of exactly 48 KB, beside which the kernel's static shared memory no longer fits unasked."""
    x, dy = torch.randn(2, 1, 3, 6144)
    scale = torch.randn(1, 6144)
    args = (dy, None, x, scale, scale, *[None] * 7, 1e-6, 1.0, 0, NEED_X | NEED_SCALE | NEED_SHIFT)
    _, dscale, dshift, *_ = emulated.norm_modulate_backward(*args)
    hat = torch.nn.functional.layer_norm(x, (6144,), eps=1e-6)
    assert torch.allclose(dshift, dy.sum(1, keepdim=True), atol=1e-5)
    assert torch.allclose(dscale, (dy * hat).sum(1, keepdim=True), atol=1e-4)


def test_backward_is_deterministic(emulated):
    """Two runs give the same bits."""
    args = draw("gate_residual_norm_modulate_backward", 3, torch.bfloat16, widths=(256,))
    first, second = (emulated.gate_residual_norm_modulate_backward(*args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(a.numel() for a in first)


@pytest.mark.parametrize("op", [op for op in OPS if op.endswith("_backward") and not op.startswith("linear")])
def test_results_share_nothing(emulated, op):
    """Those that were not asked for neither: the schema promises it."""
    for seed in range(3000, 3006):
        args = draw(op, seed, torch.bfloat16)
        torch.library.opcheck(getattr(emulated, op).default, args, test_utils=("test_schema",))


def test_empty(emulated):
    """No samples or no tokens: empty results, zero gradients of what is shared."""
    for shape in ((0, 4, 16), (2, 0, 16)):
        x, scale = torch.randn(shape), torch.randn(1, 16)
        assert emulated.norm_modulate(x, scale, None, None, None, None, None, None, 1e-6, 1.0, 0).shape == shape
        grads = emulated.norm_modulate_backward(
            x, None, x, scale, None, None, None, None, None, None, None, None, 1e-6, 1.0, 0, 1 | 8
        )
        assert grads[0].shape == shape and torch.equal(grads[1], torch.zeros(1, 1, 16))
        q = torch.randn(shape[0], shape[1], 2, 8)
        assert emulated.qk_norm_rope(q, q, *[None] * 7, 1e-6, 1)[0].shape == q.shape
    assert emulated.gated_activation(torch.randn(0, 16), 0).shape == (0, 8)
    assert torch.equal(emulated.relative_difference(torch.randn(2, 0), torch.randn(2, 0), None), torch.zeros(2, 2))
    assert torch.equal(emulated.gram(torch.randn(3, 2, 0, 8), True), torch.zeros(2, 3, 3, dtype=torch.float64))


X = torch.randn(2, 6, 16)


@pytest.mark.parametrize(
    ("message", "x", "scale", "rows"),
    [
        (r"x must be \(B, N, D\)", X[0], None, None),
        ("last dim", X.transpose(1, 2), None, None),
        (r"F dividing 6, got \(2, 4, 16\)", X, torch.randn(2, 4, 16), None),
        (r"scale must be .*got \(2, 8\)", X, torch.randn(2, 8), None),
        ("scale must have the dtype", X, torch.randn(2, 16).half(), None),
        ("scale must be float32, bfloat16 or float16", X, torch.randn(2, 16).double(), None),
        (r"rows must be contiguous int32", X, torch.randn(3, 16), torch.zeros(6, dtype=torch.int64)),
        (r"must be \(R, 16\) with rows", X, torch.randn(2, 6, 16), torch.zeros(6, dtype=torch.int32)),
    ],
)  # fmt: skip
def test_bad_input(emulated, message, x, scale, rows):
    """A call outside the contract is refused with the op and the argument named."""
    with pytest.raises(RuntimeError, match=message) as error:
        emulated.norm_modulate(x, scale, None, None, None, None, None, rows, 1e-6, 1.0, 0)
    assert "norm_modulate" in str(error.value) or "float32, bfloat16" in message
