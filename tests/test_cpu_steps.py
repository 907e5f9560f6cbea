"""The CPU kernels of the step ops against fp64; `test_cpu_kernels.py` runs them for every instruction set."""

from __future__ import annotations

import pytest
import torch
from _cpu_cases import DTYPES, RAW
from _numerics import assert_all_close_to_truth
from _raw_cases import STEPS, describe, draw, run, run_plain, widened

from maskaccel._native import native

pytestmark = pytest.mark.skipif(not native.has_cpu, reason=f"native library {native.state}: {native.reason}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_forward_steps(name, dtype):
    """Random calls over the whole contract: shapes, strides, groups, every optional operand."""
    for seed in range(25):
        args = draw(name, seed, dtype)
        got = run(name, getattr(RAW, name), args)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_kmeans_of_many_chunks(dtype):
    """More tokens than a chunk holds; any number of threads gives the same bits."""
    x = torch.randn(2, 500, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    for metric in range(3):
        args = (x, None, 9, 2, metric)
        torch.set_num_threads(1)
        one = RAW.kmeans(*args)
        torch.set_num_threads(2)
        assert all(map(torch.equal, one, RAW.kmeans(*args)))
        plain, truth = run_plain("kmeans", args), run_plain("kmeans", widened(args))
        assert_all_close_to_truth(run("kmeans", RAW.kmeans, args), plain, truth, f"metric {metric}")


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 7, 16, 31, 64, 100, 1152])
def test_forward_normed_steps_of_every_width(d, dtype):
    """Every tail of a row, modulation that changes within it and between samples, any split into tasks."""
    g = torch.Generator().manual_seed(d)
    x, y, scale, shift = (torch.randn(2, 6, d, generator=g).to(dtype) for _ in range(4))
    for flags in (0, 5):
        end = (scale, shift[:, :1], None, None, None, None, None, 1e-5, 1.0, flags)
        for stored in DTYPES:
            history = torch.randn(3, 2, 6, d, generator=g).to(stored)
            for args in (
                (history, torch.randn(3, generator=g), x, scale[:, 0], *end),
                (history, torch.randn(3, d, generator=g), x, None, *end),
            ):
                name = "combine_history_norm_modulate"
                plain, truth = run_plain(name, args), run_plain(name, widened(args))
                assert_all_close_to_truth(RAW.combine_history_norm_modulate(*args), plain, truth, str(flags))
        args = (x, y, *end)
        name = "norm_modulate_difference"
        got, plain, truth = RAW.norm_modulate_difference(*args), run_plain(name, args), run_plain(name, widened(args))
        assert_all_close_to_truth(got, plain, truth, str(flags))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_normed_steps_past_the_cache(dtype):
    """Results of 8 MiB and more; the sums have the same bits for any number of threads."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 2, 3800 // dtype.itemsize, 1152, generator=g).to(dtype)
    scale, shift = torch.randn(2, 2, 1, 1152, generator=g).to(dtype)
    end = (scale, shift, None, None, None, None, None, 1e-5, 1.0, 0)
    args = (torch.stack([x, y]), torch.tensor([0.75, 0.25]), y, scale)
    h, normed = RAW.combine_history_norm_modulate(*args, *end)
    assert torch.equal(h, RAW.combine_history(*args))
    plain, truth = run_plain("norm_modulate", (h, *end)), run_plain("norm_modulate", widened((h, *end)))
    assert_all_close_to_truth((normed,), plain, truth)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(RAW.norm_modulate_difference(x, y, *end))
    assert all(map(torch.equal, *found))
    assert torch.equal(found[0][0], RAW.norm_modulate(x, *end))
    truth = run_plain("relative_difference", (found[0][0].double(), y.double(), None))
    assert_all_close_to_truth(found[0][1:], (RAW.relative_difference(found[0][0], y, None),), truth)


H = torch.zeros(3, 2, 4, 8)
S, W = torch.zeros(5, 3, 2, 4, 8), torch.zeros(3)
X, NONE = H[0], (None,) * 5
F, I32, L32 = torch.zeros(2, 2, 8), torch.tensor([[0, 1]] * 2).int(), torch.zeros(2, 4, dtype=torch.int32)
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
    ("combine_history_norm_modulate", (H[0], W, None, None, None, None, *NONE, 1e-6, 1.0, 0)),
    ("combine_history_norm_modulate", (H[..., :0], W, None, None, None, None, *NONE, 1e-6, 1.0, 0)),
    ("combine_history_norm_modulate", (H, W[:2], None, None, None, None, *NONE, 1e-6, 1.0, 0)),
    ("combine_history_norm_modulate", (H, W, X[:1], None, None, None, *NONE, 1e-6, 1.0, 0)),
    ("combine_history_norm_modulate", (H, W, X, X[:, :3], None, None, *NONE, 1e-6, 1.0, 0)),
    ("combine_history_norm_modulate", (H, W, X, None, X[:, :3], None, *NONE, 1e-6, 1.0, 0)),
    ("combine_history_norm_modulate", (H, W, X, None, X.half(), None, *NONE, 1e-6, 1.0, 0)),
    ("combine_history_norm_modulate", (H, W, X, None, None, None, *NONE, 1e-6, 1.0, 3)),
    ("norm_modulate_difference", (X[0], X[0], None, None, *NONE, 1e-6, 1.0, 0)),
    ("norm_modulate_difference", (X, X[:1], None, None, *NONE, 1e-6, 1.0, 0)),
    ("norm_modulate_difference", (X, X.half(), None, None, *NONE, 1e-6, 1.0, 0)),
    ("norm_modulate_difference", (X, X.mT.contiguous().mT, None, None, *NONE, 1e-6, 1.0, 0)),
    ("norm_modulate_difference", (X, X, X[:, :3], None, *NONE, 1e-6, 1.0, 0)),
    ("norm_modulate_difference", (X, X, X[0], None, *NONE[:4], torch.full((4,), 4, dtype=torch.int32), 1e-6, 1.0, 0)),
    ("norm_modulate_difference", (X, X, None, None, *NONE, 1e-6, 1.0, 3)),
    ("scatter_combine", (H[0], W, F, I32, None, None, None, 0, 0.0)),
    ("scatter_combine", (H.double(), W, F.double(), I32, None, None, None, 0, 0.0)),
    ("scatter_combine", (H.transpose(2, 3), W, F, I32, None, None, None, 0, 0.0)),
    ("scatter_combine", (H[:, :1].expand(3, 2, 4, 8), W, F, I32, None, None, None, 0, 0.0)),
    ("scatter_combine", (H, W, F.half(), I32, None, None, None, 0, 0.0)),
    ("scatter_combine", (H, W, F[:, :1], I32, None, None, None, 0, 0.0)),
    ("scatter_combine", (H, W, F, I32.long(), None, None, None, 0, 0.0)),
    ("scatter_combine", (H, W, F, I32 + 3, None, None, None, 0, 0.0)),
    ("scatter_combine", (H, W, F, I32 - 1, None, None, None, 0, 0.0)),
    ("scatter_combine", (H, W, F, I32, I32, None, None, 0, 0.1)),
    ("scatter_combine", (H, W, F, I32, None, None, None, 0, 0.1)),
    ("scatter_combine", (H, W, F, I32, L32, None, None, 0, 1.1)),
    ("scatter_combine", (H, W, F, I32, L32, None, None, 3, 0.1)),
    ("scatter_combine", (H, W, F, I32, L32, H[1], None, 1, 0.1)),
    ("scatter_combine", (H, W, H[2, :, :2], I32, L32, None, None, 2, 0.1)),
    ("kmeans", (H[0, 0], None, 2, 1, 0)),
    ("kmeans", (H[0].double(), None, 2, 1, 0)),
    ("kmeans", (H[0].transpose(1, 2), None, 2, 1, 0)),
    ("kmeans", (H[0, :, :, :0], None, 2, 1, 0)),
    ("kmeans", (H[0], None, 5, 1, 0)),
    ("kmeans", (H[0], None, 0, 1, 0)),
    ("kmeans", (H[0], None, 2, -1, 0)),
    ("kmeans", (H[0], None, 2, 1, 3)),
    ("kmeans", (H[0], H[0], 2, 1, 0)),
    ("kmeans", (H[0], H[0, :, :2].double(), 2, 1, 0)),
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
    assert not H.any()
