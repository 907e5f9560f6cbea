"""Mask2Former: masked attention (Cheng et al. 2022, arXiv 2112.01527, equations 1 and 2).

    X_l = softmax(M_{l-1} + Q K^T) V + X_{l-1},   M = 0 where the mask that layer l - 1 predicted is 1, else -inf

The mask of a query is its predicted mask, resized to the features, where its sigmoid is 0.5 or more; a query whose mask
is empty sees everything. The mask is another in every layer and is made without waiting for the device.

Queries next to each other look at different places, so nearly every tile is kept in part: the layer is exact, but costs
what dense attention does.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..masks import TileMask
from ..masks.tiles import DEFAULT_BLOCK
from ..ops.attention import tile_attention
from ._layers import head_dim, linear, split


def predicted_mask(logits: Tensor, size: tuple[int, int], block: tuple[int, int] = DEFAULT_BLOCK) -> TileMask:
    """The mask of attention from predicted masks.

    Args:
        logits: `(B, Q, h, w)`, masks that the layer before predicted; they get no gradient.
        size: Height and width of the features that are attended to.
        block: Tile size.

    Returns:
        A mask `(Q, height * width)` of each sample, for all heads.

    Raises:
        ValueError: `logits` has another shape.
    """
    if logits.dim() != 4:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be (B, Q, h, w)")
    resized = nn.functional.interpolate(logits.detach(), size=size, mode="bilinear", align_corners=False)
    seen = resized.sigmoid() >= 0.5
    return TileMask.from_bool(seen.flatten(2)[:, None], block, empty_rows="dense", unique=False)


class Mask2FormerAttention(nn.Module):
    """Masked cross-attention of a decoder layer, with its residual and norm.

    Args:
        dim: Channels (256 in the paper).
        heads: Attention heads (8 in the paper).

    Raises:
        ValueError: `heads` does not divide `dim`.
    """

    paper = "Masked-attention Mask Transformer for Universal Image Segmentation (arXiv 2112.01527)"

    def __init__(self, dim: int = 256, heads: int = 8) -> None:
        super().__init__()
        head_dim(dim, heads)
        self.dim, self.heads = dim, heads
        self.q, self.k, self.v, self.out = (linear(dim, dim) for _ in range(4))
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        queries: Tensor,
        features: Tensor,
        mask: TileMask,
        query_pos: Tensor | None = None,
        feature_pos: Tensor | None = None,
    ) -> Tensor:
        """The queries after the layer.

        Args:
            queries: `(B, Q, dim)`.
            features: `(B, height * width, dim)`, of one level of the pyramid.
            mask: As of `predicted_mask`.
            query_pos: Embedding of the queries, added to them for the scores alone.
            feature_pos: Positions of the features, added for the scores alone.
        """
        seeking = queries if query_pos is None else queries + query_pos
        found = features if feature_pos is None else features + feature_pos
        projected = (self.q(seeking), self.k(found), self.v(features))
        q, k, v = (split(t, 1, self.heads)[0] for t in projected)
        return self.norm(queries + self.out(tile_attention(q, k, v, mask).flatten(2)))
