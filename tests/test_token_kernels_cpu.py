"""The CPU kernels that pick and move tokens, against the reference: ids bit for bit, numbers by the error rule."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _token_cases import DTYPES, LACKS, RAW, SHARE, Draw, check, fuzz, poison
from hypothesis import given, settings
from hypothesis import strategies as st

from maskaccel._native import native
from maskaccel.ops.adaln import schema as adaln_schema
from maskaccel.ops.tokens import reference
from maskaccel.ops.tokens.schema import (
    KEEP_GROUPS,
    KEEP_ROWS_COLS,
    MERGES,
    NEED_FULL,
    NEED_GATE,
    NEED_MASK,
    NEED_ROWS,
    NO_ROWS,
    THRESHOLD,
)  # fmt: skip

pytestmark = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))


def equal(name, *args):
    """One raw op whose results are integers."""
    poison()
    got, want = getattr(RAW, name)(*args), reference.KERNELS[name](*args)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and torch.equal(g, w), (name, args, g, w)
    return got


# ---------------------------------------------------------------------------------------------------- random_keep
def random_keep_case(draw: Draw, mode: int) -> tuple:
    pick = draw.choice
    batch, route = pick.choice([0, 1, 2, 3]), pick.choice([0, pick.randrange(1 << 24)])
    seed, offset = pick.choice([0, pick.getrandbits(63), -pick.getrandbits(62)]), pick.choice([0, 3, (1 << 32) - 1])
    step = torch.tensor([pick.choice([0, 1, 9, (1 << 33) + 5])])
    order = labels = quota = force = None
    groups = rows_kept = 1
    if mode == KEEP_GROUPS:
        groups, length = pick.choice([1, 1, 2, 9]), pick.choice([1, 4, 13, 90])
        n, keep = groups * length, groups * pick.randint(1, length)
        if pick.random() < 0.5:
            order = torch.randperm(n, generator=draw.generator).to(torch.int32)
    elif mode == KEEP_ROWS_COLS:
        groups, columns = pick.choice([1, 2, 9, 70]), pick.choice([1, 5, 31])
        rows_kept = pick.randint(1, groups)
        n, keep = groups * columns, rows_kept * pick.randint(1, columns)
    else:
        n, classes = pick.choice([1, 5, 50, 400]), pick.choice([1, 3, 10])
        keep = pick.randint(1, n)
        labels = draw.integers(-1, classes + 1, pick.choice([1, batch]), n)
        quota = draw.integers(-1, max(2, 2 * n // classes), pick.choice([1, batch]), classes)
    if mode != KEEP_ROWS_COLS and pick.random() < 0.4:
        force = (draw.uniform(pick.choice([1, batch]), n) < pick.choice([0.05, 0.8])).to(torch.uint8)
    return step, order, labels, quota, force, seed, route, offset, batch, n, keep, groups, rows_kept, mode


def test_random_keep_draws_what_the_reference_draws():
    draw = Draw(0)
    for case in range(1000 // SHARE):
        equal("random_keep", *random_keep_case(draw, case % 3))


def test_random_keep_of_many_tokens():
    """Long runs are cut by counting, not by sorting."""
    step, force = torch.tensor([4]), (Draw(1).uniform(1, 20_000) < 0.01).to(torch.uint8)
    for forced in (None, force):
        equal("random_keep", step, None, None, None, forced, 7, 1, 0, 2, 20_000, 5_000, 1, 1, KEEP_GROUPS)


# ------------------------------------------------------------------------------------- select_active, unmask_select
@fuzz
@given(st.integers(0, 9999), st.integers(0, 3), st.sampled_from([1, 2, 9, 70, 300]), st.booleans(), st.booleans())
def test_select_active(seed, batch, n, by_threshold, ties):
    draw = Draw(seed)
    score = draw.uniform(batch, n) - 0.3
    if ties:
        score = (score * 4).round() / 4  # also -0.0
    score[draw.uniform(batch, n) < 0.05] = float("nan")
    score[draw.uniform(batch, n) < 0.05] = float("-inf")
    age, decay = draw.integers(-1, 6, batch, n), 0.9 ** torch.arange(4.0)
    force = draw.choice.choice([None, (draw.uniform(1, n) < 0.2), (draw.uniform(batch, n) < 0.9)])
    force = None if force is None else force.to(torch.uint8)
    keep = draw.choice.randint(1, n)
    high = 0 if by_threshold else draw.choice.randint(0, n - keep)
    equal("select_active", score, age, decay, force, keep, high, 0.25, THRESHOLD if by_threshold else 0)


@fuzz
@given(st.integers(0, 9999), st.integers(0, 3), st.sampled_from([1, 3, 40, 200]), st.sampled_from([0.0, 0.0, 0.7]))
def test_unmask_select(seed, batch, n, temperature):
    draw = Draw(seed)
    some = draw.choice.random
    confidence = (draw.uniform(batch, n) * 8).round() / 8 if some() < 0.5 else draw.uniform(batch, n)
    confidence[draw.uniform(batch, n) < 0.1] = float("nan")
    confidence[draw.uniform(batch, n) < 0.1] = float("-inf")
    tokens = draw.integers(7, 10, batch, n).long()
    confidence[tokens != 9] = float("inf")
    sampled = draw.integers(0, 7, batch, n).long()
    kinds = draw.choice.choice([1, 4])
    groups = draw.integers(-1, kinds + 1, draw.choice.choice([1, batch]), n) if some() < 0.6 else None
    hold = (draw.uniform(draw.choice.choice([1, batch]), n) < 0.2).to(torch.uint8) if some() < 0.5 else None
    count = draw.integers(-1, n // kinds + 2, draw.choice.choice([1, batch]), kinds)
    noise = draw.uniform(batch, n) if some() < 0.3 else None
    threshold = draw.choice.choice([float("inf"), 0.8])
    args = (
        confidence,
        sampled,
        tokens,
        torch.tensor([5]),
        count,
        groups,
        hold,
        noise,
        9,
        11,
        2,
        threshold,
        temperature,
    )
    poison()
    assert torch.equal(RAW.unmask_select(*args), reference.unmask_select(*args))


# ----------------------------------------------------------------------------------------------------------- rows
ROWS = (
    st.integers(0, 9999), st.integers(0, 3), st.sampled_from([1, 2, 7, 33]), st.sampled_from([1, 8, 33, 130, 256]),
    st.sampled_from(DTYPES), st.booleans(),
)  # fmt: skip


def rows_case(seed, batch, n, ragged):
    """A draw and the index of a case."""
    draw = Draw(seed)
    kept, shared = draw.choice.randint(0, n), batch == 0 or draw.choice.random() < 0.5
    return draw, *draw.index(1 if shared else batch, n, kept, ragged)


@fuzz
@given(*ROWS)
def test_gathers(seed, batch, n, width, dtype, ragged):
    draw, keep, inverse = rows_case(seed, batch, n, ragged)
    x = draw.randn(batch, n, width, dtype=dtype)
    slot = draw.integers(-1, n + 2, keep.shape[0], n + 3)
    for ids, back in ((keep, inverse), (slot, None)):
        poison()
        assert torch.equal(RAW.gather_rows(x, ids, back), reference.gather_rows(x, ids))
    assert torch.equal(RAW.unmerge_rows(x, slot, slot, slot), reference.gather_rows(x, slot))


def segments(slot, count):
    """`order` and `offsets` of a map from rows to slots; rows of no slot come last."""
    where = torch.where((slot >= 0) & (slot < count), slot, count)
    counts = torch.nn.functional.one_hot(where.long(), count + 1)[..., :count].sum(1)
    offsets = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    return where.argsort(dim=1, stable=True).to(torch.int32), offsets.to(torch.int32)


@fuzz
@given(*ROWS)
def test_segment_rows(seed, batch, n, width, dtype, mean):
    draw = Draw(seed)
    count = draw.choice.choice([1, 3, 9])
    slot = draw.integers(-1, count + 1, draw.choice.choice([1, max(batch, 1)]), n)
    order, offsets = segments(slot, count)
    x = draw.randn(batch, n, width, dtype=dtype)
    check("segment_rows", x, order, offsets, slot, mean, magnitude=float(n))


def merge_case(draw, batch, keep, inverse, width, dtype, mode):
    """Arguments of scatter_merge after `full`, `rows`, `ids` and `inverse`."""
    n, kept = inverse.shape[1], keep.shape[1]
    pick = draw.choice.choice
    gate = mask_token = pos = None
    if mode == MERGES["add_gated"] and draw.choice.random() < 0.8:
        gate = draw.randn(pick([1, batch]), pick([1, kept]), width, dtype=pick([dtype, torch.float32]))
    if mode == MERGES["mask_token"]:
        mask_token = draw.randn(1, 1, width, dtype=pick([dtype, torch.float32]), layout="dense")[0, 0]
    if mode in (MERGES["mask_token"], MERGES["zero"]) and draw.choice.random() < 0.6:
        pos = draw.randn(pick([1, batch]), n, width, dtype=pick([dtype, torch.float32]))
    return gate, mask_token, pos, draw.choice.random(), mode


@settings(fuzz, max_examples=100 // SHARE)
@given(*ROWS, st.sampled_from(list(MERGES.values())))
def test_scatter_merge_and_its_gradients(seed, batch, n, width, dtype, ragged, mode):
    draw, keep, inverse = rows_case(seed, batch, n, ragged)
    full = draw.randn(batch, n, width, dtype=dtype)
    rows = draw.randn(batch, keep.shape[1], width, dtype=dtype)
    gate, mask_token, _pos, lam, _ = rest = merge_case(draw, batch, keep, inverse, width, dtype, mode)
    without_full = mode in (MERGES["mask_token"], MERGES["zero"])
    check("scatter_merge", None if without_full else full, rows, keep, inverse, *rest, what=f"mode {mode}")
    needs = NEED_ROWS | (NEED_FULL if mode in (MERGES["replace"], MERGES["blend"]) else 0)
    needs |= (NEED_GATE if gate is not None else 0) | (NEED_MASK if mask_token is not None else 0)
    for wanted in {needs, needs & draw.choice.randrange(16)}:
        read = rows if gate is not None else None
        args = (full, read, keep, inverse, gate, lam, mode, wanted)
        check("scatter_merge_backward", *args, what=f"mode {mode} needs {wanted}", magnitude=float(batch * n) ** 0.5)


@fuzz
@given(*ROWS, st.sampled_from(["layer", "rms", "none"]), st.sampled_from(["fp32", "narrow"]))
def test_gather_modulate(seed, batch, n, width, dtype, ragged, norm, law):
    draw, keep, inverse = rows_case(seed, batch, n, ragged)
    pick = draw.choice.choice
    x, mod_dtype = draw.randn(batch, n, width, dtype=dtype), pick([dtype, torch.float32])
    scale, shift = (
        draw.randn(pick([1, batch]), pick([1, n]), width, dtype=mod_dtype) if draw.choice.random() < 0.8 else None
        for _ in range(2)
    )
    weight, bias = (
        draw.randn(1, 1, width, dtype=dtype, layout="dense")[0, 0] if draw.choice.random() < 0.5 else None
        for _ in range(2)
    )
    flags = adaln_schema.NORMS[norm] | adaln_schema.LAWS[law] | pick([0, adaln_schema.WEIGHT_PLUS_ONE])
    poison()
    args = (x, keep, inverse, scale, shift, weight, bias, 1e-6, pick([0.0, 1.0]))
    rows, y = RAW.gather_modulate(*args, flags)
    assert torch.equal(rows, reference.gather_rows(x, keep))
    # The norm is that of norm_modulate, which has its own tests: here it is that of the tokens' own rows, bit for bit.
    wide = [m if m is None else m.expand(-1, n, -1) for m in (scale, shift)]
    whole = RAW.norm_modulate(x, *wide, weight, bias, None, None, None, *args[-2:], flags)
    assert torch.equal(y, reference.gather_rows(whole, keep))
    none, alone = RAW.gather_modulate(*args, flags | NO_ROWS)
    assert none.numel() == 0 and none.dtype == dtype and torch.equal(alone, y)


def test_results_past_the_cache():
    """Results of 8 MiB and more are written past the cache."""
    draw = Draw(3)
    batch, n, width = 2, 2100, 1152
    for dtype in DTYPES[:2]:
        keep, inverse = draw.index(batch, n, 2090, ragged=True)
        x, rows = (draw.randn(batch, k, width, dtype=dtype, layout="dense") for k in (n, 2090))
        assert torch.equal(RAW.gather_rows(x, keep, inverse), reference.gather_rows(x, keep))
        for mode in (MERGES["replace"], MERGES["zero"]):
            args = (x if mode == MERGES["replace"] else None, rows, keep, inverse, None, None, None, 0.0, mode)
            assert torch.equal(RAW.scatter_merge(*args), reference.scatter_merge(*args))
        got, y = RAW.gather_modulate(x, keep, inverse, None, None, None, None, 1e-6, 1.0, 0)
        assert torch.equal(got, reference.gather_rows(x, keep))
        whole = RAW.norm_modulate(x, None, None, None, None, None, None, None, 1e-6, 1.0, 0)
        assert torch.equal(y, reference.gather_rows(whole, keep))


# ---------------------------------------------------------------------------------------------------------- errors
def _keep(**changed):
    args = {
        "step": torch.tensor([0]), "order": None, "labels": None, "quota": None, "force": None, "seed": 0, "route": 0,
        "offset": 0, "batch": 2, "n": 12, "keep": 6, "groups": 3, "rows_kept": 1, "mode": 0,
    }  # fmt: skip
    return lambda: RAW.random_keep(*(args | changed).values())


def _int(*values):
    return torch.tensor(values, dtype=torch.int32)


X = torch.zeros(2, 4, 8)
IDS, INVERSE = _int([0, 2]), _int([0, -1, 1, -1])
ERRORS = [
    ("step must be int64", _keep(step=torch.tensor([0], dtype=torch.int32))),
    ("route is -1", _keep(route=-1)),
    ("route is 16777216", _keep(route=1 << 24)),
    ("n is 16777216", _keep(n=1 << 24)),
    ("keep is 13", _keep(keep=13)),
    ("groups is 5", _keep(groups=5)),
    ("groups is 3", _keep(keep=7)),
    ("order holds values from 0 to 12", _keep(order=torch.arange(1, 13, dtype=torch.int32))),
    ("order holds token 0 twice", _keep(order=torch.zeros(12, dtype=torch.int32))),
    ("order must be contiguous int32 of shape", _keep(order=torch.arange(12))),
    ("rows_kept is 4", _keep(rows_kept=4, mode=1)),
    ("force is not for mode 1", _keep(force=torch.zeros(1, 12, dtype=torch.uint8), rows_kept=2, mode=1)),
    ("labels and quota", _keep(mode=2)),
    ("force must be contiguous uint8", _keep(force=torch.zeros(1, 12))),
    ("force has a batch of 3", _keep(force=torch.zeros(3, 12, dtype=torch.uint8))),
    ("mode is 3", _keep(mode=3)),
    ("ids must be contiguous int32", lambda: RAW.gather_rows(X, IDS.long(), None)),
    ("ids has a batch of 3", lambda: RAW.gather_rows(X, IDS.expand(3, 2).contiguous(), None)),
    ("x must be contiguous in its last dim", lambda: RAW.gather_rows(X.transpose(1, 2), IDS, None)),
    ("x must be float32, bfloat16 or float16", lambda: RAW.gather_rows(X.double(), IDS, None)),
    ("x must have 3 dimensions", lambda: RAW.gather_rows(X[0], IDS, None)),
    ("order holds values", lambda: RAW.segment_rows(X, _int([0, 4]), _int([0, 1, 2]), INVERSE, False)),
    ("offsets must be ascending", lambda: RAW.segment_rows(X, _int([0, 1]), _int([0, 2, 1]), INVERSE, False)),
    ("offsets holds values", lambda: RAW.segment_rows(X, _int([0, 1]), _int([0, 2, 3]), INVERSE, False)),
    ("full is needed", lambda: RAW.scatter_merge(None, X[:, :2], IDS, INVERSE, None, None, None, 0.0, 0)),
    ("inverse holds values", lambda: RAW.scatter_merge(X, X[:, :2], IDS, INVERSE + 1, None, None, None, 0.0, 0)),
    ("rows has 4 rows", lambda: RAW.scatter_merge(X, X, IDS, INVERSE, None, None, None, 0.0, 0)),
    ("full has shape", lambda: RAW.scatter_merge(X[:, :3], X[:, :2], IDS, INVERSE, None, None, None, 0.0, 0)),
    ("full must have the dtype", lambda: RAW.scatter_merge(X.half(), X[:, :2], IDS, INVERSE, None, None, None, 0.0, 0)),
    ("gate is not for mode 0", lambda: RAW.scatter_merge(X, X[:, :2], IDS, INVERSE, X[:, :1], None, None, 0.0, 0)),
    ("gate must be", lambda: RAW.scatter_merge(X, X[:, :2], IDS, INVERSE, X[:, :3], None, None, 0.0, 1)),
    ("mask_token is needed", lambda: RAW.scatter_merge(None, X[:, :2], IDS, INVERSE, None, None, None, 0.0, 2)),
    ("full is not for mode 4", lambda: RAW.scatter_merge(X, X[:, :2], IDS, INVERSE, None, None, None, 0.0, 4)),
    ("needs asks for dgate", lambda: RAW.scatter_merge_backward(X, None, IDS, INVERSE, None, 0.0, 1, 4)),
    ("needs asks for dfull", lambda: RAW.scatter_merge_backward(X, None, IDS, INVERSE, None, 0.0, 2, 1)),
    ("needs is 16", lambda: RAW.scatter_merge_backward(X, None, IDS, INVERSE, None, 0.0, 0, 16)),
    ("scale must be", lambda: RAW.gather_modulate(X, IDS, INVERSE, X[:, :2], None, None, None, 1e-6, 1.0, 0)),
    ("unknown flags", lambda: RAW.gather_modulate(X, IDS, INVERSE, None, None, None, None, 1e-6, 1.0, 1 << 11)),
    ("keep is 0", lambda: RAW.select_active(X[0, :1, :4], INVERSE, X[0, 0], None, 0, 0, 0.0, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("message", "call"), ERRORS, ids=[m for m, _ in ERRORS])
def test_errors_name_the_argument(message, call):
    with pytest.raises(RuntimeError, match=message.replace("(", r"\(")):
        call()


ISAS = ("portable", "avx2", "avx512", "avx512bf16")
LOWER = ISAS[: ISAS.index(native.isa)] if native.isa in ISAS else ()


@pytest.mark.skipif(not LOWER, reason="this machine has the portable kernels only")
@pytest.mark.parametrize("isa", LOWER)
def test_lower_instruction_sets(isa):
    here = Path(__file__)
    env = os.environ | {"MASKACCEL_CPU_ISA": isa}
    files = [str(here), str(here.with_name("test_token_scores_cpu.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not lower and not errors"]
    run = subprocess.run([*command, *files], env=env, capture_output=True, text=True, cwd=here.parent.parent)
    assert run.returncode == 0, run.stdout[-3000:]
