"""Sortblock (Chen et al. 2025, arXiv 2508.00412): blocks ranked by how their residuals change.

Steps come in cycles. The first step of a cycle computes all blocks. At the second all are predicted: the change that
each block makes is continued along the line through its last two values. Blocks are then ranked by the cosine
similarity of the last change with the predicted one, over the first eighth of the channels; at the rest of the cycle
those at the bottom of the ranking are computed, the others predicted. How many is a polynomial of the timestep times
`beta`.

From the authors' code: the polynomials, the eighth, that double and single blocks are ranked each for itself, by the
hidden states alone, and that a block is computed if its similarity is at most that of number `floor(blocks * ratio)` of
the sorted ones, so at least one always is. Different here: lines go through the steps at which a block really was
computed (the code takes the distance of whole steps also for a block that was computed in between); every cycle
predicts all blocks at its second step; a window that opens within a cycle starts one; guidance branches with calls of
their own are ranked each for itself; and the similarities of all blocks are read from the device at once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..masks import Schedule, Window
from ..masks.schedule import Action, Position, StepRule, plan_of
from ..patching.patch import Context
from ..state.forecast import Newton
from ..state.generation import Generation
from ..state.history import History, Storage
from ..state.stack import Stack
from . import _cached

# Ratio to compute as a polynomial of the timestep, highest power first (PaddlePaddle/PaddleMIX, sortblock).
POLYNOMIALS = {
    "flux": (5.67621e-14, -1.36659e-10, 1.16246e-7, -3.97725e-5, 0.00361, 0.56088),
    "hunyuan-video": (8.43677e-14, -2.23758e-10, 2.17396e-7, -9.14454e-5, 0.01364, 0.33195),
    "wan": (-1.74367e-15, 1.20871e-11, -2.11429e-8, 1.49777e-5, -0.00453, 0.4971),
}
_OF_CLASS = {
    "FluxTransformer2DModel": "flux",
    "HunyuanVideoTransformer3DModel": "hunyuan-video",
    "WanTransformer3DModel": "wan",
}


@dataclass(frozen=True)
class Sortblock(_cached.CachedFeatures):
    """Compute all blocks every `interval`-th step, and the most changeable ones in between.

    Attributes:
        interval: Steps of a cycle (the authors use 4 to 9).
        beta: Factor of the ratio; a larger one computes more blocks.
        polynomial: Ratio of blocks to compute, as coefficients of powers of the timestep (1000 is noise), highest
            first; `"flux"`, `"hunyuan-video"` or `"wan"`. None takes the one of the model's class, and 1 (so that
            `beta` is the ratio) for classes without.
        low: Smallest timestep at which anything is predicted.
        high: Largest one. Lines need some computed steps before them: lower it for runs of few steps, so that three of
            them lie above.
        storage: How the changes are kept.
    """

    interval: int = 5
    beta: float = 0.1
    polynomial: tuple[float, ...] | str | None = None
    low: float = 50.0
    high: float = 900.0
    storage: Storage = Storage()

    name = "Sortblock"
    paper = "Sortblock: Similarity-Aware Feature Reuse for Diffusion Model (arXiv 2508.00412)"
    models = _cached.STACKS

    def __post_init__(self) -> None:
        self.schedule  # noqa: B018  (validates the interval and the window)
        if not isinstance(self.beta, int | float) or not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta={self.beta!r} must be a finite number, 0 or more")
        p = self.polynomial
        if isinstance(p, str) and p not in POLYNOMIALS:
            raise ValueError(f"polynomial={p!r}; named ones are {', '.join(map(repr, POLYNOMIALS))}")
        numbers = isinstance(p, tuple) and p and all(isinstance(c, int | float) and abs(c) < float("inf") for c in p)
        if p is not None and not isinstance(p, str) and not numbers:
            raise ValueError(f"polynomial={p!r} must be a tuple of finite numbers, the name of one, or None")

    @property
    def schedule(self) -> Window | Schedule:
        """The steps that compute all blocks. A window of all timesteps is none, and needs no timesteps."""
        return Window.around(Schedule(interval=self.interval), self.low, self.high)

    @property
    def rules(self) -> dict[str, StepRule]:
        """The step mask of a block, for plans."""
        return {"": BlockRule(Ranking(self, ""), None)}

    def ratio(self, at: Position, model: str | None = None) -> float:
        """Part of the blocks of a model of this class that is computed after this step, 0 to 1."""
        p = self.polynomial if self.polynomial is not None else _OF_CLASS.get(model or "", (1.0,))
        highest, *rest = POLYNOMIALS[p] if isinstance(p, str) else p
        total = functools.reduce(lambda value, c: value * at.timestep + c, rest, highest)
        return min(max(total * self.beta, 0.0), 1.0)

    def attach(self, context: Context) -> None:
        """Plan a memory of what each block adds."""
        generation = context.track_generation(self.name)
        stacks = _cached.attach_stack(self, context, self.schedule, Newton(1), self.storage, each=True)
        ranking = Ranking(self, type(context.model).__name__, _cached.context_parallel_group(context.model))
        generation.memories.append(ranking)
        for _, group in itertools.groupby(stacks, key=lambda stack: type(stack.segments[0].blocks[0])):
            ranking.groups.append(list(group))
        for stack in stacks:
            stack.rule = BlockRule(ranking, stack)

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """Blocks computed and predicted, how many were computed by their rank, and bytes held now and at most."""
        found = super().activity(model)
        rankings = [s.rule.ranking for s in _cached.stacks_of(model) if isinstance(s.rule, BlockRule)]
        for ranking in {id(r): r for r in rankings}.values():
            found |= {"rankings": ranking.rankings, "computed by rank": ranking.chosen}
        return found


@dataclass
class _Cycle:
    """Where one guidance branch stands."""

    step: int = -1  # the step that was decided last
    since: int = 0  # steps since all blocks were computed
    predicted: float = 0.0  # the step of the cycle that predicts all of them
    ratio: float = 0.0  # of blocks to compute, as of that step
    unstable: frozenset[int] | None = None  # ids of the stacks to compute; None until they are ranked


@dataclass(eq=False)
class Ranking:
    """What the rules of all blocks of one model share.

    Attributes:
        policy: The numbers.
        model: Class name of the model.
        ranks: Process group whose ranks share one sequence, and rank alike.
        groups: The blocks that are ranked together: those of one class that follow each other.
        rankings: Times that they were ranked.
        chosen: Calls of blocks that were computed by their rank.
    """

    policy: Sortblock
    model: str
    ranks: Any = None
    groups: list[list[Stack]] = field(default_factory=list)
    rankings: int = 0
    chosen: int = 0
    cycles: dict[str, _Cycle] = field(default_factory=dict)

    nbytes = 0

    def clear(self) -> None:
        """Forget the cycles."""
        self.cycles.clear()

    def computes(self, stack: Stack | None, at: Generation) -> bool:
        """Whether a block is computed at this step."""
        cycle = self.cycles.setdefault(at.branch_key, _Cycle())
        if cycle.step != at.index:
            self._advance(cycle, at)
        if cycle.since == 0:
            return True
        if cycle.since == 1 or cycle.unstable is None or id(stack) not in cycle.unstable:
            return False
        self.chosen += 1
        return True

    def _advance(self, cycle: _Cycle, at: Generation) -> None:
        cycle.step = at.index
        cycle.since = 0 if self.policy.schedule.action(at) == "compute" else cycle.since + 1
        if cycle.since == 0:
            cycle.unstable = None
        elif cycle.since == 1:
            cycle.predicted, cycle.ratio = at.index, self.policy.ratio(at, self.model)
        elif cycle.unstable is None:
            cycle.unstable = self._rank(cycle)

    def _rank(self, cycle: _Cycle) -> frozenset[int]:
        """The blocks to compute. Nothing was remembered since all of them were predicted, so that is done again."""
        ranked = [[(s, similarity(h, cycle.predicted)) for s in g if (h := _history(s))] for g in self.groups]
        if not any(ranked):
            return frozenset()
        cosines_of_all = torch.stack([cosine for group in ranked for _, cosine in group])
        if self.ranks is not None:
            torch.distributed.all_reduce(cosines_of_all, group=self.ranks)
        read = iter(cosines_of_all.tolist())
        found: set[int] = set()
        for group in ranked:
            cosines = {id(stack): next(read) for stack, _ in group}
            if cosines:
                cut = sorted(cosines.values())[min(int(len(cosines) * cycle.ratio), len(cosines) - 1)]
                found |= {stack for stack, cosine in cosines.items() if cosine <= cut}
        self.rankings += 1
        return frozenset(found)


@dataclass(eq=False)
class BlockRule:
    """The rule of one block."""

    ranking: Ranking
    stack: Stack | None

    at_run_time = "predicted, but computed by the blocks at the bottom of the ranking"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockRule) and self.ranking.policy == other.ranking.policy

    def __hash__(self) -> int:
        return hash(self.ranking.policy)

    def __str__(self) -> str:
        return str(self.ranking.policy)

    def action(self, at: Position) -> Action:
        """What happens at a step; outside a run, `"reuse"` for "it depends"."""
        if not isinstance(at, Generation):
            return self.ranking.policy.schedule.action(at)
        return "compute" if self.ranking.computes(self.stack, at) else "reuse"

    def plan(self, num_steps: int, timesteps: Sequence[float] | None = None) -> list[Action]:
        """The steps that compute all blocks, and those that may compute some."""
        return plan_of(self, num_steps, timesteps)


def _history(stack: Stack) -> History | None:
    """What is remembered of a block's change of the hidden states, if a line goes through it."""
    held = stack.segments[0].feature.peek()
    history = None if held is None else held.groups[0][0]
    return history if history is not None and len(history) > 1 else None


def similarity(history: History, step: float) -> torch.Tensor:
    """Mean over tokens of the cosine of the last value with its prediction, over an eighth of the channels."""
    last, predicted = history.newest(), history.combine(Newton(1).weights(history.stamps, step))
    some = slice(0, max(last.shape[-1] // 8, 1))
    pair = (last[..., some].float(), predicted[..., some].float())
    return torch.nn.functional.cosine_similarity(*pair, dim=-1).mean()
