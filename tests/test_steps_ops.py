"""The cached-feature ops through their public functions, and torch's own check of every op there is."""

from __future__ import annotations

import pytest
import torch
from _numerics import assert_close_to_truth
from hypothesis import given, settings
from hypothesis import strategies as st

import maskaccel
from maskaccel import ops
from maskaccel.ops import _backends, _call, _registry
from maskaccel.ops._registry import SPECS, op
from maskaccel.ops.adaln.schema import GATE_ACTS, NO_RESIDUAL, NORMS, POST_NORMS
from maskaccel.ops.attention.schema import SCHEMAS as ATTENTION
from maskaccel.ops.steps import reference
from maskaccel.ops.tokens.schema import SCHEMAS as TOKENS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
fuzz = settings(max_examples=50, deadline=None, derandomize=True)


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@fuzz
@given(
    st.integers(0, 999), st.integers(1, 3), st.sampled_from([(1,), (7,), (3, 5), (2, 4, 33), (300, 17)]),
    st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.sampled_from([None, "reference"]),
)  # fmt: skip
def test_relative_difference(seed, batch, rest, dtype, based, dense, backend):
    x, stored, base = (_random(seed + i, batch, *rest).to(dtype) for i in range(3))
    if not dense:
        x = torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]
    base = base if based else None
    value = x.double() - base.double() if based else x.double()
    truth = torch.stack([(value - stored.double()).abs().flatten(1).sum(1), stored.double().abs().flatten(1).sum(1)], 1)
    with torch.no_grad():
        got = ops.relative_difference(x, stored, base=base, backend=backend)
        assert_close_to_truth(got, reference.relative_difference(x, stored, base), truth)
    assert got.dtype == torch.float32
    assert got.shape == (batch, 2)


@fuzz
@given(
    st.integers(0, 999), st.integers(1, 5),
    st.tuples(st.integers(1, 2), st.integers(1, 6), st.sampled_from([1, 8, 33])),
    st.sampled_from(DTYPES), st.booleans(), st.sampled_from([None, *DTYPES]),
    st.sampled_from([None, "2d", "sample", "token", "broadcast"]), st.sampled_from([None, "reference"]),
    st.sampled_from(["dense", "sliced", "transposed"]),
)  # fmt: skip
def test_combine_history(seed, steps, shape, dtype, per_channel, x_dtype, gated, backend, layout):
    batch, _, width = shape
    history = _random(seed, steps, *shape).to(dtype)
    if layout == "sliced":
        history = torch.cat([history, torch.full_like(history, float("nan"))], 1)[:, :batch]
    elif layout == "transposed":
        history = history.transpose(2, 3).contiguous().transpose(2, 3)
    weights = _random(seed + 1, *((steps, width) if per_channel else (steps,)))
    x = None if x_dtype is None else _random(seed + 2, *shape).to(x_dtype)
    gates = {"2d": (batch, width), "sample": (batch, 1, width), "token": shape, "broadcast": (1, 1, width)}
    gate = None if gated is None else _random(seed + 3, *gates[gated]).to(dtype)

    total = (weights.double().view(steps, 1, 1, -1) * history.double()).sum(0)
    if gate is not None:
        total = total * (gate[:, None] if gated == "2d" else gate).double()
    truth = total if x is None else total + x.double()
    with torch.no_grad():
        got = ops.combine_history(history, weights, x=x, gate=gate, backend=backend)
        assert_close_to_truth(got, reference.combine_history(history, weights, x, gate), truth)


def test_empty():
    with torch.no_grad():
        assert ops.relative_difference(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 2)
        assert torch.equal(ops.relative_difference(torch.zeros(2, 0), torch.zeros(2, 0)), torch.zeros(2, 2))
        assert ops.combine_history(torch.zeros(3, 0, 4, 8), torch.ones(3)).shape == (0, 4, 8)
        assert ops.combine_history(torch.zeros(3, 2, 0, 8), torch.ones(3)).shape == (2, 0, 8)


H, W = torch.zeros(3, 2, 4, 8), torch.ones(3)
BAD = [
    ("relative_difference", (1, H), {}, TypeError, "x must be a torch.Tensor, got int"),
    ("relative_difference", (H.int(), H.int()), {}, TypeError, "x has dtype torch.int32"),
    ("relative_difference", (W, W), {}, ValueError, r"x must be \(B, ...\) of two dims or more, got shape \(3,\)"),
    ("relative_difference", (H, H[:1]), {}, ValueError, r"reference has shape \(1, 2, 4, 8\); it must be that of x"),
    ("relative_difference", (H, H.half()), {}, TypeError, "reference has dtype torch.float16"),
    ("relative_difference", (H, H), {"base": H[0]}, ValueError, r"base has shape \(2, 4, 8\)"),
    ("relative_difference", (H, H), {"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
    ("combine_history", (H[0], W), {}, ValueError, r"history must be \(K, B, N, D\), got shape \(2, 4, 8\)"),
    ("combine_history", (H[:0], W[:0]), {}, ValueError, "history holds K=0 steps; allowed are 1 to 16"),
    ("combine_history", (torch.zeros(17, 1, 1, 1), torch.ones(17)), {}, ValueError, "history holds K=17 steps"),
    ("combine_history", (H, W[:2]), {}, ValueError, r"weights has shape \(2,\); it must be \(3,\) or \(3, 8\)"),
    ("combine_history", (H, W.half()), {}, TypeError, "weights has dtype torch.float16; it must be float32"),
    ("combine_history", (H, [1.0, 0, 0]), {}, TypeError, "weights must be a torch.Tensor, got list"),
    ("combine_history", (H, W), {"x": H}, ValueError, r"x has shape \(3, 2, 4, 8\); it must be \(2, 4, 8\)"),
    ("combine_history", (H, W), {"x": H[0].int()}, TypeError, "x has dtype torch.int32"),
    ("combine_history", (H, W), {"gate": torch.zeros(3, 8)}, ValueError, "gate has batch 3"),
    ("combine_history", (H, W), {"gate": torch.zeros(2, 3, 8)}, ValueError, r"gate has 3 rows .* must divide N=4"),
    ("combine_history", (H, W.to("meta")), {"backend": "reference"}, ValueError, "weights is on meta, history on cpu"),
]


@pytest.mark.parametrize(("name", "args", "keywords", "error", "message"), BAD)
def test_bad_input_is_named(name, args, keywords, error, message):
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            getattr(ops, name)(*args, **keywords)


def test_gradients_are_refused_not_dropped():
    leaf = torch.zeros(2, 4, 8).requires_grad_()
    with pytest.raises(ValueError, match="relative_difference has no derivative, but x requires grad"):
        ops.relative_difference(leaf, H[0])
    with pytest.raises(ValueError, match="combine_history has no derivative, but x requires grad"):
        ops.combine_history(H, W, x=leaf)
    with torch.no_grad():
        assert ops.relative_difference(leaf, H[0]).shape == (2, 2)


def test_explain():
    assert maskaccel.explain("combine_history", H)["reference"] is None


def test_a_native_library_that_lacks_an_op(monkeypatch):
    """Built before the op existed: the next backend takes the call, and the reason is told."""
    known = _registry.implemented

    def forget():
        _backends.automatic_namespace.cache_clear()
        _call._kernel.cache_clear()
        _call._cpu.clear()

    with monkeypatch.context() as patch:
        patch.setattr(_registry, "implemented", lambda ns, name, on: name != "gram" and known(ns, name, on))
        forget()
        want = reference.gram(H + 1)
        with torch.no_grad():
            assert torch.equal(ops.gram(H + 1), want)
            assert ops.combine_history(H, W).shape == (2, 4, 8)
        assert maskaccel.explain("gram", H)["reference"] is None
        if _backends.native.has_cpu:
            assert "no cpu kernel of gram; rebuild it" in maskaccel.explain("gram", H)["cpu"]
            assert maskaccel.explain("combine_history", H)["cpu"] is None
            with pytest.raises(ValueError, match="backend='cpu' cannot run this call: the native library holds no cpu"):
                ops.gram(H, backend="cpu")
    forget()


# --------------------------------------------------------------------------------- every op, by torch's check
NAMES = [name for name in SPECS if name not in ATTENTION and name not in TOKENS]  # those have tests of their own


def _sample(name: str) -> tuple:
    """Arguments of one op: strided modulation, all optional operands, a second output where there is one."""
    x, a, dy = (_random(i, 2, 6, 8) for i in range(3))
    scale, shift, gate, scale2, shift2 = _random(3, 2, 40).chunk(5, -1)
    frames = _random(4, 2, 3, 8)
    weight, bias, post, table = _random(5, 4, 8).unbind(0)
    norm = (weight, bias, table, table, None, 1e-6, 1.0, NORMS["layer"])
    flags = NORMS["rms"] | GATE_ACTS["tanh"] | POST_NORMS["rms"]
    gated = (gate, table, post)
    both = (weight, None, None, table, None, 1e-6, 1e-5, 1.0, flags)
    q = _random(6, 2, 4, 2, 8)
    qk = (q, _random(7, 2, 4, 2, 8), weight, bias, None, None, *_random(8, 2, 4, 4).unbind(0), None, 1e-6, 1)
    samples = {
        "norm_modulate": (x, scale, frames, *norm),
        "norm_modulate_pair": (x, scale, shift, scale2, shift2, *norm),
        "norm_modulate_backward": (dy, dy, x, scale, frames, scale2, shift2, *norm, 1 | 0b111111000),
        "gate_residual": (x, a, *gated, None, 1e-6, NORMS["none"] | flags & ~3),
        "gate_residual_backward": (dy, a, *gated, None, 1e-6, NORMS["none"] | flags & ~3, 0b1000000110),
        "gate_residual_norm_modulate": (x, a, *gated, scale, frames, *both),
        "gate_residual_norm_modulate_pair": (x, a, *gated, scale, shift, scale2, shift2, *both),
        "gate_residual_norm_modulate_backward": (
            dy, dy, dy, x, a, *gated, scale, frames, scale2, shift2, *both, 0b1011111111,
        ),
        "qk_norm_rope": qk,
        "qk_norm_rope_backward": (q, q, *qk, 0b1111),
        "gated_activation": (_random(9, 5, 16), 0),
        "gated_activation_backward": (_random(9, 5, 8), _random(10, 5, 16), 1),
        "relative_difference": (x, a, dy),
        "combine_history": (H + 1, W, x[:, :4].contiguous(), frames[:, :1]),
        "combine_sites": (torch.stack([H, H + 1]), W, x[:, :4].contiguous(), torch.stack([frames[:, :2]] * 2)),
        "gram": (H + 1, True),
        "scatter_combine": (
            H + 1, W, dy[:, :2].contiguous(), torch.tensor([[0, 1], [3, 2]]).int(),
            torch.tensor([[0, 1, 0, 5]] * 2).int(), x[:, :4].contiguous(), frames[:, :1], 1, 0.25,
        ),
        "kmeans": (x, None, 3, 2, 1),
        "combine_history_norm_modulate": (H + 1, W, x[:, :4].contiguous(), gate[:, None], scale, frames[:, :2], *norm),
        "norm_modulate_difference": (x, a, scale, frames, *norm),
    }  # fmt: skip
    return samples[name]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    args = _sample(name)
    if SPECS[name].backward is not None:
        args = tuple(
            t.detach().clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for t in args
        )
        if name == "qk_norm_rope":
            args = (*args[:6], *(t.detach() for t in args[6:8]), *args[8:])
    torch.library.opcheck(op("maskaccel", name), args)


@pytest.mark.parametrize("name", NAMES)
def test_fakes_tell_shape_dtype_and_strides(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    args = _sample(name)
    with torch.no_grad():
        real = op("maskaccel", name)(*args)
        with FakeTensorMode() as mode:
            fake = op("maskaccel", name)(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args))
    for r, f in zip(*((v if isinstance(v, tuple) else (v,)) for v in (real, fake)), strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


@pytest.mark.parametrize("name", [name for name in NAMES if SPECS[name].backward is None])
def test_ops_without_a_derivative_refuse_gradients(name):
    """A caller of `torch.ops` must not get zeros in silence."""
    args = tuple(
        t.detach().clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in _sample(name)
    )
    with pytest.raises((RuntimeError, NotImplementedError)):
        out = op("maskaccel", name)(*args)
        first = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(first.sum(), next(t for t in args if isinstance(t, torch.Tensor)))


def test_the_residual_flag_is_for_inference():
    args = list(_sample("gate_residual_norm_modulate"))
    args[-1] |= NO_RESIDUAL
    with torch.no_grad():
        r, y = op("maskaccel", "gate_residual_norm_modulate")(*args)
    assert r.numel() == 0
    assert y.shape == (2, 6, 8)
    args[0] = args[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="NO_RESIDUAL"):
        op("maskaccel", "gate_residual_norm_modulate")(*args)


@pytest.mark.parametrize("op", ["combine_history", "combine_sites", "scatter_combine", "combine_history_norm_modulate"])
def test_a_wide_stream_over_a_narrow_history_is_summed_by_the_reference(op):
    """No kernel serves fp64, whichever operand has it."""
    generator = torch.Generator().manual_seed(0)
    history = torch.randn(2, 1, 4, 8, generator=generator)
    x = torch.randn(1, 4, 8, generator=generator, dtype=torch.float64)
    weights, more = torch.tensor([1.5, -0.5]), ()
    held = history[None] if op == "combine_sites" else history.clone()
    if op == "scatter_combine":
        more = (history[0, :, :1], torch.zeros(1, 1, dtype=torch.int64))
    out = getattr(ops, op)(held, weights, *more, x=x)
    out = out[0] if isinstance(out, tuple) else out
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, x + 1.5 * history[0].double() - 0.5 * history[1].double())
