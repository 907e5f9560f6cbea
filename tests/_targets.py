"""Where the tests of kernels run: native and Triton kernels on a GPU, and the same bodies on the CPU.

A body that takes a `Target` also runs in the ordinary suite, on the native CPU kernels. Streams, graphs and waits mean
nothing there and are plain calls: a test for a GPU cannot be broken unseen by a machine that has none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from _numerics import assert_all_close_to_truth
from _raw_cases import describe, draw, run, run_plain, wanted, widened
from _waits import no_waiting
from torch import Tensor

import maskaccel  # noqa: F401  (defines the ops, loads the library)
from maskaccel.ops import _registry
from maskaccel.ops._backends import call_refusal, namespace, refusal
from maskaccel.ops.attention.schema import SAME_BITS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Triton compiles anew for most of the random calls: few of them, and the same ones in all tests.
SEEDS = {"cuda": int(os.environ.get("MASKACCEL_GPU_SEEDS", "20")), "triton": 3, "cpu": 1}


@dataclass(frozen=True)
class Target:
    """A backend and the device it is tested on."""

    backend: str
    device: str

    def refuses(self, op: str, dtype: torch.dtype = torch.bfloat16) -> str | None:
        """Why the op cannot be tested here."""
        return refusal(self.backend, torch.device(self.device), dtype, op)

    def kernel(self, op: str) -> Callable[..., Any]:
        """The kernels of an op; skips the test where there are none."""
        reason = self.refuses(op)
        if reason is not None:
            pytest.skip(reason)
        return _registry.op(namespace(self.backend), op)

    def calls(self, op: str, first: int = 0, count: int | None = None, **options: Any) -> Iterator[tuple[int, tuple]]:
        """(seed, arguments) of random calls that the kernels take, of every dtype that they take."""
        dtypes = [d for d in DTYPES if self.refuses(op, d) is None]
        first = 0 if self.backend == "triton" else first
        left = min(SEEDS[self.backend] if count is None else count, 3 if self.backend == "triton" else 1 << 20)
        for seed in range(first, first + 20 * left):
            args = draw(op, seed, dtypes[seed % len(dtypes)], self.device, **options)
            if call_refusal(self.backend, op, args) is None:
                yield seed, args
                left -= 1
                if left == 0:
                    return

    def repeatable(self, op: str, first: int = 0, count: int | None = None) -> Iterator[tuple[int, tuple]]:
        """`calls` that ask for the same bits each time, where the kernels have sums in no fixed order too."""
        for seed, args in self.calls(op, first, count):
            if op == "tile_attention_backward" and self.device != "cpu":
                args = (*args[:-1], args[-1] | SAME_BITS)
            yield seed, args

    def no_waiting(self) -> contextlib.AbstractContextManager:
        """Fails where torch waits for the device."""
        return no_waiting(self.device)

    def capture(self, kernel: Callable[..., Any], args: tuple) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        """(results, replay) of a CUDA graph of one call; `args` are not touched before the first replay."""
        if self.device == "cpu":
            results = results_of(kernel(*twins(args)))

            def replay() -> None:
                for to, value in zip(results, results_of(kernel(*args)), strict=True):
                    to.copy_(value)

            return results, replay
        kernel(*twins(args))  # compiled and loaded before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = results_of(kernel(*args))
        return results, graph.replay


CPU = Target("cpu", "cpu")
_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
ON_GPU = [pytest.param(Target(b, "cuda"), marks=_GPU, id=b) for b in ("cuda", "triton")]
ANYWHERE = [*ON_GPU, pytest.param(CPU, id="cpu")]


def results_of(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def twins(args: tuple) -> tuple:
    """The same call on memory of its own, laid out alike: strides, offsets and alignment decide which kernel runs."""

    def twin(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return torch.empty(0, dtype=t.dtype, device=t.device).set_(
            t.untyped_storage().clone(), t.storage_offset(), t.size(), t.stride()
        )

    return tuple(map(twin, args))


def memory(t: Tensor) -> Tensor:
    """All of the storage of a tensor as one row: what can be written where elements share a place."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())


def bits(t: Tensor) -> Tensor:
    """The bits of a tensor as integers, so that NaN equals itself."""
    t = t.detach().contiguous()
    return t.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def outcome(kernel: Callable[..., Any], args: tuple) -> list[Tensor]:
    """The bits of what a call gives and of its arguments afterwards, which it may write."""
    return [bits(t).clone() for t in (*results_of(kernel(*args)), *args) if isinstance(t, Tensor)]


def assert_same_bits(got: list[Tensor], want: list[Tensor], what: str) -> None:
    assert len(got) == len(want)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(g, w), f"{what}: tensor {i} of {tuple(g.shape)}: {int((g != w).sum())} elements differ"


def renew(args: tuple) -> None:
    """Other values for what a call reads: floats, and the number of the step."""
    for t in args:
        if isinstance(t, Tensor) and t.is_floating_point():
            memory(t).mul_(0.75)
        elif isinstance(t, Tensor) and t.dtype == torch.int64 and t.numel() == 1:
            t.add_(1)


def spoil(results: tuple[Tensor, ...]) -> None:
    """Values that no kernel would leave."""
    for t in results:
        t.fill_(float("nan") if t.is_floating_point() else 77)


def check(target: Target, op: str, seed: int, args: tuple) -> None:
    """A call against the fp64 reference, by the error rule."""
    got = run(op, target.kernel(op), args)
    results = wanted(got, run_plain(op, args), run_plain(op, widened(args)))
    assert_all_close_to_truth(*results, f"{target.backend} {op} seed {seed} ({describe(args)})")
