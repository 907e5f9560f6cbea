"""The choice of tokens by scores and ages (ToCa, DuCa)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models._joint import text_first
from ..state.attention_scores import AttentionScores
from ..state.feature import Held
from ..state.generation import Generation
from ..state.select import hashed, top_rows, unit, with_bonus
from ._partial import Choices, Parts

if TYPE_CHECKING:
    from .toca import ToCa


@dataclass(eq=False)
class TopTokens:
    """The choice of tokens of one module.

    Attributes:
        policy: The numbers.
        generation: The model's run.
        number: Of the module, which random draws depend on.
        scores: Scores from the block's attention; None draws them at random.
        layer: Number of the block.
        layers: Number of blocks.
        kind: Of the module.
        leads: Whether its tokens are the first of joint attention, or the last; None where that is not known.
    """

    policy: ToCa
    generation: Generation
    number: int
    scores: AttentionScores | None
    layer: int
    layers: int
    kind: str
    leads: bool | None = None
    _ages: dict[str, tuple[float, Tensor]] = field(default_factory=dict)  # and the computed step they count from
    _made: tuple[Any, Choices | None] = (None, None)  # the last choice, which modules of one block may share

    @classmethod
    def of(
        cls,
        policy: ToCa,
        generation: Generation,
        numbers: Iterator[int],
        scores: AttentionScores | None,
        parts: Parts,
        layers: int,
        module: nn.Module,
        kind: str,
    ) -> TopTokens:
        """The choice for a module of a block."""
        first = text_first(parts.block)
        leads = None if first is None else first == (kind == "text")
        return cls(policy, generation, next(numbers), scores, parts.layer, layers, kind, leads)

    def __post_init__(self) -> None:
        self.generation.memories.append(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ages": {}, "_made": (None, None)}

    @property
    def nbytes(self) -> int:
        """Bytes of the ages."""
        return sum(age.nbytes for _, age in self._ages.values())

    def clear(self) -> None:
        """Forget the ages."""
        self._ages.clear()
        self._made = (None, None)

    def __call__(self, x: Tensor, held: Held | None) -> Choices | None:
        """The tokens of x `(B, N, D)` that are computed; None if none are."""
        at = self.generation
        key = (at.run, at.index, at.branch_key, x.shape[:2])
        if self._made[0] != key:
            self._made = (key, self._choose(x, held))
        return self._made[1]

    def _choose(self, x: Tensor, held: Held | None) -> Choices | None:
        branch, policy = self.generation.branch_key, self.policy
        history = None if held is None else held.groups[0][0]
        stamp = history.stamps[0] if history is not None and len(history) else -1.0
        since, age = self._ages.get(branch, (None, None))
        if age is None or since != stamp or age.shape != x.shape[:2]:
            age = torch.zeros(x.shape[:2], dtype=torch.int32, device=x.device)
        self._ages[branch] = (stamp, age + 1)
        count = int(policy.share(self.generation, self.layer, self.layers, self.kind) * x.shape[1])
        if count == 0:
            return None
        score = self._base(x) + policy.age_weight * age.float() / policy.interval
        if policy.bonus and self.kind in ("mlp", "cross"):
            raised = with_bonus(score, policy.bonus, policy.cell, policy.grid)
            if raised is None:
                self.generation.note(
                    f"{policy.name}: {x.shape[1]} tokens are no grid of whole cells, so none gets a bonus; say grid="
                )
            else:
                score = raised
        index = top_rows(score, count)
        self._ages[branch] = (stamp, (age + 1).scatter(1, index, 0))
        return Choices(index)

    def _base(self, x: Tensor) -> Tensor:
        batch, count = x.shape[:2]
        if self.scores is None:
            draw = hashed(count, self.policy.seed, self.number, self.generation.index, device=x.device)
            return (draw.float() * 2.0**-32).expand(batch, count)
        found = self.scores.get()
        if found is not None and found.shape[1] > count and self.leads is not None:
            found = found[:, :count] if self.leads else found[:, found.shape[1] - count :]
        if found is None or found.shape != (batch, count):
            seen = "no attention" if found is None else f"attention over {tuple(found.shape)} (samples, tokens)"
            raise RuntimeError(
                f"{self.policy.name}: score={self.policy.score!r} saw {seen} through scaled_dot_product_attention for "
                f"an MLP of {(batch, count)}; use score='random'"
            )
        return unit(found)
