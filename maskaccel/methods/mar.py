"""MAR: masked autoregressive generation without vector quantisation (Li et al. 2024, arXiv 2406.11838; their code).

A masked autoencoder predicts a vector z for each token, and a small diffusion model turns z into the token. In training
a ratio of the tokens is masked that is drawn from a normal distribution of mean 1 and deviation 0.25, cut off to
[0.7, 1] (`RATIO`), one for the batch, in another order for each sample:

    encoder: [64 buffer tokens that hold the class; kept tokens] + positions
    decoder: all tokens, mask tokens for the masked ones, + positions of its own
    loss:    of the diffusion model, over the masked tokens, each with 4 draws of t and noise

The encoder runs on the kept tokens (no `nonzero`: the buffer is a prefix of the index), and the diffusion model on the
rows of masked tokens only, where the authors compute all and mask the loss.

Sampling (`mask_counts`): after step s of S, `floor(N cos(pi (s + 1) / (2 S)))` tokens are masked, at least one fewer
than before; guidance grows linearly, `1 + (w - 1) (N - masked) / N`. The order of a sample is that of the keys of
`random_keep`, whose sets of kept tokens are nested: no order is stored. The number of kept tokens grows with the steps;
`bucket` rounds it, so that fewer shapes are compiled.

Left out: the variational bound in the loss of the diffusion model (the authors train its variance), so sampling takes
the posterior's variance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..masks import TokenIndex
from ._layers import check_tokens, linear, sizes
from ._ratios import TruncatedNormal
from ._transformer import PreNormBlock, learned_token, modulation, zeroed
from .diffmae import time_mlp, timestep_embedding

RATIO = TruncatedNormal(0.7, 1.0, 1.0, 0.25)
"""The ratio of masked tokens in training."""


def mask_counts(n: int, steps: int, bucket: int = 1) -> list[int]:
    """How many of n tokens are masked before each step, and 0 after the last.

    Args:
        n: Tokens.
        steps: Steps.
        bucket: Kept tokens are a multiple of it, rounded down; steps that reveal nothing then are left out.

    Returns:
        Descending numbers from n to 0.

    Raises:
        ValueError: A number is below 1, or there are more steps than tokens.
    """
    if n < 1 or bucket < 1 or not 1 <= steps <= n:
        raise ValueError(f"n={n}, steps={steps}, bucket={bucket}: n and bucket must be positive, steps from 1 to n")
    counts = [n]
    for step in range(steps - 1):
        wanted = math.floor(n * math.cos(math.pi / 2 * (step + 1) / steps))
        counts.append(max(1, min(counts[-1] - 1, wanted)))
    rounded = [n - bucket * ((n - count) // bucket) for count in counts]
    return [*dict.fromkeys(rounded), 0]


class _ResBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(linear(width, width), nn.SiLU(), linear(width, width))
        self.adaLN_modulation = modulation(width, 3 * width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, -1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class DiffusionHead(nn.Module):
    """The diffusion model of a token: an MLP with adaLN, trained to predict noise under a cosine schedule.

    Args:
        values: Channels of a token.
        dim: Channels of z.
        width: Channels of the MLP.
        depth: Residual blocks.
        steps: Steps of the process.
    """

    def __init__(self, values: int, dim: int, width: int = 1024, depth: int = 3, steps: int = 1000) -> None:
        super().__init__()
        self.values, self.steps = values, steps
        self.time, self.cond, self.input = time_mlp(width), linear(dim, width), linear(values, width)
        self.blocks = nn.ModuleList(_ResBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation, self.out = modulation(width, 2 * width), zeroed(linear(width, values))
        at = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
        level = at.cos().square()
        beta = (1 - level[1:] / level[:-1]).clamp(max=0.999)
        self.register_buffer("levels", (1 - beta).cumprod(0).float(), persistent=False)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Noise of `(R, values)` at timesteps `(R,)` given z `(R, dim)`."""
        y = self.time(timestep_embedding(t, 256).to(x.dtype)) + self.cond(z)
        x = self.input(x)
        for block in self.blocks:
            x = block(x, y)
        shift, scale = self.adaLN_modulation(y).chunk(2, -1)
        return self.out(self.norm(x) * (1 + scale) + shift)

    def noised(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """`sqrt(abar_t) x + sqrt(1 - abar_t) noise`."""
        level = self.get_buffer("levels")[t][:, None].to(x.dtype)
        return level.sqrt() * x + (1 - level).sqrt() * noise

    def loss(self, z: Tensor, target: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The squared error of the noise, `(R,)`: one value for each row."""
        return (self(self.noised(target, t, noise), t, z) - noise).square().mean(1)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        steps: int = 100,
        *,
        temperature: float = 1.0,
        guidance: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Tokens for z by ancestral sampling on evenly spaced timesteps.

        Args:
            z: `(R, dim)`; with guidance `(2 R, dim)`: conditional rows, then unconditional ones.
            steps: Number of steps.
            temperature: Factor of the noise that is added in every step.
            guidance: Scale w of `e_u + w (e_c - e_u)`; 1 is none.
            generator: Of the noise.

        Returns:
            `(R, values)`.
        """
        rows = z.shape[0] // 2 if guidance != 1.0 else z.shape[0]

        def noise() -> Tensor:
            return torch.randn(rows, self.values, device=z.device, dtype=z.dtype, generator=generator)

        x, levels = noise(), self.get_buffer("levels").to(z.dtype)
        chosen = torch.linspace(0, self.steps - 1, min(steps, self.steps)).round().long().tolist()
        for i in reversed(range(len(chosen))):
            t = torch.full((z.shape[0],), chosen[i], device=z.device)
            e = self(x if guidance == 1.0 else torch.cat([x, x]), t, z)
            if guidance != 1.0:
                e_cond, e_null = e.chunk(2)
                e = e_null + guidance * (e_cond - e_null)
            level = levels[chosen[i]]
            before = levels[chosen[i - 1]] if i else torch.ones_like(level)
            clean = (x - (1 - level).sqrt() * e) / level.sqrt()
            step = 1 - level / before
            x = (before.sqrt() * step * clean + (1 - step).sqrt() * (1 - before) * x) / (1 - level)
            if i:
                x = x + temperature * (step * (1 - before) / (1 - level)).sqrt() * noise()
        return x


class MAR(nn.Module):
    """The masked autoencoder and its diffusion head.

    Args:
        values: Channels of a token (16 times the square of the patch).
        grid: Sizes of the grid of tokens.
        dim: Channels (1024 in L).
        depth: Blocks of the encoder, and of the decoder (16).
        heads: Attention heads (16).
        buffer: Buffer tokens.
        draws: Draws of t and noise for each masked token in training.
        mlp_ratio: Hidden channels of the MLPs by channels.
        head_width: Channels of the diffusion head.
        head_depth: Residual blocks of the diffusion head.
        head_process: Steps of its process.
    """

    paper = "Autoregressive Image Generation without Vector Quantization (arXiv 2406.11838)"

    def __init__(
        self,
        values: int,
        grid: Sequence[int],
        dim: int = 1024,
        depth: int = 16,
        heads: int = 16,
        *,
        buffer: int = 64,
        draws: int = 4,
        mlp_ratio: float = 4.0,
        head_width: int = 1024,
        head_depth: int = 3,
        head_process: int = 1000,
    ) -> None:
        super().__init__()
        self.grid = sizes("grid", grid, len(tuple(grid)))
        self.buffer, self.draws, self.tokens = buffer, draws, math.prod(self.grid)

        def positions(count: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(1, count, dim) * 0.02)

        self.embed, self.embed_norm = linear(values, dim), nn.LayerNorm(dim, eps=1e-6)
        self.pos_embed = positions(buffer + self.tokens)
        self.encoder_blocks = nn.ModuleList(PreNormBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed, self.mask_token = linear(dim, dim), learned_token(dim)
        self.decoder_pos_embed, self.head_pos_embed = positions(buffer + self.tokens), positions(self.tokens)
        self.decoder_blocks = nn.ModuleList(PreNormBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.head = DiffusionHead(values, dim, head_width, head_depth, head_process)

    def visible(
        self, batch: int, masked: int, *, seed: int, step: int = 0, offset: int = 0, device: Any = None
    ) -> TokenIndex:
        """The buffer and the tokens that are not masked, among `buffer + N`; those of one step are nested.

        Args:
            batch: Samples.
            masked: How many tokens are masked, up to all of them.
            seed: Of the order.
            step: Training step; of a sampling run, a constant.
            offset: Number of this rank's first sample.
            device: Of the index.
        """
        keep = self.tokens - masked
        if keep == 0:
            rows = torch.arange(self.buffer, device=device)
            return TokenIndex.from_keep(rows, self.buffer + self.tokens)
        index = ops.random_keep(batch, self.tokens, keep, seed=seed, step=step, sample_offset=offset, device=device)
        return index.shift(self.buffer)

    def encode(self, tokens: Tensor, condition: Tensor, index: TokenIndex) -> Tensor:
        """The kept rows.

        Args:
            tokens: `(B, N, values)`; what masked ones hold is not read.
            condition: Embedding `(B, dim)` of the class, which fills the buffer; or all that it holds, `(B, buffer,
                dim)`.
            index: Of `visible`.

        Returns:
            `(B, buffer + kept, dim)`.
        """
        check_tokens(tokens, self.head.values, self.grid)
        if condition.dim() == 2:
            condition = condition[:, None].expand(-1, self.buffer, -1)
        if condition.shape[1] != self.buffer:
            raise ValueError(
                f"condition has shape {tuple(condition.shape)}; it must be (B, D) or (B, {self.buffer}, D)"
            )
        x = torch.cat([condition, self.embed(tokens)], 1)
        x = self.embed_norm(index.gather(x) + index.gather(self.pos_embed.to(x.dtype)))
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, x: Tensor, index: TokenIndex) -> Tensor:
        """What predicts each token, z `(B, N, dim)`, from the kept rows."""
        x = self.decoder_embed(x)
        pos = self.decoder_pos_embed
        x = ops.scatter_merge(None, x, index, mode="mask_token", mask_token=self.mask_token, pos=pos)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.buffer :] + self.head_pos_embed.to(x.dtype)

    def loss(
        self,
        tokens: Tensor,
        condition: Tensor,
        index: TokenIndex,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The mean loss of the diffusion head over the masked tokens, a scalar.

        Args:
            tokens: `(B, N, values)`.
            condition: As of `encode`.
            index: Of `visible`.
            generator: Of timesteps and noise.
        """
        z = self.decode(self.encode(tokens, condition, index), index)
        batch, n, buffer = tokens.shape[0], self.tokens, self.buffer
        masked = n - (index.kept - buffer)
        hidden = TokenIndex.from_mask(~index.mask[:, buffer:], capacity=masked)
        z, target = (hidden.gather(t).flatten(0, 1).repeat(self.draws, 1) for t in (z, tokens))
        t = torch.randint(self.head.steps, (len(z),), device=z.device, generator=generator)
        noise = torch.randn(target.shape, device=z.device, dtype=target.dtype, generator=generator)
        assert len(z) == batch * masked * self.draws
        return self.head.loss(z, target, t, noise).mean()

    def steps(self, counts: Sequence[int], guidance: float) -> Iterator[tuple[int, int, float]]:
        """`(masked before, masked after, guidance)` of every step; guidance is linear in what is revealed."""
        for before, after in itertools.pairwise(counts):
            left = max(after, 1)
            yield before, after, 1 + (guidance - 1) * (self.tokens - left) / self.tokens

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        null: Tensor | None = None,
        *,
        steps: int = 64,
        guidance: float = 1.0,
        temperature: float = 1.0,
        head_steps: int = 100,
        bucket: int = 1,
        seed: int = 0,
        generator: torch.Generator | None = None,
        on_step: Callable[[Tensor, TokenIndex], None] | None = None,
    ) -> Tensor:
        """Generate tokens.

        Args:
            condition: As of `encode`.
            null: The same for no class, needed with guidance.
            steps: Steps.
            guidance: Scale at the end; 1 is none.
            temperature: Of the diffusion head.
            head_steps: Steps of the diffusion head.
            bucket: As in `mask_counts`.
            seed: Of the orders.
            generator: Of the noise.
            on_step: Called with the tokens and the index of each step before it.

        Returns:
            `(B, N, values)`.

        Raises:
            ValueError: Guidance without `null`.
        """
        guided = guidance != 1.0
        if guided and null is None:
            raise ValueError(f"guidance={guidance} needs null, the embedding of no class")
        batch, device = condition.shape[0], condition.device
        whole = torch.cat([condition, null]) if guided and null is not None else condition
        tokens = condition.new_zeros(batch, self.tokens, self.head.values)
        for before, after, scale in self.steps(mask_counts(self.tokens, steps, bucket), guidance):
            index = self.visible(batch, before, seed=seed, device=device)
            if on_step is not None:
                on_step(tokens, index)
            twice = _twice(index) if guided else index
            z = self.decode(self.encode(torch.cat([tokens] * 2) if guided else tokens, whole, twice), twice)
            later = self.visible(batch, after, seed=seed, device=device)
            revealed = TokenIndex.from_mask(
                (later.mask & ~index.mask)[:, self.buffer :].expand(batch, -1), capacity=before - after
            )
            rows = (_twice(revealed) if guided else revealed).gather(z)
            # conditional rows, then unconditional ones
            drawn = self.head.sample(
                rows.flatten(0, 1), head_steps, temperature=temperature, guidance=scale if guided else 1.0,
                generator=generator,
            )  # fmt: skip
            tokens = revealed.merge(tokens, drawn.unflatten(0, (batch, -1)))
        return tokens


def _twice(index: TokenIndex) -> TokenIndex:
    """The index of a batch and the same batch again."""
    if index.batch == 1:
        return index
    keep, inverse = (torch.cat([t, t]) for t in (index.keep, index.inverse))
    return TokenIndex(keep, inverse, prefix=index.prefix)
