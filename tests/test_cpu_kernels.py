"""The CPU kernels, forward, against the fp64 reference: every op, flag, shape and layout of the contract."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _cpu_cases import (
    DTYPES,
    FORMS,
    GATES,
    OPTIONS,
    RAW,
    B,
    D,
    N,
    double,
    fill,
    modulations,
    norm_flags,
    qk_flags,
    randn,
    raw_grnm,
    raw_norm_modulate,
    row_index,
    tables,
    three,
)  # fmt: skip
from _numerics import assert_all_close_to_truth, assert_close_to_truth
from _raw_cases import BARE, bare_differs, whole_of

from maskaccel._native import native
from maskaccel.ops.adaln import reference, schema
from maskaccel.ops.steps import reference as steps_reference

pytestmark = pytest.mark.skipif(not native.has_cpu, reason=f"native library {native.state}: {native.reason}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forward_modulation_forms(form, dtype):
    x, a = randn(B, N, D, dtype=dtype) + 0.5, randn(B, N, D, dtype=dtype, seed=1)
    for mod_dtype, law in itertools.product({dtype, torch.float32}, ("fp32", "narrow")):
        gate, scale, shift, scale2, shift2 = modulations(form, 5, mod_dtype)
        rows = row_index(form)
        kwargs = {"rows": rows, "law": law}
        got = raw_norm_modulate(x, scale, shift, **kwargs)
        assert_all_close_to_truth(got, *three(reference.norm_modulate, x, scale, shift, **kwargs), what="norm_modulate")
        pair = kwargs | {"scale2": scale2, "shift2": shift2}
        got = raw_norm_modulate(x, scale, shift, **pair)
        assert_all_close_to_truth(got, *three(reference.norm_modulate, x, scale, shift, **pair), what="pair")
        args = (x, a, gate, scale, shift)
        got = raw_grnm(*args, post_eps=1e-6, **kwargs)
        assert_all_close_to_truth(got, *three(reference.gate_residual_norm_modulate, *args, **kwargs), what="fused")
        got = raw_grnm(*args, post_eps=1e-6, **pair)
        assert_all_close_to_truth(got, *three(reference.gate_residual_norm_modulate, *args, **pair), what="fused pair")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("law", ["fp32", "narrow"])
def test_forward_options(law, dtype):
    x, a = randn(B, N, D, dtype=dtype) + 0.5, randn(B, N, D, dtype=dtype, seed=1) * 2
    gate, scale, shift = modulations("sample", 3, dtype)
    for options in OPTIONS:
        kwargs = fill(options, dtype) | {"law": law}
        for s, b in ((scale, shift), (scale, None), (None, shift), (None, None)):
            got = raw_norm_modulate(x, s, b, **kwargs)
            assert_all_close_to_truth(got, *three(reference.norm_modulate, x, s, b, **kwargs), what=str(options))
        got = raw_grnm(x, a, gate, scale, shift, post_eps=1e-6, **(kwargs | {"eps": 1e-6}))
        want = three(reference.gate_residual_norm_modulate, x, a, gate, scale, shift, **(kwargs | {"eps": 1e-6}))
        assert_all_close_to_truth(got, *want, what=f"fused {options}")
    for options in GATES:
        kwargs = fill(options, dtype) | {"law": law}
        for g in (gate, None):
            got = raw_grnm(x, a, g, scale, shift, post_eps=1e-5, **kwargs)
            want = three(reference.gate_residual_norm_modulate, x, a, g, scale, shift, post_eps=1e-5, **kwargs)
            assert_all_close_to_truth(got, *want, what=f"fused {options}")
            end = (kwargs.get("post_weight"), None, 1e-5,
                   norm_flags("none", law, kwargs.get("weight_offset"), kwargs.get("gate_act", "none"),
                              kwargs.get("post_norm"), kwargs.get("clip", False)))  # fmt: skip
            got = RAW.gate_residual(x, a, g, kwargs.get("gate_table"), *end)
            want = three(reference.gate_residual, x, a, g, post_eps=1e-5, **kwargs)
            assert_all_close_to_truth((got,), *want, what=f"gate_residual {options}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 2, 7, 16, 31, 64, 100, 127, 1152, 3072, 4097])
def test_forward_widths(d, dtype):
    x, a = randn(B, N, d, dtype=dtype, seed=d), randn(B, N, d, dtype=dtype, seed=1)
    gate, scale, shift = modulations("frame", 3, dtype, d)
    for law in ("fp32", "narrow"):
        got = raw_grnm(x, a, gate, scale, shift, law=law, eps=1e-3)
        want = three(reference.gate_residual_norm_modulate, x, a, gate, scale, shift, law=law, eps=1e-3)
        assert_all_close_to_truth(got, *want, what=law)
        got = raw_norm_modulate(x, scale, shift, norm="rms", law=law)
        assert_all_close_to_truth(got, *three(reference.norm_modulate, x, scale, shift, norm="rms", law=law), what=law)


def test_forward_large_mean_keeps_its_accuracy():
    x = randn(1, 64, 1152) * 0.1 + 100.0
    got = raw_norm_modulate(x)
    assert_all_close_to_truth(got, *three(reference.norm_modulate, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_results_past_the_cache(dtype):
    x, a = randn(1, 2048, 1152, dtype=dtype), randn(1, 2048, 1152, dtype=dtype, seed=1)
    gate, scale, shift = randn(1, 3 * 1152, dtype=dtype, seed=2).chunk(3, -1)
    got = raw_grnm(x, a, gate, scale, shift)
    want = three(reference.gate_residual_norm_modulate, x, a, gate, scale, shift)
    assert_all_close_to_truth(got, *want)


def strided(t):
    """The same values as a slice of a wider, batch-last tensor."""
    b, n, d = t.shape
    wide = torch.full((n, b, d + 5), float("nan"), dtype=t.dtype)
    wide[..., 2 : 2 + d] = t.transpose(0, 1)
    return wide[..., 2 : 2 + d].transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_strided_inputs_are_read_in_place(dtype):
    x, a = randn(B, N, D, dtype=dtype), randn(B, N, D, dtype=dtype, seed=1)
    gate, scale, shift = modulations("token", 3, dtype)
    plain = raw_grnm(x, a, gate, scale, shift)
    got = raw_grnm(strided(x), strided(a), strided(gate), strided(scale), strided(shift))
    for g, p in zip(got, plain, strict=True):
        assert torch.equal(g, p)
        assert g.is_contiguous()


def test_forward_without_residual():
    x, a = randn(B, N, D), randn(B, N, D, seed=1)
    args = (x, a, None, None, None, None, None, None, None, None, None, None, 1e-6, 1e-6, 1.0)
    r, y = RAW.gate_residual_norm_modulate(*args, schema.NO_RESIDUAL)
    assert r.shape == (0,)
    assert torch.equal(y, RAW.gate_residual_norm_modulate(*args, 0)[1])


def test_forward_non_finite_values_stay_in_their_row():
    x = randn(1, 3, D)
    x[0, 1, 5] = float("nan")
    y = RAW.norm_modulate(x.bfloat16(), None, None, None, None, None, None, None, 1e-6, 1.0, 0)
    assert torch.isnan(y[0, 1]).all()
    assert torch.isfinite(y[0, [0, 2]]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_forward_and_backward_of_nothing(shape, dtype):
    x = torch.empty(shape, dtype=dtype)
    scale = torch.ones(shape[0], 8, dtype=dtype)
    (y,) = raw_norm_modulate(x, scale, scale)
    assert y.shape == shape
    r, y = raw_grnm(x, x, scale, scale, scale)
    assert r.shape == y.shape == shape
    weight = torch.ones(8, dtype=dtype)
    grads = RAW.norm_modulate_backward(
        x, None, x, scale, scale, None, None, weight, weight, None, None, None, 1e-6, 1.0, 0, 1023
    )
    assert grads[0].shape == shape
    assert all(not g.any() for g in grads)
    assert grads[5].shape == (8,)
    q = torch.empty(*shape[:2], 3, 8, dtype=dtype)
    assert RAW.qk_norm_rope(q, q, weight, weight, None, None, None, None, None, 1e-6, 1)[1].shape == q.shape
    wide = torch.ones(8, dtype=torch.float32)
    grads = RAW.qk_norm_rope_backward(q, q, q, q, wide, wide, None, None, None, None, None, 1e-6, 1, 63)
    assert not grads[2].any()
    assert grads[2].shape == (8,)
    assert RAW.gated_activation(torch.empty(0, 8, dtype=dtype), 0).shape == (0, 4)
    assert RAW.gated_activation(torch.empty(2, 0, 3, 8, dtype=dtype), 0).shape == (2, 0, 3, 4)


# ---------------------------------------------------------------------------------------------- QK norm and RoPE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dh", [64, 72, 128, 6])
@pytest.mark.parametrize("rope", ["interleaved", "half"])
def test_forward_qk_norm_rope(rope, dh, dtype):
    s, heads = 9, 3
    q, k = randn(B, s, heads, dh, dtype=dtype), randn(B, s, heads, dh, dtype=dtype, seed=1)
    positions = torch.randperm(s, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    for kind, norm, law, across, at in itertools.product(
        ("pair", "element", "batch", "head", "one_head", "complex"), ("rms", "layer", "none"), ("fp32", "narrow"),
        (False, True), (None, positions),
    ):  # fmt: skip
        size = heads * dh if across else dh
        table_dtype = torch.float32 if kind in ("element", "complex") else dtype
        cos, sin = tables(kind, s, heads, dh, table_dtype, B)
        weights = [randn(size, dtype=dtype, seed=i) + 1 for i in range(2)]
        biases = [randn(size, dtype=dtype, seed=5 + i) for i in range(2)] if norm == "layer" else [None, None]
        kwargs = {"norm": norm, "across_heads": across, "rope": rope, "positions": at, "eps": 1e-6, "law": law,
                  "q_bias": biases[0], "k_bias": biases[1]}  # fmt: skip
        got = RAW.qk_norm_rope(q, k, *weights, *biases, cos, sin, at, 1e-6, qk_flags(norm, law, across, rope))
        want = three(reference.qk_norm_rope, q, k, *weights, cos, sin, **kwargs)
        assert_all_close_to_truth(got, *want, what=f"{kind} {norm} {law} {across} {at is not None}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_qk_layouts(dtype):
    packed = randn(B, 10, 3, 4, 64, dtype=dtype)
    q, k = packed[:, :, 0], packed[:, :, 1]
    cos, sin = tables("pair", 10, 4, 64, torch.float32)
    flags = qk_flags("rms", "fp32", False, "interleaved")
    got = RAW.qk_norm_rope(q, k, None, None, None, None, cos, sin, None, 1e-6, flags)
    want = RAW.qk_norm_rope(q.contiguous(), k.contiguous(), None, None, None, None, cos, sin, None, 1e-6, flags)
    assert all(torch.equal(g, w) and g.is_contiguous() for g, w in zip(got, want, strict=True))
    grouped, short = randn(B, 10, 2, 64, dtype=dtype, seed=3), randn(B, 7, 1, 64, dtype=dtype, seed=4)
    got = RAW.qk_norm_rope(q, grouped, None, None, None, None, cos, sin, None, 1e-6, flags)
    assert_all_close_to_truth(got, *three(reference.qk_norm_rope, q, grouped, None, None, cos, sin))
    got = RAW.qk_norm_rope(q, short, None, None, None, None, None, None, None, 1e-6, flags)
    assert_all_close_to_truth(got, *three(reference.qk_norm_rope, q, short))
    at = torch.randint(0, 10, (B, 10), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    got = RAW.qk_norm_rope(q, k, None, None, None, None, cos, sin, at, 1e-6, flags)
    assert_all_close_to_truth(got, *three(reference.qk_norm_rope, q, k, None, None, cos, sin, positions=at))


# ------------------------------------------------------------------------------------------ activations and steps
def test_activation_of_any_rank_reads_rows_of_one_stride_in_place():
    whole, grad = randn(2, 3, 4, 100), randn(2, 3, 4, 40, seed=1)
    for view in (lambda t: t, lambda t: t[0, 1], lambda t: t[:, :1, :1], lambda t: t[..., 1, :], lambda t: t[1, 2, 3]):
        x, dy = view(whole)[..., 3:67], view(grad)[..., 2:34]
        got, back = RAW.gated_activation(x, 0), RAW.gated_activation_backward(dy, x, 0)
        assert got.shape == dy.shape
        assert torch.equal(got, RAW.gated_activation(x.contiguous(), 0))
        assert torch.equal(back, RAW.gated_activation_backward(dy.contiguous(), x.contiguous(), 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_base", [False, True])
def test_forward_relative_difference(with_base, dtype):
    x, reference_, base = (randn(3, 77, 300, dtype=dtype, seed=i) for i in range(3))
    base = base if with_base else None
    got = RAW.relative_difference(x, reference_, base)
    want = steps_reference.relative_difference(x.double(), reference_.double(), base=double(base))
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_combine_history(dtype):
    history = randn(5, B, N, D, dtype=dtype)[::2]
    x, gate = randn(B, N, D, dtype=dtype, seed=1), randn(B, 3, D, dtype=dtype, seed=2)
    for weights, with_x, with_gate in itertools.product((randn(3), randn(3, D)), (x, None), (gate, None)):
        got = RAW.combine_history(history, weights, with_x, with_gate)
        summed = torch.einsum("kd,kbnd->bnd", weights.double().reshape(3, -1).expand(3, D), history.double())
        truth = summed if with_gate is None else reference.spread(gate.double(), x, None) * summed
        truth = truth if with_x is None else x.double() + truth
        assert_close_to_truth(got, truth.to(dtype), truth)


# --------------------------------------------------------------------------------------- properties of the library
X = torch.zeros(2, 6, 8)
NORM_END = (None, None, None, None, None, 1e-6, 1.0, 0)
BAD_NORM = [
    (X[0], None, None, *NORM_END),
    (X.double(), None, None, *NORM_END),
    (X.transpose(1, 2), None, None, *NORM_END),
    (X, torch.zeros(3, 8), None, *NORM_END),
    (X, torch.zeros(2, 4, 8), None, *NORM_END),
    (X, torch.zeros(2, 7), None, *NORM_END),
    (X, torch.zeros(2, 8, dtype=torch.bfloat16), None, *NORM_END),
    (X.bfloat16(), torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bfloat16), *NORM_END),
    (X, torch.zeros(2, 16)[:, ::2], None, *NORM_END),
    (X, None, None, torch.zeros(7), *NORM_END[1:]),
    (X, None, None, torch.zeros(8, dtype=torch.float16), *NORM_END[1:]),
    (X, torch.zeros(3, 8), None, *NORM_END[:4], torch.zeros(6, dtype=torch.int64), *NORM_END[5:]),
    (X, torch.zeros(3, 8), None, *NORM_END[:4], torch.zeros(5, dtype=torch.int32), *NORM_END[5:]),
    (X, torch.zeros(2, 1, 8), None, *NORM_END[:4], torch.zeros(6, dtype=torch.int32), *NORM_END[5:]),
    (X, torch.zeros(3, 8), torch.zeros(2, 8), *NORM_END[:4], torch.full((6,), 2, dtype=torch.int32), *NORM_END[5:]),
    (X, torch.zeros(3, 8), None, *NORM_END[:4], torch.full((2, 6), -1, dtype=torch.int32), *NORM_END[5:]),
    (X, torch.zeros(0, 8), None, *NORM_END[:4], torch.zeros(6, dtype=torch.int32), *NORM_END[5:]),
    (X, None, None, *NORM_END[:-1], 3),
    (X, None, None, *NORM_END[:-1], 4096),
]


@pytest.mark.parametrize("args", BAD_NORM, ids=range(len(BAD_NORM)))
def test_contract_violations_raise(args):
    with pytest.raises(RuntimeError):
        RAW.norm_modulate(*args)


def test_backward_checks_row_values_too():
    m, rows = torch.zeros(3, 8), torch.full((6,), 3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="rows holds values from 0 to 3; allowed are 0 to 2"):
        RAW.norm_modulate_backward(X, None, X, m, m, None, None, None, None, None, None, rows, 1e-6, 1.0, 0, 1023)
    with pytest.raises(RuntimeError, match="rows holds"):
        RAW.gate_residual_backward(X, X, m, None, None, rows, 1e-6, 0, 1023)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BARE)
def test_bare_ops_are_the_whole_ops(name, dtype):
    for seed in range(12):
        assert not bare_differs(name, seed, dtype, getattr(RAW, name), getattr(RAW, whole_of(name)))


Q, TABLE = torch.zeros(2, 5, 3, 8), torch.zeros(3, 4)
BAD_QK = [
    (Q[0], Q, None, None, None, None, None, None, None, 1e-6, 1),
    (Q, Q.bfloat16(), None, None, None, None, None, None, None, 1e-6, 1),
    (Q, Q, torch.zeros(7), None, None, None, None, None, None, 1e-6, 1),
    (Q, Q, None, None, None, None, torch.zeros(5, 4), None, None, 1e-6, 1),
    (Q, Q, None, None, None, None, torch.zeros(4, 4), torch.zeros(4, 4), None, 1e-6, 1),
    (Q, Q, None, None, None, None, torch.zeros(5, 3), torch.zeros(5, 3), None, 1e-6, 1),
    (Q, Q[:, :3], None, None, None, None, torch.zeros(5, 4), torch.zeros(5, 4), None, 1e-6, 1),
    (Q, Q, None, None, None, None, torch.zeros(5, 4), torch.zeros(5, 4), torch.zeros(5), 1e-6, 1),
    (Q, Q, None, None, None, None, TABLE, TABLE, torch.full((5,), 3, dtype=torch.int32), 1e-6, 1),
    (Q, Q, None, None, None, None, TABLE, TABLE, torch.full((2, 5), -1, dtype=torch.int32), 1e-6, 1),
    (Q, Q, None, None, None, None, TABLE[:0], TABLE[:0], torch.zeros(5, dtype=torch.int32), 1e-6, 1),
    (Q, Q[:, :, :1], None, None, None, None, torch.zeros(1, 5, 3, 4), torch.zeros(1, 5, 3, 4), None, 1e-6, 1),
]


@pytest.mark.parametrize("args", BAD_QK, ids=range(len(BAD_QK)))
def test_qk_contract_violations_raise(args):
    with pytest.raises(RuntimeError):
        RAW.qk_norm_rope(*args)


def test_other_contract_violations_raise():
    for call in (
        lambda: RAW.gated_activation(torch.zeros(2, 5), 0),
        lambda: RAW.gated_activation(torch.zeros(2, 3, 4).transpose(0, 1), 0),
        lambda: RAW.gated_activation(torch.zeros(2, 3, 8)[..., ::2], 0),
        lambda: RAW.gated_activation(torch.zeros([1] * 8 + [4]), 0),
        lambda: RAW.gated_activation(torch.tensor(1.0), 0),
        lambda: RAW.gated_activation_backward(torch.zeros(3, 2, 2), torch.zeros(2, 3, 4), 0),
        lambda: RAW.gated_activation_backward(torch.zeros(3, 2, 2).transpose(0, 1), torch.zeros(2, 3, 4), 0),
        lambda: RAW.relative_difference(torch.zeros(3), torch.zeros(3)),
        lambda: RAW.relative_difference(X, X[:1], None),
        lambda: RAW.relative_difference(X, X.transpose(1, 2), None),
        lambda: RAW.combine_history(torch.zeros(17, 2, 6, 8), torch.zeros(17), None, None),
        lambda: RAW.combine_history(torch.zeros(0, 2, 6, 8), torch.zeros(0), None, None),
        lambda: RAW.combine_history(X[None], torch.zeros(2), None, None),
        lambda: RAW.combine_history(X[None], torch.zeros(1), X[:1], None),
        lambda: RAW.combine_history(X[None], torch.zeros(1), None, torch.zeros(2, 4, 8)),
    ):
        with pytest.raises(RuntimeError):
            call()


ISAS = ("portable", "avx2", "avx512", "avx512bf16")
LOWER = ISAS[: ISAS.index(native.isa)] if native.isa in ISAS else ()


@pytest.mark.skipif(not LOWER, reason="this machine has the portable kernels only")
@pytest.mark.parametrize("isa", LOWER)
def test_lower_instruction_sets(isa):
    here = Path(__file__)
    env = os.environ | {"MASKACCEL_CPU_ISA": isa}
    probe = "import maskaccel.ops; from maskaccel._native import native; print(native.isa)"
    found = subprocess.run(
        [sys.executable, "-c", probe], env=env, capture_output=True, text=True, cwd=here.parent.parent
    )
    assert found.stdout.strip() == isa, found.stderr
    files = [str(here), *(str(here.with_name(f"test_cpu_{name}.py")) for name in ("backward", "steps"))]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "forward or backward",
        *files,
    ]
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=here.parent.parent)
    assert run.returncode == 0, run.stdout[-3000:]
