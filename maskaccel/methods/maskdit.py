"""MaskDiT: fast training with masked transformers (Zheng et al. 2023, arXiv 2306.09305; the authors' code).

An encoder (the blocks of a DiT) sees the kept tokens, half of them in training; a small decoder sees all:

    z = Linear(modulate(norm(encoder(kept)))),  h = decoder(restore(z, mask token) + positions),  D = last layer(h)

with 8 blocks of 512 channels and 16 heads for DiT-XL, and fixed sine-cosine positions. The loss (equation 4) is that of
denoising score matching on the kept patches plus `lambda = 0.1` times that of a masked autoencoder on the dropped
ones, whose target is the *noised* image, each patch normalised:

    L = mean_kept(w (D - y)^2) + 0.1 mean_dropped((D - norm(y + n))^2)

Then the model is trained on with a ratio of 0, or one that falls to it (`RatioSchedule`, cosine^4 from 0.5). Sampling
is dense. `MaskDiT` is a patch of another DiT, whose last blocks are the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..masks import TokenIndex
from ..patching import Context
from ..patching.span import blocks_left
from ._layers import check_tokens, sizes
from ._masked_rows import patches, per_token, token_mean
from ._ratios import RatioSchedule
from ._transformer import AdaLNBlock, AdaLNLinear, learned_token, sincos, touched
from .mdt import MaskTokenRoute

RATIO = RatioSchedule(0.5, kind="constant")
"""The ratio of pretraining."""

TUNING = RatioSchedule(0.5, 0.0, kind="cosine", power=4)
"""The ratio of the unmasking stage; `steps` is to be set (`dataclasses.replace`)."""

MAE_WEIGHT = 0.1
"""Weight of the loss on dropped patches."""


class MaskDiTDecoder(nn.Module):
    """From the encoder's kept tokens to the patches of all tokens.

    Args:
        dim: Channels of the encoder.
        grid: Sizes of the grid of tokens.
        out: Values of a patch, such as `patch * patch * channels`.
        width: Channels of the decoder.
        depth: Blocks.
        heads: Attention heads.
        mlp_ratio: Hidden channels of the MLPs by channels.
    """

    paper = "Fast Training of Diffusion Models with Masked Transformers (arXiv 2306.09305)"

    def __init__(
        self,
        dim: int,
        grid: Sequence[int],
        out: int,
        *,
        width: int = 512,
        depth: int = 8,
        heads: int = 16,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.grid = sizes("grid", grid, len(tuple(grid)))
        self.decoder_layer = AdaLNLinear(dim, width)
        self.mask_token = learned_token(width)
        self.register_buffer("decoder_pos_embed", sincos(self.grid, width), persistent=False)
        self.decoder_blocks = nn.ModuleList(AdaLNBlock(width, heads, mlp_ratio, condition=dim) for _ in range(depth))
        self.final_layer = AdaLNLinear(width, out, condition=dim)

    def forward(self, x: Tensor, c: Tensor, index: TokenIndex | None = None) -> Tensor:
        """Patches of all tokens.

        Args:
            x: The encoder's output: kept tokens `(B, K, dim)`, or all.
            c: Condition `(B, dim)`.
            index: The kept tokens; None: all.

        Returns:
            `(B, N, out)`.
        """
        x, pos = self.decoder_layer(x, c), self.get_buffer("decoder_pos_embed")
        if index is None:
            x = touched(x + pos.to(x.dtype), self.mask_token)
        else:
            x = ops.scatter_merge(None, x, index, mode="mask_token", mask_token=self.mask_token, pos=pos)
        for block in self.decoder_blocks:
            x = block(x, c)
        return self.final_layer(x, c)


class MaskDiTTransformer(nn.Module):
    """An encoder of DiT blocks and the decoder.

    Args:
        dim: Channels (1152 in XL).
        depth: Blocks of the encoder (28).
        heads: Attention heads (16).
        grid: Sizes of the grid of tokens.
        out: Values of a patch.
        mlp_ratio: Hidden channels of the MLPs by channels.
        blocks: Blocks in place of new ones, such as those of a trained DiT, each called as `block(x, c)`.
        decoder_width: Channels of the decoder.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
    """

    paper = MaskDiTDecoder.paper

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        grid: Sequence[int],
        out: int,
        *,
        mlp_ratio: float = 4.0,
        blocks: Sequence[nn.Module] | None = None,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__()
        self.dim, self.grid = dim, sizes("grid", grid, len(tuple(grid)))
        self.register_buffer("pos_embed", sincos(self.grid, dim), persistent=False)
        self.blocks = nn.ModuleList(blocks or (AdaLNBlock(dim, heads, mlp_ratio) for _ in range(depth)))
        self.decoder = MaskDiTDecoder(
            dim, grid, out, width=decoder_width, depth=decoder_depth, heads=decoder_heads, mlp_ratio=mlp_ratio
        )

    def choose(
        self, batch: int, keep: int, *, seed: int, step: int, offset: int = 0, device: torch.device | str | None = None
    ) -> TokenIndex:
        """`keep` tokens of each sample, as `ops.random_keep`; `RatioSchedule.kept` says how many."""
        n = math.prod(self.grid)
        return ops.random_keep(batch, n, keep, seed=seed, step=step, sample_offset=offset, device=device)

    def forward(self, x: Tensor, c: Tensor, index: TokenIndex | None = None) -> Tensor:
        """Embedded tokens without positions `(B, N, dim)` and condition `(B, dim)` to patches `(B, N, out)`."""
        check_tokens(x, self.dim, self.grid)
        x = x + self.get_buffer("pos_embed").to(x.dtype)
        x = x if index is None else index.gather(x)
        for block in self.blocks:
            x = block(x, c)
        return self.decoder(x, c, index)


class MaskDiT(MaskTokenRoute):
    """Train a model's blocks but the last ones on half of the tokens; the last ones, the decoder, see mask tokens too.

    The decoder is as wide as the model here, where the paper's is a small one of its own. The loss is `maskdit_loss`
    with `index` of this method; `keep` may be set from step to step (`1 - RatioSchedule.ratio(step)`).

    Args:
        decoder: Blocks of the decoder.
        ratio: Dropped part of the tokens.
        options: Of `TokenRoute`.

    Raises:
        ValueError: `decoder` is below 1, `ratio` is not in [0, 1), or an argument of `TokenRoute` is not allowed.
    """

    paper = MaskDiTDecoder.paper

    def __init__(self, decoder: int = 8, ratio: float = 0.5, **options: Any) -> None:
        if decoder < 1 or not 0 <= ratio < 1:
            raise ValueError(f"decoder={decoder} must be 1 or more, ratio={ratio} in [0, 1)")
        super().__init__(0, -decoder - 1, 1.0 - ratio, **options)

    def attach(self, context: Context) -> None:
        """Plan the route."""
        blocks_left(context, self.name, "decoder", -self.end - 1)
        super().attach(context)


def edm_preconditioned(
    net: Callable[..., Tensor], noised: Tensor, sigma: Tensor, *args, sigma_data: float = 0.5, **kwargs
) -> Tensor:
    """EDM's denoiser (Karras et al. 2022, equation 7): `c_skip x + c_out F(c_in x, ln(sigma) / 4)`.

    Args:
        net: `net(x, c_noise, *args, **kwargs)` with c_noise `(B,)`.
        noised: `(B, C, H, W)`.
        sigma: `(B,)`.
        *args: Of `net`.
        sigma_data: Deviation of the data.
        **kwargs: Of `net`.
    """
    s = sigma.view(-1, *[1] * (noised.dim() - 1))
    total = s.square() + sigma_data**2
    raw = net(noised / total.sqrt(), sigma.log() / 4, *args, **kwargs)
    return noised * sigma_data**2 / total + raw * s * sigma_data / total.sqrt()


def edm_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """EDM's weight of the squared error of a denoiser."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


def maskdit_loss(
    denoised: Tensor,
    clean: Tensor,
    noised: Tensor,
    sigma: Tensor,
    index: TokenIndex | None,
    patch: int,
    *,
    mae_weight: float = MAE_WEIGHT,
    norm_pixels: bool = True,
    sigma_data: float = 0.5,
) -> Tensor:
    """Equation 4 for each sample.

    Args:
        denoised: D(y + n) `(B, C, H, W)`.
        clean: y.
        noised: y + n.
        sigma: `(B,)`, level of the noise.
        index: Kept tokens; None: all, and the loss is EDM's.
        patch: Side of a patch.
        mae_weight: lambda.
        norm_pixels: Whether the target of dropped patches is normalised, patch by patch (unbiased variance, 1e-6).
        sigma_data: Deviation of the data.

    Returns:
        `(B,)`.
    """
    error = per_token((denoised - clean).square(), patch) * edm_weight(sigma, sigma_data)[:, None]
    loss = token_mean(error, index)
    if index is None or not mae_weight:
        return loss
    target, found = patches(noised, patch), patches(denoised, patch)
    if norm_pixels:
        deviation = (target.var(-1, keepdim=True) + 1e-6).sqrt()
        target = (target - target.mean(-1, keepdim=True)) / deviation
    return loss + mae_weight * token_mean((found - target).square().mean(-1), index, dropped=True)
