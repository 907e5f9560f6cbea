"""U-DiT: attention on downsampled tokens (Tian et al. 2024, arXiv 2405.02730, section 3.3).

`x + DWConv(x)` is cut into `factor^2` interleaved sub-grids (pixel unshuffle); each attends within itself, at
`1 / factor^2` of the cost, and the tokens go back to their places. As a mask it is a window of dilation `factor`
without a radius. The second version compares q and k by their cosine, with a learned scale of each head and 2-D RoPE.

Inferred: RoPE counts places of the sub-grid, in adjacent pairs of channels, the first half of a head for y, the other
for x. A grid that `factor` does not divide is cut into sub-grids of different sizes (the authors' code needs one that
it does).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops import qk_norm_rope
from . import _groups
from ._layers import check_tokens, convolve, depthwise, head_dim, linear, remembered, sizes, split

_MOST = math.log(100.0)  # the largest logarithm of the scale of cosines


@remembered
def rope_table(
    grid: tuple[int, int], factor: int, width: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 `(S, width / 2)`, in the order of the sub-grids."""
    at = _groups.coordinates(grid)[:, :, None] // factor
    angles = at * theta ** -(torch.arange(width // 4) / (width // 4))
    angles = _groups.sub_grids(grid, factor, torch.device("cpu")).apply(angles.flatten(1)[None])[0].to(device)
    return angles.cos(), angles.sin()


class UDiTAttention(nn.Module):
    """Attention on interleaved sub-grids.

    Args:
        dim: Channels.
        heads: Attention heads; the paper's have 24 channels in the outermost stage.
        factor: Downsampling of each axis.
        kernel: Size of the depth-wise convolution.
        cosine: The second version: cosine similarity, learned scales and RoPE.
        theta: Base of RoPE's frequencies.
        qkv_bias: Whether the projections of q, k and v have a bias.

    Raises:
        ValueError: `heads` does not divide `dim`, an option is out of range, or RoPE does not fit the head dim.
    """

    paper = "U-DiTs: Downsample Tokens in U-Shaped Diffusion Transformers (arXiv 2405.02730)"

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        factor: int = 2,
        kernel: int = 5,
        cosine: bool = False,
        theta: float = 10000.0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        width = head_dim(dim, heads)
        if factor < 1:
            raise ValueError(f"factor={factor} must be 1 or more")
        if cosine and width % 4:
            raise ValueError(f"2-D RoPE needs a head dim that 4 divides; dim={dim} and heads={heads} give {width}")
        self.dim, self.heads, self.factor, self.theta = dim, heads, factor, theta
        self.downsampler = depthwise(dim, kernel)
        self.qkv = linear(dim, 3 * dim, qkv_bias)
        self.proj = linear(dim, dim)
        self.logit_scale = nn.Parameter(torch.full((heads,), math.log(10.0))) if cosine else None

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attention of `(B, H * W, dim)`, tokens in raster order of the grid (H, W); returns that shape."""
        grid = sizes("grid", grid, 2)  # type: ignore[assignment]
        check_tokens(x, self.dim, grid)
        groups = _groups.sub_grids(grid, self.factor, x.device)
        x = groups.apply(x + convolve(self.downsampler, x, grid))
        q, k, v = split(self.qkv(x), 3, self.heads)
        scale = None
        if self.logit_scale is not None:
            width = q.shape[3]
            cos, sin = rope_table(grid, self.factor, width, self.theta, x.device)
            # rms(x) is sqrt(width) times the unit vector of x
            q, k = qk_norm_rope(q, k, cos=cos, sin=sin, norm="rms", eps=1e-12)
            q = q * self.logit_scale.clamp(max=_MOST).exp()[:, None].to(q.dtype)
            scale = 1 / width
        return groups.undo(self.proj(groups.attention(q, k, v, scale).flatten(2)))
