"""A solver for each channel, for HyCa ("Let Features Decide Their Own Solvers", arXiv 2510.04188).

Of one ordinary run, for each channel of what the blocks add to the hidden states:

1. descriptors of how it moves over the steps: energy, first and second difference, curvature ratio `|D2| / |D1|`, jerk
   ratio `|D3| / |D2|`, spectral flatness; k-means puts channels with like descriptors into one cluster;
2. for each cluster the solver of the pool whose forecasts were off least, `sum |F^ - F|^2` over its channels.

Inferred, as no code is public: norms are over samples and tokens (and branches and runs), all descriptors but the
flatness are logarithms, and all are brought to mean 0 and variance 1 before they are clustered. Forecasts are those
that a run makes: from steps that are computed to the steps between them. With `interval=1` they are the paper's, of the
next step from the steps before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import Schedule
from ..models import stack_of, streams_of
from ..models._decoupled import encoder_of
from ..ops import kmeans
from ..patching.patch import Context
from ..state.forecast_channels import SOLVERS
from .probe import FeatureProbe, as_tokens, check_tokens, thinned

LEVELS = ("stack", "block")
_DIGITS = "0123456789"


class Channels(FeatureProbe):
    """Measures the channels and chooses their solvers.

    The features of a run are kept in host memory until the run is over.

    Args:
        level: `"stack"` looks at what all blocks add together, `"block"` at what each adds.
        clusters: Clusters of channels of one feature, 1 to 16.
        interval: Steps from one computed step to the next in the forecasts that are compared.
        first: Steps at the start that are computed.
        tokens: Look at this many tokens, evenly spread; None looks at all.
    """

    def __init__(
        self, level: str = "stack", clusters: int = 3, interval: int = 6, first: int = 3, tokens: int | None = 256
    ) -> None:
        super().__init__()
        if level not in LEVELS:
            raise ValueError(f"level={level!r}; allowed are {' and '.join(map(repr, LEVELS))}")
        if not isinstance(clusters, int) or isinstance(clusters, bool) or not 1 <= clusters <= 16:
            raise ValueError(f"clusters={clusters!r} must be an integer from 1 to 16")
        check_tokens(tokens)
        self.schedule = Schedule(interval=interval, first=first, origin=max(first - 1, 0))
        self.level, self.clusters, self.tokens = level, clusters, tokens
        self._features: dict[tuple[int, str], list[list[Tensor]]] = {}
        self._sums: list[Tensor] | None = None  # of each feature, `(rows, D)`: moments and spectrum, errors of solvers

    def watch(self, context: Context) -> None:
        """All blocks, together or each by itself."""
        if self.level == "stack":
            self.watch_encoder(context, encoder_of(context.model, "all"))
            return
        blocks = [block for segment in stack_of(context.model).segments for block in segment]
        parts: list[Tensor] = []

        def looking(number: int) -> Callable[..., Any]:
            def look(block: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
                streams = streams_of(block)
                before = streams.take(args, kwargs)[0]
                assert before is not None
                before = before.detach().clone()
                output = inner(*args, **kwargs)
                after = streams.read(output)[0]
                if number == 0:
                    parts.clear()
                if self.generation.active and after is not None:
                    parts.append(as_tokens(after.detach() - before))
                    if len(parts) == len(blocks) and self.arrived():
                        self.feature(parts)
                return output

            return look

        for number, block in enumerate(blocks):
            context.transaction.wrap_forward(block, looking(number))

    def feature(self, parts: list[Tensor]) -> None:
        """Keep the features of this step; of a run that is over, its sums are all that is kept."""
        at = self.generation
        for key in [key for key in self._features if key[0] != at.run]:
            self._add(self._features.pop(key))
        kept = [thinned(part, self.tokens).flatten(0, 1).cpu() for part in parts]
        self._features.setdefault((at.run, at.branch_key), []).append(kept)

    def _add(self, steps: list[list[Tensor]]) -> None:
        if len(steps) != self.steps:  # a branch that did not run at every step
            return
        if any(one.shape != first.shape for parts in steps for one, first in zip(parts, steps[0], strict=True)):
            raise ValueError("the feature changes its shape within a run, so its steps cannot be compared")
        found = [sums(torch.stack(series), self.schedule) for series in zip(*steps, strict=True)]
        self._sums = found if self._sums is None else [a + b for a, b in zip(self._sums, found, strict=True)]

    def values(self) -> dict[str, Any]:
        """The solver of each channel of each feature, as a digit: its place among the solvers."""
        for key in list(self._features):
            self._add(self._features.pop(key))
        if self.steps < 8:
            raise ValueError(f"{self.steps} steps do not show how a channel moves; measure 8 or more")
        if self._sums is None:
            raise ValueError("no guidance branch ran at every step of a run")
        count = len(SOLVERS)
        chosen = [choose(one[:-count], one[-count:], self.clusters) for one in self._sums]
        names = list(SOLVERS)
        return {
            "level": self.level, "interval": self.schedule.interval, "first": self.schedule.first, "solvers": names,
            "channels": ["".join(_DIGITS[i] for i in solvers.tolist()) for solvers in chosen],
        }  # fmt: skip


def sums(series: Tensor, schedule: Schedule) -> Tensor:
    """Sums over tokens that descriptors and errors are made of.

    Args:
        series: A feature at all steps, `(steps, tokens, D)`.
        schedule: Which steps are computed, for the errors.

    Returns:
        fp64 `(4 + bins + solvers, D)`: energy, squares of the first three differences, power at each frequency but 0,
        and the squared error of each solver.
    """
    f = series.double()
    moments = [f.diff(n=n, dim=0).square().mean(0).sum(0) if n else f.square().mean(0).sum(0) for n in range(4)]
    power = torch.fft.rfft(f - f.mean(0), dim=0)[1:].abs().square().sum(1)
    errors = torch.zeros(len(SOLVERS), f.shape[-1], dtype=torch.float64)
    for target, stamps in forecasts(len(f), schedule):
        for row, solver in enumerate(SOLVERS.values()):
            used = stamps[: solver.capacity]
            weights = torch.as_tensor(solver.weights(used, target), dtype=torch.float64)
            errors[row] += (torch.tensordot(weights, f[list(used)], 1) - f[target]).square().sum(0)
    return torch.cat([torch.stack(moments), power, errors])


def forecasts(steps: int, schedule: Schedule) -> list[tuple[int, tuple[int, ...]]]:
    """The steps that are forecast, and from which computed ones, newest first."""
    found = []
    computed: list[int] = []
    for step in range(steps):
        known = tuple(computed[::-1])
        one_ahead = schedule.interval == 1 and step >= schedule.first
        if one_ahead or not schedule.computes(step, steps):
            found.append((step, known))
        if schedule.computes(step, steps):
            computed.append(step)
    return found


def descriptors(moments: Tensor) -> Tensor:
    """What channels are clustered by: `(D, 6)`, each of mean 0 and variance 1.

    Args:
        moments: The first rows of `sums`: energy, differences, powers.
    """
    tiny = torch.finfo(torch.float64).tiny
    energy, first, second, third = moments[:4].clamp_min(tiny).log() / 2
    power = moments[4:].clamp_min(tiny)
    flatness = (power.log().mean(0) - power.mean(0).log()).exp()
    found = torch.stack([energy, first, second, second - first, third - second, flatness], 1)
    return (found - found.mean(0)) / found.std(0, correction=0).clamp_min(1e-12)


def choose(moments: Tensor, errors: Tensor, clusters: int) -> Tensor:
    """The solver of each channel, `(D,)`.

    Args:
        moments: As in `descriptors`.
        errors: Squared error of each solver, `(solvers, D)`.
        clusters: Number of clusters.
    """
    points = descriptors(moments)
    # In the order of one descriptor, the evenly spaced rows that k-means starts from are far apart.
    order = points[:, 3].argsort(stable=True)
    labels = torch.empty(len(points), dtype=torch.int64)
    found, _, _ = kmeans(points[order].float()[None], min(clusters, len(points)), iters=100)
    labels[order] = found[0].long()
    total = torch.zeros(len(errors), clusters, dtype=torch.float64).index_add_(1, labels, errors)
    return total.argmin(0)[labels]


def check(values: Mapping[str, Any], steps: int) -> None:
    """ValueError unless there is a known solver for each channel."""
    if values.get("level") not in LEVELS:
        raise ValueError(f"level={values.get('level')!r}; allowed are {' and '.join(map(repr, LEVELS))}")
    solvers, channels = values.get("solvers"), values.get("channels")
    if not isinstance(solvers, tuple) or not solvers or not all(name in SOLVERS for name in solvers):
        raise ValueError(f"solvers={solvers!r} must be a list of {', '.join(map(repr, SOLVERS))}")
    if not isinstance(channels, tuple) or not channels or not all(isinstance(c, str) and c for c in channels):
        raise ValueError("channels must be a list of strings, one for each feature")
    allowed = set(_DIGITS[: len(solvers)])
    if not all(set(one) <= allowed for one in channels):
        raise ValueError(f"channels must hold digits from 0 to {len(solvers) - 1}")
