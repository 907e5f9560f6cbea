"""Host overhead: the calls of `overhead.py`, on operands so small that the kernel costs next to nothing.

For one op also the ways to the same kernel: the public function, the raw op that it calls, and eager torch for scale.
The difference between the first two is what `maskaccel.ops` adds.
"""

from __future__ import annotations

import overhead
import pytest
import torch

from maskaccel import _native, ops
from maskaccel.bench.registry import OPS

ROUNDS = {"rounds": 100, "iterations": 100, "warmup_rounds": 5}
PLAIN, LEAVES = (overhead.Operands("cpu", torch.float32, grad) for grad in (False, True))
INFERENCE = {**overhead.peers(PLAIN), **overhead.differentiable(PLAIN), **overhead.others(PLAIN)}
TRAINING = {**overhead.peers(LEAVES), **overhead.differentiable(LEAVES)}


@pytest.mark.parametrize("name", INFERENCE)
@pytest.mark.benchmark(group="overhead: inference")
def test_inference(benchmark, name):
    benchmark.pedantic(INFERENCE[name], **ROUNDS)


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.benchmark(group="overhead: under autograd")
def test_training(benchmark, name):
    with torch.enable_grad():
        benchmark.pedantic(TRAINING[name], **ROUNDS)


@pytest.mark.benchmark(group="overhead: norm_modulate, all ways")
def test_norm_modulate_public(benchmark):
    x, scale = torch.randn(1, 1, 16), torch.randn(1, 16)
    benchmark.pedantic(ops.norm_modulate, args=(x, scale, scale), **ROUNDS)


@pytest.mark.skipif(_native.native.state != "loaded", reason="the native library is not built (`make native`)")
@pytest.mark.benchmark(group="overhead: norm_modulate, all ways")
def test_norm_modulate_raw(benchmark):
    x, scale = torch.randn(1, 1, 16), torch.randn(1, 16)
    raw = torch.ops.maskaccel_raw.norm_modulate.default
    args = (x, scale, scale, None, None, None, None, None, 1e-6, 1.0, 0)
    benchmark.pedantic(raw, args=args, **ROUNDS)


@pytest.mark.benchmark(group="overhead: norm_modulate, all ways")
def test_norm_modulate_eager(benchmark):
    op = OPS["norm_modulate"]
    inputs = op.inputs((1, 1, 16), torch.float32, torch.device("cpu"))
    benchmark.pedantic(op.eager, args=(inputs,), **ROUNDS)
