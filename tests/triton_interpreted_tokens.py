"""The Triton kernels that tell tokens apart, run by `test_triton_kernels.py` as its siblings."""

from __future__ import annotations

import pytest
import torch
from _numerics import assert_all_close_to_truth
from _raw_cases import describe, draw, run, run_plain, widened
from _triton_cases import DTYPES, poisoned_memory  # noqa: F401

# The same tests as of the other backends, here with "triton" among them.
from test_steps_kmeans import (  # noqa: F401
    BACKENDS,
    test_empty_clusters_keep_their_centroid,
    test_equal_rows,
)
from test_steps_scatter import (  # noqa: F401
    test_a_spoiled_row_stays_in_its_cluster,
    test_clusters,
    test_is_the_forecast_of_what_was_stored,
)

from maskaccel.ops.steps import triton as steps

steps.register()


def test_triton_is_among_the_backends() -> None:
    assert "triton" in BACKENDS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["scatter_combine", "kmeans"])
def test_random_calls(name: str, dtype: torch.dtype) -> None:
    for seed in range(6):
        args = draw(name, seed, dtype, widths=(24, 40))
        got = run(name, steps.KERNELS[name], args)
        assert_all_close_to_truth(
            got, run_plain(name, args), run_plain(name, widened(args)), f"{seed} {describe(args)}"
        )


def test_indices_outside_are_left_out() -> None:
    """On a GPU nobody looks at them; they must not be followed."""
    history, fresh = torch.zeros(1, 1, 4, 8), torch.ones(1, 3, 8)
    index, labels = torch.tensor([[9, -2, 1]], dtype=torch.int32), torch.zeros(1, 4, dtype=torch.int32)
    fresh[0, :2] = 100
    out = steps.KERNELS["scatter_combine"](history, torch.ones(1), fresh, index, labels, None, None, 0, 0.5)
    assert torch.equal(out[0, :, 0], torch.tensor([0.5, 1.0, 0.5, 0.5]))


def test_empty() -> None:
    none = torch.zeros(0, 2, dtype=torch.int32)
    args = (torch.zeros(2, 0, 4, 8), torch.ones(2), torch.zeros(0, 2, 8), none, None, None, None, 0, 0.0)
    assert steps.KERNELS["scatter_combine"](*args).shape == (0, 4, 8)
    assert [t.shape for t in steps.KERNELS["kmeans"](torch.zeros(0, 4, 8), None, 3, 2, 1)] == [
        (0, 4),
        (0, 3, 8),
        (0, 3),
    ]


H, W, F, AT = torch.zeros(3, 2, 4, 8), torch.ones(3), torch.zeros(2, 2, 8), torch.zeros(2, 2, dtype=torch.int32)
BAD = [
    ("scatter_combine", (H.mT, W, F, AT, None, None, None, 0, 0.0)),
    ("scatter_combine", (H[:, :1].expand(3, 2, 4, 8), W, F, AT, None, None, None, 0, 0.0)),
    ("scatter_combine", (H, W, F.half(), AT, None, None, None, 0, 0.0)),
    ("scatter_combine", (H, W, F[:, :1], AT, None, None, None, 0, 0.0)),
    ("scatter_combine", (H, W, F, AT.long(), None, None, None, 0, 0.0)),
    ("scatter_combine", (H, W, F, AT, AT, None, None, 0, 0.5)),
    ("scatter_combine", (H, W, F, AT, None, None, None, 0, 0.5)),
    ("scatter_combine", (H, W, F, AT, None, None, None, 3, 0.0)),
    ("kmeans", (H[0], None, 5, 1, 0)),
    ("kmeans", (H[0], None, 2, -1, 0)),
    ("kmeans", (H[0], None, 2, 1, 3)),
    ("kmeans", (H[0], H[0], 2, 1, 0)),
    ("kmeans", (H[0].double(), None, 2, 1, 0)),
]


@pytest.mark.parametrize(("name", "args"), BAD, ids=range(len(BAD)))
def test_contract_violations_raise(name: str, args: tuple) -> None:
    with pytest.raises(RuntimeError):
        steps.KERNELS[name](*args)
