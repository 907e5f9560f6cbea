"""The CPU kernels of the step ops against fp64; `test_cpu_kernels.py` runs them for every instruction set."""

from __future__ import annotations

import pytest
import torch
from _cpu_cases import DTYPES, RAW
from _numerics import assert_all_close_to_truth
from _raw_cases import STEPS, describe, draw, run_plain, widened

from maskaccel._native import native

pytestmark = pytest.mark.skipif(not native.has_cpu, reason=f"native library {native.state}: {native.reason}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_forward_steps(name, dtype):
    """Random calls over the whole contract: shapes, strides, groups, every optional operand."""
    for seed in range(40):
        args = draw(name, seed, dtype)
        got = getattr(RAW, name)(*args)
        got = got if isinstance(got, tuple) else (got,)
        plain, truth = run_plain(name, args), run_plain(name, widened(args))
        assert_all_close_to_truth(got, plain, truth, f"{name} seed {seed} ({describe(args)})")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_gram_of_many_chunks(dtype):
    history = torch.randn(9, 2, 300, 400, generator=torch.Generator().manual_seed(0)).to(dtype)
    for per_sample in (False, True):
        args = (history, per_sample)
        assert_all_close_to_truth(
            (RAW.gram(*args),), run_plain("gram", args), run_plain("gram", widened(args)), str(per_sample)
        )
    torch.set_num_threads(1)
    one = RAW.gram(history, False)
    torch.set_num_threads(2)
    assert torch.equal(one, RAW.gram(history, False))


H = torch.zeros(3, 2, 4, 8)
BAD = [
    ("gram", (H[0], False)),
    ("gram", (H.double(), False)),
    ("gram", (H[:0], False)),
    ("gram", (H[..., :0], False)),
    ("gram", (torch.zeros(17, 1, 1, 1), False)),
    ("gram", (H.transpose(2, 3), False)),
    ("gram", (torch.zeros(3, 2, 4, 16)[..., :8], False)),
]


@pytest.mark.parametrize(("name", "args"), BAD, ids=range(len(BAD)))
def test_contract_violations_raise(name, args):
    with pytest.raises(RuntimeError):
        getattr(RAW, name)(*args)
