"""Every Triton kernel of the attention ops against the fp64 reference, run by `test_triton_kernels.py`."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from _numerics import assert_all_close_to_truth
from _raw_attention import draw, run, run_plain
from _raw_cases import describe, wanted, widened
from _triton_cases import DTYPES, FP32, poisoned_memory  # noqa: F401
from test_attention_fuzz import check as check_call

from maskaccel.masks import TileMask
from maskaccel.ops import _registry
from maskaccel.ops.attention import triton as attention
from maskaccel.ops.attention import triton_config, triton_launch
from maskaccel.ops.attention.reference import unpack_words
from maskaccel.ops.attention.schema import KEEP, PRUNE, SCHEMAS

attention.register()
OPS = ("tile_attention", "tile_attention_backward", "attention_column_sums")
forward = attention.KERNELS["tile_attention"]
NONE7 = (None,) * 7  # bias to out_add


def check(op: str, args: tuple, what: str) -> None:
    got = run(op, attention.KERNELS[op], args)
    results = wanted(got, run_plain(op, args), run_plain(op, widened(args)))
    assert_all_close_to_truth(*results, f"{op} {what} ({describe(args)})")


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("op", OPS)
def test_matches_reference(op: str, seed: int) -> None:
    """Random calls over the whole contract: masks, layouts, grouped heads, bias, epilogue, keep bits, pruning."""
    check(op, draw(op, seed, DTYPES[seed % 3]), f"seed {seed}")


@pytest.mark.parametrize("width", [48, 88, 112, 120, 136, 200, 256])
def test_head_dims(width: int) -> None:
    """The two parts of a head dim: padded, equal, of 128 at most."""
    for op in OPS:
        check(op, draw(op, width, FP32, lengths=(33, 40), dims=(width,)), f"head dim {width}")
    one, two = triton_config.split(width)
    assert one + two >= width and one <= 128 and all(n & (n - 1) == 0 for n in (one, two))


def small(length: int = 200, block: tuple[int, int] = (128, 128)) -> tuple[tuple, tuple, tuple]:
    """(q, k, v), arguments of a mask of everything, block and scale."""
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, length, 2, 24, generator=g) for _ in range(3))
    mask = TileMask.full((length, length), block)
    lists = (*mask.lists(), *mask.transposed_lists(), mask.pattern_of, mask.patterns)
    return (q, k, v), lists, (*block, 0.3)


@pytest.mark.parametrize("length", [128, 136])
def test_a_mask_of_everything_is_no_mask(length: int) -> None:
    qkv, lists, end = small(length)
    masked = forward(*qkv, *lists, *NONE7, *end, 0.0, 0)
    plain = forward(*qkv, *(None,) * 8, *NONE7, *end, 0.0, 0)
    assert all(map(torch.equal, masked, plain))
    backward = attention.KERNELS["tile_attention_backward"]
    out, lse, _ = plain
    left, right = (
        backward(out, None, *qkv, out, lse, *which, None, None, None, None, *end, 15) for which in (lists, (None,) * 8)
    )
    assert all(map(torch.equal, left, right))


def test_a_threshold_that_keeps_everything_changes_no_bit() -> None:
    qkv, lists, end = small(136)
    plain = forward(*qkv, *lists, *NONE7, *end, 0.0, 0)
    for flags in (KEEP, PRUNE):
        out, lse, keep = forward(*qkv, *lists, *NONE7, *end, -math.inf, flags)
        assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1])
        assert keep.numel() == 0 if not flags & KEEP else unpack_words(keep, 2).all()


@pytest.mark.parametrize("by_lse", [False, True])
def test_pruning_in_one_pass_and_in_two(by_lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one block are decided on the way, larger ones before: with the same bits and the same result."""
    (q, k, v), lists, end = small(96, (32, 32))
    k[:, 32:64] *= 0.01  # far below what the first tile has
    qkv = (4 * q, k, v)
    reference_lse = forward(*qkv, *lists, *NONE7, *end, 0.0, 0)[1] if by_lse else None
    call = (*qkv, *lists, *NONE7[:4], reference_lse, None, None, *end, -1.0, KEEP | PRUNE)
    out, lse, keep = forward(*call)
    assert unpack_words(keep, 3)[..., 0].all() and not unpack_words(keep, 3)[..., 1].any()
    bits = forward(*call[:-1], KEEP)[2]
    small_blocks = triton_config.Blocks(16, 16, 2, 1)
    for name in ("forward_blocks", "keep_blocks"):
        monkeypatch.setattr(triton_launch, name, lambda *_: small_blocks)
    two = forward(*call)
    assert torch.equal(two[2], keep)
    torch.testing.assert_close(two[:2], (out, lse))
    assert torch.equal(forward(*call[:-1], KEEP)[2], bits)  # those of the parts of a tile, gathered


@pytest.mark.parametrize("seed", range(6))
def test_public_call_with_gradients(seed: int) -> None:
    from test_attention_fuzz import check as check_public

    check_public(seed, "triton", most=65)


@pytest.mark.parametrize("name", OPS)
def test_signature_is_the_schema(name: str) -> None:
    text = SCHEMAS[name]
    names = [part.split()[-1] for part in text[1 : text.index(")")].split(",")]
    assert list(inspect.signature(attention.KERNELS[name]).parameters) == names


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = draw(name, 3, FP32, lengths=(33,), dims=(16,))
    monkeypatch.undo()  # opcheck compares runs bit by bit, and poisoned empty results never equal themselves
    torch.library.opcheck(_registry.op("maskaccel_triton", name), args, test_utils=("test_schema", "test_faketensor"))


BAD = [
    ("q", lambda t: t.double(), "q must be (B, S, H, D) of fp32, bf16 or fp16, got torch.float64"),
    ("q", lambda t: t.transpose(2, 3), "q must be contiguous in its last dim"),
    ("q", lambda t: t[..., :20], "the head dim must be a multiple of 8 from 16 to 256, got 20"),
    ("k", lambda t: t.half(), "k must be torch.float32 on cpu, got torch.float16"),
    ("k", lambda t: t[:, :, [0, 1, 1]], "k must be (1, Sk, a divisor of 2, 24), got (1, 200, 3, 24)"),
    ("v", lambda t: t[:, :-1], "v must have shape (1, 200, 2, 24), got (1, 199, 2, 24)"),
    ("index", lambda _: None, "index, count and order must all be given or all be None"),
    ("index", lambda t: t.long(), "index must be contiguous torch.int32"),
    ("count", lambda t: t[:, :, :1], "count must be contiguous torch.int32 (1, 1, 2, 2)"),
    ("order", lambda t: t[:-1], "order must be contiguous torch.int32 (2,)"),
    ("pattern_of", lambda _: torch.zeros(1, 1, 2, 2, dtype=torch.int32), "pattern_of and patterns must both"),
    ("bias", lambda _: torch.zeros(1, 2, 200), "bias must be (1, 2, 200, 200), each dim full or 1, got (1, 2, 200)"),
    ("bias", lambda _: torch.zeros(1, 2, 1, 1).half(), "bias must be torch.float32 or fp32"),
    ("relpos_q", lambda _: torch.zeros(1, 200, dtype=torch.int32), "relpos_table, relpos_q and relpos_k must all"),
    ("reference_lse", lambda _: torch.zeros(1, 2, 199), "reference_lse must be contiguous torch.float32 (1, 2, 200)"),
    ("out_scale", lambda _: torch.zeros(2, 200), "out_scale must be (1, 2, 200), each dim full or 1, got (2, 200)"),
    ("out_add", lambda _: torch.zeros(1, 200, 2, 16), "out_add must have shape (1, 200, 2, 24), got (1, 200, 2, 16)"),
    ("bm", lambda _: 24, "bm must be a multiple of 16 and bn of 32, got 24 and 128"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "message"), BAD, ids=[f"{i}-{case[0]}" for i, case in enumerate(BAD)])
def test_broken_contract_raises(name: str, spoil, message: str) -> None:
    qkv, lists, end = small()
    names = list(inspect.signature(forward).parameters)
    call = dict(zip(names, (*qkv, *lists, *NONE7, *end, 0.0, 0), strict=True))
    call[name] = spoil(call[name])
    with pytest.raises(RuntimeError) as caught:
        forward(**call)
    assert message in str(caught.value)


@pytest.mark.parametrize("seed", range(24))
def test_random_public_calls(seed: int) -> None:
    """The cases of the CPU kernels' fuzz, forward and backward."""
    check_call(seed, "triton", most=64)
