"""MDT and MDTv2: masked diffusion transformers (Gao et al. 2023, arXiv 2303.14389; the authors' code).

In the masked pass of a training step a part r of the tokens is dropped after the (learned) positions were added; all
blocks but the last `decode_layer` run on the kept ones. Then the **side interpolater** fills in the others:

    X = restore(kept, mask token) + decoder positions,  S = Block_side(X, c),  output = M S + (1 - M) X

with M = 1 at dropped tokens, and the last blocks run on all tokens. S is used at dropped tokens alone, so the side
block runs with its queries there, keys and values from all: the same result and gradients (`partial_block`). When
nothing is masked (the dense pass of a step, and sampling) the decoder positions are added and there is no side block.

A training step is the sum of the loss of a dense and of a masked pass, each over all tokens. v1 (`version=1`): r is
fixed, two blocks of decoder, no long skips. v2: r ~ U[r0, r0 + 0.2] (drawn on the host and in buckets, see
`_ratios`), long skips from the first half of the encoder to the second on the kept tokens, and from the embedding of
all tokens to every block of the decoder. Attention has a table of relative positions; on kept tokens it is read at
their places (`RelativePosition`), not gathered.

Guidance (`power_cosine_scale`): w(t) = 1 + (w - 1) (1 - cos(pi (1 - t / T)^s)) / 2.

`MDT` is the span as a patch of another DiT: its own blocks, the mask token, and a copy of a block as the side block.

Left out: three entries of the authors' tables that no offset reads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..masks import TokenIndex
from ..models import stack_of
from ..ops.attention import RelativePosition
from ..patching import Context, PatchError, TokenRoute
from ..patching._fit import like_of, moved_along, same_width, width_of
from ..patching.span import SpanCall, blocks_left
from ._layers import check_tokens, remembered, sizes
from ._masked_rows import kind_of, partial_block
from ._ratios import RatioRange
from ._transformer import AdaLNBlock, learned_token, sincos, touched


def power_cosine_scale(scale: float, t: Tensor | float, steps: float = 1000, power: float = 4.0) -> Tensor:
    """The guidance scale of a timestep: 1 at t = T, `scale` at t = 0.

    Args:
        scale: Full scale w.
        t: Timesteps, of any shape.
        steps: T.
        power: The exponent s: the larger, the later guidance sets in.

    Returns:
        Scales of the shape of `t`.
    """
    at = torch.as_tensor(t, dtype=torch.float32)
    return 1 + (scale - 1) * (1 - torch.cos(math.pi * (1 - at / steps) ** power)) / 2


def places_of(
    block: nn.Module, grid: Sequence[int], queries: TokenIndex | None = None, keys: TokenIndex | None = None
) -> RelativePosition:
    """Places on the grid of the tokens that a block sees; each block reads its own table at them."""
    table = cast(Any, block).attn.relative_position
    return RelativePosition.of_grid(
        table, grid, None if queries is None else queries.keep, None if keys is None else keys.keep
    )


class SideInterpolater(nn.Module):
    """Mask tokens, decoder positions and the side block at the dropped tokens.

    Args:
        dim: Channels.
        grid: Sizes of the grid of tokens.
        heads: Attention heads of the side block.
        mlp_ratio: Hidden channels of its MLP by channels.
        block: A side block of another kind in its place, called as `block(x, c)` and known to `partial_block`.
    """

    def __init__(
        self,
        dim: int,
        grid: Sequence[int],
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        block: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.grid = sizes("grid", grid, len(tuple(grid)))
        self.mask_token = learned_token(dim)
        self.decoder_pos_embed = nn.Parameter(sincos(self.grid, dim))
        self.block = block or AdaLNBlock(dim, heads, mlp_ratio, offsets=math.prod(2 * n - 1 for n in self.grid))

    def forward(self, x: Tensor, c: Tensor, index: TokenIndex | None = None) -> Tensor:
        """From the encoder to the decoder.

        Args:
            x: `(B, K, dim)`, the kept tokens; or all, `(B, N, dim)`, where nothing is dropped.
            c: Condition of the side block.
            index: The kept tokens; None: all.

        Returns:
            `(B, N, dim)`.
        """
        pos = self.decoder_pos_embed
        if index is None or index.kept == index.n:
            return touched(x + pos.to(x.dtype), *self.block.parameters(), self.mask_token)
        full = ops.scatter_merge(None, x, index, mode="mask_token", mask_token=self.mask_token, pos=pos)
        dropped = index.complement()
        placed = getattr(getattr(self.block, "attn", None), "relative_position", None) is not None
        options = {"places": places_of(self.block, self.grid, dropped)} if placed else {}
        side = partial_block(self.block, full, dropped, c, **options)
        return ops.scatter_merge(full, side.to(full.dtype), dropped)


class MDTTransformer(nn.Module):
    """The blocks of an MDT: what lies between the embedding and the last layer of a DiT.

    Args:
        dim: Channels (1152 in XL).
        depth: Number of blocks without the side block (28 in XL).
        heads: Attention heads (16 in XL).
        grid: Sizes of the grid of tokens.
        version: 1 or 2.
        decode_layer: Blocks of the decoder, which see all tokens. None: 2 (v1), 4 (v2; the authors' v2-S takes 6).
        ratio: Of dropped tokens. None: 0.3 (v1), uniform in [0.3, 0.5] (v2).
        mlp_ratio: Hidden channels of the MLPs by channels.
        block: What makes the blocks, `block(skip)` with `skip` True for one with a long skip; None: adaLN-Zero. A block
            takes `(x, c, skip=, places=, rows=)` and has `attn.relative_position`.

    Raises:
        ValueError: Sizes do not fit, or the blocks of a v2 cannot be halved.
    """

    paper = "MDTv2: Masked Diffusion Transformer is a Strong Image Synthesizer (arXiv 2303.14389)"

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        grid: Sequence[int],
        *,
        version: int = 2,
        decode_layer: int | None = None,
        ratio: RatioRange | None = None,
        mlp_ratio: float = 4.0,
        block: Callable[[bool], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if version not in (1, 2):
            raise ValueError(f"version={version}; allowed are 1 and 2")
        decode = decode_layer if decode_layer is not None else (2 if version == 1 else 4)
        encode = depth - decode
        if decode < 1 or encode < 1 or (version == 2 and encode % 2):
            raise ValueError(
                f"depth={depth}, decode_layer={decode}: both parts need a block, and v2 an even number of blocks before"
                " the decoder"
            )
        self.grid = sizes("grid", grid, len(tuple(grid)))
        self.dim, self.version = dim, version
        self.ratio = ratio or (RatioRange(0.3, 0.3) if version == 1 else RatioRange(0.3, 0.5))
        offsets = math.prod(2 * n - 1 for n in self.grid)

        def adaln(skip: bool) -> nn.Module:
            return AdaLNBlock(dim, heads, mlp_ratio, skip=skip, offsets=offsets)

        block = block or adaln
        half = encode // 2 if version == 2 else encode
        self.en_inblocks = nn.ModuleList(block(False) for _ in range(half))
        self.en_outblocks = nn.ModuleList(block(True) for _ in range(encode - half))
        self.de_blocks = nn.ModuleList(block(version == 2) for _ in range(decode))
        self.pos_embed = nn.Parameter(sincos(self.grid, dim))
        self.side = SideInterpolater(dim, self.grid, heads, mlp_ratio, block=block(False))

    def choose(
        self, batch: int, step: int, *, seed: int = 0, route: int = 0, offset: int = 0, device: Any = None
    ) -> TokenIndex:
        """The kept tokens of a step's masked pass.

        Args:
            batch: Samples.
            step: Training step: the ratio and the tokens are functions of it and the seed.
            seed: Of the tokens.
            route: Tells several draws of a step apart.
            offset: Number of this rank's first sample among all ranks.
            device: Of the index.
        """
        n = math.prod(self.grid)
        keep = self.ratio.kept(n, step)
        return ops.random_keep(batch, n, keep, seed=seed, step=step, route=route, sample_offset=offset, device=device)

    def places(self, index: TokenIndex | None = None) -> RelativePosition:
        """Where tokens are on the grid: the kept ones, or all."""
        return places_of(self.en_inblocks[0], self.grid, index, index)

    def encode(self, x: Tensor, c: Tensor, index: TokenIndex | None = None) -> tuple[Tensor, Tensor]:
        """The blocks before the side interpolater.

        Args:
            x: Embedded tokens without positions, `(B, N, dim)`.
            c: Condition.
            index: Kept tokens; None: all.

        Returns:
            The kept tokens `(B, K, dim)`, and all tokens with positions as they came in.
        """
        check_tokens(x, self.dim, self.grid)
        x = whole = x + self.pos_embed.to(x.dtype)
        places = self.places(index)
        if index is not None:
            x = index.gather(x)
        skips = []
        for block in self.en_inblocks:
            x = block(x, c, places=places)
            skips.append(x)
        for block in self.en_outblocks:
            x = block(x, c, skip=skips.pop(), places=places)
        return x, whole

    def decode(self, x: Tensor, whole: Tensor, c: Tensor) -> Tensor:
        """The last blocks, on all tokens; `whole` as of `encode`."""
        places = self.places()
        for block in self.de_blocks:
            x = block(x, c, skip=whole if self.version == 2 else None, places=places)
        return x

    def forward(self, x: Tensor, c: Tensor, index: TokenIndex | None = None) -> Tensor:
        """The dense pass, or with an index the masked one.

        Args:
            x: Embedded tokens without positions, `(B, N, dim)`.
            c: Condition `(B, dim)`.
            index: Kept tokens of the masked pass, of `choose`.

        Returns:
            `(B, N, dim)`.
        """
        index = None if index is None or index.kept == index.n else index
        x, whole = self.encode(x, c, index)
        return self.decode(self.side(x, c, index), whole, c)


class MaskTokenRoute(TokenRoute):
    """A route whose dropped tokens come back as a learned mask token with fixed positions (a base of patches).

    Kept tokens know their places from the model's embedding, so positions are added to mask tokens alone, and calls
    that drop nothing are the model's own. `parameters()` belong to the method: give them to the optimizer too.

    Args:
        start: First block of the route.
        end: Last block, inclusive; negative numbers count from the end.
        keep: As in `TokenRoute`.
        options: Of `TokenRoute`.
    """

    def __init__(self, start: int, end: int, keep: Any, **options: Any) -> None:
        super().__init__(start, end, keep, **options)
        self.mask_token: nn.Parameter | None = None
        self._off = False

    @property
    def name(self) -> str:
        """How reports and errors call it."""
        return type(self).__name__

    def attach(self, context: Context) -> None:
        """Plan the route."""
        super().attach(context)
        if self.mask_token is None:
            token, like = learned_token(width_of(context.model, self.name)), like_of(context.model)
            self.mask_token = nn.Parameter(token.detach().to(like))
        same_width(context.model, self.name, "mask token", self.mask_token.shape[0])

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Calls of the model within it drop nothing, in training mode too (the dense pass of a step of MDT)."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    def choose(self, call: SpanCall) -> TokenIndex | None:
        """The tokens of one pass; None leaves it dense."""
        return None if self._off else super().choose(call)

    def reenter(self, call: SpanCall, rows: Tensor) -> Tensor:
        """All tokens after the route."""
        assert self.mask_token is not None
        if call.grid is None:
            raise ValueError(f"{self.name}: the grid of the tokens is not known, and mask tokens need positions")
        tokens = self.mask_token + _positions(tuple(call.grid), rows.shape[2], rows.device)
        assert call.index is not None
        return call.index.merge(tokens.to(rows.dtype).expand(rows.shape[0], -1, -1), rows)


@remembered
def _positions(grid: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    return sincos(grid, width, device=device)


class MDT(MaskTokenRoute):
    """Train a model with MDT's masked pass: a span on kept tokens, then the side block at the dropped ones.

    A training step adds two losses, `with method.dense(): model(...)` and `model(...)`. The side block is a copy of the
    first block behind the span, with its weights (the paper's starts anew; give `side` for that), and is used in
    masked passes alone.

    Args:
        decode_layer: Blocks behind the span (4 in v2-XL, 2 in v1).
        keep: Range of the part of kept tokens, or one part (0.7 in v1).
        side: The side block, of a kind that `partial_block` knows and with the arguments of the model's blocks.
        bucket: The number of kept tokens is a multiple of it.
        options: Of `TokenRoute`.

    Raises:
        ValueError: `decode_layer` is below 1, or an argument of `TokenRoute` is not allowed.
    """

    paper = MDTTransformer.paper
    models = "DiT and PixArt of diffusers, the original DiT and SiT code, blocks of this library"

    def __init__(
        self,
        decode_layer: int = 4,
        keep: float | tuple[float, float] = (0.5, 0.7),
        *,
        side: nn.Module | None = None,
        bucket: int = 16,
        **options: Any,
    ) -> None:
        if decode_layer < 1:
            raise ValueError(f"decode_layer={decode_layer}; the decoder needs a block")
        super().__init__(0, -decode_layer - 1, keep, bucket=bucket, **options)
        self.side = side

    def attach(self, context: Context) -> None:
        """Plan the route, and make the side block."""
        blocks_left(context, self.name, "decode_layer", -self.end - 1)
        blocks = [block for segment in stack_of(context.model).segments for block in segment]
        try:
            kind = kind_of(self.side or blocks[-1])
        except TypeError as error:
            raise PatchError(f"{self.name}: the side block cannot run at some rows: {error}") from None
        if kind == "joint":
            raise PatchError(f"{self.name}: text runs beside the latent tokens of {type(context.model).__name__}; the "
                             "side block would have to be given the text behind the span")  # fmt: skip
        super().attach(context)
        if self.side is None:
            self.side = copy.deepcopy(blocks[self.end + 1])

    def reenter(self, call: SpanCall, rows: Tensor) -> Tensor:
        """All tokens after the side block."""
        assert self.side is not None
        assert call.index is not None
        moved_along(self.name, "side block", next(self.side.parameters()), rows)
        full, dropped = super().reenter(call, rows), call.index.complement()
        given = {name: value for name, value in call.given.items() if value is not None}
        return dropped.merge(full, partial_block(self.side, full, dropped, **given).to(full.dtype))
