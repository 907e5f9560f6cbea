"""HDiT: neighbourhood attention of the hourglass diffusion transformer (Crowson et al. 2024, arXiv 2401.11605).

Each token sees the `kernel x kernel` tokens around it; at the border the window is moved inwards, so that every token
sees equally many (Hassani et al. 2023). Scores are cosines times a learned scale of each head, with axial RoPE of
frequencies that differ between heads, on half of the channels:

    s = scale_h * rope(q / |q|) . rope(k / |k|),   rope angles: y and x in [-1, 1], frequencies from pi to 10 pi

Inferred (the authors' code was not at hand): the frequencies, eps, and that the longer side of a grid reaches from -1
to 1. The authors rotate channels (i, i + D / 4) for i < D / 4 of a head; here they are (i, i + D / 2), which is the
same function of q and k with their channels in another order. This is the attention alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..masks import GridWindow, TileMask, TokenOrder
from ..ops import qk_norm_rope
from ..ops.attention import tile_attention
from ._layers import check_tokens, head_dim, linear, remembered, sizes, split

_EPS = 1e-6  # added to the squared length of q and k
_BLOCK = (64, 64)  # a neighbourhood is narrow: larger tiles hold more that it leaves out


@remembered
def neighbourhood(grid: tuple[int, int], kernel: int | None, device: torch.device) -> TileMask | None:
    """The mask of neighbourhoods, for tokens in raster order; None if all is near."""
    if kernel is None:
        return None
    order = TokenOrder(grid)
    rule = GridWindow(order, kernel // 2, clamp=True)
    return TileMask.from_rule(rule, (order.tokens, order.tokens), _BLOCK, device)


@remembered
def rope_table(grid: tuple[int, int], heads: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 `(1, S, heads, width / 2)`, for tokens in raster order."""
    frequencies = torch.linspace(math.log(math.pi), math.log(10 * math.pi), heads * width // 8 + 1)[:-1].exp()
    frequencies = frequencies.view(-1, heads).T  # (heads, width / 8)
    at = torch.cartesian_prod(*((torch.arange(n) * 2 + 1 - n) / max(grid) for n in grid))  # (S, 2)
    angles = (at[:, None, :, None] * frequencies[:, None]).flatten(2)  # (S, heads, width / 4)
    angles = torch.cat([angles, torch.zeros_like(angles)], dim=2)[None].to(device)  # the other half is not rotated
    return angles.cos(), angles.sin()


class HDiTAttention(nn.Module):
    """Neighbourhood attention with cosine scores and axial RoPE.

    Args:
        dim: Channels.
        heads: Attention heads (of 64 channels in the paper).
        kernel: Side of the neighbourhood, odd; None: all tokens attend to all (the inner levels of the hourglass).

    Raises:
        ValueError: `heads` does not divide `dim`, `kernel` is not odd, or 8 does not divide the head dim.
    """

    paper = (
        "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers (arXiv 2401.11605)"
    )

    def __init__(self, dim: int, heads: int, kernel: int | None = 7) -> None:
        super().__init__()
        width = head_dim(dim, heads)
        if width % 8:
            raise ValueError(f"axial RoPE needs a head dim that 8 divides; dim={dim} and heads={heads} give {width}")
        if kernel is not None and (kernel < 1 or kernel % 2 == 0):
            raise ValueError(f"kernel={kernel} must be odd")
        self.dim, self.heads, self.kernel = dim, heads, kernel
        self.qkv = linear(dim, 3 * dim, bias=False)
        self.proj = linear(dim, dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.scale = nn.Parameter(torch.full((heads,), 10.0))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attention of `(B, H * W, dim)`, tokens in raster order of the grid (H, W); returns that shape."""
        grid = sizes("grid", grid, 2)  # type: ignore[assignment]
        check_tokens(x, self.dim, grid)
        mask = neighbourhood(grid, self.kernel, x.device)
        q, k, v = split(self.qkv(x), 3, self.heads)
        width = q.shape[3]
        cos, sin = rope_table(grid, self.heads, width, x.device)
        # rms(x) is sqrt(width) times the unit vector of x
        q, k = qk_norm_rope(q, k, cos=cos, sin=sin, norm="rms", rope="half", eps=_EPS / width)
        q = q * self.scale[:, None].to(q.dtype)
        return self.proj(tile_attention(q, k, v, mask, scale=1 / width).flatten(2))
