"""Variants of the forward on sm_90a (`tools/build_variants.py`) on the host, thread by thread."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import cuda_emulator
import pytest
import torch
from _numerics import assert_close_to_truth

from maskaccel.masks import TileMask
from maskaccel.ops.attention import reference
from maskaccel.ops.attention.schema import KEEP, SCHEMAS

pytestmark = pytest.mark.skipif(cuda_emulator.missing() is not None, reason=f"no emulation: {cuda_emulator.missing()}")
ROOT = Path(__file__).resolve().parent.parent
LIBRARY = torch.library.Library("maskaccel_variants", "FRAGMENT")


@pytest.fixture(scope="module")
def variants():
    """The stage that lists them, and the tool that builds them."""
    before = list(sys.path)
    sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks" / "gpu")]
    yield importlib.import_module("variants"), importlib.import_module("build_variants")
    sys.path[:] = before


@pytest.fixture(scope="module")
def call(variants):
    """`(name, q, k, v, mask) -> out` of a variant, built at its first call."""
    stage, tool = variants
    built = set()

    def run(name, *operands):
        if name not in built:
            LIBRARY.define(name + SCHEMAS["tile_attention"])
            torch.ops.load_library(str(tool.emulated(name, ROOT / "build" / "emulated")))
            built.add(name)
        return stage.call(name, *operands)

    return run


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """As in test_cuda_emulated_sm90.py."""
    monkeypatch.setenv("MASKACCEL_EMULATE_CAPABILITY", "90")
    monkeypatch.setenv("MASKACCEL_EMULATE_SHARED", str(227 * 1024))
    monkeypatch.setenv("MASKACCEL_EMULATE_MULTIPROCESSORS", "2")


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("d64_consumers_3_polynomial_4", None),
        ("d64_consumers_3_polynomial_4", (384, 128)),
        ("d128_keys_176", None),
    ],
)
def test_right(call, name, block):
    """Three consumers and polynomials; blocks that are no multiple of 32 keys; ragged ends, rows that see nothing."""
    generator = torch.Generator().manual_seed(len(name))
    dim = 64 if name.startswith("d64") else 104
    q, k, v = (torch.randn(1, n, 2, dim, generator=generator).to(torch.bfloat16) for n in (420, 410, 410))
    mask = None
    if block is not None:
        kept = torch.rand(420, 410, generator=generator) < torch.rand(4, 420, 1, generator=generator)[0]
        kept[:, 128:256] = False
        kept[5] = False
        mask = TileMask.from_bool(kept, block)
    got = call(name, q, k, v, mask)
    lists = (None,) * 8 if mask is None else (*mask.lists(), None, None, None, mask.pattern_of, mask.patterns)
    args = (*lists, *(None,) * 7, *(block or (128, 128)), dim**-0.5, 0.0, 0)
    plain = reference.tile_attention(q, k, v, *args)[0]
    truth = reference.tile_attention(q.double(), k.double(), v.double(), *args)[0]
    assert_close_to_truth(got, plain, truth, magnitude=v.abs().max().item())


def test_what_it_does_not_serve_is_refused(call):
    """Rather than computed by another kernel than the one that is to be timed."""
    q = torch.randn(1, 130, 1, 64).to(torch.bfloat16)
    mask = TileMask.full((130, 130), (128, 128))
    with pytest.raises(RuntimeError, match="this variant does not serve the call"):
        call("d64_consumers_3_polynomial_4", q, q, q, mask)
    with pytest.raises(RuntimeError, match="this variant does not serve the call"):
        args = (*(None,) * 15, 128, 128, 0.1, 0.0, KEEP)
        torch.ops.maskaccel_variants.d64_consumers_3_polynomial_4(q, q, q, *args)


def test_table(variants):
    """Names say the head dim; a variant differs from what ships, and fits shared memory."""
    stage, _ = variants
    for name, variant in stage.VARIANTS.items():
        assert name.startswith(f"d{variant.dim}_")
        assert variant.tuning
        wide = -(-variant.dim // 64) * 64
        stages = variant.tuning.get("stages", 2 if variant.dim > 128 else 3 if variant.dim > 64 else 4)
        held = 2 * (variant.rows * wide + stages * variant.keys * (wide + variant.dim))
        assert held + 2048 < 227 * 1024, name


def test_polynomial():
    """The coefficients of `exp2_polynomial`, evaluated in fp32."""
    text = (ROOT / "csrc" / "attention" / "cuda_sm90_rows.cuh").read_text()
    body = text[text.index("exp2_polynomial(float x) {") :].split("std::memcpy")[0]
    numbers = [float(word.rstrip(");f")) for line in body.splitlines() if " y = " in line for word in line.split()[-1:]]
    assert len(numbers) == 5
    assert numbers[-1] == 1.0  # 2^n is exact, and so is the 0 of what lies below
    x = torch.linspace(-40, 0, 200001)
    whole = x.round()
    y = torch.full_like(x, numbers[0])
    for c in numbers[1:]:
        y = y * (x - whole) + c
    relative = y.double() * torch.exp2(whole.double()) / torch.exp2(x.double()) - 1
    assert relative.abs().max() < 4e-6
