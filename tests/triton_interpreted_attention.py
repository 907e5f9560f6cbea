"""Every Triton kernel of the attention ops against the fp64 reference, run by `test_triton_kernels.py`."""

from __future__ import annotations

import pytest
from _numerics import assert_all_close_to_truth
from _raw_attention import draw, run, run_plain
from _raw_cases import describe, wanted, widened
from _triton_cases import DTYPES, poisoned_memory  # noqa: F401

from maskaccel.ops.attention import triton as attention

attention.register()


def check(op: str, args: tuple, what: str) -> None:
    got = run(op, attention.KERNELS[op], args)
    results = wanted(got, run_plain(op, args), run_plain(op, widened(args)))
    assert_all_close_to_truth(*results, f"{op} {what} ({describe(args)})")


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("op", sorted(attention.KERNELS))
def test_matches_reference(op: str, seed: int) -> None:
    """Random calls over the whole contract: masks, layouts, grouped heads, bias, epilogue, keep bits, pruning."""
    check(op, draw(op, seed, DTYPES[seed % 3]), f"seed {seed}")
