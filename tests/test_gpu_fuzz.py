"""Calls of every op that hypothesis draws, on a GPU: ops, seeds of shapes and strides, dtypes, widths."""

from __future__ import annotations

import os

import pytest
from _raw_cases import ADALN, OPS, STEPS
from _targets import ANYWHERE, check

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
EXAMPLES = {"cuda": int(os.environ.get("MASKACCEL_GPU_EXAMPLES", "300")), "triton": 40, "cpu": 40}
WIDTHS = (1, 2, 5, 8, 16, 40, 104, 248, 256, 264, 1000, 1016, 1024, 1032, 2047, 2048, 3080, 6136, 6144, 6152)


@pytest.mark.parametrize("target", ANYWHERE)
def test_random_calls(target):
    served = [op for op in OPS if target.refuses(op) is None]
    if not served:
        pytest.skip(target.refuses(OPS[0]))

    # The same calls in every run: a rule about the size of errors fails for one draw in very many.
    @hypothesis.settings(max_examples=EXAMPLES[target.backend], deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.sampled_from(served), st.integers(10_000, 2**40), st.sampled_from(WIDTHS))
    def random_call(op, seed, width):
        options = {"widths": (width, max(width, 24))} if op in (*ADALN, *STEPS) else {}
        for drawn, args in target.calls(op, first=seed, count=1, **options):
            check(target, op, drawn, args)

    random_call()
