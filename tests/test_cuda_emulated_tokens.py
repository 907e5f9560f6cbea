"""The CUDA kernels that tell tokens apart, on the host as in `test_cuda_emulated.py`: what random calls do not hit."""

from __future__ import annotations

from pathlib import Path

import cuda_emulator
import pytest
import torch
from _numerics import assert_all_close_to_truth
from _raw_cases import run, run_plain, widened

pytestmark = pytest.mark.skipif(cuda_emulator.missing() is not None, reason=f"no emulation: {cuda_emulator.missing()}")


@pytest.fixture(scope="module")
def emulated():
    """The op namespace of the emulation."""
    cuda_emulator.load(Path(__file__).resolve().parent.parent / "build" / "emulated")
    return torch.ops.maskaccel_emulated


def _int(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_many_fresh_rows(emulated):
    """More indices than a CTA has threads, and clusters whose rows lie far apart."""
    g = torch.Generator().manual_seed(0)
    history, fresh = torch.randn(2, 1, 700, 8, generator=g), torch.randn(1, 600, 8, generator=g)
    index, labels = (torch.randint(0, high, (1, n), generator=g).int() for high, n in ((700, 600), (30, 700)))
    args = (history, torch.tensor([1.5, -0.5]), fresh, index, labels, None, None, 1, 0.25)
    got = run("scatter_combine", emulated.scatter_combine, args)
    plain, truth = run_plain("scatter_combine", args), run_plain("scatter_combine", widened(args))
    assert_all_close_to_truth(got, plain, truth)


def test_indices_outside_are_left_out(emulated):
    """On a GPU nobody looks at them; they must not be followed."""
    history, fresh = torch.zeros(1, 1, 4, 8), torch.full((1, 3, 8), 100.0)
    fresh[0, 2] = 1
    out = emulated.scatter_combine(
        history, torch.ones(1), fresh, _int([9, -2, 1]), _int([0, 0, 0, 0]), None, None, 0, 0.5
    )
    assert torch.equal(out[0, :, 0], torch.tensor([0.5, 1.0, 0.5, 0.5]))
    assert torch.equal(out, history[0])


def test_a_spoiled_row_stays_in_its_cluster(emulated):
    history, fresh = torch.zeros(1, 1, 4, 8), torch.ones(1, 2, 8)
    fresh[0, 1] = float("nan")
    out = emulated.scatter_combine(history, torch.ones(1), fresh, _int([0, 2]), _int([0, 0, 1, 1]), None, None, 0, 0.5)
    assert torch.equal(out[0, :2, 0], torch.tensor([1.0, 0.5]))
    assert out[0, 2:].isnan().all()


def test_empty_clusters(emulated):
    """They keep their centroid, and take the nearest tokens that are free."""
    x = torch.tensor([[[0.0], [1.0], [2.0], [10.0]]])
    init = torch.tensor([[[1.0], [100.0], [9.0], [500.0]]])
    labels, centroids, chosen = emulated.kmeans(x, init, 4, 2, 0)
    assert labels.tolist() == [[0, 0, 0, 2]]
    assert centroids.flatten().tolist() == [1.0, 100.0, 10.0, 500.0]
    assert chosen.tolist() == [[1, 2, 3, 0]]


def test_equal_tokens(emulated):
    """Ties go to the lowest cluster and the lowest row."""
    labels, _, chosen = emulated.kmeans(torch.ones(1, 300, 8), None, 20, 1, 1)
    assert not labels.any()
    assert chosen.tolist() == [list(range(20))]


@pytest.mark.parametrize("metric", [0, 1, 2])
def test_uneven_sizes(emulated, metric):
    """Tokens, clusters and width that fill no tile."""
    x = torch.randn(2, 90, 150, generator=torch.Generator().manual_seed(metric)).bfloat16()
    labels, centroids, chosen = emulated.kmeans(x, None, 21, 2, metric)
    want = torch.ops.maskaccel.kmeans(x, None, 21, 2, metric)
    assert torch.equal(labels, want[0]) and torch.equal(chosen, want[2])
    torch.testing.assert_close(centroids, want[1])


def test_nothing(emulated):
    none = torch.zeros(0, 2, dtype=torch.int32)
    args = (torch.zeros(2, 0, 4, 8), torch.ones(2), torch.zeros(0, 2, 8), none, None, None, None, 0, 0.0)
    assert emulated.scatter_combine(*args).shape == (0, 4, 8)
    assert [t.shape for t in emulated.kmeans(torch.zeros(0, 4, 8), None, 3, 2, 1)] == [(0, 4), (0, 3, 8), (0, 3)]


H, W, F, AT = torch.zeros(3, 2, 4, 8), torch.ones(3), torch.zeros(2, 2, 8), torch.zeros(2, 2, dtype=torch.int32)
BAD = [
    ("scatter_combine", (H.mT, W, F, AT, None, None, None, 0, 0.0), "fresh must be|dense in N and D"),
    ("scatter_combine", (H[:, :1].expand(3, 2, 4, 8), W, F, AT, None, None, None, 0, 0.0), "must not be expanded"),
    ("scatter_combine", (H, W, F.half(), AT, None, None, None, 0, 0.0), "of the dtype of history"),
    ("scatter_combine", (H, W, F, AT.long(), None, None, None, 0, 0.0), "index must be contiguous int32"),
    ("scatter_combine", (H, W, F, AT, None, None, None, 0, 0.5), "gamma above 0 needs labels"),
    ("scatter_combine", (H, W, F, AT, None, H[1], None, 1, 0.0), "x shares memory with history"),
    ("kmeans", (H[0], None, 5, 1, 0), "k is 5; allowed are 1 to the smaller of 4"),
    ("kmeans", (H[0], None, 2, 1, 3), "metric is 3"),
    ("kmeans", (H[0], H[0], 2, 1, 0), "init must be"),
]


@pytest.mark.parametrize(("name", "args", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(emulated, name, args, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(emulated, name)(*args)
    assert not H.any()
