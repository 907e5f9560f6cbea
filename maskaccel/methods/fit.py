"""FiT and FiTv2: images of any size as packed tokens (Lu et al. 2024, arXiv 2402.12376; Wang et al. 2024, 2410.13925).

The authors pad every image to 256 tokens and mask the padding out in each layer. Packed, the images of a batch are one
sequence `(1, sum of lengths, D)` (`Packing`): attention has the block-diagonal mask of `masks.varlen`, modulation reads
the row of each token's image (`rows` of `norm_modulate`), and no layer computes padding. Results at the tokens of
images are the same.

A block is DiT's with 2-D RoPE, SwiGLU and, in v2, a LayerNorm of q and k and **adaLN-LoRA**: one modulation for all
blocks plus a low-rank part of each, `G(c) + B_i A_i c`. The loss is over the tokens of images: in the padded form
`mean((e m)^2) N / valid`, which is the mean over them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .. import ops
from ..masks import TileMask, varlen
from ..models._parts import add_gated, add_gated_then_norm
from ._layers import linear, remembered
from ._transformer import Attention, modulation, zeroed


@dataclass(frozen=True)
class Packing:
    """Samples of different lengths, one after the other.

    Attributes:
        grids: Height and width in tokens of each image, as numbers of the host; tokens are in raster order.
    """

    grids: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.grids or any(len(grid) != 2 or min(grid) < 1 for grid in self.grids):
            raise ValueError(f"grids={self.grids!r} must hold a height and a width, 1 or more, for each image")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each image."""
        return tuple(h * w for h, w in self.grids)

    @property
    def tokens(self) -> int:
        """Tokens of all images."""
        return sum(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each image begins, and the number of all tokens."""
        return tuple(itertools.accumulate(self.lengths, initial=0))

    def samples(self, device: torch.device | None = None) -> Tensor:
        """int32 `(tokens,)`: the image of each token."""
        parts = [torch.full((n,), i, dtype=torch.int32, device=device) for i, n in enumerate(self.lengths)]
        return torch.cat(parts)

    def mask(self, device: torch.device | None = None, block: tuple[int, int] = (128, 128)) -> TileMask | None:
        """The mask of attention within images; None for one image."""
        return None if len(self.grids) == 1 else _mask_of(self, block, torch.device(device or "cpu"))

    def places(self, device: torch.device | None = None) -> Tensor:
        """int64 `(tokens, 2)`: row and column of each token in its image."""
        parts = [torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2) for h, w in self.grids]
        return torch.cat(parts).to(device)

    def rope(self, width: int, theta: float = 10000.0, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of 2-D RoPE for heads of `width` channels, fp32 `(tokens, width / 2)`.

        The first half of the pairs turns with the row, the second with the column.

        Raises:
            ValueError: 4 does not divide `width`.
        """
        if width % 4:
            raise ValueError(f"width={width} must be divisible by 4: pairs for rows and for columns")
        frequencies = theta ** (-torch.arange(0, width // 2, 2, device=device, dtype=torch.float32) / (width // 2))
        angles = (self.places(device)[:, :, None].float() * frequencies).flatten(1)
        return angles.cos(), angles.sin()

    def pack(self, samples: Sequence[Tensor]) -> Tensor:
        """Images `(length, D)` as one sequence `(1, tokens, D)`.

        Raises:
            ValueError: Their lengths are others.
        """
        found = tuple(t.shape[0] for t in samples)
        if found != self.lengths:
            raise ValueError(f"samples have lengths {found}; the packing is of {self.lengths}")
        return torch.cat(list(samples))[None]

    def unpack(self, x: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `pack`."""
        return x[0].split(self.lengths)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `(1, tokens, ...)` over each image's tokens and all else: `(images,)`."""
        return torch.stack([part.mean() for part in self.unpack(values)])


@remembered
def _mask_of(packing: Packing, block: tuple[int, int], device: torch.device) -> TileMask:
    rule = varlen(packing.offsets, packing.offsets)
    return TileMask.from_rule(rule, (packing.tokens, packing.tokens), block, device)


class FiTBlock(nn.Module):
    """A block of FiT.

    Args:
        dim: Channels.
        heads: Attention heads.
        mlp_ratio: Hidden channels of SwiGLU are `2 / 3 * mlp_ratio` times the channels.
        rank: Channels of adaLN-LoRA; None is adaLN of the block's own (v1).
        qk_norm: Whether q and k have a LayerNorm (v2).
    """

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float = 4.0, *, rank: int | None = None, qk_norm: bool = False
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio) * 2 // 3
        self.attn = Attention(dim, heads, qk_norm="layer" if qk_norm else None)
        self.w12, self.w3 = linear(dim, 2 * hidden), linear(hidden, dim)
        first = [] if rank is None else [linear(dim, rank)]
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), *first, zeroed(linear(rank or dim, 6 * dim)))

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        *,
        samples: Tensor | None = None,
        mask: TileMask | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        common: Tensor | None = None,
    ) -> Tensor:
        """The block on packed tokens.

        Args:
            x: `(1, tokens, dim)`; or `(B, N, dim)` without `samples`.
            c: Conditions `(images, dim)`.
            samples: Of `Packing.samples`.
            mask: Of `Packing.mask`.
            rope: Of `Packing.rope`.
            common: The modulation of all blocks `(images, 6 dim)` (v2).
        """
        own = self.adaLN_modulation(c)
        modulation = own if common is None else own + common
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        y = ops.norm_modulate(x, scale_msa, shift_msa, rows=samples)
        a = self.attn(y, mask=mask, rope=None if rope is None else (*rope, None))
        x, y = add_gated_then_norm(x, a, gate_msa, scale_mlp, shift_mlp, rows=samples)
        return add_gated(x, self.w3(ops.gated_activation(self.w12(y), gate_first=True)), gate_mlp, rows=samples)


class FiTBlocks(nn.Module):
    """The blocks of a FiT over packed tokens.

    Args:
        dim: Channels (1152 in XL).
        depth: Blocks (28).
        heads: Attention heads (16).
        version: 1, or 2 for adaLN-LoRA and a LayerNorm of q and k.
        rank: Of adaLN-LoRA.
        mlp_ratio: Hidden channels of the MLPs by channels.
    """

    paper = "FiTv2: Scalable and Improved Flexible Vision Transformer for Diffusion Model (arXiv 2410.13925)"

    def __init__(
        self, dim: int, depth: int, heads: int, *, version: int = 2, rank: int = 288, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__()
        if version not in (1, 2):
            raise ValueError(f"version={version}; allowed are 1 and 2")
        second = version == 2
        self.width = dim // heads
        self.blocks = nn.ModuleList(
            FiTBlock(dim, heads, mlp_ratio, rank=rank if second else None, qk_norm=second) for _ in range(depth)
        )
        self.global_modulation = modulation(dim, 6 * dim) if second else None

    def forward(self, x: Tensor, c: Tensor, packing: Packing) -> Tensor:
        """Packed tokens `(1, tokens, dim)` with conditions `(images, dim)`."""
        samples, mask = packing.samples(x.device), packing.mask(x.device)
        rope = packing.rope(self.width, device=x.device)
        common = None if self.global_modulation is None else self.global_modulation(c)
        for block in self.blocks:
            x = block(x, c, samples=samples, mask=mask, rope=rope, common=common)
        return x
