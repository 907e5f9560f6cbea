"""Which masked tokens are revealed when: schedules of counts, groups and orders for masked generative models.

A sampler of a masked model starts from tokens that are all `mask_id` (or some of them) and reveals a few at each call
of the model. How many is a schedule of counts; which is an order (confidence, margin, entropy, scores from elsewhere),
or is fixed beforehand: blocks from left to right, dilated levels, a stratified order. All of it is integers made on the
host, so a run needs no read of the device to know its steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ops._checks import choice
from ..ops._checks import count as check_count
from ..ops.tokens import philox

_PURPOSE = 4  # of the counters, beside those of the kernels

RATIOS: dict[str, Callable[[float], float]] = {
    "cosine": lambda r: math.cos(r * math.pi / 2),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r * r,
    "cubic": lambda r: 1 - r**3,
    "root": lambda r: 1 - math.sqrt(r),
    "arccos": lambda r: math.acos(r) / (math.pi / 2),
}
"""Masked share of the tokens after a share r of the steps (MaskGIT, section 3.3; MaskBit's code for arccos)."""


def mask_ratio(progress: float, schedule: str = "cosine") -> float:
    """Share of the tokens that is still masked after a share of the steps: 1 at 0, 0 at 1.

    Args:
        progress: Steps done, as a share of all, 0 to 1.
        schedule: A name of `RATIOS`.

    Raises:
        ValueError: The schedule is unknown, or `progress` outside of 0 to 1.
    """
    choice("schedule", schedule, RATIOS)
    if not 0 <= progress <= 1:
        raise ValueError(f"progress={progress!r} must be a number from 0 to 1")
    return min(1.0, max(0.0, RATIOS[schedule](float(progress))))


def reveal_counts(total: int, steps: int, schedule: str = "cosine") -> tuple[int, ...]:
    """How many tokens each step reveals, by a mask schedule: their sum is `total`.

    After step t of T, `floor(ratio(t / T) * total)` are masked, but at least 1 before the last step, and at least one
    fewer than before (MaskGIT, section 3.2, as its code clamps it).

    Args:
        total: Masked tokens at the start.
        steps: Calls of the model. With more steps than tokens some reveal none.
        schedule: A name of `RATIOS`.

    Returns:
        `steps` integers, 0 or more.

    Raises:
        ValueError: A number is out of range, or the schedule unknown.
    """
    check_count("total", total)
    check_count("steps", steps, 1)
    choice("schedule", schedule, RATIOS)
    masked, counts = total, []
    for step in range(1, steps):
        wanted = math.floor(total * mask_ratio(step / steps, schedule))
        left = min(masked, max(1, min(masked - 1, wanted)))
        counts.append(masked - left)
        masked = left
    return (*counts, masked)


def even_counts(total: int | Tensor, steps: int) -> Tensor:
    """How many tokens each step reveals if all reveal equally many: the first ones take what a division leaves.

    LLaDA's `get_num_transfer_tokens`: its noise schedule is linear, so the expected count is the same at every step.

    Args:
        total: Masked tokens, an integer or int tensor `(B,)`.
        steps: Calls of the model.

    Returns:
        int32 `(B, steps)` (B = 1 for an integer), on the device of `total`; each row sums to its total.

    Raises:
        ValueError: `steps` is below 1, or an integer `total` negative.
        TypeError: `total` is neither an integer nor a tensor of integers `(B,)`.
    """
    check_count("steps", steps, 1)
    if isinstance(total, Tensor):
        if total.dim() != 1 or total.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"total is {total.dtype} {tuple(total.shape)}; it must be int32 or int64 (B,)")
    else:
        total = torch.tensor([check_count("total", total)])
    base, rest = total // steps, total % steps
    return (base[:, None] + (torch.arange(steps, device=total.device) < rest[:, None])).to(torch.int32)


# ------------------------------------------------------------------------------------------------ discrete diffusion
@dataclass(frozen=True)
class NoiseSchedule:
    """`alpha(t)`: the probability that a token is not masked at time t; 1 (data) at t = 0, 0 (all masked) at t = 1.

    Attributes:
        kind: `"linear"`: `1 - t` (MDLM's log-linear noise, LLaDA); `"cosine"`: `1 - cos(pi/2 (1 - t))`; `"poly"`:
            `1 - t^exponent` (MD4).
        exponent: Of `"poly"`.
        eps: `alpha` is squeezed into [eps, 1 - eps] (MD4 has 1e-4), so that the weights of its loss stay finite.
    """

    kind: Literal["linear", "cosine", "poly"] = "linear"
    exponent: float = 1.0
    eps: float = 0.0

    def __post_init__(self) -> None:
        choice("kind", self.kind, ("linear", "cosine", "poly"))
        if not self.exponent > 0:
            raise ValueError(f"exponent={self.exponent!r} must be above 0")
        if not 0 <= self.eps < 0.5:
            raise ValueError(f"eps={self.eps!r} must be from 0 to below 0.5")

    def alpha(self, t: float) -> float:
        """Probability that a token is not masked at time t."""
        if self.kind == "cosine":
            value = 1 - math.cos(math.pi / 2 * (1 - t))
        else:
            value = 1 - t ** (self.exponent if self.kind == "poly" else 1.0)
        return (1 - 2 * self.eps) * value + self.eps

    def reveal_probability(self, t: float, s: float) -> float:
        """Probability that a token masked at time t is revealed by time s < t.

        The posterior of the absorbing process, `(alpha_s - alpha_t) / (1 - alpha_t)` (MDLM, section 3.2).

        Raises:
            ValueError: Not 0 <= s <= t <= 1.
        """
        if not 0 <= s <= t <= 1:
            raise ValueError(f"t={t!r}, s={s!r}; it must be 0 <= s <= t <= 1")
        alpha_s, alpha_t = self.alpha(s), self.alpha(t)
        return 0.0 if s == t else min(1.0, max(0.0, (alpha_s - alpha_t) / (1 - alpha_t)))


LINEAR = NoiseSchedule()
"""`alpha(t) = 1 - t`."""


def time_grid(steps: int, kind: Literal["uniform", "cosine"] = "uniform") -> tuple[float, ...]:
    """The `steps + 1` times of a run, from 1 to 0; `"cosine"` is `cos(pi/2 (1 - t))` of the uniform ones (MD4)."""
    check_count("steps", steps, 1)
    choice("kind", kind, ("uniform", "cosine"))
    uniform = [(steps - i) / steps for i in range(steps + 1)]
    if kind == "uniform":
        return tuple(uniform)
    return tuple(0.0 if t == 0 else math.cos(math.pi / 2 * (1 - t)) for t in uniform)


def uniform(seed: int, sample: Tensor, step: int, n: int) -> Tensor:
    """Uniform numbers of (0, 1) by counters (`maskaccel.ops.tokens.schema`): the same on every device.

    Args:
        seed: Of 64 bits.
        sample: int64 `(B,)`, numbers of the samples among all ranks.
        step: Number of the step.
        n: How many for each sample.

    Returns:
        fp32 `(B, n)` on the device of `sample`.
    """
    items = torch.arange(n, device=sample.device)[None]
    at = torch.full((1,), step, device=sample.device)
    return ((philox.words(seed, items, sample[:, None], at, _PURPOSE << 24) >> 9).float() + 0.5) * 2.0**-23


def ancestral_counts(
    masked: Sequence[int], probabilities: Sequence[float], seed: int, *, finish: bool = True, sample_offset: int = 0
) -> list[list[int]]:
    """How many tokens of each sample ancestral sampling reveals at each step, drawn before the run.

    Each masked token is revealed with probability p, independently of the others and of what the model says. That is:
    a binomial number of them, chosen at random. The numbers do not depend on the model, so the whole run's can be
    drawn first, and the steps at which no sample changes (MDLM and Prime reuse the last logits there) are known
    without a call of the model and without a read of the device.

    Args:
        masked: Masked tokens of each sample at the start.
        probabilities: Of each step, as of `NoiseSchedule.reveal_probability`.
        seed: Of the draws, made by counters on the host: those of a sample do not depend on its batch.
        finish: Reveal all that is left at the last step.
        sample_offset: Number of the first sample among all ranks.

    Returns:
        For each step the count of each sample.

    Raises:
        ValueError: A probability is outside of 0 to 1.
    """
    steps, left, law = len(probabilities), 1.0, []
    for step, p in enumerate(probabilities):
        if not 0 <= p <= 1:
            raise ValueError(f"probabilities[{step}]={p!r} must be from 0 to 1")
        law.append(left * p)
        left *= 1 - p
    # The step at which a token is revealed, by the inverse of its distribution; past the last one for never.
    reached = torch.tensor(law, dtype=torch.float64).cumsum(0)
    most = max((check_count("masked", m) for m in masked), default=0)
    sample = torch.arange(sample_offset, sample_offset + len(masked))
    when = torch.searchsorted(reached, uniform(seed, sample, 0, most).double(), right=True)
    if finish:
        when = when.clamp(max=steps - 1)
    drawn = [one[:m].bincount(minlength=steps + 1)[:steps] for one, m in zip(when, masked, strict=True)]
    return torch.stack(drawn, 1).tolist() if drawn else [[] for _ in probabilities]


# ---------------------------------------------------------------------------------------------- fixed groups, orders
def block_ids(tokens: int, block: int, prefix: int = 0) -> Tensor:
    """Number of each token's block, from left to right: int32 `(1, tokens)`, -1 for the first `prefix` (a prompt).

    Semi-autoregressive sampling (LLaDA) reveals one block after the other.
    """
    check_count("tokens", tokens)
    check_count("block", block, 1)
    check_count("prefix", prefix)
    places = torch.arange(tokens) - prefix
    return torch.where(places < 0, -1, places // block).to(torch.int32)[None]


def dilated_levels(length: int, base: int = 2, skip: int = 1) -> Tensor:
    """The step at which DUS reveals each token of a block: int32 `(length,)`, 0 first.

    Level k holds the multiples of a stride that are in no level before it; the stride begins at `base^(m - skip)`, with
    m the first power that reaches the length, and is divided by `base` from level to level. So a block takes
    `m - skip + 1` calls of the model, O(log length), and with base 2 no two neighbours of 3 tokens or more go together.

    Args:
        length: Tokens of a block.
        base: Ratio of strides, 2 or more. With more than 2 the last levels hold neighbours.
        skip: Levels that are left out at the start, 1 or more.

    Raises:
        ValueError: A number is out of range.
    """
    check_count("length", length, 1)
    check_count("base", base, 2)
    check_count("skip", skip, 1)
    power = 0
    while base**power < length:
        power += 1
    places, levels = torch.arange(length), torch.full((length,), -1, dtype=torch.int32)
    for level, exponent in enumerate(range(max(power - skip, 0), -1, -1)):
        levels[(levels < 0) & (places % base**exponent == 0)] = level
    return levels


def stratified_order(grid: tuple[int, int], seed: int = 0) -> Tensor:
    """The place of each token in a stratified random order of a grid: int64 `(h * w,)`, 0 first.

    The grid is cut into 2 x 2 cells, those into 2 x 2 again, and so on. At each depth every cell that holds no token of
    the order yet gets one, drawn at random, the cells in random order: after 4^k tokens each cell of depth k has one
    (LaViDa-O: tokens revealed together are far apart).

    Args:
        grid: Height and width. Where they are no powers of two, cells differ by a row or column.
        seed: Of the draws.

    Raises:
        ValueError: A size is below 1.
    """
    height, width = (check_count("grid", n, 1) for n in grid)
    generator = torch.Generator().manual_seed(seed)
    tokens = height * width
    y, x = torch.arange(tokens) // width, torch.arange(tokens) % width
    order = torch.empty(0, dtype=torch.int64)
    depth = 1
    while order.numel() < tokens:
        side = 2**depth
        cell = (y * side // height) * side + x * side // width
        taken = torch.zeros(side * side, dtype=torch.bool)
        taken[cell[order]] = True
        # A random permutation, of which each empty cell takes its first token, is a random token of each cell in random
        # order at once.
        shuffled = torch.randperm(tokens, generator=generator)
        first = torch.full((side * side,), tokens)
        first = first.scatter_reduce(0, cell[shuffled], torch.arange(tokens), "amin")
        new = first[~taken & (first < tokens)].sort().values
        order = torch.cat([order, shuffled[new]])
        depth += 1
    return torch.empty_like(order).scatter_(0, order, torch.arange(tokens))


# ----------------------------------------------------------------------------------------------------- parts of tokens
def subtokens(tokens: Tensor, base: int, parts: int) -> Tensor:
    """Tokens as digits, the highest first: `(B, N)` to `(B, N, parts)`, each from 0 to `base - 1`."""
    powers = base ** torch.arange(parts - 1, -1, -1, device=tokens.device)
    return tokens.unsqueeze(-1) // powers % base


def from_subtokens(digits: Tensor, base: int) -> Tensor:
    """The inverse of `subtokens`: `(B, N, parts)` to `(B, N)`."""
    powers = base ** torch.arange(digits.shape[-1] - 1, -1, -1, device=digits.device)
    return (digits * powers).sum(-1)
