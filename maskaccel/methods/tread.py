"""TREAD: token routing for efficient architecture-agnostic diffusion training (Krause et al. 2025, arXiv 2501.04765).

Half of the tokens go around the blocks from the third to the fourth last: they are put back at the end of the route as
they were at its start, so a gradient reaches the early blocks directly. There are no parameters, the loss is over all
tokens, and sampling is dense. Of N tokens `N - floor(N ratio)` run, others in each sample.

Routes also guide (section 3.4): two calls with routes of different ratios, of which the one that drops more is worse,

    v = v_2 + w (v_1 - v_2),  v_1 at gamma_1 = 0.3, v_2 at gamma_2 = 0.7

without an unconditional branch. The authors' sampler gives both calls no class; here both are as the caller makes them.

Several routes, one after the other, are several of these in one patch (`TokenRoute.from_tread_config` reads such a
configuration).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..patching import TokenRoute

RATIO = 0.5
"""Dropped part of the tokens."""

GAMMAS = (0.3, 0.7)
"""Ratios of the better and of the worse prediction of route guidance."""


class TREAD(TokenRoute):
    """Train with a part of the tokens routed around a span of blocks.

    Args:
        start: First block of the route.
        end: Last block, inclusive; negative numbers count from the end. The paper's is the fourth last.
        ratio: Part of the tokens that goes around.
        options: Of `TokenRoute`, such as `seed` and `forced`.

    Raises:
        ValueError: `ratio` is not in [0, 1), or an argument of `TokenRoute` is not allowed.
    """

    paper = "TREAD: Token Routing for Efficient Architecture-agnostic Diffusion Training (arXiv 2501.04765)"

    def __init__(self, start: int = 2, end: int = -4, ratio: float = RATIO, **options: Any) -> None:
        _check("ratio", ratio)
        super().__init__(start, end, 1.0 - ratio, **options)
        self._times = 0  # of `routed`

    @property
    def name(self) -> str:
        """How reports and errors call it."""
        return f"TREAD({self.start}, {self.end})"

    @contextmanager
    def routed(self, ratio: float, step: int | None = None) -> Iterator[None]:
        """Calls within it are routed at a ratio, in eval mode too; the number of the training step stays as it is.

        Args:
            ratio: Part of the tokens that goes around.
            step: What the tokens are drawn for; None: another number every time.

        Raises:
            ValueError: `ratio` is not in [0, 1).
        """
        _check("ratio", ratio)
        before, of_training = (self.when, self.keep, self.is_range), self._host_step()
        self.when, self.keep, self.is_range = "always", 1.0 - ratio, False
        self.step = self._times if step is None else step
        self._times += step is None
        try:
            yield
        finally:
            self.when, self.keep, self.is_range = before
            self.step = of_training


def route_guidance(
    routes: TREAD | Sequence[TREAD],
    predict: Callable[[], Tensor],
    scale: float = 1.5,
    gammas: tuple[float, float] = GAMMAS,
    step: int | None = None,
) -> Tensor:
    """`v_2 + w (v_1 - v_2)` of one model at two ratios.

    Args:
        routes: All routes of the patched model.
        predict: Calls the model once and returns its prediction.
        scale: w.
        gammas: Ratios of v_1 and of v_2, each in [0, 1).
        step: As in `TREAD.routed`.

    Returns:
        The guided prediction.

    Raises:
        ValueError: A ratio is not in [0, 1), or there are no routes.
    """
    chosen = (routes,) if isinstance(routes, TREAD) else tuple(routes)
    if not chosen:
        raise ValueError("routes is empty; route guidance needs every route of the patched model")
    found = []
    for gamma in gammas:
        with ExitStack() as stack:
            for route in chosen:
                stack.enter_context(route.routed(gamma, step))
            found.append(predict())
    good, bad = found
    return torch.lerp(bad, good, scale)


def _check(name: str, ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"{name}={ratio} must lie in [0, 1): the part of the tokens that is dropped")
