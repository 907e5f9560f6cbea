"""The CUDA kernels of the token ops on the host, thread by thread, against the reference. Needs CUDA headers alone."""

from __future__ import annotations

import os
from pathlib import Path

import cuda_emulator
import pytest
import torch
from _numerics import assert_all_close_to_truth
from _raw_cases import describe, draw, run, run_plain, wanted, widened
from _raw_tokens import DRAWS, EXACT

from maskaccel.ops.tokens import reference
from maskaccel.ops.tokens.schema import KEEP_CLASSES, KEEP_GROUPS, KEEP_ROWS_COLS, NO_ROWS, SCALED, THRESHOLD

pytestmark = pytest.mark.skipif(cuda_emulator.missing() is not None, reason=f"no emulation: {cuda_emulator.missing()}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = int(os.environ.get("MASKACCEL_EMULATED_SEEDS", "12"))
WHOLE = torch.randn(3, 40, 64)


@pytest.fixture(scope="module")
def emulated():
    """The op namespace of the emulation."""
    cuda_emulator.load(Path(__file__).resolve().parent.parent / "build" / "emulated")
    return torch.ops.maskaccel_emulated


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ints(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _same(emulated, name: str, args: tuple) -> None:
    got, want = getattr(emulated, name)(*args), reference.KERNELS[name](*args)
    got, want = (t if isinstance(t, tuple) else (t,) for t in (got, want))
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(g, w), f"{name}[{i}] ({describe(args)})"


def _close(emulated, name: str, args: tuple, what: str = "") -> None:
    got = run(name, getattr(emulated, name), args)
    got, plain, truth = wanted(got, run_plain(name, args), run_plain(name, widened(args)))
    assert_all_close_to_truth(got, plain, truth, f"{name} {what} ({describe(args)})")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", DRAWS)
def test_matches_reference(emulated, op, dtype):
    """Random calls over the whole contract; ids bit by bit."""
    for seed in range(SEEDS):
        args = draw(op, seed, dtype)
        if op in EXACT:
            _same(emulated, op, args)
        else:
            _close(emulated, op, args, f"seed {seed}")


# -------------------------------------------------------------------------------------------------------- selections
def _keep(
    n, keep, *, mode=KEEP_GROUPS, groups=1, rows_kept=0, order=None, labels=None, quota=None, force=None, batch=2
):
    step = torch.tensor([3])
    return step, order, labels, quota, force, 77, 5, 1, batch, n, keep, groups, rows_kept, mode


LONG = 8200  # words past what shared memory holds
KEEPS = {
    "long": lambda: _keep(LONG, 3000),
    "long, all but one": lambda: _keep(LONG, LONG - 1),
    "long, forced": lambda: _keep(LONG, 700, force=(torch.arange(LONG)[None] % 9 == 0).byte()),
    "long classes": lambda: _keep(
        LONG, 5000, mode=KEEP_CLASSES, labels=_ints([t % 3 for t in range(LONG)]), quota=_ints([4000, 0, 2000])
    ),
    "many short runs": lambda: _keep(1200, 300, groups=300, order=torch.randperm(1200, generator=_generator()).int()),
    "few long runs": lambda: _keep(900, 450, groups=3, order=torch.randperm(900, generator=_generator()).int()),
    "rows and columns": lambda: _keep(70 * 50, 33 * 17, mode=KEEP_ROWS_COLS, groups=70, rows_kept=33),
    "all": lambda: _keep(130, 130),
    "one": lambda: _keep(1, 1),
    "one of each run": lambda: _keep(1024, 256, groups=256),
    "more than fit": lambda: _keep(
        300, 20, mode=KEEP_CLASSES, labels=torch.zeros(1, 300, dtype=torch.int32), quota=_ints([290])
    ),
}


@pytest.mark.parametrize("case", KEEPS)
def test_random_keep(emulated, case):
    _same(emulated, "random_keep", KEEPS[case]())


@pytest.mark.parametrize("flags", [0, THRESHOLD])
def test_select_active_of_long_rows(emulated, flags):
    """Keys in the workspace; many ties, so that the radix select reaches the bits of the token."""
    score = torch.randint(0, 3, (2, LONG), generator=_generator()).float() - 1
    score[:, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    age, decay = torch.zeros(2, LONG, dtype=torch.int32), torch.ones(1)
    for force in (None, (torch.arange(LONG)[None] % 5 == 0).byte()):
        _same(emulated, "select_active", (score, age, decay, force, 1000, 0 if flags else 2500, 0.5, flags))
        _same(emulated, "select_active", (score, age, decay, force, 4000, 0, -float("inf"), flags))


def test_a_small_product_is_no_negative_zero(emulated):
    """A score that vanishes when it is weighted ties with 0, whatever its sign."""
    score, age = torch.tensor([[-1e-30, 1e-30, 0.0, -0.0]]), torch.zeros(1, 4, dtype=torch.int32)
    _same(emulated, "select_active", (score, age, torch.tensor([1e-30]), None, 2, 0, 0.0, 0))


def test_unmask_select_of_long_rows(emulated):
    """Keys in the workspace, several groups, noise of its own."""
    tokens = torch.where(torch.arange(LONG) % 7 == 0, 4, 9)[None].repeat(2, 1)
    confidence = torch.rand(2, LONG, generator=_generator())
    groups, count = (torch.arange(LONG, dtype=torch.int32)[None] % 4 - 1), _ints([500, 3, 0])
    args = (confidence, tokens + 100, tokens, torch.tensor([2]), count, groups, None, None, 9, 5, 0, float("inf"))
    _same(emulated, "unmask_select", (*args, 0.0))
    noisy = emulated.unmask_select(*args, 1.0)
    # Logarithms differ in their last bit; more than a choice at the border would be an error.
    assert (noisy != reference.unmask_select(*args, 1.0)).sum() <= 4
    assert (noisy != emulated.unmask_select(*args, 0.0)).sum() > 500


@pytest.mark.parametrize("order", ["first", "last"])
def test_warps_out_of_step(emulated, order, monkeypatch):
    """Warps that run as far ahead of each other as barriers let them find the same."""
    monkeypatch.setenv("MASKACCEL_EMULATE_ORDER", order)
    for case in ("many short runs", "few long runs", "more than fit", "rows and columns"):
        _same(emulated, "random_keep", KEEPS[case]())
    for seed in range(4):
        for name in ("select_active", "unmask_select"):
            _same(emulated, name, draw(name, seed, torch.float32))
        for name in ("sample_logits", "match_tokens", "scatter_merge_backward", "write_kv_rows", "gather_modulate"):
            _close(emulated, name, draw(name, seed, torch.bfloat16), f"seed {seed}")


# -------------------------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_width_and_alignment(emulated, dtype):
    """Words of 16 bytes and of one element; rows of one lane, and of more than a CTA has."""
    for width in (1, 4, 8, 40, 1000, 8200):
        ids = torch.randint(-2, 9, (2, 11), generator=_generator(width), dtype=torch.int32)
        for x in (
            torch.randn(2, 7, width),
            torch.randn(2, 7, width + 1)[..., 1:],
            torch.randn(7, width).expand(2, 7, width),
        ):
            _same(emulated, "gather_rows", (x.to(dtype), ids, None))


def test_long_and_empty_segments(emulated):
    """Means of more rows than are loaded at once, in their order; nothing gives zeros."""
    x = torch.randn(1, 200, 16, generator=_generator())
    order, slot = torch.arange(200, dtype=torch.int32)[None], torch.zeros(1, 200, dtype=torch.int32)
    offsets = _ints([0, 0, 190, 200, 200])
    slot[:, :190], slot[:, 190:] = 1, 2
    for mean in (False, True):
        _close(emulated, "segment_rows", (x, order, offsets, slot, mean))
        assert not emulated.segment_rows(x, order, offsets, slot, mean)[0, [0, 3]].any()


@pytest.mark.parametrize("multiprocessors", [1, 40])
def test_gradients_of_shared_operands(emulated, multiprocessors, monkeypatch):
    """One chunk and many; columns of more than one CTA. Twice the same bits."""
    monkeypatch.setenv("MASKACCEL_EMULATE_MULTIPROCESSORS", str(multiprocessors))
    ids = torch.arange(0, 300, 3, dtype=torch.int32)[None]
    inverse = torch.full((1, 300), -1, dtype=torch.int32)
    inverse[0, ids[0].long()] = torch.arange(100, dtype=torch.int32)
    for width in (24, 2056):
        dout, rows = (torch.randn(2, n, width, generator=_generator(n)).bfloat16() for n in (300, 100))
        gate = torch.randn(1, 1, width, generator=_generator(1))
        for args in ((dout, rows, ids, inverse, gate, 0.0, 1, 6), (dout, None, ids, inverse, None, 0.0, 2, 10)):
            _close(emulated, "scatter_merge_backward", args)
            again = [emulated.scatter_merge_backward(*args) for _ in range(2)]
            assert all(map(torch.equal, *again))


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 3072), (torch.float32, 6152), (torch.float16, 1000)])
def test_gather_modulate_of_wide_rows(emulated, dtype, width):
    """A row of a CTA, of a warp, and of the plain kernel; slots without a token."""
    x = torch.randn(2, 9, width, generator=_generator()).to(dtype)
    ids, inverse = _ints([0, 4, 8, 9]), _ints([0, -1, -1, -1, 1, -1, -1, -1, 2])
    scale, shift = (torch.randn(2, n, width, generator=_generator(n)).to(dtype) for n in (9, 1))
    for flags in (0, 1 | NO_ROWS):
        _close(emulated, "gather_modulate", (x, ids, inverse, scale, shift, None, None, 1e-6, 1.0, flags))
        assert not emulated.gather_modulate(x, ids, inverse, scale, shift, None, None, 1e-6, 1.0, flags)[1][:, 3].any()


# --------------------------------------------------------------------------------------------------------- K/V rows
def _write(emulated, k, v, caches, ids, **options):
    names = ("q", "k_scale", "v_scale", "q_weight", "k_weight", "cos", "sin", "positions")
    o = dict.fromkeys(names) | {"flags": 2} | options
    args = (o["k_scale"], o["v_scale"], ids, o["q_weight"], o["k_weight"], o["cos"], o["sin"], o["positions"], 1e-6)
    return emulated.write_kv_rows(o["q"], k, v, *caches, *args, o["flags"])


@pytest.mark.parametrize("order", ["turns", "last"])
def test_the_last_of_equal_ids_counts(emulated, order, monkeypatch):
    if order != "turns":
        monkeypatch.setenv("MASKACCEL_EMULATE_ORDER", order)
    k = torch.arange(6.0).view(1, 6, 1, 1).repeat(2, 1, 1, 8)
    caches = [torch.full((2, 4, 1, 8), -1.0) for _ in range(2)]
    _write(emulated, k, k + 10, caches, _ints([2, 0, 2, 9, -1, 0]))
    assert caches[0][..., 0, 0].tolist() == [[5.0, -1.0, 2.0, -1.0]] * 2
    assert caches[1][..., 0, 0].tolist() == [[15.0, -1.0, 12.0, -1.0]] * 2
    own = [c.fill_(-1.0) for c in caches]  # ids of each sample
    _write(emulated, k, k + 10, own, _ints([0, 0, 0, 1, 1, 1], [3, 3, 3, 3, 3, 0]))
    assert own[0][..., 0, 0].tolist() == [[2.0, 5.0, -1.0, -1.0], [5.0, -1.0, -1.0, 4.0]]


@pytest.mark.parametrize("at", [0, 2, 3])
def test_caches_that_take_turns(emulated, at):
    """K and V as halves of one tensor."""
    shape = [2, 5, 3, 8]
    both = torch.zeros(*shape[:at], 2, *shape[at:])
    k, v = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
    _write(emulated, k, v, both.unbind(at), _ints([4, 1]))
    assert torch.equal(both.select(at, 0)[:, [4, 1]], k) and torch.equal(both.select(at, 1)[:, [4, 1]], v)
    assert both.count_nonzero() == 2 * k.numel()


@pytest.mark.parametrize("dim", [8, 12, 264])
def test_fp8_is_rounded_as_torch_does(emulated, dim):
    """Bit by bit: ordinary rows, zeros, the least and the largest numbers, NaN and infinity."""
    k = torch.randn(1, 40, 2, dim, generator=_generator()) * torch.logspace(-3, 3, dim)
    k[0, 1] = 0
    k[0, 2] *= 1e-38
    k[0, 3] *= 1e34
    k[0, 4, 0, 1], k[0, 5, 0, 1] = float("nan"), -float("inf")
    k[0, 6] = torch.linspace(-448, 448, dim)  # a scale of 1: ties
    k[0, 7] = torch.linspace(-14, 14, dim)
    want, got = ([torch.zeros(1, 40, 2, dim, dtype=torch.uint8) for _ in range(2)] for _ in range(2))
    scales = [[torch.zeros(1, 40, 2) for _ in range(2)] for _ in range(2)]
    ids = torch.arange(40, dtype=torch.int32)[None]
    _write(emulated, k, -k, got, ids, k_scale=scales[0][0], v_scale=scales[0][1])
    rest = (None, None, None, None, None, 1e-6, 2)
    reference.write_kv_rows(None, k, -k, *want, *scales[1], ids, *rest)
    for g, w in zip((*got, *scales[0]), (*want, *scales[1]), strict=True):
        g, w = (t.masked_fill(t & 127 == 127, 127) if t.dtype == torch.uint8 else t.nan_to_num(7) for t in (g, w))
        assert torch.equal(g, w)  # the sign of a NaN means nothing


def test_every_fp8_number(emulated):
    bits = torch.arange(256, dtype=torch.uint8).view(1, 2, 2, 64)
    for kind in range(3):
        got = emulated.read_kv_rows(bits, torch.full((1, 2, 2), 0.5), kind)
        want = reference.read_kv_rows(bits, torch.full((1, 2, 2), 0.5), kind)
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)) and torch.equal(got.isnan(), want.isnan())


def test_heads_and_norms_that_need_the_general_kernel(emulated):
    """Norms across heads and heads of more than 256 elements, with RoPE of both styles, before and after the cache."""
    for dim, flags in ((264, 1), (264, 32), (64, 16 | 1), (72, 16 | 32), (40, 16 | 1 | 64)):
        g = _generator(dim)
        q, k, v = (torch.randn(2, 3, h, dim, generator=g).bfloat16() for h in (4, 2, 2))
        caches = [torch.zeros(2, 6, 2, dim).bfloat16() for _ in range(2)]
        angle = torch.randn(6, dim // 2, generator=g)
        widths = [h * dim if flags & 16 else dim for h in (4, 2)]
        weights = [torch.randn(w, generator=g) for w in widths]
        args = (q, k, v, *caches, None, None, _ints([5, 0, 3]), *weights, angle.cos(), angle.sin(), None, 1e-6, flags)
        _close(emulated, "write_kv_rows", args)


# --------------------------------------------------------------------------------------------- matching and sampling
@pytest.mark.parametrize("multiprocessors", [1, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_match_many_tokens(emulated, dtype, multiprocessors, monkeypatch):
    """Several tiles of sources and destinations, whole and shared by CTAs; rows on no 16 bytes."""
    monkeypatch.setenv("MASKACCEL_EMULATE_MULTIPROCESSORS", str(multiprocessors))
    order = torch.randperm(420, generator=_generator()).int()[None]
    x = torch.randn(2, 420, 99, generator=_generator()).to(dtype)
    for metric in (x[..., :72].contiguous(), x[..., 1:42]):
        _close(emulated, "match_tokens", (metric, order[:, 200:].contiguous(), order[:, :200].contiguous()))


@pytest.mark.parametrize("multiprocessors", [1, 64])
def test_match_ties(emulated, multiprocessors, monkeypatch):
    """Equal rows: the lowest. A row of zeros, and an id of no row, are as near to all."""
    monkeypatch.setenv("MASKACCEL_EMULATE_MULTIPROCESSORS", str(multiprocessors))
    x = torch.ones(1, 300, 8)
    x[0, 7] = 0
    x[0, :7] = -1
    best, similarity = emulated.match_tokens(x, _ints([200, 7, 400]), torch.arange(300, dtype=torch.int32)[None])
    assert best.tolist() == [[8, 0, 0]]
    assert similarity[0, 1:].tolist() == [0.0, 0.0] and abs(similarity[0, 0] - 1) < 1e-6


@pytest.mark.parametrize("multiprocessors", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample_long_rows(emulated, dtype, multiprocessors, monkeypatch):
    """A vocabulary that CTAs share, in rows of any alignment."""
    monkeypatch.setenv("MASKACCEL_EMULATE_MULTIPROCESSORS", str(multiprocessors))
    size = 20011
    base = torch.randn(1, 9, size + 5, generator=_generator()) * 3
    base[0, 1, 12] = -float("inf")
    tokens = torch.full((1, 9), 9)
    tokens[0, 2] = 3
    for first, kind in enumerate((0, 1 | SCALED, 2, 3 | SCALED)):
        args = (base.to(dtype)[..., first : first + size], tokens, torch.tensor([4]), None, 9, 8, 1, 0.9, kind)
        _close(emulated, "sample_logits", args)
    assert emulated.sample_logits(*args)[0][0, 2] == 3


@pytest.mark.parametrize("order", [None, "first", "last"])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 30.0])
def test_noise_that_is_not_drawn_could_not_win(emulated, temperature, order, monkeypatch):
    """Logits from flat to peaked; warps that learn of each other's best late, or early."""
    if order:
        monkeypatch.setenv("MASKACCEL_EMULATE_ORDER", order)
    logits = torch.randn(1, 40, 2100, generator=_generator()) * torch.linspace(0, 12, 40)[:, None]
    tokens, step = torch.zeros(1, 40, dtype=torch.int64), torch.tensor([7])
    args = (logits, tokens, step, None, 0, 11, 2, temperature, 0)
    assert torch.equal(emulated.sample_logits(*args)[0], reference.sample_logits(*args)[0])


@pytest.mark.parametrize("multiprocessors", [1, 16])
def test_rows_that_cannot_be_sampled(emulated, multiprocessors, monkeypatch):
    """A NaN, an infinite logit, or nothing but -inf: the mask, and a confidence of NaN. Ties: the lowest."""
    monkeypatch.setenv("MASKACCEL_EMULATE_MULTIPROCESSORS", str(multiprocessors))
    logits = torch.zeros(1, 5, 20011)
    logits[0, 0, 20000], logits[0, 1, 3] = float("nan"), float("inf")
    logits[0, 2] = -float("inf")
    logits[0, 3, 11000:11003] = 1
    logits[0, 4, :20010] = -float("inf")
    tokens = torch.full((1, 5), -1)
    for kind in range(4):
        ids, confidence = emulated.sample_logits(logits, tokens, torch.tensor([0]), None, -1, 0, 0, 0.0, kind)
        assert ids.tolist() == [[-1, -1, -1, 11000, 20010]]
        assert confidence.isnan().tolist() == [[True, True, True, False, False]]
        assert confidence[0, 4] == (1.0 if kind < 2 else 0.0)


# ------------------------------------------------------------------------------------------------- nothing, bad input
def test_nothing(emulated):
    """Empty batches, tokens, slots and widths."""
    no_ids, step = torch.zeros(1, 0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    assert emulated.gather_rows(WHOLE, no_ids, None).shape == (3, 0, 64)
    assert not emulated.gather_rows(torch.zeros(2, 0, 8), _ints([0, 1]), None).any()
    full = torch.randn(2, 3, 8)
    none_kept = (torch.zeros(2, 0, 8), no_ids, _ints([-1, -1, -1]))
    assert torch.equal(emulated.scatter_merge(full, *none_kept, None, None, None, 0.0, 0), full)
    gate = torch.zeros(1, 1, 8)
    grads = emulated.scatter_merge_backward(full, *none_kept, gate, 0.0, 1, 6)
    assert grads[1].shape == (2, 0, 8) and grads[2].shape == (2, 1, 8) and not grads[2].any()
    assert emulated.random_keep(step, None, None, None, None, 0, 0, 0, 0, 4, 2, 1, 0, 0)[0].shape == (0, 2)
    k, cache = torch.zeros(1, 0, 2, 8), torch.zeros(1, 3, 2, 8)
    assert _write(emulated, k, k, [cache, cache.clone()], no_ids, q=k).shape == (1, 0, 2, 8)
    assert emulated.match_tokens(WHOLE, no_ids, _ints([1]))[0].shape == (3, 0)
    assert emulated.sample_logits(
        torch.zeros(1, 0, 5), torch.zeros(1, 0, dtype=torch.int64), step, None, 0, 0, 0, 0.0, 0
    )[0].shape == (1, 0)


K = torch.zeros(1, 2, 2, 8)
CACHE, BYTES, SCALE = torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8, dtype=torch.uint8), torch.ones(1, 3, 2)
AT, STEP = _ints([0, 1]), torch.zeros(1, dtype=torch.int64)
AGES, WIDE = torch.zeros(40, 64, dtype=torch.int32), CACHE[:, :1].expand(1, 3, 2, 8)
REST = (None, None, None, None, None, 1e-6, 0)
BAD = [
    ("gather_rows", (WHOLE, AT.long(), None), "ids must be contiguous int32"),
    ("gather_rows", (WHOLE.mT, AT, None), "x must have a contiguous last dim"),
    ("gather_rows", (WHOLE, _ints([0], [1]), None), r"ids must be contiguous int32 \(3\|1"),
    ("segment_rows", (WHOLE, AT, AT, AT, True), "order must be contiguous int32"),
    ("scatter_merge", (None, WHOLE, *[AT] * 2, None, None, None, 0.0, 0), "ids must be"),
    ("scatter_merge", (None, WHOLE[:, :2], AT, AT, None, None, None, 0.0, 0), "full must be given"),
    ("scatter_merge", (None, WHOLE[:, :2], AT, AT, None, None, None, 0.0, 5), "mode is 5; allowed are 0 to 4"),
    ("scatter_merge", (WHOLE, WHOLE[:, :2], AT, AT, None, None, None, 0.0, 0), r"full must be \(3, 2, 64\)"),
    ("scatter_merge_backward", (WHOLE[:, :2], None, AT, AT, None, 0.0, 0, 8), "dmask is not of mode 0"),
    ("gather_modulate", (WHOLE[:, :2], AT, AT, WHOLE, None, None, None, 1e-6, 1.0, 0), "scale must be"),
    ("random_keep", _keep(10, 11), "keep is 11; allowed are 1 to n = 10"),
    ("random_keep", _keep(10, 4, groups=4), "groups is 4; it must divide n = 10"),
    ("random_keep", _keep(10, 5, mode=KEEP_ROWS_COLS, groups=5, rows_kept=1), "rows_kept is 1"),
    ("random_keep", _keep(10, 5, mode=KEEP_CLASSES), "labels and quota belong to mode 2"),
    ("select_active", (WHOLE[0], AGES, torch.ones(1), None, 60, 5, 0.0, 0), "high is 5; allowed are 0 to 4"),
    ("write_kv_rows", (None, K, K, WIDE, CACHE, None, None, AT, *REST), "must not be expanded"),
    ("write_kv_rows", (None, K, K, CACHE, CACHE, None, None, AT, *REST), "v_cache shares memory with k_cache"),
    ("write_kv_rows", (None, CACHE[:, :2], K, CACHE, CACHE.clone(), None, None, AT, *REST), "k shares memory"),
    ("write_kv_rows", (None, K, K, BYTES, BYTES.clone(), None, None, AT, *REST), "k_scale must be given"),
    ("write_kv_rows", (None, K, K, BYTES, BYTES.clone(), SCALE, SCALE, AT, *REST), "v_scale shares memory"),
    ("read_kv_rows", (BYTES, SCALE, 3), "kind is 3; allowed are 0 to 2"),
    ("match_tokens", (WHOLE, AT, AT[:, :0]), "dst must name at least one row"),
    ("sample_logits", (WHOLE, torch.zeros(3, 40).long(), STEP, None, 0, 0, 0, -1.0, 0), "temperature is -1"),
    ("sample_logits", (WHOLE, torch.zeros(3, 40), STEP, None, 0, 0, 0, 1.0, 0), "tokens must be contiguous int64"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(emulated, name, args, message):
    """Refused before any kernel runs."""
    with pytest.raises(RuntimeError, match=message):
        getattr(emulated, name)(*args)
    assert not CACHE.any() and not BYTES.any()
