"""Every Triton kernel of the adaLN ops against the fp64 reference, run by `test_triton_kernels.py`, interpreted."""

from __future__ import annotations

import inspect
import random
import re

import pytest
import torch
from _numerics import assert_all_close_to_truth
from _triton_cases import BF16, DTYPES, FP16, FP32, Case, as_tuple, double, poisoned_memory  # noqa: F401
from torch import Tensor

import maskaccel
from maskaccel.ops import _registry, _triton
from maskaccel.ops.adaln import fallback, schema
from maskaccel.ops.adaln import triton as adaln

ALL_NEEDS = (1 << 10) - 1
GATE_NEEDS = schema.NEED_A | schema.NEED_GATE | schema.NEED_POST
adaln.register()


def check(name: str, *args: object) -> tuple[Tensor, ...]:
    """Run an adaLN op by Triton, plain torch and in fp64; apply the error rule to every result."""
    got = as_tuple(adaln.KERNELS[name](*args))
    plain = as_tuple(fallback.KERNELS[name](*args))
    truth = as_tuple(fallback.KERNELS[name](*map(double, args)))
    assert_all_close_to_truth(got, plain, [t.double() for t in truth], what=name)
    assert all(t.is_contiguous() for t in got)
    return got


def whole(case: Case, *, norm: int = 0, flags: int = 0, layout: str = "dense", gate: str | None = "BD",
          scale: str | None = "BD", shift: str | None = "BD", scale2: str | None = None, shift2: str | None = None,
          rows: str | None = None, tables: tuple[bool, bool, bool] = (False, False, False), weight: bool = False,
          bias: bool = False, post: bool = False,
          weight_dtype: torch.dtype | None = None, offset: float = 1.0, needs: int = ALL_NEEDS,
          fused_only: bool = True) -> None:  # fmt: skip
    """Gated residual with norm and modulation, forward and backward; the other two op families are parts of it."""
    flags |= norm
    x, a = case.x(layout), case.x()
    mods = [case.mod("rows" if rows and form else form) for form in (gate, scale, shift, scale2, shift2)]
    index = case.rows(rows)
    gate_table, scale_table, shift_table = (case.table(t) for t in tables)
    w, b, pw = (case.vector(v, weight_dtype) for v in (weight, bias, post))
    g, *scale_shift, s2, b2 = mods
    pair = (s2, b2) if s2 is not None or b2 is not None else ()
    suffix = "_pair" if pair else ""
    rest = (w, b, scale_table, shift_table, index)
    gating = (g, gate_table, pw)
    out = check("gate_residual_norm_modulate" + suffix, x, a, *gating, *scale_shift, *pair, *rest, 1e-6, 1e-5, offset,
                flags)  # fmt: skip
    r = case.x() if flags & schema.CLIP else out[0]
    dy, dr = case.x(), case.x(layout)
    dy2 = case.x() if pair else None
    check("gate_residual_norm_modulate_backward", dr, dy, dy2, r, a, *gating, *scale_shift, s2, b2, *rest, 1e-6, 1e-5,
          offset, flags, needs | schema.NEED_X | schema.NEED_A)  # fmt: skip
    if fused_only:
        return
    check("norm_modulate" + suffix, x, *scale_shift, *pair, *rest, 1e-6, offset, flags)
    check("gate_residual", x, a, *gating, index, 1e-5, flags)
    # plain torch cannot differentiate with respect to nothing
    if needs & ~GATE_NEEDS:
        check("norm_modulate_backward", dy, dy2, x, *scale_shift, s2, b2, *rest, 1e-6, offset, flags, needs)
    if needs & GATE_NEEDS:
        check("gate_residual_backward", dr, a, *gating, index, 1e-5, flags, needs)


NARROW = schema.LAWS["narrow"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", [0, NARROW])
@pytest.mark.parametrize("norm", [0, 1, 2])
def test_norms_and_laws(norm: int, law: int, dtype: torch.dtype) -> None:
    whole(Case(norm, dtype, (2, 2, 40)), norm=norm, flags=law, weight=True, bias=True, fused_only=law == 0)


@pytest.mark.parametrize("law", [0, NARROW])
@pytest.mark.parametrize("norm", [0, 1])
def test_weight_offset_of_each_weight_dtype(norm: int, law: int) -> None:
    for dtype in (BF16, FP32):
        whole(Case(1, BF16, (1, 2, 24)), norm=norm, flags=law | schema.WEIGHT_PLUS_ONE | 64, weight=True, post=True,
              weight_dtype=dtype)  # fmt: skip


@pytest.mark.parametrize("law", [0, NARROW])
@pytest.mark.parametrize("act", sorted(schema.GATE_ACTS))
def test_gate_activations(act: str, law: int) -> None:
    for dtype, mod_dtype in ((FP32, FP32), (BF16, BF16), (BF16, FP32)):
        whole(Case(3, dtype, (2, 2, 40), mod_dtype), flags=schema.GATE_ACTS[act] | law, tables=(True, False, False))


def test_tanh_keeps_the_digits_of_small_gates() -> None:
    gate = torch.logspace(-8, 1.5, 96)[None] * torch.tensor([1.0, -1.0]).repeat(48)
    x, a = torch.zeros(1, 1, 96), torch.ones(1, 1, 96)
    out = adaln.KERNELS["gate_residual"](x, a, gate, None, None, None, 1e-6, schema.GATE_ACTS["tanh"])
    truth = gate.double().tanh()
    assert ((out[0] - truth) / truth).abs().max() < 4e-7


@pytest.mark.parametrize("law", [0, NARROW])
@pytest.mark.parametrize("post", ["rms", "layer"])
def test_post_norms(post: str, law: int) -> None:
    for dtype, with_weight in ((FP32, True), (BF16, True), (BF16, False)):
        whole(Case(4, dtype, (1, 2, 24)), norm=1, flags=schema.POST_NORMS[post] | law, post=with_weight, weight=True)


@pytest.mark.parametrize("form", ["BD", "1D", "B1D", "BFD", "1FD", "BND", "1ND", "chunk", "chunk3", "expanded"])
def test_modulation_forms(form: str) -> None:
    whole(Case(5, FP32, (2, 4, 24)), gate=form, scale=form, shift=form)
    whole(Case(6, BF16, (3, 2, 24), FP32), flags=NARROW, gate=form, scale="BD", shift=form, scale2="1FD", shift2=form,
          weight=True)  # fmt: skip


@pytest.mark.parametrize("rows", ["N", "BN"])
def test_indexed_rows(rows: str) -> None:
    whole(Case(7, FP32, (2, 3, 24)), rows=rows, tables=(True, True, True), weight=True, bias=True, fused_only=False)
    whole(Case(8, BF16, (2, 3, 24)), rows=rows, flags=NARROW, scale2="BD", shift2="BD")
    # a table without its tensor is shared by all tokens, also beside indexed operands
    whole(Case(8, FP32, (2, 3, 24)), rows=rows, gate=None, shift=None, tables=(True, False, True))


def test_tables() -> None:
    for law in (0, NARROW):
        whole(Case(9, BF16, (2, 4, 40)), flags=law, tables=(True, True, True), scale="BFD", shift="B1D")
        whole(Case(9, BF16, (2, 4, 40)), flags=law, tables=(True, True, True), gate=None, scale=None, shift=None)


def test_missing_operands() -> None:
    for seed, (gate, scale, shift) in enumerate([(None, None, None), (None, "BD", None), ("BD", None, "BD")]):
        whole(Case(seed, FP32, (2, 2, 24)), gate=gate, scale=scale, shift=shift)
    whole(Case(10, BF16, (2, 4, 24)), scale=None, scale2=None, shift2="BD", flags=NARROW, fused_only=False)
    whole(Case(10, BF16, (2, 4, 24)), scale="BD", shift="BD", scale2="B1D", offset=0.0)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_strides(layout: str) -> None:
    for dtype in (FP32, BF16):
        whole(Case(11, dtype, (2, 3, 40)), layout=layout, scale2="BD", shift2="BND", fused_only=dtype == BF16)


@pytest.mark.parametrize("width", [1, 2, 7, 31, 33, 130])
def test_widths(width: int) -> None:
    # one or two elements normalise to 0 or +-1: the gradient would be nothing but rounding
    for norm in (0, 1) if width > 2 else (1,):
        whole(Case(12, FP32, (1, 2, width)), norm=norm, weight=True, bias=True, flags=64 if width > 2 else 0, post=True)


def test_post_weight_without_post_norm() -> None:
    whole(Case(13, FP32, (1, 2, 24)), post=True, fused_only=False)
    whole(Case(13, FP32, (0, 2, 24)), post=True, fused_only=False)


@pytest.mark.parametrize("shape", [(1, 1, 24), (1, 21, 24), (3, 9, 24), (2, 20, 24)])
def test_reductions_over_several_programs(shape: tuple[int, int, int]) -> None:
    """Runs with ragged tails, gradients that sum over the batch, and groups of a length that runs do not divide."""
    case = Case(13, FP32, shape)
    batch, tokens, width = shape
    groups = {20: 2, 9: 9, 21: 1, 1: 1}[tokens]
    scale, shift = case.normal(1, groups, width), case.normal(batch, groups, width)
    w = case.vector()
    tail = (None, None, None, 1e-6, 1e-5, 1.0, 1 | 64, ALL_NEEDS)
    check("gate_residual_norm_modulate_backward", case.x(), case.x(), None, case.x(), case.x(), case.mod("1D"), None, w,
          scale, shift, None, None, w, w, *tail)  # fmt: skip
    check("norm_modulate_backward", case.x(), None, case.x(), case.mod("1ND"), shift, None, None, w, *(None,) * 4, 1e-6,
          1.0, 0, ALL_NEEDS)  # fmt: skip


def test_clip() -> None:
    for law in (0, NARROW):
        x = torch.tensor([6e4, -6e4, 1.0, float("nan")], dtype=FP16).expand(1, 2, 4)
        args = (x, x, None, None, None, None, 1e-6, law | schema.CLIP | 2)
        got, plain = adaln.KERNELS["gate_residual"](*args), fallback.KERNELS["gate_residual"](*args)
        torch.testing.assert_close(got, plain, rtol=0, atol=0, equal_nan=True)
        assert got[0, 0, 0] == 65504.0
    whole(Case(14, FP16, (1, 3, 24)), flags=schema.CLIP)


def test_no_residual() -> None:
    case = Case(15, BF16, (2, 3, 24))
    args = (case.x(), case.x(), case.mod("BD"), None, None, case.mod("BD"), case.mod("BD"), *(None,) * 5, 1e-6, 1e-6,
            1.0)  # fmt: skip
    r, y = adaln.KERNELS["gate_residual_norm_modulate"](*args, schema.NO_RESIDUAL)
    assert r.numel() == 0
    assert torch.equal(y, adaln.KERNELS["gate_residual_norm_modulate"](*args, 0)[1])


@pytest.mark.parametrize("bit", range(10))
def test_each_gradient_alone(bit: int) -> None:
    whole(Case(16, FP32, (2, 2, 24)), norm=1, flags=64, scale2="BD", shift2="BND", weight=True, bias=True,
          post=True, needs=1 << bit, fused_only=False)  # fmt: skip


def test_gradient_of_y_alone() -> None:
    case = Case(17, BF16, (2, 3, 24))
    check("gate_residual_norm_modulate_backward", None, case.x(), None, case.x(), case.x(), case.mod("BD"), None, None,
          case.mod("BD"), case.mod("BD"), *(None,) * 7, 1e-6, 1e-6, 1.0, 0, ALL_NEEDS)  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_random_combinations(seed: int) -> None:
    pick = random.Random(seed)
    dtype = pick.choice(DTYPES)
    shape = (pick.choice([1, 2, 3]), pick.choice([2, 4]), pick.choice([8, 24, 33, 48]))
    forms = [None, "BD", "1D", "B1D", "BFD", "1FD", "BND", "1ND", "chunk", "chunk3"]
    coin = lambda: pick.random() < 0.4  # noqa: E731
    whole(
        Case(seed, dtype, shape, pick.choice([dtype, FP32])), norm=pick.choice([0, 1, 2]),
        flags=pick.choice([0, NARROW]) | pick.choice([0, 8]) | pick.choice([0, 16, 32, 48]) | pick.choice([0, 64, 128]),
        layout=pick.choice(["dense", "sliced", "transposed", "expanded"]), gate=pick.choice(forms),
        scale=pick.choice(forms), shift=pick.choice(forms), scale2=pick.choice(forms), shift2=pick.choice(forms),
        rows=pick.choice([None, None, "N", "BN"]), tables=(coin(), coin(), coin()), weight=coin(), bias=coin(),
        post=coin(), weight_dtype=pick.choice([dtype, FP32]), offset=pick.choice([0.0, 1.0]), fused_only=False,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 4, 24), (2, 0, 24), (0, 0, 24)])
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    case = Case(18, BF16, shape)
    whole(case, gate="B1D", scale="BD", shift="1D", weight=True, bias=True, post=True, flags=64, fused_only=False)
    q = case.normal(*shape[:2], 2, 24)
    weight = case.vector()
    check("qk_norm_rope", q, q, weight, weight, None, None, None, None, None, 1e-6, 1)
    check("qk_norm_rope_backward", q, q, q, q, weight, weight, None, None, None, None, None, 1e-6, 1, 63)


# --------------------------------------------------------------------------------------------- QK norm and RoPE
HALF, ACROSS = schema.ROPE_HALF, schema.ACROSS_HEADS


def rope_case(seed: int, dtype: torch.dtype, flags: int, *, shape: tuple[int, ...] = (2, 2, 3, 2, 12),
              table: str | None = "ST",
              full: bool = False, table_dtype: torch.dtype = FP32, positions: str | None = None, weights: bool = True,
              bias: bool = False, weight_dtype: torch.dtype | None = None, keys: int | None = None, eps: float = 1e-6,
              needs: int = 63) -> None:  # fmt: skip
    """qk_norm_rope and its backward; shape is (B, S, heads of q, heads of k, head dim)."""
    batch, tokens, heads, k_heads, width = shape
    case = Case(seed, dtype, (batch, tokens, width))
    fused = case.normal(batch, tokens, heads + k_heads, width)  # q and k as views of one projection
    q, k = fused[:, :, :heads], fused[:, :, heads:]
    if keys is not None:
        k = case.normal(batch, keys, k_heads, width)
    of = [w * width if flags & ACROSS else width for w in (heads, k_heads)]
    vectors = [case.normal(n, dtype=weight_dtype) if wanted else None for wanted in (weights, bias) for n in of]
    cos = sin = index = None
    if table is not None:
        length = tokens if positions is None else tokens + 3
        last = width if full else width // 2
        lead = {"ST": (length,), "1ST": (1, length), "BST": (batch, length), "BS1T": (batch, length, 1),
                "1SHT": (1, length, heads), "BSHT": (batch, length, heads)}[table]  # fmt: skip
        both = case.normal(*lead, last, 2, dtype=table_dtype)  # as the real view of a complex table
        cos, sin = both[..., 0], both[..., 1]
        if positions is not None:
            at = (tokens,) if positions == "S" else (batch, tokens)
            index = torch.randint(0, length, at, generator=case.g, dtype=torch.int32)
    tail = (cos, sin, index, eps, flags)
    got = check("qk_norm_rope", q, k, *vectors, *tail)
    dq, dk = (case.normal(*t.shape) for t in got)
    check("qk_norm_rope_backward", dq, dk, q, k, *vectors, *tail, needs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", [0, HALF])
@pytest.mark.parametrize("norm", [0, 1, 2])
def test_qk_norm_rope(norm: int, half: int, dtype: torch.dtype) -> None:
    for law in (0, NARROW):
        rope_case(20, dtype, norm | half | law, bias=norm == 0)
    rope_case(21, dtype, norm | half | NARROW | ACROSS, bias=True)


@pytest.mark.parametrize("half", [0, HALF])
@pytest.mark.parametrize("table", ["ST", "1ST", "BST", "BS1T", "1SHT", "BSHT", None])
def test_rope_tables(table: str | None, half: int) -> None:
    for full in (False, True):
        shape = (2, 2, 3, 3, 12) if table in ("1SHT", "BSHT") else (2, 2, 3, 1, 12)
        dtype = BF16 if full else FP32
        rope_case(22, dtype, 1 | half, table=table, full=full, shape=shape, table_dtype=dtype)


@pytest.mark.parametrize("positions", ["S", "BS"])
def test_rope_positions(positions: str) -> None:
    for table in ("ST", "BST", "BSHT"):
        rope_case(24, FP32, 1, table=table, positions=positions, shape=(2, 2, 3, 3, 8))


@pytest.mark.parametrize("width", [1, 2, 6, 24, 64, 72])
def test_head_dims(width: int) -> None:
    table = None if width % 2 else "ST"
    for flags in (1, HALF | 1, ACROSS):
        rope_case(25, FP32, flags, shape=(1, 2, 2, 5, width), table=table, bias=width > 1)


def test_qk_options() -> None:
    rope_case(26, BF16, 1 | schema.WEIGHT_PLUS_ONE | NARROW, weight_dtype=FP32)
    rope_case(27, BF16, 1 | schema.WEIGHT_PLUS_ONE | NARROW)
    rope_case(28, FP32, 1, weights=False)
    rope_case(29, FP32, 1, table=None, keys=9)  # keys of another length
    rope_case(30, FP32, 1, eps=0.0, shape=(1, 3, 3, 5, 12))  # heads that pad the tile divide 0 by 0
    rope_case(31, FP32, ACROSS, shape=(2, 5, 3, 1, 6), bias=True)  # several programs, ragged tail
    rope_case(32, FP32, 1, shape=(3, 7, 1, 1, 6), bias=True)
    for bit in range(6):
        rope_case(33, FP32, 1, bias=True, needs=1 << bit)


# --------------------------------------------------------------------------------------------------- activations
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [0, 1, 2, 4, 5])
def test_gated_activation(flags: int, dtype: torch.dtype) -> None:
    for width in (2, 34, 2060):
        case = Case(40, dtype, (1, 3, width))
        x = (3 * case.normal(3, width + 6))[:, 2 : width + 2]
        y = check("gated_activation", x, flags)[0]
        check("gated_activation_backward", case.normal(*y.shape), x, flags)
    check("gated_activation", x[:0], flags)
    check("gated_activation_backward", y[:0], x[:0], flags)
    x = case.normal(2, 3, 34 + 6)[..., 2:36]
    y = check("gated_activation", x, flags)[0]
    check("gated_activation_backward", case.normal(*y.shape), x, flags)
    with pytest.raises(RuntimeError):
        adaln.KERNELS["gated_activation"](x.transpose(0, 1), flags)


# ------------------------------------------------------------------------------------------- contract and wiring
@pytest.mark.parametrize("name", sorted(schema.SCHEMAS))
def test_signature_is_the_schema(name: str) -> None:
    text = schema.SCHEMAS[name]
    wanted = [part.split()[-1] for part in text[1 : text.index(")")].split(",")]
    assert list(inspect.signature(adaln.KERNELS[name]).parameters) == wanted


def _opcheck_arguments() -> dict[str, tuple]:
    case = Case(60, BF16, (2, 2, 24))
    x, m, g, w = case.x(), case.mod("BFD"), case.mod("B1D"), case.vector()
    q, cos = case.normal(1, 2, 3, 8), case.normal(2, 4)
    norm = (w, None, case.table(), None, None)
    wide = case.normal(4, 48)
    weights = case.normal(8)
    return {
        "norm_modulate": (x, m, g, *norm, 1e-6, 1.0, 0),
        "norm_modulate_pair": (x, m, g, g, m, *norm, 1e-6, 1.0, 1),
        "norm_modulate_backward": (x, x, x, m, g, g, m, *norm, 1e-6, 1.0, 0, ALL_NEEDS),
        "gate_residual": (x, x, g, None, w, None, 1e-6, 64),
        "gate_residual_backward": (x, x, g, None, w, None, 1e-6, 64, ALL_NEEDS),
        "gate_residual_norm_modulate": (x, x, g, None, w, m, g, *norm, 1e-6, 1e-6, 1.0, 64),
        "gate_residual_norm_modulate_pair": (x, x, g, None, w, m, g, m, g, *norm, 1e-6, 1e-6, 1.0,
                                             64 | schema.NO_RESIDUAL),
        "gate_residual_norm_modulate_backward": (x, x, x, x, x, g, None, w, m, g, m, g, *norm, 1e-6, 1e-6, 1.0, 64,
                                                 ALL_NEEDS),
        "qk_norm_rope": (q, q, weights, weights, None, None, cos, cos, None, 1e-6, 1),
        "qk_norm_rope_backward": (q, q, q, q, weights, weights, None, None, cos, cos, None, 1e-6, 1, 63),
        "gated_activation": (wide, 0),
        "gated_activation_backward": (wide[:, :24].contiguous(), wide, 0),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(schema.SCHEMAS))
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # opcheck compares runs bit by bit, and poisoned empty results never equal themselves
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(_registry.op("maskaccel_triton", name), _opcheck_arguments()[name], test_utils=tests)


BAD = [
    (("x", 0), lambda x: x.double(), "x must be fp32"),
    (("x", 0), lambda x: x[0], "x must have 3 dims"),
    (("x", 0), lambda x: x.transpose(1, 2), "contiguous in its last dim"),
    (("scale", 1), lambda m: m[..., :-1], "scale must end in 24"),
    (("scale", 1), lambda m: m.to(FP16), "scale must be"),
    (("scale", 1), lambda m: m.to(FP32), "one dtype"),
    (("scale", 1), lambda m: m[:, :1].expand(-1, 4, -1), "row count that divides 2"),
    (("shift", 2), lambda m: m.expand(2, 1, 24)[[0, 1, 0]], "batch 1 or 2"),
    (("weight", 3), lambda w: w[:-1], "weight must be contiguous"),
    (("rows", 7), lambda _: torch.zeros(5, dtype=torch.int32), "rows must be"),
    (("rows", 7), lambda _: torch.zeros(2, dtype=torch.int64), "rows must be contiguous int32"),
]


@pytest.mark.parametrize(("where", "spoil", "message"), BAD)
def test_broken_contract_raises(where: tuple[str, int], spoil, message: str) -> None:
    args = list(_opcheck_arguments()["norm_modulate"])
    args[where[1]] = spoil(args[where[1]])
    with pytest.raises(RuntimeError, match=re.escape(message)):
        adaln.KERNELS["norm_modulate"](*args)


def test_runs_cover_every_row_once() -> None:
    for segment in (1, 7, 8, 9, 100, 4096, 4608):
        for batch in (1, 3, 8):
            run, count = _triton.runs(batch * segment, segment)
            assert (count - 1) * run < segment <= count * run


def test_public_api_with_gradients() -> None:
    case = Case(70, FP32, (2, 6, 24))
    leaves = [t.requires_grad_() for t in (case.x(), case.x(), case.mod("BD"), case.mod("BFD"), case.mod("B1D"))]
    results = []
    for backend in ("triton", "reference"):
        r, y = maskaccel.ops.gate_residual_norm_modulate(*leaves, norm="rms", gate_act="tanh", backend=backend)
        results.append((r, y, *torch.autograd.grad((r * y).sum(), leaves)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
