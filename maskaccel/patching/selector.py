"""How a method chooses the tokens of steps in part (`patching/partial.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..masks import TokenIndex
from ..state.solver import Point
from .latents import LatentGrid


@dataclass(frozen=True)
class Seen:
    """One step as the solver sees it, for who chooses tokens.

    Attributes:
        output: The guided output of the model, of all tokens.
        sample: The latents of the step.
        point: Their noise level.
        where: Which elements of them belong to which token.
        index: Number of the step, from 0.
        num_steps: Steps of the run, if known.
        active: The tokens that were computed at this step; None: all.
    """

    output: Tensor
    sample: Tensor
    point: Point
    where: LatentGrid
    index: int
    num_steps: int | None
    active: TokenIndex | None

    @property
    def last(self) -> bool:
        """Whether it is known to be the last step of the run."""
        return self.num_steps is not None and self.index + 1 >= self.num_steps


class Selector:
    """How a method chooses the tokens of steps in part; one object for each model, made anew for each patch.

    Attributes:
        stale: Whether the output of tokens that are not computed matters: then the solver must step from the current
            output alone.
        level: Noise level of the call on the latents of `clean`, 0 (none) to 1.
        static: Whether the tokens do not depend on what the solver sees.
        mixes: Whether it mixes keys and values of the call on `clean` into those of the run.
    """

    stale = True
    level = 0.0
    static = False
    mixes = False

    def clear(self) -> None:
        """A run begins or ends."""

    def select(self, seen: Seen) -> TokenIndex | None:
        """The tokens of the next step, `(B|1, K)` of the N latent tokens, after a step; None: all of them."""
        return None

    def fixed(self, grid: tuple[int, ...], tokens: int, device: torch.device) -> TokenIndex | None:
        """The tokens of a step, where they do not depend on what the solver saw."""
        return None

    def corrected(self, seen: Seen) -> Tensor:
        """What the solver is to be given at a step in place of `seen.output`."""
        return seen.output

    def begin(self, named: dict[str, Any]) -> None:
        """A call of the model begins, with these arguments."""

    def clean(self) -> Tensor | None:
        """Latents `(B|1, ...)` that the model is called with once before the first step, at noise `level`, or None."""
        return None

    def clean_tokens(self, grid: tuple[int, ...], tokens: int, device: torch.device) -> TokenIndex | None:
        """The tokens of that call, whose keys and values then stand for those of a dense step.

        None: all of them, and its keys and values are kept beside those of the run.
        """
        return None

    def cached_share(self, point: Point) -> float:
        """Weight of the run's own keys and values against those beside them, in tokens that are not computed."""
        return 1.0
