"""Windows on a grid of tokens: discs, boxes, bands; dilated, with clamped centres, of tokens or of whole tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from .order import TokenOrder, _sizes
from .rules import ALL, NONE, SOME, Rule

Metric = Literal["euclid", "box", "band"]
Radius = float | None


@dataclass(frozen=True, eq=False)
class GridWindow(Rule):
    """Tokens near each other on a grid.

    With `d` the difference of two tokens' coordinates, a pair is kept if

    * `"euclid"`: `sum d^2 < radius^2` (CLEAR's disc; `strict=False`: `<=`);
    * `"box"`: `|d_axis| <= radius_axis` on every axis (NATTEN, sliding tiles; `strict=True`: `<`);
    * `"band"`: the same of the raster index, one radius (Re-ttention, Sparse-VideoGen).

    Attributes:
        order: Where the tokens of both sides are; or of the queries, with `keys` for the other side.
        radius: One for all axes, or one for each; None: no limit on that axis.
        metric: What is near.
        strict: Whether the border is left out; None: as the metric says above.
        clamp: The window's centre is moved inwards where it would reach over the border, so that every token sees the
            same number of others (NATTEN, sliding tile attention).
        dilation: For each axis: only tokens of the same residue are near, and radius counts those (NATTEN's dilation;
            U-DiT's sub-grids are dilation 2 without a radius).
        unit: Distances are counted in blocks of this size (sliding tile attention: tiles; Swin windows: radius 0).
        shift: Added to coordinates before they are divided by `unit` (shifted windows).
        outside: Whether pairs with a token beside the grid (text) are kept.
        keys: Where the keys are, if not in `order`; on the same grid.
    """

    order: TokenOrder
    radius: Radius | tuple[Radius, ...]
    metric: Metric = "box"
    strict: bool | None = None
    clamp: bool = False
    dilation: int | tuple[int, ...] = 1
    unit: int | tuple[int, ...] = 1
    shift: int | tuple[int, ...] = 0
    outside: bool = True
    keys: TokenOrder | None = None
    _q: Tensor = field(init=False, repr=False)
    _k: Tensor = field(init=False, repr=False)
    _radii: tuple[Radius, ...] = field(init=False, repr=False)
    _steps: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.metric not in get_args(Metric):
            raise ValueError(f"metric={self.metric!r}; allowed are {', '.join(map(repr, get_args(Metric)))}")
        axes = len(self.order.grid)
        set_ = object.__setattr__
        if self.keys is not None and self.keys.grid != self.order.grid:
            raise ValueError(f"keys are on the grid {self.keys.grid}, queries on {self.order.grid}")
        set_(self, "strict", self.metric == "euclid" if self.strict is None else self.strict)
        radii = self.radius if isinstance(self.radius, tuple) else (self.radius,) * (1 if self._one else axes)
        if len(radii) != (1 if self._one else axes):
            raise ValueError(f"radius={self.radius!r} must be one number, or one for each of the grid's {axes} axes")
        for r in radii:
            if r is not None and not (isinstance(r, int | float) and math.isfinite(r) and r >= 0):
                raise ValueError(f"radius={self.radius!r} must be 0 or more, or None")
        if self.metric != "box" and radii[0] is None:
            raise ValueError(f"radius=None has no meaning for metric={self.metric!r}")
        set_(self, "_radii", radii)
        for name in ("dilation", "unit"):
            value = getattr(self, name)
            set_(self, name, _sizes(name, (value,) * axes if isinstance(value, int) else value, axes))
        shift = (self.shift,) * axes if isinstance(self.shift, int) else tuple(self.shift)
        if len(shift) != axes:
            raise ValueError(f"shift={self.shift!r} must be one number, or one for each of the grid's {axes} axes")
        set_(self, "shift", shift)
        if self.metric != "box" and (self.clamp or max(self.dilation) > 1):  # type: ignore[arg-type]
            raise ValueError(f"clamp and dilation are for metric='box', not {self.metric!r}")
        if self.clamp and any(r is not None and r != int(r) for r in radii):
            raise ValueError(f"radius={self.radius!r} must be whole where the centre is clamped")
        if self.clamp and self.strict:
            raise ValueError("clamp with strict=True: count the border in the radius instead")
        set_(self, "_steps", torch.tensor(self.dilation))
        set_(self, "_q", self._places(self.order, self.clamp))
        set_(self, "_k", self._places(self.keys or self.order, False))

    @property
    def _one(self) -> bool:
        return self.metric != "box"

    def _places(self, order: TokenOrder, clamp: bool) -> Tensor:
        """int64 `(S, axes)` in units; -1 beside the grid."""
        at, outside = order.coordinates, order.coordinates[:, :1] < 0
        sizes = torch.tensor(order.grid)
        if self.metric == "band":
            strides = torch.tensor([math.prod(order.grid[i + 1 :]) for i in range(len(order.grid))])
            return (at * strides).sum(1, keepdim=True).masked_fill(outside, -1)
        unit, shift = torch.tensor(self.unit), torch.tensor(self.shift)
        at = torch.div(at + shift, unit, rounding_mode="floor")
        at = at - torch.div(shift, unit, rounding_mode="floor")
        if clamp:
            blocks = (
                torch.div(sizes - 1 + shift, unit, rounding_mode="floor")
                - torch.div(shift, unit, rounding_mode="floor")
                + 1
            )
            residue, index = at % self._steps, torch.div(at, self._steps, rounding_mode="floor")
            count = torch.div(blocks - residue + self._steps - 1, self._steps, rounding_mode="floor")
            for axis, r in enumerate(self._radii):
                if r is not None:
                    last = (count[:, axis] - 1 - int(r)).clamp(min=int(r))
                    index[:, axis] = torch.minimum(index[:, axis].clamp(min=int(r)), last)
            # A grid smaller than the window: every centre is in its middle, and all of the grid is near.
            at = index * self._steps + residue
        return at.masked_fill(outside, -1)

    def check(self, sq: int, sk: int) -> None:
        """The tokens are those of the grid."""
        for name, order, tokens in (("queries", self.order, sq), ("keys", self.keys or self.order, sk)):
            if order.tokens != tokens:
                beside = f" and {order.prefix + order.suffix} beside it" if order.prefix + order.suffix else ""
                raise ValueError(
                    f"the window's grid {order.grid}{beside} has {order.tokens} tokens; there are {tokens} {name}"
                )

    def to(self, device: torch.device) -> Rule:
        """A copy whose coordinates are on the device."""
        if self._q.device == device:
            return self
        moved = object.__new__(GridWindow)
        moved.__dict__.update(self.__dict__)
        for name in ("_q", "_k", "_steps"):
            object.__setattr__(moved, name, getattr(self, name).to(device))
        return moved

    def _within(self, distance: Tensor, radius: float) -> Tensor:
        return distance < radius if self.strict else distance <= radius

    def classify(self, rows: Tensor, columns: Tensor) -> Tensor:
        """From the boxes around each tile's tokens."""
        q, k = self._q[rows], self._k[columns]  # (M, bm, axes), (N, bn, axes)
        q_out, k_out = (q < 0).any(2), (k < 0).any(2)
        low = torch.iinfo(torch.int64).max // 4
        q_min, q_max = q.masked_fill(q_out[..., None], low).amin(1), q.masked_fill(q_out[..., None], -low).amax(1)
        k_min, k_max = k.masked_fill(k_out[..., None], low).amin(1), k.masked_fill(k_out[..., None], -low).amax(1)
        least = torch.maximum(q_min[:, None] - k_max, k_min - q_max[:, None]).clamp(min=0)  # (M, N, axes)
        most = torch.maximum(q_max[:, None] - k_min, k_max - q_min[:, None]).abs()
        if self.metric == "euclid":
            radius = self._radii[0]
            assert radius is not None
            some = self._within((least.double() ** 2).sum(2), radius**2)
            every = self._within((most.double() ** 2).sum(2), radius**2)
        else:
            some = torch.ones(least.shape[:2], dtype=torch.bool, device=rows.device)
            every = some.clone()
            for axis, radius in enumerate(self._radii):
                if radius is not None:
                    reach = radius * self.dilation[axis]  # type: ignore[index]
                    some &= self._within(least[..., axis], reach)
                    every &= self._within(most[..., axis], reach)
            if max(self.dilation) > 1:  # type: ignore[arg-type]
                every = torch.zeros_like(every)
        result = torch.where(every, ALL, torch.where(some, SOME, NONE))
        beside = q_out.any(1)[:, None] | k_out.any(1)
        wholly = q_out.all(1)[:, None] | k_out.all(1)
        result = torch.where(wholly, ALL if self.outside else NONE, torch.where(beside, SOME, result))
        return result.to(torch.int8)[None, None]

    def keep(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Exactly."""
        q, k = self._q[rows][:, :, None], self._k[columns][:, None]  # (T, bm, 1, axes), (T, 1, bn, axes)
        d = (q - k).abs()
        if self.metric == "euclid":
            radius = self._radii[0]
            assert radius is not None
            near = self._within((d * d).sum(3), radius**2)
        else:
            near = torch.ones(d.shape[:3], dtype=torch.bool, device=rows.device)
            for axis, radius in enumerate(self._radii):
                if radius is not None:
                    near &= self._within(d[..., axis], radius * self.dilation[axis])  # type: ignore[index]
            if max(self.dilation) > 1:  # type: ignore[arg-type]
                near &= (d % self._steps == 0).all(3)
        beside = (q < 0).any(3) | (k < 0).any(3)
        return torch.where(beside, torch.tensor(self.outside, device=rows.device), near)[None, None]
