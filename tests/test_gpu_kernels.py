"""Every op of every GPU backend against the fp64 reference, by the error rule; its fakes and bits of repeated calls.

What needs a GPU is skipped without one; the bodies then run on the native CPU kernels.
"""

from __future__ import annotations

import pytest
import torch
from _raw_cases import ADALN, BARE, OPS, STEPS, bare_differs, whole_of
from _targets import ANYWHERE, CPU, DTYPES, ON_GPU, SEEDS, assert_same_bits, check, outcome, twins

from maskaccel.ops import _registry
from maskaccel.ops.adaln.schema import NEED_SCALE, NEED_SHIFT, NEED_X

REAL_WIDTHS = (256, 1152, 1536, 2432, 3072, 5120, 6144, 8192)
MOVES = ("gather_rows", "segment_rows", "scatter_merge", "scatter_merge_backward", "gather_modulate")


def test_every_op_is_drawn():
    assert set(OPS) == set(_registry.SPECS)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", ANYWHERE)
def test_matches_reference(target, op):
    """Random calls over the whole contract."""
    target.kernel(op)
    for seed, args in target.calls(op, count=3 * SEEDS[target.backend]):
        check(target, op, seed, args)


@pytest.mark.parametrize("op", [*ADALN, *STEPS, *MOVES])
@pytest.mark.parametrize("target", ON_GPU)
def test_real_widths(target, op):
    """The widths of real models, and the general kernel beyond them."""
    target.kernel(op)
    for seed, args in target.calls(op, first=1000, widths=REAL_WIDTHS):
        check(target, op, seed, args)


LONG = (1000, 1023, 2048)


@pytest.mark.parametrize("op", ["tile_attention", "tile_attention_backward", "attention_column_sums"])
@pytest.mark.parametrize("target", ON_GPU)
def test_long_attention(target, op):
    """Lines of many tiles, more CTAs than the GPU runs at once."""
    target.kernel(op)
    for seed, args in target.calls(op, first=2000, lengths=LONG):
        check(target, op, seed, args)


@pytest.mark.parametrize("name", BARE)
@pytest.mark.parametrize("target", [ON_GPU[0], pytest.param(CPU, id="cpu")])
def test_bare_ops_are_the_whole_ops(target, name):
    """The same bits as the op with every operand."""
    bare, whole = target.kernel(name), target.kernel(whole_of(name))
    for seed in range(12):
        assert not bare_differs(name, seed, DTYPES[seed % 3], bare, whole, target.device)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", ANYWHERE)
def test_repeated_calls_give_the_same_bits(target, op):
    """No result depends on which program or thread comes first, where that is asked for."""
    kernel = target.kernel(op)
    for seed, args in target.repeatable(op, first=7):
        first, second = (outcome(kernel, twins(args)) for _ in range(2))
        assert_same_bits(second, first, f"{target.backend} {op} seed {seed}")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", ANYWHERE)
def test_opcheck(target, op):
    """Schema, fake and autograd registration of the op tell what its kernels on this device do."""
    called = target.kernel(op)
    kinds = ("test_schema", "test_faketensor")
    if target.backend != "triton":  # the public op runs the native kernels
        called, kinds = _registry.op("maskaccel", op), (*kinds, "test_autograd_registration")
    for _, args in target.calls(op, first=3000, count=2):
        torch.library.opcheck(called, args, test_utils=kinds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", ANYWHERE)
def test_accumulators_of_all_unasked_shared_memory(target, dtype):
    """Sums of exactly 48 KB of accumulators: beside static shared memory more than a kernel gets unasked."""
    x, dy = torch.randn(2, 2, 3, 6144, generator=torch.Generator().manual_seed(0)).to(dtype).to(target.device)
    scale = torch.zeros(2, 6144, dtype=dtype, device=target.device)
    args = (dy, None, x, scale, scale, *[None] * 7, 1e-6, 1.0, 0, NEED_X | NEED_SCALE | NEED_SHIFT)
    target.kernel("norm_modulate_backward")
    check(target, "norm_modulate_backward", 0, args)
