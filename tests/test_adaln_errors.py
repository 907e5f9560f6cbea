"""Bad input of the fused adaLN ops, and which backend a call takes: every error names argument, value and what is
allowed."""

from __future__ import annotations

import pytest
import torch

import maskaccel
from maskaccel import ops
from maskaccel.ops._backends import refusal
from maskaccel.ops.adaln import reference

X, M = torch.zeros(2, 6, 8), torch.zeros(2, 8)
Q, C = torch.zeros(2, 4, 2, 8), torch.zeros(4, 4)
I = torch.int32  # noqa: E741
BAD = [
    ("norm_modulate", {"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ("norm_modulate", {"x": X.long()}, TypeError, "x has dtype torch.int64; allowed are"),
    ("norm_modulate", {"x": X[0]}, ValueError, r"x must be \(B, N, D\), got shape \(6, 8\)"),
    ("norm_modulate", {"x": X[..., :0]}, ValueError, r"x has an empty last dimension"),
    (
        "norm_modulate",
        {"x": X, "norm": "batch"},
        ValueError,
        "norm='batch' is not known; allowed are 'layer', 'rms', 'none'",
    ),
    ("norm_modulate", {"x": X, "law": "wide"}, ValueError, "law='wide' is not known; allowed are 'fp32', 'narrow'"),
    ("norm_modulate", {"x": X, "weight_offset": 2}, ValueError, "weight_offset=2 is not known"),
    ("norm_modulate", {"x": X, "eps": -1.0}, ValueError, "eps=-1.0 must be a finite number, 0 or above"),
    ("norm_modulate", {"x": X, "eps": float("nan")}, ValueError, "eps=nan must be a finite number"),
    ("norm_modulate", {"x": X, "eps": None}, ValueError, "eps=None must be a finite number"),
    ("norm_modulate", {"x": X, "offset": float("inf")}, ValueError, "offset=inf must be a finite number"),
    ("norm_modulate", {"x": X, "scale": torch.zeros(3, 8)}, ValueError, r"scale has batch 3 .* allowed 1, 2"),
    ("norm_modulate", {"x": X, "scale": torch.zeros(2, 9)}, ValueError, r"scale has shape \(2, 9\); x is \(2, 6, 8\)"),
    ("norm_modulate", {"x": X, "shift": torch.zeros(8)}, ValueError, r"shift has shape \(8,\)"),
    ("norm_modulate", {"x": X, "shift": torch.zeros(2, 4, 8)}, ValueError, r"shift has 4 rows .* must divide N=6"),
    ("norm_modulate", {"x": X, "shift": torch.zeros(2, 0, 8)}, ValueError, r"shift has 0 rows .* must divide N=6"),
    ("norm_modulate", {"x": X, "scale2": M.int()}, TypeError, "scale2 has dtype torch.int32"),
    (
        "norm_modulate",
        {"x": X, "scale": M.to("meta"), "backend": "reference"},
        ValueError,
        "scale is on meta, x on cpu",
    ),
    ("norm_modulate", {"x": X, "scale": 1.0}, TypeError, "scale must be a torch.Tensor, got float"),
    ("norm_modulate", {"x": X, "weight": torch.zeros(7)}, ValueError, r"weight has shape \(7,\); it must be \(8,\)"),
    ("norm_modulate", {"x": X, "bias": torch.zeros(1, 8)}, ValueError, r"bias has shape \(1, 8\); it must be \(8,\)"),
    ("norm_modulate", {"x": X, "scale_table": torch.zeros(9)}, ValueError, r"scale_table has shape \(9,\)"),
    (
        "norm_modulate",
        {"x": X, "scale": M, "rows": torch.zeros(6)},
        TypeError,
        "rows has dtype torch.float32; it must be int32",
    ),
    (
        "norm_modulate",
        {"x": X, "scale": M, "rows": torch.zeros(5, dtype=I)},
        ValueError,
        r"rows has shape \(5,\); it must be \(6,\) or",
    ),
    (
        "norm_modulate",
        {"x": X, "scale": M, "rows": torch.full((6,), 2, dtype=I)},
        ValueError,
        r"values in \[2, 2\]; allowed are 0 to 1",
    ),
    ("norm_modulate", {"x": X, "scale": M, "rows": torch.full((6,), -1, dtype=I)}, ValueError, r"values in \[-1, -1\]"),
    (
        "norm_modulate",
        {"x": X, "rows": torch.zeros(6, dtype=I)},
        ValueError,
        "rows is given without a modulation tensor",
    ),
    (
        "norm_modulate",
        {"x": X, "scale": X[:, :1], "rows": torch.zeros(6, dtype=I)},
        ValueError,
        r"with rows it must be \(R, 8\)",
    ),
    ("norm_modulate", {"x": X, "backend": "gpu"}, ValueError, "unknown backend 'gpu'; allowed are"),
    (
        "norm_modulate",
        {"x": X, "backend": "cuda"},
        ValueError,
        "backend='cuda' cannot run this call: the tensors are on cpu",
    ),
    ("norm_modulate", {"x": X.double(), "backend": "cpu"}, ValueError, "dtype torch.float64 is not served by kernels"),
    ("gate_residual", {"x": X, "a": X[:1]}, ValueError, r"a has shape \(1, 6, 8\); it must be that of x"),
    ("gate_residual", {"x": X, "a": X.bfloat16()}, TypeError, "a has dtype torch.bfloat16; it must be that of x"),
    ("gate_residual", {"x": X, "a": None}, TypeError, "a must be a torch.Tensor, got NoneType"),
    (
        "gate_residual",
        {"x": X, "a": X, "gate_act": "relu"},
        ValueError,
        "gate_act='relu' is not known; allowed are 'none', 'tanh'",
    ),
    ("gate_residual", {"x": X, "a": X, "post_norm": "batch"}, ValueError, "post_norm='batch' is not known"),
    ("gate_residual", {"x": X, "a": X, "post_weight": M[0]}, ValueError, "post_weight is given but post_norm is None"),
    (
        "gate_residual",
        {"x": X, "a": X, "post_norm": "rms", "post_eps": -1},
        ValueError,
        "eps=-1 must be a finite number",
    ),
    ("gate_residual", {"x": X, "a": X, "gate_table": M}, ValueError, r"gate_table has shape \(2, 8\)"),
    ("gate_residual_norm_modulate", {"x": X, "a": X, "gate": M[:, :4]}, ValueError, r"gate has shape \(2, 4\)"),
    (
        "gate_residual_norm_modulate",
        {"x": X, "a": X, "post_norm": "rms", "post_eps": "x"},
        ValueError,
        "post_eps='x' must be",
    ),
    ("qk_norm_rope", {"q": X, "k": Q}, ValueError, r"q must be \(B, S, H, Dh\), got shape \(2, 6, 8\)"),
    ("qk_norm_rope", {"q": Q, "k": None}, TypeError, "k must be a torch.Tensor, got NoneType"),
    ("qk_norm_rope", {"q": Q, "k": Q[:1]}, ValueError, r"k has shape \(1, 4, 2, 8\); q is \(2, 4, 2, 8\)"),
    ("qk_norm_rope", {"q": Q, "k": Q.half()}, TypeError, "k has dtype torch.float16; it must be that of q"),
    (
        "qk_norm_rope",
        {"q": Q, "k": Q, "rope": "neox"},
        ValueError,
        "rope='neox' is not known; allowed are 'interleaved', 'half'",
    ),
    (
        "qk_norm_rope",
        {"q": Q, "k": Q, "q_weight": torch.zeros(16)},
        ValueError,
        r"q_weight has shape \(16,\); it must be \(8,\)",
    ),
    (
        "qk_norm_rope",
        {"q": Q, "k": Q, "k_bias": M[0], "across_heads": True},
        ValueError,
        r"k_bias has shape \(8,\); it must be \(16,\)",
    ),
    ("qk_norm_rope", {"q": Q, "k": Q, "cos": C}, ValueError, "sin is missing; pass both cos and sin"),
    (
        "qk_norm_rope",
        {"q": Q, "k": Q, "cos": C, "sin": C[:2]},
        ValueError,
        r"sin has shape \(2, 4\); it must be that of cos",
    ),
    (
        "qk_norm_rope",
        {"q": Q, "k": Q, "cos": C[:, :3], "sin": C[:, :3]},
        ValueError,
        r"cos has shape \(4, 3\); it must be .* T=8 or 4",
    ),
    ("qk_norm_rope", {"q": Q, "k": Q, "cos": C[:3], "sin": C[:3]}, ValueError, r"cos has 3 rows .* q has 4 tokens"),
    ("qk_norm_rope", {"q": Q, "k": Q[:, :2], "cos": C, "sin": C}, ValueError, "k has 2 tokens, q has 4"),
    (
        "qk_norm_rope",
        {"q": Q, "k": Q, "cos": C.expand(3, 4, 4), "sin": C.expand(3, 4, 4)},
        ValueError,
        "cos has batch 3; allowed are 1 and 2",
    ),
    (
        "qk_norm_rope",
        {"q": Q, "k": Q, "positions": torch.zeros(4, dtype=I)},
        ValueError,
        "positions is given without cos and sin",
    ),
    (
        "qk_norm_rope",
        {"q": Q, "k": Q, "cos": C, "sin": C, "positions": torch.full((4,), 9, dtype=I)},
        ValueError,
        r"positions holds values in \[9, 9\]; allowed are 0 to 3",
    ),
    (
        "qk_norm_rope",
        {"q": Q[..., :7], "k": Q[..., :7], "cos": C, "sin": C},
        ValueError,
        "q has head dim 7; RoPE needs an even one",
    ),
    ("qk_norm_rope", {"q": Q, "k": Q, "across_heads": "yes"}, ValueError, "across_heads='yes' is not known"),
    ("gated_activation", {"x": 1}, TypeError, "x must be a torch.Tensor, got int"),
    (
        "gated_activation",
        {"x": X, "kind": "relu"},
        ValueError,
        "kind='relu' is not known; allowed are 'swiglu', 'geglu', 'gelu_tanh'",
    ),
    (
        "gated_activation",
        {"x": X[..., :7]},
        ValueError,
        r"x has shape \(2, 6, 7\); for 'swiglu' its last dim must be even",
    ),
    ("gated_activation", {"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\); for 'swiglu'"),
]


@pytest.mark.parametrize(("op", "arguments", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(op, arguments, error, message):
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            getattr(ops, op)(**arguments)


def test_tables_get_no_gradient():
    cos = C.clone().requires_grad_()
    with pytest.raises(ValueError, match="cos and sin get no gradient; pass them detached"):
        ops.qk_norm_rope(Q, Q, cos=cos, sin=C)
    with torch.no_grad():
        assert ops.qk_norm_rope(Q, Q, cos=cos, sin=C)[0].shape == Q.shape


def test_a_call_that_needs_normalising_gives_the_same():
    """What the kernels do not take as it is (a strided last dim, mixed dtypes) is made dense and called again."""
    x = torch.randn(2, 6, 8)
    scale = torch.randn(2, 8, 2)[..., 0]
    torch.testing.assert_close(ops.norm_modulate(x, scale), reference.norm_modulate(x, scale.contiguous()))


def test_explain_and_selection_agree():
    reasons = maskaccel.explain("norm_modulate", X)
    assert list(reasons) == ["cuda", "cpu", "triton", "reference"]
    assert reasons["reference"] is None
    assert "the tensors are on cpu" in reasons["cuda"]
    assert all(refusal(name, X.device, X.dtype) == reason for name, reason in reasons.items())
    for name, reason in reasons.items():
        if reason is None:
            torch.testing.assert_close(ops.norm_modulate(X, backend=name), reference.norm_modulate(X))
        else:
            with pytest.raises(ValueError, match=f"backend='{name}' cannot run this call"):
                ops.norm_modulate(X, backend=name)
    assert "float64 is not served" in maskaccel.explain("norm_modulate", X.double())["cpu"]
    with pytest.raises(ValueError, match="op='nothing' is not known"):
        maskaccel.explain("nothing")
