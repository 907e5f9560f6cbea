"""Clusters of similar tokens."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .. import _call, _checks
from . import _check
from . import reference as plain
from .schema import MAX_CLUSTERS, METRICS


def kmeans(
    x: Tensor, k: int, *, iters: int, init: Tensor | None = None, metric: str = "l2", backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """k-means of the tokens of each sample, with one representative token for each cluster.

    A fixed number of iterations (Lloyd 1982) without waiting for the device, and without random numbers: the same
    input gives the same clusters. ClusCa (Zheng et al. 2025, arXiv 2509.10312) clusters hidden tokens by `"l1"` at
    computed steps, starting from the centroids of the computed step before, and then computes one token a cluster.

    An empty cluster keeps its centroid and may win rows again. Equal distances go to the lowest cluster.

    Args:
        x: `(B, N, D)`, fp32, bf16 or fp16; distances and means are fp32.
        k: Clusters, 1 to min(N, 1024).
        iters: Assignments that are followed by new centroids, 0 to 1000; one more assignment is made for the result.
        init: `(B, k, D)` centroids to start from, of any floating dtype; None takes k evenly spaced rows.
        metric: `"l2"`; `"l1"` (assigns by L1, but centroids are means, as ClusCa does); `"cosine"`, where rows count at
            unit length and only the direction of a centroid means something (spherical k-means, Dhillon & Modha 2001).
        backend: As in `maskaccel.ops.norm_modulate`.

    Returns:
        labels: int32 `(B, N)`, the nearest of the returned centroids.
        centroids: fp32 `(B, k, D)`.
        representatives: int32 `(B, k)`, distinct: the token of each cluster that is nearest to its centroid; for an
            empty cluster the nearest token that represents no other one.

    Raises:
        TypeError: An argument is no tensor or int, or of a dtype that is not allowed.
        ValueError: Shapes or values do not fit, an input requires grad, or `backend` cannot run the call.
    """
    if backend is None and not _call.tracing():
        try:
            labels, centroids, chosen = _call.fast("kmeans", x, (x, init, k, iters, METRICS[metric]))
            return labels, centroids, chosen
        except _call.FAULTS:
            pass  # the checks below say what is wrong, or make the operands dense
    x = _checks.activation("x", x)
    batch, n, width = x.shape
    if n == 0:
        raise ValueError(f"x has no tokens to cluster: shape {tuple(x.shape)}")
    k = _check.integer("k", k, 1, min(n, MAX_CLUSTERS))
    iters = _check.integer("iters", iters, 0, 1000)
    _checks.choice("metric", metric, METRICS)
    if init is not None:
        _checks.same_device("init", _checks.floating("init", init), "x", x)
        if tuple(init.shape) != (batch, k, width):
            raise ValueError(f"init has shape {tuple(init.shape)}; it must be {(batch, k, width)}")
    _checks.no_gradient("kmeans", x=x, init=init)
    start = None if init is None else init.float().contiguous()
    args = (_checks.dense_last(x), start, k, iters, METRICS[metric])
    return _call.checked("kmeans", x, args, backend, partial(plain.kmeans, x, init, k, iters, METRICS[metric]))
