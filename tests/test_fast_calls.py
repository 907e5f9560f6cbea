"""The fast path of the ops: which calls take it, and that what it leaves out is nothing that a call needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from maskaccel import ops
from maskaccel._native import native
from maskaccel.masks import TileMask, TokenIndex
from maskaccel.ops import _call, _registry
from maskaccel.ops.adaln import check, flags, schema
from maskaccel.ops.attention import check as attention_check
from maskaccel.ops.attention import quick
from maskaccel.ops.attention import schema as attention_schema
from maskaccel.ops.tokens import _run

pytestmark = pytest.mark.skipif(not native.has_cpu, reason=f"native library {native.state}: {native.reason}")
D = 16


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, A, M, V, ROWS = randn(2, 6, D), randn(2, 6, D, seed=1), randn(2, D, seed=2), randn(D, seed=3), torch.arange(6) % 2
ROWS = ROWS.to(torch.int32)
Q, C = randn(2, 6, 3, 8), randn(6, 4, seed=4)
HEADS, LSE = randn(2, 6, 3, 16, seed=5), randn(2, 3, 6, seed=6)
Q16, C8, BIAS = randn(2, 3, 3, 16, seed=7), randn(6, 8, seed=8), randn(1, 3, 6, 6, seed=9)
MASK = TileMask.from_tiles(torch.ones(1, 1, dtype=torch.bool), (6, 6), (16, 32))
PATTERN = TileMask.from_bool(torch.ones(6, 6, dtype=torch.bool).tril(), (16, 32))
INDEX, MASKED = TokenIndex.from_keep(torch.tensor([0, 2, 5]), 6), torch.tensor([[20, 3, 20, 20, 4, 20]]).expand(2, -1)
MASKED = MASKED.contiguous()
MERGE = ops.match_tokens(X, 0.5, grid=(2, 3), cell=(2, 3), seed=0)
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
    "tile_attention": lambda: ops.tile_attention(HEADS, HEADS, HEADS, scale=-0.3),
    "tile_attention, mask, lse": lambda: ops.tile_attention(HEADS, HEADS, HEADS, MASK, return_lse=True),
    "tile_attention, pattern": lambda: ops.tile_attention(HEADS, HEADS, HEADS, PATTERN),
    "tile_attention, bias": lambda: ops.tile_attention(HEADS, HEADS, HEADS, bias=BIAS),
    "tile_attention, epilogue": lambda: ops.tile_attention(HEADS, HEADS, HEADS, MASK, out_scale=LSE, out_add=HEADS),
    "tile_attention, keep": lambda: ops.tile_attention(
        HEADS, HEADS, HEADS, PATTERN, skip_threshold=-3, reference_lse=LSE, prune=True, return_keep=True
    ),
    "attention_column_sums": lambda: ops.attention_column_sums(HEADS, HEADS, LSE, PATTERN, bias=BIAS),
    "merge_attention": lambda: ops.merge_attention(HEADS, LSE, HEADS + 1, -LSE),
    "linear_attention": lambda: ops.linear_attention(HEADS, HEADS, HEADS, feature_map="elu1"),
    "gather_rows": lambda: ops.gather_rows(X, INDEX),
    "gather_modulate": lambda: ops.gather_modulate(X, INDEX, M, M[:, None]),
    "gather_modulate, tokens": lambda: ops.gather_modulate(X, INDEX, A, M, offset=0.5),
    "gather_modulate, no rows": lambda: ops.gather_modulate(X, INDEX, M, weight=V, return_rows=False),
    "scatter_merge": lambda: ops.scatter_merge(X, A[:, :3], INDEX),
    "scatter_merge, add_gated": lambda: ops.scatter_merge(X, A[:, :3], INDEX, mode="add_gated", gate=M),
    "scatter_merge, mask_token": lambda: ops.scatter_merge(
        None, A[:, :3], INDEX, mode="mask_token", mask_token=V[None], pos=X[0]
    ),
    "scatter_merge, blend": lambda: ops.scatter_merge(X, A[:, :3], INDEX, mode="blend", lam=0.3),
    "scatter_merge, zero": lambda: ops.scatter_merge(None, A[:, :3], INDEX, mode="zero"),
    "merge_tokens": lambda: ops.merge_tokens(X, MERGE),
    "unmerge_tokens": lambda: ops.unmerge_tokens(X[:, : MERGE.merged], MERGE),
    "random_keep": lambda: ops.random_keep(2, 6, 3, seed=5, step=7),
    "random_keep, shared": lambda: ops.random_keep(2, 6, 0.5, seed=-5, step=torch.tensor([7]), shared=True),
    "select_active": lambda: ops.select_active(LSE[:, 0].contiguous(), None, 3),
    "select_active, age": lambda: ops.select_active(LSE[:, 0].contiguous(), ROWS.expand(2, -1).contiguous(), 0.5),
    "write_kv_rows": lambda: written(False),
    "write_kv_rows, pre": lambda: written(True),
    "read_kv_rows": lambda: ops.read_kv_rows(HEADS.to(torch.float8_e4m3fn), LSE.mT.contiguous(), torch.float32),
    "sample_logits": lambda: ops.sample_logits(X, MASKED, 20, seed=3, step=2, confidence="margin", scaled=True),
    "unmask_select": lambda: ops.unmask_select(LSE[:, 0].contiguous(), MASKED, MASKED, 20, 2, temperature=0.5),
    "unmask_select, counts": lambda: ops.unmask_select(
        LSE[:, 0].contiguous(), MASKED, MASKED, 20, torch.ones(2, 1, dtype=torch.int32)
    ),
    "confidence_unmask": lambda: ops.confidence_unmask(X, MASKED, 20, 2, threshold=0.1, order="entropy"),
}


def written(pre: bool) -> tuple:
    """Caches are written in place."""
    caches = [HEADS.clone(), HEADS.clone() + 1]
    store = "pre" if pre else "post"
    q = ops.write_kv_rows(Q16, HEADS[:, :3], *caches, INDEX, q=Q16, k_weight=V, cos=C8, sin=C8, norm="rms", store=store)
    return q, *caches


def tensors(result) -> list[Tensor]:
    """The tensors of a result, those of an index too."""
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


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
            (_run, ("run", "index_fits", "rows_of")),
        ):
            for name in names:
                monkeypatch.setattr(module, name, slow)
        got = call()
    assert all(map(torch.equal, tensors(got), tensors(expected)))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_fast_calls_equal_the_checked_ones(call, monkeypatch):
    """The same bits, whichever way the arguments went."""
    fast = call()

    def no_fast_path(*args):
        raise LookupError

    monkeypatch.setattr("maskaccel.ops.adaln.api.fast", no_fast_path)
    monkeypatch.setattr("maskaccel.ops.adaln.api.bare", lambda *args: None)
    monkeypatch.setattr(_call, "bare", lambda *args: None)
    monkeypatch.setattr(quick, "attention", no_fast_path)
    monkeypatch.setattr(quick, "column_sums", no_fast_path)
    for name in ("fast", "undifferentiated"):
        monkeypatch.setattr(_call, name, no_fast_path)
    checked = call()
    assert len(tensors(fast)) == len(tensors(checked))
    assert all(map(torch.equal, tensors(fast), tensors(checked)))


def test_gradients_are_the_same_on_both_ways(monkeypatch):
    """Under autograd too the fast path leaves out checks alone."""
    calls = {
        "norm_modulate": lambda t: ops.norm_modulate(t[:, :, 0], t[:, 0, 1], t[:1, 1, 1]),
        "pair": lambda t: sum(ops.norm_modulate(t[:, :, 0], t[:, 0, 1], scale2=t[:, 1, 1], offset=0.0)),
        "fused": lambda t: sum(
            ops.gate_residual_norm_modulate(t[:, :, 0], t[:, :, 1], t[:, 0, 2], t[:, 1, 2], eps=1e-3, gate_act="tanh")
        ),
        "fused, no residual": lambda t: ops.gate_residual_norm_modulate(
            t[:, :, 0], t[:, :, 1], t[:, 0, 2], scale2=t[:, 1, 2], return_residual=False
        )[1],
        "gate_residual": lambda t: ops.gate_residual(t[:, :, 0], t[:, :, 1], t[:, 0, 2]),
        "qk_norm_rope": lambda t: sum(ops.qk_norm_rope(t, t, V, None, C8, C8)),
        "tile_attention, no mask": lambda t: sum(
            part.sum() for part in ops.tile_attention(t, t, t, scale=0.3, return_lse=True)
        ),
        "tile_attention": lambda t: ops.tile_attention(t, t, t, PATTERN, bias=BIAS.clone().requires_grad_()),
        "gather_modulate": lambda t: ops.gather_modulate(t[:, :, 0], INDEX, t[:, 0, 0], t[:1, 1, 0])[1],
        "scatter_merge": lambda t: ops.scatter_merge(t[:, :, 0], t[:, :3, 1], INDEX, mode="add_gated", gate=t[:, 0, 0]),
        "merge_tokens": lambda t: ops.merge_tokens(t[:, :, 0], MERGE),
    }

    def gradients() -> dict[str, Tensor]:
        leaf = HEADS.clone().requires_grad_()
        return {name: torch.autograd.grad(call(leaf).square().sum(), leaf)[0] for name, call in calls.items()}

    fast = gradients()
    assert ops.norm_modulate(X.clone().requires_grad_()).grad_fn.name().startswith("norm_modulate_bare_maskaccel")
    for module in ("maskaccel.ops._call", "maskaccel.ops.adaln.api"):
        monkeypatch.setattr(f"{module}.tracing", lambda: True)  # no call is quick then
    assert ops.norm_modulate(X.clone().requires_grad_()).grad_fn.name().startswith("norm_modulate_maskaccel")
    checked = gradients()
    for name in calls:
        assert torch.equal(fast[name], checked[name]), name


def test_packed_numbers_of_attention():
    assert attention_schema.packed(128, 64, 0.125) == 8 | 2 << 16 | 0x3E000000 << 32
    assert attention_schema.packed(16, 32, -1.0) == 1 | 1 << 16 | (0xBF800000 - (1 << 32)) << 32
    for numbers in ((16 << 16, 32, 1.0), (16, 32 << 16, 1.0), (16, 32, 1e39), (16, 32, float("nan"))):
        assert attention_schema.packed(*numbers) is None


def test_constants_are_held_where_that_is_safe():
    """One tensor for a number and a place; none of a mode that makes tensors of no memory."""
    place = torch.device("cpu")
    assert _run.constant(3, (1,), torch.int64, place) is _run.constant(3, (1,), torch.int64, place)
    with FakeTensorMode():
        assert type(_run.constant(77, (1,), torch.int64, place)) is FakeTensor
    assert type(_run.constant(77, (1,), torch.int64, place)) is Tensor


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
