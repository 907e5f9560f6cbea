"""Clusters of the tokens of a model's streams, made anew at computed steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import StepRule
from ..models import Streams
from ..ops import kmeans
from ..patching.transaction import Transaction
from .generation import Generation

CLUSTERS = "_maskaccel_clusters"


@dataclass
class Grouped:
    """The clusters of one stream in one guidance branch.

    Attributes:
        labels: Cluster of each token, int32 `(B, N)`.
        centroids: fp32 `(B, clusters, D)`.
    """

    labels: Tensor
    centroids: Tensor


class Clusters:
    """k-means of what one block returns at computed steps, each time from the centroids of the time before.

    Attributes:
        count: Clusters of a stream, at most; a stream of fewer tokens has one for each.
        iters: Iterations.
        metric: Of `maskaccel.ops.kmeans`.
    """

    def __init__(
        self, generation: Generation, rule: StepRule, streams: Streams, count: int, iters: int, metric: str
    ) -> None:
        self.generation, self.rule, self.streams = generation, rule, streams
        self.count, self.iters, self.metric = count, iters, metric
        self._held: dict[tuple[str, int], Grouped] = {}
        generation.memories.append(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}}

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(g.labels.nbytes + g.centroids.nbytes for g in self._held.values())

    def clear(self) -> None:
        """Forget every branch."""
        self._held.clear()

    def get(self, stream: int) -> Grouped | None:
        """The clusters of a stream (0: the hidden states) in this branch."""
        return self._held.get((self.generation.branch_key, stream))

    def update(self, output: Any) -> None:
        """Cluster the streams that the block returned."""
        for stream, x in enumerate(self.streams.read(output)):
            key = self.generation.branch_key, stream
            if x is None or x.dim() != 3:
                self._held.pop(key, None)
                continue
            count, before = min(self.count, x.shape[1]), self._held.get(key)
            shape = (x.shape[0], count, x.shape[2])
            fits = before is not None and before.centroids.shape == shape and before.centroids.device == x.device
            init = before.centroids if before is not None and fits else None
            labels, centroids, _ = kmeans(x, count, iters=self.iters, init=init, metric=self.metric)
            self._held[key] = Grouped(labels, centroids)

    def attach(self, block: nn.Module, transaction: Transaction, claimant: str) -> None:
        """Plan that the streams are clustered whenever `block` is computed whole."""
        transaction.set(block, CLUSTERS, self, claimant)
        transaction.wrap_forward(block, _clustered_forward)


def _clustered_forward(self: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    clusters: Clusters = self.__dict__[CLUSTERS]
    output = inner(*args, **kwargs)
    generation = clusters.generation
    if generation.active and not torch.is_grad_enabled() and clusters.rule.action(generation) == "compute":
        clusters.update(output)
    return output
