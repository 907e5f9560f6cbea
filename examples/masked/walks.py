"""What samplers of masked models trade: a small masked model of random walks, sampled in many ways.

    python examples/masked/walks.py

A walk is a sequence of digits in which neighbours differ by one (modulo 10). What a sampler must get right is plain:
two neighbours that are revealed in one call are drawn as if independent, and often do not fit. The model is trained
here (a minute or two on a quiet CPU); then each sampler makes walks, and the table says how many calls of the model
they took and what share of the steps is right. Nothing but torch and maskaccel is needed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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


class Walker(nn.Module):
    """A bidirectional transformer over masked walks; `body` and `head` apart, so that samplers can leave rows out."""

    def __init__(self, length: int, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(DIGITS + 1, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, DIGITS)
        self.calls = 0

    def body(self, tokens: Tensor) -> Tensor:
        """Hidden rows `(B, N, width)`."""
        self.calls += 1
        places = self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.blocks(self.tokens(tokens) + places)

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


def table(model: Walker, length: int, count: int, seed: int, show: Callable[[str], None]) -> None:
    """Sample, with the head on masked rows, and print what came out.

    Ancestral samplers skip a step where no sample of the batch changes, so theirs has one sample; they make a quarter
    of the walks.
    """
    show("| sampler | calls | right steps |\n|---|---|---|")
    for name, sampler in samplers(length).items():
        alone = isinstance(sampler, methods.MDLM)
        model.calls, parts, batch = 0, [], 1 if alone else count
        for first in range(0, max(1, count // 4) if alone else count, batch):
            tokens = torch.full((batch, length), MASK)
            parts.append(sampler.sample(model.body, tokens, MASK, seed=seed, sample_offset=first, head=model.head))
        calls = model.calls / len(parts)
        show(f"| {name} | {calls:.3g} | {100 * right_steps(torch.cat(parts)):.1f} % |")


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


if __name__ == "__main__":
    main()
