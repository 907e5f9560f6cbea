"""What this device can do at best: copies, matrix products, cuDNN's attention. Everything else is measured against it.

Best of the rounds, not the median: a ceiling is not lowered by what disturbs the machine. Data is random: products of
zeros draw less power and run faster.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import attention
import torch
from stage import Context, Record

SECONDS = 60.0
EXPECTED = 1.5
GIB = 2**30
# Bytes of one tensor: within the L2 cache, at its edge, of ops of image models, and far beyond
COPIES = {"16 MiB": GIB // 64, "32 MiB": GIB // 32, "128 MiB": GIB // 8, "512 MiB": GIB // 2,
          "1 GiB": GIB, "4 GiB": 4 * GIB, "8 GiB": 8 * GIB}  # fmt: skip
GEMMS = {"8192": 8192, "4096": 4096}


def items(context: Context) -> list[str]:
    """Copies, products, attention at the first shapes of the stage `attention`, and the clocks under load."""
    shapes = attention.TINY if context.tiny else attention.SHAPES[:5]
    return ["copy", "gemm", *(f"attention {'x'.join(map(str, shape))}" for shape in shapes), "clocks"]


def run(item: str, context: Context) -> Record:
    """One ceiling."""
    what, _, size = item.partition(" ")
    if what == "copy":
        return _copy(context)
    if what == "gemm":
        return _gemm(context)
    if what == "clocks":
        return _clocks(context)
    tokens, heads, width = map(int, size.split("x"))
    return _attention((tokens, heads, width), context)


def _best(calls: dict[str, Callable[[], Any]], context: Context) -> dict[str, float]:
    return {name: min(values) for name, values in context.samples(calls, min(context.rounds, 7)).items()}


def _copy(context: Context) -> Record:
    rates = {}
    for name, count in COPIES.items():
        count = count // 2**16 if context.tiny else count
        source = torch.empty(count // 2, dtype=torch.bfloat16, device=context.device).normal_()
        target = torch.empty_like(source)
        ms = _best({name: lambda t=target, s=source: t.copy_(s)}, context)[name]
        rates[name] = 2 * count / ms / 1e6
        del source, target
    return {"gb_per_s": rates, "summary": ", ".join(f"{name} {rate:.0f} GB/s" for name, rate in rates.items())}


def _gemm(context: Context) -> Record:
    rates = {}
    for name, size in GEMMS.items():
        size = size // 64 if context.tiny else size
        a, b = (torch.randn(size, size, device=context.device).to(torch.bfloat16) for _ in range(2))
        ms = _best({name: lambda a=a, b=b: a @ b}, context)[name]
        rates[name] = 2 * size**3 / ms / 1e9
    return {"tflop_per_s": rates, "summary": ", ".join(f"{name} {rate:.0f} TFLOP/s" for name, rate in rates.items())}


def _attention(shape: tuple[int, int, int], context: Context) -> Record:
    tokens, heads, width = shape
    *inputs, dout = attention.leaves(shape, context.device)
    call = attention.cudnn if context.device == "cuda" else attention.sdpa
    out = call(*inputs)
    detached = [t.detach() for t in inputs]
    ms = _best({
        "forward": lambda: call(*detached),
        "backward": lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True),
    }, context)  # fmt: skip
    flops = {"forward": 4 * tokens**2 * heads * width, "backward": 10 * tokens**2 * heads * width}
    rates = {name: flops[name] / ms[name] / 1e9 for name in ms}
    return {
        "provider": "cudnn" if context.device == "cuda" else "sdpa", "ms": ms, "tflop_per_s": rates,
        "summary": ", ".join(f"{name} {ms[name]:.3f} ms, {rates[name]:.0f} TFLOP/s" for name in ms),
    }  # fmt: skip


def _clocks(context: Context) -> Record:
    """Of the device while it multiplies: whoever else draws its power shows here."""
    if context.device != "cuda":
        return {"clocks": "no GPU"}
    a = torch.randn(8192, 8192, device="cuda").to(torch.bfloat16)
    for _ in range(500):
        a @ a
    query = "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_throttle_reasons.active"
    try:
        said = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        said = f"unknown: {error}"
    torch.cuda.synchronize()
    return {"sm clock, memory clock, temperature, power, throttle reasons": said, "summary": said}


def table(records: dict[str, Record]) -> str:
    """Every ceiling."""
    lines = ["| ceiling | measured |", "|---|---|"]
    return "\n".join([*lines, *(f"| {item} | {record.get('summary', '-')} |" for item, record in records.items())])
