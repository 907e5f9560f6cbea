"""SiT, compact: a class-conditional transformer that predicts a velocity (Ma et al. 2024, arXiv 2401.08740).

The network is DiT's (Peebles & Xie 2023, arXiv 2212.09748): patches, fixed 2-D sine-cosine positions, blocks with
adaLN-zero. With `rope=True` queries and keys are also rotated by their row and column (Su et al. 2021,
arXiv 2104.09864, over two axes).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskaccel import ops

Rope = tuple[Tensor, Tensor]


def frequencies(count: int, longest: float = 10_000.0) -> Tensor:
    """`count` angular frequencies from 1 down to 1 / longest, geometric."""
    return longest ** (-torch.arange(count, dtype=torch.float64) / count)


def waves(position: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of positions `(...)` at `width / 2` frequencies: fp32 `(..., width)`."""
    angle = position.double()[..., None] * frequencies(width // 2).to(position.device)
    return torch.cat([angle.sin(), angle.cos()], -1).float()


def grid_positions(side: int) -> tuple[Tensor, Tensor]:
    """Row and column `(side * side,)` of each token, in raster order."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return row.flatten(), column.flatten()


def rope_tables(side: int, head_dim: int) -> Rope:
    """Cos and sin `(tokens, head_dim)`: half of the channel pairs turn with the row, half with the column."""
    angles = [p.double()[:, None] * frequencies(head_dim // 4, 100.0) for p in grid_positions(side)]
    angle = torch.cat(angles, 1).repeat_interleave(2, dim=1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate neighbouring channel pairs of `(B, N, H, D)` by tables `(N, D)`, or `(B, N, D)` where samples differ."""
    cos, sin = (table.unsqueeze(-2) for table in rope)
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
    return (x * cos + turned * sin).type_as(x)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Attention(nn.Module):
    """Self-attention over all the tokens that it is given, by the kernels of maskaccel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope | None) -> Tensor:
        """Tokens `(B, N, width)` to the same, rotary tables as in `rotate`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return self.proj(ops.tile_attention(q, k, v).flatten(2))


class SiTBlock(nn.Module):
    """Attention and an MLP, each with adaLN-zero; submodules are named as in the authors' code."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = zero_modulation(width, 6)

    def forward(self, x: Tensor, c: Tensor, rope: Rope | None = None) -> Tensor:
        """Tokens `(B, N, width)`, condition `(B, width)`, rotary tables of those tokens."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rope)
        x = x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


def zero_modulation(width: int, parts: int) -> nn.Sequential:
    """Shifts, scales and gates of a condition, all 0 at the start."""
    linear = nn.Linear(width, parts * width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


class FinalLayer(nn.Module):
    """Modulated norm and projection to the pixels of a patch; zero at the start."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = zero_modulation(width, 2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens `(B, N, width)` and a condition `(B, width)` to `(B, N, outputs)`."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """The network.

    Args:
        size: Pixels of a side of the square images.
        channels: Channels of an image.
        patch: Pixels of a side of a patch; there are `(size / patch) ** 2` tokens.
        width: Channels of a token.
        depth: Blocks.
        heads: Attention heads; each has `width / heads` channels, a multiple of 8 from 16 to 256 (the kernels' sizes).
        classes: Classes; the label table has one more row, which means "no class".
        rope: Whether queries and keys are rotated by their position.

    Raises:
        ValueError: Sizes do not divide each other as said.
    """

    def __init__(
        self,
        size: int = 32,
        channels: int = 1,
        patch: int = 2,
        width: int = 192,
        depth: int = 8,
        heads: int = 6,
        classes: int = 10,
        rope: bool = False,
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"patch={patch} does not divide size={size}")
        if width % heads or width // heads not in range(16, 257, 8):
            raise ValueError(f"width={width} and heads={heads} must give heads of 16, 24, ... 256 channels")
        self.patch_size, self.side, self.inner_dim = patch, size // patch, width
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(SiTBlock(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * channels)
        row, column = (waves(p, width // 2) for p in grid_positions(self.side))
        self.register_buffer("positions", torch.cat([row, column], 1), persistent=False)
        cos, sin = rope_tables(self.side, width // heads) if rope else (None, None)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        nn.init.normal_(self.label.weight, std=0.02)

    def tokens(self, x: Tensor) -> Tensor:
        """Embedded patches `(B, N, width)` of images `(B, C, H, W)`, without positions."""
        return self.embed(x).flatten(2).transpose(1, 2)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """What the blocks know of times `(B,)` in 0..1 (1 is noise) and labels int64 `(B,)`: `(B, width)`."""
        return self.time(waves(1000 * t, 256)) + self.label(y)

    def rope(self) -> Rope | None:
        """Rotary tables of all tokens, if there are any."""
        return None if self.rope_cos is None else (self.rope_cos, self.rope_sin)

    def image(self, patches: Tensor) -> Tensor:
        """Images `(B, C, H, W)` of patches `(B, N, patch * patch * C)`, channels innermost."""
        x = patches.unflatten(-1, (self.patch_size, self.patch_size, -1)).unflatten(1, (self.side, self.side))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The velocity, shaped as the images `(B, C, H, W)`; times and labels as in `condition`."""
        x, c = self.tokens(x) + self.positions, self.condition(t, y)
        rope = self.rope()
        for block in self.blocks:
            x = block(x, c, rope)
        return self.image(self.final_layer(x, c))
