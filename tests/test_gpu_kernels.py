"""Every op of the CUDA library on a GPU against the fp64 reference, by the error rule. Skipped without a GPU."""

from __future__ import annotations

import pytest
import torch
from _numerics import assert_all_close_to_truth
from _raw_cases import ADALN, OPS, STEPS, describe, draw, draw_bare, run, run_plain, wanted, widened

import maskaccel  # noqa: F401  (defines the ops, loads the library)
from maskaccel.ops.adaln.schema import BARE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REAL_WIDTHS = (256, 1152, 1536, 2432, 3072, 5120, 6144, 8192)


def _op(name: str):
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"maskaccel_raw::{name}", "CUDA"):
        pytest.skip("the native library is not built with CUDA kernels")
    return getattr(torch.ops.maskaccel_raw, name).default


def _check(op: str, seed: int, dtype: torch.dtype, **options) -> None:
    args = draw(op, seed, dtype, "cuda", **options)
    got = run(op, _op(op), args)
    got, plain, truth = wanted(got, run_plain(op, args), run_plain(op, widened(args)))
    assert_all_close_to_truth(got, plain, truth, f"{op} seed {seed} ({describe(args)})")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_matches_reference(op, dtype):
    """Random calls over the whole contract."""
    for seed in range(60):
        _check(op, seed, dtype)


@pytest.mark.parametrize("name", BARE)
def test_bare_ops_are_the_whole_ops(name):
    """The same bits as the op with every operand."""
    for seed in range(12):
        args, whole = draw_bare(name, seed, DTYPES[seed % 3], "cuda")
        got, want = _op(name)(*args), _op(name.removesuffix("_bare"))(*whole)
        got, want = (t if isinstance(t, tuple) else (t,) for t in (got, want))
        assert all(map(torch.equal, got, want)), f"{name} seed {seed}"


MOVES = ("gather_rows", "segment_rows", "scatter_merge", "scatter_merge_backward", "gather_modulate")


@pytest.mark.parametrize("op", [*ADALN, *STEPS, *MOVES])
def test_real_widths(op):
    """The widths of real models, and the general kernel beyond them."""
    for seed in range(12):
        _check(op, seed, torch.bfloat16, widths=REAL_WIDTHS)


REDUCTIONS = ("norm_modulate_backward", "gate_residual_norm_modulate_backward", "qk_norm_rope_backward", "gram",
              "norm_modulate_difference", "kmeans", "scatter_merge_backward", "sample_logits",
              "match_tokens")  # fmt: skip


@pytest.mark.parametrize("op", REDUCTIONS)
def test_deterministic(op):
    """Two runs of a reduction over tokens give the same bits."""
    for seed in range(7, 19):
        args = draw(op, seed, torch.bfloat16, "cuda", widths=(3072,))
        first, second = _op(op)(*args), _op(op)(*args)
        first, second = (t if isinstance(t, tuple) else (t,) for t in (first, second))
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(first, second, strict=True)), seed


def test_offsets_beyond_int32():
    """Rows past 2^31 elements are addressed."""
    tokens, width = 720_000, 3072
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GiB of GPU memory")
    x = torch.zeros(1, tokens, width, dtype=torch.bfloat16, device="cuda")
    x[0, -1] = torch.randn(width, device="cuda")
    y = _op("norm_modulate")(x, *[None] * 7, 1e-6, 1.0, 0)
    expected = torch.nn.functional.layer_norm(x[0, -1:].float(), (width,), eps=1e-6).bfloat16()
    assert torch.allclose(y[0, -1:], expected, atol=2e-2) and not y[0, :-1].any()


def test_side_stream():
    """The launch goes to the current stream."""
    args = draw("norm_modulate", 3, torch.bfloat16, "cuda", widths=(3072,))
    expected = _op("norm_modulate")(*args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = _op("norm_modulate")(*args)
    stream.synchronize()
    assert torch.equal(got, expected)


def test_cuda_graph():
    """The op can be captured and replayed: no synchronisation, no host read."""
    x = torch.randn(2, 64, 3072, device="cuda", dtype=torch.bfloat16)
    scale = torch.randn(2, 3072, device="cuda", dtype=torch.bfloat16)
    call = lambda: _op("norm_modulate")(x, scale, *[None] * 6, 1e-6, 1.0, 0)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, call())


@pytest.mark.parametrize("n", [300, 20000])
def test_a_graph_counts_steps(n):
    """The step is read on the device: every replay draws the ids of its step."""
    step = torch.zeros(1, dtype=torch.int64, device="cuda")
    call = lambda: _op("random_keep")(step, None, None, None, None, 3, 0, 0, 2, n, n // 3, 1, 0, 0)[0]  # noqa: E731
    first = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = call()
    for number in range(3):
        step.fill_(number)
        graph.replay()
        assert torch.equal(ids, call()) and torch.equal(ids, first) == (number == 0)
