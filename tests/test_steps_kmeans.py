"""`ops.kmeans`: against a plain loop, what the result promises, layouts, bad input."""

from __future__ import annotations

import pytest
import torch
from _numerics import assert_close_to_truth
from hypothesis import given, settings
from hypothesis import strategies as st

from maskaccel import ops
from maskaccel.ops._backends import refusal
from maskaccel.ops.steps import reference
from maskaccel.ops.steps.schema import METRICS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
BACKENDS = [b for b in ("cpu", "triton") if refusal(b, CPU, torch.float32, "kmeans") is None] + ["reference"]
fuzz = settings(max_examples=60, deadline=None, derandomize=True)


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _distance(row, centroid, metric):
    if metric == "cosine":
        length = row.norm() * centroid.norm()
        return 1 - (row @ centroid / length if length > 0 else torch.zeros(()).double())
    return (row - centroid).abs().sum() if metric == "l1" else (row - centroid).square().sum()


def _lloyd(rows, k, iters, init, metric):
    """One sample, token by token, fp64."""
    n = len(rows)
    centroids = [rows[(2 * c + 1) * n // (2 * k)] for c in range(k)] if init is None else list(init)

    def assign():
        distances = torch.stack([torch.stack([_distance(row, c, metric) for c in centroids]) for row in rows])
        return distances, [min(range(k), key=lambda c: (d[c].item(), c)) for d in distances]

    for _ in range(iters):
        _, labels = assign()
        for c in range(k):
            members = [row for row, label in zip(rows, labels, strict=True) if label == c]
            if metric == "cosine":
                members = [row / row.norm() if row.norm() > 0 else row for row in members]
            if members:
                centroids[c] = torch.stack(members).mean(0)
    distances, labels = assign()
    chosen = {}
    for c in range(k):
        if c in labels:
            chosen[c] = min((n for n in range(n) if labels[n] == c), key=lambda n: (distances[n, c].item(), n))
    for c in range(k):
        if c not in chosen:
            free = [m for m in range(n) if m not in chosen.values()]
            chosen[c] = min(free, key=lambda m: (distances[m, c].item(), m))
    return torch.tensor(labels), torch.stack(centroids), torch.tensor([chosen[c] for c in range(k)]), distances


@fuzz
@given(
    st.integers(0, 999), st.integers(0, 2), st.integers(1, 12), st.sampled_from([1, 3, 8, 33]), st.integers(1, 7),
    st.integers(0, 3), st.sampled_from(DTYPES), st.sampled_from(list(METRICS)), st.booleans(),
    st.sampled_from(["dense", "sliced", "strided"]), st.sampled_from([None, "reference"]),
)  # fmt: skip
def test_kmeans(seed, batch, n, width, k, iters, dtype, metric, warm, layout, backend):
    k = min(k, n)
    x = _random(seed, batch, n, width).to(dtype)
    if layout == "sliced":
        x = torch.cat([x, torch.full_like(x, float("nan"))], 1)[:, :n]
    elif layout == "strided":  # copied: the last dim is not dense
        x = torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]
    init = _random(seed + 1, batch, k, width).to(dtype) if warm else None
    with torch.no_grad():
        labels, centroids, chosen = ops.kmeans(x, k, iters=iters, init=init, metric=metric, backend=backend)
        plain = reference.kmeans(x, init, k, iters, METRICS[metric])
    assert (labels.dtype, centroids.dtype, chosen.dtype) == (torch.int32, torch.float32, torch.int32)
    assert (labels.shape, centroids.shape, chosen.shape) == ((batch, n), (batch, k, width), (batch, k))
    for b in range(batch):
        start = None if init is None else init[b].double()
        want = _lloyd(x[b].double(), k, iters, start, metric)
        if metric == "cosine" and width == 1:  # every distance is 0 or 2, or a rounding away from it
            continue
        assert_close_to_truth(centroids[b], plain[1][b], want[1], what="centroids")
        assert torch.equal(labels[b].long(), want[0])
        # Both rows of a cluster of two are as near to its centroid: the choice is a matter of the last bit.
        got, best = (want[3][at, torch.arange(k)] for at in (chosen[b].long(), want[2]))
        assert (got <= best * (1 + 1e-5) + 1e-6).all()
        assert len(set(chosen[b].tolist())) == k


def _blobs(seed: int, batch: int, n: int, k: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows around k centers that are far apart, every k-th of one center, and the label of each row."""
    centers = 8 * _random(seed, batch, k, width)
    label = torch.arange(n) * k // n
    return centers[:, label] + 0.1 * _random(seed + 1, batch, n, width), label


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_finds_separate_clusters(backend, dtype, metric):
    x, label = _blobs(0, 2, 96, 6, 40)
    x = x.to(dtype)
    with torch.no_grad():
        labels, centroids, chosen = ops.kmeans(x, 6, iters=3, metric=metric, backend=backend)
        plain = reference.kmeans(x, None, 6, 3, METRICS[metric])
        truth = reference.kmeans(x.double(), None, 6, 3, METRICS[metric])
    assert torch.equal(labels.long(), label.expand(2, -1))
    assert torch.equal(label[chosen.long()], torch.arange(6).expand(2, -1))
    assert_close_to_truth(centroids, plain[1], truth[1])
    assert torch.equal(chosen, truth[2])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_result_promises(backend, metric):
    """On data without clusters: labels are nearest to the centroids returned, representatives distinct members."""
    x = _random(3, 2, 150, 24)
    with torch.no_grad():
        labels, centroids, chosen = ops.kmeans(x, 19, iters=4, metric=metric, backend=backend)
    distance = reference.distances(x.double(), centroids.double(), METRICS[metric])
    mine = distance.gather(2, labels.long()[..., None])[..., 0]
    assert (mine <= distance.amin(2) * (1 + 1e-5)).all()
    assert all(len(set(row.tolist())) == 19 for row in chosen)
    assert torch.equal(labels.gather(1, chosen.long()), torch.arange(19, dtype=torch.int32).expand(2, -1))
    best = torch.where(labels[:, None] == torch.arange(19)[:, None], distance.mT, torch.inf).amin(2)
    assert (distance.mT.gather(2, chosen.long()[..., None])[..., 0] <= best * (1 + 1e-5)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_clusters_keep_their_centroid(backend):
    x = torch.tensor([[[0.0], [1.0], [2.0], [10.0]]])
    init = torch.tensor([[[1.0], [100.0], [9.0], [500.0]]])
    with torch.no_grad():
        labels, centroids, chosen = ops.kmeans(x, 4, iters=2, init=init, backend=backend)
    assert labels.tolist() == [[0, 0, 0, 2]]
    assert centroids.flatten().tolist() == [1.0, 100.0, 10.0, 500.0]
    assert chosen.tolist() == [[1, 2, 3, 0]]  # cluster 1 takes what is nearest to 100 and free, cluster 3 the rest


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows(backend):
    """Ties go to the lowest cluster and the lowest row; representatives are distinct all the same."""
    with torch.no_grad():
        labels, centroids, chosen = ops.kmeans(torch.ones(1, 5, 8), 3, iters=2, backend=backend)
    assert labels.tolist() == [[0] * 5]
    assert torch.equal(centroids, torch.ones(1, 3, 8))
    assert chosen.tolist() == [[0, 1, 2]]


def test_warm_start_goes_on():
    x = _random(0, 1, 60, 12)
    with torch.no_grad():
        _, middle, _ = ops.kmeans(x, 5, iters=2)
        for got, want in zip(ops.kmeans(x, 5, iters=3, init=middle), ops.kmeans(x, 5, iters=5), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal(backend):
    x = _random(0, 2, 200, 20).bfloat16()
    with torch.no_grad():
        first, second = (ops.kmeans(x, 9, iters=5, metric="l1", backend=backend) for _ in range(2))
    assert all(map(torch.equal, first, second))


X, C = torch.zeros(2, 6, 8), torch.zeros(2, 3, 8)
BAD = [
    ((1, 3), {"iters": 1}, TypeError, "x must be a torch.Tensor, got int"),
    ((X[0], 3), {"iters": 1}, ValueError, r"x must be \(B, N, D\), got shape \(6, 8\)"),
    ((X.int(), 3), {"iters": 1}, TypeError, "x has dtype torch.int32"),
    ((X[..., :0], 3), {"iters": 1}, ValueError, "x has an empty last dimension"),
    ((X[:, :0], 3), {"iters": 1}, ValueError, "x has no tokens to cluster"),
    ((X, 0), {"iters": 1}, ValueError, "k=0; allowed are 1 to 6"),
    ((X, 7), {"iters": 1}, ValueError, "k=7; allowed are 1 to 6"),
    ((torch.zeros(1, 1100, 1), 1025), {"iters": 1}, ValueError, "k=1025; allowed are 1 to 1024"),
    ((X, 2.0), {"iters": 1}, TypeError, "k must be an int, got float"),
    ((X, 3), {"iters": -1}, ValueError, "iters=-1; allowed are 0 to 1000"),
    ((X, 3), {"iters": 1001}, ValueError, "iters=1001; allowed are 0 to 1000"),
    ((X, 3), {"iters": 1.5}, TypeError, "iters must be an int, got float"),
    ((X, 3), {"iters": 1, "metric": "L3"}, ValueError, "metric='L3' is not known; allowed are 'l2', 'l1', 'cosine'"),
    ((X, 3), {"iters": 1, "init": C[:1]}, ValueError, r"init has shape \(1, 3, 8\); it must be \(2, 3, 8\)"),
    ((X, 3), {"iters": 1, "init": C.int()}, TypeError, "init has dtype torch.int32"),
    ((X, 3), {"iters": 1, "init": C.to("meta"), "backend": "reference"}, ValueError, "init is on meta, x on cpu"),
    ((X, 3), {"iters": 1, "backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
]


@pytest.mark.parametrize(("args", "keywords", "error", "message"), BAD)
def test_bad_input_is_named(args, keywords, error, message):
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            ops.kmeans(*args, **keywords)


@pytest.mark.parametrize("name", ["x", "init"])
def test_gradients_are_refused(name):
    call = {"x": X, "init": C}
    call[name] = call[name].clone().requires_grad_()
    with pytest.raises(ValueError, match=f"kmeans has no derivative, but {name} requires grad"):
        ops.kmeans(call.pop("x"), 3, iters=1, **call)
