"""`confidence_unmask` beside the eager path of masked models: softmax and Gumbel noise in float64, argmax, top-k."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from maskaccel import ops
from maskaccel.bench.fingerprint import fingerprint

from ..attention import page
from ..interleaved import timed

# (batch, tokens, vocabulary)
SHAPES = ((1, 64, 32768), (1, 64, 126464), (2, 256, 8256))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MASKED = 1.0  # share of masked positions: the dearest step, the first


def eager(logits: Tensor, tokens: Tensor, mask_id: int, n: int, temperature: float) -> Tensor:
    """LLaDA's step: Gumbel noise and softmax in float64 over all positions, low-confidence remasking by sample."""
    wide = logits.to(torch.float64)
    noise = torch.rand_like(wide)
    ids = (wide.exp() / (-torch.log(noise)) ** temperature).argmax(-1)
    p = wide.softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    masked = tokens == mask_id
    confidence = torch.where(masked, p, -torch.inf)
    out = tokens.clone()
    for b in range(tokens.shape[0]):
        at = confidence[b].topk(n).indices
        out[b, at] = ids[b, at]
    return out


def _calls(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    batch, count, size = shape
    logits = (torch.randn(shape, generator=generator) * 3).to(dtype)
    tokens = torch.where(torch.rand(batch, count, generator=generator) < MASKED, size, 0)
    n = count // 16
    return {
        "eager float64": lambda: eager(logits, tokens, size, n, 1.0),
        "maskaccel": lambda: ops.confidence_unmask(logits, tokens, size, n),
        "maskaccel, greedy": lambda: ops.confidence_unmask(logits, tokens, size, n, temperature=0.0),
        "reading the logits": lambda: logits.amax(-1),
    }


def run(rounds: int, results: Path, docs: Path) -> None:
    """Measure, store and write the table of docs/masked-models.md."""
    cases = []
    with torch.no_grad():
        for shape in tqdm(SHAPES, unit="shape"):
            for name, dtype in DTYPES.items():
                seconds = timed(_calls(shape, dtype), rounds)
                cases.append({"shape": list(shape), "dtype": name, "seconds": seconds})
    data = {"fingerprint": fingerprint(), "rounds": rounds, "masked": MASKED, "cases": cases}
    page.store(data, results / "tokens_unmask.json")
    page.show(docs / "masked-models.md", "unmask", table(data))


def table(data: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| batch x tokens x vocabulary | dtype | eager float64, ms | maskaccel, ms | faster | greedy, ms | max of the "
        "logits, ms |",
        "|---" * 7 + "|",
    ]
    for case in data["cases"]:
        s = {name: 1e3 * value for name, value in case["seconds"].items()}
        lines.append(
            f"| {' x '.join(map(str, case['shape']))} | {case['dtype']} | {s['eager float64']:.1f} | "
            f"{s['maskaccel']:.2f} | {s['eager float64'] / s['maskaccel']:.1f}x | {s['maskaccel, greedy']:.2f} | "
            f"{s['reading the logits']:.2f} |"
        )
    return "\n".join(lines) + "\n"
