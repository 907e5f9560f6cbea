"""LLaDA2's block refinement in diffusers (LLaDA2.1, Bie et al. 2026, arXiv 2602.08676): its sampling step and head.

The scheduler samples every token of a block, commits those above a threshold of confidence (or, of fewer, the best ones
that the schedule asks for), and may replace committed ones where the model is confident of another ("editing").
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.tokens import sample_logits, unmask_select
from ..patching.patch import Context
from ..patching.sampling import SamplingStep, check_noise, multinomial_noise, output_class, sample_with
from ..state.generation import Generation

_STATE = "_maskaccel_llada2"
_PIPELINE = "LLaDA2Pipeline"


class BlockStep(SamplingStep):
    """`BlockRefinementScheduler.step` by the token ops, where tokens are masked."""

    scheduler = "BlockRefinementScheduler"
    fingerprints = frozenset({"421b3d37f290"})

    def __init__(self, generation: Generation, noise: str) -> None:
        super().__init__(generation, noise)
        self._number = 0
        self._counts: list[int] = []

    def refusal(self, given: dict[str, Any]) -> str | None:
        """Why a step is the scheduler's own."""
        size = given["model_output"].shape[-1]
        if given["mask_token_id"] is None:
            return "mask_token_id is None: tokens are replaced, not masked"
        if given["top_k"] is not None and 0 < given["top_k"] < size:
            return "top_k"
        if given["top_p"] is not None and given["top_p"] < 1:
            return "top_p"
        if given["temperature"] < 0:
            return "temperature below 0"  # which the scheduler refuses
        return None

    def begin(self, scheduler: Any) -> None:
        """The counts of a run, read once."""
        schedule = scheduler._transfer_schedule
        self._counts, self._number = ([] if schedule is None else schedule.tolist()), 0

    def step(self, scheduler: Any, given: dict[str, Any]) -> Any:
        """The scheduler's step, without its loop over samples."""
        logits, tokens, mask_id = given["model_output"], given["sample"], given["mask_token_id"]
        config, self._number = scheduler.config, self._number + 1
        editing = config.editing_threshold if given["editing_threshold"] is None else given["editing_threshold"]
        threshold = float(config.threshold) if given["threshold"] is None else given["threshold"]
        method, temperature = given["sampling_method"], given["temperature"]
        drawn = temperature != 0 and method in ("multinomial", "auto")
        noise = None
        if drawn and self.noise == "pipeline":
            shape = (logits.shape[0] * logits.shape[1], logits.shape[2])
            noise = multinomial_noise(shape, torch.float32, logits.device, given["generator"]).view(logits.shape)
        edits = editing is not None and editing > 0
        # With editing, committed tokens are predicted too.
        asked = torch.full_like(tokens, mask_id) if edits else tokens
        ids, confidence = sample_logits(
            logits, asked, mask_id, temperature=temperature if drawn else 0.0, scaled=drawn and temperature != 1,
            seed=self._seed, step=self._number, noise=noise,
        )  # fmt: skip
        masked = tokens == mask_id
        taken = self._committed(confidence, tokens, mask_id, int(given["timestep"]), threshold)
        edited = torch.zeros_like(masked)
        if edits:
            prompt = given["prompt_mask"]
            edited = ~masked & (ids != tokens) & (confidence > float(editing))
            edited = edited if prompt is None else edited & ~prompt
        found = torch.where(taken | edited, ids, tokens)
        results = (found, taken, edited, ids, confidence, logits)
        if not given["return_dict"]:
            return results
        return output_class(scheduler, "BlockRefinementSchedulerOutput")(*results)

    def _committed(self, confidence: Tensor, tokens: Tensor, mask_id: int, index: int, threshold: float) -> Tensor:
        """Which masked tokens are committed: all above the threshold, or the best ones of the schedule's number."""
        if not self._counts:
            return torch.zeros_like(tokens, dtype=torch.bool)
        # The scheduler's "above" as the op's "at least": the next number of fp32.
        above = torch.nextafter(torch.tensor(threshold, dtype=torch.float32), torch.tensor(torch.inf)).item()
        # A sampled token may be the mask's own id; so who took a token is asked with one that no token has.
        flag = torch.full_like(tokens, -1)
        count = self._counts[min(index, len(self._counts) - 1)]
        return unmask_select(confidence.float(), flag, tokens, mask_id, n=count, threshold=above) == -1

    def head(self, inner: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Logits of the block that is sampled, in place of those of the whole window."""
        block = sum(self._counts)  # known from the first step of a run on
        known = block > 0 and self._run == self.generation.run
        if not known or hidden.dim() != 3 or hidden.shape[1] <= block or not _called_by_pipeline():
            return inner(hidden)
        self.head_rows += block
        self.head_left_out += hidden.shape[1] - block
        return inner(hidden[:, -block:])


def _called_by_pipeline() -> bool:
    """Whether the pipeline's own loop asks, which reads the last block alone; anybody else gets all logits.

    The loop tells nobody when it ends, so it is looked for among the callers.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            kinds = type(frame.f_locals.get("self")).__mro__
            if any(kind.__name__ == _PIPELINE for kind in kinds):
                return True
        frame = frame.f_back
    return False


@dataclass(frozen=True)
class LLaDA2:
    """The sampling of diffusers' `LLaDA2Pipeline` in one pass over the logits, and the head on one block.

    Steps with `top_k` or `top_p`, and schedulers that replace tokens without a mask (DiffusionGemma), stay the
    scheduler's own; the report counts them. Without editing, `sampled_tokens` and `sampled_probs` of tokens that are
    not masked are the tokens themselves and +inf.

    Attributes:
        noise: `"counter"`: the library's counter-based noise, seeded from the pipeline's generator once a run.
            `"pipeline"`: what the unpatched pipeline draws, so that the tokens are the same up to rounding.
        block_head: Whether the model's head is run on the block that is sampled alone, not on the whole window.
    """

    noise: str = "counter"
    block_head: bool = True

    name = "LLaDA2"
    kind = "exact"
    paper = "LLaDA2.1: Speeding Up Text Diffusion via Token Editing (arXiv 2602.08676)"
    models = "LLaDA2Pipeline (BlockRefinementScheduler)"

    def __post_init__(self) -> None:
        check_noise(self.noise)

    def attach(self, context: Context) -> None:
        """Plan the sampling step of the scheduler, and the head on one block."""
        step = BlockStep(context.generation, self.noise)
        if not sample_with(context, self.name, step):
            return
        context.track_generation(self.name)
        context.transaction.set(context.model, _STATE, step, self.name)
        if not self.block_head:
            return
        head = getattr(context.model, "lm_head", None)
        if not isinstance(head, nn.Module):
            context.skip(self.name, context.model, "it has no lm_head: logits of the whole window are computed")
            return
        context.transaction.set(head, _STATE, step, self.name)
        context.transaction.wrap_forward(head, _block_head)
        context.done(self.name, head, "head on the sampled block")

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """Steps that were sampled here, those left to the scheduler, and rows that the head left out."""
        step = model.__dict__.get(_STATE)
        return {} if step is None else step.activity()


def _block_head(self: nn.Module, inner: Callable[[Tensor], Tensor], /, hidden: Tensor) -> Tensor:
    return self.__dict__[_STATE].head(inner, hidden)
