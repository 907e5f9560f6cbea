"""MaskGWM: temporal attention of a driving world model (Ni et al. 2025, arXiv 2502.11663; OpenDWM's code).

Tokens of a video lie on a grid (T, H, W). Temporal attention is one of

* point-wise: a place over time, `((b h w) t)`;
* row-wise: a row of every frame, `((b h) (t w))`, which lets what moves sideways be followed;
* full: all tokens.

Row-wise masking keeps equally many tokens of every row, so the kept tokens are a grid again, of smaller W: the layer
takes the grid of the call. This is the attention alone; what the model drops in training is not part of it.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from . import _groups
from ._layers import check_tokens, head_dim, linear, sizes, split

Kind = Literal["pointwise", "rowwise", "full"]
_SHARED: dict[str, tuple[int, ...]] = {"pointwise": (1, 2), "rowwise": (1,), "full": ()}


class MaskGWMAttention(nn.Module):
    """Point-wise, row-wise or full attention over the tokens of a video.

    Args:
        dim: Channels.
        heads: Attention heads (24 of 64 channels in the paper's model).
        kind: `"rowwise"`, `"pointwise"` or `"full"`.
        qkv_bias: Whether the projections of q, k and v have a bias.

    Raises:
        ValueError: `heads` does not divide `dim`, or `kind` is unknown.
    """

    paper = "MaskGWM: A Generalizable Driving World Model with Video Mask Reconstruction (arXiv 2502.11663)"

    def __init__(self, dim: int, heads: int, kind: Kind = "rowwise", qkv_bias: bool = True) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"kind={kind!r}; allowed are {', '.join(map(repr, get_args(Kind)))}")
        head_dim(dim, heads)
        self.dim, self.heads, self.kind = dim, heads, kind
        self.qkv = linear(dim, 3 * dim, qkv_bias)
        self.proj = linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Attention of `(B, T * H * W, dim)`, tokens in raster order of the grid (T, H, W); returns that shape."""
        grid = sizes("grid", grid, 3)  # type: ignore[assignment]
        check_tokens(x, self.dim, grid)
        groups = _groups.lines(grid, _SHARED[self.kind], x.device)
        q, k, v = split(self.qkv(groups.apply(x)), 3, self.heads)
        return groups.undo(self.proj(groups.attention(q, k, v).flatten(2)))
