"""The CPU kernels, backward, against autograd of the fp64 reference."""

from __future__ import annotations

import itertools

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
    row_index,
    tables,
    three,
)  # fmt: skip
from _numerics import assert_all_close_to_truth, assert_close_to_truth

from maskaccel._native import native
from maskaccel.ops.adaln import reference, schema

pytestmark = pytest.mark.skipif(not native.has_cpu, reason=f"native library {native.state}: {native.reason}")


def reference_gradients(function, inputs, dtype, grads, **kwargs):
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in inputs.items() if v is not None}
    out = function(**leaves, **kwargs)
    out = out if isinstance(out, tuple) else (out,)
    chosen = [(o, g.to(o.dtype)) for o, g in zip(out, grads, strict=True) if g is not None]
    found = torch.autograd.grad(
        [o for o, _ in chosen], list(leaves.values()), [g for _, g in chosen], allow_unused=True
    )
    return dict(zip(leaves, found, strict=True))


def per_token(grad, rows, operand):
    """Sums per-token gradients into the rows they came from."""
    rows = rows.expand(B, N) if rows.dim() == 1 else rows
    out = grad.new_zeros(operand.shape, dtype=torch.float64)
    return out.index_put_((rows.long().flatten(),), grad.double().reshape(-1, grad.shape[-1]), accumulate=True)


def check_gradients(got, plain, truth, form, rows, inputs, what):
    for name, g in got.items():
        want, simple = truth.get(name), plain.get(name)
        if want is None:
            assert g.numel() == 0, f"{what} {name}: expected no gradient"
            continue
        if name in ("gate", "scale", "shift", "scale2", "shift2"):
            assert g.dtype == torch.float32
            g = per_token(g, rows, inputs[name]).float() if rows is not None else g.reshape(want.shape)
        assert_close_to_truth(g, simple.to(g.dtype), want, what=f"{what} {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_backward_modulation_forms(form, dtype):
    x, a = randn(B, N, D, dtype=dtype) + 0.5, randn(B, N, D, dtype=dtype, seed=1)
    dr, dy, dy2 = (randn(B, N, D, dtype=dtype, seed=20 + i) for i in range(3))
    names = ("gate", "scale", "shift", "scale2", "shift2")
    mods = dict(zip(names, modulations(form, 5, dtype), strict=True))
    rows = row_index(form)
    norm_inputs = {"x": x, **{k: mods[k] for k in names[1:]}}
    plain = reference_gradients(reference.norm_modulate, norm_inputs, dtype, (dy, dy2), rows=rows)
    truth = reference_gradients(reference.norm_modulate, norm_inputs, torch.float64, (dy, dy2), rows=rows)
    out = RAW.norm_modulate_backward(
        dy, dy2, x, *(mods[k] for k in names[1:]), None, None, None, None, rows, 1e-6, 1.0, 0, 1023
    )
    got = dict(zip(("x", *names[1:]), out[:5], strict=True))
    check_gradients(got, plain, truth, form, rows, mods, f"norm_modulate {form}")
    assert out[5].numel() == out[6].numel() == 0

    r, *_ = raw_grnm(x, a, *(mods[k] for k in names[:3]), rows=rows)
    fused_inputs = {"x": x, "a": a, **mods}
    fused = reference.gate_residual_norm_modulate
    plain = reference_gradients(fused, fused_inputs, dtype, (dr, dy, dy2), rows=rows)
    truth = reference_gradients(fused, fused_inputs, torch.float64, (dr, dy, dy2), rows=rows)
    out = RAW.gate_residual_norm_modulate_backward(
        dr, dy, dy2, r, a, mods["gate"], None, None, *(mods[k] for k in names[1:]), None, None, None, None, rows, 1e-6,
        1e-6, 1.0, 0, 1023,
    )  # fmt: skip
    got = dict(zip(("x", "a", *names), out[:7], strict=True))
    check_gradients(got, plain, truth, form, rows, mods, f"fused {form}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_options(dtype):
    n = 150  # more than two chunks of tokens, the last one short
    x, a = randn(B, n, D, dtype=dtype) + 0.5, randn(B, n, D, dtype=dtype, seed=1) * 2
    dr, dy = (randn(B, n, D, dtype=dtype, seed=20 + i) for i in range(2))
    gate, scale, shift = modulations("sample", 3, dtype)
    for norm_options, gate_options in itertools.product(OPTIONS, [{}, *GATES[:-1]]):
        if "weight_offset" in norm_options and "post_weight" in gate_options:
            continue
        merged = fill(norm_options, dtype) | fill(gate_options, dtype)
        tensors = {k: v for k, v in merged.items() if isinstance(v, torch.Tensor)}
        wide_vectors = any(v in ("w32", "b32") for v in norm_options.values())
        if wide_vectors and "post_weight" in tensors:
            continue
        plain_options = {k: v for k, v in merged.items() if k not in tensors}
        inputs = {"x": x, "a": a, "gate": gate, "scale": scale, "shift": shift, **tensors}
        fused = reference.gate_residual_norm_modulate
        plain = reference_gradients(fused, inputs, dtype, (dr, dy), **plain_options)
        truth = reference_gradients(fused, inputs, torch.float64, (dr, dy), **plain_options)
        flags = norm_flags(
            *(
                plain_options.get(k, d)
                for k, d in (
                    ("norm", "layer"),
                    ("law", "fp32"),
                    ("weight_offset", 0.0),
                    ("gate_act", "none"),
                    ("post_norm", None),
                )
            )
        )
        eps, offset = plain_options.get("eps", 1e-6), plain_options.get("offset", 1.0)
        t = tensors.get
        end = (t("weight"), t("bias"), t("scale_table"), t("shift_table"), None, eps, eps, offset, flags)
        gates = (gate, t("gate_table"), t("post_weight"))
        r, _ = RAW.gate_residual_norm_modulate(x, a, *gates, scale, shift, *end)
        out = RAW.gate_residual_norm_modulate_backward(dr, dy, None, r, a, *gates, scale, shift, None, None, *end, 1023)
        names = ("x", "a", "gate", "scale", "shift", "scale2", "shift2", "weight", "bias", "post_weight")
        got = {k: g for k, g in zip(names, out, strict=True) if k not in ("scale2", "shift2")}
        check_gradients(got, plain, truth, "sample", None, inputs, f"{norm_options} {gate_options}")


def test_backward_of_a_lone_gate_matches_the_fused_one():
    x, a, dr = (randn(B, 70, D, seed=i) for i in range(3))
    gate = modulations("sample", 1, torch.float32)[0]
    weight = randn(D, seed=9)
    for act, post in itertools.product(schema.GATE_ACTS, (None, "rms", "layer")):
        flags = norm_flags("none", gate_act=act, post_norm=post)
        da, dgate, dpost = RAW.gate_residual_backward(
            dr, a, gate, None, weight if post else None, None, 1e-6, flags, 1023
        )
        inputs = {"x": x, "a": a, "gate": gate, "post_weight": weight}
        options = {"gate_act": act, "post_norm": post}
        plain = reference_gradients(reference.gate_residual, inputs, torch.float32, (dr,), **options)
        truth = reference_gradients(reference.gate_residual, inputs, torch.float64, (dr,), **options)
        got = {"a": da, "gate": dgate, "post_weight": dpost}
        check_gradients(got, plain, truth, "sample", None, inputs, f"{act} {post}")


def test_backward_standing_tables_and_needs():
    x, dy = randn(B, N, D), randn(B, N, D, seed=1)
    table = randn(D, seed=2)
    args = (dy, None, x, None, None, None, None, None, None, table, table, None, 1e-6, 1.0, 0)
    out = RAW.norm_modulate_backward(*args, 1023)
    assert out[1].shape == out[2].shape == (1, 1, D)
    normed = reference.norm_modulate(x.double())
    torch.testing.assert_close(out[1][0, 0].double(), (dy.double() * normed).sum((0, 1)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[2][0, 0], dy.sum((0, 1)), rtol=1e-5, atol=1e-5)
    out = RAW.norm_modulate_backward(*args, schema.NEED_SHIFT)
    assert [g.numel() for g in out] == [0, 0, D, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("across", [False, True])
def test_backward_qk_norm_rope(across, dtype):
    s, heads, dh = 70, 3, 40
    q, k = randn(B, s, heads, dh, dtype=dtype), randn(B, s, heads, dh, dtype=dtype, seed=1)
    dq, dk = randn(B, s, heads, dh, dtype=dtype, seed=2), randn(B, s, heads, dh, dtype=dtype, seed=3)
    size = heads * dh if across else dh
    for norm, rope, kind in itertools.product(
        ("rms", "layer", "none"), ("interleaved", "half", None), ("pair", "element", "head")
    ):
        cos, sin = tables(kind, s, heads, dh, torch.float32, B) if rope else (None, None)
        vectors = [randn(size, dtype=dtype, seed=i) + 1 for i in range(4)]
        kwargs = {"norm": norm, "across_heads": across, "rope": rope or "interleaved"}

        def grads(wide, cos=cos, sin=sin, vectors=vectors, kwargs=kwargs):
            leaves = [t.to(wide).requires_grad_() for t in (q, k, *vectors)]
            out = reference.qk_norm_rope(
                *leaves[:4], double(cos), double(sin), q_bias=leaves[4], k_bias=leaves[5], **kwargs
            )
            return torch.autograd.grad(out, leaves, (dq.to(wide), dk.to(wide)))

        flags = qk_flags(norm, "fp32", across, rope)
        got = RAW.qk_norm_rope_backward(dq, dk, q, k, *vectors, cos, sin, None, 1e-6, flags, 63)
        plain = grads(dtype)
        plain = [*plain[:2], *(p.float() for p in plain[2:])]
        assert_all_close_to_truth(got, plain, grads(torch.float64), what=f"{norm} {rope} {kind}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", schema.ACTIVATIONS)
def test_forward_and_backward_gated_activation(kind, dtype):
    x = randn(33, 74, dtype=dtype, scale=3.0)
    x[0, :6] = torch.tensor([0.0, -20.0, 20.0, -100.0, 88.0, 1e-4], dtype=dtype)
    x[0, 37:43] = x[0, :6]
    for gate_first in (False, True):
        flags = schema.ACTIVATIONS[kind] | (schema.GATE_FIRST if gate_first else 0)
        got = RAW.gated_activation(x, flags)
        assert_all_close_to_truth((got,), *three(reference.gated_activation, x, kind, gate_first=gate_first))
        dy = randn(*got.shape, dtype=dtype, seed=1)
        out = RAW.gated_activation_backward(dy, x, flags)
        plain, truth = (
            reference_gradients(
                lambda x, g=gate_first: reference.gated_activation(x, kind, gate_first=g), {"x": x}, t, (dy,)
            )
            for t in (dtype, torch.float64)
        )
        assert_close_to_truth(out, plain["x"], truth["x"], what=f"{kind} backward")


def test_threads_do_not_change_a_bit():
    x, a, dr, dy = (randn(1, 700, 384, dtype=torch.bfloat16, seed=i) for i in range(4))
    gate, scale, shift = randn(1, 7, 3 * 384, dtype=torch.bfloat16, seed=5).chunk(3, -1)
    q = randn(1, 700, 4, 64, seed=6)
    weight = randn(64, seed=7)
    end = (None, None, None, None, None, 1e-6, 1e-6, 1.0, 0)

    def everything():
        r, y = RAW.gate_residual_norm_modulate(x, a, gate, None, None, scale, shift, *end)
        back = RAW.gate_residual_norm_modulate_backward(
            dr, dy, None, r, a, gate, None, None, scale, shift, None, None, *end, 1023
        )
        qk = RAW.qk_norm_rope_backward(q, q, q, q, weight, weight, None, None, None, None, None, 1e-6, 1, 63)
        return [r, y, *back, *qk, RAW.relative_difference(x, a, None)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(2)
        two = everything()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(o, t) for o, t in zip(one, two, strict=True))
