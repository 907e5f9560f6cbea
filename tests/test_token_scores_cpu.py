"""The CPU kernels of sampling, matching and K/V rows against their reference."""

from __future__ import annotations

import re

import pytest
import torch
from _numerics import assert_close_to_truth
from _token_cases import DTYPES, LACKS, RAW, SHARE, Draw, double, fuzz, poison
from hypothesis import given, settings
from hypothesis import strategies as st

from maskaccel.ops.adaln import schema as adaln_schema
from maskaccel.ops.tokens import philox, reference
from maskaccel.ops.tokens.schema import PRE_ROPE, PURPOSE_SAMPLE, SCALED

pytestmark = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))


# -------------------------------------------------------------------------------------------------- sample_logits
def noisy(logits, tokens, step, noise, mask_id, seed, offset, temperature, flags):
    """What sample_logits compares, fp64."""
    batch, n, size = logits.shape
    if temperature and noise is None:
        items = torch.arange(n * size).view(1, n, size)
        sample = torch.arange(offset, offset + batch).view(-1, 1, 1)
        noise = philox.gumbel(philox.words(seed, items, sample, step, PURPOSE_SAMPLE << 24), torch.float64)
    return logits.double() + (temperature * noise.double() if temperature else 0.0)


def sampling_case(draw, batch, n, size, dtype, scale):
    pick, some = draw.choice.choice, draw.choice.random
    logits = draw.randn(batch, n, size, dtype=torch.float32, layout="dense") * scale
    if some() < 0.3:
        logits[draw.uniform(batch, n, size) < 0.3] = float("-inf")
    if batch and some() < 0.4:
        logits[0, n - 1, draw.choice.randrange(size)] = pick([float("nan"), float("inf")])
    if batch and some() < 0.2:
        logits[0, 0] = float("-inf")
    logits = logits.to(dtype)
    if some() < 0.5:  # rows of a wider tensor
        logits = torch.cat([logits, torch.full_like(logits, float("nan"))], -1)[..., :size]
    temperature = pick([0.0, 0.3, 1.0, 2.0])
    noise = draw.randn(batch, n, size, layout="dense") if some() < 0.3 else None
    flags = pick([0, 1, 2, 3]) | (pick([0, SCALED]) if temperature else 0)
    tokens, step = draw.integers(0, 2, batch, n).long(), torch.tensor([pick([0, 8, (1 << 33) + 1])])
    return logits, tokens, step, noise, 1, draw.choice.getrandbits(62), pick([0, 5]), temperature, flags


@settings(fuzz, max_examples=150 // SHARE)
@given(
    st.integers(0, 9999), st.integers(0, 2), st.integers(1, 4), st.sampled_from([1, 2, 15, 16, 17, 100, 513, 1500]),
    st.sampled_from(DTYPES), st.sampled_from([0.1, 1.0, 5.0, 30.0]),
)  # fmt: skip
def test_sample_logits(seed, batch, n, size, dtype, scale):
    args = sampling_case(Draw(seed), batch, n, size, dtype, scale)
    check_sample(args)


def check_sample(args):
    logits, tokens, *_, mask_id, _, _, temperature, _ = args
    poison()
    ids, confidence = RAW.sample_logits(*args)
    plain, truth = reference.sample_logits(*args), reference.sample_logits(*map(double, args))
    compared = noisy(*args)
    got = torch.where(ids == mask_id, truth[0], ids)  # a row of no use names no token of its own
    same = got == truth[0]
    if temperature == 0:
        assert same.all()
    else:  # two that are equal but for the rounding of the noise
        metric = [
            compared.gather(-1, i.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1) for i in (got, truth[0])
        ]
        assert (same | ((metric[0] - metric[1]).abs() < 1e-5 * (1 + metric[1].abs()))).all()
    for kind in (torch.isnan, torch.isposinf):
        assert torch.equal(kind(confidence), kind(truth[1]))
    assert torch.equal(torch.isnan(confidence), (tokens == mask_id) & (ids == mask_id) & torch.isnan(truth[1]))
    finite = torch.isfinite(truth[1]) & same & (plain[0] == truth[0])
    size = logits[torch.isfinite(logits)].abs().max().item() if torch.isfinite(logits).any() else 0.0
    # Few numbers, some of them logarithms of long sums: a last place of those counts for much.
    pair = plain[1][finite], truth[1][finite]
    assert_close_to_truth(confidence[finite], *pair, what="confidence", magnitude=16.0 + size)


def test_sample_logits_of_a_large_vocabulary():
    """Rows are cut into chunks; a token that wins in the last one, equal ones in two of them."""
    draw = Draw(5)
    for size in (16_384, 16_385, 40_000):
        for dtype in DTYPES[:2]:
            logits = draw.randn(1, 2, size, dtype=dtype, layout="dense")
            tokens, step = torch.ones(1, 2, dtype=torch.int64), torch.tensor([3])
            for temperature, kind in ((0.0, 1), (1.0, 0), (1.0, 2)):
                check_sample((logits, tokens, step, None, 1, 9, 0, temperature, kind))
            equals = logits.clone()
            equals[0, 0, [70, size - 1]] = 9.0
            equals[0, 1, size - 1] = 9.0
            ids, margin = RAW.sample_logits(equals, tokens, step, None, 1, 9, 0, 0.0, 1)
            assert ids.tolist() == [[70, size - 1]]
            assert margin[0, 0] == 0
            assert margin[0, 1] > 0


# --------------------------------------------------------------------------------------------------- match_tokens
@settings(fuzz, max_examples=80 // SHARE)
@given(
    st.integers(0, 9999), st.integers(0, 3), st.sampled_from([1, 5, 70, 200]), st.sampled_from([1, 3, 8, 64, 129]),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_match_tokens(seed, batch, n, width, dtype):
    draw = Draw(seed)
    pick = draw.choice.choice
    metric = draw.randn(batch, n, width, dtype=dtype).clone() if batch else torch.zeros(0, n, width, dtype=dtype)
    if draw.choice.random() < 0.5:
        metric[draw.uniform(batch, n) < 0.2] = 0
    src = draw.integers(0, n, pick([1, batch]), pick([0, 1, 50, 150]))
    dst = draw.integers(0, n, pick([1, batch]), pick([1, 17, 140]))
    poison()
    best, similarity = RAW.match_tokens(metric, src, dst)
    plain, truth = reference.match_tokens(metric, src, dst)[1], reference.match_tokens(metric.double(), src, dst)[1]
    assert best.dtype == torch.int32
    # Sums of `width` terms in another order than plain torch takes, times two factors that are rounded themselves.
    assert_close_to_truth(similarity, plain, truth, what="similarity", magnitude=8.0 + 2.0 * width**0.5)
    # The row that was found is as similar as the best one, and the first among equal rows.
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    chosen = dst.expand(batch, -1).gather(1, best.long())
    found = (reference.gather_rows(unit, src) * reference.gather_rows(unit, chosen)).sum(-1)
    assert (truth - found < 3e-6).all()
    for b in range(batch):
        ids = dst[b % dst.shape[0]].tolist()
        assert all(ids.index(ids[i]) == i for i in best[b].tolist())


def test_match_tokens_of_equal_and_of_zero_rows():
    metric = torch.tensor([[[1.0, 0], [0, 0], [-1, 0], [2, 0]]])
    ids = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
    best, similarity = RAW.match_tokens(metric, ids, ids)
    assert best.tolist() == [[0, 0, 2, 0]]
    assert similarity.tolist() == [[1, 0, 1, 1]]
    assert RAW.match_tokens(metric, ids[:, 2:3], ids[:, :2].contiguous())[0].tolist() == [[1]]  # 0 is more than -1


# -------------------------------------------------------------------------------------------------------- K/V rows
def kv_case(draw, batch, rows, size, heads, width, dtype, narrow):
    """Arguments of write_kv_rows but for eps and flags."""
    pick, some = draw.choice.choice, draw.choice.random

    def data(*shape, of=dtype):
        """`(B, M, H, Dh)`, perhaps a part of a wider projection."""
        whole = draw.randn(1, 1, shape[0] * shape[1] * (shape[2] + 1) * shape[3], layout="dense")
        whole = whole.view(*shape[:2], shape[2] + 1, shape[3]).to(of)
        return whole[:, :, 1:] if some() < 0.5 else whole[:, :, 1:].contiguous()

    k, v = data(batch, rows, heads, width), data(batch, rows, heads, width)
    q = data(batch, rows, heads * pick([1, 2]), width) if some() < 0.6 else None
    if narrow:
        caches = [draw.integers(0, 120, batch, size, heads, width).to(torch.uint8) for _ in range(2)]
        scales = [draw.uniform(batch, size, heads) for _ in range(2)]
    elif some() < 0.5:  # halves of one tensor
        both = data(batch, size, 2 * heads, width).contiguous()
        caches, scales = [both[:, :, :heads], both[:, :, heads:]], [None, None]
    else:
        caches, scales = [data(batch, size, heads, width).contiguous() for _ in range(2)], [None, None]
    ids = draw.integers(-1, size + 2, pick([1, batch]), rows)
    return [q, k, v, *caches, *scales, ids]


@settings(fuzz, max_examples=120 // SHARE)
@given(
    st.integers(0, 9999), st.integers(1, 3), st.sampled_from([1, 6]), st.sampled_from([1, 9]), st.sampled_from([1, 3]),
    st.sampled_from([2, 24, 64, 72, 128]), st.sampled_from(DTYPES), st.booleans(),
    st.sampled_from(["rms", "layer", "none"]), st.sampled_from(["fp32", "narrow"]),
)  # fmt: skip
def test_write_kv_rows(seed, batch, rows, size, heads, width, dtype, narrow, norm, law):
    draw = Draw(seed)
    pick, some = draw.choice.choice, draw.choice.random
    args = kv_case(draw, batch, rows, size, heads, width, dtype, narrow)
    q = args[0]
    across = pick([0, adaln_schema.ACROSS_HEADS])
    weights: list = [None, None]
    if norm != "none" and some() < 0.7:
        counts = (heads if q is None else q.shape[2], heads)
        weights = [draw.randn(1, 1, width * (c if across else 1), dtype=dtype, layout="dense")[0, 0] for c in counts]
    cos = sin = positions = None
    if some() < 0.7:
        shape = (pick([1, batch]), 11, pick([width, width // 2]))
        cos, sin = (draw.randn(*shape, dtype=pick([dtype, torch.float32]), layout="dense") for _ in range(2))
        sin = sin.to(cos.dtype)
        if some() < 0.4:
            cos, sin = cos[0], sin[0]
        positions = pick([None, draw.integers(-2, 13, rows), draw.integers(0, 11, batch, rows)])
    flags = adaln_schema.NORMS[norm] | adaln_schema.LAWS[law] | across | pick([0, adaln_schema.ROPE_HALF])
    flags |= pick([0, adaln_schema.WEIGHT_PLUS_ONE]) | pick([0, PRE_ROPE])
    rest = (*weights, cos, sin, positions, 1e-6, flags)

    def run(function, convert):
        """The op on copies of the caches; returns them, and q."""
        q, k, v, *written, ids = [None if t is None else convert(t) for t in args]
        own = [None if t is None else t.clone() for t in written]
        out = function(q, k, v, *own, ids, *(convert(t) for t in rest))
        return out, own

    plain_q, plain = run(reference.write_kv_rows, lambda t: t)
    # Into the very memory of the case, which may be a part of something wider.
    got_q = RAW.write_kv_rows(*args, *rest)
    if narrow:
        # Bits of values that were equal before rounding; a norm in another order moves some by one step.
        for cache, scale, other, factor in zip(args[3:5], args[5:7], plain[:2], plain[2:], strict=True):
            values, want = (RAW.read_kv_rows(c, s, 0) for c, s in ((cache, scale), (other, factor)))
            assert torch.allclose(scale, factor, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=0)
            step = 2.0**-3 * want.abs() + factor.unsqueeze(-1) * 2.0**-8
            assert ((values - want).abs() <= step).all()
    else:
        exact = flags & ~adaln_schema.LAWS["narrow"]
        true_q, truth = run(lambda *a: reference.write_kv_rows(*a[:-1], exact), double)
        assert_close_to_truth(args[3], plain[0], truth[0], what="k_cache")
        assert torch.equal(args[4], plain[1])
        if q is not None:
            assert_close_to_truth(got_q, plain_q, true_q, what="q")
    if q is None:
        assert got_q.numel() == 0
        assert got_q.dtype == dtype


def test_fp8_bits_are_torchs():
    """Every fp16 number as it is converted for a row whose scale is 1; and every byte read back."""
    row = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.float16)
    row = row[row.abs() <= 448].float()
    row = torch.cat([row, torch.tensor([448.0]), row * 1.0001, row * 0.9999]).clamp(-448, 448)
    row = row[: row.numel() // 2 * 2]
    k = row.view(1, 1, 1, -1)
    caches = [torch.zeros(1, 1, 1, row.numel(), dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(1, 1, 1) for _ in range(2)]
    ids = torch.zeros(1, 1, dtype=torch.int32)
    RAW.write_kv_rows(None, k, k, *caches, *scales, ids, *[None] * 5, 1e-6, adaln_schema.NORMS["none"])
    assert scales[0].item() == scales[1].item() == 1
    for cache in caches:
        assert torch.equal(cache.flatten(), row.to(torch.float8_e4m3fn).view(torch.uint8))
    every = torch.arange(256, dtype=torch.uint8).view(1, 2, 2, 64)
    scale = torch.tensor([1.0, 0.5, 3.0, 0.1]).view(1, 2, 2)
    for kind in range(3):
        got, want = RAW.read_kv_rows(every, scale, kind), reference.read_kv_rows(every, scale, kind)
        assert got.dtype == want.dtype
        assert torch.equal(got, want) or torch.equal(got.nan_to_num(), want.nan_to_num())
        assert torch.equal(got.isnan(), want.isnan())


def test_fp8_of_zeros_and_of_nan():
    k = torch.zeros(1, 2, 1, 64)
    k[0, 1, 0, 7] = float("nan")
    caches, scales = [torch.ones(1, 2, 1, 64, dtype=torch.uint8) for _ in range(2)], [torch.zeros(1, 2, 1)] * 2
    scales = [s.clone() for s in scales]
    ids = torch.tensor([[0, 1]], dtype=torch.int32)
    RAW.write_kv_rows(None, k, k, *caches, *scales, ids, *[None] * 5, 1e-6, adaln_schema.NORMS["none"])
    for cache, scale in zip(caches, scales, strict=True):
        assert scale[0, 0].item() == 1
        assert not cache[0, 0].any()
        assert RAW.read_kv_rows(cache, scale, 0)[0, 1].isnan().all()


# ---------------------------------------------------------------------------------------------------------- errors
def _sample(**changed):
    args = {
        "logits": torch.zeros(1, 4, 8), "tokens": torch.zeros(1, 4, dtype=torch.int64), "step": torch.tensor([0]),
        "noise": None, "mask_id": 0, "seed": 0, "offset": 0, "temperature": 0.0, "flags": 0,
    }  # fmt: skip
    return RAW.sample_logits(*(args | changed).values())


def _kv(**changed):
    k = torch.zeros(1, 2, 1, 8)
    args = {
        "q": None, "k": k, "v": k, "k_cache": torch.zeros(1, 4, 1, 8), "v_cache": torch.zeros(1, 4, 1, 8),
        "k_scale": None, "v_scale": None, "ids": torch.zeros(1, 2, dtype=torch.int32), "q_weight": None,
        "k_weight": None, "cos": None, "sin": None, "positions": None, "eps": 1e-6, "flags": 1,
    }  # fmt: skip
    return RAW.write_kv_rows(*(args | changed).values())


CACHE = torch.zeros(1, 4, 1, 8)
METRIC, SOME = torch.zeros(1, 4, 8), torch.zeros(1, 2, dtype=torch.int32)
ERRORS = [
    ("tokens must be contiguous int64", lambda: _sample(tokens=torch.zeros(1, 3))),
    ("noise must be contiguous float32", lambda: _sample(noise=torch.zeros(1, 4, 7))),
    ("temperature is -1", lambda: _sample(temperature=-1.0)),
    ("temperature is 0", lambda: _sample(flags=SCALED)),
    ("unknown flags 8", lambda: _sample(flags=8)),
    ("logits has a last dim of 0", lambda: _sample(logits=torch.zeros(1, 4, 0))),
    ("q must have the shape of k", lambda: _kv(q=torch.zeros(1, 3, 1, 8))),
    ("v must have the dtype of k", lambda: _kv(v=torch.zeros(1, 2, 1, 8).half())),
    ("k_cache is written to", lambda: _kv(k_cache=torch.zeros(1, 1, 1, 8).expand(1, 4, 1, 8))),
    ("k_cache must be (B, S, Hk, Dh)", lambda: _kv(k_cache=torch.zeros(1, 4, 2, 8))),
    ("k_cache must have the dtype of k", lambda: _kv(k_cache=torch.zeros(1, 4, 1, 8).half())),
    ("k_scale goes with", lambda: _kv(k_scale=torch.zeros(1, 4, 1))),
    ("k_scale must be contiguous float32",
     lambda: _kv(k_cache=torch.zeros(1, 4, 1, 8, dtype=torch.uint8), k_scale=torch.zeros(1, 4))),
    ("k_cache shares memory with v_cache", lambda: _kv(k_cache=CACHE, v_cache=CACHE)),
    ("k shares memory with v_cache", lambda: _kv(k=CACHE[:, :2], v_cache=CACHE)),
    ("cos and sin must be given together", lambda: _kv(cos=torch.zeros(4, 8))),
    ("the last dim of cos", lambda: _kv(cos=torch.zeros(4, 6), sin=torch.zeros(4, 6))),
    ("ids has 3 elements", lambda: _kv(ids=torch.zeros(1, 3, dtype=torch.int32))),
    ("positions must be contiguous int32", lambda: _kv(cos=torch.zeros(4, 8), sin=torch.zeros(4, 8),
                                                         positions=torch.zeros(3, dtype=torch.int32))),
    ("unknown flags 128", lambda: _kv(flags=128)),
    ("kind is 3", lambda: RAW.read_kv_rows(torch.zeros(1, 4, 1, 8, dtype=torch.uint8), torch.zeros(1, 4, 1), 3)),
    ("cache must be uint8", lambda: RAW.read_kv_rows(CACHE, torch.zeros(1, 4, 1), 0)),
    ("scale must be contiguous float32",
     lambda: RAW.read_kv_rows(torch.zeros(1, 4, 1, 8, dtype=torch.uint8), torch.zeros(1, 4), 0)),
    ("dst has 0 ids", lambda: RAW.match_tokens(METRIC, SOME, SOME[:, :0].contiguous())),
    ("src must be contiguous int32", lambda: RAW.match_tokens(METRIC, SOME.long(), SOME)),
    ("metric must be (B, N, C)", lambda: RAW.match_tokens(METRIC[0], SOME, SOME)),
]  # fmt: skip


@pytest.mark.parametrize(("message", "call"), ERRORS, ids=[m for m, _ in ERRORS])
def test_errors_name_the_argument(message, call):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call()
