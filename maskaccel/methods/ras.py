"""RAS: region-adaptive sampling (Liu et al. 2025, arXiv 2502.10389).

From step `first` on a step computes the tokens where the model's output is in focus; the others keep the output of the
step before, and attention sees their keys and values as the last step left them. Section 3 of the paper scores token i
by the noise that the model predicts for it, and raises it with the number of times D_i that it was left out:

    R_i = mean over its pixels of std over channels (v_i) * exp(beta * D_i)

Of the tokens that are left out, `1 - high_fraction` have the lowest scores and `high_fraction` the highest. Steps in
`dense` compute all tokens, which renews what is cached.

From the authors' code: the score is of the output that the scheduler is given, with its stale parts in it; D_i counts
over the whole run; the numbers below. Their settings:

    SD3, 28 steps            dense=(12, 20), high_fraction=0.3
    Lumina-Next, 30 steps    high_fraction=1.0, ramp=(256, 4)

Different here: every image of a batch has tokens of its own (one choice for all in the code, `shared=True`); both
halves of a guided batch share them; latents of one channel are scored over the pixels of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks import DenseAt, TokenIndex
from ..ops import select_active
from ..ops._checks import choice
from ..ops._checks import count as check_count
from ..patching.selector import Seen, Selector
from ..state.kv import KVStorage
from ._active import PartialSteps, check_common, check_number, check_steps, rounded

METRICS = ("std", "l2")


@dataclass(frozen=True)
class RAS(PartialSteps):
    """Compute the tokens in focus; the others keep the output of the step before.

    Attributes:
        ratio: Share of the tokens that a step in part computes, above 0 to 1.
        first: Dense steps at the start, 1 or more.
        dense: Numbers of further dense steps.
        end: Last step that may be in part; None: the last of the run.
        metric: `"std"` or `"l2"`, over the channels of the output.
        beta: Growth of the score with each time that a token was left out, 0 or more.
        high_fraction: Share of the tokens left out that have the highest scores, 0 to 1.
        ramp: `(tokens, steps)`: so many tokens more are left out every so many steps, around the share that `ratio`
            leaves out on average; None leaves out the same number at every step.
        shared: One choice for all images of a batch.
        multiple: Numbers of tokens are rounded up to a multiple of it.
        grid: Grid of the latent tokens where the model does not tell it.
        storage: How keys and values are kept.
        kernel: Attend at steps in part through `tile_attention`: on a CPU faster than torch's function. Without it the
            model's own attention is called, and steps with all tokens active are dense ones bit for bit.
    """

    ratio: float = 0.5
    first: int = 4
    dense: tuple[int, ...] = (12, 22)
    end: int | None = None
    metric: str = "std"
    beta: float = 0.1
    high_fraction: float = 0.3
    ramp: tuple[int, int] | None = None
    shared: bool = False
    multiple: int = 32
    grid: tuple[int, ...] | None = None
    storage: KVStorage = KVStorage()
    kernel: bool = False

    name = "RAS"
    paper = "Region-Adaptive Sampling for Diffusion Transformers (arXiv 2502.10389)"

    def __post_init__(self) -> None:
        check_common(self)
        check_steps(self)
        if self.end is not None:
            check_count("end", self.end)
        choice("metric", self.metric, METRICS)
        check_number(self, "ratio", 0, 1)
        if self.ratio == 0:
            raise ValueError("ratio=0 computes no token; give a share above 0")
        check_number(self, "beta", 0)
        check_number(self, "high_fraction", 0, 1)
        ramp = self.ramp
        if ramp is not None and (
            not isinstance(ramp, tuple) or len(ramp) != 2 or any(type(n) is not int for n in ramp) or ramp[1] < 1
        ):
            raise ValueError(f"ramp={ramp!r} must be (tokens, steps) with 1 step or more, or None")

    @property
    def rule(self) -> DenseAt:
        """The step mask."""
        return DenseAt(self.first, self.dense, self.end)

    def selector(self) -> Selector:
        """How tokens are chosen on one model."""
        return _Focus(self)

    def count(self, step: int, num_steps: int | None, tokens: int) -> int:
        """The tokens that a step in part computes.

        Raises:
            ValueError: The ramp needs the number of steps and it is unknown.
        """
        left = int((1 - self.ratio) * tokens)
        if self.ramp is not None:
            if num_steps is None:
                raise ValueError(f"ramp={self.ramp} needs the number of steps; pass it to generation(num_steps=...)")
            change, length = self.ramp
            left += change * (step // length - ((num_steps + self.first) // length // 2))
        return rounded(tokens - min(max(left, 0), tokens), self.multiple, tokens)


class _Focus(Selector):
    """The tokens of largest score. How often each was left out is kept for a run."""

    def __init__(self, method: RAS) -> None:
        self.method = method
        self.left: Tensor | None = None

    def clear(self) -> None:
        """A run begins or ends."""
        self.left = None

    def score(self, seen: Seen) -> Tensor:
        """`(B, N)`, fp32."""
        v = seen.where.tokens(seen.output).float()
        if v.shape[-1] == 1:
            v = v.transpose(-1, -2)
        score = v.norm(dim=-1) if self.method.metric == "l2" or v.shape[-1] == 1 else v.std(dim=-1)
        score = score.mean(-1)
        return score.mean(0, keepdim=True) if self.method.shared else score

    def select(self, seen: Seen) -> TokenIndex | None:
        """The tokens of the next step."""
        method, score = self.method, self.score(seen)
        if self.left is None or self.left.shape != score.shape:
            self.left = torch.zeros(score.shape, dtype=torch.int32, device=score.device)
        keep = method.count(seen.index + 1, seen.num_steps, score.shape[1])
        if keep == score.shape[1]:
            return None
        index, _ = select_active(score, self.left, keep, beta=method.beta, high_fraction=method.high_fraction)
        self.left += index.inverse < 0
        return index
