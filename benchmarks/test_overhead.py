"""Host overhead: one call on tensors so small that the kernel costs next to nothing.

Three ways to the same kernel: the public function, the raw op that it calls, and one eager torch op for scale. The
difference between the first two is what `maskaccel.ops` adds; `extra_info` holds the number of elements.
"""

from __future__ import annotations

import pytest
import torch

from maskaccel import _native, ops
from maskaccel.bench.registry import OPS

SHAPES = {
    "norm_modulate": (1, 1, 16),
    "gate_residual_norm_modulate": (1, 1, 16),
    "gate_residual": (1, 1, 16),
    "qk_norm_rope": (1, 1, 1, 16),
    "gated_activation.swiglu": (1, 1, 32),
    "relative_difference": (1, 1, 16),
    "combine_history": (2, 1, 1, 16),
    "combine_sites": (2, 2, 1, 1, 16),
    "gram": (2, 1, 1, 16),
    "combine_history_norm_modulate": (2, 1, 1, 16),
    "norm_modulate_difference": (1, 1, 16),
    "tile_attention": (1, 8, 1, 16),
    "merge_attention": (1, 8, 1, 16),
    "linear_attention": (1, 8, 1, 16),
}
CALLS = {"rounds": 200, "iterations": 100, "warmup_rounds": 5}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.benchmark(group="overhead: public op")
def test_public_op(benchmark, name):
    op = OPS[name]
    inputs = op.inputs(SHAPES[name], torch.float32, torch.device("cpu"))
    benchmark.extra_info["shape"] = SHAPES[name]
    benchmark.pedantic(op.run, args=(inputs, None), **CALLS)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.benchmark(group="overhead: norm_modulate, all ways")
def test_norm_modulate_public(benchmark, grad):
    x, scale = torch.randn(1, 1, 16, requires_grad=grad), torch.randn(1, 16)
    with torch.set_grad_enabled(grad):
        benchmark.pedantic(ops.norm_modulate, args=(x, scale, scale), **CALLS)


@pytest.mark.skipif(_native.native.state != "loaded", reason="the native library is not built (`make native`)")
@pytest.mark.benchmark(group="overhead: norm_modulate, all ways")
def test_norm_modulate_raw(benchmark):
    x, scale = torch.randn(1, 1, 16), torch.randn(1, 16)
    raw = torch.ops.maskaccel_raw.norm_modulate.default
    args = (x, scale, scale, None, None, None, None, None, 1e-6, 1.0, 0)
    benchmark.pedantic(raw, args=args, **CALLS)


@pytest.mark.benchmark(group="overhead: norm_modulate, all ways")
def test_norm_modulate_eager(benchmark):
    op = OPS["norm_modulate"]
    inputs = op.inputs((1, 1, 16), torch.float32, torch.device("cpu"))
    benchmark.pedantic(op.eager, args=(inputs,), **CALLS)


@pytest.mark.benchmark(group="overhead: norm_modulate, all ways")
def test_one_torch_op(benchmark):
    x = torch.randn(1, 1, 16)
    benchmark.pedantic(torch.add, args=(x, x), **CALLS)
