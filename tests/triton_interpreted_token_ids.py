"""The Triton kernels that choose tokens, run by `test_triton_kernels.py` as its siblings."""

from __future__ import annotations

import fuzz_token_ids as fuzz
import pytest
import torch
import triton
import triton.language as tl
from _triton_cases import poisoned_memory  # noqa: F401

from maskaccel.ops.tokens import reference
from maskaccel.ops.tokens import triton as tokens
from maskaccel.ops.tokens import triton_launch_select as select
from maskaccel.ops.tokens.triton_check import random_stream
from maskaccel.ops.tokens.triton_lib import random_word

INT, CPU = torch.int32, torch.device("cpu")


@triton.jit
def _one_word(out, item, key0, key1, sample, step, last):
    lane = tl.arange(0, 1)
    word = random_word((lane + item).to(tl.uint32), (key0, key1, sample, step, last), tl.program_id(0))
    tl.store(out + lane, word.to(tl.int64))


@pytest.mark.parametrize(
    ("counter", "key", "first"),
    [
        ((0, 0, 0, 0), 0, 0x6627E8D5),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, 0x408F276D),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, 0xD16CFE09),
    ],
)
def test_the_words_are_those_that_the_authors_publish(counter: tuple, key: int, first: int) -> None:
    """The known answers of Random123."""
    out, item = torch.zeros(1, dtype=torch.int64), counter[0] - (1 << 32 if counter[0] >> 31 else 0)
    last = counter[3] - (1 << 32 if counter[3] >> 31 else 0)
    _one_word[(1,)](out, item, *random_stream(torch.tensor([counter[2]]), CPU, key, counter[1], last))
    assert int(out) == first


@pytest.mark.parametrize(("whole", "seeds"), [(8192, range(45)), (128, range(100, 115))])
def test_random_calls_give_the_bits_of_the_reference(whole: int, seeds: range, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "WHOLE", whole)  # longer rows of keys are walked in blocks
    for seed in seeds:
        fuzz.check(seed, tokens.KERNELS)


def test_infinite_scores_and_both_zeros_are_ranked() -> None:
    inf, nan = float("inf"), float("nan")
    score = torch.tensor([[-0.0, nan, 0.0, -inf, inf, -1.0, 1.0, -0.0]])
    args = (score, torch.zeros(1, 8, dtype=INT), torch.ones(1), None)
    for keep in range(1, 9):
        got, wanted = (ops["select_active"](*args, keep, 0, 0.0, 0) for ops in (tokens.KERNELS, reference.KERNELS))
        assert torch.equal(got[0], wanted[0]), keep
    assert tokens.KERNELS["select_active"](*args, 8, 0, 0.0, 1)[0].tolist() == [[0, 2, 4, 6, 7, 8, 8, 8]]


def test_equal_words_are_told_apart_by_token() -> None:
    """A row of equal scores: keys differ in the bits of the token alone."""
    args = (torch.zeros(1, 50), torch.zeros(1, 50, dtype=INT), torch.ones(1), None, 20, 7, 0.0, 0)
    keep = tokens.KERNELS["select_active"](*args)[0]
    assert keep.tolist() == [list(range(7, 27))]


def test_seeds_and_steps_are_no_reason_to_compile() -> None:
    """Words of every size are int32 arguments."""
    step = torch.zeros(1, dtype=torch.int64)
    for seed, offset in ((0, 0), (1, 1 << 31), (-1, (1 << 32) - 1), ((1 << 63) - 1, 16)):
        words = random_stream(step, CPU, seed, offset, 0)[:3]
        assert all(-(1 << 31) <= word < 1 << 31 for word in words)
        assert [word & 0xFFFFFFFF for word in words] == [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, offset]


def test_no_sample() -> None:
    step, none = torch.zeros(1, dtype=torch.int64), torch.zeros(0, 8)
    got = tokens.KERNELS["random_keep"](step, None, None, None, None, 0, 0, 0, 0, 8, 4, 1, 0, 0)
    assert [tuple(t.shape) for t in got] == [(0, 4), (0, 8), (0,)]
    got = tokens.KERNELS["select_active"](none, none.to(INT), torch.ones(1), None, 4, 0, 0.5, 1)
    assert [tuple(t.shape) for t in got] == [(0, 4), (0, 8), (0,), (0, 8)]


def test_registered_ops_run() -> None:
    tokens.register()
    args = (torch.zeros(1, dtype=torch.int64), None, None, None, None, 5, 0, 0, 2, 24, 6, 1, 0, 0)
    got = torch.ops.maskaccel_triton.random_keep(*args)
    assert all(torch.equal(g, w) for g, w in zip(got, reference.random_keep(*args), strict=True))


STEP, SCORE, AGE = torch.zeros(1, dtype=torch.int64), torch.zeros(2, 8), torch.zeros(2, 8, dtype=INT)
FORCE, TOKENS, COUNT = torch.zeros(1, 8, dtype=torch.uint8), torch.zeros(2, 8, dtype=torch.int64), AGE[:, :1].clone()


def keep_args(**changes: object) -> tuple:
    args = {"step": STEP, "order": None, "labels": None, "quota": None, "force": None, "seed": 0, "route": 0,
            "offset": 0, "batch": 2, "n": 8, "keep": 4, "groups": 1, "rows_kept": 0, "mode": 0}  # fmt: skip
    return tuple({**args, **changes}.values())


def active_args(**changes: object) -> tuple:
    args = {"score": SCORE, "age": AGE, "decay": torch.ones(2), "force": None, "keep": 4, "high": 0, "threshold": 0.0,
            "flags": 0}  # fmt: skip
    return tuple({**args, **changes}.values())


def unmask_args(**changes: object) -> tuple:
    args = {"confidence": SCORE, "sampled": TOKENS, "tokens": TOKENS, "step": STEP, "count": COUNT, "groups": None,
            "hold": None, "noise": None, "mask_id": 9, "seed": 0, "offset": 0, "threshold": 1.0,
            "temperature": 0.0}  # fmt: skip
    return tuple({**args, **changes}.values())


BAD = [
    ("random_keep", keep_args(step=torch.zeros(1))),
    ("random_keep", keep_args(keep=9)),
    ("random_keep", keep_args(keep=0)),
    ("random_keep", keep_args(groups=3)),
    ("random_keep", keep_args(groups=8)),
    ("random_keep", keep_args(route=1 << 24)),
    ("random_keep", keep_args(mode=3)),
    ("random_keep", keep_args(mode=1, groups=2, rows_kept=3)),
    ("random_keep", keep_args(mode=1, groups=2, rows_kept=1, keep=6)),
    ("random_keep", keep_args(mode=1, groups=2, rows_kept=1, force=FORCE)),
    ("random_keep", keep_args(mode=2)),
    ("random_keep", keep_args(mode=2, labels=AGE, quota=AGE[:, :0])),
    ("random_keep", keep_args(mode=2, labels=AGE[:, :4], quota=COUNT)),
    ("random_keep", keep_args(force=FORCE.bool())),
    ("random_keep", keep_args(order=AGE[0, :4])),
    ("random_keep", keep_args(labels=AGE)),
    ("select_active", active_args(score=SCORE.double())),
    ("select_active", active_args(score=SCORE.T.contiguous().T)),
    ("select_active", active_args(age=AGE[:1])),
    ("select_active", active_args(decay=torch.ones(0))),
    ("select_active", active_args(high=5)),
    ("select_active", active_args(high=1, flags=1)),
    ("unmask_select", unmask_args(confidence=SCORE.double())),
    ("unmask_select", unmask_args(sampled=AGE)),
    ("unmask_select", unmask_args(count=COUNT[:, :0])),
    ("unmask_select", unmask_args(noise=SCORE[:1])),
    ("unmask_select", unmask_args(temperature=-1.0)),
    ("unmask_select", unmask_args(hold=FORCE.bool())),
]


@pytest.mark.parametrize(("name", "args"), BAD, ids=range(len(BAD)))
def test_contract_violations_raise(name: str, args: tuple) -> None:
    with pytest.raises(RuntimeError):
        tokens.KERNELS[name](*args)
