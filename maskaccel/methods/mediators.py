"""Attention mediators: queries and keys meet through a few pooled queries (Pu et al. 2024, arXiv 2408.05710).

    M = pool(Q) on sqrt(n) x sqrt(n),   V_m = softmax(s M K^T + B_1) V,   O = softmax(s Q M^T + B_2) V_m + DWConv(V)

with s the inverse root of the head dim. The cost is linear in the tokens. B_1 and B_2 are learned: a 7 x 7 map that is
resized to the grid, plus a row and a column term (equations of section 3.2; the authors' code).

Early steps of sampling need few mediators, later ones more: `MediatorSchedule`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor, nn

from ..ops.attention import tile_attention
from ._layers import check_tokens, convolve, depthwise, head_dim, linear, off_grid, on_grid, sizes, split

_MAP = 7  # size of the map of biases before it is resized


class MediatorAttention(nn.Module):
    """Attention through mediators, in place of a DiT's or SiT's attention.

    Args:
        dim: Channels.
        heads: Attention heads.
        grid: Height and width in tokens; the biases are for this grid.
        mediators: Number of mediators, a square: 4, 16 or 64 in the paper.
        kernel: Size of the depth-wise convolution of the values.
        qkv_bias: Whether the projections of q, k and v have a bias.

    Raises:
        ValueError: `heads` does not divide `dim`, or `mediators` is no square.
    """

    paper = "Efficient Diffusion Transformer with Step-wise Dynamic Attention Mediators (arXiv 2408.05710)"

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: tuple[int, int],
        mediators: int = 16,
        *,
        kernel: int = 3,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        head_dim(dim, heads)
        side = isqrt(max(mediators, 0))
        if side < 1 or side * side != mediators:
            raise ValueError(f"mediators={mediators} must be a square, such as 4, 16 or 64")
        self.dim, self.heads, self.side = dim, heads, side
        self.grid = height, width = sizes("grid", grid, 2)
        self.qkv = linear(dim, 3 * dim, qkv_bias)
        self.proj = linear(dim, dim)
        self.dwc = depthwise(dim, kernel)
        shapes = {"map": (_MAP, _MAP), "rows": (height, 1), "columns": (1, width)}
        for of in ("mediators", "tokens"):
            terms = {name: nn.Parameter(torch.empty(heads, mediators, *shape)) for name, shape in shapes.items()}
            setattr(self, f"bias_of_{of}", nn.ParameterDict(terms))
            for term in terms.values():
                nn.init.trunc_normal_(term, std=0.02)

    def _bias(self, terms: nn.ParameterDict) -> Tensor:
        """`(1, heads, mediators, tokens)`."""
        resized = nn.functional.interpolate(terms["map"], size=self.grid, mode="bilinear")
        return (resized + (terms["rows"] + terms["columns"])).flatten(2)[None]

    def forward(self, x: Tensor) -> Tensor:
        """Attention of `(B, H * W, dim)`, tokens in raster order; returns that shape."""
        check_tokens(x, self.dim, self.grid)
        q, k, v = split(self.qkv(x), 3, self.heads)
        pooled = nn.functional.adaptive_avg_pool2d(on_grid(q.flatten(2), self.grid), self.side)
        (mediators,) = split(off_grid(pooled), 1, self.heads)
        gathered = tile_attention(mediators, k, v, bias=self._bias(self.bias_of_mediators))  # type: ignore[arg-type]
        bias = self._bias(self.bias_of_tokens).mT  # type: ignore[arg-type]
        out = tile_attention(q, mediators, gathered, bias=bias).flatten(2)
        return self.proj(out + convolve(self.dwc, v.flatten(2), self.grid))


class MediatorSchedule:
    """Which of several models, with ever more mediators, runs a step of sampling.

    The latent moves fast in early steps, where few mediators do. The mean absolute change of a step is compared with
    its mean over the first steps: once it is below `ratios[k]` of that, model k gives way to model k + 1, for good.

    Inferred from the arguments of the authors' sampler: that the comparison uses the change of the last step, and that
    a step moves on by one model at most.

    Args:
        models: Number of models.
        ratios: Falling ratios at which to move on, one less than models.
        first: Steps whose changes are averaged.

    Raises:
        ValueError: Numbers do not fit together.
    """

    def __init__(self, models: int, ratios: Sequence[float], first: int) -> None:
        if models < 1 or len(ratios) != models - 1:
            raise ValueError(f"{models} models need {models - 1} ratios, got {len(ratios)}")
        if first < 1:
            raise ValueError(f"first={first} must be 1 or more")
        if any(b >= a for a, b in itertools.pairwise(ratios)) or any(r <= 0 for r in ratios):
            raise ValueError(f"ratios={tuple(ratios)} must be positive and fall")
        self.ratios, self.first = tuple(ratios), first
        self.reset()

    def reset(self) -> None:
        """Start another sample."""
        self.model = 0
        self._before: Tensor | None = None
        self._changes: list[float] = []

    def update(self, latent: Tensor) -> int:
        """Index of the model for the step that starts at `latent`. Reads one number from the device."""
        before, self._before = self._before, latent.detach().clone()
        if before is None:
            return self.model
        change = float((latent - before).abs().mean())
        if len(self._changes) < self.first:
            self._changes.append(change)
        elif self.model < len(self.ratios):
            mean = sum(self._changes) / self.first
            self.model += change < self.ratios[self.model] * mean
        return self.model
