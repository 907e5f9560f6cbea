"""MicroDiT: deferred masking and its sparse blocks (Sehwag et al. 2024, arXiv 2407.15811; the authors' code).

A **patch mixer**, a few blocks of its own width over *all* tokens, runs first; then 75 % of the tokens are dropped and
the backbone and the last layer see the others, which by now know of the dropped ones. There is no decoder: the loss is
EDM's over the kept patches. Between the widths of mixer and backbone are a LayerNorm and a linear layer; the way out
runs on kept tokens. Later stages of training keep all tokens.

Blocks (`MicroDiTBlock`): self-attention and MLP with adaLN, cross-attention to the text between them behind a plain
norm; q and k are normalised over all heads without weights; SwiGLU, or every other block a mixture of experts that
choose their tokens (`ExpertChoiceMLP`): of K tokens each of E experts takes `floor(capacity K / E)`, so their number
follows the tokens that are kept. The last weights of attention and MLP start with a deviation of
`0.02 / sqrt(2 layers)`.

`MicroDiT` is a patch of another DiT, whose first blocks are the mixer.

Left out: the layer-wise widths of the authors' configurations (`hidden` is an argument of each block).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..masks import TokenIndex
from ..models._parts import add_gated
from ..ops.attention import tile_attention
from ..patching import Context, TokenRoute
from ..patching.span import blocks_left
from ._layers import head_dim, linear, split
from ._masked_rows import patches
from ._transformer import AdaLNLinear, zeroed
from .maskdit import edm_weight

RATIO = 0.75
"""Part of the tokens that is dropped behind the mixer."""

_EPS = 1e-6


def _normal(inputs: int, outputs: int, std: float = 0.02) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.trunc_normal_(layer.weight, std=std)
    return layer


class ExpertChoiceMLP(nn.Module):
    """A mixture of experts, each of which chooses its tokens (Zhou et al. 2022), with GELU.

    Args:
        dim: Channels.
        hidden: Hidden channels of each expert.
        experts: Number of experts.
        capacity: Experts that a token has on average.
        std: Deviation of the second weight.

    Raises:
        ValueError: A size is not positive.
    """

    def __init__(self, dim: int, hidden: int, experts: int = 8, capacity: float = 2.0, *, std: float = 0.02) -> None:
        super().__init__()
        if min(dim, hidden, experts) < 1 or capacity <= 0:
            raise ValueError(f"dim={dim}, hidden={hidden}, experts={experts}, capacity={capacity} must be positive")
        self.experts, self.capacity = experts, capacity
        self.w1 = nn.Parameter(torch.empty(experts, dim, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, dim))
        self.gate = _normal(dim, experts)
        nn.init.trunc_normal_(self.w1, std=0.02)
        nn.init.trunc_normal_(self.w2, std=std)

    def tokens(self, n: int) -> int:
        """How many of n tokens each expert takes: `floor(capacity n / experts)`, at least 1 and at most n."""
        return min(n, max(1, int(self.capacity * n / self.experts)))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, K, dim)` to `(B, K, dim)`: the sum over experts of probability times output for its tokens."""
        batch, n, dim = x.shape
        weight, chosen = self.gate(x).float().softmax(-1).transpose(1, 2).topk(self.tokens(n), dim=-1)
        at = chosen.flatten(1)[..., None].expand(-1, -1, dim)  # (B, E * k, dim)
        taken = x.gather(1, at).unflatten(1, (self.experts, -1))
        h = F.gelu(torch.einsum("bekd,edf->bekf", taken, self.w1))
        out = torch.einsum("bekf,efd->bekd", h, self.w2) * weight[..., None].to(x.dtype)
        return x.new_zeros(batch, n, dim).scatter_add(1, at, out.flatten(1, 2))


class _SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int, std: float) -> None:
        super().__init__()
        self.w12, self.w3 = _normal(dim, 2 * hidden), _normal(hidden, dim, std)
        nn.init.trunc_normal_(self.w12.weight[hidden:], std=std)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(ops.gated_activation(self.w12(x), "swiglu", gate_first=True))


class MicroDiTBlock(nn.Module):
    """A block of the mixer or the backbone.

    Args:
        dim: Channels.
        heads: Attention heads.
        hidden: Hidden channels of the MLP, before it is reduced to 2/3 for SwiGLU and rounded up to `multiple`.
        context: Channels of the context; None: `dim`.
        condition: Channels of the condition; None: `dim`.
        experts: Number of experts, or 0 for SwiGLU.
        capacity: Of the experts.
        layers: Number of layers that the deviation of the last weights is for.
        multiple: What hidden channels are a multiple of.

    Raises:
        ValueError: `heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        context: int | None = None,
        condition: int | None = None,
        experts: int = 0,
        capacity: float = 2.0,
        layers: int = 28,
        multiple: int = 256,
    ) -> None:
        super().__init__()
        head_dim(dim, heads)
        std = 0.02 / (2 * layers) ** 0.5
        self.heads = heads
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=_EPS) for _ in range(3))
        self.qkv, self.proj = _normal(dim, 3 * dim), _normal(dim, dim, std)
        self.q_cross, self.kv_cross = _normal(dim, dim), _normal(context or dim, 2 * dim)
        self.proj_cross = _normal(dim, dim, std)
        rounded = multiple * -(-(hidden if experts else 2 * hidden // 3) // multiple)
        self.mlp: nn.Module = (
            ExpertChoiceMLP(dim, rounded, experts, capacity, std=std) if experts else _SwiGLU(dim, rounded, std)
        )
        last = zeroed(linear(condition or dim, 6 * dim))
        self.adaLN_modulation = nn.Sequential(nn.GELU(approximate="tanh"), last)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = ops.qk_norm_rope(q, k, norm="layer", across_heads=True, eps=_EPS)
        return tile_attention(q, k, v).flatten(2)

    def forward(self, x: Tensor, context: Tensor, c: Tensor) -> Tensor:
        """`(B, K, dim)`, context `(B, M, context)` and condition `(B, condition)` to `(B, K, dim)`."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)

        def normed(x: Tensor, norm: nn.LayerNorm, scale: Tensor | None = None, shift: Tensor | None = None) -> Any:
            return ops.norm_modulate(x, scale, shift, weight=norm.weight, bias=norm.bias, eps=norm.eps)

        q, k, v = split(self.qkv(normed(x, self.norm1, scale_msa, shift_msa)), 3, self.heads)
        x = add_gated(x, self.proj(self._attend(q, k, v)), gate_msa)
        q = self.q_cross(normed(x, self.norm2)).unflatten(-1, (self.heads, -1))
        k, v = split(self.kv_cross(context), 2, self.heads)
        x = x + self.proj_cross(self._attend(q, k, v))
        return add_gated(x, self.mlp(normed(x, self.norm3, scale_mlp, shift_mlp)), gate_mlp)


def _between(inputs: int, outputs: int) -> nn.Module:
    """LayerNorm and linear layer between two widths; nothing for equal ones."""
    if inputs == outputs:
        return nn.Identity()
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(nn.LayerNorm(inputs, eps=_EPS), layer)


class PatchMixer(nn.Module):
    """Blocks over all tokens before some are dropped.

    Args:
        dim: Channels of the backbone (1024 in XL).
        context: Channels of the context; None: `dim`.
        width: Channels of the mixer (768).
        depth: Blocks (6).
        head_dim: Channels of a head (64).
        mlp_ratio: Hidden channels by channels.
        experts: Experts of every other block, or 0 for none.
        layers: Layers of the backbone.
        multiple: As in `MicroDiTBlock`.
    """

    def __init__(
        self,
        dim: int,
        context: int | None = None,
        *,
        width: int = 768,
        depth: int = 6,
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        experts: int = 8,
        layers: int = 28,
        multiple: int = 256,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            MicroDiTBlock(
                width, width // head_dim, int(mlp_ratio * width), condition=dim, layers=layers, multiple=multiple,
                experts=experts if i % 2 else 0,
            )
            for i in range(depth)
        )  # fmt: skip
        self.map_in, self.map_out = _between(dim, width), _between(width, dim)
        self.map_context = _between(context or dim, width)

    def forward(self, x: Tensor, context: Tensor, c: Tensor, index: TokenIndex | None = None) -> Tensor:
        """Mixed tokens of the backbone's width.

        Args:
            x: All tokens `(B, N, dim)`.
            context: Text `(B, M, context)`.
            c: Condition `(B, dim)`.
            index: The tokens that go on; None: all.

        Returns:
            `(B, K, dim)`.
        """
        x, context = self.map_in(x), self.map_context(context)
        for block in self.blocks:
            x = block(x, context, c)
        return self.map_out(x if index is None else index.gather(x))


class MicroDiTTransformer(nn.Module):
    """Mixer, backbone and last layer.

    Args:
        dim: Channels (1024 in XL).
        depth: Blocks of the backbone (28).
        head_dim: Channels of a head (64).
        out: Values of a patch.
        mlp_ratio: Hidden channels by channels.
        experts: Experts of every other block but the last, or 0 for none.
        multiple: As in `MicroDiTBlock`.
        context: Channels of the context; None: `dim`.
        mixer_width: Channels of the mixer (768).
        mixer_depth: Blocks of the mixer (6).
    """

    paper = "Stretching Each Dollar: Diffusion Training from Scratch on a Micro-Budget (arXiv 2407.15811)"

    def __init__(
        self,
        dim: int,
        depth: int,
        head_dim: int,
        out: int,
        *,
        mlp_ratio: float = 4.0,
        experts: int = 8,
        multiple: int = 256,
        context: int | None = None,
        mixer_width: int = 768,
        mixer_depth: int = 6,
    ) -> None:
        super().__init__()
        self.mixer = PatchMixer(
            dim, context, width=mixer_width, depth=mixer_depth, head_dim=head_dim, mlp_ratio=mlp_ratio,
            experts=experts, layers=depth, multiple=multiple,
        )  # fmt: skip
        self.blocks = nn.ModuleList(
            MicroDiTBlock(
                dim, dim // head_dim, int(mlp_ratio * dim), context=context, layers=i + 1, multiple=multiple,
                experts=experts if i % 2 and i < depth - 1 else 0,
            )
            for i in range(depth)
        )  # fmt: skip
        self.final_layer = AdaLNLinear(dim, out)

    def forward(self, x: Tensor, context: Tensor, c: Tensor, index: TokenIndex | None = None) -> Tensor:
        """Patches of the kept tokens, `(B, K, out)`; arguments as of `PatchMixer`."""
        x = self.mixer(x, context, c, index)
        for block in self.blocks:
            x = block(x, context, c)
        return self.final_layer(x, c)


def kept_edm_loss(
    predicted: Tensor,
    clean: Tensor,
    noised: Tensor,
    sigma: Tensor,
    index: TokenIndex | None,
    patch: int,
    *,
    sigma_data: float = 0.5,
) -> Tensor:
    """EDM's loss over the kept patches: `mean_kept(w (c_skip (y + n) + c_out F - y)^2)` of each sample.

    Args:
        predicted: F of the kept tokens, `(B, K, patch * patch * C)`, channels innermost.
        clean: y `(B, C, H, W)`.
        noised: y + n.
        sigma: `(B,)`.
        index: Kept tokens; None: all.
        patch: Side of a patch.
        sigma_data: Deviation of the data.

    Returns:
        `(B,)`.
    """
    target, given = (patches(t, patch) for t in (clean, noised))
    if index is not None:
        target, given = index.gather(target), index.gather(given)
    s = sigma[:, None, None]
    total = s.square() + sigma_data**2
    denoised = given * sigma_data**2 / total + predicted * s * sigma_data / total.sqrt()
    return (denoised - target).square().mean((1, 2)) * edm_weight(sigma, sigma_data)


class MicroDiT(TokenRoute):
    """Train a model with deferred masking: its first blocks mix all tokens, the others run on a quarter of them.

    Dropped tokens leave the model as zeros, so the loss is over kept ones alone: `token_mean(errors, method.index)`.

    Args:
        mixer: Blocks of the mixer.
        ratio: Dropped part of the tokens behind it; 0 for the later stages of training.
        options: Of `TokenRoute`.

    Raises:
        ValueError: `mixer` is below 1, `ratio` is not in [0, 1), or an argument of `TokenRoute` is not allowed.
    """

    paper = MicroDiTTransformer.paper

    def __init__(self, mixer: int = 6, ratio: float = RATIO, **options: Any) -> None:
        if mixer < 1 or not 0 <= ratio < 1:
            raise ValueError(f"mixer={mixer} must be 1 or more, ratio={ratio} in [0, 1)")
        super().__init__(mixer, -1, 1.0 - ratio, reenter="zero", **options)

    @property
    def name(self) -> str:
        """How reports and errors call it."""
        return "MicroDiT"

    def attach(self, context: Context) -> None:
        """Plan the route."""
        blocks_left(context, self.name, "mixer", self.start)
        super().attach(context)
