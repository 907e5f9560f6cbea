"""qk_norm_rope of whole, aligned heads, which has kernels of its own, against the reference. Needs CUDA headers."""

from __future__ import annotations

from pathlib import Path

import cuda_emulator
import pytest
import torch
from _numerics import assert_all_close_to_truth
from _raw_cases import run, run_plain, widened

pytestmark = pytest.mark.skipif(cuda_emulator.missing() is not None, reason=f"no emulation: {cuda_emulator.missing()}")
LAYER, RMS, NONE, NARROW, PLUS_ONE, HALF = 0, 1, 2, 4, 8, 32
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# dtype, that of weights and tables, heads of q and k, head dim, width of the tables (0: none), flags, bias, positions
CALLS = [
    (BF16, FP32, 24, 24, 128, 128, RMS, False, False),  # FLUX
    (BF16, BF16, 38, 38, 64, 0, RMS, False, False),  # SD3.5
    (BF16, BF16, 5, 5, 72, 36, RMS | HALF, False, True),
    (BF16, FP32, 9, 9, 128, 64, RMS | NARROW, False, False),
    (BF16, BF16, 7, 7, 64, 64, LAYER | HALF | NARROW, True, True),
    (FP16, FP16, 6, 6, 96, 48, RMS | NARROW | PLUS_ONE, True, False),
    (FP16, FP32, 17, 3, 72, 0, LAYER, True, False),
    (FP32, FP32, 9, 9, 128, 128, LAYER | HALF, True, True),
    (FP32, FP32, 11, 11, 64, 32, NONE, False, False),
]


@pytest.fixture(scope="module")
def emulated():
    """The op namespace of the emulation."""
    cuda_emulator.load(Path(__file__).resolve().parent.parent / "build" / "emulated")
    return torch.ops.maskaccel_emulated


def _operands(call: tuple) -> tuple:
    dtype, other, q_heads, k_heads, dim, table, flags, bias, with_positions = call
    g = torch.Generator().manual_seed(dim + q_heads)

    def new(*shape: int, of: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(of)

    # Slices of a joint projection, a mean far from zero, an odd number of rows.
    joint = new(2, 3, q_heads + k_heads + 1, dim, of=dtype) + 3.0
    q, k = joint[:, :, :q_heads], joint[:, :, q_heads : q_heads + k_heads]
    vectors = [new(dim, of=other), new(dim, of=other)]
    biases = [new(dim, of=other), new(dim, of=other)] if bias else [None, None]
    length = 5 if with_positions else 3
    cos, sin = (new(length, table, of=other) if table else None for _ in range(2))
    positions = torch.tensor([4, 0, 2], dtype=torch.int32) if with_positions else None
    return q, k, *vectors, *biases, cos, sin, positions, 1e-6, flags


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_matches_reference(emulated, call):
    args = _operands(call)
    got = run("qk_norm_rope", emulated.qk_norm_rope, args)
    assert_all_close_to_truth(got, run_plain("qk_norm_rope", args), run_plain("qk_norm_rope", widened(args)), str(call))


def _kernel(emulated, args: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    launches = tmp_path / "launches"
    launches.unlink(missing_ok=True)
    monkeypatch.setenv("MASKACCEL_EMULATE_RECORD", str(launches))
    emulated.qk_norm_rope(*args)
    return launches.read_text().split()[0]


def test_who_serves(emulated, tmp_path, monkeypatch):
    """Aligned heads go to the fast kernels, all else to the general one."""
    for call in CALLS:
        assert "qk_heads_kernel" in _kernel(emulated, _operands(call), tmp_path, monkeypatch), call
    q, k, *rest = _operands(CALLS[0])
    shifted = torch.randn(2, 3, 24, 136).to(BF16)[..., 4:132]  # rows that start on 8 bytes
    assert "qk_head_kernel" in _kernel(emulated, (shifted, k, *rest), tmp_path, monkeypatch)
    rest[4] = torch.randn(3, 256)[:, ::2]  # cos with an element between each two
    assert "qk_head_kernel" in _kernel(emulated, (q, k, *rest), tmp_path, monkeypatch)
