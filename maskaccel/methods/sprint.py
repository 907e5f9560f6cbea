"""SPRINT: sparse-dense residual fusion (Park et al. 2025, arXiv 2510.21986; the authors' code), and path-drop guidance.

The blocks are f (2, all tokens), g (the middle, on kept tokens: 25 % in pretraining) and h (2, all tokens):

    f = f(x),  g = g(kept rows of f),  h_in = W [g_pad ; f] + b,  g_pad = g at kept tokens and the mask token elsewhere

Tokens are kept by cell, 1 of every 2 x 2 for a ratio of 0.75 (`CELLS`). In training, each sample has g_pad replaced by
the mask token throughout with probability 0.1 (**path drop**). That trains what guidance uses: the unconditional
half of a guided step runs f and h alone,

    v = v_u + w (v_c - v_u),  v_u = h(W [mask token ; f(x, null)])

so it costs 4 of 28 blocks of SiT-XL, not 28. The fusion also takes place when all tokens are kept (finetuning at a
ratio of 0, and sampling). The loss is over all tokens.

`SprintFusion` never forms g_pad or the concatenation: with W = [W_g | W_f] it is a product of f for all tokens and one
of `g - mask token` for the kept ones. The authors' mask token is not trained (normal, 0.02).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import ops
from ..masks import TokenIndex
from ..models import stack_of, streams_of
from ..patching import Context, TokenRoute
from ..patching._fit import like_of, moved_along, same_width, width_of
from ..patching.route import RouteFrame
from ..patching.span import SpanCall
from ._ratios import uniform
from ._transformer import learned_token, touched

RATIO = 0.75
"""Dropped part of the tokens in pretraining; 0 in finetuning."""

PATH_DROP = 0.1
"""Probability of a path drop, for each sample of a training batch."""

CELLS: dict[float, tuple[tuple[int, int], int]] = {
    0.5: ((2, 2), 2),
    0.625: ((4, 4), 6),
    0.75: ((2, 2), 1),
    0.875: ((4, 4), 2),
}
"""By ratio: cells of the grid, and how many tokens of each are kept. Video keeps 2 of 2 x 2 x 2 (a ratio of 0.75)."""


class SprintFusion(nn.Module):
    """The linear layer that joins both paths, and the mask token.

    Args:
        dim: Channels.
        path_drop: Probability of a path drop in training mode.
        learn_mask: Whether the mask token is trained (SR-DiT, PRX).
        seed: Of the path drops.

    Attributes:
        weight: `(dim, 2 dim)`, columns of g first: Xavier uniform.
        bias: `(dim,)`: 0.
        mask_token: `(dim,)`.

    Raises:
        ValueError: `path_drop` is no probability.
    """

    def __init__(self, dim: int, *, path_drop: float = PATH_DROP, learn_mask: bool = False, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= path_drop < 1:
            raise ValueError(f"path_drop={path_drop} must lie in [0, 1)")
        self.path_drop, self.seed = path_drop, seed
        self.weight, self.bias = nn.Parameter(torch.empty(dim, 2 * dim)), nn.Parameter(torch.zeros(dim))
        nn.init.xavier_uniform_(self.weight)
        self.mask_token = learned_token(dim).requires_grad_(learn_mask)

    def draw(self, batch: int, step: Tensor | int, *, offset: int = 0, device: Any = None) -> Tensor | None:
        """Which samples keep the path of g in a training step: bool `(batch,)`; None: all of them.

        A function of the seed, the step and the number of the sample, as the kept tokens.

        Args:
            batch: Samples.
            step: Training step.
            offset: Number of this rank's first sample.
            device: Of the result.
        """
        return self.drawn(batch, step, offset=offset, device=device) if self.training else None

    def drawn(self, batch: int, step: Tensor | int, *, offset: int = 0, device: Any = None) -> Tensor | None:
        """As `draw`, whatever the mode."""
        if not self.path_drop:
            return None
        return uniform(batch, seed=self.seed, step=step, offset=offset, device=device) >= self.path_drop

    def forward(self, f: Tensor, g: Tensor, index: TokenIndex | None = None, path_keep: Tensor | None = None) -> Tensor:
        """`W [g_pad ; f] + b`.

        Args:
            f: All tokens before the middle, `(B, N, dim)`.
            g: Kept tokens after it, `(B, K, dim)`; all of them without an index.
            index: The kept tokens.
            path_keep: bool `(B,)`: False where g_pad is the mask token throughout.

        Returns:
            `(B, N, dim)`.
        """
        if index is not None and index.kept < index.n:
            return ops.sparse_dense_fuse(f, g, index, self.weight, self.bias, self.mask_token, path_keep)
        to_g, to_f = self.weight.chunk(2, dim=1)
        of_g = nn.functional.linear(g, to_g)
        if path_keep is not None:
            of_g = torch.where(path_keep[:, None, None], of_g, self._of_mask_token().to(of_g.dtype))
        return touched(nn.functional.linear(f, to_f, self.bias) + of_g, self.mask_token)

    def _of_mask_token(self) -> Tensor:
        """`W_g` times the mask token, in fp32 or wider."""
        to_g = self.weight.chunk(2, dim=1)[0]
        wide = torch.promote_types(torch.float32, to_g.dtype)
        return to_g.to(wide) @ self.mask_token.to(wide)

    def without_middle(self, f: Tensor) -> Tensor:
        """`W [mask token ; f] + b`: the path-dropped form, of `(B, N, dim)`, which needs no g."""
        out = nn.functional.linear(f, self.weight.chunk(2, dim=1)[1], self.bias)
        return (out + self._of_mask_token()).to(out.dtype)

    def guided(self, f: Tensor, g: Tensor, index: TokenIndex | None = None) -> Tensor:
        """Both halves of a guided batch, of which the conditional one alone went through the middle.

        Args:
            f: `(2 B, N, dim)`: conditional samples, then unconditional ones.
            g: `(B, K, dim)` of the conditional ones.
            index: As in `forward`, of the conditional samples.

        Returns:
            `(2 B, N, dim)`.
        """
        cond, null = f.chunk(2)
        return torch.cat([self(cond, g, index), self.without_middle(null)])


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """`v_u + w (v_c - v_u)`."""
    return torch.lerp(unconditional, conditional, scale)


def cell_index(
    batch: int,
    grid: tuple[int, ...],
    ratio: float = RATIO,
    *,
    seed: int,
    step: Tensor | int = 0,
    offset: int = 0,
    device: Any = None,
) -> TokenIndex:
    """Kept tokens by cell: as many of each, drawn among its tokens.

    Args:
        batch: Samples.
        grid: Sizes of the grid of tokens; three for a video.
        ratio: Dropped part, one of `CELLS` (0.75 for a video).
        seed: Of the draw.
        step: Training step.
        offset: Number of this rank's first sample.
        device: Of the index.

    Raises:
        ValueError: There are no cells for the ratio, or they do not divide the grid.
    """
    if len(grid) == 3 and ratio == 0.75:
        cell: tuple[int, ...] = (2, 2, 2)
        kept = 2
    elif len(grid) == 2 and ratio in CELLS:
        cell, kept = CELLS[ratio]
    else:
        known = ", ".join(map(str, CELLS))
        raise ValueError(f"ratio={ratio} on the grid {grid} has no cells; known are {known} (images), 0.75 (videos)")
    n = math.prod(grid)
    return ops.random_keep(
        batch, n, n * kept // math.prod(cell), seed=seed, step=step, sample_offset=offset, scheme="cell", grid=grid,
        cell=cell, device=device,
    )  # fmt: skip


class SPRINT(TokenRoute):
    """Train the middle blocks of a model on some tokens, cell by cell, and join them with all tokens before the last.

    A patch: f is the blocks before `start`, g those from `start` to `end`, h the others. The fusion is part of the
    model from then on, in eval mode too; give `parameters()` of this method to the optimizer, and save its
    `state_dict()`. A model that was trained without it changes, as in the paper, which trains from scratch.

    Args:
        start: First block of g.
        end: Last block of g, inclusive; negative numbers count from the end.
        ratio: Dropped part of the tokens; 0 for finetuning.
        fusion: The fusion; None makes one of the model's width.
        select: `"cell"`, or `"uniform"` (another selector of the paper).
        path_drop: Probability of a path drop, of a fusion that is made here.
        seed: Of tokens and path drops.
        options: Of `TokenRoute`.

    Raises:
        ValueError: `ratio` is not in [0, 1), or an argument of `TokenRoute` is not allowed.
    """

    paper = "Sprint: Sparse-Dense Residual Fusion for Efficient Diffusion Transformers (arXiv 2510.21986)"
    batch_wide = False  # whether a path drop is one for the whole batch

    def __init__(
        self,
        start: int = 2,
        end: int = -3,
        ratio: float = RATIO,
        *,
        fusion: SprintFusion | None = None,
        select: str = "cell",
        path_drop: float = PATH_DROP,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio={ratio} must lie in [0, 1): the part of the tokens that is dropped")
        # The smallest cell of which a whole number is kept is that of `CELLS`, for images and videos.
        super().__init__(start, end, 1.0 - ratio, "uniform" if ratio == 0 else select, seed=seed, **options)
        self.fusion = fusion
        self._path_drop = fusion.path_drop if fusion is not None else path_drop
        self._dropped = False
        self._null: str | None = None  # which half of a batch is the unconditional one, if calls are split
        self._paths: Any = weakref.WeakKeyDictionary()  # which samples keep the path of g, of every call's index

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_paths": None}  # of calls that are running; weak references cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._paths = weakref.WeakKeyDictionary()

    @property
    def name(self) -> str:
        """How reports and errors call it."""
        return type(self).__name__

    def make_fusion(self, width: int) -> SprintFusion:
        """The fusion of a model that brings none."""
        return SprintFusion(width, path_drop=self._path_drop, seed=self.seed)

    def attach(self, context: Context) -> None:
        """Plan the route, and what lets calls leave its blocks out."""
        super().attach(context)
        if self.fusion is None:
            self.fusion = self.make_fusion(width_of(context.model, self.name)).to(like_of(context.model))
        same_width(context.model, self.name, "fusion", self.fusion.mask_token.shape[0])
        blocks = [block for segment in stack_of(context.model).segments for block in segment]
        for block in blocks[self.start % len(blocks) : self.end % len(blocks) + 1]:
            context.transaction.wrap_forward(block, self._run_or_skip)
        context.transaction.wrap_forward(context.model, self._in_halves)

    def _run_or_skip(self, block: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if not self._dropped:
            return inner(*args, **kwargs)
        streams = streams_of(block)
        return streams.give(streams.take(args, kwargs))

    def choose(self, call: SpanCall) -> TokenIndex | None:
        """The tokens of a pass: all of them in eval mode, since the fusion takes place then too."""
        assert call.hidden is not None
        device = call.hidden.device
        if self._dropped:  # the blocks run on nothing: one token stands for it
            keep, inverse = torch.zeros(1, 1, dtype=torch.int32), torch.full((1, call.tokens), -1, dtype=torch.int32)
            inverse[0, 0] = 0
            return TokenIndex(keep, inverse).to(device)
        index = super().choose(call)
        index = TokenIndex.all(call.tokens, device) if index is None else index
        if call.model.training:
            self._paths[index] = self._path_keep(call, self.step - 1)
        return index

    def _path_keep(self, call: SpanCall, step: Tensor) -> Tensor | None:
        assert self.fusion is not None
        if self.batch_wide:
            drawn = self.fusion.drawn(1, step)
            return None if drawn is None else drawn.expand(call.batch)
        return self.fusion.drawn(call.batch, step, offset=self.first_sample(call))

    def reenter(self, call: SpanCall, rows: Tensor) -> Tensor:
        """The fusion of what ran with all tokens before the middle."""
        assert call.hidden is not None
        assert self.fusion is not None
        moved_along(self.name, "fusion", self.fusion.weight, call.hidden)
        if self._dropped:
            return self.fusion.without_middle(call.hidden)
        return self.fusion(call.hidden, rows.to(call.hidden.dtype), call.index, self._paths.get(call.index))

    @contextmanager
    def path_dropped(self) -> Iterator[None]:
        """Calls of the model within it run f and h alone: the unconditional half of path-drop guidance."""
        before, self._dropped = self._dropped, True
        try:
            yield
        finally:
            self._dropped = before

    @contextmanager
    def halves(self, null: str) -> Iterator[None]:
        """Calls within it hold a conditional and an unconditional half, as pipelines make them for guidance.

        The batch is split: its conditional half is a call of the model, the unconditional one a call of f and h alone.

        Args:
            null: The unconditional half: `"first"` (most pipelines of diffusers) or `"second"` (its DiT).

        Raises:
            ValueError: `null` is neither.
        """
        if null not in ("first", "second"):
            raise ValueError(f"null={null!r}; allowed are 'first' and 'second'")
        before, self._null = self._null, null
        try:
            yield
        finally:
            self._null = before

    def _in_halves(self, model: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        null, self._null = self._null, None
        if null is None:
            return inner(*args, **kwargs)
        try:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            batch = next(t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim())
            if batch % 2:
                raise ValueError(f"{self.name}: a batch of {batch} has no halves; it holds an unconditional one")
            found = []
            for name, rows in (("first", slice(0, batch // 2)), ("second", slice(batch // 2, batch))):
                of_half = [t[rows] if isinstance(t, Tensor) and t.dim() and t.shape[0] == batch else t for t in leaves]
                given, named = pytree.tree_unflatten(of_half, spec)
                with self.path_dropped() if name == null else nullcontext():
                    found.append(model(*given, **named))  # with its hooks: it is a call of its own
        finally:
            self._null = null
        first, second = (pytree.tree_flatten(one)[0] for one in found)
        both = [torch.cat([a, b]) if isinstance(a, Tensor) else a for a, b in zip(first, second, strict=True)]
        return pytree.tree_unflatten(both, pytree.tree_flatten(found[0])[1])

    def exit(self, rows: Tensor, frame: RouteFrame) -> Tensor:
        """All tokens `(B, N, D)` in a model that calls `enter` and `exit` itself; with the fusion, if all ran too."""
        if self.fusion is None:
            raise ValueError(f"{self.name}: fusion is None; a model of your own needs fusion=SprintFusion(width)")
        assert frame.hidden is not None
        path_keep = self._path_keep(frame, self.step - 1) if self.training else None
        return self.fusion(frame.hidden, rows.to(frame.hidden.dtype), frame.index, path_keep)

    def guided(
        self, model: Callable[..., Any], scale: float, *args: Any, null: Mapping[str, Any], **kwargs: Any
    ) -> Tensor:
        """Path-drop guidance, `v_u + w (v_c - v_u)`: one whole call of the model, and one without its middle.

        Args:
            model: The patched model, or a function that calls it and returns a tensor.
            scale: w (about 3 in the authors' configuration).
            *args: Of the conditional call.
            null: What is different in the unconditional call, by name: such as `{"class_labels": null_labels}`.
            **kwargs: Of both calls.

        Returns:
            The guided prediction; of what the model returns, the first tensor.
        """
        conditional = _tensor(model(*args, **kwargs))
        with self.path_dropped():
            unconditional = _tensor(model(*args, **{**kwargs, **null}))
        return guide(conditional, unconditional, scale)


def _tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple | list) else output.sample
