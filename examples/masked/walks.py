"""What samplers of masked models trade: a small masked model of random walks, sampled in many ways.

    python examples/masked/walks.py

A walk is a sequence of digits in which neighbours differ by one (modulo 10). What a sampler must get right is plain:
two neighbours that are revealed in one call are drawn as if independent, and often do not fit. The model is trained
here (a minute or two on a quiet CPU); then each sampler makes walks, and the table says how many calls of the model
they took and what share of the steps is right. Nothing but torch and maskaccel is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import maskaccel
from maskaccel import methods

DIGITS, MASK = 10, 10


def walks(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Random walks, int64 `(batch, length)`."""
    steps = torch.randint(0, 2, (batch, length), generator=generator) * 2 - 1
    steps[:, 0] = torch.randint(0, DIGITS, (batch,), generator=generator)
    return steps.cumsum(1) % DIGITS


def right_steps(tokens: Tensor) -> float:
    """Share of the neighbours that differ by one."""
    difference = (tokens[:, 1:] - tokens[:, :-1]) % DIGITS
    return float(((difference == 1) | (difference == DIGITS - 1)).float().mean())


class Block(nn.Module):
    """A block of a transformer whose tokens all see each other."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden rows `(B, N, width)`."""
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(hidden)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(hidden)


class Body(nn.Module):
    """A bidirectional transformer over masked walks, without its head.

    Attributes:
        calls: So far.
        rows: That they computed, for each sample.
    """

    def __init__(self, length: int, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(DIGITS + 1, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)), nn.LayerNorm(width))
        self.calls = self.rows = 0

    def forward(self, tokens: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Hidden rows `(B, N, width)`."""
        self.calls, self.rows = self.calls + 1, self.rows + tokens.shape[1]
        places = torch.arange(tokens.shape[1], device=tokens.device) if position_ids is None else position_ids
        return self.blocks(self.tokens(tokens) + self.places(places))


class Walker(nn.Module):
    """A masked model of walks; `body` and `head` apart, so that samplers can leave rows out."""

    def __init__(self, length: int, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.body, self.head = Body(length, width, layers), nn.Linear(width, DIGITS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(B, N, 10)`."""
        return self.head(self.body(tokens))


def train(model: Walker, length: int, steps: int, batch: int, seed: int) -> float:
    """LLaDA's loss (eq. 3): cross-entropy of the masked tokens, by 1 / t. Returns its mean over the last steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    last = []
    for _ in range(steps):
        clean = walks(batch, length, generator)
        t = torch.rand(batch, 1, generator=generator).clamp_min(1 / length)
        hidden = torch.rand(batch, length, generator=generator) < t
        logits = model(torch.where(hidden, MASK, clean))
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), clean.flatten(), reduction="none")
        loss = (losses.view(batch, length) * hidden / t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        last = [*last[-99:], float(loss.detach())]
    return sum(last) / len(last)


def samplers(length: int) -> dict[str, Any]:
    """The rows of the table."""
    block = length // 2
    return {
        "LLaDA, one token a call": methods.LLaDA(steps=length, temperature=1.0),
        "LLaDA, 1/2 the calls": methods.LLaDA(steps=length // 2, temperature=1.0),
        "LLaDA, 1/4 the calls": methods.LLaDA(steps=length // 4, temperature=1.0),
        "LLaDA, 1/4 the calls, random order": methods.LLaDA(steps=length // 4, temperature=1.0, order="random"),
        "LLaDA, 1/4 the calls, margin": methods.LLaDA(steps=length // 4, temperature=1.0, order="margin"),
        "LLaDA, threshold 0.9, two blocks": methods.LLaDA(block=block, temperature=1.0, threshold=0.9),
        "DUS, two blocks": methods.DUS(block=block, temperature=1.0),
        "DUS, one block": methods.DUS(block=length, temperature=1.0),
        "MaskGIT, 8 steps": methods.MaskGIT(steps=8, choice_temperature=1.0),
        "MDLM, 16 steps": methods.MDLM(steps=16),
        "MDLM, 1000 steps": methods.MDLM(steps=1000),
        "MD4, 64 steps": methods.MD4(steps=64),
    }


def caches() -> dict[str, Any]:
    """The rows of the second table: what keys and values are kept of."""
    return {
        "none": None,
        "prefix": methods.FastDLLM("prefix"),
        "dual": methods.FastDLLM("dual"),
        "dual, refreshed every second step": methods.FastDLLM("dual", refresh=2),
    }


def table(model: Walker, length: int, count: int, seed: int, show: Callable[[str], None]) -> None:
    """Sample, with the head on masked rows, and print what came out.

    Ancestral samplers skip a step where no sample of the batch changes, so theirs has one sample; they make a quarter
    of the walks.
    """
    show("| sampler | calls | right steps |\n|---|---|---|")
    for name, sampler in samplers(length).items():
        alone = isinstance(sampler, methods.MDLM)
        model.body.calls, parts, batch = 0, [], 1 if alone else count
        for first in range(0, max(1, count // 4) if alone else count, batch):
            tokens = torch.full((batch, length), MASK)
            parts.append(sampler.sample(model.body, tokens, MASK, seed=seed, sample_offset=first, head=model.head))
        calls = model.body.calls / len(parts)
        show(f"| {name} | {calls:.3g} | {100 * right_steps(torch.cat(parts)):.1f} % |")


def cached_table(model: Walker, length: int, count: int, seed: int, show: Callable[[str], None]) -> None:
    """The same sampler with keys and values kept: half as many calls as tokens, in blocks of a quarter of the walk."""
    sampler = methods.LLaDA(steps=length // 2, block=length // 4, temperature=1.0)
    tokens, body = torch.full((count, length), MASK), model.body
    show("| kept keys and values | calls | rows, in whole calls | right steps |\n|---|---|---|---|")
    for name, method in caches().items():
        body.calls = body.rows = 0
        with contextlib.nullcontext() if method is None else maskaccel.patch(body, [method]):
            cache = None if method is None else body
            found = sampler.sample(body, tokens, MASK, seed=seed, head=model.head, cache=cache)
        show(f"| {name} | {body.calls} | {body.rows / length:.3g} | {100 * right_steps(found):.1f} % |")


def main() -> None:
    """Train and sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32, help="tokens of a walk (default 32)")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default 1000)")
    parser.add_argument("--batch", type=int, default=48, help="walks of a training step (default 48)")
    parser.add_argument("--samples", type=int, default=256, help="walks of each sampler (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    model = Walker(given.length)
    start = time.perf_counter()
    loss = train(model, given.length, given.steps, given.batch, given.seed)
    print(f"trained for {time.perf_counter() - start:.0f} s, loss {loss:.3f}; {torch.get_num_threads()} threads\n")
    with torch.no_grad():
        table(model.eval(), given.length, given.samples, given.seed, print)
        print()
        cached_table(model, given.length, given.samples, given.seed, print)


if __name__ == "__main__":
    main()
