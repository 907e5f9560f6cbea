"""How calls run on a GPU: graphs, streams, waits, devices, a process's first call. Results against plain calls, bit by
bit.

What needs a GPU is skipped without one; the bodies of the first tests then run on the native CPU kernels.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from _raw_cases import OPS
from _targets import (
    ANYWHERE,
    CPU,
    ON_GPU,
    Target,
    assert_same_bits,
    bits,
    check,
    memory,
    outcome,
    renew,
    results_of,
    spoil,
    twins,
)
from torch import Tensor

from maskaccel.masks import TileMask
from maskaccel.ops import norm_modulate, tile_attention
from maskaccel.ops.attention.schema import NEED_K, NEED_Q, NEED_V

CALLS = 4  # random calls of each op


def _all_bits(results: tuple[Tensor, ...], args: tuple) -> list[Tensor]:
    return [bits(t).clone() for t in (*results, *args) if isinstance(t, Tensor)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", ANYWHERE)
def test_a_graph_reads_what_its_arguments_hold(target, op):
    """Captured once and replayed with other values in the same memory, a call gives what a plain call gives."""
    kernel = target.kernel(op)
    for seed, args in target.repeatable(op, count=CALLS):
        plain, captured = twins(args), twins(args)
        results, replay = target.capture(kernel, captured)
        for number in range(3):
            if number:
                renew(plain), renew(captured)
            spoil(results)
            want = outcome(kernel, plain)
            replay()
            assert_same_bits(_all_bits(results, captured), want, f"{target.backend} {op} seed {seed} replay {number}")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", ANYWHERE)
def test_a_call_does_not_wait(target, op):
    """Nothing that torch calls a synchronisation: no value of the device is read on the host."""
    kernel = target.kernel(op)
    for _, args in target.calls(op, count=CALLS):
        kernel(*twins(args))  # compiled and loaded
        again = twins(args)
        with target.no_waiting():
            kernel(*again)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", ANYWHERE)
def test_a_call_runs_on_the_current_stream(target, op):
    """What the stream wrote just before, behind a long wait, is what the call reads."""
    kernel = target.kernel(op)
    for seed, args in target.repeatable(op, count=CALLS):
        want = outcome(kernel, twins(args))
        here = twins(args)
        read = [memory(t) for t in here if isinstance(t, Tensor) and t.is_floating_point()]
        late = [t.clone() for t in read]
        for t in read:
            t.zero_()
        stream: contextlib.AbstractContextManager = contextlib.nullcontext()
        if target.device != "cpu":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            stream = torch.cuda.stream(side)
        with stream:
            if target.device != "cpu":
                torch.cuda._sleep(2_000_000)
            for t, value in zip(read, late, strict=True):
                t.copy_(value)
            results = results_of(kernel(*here))
        if target.device != "cpu":
            side.synchronize()
        assert_same_bits(_all_bits(results, here), want, f"{target.backend} {op} seed {seed}")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", ON_GPU)
def test_another_device_than_the_current_one(target, op):
    """Tensors of the second GPU while the first is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    second = Target(target.backend, "cuda:1")
    with torch.cuda.device(0):
        for seed, args in second.calls(op, count=CALLS):
            check(second, op, seed, args)
            assert torch.cuda.current_device() == 0
            assert all(t.device.index == 1 for t in results_of(second.kernel(op)(*args)))


@pytest.mark.parametrize("n", [300, 20000])
@pytest.mark.parametrize("target", ANYWHERE)
def test_a_graph_counts_steps(target, n):
    """The step is read on the device: every replay draws the ids of its step."""
    kernel = target.kernel("random_keep")
    step = torch.zeros(1, dtype=torch.int64, device=target.device)
    args = (step, None, None, None, None, 3, 0, 0, 2, n, n // 3, 1, 0, 0)
    first = kernel(*args)[0]
    (ids, *_), replay = target.capture(kernel, args)
    for number in range(3):
        step.fill_(number)
        replay()
        assert torch.equal(ids, kernel(*args)[0]) and torch.equal(ids, first) == (number == 0)


@pytest.mark.parametrize("dim", [64, 72, 128, 256])
@pytest.mark.parametrize("target", ANYWHERE)
def test_attention_of_a_mask(target, dim):
    """The public call: two runs give the same bits, and so does a graph of it; so do gradients where that is asked for.

    Otherwise they may differ by roundings: the backward of sm_90a adds to dq in no fixed order.
    """
    target.kernel("tile_attention")
    tokens = 1500 if target.device != "cpu" else 150
    gen = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, tokens, 4, dim, generator=gen).bfloat16().to(target.device).requires_grad_() for _ in range(3)
    )
    side = -(-tokens // 128)
    mask = TileMask.from_tiles((torch.rand(2, 4, side, side, generator=gen) < 0.4).to(target.device), (tokens,) * 2)

    def once() -> list[Tensor]:
        out, lse = tile_attention(q, k, v, mask, return_lse=True, backend=target.backend)
        return [out, lse, *torch.autograd.grad(out.float().square().sum() + lse.nan_to_num(neginf=0).sum(), (q, k, v))]

    first, second = once(), once()
    assert all(map(torch.equal, first[:2], second[:2]))
    for one, other in zip(first[2:], second[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 * one.abs().max().item())
    torch.use_deterministic_algorithms(target.device != "cpu")
    try:
        assert all(map(torch.equal, once(), once()))
    finally:
        torch.use_deterministic_algorithms(False)

    def plain(*qkv: Tensor) -> Tensor:
        return tile_attention(*qkv, mask, backend=target.backend)

    with torch.no_grad():
        (out,), replay = target.capture(plain, (q.detach(), k.detach(), v.detach()))
        spoil((out,))
        replay()
    assert torch.equal(out, first[0])


@pytest.mark.parametrize("target", ANYWHERE)
def test_masked_attention_on_several_streams_at_once(target):
    """Launches that share rows of tiles among their CTAs: beside each other, beside a graph, and after it."""
    gen = torch.Generator().manual_seed(0)
    side, heads = (4, 2) if target.device == "cpu" else (24, 8)
    qkv = [torch.randn(1, side * 128, heads, 64, generator=gen).bfloat16().to(target.device) for _ in range(3)]
    tiles = torch.rand(1, heads, side, side, generator=gen) < 0.4
    mask = TileMask.from_tiles(tiles.to(target.device), (side * 128,) * 2)

    def call(*qkv: Tensor) -> Tensor:
        return tile_attention(*qkv, mask, backend=target.backend)

    target.kernel("tile_attention")
    want = call(*qkv)
    (captured,), replay = target.capture(call, tuple(qkv))
    streams: list[contextlib.AbstractContextManager] = [contextlib.nullcontext()] * 3
    if target.device != "cpu":
        streams = [torch.cuda.stream(torch.cuda.Stream()) for _ in range(3)]
    for _ in range(2 if target.device == "cpu" else 50):
        spoil((captured,))
        if target.device != "cpu":
            torch.cuda.synchronize()
        replay()
        got = []
        for stream in streams:
            with stream:
                got += [call(*qkv) for _ in range(2)]
        if target.device != "cpu":
            torch.cuda.synchronize()
        assert all(torch.equal(out, want) for out in (*got, captured))


@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("target", ANYWHERE)
def test_gradients_of_a_mask_in_a_graph(target, dim):
    """Replayed with other values, also by kernels that add in no fixed order: sums begin at zero every time."""
    forward, backward = target.kernel("tile_attention"), target.kernel("tile_attention_backward")
    gen = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 300, 2, dim, generator=gen).bfloat16().to(target.device) for _ in range(4))
    mask = TileMask.from_tiles((torch.rand(1, 2, 3, 3, generator=gen) < 0.7).to(target.device), (300, 300))
    lists = (*mask.lists(), *mask.transposed_lists(), *[None] * 6)
    numbers = (128, 128, dim**-0.5)
    out, lse, _ = forward(q, k, v, *lists, *[None] * 3, *numbers, 0.0, 0)
    args = (dout, None, q, k, v, out, lse, *lists, *numbers, NEED_Q | NEED_K | NEED_V)
    plain, captured = twins(args), twins(args)
    results, replay = target.capture(backward, captured)
    for number in range(3):
        if number:
            renew(plain), renew(captured)
        spoil(results[:3])
        replay()
        for got, want in zip(results[:3], backward(*plain)[:3], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2 * want.abs().max().item())


@pytest.mark.parametrize("target", [ON_GPU[0], pytest.param(CPU, id="cpu")])
def test_a_refused_call_leaves_nothing_behind(target):
    """After an error the next call is as good as any."""
    x = torch.randn(1, 4, 64, device=target.device)
    kernel = target.kernel("norm_modulate")
    with pytest.raises(RuntimeError, match="scale must"):
        kernel(x, torch.randn(1, 32, device=target.device), *[None] * 6, 1e-6, 1.0, 0)
    y = norm_modulate(x, backend=target.backend)
    assert torch.allclose(y, torch.nn.functional.layer_norm(x, (64,), eps=1e-6), atol=1e-5)


FRESH = {
    "first": "y = call()",
    "after torch": "torch.randn(64, 64, device=device) @ torch.randn(64, 64, device=device)\ny = call()",
    # The code of the kernels comes to the device while the stream is captured.
    "in a capture": "graph = torch.cuda.CUDAGraph()\nwith torch.cuda.graph(graph): y = call()\ngraph.replay()",
}
PROCESS = """
import torch, maskaccel
device, backend = {device!r}, {backend!r}
x = torch.arange(2 * 3 * 256, device=device).reshape(2, 3, 256).remainder(7).bfloat16()
def call(): return maskaccel.ops.norm_modulate(x, backend=backend)
{body}
want = torch.nn.functional.layer_norm(x.double(), (256,), eps=1e-6)
assert (y.double() - want).abs().max() < 0.02, (y, want)
"""


@pytest.mark.parametrize("loading", ["LAZY", "EAGER"])
@pytest.mark.parametrize("body", FRESH)
@pytest.mark.parametrize("target", [ON_GPU[0], pytest.param(CPU, id="cpu")])
def test_first_call_of_a_process(target, body, loading):
    """The library's own CUDA runtime beside torch's, whichever of the two comes first."""
    target.kernel("norm_modulate")
    if target.device == "cpu" and (body, loading) != ("first", "LAZY"):
        pytest.skip("is for a GPU")
    code = PROCESS.format(device=target.device, backend=target.backend, body=FRESH[body])
    env = os.environ | {"CUDA_MODULE_LOADING": loading}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert run.returncode == 0, run.stderr[-2000:]
