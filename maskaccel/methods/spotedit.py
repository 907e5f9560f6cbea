"""SpotEdit: selective region editing (Qin et al. 2025, arXiv 2512.22323).

An edit that changes a part of an image needs the steps of that part alone. After every step the clean latents
x0_hat = x_t - t v are compared with those of the reference image, token by token; a token whose difference is below
`threshold` is taken for unchanged, is not computed at the next step, and at the end is the reference itself. The first
steps are dense, and so are the steps in `dense`.

*SpotFusion* (`fuse=True`) gives attention, in the rows of the tokens that are not computed, a mixture of what the last
dense step left and of the reference's own keys and values:

    K = (1 - w) K_ref + w K_cached (V likewise),  w = cos^2(pi t / 2)

with t the noise level of the step, 1 at its start. The reference's keys and values are of one more call of the model at
the start of a run, on the reference alone, without noise.

The authors score by features of the first stages of the VAE's decoder, channel by channel of unit length, with a
threshold of 0.2 (FLUX.1 Kontext) or 0.15 (Qwen-Image-Edit): give such a function as `score`. Without it the score is
the mean square of the difference of the latents over the variance of the reference, so that it does not depend on their
scale; its threshold is a setting of its own.

Different here: every image of a batch has tokens of its own; in their code t is divided by 1000 twice, so that w is
nearly 1; and what they smooth at the border of the edit was overwritten just before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..masks import DenseAt, TokenIndex
from ..ops import select_active
from ..ops._checks import count as check_count
from ..patching.selector import Seen, Selector
from ..state.kv import KVStorage
from ..state.solver import Point
from ._active import Given, PartialSteps, check_common, check_number, check_steps, grown, rounded, value_of
from ._reference import reference_like, towards

Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class SpotEdit(PartialSteps):
    """Compute the tokens that differ from a reference image; the others become the reference.

    Attributes:
        reference: Latents of the reference image, in the form that the scheduler is given and its scale (a batch of 1
            serves all images), or a function that gives them, called at every step.
        threshold: A token whose score is below it is not computed.
        first: Dense steps at the start, 1 or more.
        dense: Numbers of further dense steps.
        dilation: Tokens within so many rows and columns of one that is computed are computed too.
        score: Given clean latents and those of the reference, both in the form of `reference`, the score of each token
            `(B, N)`; None is the difference of latents above.
        fuse: Mix the reference's keys and values into the cached ones.
        border: Share of the reference in tokens that are not computed beside ones that are, at the end; 1 is all of it.
        multiple: Numbers of tokens are rounded up to a multiple of it, by the next best scores.
        grid: Grid of the latent tokens where the model does not tell it.
        storage: How keys and values are kept.
        kernel: Attend at steps in part through `tile_attention`: on a CPU faster than torch's function. Without it the
            model's own attention is called, and steps with all tokens active are dense ones bit for bit.
    """

    reference: Given = field(repr=False)
    threshold: float = 0.2
    first: int = 4
    dense: tuple[int, ...] = (13, 22, 31)
    dilation: int = 0
    score: Score | None = None
    fuse: bool = False
    border: float = 0.8
    multiple: int = 32
    grid: tuple[int, ...] | None = None
    storage: KVStorage = KVStorage()
    kernel: bool = False

    name = "SpotEdit"
    paper = "SpotEdit: Selective Region Editing in Diffusion Transformers (arXiv 2512.22323)"

    def __post_init__(self) -> None:
        check_common(self)
        check_steps(self)
        check_number(self, "threshold", 0)
        check_count("dilation", self.dilation)
        check_number(self, "border", 0, 1)
        if not isinstance(self.reference, Tensor) and not callable(self.reference):
            raise TypeError(f"reference={self.reference!r} must be a tensor or a function that gives one")
        if self.score is not None and not callable(self.score):
            raise TypeError(f"score={self.score!r} must be a function of clean latents and reference, or None")

    @property
    def rule(self) -> DenseAt:
        """The step mask."""
        return DenseAt(self.first, self.dense)

    def selector(self) -> Selector:
        """How tokens are chosen on one model."""
        return _Changed(self)


class _Changed(Selector):
    """The tokens whose clean latents differ from the reference."""

    def __init__(self, method: SpotEdit) -> None:
        self.method, self.mixes = method, method.fuse

    def score(self, seen: Seen, reference: Tensor) -> Tensor:
        """`(B, N)`, fp32."""
        clean = seen.point.clean(seen.output.to(reference.dtype), seen.sample.to(reference.dtype))
        if self.method.score is not None:
            found = self.method.score(clean, reference.expand_as(clean)).float()
            if found.shape != (clean.shape[0], seen.where.count):
                raise ValueError(f"score gave shape {tuple(found.shape)} for {seen.where.count} tokens")
            return found
        target = seen.where.tokens(reference)
        difference = (seen.where.tokens(clean) - target).square().mean((-1, -2))
        return (difference / target.var((1, 2, 3), keepdim=True)[..., 0, 0].clamp(min=1e-12)).float()

    def select(self, seen: Seen) -> TokenIndex | None:
        """The tokens of the next step. Their number is read on the host, once a step."""
        method = self.method
        score = self.score(seen, reference_like(method.reference, seen.sample))
        changed = grown(score >= method.threshold, seen.where.grid, method.dilation)
        keep = rounded(int(changed.sum(1).max()), method.multiple, changed.shape[1])
        if keep == changed.shape[1]:
            return None
        index, _ = select_active(score, score.new_zeros(score.shape).int(), keep, force=changed)
        return index

    def corrected(self, seen: Seen) -> Tensor:
        """At the last step, tokens that were not computed become the reference."""
        if not seen.last or seen.active is None:
            return seen.output
        reference = reference_like(self.method.reference, seen.sample)
        batch = seen.output.shape[0]
        kept = ~seen.active.mask[:batch, : seen.where.count]
        share = kept.float()
        if self.method.border < 1:
            share = share.where(~(kept & grown(~kept, seen.where.grid, 1)), self.method.border)
        return towards(seen, reference, share)

    def clean(self) -> Tensor | None:
        """What the keys and values beside the cached ones are of."""
        return value_of("reference", self.method.reference) if self.mixes else None

    def cached_share(self, point: Point) -> float:
        """W of SpotFusion."""
        return math.cos(math.pi * point.noise / (point.signal + point.noise) / 2) ** 2
