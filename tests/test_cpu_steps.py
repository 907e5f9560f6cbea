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
    for seed in range(25):
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1152, 9000])
def test_forward_sites_of_several_tiles(width, dtype):
    """More tokens than a tile holds, tiles that end with a sample, rows wider than a tile, results past the cache."""
    g = torch.Generator().manual_seed(0)
    history = torch.randn(3, 2, 2, 1000 if width == 1152 else 3, width, generator=g).to(dtype)
    gates = torch.randn(3, 2, 1, width, generator=g).to(dtype)
    for weights in (torch.randn(3, 2, generator=g), torch.randn(3, 2, width, generator=g)):
        args = (history, weights, history[0, 0].contiguous(), gates)
        plain, truth = run_plain("combine_sites", args), run_plain("combine_sites", widened(args))
        assert_all_close_to_truth((RAW.combine_sites(*args),), plain, truth)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 7, 16, 31, 64, 100, 1152])
def test_forward_history_of_another_dtype(d, dtype, stored):
    g = torch.Generator().manual_seed(d)
    history, x = torch.randn(3, 2, 5, d, generator=g).to(stored), torch.randn(2, 5, d, generator=g).to(dtype)
    gate = torch.randn(2, d, generator=g).to(dtype)
    for weights in (torch.randn(3, generator=g), torch.randn(3, d, generator=g)):
        args = (history, weights, x, gate)
        plain, truth = run_plain("combine_history", args), run_plain("combine_history", widened(args))
        assert_all_close_to_truth((RAW.combine_history(*args),), plain, truth)
        args = (history[None], weights if weights.dim() == 1 else weights[None], x, gate[None])
        assert_all_close_to_truth((RAW.combine_sites(*args),), plain, truth)


H = torch.zeros(3, 2, 4, 8)
S, W = torch.zeros(5, 3, 2, 4, 8), torch.zeros(3)
BAD = [
    ("combine_sites", (S[0], W, None, None)),
    ("combine_sites", (S[:0], W, None, None)),
    ("combine_sites", (S[..., :0], W, None, None)),
    ("combine_sites", (S.double(), W, None, None)),
    ("combine_sites", (S.transpose(3, 4), W, None, None)),
    ("combine_sites", (S, W[:2], None, None)),
    ("combine_sites", (S, W.double(), None, None)),
    ("combine_sites", (S, torch.zeros(4, 3), None, None)),
    ("combine_sites", (S, torch.zeros(5, 3, 7), None, None)),
    ("combine_sites", (S, torch.zeros(3, 5).T, None, None)),
    ("combine_sites", (S, W, S[0, 0, :1], None)),
    ("combine_sites", (S, W, None, torch.zeros(4, 2, 8))),
    ("combine_sites", (S, W, None, torch.zeros(5, 3, 8))),
    ("combine_sites", (S, W, None, torch.zeros(5, 2, 3, 8))),
    ("combine_sites", (S, W, None, torch.zeros(5, 2, 8).half())),
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
