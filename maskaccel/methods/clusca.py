"""ClusCa: cluster-driven feature caching (Zheng et al. 2025, arXiv 2509.10312).

At computed steps the tokens are clustered by the hidden states after the last block (of two streams: the last block of
two streams). Between them attention and MLP outputs are forecast by TaylorSeer's series, but MLPs compute one token of
each cluster and the rest of the cluster takes part in it:

    C(x_n) = F(x_n) for the computed tokens, gamma * F(computed token of the cluster) + (1 - gamma) * C(x_n) for others

with C the remembered value (order 0) of the series, which stays so for the steps that follow.

From the authors' code: k-means with L1 distances, from the centroids of the computed step before; one random token of
each cluster, drawn anew in each layer at each step; text streams compute their tokens without passing them on; blocks
whose attention and MLP share a projection are only forecast. Defaults are those for FLUX. Others of theirs:

    DiT           interval=4, order=4, first=2, gamma=0, iters=100
    HunyuanVideo  interval=5, first=1, clusters=32, gamma=0.01

Different here: a fixed number of iterations and an even start instead of a random one, so that the device need not be
waited for; the draw is the same in every sample and guidance branch; an empty cluster computes no token of its own
(the code computes token 0 then, and adds it to its cluster twice); differences are formed from the second computed
step on (the code waits for the last of the first steps). Cross-attention, which the authors' models lack, is forecast.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor, nn

from ..masks import Schedule
from ..models import streams_of
from ..ops.steps.schema import MAX_CLUSTERS, METRICS
from ..patching.patch import Context
from ..patching.transaction import PatchError
from ..state.clusters import Clusters
from ..state.feature import Held
from ..state.generation import Generation
from ..state.history import Storage
from ..state.ladder import Series
from ..state.select import hashed, one_per_cluster
from . import _cached
from ._partial import Choices, attach_parts, parts_of


@dataclass(frozen=True)
class ClusCa(_cached.CachedFeatures):
    """Forecast features, and compute one token of each cluster.

    Attributes:
        interval: Steps from one computed step to the next (N in the paper).
        order: Order of the series; `order + 1` values are remembered.
        first: Steps at the start that are computed.
        last: Steps at the end that are computed.
        clusters: Clusters of each stream (K in the paper), and tokens that an MLP computes.
        gamma: What the other tokens take of the computed one of their cluster.
        iters: Iterations of k-means.
        metric: Distance of k-means: `"l1"`, `"l2"` or `"cosine"`.
        seed: Of the draw.
        storage: How features are kept.
    """

    interval: int = 5
    order: int = 1
    first: int = 3
    last: int = 0
    clusters: int = 16
    gamma: float = 0.005
    iters: int = 10
    metric: str = "l1"
    seed: int = 0
    storage: Storage = Storage()

    name = "ClusCa"
    paper = "Compute Only 16 Tokens in One Timestep: Cluster-Driven Feature Caching (arXiv 2509.10312)"
    models = "lists of blocks with MLPs by token, whose streams are known"

    def __post_init__(self) -> None:
        self.schedule  # noqa: B018  (validates the fields when the method is made)
        Series(self.order)
        for name, low, high in (("clusters", 1, MAX_CLUSTERS), ("iters", 0, 1000)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"{name}={value!r} must be an integer from {low} to {high}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed={self.seed!r} must be an integer")
        if not isinstance(self.gamma, int | float) or not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma!r} must be a number from 0 to 1")
        if self.metric not in METRICS:
            raise ValueError(f"metric={self.metric!r}; allowed are {', '.join(map(repr, METRICS))}")

    @property
    def schedule(self) -> Schedule:
        """The step mask; the interval counts from the last of the first steps."""
        return Schedule.after_first(self.interval, self.first, self.last, between=("partial",))

    def attach(self, context: Context) -> None:
        """Plan the memories of all blocks, and the clusters.

        Raises:
            PatchError: The model has no MLP that is known, or no block whose hidden states are.
        """
        found = parts_of(self, context)
        last = [parts.block for parts in found if parts.only("mlp") is not None]
        if not last:
            raise PatchError(f"{self.name}: {type(context.model).__name__} has no MLP of its own in any block")
        try:
            streams = streams_of(last[-1])
        except LookupError as error:
            raise PatchError(f"{self.name}: no hidden states to cluster: {error}") from None
        generation = context.track_generation(self.name)
        clusters = Clusters(generation, self.schedule, streams, self.clusters, self.iters, self.metric)
        numbers = itertools.count()

        def choose(module: nn.Module, kind: str) -> OnePerCluster | None:
            if kind not in ("mlp", "text"):
                return None
            return OnePerCluster(self, generation, clusters, next(numbers), kind)

        for parts in found:
            attach_parts(self, context, parts, self.schedule, choose, Series(self.order), self.storage)
        clusters.attach(last[-1], context.transaction, self.name)
        context.done(self.name, last[-1], "clustered at computed steps")


@dataclass(eq=False)
class OnePerCluster:
    """The choice of tokens of one MLP.

    Attributes:
        policy: The numbers.
        generation: The model's run.
        clusters: Of the streams.
        number: Of the MLP, which the draw depends on.
        kind: `"mlp"` of the hidden states, or `"text"`.
    """

    policy: ClusCa
    generation: Generation
    clusters: Clusters
    number: int
    kind: str

    def __call__(self, x: Tensor, held: Held | None) -> Choices | None:
        """One token of each cluster; None where the tokens of x `(B, N, D)` are not those that were clustered."""
        grouped = self.clusters.get(1 if self.kind == "text" else 0)
        if grouped is None or grouped.labels.shape != x.shape[:2]:
            return None
        draw = hashed(x.shape[1], self.policy.seed, self.number, self.generation.index, device=x.device)
        index = one_per_cluster(grouped.labels, grouped.centroids.shape[1], draw)
        if self.kind == "text" or not self.policy.gamma:
            return Choices(index)
        return Choices(index, grouped.labels, self.policy.gamma)


__all__ = ["ClusCa"]
