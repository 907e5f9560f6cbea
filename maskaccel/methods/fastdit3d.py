"""FastDiT-3D: voxel-aware masking (Mo et al. 2023, arXiv 2312.07231, section 3.2).

Most voxels of a shape are empty (97.66 % in the paper's data), so foreground and background tokens are dropped at
ratios of their own, r_f = 0.95 and r_b = 0.99. The encoder attends globally among the kept tokens; the decoder, small
and partly with windows, sees all tokens. Samples keep different numbers of tokens: the index is ragged, its slots a
capacity that is known on the host.

    kept of a class = round((1 - r) tokens of the class)

The decoder (4 blocks of 384 channels, every other one with windows of 4^3) is MaskDiT's with `DiT3DAttention`. The MLPs
of the multi-category model are mixtures of experts (`ExpertChoiceMLP` is one; the paper routes by token as well).

Inferred (no code was published): the rounding, at least one token of each class that is there, and which blocks have
windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .. import ops
from ..masks import TokenIndex
from ._layers import check_tokens, sizes
from ._transformer import AdaLNBlock, AdaLNLinear, padding_bias, sincos
from .dit3d import DiT3DAttention
from .maskdit import MaskDiTDecoder


@dataclass(frozen=True)
class VoxelAware:
    """Foreground and background tokens, dropped at ratios of their own.

    Attributes:
        background: Dropped part of the tokens without an occupied voxel.
        foreground: Dropped part of the others.
    """

    background: float = 0.99
    foreground: float = 0.95

    def __post_init__(self) -> None:
        if not (0 <= self.background < 1 and 0 <= self.foreground < 1):
            raise ValueError(
                f"background={self.background}, foreground={self.foreground}: both must lie in [0, 1), the dropped part"
            )

    @staticmethod
    def occupied(voxels: Tensor, patch: int) -> Tensor:
        """Whether a patch holds an occupied voxel: bool `(B, tokens)` of `(B, X, Y, Z)`, in raster order.

        Raises:
            ValueError: `patch` does not divide the grid.
        """
        if voxels.dim() != 4 or any(n % patch for n in voxels.shape[1:]):
            raise ValueError(f"voxels have shape {tuple(voxels.shape)}; patch={patch} must divide X, Y and Z of it")
        return nn.functional.max_pool3d((voxels != 0).float()[:, None], patch).flatten(1) > 0

    def capacity(self, n: int, occupancy: float = 1.0, multiple: int = 1) -> int:
        """Slots that hold what any sample keeps whose part of foreground tokens is at most `occupancy`."""
        if not 0 <= occupancy <= 1:
            raise ValueError(f"occupancy={occupancy} must lie in [0, 1]")
        least = min(self.background, self.foreground)
        front = n * occupancy if self.foreground <= self.background else n
        most = (1 - least) * front + (1 - self.background) * (n - front) + 1
        return min(n, multiple * math.ceil(max(most, 2) / multiple))

    def choose(self, occupied: Tensor, capacity: int, *, seed: int, step: int, offset: int = 0) -> TokenIndex:
        """The kept tokens, a ragged index.

        Args:
            occupied: bool `(B, N)`.
            capacity: Slots of each sample, see `capacity`; what goes beyond is dropped.
            seed: Of the draw.
            step: Training step.
            offset: Number of this rank's first sample.
        """
        batch, n = occupied.shape
        return ops.random_keep(
            batch, n, (1 - self.background, 1 - self.foreground), seed=seed, step=step, sample_offset=offset,
            scheme="classes", labels=occupied.int(), capacity=capacity, device=occupied.device,
        )  # fmt: skip


class FastDiT3DDecoder(MaskDiTDecoder):
    """The decoder over all voxel tokens: MaskDiT's, some of its blocks with windows.

    Args:
        dim: Channels of the encoder.
        grid: Tokens along x, y and z.
        out: Values of a patch.
        width: Channels.
        depth: Blocks.
        heads: Attention heads.
        window: Side of the windows.
        windowed: Which blocks have windows.
    """

    paper = (
        "Fast Training of Diffusion Transformer with Extreme Masking for 3D Point Clouds Generation (arXiv 2312.07231)"
    )

    def __init__(
        self,
        dim: int,
        grid: Sequence[int],
        out: int,
        *,
        width: int = 384,
        depth: int = 4,
        heads: int = 6,
        window: int = 4,
        windowed: Sequence[int] = (0, 2),
    ) -> None:
        x, y, z = sizes("grid", tuple(grid), 3)
        super().__init__(dim, (x, y, z), out, width=width, depth=depth, heads=heads)
        self.decoder_layer = AdaLNLinear(dim, width, zero=False)
        for i in windowed:
            block = self.decoder_blocks[i]
            assert isinstance(block, AdaLNBlock)
            block.attn = DiT3DAttention(width, heads, (x, y, z), window)


class FastDiT3DTransformer(nn.Module):
    """Encoder with global attention among the kept tokens, and the decoder over all.

    Args:
        dim: Channels of the encoder (1152 in XL).
        depth: Blocks of the encoder (28).
        heads: Attention heads of the encoder (16).
        grid: Tokens along x, y and z.
        out: Values of a patch.
        mlp_ratio: Hidden channels of the encoder's MLPs by channels.
        decoder: The decoder; None: that of the paper.
    """

    paper = FastDiT3DDecoder.paper

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        grid: Sequence[int],
        out: int,
        *,
        mlp_ratio: float = 4.0,
        decoder: FastDiT3DDecoder | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.grid = dim, sizes("grid", tuple(grid), 3)
        self.register_buffer("pos_embed", sincos(self.grid, dim), persistent=False)
        self.blocks = nn.ModuleList(AdaLNBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.decoder = decoder or FastDiT3DDecoder(dim, self.grid, out)

    def forward(self, x: Tensor, c: Tensor, index: TokenIndex | None = None) -> Tensor:
        """Patches of all tokens.

        Slots of a ragged index that hold no token are attended to by none.

        Args:
            x: Embedded tokens without positions `(B, N, dim)`.
            c: Condition `(B, dim)`.
            index: Of `VoxelAware.choose`; None: all tokens (sampling).

        Returns:
            `(B, N, out)`.
        """
        check_tokens(x, self.dim, self.grid)
        index = TokenIndex.all(x.shape[1], x.device) if index is None else index
        x = index.gather(x + self.get_buffer("pos_embed").to(x.dtype))
        bias = None if index.counts is None else padding_bias(index.keep < index.n)
        for block in self.blocks:
            x = block(x, c, bias=bias)
        return self.decoder(x, c, index)
