"""The transformer block that papers on token dropping share: DiT's, over all tokens or at some query rows.

Names of submodules are those of DiT's code (`attn.qkv`, `attn.proj`, `mlp.fc1`, `mlp.fc2`, `adaLN_modulation.1`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..masks import TileMask, TokenIndex
from ..models._parts import add_gated, add_gated_then_norm
from ..ops.attention import RelativePosition, tile_attention
from ..ops.attention.check import HEAD_DIMS
from ._layers import head_dim, linear, split


def positions_of(rows: TokenIndex) -> Tensor:
    """The places of kept tokens as `qk_norm_rope` takes them: int32 `(B, K)`, or `(K,)` for all samples alike."""
    return rows.keep[0] if rows.batch == 1 else rows.keep


_NEVER = -3e4  # no score makes up for it, and its exponential is 0


def taken(x: Tensor, rows: TokenIndex | None) -> Tensor:
    """The kept rows of `(B, N, D)`; all of them without an index, and what has one row for a sample as it is."""
    return x if rows is None or x.dim() != 3 or x.shape[1] == 1 else rows.gather(x)


def padding_bias(valid: Tensor) -> Tensor:
    """Bias of scores that leaves keys out: fp32 `(B, 1, 1, M)` of bool `(B, M)`; reads no values, as a mask would."""
    return torch.where(valid, 0.0, _NEVER)[:, None, None]


def backend_of(q: Tensor) -> str | None:
    """Backend of attention: plain torch for head dims that no kernel serves."""
    return None if q.shape[-1] in HEAD_DIMS else "reference"


def linear_part(layer: nn.Module, x: Tensor, part: slice) -> Tensor:
    """Some output channels of a linear layer.

    A plain layer computes no more than them; any other (quantised, with an adapter or hooks) is called whole.
    """
    plain = type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks)
    if not plain or "forward" in layer.__dict__ or "parametrizations" in layer._modules:
        return layer(x)[..., part]
    assert isinstance(layer, nn.Linear)
    return F.linear(x, layer.weight[part], None if layer.bias is None else layer.bias[part])


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The layer, with a weight of 0."""
    nn.init.zeros_(layer.weight)
    return layer


def modulation(condition: int, outputs: int) -> nn.Sequential:
    """SiLU and a linear layer that starts at 0: adaLN-Zero's modulation vectors."""
    return nn.Sequential(nn.SiLU(), zeroed(linear(condition, outputs)))


class Attention(nn.Module):
    """Multi-head attention of tokens, or of some of them over all.

    Args:
        dim: Channels.
        heads: Attention heads.
        qkv_bias: Whether the projections of q, k and v have a bias.
        qk_norm: `"rms"` or `"layer"` for a norm of each head's q and k with a learned weight, else None.
        offsets: Number of relative offsets of a table of position biases (`relative_position`, `(heads, offsets)`,
            truncated normal of 0.02), or None for none.

    Raises:
        ValueError: `heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        qk_norm: str | None = None,
        offsets: int | None = None,
    ) -> None:
        super().__init__()
        width = head_dim(dim, heads)
        self.dim, self.heads, self.qk_norm = dim, heads, qk_norm
        self.qkv = linear(dim, 3 * dim, qkv_bias)
        self.proj = linear(dim, dim)
        self.q_norm = nn.Parameter(torch.ones(width)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(width)) if qk_norm else None
        self.relative_position: nn.Parameter | None = None
        if offsets is not None:
            self.relative_position = nn.Parameter(torch.empty(heads, offsets))
            nn.init.trunc_normal_(self.relative_position, std=0.02)

    def _project(self, x: Tensor, rows: TokenIndex | None) -> tuple[Tensor, Tensor, Tensor]:
        if rows is None:
            q, k, v = split(self.qkv(x), 3, self.heads)
            return q, k, v
        dim = self.dim
        q = linear_part(self.qkv, rows.gather(x), slice(0, dim)).unflatten(-1, (self.heads, -1))
        k, v = split(linear_part(self.qkv, x, slice(dim, 3 * dim)), 2, self.heads)
        return q, k, v

    def _turned(
        self, q: Tensor, k: Tensor, rows: TokenIndex | None, cos: Tensor | None, sin: Tensor | None, at: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        norm = self.qk_norm or "none"
        if rows is None:
            return ops.qk_norm_rope(q, k, self.q_norm, self.k_norm, cos, sin, norm=norm, positions=at)
        # Queries and keys are at different places: each with one head of itself in place of the other.
        if at is None:
            there = positions_of(rows)
        elif at.dim() == 1:
            there = at[positions_of(rows).long()].contiguous()
        else:
            there = rows.gather(at)
        q = ops.qk_norm_rope(
            q, q[:, :, :1], self.q_norm, self.q_norm, cos, sin, norm=norm, positions=None if cos is None else there
        )[0]
        k = ops.qk_norm_rope(k, k[:, :, :1], self.k_norm, self.k_norm, cos, sin, norm=norm, positions=at)[0]
        return q, k

    def forward(
        self,
        x: Tensor,
        *,
        rows: TokenIndex | None = None,
        mask: TileMask | None = None,
        places: RelativePosition | None = None,
        rope: tuple[Tensor, Tensor, Tensor | None] | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attention of `(B, N, dim)`.

        Args:
            x: Tokens.
            rows: Query rows; the result has them alone. None: all.
            mask: Which tiles attend, see `tile_attention`.
            places: Where queries and keys are on a grid; the table is this layer's `relative_position`.
            rope: `(cos, sin, positions)`, rows `positions` int32 `(N,)` or `(B, N)` (None: in order) of tables
                `(S, head dim / 2)`.
            bias: Added to the scores, such as `padding_bias`.
        """
        q, k, v = self._project(x, rows)
        if self.qk_norm or rope is not None:
            q, k = self._turned(q, k, rows, *(rope or (None, None, None)))
        if self.relative_position is not None and places is not None:
            places = places.with_table(self.relative_position)
        out = tile_attention(q, k, v, mask, bias=bias, relpos=places, backend=backend_of(q))
        return self.proj(out.flatten(2))


class Mlp(nn.Module):
    """Linear, GELU, linear.

    Args:
        dim: Channels.
        ratio: Hidden channels by channels.
        tanh: Whether GELU is the tanh approximation (DiT) or exact (vision transformers).
    """

    def __init__(self, dim: int, ratio: float = 4.0, *, tanh: bool = True) -> None:
        super().__init__()
        self.tanh = tanh
        self.fc1 = linear(dim, int(dim * ratio))
        self.fc2 = linear(int(dim * ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim)` to `(..., dim)`."""
        h = self.fc1(x)
        return self.fc2(ops.gated_activation(h, kind="gelu_tanh") if self.tanh else F.gelu(h))


class AdaLNBlock(nn.Module):
    """The adaLN-Zero block of DiT (Peebles and Xie 2023), which may run at some query rows only.

    Args:
        dim: Channels.
        heads: Attention heads.
        mlp_ratio: Hidden channels of the MLP by channels.
        condition: Channels of the condition; None: `dim`.
        skip: Whether the block first joins a long skip: `skip_linear([x, skip])` (U-ViT, MDTv2).
        cross: Whether there is cross-attention to a context between attention and MLP, without norm and gate as in
            PixArt (`cross`, its keys from the context).
        attention: Options of `Attention`.
    """

    takes_rows = True

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        condition: int | None = None,
        skip: bool = False,
        cross: bool = False,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.attn: nn.Module = Attention(dim, heads, **attention)
        self.cross = CrossAttention(dim, heads) if cross else None
        self.mlp = Mlp(dim, mlp_ratio)
        self.adaLN_modulation = modulation(condition or dim, 6 * dim)
        self.skip_linear = linear(2 * dim, dim) if skip else None

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        *,
        rows: TokenIndex | None = None,
        skip: Tensor | None = None,
        context: Tensor | None = None,
        context_bias: Tensor | None = None,
        samples: Tensor | None = None,
        **attention: Any,
    ) -> Tensor:
        """The block.

        Args:
            x: `(B, N, dim)`.
            c: Condition `(B, condition)`, `(B, N, condition)` for each token, or `(R, condition)` with `samples`.
            rows: Query rows. The result is that of the whole block at these rows, `(B, K, dim)`, and so are its
                gradients: keys and values come from all rows, the rest of the block knows single tokens only.
            skip: `(B, N, dim)` of a block with a long skip.
            context: `(B, M, dim)` of a block with cross-attention.
            context_bias: Added to its scores, such as the `padding_bias` of texts of different lengths.
            samples: int32 `(N,)` or `(B, N)`: row of `c` that belongs to each token (packed samples).
            **attention: Of `Attention.forward`.

        Returns:
            `(B, N, dim)`, or `(B, K, dim)` with `rows`.

        Raises:
            ValueError: The block needs a skip or a context and has none, or the other way round.
        """
        if (skip is None) != (self.skip_linear is None) or (context is None) != (self.cross is None):
            raise ValueError("skip and context must be given to blocks that were made for them, and to no others")
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        shift_msa, scale_msa, gate_msa, *mlp = self.adaLN_modulation(c).chunk(6, dim=-1)
        if rows is not None:
            attention["rows"] = rows
        a = self.attn(ops.norm_modulate(x, scale_msa, shift_msa, rows=samples), **attention)
        if rows is not None:
            x, gate_msa, *mlp = (taken(t, rows) for t in (x, gate_msa, *mlp))
        shift_mlp, scale_mlp, gate_mlp = mlp
        if self.cross is None:
            x, y = add_gated_then_norm(x, a, gate_msa, scale_mlp, shift_mlp, rows=samples)
        else:
            x = add_gated(x, a, gate_msa, rows=samples)
            x = x + self.cross(x, context, bias=context_bias)
            y = ops.norm_modulate(x, scale_mlp, shift_mlp, rows=samples)
        return add_gated(x, self.mlp(y), gate_mlp, rows=samples)


class CrossAttention(nn.Module):
    """Attention of tokens to a context.

    Args:
        dim: Channels.
        heads: Attention heads.
        context: Channels of the context; None: `dim`.
        offsets: As in `Attention`.
    """

    def __init__(self, dim: int, heads: int, context: int | None = None, offsets: int | None = None) -> None:
        super().__init__()
        head_dim(dim, heads)
        self.heads = heads
        self.q = linear(dim, dim)
        self.kv = linear(context or dim, 2 * dim)
        self.proj = linear(dim, dim)
        self.relative_position: nn.Parameter | None = None
        if offsets is not None:
            self.relative_position = nn.Parameter(torch.empty(heads, offsets))
            nn.init.trunc_normal_(self.relative_position, std=0.02)

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, M, heads, head dim)` of a context: what may be remembered while it stays the same."""
        k, v = split(self.kv(context), 2, self.heads)
        return k, v

    def forward(
        self,
        x: Tensor,
        memory: Tensor | tuple[Tensor, Tensor],
        mask: TileMask | None = None,
        places: RelativePosition | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """`(B, N, dim)` attends to a context `(B, M, context)`, or to what `keys` gave for it."""
        k, v = memory if isinstance(memory, tuple) else self.keys(memory)
        q = self.q(x).unflatten(-1, (self.heads, -1))
        if self.relative_position is not None and places is not None:
            places = places.with_table(self.relative_position)
        out = tile_attention(q, k, v, mask, bias=bias, relpos=places, backend=backend_of(q))
        return self.proj(out.flatten(2))


class AdaLNLinear(nn.Module):
    """Norm, modulation by the condition, linear: DiT's last layer, and the way into MaskDiT's decoder.

    Args:
        dim: Channels.
        out: Channels of the result.
        condition: Channels of the condition; None: `dim`.
        zero: Whether the linear layer starts at 0.
    """

    def __init__(self, dim: int, out: int, condition: int | None = None, *, zero: bool = True) -> None:
        super().__init__()
        self.linear = zeroed(linear(dim, out)) if zero else linear(dim, out)
        self.adaLN_modulation = modulation(condition or dim, 2 * dim)

    def forward(self, x: Tensor, c: Tensor, samples: Tensor | None = None) -> Tensor:
        """`(B, N, dim)` to `(B, N, out)`; `c` and `samples` as in `AdaLNBlock`."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(ops.norm_modulate(x, scale, shift, rows=samples))


class PreNormBlock(nn.Module):
    """The block of vision transformers (timm's `Block`): affine LayerNorms, no condition.

    Args:
        dim: Channels.
        heads: Attention heads.
        mlp_ratio: Hidden channels of the MLP by channels.
        attention: Options of `Attention`.
    """

    takes_rows = True

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, **attention: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, **attention)
        self.mlp = Mlp(dim, mlp_ratio, tanh=False)

    def forward(self, x: Tensor, *, rows: TokenIndex | None = None, **attention: Any) -> Tensor:
        """`(B, N, dim)` to the same, or to `(B, K, dim)` with query rows."""
        a = self.attn(self.norm1(x), rows=rows, **attention)
        x, y = add_gated_then_norm(
            taken(x, rows), a, weight=self.norm2.weight, bias=self.norm2.bias, eps=self.norm2.eps
        )
        return x + self.mlp(y)


def learned_token(dim: int, std: float = 0.02) -> nn.Parameter:
    """A token `(dim,)` of a normal distribution, such as a mask token."""
    return nn.Parameter(torch.randn(dim) * std)


def sincos(grid: Sequence[int], dim: int, *, device: Any = None) -> Tensor:
    """Fixed sine and cosine positions of MAE, fp32 `(1, tokens, dim)`, tokens in raster order.

    Channels are shared out evenly among the axes, the last axis first (as MAE's code: columns before rows); pairs that
    are left over go to the first of these.

    Raises:
        ValueError: `dim` is odd, or has no pair for each axis.
    """
    axes = len(grid)
    each, more = divmod(dim // 2, axes)
    if dim % 2 or not each:
        raise ValueError(f"dim={dim} must be even, and {2 * axes} or more: sines and cosines of {axes} axes")
    at = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid)).reshape(math.prod(grid), axes)
    parts = []
    for i, axis in enumerate(reversed(range(axes))):
        half = each + (i < more)
        angle = at[:, axis, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, 1).float()[None].to(device)


def touched(x: Tensor, *parameters: Tensor | None) -> Tensor:
    """`x`, with gradients of 0 to parameters that this call does not use.

    Distributed training waits for the gradient of every parameter; one that only some calls use would stop it.
    """
    return _Touch.apply(x, *(p for p in parameters if p is not None and p.requires_grad))


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return grad, *map(torch.zeros_like, ctx.saved_tensors)
