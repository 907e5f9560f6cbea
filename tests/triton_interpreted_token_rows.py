"""The Triton kernels of rows of tokens, K/V rows, matching and sampling; run by `test_triton_kernels.py`."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from _numerics import assert_all_close_to_truth, assert_close_to_truth
from _raw_cases import describe, draw, run, run_plain, widened
from _triton_cases import BF16, DTYPES, FP16, FP32, poisoned_memory  # noqa: F401

from maskaccel import ops
from maskaccel.ops import _registry
from maskaccel.ops.tokens import reference
from maskaccel.ops.tokens import triton as tokens
from maskaccel.ops.tokens.schema import PRE_ROPE, SCHEMAS

tokens.register()
KERNELS, INT = tokens.KERNELS, torch.int32
OPS = (
    "gather_rows", "unmerge_rows", "segment_rows", "scatter_merge", "scatter_merge_backward", "gather_modulate",
    "write_kv_rows", "read_kv_rows",
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_random_calls(name: str, dtype: torch.dtype) -> None:
    for seed in range(6):
        args = draw(name, seed, dtype, widths=(7, 24, 40))
        got, plain, truth = run(name, KERNELS[name], args), run_plain(name, args), run_plain(name, widened(args))
        assert all(t.is_contiguous() for t in got[:1])
        assert_all_close_to_truth(got, plain, truth, f"{name} {seed} {describe(args)}")


def test_rows_wider_than_a_block() -> None:
    x, ids = torch.randn(2, 5, 1100), torch.tensor([[4, 0, 5, -1]], dtype=INT)
    got, wanted = (ops["gather_rows"](x, ids, None) for ops in (KERNELS, reference.KERNELS))
    assert torch.equal(got, wanted)


def test_sums_of_runs_do_not_depend_on_the_run_count() -> None:
    """dgate and dmask are summed in two stages, in an order fixed by the shape: twice the same bits."""
    g = torch.Generator().manual_seed(0)
    dout, rows = (torch.randn(2, n, 24, generator=g) for n in (30, 20))
    ids = torch.stack([torch.randperm(30, generator=g)[:20].sort().values for _ in range(2)]).to(INT)
    inverse = torch.full((2, 30), -1, dtype=INT).scatter_(1, ids.long(), torch.arange(20, dtype=INT).expand(2, -1))
    for mode, gate, needs in ((1, torch.randn(2, 1, 24, generator=g), 6), (2, None, 10)):
        args = (dout, rows, ids, inverse, gate, 0.0, mode, needs)
        first, again = (KERNELS["scatter_merge_backward"](*args) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        truth = reference.scatter_merge_backward(*widened(args))
        assert_all_close_to_truth(first, reference.scatter_merge_backward(*args), truth)


# ---------------------------------------------------------------------------------------------------------- K/V rows
def test_every_fp8_value_is_read() -> None:
    bits = torch.arange(256).to(torch.uint8).view(1, 1, 1, 256)
    got = KERNELS["read_kv_rows"](bits, torch.ones(1, 1, 1), 0)
    assert torch.equal(got.nan_to_num(1e9), bits.view(torch.float8_e4m3fn).float().nan_to_num(1e9))


def test_fp8_is_rounded_to_the_nearest_even() -> None:
    """Every fp8 value, every tie between two of them, and what lies around a tie; a scale of 1 in every head."""
    bits = torch.arange(0, 0x7F).to(torch.uint8)
    grid = bits.view(torch.float8_e4m3fn).float()
    ties = (grid[1:] + grid[:-1]) / 2
    values = torch.cat([grid, ties, ties * (1 + 1e-6), ties * (1 - 1e-6)])
    values = torch.cat([values, -values])
    values = torch.nn.functional.pad(values, (0, -len(values) % 60)).view(-1, 15)
    v = torch.cat([values, torch.full((len(values), 1), 448.0)], 1).view(1, -1, 4, 16)
    caches = [torch.zeros(v.shape, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(v.shape[:3]) for _ in range(2)]
    ids = torch.arange(v.shape[1], dtype=INT)[None]
    KERNELS["write_kv_rows"](None, v, v, *caches, *scales, ids, *(None,) * 5, 1e-6, 2)
    wanted = v.to(torch.float8_e4m3fn)
    for cache, scale in zip(caches, scales, strict=True):
        assert torch.equal(cache.view(torch.float8_e4m3fn).float(), wanted.float())
        assert torch.equal(scale, torch.ones_like(scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_ids_the_last_counts(dtype: torch.dtype) -> None:
    rows = torch.arange(12.0).to(dtype).view(1, 6, 1, 2).expand(2, 6, 3, 2)
    ids = torch.tensor([[2, 0, 2, 7, 2, -1], [1, 1, 1, 1, 1, 1]], dtype=INT)
    caches = [torch.full((2, 3, 4, 2), -5.0, dtype=dtype)[:, :, :3].transpose(1, 1) for _ in range(2)]
    KERNELS["write_kv_rows"](None, rows, rows, *caches, None, None, ids, *(None,) * 5, 1e-6, 2)
    for cache in caches:
        assert cache[0, :, 0, 0].tolist() == [2.0, -5.0, 8.0]
        assert cache[1, :, 2, 0].tolist() == [-5.0, 10.0, -5.0]


def test_positions_outside_the_table_are_clamped() -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 4, 2, 8, generator=g) for _ in range(3))
    table = torch.randn(3, 4, generator=g)
    ids, places = torch.tensor([[0, 1, 2, 3]], dtype=INT), torch.tensor([-4, 0, 2, 9], dtype=INT)
    for positions in (places, None):
        for flags in (1, 1 | PRE_ROPE):
            args = (q, k, v, torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8), None, None, ids, None, None, table,
                    table, positions, 1e-6, flags)  # fmt: skip
            got, plain = run("write_kv_rows", KERNELS["write_kv_rows"], args), run_plain("write_kv_rows", args)
            assert_all_close_to_truth(got, plain, run_plain("write_kv_rows", widened(args)))


# ---------------------------------------------------------------------------------------------------------- matching
@pytest.mark.parametrize("dtype", DTYPES)
def test_matching(dtype: torch.dtype) -> None:
    done = 0
    for seed in range(8):
        args = draw("match_tokens", seed, dtype)
        if args[0].shape[0] * args[1].shape[1] < 16:
            continue  # the error of so few numbers is luck
        got, plain = run("match_tokens", KERNELS["match_tokens"], args), run_plain("match_tokens", args)
        assert_all_close_to_truth(got, plain, run_plain("match_tokens", widened(args)), describe(args))
        done += 1
    assert done >= 3


def test_equal_rows_give_the_first_and_zeros_match_nothing() -> None:
    metric = torch.zeros(1, 40, 20)
    metric[0, :, 0] = 1.0
    metric[0, 7] = 0.0
    src, dst = torch.tensor([[3, 7]], dtype=INT), torch.arange(10, 40, dtype=INT)[None]
    best, similarity = KERNELS["match_tokens"](metric, src, dst)
    assert best.tolist() == [[0, 0]] and similarity.tolist() == [[1.0, 0.0]]


# ---------------------------------------------------------------------------------------------------------- sampling
def sampled(dtype: torch.dtype, spread: float, size: int, temperature: float, flags: int) -> tuple:
    """Rows enough that the error is one of the kernel and not of one value."""
    g, n = torch.Generator().manual_seed(size), 8 if size > 2048 else 16
    logits = (torch.randn(2, n, size, generator=g) * spread).to(dtype)
    tokens = torch.full((2, n), 9)
    tokens[0, 3] = 4
    return logits, tokens, torch.tensor([3]), None, 9, 1 << 40, 5, temperature, flags


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize(
    ("dtype", "spread", "size", "temperature", "scaled"),
    [(FP32, 1.0, 37, 0.0, 0), (BF16, 5.0, 300, 0.7, 4), (FP16, 2.0, 5, 1.0, 0), (FP32, 30.0, 2200, 2.5, 4)],
)
def test_sampling(kind: int, dtype: torch.dtype, spread: float, size: int, temperature: float, scaled: int) -> None:
    args = sampled(dtype, spread, size, temperature, kind | scaled)
    (ids, confidence), (wanted, plain) = KERNELS["sample_logits"](*args), reference.sample_logits(*args)
    assert torch.equal(ids, wanted)
    assert ids[0, 3] == 4 and confidence[0, 3] == math.inf
    at = confidence.isfinite()
    assert at.sum() == ids.numel() - 1
    truth = reference.sample_logits(*widened(args))[1]
    assert_close_to_truth(confidence[at], plain[at], truth[at])


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 4, 7])
def test_sampling_of_spoilt_rows(flags: int) -> None:
    inf, nan = math.inf, math.nan
    rows = [[-inf] * 4, [0.0, nan, 1.0, 2.0], [0.0, inf, 1.0, 2.0], [-inf, -inf, 0.5, -inf], [-inf, 1.0, -inf, 1.0],
            [-3.4e38] * 4, [3.0e38, -3.0e38, 3.0e38, 0.0]]  # fmt: skip
    logits, tokens = torch.tensor([rows]), torch.full((1, len(rows)), 9)
    args = (logits, tokens, torch.tensor([0]), torch.zeros(1, len(rows), 4), 9, 0, 0, 100.0 if flags & 4 else 0.0)
    got, wanted = (ops["sample_logits"](*args, flags) for ops in (KERNELS, reference.KERNELS))
    assert torch.equal(got[0], wanted[0]) and got[0][0, :5].tolist() == [9, 9, 9, 2, 1]
    torch.testing.assert_close(got[1], wanted[1], equal_nan=True)


@pytest.mark.parametrize("behind", [-50.0, -5.0, 50.0])
def test_a_block_of_logits_that_cannot_win_changes_nothing(behind: float) -> None:
    """The second block of a row draws its noise, or none where the first one is out of reach."""
    logits = torch.zeros(1, 3, 2060)
    logits[..., 2048:] = behind
    args = (logits, torch.full((1, 3), 9), torch.tensor([0]), None, 9, 5, 0, 1.0, 2)
    (ids, entropy), (wanted, plain) = KERNELS["sample_logits"](*args), reference.sample_logits(*args)
    assert torch.equal(ids, wanted) and bool((ids >= 2048).all()) == (behind > 0)
    torch.testing.assert_close(entropy, plain)


def test_noise_is_that_of_the_words() -> None:
    """Flat logits: the largest noise decides, so a shifted item, sample or step would show."""
    args = (torch.zeros(2, 3, 50), torch.full((2, 3), 9), torch.tensor([1 << 33]), None, 9, -7, (1 << 32) - 1, 1.0, 0)
    assert torch.equal(KERNELS["sample_logits"](*args)[0], reference.sample_logits(*args)[0])
    confidence, tokens = torch.zeros(2, 40), torch.full((2, 40), 9)
    args = (confidence, tokens + 1, tokens, torch.tensor([4]), torch.tensor([[11]], dtype=INT), None, None, None, 9, 3,
            1, math.inf, 1.0)  # fmt: skip
    assert torch.equal(KERNELS["unmask_select"](*args), reference.unmask_select(*args))


# ---------------------------------------------------------------------------------------------------------- contract
@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_signature_is_the_schema(name: str) -> None:
    text = SCHEMAS[name]
    wanted = [part.split()[-1] for part in text[1 : text.index(") ->")].split(",")]
    assert list(inspect.signature(KERNELS[name]).parameters) == wanted


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # opcheck compares runs bit by bit, and poisoned empty results never equal themselves
    args = draw(name, 3, FP32, widths=(24,))
    torch.library.opcheck(_registry.op("maskaccel_triton", name), args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("mode", ["replace", "add_gated", "mask_token", "blend", "zero"])
def test_gradients_of_a_routed_span(mode: str) -> None:
    """The derivative rules call the ops of the backend that ran forward."""
    g = torch.Generator().manual_seed(2)
    index = ops.random_keep(2, 9, 4, seed=1, backend="triton")
    made = {"x": (2, 9, 8), "scale": (2, 9, 8), "gate": (1, 1, 8), "token": (8,), "pos": (1, 9, 8)}
    operands = {name: torch.randn(shape, generator=g) for name, shape in made.items()}
    weights = torch.randn(2, 9, 8, generator=g)
    named = {"add_gated": ("gate",), "mask_token": ("token", "pos")}.get(mode, ())
    options = {{"token": "mask_token"}.get(name, name): name for name in named}

    def gradients(backend: str) -> list:
        leaf = {name: t.clone().requires_grad_() for name, t in operands.items()}
        rows, y = ops.gather_modulate(leaf["x"], index, leaf["scale"], backend=backend)
        full = leaf["x"] if mode in ("replace", "add_gated", "blend") else None
        given = {option: leaf[name] for option, name in options.items()}
        lam = {"lam": 0.3} if mode == "blend" else {}
        out = ops.scatter_merge(full, rows + y, index, mode=mode, **given, **lam, backend=backend)
        (out * weights).sum().backward()
        return [out.detach(), *(leaf[name].grad for name in ("x", "scale", *named))]

    for got, wanted in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)


def test_empty() -> None:
    x, none, ids = torch.zeros(2, 4, 8), torch.zeros(2, 0, 8), torch.zeros(2, 0, dtype=INT)
    inverse, offsets = torch.full((1, 4), -1, dtype=INT), torch.zeros(1, 1, dtype=INT)
    assert KERNELS["gather_rows"](x, ids, None).shape == (2, 0, 8)
    assert not KERNELS["gather_rows"](none, torch.zeros(2, 3, dtype=INT), None).any()
    assert KERNELS["segment_rows"](none, ids, offsets, ids, True).shape == (2, 0, 8)
    assert torch.equal(KERNELS["scatter_merge"](x + 1, none, ids, inverse, None, None, None, 0.0, 0), x + 1)
    gate = torch.ones(1, 1, 8)
    dout = torch.ones(2, 4, 8)
    _, drows, dgate, _ = KERNELS["scatter_merge_backward"](dout, none, ids, inverse, gate, 0.0, 1, 6)
    assert drows.shape == (2, 0, 8) and torch.equal(dgate, torch.zeros(2, 1, 8))
    dmask = KERNELS["scatter_merge_backward"](dout, None, ids, inverse, None, 0.0, 2, 8)[3]
    assert torch.equal(dmask, torch.full((8,), 8.0))
    assert KERNELS["match_tokens"](x, ids, inverse)[0].shape == (2, 0)
    tokens, step = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    assert KERNELS["sample_logits"](torch.zeros(0, 3, 5), tokens, step, None, 9, 0, 0, 0.0, 0)[0].shape == (0, 3)


X, R, AT, V = torch.zeros(2, 4, 8), torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=INT), torch.zeros(1, 4, dtype=INT)
K, STEP, TOK = torch.zeros(2, 3, 2, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)
NO5, C = (None,) * 5, torch.zeros(2, 5, 2, 4)
CODE, UNIT = C.to(torch.uint8), torch.ones(2, 5, 2)
BAD = [
    ("gather_rows", (X.double(), AT, None)),
    ("gather_rows", (X.mT, AT, None)),
    ("gather_rows", (X, AT.long(), None)),
    ("gather_rows", (X, AT.T, None)),
    ("gather_rows", (X, AT[0], None)),
    ("segment_rows", (X, AT, V, V, False)),
    ("segment_rows", (X, V, V[:, :0], V, False)),
    ("scatter_merge", (None, R, AT, V, None, None, None, 0.0, 0)),
    ("scatter_merge", (X.half(), R, AT, V, None, None, None, 0.0, 0)),
    ("scatter_merge", (X[:, :2], R, AT, V, None, None, None, 0.0, 0)),
    ("scatter_merge", (X, R, AT[:, :1], V, None, None, None, 0.0, 0)),
    ("scatter_merge", (X, R, AT, V, R, None, None, 0.0, 0)),
    ("scatter_merge", (X, R, AT, V, X, None, None, 0.0, 1)),
    ("scatter_merge", (X, R, AT, V, None, None, None, 0.0, 4)),
    ("scatter_merge", (X, R, AT, V, None, None, None, 0.0, 5)),
    ("scatter_merge", (X, R, AT, V, None, None, None, math.nan, 3)),
    ("scatter_merge", (None, R, AT, V, None, X[0, 0, :2], None, 0.0, 2)),
    ("scatter_merge", (None, R, AT, V, None, None, R, 0.0, 2)),
    ("scatter_merge_backward", (X, None, AT, V, None, 0.0, 1, 1)),
    ("scatter_merge_backward", (X, None, AT, V, R, 0.0, 1, 4)),
    ("scatter_merge_backward", (X, R, AT, V[:, :2], None, 0.0, 0, 2)),
    ("gather_modulate", (X, AT, V, R, None, None, None, 1e-6, 1.0, 0)),
    ("gather_modulate", (X, AT, V, None, None, None, None, 1e-6, 1.0, 3)),
    ("gather_modulate", (X, AT, V, X[:, :1].double(), None, None, None, 1e-6, 1.0, 0)),
    ("write_kv_rows", (None, K, K, C.half(), C, None, None, AT, *NO5, 1e-6, 2)),
    ("write_kv_rows", (None, K, K, C, C[:, :4], None, None, AT, *NO5, 1e-6, 2)),
    ("write_kv_rows", (None, K, K, C[:, :1].expand(2, 5, 2, 4), C, None, None, AT, *NO5, 1e-6, 2)),
    ("write_kv_rows", (None, K, K, CODE, CODE, UNIT, None, AT, *NO5, 1e-6, 2)),
    ("write_kv_rows", (None, K, K, CODE, CODE, UNIT, UNIT[:, :2], AT, *NO5, 1e-6, 2)),
    ("write_kv_rows", (None, K, K, C, C, None, None, AT[:, :2], *NO5, 1e-6, 2)),
    ("write_kv_rows", (K[:, :2], K, K, C, C, None, None, AT, *NO5, 1e-6, 2)),
    ("write_kv_rows", (None, K, K, C, C, None, None, AT, None, None, UNIT[0], None, None, 1e-6, 2)),
    ("read_kv_rows", (C, UNIT, 0)),
    ("read_kv_rows", (CODE, UNIT.half(), 0)),
    ("read_kv_rows", (CODE, UNIT, 3)),
    ("match_tokens", (X.double(), AT, V)),
    ("match_tokens", (X, AT, V[:, :0])),
    ("sample_logits", (X[:, :, :0], TOK, STEP, None, 9, 0, 0, 0.0, 0)),
    ("sample_logits", (X, TOK.int(), STEP, None, 9, 0, 0, 0.0, 0)),
    ("sample_logits", (X, TOK, STEP, R, 9, 0, 0, 1.0, 0)),
    ("sample_logits", (X, TOK, STEP, None, 9, 0, 0, 0.0, 4)),
    ("sample_logits", (X, TOK, STEP, None, 9, 0, 0, -1.0, 0)),
]


@pytest.mark.parametrize(("name", "args"), BAD, ids=range(len(BAD)))
def test_contract_violations_raise(name: str, args: tuple) -> None:
    with pytest.raises(RuntimeError):
        KERNELS[name](*args)
