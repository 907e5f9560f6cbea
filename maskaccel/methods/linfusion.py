"""LinFusion: generalised linear attention (Liu et al. 2024, arXiv 2409.02097, section 3.3).

    q = elu(W_q (x + f_q(x))) + 1,   k = elu(W_k (x + f_k(x))) + 1,
    O = q (k^T v / N) / (q . mean(k) + 1e-4)

with N keys and f a small MLP (linear, LayerNorm, LeakyReLU, linear). The mean over the keys makes it independent of the
resolution, and it looks both ways.

Inferred: the width of f, a quarter of the channels, and that its last layer starts at 0, so that a converted layer
starts from the projections of the attention it replaces.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.attention import linear_attention
from ..ops.attention.check import HEAD_DIMS
from ._layers import head_dim, linear, split


def _feature_branch(dim: int, width: int) -> nn.Sequential:
    last = linear(width, dim)
    nn.init.zeros_(last.weight)
    return nn.Sequential(linear(dim, width), nn.LayerNorm(width), nn.LeakyReLU(), last)


class LinFusionAttention(nn.Module):
    """Normalised linear attention in place of the self-attention of a U-Net or DiT.

    Args:
        dim: Channels.
        heads: Attention heads.
        branch_dim: Width of the MLPs f; None: `dim // 4`.
        qkv_bias: Whether the projections of q, k and v have a bias (Stable Diffusion's have none).
        eps: Added to the denominator.

    Raises:
        ValueError: `heads` does not divide `dim`.
    """

    paper = "LinFusion: 1 GPU, 1 Minute, 16K Image (arXiv 2409.02097)"

    def __init__(
        self, dim: int, heads: int, *, branch_dim: int | None = None, qkv_bias: bool = False, eps: float = 1e-4
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.eps = dim, heads, eps
        self.backend = None if head_dim(dim, heads) in HEAD_DIMS else "reference"
        branch_dim = dim // 4 if branch_dim is None else branch_dim
        self.to_q, self.to_k, self.to_v = (linear(dim, dim, qkv_bias) for _ in range(3))
        self.f_q, self.f_k = _feature_branch(dim, branch_dim), _feature_branch(dim, branch_dim)
        self.to_out = linear(dim, dim)

    @classmethod
    def from_attention(cls, attention: nn.Module) -> LinFusionAttention:
        """The layer that starts from a diffusers `Attention`: its heads and its four projections.

        Raises:
            TypeError: `attention` has no linear `to_q`, `to_k`, `to_v` and `to_out[0]` of one width.
        """
        try:
            parts = [attention.get_submodule(name) for name in ("to_q", "to_k", "to_v", "to_out.0")]
        except AttributeError:
            parts = []
        linears = [part for part in parts if isinstance(part, nn.Linear)]
        dims = {n for part in linears for n in (part.in_features, part.out_features)}
        if len(linears) != 4 or len(dims) != 1:
            raise TypeError(
                f"attention is a {type(attention).__name__}; it must have the linears to_q, to_k, to_v and to_out[0],"
                " of one width"
            )
        to_q, _, _, to_out = linears
        made = cls(dims.pop(), int(attention.heads), qkv_bias=to_q.bias is not None)  # type: ignore[arg-type]
        made.to(device=to_q.weight.device, dtype=to_q.weight.dtype)
        for mine, theirs in zip((made.to_q, made.to_k, made.to_v, made.to_out), linears):
            mine.load_state_dict(theirs.state_dict(), strict=theirs is not to_out or to_out.bias is not None)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Attention of `(B, S, dim)`; returns that shape."""
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, S, {self.dim})")
        projected = (self.to_q(x + self.f_q(x)), self.to_k(x + self.f_k(x)), self.to_v(x))
        q, k, v = (split(t, 1, self.heads)[0] for t in projected)
        out = linear_attention(q, k, v, feature_map="elu1", normalize="mean", eps=self.eps, backend=self.backend)
        return self.to_out(out.flatten(2))
