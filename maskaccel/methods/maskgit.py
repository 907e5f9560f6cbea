"""MaskGIT: masked generative image transformer (Chang et al. 2022, arXiv 2202.04200), and the samplers that follow it.

Each of T steps samples a token for every masked position, ranks the positions by the log-probability of what was
sampled plus Gumbel noise that anneals to 0, and reveals the best of them; a mask schedule says how many (section 3.2).
Muse, MAGVIT, Meissonic and aMUSEd are settings of it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..masks.unmasking import reveal_counts
from ..ops._checks import count as check_count
from ..patching.patch import Context
from ..patching.sampling import check_noise
from . import _amused, _masked
from ._masked import Draw, Reveal


def anneal(
    free: Tensor, steps: int, schedule: str, temperature: float, start: float, end: float | None = None
) -> Iterator[Reveal]:
    """MaskGIT's steps.

    Args:
        free: bool `(B, N)` on the host: masked tokens that may be revealed.
        steps: Calls of the model.
        schedule: A name of `masks.unmasking.RATIOS`.
        temperature: Of the sampled tokens; confidences are of the same softmax.
        start: Temperature of the noise on the ranks. It falls to 0 with the share of steps done, as
            `start * (1 - t / T)` after step t (MaskGIT), or
        end: where given, from `start` at the first step to `end` at the last (aMUSEd, Meissonic).
    """
    masked = free.sum(1).tolist()
    counts = list(zip(*(reveal_counts(m, steps, schedule) for m in masked), strict=True))
    for step, (count, rows) in enumerate(zip(counts, _masked.remaining(masked, counts), strict=True)):
        if end is None:
            noise = start * (1 - (step + 1) / steps)
        else:
            noise = start + (end - start) * (step / (steps - 1) if steps > 1 else 0.0)
        scaled = temperature not in (0.0, 1.0)
        yield Reveal(count, "log", temperature=temperature, noise=noise, scaled=scaled, rows=rows)


@dataclass(frozen=True)
class MaskGIT(_masked.MaskedSampling):
    """Reveal tokens by the probability of what was sampled, as many as a mask schedule says.

    As a sampler: `MaskGIT(steps=8).sample(model, tokens, mask_id)`. As a patch of diffusers' `AmusedPipeline` and its
    variants: their own schedule, steps and temperatures hold; sampling, confidence and selection become one op each,
    which reads the logits once, and the head is run on masked rows alone. The random numbers are other ones (with
    `noise="pipeline"` the same), their law is the same. A sample without masked tokens stays as it is (the scheduler
    would mask one of its tokens again).

    Attributes:
        steps: Calls of the model (not for the patch).
        schedule: Masked share over the steps, a name of `masks.unmasking.RATIOS` (not for the patch).
        temperature: Of the sampled tokens (not for the patch).
        choice_temperature: Gumbel noise on the log-confidence at the start (not for the patch).
        choice_end: Where it ends; None: MaskGIT's, which falls to 0 with the share of steps done (not for the patch).
        noise: For the patch. `"counter"`: the library's counter-based noise, formed where it is used, seeded from the
            pipeline's generator once a run. `"pipeline"`: what the unpatched pipeline draws from its generator, so that
            the tokens are the same up to rounding; costs the noise's memory.
        masked_head: For the patch: whether the head is run on masked rows alone.
    """

    steps: int = 8
    schedule: str = "cosine"
    temperature: float = 1.0
    choice_temperature: float = 4.5
    choice_end: float | None = None
    noise: str = "counter"
    masked_head: bool = True

    name = "MaskGIT"
    kind = "exact"
    paper = "MaskGIT: Masked Generative Image Transformer (arXiv 2202.04200)"
    models = "aMUSEd (UVit2DModel, AmusedScheduler); as a sampler, any masked model"

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        reveal_counts(0, self.steps, self.schedule)
        for field in ("temperature", "choice_temperature"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}={getattr(self, field)!r} must be a number, 0 or more")
        check_noise(self.noise)

    def plan(self, free: Tensor, draw: Draw) -> Generator[Reveal, bool, None]:
        """MaskGIT's steps."""
        yield from anneal(
            free, self.steps, self.schedule, self.temperature, self.choice_temperature, self.choice_end
        )  # fmt: skip

    def attach(self, context: Context) -> None:
        """Plan the sampling step of aMUSEd's scheduler, and its head on masked rows."""
        _amused.attach(context, self.name, self.noise, self.masked_head)

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """Steps that were sampled here, and rows that the head left out."""
        return _amused.activity(model)


MUSE = MaskGIT(steps=24)
"""Muse's base model (Chang et al. 2023, arXiv 2301.00704): 24 steps."""
MUSE_SUPER = MaskGIT(steps=8)
"""Muse's super-resolution model: 8 steps."""
MAGVIT = MaskGIT(steps=12)
"""MAGVIT (Yu et al. 2023, arXiv 2212.05199): 12 steps over the tokens of a video."""
MEISSONIC = MaskGIT(steps=64, choice_temperature=2.0, choice_end=0.0)
"""Meissonic (Bai et al. 2024, arXiv 2410.08261): 64 steps; noise on the ranks from 2 to 0."""
