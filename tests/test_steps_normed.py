"""`ops.combine_history_norm_modulate` and `ops.norm_modulate_difference`: accuracy, layouts, and what they replace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _numerics import assert_close_to_truth
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskaccel import ops
from maskaccel.ops.adaln import reference as adaln
from maskaccel.ops.steps import reference as steps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _layout(kind: str, t: torch.Tensor) -> torch.Tensor:
    """The same values as a dense tensor, a slice of a wider one, a transposed one, or one with a strided last dim."""
    if kind == "chunk":
        return torch.cat([torch.full_like(t, float("nan")), t, torch.full_like(t, float("nan"))], -1).chunk(3, -1)[1]
    if kind == "transposed":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "strided":
        return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]
    return t


LAYOUTS = ("dense", "chunk", "transposed", "strided")


@st.composite
def norms(draw: Any) -> tuple[tuple[int, int, int], torch.dtype, dict[str, Any]]:
    """Shape and dtype of what is normalised, and the keywords of the norm."""
    batch, frames, tokens = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 5]))
    shape = (batch, frames * tokens, draw(st.sampled_from([1, 3, 8, 17, 64, 100, 260])))
    seed, dtype = draw(st.integers(0, 999)), draw(st.sampled_from(DTYPES))
    kind, affine = (draw(st.sampled_from([dtype, torch.float32])) for _ in range(2))
    width, indexed = shape[2], draw(st.booleans())
    forms = [(batch, width), (1, 1, width), (batch, frames, width), shape]
    options: dict[str, Any] = {
        "norm": draw(st.sampled_from(["layer", "rms", "none"])), "law": draw(st.sampled_from(["fp32", "narrow"])),
        "offset": draw(st.sampled_from([1.0, 0.0])), "weight_offset": draw(st.sampled_from([0.0, 1.0])),
    }  # fmt: skip
    for i, name in enumerate(("scale", "shift")):
        if draw(st.booleans()):
            form = (4, width) if indexed else draw(st.sampled_from(forms))
            options[name] = _layout(draw(st.sampled_from(LAYOUTS)), (_random(seed + i, *form) / 2).to(kind))
        if draw(st.booleans()):
            options[f"{name}_table"] = (_random(seed + 10 + i, width) / 3).to(kind)
    for i, name in enumerate(("weight", "bias")):
        if draw(st.booleans()):
            options[name] = (1 - i + _random(seed + 20 + i, width) / 5).to(affine)
    if indexed and ("scale" in options or "shift" in options):
        size = draw(st.sampled_from([shape[1:2], shape[:2]]))
        options["rows"] = torch.randint(0, 4, size, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return shape, dtype, options


def _double(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in values.items()}


@fuzz
@given(
    norms(), st.integers(0, 999), st.integers(1, 5), st.booleans(), st.sampled_from([None, *DTYPES]),
    st.sampled_from([None, "2d", "sample", "token"]), st.sampled_from(LAYOUTS), st.sampled_from([None, "reference"]),
)  # fmt: skip
def test_combine_history_norm_modulate(case, seed, count, per_channel, stored, gated, layout, backend):
    shape, dtype, options = case
    history = _random(seed, count, *shape).to(stored or dtype)
    history = _layout(layout, history)
    weights = _random(seed + 1, *((count, shape[2]) if per_channel else (count,)))
    x = None if stored is None else _layout(layout, _random(seed + 2, *shape).to(dtype))
    forms = {"2d": (shape[0], shape[2]), "sample": (1, 1, shape[2]), "token": shape}
    gate = None if gated is None else _random(seed + 3, *forms[gated]).to(dtype)

    with torch.no_grad():
        h, y = ops.combine_history_norm_modulate(history, weights, x=x, gate=gate, backend=backend, **options)
        total = (weights.double().view(count, 1, 1, -1) * history.double()).sum(0)
        if gate is not None:
            total = total * (gate[:, None] if gated == "2d" else gate).double()
        truth = total if x is None else total + x.double()
        plain = steps.combine_history(history, weights, x, gate)
        assert_close_to_truth(h, plain, truth, what="h")
        assert h.dtype == y.dtype == dtype
        # y is the norm of h as stored, whose rounding is not the norm's error
        assert_close_to_truth(
            y, adaln.norm_modulate(h, **options), adaln.norm_modulate(h.double(), **_double(options)), what="y"
        )
    assert h.data_ptr() != y.data_ptr()


@fuzz
@given(norms(), st.integers(0, 999), st.sampled_from(LAYOUTS), st.sampled_from([None, "reference"]))
def test_norm_modulate_difference(case, seed, layout, backend):
    shape, dtype, options = case
    x, stored = (_layout(layout, _random(seed + i, *shape).to(dtype)) for i in range(2))
    with torch.no_grad():
        y, sums = ops.norm_modulate_difference(x, stored, backend=backend, **options)
        plain = adaln.norm_modulate(x, **options)
        assert_close_to_truth(y, plain, adaln.norm_modulate(x.double(), **_double(options)), what="y")
        truth = torch.stack([(y.double() - stored.double()).abs().sum((1, 2)), stored.double().abs().sum((1, 2))], 1)
        assert_close_to_truth(sums, steps.relative_difference(y, stored), truth, what="sums")
    assert sums.dtype == torch.float32


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_equations_in_plain_torch(backend):
    """Taylor forecast of a residual, then DiT's adaLN; TeaCache's two sums (eq. 5)."""
    history, x, a = _random(0, 3, 2, 6, 32), _random(1, 2, 6, 32), _random(2, 2, 6, 32)
    scale, shift, gate = _random(3, 2, 96).chunk(3, 1)
    weights = torch.tensor([1.0, 2.0, 2.0])
    with torch.no_grad():
        h, y = ops.combine_history_norm_modulate(history, weights, scale, shift, x=x, gate=gate, backend=backend)
        wanted = x + gate[:, None] * (history[0] + 2 * history[1] + 2 * history[2])
        torch.testing.assert_close(h, wanted)
        modulated = F.layer_norm(wanted, (32,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        torch.testing.assert_close(y, modulated, rtol=1e-5, atol=1e-5)
        y, sums = ops.norm_modulate_difference(x, a, scale, shift, backend=backend)
        modulated = F.layer_norm(x, (32,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        torch.testing.assert_close(y, modulated, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums[:, 0] / sums[:, 1], (modulated - a).abs().mean((1, 2)) / a.abs().mean((1, 2)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_are_the_two_ops_they_replace(dtype):
    """The same kernels' arithmetic: `h` and `y` bit by bit."""
    history, x = _random(0, 3, 2, 7, 100).to(dtype), _random(1, 2, 7, 100).to(dtype)
    scale, shift = _random(2, 2, 7, 200).to(dtype).chunk(2, -1)
    for law in ("fp32", "narrow"):
        with torch.no_grad():
            h, y = ops.combine_history_norm_modulate(history, torch.ones(3), scale, shift, x=x, norm="none", law=law)
            assert torch.equal(h, ops.combine_history(history, torch.ones(3), x=x))
            assert torch.equal(y, ops.norm_modulate(h, scale, shift, norm="none", law=law))
            y, sums = ops.norm_modulate_difference(x, h, scale, shift, law=law)
            assert torch.equal(y, ops.norm_modulate(x, scale, shift, law=law))
            torch.testing.assert_close(sums, ops.relative_difference(y, h), rtol=1e-5, atol=0)


def test_nan_of_a_row_stays_there():
    x, stored = _random(0, 2, 3, 40), _random(1, 2, 3, 40)
    x[0, 1, 3] = float("nan")
    with torch.no_grad():
        y, sums = ops.norm_modulate_difference(x, stored)
    assert y.isnan().any(-1).sum() == 1
    assert sums.isnan().tolist() == [[True, False], [False, False]]


def test_constant_rows_without_eps():
    """The inverse deviation is infinite: only the elements of the row may count, not what pads it."""
    for d in (5, 24, 33):
        with torch.no_grad():
            _, sums = ops.norm_modulate_difference(torch.ones(1, 1, d), torch.ones(1, 1, d), norm="none", eps=0.0)
            assert sums.tolist() == [[0.0, d]]
            _, sums = ops.norm_modulate_difference(torch.zeros(1, 1, d), torch.ones(1, 1, d), norm="rms", eps=1e-6)
            assert sums.tolist() == [[d, d]]


def test_empty():
    with torch.no_grad():
        for shape in ((0, 4, 8), (2, 0, 8)):
            y, sums = ops.norm_modulate_difference(torch.zeros(shape), torch.zeros(shape), torch.zeros(1, 8))
            assert y.shape == shape
            assert torch.equal(sums, torch.zeros(shape[0], 2))
            h, y = ops.combine_history_norm_modulate(torch.zeros(3, *shape), torch.ones(3), torch.zeros(1, 8))
            assert h.shape == y.shape == shape


H, W, X, M = torch.zeros(3, 2, 6, 8), torch.ones(3), torch.zeros(2, 6, 8), torch.zeros(2, 8)
ROWS = torch.zeros(6, dtype=torch.int32)
BAD: list[tuple[tuple, dict[str, Any], type[Exception], str]] = [
    ((1, W), {}, TypeError, "history must be a torch.Tensor, got int"),
    ((X, W), {}, ValueError, r"history must be \(K, B, N, D\), got shape \(2, 6, 8\)"),
    ((H, W[:2]), {}, ValueError, r"weights has shape \(2,\); it must be \(3,\) or \(3, 8\)"),
    ((H, W), {"x": H}, ValueError, r"x has shape \(3, 2, 6, 8\); it must be \(2, 6, 8\)"),
    ((H, W), {"gate": torch.zeros(2, 4, 8)}, ValueError, "gate has 4 rows a sample .* must divide N=6"),
    ((H, W, torch.zeros(2, 4, 8)), {}, ValueError, "scale has 4 rows a sample .* must divide N=6"),
    ((H, W, M, torch.zeros(2, 7)), {}, ValueError, r"shift has shape \(2, 7\); x is \(2, 6, 8\)"),
    ((H, W, M), {"rows": ROWS + 2}, ValueError, r"rows holds values in \[2, 2\]; allowed are 0 to 1"),
    ((H, W), {"rows": ROWS}, ValueError, "rows is given without a modulation tensor"),
    ((H, W), {"norm": "batch"}, ValueError, "norm='batch' is not known; allowed are 'layer', 'rms', 'none'"),
    ((H, W), {"law": "wide"}, ValueError, "law='wide' is not known"),
    ((H, W), {"eps": -1.0}, ValueError, "eps=-1.0 must be a finite number, 0 or above"),
    ((H, W), {"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\); it must be \(8,\)"),
    ((H, W), {"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
]  # fmt: skip
BAD_DIFFERENCE: list[tuple[tuple, dict[str, Any], type[Exception], str]] = [
    ((1, X), {}, TypeError, "x must be a torch.Tensor, got int"),
    ((X, 1), {}, TypeError, "reference must be a torch.Tensor, got int"),
    ((H, H), {}, ValueError, r"x must be \(B, N, D\), got shape \(3, 2, 6, 8\)"),
    ((X, X[:1]), {}, ValueError, r"reference has shape \(1, 6, 8\); it must be that of x, \(2, 6, 8\)"),
    ((X, X.half()), {}, TypeError, "reference has dtype torch.float16; it must be that of x"),
    ((X, X.to("meta")), {"backend": "reference"}, ValueError, "reference is on meta, x on cpu"),
    ((X, X, torch.zeros(3, 8)), {}, ValueError, "scale has batch 3"),
    ((X, X, M, M.int()), {}, TypeError, "shift has dtype torch.int32"),
    ((X, X), {"offset": float("nan")}, ValueError, "offset=nan must be a finite number"),
    ((X, X), {"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
]


@pytest.mark.parametrize(
    ("function", "args", "keywords", "error", "message"),
    [
        *((ops.combine_history_norm_modulate, *case) for case in BAD),
        *((ops.norm_modulate_difference, *case) for case in BAD_DIFFERENCE),
    ],
)
def test_bad_input_is_named(function, args, keywords, error, message):
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            function(*args, **keywords)


@pytest.mark.parametrize("name", ["history", "weights", "x", "gate", "scale", "shift", "weight", "scale_table"])
def test_gradients_are_refused_by_combine(name):
    call = {"history": H, "weights": W, "x": X, "gate": M, "scale": M, "shift": M, "weight": M[0], "scale_table": M[0]}
    call[name] = call[name].clone().requires_grad_()
    with pytest.raises(ValueError, match=f"combine_history_norm_modulate has no derivative, but {name} requires grad"):
        ops.combine_history_norm_modulate(call.pop("history"), call.pop("weights"), **call)


@pytest.mark.parametrize("name", ["x", "reference", "scale", "shift", "bias", "shift_table"])
def test_gradients_are_refused_by_difference(name):
    call = {"x": X, "reference": X, "scale": M, "shift": M, "bias": M[0], "shift_table": M[0]}
    call[name] = call[name].clone().requires_grad_()
    with pytest.raises(ValueError, match=f"norm_modulate_difference has no derivative, but {name} requires grad"):
        ops.norm_modulate_difference(call.pop("x"), call.pop("reference"), **call)


def test_traced_whole():
    """Both are one node of a graph."""
    history, x, scale = _random(0, 2, 1, 4, 16), _random(1, 1, 4, 16), _random(2, 1, 16)

    @torch.compile(backend="eager", fullgraph=True)
    def run(history, x, scale):
        h, y = ops.combine_history_norm_modulate(history, torch.ones(2), scale, x=x)
        return h, *ops.norm_modulate_difference(h, y, scale)

    with torch.no_grad():
        h, y, sums = run(history, x, scale)
        wanted = ops.combine_history_norm_modulate(history, torch.ones(2), scale, x=x)
        assert torch.equal(h, wanted[0])
        assert torch.equal(y, ops.norm_modulate(h, scale))
        assert sums[0, 0] == 0
