"""Inputs and checks shared by the tests of the CPU kernels of the token ops."""

from __future__ import annotations

import os
import random

import torch
from _numerics import assert_close_to_truth
from hypothesis import settings

import maskaccel.ops  # noqa: F401  (defines the ops and loads the library)
from maskaccel.ops._backends import refusal
from maskaccel.ops.tokens import reference

LACKS = refusal("cpu", torch.device("cpu"), torch.float32, "match_tokens")
RAW = torch.ops.maskaccel_raw
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("dense", "sliced", "expanded", "batch last")
# A lower instruction set than the machine's has the same code but for its vectors: a third of the cases.
SHARE = 3 if os.environ.get("MASKACCEL_CPU_ISA") else 1
fuzz = settings(max_examples=60 // SHARE, deadline=None, derandomize=True)


class Draw:
    """Inputs that follow from one seed."""

    def __init__(self, seed: int):
        self.choice = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape, dtype=torch.float32, layout=None):
        """`(B, N, D)` with a dense last dim; what lies between its rows is NaN."""
        layout = layout or self.choice.choice(LAYOUTS)
        batch, n, width = shape
        if layout == "expanded":
            return self._normal(1, n, width).to(dtype).expand(shape)
        if layout == "batch last":
            return self._normal(n, batch, width).to(dtype).transpose(0, 1)
        if layout == "sliced":
            wide = torch.full((batch, n + 2, width + 3), float("nan"), dtype=dtype)
            wide[:, 1 : n + 1, 2 : 2 + width] = self._normal(*shape)
            return wide[:, 1 : n + 1, 2 : 2 + width]
        return self._normal(*shape).to(dtype)

    def _normal(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape):
        return torch.rand(shape, generator=self.generator)

    def integers(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.generator, dtype=torch.int32)

    def index(self, batch, n, kept, ragged):
        """`keep` and `inverse` of a token index."""
        keep = torch.stack([torch.randperm(n, generator=self.generator)[:kept].sort().values for _ in range(batch)])
        keep = keep.to(torch.int32)
        if ragged and kept:
            keep[:, -1] = n
        inverse = torch.full((batch, n + 1), -1, dtype=torch.int32)
        inverse.scatter_(1, keep.long(), torch.arange(kept, dtype=torch.int32).expand(batch, kept))
        return keep.contiguous(), inverse[:, :n].contiguous()


def poison():
    """Leaves NaN in memory that results of the next call may get."""
    for size in (16, 300, 5_000, 60_000):
        torch.full((size,), float("nan"))


def double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check(name, *args, what="", magnitude=0.0):
    """One raw op against plain torch and fp64; returns its results."""
    poison()
    got = getattr(RAW, name)(*args)
    plain, truth = reference.KERNELS[name](*args), reference.KERNELS[name](*map(double, args))
    several = lambda v: v if isinstance(v, tuple) else (v,)  # noqa: E731
    for i, (g, p, t) in enumerate(zip(several(got), several(plain), several(truth), strict=True)):
        assert g.is_contiguous()
        if g.dtype.is_floating_point:
            assert_close_to_truth(g, p, t, what=f"{name}[{i}] {what}", magnitude=magnitude)
        else:
            assert torch.equal(g, p), f"{name}[{i}] {what}"
    return got
