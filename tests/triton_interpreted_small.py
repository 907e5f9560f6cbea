"""The small attention ops in Triton, run by `test_triton_kernels.py` as its siblings."""

from __future__ import annotations

# The same tests as of the other backends, here with "triton" among them.
from test_attention_small_ops import (  # noqa: F401
    BACKENDS,
    test_linear_attention_gradients,
    test_linear_attention_lets_nan_through,
    test_linear_attention_refuses,
    test_merge_attention,
    test_merge_attention_of_halves_is_attention,
    test_merge_attention_refuses,
    test_rows_without_keys,
    test_tile_lists,
    test_tile_lists_refuses,
)


def test_triton_is_among_the_backends() -> None:
    assert "triton" in BACKENDS
