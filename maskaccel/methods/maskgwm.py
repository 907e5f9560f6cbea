"""MaskGWM: temporal attention of a driving world model (Ni et al. 2025, arXiv 2502.11663; OpenDWM's code).

Tokens of a video lie on a grid (T, H, W). Temporal attention is one of

* point-wise: a place over time, `((b h w) t)`;
* row-wise: a row of every frame, `((b h) (t w))`, which lets what moves sideways be followed;
* full: all tokens.

In training a part of the tokens is dropped until 5 blocks before the last one (`MaskGWMMasks`). Row-wise masking keeps
equally many tokens of every row, so the kept tokens are a grid again, of smaller W: layers take the grid of the call.
The authors sort the kept ids by their random keys; ascending ids, as here, are what keeps rows apart. Dropped tokens
come back as mask tokens that hold a part of their noise, and through side blocks (`MaskGWMReconstruction`).

Left out: cross-attention of the side blocks to views and text.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .. import ops
from ..masks import TokenIndex
from . import _groups
from ._layers import check_tokens, head_dim, linear, sizes, split
from ._masked_rows import partial_block
from ._ratios import kept_tokens, uniform
from ._transformer import AdaLNBlock, sincos

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


# ------------------------------------------------------------------------------------------------------ masking
Masking = Literal["constant", "frames", "rows", "mixed"]


@dataclass(frozen=True)
class MaskGWMMasks:
    """Which tokens of a video are kept in training.

    Attributes:
        ratio: Dropped part of the tokens of each row; as many are kept of every row, `floor(W (1 - ratio))`, so that
            they are a grid of smaller W (`grid` of the index).
        kind: `"constant"`: the same tokens in all frames. `"rows"`: others in each frame. `"mixed"`: each sample is one
            of the two, constant with probability `constant`. `"frames"`: as many of each frame, but not of each row.
        constant: Of `"mixed"`.
        seed: Of the draws.
    """

    ratio: float = 0.25
    kind: Masking = "mixed"
    constant: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Masking):
            raise ValueError(f"kind={self.kind!r}; allowed are {', '.join(map(repr, get_args(Masking)))}")
        if not 0 <= self.ratio < 1 or not 0 <= self.constant <= 1:
            raise ValueError(f"ratio={self.ratio} must lie in [0, 1), constant={self.constant} in [0, 1]")

    def shared(self, batch: int, step: int | Tensor, *, offset: int = 0, device: Any = None) -> Tensor:
        """Which samples have the same tokens in all frames: bool `(B,)`."""
        if self.kind != "mixed":
            return torch.full((batch,), self.kind == "constant", device=device)
        return uniform(batch, seed=self.seed, step=step, offset=offset, device=device) < self.constant

    def choose(
        self, batch: int, grid: tuple[int, int, int], step: int | Tensor, *, offset: int = 0, device: Any = None
    ) -> TokenIndex:
        """The kept tokens of a step.

        Args:
            batch: Samples.
            grid: Frames, rows and columns of tokens.
            step: Training step.
            offset: Number of this rank's first sample.
            device: Of the index.
        """
        frames, height, width = sizes("grid", grid, 3)
        n = frames * height * width

        def draw(keep: int, grid: tuple[int, ...], route: int, times: int = 1) -> TokenIndex:
            return ops.random_keep(
                batch, n, keep, seed=self.seed, step=step, route=route, sample_offset=offset, scheme="row_equal",
                grid=grid, frames=times, device=device,
            )  # fmt: skip

        if self.kind == "frames":
            each = kept_tokens(height * width, self.ratio)
            return dataclasses.replace(draw(frames * each, (frames, height * width), 0), grid=(frames, each))
        columns = kept_tokens(width, self.ratio)
        keep = frames * height * columns
        found = draw(keep, (frames, height, width), 0) if self.kind != "constant" else None
        same = draw(keep, (frames, height, width), 1, frames) if self.kind != "rows" else found
        assert same is not None
        if found is not None and found is not same:
            chosen = self.shared(batch, step, offset=offset, device=found.keep.device)[:, None]
            ids, inverse = (
                torch.where(chosen, a, b) for a, b in ((same.keep, found.keep), (same.inverse, found.inverse))
            )
            same = TokenIndex(ids, inverse)
        return dataclasses.replace(same, grid=(frames, height, columns))


class MaskGWMReconstruction(nn.Module):
    """What takes the place of dropped tokens before the last blocks.

    A mask token is `a t / 1000 + b (1 - t / 1000)` of the projected noise at its place (a) and a learned one (b), plus
    a linear layer of its position. Then a spatial side block, each frame by itself, runs at the dropped tokens; with
    `temporal=True` also one over the frames of each place, and samples whose masks differ between frames take what it
    gives to the spatial block: `S = s Block(X) + (1 - s) Block_t(X)` with s = 1 for samples of constant masks.

    Args:
        dim: Channels.
        heads: Attention heads.
        grid: Frames, rows and columns of tokens.
        noise: Channels of a patch of the noise; None: the mask token is learned alone.
        temporal: Whether there is a temporal side block.
        mlp_ratio: Hidden channels of the side blocks' MLPs by channels.
    """

    paper = MaskGWMAttention.paper

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: tuple[int, int, int],
        *,
        noise: int | None = None,
        temporal: bool = False,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.grid = sizes("grid", grid, 3)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.noise_proj = linear(noise, dim) if noise else None
        self.position_proj = linear(dim, dim)
        self.register_buffer("positions", _video_positions(self.grid, dim), persistent=False)
        self.side = AdaLNBlock(dim, heads, mlp_ratio)
        self.temporal = AdaLNBlock(dim, heads, mlp_ratio) if temporal else None

    def mask_tokens(self, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """The mask token of every place, `(B, N, dim)` or `(1, N, dim)`.

        Args:
            t: Timesteps `(B,)`, 0 to 1000.
            noise: The noise of every token's patch, `(B, N, noise)`.

        Raises:
            ValueError: There is a projection of noise and no noise, or the other way round.
        """
        if (noise is None) != (self.noise_proj is None):
            raise ValueError("noise must be given to a module that was made with its channels, and to no other")
        pos = self.position_proj(self.get_buffer("positions").to(self.mask_token.dtype))
        if noise is None or self.noise_proj is None:
            return self.mask_token + pos
        part = (t.to(pos.dtype) / 1000)[:, None, None]
        return self.noise_proj(noise) * part + self.mask_token * (1 - part) + pos

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        index: TokenIndex,
        t: Tensor,
        noise: Tensor | None = None,
        shared: Tensor | None = None,
    ) -> Tensor:
        """All tokens.

        Args:
            x: Kept tokens `(B, K, dim)`.
            c: Condition `(B, dim)`.
            index: Of `MaskGWMMasks.choose`, as many tokens of every frame.
            t: Timesteps `(B,)`, 0 to 1000.
            noise: As in `mask_tokens`.
            shared: Of `MaskGWMMasks.shared`, with a temporal side block.

        Returns:
            `(B, T * H * W, dim)`.
        """
        frames, batch = self.grid[0], x.shape[0]
        tokens = self.mask_tokens(t, noise).to(x.dtype).expand(batch, -1, -1)
        x = index.merge(tokens, x)
        dropped = index.complement().expand(batch)
        of_frame = _by_frame(dropped, frames)
        side = partial_block(
            self.side, x.unflatten(1, (frames, -1)).flatten(0, 1), of_frame, c.repeat_interleave(frames, 0)
        )
        side = side.unflatten(0, (batch, frames)).flatten(1, 2)
        if self.temporal is not None:
            places = x.unflatten(1, (frames, -1)).transpose(1, 2)  # (B, H * W, T, dim)
            moved = self.temporal(places.flatten(0, 1), c.repeat_interleave(places.shape[1], 0))
            moved = dropped.gather(moved.view_as(places).transpose(1, 2).flatten(1, 2))
            same = torch.ones(batch, dtype=torch.bool, device=x.device) if shared is None else shared
            side = torch.where(same[:, None, None], side, moved)
        return dropped.merge(x, side.to(x.dtype))


def _video_positions(grid: tuple[int, ...], dim: int) -> Tensor:
    """Positions `(1, T * H * W, dim)`: a quarter of the channels for the frame, the others for the place in it."""
    time, place = sincos(grid[:1], dim // 4), sincos(grid[1:], dim - dim // 4)
    return torch.cat([time.repeat_interleave(place.shape[1], 1), place.repeat(1, grid[0], 1)], 2)


def _by_frame(index: TokenIndex, frames: int) -> TokenIndex:
    """The index of each frame by itself, `(B * T, tokens of a frame)`; all frames keep as many."""
    size = index.n // frames
    start = torch.arange(frames, dtype=torch.int32, device=index.keep.device)[:, None]
    keep = index.keep.unflatten(1, (frames, -1))
    inverse = index.inverse.unflatten(1, (frames, size))
    slots = torch.where(inverse < 0, inverse, inverse - start * keep.shape[2])
    return TokenIndex((keep - start * size).flatten(0, 1).contiguous(), slots.flatten(0, 1).contiguous())
