"""SpeCa: speculative feature caching (Liu et al. 2025, arXiv 2509.11628).

After a computed step the next ones are drafts: what the blocks add is forecast by a Taylor series. From some draft on,
each is verified: the last block is computed on the forecast of the others, and what it adds is compared with its own
forecast, `e = |F_draft - F| / |F|`. While `e` is at most `max(floor, threshold * decay^progress)` drafts go on, up to
a most number of them; then, or after a draft that failed, a step is computed.

From the authors' code: when drafts are verified and when they end; that a draft that failed is kept, and the *next*
step is computed (the blocks of the failed one have passed already); the series of order 2; the threshold. Different
here: all of the first steps are computed (the code drafts the second of them); the error is the ratio of norms of the
paper instead of the mean of elementwise ratios, and of a batch the worst sample's; and what the verifying block
computes is used, not discarded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..masks.schedule import Action, Position, plan_of
from ..ops import relative_difference
from ..ops._checks import count as check_count
from ..patching.patch import Context
from ..patching.transaction import PatchError
from ..state.feature import key_of
from ..state.forecast import Taylor
from ..state.generation import Generation
from ..state.history import Storage
from ..state.stack import Stack
from . import _cached

METRICS = ("l1", "l2", "cosine")


@dataclass(frozen=True)
class SpeCa(_cached.CachedFeatures):
    """Forecast steps while the last block agrees with its forecast.

    Attributes:
        threshold: Largest error at the start of a run.
        decay: Factor of the threshold from the start to the end of a run.
        floor: Smallest threshold.
        min_drafts: Drafts after a computed step that are not verified.
        max_drafts: Most drafts in a row; 0 computes always.
        order: Order of the Taylor series; `order + 1` values are remembered.
        first: Steps at the start that are computed.
        metric: Of the error: `"l1"` and `"l2"` are ratios of norms, `"cosine"` is 1 - cosine similarity.
        level: `"stack"` remembers what all blocks but the last add together, `"block"` each by itself (nearer to the
            paper, which forecasts each module, at the memory of all blocks).
        storage: How features are kept.
    """

    threshold: float = 0.1
    decay: float = 0.01
    floor: float = 0.01
    min_drafts: int = 2
    max_drafts: int = 5
    order: int = 2
    first: int = 3
    metric: str = "l1"
    level: str = "stack"
    storage: Storage = Storage()

    name = "SpeCa"
    paper = "SpeCa: Accelerating Diffusion Transformers with Speculative Feature Caching (arXiv 2509.11628)"
    models = _cached.STACKS

    def __post_init__(self) -> None:
        for name, low in (("min_drafts", 0), ("max_drafts", 0), ("first", 1)):
            check_count(name, getattr(self, name), low)
        for name in ("threshold", "floor"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"{name}={value!r} must be a number, 0 or more")
        if not isinstance(self.decay, int | float) or not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay!r} must be a number above 0, 1 at most")
        if self.metric not in METRICS:
            raise ValueError(f"metric={self.metric!r}; allowed are {', '.join(map(repr, METRICS))}")
        _cached.check_level(self.level, ("stack", "block"))
        self.forecaster  # noqa: B018  (validates the order)

    @property
    def forecaster(self) -> Taylor:
        """The series."""
        return Taylor(self.order)

    @property
    def rule(self) -> Speculation:
        """The step mask."""
        return Speculation(self)

    def limit(self, at: Position) -> float:
        """The largest error that a draft before this step may have had."""
        if at.num_steps is None:
            raise ValueError("SpeCa needs the number of steps; pass it to generation(num_steps=...)")
        progress = (at.index + at.offset) / (at.num_steps + at.offset)
        return max(self.floor, self.threshold * self.decay**progress)

    def attach(self, context: Context) -> None:
        """Plan a memory of all blocks but the last, and one of the last, which verifies."""
        blocks = [pair for segment in _cached.segments_of(self, context.model) for pair in segment]
        if len(blocks) < 2:
            raise PatchError(f"{self.name}: {type(context.model).__name__} has one block; verifying needs two or more")
        rule = self.rule
        _cached.attach_stack(
            self, context, rule, self.forecaster, self.storage, tail=1, each=self.level == "block"
        )  # fmt: skip
        generation = context.track_generation(self.name)
        generation.memories.append(rule)
        block, streams = blocks[-1]
        verifier = Verifier(
            generation, [([block], [streams])], rule, self.forecaster, self.storage,
            group=_cached.context_parallel_group(context.model),
        )  # fmt: skip
        verifier.attach(context.transaction, self.name)
        context.done(self.name, block, "verifies")

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """Calls computed and reused, drafts that were verified and failed, and bytes held now and at most."""
        found = super().activity(model)
        rules = {id(s.rule): s.rule for s in _cached.stacks_of(model) if isinstance(s.rule, Speculation)}
        for rule in rules.values():
            found |= {"verified": rule.verified, "failed": rule.failed}
        return found


@dataclass
class _Branch:
    """Where one guidance branch stands."""

    step: int = -1  # the step that was decided last
    drafts: int = 0  # since the last computed step
    error: float | None = None  # of the last draft, if it was verified


@dataclass(eq=False)
class Speculation:
    """The rule of all stacks of one model: what this step does, decided once for each guidance branch.

    Attributes:
        policy: The numbers.
        verified: Drafts that were verified.
        failed: Drafts whose error was too large.
    """

    policy: SpeCa
    verified: int = 0
    failed: int = 0
    branches: dict[str, _Branch] = field(default_factory=dict)

    nbytes = 0
    at_run_time = "a draft; the last block verifies it, and after a failed one a step is computed"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Speculation) and self.policy == other.policy

    def __hash__(self) -> int:
        return hash(self.policy)

    def __str__(self) -> str:
        return str(self.policy)

    def clear(self) -> None:
        """Forget the drafts."""
        self.branches.clear()

    def action(self, at: Position) -> Action:
        """What happens at a step; outside a run, `"reuse"` for "it depends"."""
        if at.index < self.policy.first or not self.policy.max_drafts:
            return "compute"
        if not isinstance(at, Generation):
            self.policy.limit(at)  # says what a run has to tell
            return "reuse"
        state = self._decided(at)
        return "reuse" if state.drafts else "compute"

    def plan(self, num_steps: int, timesteps: Sequence[float] | None = None) -> list[Action]:
        """The steps that are always computed, and those that may be drafts."""
        return plan_of(self, num_steps, timesteps)

    def verifies(self, at: Generation) -> bool:
        """Whether this step is a draft that is verified."""
        return self.action(at) == "reuse" and self._decided(at).drafts > self.policy.min_drafts

    def record(self, at: Generation, error: float) -> None:
        """The error of this step's draft."""
        self._decided(at).error = error
        self.verified += 1

    def _decided(self, at: Generation) -> _Branch:
        state = self.branches.setdefault(at.branch_key, _Branch())
        if state.step != at.index:
            failed = state.error is not None and not state.error <= self.policy.limit(at)
            self.failed += failed
            over = failed or state.drafts >= self.policy.max_drafts
            state.step, state.drafts, state.error = at.index, 0 if over else state.drafts + 1, None
        return state


class Verifier(Stack):
    """The last block, which on some drafts is computed and compared with its forecast."""

    def _body(self, role: Any, inner: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        rule, feature = self.rule, self.segments[0].feature
        assert isinstance(rule, Speculation)
        if not rule.verifies(self.generation):
            return super()._body(role, inner, args, kwargs)
        bases = role.streams.take(args, kwargs)
        held = feature.find(key_of(*bases))
        if held is None:
            return super()._body(role, inner, args, kwargs)
        drafts = feature.forecast(held, own=False)
        before = [None if b is None else b.clone() for b in bases]
        output = inner(*args, **kwargs)
        pairs = [
            (draft, after - base)
            for draft, after, base in zip(drafts, role.streams.read(output), before, strict=True)
            if draft is not None and after is not None and base is not None
        ]
        rule.record(self.generation, relative_error(pairs, rule.policy.metric, self.group))
        self._count()
        return output


def relative_error(pairs: Sequence[tuple[Tensor, Tensor]], metric: str, group: Any = None) -> float:
    """How far forecasts are from what they forecast; one read of the device.

    Args:
        pairs: Forecast and truth of each stream, `(B, ...)`.
        metric: `"l1"`, `"l2"` or `"cosine"`.
        group: Process group whose ranks share one sequence: their sums are added, so that all find the same.

    Returns:
        The largest error of any sample, over all its streams.
    """
    tiny = torch.finfo(torch.float64).tiny
    if metric == "l1":
        sums = torch.stack([relative_difference(draft, truth) for draft, truth in pairs]).double().sum(0)
    else:
        wide = [(draft.flatten(1).double(), truth.flatten(1).double()) for draft, truth in pairs]
        draft, truth = (torch.cat(parts, 1) for parts in zip(*wide, strict=True))
        first = (draft - truth).square() if metric == "l2" else draft * truth
        sums = torch.stack([first.sum(1), truth.square().sum(1), draft.square().sum(1)], 1)
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
    if metric == "cosine":
        errors = 1 - sums[:, 0] / (sums[:, 1] * sums[:, 2]).sqrt().clamp_min(tiny)
    else:
        errors = sums[:, 0] / sums[:, 1].clamp_min(tiny)
    return float((errors.sqrt() if metric == "l2" else errors).max())
