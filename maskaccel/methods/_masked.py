"""What samplers of masked models share: one step, the head on the rows that need it, and the loop over the steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ..masks import TokenIndex
from ..masks.unmasking import uniform
from ..ops._checks import choice
from ..ops.tokens import sample_logits, unmask_select

Order = Literal["confidence", "margin", "entropy", "log", "random", "scores"]
ORDERS: tuple[str, ...] = get_args(Order)

Model = Callable[[Tensor], Any]
Head = Callable[[Tensor], Tensor]
Scores = Callable[[int, Tensor, Tensor], Tensor]
"""Given the number of the step, the sampled tokens and their log-probabilities, `(B, N)` each (the token itself and
+inf where nothing is masked): what positions are ranked by, `(B, N)`."""


ROWS = "_maskaccel_computed_rows"  # attribute of a patched model that holds its `ComputedRows`


class ComputedRows(Protocol):
    """What a patched model keeps of the tokens that it does not compute at every step."""

    def run(self) -> contextlib.AbstractContextManager[None]:
        """One run of a sampler."""

    def call(self, model: Model, tokens: Tensor, span: tuple[int, int]) -> Tensor:
        """What a model that calls the patched one gives for some rows.

        Args:
            model: As of `MaskedSampling.sample`.
            tokens: int64 `(B, N)`.
            span: The first of the rows, and the one after the last.

        Returns:
            Logits or hidden rows `(B, last - first, ...)`.
        """


@dataclass(frozen=True, eq=False)
class Reveal:
    """What one call of the model reveals.

    Attributes:
        count: Tokens of each sample: one integer for all, or one for each.
        order: What they are ranked by: `"confidence"` (probability of the sampled token), its logarithm `"log"`,
            `"margin"` (largest probability minus the second), `"entropy"` (the lowest first), `"random"`, or
            `"scores"`.
        threshold: Tokens of this confidence (or score) or more are revealed too; None: only `count`.
        temperature: Of the sampled tokens; 0 takes the most probable one.
        noise: Gumbel noise of this temperature is added to what the tokens are ranked by.
        scaled: Whether confidences are those of `softmax(logits / temperature)`; of `softmax(logits)` if not.
        within: bool `(1|B, N)`: only these tokens are revealed; None: all.
        block: bool `(1|B, N)` on the host: the tokens that the step is about, where `within` is a part of them; None:
            `within`.
        rows: Upper bound of the tokens of a sample that are masked and inside `within`; None: not known beforehand.
        scores: With order `"scores"`, what gives them.
        watch: Whether the plan wants to be told if anything inside `within` is still masked after the step, which reads
            the device.
    """

    count: int | Sequence[int] = 0
    order: Order = "confidence"
    threshold: float | None = None
    temperature: float = 1.0
    noise: float = 0.0
    scaled: bool = False
    within: Tensor | None = None
    block: Tensor | None = None
    rows: int | None = None
    scores: Scores | None = None
    watch: bool = False

    def __post_init__(self) -> None:
        choice("order", self.order, ORDERS)
        if (self.order == "scores") != (self.scores is not None):
            raise ValueError(f"order={self.order!r}, scores={self.scores!r}: order 'scores' and scores go together")

    @property
    def idle(self) -> bool:
        """Whether nothing can be revealed, whatever the model says."""
        counts = [self.count] if isinstance(self.count, int) else self.count
        return self.threshold is None and not any(counts)


class MaskedRows:
    """The rows of a batch that are still needed, side by side: those of masked tokens that may be revealed."""

    def __init__(self, needed: Tensor, capacity: int | None = None) -> None:
        # Samples may have different numbers of them: slots beyond a sample's own gather nothing and are put nowhere.
        self.tokens = needed.shape[1]
        self.index = TokenIndex.from_mask(needed, capacity=None if capacity is None else max(1, capacity))

    def take(self, values: Tensor, empty: int = 0) -> Tensor:
        """`(B|1, N)` values of these tokens, `(B, K)`; `empty` in slots that hold none."""
        keep = self.index.keep.long()
        padded = torch.nn.functional.pad(values.expand(keep.shape[0], -1), (0, 1), value=empty)
        return padded.gather(1, keep.clamp(max=self.tokens))

    def rows(self, hidden: Tensor) -> Tensor:
        """`(B, N, D)` rows of these tokens, `(B, K, D)`."""
        return self.index.gather(hidden)

    def put(self, values: Tensor, tokens: Tensor) -> Tensor:
        """`tokens (B, N)` with the values `(B, K)` of these."""
        padded = torch.nn.functional.pad(tokens, (0, 1))
        return padded.scatter(1, self.index.keep.long().clamp(max=self.tokens), values)[:, : self.tokens].contiguous()


def reveal_step(
    reveal: Reveal,
    logits: Tensor,
    tokens: Tensor,
    mask_id: int,
    *,
    seed: int,
    step: int,
    sample_offset: int = 0,
    hold: Tensor | None = None,
    noise: Tensor | None = None,
    select_noise: Tensor | None = None,
) -> Tensor:
    """One step: a token is sampled for each masked position, and some positions take theirs.

    Args:
        reveal: What the step reveals.
        logits: `(B, N, V)`; read at masked positions alone.
        tokens: int64 `(B, N)`.
        mask_id: Value of masked ones.
        seed: Of the counter-based noise.
        step: Number of the step, for the noise.
        sample_offset: Number of the first sample, for the noise.
        hold: bool `(B|1, N)`: positions that stay as they are.
        noise: Gumbel noise `(B, N, V)` in place of the counter-based one.
        select_noise: Gumbel noise `(B, N)` likewise.

    Returns:
        int64 `(B, N)`.
    """
    kind = {"random": "confidence", "scores": "log"}.get(reveal.order, reveal.order)
    ids, confidence = sample_logits(
        logits, tokens, mask_id, temperature=reveal.temperature, confidence=kind, scaled=reveal.scaled,
        seed=seed, step=step, sample_offset=sample_offset, noise=noise,
    )  # fmt: skip
    spread = reveal.noise
    if reveal.order == "random":
        # NaN stays: what could not be sampled is never revealed.
        confidence, spread = torch.where(confidence.isnan(), confidence, 0.0), 1.0
    elif reveal.scores is not None:
        given = reveal.scores(step, ids, confidence)
        if not isinstance(given, Tensor) or given.shape != tokens.shape:
            found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"scores gives {found}; it must be a tensor of shape {tuple(tokens.shape)}")
        confidence = torch.where(confidence.isnan(), confidence, given.float())
    if reveal.within is not None:
        outside = ~reveal.within
        hold = outside if hold is None else hold | outside
    return unmask_select(
        confidence.float(), ids, tokens, mask_id, n=reveal.count, threshold=reveal.threshold, temperature=spread,
        hold=hold, seed=seed, step=step, sample_offset=sample_offset, noise=select_noise,
    )  # fmt: skip


@dataclass(frozen=True)
class Draw:
    """The random numbers of a run: by counters of sample, position and step.

    So they do not depend on the device, nor on the batch of a sample (but where steps depend on what the model says of
    all of its samples: thresholds, policies).

    Attributes:
        seed: Of the run.
        sample_offset: Number of the first sample among all ranks.
    """

    seed: int
    sample_offset: int = 0

    def uniform(self, step: int, like: Tensor) -> Tensor:
        """Uniform numbers of (0, 1), one for each of `like (B, N)`."""
        first = self.sample_offset
        sample = torch.arange(first, first + like.shape[0], device=like.device)
        return uniform(self.seed, sample, step, like.shape[1])


class MaskedSampling:
    """Base of the samplers of masked models: a frozen dataclass that gives `plan`.

    Attributes:
        name: As reports call it.
        paper: Title and number.
    """

    name = ""
    paper = ""

    def plan(self, free: Tensor, draw: Draw) -> Generator[Reveal, bool, None]:
        """The steps of a run; steps that can reveal nothing are not run.

        Args:
            free: bool `(B, N)` on the host: masked tokens that may be revealed.
            draw: The random numbers of the run.

        Yields:
            What each step reveals. To a step that wants to `watch`, whether anything is left is sent back.
        """
        raise NotImplementedError

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        tokens: Tensor,
        mask_id: int,
        *,
        seed: int = 0,
        sample_offset: int = 0,
        hold: Tensor | None = None,
        head: Head | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
        cache: nn.Module | None = None,
    ) -> Tensor:
        """Reveal the masked tokens.

        A model whose vocabulary holds the mask token may predict it: such a position stays masked. Set its logit to
        -inf where that is not wanted.

        Args:
            model: Given int64 tokens `(B, N)`, the logits `(B, N, V)`, or an object that has them as `logits`. With
                `head`: hidden rows `(B, N, D)`.
            tokens: int64 `(B, N)`, masked where `mask_id` stands; the others are given (a prompt, the frames around
                those to interpolate, the rest of an image).
            mask_id: Value of masked tokens.
            seed: Of all random numbers.
            sample_offset: Number of the first sample among all ranks; each sample has random numbers of its own.
            hold: bool `(B|1, N)`: masked tokens that stay masked.
            head: Maps rows `(B, K, D)` to logits `(B, K, V)`. It is then run on the rows alone that are masked and may
                be revealed at the step, which gives the same logits for less. Not with methods that rank by scores.
            on_step: Called with the number of the step and the tokens after it.
            cache: `model`, or the module that it calls, patched with `FastDLLM`: between whole calls it computes the
                rows of the block at hand alone. Not with methods that rank by scores.

        Returns:
            int64 `(B, N)`.

        Raises:
            TypeError: `tokens` is no int64 tensor, `hold` not bool, or the model returns neither logits nor what has
                them.
            ValueError: Shapes do not fit, `mask_id` is negative, `hold` holds all masked tokens, there is a `head` or a
                `cache` and the method ranks by scores, or `cache` is not patched; the model's output does not fit the
                tokens; on a CPU also logits of a masked token with a NaN or +inf (on a GPU it stays masked).
        """
        check_tokens(tokens, mask_id)
        computed = None if cache is None else _computed_rows(cache)
        free = masked_tokens(tokens, mask_id, hold)
        # The one read of the device of a run: from here on the host knows what is masked (unless a step watches).
        known = free.cpu()
        if hold is not None and not bool(known.any()) and bool((tokens == mask_id).any()):
            raise ValueError("hold leaves no masked token that may be revealed")
        draw = Draw(seed, sample_offset)
        plan = self.plan(known, draw)
        step, reveal = 0, next(plan, None)
        with contextlib.nullcontext() if computed is None else computed.run():
            while reveal is not None:
                left = True
                if not reveal.idle:
                    span = None if computed is None else _span(reveal, known)
                    inside = reveal.within
                    if inside is not None:
                        reveal = replace(reveal, within=inside.to(tokens.device))
                    at = _Step(reveal, head, mask_id, draw, step)
                    if computed is None or span is None:
                        tokens = at.revealed(model, tokens, hold)
                    else:
                        tokens = at.revealed_in(span, computed, model, tokens, hold)
                    if on_step is not None:
                        on_step(step, tokens)
                    if reveal.watch:
                        left = bool(_needed(reveal, tokens, mask_id, hold).any())
                step += 1
                try:
                    reveal = plan.send(left)
                except StopIteration:
                    return tokens
        return tokens


@dataclass(frozen=True)
class _Step:
    """One call of a model and what it reveals."""

    reveal: Reveal
    head: Head | None
    mask_id: int
    draw: Draw
    step: int

    def revealed(self, model: Model, tokens: Tensor, hold: Tensor | None) -> Tensor:
        """The tokens after it."""
        mask_id, output = self.mask_id, logits_of(model(tokens))
        _check_output("logits" if self.head is None else "hidden rows", output, tokens)
        if self.head is None:
            return reveal_step(self.reveal, output, tokens, mask_id, hold=hold, step=self.step, **vars(self.draw))
        return _on_rows(self.reveal, output, self.head, tokens, mask_id, hold, self.draw, self.step)

    def revealed_in(self, span: tuple[int, int], computed: ComputedRows, model: Model, tokens: Tensor,
                    hold: Tensor | None) -> Tensor:  # fmt: skip
        """The same, with the output of the rows of a span alone."""
        first, last = span
        if self.reveal.scores is not None:
            raise ValueError("cache is given, but the method ranks by scores of all tokens: no row can be left out")
        inside = self.reveal.within
        block = replace(self, reveal=replace(self.reveal, within=None if inside is None else inside[:, first:last]))
        own = tokens[:, first:last].contiguous()
        new = block.revealed(
            lambda _: computed.call(model, tokens, span), own, None if hold is None else hold[:, first:last]
        )
        return torch.cat([tokens[:, :first], new, tokens[:, last:]], 1)


def _span(reveal: Reveal, free: Tensor) -> tuple[int, int]:
    """The rows that a step is about, from the first to the one after the last: its block, else all that is masked."""
    inside = reveal.within if reveal.block is None else reveal.block
    places = (free if inside is None else inside).any(0).nonzero().flatten()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, free.shape[1])


def _computed_rows(cache: nn.Module) -> ComputedRows:
    held = getattr(cache, "__dict__", {}).get(ROWS)
    if held is None:
        raise ValueError(f"cache={type(cache).__name__} is not patched with FastDLLM; maskaccel.patch does that")
    return held


def _needed(reveal: Reveal, tokens: Tensor, mask_id: int, hold: Tensor | None) -> Tensor:
    needed = masked_tokens(tokens, mask_id, hold)
    return needed if reveal.within is None else needed & reveal.within


def _on_rows(reveal: Reveal, hidden: Tensor, head: Head, tokens: Tensor, mask_id: int, hold: Tensor | None,
             draw: Draw, step: int) -> Tensor:  # fmt: skip
    """A step whose head is run on the rows alone that need it."""
    if reveal.scores is not None:
        raise ValueError("head is given, but the method ranks by scores of all tokens: no row can be left out")
    rows = MaskedRows(_needed(reveal, tokens, mask_id, hold), reveal.rows)
    # Slots without a token hold another value than mask_id, so that nothing is sampled for them.
    inside = rows.take(tokens, empty=mask_id + 1)
    inner = replace(reveal, within=None)
    return rows.put(reveal_step(inner, head(rows.rows(hidden)), inside, mask_id, step=step, **vars(draw)), tokens)


def logits_of(output: Any) -> Tensor:
    """Logits of a model's output: a tensor, or what has one as `logits`."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model returned a {type(output).__name__}; it must be a tensor, or have one as `logits`")
    return logits


def _check_output(name: str, output: Tensor, tokens: Tensor) -> None:
    if output.dim() != 3 or output.shape[:2] != tokens.shape:
        batch, n = tokens.shape
        raise ValueError(f"the model's {name} have shape {tuple(output.shape)}; they must be ({batch}, {n}, ...)")


def check_tokens(tokens: Tensor, mask_id: int) -> None:
    """int64 `(B, N)`, and a mask id that is no negative number."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        found = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens must be a tensor of int64, got {found}")
    if tokens.dim() != 2:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}; it must be (B, N)")
    if isinstance(mask_id, bool) or not isinstance(mask_id, int) or mask_id < 0:
        raise ValueError(f"mask_id={mask_id!r} must be an integer, 0 or more")


def masked_tokens(tokens: Tensor, mask_id: int, hold: Tensor | None) -> Tensor:
    """Bool `(B, N)`: masked tokens that may be revealed."""
    masked = tokens == mask_id
    if hold is None:
        return masked
    if not isinstance(hold, Tensor) or hold.dtype != torch.bool:
        found = hold.dtype if isinstance(hold, Tensor) else type(hold).__name__
        raise TypeError(f"hold must be a bool tensor, got {found}")
    if hold.dim() != 2 or hold.shape[0] not in (1, tokens.shape[0]) or hold.shape[1] != tokens.shape[1]:
        raise ValueError(f"hold has shape {tuple(hold.shape)}; tokens have {tuple(tokens.shape)}: (B, N) or (1, N)")
    return masked & ~hold


def remaining(masked: Sequence[int], counts: Sequence[Sequence[int]]) -> list[int]:
    """Upper bound of the masked tokens of a sample before each step, given what each step reveals of each sample."""
    left, bounds = list(masked), []
    for count in counts:
        bounds.append(max(left, default=0))
        left = [max(0, have - taken) for have, taken in zip(left, count, strict=True)]
    return bounds
