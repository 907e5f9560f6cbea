"""The sampling step of diffusers' aMUSEd pipelines, and their head on masked rows (see `maskgit.MaskGIT`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models._adapter import children_of, fingerprint
from ..ops.tokens import sample_logits, unmask_select
from ..patching.patch import Context
from ..patching.sampling import SamplingStep, multinomial_noise, output_class, sample_with
from ..state.generation import Generation
from ._masked import MaskedRows

_MODEL, _HEAD = "UVit2DModel", "mlm_layer"
_HEADS = frozenset({"e53c8ca148ed"})
_STATE = "_maskaccel_amused"


class AmusedStep(SamplingStep):
    """`AmusedScheduler.step` by the token ops.

    Attributes:
        capacity: Upper bound of the masked tokens of a sample at the next step, known to the host; None: read it.
        compact: Rows of the logits of the current step, or None where they are of all tokens.
    """

    scheduler = "AmusedScheduler"
    fingerprints = frozenset({"b227e4eb7840"})

    def __init__(self, generation: Generation, noise: str) -> None:
        super().__init__(generation, noise)
        self.tokens: Tensor | None = None
        self.mask_id = -1
        self.capacity: int | None = None
        self.compact: int | None = None
        self._temperatures: list[float] = []
        self._start: tuple[Any, float] = (1.0, 1.0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tokens": None, "capacity": None, "compact": None, "_run": -1}

    def seen(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The tokens of a call of the model, told before it."""
        self.tokens, self.compact = (args[0] if args else kwargs.get("input_ids")), None

    def head(self, inner: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Logits of masked tokens alone, `(B, V, K, 1)` in place of `(B, V, H, W)`: the head takes each by itself."""
        tokens, self.tokens = self.tokens, None
        # Outside of a run somebody else reads the logits.
        if tokens is None or not self.generation.active or hidden.shape[-2:] != tokens.shape[-2:]:
            return inner(hidden)
        if self._run != self.generation.run:
            self.capacity = None  # of an earlier run
        needed = tokens.flatten(1) == self.mask_id
        if self.capacity is None:
            self.capacity = int(needed.sum(1).max())  # once a run
        self.capacity = min(max(1, self.capacity), needed.shape[1])
        rows = MaskedRows(needed, self.capacity).rows(hidden.flatten(2).transpose(1, 2))
        self.compact = self.capacity
        self.head_rows += self.capacity
        self.head_left_out += needed.shape[1] - self.capacity
        # As an image of one column whose channels lie side by side, so that the logits of a row do too.
        return inner(rows.transpose(1, 2).unsqueeze(-1))

    def refusal(self, given: dict[str, Any]) -> str | None:
        """Why a step is the scheduler's own."""
        if given["model_output"].ndim not in (3, 4):
            return "the logits have neither 3 nor 4 dims"
        return None

    def begin(self, scheduler: Any) -> None:
        """The temperatures of a run, read once."""
        self._temperatures = scheduler.temperatures.tolist()

    def step(self, scheduler: Any, given: dict[str, Any]) -> Any:
        """MaskGIT's step as the scheduler has it."""
        logits, sample, generator = given["model_output"], given["sample"], given["generator"]
        if logits.ndim == 4:
            logits = logits.flatten(2).transpose(1, 2)
        tokens, mask_id = sample.flatten(1).contiguous(), scheduler.config.mask_token_id
        batch, n = tokens.shape
        steps, last = len(self._temperatures), int(given["timestep"])
        index = steps - 1 - last
        rows = None if self.compact is None else MaskedRows(tokens == mask_id, self.compact)
        noise = None
        if self.noise == "pipeline":
            noise = _sampling_noise(logits, n, generator)
            noise = noise if rows is None else rows.rows(noise)
        inside = tokens if rows is None else rows.take(tokens, empty=mask_id + 1)
        options: dict[str, Any] = {"seed": self._seed, "step": index}
        ids, confidence = sample_logits(logits, inside, mask_id, confidence="log", noise=noise, **options)
        confidence = confidence.float()
        if rows is not None:
            unknown = torch.full((batch, n), math.inf, device=tokens.device)
            ids, confidence = rows.put(ids, tokens), rows.put(confidence, unknown)
        if last == 0:
            found = ids
            self.capacity = None
        else:
            masked = (tokens == mask_id).sum(1, keepdim=True)
            left = self._left(scheduler, masked, index, n, given["starting_mask_ratio"])
            spread = None if self.noise == "counter" else _choice_noise(logits, batch, n, generator)
            found = unmask_select(
                confidence, ids, tokens, mask_id, n=(masked - left).clamp_min(0).to(torch.int32),
                temperature=self._temperatures[index], noise=spread, **options,
            )  # fmt: skip
        found, ids = found.view(sample.shape), ids.view(sample.shape)
        if not given["return_dict"]:
            return found, ids
        return output_class(scheduler, "AmusedSchedulerOutput")(found, ids)

    def _left(self, scheduler: Any, masked: Tensor, index: int, n: int, start: Any) -> Tensor:
        """How many tokens of each sample stay masked: the schedule's, fewer than before, 1 or more."""
        progress = torch.full((1, 1), index + 1, device=masked.device) / len(self._temperatures)
        cosine = scheduler.config.masking_schedule == "cosine"
        ratio = torch.cos(progress * math.pi / 2) if cosine else 1 - progress
        if self.compact is not None:
            # The same on the host, where rounding may go the other way: one more at most.
            if self._start[0] is not start:
                self._start = (start, float(start))  # a tensor of the pipeline's is read once
            host = (index + 1) / len(self._temperatures)
            share = math.cos(host * math.pi / 2) if cosine else 1 - host
            self.capacity = min(self.compact, max(1, math.floor(n * share * self._start[1]) + 1))
        return (n * (start * ratio)).floor().minimum(masked - 1).clamp_min(1).to(torch.int64)


def _sampling_noise(logits: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """What the scheduler's multinomial draws: for all tokens, on the generator's device, fp32 on a CPU."""
    device = logits.device if generator is None else generator.device
    dtype = torch.float32 if device.type == "cpu" else logits.dtype
    shape = (logits.shape[0] * n, logits.shape[2])
    return multinomial_noise(shape, dtype, device, generator).view(-1, n, shape[1]).to(logits.device)


def _choice_noise(logits: Tensor, batch: int, n: int, generator: torch.Generator | None) -> Tensor:
    """The Gumbel noise that the scheduler adds to its log-probabilities, of the dtype of those."""
    device = logits.device if generator is None else generator.device
    u = torch.zeros((batch, n), dtype=logits.dtype, device=device).uniform_(0, 1, generator=generator)
    u = u.to(logits.device).clamp(1e-20)
    return (-torch.log((-torch.log(u)).clamp(1e-20))).float()


def attach(context: Context, method: str, noise: str, masked_head: bool) -> None:
    """Plan aMUSEd's sampling step and its head."""
    model = context.model
    if type(model).__name__ != _MODEL:
        context.skip(method, model, f"it is no {_MODEL}")
        return
    step = AmusedStep(context.generation, noise)
    if not sample_with(context, method, step):
        return
    step.mask_id = context.scheduler.config.mask_token_id
    context.track_generation(method)
    context.transaction.set(model, _STATE, step, method)
    head = children_of(model, (_HEAD,))
    if not masked_head or not head:
        return
    kind: Any = type(head[0])
    found = fingerprint(kind)
    if found not in _HEADS:
        context.skip(method, head[0], f"unknown version of {kind.__name__}.forward (fingerprint {found})")
        return
    context.transaction.pre_hook(model, step.seen)
    context.transaction.set(head[0], _STATE, step, method)
    context.transaction.wrap_forward(head[0], _masked_head)
    context.done(method, head[0], "head on masked rows")


def _masked_head(self: nn.Module, inner: Callable[[Tensor], Tensor], /, hidden: Tensor) -> Tensor:
    return self.__dict__[_STATE].head(inner, hidden)


def activity(model: nn.Module) -> dict[str, Any]:
    """What the step of a patched model did."""
    step = model.__dict__.get(_STATE)
    return {} if step is None else step.activity()
