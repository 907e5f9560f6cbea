"""A training step of a DiT-S/2 with a route, beside the dense step, its ideal, and gather and scatter written by hand.

The ideal of a route that keeps the share k of the tokens is the rest of the step and k times the span's part: what the
step costs without the span's blocks is measured, the span's part is the difference to the dense step. Attention falls
with the square of the kept tokens, so a step may cost less than that ideal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from tqdm import tqdm

import maskaccel
from maskaccel import TokenRoute
from maskaccel.bench.fingerprint import fingerprint

from ..attention import page
from ..interleaved import timed

SPAN = (2, 8)  # TREAD's blocks of a DiT of 12 (arXiv 2501.04765), the last inclusive
KEPT = (0.5, 0.25)
WIDTH, HEADS, DEPTH = 384, 6, 12


def build(tokens: int, depth: int = DEPTH) -> DiTTransformer2DModel:
    """DiT-S/2 on latents of 4 channels, gates and projections random."""
    torch.manual_seed(0)
    side = round(tokens**0.5)
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=4, out_channels=4, num_layers=depth,
        patch_size=2, sample_size=2 * side, num_embeds_ada_norm=1000,
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.train()


class Step:
    """One training step: forward, mean squared error, backward, AdamW."""

    def __init__(self, model: nn.Module, batch: int, tokens: int) -> None:
        side = 2 * round(tokens**0.5)
        generator = torch.Generator().manual_seed(1)
        self.model = model
        self.x, self.target = (torch.randn(batch, 4, side, side, generator=generator) for _ in range(2))
        self.t = torch.randint(0, 1000, (batch,), generator=generator)
        self.labels = torch.randint(0, 1000, (batch,), generator=generator)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=True)

    def loss(self) -> Tensor:
        """Forward and loss."""
        out = self.model(self.x, self.t, self.labels, return_dict=False)[0]
        return nn.functional.mse_loss(out, self.target)

    def __call__(self) -> None:
        """The whole step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def saved(self) -> int:
        """Bytes of activations that the forward keeps for the backward: what the peak of memory is made of."""
        owned = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        found: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in owned:
                found[storage.data_ptr()] = storage.nbytes()
            return t.detach()  # itself would hold its own graph

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = self.loss()  # the graph holds what is counted
        total = sum(found.values())
        del loss
        return total


@contextlib.contextmanager
def by_hand(model: DiTTransformer2DModel, keep: float) -> Iterator[None]:
    """The same route as training code writes it: a clone of the stash, repeated indices, gather and scatter."""
    first, last = model.transformer_blocks[SPAN[0]], model.transformer_blocks[SPAN[1]]
    held: dict[str, Tensor] = {}

    def enter(block: nn.Module, args: tuple) -> tuple:
        x = args[0]
        batch, n, width = x.shape
        ids = torch.rand(batch, n).argsort(dim=1)[:, : n - int(n * (1 - keep))]
        held["at"], held["stash"] = ids.unsqueeze(-1).repeat(1, 1, width), x.clone()
        return (torch.gather(x, 1, held["at"]), *args[1:])

    def leave(block: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return held.pop("stash").clone().scatter(1, held.pop("at"), out)

    hooks = [first.register_forward_pre_hook(enter), last.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measure(tokens: int, batch: int, rounds: int) -> dict[str, Any]:
    """All steps at one length, interleaved."""
    span = SPAN[1] - SPAN[0] + 1
    steps = {"dense": Step(build(tokens), batch, tokens), "rest": Step(build(tokens, DEPTH - span), batch, tokens)}
    calls: dict[str, Callable[[], Any]] = dict(steps)
    patches = []
    for keep in KEPT:
        step = steps[f"route {keep}"] = Step(build(tokens), batch, tokens)
        patches.append(maskaccel.patch(step.model, [TokenRoute(*SPAN, keep=keep)]))
        calls[f"route {keep}"] = step
        hand = steps[f"by hand {keep}"] = Step(build(tokens), batch, tokens)

        def naive(hand: Step = hand, keep: float = keep) -> None:
            with by_hand(hand.model, keep):
                hand()

        calls[f"by hand {keep}"] = naive
    seconds = timed(calls, rounds)
    saved = {}
    for name, step in steps.items():
        with by_hand(step.model, float(name.split()[-1])) if "hand" in name else contextlib.nullcontext():
            saved[name] = step.saved()
    for one in patches:
        one.remove()
    return {"tokens": tokens, "batch": batch, "seconds": seconds, "saved_bytes": saved}


def ideal(values: dict[str, float], keep: float) -> float:
    """The rest, and the kept share of the span."""
    return values["rest"] + keep * (values["dense"] - values["rest"])


def run(lengths: list[int], batch: int, rounds: int, results: Path, docs: Path) -> None:
    """Measure, store and write the table of docs/tokens.md."""
    cases = [measure(tokens, batch, rounds) for tokens in tqdm(lengths, unit="length")]
    data = {"fingerprint": fingerprint(), "rounds": rounds, "span": list(SPAN), "depth": DEPTH, "cases": cases}
    page.store(data, results / "tokens_training.json")
    page.show(docs / "tokens.md", "training", table(data))


def table(data: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| tokens | kept in the span | dense step, s | route, s | ideal, s | route / ideal | by hand, s | activations, "
        "MB: dense, route, ideal, by hand |",
        "|---" * 8 + "|",
    ]
    for case in data["cases"]:
        s, b = case["seconds"], {name: value / 1e6 for name, value in case["saved_bytes"].items()}
        for keep in KEPT:
            best = ideal(s, keep)
            lines.append(
                f"| {case['tokens']} | {keep:.0%} | {s['dense']:.3f} | {s[f'route {keep}']:.3f} | {best:.3f} | "
                f"{s[f'route {keep}'] / best:.2f} | {s[f'by hand {keep}']:.3f} | {b['dense']:.0f}, "
                f"{b[f'route {keep}']:.0f}, {ideal(b, keep):.0f}, {b[f'by hand {keep}']:.0f} |"
            )
    return "\n".join(lines) + "\n"
