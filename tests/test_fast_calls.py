"""The fast path of the ops: which calls take it, and that what it leaves out is nothing that a call needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maskaccel import ops
from maskaccel._native import native
from maskaccel.ops import _call, _registry
from maskaccel.ops.adaln import check, flags, schema
from maskaccel.ops.attention import check as attention_check

pytestmark = pytest.mark.skipif(not native.has_cpu, reason=f"native library {native.state}: {native.reason}")
D = 16


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, A, M, V, ROWS = randn(2, 6, D), randn(2, 6, D, seed=1), randn(2, D, seed=2), randn(D, seed=3), torch.arange(6) % 2
ROWS = ROWS.to(torch.int32)
Q, C = randn(2, 6, 3, 8), randn(6, 4, seed=4)
HEADS, LSE = randn(2, 6, 3, 16, seed=5), randn(2, 3, 6, seed=6)
CALLS = {
    "norm_modulate": lambda: ops.norm_modulate(X, M, M),
    "norm_modulate, no operand": lambda: ops.norm_modulate(X),
    "norm_modulate, offset 0": lambda: ops.norm_modulate(X, M, norm="none", offset=0),
    "norm_modulate, other offset": lambda: ops.norm_modulate(X, M, offset=0.5),
    "norm_modulate, great eps": lambda: ops.norm_modulate(X, M, eps=1e300),
    "norm_modulate, weight": lambda: ops.norm_modulate(X, M, M, weight=V),
    "norm_modulate, tables": lambda: ops.norm_modulate(X, M, M, scale_table=V, shift_table=V),
    "norm_modulate, pair": lambda: ops.norm_modulate(X, M, M, scale2=M, shift2=M),
    "norm_modulate, rows": lambda: ops.norm_modulate(X, M, M, rows=ROWS),
    "norm_modulate, pair, rows": lambda: ops.norm_modulate(X, M, M, scale2=M, rows=ROWS),
    "fused": lambda: ops.gate_residual_norm_modulate(X, A, M, M, M),
    "fused, post_eps": lambda: ops.gate_residual_norm_modulate(X, A, M, M, M, post_norm="rms", post_eps=1e-3),
    "fused, pair": lambda: ops.gate_residual_norm_modulate(X, A, M, M, M, scale2=M, shift2=M),
    "fused, rows": lambda: ops.gate_residual_norm_modulate(X, A, M, M, M, rows=ROWS),
    "fused, no residual": lambda: ops.gate_residual_norm_modulate(X, A, M, M, M, return_residual=False),
    "fused, tables, no residual": lambda: ops.gate_residual_norm_modulate(
        X, A, M, M, M, gate_table=V, return_residual=False
    ),
    "gate_residual": lambda: ops.gate_residual(X, A, M),
    "gate_residual, rows": lambda: ops.gate_residual(X, A, M, rows=ROWS),
    "gate_residual, sandwich": lambda: ops.gate_residual(X, A, M, post_norm="rms", post_weight=V, clip=True),
    "qk_norm_rope": lambda: ops.qk_norm_rope(Q, Q, None, None, C, C),
    "qk_norm_rope, bias": lambda: ops.qk_norm_rope(Q, Q, norm="layer", q_bias=V[:8], k_bias=V[:8]),
    "qk_norm_rope, positions": lambda: ops.qk_norm_rope(Q, Q, None, None, C, C, positions=ROWS),
    "gated_activation": lambda: ops.gated_activation(X),
    "gated_activation, four dims": lambda: ops.gated_activation(Q, "geglu"),
    "gated_activation, view": lambda: ops.gated_activation(X[..., 2:10]),
    "relative_difference": lambda: ops.relative_difference(X, A),
    "relative_difference, base": lambda: ops.relative_difference(X, A, base=X),
    "combine_history": lambda: ops.combine_history(X[None], torch.ones(1), x=X, gate=M),
    "merge_attention": lambda: ops.merge_attention(HEADS, LSE, HEADS + 1, -LSE),
    "linear_attention": lambda: ops.linear_attention(HEADS, HEADS, HEADS, feature_map="elu1"),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad mode"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_common_calls_skip_the_checks(call, grad, monkeypatch):
    """Calls within the contract never reach the slow path, also where autograd is on but nothing requires grad."""

    def slow(*args, **kwargs):
        raise AssertionError("this call went through the checks")

    with torch.set_grad_enabled(grad):
        expected = call()
        for module, names in (
            (check, ("norm_arguments", "qk_arguments", "activation_arguments")),
            (_call, ("checked",)),
            (attention_check, ("qkv",)),
        ):
            for name in names:
                monkeypatch.setattr(module, name, slow)
        got = call()
    if isinstance(got, Tensor):
        got, expected = (got,), (expected,)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_fast_calls_equal_the_checked_ones(call, monkeypatch):
    """The same bits, whichever way the arguments went."""
    fast = call()

    def no_fast_path(*args):
        raise LookupError

    monkeypatch.setattr("maskaccel.ops.adaln.api.fast", no_fast_path)
    monkeypatch.setattr("maskaccel.ops.adaln.api.bare", lambda *args: None)
    monkeypatch.setattr(_call, "fast", no_fast_path)
    checked = call()
    if isinstance(fast, Tensor):
        fast, checked = (fast,), (checked,)
    assert all(map(torch.equal, fast, checked))


def test_numbers_that_do_not_fit_one_integer():
    assert flags.packed(5, 1e-6, 1.0) == 5 | schema.OFFSET_ONE | 0x358637BD << 32
    assert flags.packed(0, 0.0, 0.0) == 0
    for eps, offset in ((-1e-6, 1.0), (float("nan"), 1.0), (float("inf"), 0.0), (1e300, 0.0), (1e-6, 0.5)):
        assert flags.packed(0, eps, offset) is None


@pytest.mark.parametrize("name", ["rows", "positions"])
def test_index_out_of_range_is_refused_before_memory_is_read(name):
    for low, high in ((-1, 0), (0, 2), (0, 2**31 - 1)):
        index = torch.full((6,), high, dtype=torch.int32)
        index[3] = low
        with pytest.raises(ValueError, match=rf"{name} holds values in \[{low}, {high}\]; allowed are 0 to 1"):
            if name == "rows":
                ops.norm_modulate(X, M, rows=index)
            else:
                ops.qk_norm_rope(Q, Q, None, None, C[:2], C[:2], positions=index)


def test_index_out_of_range_is_refused_in_a_compiled_call():
    """Tracing cannot look at values; the kernel does."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda rows: ops.norm_modulate(X, M, rows=rows), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ROWS), ops.norm_modulate(X, M, rows=ROWS))
        with pytest.raises(RuntimeError, match="rows holds values from 0 to 7; allowed are 0 to 1"):
            compiled(ROWS * 7)


class _Modulated(nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return ops.gated_activation(ops.norm_modulate(x, scale))


@pytest.mark.parametrize("strict", [False, True])
def test_export_records_the_differentiable_ops(strict):
    """An export by running sees ops with a derivative and any device, not the raw kernels."""
    program = torch.export.export(_Modulated(), (X, M), strict=strict)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    for op in ("norm_modulate", "gated_activation"):
        assert any(name.startswith(f"maskaccel.{op}.") for name in names), names
    torch.testing.assert_close(program.module()(X, M), _Modulated()(X, M))


def test_table_of_cosines_that_requires_grad_is_refused():
    table = C.clone().requires_grad_()
    with pytest.raises(ValueError, match="cos and sin get no gradient; pass them detached"):
        ops.qk_norm_rope(Q, Q, None, None, table, C)
    with torch.no_grad():
        ops.qk_norm_rope(Q, Q, None, None, table, C)


META = {
    "norm_modulate": lambda: ops.norm_modulate(X, M.to("meta")),
    "norm_modulate, grad": lambda: ops.norm_modulate(X.clone().requires_grad_(), M.to("meta")),
    "norm_modulate, weight": lambda: ops.norm_modulate(X, M, weight=V.to("meta")),
    "fused": lambda: ops.gate_residual_norm_modulate(X, A.to("meta"), M, M, M),
    "gate_residual": lambda: ops.gate_residual(X, A, M.to("meta")),
    "qk_norm_rope": lambda: ops.qk_norm_rope(Q, Q.to("meta")),
    "relative_difference": lambda: ops.relative_difference(X, A.to("meta")),
    "combine_history": lambda: ops.combine_history(X[None], torch.ones(1, device="meta")),
    "combine_sites": lambda: ops.combine_sites(X[None, None], torch.ones(1), x=X.to("meta")),
    "norm_modulate_difference": lambda: ops.norm_modulate_difference(X, A.to("meta")),
    "kmeans": lambda: ops.kmeans(X, 2, iters=1, init=X[:, :2].to("meta")),
    "scatter_combine": lambda: ops.scatter_combine(
        X[None].clone(), torch.ones(1), X[:, :2].to("meta"), torch.zeros(2, 2, dtype=torch.int32)
    ),
}


@pytest.mark.parametrize("call", META.values(), ids=META)
def test_one_meta_tensor_among_others_is_an_error(call):
    """torch would run the shape function in place of the kernel, and return memory that nobody wrote."""
    with pytest.raises(ValueError, match=r"is on (cpu|meta), .* on (cpu|meta); they must be on one device"):
        call()


def test_schemas_name_tensors_before_numbers():
    """The numbers that a derivative reads are the inputs after the tensors."""
    assert _registry._leading_tensors("(Tensor x, Tensor? y, int n, float e) -> Tensor") == 2
    assert _registry._leading_tensors("(Tensor(a!) x, Tensor(b!)? y) -> (Tensor, Tensor)") == 2
    with pytest.raises(AssertionError):
        _registry._leading_tensors("(Tensor x, int n, Tensor y) -> Tensor")


def test_derivatives_inside_and_after_a_transform():
    """The short way to autograd is for calls outside of `torch.func`; a tensor that leaked out of it is one too."""
    leaked = []

    def loss(x: Tensor) -> Tensor:
        leaked.append(x)
        return ops.norm_modulate(x, M, M).square().sum()

    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ops.norm_modulate(x, M, M).square().sum(), x)
    torch.testing.assert_close(torch.func.grad(loss)(X), expected)
    scale = M.clone().requires_grad_()
    for t in (leaked[0], X):
        (got,) = torch.autograd.grad(ops.norm_modulate(t, scale).square().sum(), scale)
        torch.testing.assert_close(got, torch.autograd.grad(ops.norm_modulate(X, scale).square().sum(), scale)[0])
