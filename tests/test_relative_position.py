"""Tables of relative positions on a grid, for all of its tokens or some, against a loop over pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from maskaccel.ops import RelativePosition, tile_attention


def looked_up(table: torch.Tensor, grid: tuple[int, ...], q_rows: torch.Tensor, k_rows: torch.Tensor) -> torch.Tensor:
    """`(B, H, Sq, Sk)`: the entry of the offset query - key, offsets in raster order from `-(n - 1)` on."""
    cells = list(itertools.product(*map(range, grid)))
    shaped = table.view(-1, *(2 * n - 1 for n in grid))
    rows = []
    for q_of, k_of in zip(q_rows.tolist(), k_rows.tolist(), strict=True):
        for i, j in itertools.product(q_of, k_of):
            rows.append(
                shaped[(slice(None), *(a - b + n - 1 for a, b, n in zip(cells[i], cells[j], grid, strict=True)))]
            )
    size = (q_rows.shape[0], q_rows.shape[1], k_rows.shape[1], -1)
    return torch.stack(rows).view(size).permute(0, 3, 1, 2)


@pytest.mark.parametrize("grid", [(7,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("kept", [False, True])
def test_a_grid_and_kept_tokens_of_it(grid, kept):
    """MDT: each sample keeps tokens of its own."""
    generator = torch.Generator().manual_seed(0)
    tokens = math.prod(grid)
    table = torch.randn(2, math.prod(2 * n - 1 for n in grid), generator=generator)
    some = torch.stack([torch.randperm(tokens, generator=generator)[:5].sort().values for _ in range(3)])
    rows = some if kept else torch.arange(tokens).expand(3, -1)
    q, k, v = (torch.randn(3, rows.shape[1], 2, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    relpos = RelativePosition.of_grid(table, grid, *((some, some) if kept else ()))
    got = tile_attention(q, k, v, relpos=relpos)
    want = tile_attention(q, k, v, bias=looked_up(table, grid, rows, rows))
    torch.testing.assert_close(got, want)


def test_queries_and_keys_may_be_different_tokens():
    table = torch.arange(7.0 * 9).view(1, -1)
    q_rows, k_rows = torch.tensor([0, 19, 7]), torch.tensor([3, 12])
    relpos = RelativePosition.of_grid(table, (4, 5), q_rows, k_rows)
    found = table[0][(relpos.q_at[0][:, None] - relpos.k_at[0]).long()]
    assert torch.equal(found, looked_up(table, (4, 5), q_rows[None], k_rows[None])[0, 0])


def test_errors():
    with pytest.raises(ValueError, match=r"the grid \(4, 5\) has 63 offsets"):
        RelativePosition.of_grid(torch.zeros(1, 62), (4, 5))
    with pytest.raises(TypeError, match="q_at has dtype"):
        RelativePosition(torch.zeros(1, 5), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="reaches from -2 to 0"):
        RelativePosition(torch.zeros(1, 5), torch.zeros(3, dtype=torch.int32), torch.arange(3, dtype=torch.int32))
