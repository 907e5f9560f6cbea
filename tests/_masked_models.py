"""Tiny masked models whose law is known, and plain loops of their samplers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskaccel.ops.tokens import philox
from maskaccel.ops.tokens.schema import PURPOSE_SAMPLE, PURPOSE_SELECT


class Toy(nn.Module):
    """A masked model in which every position sees all others; `body` and `head` apart."""

    def __init__(self, vocabulary: int = 11, tokens: int = 24, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(vocabulary + 1, width, generator=generator)
        self.places = torch.randn(tokens, width, generator=generator)
        self.weight = torch.randn(width, vocabulary, generator=generator)
        self.calls, self.rows = 0, 0

    def body(self, tokens: Tensor) -> Tensor:
        """Hidden rows."""
        self.calls += 1
        hidden = self.embedding[tokens] + self.places[: tokens.shape[1]]
        return (hidden + hidden.mean(1, keepdim=True)).tanh()

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of rows."""
        self.rows += hidden.shape[0] * hidden.shape[1]
        return hidden @ self.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.body(tokens))


class Joint:
    """The exact conditionals of two tokens with a known joint law, as a masked model."""

    def __init__(self, law: Tensor) -> None:
        self.law, self.calls = law, 0  # (V, V)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits `(B, 2, V)` of each token given the other, or its marginal."""
        self.calls += 1
        size = len(self.law)
        given = torch.cat([self.law / self.law.sum(0), self.law.sum(1, keepdim=True)], 1)  # of the first, by the second
        other = torch.cat([(self.law / self.law.sum(1, keepdim=True)).T, self.law.sum(0)[:, None]], 1)
        first, second = given.T[tokens[:, 1].clamp(max=size)], other.T[tokens[:, 0].clamp(max=size)]
        return torch.stack([first, second], 1).log().float()

    def ancestral(self, chances: list[float]) -> Tensor:
        """The law of ancestral sampling: tokens that are revealed in one step are independent."""
        together, masked = 0.0, 1.0
        for chance in chances:
            together += (masked * chance) ** 2
            masked *= 1 - chance
        apart = self.law.sum(1, keepdim=True) * self.law.sum(0)
        return together * apart + (1 - together) * self.law


def sampling_noise(seed: int, step: int, shape: tuple[int, int, int]) -> Tensor:
    """The counters' Gumbel noise of sampling, `(B, N, V)`."""
    batch, n, size = shape
    return _noise(
        seed, step, torch.arange(n * size).view(1, n, size), torch.arange(batch).view(-1, 1, 1), PURPOSE_SAMPLE
    )


def choice_noise(seed: int, step: int, shape: tuple[int, int]) -> Tensor:
    """The counters' Gumbel noise of selection, `(B, N)`."""
    return _noise(seed, step, torch.arange(shape[1])[None], torch.arange(shape[0])[:, None], PURPOSE_SELECT)


def _noise(seed: int, step: int, items: Tensor, sample: Tensor, purpose: int) -> Tensor:
    return philox.gumbel(philox.words(seed, items, sample, torch.tensor([step]), purpose << 24))


def chi_square(counts: Tensor, law: Tensor) -> float:
    """Standard deviations that the chi-square statistic lies above its mean (Wilson and Hilferty)."""
    expected = law.double() / law.double().sum() * counts.sum()
    k = law.numel() - 1
    ratio = float(((counts.double() - expected) ** 2 / expected).sum()) / k
    return (ratio ** (1 / 3) - (1 - 2 / (9 * k))) / (2 / (9 * k)) ** 0.5
