"""Masked cross-attention: tokens of a region see the reference tokens of that region alone.

* DreamActor-H1 (Wang et al. 2025, arXiv 2506.10568): features of a person and of a product are injected inside the
  bounding boxes of each. Tokens of two boxes see both.
* FantasyPortrait (Wang et al. 2025, arXiv 2507.12956): every frame has a few tokens of each identity; a latent token
  inside a face sees those of that identity and frame.

A token outside all regions gets 0, and query tiles without any region cost nothing. The result is added to that of the
text cross-attention, before the output projection of both, so a 0 stays a 0.

Inferred: of DreamActor-H1 only the abstract is public, so shapes and the place of the branch follow FantasyPortrait;
that the values' projection starts at 0, so that a new branch changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..masks import Segments, TileMask
from ..ops.attention import tile_attention
from ._layers import linear, split

_BLOCK = (128, 32)  # reference tokens are few


def box_regions(boxes: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Which tokens lie inside which boxes.

    Args:
        boxes: `(B, R, 4)` or, where boxes move, `(B, F, R, 4)`: top, left, bottom and right as fractions of the frame.
        grid: Frames, height and width in tokens.

    Returns:
        bool `(B, F * H * W, R)`: the centre of the token is inside.

    Raises:
        ValueError: `boxes` has another shape.
    """
    frames, height, width = grid
    if boxes.dim() == 3:
        boxes = boxes[:, None].expand(-1, frames, -1, -1)
    if boxes.dim() != 4 or boxes.shape[1] != frames or boxes.shape[3] != 4:
        raise ValueError(f"boxes has shape {tuple(boxes.shape)}; it must be (B, R, 4) or (B, {frames}, R, 4)")
    y, x = ((torch.arange(n, device=boxes.device) + 0.5) / n for n in (height, width))
    top, left, bottom, right = boxes[:, :, None, None].unbind(-1)  # (B, F, 1, 1, R)
    rows = (y[:, None, None] >= top) & (y[:, None, None] < bottom)
    return (rows & (x[:, None] >= left) & (x[:, None] < right)).flatten(1, 3)


def region_mask(regions: Tensor, tokens: Sequence[int], block: tuple[int, int] = _BLOCK) -> TileMask:
    """The mask of tokens of regions onto the reference tokens of those regions.

    Args:
        regions: bool `(B, S, R)`, as of `box_regions`.
        tokens: How many reference tokens each region has, in their order.
        block: Tile size.

    Returns:
        A mask `(S, sum(tokens))` of each sample. Made once for a video; on a GPU that waits.

    Raises:
        ValueError: `regions` is not bool `(B, S, R)` for as many regions as `tokens` has.
    """
    if regions.dim() != 3 or regions.dtype != torch.bool or regions.shape[2] != len(tokens):
        raise ValueError(
            f"regions is {regions.dtype} {tuple(regions.shape)}; for {len(tokens)} regions it must be bool (B, S, R)"
        )
    relation, classes = torch.unique(regions.flatten(0, 1), dim=0, return_inverse=True)
    of_key = torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(list(tokens))).to(regions.device)
    rule = Segments(classes.view(regions.shape[:2]), of_key, relation.to(torch.int8))
    return TileMask.from_rule(rule, (regions.shape[1], len(of_key)), block, regions.device)


def identity_mask(identities: Tensor, count: int, tokens: int, block: tuple[int, int] = _BLOCK) -> TileMask:
    """The mask of tokens of faces onto the tokens of that identity in that frame.

    Args:
        identities: int `(B, F, H, W)`: whose face each latent token shows, from 0 to `count - 1`; -1: nobody's.
        count: Identities.
        tokens: Reference tokens of an identity in a frame. The keys are `(F, count, tokens)`, flattened.
        block: Tile size.

    Returns:
        A mask `(F * H * W, F * count * tokens)` of each sample.

    Raises:
        ValueError: `identities` is not int32 or int64 `(B, F, H, W)`, or holds more than `count`.
    """
    if identities.dim() != 4 or identities.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"identities is {identities.dtype} {tuple(identities.shape)}; it must be int32 or int64 (B, F, H, W)"
        )
    if identities.numel() and int(identities.max()) >= count:
        raise ValueError(f"identities holds {int(identities.max())}; there are {count} identities")
    frames = identities.shape[1]
    frame = torch.arange(frames, device=identities.device)[:, None, None]
    of_query = torch.where(identities < 0, -1, frame * count + identities).flatten(1)
    of_key = torch.arange(frames * count, device=identities.device).repeat_interleave(tokens)
    return TileMask.from_rule(Segments(of_query, of_key), (of_query.shape[1], len(of_key)), block, identities.device)


class MaskedCrossAttention(nn.Module):
    """Keys and values of reference tokens, for the queries of a cross-attention that is there already.

    Args:
        context_dim: Channels of the reference tokens.
        heads: Attention heads, those of the queries.
        head_dim: Channels of a head.
        bias: Whether the projections have a bias.
    """

    paper = (
        "DreamActor-H1: High-Fidelity Human-Product Demonstration Video Generation via Motion-designed Diffusion"
        " Transformers (arXiv 2506.10568); FantasyPortrait (arXiv 2507.12956)"
    )

    def __init__(self, context_dim: int, heads: int, head_dim: int, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.k = linear(context_dim, heads * head_dim, bias)
        self.v = linear(context_dim, heads * head_dim, bias)
        nn.init.zeros_(self.v.weight)

    def forward(self, q: Tensor, context: Tensor, mask: TileMask) -> Tensor:
        """What the queries find in their regions.

        Args:
            q: `(B, S, heads, head_dim)`, queries of the text cross-attention.
            context: `(B, Sk, context_dim)`, reference tokens.
            mask: As of `region_mask` or `identity_mask`.

        Returns:
            `(B, S, heads, head_dim)`, 0 outside all regions: to be added to the result of the text cross-attention.
        """
        (k,), (v,) = (split(projection(context), 1, self.heads) for projection in (self.k, self.v))
        return tile_attention(q, k, v, mask)
