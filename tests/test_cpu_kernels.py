"""The CPU kernels against the fp64 reference: every op, flag, shape and layout of the contract, on every instruction set."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _numerics import assert_all_close_to_truth, assert_close_to_truth

import maskaccel.ops  # noqa: F401  (defines the ops and loads the library)
from maskaccel._native import native
from maskaccel.ops.adaln import reference, schema
from maskaccel.ops.steps import reference as steps_reference

pytestmark = pytest.mark.skipif(not native.has_cpu, reason=f"native library {native.state}: {native.reason}")

RAW = torch.ops.maskaccel_raw
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
B, N, D = 2, 12, 72  # 72 is a head size and no multiple of a vector


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def double(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return value


def three(function, *args, **kwargs):
    """Plain torch in the dtype of the arguments, and the fp64 truth under the law that rounds nowhere."""
    plain = function(*args, **kwargs)
    exact = {**{k: double(v) for k, v in kwargs.items()}, **({"law": "fp32"} if "law" in kwargs else {})}
    truth = function(*map(double, args), **exact)
    as_tuple = lambda v: v if isinstance(v, tuple) else (v,)  # noqa: E731
    return as_tuple(plain), as_tuple(truth)


def norm_flags(norm="layer", law="fp32", weight_offset=0.0, gate_act="none", post_norm=None, clip=False):
    return (
        schema.NORMS[norm] | schema.LAWS[law] | (schema.WEIGHT_PLUS_ONE if weight_offset else 0)
        | schema.GATE_ACTS[gate_act] | schema.POST_NORMS[post_norm] | (schema.CLIP if clip else 0)
    )  # fmt: skip


def raw_norm_modulate(x, scale=None, shift=None, *, norm="layer", weight=None, bias=None, eps=1e-6, offset=1.0, rows=None,
                      law="fp32", weight_offset=0.0, scale_table=None, shift_table=None, scale2=None, shift2=None):  # fmt: skip
    flags = norm_flags(norm, law, weight_offset)
    end = (weight, bias, scale_table, shift_table, rows, eps, offset, flags)
    if scale2 is None and shift2 is None:
        return (RAW.norm_modulate(x, scale, shift, *end),)
    return RAW.norm_modulate_pair(x, scale, shift, scale2, shift2, *end)


def raw_grnm(x, a, gate=None, scale=None, shift=None, *, gate_act="none", post_norm=None, post_weight=None, post_eps=1e-5,
             norm="layer", weight=None, bias=None, eps=1e-6, offset=1.0, rows=None, law="fp32", weight_offset=0.0,
             gate_table=None, scale_table=None, shift_table=None, scale2=None, shift2=None, clip=False):  # fmt: skip
    flags = norm_flags(norm, law, weight_offset, gate_act, post_norm, clip)
    end = (weight, bias, scale_table, shift_table, rows, eps, post_eps, offset, flags)
    if scale2 is None and shift2 is None:
        return RAW.gate_residual_norm_modulate(x, a, gate, gate_table, post_weight, scale, shift, *end)
    return RAW.gate_residual_norm_modulate_pair(x, a, gate, gate_table, post_weight, scale, shift, scale2, shift2, *end)


def modulations(form, count, dtype, d=D):
    """`count` modulation tensors of a form, as strided chunks of one projection where the form allows."""
    shape = {"sample": (B, d), "row": (B, 1, d), "frame": (B, 3, d), "token": (B, N, d), "shared": (1, d),
             "shared_frame": (1, 4, d), "shared_token": (1, N, d), "rows": (5, d), "rows2": (5, d)}[form]  # fmt: skip
    wide = randn(*shape[:-1], shape[-1] * count, seed=3, scale=0.5).to(dtype)
    return wide.chunk(count, dim=-1)


def row_index(form):
    if not form.startswith("rows"):
        return None
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 5, (N,) if form == "rows" else (B, N), generator=generator, dtype=torch.int32)


FORMS = ("sample", "row", "frame", "token", "shared", "shared_frame", "shared_token", "rows", "rows2")


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


OPTIONS = [
    {"norm": "rms"},
    {"norm": "none", "offset": 0.0},
    {"norm": "layer", "offset": 0.0, "eps": 1e-2},
    {"norm": "rms", "weight": "w"},
    {"norm": "rms", "weight": "w", "weight_offset": 1.0},
    {"norm": "layer", "weight": "w", "bias": "b"},
    {"norm": "rms", "weight": "w32", "bias": "b32"},
    {"norm": "layer", "weight": "w32", "weight_offset": 1.0},
    {"scale_table": "t0", "shift_table": "t1"},
    {"norm": "rms", "scale_table": "t0", "shift_table": "t1", "weight": "w", "bias": "b"},
]
GATES = [
    {"gate_act": "tanh"},
    {"gate_act": "clamp_tanh", "gate_table": "t0"},
    {"gate_act": "sigmoid_1m"},
    {"post_norm": "rms"},
    {"post_norm": "rms", "post_weight": "w", "gate_act": "tanh"},
    {"post_norm": "layer", "post_weight": "w", "weight_offset": 1.0},
    {"clip": True},
]


def fill(options, dtype, d=D):
    vectors = {"w": randn(d, dtype=dtype, seed=7) + 1, "b": randn(d, dtype=dtype, seed=8), "w32": randn(d, seed=7) + 1,
               "b32": randn(d, seed=8), "t0": randn(d, dtype=dtype, seed=9) * 3, "t1": randn(d, dtype=dtype, seed=10)}  # fmt: skip
    return {k: vectors.get(v, v) if isinstance(v, str) else v for k, v in options.items()}


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
    grads = RAW.norm_modulate_backward(x, None, x, scale, scale, None, None, weight, weight, None, None, None, 1e-6, 1.0, 0, 1023)
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


# ---------------------------------------------------------------------------------------------- QK norm and RoPE
def tables(kind, s, heads, dh, dtype, batch=1):
    shape = {"pair": (s, dh // 2), "element": (s, dh), "batch": (batch, s, dh), "head": (batch, s, heads, dh // 2),
             "one_head": (batch, s, 1, dh), "complex": (s, dh // 2, 2)}[kind]  # fmt: skip
    angle = randn(*shape, seed=4, scale=3.0)
    if kind == "complex":
        both = torch.stack([angle[..., 0].cos(), angle[..., 0].sin()], -1).to(dtype)
        return both[..., 0], both[..., 1]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def qk_flags(norm, law, across, rope, weight_offset=0.0):
    return (
        schema.NORMS[norm] | schema.LAWS[law] | (schema.WEIGHT_PLUS_ONE if weight_offset else 0)
        | (schema.ACROSS_HEADS if across else 0) | (schema.ROPE_HALF if rope == "half" else 0)
    )  # fmt: skip


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
            out = reference.qk_norm_rope(*leaves[:4], double(cos), double(sin), q_bias=leaves[4], k_bias=leaves[5], **kwargs)
            return torch.autograd.grad(out, leaves, (dq.to(wide), dk.to(wide)))

        flags = qk_flags(norm, "fp32", across, rope)
        got = RAW.qk_norm_rope_backward(dq, dk, q, k, *vectors, cos, sin, None, 1e-6, flags, 63)
        plain = grads(dtype)
        plain = [*plain[:2], *(p.float() for p in plain[2:])]
        assert_all_close_to_truth(got, plain, grads(torch.float64), what=f"{norm} {rope} {kind}")


# ---------------------------------------------------------------------------------------------------- backward
def reference_gradients(function, inputs, dtype, grads, **kwargs):
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in inputs.items() if v is not None}
    out = function(**leaves, **kwargs)
    out = out if isinstance(out, tuple) else (out,)
    chosen = [(o, g.to(o.dtype)) for o, g in zip(out, grads, strict=True) if g is not None]
    found = torch.autograd.grad([o for o, _ in chosen], list(leaves.values()), [g for _, g in chosen], allow_unused=True)
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
        flags = norm_flags(*(plain_options.get(k, d) for k, d in (
            ("norm", "layer"), ("law", "fp32"), ("weight_offset", 0.0), ("gate_act", "none"), ("post_norm", None))))  # fmt: skip
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
        da, dgate, dpost = RAW.gate_residual_backward(dr, a, gate, None, weight if post else None, None, 1e-6, flags, 1023)
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


# ------------------------------------------------------------------------------------------ activations and steps
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
            reference_gradients(lambda x, g=gate_first: reference.gated_activation(x, kind, gate_first=g), {"x": x}, t, (dy,))
            for t in (dtype, torch.float64)
        )
        assert_close_to_truth(out, plain["x"], truth["x"], what=f"{kind} backward")


def test_forward_activation_strided_rows():
    x = randn(9, 100)[:, 3:67]
    assert torch.equal(RAW.gated_activation(x, 0), RAW.gated_activation(x.contiguous(), 0))


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
    (X, None, None, *NORM_END[:-1], 3),
    (X, None, None, *NORM_END[:-1], 4096),
]


@pytest.mark.parametrize("args", BAD_NORM, ids=range(len(BAD_NORM)))
def test_contract_violations_raise(args):
    with pytest.raises(RuntimeError):
        RAW.norm_modulate(*args)


Q = torch.zeros(2, 5, 3, 8)
BAD_QK = [
    (Q[0], Q, None, None, None, None, None, None, None, 1e-6, 1),
    (Q, Q.bfloat16(), None, None, None, None, None, None, None, 1e-6, 1),
    (Q, Q, torch.zeros(7), None, None, None, None, None, None, 1e-6, 1),
    (Q, Q, None, None, None, None, torch.zeros(5, 4), None, None, 1e-6, 1),
    (Q, Q, None, None, None, None, torch.zeros(4, 4), torch.zeros(4, 4), None, 1e-6, 1),
    (Q, Q, None, None, None, None, torch.zeros(5, 3), torch.zeros(5, 3), None, 1e-6, 1),
    (Q, Q[:, :3], None, None, None, None, torch.zeros(5, 4), torch.zeros(5, 4), None, 1e-6, 1),
    (Q, Q, None, None, None, None, torch.zeros(5, 4), torch.zeros(5, 4), torch.zeros(5), 1e-6, 1),
    (Q, Q[:, :, :1], None, None, None, None, torch.zeros(1, 5, 3, 4), torch.zeros(1, 5, 3, 4), None, 1e-6, 1),
]


@pytest.mark.parametrize("args", BAD_QK, ids=range(len(BAD_QK)))
def test_qk_contract_violations_raise(args):
    with pytest.raises(RuntimeError):
        RAW.qk_norm_rope(*args)


def test_other_contract_violations_raise():
    for call in (
        lambda: RAW.gated_activation(torch.zeros(2, 5), 0),
        lambda: RAW.gated_activation(torch.zeros(2, 3, 4), 0),
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
    found = subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, text=True, cwd=here.parent.parent)
    assert found.stdout.strip() == isa, found.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "forward or backward", str(here)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=here.parent.parent)
    assert run.returncode == 0, run.stdout[-3000:]
