"""The fused adaLN ops through their public functions: every row form, stride, dtype and law, forward and backward.

Everything here runs on whatever backend is automatic on this machine, and on the reference; the error rule is the
judge.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _numerics import assert_close_to_truth
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo.common import assert_gradients_close

from maskaccel import ops
from maskaccel.ops.adaln import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = (None, "reference")
Tensors = dict[str, torch.Tensor]
fuzz = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def _random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


@dataclasses.dataclass
class Case:
    """Arguments of one call, by name; `tensors` are those that may get a gradient."""

    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]
    index: dict[str, torch.Tensor]

    def call(self, function: Any, tensors: Tensors | None = None, **more: Any) -> tuple[torch.Tensor, ...]:
        out = function(**(self.tensors if tensors is None else tensors), **self.options, **self.index, **more)
        return out if isinstance(out, tuple) else (out,)

    def wide(self) -> dict[str, torch.Tensor]:
        return {name: t.double() for name, t in self.tensors.items()}


def _strided(draw: Any, t: torch.Tensor) -> torch.Tensor:
    """The same values as a dense tensor, a slice of a wider one, a transposed one, or one with a strided last dim."""
    kind = draw(st.sampled_from(["dense", "chunk", "transposed", "strided"]))
    if kind == "chunk":
        return torch.cat([torch.full_like(t, float("nan")), t, torch.full_like(t, float("nan"))], -1).chunk(3, -1)[1]
    if kind == "transposed" and t.dim() > 2:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "strided":
        return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]
    return t


@st.composite
def cases(draw: Any, gated: bool, normed: bool = True, narrowest: int = 1) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    widths = [width for width in (1, 2, 3, 8, 17, 32, 64, 100, 260) if width >= narrowest]
    batch, width = draw(st.integers(1, 3)), draw(st.sampled_from(widths))
    frames, tokens = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 5]))
    n = frames * tokens
    dtype = draw(st.sampled_from(DTYPES))
    mod_dtype = draw(st.sampled_from([dtype, torch.float32]))
    rows = draw(st.sampled_from([None, "one", "each"]))
    index: dict[str, torch.Tensor] = {}

    def modulation() -> torch.Tensor:
        forms = {
            "sample": (batch, width), "broadcast sample": (1, width), "sample, 3 dims": (batch, 1, width),
            "frame": (batch, frames, width), "broadcast frame": (1, frames, width), "token": (batch, n, width),
        }  # fmt: skip
        shape = (4, width) if rows else forms[draw(st.sampled_from(sorted(forms)))]
        return _strided(draw, (0.5 * _random(generator, *shape)).to(mod_dtype))

    tensors = {"x": _strided(draw, _random(generator, batch, n, width).to(dtype))}
    options: dict[str, Any] = {"law": draw(st.sampled_from(["fp32", "narrow"]))}
    names = []
    if gated:
        tensors["a"] = _strided(draw, _random(generator, batch, n, width).to(dtype))
        names += ["gate"]
        options["gate_act"] = draw(st.sampled_from(["none", "tanh", "clamp_tanh", "sigmoid_1m"]))
        options["post_norm"] = draw(st.sampled_from([None, "rms", "layer"]))
        if options["post_norm"] and draw(st.booleans()):
            tensors["post_weight"] = (1 + 0.2 * _random(generator, width)).to(mod_dtype)
    if normed:
        names += ["scale", "shift", *(["scale2", "shift2"] if draw(st.booleans()) else [])]
        options["norm"] = draw(st.sampled_from(["layer", "rms", "none"]))
        options["offset"] = draw(st.sampled_from([1.0, 0.0]))
        if draw(st.booleans()):
            tensors["weight"] = (1 + 0.2 * _random(generator, width)).to(mod_dtype)
            options["weight_offset"] = draw(st.sampled_from([0.0, 1.0]))
        if draw(st.booleans()):
            tensors["bias"] = (0.2 * _random(generator, width)).to(mod_dtype)
    for name in names:
        if draw(st.booleans()):
            tensors[name] = modulation()
        if not name.endswith("2") and draw(st.booleans()):
            tensors[f"{name}_table"] = (0.3 * _random(generator, width)).to(mod_dtype)
    if rows and any(name in tensors for name in names):
        shape = (n,) if rows == "one" else (batch, n)
        index["rows"] = torch.randint(0, 4, shape, generator=generator, dtype=torch.int32)
    return Case(tensors, options, index)


def _check_forward(case: Case, function: Any, plain: Any) -> None:
    with torch.no_grad():
        truth = case.call(plain, case.wide())
        eager = case.call(plain)
        for backend in BACKENDS:
            found = case.call(function, backend=backend)
            assert len(found) == len(truth)
            for i, (f, e, t) in enumerate(zip(found, eager, truth, strict=True)):
                assert_close_to_truth(f, e, t, what=f"output {i} on {backend}")


def _gradients(case: Case, function: Any, tensors: dict[str, torch.Tensor], **more: Any) -> dict[str, torch.Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    with torch.enable_grad():
        out = case.call(function, leaves, **more)
        cotangents = []
        for i, o in enumerate(out):
            c = torch.randn(*o.shape[::-1], generator=torch.Generator().manual_seed(i)).to(o.dtype)
            cotangents.append(c.permute(*range(c.dim() - 1, -1, -1)))  # not dense: what a transpose sends back
        found = torch.autograd.grad(out, list(leaves.values()), cotangents, allow_unused=True)
    return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


def _check_backward(case: Case, function: Any, plain: Any) -> None:
    truth, eager = _gradients(case, plain, case.wide()), _gradients(case, plain, case.tensors)
    for backend in BACKENDS:
        found = _gradients(case, function, case.tensors, backend=backend)
        for name, tensor in case.tensors.items():
            if name in truth:
                assert found[name].dtype == tensor.dtype
                assert found[name].shape == tensor.shape
        assert_gradients_close(found, eager, truth)


@fuzz
@given(cases(gated=False))
def test_norm_modulate(case):
    _check_forward(case, ops.norm_modulate, reference.norm_modulate)


@fuzz
@given(cases(gated=True))
def test_gate_residual_norm_modulate(case):
    _check_forward(case, ops.gate_residual_norm_modulate, reference.gate_residual_norm_modulate)


@fuzz
@given(cases(gated=True, normed=False))
def test_gate_residual(case):
    _check_forward(case, ops.gate_residual, reference.gate_residual)


@fuzz
@given(cases(gated=False, narrowest=8))  # two values of a LayerNorm have a gradient of nearly zero
def test_norm_modulate_backward(case):
    _check_backward(case, ops.norm_modulate, reference.norm_modulate)


@fuzz
@given(cases(gated=True, narrowest=8))  # two values of a LayerNorm have a gradient of nearly zero
def test_gate_residual_norm_modulate_backward(case):
    _check_backward(case, ops.gate_residual_norm_modulate, reference.gate_residual_norm_modulate)


@fuzz
@given(cases(gated=True, normed=False, narrowest=8))
def test_gate_residual_backward(case):
    _check_backward(case, ops.gate_residual, reference.gate_residual)


@st.composite
def rope_cases(draw: Any) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    batch, s, heads = draw(st.integers(1, 2)), draw(st.integers(1, 7)), draw(st.sampled_from([1, 2, 3]))
    dim = draw(st.sampled_from([2, 8, 16, 40, 64]))
    dtype = draw(st.sampled_from(DTYPES))
    across, rotated = draw(st.booleans()), draw(st.booleans())
    tensors = {name: _strided(draw, _random(generator, batch, s, heads, dim).to(dtype)) for name in "qk"}
    options = {
        "norm": draw(st.sampled_from(["rms", "layer", "none"])), "across_heads": across,
        "rope": draw(st.sampled_from(["interleaved", "half"])), "law": draw(st.sampled_from(["fp32", "narrow"])),
    }  # fmt: skip
    weight_dtype = draw(st.sampled_from([dtype, torch.float32]))
    for name in ("q_weight", "k_weight", "q_bias", "k_bias"):
        if draw(st.booleans()):
            mean = float("weight" in name)
            tensors[name] = (mean + 0.2 * _random(generator, heads * dim if across else dim)).to(weight_dtype)
    index: dict[str, torch.Tensor] = {}
    if rotated:
        length, per = s, draw(st.sampled_from([1, 2]))
        if draw(st.booleans()):
            length = s + 3
            shape = draw(st.sampled_from([(s,), (batch, s)]))
            index["positions"] = torch.randint(0, length, shape, generator=generator, dtype=torch.int32)
        shape = draw(st.sampled_from([(length,), (1, length), (batch, length), (batch, length, 1), (1, length, heads)]))
        angle = _random(generator, *shape, dim // per)
        if draw(st.booleans()):  # the real view of a complex table: strided in the last dim
            table = torch.polar(torch.ones_like(angle), angle)
            index |= {"cos": table.real, "sin": table.imag}
        else:
            index |= {"cos": angle.cos(), "sin": angle.sin()}
    return Case(tensors, options, index)


@fuzz
@given(rope_cases())
def test_qk_norm_rope(case):
    _check_forward(case, ops.qk_norm_rope, reference.qk_norm_rope)


@fuzz
@given(rope_cases())
def test_qk_norm_rope_backward(case):
    _check_backward(case, ops.qk_norm_rope, reference.qk_norm_rope)


@st.composite
def activation_cases(draw: Any) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    shape = draw(st.sampled_from([(6,), (3, 8), (2, 5, 14), (2, 3, 4, 66)]))
    x = _strided(draw, (2 * _random(generator, *shape)).to(draw(st.sampled_from(DTYPES))))
    kind = draw(st.sampled_from(["swiglu", "geglu", "gelu_tanh"]))
    return Case({"x": x}, {"kind": kind, "gate_first": draw(st.booleans())}, {})


@fuzz
@given(activation_cases())
def test_gated_activation(case):
    _check_forward(case, ops.gated_activation, reference.gated_activation)
    _check_backward(case, ops.gated_activation, reference.gated_activation)


# ------------------------------------------------------------------------------------- the oracle itself
def test_the_reference_is_the_formula():
    """Against the same written with torch's own layers, as the models write it."""
    x, a = torch.randn(2, 6, 32), torch.randn(2, 6, 32)
    scale, shift, gate = torch.randn(3, 2, 32).unbind(0)
    expected = F.layer_norm(x, (32,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(reference.norm_modulate(x, scale, shift), expected)
    weight = torch.randn(32)
    expected = F.rms_norm(x, (32,), weight, eps=1e-5) * scale[:, None]
    torch.testing.assert_close(
        reference.norm_modulate(x, scale, norm="rms", weight=weight, eps=1e-5, offset=0.0), expected
    )
    r = x + gate[:, None].tanh() * F.rms_norm(a, (32,), weight, eps=1e-6)
    got = reference.gate_residual_norm_modulate(
        x, a, gate, scale, shift, gate_act="tanh", post_norm="rms", post_weight=weight
    )
    torch.testing.assert_close(got[0], r)
    torch.testing.assert_close(got[1], F.layer_norm(r, (32,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None])
    q = torch.randn(1, 5, 2, 8)
    table = torch.polar(torch.ones(5, 4), torch.randn(5, 4))
    turned = torch.view_as_real(torch.view_as_complex(q.view(1, 5, 2, 4, 2)) * table[None, :, None]).flatten(-2)
    got_q, _ = reference.qk_norm_rope(q, q, cos=table.real, sin=table.imag, norm="none")
    torch.testing.assert_close(got_q, turned)
    value, g = torch.randn(3, 16).chunk(2, -1)
    torch.testing.assert_close(reference.gated_activation(torch.cat([value, g], -1)), value * F.silu(g))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_gradcheck(norm):
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    def both(x, a, gate, scale, shift, weight, post_weight):
        return ops.gate_residual_norm_modulate(
            x, a, gate, scale, shift, weight=weight, norm=norm, gate_act="tanh", post_norm="rms",
            post_weight=post_weight, backend="reference",
        )  # fmt: skip

    inputs = [leaf(2, 4, 6), leaf(2, 4, 6), leaf(2, 6), leaf(2, 2, 6), leaf(1, 4, 6), leaf(6), leaf(6)]
    assert torch.autograd.gradcheck(both, inputs)
    cos, sin = torch.randn(2, 3, 4, dtype=torch.float64).unbind(0)
    assert torch.autograd.gradcheck(
        lambda q, k, w: ops.qk_norm_rope(q, k, w, w, cos, sin, norm=norm), [leaf(1, 3, 2, 4), leaf(1, 3, 2, 4), leaf(4)]
    )
    assert torch.autograd.gradcheck(lambda x: ops.gated_activation(x, "geglu"), [leaf(3, 4)])


# ------------------------------------------------------------------------------------------- odd situations
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (0, 0, 8)])
def test_empty_batches(backend, shape):
    x = torch.randn(shape).requires_grad_()
    scale = torch.randn(shape[0], 8).requires_grad_()
    r, y = ops.gate_residual_norm_modulate(x, x * 2, scale, scale, backend=backend)
    assert r.shape == y.shape == shape
    (r.sum() + y.sum()).backward()
    assert x.grad.shape == shape
    assert torch.equal(scale.grad, torch.zeros_like(scale))
    heads = torch.randn(*shape[:2], 2, 8)
    assert ops.qk_norm_rope(heads, heads, backend=backend)[0].shape == heads.shape
    assert ops.gated_activation(x, backend=backend).shape == (*shape[:2], 4)


@pytest.mark.parametrize("law", ["fp32", "narrow"])
def test_return_residual_false_is_the_same_y(law):
    x, a, gate = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.randn(2, 16)
    y = ops.gate_residual_norm_modulate(x, a, gate, law=law)[1]
    alone = ops.gate_residual_norm_modulate(x, a, gate, law=law, return_residual=False)
    torch.testing.assert_close(alone, y)
    pair = ops.gate_residual_norm_modulate(x, a, gate, scale2=gate, law=law, return_residual=False)
    assert len(pair) == 2
    leaf = x.clone().requires_grad_()
    ops.gate_residual_norm_modulate(leaf, a, gate, law=law, return_residual=False).square().sum().backward()
    other = x.clone().requires_grad_()
    ops.gate_residual_norm_modulate(other, a, gate, law=law)[1].square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_clip_keeps_fp16_finite():
    x = torch.full((1, 2, 8), 60000.0, dtype=torch.float16)
    a = torch.full_like(x, 30000.0)
    assert torch.isinf(ops.gate_residual(x, a)).all()
    assert (ops.gate_residual(x, a, clip=True) == 65504).all()


def test_only_the_gradients_asked_for_are_computed():
    x, scale = torch.randn(2, 3, 8), torch.randn(2, 8).requires_grad_()
    ops.norm_modulate(x, scale).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(scale.grad, F.layer_norm(x, (8,), eps=1e-6).sum(1))


def test_torch_func_gives_the_same_gradients():
    x, scale = torch.randn(2, 3, 8), torch.randn(2, 8)

    def loss(x, scale):
        return ops.norm_modulate(x, scale, scale).square().sum()

    found = torch.func.grad(loss, argnums=(0, 1))(x, scale)
    leaves = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
    loss(*leaves).backward()
    for f, leaf in zip(found, leaves, strict=True):
        torch.testing.assert_close(f, leaf.grad)


def test_second_derivatives_and_forward_mode_are_never_silently_zero():
    """Either they are right (the reference) or they are refused (the kernels)."""
    x = torch.randn(2, 3, 8).requires_grad_()
    (g,) = torch.autograd.grad(ops.norm_modulate(x).pow(3).sum(), x, create_graph=True)
    try:
        (second,) = torch.autograd.grad(g.square().sum(), x)
    except RuntimeError:
        pass
    else:
        y = x.detach().requires_grad_()
        (h,) = torch.autograd.grad(F.layer_norm(y, (8,), eps=1e-6).pow(3).sum(), y, create_graph=True)
        torch.testing.assert_close(second, torch.autograd.grad(h.square().sum(), y)[0], rtol=1e-4, atol=1e-4)
    tangent = torch.randn(2, 3, 8)
    try:
        _, found = torch.func.jvp(ops.norm_modulate, (x.detach(),), (tangent,))
    except (RuntimeError, NotImplementedError):
        pass
    else:
        _, expected = torch.func.jvp(lambda t: F.layer_norm(t, (8,), eps=1e-6), (x.detach(),), (tangent,))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_autocast_and_mixed_dtypes():
    x = torch.randn(2, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scale = torch.nn.Linear(8, 8)(torch.randn(2, 8))
        assert scale.dtype == torch.bfloat16
        y = ops.norm_modulate(x, scale, scale)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, reference.norm_modulate(x, scale.float(), scale.float()))
    half = ops.norm_modulate(x.half(), scale.detach().float(), scale.detach())  # one fp32, one bf16
    assert half.dtype == torch.float16


def test_outputs_are_new_and_inputs_untouched():
    x, a, gate = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.randn(2, 16)
    kept = [t.clone() for t in (x, a, gate)]
    r, y = ops.gate_residual_norm_modulate(x, a, gate)
    assert len({t.data_ptr() for t in (x, a, r, y)}) == 4
    r.zero_()
    y.zero_()
    assert all(map(torch.equal, kept, (x, a, gate)))


def test_nothing_of_fresh_memory_shows():
    """Outputs are whole: with new memory filled with NaN, as deterministic mode does, none is left."""
    torch.use_deterministic_algorithms(True)
    filled, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory, True,
    )  # fmt: skip
    try:
        assert torch.empty(4).isnan().all()
        for n, width in ((1, 3), (7, 17), (5, 64), (3, 129)):
            x = torch.randn(2, n, width).requires_grad_()
            gate, rows = torch.randn(4, width).requires_grad_(), torch.arange(n, dtype=torch.int32) % 4
            out = ops.gate_residual_norm_modulate(x, x * 2, gate, gate, gate, rows=rows)
            out += ops.gate_residual_norm_modulate(x, x, gate[:2], gate[:2], scale2=gate[2:])
            heads = torch.randn(2, n, 2, 6).requires_grad_()
            out += ops.qk_norm_rope(heads, heads, cos=torch.ones(n, 3), sin=torch.zeros(n, 3))
            out += (ops.gated_activation(torch.randn(n, 2 * width)),)
            assert all(t.isfinite().all() for t in out)
            sum(t.sum() for t in out).backward()
            assert all(t.grad.isfinite().all() for t in (x, gate, heads))
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(False)
