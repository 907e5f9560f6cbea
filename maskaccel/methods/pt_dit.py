"""PT-DiT of Qihoo-T2X: proxy tokens and windows instead of attention over all tokens (Wang et al. 2024,
arXiv 2409.04005, section 3.2).

* Global information interaction: a proxy is the mean of each spatio-temporal window `(p_f, p_h, p_w)`, or, in the
  first version of the paper, one token of it that is drawn at random; proxies attend to one another; then all tokens
  attend to the proxies.
* Texture complement: attention within windows, then within windows shifted by half a window.

Inferred, since the paper's code is not public: the attentions of one part share no projections; the three results are
added to the stream one after the other, each after a LayerNorm without parameters (the block's modulation is not part
of this layer); proxies have no residual around their self-attention; windows that reach over the border hold fewer
tokens.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..ops.attention import tile_attention
from . import _groups
from ._layers import check_tokens, cut, head_dim, linear, remembered, sizes, split

Proxy = Literal["mean", "random"]


@remembered
def _members(grid: tuple[int, ...], window: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens window by window, and where each window starts and how many it has."""
    ids = _groups.window_ids(grid, window, (0,) * len(grid))
    counts = ids.bincount()
    return ids.argsort(stable=True).to(device), (counts.cumsum(0) - counts).to(device), counts.to(device)


class ProxyAttention(nn.Module):
    """Proxies attend to one another, and all tokens to the proxies.

    Args:
        dim: Channels.
        heads: Attention heads.
        window: Tokens of a proxy along frames, height and width.
        proxy: `"mean"` of the window, or `"random"`: one of its tokens, drawn in every call by torch's generator.
        qkv_bias: Whether the projections of q, k and v have a bias.
    """

    def __init__(
        self, dim: int, heads: int, window: tuple[int, int, int], proxy: Proxy = "mean", qkv_bias: bool = True
    ) -> None:
        super().__init__()
        head_dim(dim, heads)
        if proxy not in get_args(Proxy):
            raise ValueError(f"proxy={proxy!r}; allowed are {', '.join(map(repr, get_args(Proxy)))}")
        self.dim, self.heads, self.window, self.proxy = dim, heads, sizes("window", window, 3), proxy
        self.qkv = linear(dim, 3 * dim, qkv_bias)
        self.proxy_proj = linear(dim, dim)
        self.q = linear(dim, dim, qkv_bias)
        self.kv = linear(dim, 2 * dim, qkv_bias)
        self.proj = linear(dim, dim)

    def proxies(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """A token for each window, `(B, proxies, dim)`; windows at the border are what there is of them."""
        if self.proxy == "random":
            order, starts, counts = _members(grid, self.window, x.device)
            drawn = starts + (torch.rand(len(starts), device=x.device) * counts).long()
            return x.index_select(1, order[drawn])
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        sums = cut(x, grid, self.window).sum((2, 4, 6), dtype=wide)
        for axis, (n, w) in enumerate(zip(grid, self.window)):
            starts = torch.arange(0, n, w, device=x.device)
            counts = (n - starts).clamp(max=w)
            sums = sums / counts.view([-1 if d == axis + 1 else 1 for d in range(5)])
        return sums.flatten(1, 3).to(x.dtype)

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """What is added to `(B, F * H * W, dim)`, tokens in raster order of the grid (F, H, W)."""
        check_tokens(x, self.dim, grid)
        q, k, v = split(self.qkv(self.proxies(x, grid)), 3, self.heads)
        proxies = self.proxy_proj(tile_attention(q, k, v).flatten(2))
        (q,), (k, v) = split(self.q(x), 1, self.heads), split(self.kv(proxies), 2, self.heads)
        return self.proj(tile_attention(q, k, v).flatten(2))


class WindowAttention(nn.Module):
    """Attention within the windows of a grid, or within shifted ones.

    Args:
        dim: Channels.
        heads: Attention heads.
        window: Tokens of a window along each axis of the grid.
        shift: Tokens by which windows are shifted; 0 for none. Windows at the border are then smaller.
        qkv_bias: Whether the projections of q, k and v have a bias.
    """

    def __init__(
        self, dim: int, heads: int, window: tuple[int, ...], shift: tuple[int, ...] | None = None, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        head_dim(dim, heads)
        self.dim, self.heads, self.window = dim, heads, sizes("window", window, len(window))
        self.shift = (0,) * len(window) if shift is None else tuple(shift)
        if len(self.shift) != len(window) or any(s < 0 or s >= w for s, w in zip(self.shift, self.window)):
            raise ValueError(f"shift={shift} must be one number for each axis, from 0 to below window={window}")
        self.qkv = linear(dim, 3 * dim, qkv_bias)
        self.proj = linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """What is added to `(B, prod(grid), dim)`, tokens in raster order."""
        grid = sizes("grid", grid, len(self.window))
        check_tokens(x, self.dim, grid)
        groups = _groups.windows(grid, self.window, self.shift, x.device)
        q, k, v = split(self.qkv(groups.apply(x)), 3, self.heads)
        return groups.undo(self.proj(groups.attention(q, k, v).flatten(2)))


class PTDiTAttention(nn.Module):
    """The attention part of a PT-DiT block but for its text cross-attention.

    Args:
        dim: Channels.
        heads: Attention heads.
        window: Tokens of a proxy along frames, height and width. The paper takes (1, 2, 2) at 256 x 256 pixels, and
            twice the height and width for each doubling of the resolution.
        attention_window: Windows of the texture complement; None: as `window`.
        proxy: As of `ProxyAttention`.
        qkv_bias: Whether the projections of q, k and v have a bias.

    Raises:
        ValueError: `heads` does not divide `dim`, or sizes are not positive.
    """

    paper = (
        "Qihoo-T2X: An Efficiency-Focused Diffusion Transformer via Proxy Tokens for Text-to-Any-Task"
        " (arXiv 2409.04005)"
    )

    def __init__(
        self,
        dim: int,
        heads: int,
        window: tuple[int, int, int] = (1, 2, 2),
        attention_window: tuple[int, int, int] | None = None,
        proxy: Proxy = "mean",
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        inner = window if attention_window is None else attention_window
        inner = sizes("attention_window", inner, 3)  # type: ignore[assignment]
        shift = tuple(n // 2 for n in inner)
        self.proxy = ProxyAttention(dim, heads, window, proxy, qkv_bias)
        self.window = WindowAttention(dim, heads, inner, None, qkv_bias)
        self.shifted_window = WindowAttention(dim, heads, inner, shift, qkv_bias)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(3))

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """The stream `(B, F * H * W, dim)` with all three attentions added; tokens in raster order of (F, H, W)."""
        check_tokens(x, self.proxy.dim, grid)
        for norm, attention in zip(self.norms, (self.proxy, self.window, self.shifted_window)):
            x = x + attention(norm(x), grid)
        return x
