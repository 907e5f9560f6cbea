"""CPU timings of every op against eager, on a shape small enough to repeat often.

The acceptance shapes are timed by `python -m maskaccel.bench` (interleaved rounds); this suite follows the same
registry over time with pytest-benchmark's own statistics (`--benchmark-autosave`, `--benchmark-compare`).
"""

from __future__ import annotations

import pytest
import torch

from maskaccel.bench.registry import DTYPES, OPS
from maskaccel.bench.runner import Oracle, backends_for

SHAPES = {
    "norm_modulate": (2, 256, 1152),
    "gate_residual_norm_modulate": (2, 256, 1152),
    "gate_residual": (2, 256, 1152),
    "qk_norm_rope": (1, 256, 16, 72),
    "gated_activation.swiglu": (2, 256, 4608),
    "gated_activation.geglu": (2, 256, 4608),
    "relative_difference": (2, 256, 1152),
    "combine_history": (3, 2, 256, 1152),
    "combine_sites": (8, 2, 2, 256, 1152),
    "gram": (3, 2, 256, 1152),
    "combine_history_norm_modulate": (3, 2, 256, 1152),
    "norm_modulate_difference": (2, 256, 1152),
}
CPU = torch.device("cpu")


@pytest.mark.parametrize("provider", ["cpu", "eager"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_forward(benchmark, name, dtype, provider):
    op = OPS[name]
    if provider != "eager" and provider not in backends_for(CPU, DTYPES[dtype]):
        pytest.skip("the native library is not built (`make native`)")
    inputs = op.inputs(SHAPES[name], DTYPES[dtype], CPU)
    benchmark.group = f"{name} {dtype}"
    benchmark.extra_info.update(shape=SHAPES[name], bytes=op.bytes(SHAPES[name], DTYPES[dtype]))
    if provider == "eager":
        benchmark(op.eager, inputs)
        return
    verdict = Oracle(op, inputs).judge(lambda i: op.run(i, provider))
    assert verdict.passed, verdict.note  # a wrong kernel is not timed
    benchmark(op.run, inputs, provider)
