"""LiT: a DiT with linear attention (Wang et al. 2025, arXiv 2501.12976).

    O = relu(Q) (relu(K)^T V) / (relu(Q) sum relu(K)) + DWConv(V)

with few heads and a depth-wise 5 x 5 convolution of the values. A LiT starts from the weights of a trained DiT, all but
those of the linear attention, and is trained further by distilling its noise and variance.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.attention import linear_attention
from ..ops.attention.check import HEAD_DIMS
from ._layers import check_tokens, convolve, depthwise, head_dim, linear, sizes, split


class LiTAttention(nn.Module):
    """ReLU linear attention with a depth-wise convolution of the values.

    Args:
        dim: Channels.
        heads: Attention heads; the paper takes 2 or 3, with far more channels each than a DiT. Kernels take up to 256
            channels a head; above that two matrix products of torch do.
        kernel: Size of the convolution.
        qkv_bias: Whether the projections of q, k and v have a bias.
        eps: Added to the denominator.

    Raises:
        ValueError: `heads` does not divide `dim`.
    """

    paper = "LiT: Delving into a Simplified Linear Diffusion Transformer for Image Generation (arXiv 2501.12976)"

    def __init__(self, dim: int, heads: int = 2, *, kernel: int = 5, qkv_bias: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        width = head_dim(dim, heads)
        self.dim, self.heads, self.eps = dim, heads, eps
        self.backend = None if width in HEAD_DIMS else "reference"
        self.qkv = linear(dim, 3 * dim, qkv_bias)
        self.proj = linear(dim, dim)
        self.dwc = depthwise(dim, kernel)

    @classmethod
    def from_attention(cls, attention: nn.Module, heads: int = 2, *, projections: bool = False) -> LiTAttention:
        """The layer that takes the place of a DiT's attention (`qkv` and `proj`, as timm names them).

        Args:
            attention: Attention of a DiT block.
            heads: Heads of the linear attention.
            projections: Also start from its projections, which the paper does not: its linear attention is new. They
                have the same shapes whatever the heads.

        Raises:
            TypeError: `attention` has no linear `qkv` and `proj`.
        """
        qkv, proj = (getattr(attention, name, None) for name in ("qkv", "proj"))
        if not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear):
            raise TypeError(f"attention is a {type(attention).__name__}; it must have the linears qkv and proj")
        made = cls(qkv.in_features, heads, qkv_bias=qkv.bias is not None)
        made.to(device=qkv.weight.device, dtype=qkv.weight.dtype)
        if projections:
            made.qkv.load_state_dict(qkv.state_dict())
            made.proj.load_state_dict(proj.state_dict())
        return made

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attention of `(B, H * W, dim)`, tokens in raster order of the grid (H, W); returns that shape."""
        grid = sizes("grid", grid, 2)  # type: ignore[assignment]
        check_tokens(x, self.dim, grid)
        q, k, v = split(self.qkv(x), 3, self.heads)
        out = linear_attention(q, k, v, feature_map="relu", eps=self.eps, backend=self.backend).flatten(2)
        return self.proj(out + convolve(self.dwc, v.flatten(2), grid))
