"""Routes: some of the latent tokens run a span of a model's blocks in training, the others go around it.

    route = maskaccel.TokenRoute(start=2, end=-2, keep=0.5)
    patch = maskaccel.patch(transformer, [route])
    loss = ...  # as before; in eval mode the model is dense

TREAD (Krause et al. 2025, arXiv:2501.04765) puts the dropped tokens back as they were where the route began
(`reenter="stash"`), the masked-transformer family (MDT, MaskDiT, SPRINT) puts mask tokens in their place.

Which tokens run is a function of integers (seed, step, route, number of the sample in all ranks), so a recomputation, a
resumed run and any split of the batch draw the same. How many run is decided on the host.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import TokenIndex
from ..ops import tokens as token_ops
from ..ops.tokens._run import seed_of
from ..ops.tokens.philox import words
from ._fit import like_of, same_width, width_of
from ._follow import Rows
from ._spans import SpanCall, span_activity
from .patch import Context
from .span import attach_span

Select = Callable[[SpanCall], TokenIndex]
Reenter = Callable[[SpanCall, Tensor], Tensor]

SCHEMES = ("uniform", "cell", "rows_cols", "row_equal", "classes")
REENTRIES = ("stash", "mask_token", "zero")
NEED_GRID = ("cell", "rows_cols", "row_equal")
OPTIONS = ("cell", "labels", "backend")  # arguments of `random_keep` that a route has no argument of its own for
COUNTS = 8  # different numbers of kept tokens before a person is told: compiled code is made anew for each


@dataclass(eq=False)
class RouteFrame(SpanCall):
    """One pass through a route of a model that calls `enter` and `exit` itself; what `SpanCall` is to a patched model.

    Attributes:
        per_token: What `enter` was given for each token, cut to the kept ones.
    """

    per_token: list[Any] = field(default_factory=list)


class MaskToken(nn.Module):
    """Re-entry with one learned token in place of every dropped one (MDT, MaskDiT, SPRINT).

    Args:
        width: Width of the stream.
        std: Standard deviation of the initial values.
    """

    def __init__(self, width: int, *, std: float = 0.02, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(width, device=device, dtype=dtype) * std)

    def forward(self, call: SpanCall, rows: Tensor) -> Tensor:
        """All tokens `(B, N, D)` of the kept ones `(B, K, D)`."""
        return token_ops.scatter_merge(None, rows, _index(call), mode="mask_token", mask_token=self.token)


class TokenRoute(nn.Module):
    """A route around a span of blocks for the tokens that are not kept.

    Give it to `maskaccel.patch`, or call `enter` and `exit` in a model of your own. It is a module for what it holds:
    the step (saved by its `state_dict`), and the mask token where it has one. Those parameters are not part of the
    model: give `route.parameters()` to the optimizer too.

    Args:
        start: First block of the route, over the whole stack of blocks in the order of execution; negative numbers
            count from the end.
        end: Last block, inclusive, likewise.
        keep: How many of the N latent tokens run: a fraction in (0, 1], rounded up; a whole number; or a range
            (low, high) of fractions from which a multiple of `bucket` is drawn at every step, the same on every rank
            (MDT's ratio). The schemes "rows_cols" and "classes" have what `ops.random_keep` has in place of a range.
        select: Which: a scheme of `ops.random_keep`, or a function of the `SpanCall` that returns a `TokenIndex`.
        reenter: What a dropped token is after the route: "stash" (what it was before), "mask_token" (a learned one, of
            the width that the model's config tells; otherwise give a `MaskToken`), "zero", or a function or module of
            the `SpanCall` and the kept rows `(B, K, D)` that returns all `(B, N, D)`.
        seed: 64 bits; the same on all ranks.
        when: "training" routes in training mode only, "always" in eval mode too.
        forced: Latent tokens that are never dropped: bool `(N,)` or `(B, N)`, or a function of the `SpanCall` that
            returns it.
        bucket: With a range, numbers of kept tokens are multiples of this.
        shared: Whether all samples of a batch keep the same tokens.
        frames: For a grid of (frames, height, width): "each" draws for all tokens, "shared" draws for one frame and
            keeps the same places in all of them.
        options: Further arguments of `ops.random_keep` for the scheme, such as `{"cell": (2, 2)}`. The `labels` of
            "classes" are the same for all samples, `(N,)`: all must keep equal numbers.
        sample_offset: Number of the batch's first sample among those of all ranks. None: rank times batch under
            `torch.distributed`, otherwise 0.
        route: Number of the route for the random numbers; None counts the routes of a model.

    Attributes:
        index: The tokens of the last pass, without text; for losses such as REPA's that look at kept tokens alone.

    Raises:
        ValueError: An argument is outside of what is allowed.
    """

    kind, several = "lossy", True
    models = "models whose blocks run on some of the tokens (58 of the 76 transformers of diffusers)"

    def __init__(
        self, start: int, end: int, keep: float | int | tuple[float, float] = 0.5, select: str | Select = "uniform",
        reenter: str | Reenter = "stash", *, seed: int = 0, when: str = "training",
        forced: Tensor | Callable[[SpanCall], Tensor] | None = None, bucket: int = 64, shared: bool = False,
        frames: str = "each", options: Mapping[str, Any] | None = None, sample_offset: int | None = None,
        route: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("start", start), ("end", end)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}={value!r} must be the number of a block")
        if (start < 0) == (end < 0) and end < start:
            raise ValueError(f"end={end} is before start={start}: the route would end before it starts")
        _choice("when", when, ("training", "always"))
        _choice("frames", frames, ("each", "shared"))
        if isinstance(select, str):
            _choice("select", select, SCHEMES, " or a function")
        elif not callable(select):
            raise ValueError(f"select={select!r}; allowed are {', '.join(SCHEMES)}, or a function")
        if isinstance(reenter, str):
            _choice("reenter", reenter, REENTRIES, " or a function")
        elif not callable(reenter):
            raise ValueError(f"reenter={reenter!r}; allowed are {', '.join(REENTRIES)}, or a function")
        if isinstance(bucket, bool) or not isinstance(bucket, int) or bucket < 1:
            raise ValueError(f"bucket={bucket!r} must be 1 or more")
        if route is not None and not (_is_int(route) and 0 <= route < 1 << 24):
            raise ValueError(f"route={route!r}; allowed are None and 0 to {(1 << 24) - 1}")
        if sample_offset is not None and not (_is_int(sample_offset) and sample_offset >= 0):
            raise ValueError(f"sample_offset={sample_offset!r}; allowed are None and integers of 0 or more")
        seed_of(seed)
        for name in options or ():
            if name not in OPTIONS:
                raise ValueError(f"options has {name!r}; allowed are {', '.join(OPTIONS)}")
        self.is_range = isinstance(keep, tuple | list) and select not in ("rows_cols", "classes")
        if select == "classes" and getattr(options.get("labels") if options else None, "ndim", 0) != 1:
            raise ValueError("select='classes' needs options={'labels': ...} of shape (N,), the same for all samples")
        plain = not self.is_range and isinstance(keep, tuple | list)  # rows and columns, or classes
        self.keep: Any = tuple(keep) if plain else _keep(keep)
        self.start, self.end, self.select, self.seed, self.when = start, end, select, seed, when
        self.bucket, self.shared, self.frames, self.options = bucket, shared, frames, dict(options or {})
        self.sample_offset, self.route = sample_offset, route
        self.reenter_with = reenter  # a module registers itself
        self.forced, self._forced_count = forced, 0
        if isinstance(forced, Tensor):
            if forced.dtype != torch.bool or forced.dim() not in (1, 2):
                raise ValueError(
                    f"forced is {forced.dtype} of shape {tuple(forced.shape)}; it must be bool (N,) or (B, N)"
                )
            self._forced_count = int(forced.sum(-1).max())
            if isinstance(self.keep, int):
                self._check_forced(self.keep)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self.steps: Tensor
        # a step as a number, and the version of `steps` that it was read from
        self._host: tuple[int, int] | None = (0, self.steps._version)
        self._index: TokenIndex | None = None
        self._seen: set[int] = set()
        self._activity: dict[int, dict[str, Any]] = {}  # of each model

    # ------------------------------------------------------------------------------------------------- the step

    @property
    def step(self) -> Tensor:
        """int64 `(1,)`: number of the next routed forward, which counts it. Set it to an int, or fill it in place."""
        return self.steps

    @step.setter
    def step(self, value: int | Tensor) -> None:
        if isinstance(value, Tensor):
            if value.dtype != torch.int64 or value.numel() != 1:
                raise ValueError(
                    f"step is {value.dtype} of shape {tuple(value.shape)}; it must be int64 (1,), or an int"
                )
            self.steps = value.reshape(1)
            self._host = None
        else:
            if not _is_int(value) or value < 0:
                raise ValueError(f"step={value!r}; it must be an integer of 0 or more, or an int64 tensor (1,)")
            self.steps.fill_(value)
            self._host = value, self.steps._version

    def _host_step(self) -> int:
        """The step as a number. Read from the tensor once after somebody else has written it."""
        if self._host is None or self._host[1] != self.steps._version:
            self._host = int(self.steps), self.steps._version
        return self._host[0]

    def _count(self) -> None:
        known = self._host is not None and self._host[1] == self.steps._version
        self.steps += 1
        self._host = (self._host[0] + 1, self.steps._version) if known and self._host is not None else None

    # --------------------------------------------------------------------------------------------- as a method

    @property
    def name(self) -> str:
        """How reports and errors call it."""
        return f"TokenRoute({self.start}, {self.end})"

    def attach(self, context: Context) -> None:
        """Plan the route on a model."""
        attach_span(context, self.name, self.start, self.end, self)
        if self.when == "always":
            context.drops = self.name
        if self.reenter_with == "mask_token":
            self.reenter_with = MaskToken(width_of(context.model, self.name)).to(like_of(context.model))
        elif isinstance(self.reenter_with, MaskToken):
            same_width(context.model, self.name, "mask token", self.reenter_with.token.shape[0])

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """For the report: calls that were routed and not, why not, and the last number of tokens."""
        return {**self._of(model), **span_activity(model)}

    def _of(self, model: nn.Module) -> dict[str, Any]:
        return self._activity.setdefault(id(model), {"routed calls": 0, "dense calls": 0})

    def choose(self, call: SpanCall) -> TokenIndex | None:
        """The tokens of one pass; None leaves it dense."""
        if self.when == "training" and not call.model.training:
            self._dense(call.model, "the model is in eval mode")
            return None
        return self._chosen(call, call.number if self.route is None else self.route, None)

    def reenter(self, call: SpanCall, rows: Tensor) -> Tensor:
        """All tokens after the route."""
        if self.reenter_with == "stash":
            return call.restored(rows)
        if self.reenter_with == "zero":
            return token_ops.scatter_merge(None, rows, _index(call), mode="zero")
        assert not isinstance(self.reenter_with, str)
        return self.reenter_with(call, rows)

    # ------------------------------------------------------------------------------------- in a model of your own

    def enter(
        self, x: Tensor, per_token: Sequence[Any] = (), *, grid: tuple[int, ...] | None = None,
        step: Tensor | int | None = None, enabled: bool = True,
    ) -> tuple[Tensor, RouteFrame]:  # fmt: skip
        """The kept rows of a stream, for models that call it before the blocks of the route.

        Args:
            x: Latent tokens `(B, N, D)`.
            per_token: What else the blocks need for each token: tensors `(B|1, N, ...)`, or `(N, ...)` for all samples,
                and tuples of them. Those for all samples get a batch where samples keep different tokens.
            grid: The grid of the N tokens, for schemes that need it.
            step: The step, in place of the route's own, which is then not counted. Needed inside a checkpointed
                function, which runs twice.
            enabled: False runs all tokens (in eval mode, say).

        Returns:
            The rows `(B, K, D)`, and the frame for `exit`: its `index` (None: all run) and its cut `per_token`.

        Raises:
            ValueError: `x` has another shape, a tensor of `per_token` has no dim of N tokens, or `reenter` is
                "mask_token", of which nobody knew the width before an optimizer was made: give `MaskToken(width)`.
        """
        if not isinstance(x, Tensor) or x.dim() != 3 or not x.is_floating_point():
            found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x is {found}; it must be floating (B, N, D)")
        if self.reenter_with == "mask_token":
            raise ValueError(
                "reenter='mask_token' makes its token when a model is patched; for enter() and exit() give "
                f"reenter=maskaccel.patching.MaskToken({x.shape[2]})"
            )
        for value in per_token:
            _check_per_token(value, x.shape)
        rows = Rows(x.shape[1], x.shape[0], grid, None, None)
        frame = RouteFrame(self, self.route or 0, x.shape[0], x, {}, {}, rows, per_token=list(per_token))  # type: ignore[arg-type]
        if enabled:
            frame.index = self._chosen(frame, self.route or 0, step)
        else:
            self._dense(self, "enabled is False")
        if frame.index is None:
            return x, frame
        frame.per_token = [_cut(value, frame.index, x.shape) for value in per_token]
        return frame.index.gather(x), frame

    def exit(self, rows: Tensor, frame: RouteFrame) -> Tensor:
        """All tokens `(B, N, D)` again, of the kept ones after the blocks of the route."""
        return rows if frame.index is None else self.reenter(frame, rows)

    @property
    def index(self) -> TokenIndex | None:
        """The tokens of the last pass; None if all ran."""
        return self._index

    @classmethod
    def from_tread_config(cls, config: Mapping[str, Any], **options: Any) -> list[TokenRoute]:
        """The routes of a TREAD configuration, as CompVis/tread and SimpleTuner write it.

        Args:
            config: `{"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]}`, or the list
                itself. `selection_ratio` is the share of tokens that is dropped; both layers are inclusive, negative
                ones count from the end.
            **options: Further arguments of every route.

        Raises:
            ValueError: There are no routes, or a key is missing or not known.
        """
        routes = config.get("routes") if isinstance(config, Mapping) else config
        if not routes or not isinstance(routes, Sequence):
            raise ValueError(f"config={config!r} has no routes; it must be a mapping with a list of them")
        names = ("selection_ratio", "start_layer_idx", "end_layer_idx")
        made = []
        for one in routes:
            if not isinstance(one, Mapping) or set(one) != set(names):
                raise ValueError(f"route {one!r} must have the keys {', '.join(names)}, and no others")
            ratio = one["selection_ratio"]
            if not 0 <= ratio < 1:
                raise ValueError(f"selection_ratio={ratio!r} of a route; the share that is dropped is in [0, 1)")
            made.append(cls(one["start_layer_idx"], one["end_layer_idx"], 1.0 - float(ratio), **options))
        return made

    # ------------------------------------------------------------------------------------------ choosing the tokens

    def _dense(self, model: nn.Module, why: str) -> None:
        found = self._of(model)
        found["dense calls"] += 1
        found["dense because"] = why
        self._index = None

    def _chosen(self, call: SpanCall, route: int, step: Tensor | int | None) -> TokenIndex | None:
        assert call.hidden is not None
        if self.steps.device != call.hidden.device:
            self.steps = self.steps.to(call.hidden.device)
            self._host = None if self._host is None else (self._host[0], self.steps._version)
        if callable(self.select):
            index = self.select(call)
            if not isinstance(index, TokenIndex):
                raise TypeError(f"{self.name}: select returned a {type(index).__name__}; it must be a TokenIndex")
        else:
            index = self._drawn(call, route, self.steps if step is None else step)
        if step is None:
            self._count()
        if index.kept == index.n == call.tokens:
            self._dense(call.model, "all tokens are kept")
            return None
        self._index = index
        found = self._of(call.model)
        found["routed calls"] += 1
        found["tokens"] = f"{index.kept} of {index.n}"
        if index.kept not in self._seen:
            self._seen.add(index.kept)
            if len(self._seen) == COUNTS + 1:
                warnings.warn(
                    f"{self.name} has kept {COUNTS + 1} different numbers of tokens: compiled blocks are compiled for "
                    "each. A larger bucket, or fewer sizes of images, gives fewer",
                    stacklevel=2,
                )
        return index

    def _drawn(self, call: SpanCall, route: int, step: Tensor | int) -> TokenIndex:
        assert call.hidden is not None
        grid, device, given = call.grid, call.hidden.device, dict(self.options)
        if self.frames == "shared":
            if grid is None or len(grid) != 3:
                raise ValueError(f"{self.name}: frames='shared' needs a grid of (frames, height, width); it is {grid}")
            given["frames"] = grid[0]
        keep = self._keep_of(call.tokens, route, step)
        force = self.forced(call) if callable(self.forced) else self.forced
        if force is not None:
            if force.shape[-1] != call.tokens:
                raise ValueError(f"{self.name}: forced is of {force.shape[-1]} tokens; the route has {call.tokens}")
            given["force"] = force.to(device)
        if self.select in NEED_GRID:
            if grid is None:
                raise ValueError(
                    f"{self.name}: select={self.select!r} needs the grid of the tokens, and here none is known: "
                    "inside another route, say, or in a model whose grid cannot be read. 'uniform' needs none"
                )
            given["grid"] = grid
        index = token_ops.random_keep(
            call.batch, call.tokens, keep, seed=self.seed, step=step, route=route, shared=self.shared,
            sample_offset=self.first_sample(call), scheme=str(self.select), device=device, **given,
        )  # fmt: skip
        return index if index.counts is None else replace(index, counts=None)  # equal, since the labels are

    def first_sample(self, call: SpanCall) -> int:
        """Number of the first sample of a call among those of all ranks."""
        return _rank() * call.batch if self.sample_offset is None else self.sample_offset

    def _keep_of(self, n: int, route: int, step: Tensor | int) -> Any:
        """How many of n tokens, as `random_keep` takes it; a number wherever it is one."""
        if not self.is_range:
            count = math.ceil(n * self.keep - 1e-9) if isinstance(self.keep, float) else self.keep
            if isinstance(count, int):
                if count > n:
                    raise ValueError(f"{self.name}: keep={self.keep}, but there are {n} latent tokens")
                self._check_forced(max(1, count))
            return self.keep
        low, high = self.keep
        host = step if isinstance(step, int) else self._host_step() if step is self.steps else int(step)
        word = words(self.seed, torch.tensor(n), torch.tensor(_EVERY_SAMPLE), torch.tensor([host]), route)
        drawn = n * (low + (high - low) * (int(word) / 2**32))
        bucket = min(self.bucket, n)
        first, last = math.ceil(n * low / bucket) * bucket, math.floor(n * high / bucket) * bucket
        while last < first and bucket > 1:  # no multiple in the range, since there are few tokens: a smaller one
            bucket //= 2
            first, last = math.ceil(n * low / bucket) * bucket, math.floor(n * high / bucket) * bucket
        if last < first:
            first = last = math.ceil(n * low)
        count = min(last, max(first, round(drawn / bucket) * bucket))
        self._check_forced(count)
        return count

    def _check_forced(self, keep: int) -> None:
        if self._forced_count > keep:
            raise ValueError(f"{self.name}: forced has {self._forced_count} tokens in a sample, but {keep} are kept")

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"start={self.start}, end={self.end}, keep={self.keep}, select={self.select!r}"


_EVERY_SAMPLE = 0xFFFFFFFF  # in place of the number of a sample, for what all samples share


def _choice(name: str, value: Any, allowed: Sequence[str], also: str = "") -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; allowed are {', '.join(allowed)}{also}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _keep(keep: Any) -> float | int | tuple[float, float]:
    if isinstance(keep, tuple | list):
        if len(keep) != 2 or not all(isinstance(k, float | int) and 0 < k <= 1 for k in keep) or keep[1] < keep[0]:
            raise ValueError(f"keep={keep!r}; a range is two ascending fractions in (0, 1]")
        return float(keep[0]), float(keep[1])
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise ValueError(
            f"keep={keep!r}; allowed are a fraction in (0, 1], a number of tokens, or a range of fractions"
        )
    if (isinstance(keep, float) and not 0 < keep <= 1) or (keep < 1 and isinstance(keep, int)):
        raise ValueError(f"keep={keep!r}; a fraction is in (0, 1], a number of tokens is 1 or more")
    return keep


def _index(call: SpanCall) -> TokenIndex:
    if call.index is None:
        raise RuntimeError("the route runs on all tokens: there is nothing to put back")
    return call.index


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _check_per_token(value: Any, shape: Sequence[int]) -> None:
    """Before anything is drawn: whether `_cut` can cut it."""
    if value is None:
        return
    if isinstance(value, tuple | list):
        for part in value:
            _check_per_token(part, shape)
        return
    batch, n = shape[:2]
    wanted = f"({batch} or 1, {n}, ...) or ({n}, ...)"
    if not isinstance(value, Tensor):
        raise ValueError(
            f"per_token holds a {type(value).__name__}; it must hold tensors {wanted}, tuples of them, None"
        )
    of_samples = value.dim() > 1 and value.shape[1] == n and value.shape[0] in (1, batch)
    if not of_samples and not (value.dim() and value.shape[0] == n):
        raise ValueError(f"per_token holds a tensor of shape {tuple(value.shape)}; it must be {wanted}")


def _cut(value: Any, index: TokenIndex, shape: Sequence[int]) -> Any:
    """What `enter` is given for each token, cut to the kept ones."""
    if value is None:
        return None
    if isinstance(value, tuple | list):
        return type(value)(_cut(part, index, shape) for part in value)
    batch, n = shape[:2]
    if value.dim() > 1 and value.shape[1] == n and value.shape[0] in (1, batch):
        if index.batch == 1:
            return value.index_select(1, index.keep[0])
        return index.gather(value, 1)
    return index.gather(value, 0)
